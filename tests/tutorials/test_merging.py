"""Mixtures of connectors: what is measured, what is put back, and closed forms of the tables."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.contract.reference import traces
from tests.support.tiny import lively, tiny_llava
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.merging import interpolate
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.finetune import loss_of
from xlvlms_tutorial.samples import PROMPTS, Question, Sample
from xlvlms_tutorial.tutorials import merging
from xlvlms_tutorial.tutorials.merging import Bench, Reading, connected, connector_of

COLOURS = ((200, 30, 40), (10, 90, 200), (40, 160, 60))
NAMES = ["picture", "kind", "weight", "part", "captions", "presence"]


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava())


@pytest.fixture(autouse=True)
def nothing_is_left_behind(vlm):
    before = connector_of(vlm)
    yield
    assert traces(vlm) == []
    after = connector_of(vlm)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(weight.requires_grad for weight in vlm.model.parameters())


@pytest.fixture
def samples():
    made = []
    for number, colour in enumerate(COLOURS):
        questions = (
            Question("presence", "Is there a key ?", ("yes", "no")[number % 2]),
            Question("colour", "What colour is the key ?", "red"),
            Question("count", "How many keys are there ?", "two"),
        )
        picture = Image.new("RGB", (32, 32), colour)
        truth = {"item": "key", "colour": "red", "place": "sand"}
        made.append(Sample(f"{number}", picture, ("a red key on the sand",), questions, truth))
    return made


def moved(state, seed, size=0.5):
    generator = torch.Generator().manual_seed(seed)
    noisy = {}
    for name, weight in state.items():
        noisy[name] = weight + size * torch.randn(weight.shape, generator=generator)
    return noisy


# Behaviours


def test_a_bench_asks_questions_of_both_kinds_by_turns(samples):
    bench = Bench(samples, n_presence=2, n_other=1)
    types = [question.type for question in bench.questions]
    assert types == ["presence", "colour", "presence", "count", "presence", "colour"]
    assert bench.rows == [0, 0, 1, 1, 2, 2]


def test_a_reading_agrees_with_the_loss_and_with_a_plain_forward(vlm, samples):
    bench = Bench(samples)
    reading = bench.read(vlm)
    tokens = torch.cat(list(reading.token_probs))
    with torch.no_grad():
        loss = loss_of(vlm, samples, PROMPTS["image"], [s.captions[0] for s in samples])
    assert float(-tokens.log().mean()) == pytest.approx(float(loss), rel=1e-4)
    for row, question, probs in zip(bench.rows, bench.questions, reading.answer_probs, strict=True):
        logits = vlm.forward(vlm.batch_of([samples[row]], [question.text])).logits[0, -1]
        assert torch.allclose(probs, logits.softmax(dim=-1), atol=1e-5)
    assert reading.presence.tolist() == [True, False] * 3
    assert reading.by_picture().shape == (3, 5)


def test_a_caption_is_scored_by_the_truth_or_else_by_the_words_of_the_reference(samples):
    known, unknown = samples[0], Sample("x", samples[0].source, ("a red key",))
    assert merging._share_named("two red keys on the grass", known) == pytest.approx(2 / 3)
    assert merging._share_named("a blue key.", unknown) == pytest.approx(2 / 3)


def test_a_front_is_measured_at_the_interpolated_weights(vlm, samples):
    bench = Bench(samples[:2])
    first, second = connector_of(vlm), moved(connector_of(vlm), 1)
    readings = merging.front(vlm, bench, first, second, [0.0, 0.3, 1.0])
    assert torch.equal(readings[0.0].answer_probs, bench.read(vlm).answer_probs)
    with connected(vlm, interpolate(first, second, 0.3)):
        assert torch.equal(readings[0.3].answer_probs, bench.read(vlm).answer_probs)
    assert merging.front_table(readings).index.tolist() == [0.0, 0.3, 1.0]


def test_the_connector_is_put_back_after_an_error(vlm):
    with pytest.raises(ZeroDivisionError), connected(vlm, moved(connector_of(vlm), 2)):
        raise ZeroDivisionError


def test_a_model_without_connector_is_refused(vlm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(anatomy, "connector", lambda model: None)
        with pytest.raises(InputError, match="no connector"):
            connector_of(vlm)


@pytest.mark.parametrize("skill", ["captions", "presence", "both"])
def test_training_lowers_the_loss_of_its_skill_and_starts_where_it_should(vlm, samples, skill):
    start = moved(connector_of(vlm), 3, 0.05)
    texts = {
        "captions": (PROMPTS["image"], [sample.captions[0] for sample in samples]),
        "presence": ("Is there a key ?", ["yes", "no", "yes"]),
    }
    trained = merging.train_expert(vlm, start, samples, skill, steps=30, batch_size=6)
    for name in texts if skill == "both" else [skill]:
        losses = []
        for state in (start, trained):
            with connected(vlm, state), torch.no_grad():
                losses.append(float(loss_of(vlm, samples, *texts[name])))
        assert losses[1] < losses[0]
    same = merging.train_expert(vlm, start, samples, skill, steps=30, batch_size=6)
    assert all(torch.equal(same[name], weight) for name, weight in trained.items())


def test_the_records_have_every_kind_and_the_ends_of_both_experts(vlm, samples):
    start = connector_of(vlm)
    experts = {"start": start}
    for number, name in enumerate(("captions", "presence", "presence, again", "other", "joint")):
        experts[name] = moved(start, 20 + number)
    benches = {"test": Bench(samples[:2]), "composition": Bench(samples[2:])}
    table = merging.measure(vlm, experts, benches, (0.0, 0.5, 1.0), (0.0, 0.5, 1.0))
    counts = table.groupby(["part", "kind"]).size().to_dict()
    for kind in ("one start", "two starts", "second order", "ensemble"):
        assert counts["test", kind] == 6
    assert ("composition", "two starts") not in counts and counts["composition", "joint"] == 1
    test = merging.means(table)["caption loss"]
    assert test["two starts", 1.0] == test["one start", 1.0] == test["ensemble", 1.0]
    assert test["two starts", 0.0] != test["one start", 0.0] == test["second order", 0.0]
    with connected(vlm, interpolate(experts["other"], experts["presence"], 0.5)):
        expected = benches["test"].read(vlm).scores()["caption loss"]
    assert test["two starts", 0.5] == pytest.approx(expected, abs=1e-4)


def test_another_models_experts_are_trained_and_measured(vlm, samples, monkeypatch):
    monkeypatch.setattr(merging, "load", lambda model: vlm)
    monkeypatch.setattr(merging, "load_samples", lambda *args, **options: samples)
    experts = merging.family(vlm, steps=2, n_samples=3)
    assert all(torch.equal(experts["start"][k], v) for k, v in connector_of(vlm).items())
    table = merging.scores("tiny", "folder", experts)
    assert set(table["part"]) == set(merging.PARTS)
    assert 0 < merging.chosen_weight(table, "captions") < 1
    gain = merging.gain(table, "mean", "joint", merging.chosen_weight(table, "mean"))
    assert gain.n == len(samples)


# Closed forms


def reading(probs, tokens=(0.5,)):
    n = len(probs)
    return Reading(
        np.ones(1),
        [torch.tensor(tokens)],
        torch.tensor(probs),
        torch.zeros(n, dtype=torch.long),
        np.ones(n, dtype=bool),
        np.zeros(n, dtype=int),
    )


def test_a_picture_is_scored_by_its_own_questions():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    scored = Reading(
        np.array([0.5, 1.0]),
        [torch.tensor([0.5, 0.5]), torch.tensor([1.0])],
        probs,
        torch.zeros(3, dtype=torch.long),
        np.array([True, True, False]),
        np.array([0, 0, 1]),
    ).by_picture()
    assert scored["presence"].tolist()[0] == 0.5 and np.isnan(scored["presence"].tolist()[1])
    assert scored["other"].tolist()[1] == 1.0 and scored["captions"].tolist() == [0.5, 1.0]
    assert scored["caption loss"].tolist() == pytest.approx([np.log(2), 0.0])
    assert scored["presence loss"][0] == pytest.approx(-np.log([0.9, 0.2]).mean())


def test_an_ensemble_mixes_probabilities_not_their_logarithms():
    one, two = reading([[0.9, 0.1]], (0.8, 0.2)), reading([[0.2, 0.8]], (0.4, 0.6))
    mixed = merging.ensemble(one, two, 0.5)
    assert mixed.scores()["presence loss"] == pytest.approx(-np.log(0.55))
    assert mixed.scores()["caption loss"] == pytest.approx(-np.log([0.6, 0.4]).mean())
    assert mixed.scores()["presence"] == 1.0 and np.isnan(mixed.scores()["captions"])
    assert merging.ensemble(one, two, 0.75).scores()["presence"] == 0.0


def table_of(*rows):
    return pd.DataFrame(rows, columns=NAMES)


def test_areas_are_above_the_chord_and_losses_count_downwards():
    rows = []
    for weight, captions, presence in ((0.0, 1.0, 0.5), (1.0, 0.0, 1.0), (0.5, 1.0, 0.5)):
        rows.append((7, "one start", weight, "test", captions, presence))
    table = table_of(*rows).assign(**{"caption loss": [1.0, 1.0, 2.0]})
    area = merging.areas(table, "one start").loc[7]
    assert (area["captions"], area["presence"], area["mean"]) == (0.25, -0.125, 0.0625)
    assert merging.areas(table, "one start", ["caption loss"]).loc[7, "mean"] == -0.5


def test_a_weight_is_chosen_on_validation_and_never_an_expert():
    rows = []
    for picture in (0, 1):
        for weight, score in ((0.0, 0.9), (0.25, 0.2), (0.5, 0.4), (1.0, 0.8)):
            rows.append((picture, "one start", weight, "validation", score, 1 - score))
            rows.append((picture, "one start", weight, "test", 0.1 * picture + weight, weight))
    table = table_of(*rows)
    assert merging.chosen_weight(table, "captions") == 0.5
    assert merging.chosen_weight(table, "presence") == 0.25
    assert merging.gain(table, "captions", 0.0, 0.25).value == pytest.approx(0.25)
    assert merging.gain(table, "mean", 1.0).value == pytest.approx(-0.5)


def test_a_gain_is_over_the_pictures_that_both_have():
    rows = []
    for picture in (0, 1, 2):
        for weight in (0.0, 0.5, 1.0):
            rows.append((picture, "one start", weight, "test", weight * picture, 0.0))
    rows += [(picture, "joint", np.nan, "test", 0.25, 0.0) for picture in (1, 0)]
    gain = merging.gain(table_of(*rows), "captions", "joint")
    assert (gain.value, gain.n) == (0.0, 2)


def test_a_random_expert_is_as_far_from_the_start_in_each_weight():
    start = {"a": torch.zeros(4, 3), "b": torch.ones(5)}
    expert = {"a": torch.full((4, 3), 2.0), "b": torch.ones(5)}
    drawn = merging.random_expert(start, expert)
    assert float(drawn["a"].norm()) == pytest.approx(48**0.5)
    assert torch.equal(drawn["b"], start["b"])
    assert not torch.equal(drawn["a"], merging.random_expert(start, expert, seed=1)["a"])


def test_what_moves_straight_is_explained_and_what_turns_back_is_not():
    moved_by = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert merging.explained(moved_by, moved_by).tolist() == [[1.0, 1.0]]
    assert merging.explained(moved_by, -moved_by).tolist() == [[-3.0, -3.0]]
    assert merging.explained(moved_by, 0 * moved_by).tolist() == [[0.0, 0.0]]


def test_a_step_of_a_linear_last_map_moves_the_input_states_straight(vlm, samples):
    """Of a connector whose last map alone moves, its own output moves exactly so."""
    start = connector_of(vlm)
    end = dict(start)
    end["linear_2.weight"] = 1.5 * start["linear_2.weight"]
    tokens = []
    for share in (0.0, 0.5, 1.0):
        with connected(vlm, interpolate(start, end, share)), torch.no_grad():
            tokens.append(anatomy.connector(vlm.model)(torch.ones(1, 4, 16)))
    assert torch.allclose(tokens[1], (tokens[0] + tokens[2]) / 2, atol=1e-5)
    ours, drawn = merging.straightness(vlm, Bench(samples), start, end, n=3)
    assert ours.shape == drawn.shape == (4, 3)
    assert np.nanmean(ours[1:]) > np.nanmean(drawn[1:])
