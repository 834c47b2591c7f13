"""Pairs that differ in one fact, the last step run alone, windows, bands and what is recorded."""

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions import PatchingGrid, knock_out
from xlvlms_tutorial.pocket import counterfactuals, language, render, scenes
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.tutorials import Experiment, tracing
from xlvlms_tutorial.tutorials.tracing import (
    AnsweredPairs,
    LastStep,
    make_pairs,
    strongest,
    windows,
)

KINDS = ["colour", "place"]


@pytest.fixture(scope="module")
def vlm():
    return tiny_llava()


@pytest.fixture(scope="module")
def pairs():
    return make_pairs("scenes", KINDS, 3)


@pytest.fixture(scope="module")
def study(vlm, pairs):
    return AnsweredPairs(vlm, pairs)


def test_pairs_are_one_scene_with_one_factor_changed(pairs):
    assert [pair.kind for pair in pairs] == ["colour"] * 3 + ["place"] * 3
    pictures = {}
    for scene in scenes(120):
        pictures[render(scene).tobytes()] = scene
    for pair in make_pairs("scenes", KINDS, 3, "train"):
        scene = pictures[pair.clean.tobytes()]
        others = {render(other).tobytes() for other in counterfactuals(scene, pair.kind)}
        assert pair.corrupt.tobytes() in others
        (question,) = (q for q in language.questions(scene) if q.type == pair.kind)
        assert pair.question == question.text and pair.answers[0] == question.answer
        assert pair.answers[1] not in ("", question.answer)


def test_other_data_swaps_pictures_of_samples_with_other_answers(monkeypatch, pairs):
    samples = []
    for number, answer in enumerate(["red", "red", "blue", "two"]):
        kind = "count" if answer == "two" else "colour"
        picture = pairs[number].clean
        samples.append(Sample(f"s{number}", picture, (), (Question(kind, "what", answer),)))
    monkeypatch.setattr(tracing, "load_samples", lambda *_: samples)
    swapped = make_pairs("photographs", ["colour"], 5)
    assert [(pair.clean, pair.corrupt) for pair in swapped] == [
        (pairs[0].clean, pairs[2].clean),
        (pairs[1].clean, pairs[2].clean),
    ]
    assert swapped[0].answers == ("red", "")
    # no such type: all questions count as one
    assert {pair.kind for pair in make_pairs("photographs", ["place"], 5)} == {"any"}
    monkeypatch.setattr(tracing, "load_samples", lambda *_: samples[:1])
    with pytest.raises(InputError, match="no two pictures"):
        make_pairs("photographs", ["colour"], 5)


def test_a_study_keeps_what_is_answered_rightly_both_times(vlm, pairs, monkeypatch):
    # logits that say the right answers but for the second pair, whose answers agree
    words = ["red", "blue", "grass", "woman"]
    tokens = vlm.tokenizer.convert_tokens_to_ids(words)
    said = [[0, 0, 2, 3], [1, 0, 3, 0]]
    answers = [("red", "blue"), ("red", "red"), ("grass", "woman"), ("woman", "grass")]
    asked = [pair._replace(answers=known) for pair, known in zip(pairs, answers, strict=False)]
    calls = iter(said)

    def logits(*_):
        rows = [tokens[k] for k in next(calls)]
        return torch.eye(len(vlm.tokenizer))[rows] + 0.01 * torch.eye(len(vlm.tokenizer))[3]

    monkeypatch.setattr(tracing, "_first_logits", logits)
    study = AnsweredPairs(vlm, asked)
    assert [pair.answers for pair in study.pairs] == [("red", "blue"), ("grass", "woman")]
    assert study.tokens.tolist() == [[tokens[0], tokens[1]], [tokens[2], tokens[3]]]
    chosen = torch.zeros(2, len(vlm.tokenizer))
    chosen[0, tokens[1]], chosen[1, tokens[2]] = 3.0, 2.0
    assert study.gap(chosen).tolist() == [-3.0, 2.0]
    assert study.lost(chosen).tolist() == [1.0, 0.0]
    assert study.words(chosen) == ["blue", "grass"]


def test_a_model_that_answers_nothing_keeps_all_pairs_with_two_tokens(study, pairs):
    assert len(study.pairs) == len(pairs) and study.kinds.tolist() == ["colour"] * 3 + ["place"] * 3
    assert bool((study.tokens[:, 0] != study.tokens[:, 1]).all())
    few = AnsweredPairs(study.vlm, pairs, n=2, both=False)
    assert few.kinds.tolist() == ["colour"] * 2 + ["place"] * 2 and few.corrupt is None


