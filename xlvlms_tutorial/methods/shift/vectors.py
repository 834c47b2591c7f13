r"""How fine-tuning moves concepts.

Shift vectors, who matches whom, and how well the samples of a concept agree. States a (n, d) of the
original and b (n, d) of the fine-tuned model, row m of both from the same sample, differ by
:math:`\delta_m = b_m - a_m`. A concept :math:`u_k` of a is moved by the mean of this over the
samples that it is strongest in, after "Analyzing Finetuning Representation Shift for Multimodal
LLMs Steering" (arXiv 2501.03012). NumPy arrays and torch tensors are read; sums are taken in
float64, in blocks, on the device of a.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import trim_mean
from torch import Tensor

from xlvlms_tutorial.activations.activations import States
from xlvlms_tutorial.errors import (
    ActivationsError,
    ComparisonError,
    LengthError,
    SelectionError,
    WordListError,
)
from xlvlms_tutorial.methods.concepts.base import whole
from xlvlms_tutorial.metrics.dictionaries import match_concepts

CENTRES = ("mean", "median", "trimmed")

Array = Tensor | np.ndarray
WordLists = Mapping[int, Sequence[str]] | Sequence[Sequence[str]]

_BLOCK = 2**20  # numbers of one array at a time, to bound memory
_ROUNDING = 1e-12  # of the length of what was averaged: below it a mean is zero but for rounding
_SAME = {
    "n_samples": "numbers of samples",
    "ids_sha256": "sample sets",
    "selection": "captured positions",
    "reduce": "reductions",
}


def matched(a: States, b: States) -> tuple[States, States]:
    """The rows of the samples that both have, in the order of a.

    Those for which both models said the token of interest. Both must be captured from the same list
    of samples, at the same kind of position. Samples are told apart by their id.

    Raises
    ------
    ComparisonError
        If the two are of other samples or positions, a sample has several
        rows, or no sample is in both.
    """
    for name, what in _SAME.items():
        one, other = a.provenance.get(name), b.provenance.get(name)
        if one != other:
            raise ComparisonError(
                what, one, other, "capture both models on the same samples in the same way"
            )
    for states in (a, b):
        if (several := len(states) - states.table["id"].nunique()) > 0:
            advice = (
                "capture one row a sample (words, or reduce='mean'), and give "
                "each sample an id of its own"
            )
            raise ComparisonError(
                "numbers of rows and of samples", len(states), len(states) - several, advice
            )
    ids, others = a.table["id"], pd.Index(b.table["id"])
    rows = ids.isin(others).to_numpy().nonzero()[0]
    if not len(rows):
        advice = "none is in both, so choose a word that both models say, or give more samples"
        raise ComparisonError("samples", f"{len(a)} in a", f"{len(b)} in b", advice)
    pick = lambda side, at: States(
        {key: part[at] for key, part in side.tensors.items()}, side.table.iloc[at], side.provenance
    )
    return pick(a, rows), pick(b, others.get_indexer(ids.iloc[rows]))


def similarity(one: Float[Array, "k d"], other: Float[Array, "m _"]) -> Float[np.ndarray, "k m"]:
    r"""Cosines of concepts (k, d) with others (m, d), :math:`S_{ij} = \cos(u_i, u'_j)`.

    Raises
    ------
    ActivationsError, ComparisonError
        If concepts are missing, NaN, infinite or zero, or the two are not equally wide.
    """
    sides = [side.double() for side in _alike(one, other, "concepts", "other concepts")]
    lengths = [torch.linalg.vector_norm(side, dim=1, keepdim=True) for side in sides]
    if zero := [
        _listed((length[:, 0] == 0).cpu().numpy()) for length in lengths if not length.all()
    ]:
        raise ActivationsError(
            f"concepts {zero[0]} are zero and have no direction",
            "leave out concepts that are never used",
        )
    left, right = (side / length for side, length in zip(sides, lengths, strict=True))
    return (left @ right.T).clamp_(-1, 1).cpu().numpy()


def match(
    one: Float[Array, "k d"], other: Float[Array, "m _"], how: str = "one-to-one"
) -> Int[np.ndarray, "k"]:
    r"""Which of the other concepts each concept goes with, m(k), by their cosines :math:`S`.

    "argmax" takes :math:`m(i) = \arg\max_j S_{ij}`, so several may go with one: how concepts
    changed. "one-to-one" is the bijection :math:`\gamma \in \{0, 1\}` that minimises
    :math:`\sum \gamma_{ij} (1 - S_{ij})`: what a concept has become.

    Raises
    ------
    ActivationsError, ComparisonError
        As :func:`similarity`; also if the two are not equally many for one-to-one.
    SelectionError
        If ``how`` is unknown.
    """
    shape = similarity(one, other).shape  # refuses what has no cosine
    if how == "one-to-one" and shape[0] != shape[1]:
        raise ComparisonError(
            "numbers of concepts", *shape, "fit equally many, or match with how='argmax'"
        )
    return np.array(match_concepts(one, other, how)["b"])


def associations(codes: Float[Array, "n k"]) -> Int[np.ndarray, "n"]:
    r"""The concept that each sample belongs to, from codes (n, k).

    :math:`A_k = \{m : k = \arg\max_i |v_i(x_m)|\}`, as labels. Of equal
    codes the first concept is taken.

    Raises
    ------
    ActivationsError
        If the codes are no matrix of finite numbers, or no concept is active in some sample.
    """
    size, labels = _rows(codes, "codes").abs().max(dim=1)  # the first of equal ones
    if silent := int((size == 0).sum()):
        raise ActivationsError(
            f"no concept is active in {silent} of {len(size)} samples",
            "leave them out, or lower the penalty",
        )
    return labels.cpu().numpy()


def shift_vectors(
    a: Float[Array, "n d"],
    b: Float[Array, "m _"],
    labels: Int[Array, "l"],
    k: int,
    how: str = "mean",
) -> Float[np.ndarray, "k _"]:
    r"""The shift of each concept (k, d).

    :math:`\Delta_k = \frac{1}{|A_k|} \sum_{m \in A_k} (b_m - a_m)`, A_k the samples labelled k.
    ``how`` "median" takes the median of each dimension's differences, "trimmed" their mean without
    the smallest and largest 10 %; the authors' code takes the difference of the two sides' medians.

    Raises
    ------
    ActivationsError
        If states are missing, NaN or infinite, or a concept has no samples.
    ComparisonError, LengthError
        If a and b are not equally wide, or a, b and labels not equally many.
    SelectionError
        If ``how`` is unknown, or labels are not among 0 to k - 1.
    """
    if how not in CENTRES:
        raise SelectionError(
            f"unknown way to average {how!r}", f"allowed: {', '.join(map(repr, CENTRES))}"
        )
    pairs = _paired(a, b, labels, k)
    if how == "mean":
        return (
            sum(member.T @ delta for member, delta in pairs.blocks()).cpu().numpy()
            / pairs.sizes[:, None]
        )
    centre = {
        "median": lambda rows: np.median(rows, axis=0),
        "trimmed": lambda rows: trim_mean(rows, 0.1, axis=0),
    }[how]
    return np.stack(
        [centre(pairs.differences(pairs.labels == concept).cpu().numpy()) for concept in range(k)]
    )


def shifted(
    concepts: Float[Array, "k d"], shifts: Float[Array, "m _"], alpha: float | int = 1.0
) -> Float[np.ndarray, "k d"]:
    r"""Concepts (k, d) moved along their shifts (k, d): :math:`u_k^s = u_k^a + \alpha \Delta_k`.

    With means of k-means clusters, and shifts that are means over the same clusters,
    :math:`\alpha = 1` gives the mean of b over A_k.

    Raises
    ------
    ActivationsError, ComparisonError
        If concepts or shifts are missing, NaN or infinite, or the two are not
        equally wide and equally many.
    SelectionError
        If alpha is not a finite number, or so large that concepts become infinite.
    """
    start, by = _alike(concepts, shifts, "concepts", "shifts")
    if len(start) != len(by):
        raise ComparisonError(
            "numbers of concepts and shifts", len(start), len(by), "give one shift for each concept"
        )
    if not (found := start.double() + alpha * by.double()).isfinite().all():
        raise SelectionError(
            f"alpha is {alpha}",
            "give a finite number with which concepts stay finite; 1 is the paper's",
        )
    return found.cpu().numpy()


def consistency(
    a: Float[Array, "n d"], b: Float[Array, "m _"], labels: Int[Array, "l"], k: int
) -> Float[np.ndarray, "k"]:
    r"""How far the samples of each concept (k,) move its way.

    :math:`\frac{1}{|A_k|} \sum_{m \in A_k} \cos(\delta_m, \Delta_k)`, at most 1.

    Raises
    ------
    ActivationsError, ComparisonError, LengthError, SelectionError
        As :func:`shift_vectors`; also if a sample, or a concept on average, does
        not move, which has no direction.
    """
    pairs = _paired(a, b, labels, k)
    totals, units, lengths = pairs.moments()
    norms = np.linalg.norm(totals, axis=1)
    if still := _listed(norms <= _ROUNDING * lengths):
        raise ActivationsError(
            f"concept(s) {still} move by zero on average",
            "use pairwise_consistency, or fit other concepts",
        )
    return ((units * totals).sum(axis=1) / (norms * pairs.sizes)).clip(-1, 1)


def pairwise_consistency(
    a: Float[Array, "n d"], b: Float[Array, "m _"], labels: Int[Array, "l"], k: int
) -> Float[np.ndarray, "k"]:
    r"""Mean cosine of the shifts of two different samples of each concept (k,).

    The authors' released notebook calls it consistency. From the sum of unit shifts, :math:`(\lVert
    \sum_m \hat\delta_m \rVert^2 - |A_k|) / (|A_k| (|A_k| - 1))`. Where all :math:`\delta_m` are
    equally long it is :math:`(|A_k| c^2 - 1) / (|A_k| - 1)` of the :func:`consistency` c.

    Raises
    ------
    ActivationsError, ComparisonError, LengthError, SelectionError
        As :func:`shift_vectors`; also if a concept has only one sample, or a sample does not move.
    """
    pairs = _paired(a, b, labels, k)
    if alone := _listed((n := pairs.sizes) == 1):
        raise ActivationsError(
            f"concept(s) {alone} have one sample and no pair",
            "fit fewer concepts, or give more samples",
        )
    return ((np.square(pairs.moments()[1]).sum(axis=1) - n) / (n * (n - 1))).clip(-1, 1)


def magnitude(shifts: Float[Array, "k d"]) -> Float[np.ndarray, "k"]:
    r"""Length of each shift (k,), :math:`\lVert \Delta_k \rVert`, in units of the states.

    Raises
    ------
    ActivationsError
        If shifts are missing, NaN or infinite.
    """
    return _rows(shifts, "shifts").double().norm(dim=1).cpu().numpy()


def t_overlap(words: WordLists, others: WordLists) -> Float[np.ndarray, "k"]:
    r"""Share of each concept's words T that are also among the other's, in per cent.

    :math:`100 |T \cap T'| / |T|` (T-Overlap). A word counts once, whatever its rank. Two mappings
    (``concepts.as_lists``) are paired by key, lists by position.

    Raises
    ------
    WordListError
        If there are no concepts, or a concept has no list of words.
    ComparisonError, LengthError
        If two mappings have other keys, or the two are not equally many.
    """
    if isinstance(words, Mapping) and isinstance(others, Mapping):
        if set(words) != set(others):
            raise ComparisonError(
                "concepts", sorted(words), sorted(others), "give words of the same concepts"
            )
        others = [others[concept] for concept in words]
    one, other = _sets(words), _sets(others)
    if len(one) != len(other):
        raise LengthError(words=len(one), others=len(other))
    return np.array(
        [100 * len(mine & theirs) / len(mine) for mine, theirs in zip(one, other, strict=True)]
    )


class _Pairs(NamedTuple):
    """States of the same samples in two models, with the concept of each sample.

    And the number of samples of each concept.
    """

    a: Float[Tensor, "n d"]
    b: Float[Tensor, "n d"]
    labels: Int[Tensor, "n"]
    sizes: Int[np.ndarray, "k"]

    def differences(self, rows: Tensor | slice) -> Float[Tensor, "_ d"]:
        return self.b[rows].double() - self.a[rows].double()

    def blocks(self) -> Iterator[tuple[Float[Tensor, "b k"], Float[Tensor, "b d"]]]:
        """Membership (0 or 1) and shifts of a bounded number of samples at a time."""
        step = max(1, _BLOCK // self.a.shape[1])
        for rows in (slice(start, start + step) for start in range(0, len(self.labels), step)):
            yield (
                torch.nn.functional.one_hot(self.labels[rows], len(self.sizes)).double(),
                self.differences(rows),
            )

    def moments(
        self,
    ) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, "k d"], Float[np.ndarray, "k"]]:
        """Sums of shifts, of unit shifts and of lengths for each concept.

        ``ActivationsError`` if a sample does not move.
        """
        totals, units, lengths, still = 0, 0, 0, 0
        for member, delta in self.blocks():
            length = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
            still += int((length == 0).sum())
            totals, units = totals + member.T @ delta, units + (member / length).T @ delta
            lengths = lengths + (member * length).sum(dim=0)
        if still:
            told = f"{still} of {len(self.labels)} samples have the same state in both models"
            raise ActivationsError(
                told,
                (
                    "cosines need a direction; check that the two models differ, "
                    "or leave these samples out"
                ),
            )
        return totals.cpu().numpy(), units.cpu().numpy(), lengths.cpu().numpy()


def _paired(a: Array, b: Array, labels: Array, k: int) -> _Pairs:
    """States and labels that belong together, with no concept without samples."""
    one, other = _alike(a, b, "states of a", "states of b")
    whole("k", k)
    groups = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if not len(one) == len(other) == groups.size:
        raise LengthError(a=len(one), b=len(other), labels=groups.size)
    if groups.ndim != 1 or groups.dtype.kind not in "iu" or groups.min() < 0 or groups.max() >= k:
        told = (
            f"labels of {k} concepts are {groups.dtype} of shape {groups.shape}, from "
            f"{groups.min()} to {groups.max()}"
        )
        raise SelectionError(told, f"give the number of each sample's concept, 0 to {k - 1}")
    sizes = np.bincount(groups, minlength=k)
    if empty := _listed(sizes == 0):
        raise ActivationsError(
            f"no sample belongs to concept(s) {empty}",
            "fit fewer, or leave these out of concepts and codes",
        )
    return _Pairs(one, other, torch.from_numpy(groups.astype(np.int64)).to(one.device), sizes)


def _alike(
    one: Array, other: Array, what: str, others: str
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Both as matrices of one width on the device of the first."""
    left, right = _rows(one, what), _rows(other, others)
    if left.shape[1] != right.shape[1]:
        raise ComparisonError(
            "widths",
            left.shape[1],
            right.shape[1],
            "give both at the same layer, of models of one width",
        )
    return left, right.to(left.device)


def _rows(values: Array, what: str) -> Float[Tensor, "n d"]:
    found = (
        values.detach()
        if isinstance(values, Tensor)
        else torch.from_numpy(np.require(values, requirements="W"))
    )
    if found.ndim != 2 or not found.numel():
        raise ActivationsError(
            f"{what} of shape {tuple(found.shape)}", "give one row and one column or more"
        )
    if not found.isfinite().all():
        raise ActivationsError(
            f"{what} hold NaN or infinite values", "leave out the samples or concepts that do"
        )
    return found


def _sets(words: WordLists) -> list[set[str]]:
    named = dict(words) if isinstance(words, Mapping) else dict(enumerate(words))
    fit = lambda found: (
        not isinstance(found, str)
        and len(found)
        and all(isinstance(word, str) and word for word in found)
    )
    if (bad := [str(concept) for concept, found in named.items() if not fit(found)]) or not named:
        raise WordListError(
            f"no list of words for {', '.join(bad) or 'any concept'}",
            "give each concept one word or more, none missing",
        )
    return [set(found) for found in named.values()]


def _listed(mask: np.ndarray) -> str:
    """The numbers of the rows where a mask is true, as text; empty where none is."""
    return ", ".join(map(str, np.flatnonzero(mask)))
