"""What is remembered is what was kept, the latest of it, and nothing while work is measured."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from xlvlms_tutorial.memory import Memory, fingerprint, measuring


def test_the_results_that_were_asked_for_last_stay():
    memory = Memory(2)
    for number in range(2):
        memory.keep(number, torch.tensor(number))
    assert memory.recall(0) == 0  # so that 1 was not asked for longest
    memory.keep(2, torch.tensor(2))
    assert memory.recall(1) is None
    assert (memory.recall(0), memory.recall(2)) == (0, 2)


def test_nothing_is_recalled_or_kept_while_work_is_measured():
    memory = Memory(2)
    memory.keep("before", torch.tensor(1))
    with measuring():
        assert memory.recall("before") is None
        memory.keep("inside", torch.tensor(2))
    assert memory.recall("before") == 1
    assert memory.recall("inside") is None


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=6), st.integers(0, 5))
def test_a_fingerprint_is_that_of_shape_dtype_and_values(values, place):
    tensor = torch.tensor(values, dtype=torch.float32)
    changed = tensor.clone()
    changed[place % len(values)] += 1
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    others = [changed, tensor[None], tensor.double(), torch.cat([tensor, tensor])]
    assert fingerprint(tensor) not in [fingerprint(each) for each in others]
    grid = tensor.expand(3, -1).t()  # strides do not matter
    assert fingerprint(grid) == fingerprint(grid.contiguous())