def test_spans_part_the_prompt_and_the_cells_are_where_the_pictures_differ(study):
    spans = study.spans()
    inside = study.clean["attention_mask"] == 1
    total = sum(mask.int() for mask in spans.values())
    assert bool((total <= 1).all()) and not bool((total[~inside] > 0).any())
    # the ground is the lowest quarter of the picture: on a grid of 2 x 2 cells, the lower two
    places = torch.tensor(study.kinds == "place")
    picture = study.clean.mask("image")
    cells = spans["cells that differ"][places][picture[places]].reshape(int(places.sum()), -1)
    assert cells.tolist() == [[False, False, True, True]] * int(places.sum())
    assert torch.equal(spans["cells that differ"] | spans["other cells"], picture)
    assert spans["last"].sum(dim=1).tolist() == [1] * len(study.pairs)


def test_without_a_square_grid_the_picture_is_one_span(study, monkeypatch):
    monkeypatch.setattr(tracing, "_differing_cells", lambda *_: None)
    assert list(study.spans())[0] == "picture"


@pytest.mark.parametrize("to_span", ["image", "question", "random"])
def test_the_last_step_is_the_whole_forward_with_the_last_position_cut(study, to_span):
    vlm, step = study.vlm, LastStep(study.vlm, study.clean)
    assert step._saved  # not by whole forwards
    span = tracing.random_positions(study) if to_span == "random" else to_span
    for layers in ([1], [2, 3], [1, 2, 3]):
        with knock_out(vlm, "last", span, layers):
            expected = vlm.forward(study.clean, logits=False).logits[:, -1]
        logits = step.logits(knock_out(vlm, "last", span, layers))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits, step.logits(), atol=1e-3)
    plain = vlm.forward(study.clean, logits=False).logits[:, -1]
    torch.testing.assert_close(step.logits(), plain, rtol=1e-4, atol=1e-5)


def test_other_models_run_whole(study, monkeypatch):
    monkeypatch.setattr(study.vlm.model.config, "model_type", "other")
    step = LastStep(study.vlm, study.clean)
    assert not step._saved
    plain = study.vlm.forward(study.clean, logits=False).logits[:, -1]
    torch.testing.assert_close(step.logits(), plain)


def test_windows_are_all_runs_of_as_many_blocks():
    assert [list(window) for window in windows(4, 3)] == [[1, 2, 3], [2, 3, 4]]
    assert windows(2, 5) == [range(1, 3)]


def test_random_positions_are_as_many_as_the_picture_and_never_the_last(study):
    mask = tracing.random_positions(study, seed=1)
    assert mask.sum(dim=1).tolist() == [4] * len(study.pairs)
    assert not mask[:, -1].any() and not bool((mask & (study.clean["attention_mask"] == 0)).any())
    assert torch.equal(mask, tracing.random_positions(study, seed=1))
    assert not torch.equal(mask, tracing.random_positions(study, seed=2))


def test_the_strongest_elsewhere_shares_no_block_with_the_band():
    tried = windows(8, 3)
    lost = np.array([0.1, 0.3, 0.2, 0.8, 0.9, 0.7])[:, None]
    assert strongest(lost, tried) == (4, 1)
    assert strongest(np.zeros((6, 2)), tried) == (2, 5)
    assert strongest(np.zeros((1, 2)), tried[:1]) == (0, 0)


def test_each_kind_has_its_own_window_and_baselines_cut_as_much(study, monkeypatch):
    tried = windows(4, 1)
    lost = np.zeros((4, 6))
    lost[3, :3], lost[0, :3], lost[1, 3:] = 1, 0.5, 1
    chosen = tracing.choose(lost, tried, study.kinds)
    assert chosen == {"colour": (3, 0), "place": (1, 0)}
    cuts = []

    def sweep(study, blocks, positions):
        cuts.append((blocks, int(positions.sum())))
        return np.full((1, 6), float(blocks == [range(4, 5)]))

    monkeypatch.setattr(tracing, "sweep", sweep)
    result = tracing.losses(study, lost, tried, chosen, n_draws=2)
    assert result["band"].tolist() == [1.0] * 6
    assert result["equal window elsewhere"].tolist() == [0.5] * 3 + [0.0] * 3
    assert result["random positions"].tolist() == [1.0] * 3 + [0.0] * 3
    # two draws in two windows, as many positions as there are image tokens
    assert len(cuts) == 4 and {n for _, n in cuts} == {4 * 6}


def test_where_follows_the_pictures_that_are_drawn():
    tried = windows(6, 3)
    surely = np.zeros((4, 8))
    surely[2] = 1
    estimate = tracing.where(surely, tried)
    assert (estimate.value, estimate.low, estimate.high) == (4, 4, 4)
    split = np.zeros((4, 8))
    split[0, :5], split[3, 5:] = 1, 1
    estimate = tracing.where(split, tried)
    assert (estimate.value, estimate.low, estimate.high) == (2, 2, 5)
    # of one picture nothing is known but the answer
    estimate = tracing.where(surely[:, :1], tried)
    assert (estimate.value, estimate.low, estimate.high) == (4, 2, 5)


