"""What the chapter on training through gaps needs around it: stages, shares, errors."""

from dataclasses import replace

import pandas as pd
import pytest

from tests.support.tiny import lively, tiny_llava
from tests.support.tiny_disk import small_samples
from xlvlms_tutorial.evaluation import Report
from xlvlms_tutorial.interventions import skip
from xlvlms_tutorial.tutorials import Experiment, skip_training


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava(layers=6))


def reported(named: list[bool], answers: list[tuple[str, str, str, bool]]) -> Report:
    """A report with captions that name the subject or not, and answers that are right or not."""
    ids = [f"s{k}" for k in range(len(named))]
    captions = pd.DataFrame({"sample": ids, "caption": "", "subject": named})
    columns = ["sample", "type", "prediction", "correct"]
    return Report("tiny", "made", 0, captions, pd.DataFrame(answers, columns=columns))


def trial_of(**reports: Report) -> skip_training.Trial:
    trial = skip_training.Trial(small_samples(2), small_samples(1))
    trial.reports = reports
    return trial


RIGHT = [("s0", "presence", "no", True), ("s0", "place", "sand", True)]
RIGHT += [("s0", "action", "falling", True), ("s1", "presence", "yes", True)]
RIGHT += [("s1", "place", "snow", True), ("s1", "action", "jumping", True)]
WRONG = [("s0", "presence", "no", False), ("s0", "place", "sand", True)]
WRONG += [("s0", "action", "falling", True), ("s1", "presence", "no", False)]
WRONG += [("s1", "place", "snow", True), ("s1", "action", "snow", False)]


def test_samples_have_one_question_about_presence_and_two_others_in_turn():
    samples = skip_training.draw_samples("scenes", 6)
    for sample in samples:
        kinds = [question.type for question in sample.questions]
        assert kinds.count("presence") == 1
        assert len(kinds) == 3
    assert len({sample.questions[1].type for sample in samples}) > 2


def test_facts_are_shares_by_sample_with_presence_apart():
    trial = trial_of(dense=reported([True, True], RIGHT), short=reported([True, True], WRONG))
    assert trial.kinds == ["presence?", "place?", "action?"]
    assert trial.score("short", "caption") == 1
    assert trial.score("short", "answer") == 0.5
    assert trial.score("short", "open") == 0.75
    assert trial.retained("short", "open").value == 0.75
    assert trial.retained("short", "caption").value == 1
    assert trial.means(["short"], ["subject", "colour?"]).loc["short"].isna().tolist() == [
        False,
        True,
    ]


def test_the_least_is_the_factor_or_type_that_kept_least():
    columns = ["action", "item", "colour", "place"]
    reports = {"dense": reported([True, True], RIGHT), "short": reported([True, False], WRONG)}
    for stage, report in reports.items():
        captions = report.captions.assign(**dict.fromkeys(columns, True))
        reports[stage] = replace(report, captions=captions)
    experiment = Experiment("skip-training", "tiny", "made")
    least = skip_training.record_kept(experiment, trial_of(**reports), "SKIP-3", "short")
    assert least == {"captions": "subject", "answers": "presence"}
    choices = {one["variant"]: one["choice"] for one in experiment.records}
    assert choices["captions, least"] == choices["answers, least"] == "least favourable"
    assert len(choices) == 5
    assert experiment.verdict("SKIP-3", "answers, least") == "refuted"


def test_answers_to_another_question_are_told_from_other_errors():
    (lesson,) = small_samples(1)
    place = next(question for question in lesson.questions if question.type == "place")
    answers = [("s0", "action", f" {place.answer.capitalize()}.", False)]
    answers += [("s0", "place", "the moon", False), ("s1", "presence", place.answer, False)]
    counts = skip_training.mistaken(reported([True], answers), [lesson])
    assert counts == {"asked": 2, "wrong": 2, "another question's answer": 1}


def test_stages_are_evaluated_once_and_cost_what_is_left(vlm):
    trial = skip_training.Trial(small_samples(2), small_samples(1), n_tokens=2)
    trial.add("dense", vlm)
    with skip(vlm, [2, 3, 4]):
        trial.add("skipped, untrained", vlm, 1)
    report = trial.reports["dense"]
    trial.add("dense", vlm)
    assert trial.reports["dense"] is report
    assert len(trial.reports["skipped, untrained"].captions) == 1
    shares = trial.shares()
    assert shares.loc["skipped", "memory"] == 1
    assert 0.3 < trial.operations("skipped") < 1
    assert shares.loc["skipped", "training step"] < 1


