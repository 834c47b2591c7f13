"""What the chapter on skipping needs around its plans: samples, scores, counts."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from tests.support.tiny import lively, tiny_llava
from tests.support.tiny_disk import small_samples
from xlvlms_tutorial.claims import claims
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions import skip
from xlvlms_tutorial.methods.skipping import SkipPlan
from xlvlms_tutorial.metrics import Estimate
from xlvlms_tutorial.tutorials import Experiment, skipping


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava(layers=6))


def judge_of(scores: dict[str, list[float]]) -> skipping.Judge:
    """A judge whose whole model has the scores given; nothing is evaluated."""
    judge = object.__new__(skipping.Judge)
    judge.whole = table_of(scores)
    judge.tasks, judge.seed = list(scores), 0
    return judge


def table_of(scores: dict[str, list[float]]) -> pd.DataFrame:
    n = len(next(iter(scores.values())))
    return pd.DataFrame(scores, index=pd.Index([f"s{k}" for k in range(n)], name="sample"))


def test_each_sample_has_one_question_about_presence_and_two_others_in_turn():
    samples = skipping.draw_samples("scenes", 6)
    assert len({sample.id for sample in samples}) == 6
    for sample in samples:
        kinds = [question.type for question in sample.questions]
        assert kinds[0] == "presence"
        assert "presence" not in kinds[1:]
        assert len(set(kinds)) == len(kinds) == 3
    assert len({sample.questions[1].type for sample in samples}) > 2


def test_questions_are_asked_one_by_one_with_their_own_answers():
    samples = skipping.draw_samples("scenes", 2)
    copies = skipping.one_question_each(samples)
    assert [copy.id for copy in copies] == [f"{s.id}/{k}" for s in samples for k in (0, 1)]
    assert [len(copy.questions) for copy in copies] == [1] * 4
    assert skipping.question_of(copies[1]) == samples[0].questions[1].text
    assert skipping.answer_of(copies[1]) == samples[0].questions[1].answer


def test_what_is_retained_is_a_share_of_the_same_samples():
    judge = judge_of({"caption": [1.0, 1.0, 0.5, 0.5]})
    half = judge.retained(table_of({"caption": [0.5, 0.5, 0.25, 0.25]}), "caption")
    assert half.value == pytest.approx(0.5)
    first = judge.retained(table_of({"caption": [1.0, 0.0]}), "caption")
    assert first.value == pytest.approx(0.5)
    assert first.n == 2
    above = judge.above(table_of({"caption": [1.0, 1.0, 0.5, 0.5]}), "caption", 0.9)
    assert above.value == pytest.approx(0.1)
    assert above.low == pytest.approx(0.1)


def test_a_difference_is_taken_on_the_samples_of_both():
    judge = judge_of({"answer": [1.0, 1.0, 1.0]})
    one, other = table_of({"answer": [1.0, 1.0, 0.0]}), table_of({"answer": [0.5, 0.5]})
    effect = judge.difference(one, other, "answer")
    assert (effect.value, effect.n) == (0.5, 2)


def test_thrown_away_and_skipped_blocks_give_the_same_states_at_another_cost(vlm):
    call = skipping.prefill_of(vlm, 4)
    ways = {
        "dense": call,
        "thrown away": skipping.discarding(vlm, [2, 4], call),
        "skipped": skipping.applied(vlm, SkipPlan((2, 4)), call),
    }
    states = {name: way().last_hidden_state for name, way in ways.items()}
    assert torch.equal(states["thrown away"], states["skipped"])
    assert not torch.allclose(states["dense"], states["skipped"])
    assert torch.equal(call().last_hidden_state, states["dense"])  # hooks and plans are gone
    shares = skipping.operations(ways)
    assert shares["thrown away"] == 1
    assert shares["skipped"] == pytest.approx(4 / 6)


def test_a_plan_is_judged_once_whatever_the_order_of_its_blocks(vlm, monkeypatch):
    samples = small_samples(4)
    calls = []
    evaluate = skipping.evaluate
    monkeypatch.setattr(
        skipping, "evaluate", lambda *args, **options: calls.append(1) or evaluate(*args, **options)
    )
    judge = skipping.Judge(vlm, samples)
    report = judge.report(SkipPlan((4, 2)))
    assert judge.report(SkipPlan((2, 4))) is report
    assert len(calls) == 2
    rows = judge.scores(SkipPlan((2, 4)), samples[:2])
    assert rows.index.tolist() == [sample.id for sample in samples[:2]]
    assert len(calls) == 2
    with skip(vlm, [2, 4]):
        expected = evaluate(
            vlm, samples, progress=False, batch_size=48, caption_tokens=20, answer_tokens=4
        )
    assert report.captions["caption"].tolist() == expected.captions["caption"].tolist()
    with pytest.raises(InputError, match="samples to judge by"):
        skipping.Judge(vlm, samples[:1])


def test_one_task_is_judged_as_with_the_other(vlm):
    samples = small_samples(4)
    whole = skipping.Judge(vlm, samples).report(SkipPlan((2,)))
    judge = skipping.Judge(vlm, samples)
    captions = judge.report(SkipPlan((2,)), task="caption")
    assert captions.scores()["caption"].equals(whole.scores()["caption"])
    assert len(captions.answers) == 0
    answers = judge.report(SkipPlan((2,)), task="answer")
    assert answers.answers.equals(whole.answers)
    both = judge.report(SkipPlan((2,)))
    assert judge.report(SkipPlan((2,)), task="caption") is both
    gap = judge.gap(SkipPlan((2,)), SkipPlan((4,))) if len(judge.tasks) == 2 else None
    assert gap is None or gap.n == 4


def test_blocks_are_chosen_as_without_a_memo_and_from_batches_that_are_measured_once(vlm):
    samples = small_samples(4)
    candidates = {"captions": [2, 3, 5], "answers": [2, 4, 5]}
    memo = {}
    skipping.choose_blocks(vlm, samples[:2], candidates, 2, 2, memo)
    n = len(memo)
    assert n == 2 * (1 + 3 + 2)  # the whole model, each candidate, each one left beside the first
    assert skipping.choose_blocks(vlm, samples[:2], candidates, 2, 2, memo)
    assert len(memo) == n
    chosen = skipping.choose_blocks(vlm, samples, candidates, 2, 2, memo)
    assert chosen == skipping.choose_blocks(vlm, samples, candidates, 2)


def test_a_sign_that_orders_blocks_as_their_effect_has_rank_correlation_one():
    change = pd.Series([0.1, 0.2, 0.3, 0.4, 0.5, 9.0], range(1, 7))
    effect = pd.DataFrame({"captions": change**2, "answers": -change})
    effect.loc[6] = -1.0  # the last block does not count
    signs = skipping.rank_correlations(change, effect, 2)
    assert (signs["captions"].value, signs["answers"].value) == (1, -1)
    assert signs["captions"].n == 4
    assert skipping.rank_correlations(change, effect, 5)["captions"].n == 6  # too few remain


def test_redundancy_is_recorded_against_a_random_order_and_the_change(monkeypatch, tmp_path):
    monkeypatch.setenv(claims.FOLDER_VARIABLE, str(tmp_path))
    n = 40
    rng = np.random.default_rng(0)
    cost = pd.Series(rng.random(n), range(1, n + 1))
    effect = pd.DataFrame({"captions": cost, "answers": -cost})
    measures = pd.DataFrame({"same": cost**2, "random": rng.random(n)}, cost.index)
    change = pd.Series(rng.random(n), cost.index)
    experiment = Experiment("skipping", "tiny", "scenes")
    skipping.record_redundancy(experiment, measures, change, effect, 3)
    values = {record["variant"]: record for record in experiment.records}
    assert len(values) == 8 and {record["n"] for record in experiment.records} == {37}
    assert values["same, captions"]["value"] == 1 and values["same, answers"]["value"] == -1
    assert values["same, captions"]["verdict"] == "confirmed"
    assert abs(values["random, captions"]["value"]) < 0.5
    between = slice(3, n - 1)
    with_change = spearmanr(change.loc[between], cost.loc[between]).statistic
    ahead = values["same, against the change of the input, captions"]
    assert ahead["value"] == pytest.approx(1 - with_change)
    assert ahead["low"] < ahead["value"] < ahead["high"] and ahead["verdict"] == "confirmed"
    # drawn again by hand: the same blocks for both sides
    draws = np.random.default_rng(0).integers(37, size=(2000, 37))
    x, y = change.loc[between].to_numpy(), cost.loc[between].to_numpy()
    by_hand = [1 - spearmanr(x[draw], y[draw]).statistic for draw in draws[:200]]
    assert np.quantile(by_hand, 0.025) == pytest.approx(ahead["low"], abs=0.1)


def test_shares_are_recorded_against_the_whole_model_and_against_random_blocks():
    judge = judge_of({"caption": [1.0] * 4})
    judge.vlm = tiny_llava(layers=6)
    scores = {
        ("by captions", 1): table_of({"caption": [1.0] * 4}),
        ("by captions", 2): table_of({"caption": [0.5] * 4}),
        ("similar", 2): table_of({"caption": [0.0] * 4}),
        ("random", 1): table_of({"caption": [0.25] * 4}),
        ("random", 2): table_of({"caption": [0.25] * 4}),
    }
    experiment = Experiment("skipping", "tiny", "made")
    skipping.record_shares(experiment, judge, scores, 2, 3)
    values = {row["variant"]: row["value"] for row in experiment.records}
    assert values == pytest.approx(
        {
            "by captions, 1 of 6 blocks, captions": 0.1,
            "by captions, 2 of 6 blocks, captions": -0.4,
            "by captions, 1 of 6 blocks, against random, captions": 0.75,
            "by captions, 2 of 6 blocks, against random, captions": 0.25,
            "similar, 2 of 6 blocks, against random, captions": -0.25,
        }
    )


def test_pairs_do_not_overlap_and_intervals_take_some_block(vlm):
    assert skipping.pair_starts(vlm, (0.1, 0.2, 0.5, 1.0)) == [1, 3, 5]
    assert [skipping.widest_interval(depth) for depth in (4, 5, 6, 30)] == [2, 3, 4, 4]


def test_words_of_other_pictures_are_wrong_and_those_of_the_picture_are_not():
    samples = skipping.draw_samples("scenes", 12)
    right, wrong = skipping.words_to_mark(samples[:3], samples)
    for sample, good, bad in zip(samples, right, wrong, strict=False):
        assert sample.truth["subject"] in good
        assert not set(good) & set(bad)
    assert set(wrong[0]) | set(right[0]) >= {sample.truth["place"] for sample in samples}


class Notes(Experiment):
    """An experiment whose checks are remembered and not written."""

    def __init__(self) -> None:
        super().__init__("skipping", "tiny", "made")
        self.held: dict[str, bool] = {}

    def check(self, statement: str, holds: object) -> bool:
        self.held[statement] = bool(holds)
        return bool(holds)


def test_checks_fail_where_the_numbers_are_others():
    blocks = range(1, 31)
    flat = pd.DataFrame(dict.fromkeys(("captions", "answers", "plain text"), 1.5), blocks)
    notes = Notes()
    skipping.check_effects(notes, flat, {"captions": Estimate(0.9, 0.8, 1.0, 9)})
    assert notes.held["without the first or the last block captions and answers break"]
    assert sum(notes.held.values()) == 2  # and no late block costs answers more
    rows = [("by captions", 1, "caption", 0.95), ("random", 1, "caption", 0.5)]
    rows += [("by captions", 3, "caption", 0.4), ("random", 3, "caption", 0.1)]
    rows += [("interval", 14, "caption", 0.0)]
    kept = pd.DataFrame(rows, columns=["choice", "blocks", "task", "value"])
    notes = Notes()
    skipping.check_retained(notes, kept, 3, 14)
    assert not notes.held.pop("similarity and the interval do little better than random")
    assert all(notes.held.values())
    fair = pd.DataFrame({"questions": ["all", "all"], "verdict": ["confirmed", "undecided"]})
    skipping.check_fair(notes, fair)
    assert notes.held.pop("the verdict of the fair line changes with two more pictures")
    for same in (fair[:1], None):
        skipping.check_fair(notes, same)
        assert not notes.held.pop("the verdict of the fair line changes with two more pictures")
    kept.loc[0, "value"] = 0.6
    skipping.check_retained(notes, kept, 3, 14)
    assert not notes.held["one block chosen by its effect goes unnoticed in its task"]
