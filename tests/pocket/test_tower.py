"""The tower sees each picture once, and again whenever anything but the picture counts."""

import pytest
import torch
from torch import nn

from xlvlms_tutorial.memory import measuring
from xlvlms_tutorial.pocket import tower as towers
from xlvlms_tutorial.pocket.tower import PATCHES, Tower, TowerConfig


@pytest.fixture
def seen(monkeypatch):
    """The numbers of pictures that were really encoded, pass by pass."""
    monkeypatch.setattr(towers, "_SEEN", towers.Memory(8))
    counts = []
    encode = Tower._all

    def counted(tower, pictures):
        counts.append(len(pictures))
        return encode(tower, pictures)

    monkeypatch.setattr(Tower, "_all", counted)
    return counts


def small():
    """A tower of raw patches: 8 x 8 pictures, 2 x 2 tokens of 3 numbers."""
    config = TowerConfig(PATCHES, image_size=8, grid=2, hidden_size=3)
    return Tower(config).eval().requires_grad_(False)


PICTURES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_picture_is_encoded_once_whatever_stands_beside_it(seen):
    tower = small()
    first = tower(PICTURES[[0, 1, 0]]).last_hidden_state
    again = tower(PICTURES[[2, 1]]).last_hidden_state
    assert seen == [2, 1]
    assert torch.equal(first[0], first[2])
    assert torch.equal(again[1], first[1])
    with measuring():
        expected = tower(PICTURES).last_hidden_state
    assert seen == [2, 1, 3]
    assert torch.equal(torch.stack([first[0], first[1], again[0]]), expected)


def test_models_of_one_tower_share_what_they_have_seen_and_others_do_not(seen):
    first = small()
    first(PICTURES)
    small()(PICTURES)
    assert seen == [3]
    changed = small()
    changed.mean.fill_(0.5)
    outputs = changed(PICTURES).last_hidden_state
    assert seen == [3, 3]
    torch.testing.assert_close(outputs, first(PICTURES).last_hidden_state - 0.5)


def test_weights_that_change_behind_the_back_of_autograd_count(seen):
    tower = small()
    before = tower(PICTURES).last_hidden_state
    tower.std.data.mul_(2)
    torch.testing.assert_close(tower(PICTURES).last_hidden_state, before / 2)


def test_what_was_given_out_may_be_changed(seen):
    tower = small()
    outputs = tower(PICTURES).last_hidden_state
    expected = outputs.clone()
    outputs.zero_()
    tower(PICTURES).last_hidden_state.zero_()
    assert torch.equal(tower(PICTURES).last_hidden_state, expected)


def test_hooks_training_and_gradients_see_every_picture(seen):
    tower = small()
    tower(PICTURES)
    calls = []
    hook = tower.net.register_forward_hook(lambda *_: calls.append(1))
    tower(PICTURES)
    hook.remove()
    tower.train()(PICTURES)
    tower.eval()
    wanted = PICTURES.clone().requires_grad_(True)
    tower(wanted).last_hidden_state.sum().backward()
    assert seen == [3, 3, 3, 3]
    assert wanted.grad.abs().sum() > 0
    assert isinstance(tower.net, nn.Identity)
