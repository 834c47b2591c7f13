"""Answers as the VQA challenge scores them, and what steering does to them.

The change that was asked for, and all others. The accuracy is that of Antol et al. (2015), with
leave-one-out averaging, on answers normalised by the challenge's published rules. Its official
script departs from these rules; what it gives is ``vqa_accuracy(..., official=True)``.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from numbers import Real

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from numpy.typing import ArrayLike
from torch import Tensor

from xlvlms_tutorial.errors import (
    ActivationsError,
    ComparisonError,
    EstimateError,
    LengthError,
    SelectionError,
)
from xlvlms_tutorial.metrics.answers import group_labels, with_columns
from xlvlms_tutorial.metrics.intervals import Estimate, difference, proportion
from xlvlms_tutorial.metrics.vqa_official import as_compared
from xlvlms_tutorial.text import vqa_normalise

TYPES = ("yes/no", "number", "other")

_NUMBER = re.compile(r"\d+(\.\d+)?|\.\d+")
_YES_NO = re.compile(r"\s*(yes|no)\s*(?:[,.;:!\n]|$)")
_BLOCK = 2**24  # logits turned to float64 at once


def vqa_accuracy(
    predictions: Sequence[str | Real],
    references: Sequence[Sequence[str | Real]],
    official: bool = False,
) -> Float64[np.ndarray, "n"]:
    """Compute the VQA accuracy of each prediction against the answers that people gave.

    Right where three of the others said the same. With m references of which k match, each is left
    out once: ( k min(1, (k-1)/3) + (m-k) min(1, k/3) ) / m, which is the mean over the subsets of
    m - 1 people. A single reference is matched exactly. Both sides are normalised
    (:func:`~xlvlms_tutorial.text.vqa_normalise`). With two or three references no answer can reach
    1; the challenge has ten. From "VQA: Visual Question Answering" (Antol et al. 2015,
    arXiv 1505.00468).

    Parameters
    ----------
    predictions : sequence of str or number
        What a model has said; a number counts as its digits.
    references : sequence of sequence of str or number
        What people said to each question, one answer or more.
    official : bool, default False
        Whether to give what the challenge's evaluation script gives, with its own normalisation,
        for numbers that stand beside published ones. Where all people gave the same answer it
        normalises nothing, so that "Yes" against ten "yes" is 0; that alone lowers scores of models
        that write capitals or periods by several points. It never matches a single reference.

    Returns
    -------
    ndarray (n,)
        The accuracy of each prediction, 0 to 1.

    Raises
    ------
    EstimateError
        If there are no predictions, a question has no references, or text in place of a list of
        them, or an answer is no text or number.
    LengthError
        If there are not as many lists of references as predictions.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import vqa_accuracy
    >>> references = [["2"] * 10, ["red"] * 2 + ["blue"] * 8]
    >>> vqa_accuracy(["Two.", "red"], references).round(2).tolist()
    [1.0, 0.6]
    """
    if len(predictions) != len(references):
        raise LengthError(predictions=len(predictions), references=len(references))
    if not len(predictions):
        raise EstimateError("VQA accuracy", "no predictions", "one or more")
    for answers in references:
        if isinstance(answers, str) or not len(answers):
            raise EstimateError(
                "VQA accuracy",
                f"references {answers!r}",
                "a list of one answer or more for each question",
            )
    matches, sizes = [], []
    for prediction, answers in zip(predictions, references, strict=True):
        text, texts = _text(prediction), list(map(_text, answers))
        if official:
            text, texts = as_compared(text, texts)
        else:
            text, texts = vqa_normalise(text), list(map(vqa_normalise, texts))
        matches.append(texts.count(text))
        sizes.append(len(texts))
    k, m = np.array(matches, dtype=np.float64), np.array(sizes, dtype=np.float64)
    accuracy = (k * np.clip((k - 1) / 3, 0, 1) + (m - k) * np.minimum(k / 3, 1)) / m
    return accuracy if official else np.where(m == 1, k, accuracy)


def _text(answer: object) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, Real) or not isfinite(answer):
        raise EstimateError("VQA accuracy", f"the answer {answer!r}", "texts and finite numbers")
    return str(answer)


def answer_type(answer: str) -> str:
    """Return the type of an answer: "yes/no", "number" or "other".

    Parameters
    ----------
    answer : str
        What a model or a person has said.

    Returns
    -------
    str
        "yes/no" ("No.", "Yes, it is"; not "no parking"), "number" ("two", "3.5") or "other".

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import answer_type
    >>> answer_type("Yes, it is"), answer_type("two"), answer_type("no parking")
    ('yes/no', 'number', 'other')
    """
    normalised = _read(answer)
    if normalised in ("yes", "no"):
        return "yes/no"
    return "number" if _NUMBER.fullmatch(normalised) else "other"


def answer_counts(predictions: Sequence[str]) -> pd.DataFrame:
    """Count how often each answer is given, once normalised.

    Use it to see which answers steering brings about: the changes are
    ``answer_counts(after).sub(answer_counts(before), fill_value=0)``.

    Parameters
    ----------
    predictions : sequence of str
        What a model has said.

    Returns
    -------
    pandas.DataFrame
        Column count; one row for each type and answer (the index), the most frequent of a type
        first.

    Raises
    ------
    EstimateError
        If there are no predictions.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import answer_counts
    >>> answer_counts(["2", "Two.", "no"])["count"].to_dict()
    {('yes/no', 'no'): 1, ('number', '2'): 2}
    """
    if not len(predictions):
        raise EstimateError("answer counts", "no predictions", "one or more")
    answers = pd.DataFrame(
        {"type": list(map(answer_type, predictions)), "answer": list(map(_read, predictions))}
    )
    counts = answers.groupby(["type", "answer"]).size().rename("count").reset_index()
    counts = counts.assign(order=counts["type"].map(TYPES.index)).sort_values(
        ["order", "count", "answer"], ascending=[True, False, True]
    )
    return counts.set_index(["type", "answer"])[["count"]]


def targeted_change(
    before: Sequence[str], after: Sequence[str], source: str, target: str
) -> Estimate:
    """Estimate the share of predictions that changed from one answer to another.

    Use it to see how well steering moves one answer to the one that was asked for. Answers are
    compared whole once normalised: "no" is not in "nobody", and "Yes, it is" is the answer "yes".

    Parameters
    ----------
    before, after : sequence of str
        What the model said without and with steering, to the same questions.
    source : str
        The answer that is to change; other predictions are left out.
    target : str
        The answer that it is to become.

    Returns
    -------
    Estimate
        The share of the ``source`` answers that are ``target`` after, with Wilson's interval.

    Raises
    ------
    EstimateError
        If no prediction was ``source`` before.
    LengthError
        If the two lists differ in length.
    SelectionError
        If source and target are the same answer.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import targeted_change
    >>> print(targeted_change(["no", "No.", "yes"], ["yes", "no", "yes"], "no", "yes"))
    0.50 [0.09, 0.91]
    """
    was_source, is_target, _ = _changes(before, after, source, target)
    if not was_source.any():
        raise EstimateError("targeted change", f"no prediction {source!r} before", "one or more")
    return proportion(is_target[was_source])


def side_effects(
    before: pd.DataFrame,
    after: pd.DataFrame,
    changed_types: Collection[str] = (),
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the accuracy before and after on the same questions, overall and by type.

    Use it to see what steering costs on questions that it was not meant to change.

    Parameters
    ----------
    before, after : pandas.DataFrame
        Two tables of :func:`~xlvlms_tutorial.metrics.answers.answer_table`, of the same questions
        in the same order.
    changed_types : collection of str, default ()
        The types of questions that were to change.
    groups : array-like, optional
        One label a row, usually the scene, which makes the intervals those of a cluster bootstrap.
        By default each question is independent.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Rows "overall" (all questions, each with the same weight), "elsewhere" (the types that were
        not to change, if some were), then each type. Columns targeted, before, after, change (after
        - before, paired) with its interval low and high, and n.

    Raises
    ------
    ComparisonError
        If the tables do not hold the same questions in the same order.
    EstimateError
        If a part has fewer than two questions.
    LengthError
        If ``groups`` has another length.
    SelectionError
        If a type that was to change is not in the tables.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Question
    >>> from xlvlms_tutorial.metrics import answer_table, side_effects
    >>> questions = [Question("count", f"How many {noun}?", "two") for noun in ("keys", "cars")]
    >>> before = answer_table(["two", "three"], questions)
    >>> after = answer_table(["two", "two"], questions)
    >>> side_effects(before, after)["change"].to_dict()
    {'overall': 0.5, 'count': 0.5}
    """
    _same_questions(before, after, ("correct",))
    labels = group_labels(before, groups).to_numpy()
    was, now = (table["correct"].to_numpy(dtype=np.float64) for table in (before, after))
    rows = {}
    for name, part in _parts(before["type"].to_numpy(), changed_types).items():
        change = difference(now[part], was[part], labels[part], paired=True, seed=seed)
        rows[name] = {
            "targeted": name in changed_types,
            "before": was[part].mean(),
            "after": now[part].mean(),
            "change": change.value,
            "low": change.low,
            "high": change.high,
            "n": change.n,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("type")


def steering_table(
    tables: Mapping[str, pd.DataFrame], changes: Mapping[str, tuple[str, str]]
) -> pd.DataFrame:
    """Make the paper's table of steering: accuracy by type of question, and which answers changed.

    Use it to compare several steering vectors on the same questions. Khayatan et al. 2025
    (arXiv 2501.03012) give the counts alone.

    Parameters
    ----------
    tables : mapping of str to pandas.DataFrame
        Tables of :func:`~xlvlms_tutorial.metrics.answers.answer_table` by name, first the one
        without steering, all of the same questions in the same order.
    changes : mapping of str to (str, str)
        The answers (source, target) of each steering, by the names of the other tables in their
        order.

    Returns
    -------
    pandas.DataFrame
        A row for each table; a column for each type of question, with its accuracy; "to target",
        the share of the answers ``source`` that became ``target``; "elsewhere", the share of all
        other answers that changed at all. The last two are NaN in the first row.

    Raises
    ------
    ComparisonError
        If the tables do not hold the same questions in the same order.
    EstimateError
        If no answer, or every answer, was ``source`` before.
    SelectionError
        If there is not a change for every table but the first, or a source is its target.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Question
    >>> from xlvlms_tutorial.metrics import answer_table, steering_table
    >>> questions = [
    ...     Question("time", "Is it day?", "yes"),
    ...     Question("time", "Is it night?", "no"),
    ...     Question("colour", "What colour is the key?", "red"),
    ... ]
    >>> before = answer_table(["no", "no", "red"], questions)
    >>> after = answer_table(["yes", "no", "red"], questions)
    >>> table = steering_table({"none": before, "yes": after}, {"yes": ("no", "yes")})
    >>> table.loc["yes"].to_dict()
    {'time': 1.0, 'colour': 1.0, 'to target': 0.5, 'elsewhere': 0.0}
    """
    if not tables:
        raise SelectionError("no tables", "give the one without steering first, then one or more")
    first, *others = tables
    if others != list(changes):
        raise SelectionError(
            f"changes for {', '.join(changes) or 'nothing'}",
            f"give one for each of {', '.join(others)}, in this order",
        )
    base = tables[first]
    for table in tables.values():
        _same_questions(base, table, ("correct", "prediction"))
    rows = {
        name: table.groupby("type", sort=False)["correct"].mean().to_dict()
        for name, table in tables.items()
    }
    for name in others:
        source, target = changes[name]
        predictions = list(base["prediction"]), list(tables[name]["prediction"])
        was_source, is_target, changed = _changes(*predictions, source, target)
        if was_source.all() or not was_source.any():
            raise EstimateError(
                f"the change {name!r}",
                f"{was_source.sum()} of {len(was_source)} answers {source!r} before",
                "some, not all",
            )
        rows[name]["to target"] = is_target[was_source].mean()
        rows[name]["elsewhere"] = changed[~was_source].mean()
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("steering")


def answer_kl(
    logits_before: Float[Tensor, "n v"], logits_after: Float[Tensor, "m w"]
) -> Float64[Tensor, "n"]:
    """Compute how far each distribution over the vocabulary moved, as KL(before || after).

    Use it on the logits of the first answer token, with and without steering.

    Parameters
    ----------
    logits_before : Tensor (n, v)
        The logits over the vocabulary for each question, without steering.
    logits_after : Tensor (n, v)
        Those of the same questions, with steering.

    Returns
    -------
    Tensor (n,)
        The divergence of each question in nats, computed in float64.

    Raises
    ------
    ActivationsError
        If a logit is not finite, or there are none.
    ComparisonError
        If the shapes differ.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.metrics import answer_kl
    >>> before, after = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    >>> round(answer_kl(before, after).item(), 2)  # from (1/2, 1/2) to (3/4, 1/4)
    0.14
    """
    if logits_before.shape != logits_after.shape:
        raise ComparisonError(
            "the logits' shapes",
            tuple(logits_before.shape),
            tuple(logits_after.shape),
            "give the same questions twice",
        )
    if not logits_before.numel() or not (
        logits_before.isfinite().all() and logits_after.isfinite().all()
    ):
        raise ActivationsError(
            "logits are missing, NaN or infinite", "give one row or more of finite logits"
        )
    n_rows = max(1, _BLOCK // logits_before.shape[1])  # bounds the memory in float64
    divergences = []
    for p, q in zip(logits_before.split(n_rows), logits_after.split(n_rows), strict=True):
        divergences.append(_kl(p.double().log_softmax(-1), q.double().log_softmax(-1)))
    return torch.cat(divergences)


def _kl(p: Float64[Tensor, "n v"], q: Float64[Tensor, "n v"]) -> Float64[Tensor, "n"]:
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)  # rounding can leave -1e-17


def _read(answer: str) -> str:
    """Normalise an answer, to "yes" or "no" where it begins with that word on its own."""
    match = _YES_NO.match(answer.lower())
    return match[1] if match else vqa_normalise(answer)


def _changes(
    before: Sequence[str], after: Sequence[str], source: str, target: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which answers were the source, which are the target now, and which changed."""
    if len(before) != len(after):
        raise LengthError(before=len(before), after=len(after))
    if _read(source) == _read(target):
        raise SelectionError(
            f"source {source!r} and target {target!r} are the same answer", "give two that differ"
        )
    was = np.array(list(map(_read, before)), dtype=object)
    now = np.array(list(map(_read, after)), dtype=object)
    return was == _read(source), now == _read(target), was != now


def _parts(kinds: np.ndarray, changed: Collection[str]) -> dict[str, np.ndarray]:
    """Select the rows of all types, of the types that were not to change, and of each type."""
    types = list(dict.fromkeys(kinds))
    if isinstance(changed, str) or not set(changed) <= set(types):
        raise SelectionError(
            f"changed_types={changed!r}", f"give a list of types; allowed: {', '.join(types)}"
        )
    parts = {"overall": np.ones(len(kinds), dtype=bool)}
    elsewhere = ~np.isin(kinds, list(changed))
    if changed and elsewhere.any():
        parts["elsewhere"] = elsewhere
    return parts | {kind: kinds == kind for kind in types}


def _same_questions(before: pd.DataFrame, after: pd.DataFrame, needed: Collection[str]) -> None:
    columns = ["type", "question", "target", "answer"]
    for table in (before, after):
        with_columns(table, (*columns, *needed))
    if len(before) != len(after):
        raise ComparisonError(
            "the numbers of questions",
            len(before),
            len(after),
            "give the answers to the same questions",
        )
    questions_before = before[columns].reset_index(drop=True).fillna("")
    questions_after = after[columns].reset_index(drop=True).fillna("")
    differing = np.flatnonzero((questions_before != questions_after).any(axis=1)).tolist()
    if differing:
        row = differing[0]
        raise ComparisonError(
            f"the questions of row {row}",
            tuple(questions_before.loc[row]),
            tuple(questions_after.loc[row]),
            "give the answers to the same questions, in the same order",
        )
