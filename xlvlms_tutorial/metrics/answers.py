"""Answers to questions: what counts as the same answer, and how often a model gives it."""

from collections.abc import Collection, Sequence

import pandas as pd
from numpy.typing import ArrayLike

from xlvlms_tutorial.errors import EstimateError, LengthError
from xlvlms_tutorial.metrics.intervals import share
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.text import normalise

COLUMNS = ("type", "stratum", "answer", "prediction", "correct", "target", "question")


def yes_or_no(prediction: str) -> str | None:
    """The first word of a prediction where that is yes or no, else None."""
    first = normalise(prediction).partition(" ")[0]
    return first if first in ("yes", "no") else None


def exact_match(prediction: str, answer: str) -> bool:
    """Whether a prediction is the answer once both are normalised.

    Of a yes/no question the first word decides.
    """
    wanted = normalise(answer)
    return (
        yes_or_no(prediction) == wanted
        if wanted in ("yes", "no")
        else normalise(prediction) == wanted
    )


def answer_table(predictions: Sequence[str], questions: Sequence[Question]) -> pd.DataFrame:
    """One row a question: type, stratum, answer, prediction, correct, target, question.

    Raises
    ------
    LengthError
        If there are not as many predictions as questions.
    """
    if len(predictions) != len(questions):
        raise LengthError(predictions=len(predictions), questions=len(questions))
    rows = [
        (
            asked.type,
            asked.stratum,
            asked.answer,
            told,
            exact_match(told, asked.answer),
            asked.target,
            asked.text,
        )
        for told, asked in zip(predictions, questions, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"correct": bool})


def accuracy_by_type(
    table: pd.DataFrame, groups: ArrayLike | None = None, seed: int = 0
) -> pd.DataFrame:
    """Accuracy with its interval (value, low, high, n) of an :func:`answer_table`.

    A row "overall", then a row for each type. ``groups`` (one label a row, usually the scene) makes
    the intervals those of a cluster bootstrap.

    Raises
    ------
    EstimateError
        If the table is empty, or has no such columns.
    LengthError
        If ``groups`` has another length.
    """
    with_columns(table, ("type", "correct"))
    if table.empty:
        raise EstimateError("accuracy", "no answers", "a table with one answer or more")
    labels = group_labels(table, groups)
    parts = {"overall": slice(None)} | {
        kind: (table["type"] == kind).to_numpy() for kind in table["type"].unique()
    }
    estimates = {
        name: share(table["correct"].to_numpy()[rows], labels[rows], seed=seed)
        for name, rows in parts.items()
    }
    return pd.DataFrame(
        [e.asdict() for e in estimates.values()], index=pd.Index(estimates, name="type")
    )


def with_columns(
    table: pd.DataFrame,
    names: Collection[str],
    wanted: str = "a table of answers, as answer_table makes it",
) -> pd.DataFrame:
    """The columns of a table that are needed.

    Raises
    ------
    EstimateError
        If it is no table, or lacks one, with those that it has.
    """
    if not isinstance(table, pd.DataFrame):
        raise EstimateError("a table", f"a {type(table).__name__}", wanted)
    if lacking := [name for name in names if name not in table]:
        there = (
            f"no column {', '.join(map(repr, lacking))} among "
            f"{', '.join(map(str, table.columns)) or 'none'}"
        )
        raise EstimateError("a table", there, wanted)
    return table[list(names)]


def group_labels(table: pd.DataFrame, groups: ArrayLike | None) -> pd.Series:
    """One label for each row of a table: the labels given, or each row its own.

    Raises
    ------
    LengthError
        If there are not as many labels as rows.
    """
    labels = pd.Series(range(len(table)) if groups is None else groups).reset_index(drop=True)
    if len(labels) != len(table):
        raise LengthError(rows=len(table), groups=len(labels))
    return labels
