"""VQA accuracy against its definition, the faults of the released code as
tests, and what steering changed.
"""

import re
from itertools import combinations

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlms_tutorial.errors import (
    ActivationsError,
    ComparisonError,
    EstimateError,
    LengthError,
    SelectionError,
)
from xlvlms_tutorial.metrics import vqa
from xlvlms_tutorial.metrics.answers import answer_table
from xlvlms_tutorial.metrics.intervals import bootstrap, proportion
from xlvlms_tutorial.metrics.vqa import (
    answer_counts,
    answer_kl,
    answer_type,
    side_effects,
    steering_table,
    targeted_change,
    vqa_accuracy,
    vqa_normalise,
)
from xlvlms_tutorial.samples import Question


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("The  Two\tdogs.", "2 dogs"),
        ("1,000", "1000"),
        ("1,000,000 people", "1000000 people"),
        ("red,blue", "red blue"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        (".5", ".5"),
        ("a.m.", "am"),
        ("10:30", "10:30"),
        ("boy's", "boy's"),
        ("boy\u2019s", "boy's"),
        ("dont", "don't"),
        ("DON'T", "don't"),
        ("couldntve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("youre", "you're"),
        ("well", "well"),
        ("its", "its"),
        ("left-hand side", "left hand side"),
        ("none", "0"),
        ("a", ""),
        ("", ""),
        ("yes!", "yes"),
        ("(maybe)", "maybe"),
        ("stop/go", "stop go"),
        ("ten\nan", "10"),
        ("eleven", "eleven"),
    ],
)
def test_normalise(raw, clean):
    assert vqa_normalise(raw) == clean


@given(st.one_of(st.text(max_size=25), st.text("aneo 1,.'-;yt", max_size=15)))
@settings(deadline=None, max_examples=300)
def test_normalising_twice_changes_nothing(text):
    assert vqa_normalise(vqa_normalise(text)) == vqa_normalise(text)


def slow_accuracy(prediction, references):
    answer, answers = vqa_normalise(prediction), list(map(vqa_normalise, references))
    subsets = list(combinations(answers, len(answers) - 1))
    return np.mean(
        [min(1, sum(reference == answer for reference in subset) / 3) for subset in subsets]
    )


ANSWER = st.sampled_from(["yes", "no", "Yes.", "2", "two"])


@given(
    st.lists(st.tuples(ANSWER, st.lists(ANSWER, min_size=2, max_size=10)), min_size=1, max_size=5)
)
@settings(deadline=None, max_examples=100)
def test_accuracy_is_the_mean_over_the_subsets_that_leave_one_out(cases):
    predictions, references = map(list, zip(*cases, strict=True))
    assert vqa_accuracy(predictions, references) == pytest.approx(
        [slow_accuracy(*entry) for entry in cases]
    )


def test_accuracy_of_ten_answers():
    references = [["yes"] * k + ["no"] * (10 - k) for k in range(11)]
    assert vqa_accuracy(["yes"] * 11, references) == pytest.approx([0, 0.3, 0.6, 0.9] + [1] * 7)


def test_three_of_ten_are_not_yet_right():
    """The released code takes min(1, 3 / 3) without leaving anyone out."""
    assert vqa_accuracy(["red"], [["red"] * 3 + ["blue"] * 7]).tolist() == pytest.approx([0.9])


def test_references_are_normalised_as_wholly_as_predictions():
    """The released code gives references the digits and articles alone."""
    assert vqa_accuracy(
        ["t-shirt", "dont", "U.S."], [["T-shirt!"], ["don't"], ["us."]]
    ).tolist() == [1, 1, 1]


def test_a_single_reference_is_matched_exactly():
    assert vqa_accuracy(["Two", "two dogs"], [["2"], ["2"]]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("predictions", "references", "error"),
    [
        ([], [], EstimateError),
        (["a"], [[]], EstimateError),
        (["a"], ["yes"], EstimateError),
        (["a"], [["a"], ["b"]], LengthError),
    ],
)
def test_accuracy_refuses_what_has_no_answers(predictions, references, error):
    with pytest.raises(error):
        vqa_accuracy(predictions, references)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Yes", "yes/no"),
        ("no.", "yes/no"),
        ("Yes, it is a cat", "yes/no"),
        ("no parking", "other"),
        ("nowhere", "other"),
        ("yesterday", "other"),
        ("two", "number"),
        ("3.5", "number"),
        ("1,000", "number"),
        ("none", "number"),
        ("two dogs", "other"),
        ("nan", "other"),
        ("inf", "other"),
        ("1e5", "other"),
        ("10:30", "other"),
        ("", "other"),
        ("white", "other"),
    ],
)
def test_answer_type(answer, kind):
    assert answer_type(answer) == kind


