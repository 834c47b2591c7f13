"""Votes and copies: hand-made cases, a loop of its own, and models that copy by rule."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.in_context import (
    Episode,
    Example,
    copy_rate,
    episodes,
    majority_vote,
)

WORDS = ("red", "blue", "green", "grey")
ANSWERS = st.lists(st.sampled_from(WORDS), min_size=3, max_size=3)


def episode(
    truth: str, answers: list[str], number: int = 0, order: str = "nearest_last"
) -> Episode:
    shown = tuple(Example(f"s{k}", None, "Which ?", answer) for k, answer in enumerate(answers))
    return Episode(Example(f"q{number}", None, "Which ?", truth), shown, order)


def reversed_order(one: Episode) -> Episode:
    return Episode(one.query, one.demonstrations[::-1], "nearest_first")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["red", "blue", "red"], "red"),
        (["red", "blue"], "blue"),  # a tie: the nearest stands last
        (["blue", "red", "red", "blue"], "blue"),
        (["two", "A key", "2."], "2."),  # as accuracy compares them, as the nearest says it
        (["", "red", ""], "red"),
        (["A", "B", "a."], "a."),  # options, of which one is an article too
    ],
)
def test_the_most_frequent_answer_wins_and_of_equals_the_nearest(answers, expected):
    assert majority_vote([episode("x", answers)]) == [expected]
    assert majority_vote([reversed_order(episode("x", answers))]) == [expected]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=7))
def test_a_vote_is_one_of_the_most_frequent_in_either_order(answers):
    one = episode("x", answers)
    (vote,) = majority_vote([one])
    counts = Counter(answers)
    assert counts[vote] == max(counts.values())
    assert majority_vote([reversed_order(one)]) == [vote]


@pytest.mark.parametrize("answers", [[], ["", " "], ["...", "..."]])
def test_no_answers_give_no_vote(answers):
    with pytest.raises(InputError, match="no demonstration of the query 'q0' has an answer"):
        majority_vote([episode("x", answers)])


def looped(outputs: list[str], made: list[Episode]) -> dict[int, list[bool]]:
    """The definition, one position at a time."""
    copies: dict[int, list[bool]] = {}
    for j in range(len(made[0].demonstrations)):
        copies[j + 1] = []
        for output, one in zip(outputs, made, strict=True):
            answers = [example.answer for example in one.demonstrations]
            if answers[j] == one.query.answer or answers.count(answers[j]) > 1:
                continue
            copies[j + 1].append(output == answers[j])
    return copies


@given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS), ANSWERS), min_size=1))
def test_copy_rates_are_those_of_the_definition(cases):
    made = [episode(truth, answers, k) for k, (truth, _, answers) in enumerate(cases)]
    outputs = [output for _, output, _ in cases]
    table = copy_rate(outputs, made)
    for position, copies in looped(outputs, made).items():
        row = table.iloc[position - 1]
        assert row["position"] == position and row["n"] == len(copies)
        if copies:
            assert row["rate"] == pytest.approx(np.mean(copies))
            assert row["low"] <= row["rate"] <= row["high"]
        else:
            assert math.isnan(row["rate"])
    back = copy_rate(outputs, [reversed_order(one) for one in made])
    assert back["rate"].fillna(-1).tolist() == table["rate"].fillna(-1).tolist()[::-1]


def test_a_model_that_copies_the_last_copies_the_last_in_either_order():
    support = [Example(f"s{k}", None, "Which ?", WORDS[k % 4]) for k in range(12)]
    queries = [Example(f"q{k}", None, "Which ?", WORDS[k % 4]) for k in range(40)]
    for order in ("nearest_last", "nearest_first"):
        made = episodes(support, queries, 3, order=order)
        outputs = [one.demonstrations[-1].answer for one in made]
        rates = copy_rate(outputs, made)
        assert rates["rate"].tolist() == [0.0, 0.0, 1.0]
        assert rates["n"].min() > 10 and rates["uniform"].tolist() == [1 / 3] * 3


def test_an_option_that_is_an_article_is_an_answer_too():
    made = [episode("C", ["A", "B", "D"])]
    assert copy_rate(["A."], made)["rate"].tolist() == [1.0, 0.0, 0.0]
    assert copy_rate(["B"], made)["rate"].tolist() == [0.0, 1.0, 0.0]
    assert copy_rate([""], made)["rate"].tolist() == [0.0, 0.0, 0.0]


def test_a_model_that_is_right_copies_nothing():
    made = [episode("red", ["red", "blue", "green"], k) for k in range(5)]
    table = copy_rate(["red"] * 5, made)
    assert table["n"].tolist() == [0, 5, 5] and table["rate"].tolist()[1:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("outputs", "made", "message"),
    [
        (["red"], [], "differ|1 outputs"),
        ([], [], "episodes of no demonstrations"),
        (["red"], [episode("x", [])], "episodes of 0 demonstrations"),
        (["red"] * 2, [episode("x", ["red"]), episode("x", ["red", "blue"])], "of 1, 2 demonstr"),
        (["red"], [episode("", ["red"])], "an answer in the episode of 'q0' is empty"),
        (["red"], [episode("x", ["..."])], "an answer in the episode of 'q0' is empty"),
    ],
)
def test_what_no_rate_can_be_measured_on_is_refused(outputs, made, message):
    with pytest.raises(InputError, match=message):
        copy_rate(outputs, made)
