"""The front and the barrier against closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.merging import above_chord, loss_barrier

WEIGHTS = np.linspace(0, 1, 11)


@given(arrays(float, 2, elements=st.floats(-1, 1)))
def test_scores_that_mix_as_weights_do_lie_on_the_chord(ends):
    scores = (1 - WEIGHTS) * ends[0] + WEIGHTS * ends[1]
    assert abs(above_chord(scores, WEIGHTS)) < 1e-12
    assert abs(loss_barrier(scores, WEIGHTS)) < 1e-12


def test_a_parabola_has_a_sixth_above_its_chord():
    weights = np.linspace(0, 1, 2001)
    assert above_chord(weights * (1 - weights), weights) == pytest.approx(1 / 6, abs=1e-6)
    assert loss_barrier(weights * (1 - weights), weights) == pytest.approx(1 / 4, abs=1e-6)


def test_tasks_and_seeds_are_leading_axes():
    scores = np.random.default_rng(0).random((2, 3, 11))
    areas, barriers = above_chord(scores, WEIGHTS), loss_barrier(scores, WEIGHTS)
    assert areas.shape == barriers.shape == (2, 3)
    assert areas[1, 2] == pytest.approx(above_chord(scores[1, 2], WEIGHTS))
    assert barriers[1, 2] == pytest.approx(loss_barrier(scores[1, 2], WEIGHTS))


def test_uneven_weights_count_by_their_distance():
    assert above_chord([0, 1, 0], [0, 0.9, 1]) == pytest.approx(0.5)


@pytest.mark.parametrize("weights", [[0, 0.5], [0.1, 1, 2], [0, 0, 1], [1, 0.5, 0], [[0, 0.5, 1]]])
@pytest.mark.parametrize("measure", [above_chord, loss_barrier])
def test_weights_that_are_no_way_between_two_experts_are_refused(measure, weights):
    with pytest.raises(InputError):
        measure([0.0, 1.0, 0.0], weights)


@pytest.mark.parametrize("measure", [above_chord, loss_barrier])
def test_a_value_that_is_not_finite_gives_no_number(measure):
    with pytest.raises(InputError, match="not finite"):
        measure([0, float("nan"), 1], [0, 0.5, 1])
