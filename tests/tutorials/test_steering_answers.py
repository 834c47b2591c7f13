"""What the chapters on steering share: tasks, questions, scores and settings."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support.quizzes import YES_TO_NO, ask, bare_study, quiz
from tests.support.steering import by_hand
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.methods.steering import SteeringVectors
from xlvlms_tutorial.tutorials import steering_answers
from xlvlms_tutorial.tutorials.steering_answers import Task

LENGTHS = {1: 2.0, 2: 0.0, 3: 10.0}
VECTORS = SteeringVectors(
    {layer: torch.tensor([length, 0.0]) for layer, length in LENGTHS.items()}, {"model": "by hand"}
)


@pytest.fixture
def study():
    return bare_study()


def test_pairs_that_cannot_be_used_are_replaced_by_another_type():
    known = ["yes", "no", "wood", "tin", "one", "two"]
    kinds = {"yes": "presence", "no": "presence", "wood": "matter", "tin": "matter"}
    kinds |= {"one": "count", "two": "count"}
    wanted = [["yes", "no"], ["red", "blue"], ["sand", "snow"]]
    right = dict.fromkeys(known, 4)
    pairs = steering_answers._usable_pairs(wanted, known, kinds, ["yes", "tin", "two"], right)
    assert pairs == [("yes", "no"), ("tin", "wood"), ("two", "one")]
    # no more than were wanted, and none that the model never says or that is asked for once only
    assert steering_answers._usable_pairs(wanted[:1], known, kinds, ["tin"], right) == [
        ("tin", "wood")
    ]
    assert steering_answers._usable_pairs(wanted, known, kinds, ["tin"], right | {"tin": 1}) == []


def test_states_are_of_the_first_questions_to_each_answer():
    samples = ask(["yes", "no", "yes", "red", "yes", "no"])
    states = by_hand(6)
    selected = steering_answers.states_for(states, samples, ["yes", "no"], 2)
    assert selected.table["sample"].tolist() == [0, 1, 2, 5]


def test_a_score_counts_source_answers_and_what_other_types_lose():
    samples = ask(["yes", "yes", "no", "red", "blue"])
    before = ["yes", "yes", "no", "red", "red"]  # the last one is wrong
    after = ["no", "yes", "yes", "blue", "blue"]  # of the colours one is lost and one is won
    rates = steering_answers.score(samples, before, after, YES_TO_NO)
    assert rates == {"to target": 0.5, "lost": 0.0}
    after[4] = "red"
    assert steering_answers.score(samples, before, after, YES_TO_NO)["lost"] == 0.5


def test_where_all_questions_are_of_one_type_the_others_are_those_without_a_source_answer():
    samples = ask(["yes", "no", "no"])
    other = steering_answers._other_types(samples, ["yes", "yes", "no"], YES_TO_NO)
    assert other.tolist() == [False, False, True]


@pytest.mark.parametrize("limit, expected", [(0.1, (30, 0.5)), (0.3, (25, 0.5)), (0.0, (30, 0.5))])
def test_the_best_setting_is_within_the_limit_or_loses_least(limit, expected):
    rows = pd.DataFrame({"layer": [25, 25, 30], "strength": [0.5, 1.0, 0.5]})
    rows["to target"] = [0.9, 0.9, 0.4]
    rows["lost"] = [0.2, 0.2, 0.05]
    assert steering_answers.best_within(rows, limit) == expected
    tried = rows.assign(vector="yes to no")
    assert steering_answers.best_settings(tried, limit) == {"yes to no": expected}


def test_the_slope_of_a_step_is_the_least_squares_one():
    changed = pd.DataFrame({10: [0, 0], 20: [0, 1], 30: [1, 1]})
    x = np.array([10, 20, 30])
    expected = [np.polyfit(x, row, 1)[0] for row in changed.to_numpy(float)]
    assert steering_answers.slope(changed).value == pytest.approx(np.mean(expected))


def test_a_gain_is_over_the_baseline_that_does_best_on_these_questions(study):
    study.test = quiz(["yes"] * 8 + ["red"] * 2)
    everything = ["no"] * 8 + ["red"] * 2
    half = ["no"] * 4 + ["yes"] * 4 + ["blue"] * 2
    baselines = {"nothing": study.test.answers, "half": half}
    gain = steering_answers.gain(study, "yes to no", everything, baselines)
    assert gain.value == 0.5 and gain.n == 8
    rates = study.rates({"yes to no": {"all": everything, "half": half}})
    assert rates["yes to no"].to_dict() == {"all": 1.0, "half": 0.5}


def test_accuracy_on_other_types_is_over_scenes(study):
    scenes = ["a", "a", "b", "b", "c", "c"]
    study.test = quiz(["yes", "red", "yes", "red", "no", "blue"], scenes=scenes)
    steered = ["no", "red", "no", "blue", "no", "blue"]  # one of three colours is lost
    change = steering_answers.accuracy_change(study, "yes to no", steered)
    assert change.value == pytest.approx(-1 / 3)
    assert change.low < change.value <= change.high
    same = steering_answers.accuracy_change(study, "yes to no", study.test.answers)
    assert same.value == 0 and same.low < 0 < same.high


def test_illustrations_are_answered_correctly_where_there_are_such(study):
    answers, says = ["no", "yes", "no", "red", "blue"], ["yes", "yes", "no", "red", "blue"]
    study.test = quiz(answers, says)
    shown = steering_answers.illustrations(study, ["yes to no", "red to blue"])
    assert [sample.questions[0].answer for sample in shown] == ["yes", "no", "red", "blue"]


def test_changes_by_layer_are_those_to_the_target(study, monkeypatch):
    study.validation = quiz(["yes", "yes", "red"])
    rows = pd.DataFrame({"layer": [3, 9], "answers": [["yes", "no"], ["no", "no"]]})
    monkeypatch.setattr(study, "steer", lambda samples, *args, **options: rows)
    changed = steering_answers.changed_by_layer(study, "yes to no", VECTORS, [3, 9])
    assert changed.to_dict("list") == {3: [False, True], 9: [True, True]}


def test_settings_are_scored_for_the_task_of_their_vector(study, monkeypatch):
    study.validation = quiz(["yes", "yes", "red", "red"])
    ids = [sample.id for sample in study.validation.samples]
    said = dict(zip(ids, ["no", "no", "red", "blue"], strict=True))

    def steer(samples, vectors, layers, strengths):
        row = {"layer": 9, "strength": 1.0, "answers": [said[sample.id] for sample in samples]}
        return pd.DataFrame([row])

    monkeypatch.setattr(study, "steer", steer)
    tried = steering_answers.try_settings(study, dict.fromkeys(study.pairs, VECTORS), [9], [1.0])
    assert tried["vector"].tolist() == ["yes to no", "red to blue"]
    assert tried["to target"].tolist() == [1.0, 0.5]
    assert tried["lost"].tolist() == [0.5, 1.0]


def test_answers_stay_without_an_attention_that_adds_nothing(study):
    study.vlm = tiny_llava()
    for block in study.vlm.model.model.language_model.layers:
        block.self_attn.o_proj.weight.zero_()
    questions = ask(["yes", "red", "no"])
    study.validation = study.recorded_quiz(questions)
    spoken = study.validation.answers
    study.pairs = {"all": Task(tuple(set(spoken)), ("nothing",))}
    staying = steering_answers.knock_out(study, 2)
    assert staying.index.tolist() == [2, 3]
    assert (staying["attention"] == 1).all(axis=None)
    # without attention nothing comes from the picture either
    assert (staying["picture"] == 1).all(axis=None)


def test_stretched_vectors_are_as_long_as_the_late_one(study, monkeypatch):
    study.validation = quiz(["yes", "no", "red"])
    scaled = {}

    def at_setting(vectors, layer, strength):
        scaled[layer] = strength
        return layer

    rows = pd.DataFrame({"layer": [1], "strength": [0.5], "answers": [["no"]]})
    monkeypatch.setattr(steering_answers, "at_setting", at_setting)
    monkeypatch.setattr(steering_answers, "score", lambda *args: {"to target": 1.0, "lost": 0.0})
    monkeypatch.setattr(study, "steer", lambda *args, **options: rows)
    table = steering_answers.stretched(study, "yes to no", VECTORS, [1, 2], like=3)
    assert scaled == {1: 5.0}  # a vector of length 0 cannot be stretched
    assert table.index.names == ["layer", "strength"]