def test_three_seeds_are_recorded_as_shares_of_the_dense_record():
    def record(caption: float, presence: float) -> dict:
        factors = ("subject", "action", "item", "colour", "place")
        rows = [{"metric": f"caption/{name}", "value": caption, "n": 100} for name in factors]
        rows.append({"metric": "qa/presence", "value": presence, "n": 50})
        rows.append({"metric": "qa/place", "value": caption, "n": 50})
        rows.append({"metric": "qa/overall", "value": (caption + presence) / 2, "n": 100})
        return {"metrics": {"scenes": rows}}

    experiment = Experiment("skip-training", "tiny", "made", [0, 1, 2], interval_over="seeds")
    runs = [record(value, 0.5) for value in (0.8, 0.9, 1.0)]
    skip_training.record_seeds(experiment, "SKIP-3", runs, record(1.0, 1.0))
    values = {one["variant"]: one["value"] for one in experiment.records}
    assert values["captions, three seeds"] == pytest.approx(0.9)
    assert values["answers, three seeds"] == pytest.approx(0.7)
    assert values["answers, without presence, three seeds"] == pytest.approx(0.9)
    assert {one["interval_over"] for one in experiment.records} == {"seeds"}


class Notes(Experiment):
    """An experiment whose checks are remembered and not written."""

    def __init__(self) -> None:
        super().__init__("skip-training", "tiny", "made")
        self.held: dict[str, bool] = {}

    def check(self, statement: str, holds: object) -> bool:
        self.held[statement] = bool(holds)
        return bool(holds)


def test_checks_of_costs_fail_where_nothing_or_too_much_is_saved():
    columns = ["prefill", "decode", "training step", "memory"]
    rows = {"dense": [1, 1, 1, 1], "skipped": [0.6, 0.6, 0.6, 1], "short": [0.6, 0.6, 0.6, 0.6]}
    shares = pd.DataFrame(rows, columns).T
    notes = Notes()
    skip_training.check_savings(notes, shares)
    skip_training.check_short(notes, shares, equally_many=True)
    assert len(notes.held) == 5
    assert all(notes.held.values())
    shares.loc["skipped"] = [0.4, 0.4, 0.8, 0.9]
    skip_training.check_savings(notes, shares)
    skip_training.check_short(notes, shares, equally_many=True)
    assert not any(notes.held.values())


def test_checks_of_scores_tell_trained_from_untrained():
    wrong = [(*row[:3], False) for row in RIGHT]
    stages = {}
    for kind in ("skipped", "pruned", "short"):
        stages[f"{kind}, untrained"] = reported([False, False], wrong)
        stages[f"{kind}, trained"] = reported([True, True], RIGHT)
    trial = trial_of(**stages | {"dense": reported([True, True], RIGHT)})
    notes = Notes()
    kinds = ("skipped", "short", "pruned")
    skip_training.check_regained(notes, trial, kinds)
    assert not notes.held.pop("answers stop earlier than captions where much is regained")
    assert list(notes.held.values()) == [True, True]
    record = {"variant": "captions, three seeds", "value": 0.9}
    skip_training.check_skipped(notes, trial, [record])
    assert notes.held["without training nothing is kept, with it most"]
    assert notes.held["over three trainings about nine tenths of captions are kept"]
    assert not notes.held["the skipped model answers about presence as by chance"]
    trial.reports["short, untrained"] = reported([True, True], wrong)
    skip_training.check_regained(notes, trial, kinds)
    assert not notes.held["before training all three are at the floor"]


def test_the_chosen_half_starts_lowest_and_interval_2_above_guessing():
    plans = {"interval 2": range(14), "chosen": range(15), "ends": range(15)}
    notes = Notes()
    starts = {"interval 2": 12.0, "chosen": 8.0, "ends": 9.5}
    skip_training.check_starts(notes, starts, plans, 49152)  # evenly: 10.8 nats
    assert all(notes.held.values())
    skip_training.check_starts(notes, starts | {"interval 2": 8.5}, plans, 49152)
    assert not any(notes.held.values())


def test_errors_are_few_or_answer_another_question():
    mistakes = {"a": {"wrong": 3}, "b": {"wrong": 11}}
    short = {"wrong": 10, "another question's answer": 5}
    notes = Notes()
    skip_training.check_mistakes(notes, mistakes | {"short": short}, ["a", "b", "short"])
    assert all(notes.held.values())
    short["another question's answer"] = 1
    mistakes["a"]["wrong"] = 12
    skip_training.check_mistakes(notes, mistakes | {"short": short}, ["a", "b", "short"])
    assert not any(notes.held.values())