def test_counts_add_up_over_calls_and_answers():
    """The released code overwrites the overall counts of a type by those of the next."""
    predictions = ["Yes", "yes, it is", "no", "two", "2", "snow", "the Snow"]
    counts = answer_counts(predictions)
    expected = {("yes/no", "yes"): 2, ("yes/no", "no"): 1, ("number", "2"): 2, ("other", "snow"): 2}
    assert counts["count"].to_dict() == expected
    assert counts.index.tolist() == list(expected)
    both = counts.add(answer_counts(["no", "red"]), fill_value=0)["count"]
    assert both.sum() == len(predictions) + 2 and both["yes/no", "no"] == 2
    with pytest.raises(EstimateError):
        answer_counts([])


def test_targeted_change_counts_those_that_held_the_source():
    before = ["Yes", "yes.", "yes, a cat", "no", "nobody", "red"]
    after = ["No", "yes", "no, none", "no", "no", "no"]
    estimate = targeted_change(before, after, "yes", "no")
    assert estimate == proportion([True, False, True])
    assert targeted_change(before, after, "red", "no").value == 1


def test_answers_that_contain_another_are_not_that_answer():
    """The released code looks for substrings: "no" in "nobody", "1" in "10"."""
    assert targeted_change(["1", "10", "1"], ["3", "3", "13"], "1", "3") == proportion(
        [True, False]
    )
    assert targeted_change(["yes", "yes"], ["nobody", "no"], "yes", "no").value == 0.5


def test_targeted_change_refuses():
    with pytest.raises(SelectionError, match="same answer"):
        targeted_change(["2"], ["2"], "two", "2")
    with pytest.raises(EstimateError, match="'yes' before"):
        targeted_change(["no", "yesterday"], ["no", "no"], "yes", "no")
    with pytest.raises(LengthError):
        targeted_change(["yes"], [], "yes", "no")


QUESTIONS = [Question("presence", f"Any {k}?", "yes" if k % 2 else "no", "key") for k in range(12)]
QUESTIONS += [Question("colour", f"Which {k}?", "red", "key") for k in range(4)]
BEFORE = [question.answer for question in QUESTIONS]
AFTER = ["no"] * 12 + ["red", "red", "blue", "no"]


@pytest.fixture
def tables():
    return answer_table(BEFORE, QUESTIONS), answer_table(AFTER, QUESTIONS)


def test_side_effects_by_type(tables):
    table = side_effects(*tables, ["presence"])
    assert table.index.tolist() == ["overall", "elsewhere", "presence", "colour"]
    assert table["targeted"].tolist() == [False, False, True, False]
    assert table["n"].tolist() == [16, 4, 12, 4]
    assert table["after"].tolist() == pytest.approx([8 / 16, 2 / 4, 6 / 12, 2 / 4])
    assert table["change"].tolist() == pytest.approx((table["after"] - table["before"]).tolist())
    expected = bootstrap([0.0] * 2 + [-1.0] * 2)
    assert (table.loc["colour", "low"], table.loc["colour", "high"]) == (
        expected.low,
        expected.high,
    )


def test_overall_is_the_mean_over_questions_not_over_types():
    """The released code gives each type the same weight however many questions it has."""
    before = answer_table(BEFORE, QUESTIONS)
    table = side_effects(before, answer_table(BEFORE[:12] + ["blue"] * 4, QUESTIONS))
    assert (
        table.loc["overall", "after"]
        == 12 / 16
        != table.loc[["presence", "colour"], "after"].mean()
    )
    assert "elsewhere" not in table.index


def test_nothing_changed_is_no_certainty(tables):
    table = side_effects(tables[0], tables[0])
    assert (table["change"] == 0).all() and (table["low"] < 0).all() and (table["high"] > 0).all()


