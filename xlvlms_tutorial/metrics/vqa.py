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
    """VQA accuracy of each prediction, 0 to 1, against the answers that people gave.

    Right where three of the others said the same. With m references of which k match, each is left
    out once: ( k min(1, (k-1)/3) + (m-k) min(1, k/3) ) / m, which is the mean over the subsets of
    m - 1 people. A single reference is matched exactly. Both sides are normalised
    (:func:`~xlvlms_tutorial.text.vqa_normalise`). With two or three references no answer can reach
    1; the challenge has ten. A number counts as its digits.

    ``official`` gives what the challenge's evaluation script gives, with its own normalisation, for
    numbers that stand beside published ones. Where all people gave the same answer it normalises
    nothing, so that "Yes" against ten "yes" is 0; that alone lowers scores of models that write
    capitals or periods by several points. It never matches a single reference.

    Raises
    ------
    EstimateError
        If there are no predictions, a question has no references, or text in place of a list of
        them, or an answer is no text or number.
    LengthError
        If there are not as many lists of references as predictions.
    """
    if len(predictions) != len(references):
        raise LengthError(predictions=len(predictions), references=len(references))
    if not len(predictions):
        raise EstimateError("VQA accuracy", "no predictions", "one or more")
    if wrong := [given for given in references if isinstance(given, str) or not len(given)]:
        raise EstimateError(
            "VQA accuracy",
            f"references {wrong[0]!r}",
            "a list of one answer or more for each question",
        )
    pairs = [
        (_text(answer), list(map(_text, given)))
        for answer, given in zip(predictions, references, strict=True)
    ]
    told = [
        as_compared(*pair)
        if official
        else (vqa_normalise(pair[0]), list(map(vqa_normalise, pair[1])))
        for pair in pairs
    ]
    k = np.array([given.count(answer) for answer, given in told], dtype=np.float64)
    m = np.array([len(given) for _, given in told], dtype=np.float64)
    kept = (k * np.clip((k - 1) / 3, 0, 1) + (m - k) * np.minimum(k / 3, 1)) / m
    return kept if official else np.where(m == 1, k, kept)


def _text(answer: object) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, Real) or not isfinite(answer):
        raise EstimateError("VQA accuracy", f"the answer {answer!r}", "texts and finite numbers")
    return str(answer)


def answer_type(answer: str) -> str:
    """The type of an answer.

    "yes/no" ("No.", "Yes, it is"; not "no parking"), "number" ("two", "3.5") or "other".
    """
    told = _read(answer)
    return "yes/no" if told in ("yes", "no") else "number" if _NUMBER.fullmatch(told) else "other"


def answer_counts(predictions: Sequence[str]) -> pd.DataFrame:
    """How often each answer is given, once normalised.

    One row for each type and answer (the index), the most frequent of a type first. What steering
    changes is ``answer_counts(after).sub(answer_counts(before), fill_value=0)``.

    Raises
    ------
    EstimateError
        If there are no predictions.
    """
    if not len(predictions):
        raise EstimateError("answer counts", "no predictions", "one or more")
    told = pd.DataFrame(
        {"type": list(map(answer_type, predictions)), "answer": list(map(_read, predictions))}
    )
    counts = told.groupby(["type", "answer"]).size().rename("count").reset_index()
    counts = counts.assign(order=counts["type"].map(TYPES.index)).sort_values(
        ["order", "count", "answer"], ascending=[True, False, True]
    )
    return counts.set_index(["type", "answer"])[["count"]]


def targeted_change(
    before: Sequence[str], after: Sequence[str], source: str, target: str
) -> Estimate:
    """Of the predictions that were ``source`` before, the share that are ``target`` after.

    With Wilson's interval. Answers are compared whole once normalised: "no" is not in "nobody".
    "Yes, it is" is the answer "yes".

    Raises
    ------
    EstimateError
        If no prediction was ``source`` before.
    LengthError
        If the two lists differ in length.
    SelectionError
        If source and target are the same answer.
    """
    held, reached, _ = _changes(before, after, source, target)
    if not held.any():
        raise EstimateError("targeted change", f"no prediction {source!r} before", "one or more")
    return proportion(reached[held])


