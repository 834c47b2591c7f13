"""Settings, baselines and scores of the chapter on dropped image tokens."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.contract.reference import traces
from tests.support.tiny import PROMPTS, lively, tiny_llava
from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.dropping import drop_tokens
from xlvlms_tutorial.samples import Question, Sample
from xlvlms_tutorial.tutorials import dropping
from xlvlms_tutorial.tutorials.experiments import Experiment


@pytest.fixture
def vlm():
    vlm = lively(tiny_llava())
    yield vlm
    assert traces(vlm) == []


def samples_with(answers):
    samples = []
    for k, pair in enumerate(answers):
        picture = Image.new("RGB", (32, 32), (40 * k, 90, 200 - 30 * k))
        questions = [
            Question("colour", prompt, answer, "key")
            for prompt, answer in zip(PROMPTS, pair, strict=False)
        ]
        samples.append(Sample(f"picture {k}", picture, questions=tuple(questions)))
    return samples


def test_accuracy_is_that_of_a_loop_over_questions(vlm):
    samples = samples_with([("red", "blue"), ("yes", "no"), ("key",)])
    expected = []
    for context in (nullcontext, partial(drop_tokens, vlm, 1, 2)):
        expected = []
        for sample in samples:
            right = []
            for question in sample.questions:
                with context():
                    batch = vlm.batch([sample.image], [question.text])
                    token = int(vlm.forward(batch).logits[0, -1].argmax())
                right.append(vlm.tokenizer.decode([token]) == question.answer)
            expected.append(np.mean(right))
        assert dropping.accuracy(vlm, samples, context).tolist() == expected
    # an answer that is taken from the model itself is right
    first = vlm.forward(vlm.batch([samples[0].image], PROMPTS[:1])).logits[0, -1].argmax()
    own = samples_with([(vlm.tokenizer.decode([int(first)]),)])
    assert dropping.accuracy(vlm, own).tolist() == [1.0]


def test_settings_stay_in_range(vlm):
    assert dropping.settings(vlm, 4, (0.0, 0.5, 1.0), (0.5, 0.01, 1.0)) == [
        (1, 2),
        (1, 1),
        (1, 4),
        (2, 2),
        (2, 1),
        (2, 4),
    ]


def test_the_best_setting_costs_no_more_than_the_limit():
    scores = {(1, 1): np.zeros(2), (1, 2): np.ones(2), (2, 1): np.full(2, 0.5)}
    costs = {(1, 1): 0.5, (1, 2): 0.9, (2, 1): 0.7}
    assert dropping.best_within(scores, costs, 0.9) == (1, 2)
    assert dropping.best_within(scores, costs, 0.695) == (2, 1)
    assert dropping.best_within(scores, costs, 0.6) == (1, 1)
    assert dropping.best_within(scores, costs, 0.1) == (1, 1)


def test_operations_fall_with_what_is_dropped(vlm):
    samples = samples_with([("red",)])
    ways = {keep: partial(drop_tokens, vlm, 1, keep) for keep in (4, 2, 1)}
    shares = dropping.operations(vlm, samples, ways)
    # to see what receives attention costs a little, also where nothing is dropped
    assert 1 <= shares[4] < 1.01 and shares[4] > shares[2] > shares[1] > 0


def test_smaller_pictures_have_fewer_tokens_and_leave_no_trace():
    vlm = tiny_reader()
    sample = samples_with([("red",)])[0]
    assert dropping.image_tokens(vlm, sample) == 4
    with dropping.smaller_pictures(vlm, 1):
        assert dropping.image_tokens(vlm, sample) == 1
        batch = vlm.batch([sample.image], PROMPTS[:1])
        assert batch["pixel_values"].shape[-1] == 16
        assert torch.isfinite(vlm.forward(batch).logits).all()
    assert dropping.image_tokens(vlm, sample) == 4
    with pytest.raises(InputError, match="1 to 4"), dropping.smaller_pictures(vlm, 3):
        pass
    with pytest.raises(InputError, match="pocket"), dropping.smaller_pictures(lively(tiny_llava())):
        pass


def test_gains_are_paired_and_recorded_by_baseline():
    random = np.random.default_rng(0)
    base = random.random(50)
    estimate = dropping.gain(base + 0.25, base)
    assert estimate.low == pytest.approx(0.25) and estimate.high == pytest.approx(0.25)
    assert dropping.gain(np.full(3, np.nan), np.ones(3)) is None
    experiment = Experiment("dropping", "pocket-llava", "scenes")
    scores = {"pooled": base, "as pooled": base + 0.25, "random as pooled": base + 0.5}
    dropping.record_gains(experiment, "answers", scores)
    verdicts = {record["variant"]: record["verdict"] for record in experiment.records}
    name = "answers, at the cost of pooled"
    assert verdicts == {name: "confirmed", f"{name}, against random tokens": "refuted"}


def test_decode_steps_are_those_of_a_generation_and_can_be_run_again(vlm):
    samples = samples_with([("red",), ("blue",)])
    (way,) = dropping.decodes(vlm, samples, {"plain": nullcontext}, steps=2).values()
    with way() as run:
        run()
        run()
    for prepare in (dropping.prefills, dropping.decodes):
        (way,) = prepare(vlm, samples, {"dropped": partial(drop_tokens, vlm, 1, 2)}).values()
        with way() as run:
            run()


def test_cells_that_stay_are_shares_of_pictures(vlm):
    samples = samples_with([("red",), ("blue",)])
    cells = dropping.kept_cells(vlm, samples, 1, 3)
    assert cells.shape == (2, 2) and cells.sum() == 3
