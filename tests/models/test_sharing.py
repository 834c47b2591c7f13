"""Texts about one picture: the picture runs once, and every answer is that of the whole prompt."""

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_llava
from xlvlms_tutorial.errors import PromptError
from xlvlms_tutorial.models.sharing import by_picture, generate_shared, shareable
from xlvlms_tutorial.states import intervene
from xlvlms_tutorial.states.partial import skip_mlp_tokens

TEXTS = ["What colour is the key ?", "Is there a woman in the picture ?", "Describe the picture .", "What is the key ?", "Is there a key ?"]


@pytest.fixture
def pictures():
    return [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]


@pytest.fixture
def forwards(monkeypatch):
    """A model with the number of rows and positions of each call of its vision tower and decoder."""
    vlm, rows = tiny_llava(), []
    tower = vlm.model.model.vision_tower
    original = tower.forward

    def counted(pixel_values, *args, **kwargs):
        rows.append(len(pixel_values))
        return original(pixel_values, *args, **kwargs)

    monkeypatch.setattr(tower, "forward", counted)
    return vlm, rows


def whole(vlm, images, texts):
    """The answers of prompts that share no picture: every one has a copy of its own."""
    return vlm.generate([image.copy() for image in images], texts, 6)


def test_pictures_run_once_and_answers_are_those_of_whole_prompts(forwards, pictures):
    vlm, rows = forwards
    red, blue = pictures
    images = [red, blue, red, red, blue]
    expected = whole(vlm, images, TEXTS)
    assert rows == [5]
    assert vlm.generate(images, TEXTS, 6) == expected
    assert rows == [5, 2]
    assert vlm.generate(images, TEXTS, 6, batch_size=2) == expected


def test_logits_agree_with_those_of_whole_prompts(pictures):
    vlm = tiny_llava(seed=1)
    images = [pictures[0], pictures[1], pictures[0]]
    batch = vlm.batch(images, TEXTS[:3])
    calls = []
    head = vlm.model.lm_head.register_forward_hook(lambda module, args, logits: calls.append(logits[:, -1]))
    vlm.generate_ids(batch, 1)
    generate_shared(vlm, batch, images, 1)
    head.remove()
    whole_prompts, _, shared = calls  # the second is that of the pictures
    assert torch.allclose(whole_prompts, shared, atol=1e-5)


@pytest.mark.parametrize("scope", ["prefill", "decode", "both"])
@pytest.mark.parametrize("part", ["block", "mlp", "attention"])
def test_skipping_gives_the_same_answers_in_two_parts(forwards, pictures, part, scope):
    vlm, rows = forwards
    images = [pictures[0], pictures[1], pictures[0], pictures[1], pictures[0]]
    with intervene.skip(vlm, 2, part=part, scope=scope):
        expected = whole(vlm, images, TEXTS)
        assert vlm.generate(images, TEXTS, 6) == expected
    assert rows == [5, 2]


def test_what_depends_on_positions_runs_whole(forwards, pictures):
    vlm, rows = forwards
    images = [pictures[0]] * 3
    vector = torch.full((vlm.width,), 3.0)
    with intervene.add(vlm, vector, 1, positions="image"):
        assert not shareable(vlm)
        assert vlm.generate(images, TEXTS[:3], 6) == whole(vlm, images, TEXTS[:3])
    with skip_mlp_tokens(vlm, 1, span="image"):
        assert not shareable(vlm)
    hook = vlm.model.register_forward_hook(lambda *_: None)
    assert not shareable(vlm)
    hook.remove()
    assert shareable(vlm)
    assert rows == [3, 3]


def test_other_architectures_run_whole(forwards):
    vlm, _ = forwards
    vlm.model.config.model_type = "llava_next"
    assert not shareable(vlm)


def test_prompts_of_one_length_and_equal_prompts_are_kept_apart(forwards, pictures):
    vlm, _ = forwards
    images = [pictures[0]] * 2
    assert vlm.generate(images, [TEXTS[0]] * 2, 6) == whole(vlm, images, [TEXTS[0]] * 2)


def test_texts_about_a_picture_stand_together_and_no_text_is_lost(pictures):
    red, blue = pictures
    assert list(by_picture([red, blue, red, blue, red], 2)) == [[0, 2], [4, 1], [3]]
    assert list(by_picture([None] * 3, 2)) == [[0, 1], [2]]


@pytest.mark.parametrize("n", [1, 3])
def test_pictures_and_texts_must_be_equally_many(pictures, n):
    with pytest.raises(PromptError, match="2 texts"):
        tiny_llava().generate(pictures[:1] * n, TEXTS[:2])