def side_effects(
    before: pd.DataFrame,
    after: pd.DataFrame,
    changed_types: Collection[str] = (),
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy before and after on the same questions.

    From two tables of :func:`metrics.answers.answer_table`. Rows are "overall" (all questions,
    each with the same weight), "elsewhere" (the types that were not to change, if some were), then
    each type. Columns are targeted, before, after, change (after - before, paired) with its
    interval low and high, and n. ``groups`` (one label a row, usually the scene) makes the
    intervals those of a cluster bootstrap.

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
    """
    _same_questions(before, after, ("correct",))
    labels = group_labels(before, groups).to_numpy()
    was, now = (table["correct"].to_numpy(dtype=np.float64) for table in (before, after))
    rows = {}
    for name, part in _parts(before["type"].to_numpy(), changed_types).items():
        change = difference(now[part], was[part], labels[part], paired=True, seed=seed)
        told = {
            "targeted": name in changed_types,
            "before": was[part].mean(),
            "after": now[part].mean(),
            "change": change.value,
        }
        rows[name] = told | {"low": change.low, "high": change.high, "n": change.n}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("type")


def steering_table(
    tables: Mapping[str, pd.DataFrame], changes: Mapping[str, tuple[str, str]]
) -> pd.DataFrame:
    """The table of the paper.

    A row for each steering, accuracy for each type of question, and what became of the answers.
    ``tables`` maps names to tables of :func:`metrics.answers.answer_table`, first the one without
    steering; ``changes`` maps the other names to (source, target). "to target" is the share of the
    answers ``source`` that became ``target``; "elsewhere" is the share of all other answers that
    changed at all. (Khayatan et al. 2025, arXiv 2501.03012, give the counts alone.)

    Raises
    ------
    ComparisonError
        If the tables do not hold the same questions in the same order.
    EstimateError
        If no answer, or every answer, was ``source`` before.
    SelectionError
        If there is not a change for every table but the first, or a source is its target.
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
        held, reached, moved = _changes(
            list(base["prediction"]), list(tables[name]["prediction"]), *changes[name]
        )
        if held.all() or not held.any():
            raise EstimateError(
                f"the change {name!r}",
                f"{held.sum()} of {len(held)} answers {changes[name][0]!r} before",
                "some, not all",
            )
        rows[name] |= {"to target": reached[held].mean(), "elsewhere": moved[~held].mean()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("steering")


def answer_kl(
    logits_before: Float[Tensor, "n v"], logits_after: Float[Tensor, "m w"]
) -> Float64[Tensor, "n"]:
    """How far each distribution over the vocabulary moved.

    KL(before || after) in nats, computed in float64 from logits ``(n, v)``.

    Raises
    ------
    ActivationsError
        If a logit is not finite, or there are none.
    ComparisonError
        If the shapes differ.
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
    rows = max(1, _BLOCK // logits_before.shape[1])  # bounds the memory in float64
    parts = zip(logits_before.split(rows), logits_after.split(rows), strict=True)
    return torch.cat(
        [_kl(one.double().log_softmax(-1), other.double().log_softmax(-1)) for one, other in parts]
    )


def _kl(p: Float64[Tensor, "n v"], q: Float64[Tensor, "n v"]) -> Float64[Tensor, "n"]:
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)  # rounding can leave -1e-17


def _read(answer: str) -> str:
    """An answer normalised, and "yes" or "no" where it begins with that word on its own."""
    found = _YES_NO.match(answer.lower())
    return found[1] if found else vqa_normalise(answer)


def _changes(
    before: Sequence[str], after: Sequence[str], source: str, target: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which answers were the source, which are the target now, and which changed."""
    if len(before) != len(after):
        raise LengthError(before=len(before), after=len(after))
    if _read(source) == _read(target):
        raise SelectionError(
            f"source {source!r} and target {target!r} are the same answer", "give two that differ"
        )
    was, now = ([_read(told) for told in answers] for answers in (before, after))
    was, now = np.array(was, dtype=object), np.array(now, dtype=object)
    return was == _read(source), now == _read(target), was != now


def _parts(kinds: np.ndarray, changed: Collection[str]) -> dict[str, np.ndarray]:
    """Which rows belong to all, to the types that were not to change, and to each type."""
    types = list(dict.fromkeys(kinds))
    if isinstance(changed, str) or not set(changed) <= set(types):
        raise SelectionError(
            f"changed_types={changed!r}", f"give a list of types; allowed: {', '.join(types)}"
        )
    elsewhere = ~np.isin(kinds, list(changed))
    some = {"elsewhere": elsewhere} if changed and elsewhere.any() else {}
    return (
        {"overall": np.ones(len(kinds), dtype=bool)}
        | some
        | {kind: kinds == kind for kind in types}
    )


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
    one, other = (table[columns].reset_index(drop=True).fillna("") for table in (before, after))
    if differs := np.flatnonzero((one != other).any(axis=1)).tolist():
        asked = (tuple(table.loc[differs[0]]) for table in (one, other))
        raise ComparisonError(
            f"the questions of row {differs[0]}",
            *asked,
            "give the answers to the same questions, in the same order",
        )
