import jaxtyping
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.answers import (
    accuracy_by_type,
    answer_table,
    exact_match,
    normalise,
    with_columns,
    yes_or_no,
)
from xlvlms_tutorial.metrics.intervals import bootstrap, proportion
from xlvlms_tutorial.samples import Question


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" The Snow. ", "snow"),
        ("Two!", "2"),
        ("a red\nkey", "red key"),
        ("", ""),
        ("don't", "dont"),
        ("left-hand side", "left hand side"),
    ],
)
def test_normalise(raw, clean):
    assert normalise(raw) == clean


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("Red.", "red", True),
        ("3", "three", True),
        ("the snow", "snow", True),
        ("dark red", "red", False),
        ("", "red", False),
        ("Yes, there is no doubt.", "yes", True),
        ("No", "yes", False),
        ("Maybe yes", "yes", False),
        ("nowhere", "no", False),
        ("yes", "red", False),
        ("3.5", "3 5", False),
        ("It's 3.5.", "3.5", False),
        ("3.5.", "3.5", True),
        ("1,000", "1000", True),
        ("none", "0", True),
    ],
)
def test_exact_match(prediction, answer, same):
    assert exact_match(prediction, answer) is same


@pytest.mark.parametrize(
    ("prediction", "read"),
    [
        ("Yes.", "yes"),
        ("NO, it is not", "no"),
        ("no", "no"),
        ("There is", None),
        ("", None),
        ("yesterday", None),
        # letters that a search for "no" would take
        ("snow", None),
        ("Not that I can see", None),
        ("now", None),
        ("I know it is", None),
        ("None", None),
        ("It is not there, no", None),
        ("Yes, now there is snow", "yes"),
    ],
)
def test_yes_or_no(prediction, read):
    assert yes_or_no(prediction) == read


QUESTIONS = [
    Question("colour", "Which?", "red", "key"),
    Question("colour", "Which?", "blue", "gem"),
    Question("presence", "Any?", "no", "bee", "random"),
]


def test_answer_table_has_one_row_a_question():
    table = answer_table(["Red", "red", "no"], QUESTIONS)
    assert table["correct"].tolist() == [True, False, True]
    assert table["stratum"].isna().tolist() == [True, True, False]
    assert table.loc[2, ["type", "answer", "prediction", "target", "question"]].tolist() == [
        "presence",
        "no",
        "no",
        "bee",
        "Any?",
    ]
    with pytest.raises(InputError, match="predictions: 1, questions: 3"):
        answer_table(["red"], QUESTIONS)


def test_accuracy_is_overall_and_by_type_with_wilson_intervals():
    table = pd.concat([answer_table(["Red", "red", "no"], QUESTIONS)] * 5, ignore_index=True)
    result = accuracy_by_type(table)
    assert result.index.tolist() == ["overall", "colour", "presence"]
    assert result["value"].tolist() == pytest.approx([2 / 3, 1 / 2, 1])
    assert result["n"].tolist() == [15, 10, 5]
    expected = proportion([True, False] * 5)
    assert result.loc["colour", ["low", "high"]].tolist() == pytest.approx(
        [expected.low, expected.high]
    )


def test_groups_make_the_interval_a_cluster_bootstrap_also_on_a_filtered_table():
    table = pd.concat([answer_table(["Red", "red", "no"], QUESTIONS)] * 8, ignore_index=True)
    table["correct"] = np.random.default_rng(0).random(len(table)) < 0.6
    part = table[table.index % 3 != 2]
    scene = np.repeat(np.arange(8), 2)
    expected = bootstrap(part["correct"], scene, seed=2)
    row = accuracy_by_type(part, scene, seed=2).loc["overall"]
    assert (row["low"], row["high"]) == (expected.low, expected.high)
    with pytest.raises(InputError):
        accuracy_by_type(part, scene[:-1])


def test_no_answers_give_no_accuracy():
    with pytest.raises(InputError, match="no answers"):
        accuracy_by_type(answer_table([], []))


@pytest.mark.parametrize("lacking", ["type", "correct"])
def test_tables_without_a_column_are_refused_with_those_they_have(lacking):
    table = answer_table(["Red", "red", "no"], QUESTIONS).drop(columns=lacking)
    with pytest.raises(InputError, match=f"no column '{lacking}' among .*prediction.*answer_table"):
        accuracy_by_type(table)


@pytest.mark.parametrize("groups", [None, [], {"type": []}, "table"])
def test_what_is_no_table_is_refused(groups, monkeypatch):
    # its checks refuse these already
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match=f"found a {type(groups).__name__}"):
        with_columns(groups, ("type",))