def test_groups_make_the_intervals_those_of_clusters(tables):
    scene = np.repeat(np.arange(8), 2)
    row = side_effects(*tables, groups=scene).loc["overall"]
    expected = bootstrap(
        np.array(
            [
                float(a) - float(b)
                for a, b in zip(tables[1]["correct"], tables[0]["correct"], strict=True)
            ]
        ),
        scene,
    )
    assert (row["low"], row["high"]) == (expected.low, expected.high)


def test_side_effects_refuse(tables):
    before, after = tables
    with pytest.raises(ComparisonError, match="numbers of questions"):
        side_effects(before, after[:-1])
    with pytest.raises(ComparisonError, match="questions of row 0"):
        side_effects(before, after[::-1])
    with pytest.raises(SelectionError, match="give a list of types; allowed: presence, colour"):
        side_effects(before, after, ["count"])
    with pytest.raises(SelectionError, match="give a list of types"):
        side_effects(before, after, "presence")


def test_steering_table(tables):
    before, after = tables
    table = steering_table({"none": before, "yes to no": after}, {"yes to no": ("yes", "no")})
    assert table.loc["none", ["presence", "colour"]].tolist() == [1, 1]
    assert table.loc["none", ["to target", "elsewhere"]].isna().all()
    assert table.loc["yes to no"].to_dict() == pytest.approx(
        {"presence": 0.5, "colour": 0.5, "to target": 1, "elsewhere": 2 / 10}
    )
    with pytest.raises(SelectionError, match="changes for nothing; give one for each of b"):
        steering_table({"none": before, "b": after}, {})
    with pytest.raises(EstimateError, match="0 of 16"):
        steering_table({"none": before, "b": after}, {"b": ("green", "no")})
    with pytest.raises(ComparisonError):
        steering_table({"none": before, "b": after[::-1]}, {"b": ("yes", "no")})


def test_kl_is_its_definition(monkeypatch):
    first, second = torch.randn(2, 9, 11, generator=torch.Generator().manual_seed(0))
    p, q = (np.exp(side.double().numpy()) for side in (first, second))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = []
    for row_p, row_q in zip(p, q, strict=True):
        expected.append(sum(a * np.log(a / b) for a, b in zip(row_p, row_q, strict=True)))
    assert answer_kl(first, second).numpy() == pytest.approx(np.array(expected), rel=1e-12)
    monkeypatch.setattr(vqa, "_BLOCK", 25)  # two rows at once
    assert answer_kl(first, second).numpy() == pytest.approx(np.array(expected), rel=1e-12)


def test_kl_of_the_same_answers_is_nothing_and_of_sure_ones_finite():
    logits = torch.tensor([[300.0, 0.0], [0.0, 0.0]], dtype=torch.float16)
    assert answer_kl(logits, logits).tolist() == [0, 0]
    assert answer_kl(logits, logits + 5).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert answer_kl(logits, logits.flip(1)).tolist() == pytest.approx([300, 0])
    assert answer_kl(logits, logits).dtype == torch.float64


def test_kl_refuses():
    with pytest.raises(ComparisonError):
        answer_kl(torch.zeros(2, 3), torch.zeros(2, 4))
    for bad in (
        torch.zeros(0, 3),
        torch.tensor([[0.0, torch.nan]]),
        torch.tensor([[0.0, -torch.inf]]),
    ):
        with pytest.raises(ActivationsError):
            answer_kl(bad, torch.zeros_like(bad))


def test_tables_with_fractional_accuracy_work_too(tables):
    before, after = (table.assign(correct=table["correct"] * 0.9) for table in tables)
    assert side_effects(before, after).loc["colour", "change"] == pytest.approx(-0.45)
    assert isinstance(
        steering_table({"none": before, "b": after}, {"b": ("yes", "no")}), pd.DataFrame
    )


