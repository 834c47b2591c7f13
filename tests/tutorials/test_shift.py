"""Samples, states and comparisons of the chapter on shift, on hand-made cases."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support.tiny import PICTURE, lively, tiny_llava
from xlvlms_tutorial import Activations, KMeans
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.tutorials import Experiment, shift

TOKEN = "woman"


def words(concepts: np.ndarray) -> dict[int, list[str]]:
    """The words of each concept are the names of its positive directions."""
    return {
        number: [f"w{k}" for k in np.flatnonzero(row > 0.5)] or ["none"]
        for number, row in enumerate(concepts)
    }


def grouped(n: int = 12, seed: int = 0) -> torch.Tensor:
    """States (3 n, 4) of three groups along three axes."""
    noise = torch.randn(3 * n, 4, generator=torch.Generator().manual_seed(seed))
    return 5 * torch.eye(4)[torch.arange(3 * n) % 3] + 0.05 * noise


@pytest.fixture(scope="module")
def comparison() -> shift.Comparison:
    a = grouped()
    moved = a + 3 * torch.eye(4)[3] + 0.02 * grouped(seed=1)
    return shift.Comparison(a, moved, words, k=3)


def test_a_caption_is_cut_behind_the_whole_word():
    assert shift.begin("A womanly woman walks, woman.", TOKEN) == "A womanly woman"


def test_samples_come_with_the_caption_that_has_the_token_first(monkeypatch):
    captions = [("A frog.", "A woman."), ("A frog.",)] + [("A woman by a woman.", "A fly.")] * 8
    samples = [Sample(f"{k}", None, one) for k, one in enumerate(captions)]
    monkeypatch.setattr(shift, "load_samples", lambda *a, **k: samples)
    token, chosen, everything = shift.samples_with("x", 10, TOKEN)
    assert (token, everything) == (TOKEN, samples)
    assert [sample.captions[0] for sample in chosen] == ["A woman."] + (["A woman by a woman."] * 8)


def test_two_states_of_the_token_are_read_in_one_forward():
    samples = [Sample(f"{k}", PICTURE, ("a woman on the grass",)) for k in range(3)]
    predicting, at = shift.read(tiny_llava(), samples, [1, 2], TOKEN)
    assert len(predicting) == len(at) == 3
    assert set(at.table["token"].str.strip()) == {TOKEN}
    assert (at.table["position"].to_numpy() - predicting.table["position"].to_numpy() == 1).all()


def test_where_few_would_say_the_token_all_stay():
    samples = [Sample(f"{k}", PICTURE, ("a woman on the grass",)) for k in range(3)]
    predicting, at = shift.read_where_said(lively(tiny_llava()), samples, [3], TOKEN)
    assert len(predicting) == len(at) == 3


def test_overlap_counts_the_words_of_the_match():
    fitted, others = KMeans(2), KMeans(2)
    fitted.components_ = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    others.components_ = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert shift.overlap(fitted, others, words).tolist() == [0.5, 1.0]


def test_what_concepts_became_is_listed_by_size():
    rows = np.array([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    fitted = KMeans(2, seed=0).fit(rows)
    swapped = KMeans(2, seed=0).fit(rows + 0.1)
    table = shift.became(fitted, {"mood": swapped}, words)
    assert table["samples"].tolist() == [2, 1]
    assert (table["base"] == table["mood"]).all()
    assert shift.first_words(fitted, words, ["w0"]) == 0.5
    assert shift.first_words(fitted, words, ["w9"]) == 0


def test_the_share_of_the_text_is_its_length_along_the_shift():
    base = torch.zeros(4, 3)
    tuned = base + torch.tensor([2.0, 0.0, 0.0])
    text = base + torch.tensor([1.0, 7.0, 0.0])  # what is across does not count
    assert shift.text_share(base, tuned, text) == 0.5
    assert shift.text_share(base, tuned, base) == 0
    assert shift.text_share(base, tuned, tuned) == 1


def test_shifted_concepts_are_means_of_tuned_states(comparison):
    there = comparison.start + comparison.shifts["shifted"]
    for concept in range(3):
        members = torch.from_numpy(comparison.labels == concept)
        assert np.allclose(there[concept], comparison.b[members].mean(0), atol=1e-4)


def test_recovery_is_the_own_shift_by_default(comparison):
    own = comparison.recovered()
    assert own.equals(comparison.recovered(comparison.shifts["shifted"]))
    assert (own["cosine_after"] > own["cosine_before"]).all()
    means = comparison.means()
    assert list(means) == ["shifted", "global", "original"]
    assert means["original"] == own["t_overlap_before"].mean()


def test_points_have_no_consistency_of_a_single_sample():
    a = torch.cat([grouped(), 20 * torch.eye(4)[3][None]])
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    points = shift.Comparison(a, a + 1 + 0.1 * noise, words, k=4).points()
    single = points["consistency"].isna()
    assert single.sum() == 1 and (single == points["pairwise"].isna()).all()
    assert points["consistency"].dropna().between(0.9, 1).all()
    assert (points["magnitude"] > 1.5).all()
    assert np.allclose(points["perfect"], 1 / points["cosine_before"] - 1)


def test_curves_start_at_the_original_and_hold_the_comparison(comparison):
    curve = shift.curve_over_strength(comparison, [0.0, 1.0])
    means = comparison.means()
    assert curve.loc[0.0, "shifted"] == curve.loc[0.0, "global"] == means["original"]
    assert curve.loc[1.0, "shifted"] == means["shifted"]
    sizes = shift.curve_over_sizes(comparison.a, comparison.b, words, [2, 3])
    assert sizes.loc[3].to_dict() == means
    table = pd.DataFrame({"sample": range(36), "id": [f"{k}" for k in range(36)]})
    a = Activations({(7, "resid_post"): comparison.a}, table, {})
    b = Activations({(7, "resid_post"): comparison.b}, table, {})
    assert shift.curve_over_layers(a, b, words, [7], 3).loc[7].to_dict() == means


def test_groups_as_such_do_not_correlate_within_groups():
    points = pd.DataFrame({"adapter": list("aaabbb"), "x": [1.0, 2, 3, 11, 12, 13]})
    points["y"] = [1.0, 2, 1, 11, 12, 11]
    assert shift.related(points, "x", "y").value > 0.9
    within = shift.within_groups(points, "adapter")
    assert abs(shift.related(within, "x", "y").value) < 1e-9


def test_no_correlation_is_taken_of_few_or_equal_points():
    points = pd.DataFrame({"x": [1.0, 2, 3, np.nan], "y": [1.0, 2, 3, 4], "z": [1.0] * 4})
    assert shift.related(points, "x", "y") is None
    assert shift.related(points, "y", "z") is None
    equal = points.assign(improvement=1.0, perfect=1.0)
    assert shift.beyond_geometry(equal, "y") is None


def test_beyond_geometry_is_the_gap_of_two_correlations():
    points = pd.DataFrame({"x": [1.0, 2, 3, 4, 5]})
    points["improvement"] = points["x"]
    points["perfect"] = -points["x"]
    assert shift.beyond_geometry(points, "x").value == pytest.approx(2)


def test_the_truth_of_concepts_is_asked_of_samples_and_of_words():
    rows = np.array([[0.0, 9.0], [0.1, 9.0], [9.0, 0.0], [9.0, 0.1], [0.0, 9.1]])
    fitted = KMeans(2, seed=0).fit(rows)
    values = pd.Series(["walking", "walking", "falling", "falling", None], index=[4, 3, 2, 1, 0])
    first = int(fitted.labels_[0])
    lists = {first: ["is", "a", "the", "walks"], 1 - first: ["falls"]}
    row = shift.truth_row(fitted, values, lists)
    assert row == {"samples": 1.0, "named in 3 words": 0.5, "named in 4 words": 1.0}


def test_the_push_comes_after_the_token_and_not_before():
    vlm = lively(tiny_llava())
    samples = [Sample("a", PICTURE, ("a woman",))]
    plain = shift.describe(vlm, samples, 20)
    token = plain[0].split()[2]
    vector = 50 * torch.ones(vlm.width) * torch.randn(vlm.width).sign()
    pushed = shift.push(vlm, vector, 2, 1.0, samples, plain, token)
    kept = shift.begin(plain[0], token)
    assert pushed[0].startswith(kept) and pushed != plain
    assert shift.push(vlm, vector, 2, 0.0, samples, plain, token) == plain


def test_the_word_after_the_token_is_counted():
    assert shift.word_after("A woman is walking.", TOKEN) == "walking"
    assert shift.word_after("A frog.", TOKEN) == ""
    captions = ["A woman walks.", "A woman leaps.", "A woman lies."]
    actions = [["walks"], ["jumps"], []]
    counted = shift.follow(captions, TOKEN, actions, {"leaps", "lies"})
    assert counted["the action"] == 0.5  # of the two whose action is known
    assert counted["a word of the adapter"] == pytest.approx(2 / 3)


@pytest.fixture
def checks(monkeypatch):
    written = {}
    experiment = Experiment("shift", "tiny-llava", "none")
    monkeypatch.setattr(experiment, "check", written.__setitem__)
    return experiment, written


def test_what_models_answer_is_written_down(checks):
    experiment, written = checks
    scene = "a woman is there on the grass"
    shift.check_answers(experiment, {"base": ["walking", "yes"], "mood": [scene, scene]})
    assert list(written.values()) == [True, True]
    shift.check_answers(experiment, {"base": [scene, "yes"], "mood": [scene, "yes"]})
    assert list(written.values()) == [False, False]


def test_words_before_the_token_and_at_it_are_written_down(checks):
    experiment, written = checks
    picture = Sample("s", None, truth={"action": "walking"})
    few_words = pd.DataFrame({"base, predicting": [[TOKEN]], "base, at": [["walks"]]})
    shift.check_positions(experiment, few_words, TOKEN, [picture], "action")
    assert list(written.values()) == [True, True]
    few_words = pd.DataFrame({"mood, predicting": [["man"]], "base, at": [["key"]]})
    shift.check_positions(experiment, few_words, TOKEN, [picture], "action")
    assert list(written.values()) == [False, False]


def curves_of(shifted, original, strength):
    by_layer = pd.DataFrame({"shifted": shifted, "original": original}, index=[10, 30])
    by_size = pd.DataFrame({"shifted": [10.0, 90.0, 90.0]}, index=[5, 10, 20])
    by_strength = pd.DataFrame({"shifted": strength}, index=[0.0, 1.0, 2.0])
    return {"layer": by_layer, "concepts": by_size, "strength": by_strength}


def test_curves_are_written_down_and_steps_where_they_are_known(checks):
    experiment, written = checks
    curves = curves_of([90, 80], [70, 20], [10, 90, 50])
    curves["training step"] = pd.DataFrame({"original": [50, 30]}, index=[10, 160])
    shift.check_curves(experiment, curves)
    assert all(written.values())
    shift.check_curves(experiment, curves_of([90, 60], [50, 45], [10, 80, 90]))
    statements = [statement for statement, holds in written.items() if holds]
    assert statements == ["from ten concepts on their number matters little"]


def test_what_one_vector_for_all_does_is_written_down(checks, monkeypatch):
    experiment, written = checks
    monkeypatch.setattr(experiment, "verdict", lambda *_: "undecided")
    reached = {"original": 30.0, "global": 75.0, "shifted": 90.0, "seed": 92.0}
    shift.check_baselines(experiment, {"mood": pd.Series(reached)}, "layer 30")
    assert list(written.values()) == [True, True, True]
    reached |= {"global": 40.0, "seed": 70.0}
    shift.check_baselines(experiment, {"mood": pd.Series(reached)}, "layer 30")
    assert list(written.values()) == [False, False, True]


def test_the_text_is_judged_by_layer(checks):
    experiment, written = checks
    share = pd.DataFrame([[0.3, 0.6, 0.1, 0.1], [0.2, 0.3, 0.1, 0.1]], columns=[10, 20, 27, 30])
    shift.check_text(experiment, share)
    assert list(written.values()) == [True, True, True]
    shift.check_text(experiment, share / 10 + [0, 0, 0, 0.3])
    assert list(written.values()) == [False, False, False]


def test_the_action_in_words_and_samples_is_written_down(checks):
    experiment, written = checks
    rows = {"base": [0.9, 1, 1], "colour": [0.85, 0.1, 0.7], "place": [0.85, 0.6, 0.7]}
    table = pd.DataFrame(rows, index=["samples", "named in 3 words", "named in 15 words"]).T
    shift.check_truth(experiment, table)
    assert all(written.values())
    shift.check_truth(experiment, table.assign(samples=[0.9, 0.5, 0.5]))
    assert [statement for statement, holds in written.items() if not holds] == [
        "the samples are sorted by action nearly as in the base model"
    ]


def test_pushed_captions_are_written_down(checks):
    experiment, written = checks
    mood = "a cheerful happy merry woman leaps"
    captions = {
        "shift, 0": ["a woman jumps", "a woman falls"],
        "shift, 0.5": ["a woman jumped", "a woman falls"],
        "shift, 1": ["a woman leaps", "a woman falls"],
        "shift, 1.5": ["a woman leaps", "a woman leaps"],
        "the adapter itself": [mood, mood],
    }
    rows = {}
    for name, action, adapter in (
        ("shift, 0.5", 1, 0),
        ("shift, 1", 0.5, 0.5),
        ("random, 1", 1, 0),
    ):
        rows[name] = {"the action": action, "a word of the adapter": adapter}
    shift.check_pushes(experiment, captions, rows, TOKEN, "mood")
    assert all(written.values())
    rows["random, 1"]["the action"] = 0.9
    captions["shift, 1"] = [mood, mood]
    shift.check_pushes(experiment, captions, rows, TOKEN, "mood")
    assert [statement for statement, holds in written.items() if not holds] == [
        "a random vector changes no verb",
        "the push brings little mood elsewhere",
    ]


def test_correlations_are_recorded_pooled_and_within(checks):
    experiment, written = checks
    rng = np.random.default_rng(0)
    magnitude = rng.random(40)
    points = pd.DataFrame({"magnitude": magnitude, "consistency": 0.95, "cosine_after": 0.9})
    points["improvement"] = magnitude
    points["perfect"] = magnitude + rng.random(40)
    points["adapter"] = ["mood", "place"] * 20
    causes = {"consistency": "SHIFT-3", "magnitude": "SHIFT-4"}
    shift.record_correlations(experiment, points, causes, "layer 30")
    measured = {record["variant"]: record["verdict"] for record in experiment.records}
    # what does not vary has no correlation
    assert set(measured) == {
        "improvement, pooled, layer 30",
        "improvement, within adapters, layer 30",
        "improvement, pooled, minus perfect, layer 30",
        "improvement, within adapters, minus perfect, layer 30",
    }
    assert set(measured.values()) == {"confirmed"}
    assert list(written.values()) == [True, True]
