"""Watching modules: what they get, give and are called with, seen and not
changed, and nothing left behind.
"""

import doctest

import pytest
import torch
from torch import nn

from xlvlms_tutorial.models import watching
from xlvlms_tutorial.models.watching import on_input, on_output, record_calls


class Block(nn.Module):
    """Doubles its states, and returns them alone or in a tuple."""

    def __init__(self, in_tuple):
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, hidden_states, scale=2):
        made = scale * hidden_states
        return (made, None) if self.in_tuple else made


def hooks_left(module):
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


@pytest.mark.parametrize("in_tuple", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_states_are_seen_as_they_come_and_go(in_tuple, by_name):
    block, got, given = Block(in_tuple), [], []
    states = torch.ones(1, 2)
    with on_input(block, got.append), on_output(block, given.append):
        output = block(hidden_states=states) if by_name else block(states)
    assert got[0] is states and torch.equal(given[0], 2 * states)
    assert isinstance(output, tuple) == in_tuple and hooks_left(block) == 0


def test_the_handle_removes_itself_when_asked_too():
    block, got = Block(False), []
    handle = on_input(block, got.append)
    block(torch.ones(1))
    handle.remove()
    block(torch.ones(1))
    assert len(got) == 1 and hooks_left(block) == 0


@pytest.mark.parametrize(("prepend", "expected"), [(True, 2.0), (False, 5.0)])
def test_what_a_module_gives_is_seen_before_or_after_other_hooks(prepend, expected):
    block, given = Block(False), []
    with (
        block.register_forward_hook(lambda module, args, output: output + 3),
        on_output(block, given.append, prepend=prepend),
    ):
        block(torch.ones(1))
    assert given[0].item() == expected


def test_calls_are_kept_in_order_as_other_hooks_leave_them():
    block = Block(False)
    with (
        block.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        record_calls(block) as calls,
    ):
        block(torch.zeros(1))
        block(torch.ones(1), scale=3)
    assert [(args[0].item(), kwargs) for args, kwargs in calls] == [(1, {}), (2, {"scale": 3})]
    assert hooks_left(block) == 0


def test_an_error_inside_leaves_no_hook_and_keeps_the_call():
    block = Block(False)
    with pytest.raises(TypeError), record_calls(block) as calls:
        block("not states", scale=None)
    assert calls == [(("not states",), {"scale": None})] and hooks_left(block) == 0


def test_examples_run():
    failed, attempted = doctest.testmod(watching)
    assert failed == 0 and attempted > 0
