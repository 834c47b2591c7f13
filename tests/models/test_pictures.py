"""A picture goes through the tower once, and the model says what it said before."""

import copy

import pytest
import torch
from PIL import Image

from tests.support.tiny import PROMPTS, tiny_llava
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.pictures import remember_pictures

PICTURES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]


@pytest.fixture
def vlm():
    return tiny_llava()


@pytest.fixture
def encoded(vlm):
    """How many pictures each call of the tower itself encoded."""
    rows = []
    tower = anatomy.tower(vlm.model)
    original = tower.forward

    def counted(pixel_values, **options):
        rows.append(len(pixel_values))
        return original(pixel_values, **options)

    tower.forward = counted
    remember_pictures(vlm)
    return rows


def logits(vlm, numbers):
    batch = vlm.batch([PICTURES[number] for number in numbers], PROMPTS[: len(numbers)])
    return vlm.forward(batch).logits


def test_each_picture_is_encoded_once_and_nothing_else_changes(vlm, encoded):
    plain = tiny_llava()
    for numbers in ([0, 1, 0], [1, 2], [2, 2, 0, 1]):
        torch.testing.assert_close(logits(vlm, numbers), logits(plain, numbers))
    assert encoded == [2, 1]


def test_pictures_beyond_the_number_are_encoded_anew(vlm, encoded):
    remember_pictures(vlm, max_pictures=1)
    logits(vlm, [0, 1])
    logits(vlm, [1])
    logits(vlm, [0])
    assert encoded == [2, 1]


def test_a_tower_whose_weights_changed_encodes_anew(vlm, encoded):
    before = logits(vlm, [0])
    with torch.no_grad():
        next(anatomy.tower(vlm.model).parameters()).mul_(2.0)
    assert not torch.allclose(logits(vlm, [0]), before)
    assert encoded == [1, 1]


def test_gradients_and_hooks_see_the_tower_itself(vlm, encoded):
    tower = anatomy.tower(vlm.model)
    logits(vlm, [0])
    batch = vlm.batch(PICTURES[:1], PROMPTS[:1])
    vlm.model.requires_grad_(True)
    vlm.model(**batch).logits.sum().backward()
    assert any(weight.grad is not None for weight in tower.parameters())
    inner = [module for module in tower.modules() if isinstance(module, torch.nn.Linear)][0]
    with inner.register_forward_hook(lambda module, args, output: 0 * output):
        changed = logits(vlm, [0])
    assert not torch.allclose(changed, logits(vlm, [0]))
    assert encoded == [1, 1, 1]


def test_a_copy_of_the_model_has_a_tower_of_its_own(vlm):
    remember_pictures(vlm)
    logits(vlm, [0])
    other = copy.deepcopy(vlm.model)
    tower = anatomy.tower(other)
    with torch.no_grad():
        for weight in tower.parameters():
            weight.zero_()
    pixels = vlm.batch(PICTURES[:1], PROMPTS[:1])["pixel_values"]
    with torch.no_grad():
        assert not tower(pixels).last_hidden_state.any()
        assert anatomy.tower(vlm.model)(pixels).last_hidden_state.any()
