"""A claim is measured again by the rule of its chapter, whoever answers the questions."""

import numpy as np
import pytest

from tools.live import ledger
from xlvlms_tutorial import load
from xlvlms_tutorial.tutorials.steering_answers import Study

TASK = "yes to no"


@pytest.fixture(scope="module")
def study():
    pairs, types = [["yes", "no"]], ["colour", "place"]
    return Study(load("pocket-llava"), "scenes", pairs, types, 4, n_scenes=24)


@pytest.fixture(scope="module")
def changes(study):
    one = np.ones(study.vlm.width, np.float32)
    return [ledger.Change(name, one, 30, 1.0) for name in ("vector", "random")]


@pytest.fixture(scope="module")
def expected(study):
    no = np.full(len(study.test.samples), "no", object)
    return {"vector": no, "random": study.test.answers}


def answering(*words):
    """An engine that says one word a change."""
    return lambda questions, changes: [[word] * len(questions) for word in words]


def test_the_same_answers_are_the_same_verdict(study, changes, expected):
    ask = answering("no", "yes")
    lines, differing = ledger.compare(study, TASK, changes, expected, ask)
    assert differing == []
    outcomes = [line.rpartition(", ")[2] for line in lines if line.startswith("STEER-1")]
    assert outcomes == ["confirmed", "confirmed"]


def test_every_answer_that_differs_is_named_and_so_is_a_verdict(study, changes, expected):
    ask = answering("yes", "yes")
    _, differing = ledger.compare(study, TASK, changes, expected, ask)
    n_sources = int((study.test.answers == "yes").sum())
    assert len(differing) == n_sources + 1
    assert differing[0].startswith("vector, ")
    assert differing[-1] == "STEER-1 is undecided by the page"
