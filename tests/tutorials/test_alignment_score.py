"""The numbers of the chapter on alignment scores, on cases that can be worked out by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from xlvlms_tutorial import load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.evaluation import Report
from xlvlms_tutorial.methods.alignment import Alignment
from xlvlms_tutorial.tutorials import Experiment, alignment_score


def profile(values, noise=0.0):
    values = np.array(values, float)
    draws = np.random.default_rng(0).normal(0, 1, (200, 1))
    return Alignment(tuple(range(len(values))), values, values + noise * draws, n=8)


def models(**columns):
    return pd.DataFrame(columns, dtype=float)


def experiment():
    return Experiment("alignment-score", "pocket-llava", "scenes")


def test_what_moves_a_whole_profile_leaves_its_rise_exact():
    effect = alignment_score.rise(profile([0.1, 0.4, 0.3], noise=0.5), 0, 1)
    assert effect.value == pytest.approx(0.3)
    assert (effect.low, effect.high) == pytest.approx((0.3, 0.3))


def test_a_gain_is_taken_within_each_resample():
    before, after = profile([0.1, 0.3], noise=0.5), profile([0.2, 0.6], noise=0.5)
    effect = alignment_score.gain(after, before)
    assert (effect.value, effect.low, effect.high) == pytest.approx((0.2, 0.2, 0.2))
    assert alignment_score.gain(before, after).value == pytest.approx(-0.2)


def test_scores_keep_more_digits_than_outcomes():
    numbers = alignment_score.rounded(models(layer=[0.123], input=[0.456], qa=[0.456]))
    assert numbers.iloc[0].to_dict() == {"layer": 0.12, "input": 0.46, "qa": 0.5}


@pytest.mark.parametrize("n, decided", [(4, False), (5, True)])
def test_a_perfect_order_of_four_is_within_the_reach_of_chance(n, decided):
    effect = alignment_score.random_order(range(n), range(n))
    assert effect.value == 1
    assert (effect.low > 0) is decided


def test_the_opposite_order_has_the_mirrored_range():
    same = alignment_score.random_order([1, 2, 3, 4, 5], [1, 3, 2, 5, 4])
    opposite = alignment_score.random_order([1, 2, 3, 4, 5], [5, 3, 4, 1, 2])
    assert (opposite.value, opposite.low, opposite.high) == pytest.approx(
        (-same.value, -same.high, -same.low)
    )


def test_too_many_points_for_all_orders_are_refused():
    with pytest.raises(InputError, match="9 points"):
        alignment_score.random_order(range(9), range(9))


def test_correlations_are_recorded_and_those_without_spread_left_out():
    scores = np.linspace(0.1, 0.6, 6)
    numbers = models(layer=-scores, input=scores, qa=scores, yes=np.full(6, 0.5))
    recorded = experiment()
    rows = alignment_score.correlate(recorded, "IMA-8", numbers, ["qa", "yes"])
    assert list(rows.index) == [
        "qa, layer, pearson",
        "qa, layer, spearman",
        "qa, input, pearson",
        "qa, input, spearman",
    ]
    assert rows["value"].tolist() == pytest.approx([-1, -1, 1, 1])
    assert recorded.verdict("IMA-8", "qa, input, pearson") == "confirmed"
    assert {one["interval_over"] for one in recorded.records} == {"checkpoints"}


def test_models_without_an_outcome_are_no_points_of_its_correlation():
    scores = np.linspace(0.1, 0.6, 6)
    numbers = models(layer=scores, input=scores, yes=[1, 2, 3, np.nan, np.nan, 4])
    rows = alignment_score.correlate(experiment(), "IMA-9", numbers, ["yes"])
    assert set(rows["n"]) == {4}


def test_a_baseline_that_ranks_like_the_outcome_leads_a_score_that_does_not():
    outcome = np.arange(8) / 10
    numbers = models(layer=-outcome, input=outcome, likelihood=outcome, qa=outcome)
    rows = alignment_score.compare_predictors(experiment(), numbers, ["qa"])
    assert rows.loc["qa, layer, less likelihood", "value"] == pytest.approx(-2)
    assert rows.loc["qa, layer, less likelihood", "verdict"] == "refuted"
    assert rows.loc["qa, input, less likelihood", "value"] == pytest.approx(0)


def test_outcomes_of_a_hand_made_report():
    scenes = load_samples("scenes", n=2)
    scenes = [replace(s, truth={"subject": "woman", "item": "key"}) for s in scenes]
    captions = pd.DataFrame(
        {
            "sample": [s.id for s in scenes],
            "caption": ["a woman with a key", "a fish with a key"],
            "subject": [True, False],
            "item": [True, True],
        }
    )
    answers = pd.DataFrame(
        {
            "type": ["colour", "colour", "presence", "presence"],
            "correct": [True, False, True, False],
            "prediction": ["red", "blue", "no", "yes"],
        }
    )
    report = Report("made", "scenes", 0, captions, answers)
    assert alignment_score.outcomes(report, scenes, ["fish", "key", "woman"]) == {
        "caption": 0.75,
        "qa": 0.5,
        "chair_i": 0.25,
        "chair_s": 0.5,
        "yes": 0.5,
    }
