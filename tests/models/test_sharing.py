"""Texts about one picture: the picture runs once, and every answer is that of the whole prompt."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import tiny_llava
from xlvlms_tutorial import interventions
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions.token_skipping import skip_tokens
from xlvlms_tutorial.models.sharing import by_picture, greedy, shareable

TEXTS = [
    "What colour is the key ?",
    "Is there a woman in the picture ?",
    "Describe the picture .",
    "What is the key ?",
    "Is there a key ?",
]


@pytest.fixture
def pictures():
    return [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]


@pytest.fixture
def forwards(monkeypatch):
    """A model with the number of rows and positions of each call
    of its vision tower and decoder.
    """
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
    head = vlm.model.lm_head.register_forward_hook(
        lambda module, args, logits: calls.append(logits[:, -1])
    )
    vlm.generate_ids(batch, 1)
    vlm._generate_shared(batch, images, 1)
    head.remove()
    whole_prompts, _, shared = calls  # the second is that of the pictures
    assert torch.allclose(whole_prompts, shared, atol=1e-5)


@pytest.mark.parametrize("scope", ["prefill", "decode", "both"])
@pytest.mark.parametrize("part", ["block", "mlp", "attention"])
def test_skipping_gives_the_same_answers_in_two_parts(forwards, pictures, part, scope):
    vlm, rows = forwards
    images = [pictures[0], pictures[1], pictures[0], pictures[1], pictures[0]]
    with interventions.skip(vlm, 2, part=part, scope=scope):
        expected = whole(vlm, images, TEXTS)
        assert vlm.generate(images, TEXTS, 6) == expected
    assert rows == [5, 2]


def test_what_depends_on_positions_runs_whole(forwards, pictures):
    vlm, rows = forwards
    images = [pictures[0]] * 3
    vector = torch.full((vlm.width,), 3.0)
    with interventions.add(vlm, vector, 1, positions="image"):
        assert not shareable(vlm.model, vlm.active)
        assert vlm.generate(images, TEXTS[:3], 6) == whole(vlm, images, TEXTS[:3])
    with skip_tokens(vlm, 1, span="image"):
        assert not shareable(vlm.model, vlm.active)
    hook = vlm.model.register_forward_hook(lambda *_: None)
    assert not shareable(vlm.model, vlm.active)
    hook.remove()
    assert shareable(vlm.model, vlm.active)
    assert rows == [3, 3]


def test_other_architectures_run_whole(forwards):
    vlm, _ = forwards
    vlm.model.config.model_type = "llava_next"
    assert not shareable(vlm.model, vlm.active)


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
    with pytest.raises(InputError, match="2 texts"):
        tiny_llava().generate(pictures[:1] * n, TEXTS[:2])


# Greedy, whatever a folder says

SETTINGS = {
    "num_beams": 4,
    "num_return_sequences": 3,
    "num_beam_groups": 2,
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 1,
    "penalty_alpha": 0.6,
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "min_length": 40,
    "min_new_tokens": 8,
    "max_length": 3,
    "max_time": 0.0,
    "stop_strings": ["red"],
    "bad_words_ids": [[11]],
    "sequence_bias": [[[8], 9.0]],
    "guidance_scale": 3.0,
    "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": (1, 3.0),
    "prompt_lookup_num_tokens": 3,
    "use_cache": False,
    "cache_implementation": "static",
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_hidden_states": True,
    "renormalize_logits": True,
    "token_healing": True,
}


def lively(seed: int = 3):
    torch.manual_seed(seed)
    vlm = tiny_llava(layers=4)
    for weight in vlm.model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.35)
    return vlm


def noisy(n: int) -> list[Image.Image]:
    return [
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (32, 32, 3), dtype=np.uint8))
        for k in range(n)
    ]


def by_argmax(vlm, picture, text, n):
    """The most probable token at each step, from whole forwards without a cache."""
    batch = dict(vlm.batch([picture], [text]))
    ids = []
    for _ in range(n):
        with torch.no_grad():
            logits = vlm.model(**batch).logits[0, -1]
        logits[vlm.model.generation_config.suppress_tokens] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == vlm.model.generation_config.eos_token_id:
            break
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids[-1:]])], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("setting", SETTINGS)
def test_answers_are_greedy_whatever_the_folder_says(setting):
    vlm, images = lively(), noisy(3)
    expected = [by_argmax(vlm, image, text, 6) for image, text in zip(images, TEXTS, strict=False)]
    setattr(vlm.model.generation_config, setting, SETTINGS[setting])
    assert vlm.generate(images, TEXTS[:3], 6) == expected
    assert vlm.generate_ids(vlm.batch(images, TEXTS[:3]), 6).shape[0] == 3
    # it stays the model's own
    assert getattr(vlm.model.generation_config, setting) == SETTINGS[setting]


def test_what_a_call_asks_for_is_done():
    vlm = lively()
    batch = vlm.batch(noisy(2), TEXTS[:2])
    vlm.model.generation_config.num_beams = 3
    assert vlm.generate_ids(batch, 4, num_beams=2, num_return_sequences=2).shape[0] == 4
    assert torch.equal(
        vlm.generate_ids(batch, 4, return_dict_in_generate=True), vlm.generate_ids(batch, 4)
    )


def test_the_models_settings_are_back_even_after_an_error():
    vlm = lively()
    config = vlm.model.generation_config
    with pytest.raises(RuntimeError, match="planted"), greedy(vlm.model):
        assert vlm.model.generation_config is not config
        assert vlm.model.generation_config.suppress_tokens == config.suppress_tokens
        raise RuntimeError("planted")
    assert vlm.model.generation_config is config


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "part",
    ["one weight of the head", "the head", "a query", "the tower", "an embedding that is said"],
)
def test_logits_that_are_no_numbers_are_told(part, value):
    vlm, image = lively(), noisy(1)
    first = vlm.generate_ids(vlm.batch(image, TEXTS[:1]), 1)[0, 0]
    weight, index = {
        "one weight of the head": (vlm.model.lm_head.weight, (5, 3)),
        "the head": (vlm.model.lm_head.weight, slice(None)),
        "a query": (vlm.blocks[2].self_attn.q_proj.weight, (0, 0)),
        "the tower": (vlm.model.model.vision_tower.encoder.layers[0].mlp.fc1.weight, slice(None)),
        "an embedding that is said": (vlm.model.get_input_embeddings().weight, first),
    }[part]
    weight.data[index] = value
    with pytest.raises(
        InputError, match="logits of the next token are NaN or infinite.*check its weights"
    ):
        vlm.generate(image, TEXTS[:1], 4)
    with pytest.raises(InputError):
        vlm.generate(image * 2, [TEXTS[0]] * 2, 4)  # the picture runs once