def test_curves_are_shares_by_kind_with_intervals_that_hold_them(study):
    tried = windows(3, 1)
    lost = np.array([[0.0] * 6, [1.0] * 3 + [0.0] * 3, [0, 0, 1, 1, 1, 1]])
    curves = tracing.curves(study, lost, tried)
    assert curves["colour"]["lost"].tolist() == pytest.approx([0, 1, 1 / 3])
    assert curves["place"]["lost"].tolist() == [0, 0, 1]
    for curve in curves.values():
        assert ((curve["low"] <= curve["lost"]) & (curve["lost"] <= curve["high"])).all()
        assert (curve["high"] - curve["low"] > 0.2).all()


def test_the_handover_is_the_first_layer_at_which_the_last_position_leads():
    values = np.zeros((3, 3, 4))
    values[:, 0, :] = np.array([1.0, 0.3, 0.0])[:, None]
    values[:, 1, :] = np.array([0.0, 0.3, 0.1])[:, None]
    values[:, 2, :] = np.array([0.0, 0.5, 0.9])[:, None]
    ends = np.ones(4), np.zeros(4)
    grid = PatchingGrid(values, *ends, (8, 20, 24), ("cells", "others", "last"), "denoise")
    assert tracing.handover(grid, ["cells", "others"]).value == 24
    assert tracing.handover(grid, ["cells"]).value == 20


def test_routes_cut_one_way_each(study):
    ways = tracing.routes(study)
    assert ways.index.tolist() == KINDS
    every = range(1, 4)
    lost = study.lost(study.step.logits(knock_out(study.vlm, "last", "image", every)))
    expected = [lost[study.kinds == kind].mean() for kind in KINDS]
    assert ways["picture to last"].tolist() == expected
    spans = study.spans()
    with knock_out(study.vlm, spans["question"] | spans["marks"], "image", every):
        logits = study.vlm.forward(study.clean, logits=False).logits[:, -1]
    deaf = study.lost(logits)
    assert ways["picture to words"].tolist() == [deaf[study.kinds == kind].mean() for kind in KINDS]


def test_each_kind_is_recorded_against_both_nulls(study, tmp_path, monkeypatch):
    experiment = Experiment("tracing", "tiny", "scenes")
    band = np.ones(6)
    lost = {
        "band": band,
        "equal window elsewhere": np.zeros(6),
        "random positions": np.array([1.0, 1, 1, 0, 0, 1]),
    }
    table = tracing.record(experiment, study, lost)
    assert table.loc["place", "random positions"] == pytest.approx(1 / 3)
    values = {record["variant"]: record["value"] for record in experiment.records}
    assert values == {
        "colour, equal window elsewhere": 1.0,
        "colour, random positions": 0.0,
        "place, equal window elsewhere": 1.0,
        "place, random positions": pytest.approx(2 / 3),
    }


def test_sentences_about_the_band_follow_from_what_was_measured():
    kinds = np.array(["colour", "place", "count"])
    model = type("Model", (), {"layer_at": lambda self, share: round(30 * share)})()
    study = AnsweredPairs.__new__(AnsweredPairs)
    study.kinds, study.vlm = kinds, model
    tried = windows(30, 3)
    lost = np.zeros((28, 3))
    lost[22, :2], lost[10, 2] = 1, 1
    chosen = {"colour": (22, 10), "place": (22, 10), "count": (10, 22)}
    places = {kind: tracing.Estimate(24, 24, 24, 3) for kind in kinds}
    by_kind = tracing.pd.DataFrame(
        {"band": [1.0, 1.0, 1.0], "equal window elsewhere": [0.0, 0.0, 0.0]}, kinds
    )
    arguments = (study, lost, tried, chosen, places, by_kind)
    assert all(tracing.band_statements(*arguments, 24).values())
    elsewhere = tracing.band_statements(*arguments, 20)
    assert sum(elsewhere.values()) == 2


def test_sentences_about_patching_follow_from_the_maps(study):
    names = ("cells that differ", "other cells", "question", "marks", "last")
    layers = (20, 23, 24, 25, 30)
    values = np.zeros((5, 5, 6))
    values[:2, 0], values[:2, 1], values[2:, 4] = 0.6, 0.38, 0.95
    ends = np.ones(6), np.zeros(6)
    grid = PatchingGrid(values, *ends, layers, names, "denoise")
    back = np.zeros((2, 2, 6))
    back[0, 1], back[1, 0] = 1.0, 1.0  # noise: what stays of the clean answer
    noised = PatchingGrid(back, *ends, (23, 24), ("picture", "last"), "noise")
    statements = tracing.patching_statements(study, grid, noised, 24)
    # of the tiny model's four cells the two of the ground and those of the thing differ
    fewer = "the cells that differ carry more of it than the others, and are fewer"
    assert {name for name, holds in statements.items() if not holds} <= {fewer}
    shifted = tracing.patching_statements(study, grid, noised, 20)
    assert sum(shifted.values()) < sum(statements.values())
