"""The tiny models on disk.

Genuine classes that load, speak in the world's words, and differ from picture to picture.
"""

import json
import re
from collections import Counter

import pytest
import torch
import transformers as hf

from tests.support import tiny_disk
from tests.support.tiny_disk import (
    GRID,
    KINDS,
    LAYERS,
    WIDTH,
    at_hand,
    small_coco,
    small_samples,
    tokenizer,
)
from xlvlms_tutorial import load
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.pocket import world

CLASSES = {
    "llava": hf.LlavaForConditionalGeneration,
    "qwen2-vl": hf.Qwen2VLForConditionalGeneration,
}
N = 48


@pytest.fixture(scope="module", params=KINDS)
def vlm(request) -> VLM:
    """Loaded from its folder as a hub model would be."""
    return load(at_hand(request.param), offline=True)


@pytest.fixture(scope="module")
def captions(vlm) -> list[str]:
    """What it says of test scenes."""
    return vlm.generate(
        [sample.image for sample in small_samples(N)], ["Describe the picture."] * N
    )


def test_it_is_of_the_genuine_class_and_tiny(vlm):
    assert type(vlm.model) in CLASSES.values()
    assert (vlm.n_layers, vlm.width) == (LAYERS, WIDTH)
    text = vlm.model.config.get_text_config(decoder=True)
    assert text.num_key_value_heads < text.num_attention_heads
    assert sum(weight.numel() for weight in vlm.model.parameters()) < 1e6


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_the_world_are_one_token_in_a_sentence_and_at_its_start(kind):
    words = tokenizer(kind)
    for word in (
        *world.SUBJECTS,
        *world.ITEMS,
        *world.PLACES,
        *world.COLOURS,
        "yes",
        "no",
        "three",
        "bushes",
        "left",
        "7",
    ):
        for form in (word, word.capitalize(), f" {word}"):
            assert len(words(form, add_special_tokens=False).input_ids) == 1, form
    for text in ("A man is in the snow, next to two red keys.", "Zebras? In 1987: naïve!"):
        assert words.decode(words(text, add_special_tokens=False).input_ids) == text


def test_captions_are_text_with_the_words_of_the_world(captions):
    counts = Counter(
        word for caption in captions for word in set(re.findall(r"\w+", caption.lower()))
    )
    assert all(re.fullmatch(r"[A-Z][a-z ,]+\.", caption) for caption in captions), captions
    assert len(set(captions)) >= 12
    for words, minimum in (
        (world.SUBJECTS, 4),
        (world.PLACES, 4),
        (("key", "keys", "gem", "gems", "flag", "flags", "rocks", "rock"), 2),
    ):
        assert len(counts.keys() & set(words)) >= minimum, counts
    assert counts.keys() & {"woman", "man"}


def test_places_are_seen(captions):
    correct = [
        sample.truth["place"] in caption.split() or f"{sample.truth['place']}." in caption.split()
        for sample, caption in zip(small_samples(N), captions, strict=True)
    ]
    assert sum(correct) > N / 2


def test_answers_are_words_and_not_all_the_same(vlm):
    asked_questions = [
        (sample.image, question) for sample in small_samples(16) for question in sample.questions
    ]
    texts = vlm.generate(
        [image for image, _ in asked_questions],
        [question.text for _, question in asked_questions],
        max_new_tokens=4,
    )
    assert len(set(texts)) >= 5
    assert (
        sum(
            answer == question.answer
            for answer, (_, question) in zip(texts, asked_questions, strict=True)
        )
        > len(asked_questions) / 5
    )


def test_pictures_of_any_square_size_give_one_grid(vlm):
    images = [
        sample.image.resize((side, side))
        for sample, side in zip(small_samples(3), (64, 100, 256), strict=True)
    ]
    spans = vlm.spans(
        images, ["Describe the picture."] * 3, ["A man.", "A bee on the sand.", "A key."]
    )
    assert spans[spans["span"] == "image"].groupby("sample").size().tolist() == [GRID**2] * 3
    answer = spans[spans["span"] == "answer"].groupby("sample")["token"].agg("".join)
    assert answer.str.strip().tolist() == ["A man.", "A bee on the sand.", "A key."]


def test_a_given_answer_is_read_as_the_one_that_is_generated(vlm):
    sample = small_samples(1)
    ids = vlm.generate_ids(vlm.batch([sample[0].image], ["Describe the picture."]), 24)[0].tolist()
    answer_ids = ids[: ids.index(vlm.tokenizer.eos_token_id)]
    batch = vlm.batch(
        [sample[0].image], ["Describe the picture."], [vlm.tokenizer.decode(answer_ids).strip()]
    )
    assert batch["input_ids"][batch.mask("answer")].tolist() == answer_ids


def test_states_are_captured_at_words_and_pictures(vlm, captions):
    samples = small_samples(N)
    states = capture(vlm, samples, "all", span="image")
    assert states[LAYERS].shape == (N, WIDTH)
    people = capture(vlm, samples, LAYERS, words=list(world.SUBJECTS), max_new_tokens=24)
    assert len(people) > N / 2
    assert torch.isfinite(people[LAYERS]).all()


def test_the_folder_of_pictures_reads_as_samples(tmp_path):
    folder = small_coco(tmp_path / "coco", n=6)
    samples = load_samples(str(folder), n=6)
    assert {sample.captions for sample in samples} == {
        sample.captions for sample in small_samples(6)
    }
    assert {sample.image.size for sample in samples} == {(64, 64)}
    assert len(json.loads((folder / "instances.json").read_text())["images"]) == 6


def test_what_is_there_is_left_and_what_fails_is_absent(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    assert small_coco(tmp_path / "there") == tmp_path / "there"
    assert list((tmp_path / "there").iterdir()) == []

    def fails(samples, folder):
        folder.mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr(tiny_disk, "write_coco", fails)
    with pytest.raises(OSError, match="no space"):
        small_coco(tmp_path / "absent")
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {
        "there"
    }