def as_the_script_does(prediction, references):
    """The official evaluation, as its description goes.

    One mark, one word, one person at a time.
    """
    contractions = {
        "hed": "he'd",
        "twas": "'twas",
        "dont": "don't",
        "couldnt've": "couldn't've",
        "somebody'd": "somebodyd",
        "yall'll": "y'all'll",
    }

    def normalised(text):
        out = text
        for mark in ';/[]"{}()=+\\_-><@`,?!':
            beside = mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if beside or re.search(r"\d,\d", text) else " ")
        out, remaining = "", list(reversed(out))
        while remaining:
            letter = remaining.pop()
            out += "" if letter == "." and not (remaining and remaining[-1].isdigit()) else letter
        words = [
            {"none": "0", "two": "2", "ten": "10"}.get(word, word) for word in out.lower().split()
        ]
        return " ".join(
            contractions.get(word, word) for word in words if word not in ("a", "an", "the")
        )

    prediction, references = prediction.strip(), [reference.strip() for reference in references]
    if len(set(references)) > 1:
        prediction, references = (
            normalised(prediction),
            [normalised(reference) for reference in references],
        )
    # the official average leaves each person out in turn
    matches = []
    for out in range(len(references)):
        others = references[:out] + references[out + 1 :]
        matches.append(others.count(prediction))
    return np.mean([min(1, count / 3) for count in matches])


PARTS = [
    "Yes",
    "yes",
    "a dog",
    "The dog.",
    "dog",
    "1,000 t-shirts",
    "t-shirts",
    "t- shirts",
    "2",
    "two",
    "None",
    "hed",
    "Twas",
    "dont",
    "couldnt've",
    "somebody'd",
    "yall'll",
    "10:30",
    "3.5",
    " red\t",
    "red/blue",
    "(red) blue",
    "\u00fcber",
    "",
    "im",
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PARTS), st.lists(st.sampled_from(PARTS), min_size=1, max_size=10))
def test_official_is_what_the_script_gives(prediction, references):
    assert vqa_accuracy([prediction], [references], official=True)[0] == pytest.approx(
        as_the_script_does(prediction, references)
    )


@pytest.mark.parametrize(
    ("prediction", "references", "official", "ours"),
    [
        ("Yes", ["yes"] * 10, 0, 1),
        ("yes", ["yes"] * 10, 1, 1),
        ("Yes", ["yes"] * 9 + ["no"], 1, 1),
        (" yes\n", ["yes"] * 10, 1, 1),
        ("red.", ["red"] * 10, 0, 1),
        ("1,000 t-shirts", ["1000 tshirts"] * 5 + ["many"] * 5, 1, 0),
        ("hed", ["he'd"] * 5 + ["she"] * 5, 1, 0),
        ("im", ["i'm"] * 5 + ["me"] * 5, 0, 1),
        ("yes", ["yes"], 0, 1),
    ],
)
def test_official_and_ours_differ_as_is_told(prediction, references, official, ours):
    assert vqa_accuracy([prediction], [references], official=True)[0] == official
    assert vqa_accuracy([prediction], [references])[0] == ours


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(
    ("prediction", "reference"), [("2", 2), (2, "2"), (2, np.int64(2)), (2.5, 2.5), ("3.5", 3.5)]
)
def test_numbers_count_as_their_digits(prediction, reference, official):
    assert vqa_accuracy([prediction], [[reference] * 10], official)[0] == 1


@pytest.mark.parametrize("bad", [None, True, float("nan"), ["2"], b"2", {"answer": "2"}])
def test_answers_that_are_no_texts_are_refused(bad, monkeypatch):
    # its checks refuse some of these already
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for predictions, references in (([bad], [["2"] * 3]), (["2"], [["2", bad, "2"]])):
        with pytest.raises(EstimateError, match="texts and finite numbers"):
            vqa_accuracy(predictions, references)


@pytest.mark.parametrize("lacking", ["type", "question", "target", "answer", "correct"])
def test_tables_without_a_column_are_refused(tables, lacking):
    before, after = tables
    for pair in ((before.drop(columns=lacking), after), (before, after.drop(columns=lacking))):
        with pytest.raises(EstimateError, match=f"no column '{lacking}'"):
            side_effects(*pair)
        with pytest.raises(EstimateError, match=f"no column '{lacking}'"):
            steering_table({"none": pair[0], "steered": pair[1]}, {"steered": ("yes", "no")})


def test_no_tables_are_refused():
    with pytest.raises(SelectionError, match="no tables"):
        steering_table({}, {})
