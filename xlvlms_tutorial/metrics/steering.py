"""What steering does to answers: the change that was asked for, and all others."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from xlvlms_tutorial.errors import incomparable
from xlvlms_tutorial.metrics.answers import with_columns
from xlvlms_tutorial.metrics.plain import require_estimate
from xlvlms_tutorial.text import vqa_normalise
from xlvlms_tutorial.validation import (
    require,
    require_equal,
    require_same_length,
)

_YES_NO = re.compile(r"\s*(yes|no)\s*(?:[,.;:!\n]|$)")
_BLOCK = 2**24  # logits turned to float64 at once


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
    InputError
        If the tables do not hold the same questions in the same order. If no answer, or every
        answer, was ``source`` before. If there is not a change for every table but the first, or a
        source is its target.

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
    require(tables, "no tables", "give the one without steering first, then one or more")
    first, *others = tables
    require(
        others == list(changes),
        f"changes for {', '.join(changes) or 'nothing'}",
        f"give one for each of {', '.join(others)}, in this order",
    )
    base = tables[first]
    for table in tables.values():
        _same_questions(base, table)
    rows = {}
    for name, table in tables.items():
        by_type = table.groupby("type", sort=False)
        rows[name] = by_type["correct"].mean().to_dict()
    for name in others:
        source, target = changes[name]
        before = list(base["prediction"])
        after = list(tables[name]["prediction"])
        was_source, is_target, changed = _changes(before, after, source, target)
        n_source = was_source.sum()
        require_estimate(
            0 < n_source < len(was_source),
            f"the change {name!r}",
            f"{n_source} of {len(was_source)} answers {source!r} before",
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
    InputError
        If a logit is not finite, or there are none. If the shapes differ.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.metrics import answer_kl
    >>> before, after = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    >>> round(answer_kl(before, after).item(), 2)  # from (1/2, 1/2) to (3/4, 1/4)
    0.14
    """
    require_equal(
        "the logits' shapes",
        tuple(logits_before.shape),
        tuple(logits_after.shape),
        "give the same questions twice",
    )
    require(
        logits_before.numel() and logits_before.isfinite().all() and logits_after.isfinite().all(),
        "logits are missing, NaN or infinite",
        "give one row or more of finite logits",
    )
    n_rows = max(1, _BLOCK // logits_before.shape[1])  # bounds the memory in float64
    divergences = []
    blocks = zip(logits_before.split(n_rows), logits_after.split(n_rows), strict=True)
    for before, after in blocks:
        p = before.double().log_softmax(-1)
        q = after.double().log_softmax(-1)
        divergences.append(_kl(p, q))
    return torch.cat(divergences)


def _kl(p: Float64[Tensor, "n v"], q: Float64[Tensor, "n v"]) -> Float64[Tensor, "n"]:
    """Return KL(p || q) of each row, from log probabilities."""
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)  # rounding can leave -1e-17


def _read(answer: str) -> str:
    """Normalise an answer, to "yes" or "no" where it begins with that word on its own."""
    match = _YES_NO.match(answer.lower())
    return match[1] if match else vqa_normalise(answer)


def _changes(
    before: Sequence[str], after: Sequence[str], source: str, target: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which answers were the source, which are the target now, and which changed."""
    require_same_length(before=before, after=after)
    source_answer = _read(source)
    target_answer = _read(target)
    require(
        source_answer != target_answer,
        f"source {source!r} and target {target!r} are the same answer",
        "give two that differ",
    )
    was = np.array(list(map(_read, before)), dtype=object)
    now = np.array(list(map(_read, after)), dtype=object)
    return was == source_answer, now == target_answer, was != now


def _same_questions(before: pd.DataFrame, after: pd.DataFrame) -> None:
    """Refuse two tables of answers that are not to the same questions, row by row."""
    columns = ["type", "question", "target", "answer"]
    for table in (before, after):
        with_columns(table, (*columns, "correct", "prediction"))
    require_equal(
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
        raise incomparable(
            f"the questions of row {row}",
            tuple(questions_before.loc[row]),
            tuple(questions_after.loc[row]),
            "give the answers to the same questions, in the same order",
        )
