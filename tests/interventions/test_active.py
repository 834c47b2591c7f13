"""What is active is told while it lasts, in the order of entry, and with what it was made of."""

import pytest
import torch

from tests.support.tiny import tiny_llava
from xlvlms_tutorial import interventions


def doubled(states):
    return 2 * states


@pytest.fixture(scope="module")
def vlm():
    return tiny_llava()


def test_interventions_are_told_while_they_last(vlm):
    with (
        interventions.skip(vlm, 2, part="mlp"),
        interventions.add(vlm, torch.ones(32), 1, strength=2),
    ):
        skipped, added = vlm.active
    assert skipped == "skip(layers=2, part='mlp', scope='both', cache='own')"
    assert added.startswith("add(vector=torch.float32 [32] ")
    assert "strength=2, positions='all', gate=None" in added
    assert vlm.active == []


def test_vectors_are_told_apart_and_equal_ones_are_the_same(vlm):
    descriptions = []
    for value in (1.0, 2.0, 1.0):
        with interventions.add(vlm, torch.full((32,), value), 1):
            descriptions += vlm.active
    assert descriptions[0] == descriptions[2] != descriptions[1]


def test_functions_and_masks_have_names(vlm):
    name = "model.language_model.layers.0.mlp.down_proj"
    mask = torch.ones(32, 64, dtype=torch.bool)
    with interventions.edit(vlm, doubled, 1), interventions.mask_weights(vlm, {name: mask}):
        edited, masked = vlm.active
    assert "change=doubled" in edited
    assert f"{{{name}: torch.bool [32, 64] " in masked


def test_nothing_stays_after_an_error_or_a_refusal(vlm):
    with pytest.raises(RuntimeError, match="planted"), interventions.skip(vlm, 1):
        raise RuntimeError("planted")
    with pytest.raises(IndexError), interventions.skip(vlm, 9):
        pass
    assert vlm.active == []
