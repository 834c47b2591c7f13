"""What steering changed of the answers, and how far it moved their distribution."""

import numpy as np
import pandas as pd
import pytest
import torch

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics import steering
from xlvlms_tutorial.metrics.answers import answer_table
from xlvlms_tutorial.metrics.steering import answer_kl, steering_table
from xlvlms_tutorial.samples import Question

ASKED = [Question("presence", f"Any {k}?", "yes" if k % 2 else "no", "key") for k in range(12)]
ASKED += [Question("colour", f"Which {k}?", "red", "key") for k in range(4)]
BEFORE = [asked.answer for asked in ASKED]
AFTER = ["no"] * 12 + ["red", "red", "blue", "no"]


@pytest.fixture
def tables():
    return answer_table(BEFORE, ASKED), answer_table(AFTER, ASKED)


def test_steering_table(tables):
    before, after = tables
    found = steering_table({"none": before, "yes to no": after}, {"yes to no": ("yes", "no")})
    assert found.loc["none", ["presence", "colour"]].tolist() == [1, 1]
    assert found.loc["none", ["to target", "elsewhere"]].isna().all()
    assert found.loc["yes to no"].to_dict() == pytest.approx(
        {"presence": 0.5, "colour": 0.5, "to target": 1, "elsewhere": 2 / 10}
    )
    with pytest.raises(InputError, match="changes for nothing; give one for each of b"):
        steering_table({"none": before, "b": after}, {})
    with pytest.raises(InputError, match="0 of 16"):
        steering_table({"none": before, "b": after}, {"b": ("green", "no")})
    with pytest.raises(InputError):
        steering_table({"none": before, "b": after[::-1]}, {"b": ("yes", "no")})


def test_answers_that_contain_another_are_not_that_answer():
    """The released code looks for substrings: "no" in "nobody", "1" in "10"."""
    questions = [Question("count", f"How many {k}?", "1", "key") for k in range(3)]
    before = answer_table(["1", "10", "One."], questions)
    after = answer_table(["3", "3", "13"], questions)
    changes = steering_table({"none": before, "b": after}, {"b": ("1", "3")}).loc["b"]
    assert changes[["to target", "elsewhere"]].tolist() == [0.5, 1]


def test_kl_is_its_definition(monkeypatch):
    one, other = torch.randn(2, 9, 11, generator=torch.Generator().manual_seed(0))
    p, q = (np.exp(side.double().numpy()) for side in (one, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = [
        sum(a * np.log(a / b) for a, b in zip(*rows, strict=True))
        for rows in zip(p, q, strict=True)
    ]
    assert answer_kl(one, other).numpy() == pytest.approx(np.array(expected), rel=1e-12)
    monkeypatch.setattr(steering, "_BLOCK", 25)  # two rows at once
    assert answer_kl(one, other).numpy() == pytest.approx(np.array(expected), rel=1e-12)


def test_kl_of_the_same_answers_is_nothing_and_of_sure_ones_finite():
    logits = torch.tensor([[300.0, 0.0], [0.0, 0.0]], dtype=torch.float16)
    assert answer_kl(logits, logits).tolist() == [0, 0]
    assert answer_kl(logits, logits + 5).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert answer_kl(logits, logits.flip(1)).tolist() == pytest.approx([300, 0])
    assert answer_kl(logits, logits).dtype == torch.float64


def test_kl_refuses():
    with pytest.raises(InputError):
        answer_kl(torch.zeros(2, 3), torch.zeros(2, 4))
    for bad in (
        torch.zeros(0, 3),
        torch.tensor([[0.0, torch.nan]]),
        torch.tensor([[0.0, -torch.inf]]),
    ):
        with pytest.raises(InputError):
            answer_kl(bad, torch.zeros_like(bad))


def test_tables_with_fractional_accuracy_work_too(tables):
    before, after = (table.assign(correct=table["correct"] * 0.9) for table in tables)
    assert isinstance(
        steering_table({"none": before, "b": after}, {"b": ("yes", "no")}), pd.DataFrame
    )


@pytest.mark.parametrize(
    "lacking", ["type", "question", "target", "answer", "correct", "prediction"]
)
def test_tables_without_a_column_are_refused(tables, lacking):
    before, after = tables
    for pair in ((before.drop(columns=lacking), after), (before, after.drop(columns=lacking))):
        with pytest.raises(InputError, match=f"no column '{lacking}'"):
            steering_table({"none": pair[0], "steered": pair[1]}, {"steered": ("yes", "no")})


def test_no_tables_are_refused():
    with pytest.raises(InputError, match="no tables"):
        steering_table({}, {})
