"""Answers to questions: what counts as the same answer, and how often a model gives it."""

from collections.abc import Collection, Sequence

import pandas as pd
from numpy.typing import ArrayLike

from xlvlms_tutorial.metrics.intervals import proportion
from xlvlms_tutorial.metrics.plain import require_estimate
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.text import normalise
from xlvlms_tutorial.validation import require_same_length

COLUMNS = ("type", "stratum", "answer", "prediction", "correct", "target", "question")


def yes_or_no(prediction: str) -> str | None:
    """Return the first word of a prediction if that is yes or no, else None.

    Use it to read the answers to presence questions; :func:`exact_match` reads yes/no questions so.

    Parameters
    ----------
    prediction : str
        What a model has said; it is normalised first (:func:`~xlvlms_tutorial.text.normalise`).

    Returns
    -------
    str or None
        "yes", "no" or None.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import yes_or_no
    >>> yes_or_no("Yes, there is."), yes_or_no("nobody")
    ('yes', None)
    """
    first = normalise(prediction).partition(" ")[0]
    return first if first in ("yes", "no") else None


def exact_match(prediction: str, answer: str) -> bool:
    """Return whether a prediction is the answer once both are normalised.

    Of a yes/no question the first word decides. :func:`answer_table` uses it for a whole list.

    Parameters
    ----------
    prediction : str
        What a model has said.
    answer : str
        The correct answer.

    Returns
    -------
    bool
        True if the two agree.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics.answers import exact_match
    >>> exact_match("Two.", "2"), exact_match("Yes, two.", "yes"), exact_match("a red car", "red")
    (True, True, False)
    """
    expected = normalise(answer)
    if expected in ("yes", "no"):
        return yes_or_no(prediction) == expected
    return normalise(prediction) == expected


def answer_table(predictions: Sequence[str], questions: Sequence[Question]) -> pd.DataFrame:
    """Make a table of predictions beside their questions, with one row a question.

    The other functions for answers (:func:`accuracy_by_type`,
    :func:`~xlvlms_tutorial.metrics.hallucination.pope`,
    :func:`~xlvlms_tutorial.metrics.steering.steering_table`) start from it.

    Parameters
    ----------
    predictions : sequence of str
        What a model has said, one text for each question.
    questions : sequence of Question
        The questions with their correct answers.

    Returns
    -------
    pandas.DataFrame
        Columns type, stratum, answer, prediction, correct (bool, see :func:`exact_match`), target,
        question.

    Raises
    ------
    InputError
        If there are not as many predictions as questions.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Question
    >>> from xlvlms_tutorial.metrics import answer_table
    >>> question = Question("count", "How many keys are there?", "two", "key")
    >>> table = answer_table(["2", "three"], [question, question])
    >>> table["correct"].tolist()
    [True, False]
    """
    require_same_length(predictions=predictions, questions=questions)
    rows = []
    for prediction, question in zip(predictions, questions, strict=True):
        correct = exact_match(prediction, question.answer)
        rows.append(
            (
                question.type,
                question.stratum,
                question.answer,
                prediction,
                correct,
                question.target,
                question.text,
            )
        )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"correct": bool})


def accuracy_by_type(
    table: pd.DataFrame, groups: ArrayLike | None = None, seed: int = 0
) -> pd.DataFrame:
    """Compute the accuracy, with its interval, overall and for each type of question.

    Parameters
    ----------
    table : pandas.DataFrame
        An :func:`answer_table`, or any table with the columns type and correct.
    groups : array-like, optional
        One label a row, usually the scene, which makes the intervals those of a cluster bootstrap.
        By default each answer is independent, and the intervals are Wilson's.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns value, low, high, n; a row "overall", then a row for each type.

    Raises
    ------
    InputError
        If the table is empty, or has no such columns. If ``groups`` has another length.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Question
    >>> from xlvlms_tutorial.metrics import accuracy_by_type, answer_table
    >>> question = Question("count", "How many keys are there?", "two", "key")
    >>> accuracy = accuracy_by_type(answer_table(["2", "three"], [question, question]))
    >>> accuracy["value"].to_dict()
    {'overall': 0.5, 'count': 0.5}
    """
    with_columns(table, ("type", "correct"))
    require_estimate(not table.empty, "accuracy", "no answers", "a table with one answer or more")
    labels = group_labels(table, groups)
    correct = table["correct"].to_numpy()
    estimates = {"overall": proportion(correct, labels, seed=seed).asdict()}
    for kind in table["type"].unique():
        rows = (table["type"] == kind).to_numpy()
        estimates[kind] = proportion(correct[rows], labels[rows], seed=seed).asdict()
    return pd.DataFrame(list(estimates.values()), index=pd.Index(estimates, name="type"))


def with_columns(
    table: pd.DataFrame,
    names: Collection[str],
    allowed: str = "a table of answers, as answer_table makes it",
) -> pd.DataFrame:
    """Return the columns of a table that are needed, or refuse the table.

    Parameters
    ----------
    table : pandas.DataFrame
        What the caller gave.
    names : collection of str
        The columns that are needed.
    allowed : str
        What to give instead, for the message.

    Raises
    ------
    InputError
        If it is no table, or lacks a column; the message names those that it has.
    """
    is_table = isinstance(table, pd.DataFrame)
    require_estimate(is_table, "a table", f"a {type(table).__name__}", allowed)
    missing = [name for name in names if name not in table]
    present = ", ".join(map(str, table.columns)) or "none"
    problem = f"no column {', '.join(map(repr, missing))} among {present}"
    require_estimate(not missing, "a table", problem, allowed)
    return table[list(names)]


def group_labels(table: pd.DataFrame, groups: ArrayLike | None) -> pd.Series:
    """Return one label for each row of a table: the labels given, or each row its own.

    Raises
    ------
    InputError
        If there are not as many labels as rows.
    """
    labels = pd.Series(range(len(table)) if groups is None else groups).reset_index(drop=True)
    require_same_length(rows=table, groups=labels)
    return labels
