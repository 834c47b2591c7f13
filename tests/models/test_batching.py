"""Batches of samples, prompts and answers."""

import pytest
import torch

from xlvlms_tutorial import load, load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.models import batches
from xlvlms_tutorial.models.batching import with_eos
from xlvlms_tutorial.samples import PROMPTS

SAMPLES = load_samples("scenes", n=5)
CAPTIONS = [sample.captions[0] for sample in SAMPLES]


@pytest.fixture(scope="module")
def vlm():
    return load("pocket-llava")


def same(batch, expected):
    return batch.keys() == expected.keys() and all(
        torch.equal(batch[name], expected[name]) for name in batch
    )


@pytest.mark.parametrize(
    ("prompts", "answers"),
    [
        ("Where is it?", CAPTIONS),
        (["Where is it?"] * 5, lambda sample: sample.captions[0]),
        (lambda sample: "Where is it?", CAPTIONS),
    ],
)
def test_batches_are_those_of_the_samples_in_their_order(vlm, prompts, answers):
    first, second, third = batches(vlm, SAMPLES, prompts, answers, batch_size=2)
    assert same(first, vlm.batch_of(SAMPLES[:2], ["Where is it?"] * 2, CAPTIONS[:2]))
    assert same(second, vlm.batch_of(SAMPLES[2:4], ["Where is it?"] * 2, CAPTIONS[2:4]))
    assert same(third, vlm.batch_of(SAMPLES[4:], ["Where is it?"], CAPTIONS[4:]))


def test_without_prompts_samples_are_to_be_described(vlm):
    (batch,) = batches(vlm, SAMPLES)
    assert same(batch, vlm.batch_of(SAMPLES, [PROMPTS["image"]] * 5))


def test_plain_texts_are_read_as_they_are(vlm):
    texts = ["A red ball lies on the grass.", "Snow."]
    (batch,) = batches(vlm, texts)
    assert same(batch, vlm.prepare(vlm.tokenizer(texts, return_tensors="pt", padding=True)))


def test_a_batch_is_made_when_it_is_asked_for_and_everything_is_checked_before(vlm, monkeypatch):
    made, batch_of = [], vlm.batch_of

    def counted(samples, *texts):
        made.append(len(samples))
        return batch_of(samples, *texts)

    monkeypatch.setattr(vlm, "batch_of", counted)
    inputs = batches(vlm, SAMPLES, batch_size=3)
    assert made == []
    next(inputs)
    assert made == [3]
    with pytest.raises(InputError):
        batches(vlm, SAMPLES, ["What is it?"] * 4 + [" "], batch_size=3)
    assert made == [3]


@pytest.mark.parametrize(
    ("samples", "options", "error", "message"),
    [
        ([], {}, InputError, "0 samples in batches of 16; give at least one of each"),
        (SAMPLES, {"batch_size": 0}, InputError, "5 samples in batches of 0"),
        (SAMPLES, {"answers": ["yes"]}, InputError, "samples: 5, answers: 1"),
        (SAMPLES, {"prompts": ["What?"]}, InputError, "samples: 5, prompts: 1"),
        (["Snow.", *SAMPLES], {}, InputError, "texts among samples"),
        (["Snow.", " "], {}, InputError, "empty ones"),
        (["Snow."], {"answers": ["yes"]}, InputError, "texts with answers"),
    ],
)
def test_what_makes_no_batches_is_refused(vlm, samples, options, error, message):
    with pytest.raises(error, match=message):
        batches(vlm, samples, **options)


def test_a_bar_is_shown_only_where_it_is_asked_for(vlm, capsys):
    for progress in (False, True):
        for _ in batches(vlm, SAMPLES, batch_size=2, progress=progress, desc="reading"):
            pass
        assert ("reading: " in capsys.readouterr().err) is progress


def test_answers_end_with_the_token_by_which_the_model_ends_them(vlm, monkeypatch):
    assert with_eos(vlm, ["yes"]) == ["yes" + vlm.tokenizer.eos_token]
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [0, 2])
    assert with_eos(vlm, ["yes"]) == ["yes" + vlm.tokenizer.convert_ids_to_tokens(0)]
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", None)
    assert with_eos(vlm, ["yes"]) == ["yes"]
