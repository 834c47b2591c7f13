import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from xlvlms_tutorial.data.samples import Question
from xlvlms_tutorial.errors import EstimateError, LengthError
from xlvlms_tutorial.metrics.answers import answer_table
from xlvlms_tutorial.metrics.hallucination import chair, pope
from xlvlms_tutorial.metrics.uncertainty import bootstrap, proportion

STRATA = ("random", "popular", "adversarial")


def presence(answers, predictions, strata=("random",)):
    asked = [Question("presence", "Is there a bee?", a, "bee", strata[i % len(strata)]) for i, a in enumerate(answers)]
    return answer_table(predictions, asked)


def test_pope_agrees_with_scikit_learn_in_every_stratum():
    rng = np.random.default_rng(0)
    answers, told = rng.choice(["yes", "no"], 90), rng.choice(["Yes.", "No, there is not."], 90, p=[0.7, 0.3])
    found = pope(presence(answers.tolist(), told.tolist(), STRATA))
    assert found.index.tolist() == [*STRATA, "overall"]
    for k, name in enumerate(found.index):
        part = slice(None) if name == "overall" else slice(k, None, 3)
        truth, yes = answers[part] == "yes", np.char.startswith(told[part], "Yes")
        row = found.loc[name]
        assert row[["accuracy", "precision", "recall", "f1", "yes_ratio"]].tolist() == pytest.approx(
            [accuracy_score(truth, yes), precision_score(truth, yes), recall_score(truth, yes), f1_score(truth, yes), yes.mean()]
        )
        assert (row["yes_ratio_low"], row["yes_ratio_high"]) == (proportion(yes).low, proportion(yes).high)
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
        assert row["n"] == len(yes)


def test_an_unclear_answer_is_neither_right_nor_a_yes():
    row = pope(presence(["no", "yes", "yes", "no"], ["A frog on the grass.", "It is there.", "yes", "no"])).loc["overall"]
    assert row[["accuracy", "yes_ratio", "unclear", "recall"]].tolist() == [0.5, 0.25, 0.5, 0.5]


def test_undefined_precision_is_nan_and_not_zero():
    row = pope(presence(["yes", "no"], ["no", "no"])).loc["overall"]
    assert np.isnan(row["precision"])
    assert row["recall"] == row["f1"] == 0


def test_pope_looks_at_presence_questions_only_and_groups_by_scene():
    table = answer_table(["yes", "red", "no", "no"] * 6, [
        Question("presence", "?", "yes", "bee", "random"), Question("colour", "?", "blue", "key"),
        Question("presence", "?", "yes", "fly", "popular"), Question("presence", "?", "no", "fly", "popular"),
    ] * 6)  # fmt: skip
    scenes = np.repeat(np.arange(6), 4)
    found = pope(table, scenes)
    assert found["n"].tolist() == [6, 12, 18]
    expected = bootstrap([True, False, True] * 6, np.repeat(np.arange(6), 3))
    assert found.loc["overall", ["accuracy_low", "accuracy_high"]].tolist() == [expected.low, expected.high]
    with pytest.raises(EstimateError, match="presence"):
        pope(table[table["type"] == "colour"])
    with pytest.raises(LengthError):
        pope(table, scenes[1:])


WORDS = ("robot", "key", "box", "bee")


def test_chair_counts_absent_objects_and_captions_that_name_one():
    told = ["A robot beside two keys and a box.", "A bee.", "Nothing at all.", "Robots and a robot."]
    there = [{"robot", "key"}, {"bee"}, {"box"}, {"key"}]
    found = chair(told, there, WORDS)
    assert found["value"].tolist() == pytest.approx([2 / 5, 2 / 4])  # box of 3 named, none of 1, robot of 1 (once a caption)
    assert found["n"].tolist() == [5, 4]
    assert (found["low"] <= found["value"]).all()
    assert (found["value"] <= found["high"]).all()


def test_chair_takes_synonyms():
    assert chair(["An android."], [{"robot"}], {"robot": ("android",), "key": ()}).loc["CHAIR_i", "value"] == 0
    assert chair(["An android."], [{"key"}], {"robot": ("android",), "key": ()}).loc["CHAIR_s", "value"] == 1


def test_chair_without_a_named_object_is_undefined():
    found = chair(["Hm.", "Well."], [{"bee"}, {"box"}], WORDS)
    assert np.isnan(found.loc["CHAIR_i", "value"])
    assert found.loc["CHAIR_i", "n"] == 0
    assert found.loc["CHAIR_s", "value"] == 0


def test_chair_refuses_what_does_not_fit():
    with pytest.raises(LengthError):
        chair(["a bee"], [], WORDS)
    with pytest.raises(EstimateError):
        chair([], [], WORDS)
    with pytest.raises(EstimateError, match="zebra"):
        chair(["a bee"], [{"zebra"}], WORDS)
