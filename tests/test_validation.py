"""The checks of arguments: what passes, and the words of what does not."""

import numpy as np
import pytest

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.validation import (
    require,
    require_counts,
    require_equal,
    require_one_of,
    require_same_length,
)


def test_what_does_not_hold_is_refused_with_the_problem_and_the_advice():
    require(np.True_, "too large", "give less")
    with pytest.raises(InputError, match="^too large; give less.$"):
        require(np.False_, "too large", "give less")


def test_things_that_belong_together_are_equal():
    require_equal("shapes", (2, 3), (2, 3), "give equal ones")
    with pytest.raises(InputError, match=r"^shapes differ: \(2,\) and \(3,\); give equal ones"):
        require_equal("shapes", (2,), (3,), "give equal ones")


def test_a_value_that_is_not_allowed_is_named_with_all_that_are():
    require_one_of("b", iter(("a", "b")), "mode")
    with pytest.raises(InputError, match="^unknown mode 'c'; allowed: 'a', 'b'.$"):
        require_one_of("c", iter(("a", "b")), "mode")


@pytest.mark.parametrize("number", [0, -1, 1.0, "3", float("nan")])
def test_a_count_is_an_integer_of_one_or_more(number):
    require_counts(steps=1, batch_size=np.int64(3), rank=None)
    with pytest.raises(InputError, match=f"^rank is {number}; give at least 1.$"):
        require_counts(steps=1, rank=number)


def test_lists_that_differ_in_length_are_named_with_their_lengths():
    require_same_length(a=[1, 2], b=np.zeros(2), c=2, d=None)
    require_same_length(a=None)
    with pytest.raises(InputError, match=r"\(a: 2, b: 0\)"):
        require_same_length(a=[1, 2], b=[], c=None)
