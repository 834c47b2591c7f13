r"""How fine-tuning moves concepts.

Shift vectors, and how well the samples of a concept agree. Activations a (n, d)
of the original and b (n, d) of the fine-tuned model, row m of both from the same sample, differ by
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

from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.errors import InputError, incomparable
from xlvlms_tutorial.methods.concepts.base import whole
from xlvlms_tutorial.validation import require, require_one_of, require_same_length

# How the shift of a concept can be averaged over its samples: ``average`` of ``shift_vectors``
AVERAGES = ("mean", "median", "trimmed")

Array = Tensor | np.ndarray
# Words of concepts: a list for each concept in order, or a mapping from its number to its list
WordLists = Mapping[int, Sequence[str]] | Sequence[Sequence[str]]

_BLOCK = 2**20  # numbers of one array at a time, to bound memory
_ROUNDING = 1e-12  # of the length of what was averaged: below it a mean is zero but for rounding
_MUST_AGREE = {
    "n_samples": "numbers of samples",
    "ids_sha256": "sample sets",
    "selection": "captured positions",
    "reduce": "reductions",
}


def common_samples(a: Activations, b: Activations) -> tuple[Activations, Activations]:
    """Keep the rows of the samples that two captures share, in the order of the first.

    Use it before :func:`shift_vectors` where the two models need not have said the token of
    interest about the same samples. Both must be captured from the same list of samples, at the
    same kind of position, with one row a sample. Samples are told apart by their id.

    Parameters
    ----------
    a : Activations
        Activations of the original model.
    b : Activations
        Activations of the fine-tuned model.

    Returns
    -------
    tuple of States
        The shared rows of ``a`` and of ``b``: row m of both is of the same sample. Each keeps its
        own table and provenance.

    Raises
    ------
    InputError
        If the two are of other samples or positions, a sample has several
        rows, or no sample is in both.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.methods.shift import common_samples
    >>> def activations(ids):
    ...     table = pd.DataFrame({"sample": range(len(ids)), "id": ids})
    ...     return Activations({(3, "resid_post"): torch.ones(len(ids), 2)}, table, {})
    >>> a, b = common_samples(activations(["s4", "s1", "s7"]), activations(["s7", "s4"]))
    >>> a.table["id"].tolist()
    ['s4', 's7']
    >>> b.table["id"].tolist()
    ['s4', 's7']
    """
    for name, description in _MUST_AGREE.items():
        value_a = a.provenance.get(name)
        value_b = b.provenance.get(name)
        advice = "capture both models on the same samples in the same way"
        require_equal(description, value_a, value_b, advice)
    for states in (a, b):
        n_samples = states.table["id"].nunique()
        if len(states) > n_samples:
            advice = (
                "capture one row a sample (words, or reduce='mean'), and give "
                "each sample an id of its own"
            )
            raise incomparable("numbers of rows and of samples", len(states), n_samples, advice)
    ids_a = a.table["id"]
    ids_b = pd.Index(b.table["id"])
    rows_a = ids_a.isin(ids_b).to_numpy().nonzero()[0]
    if not len(rows_a):
        advice = "none is in both, so choose a word that both models say, or give more samples"
        raise incomparable("samples", f"{len(a)} in a", f"{len(b)} in b", advice)
    rows_b = ids_b.get_indexer(ids_a.iloc[rows_a])
    return _rows_of(a, rows_a), _rows_of(b, rows_b)


def assign_concepts(codes: Float[Array, "n k"]) -> Int[np.ndarray, "n"]:
    r"""Assign each sample to the concept of its largest code.

    Use it to label samples for :func:`shift_vectors` and :func:`consistency`. The samples of
    concept k are :math:`A_k = \{m : k = \arg\max_i |v_i(x_m)|\}`.

    Parameters
    ----------
    codes : array or tensor (n, k)
        Codes of samples, as ``Dictionary.transform`` gives them; compared by size, without sign.

    Returns
    -------
    ndarray of int (n,)
        The number of each sample's concept, 0 to k - 1; the first of equal codes.

    Raises
    ------
    InputError
        If the codes are no matrix of finite numbers, or no concept is active in some sample.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.shift import assign_concepts
    >>> assign_concepts(np.array([[0.1, -3.0, 2.0], [0.5, 0.5, 0.0]])).tolist()
    [1, 0]
    """
    sizes, labels = _matrix(codes, "codes").abs().max(dim=1)  # the first of equal ones
    inactive = int((sizes == 0).sum())
    if inactive:
        raise InputError(
            f"no concept is active in {inactive} of {len(sizes)} samples",
            "leave them out, or lower the penalty",
        )
    return labels.cpu().numpy()


def shift_vectors(
    a: Float[Array, "n d"],
    b: Float[Array, "m _"],
    labels: Int[Array, "l"],
    k: int,
    average: str = "mean",
) -> Float[np.ndarray, "k _"]:
    r"""Average how far fine-tuning moves the samples of each concept.

    Use it to predict where a concept of the original model goes: add its shift vector by
    :func:`shifted`. The shift is
    :math:`\Delta_k = \frac{1}{|A_k|} \sum_{m \in A_k} (b_m - a_m)`, with A_k the samples labelled k
    (arXiv 2501.03012; the authors' code takes the difference of the two sides' medians).

    Parameters
    ----------
    a : array or tensor (n, d)
        Activations of the original model, a row for each sample.
    b : array or tensor (n, d)
        Activations of the fine-tuned model, of the same samples in the same order.
    labels : array or tensor of int (n,)
        The concept of each sample, 0 to k - 1, as :func:`assign_concepts` gives it.
    k : int
        The number of concepts; each must have a sample.
    average : str
        How differences are averaged: "mean" (the default, the paper's),
        "median" of each dimension, or "trimmed", the mean of each dimension without the smallest
        and largest 10 %.

    Returns
    -------
    ndarray (k, d)
        The shift vector of each concept, in float64.

    Raises
    ------
    InputError
        If activations are missing, NaN or infinite, or a concept has no samples. If a and b are not
        equally wide, or a, b and labels not equally many. If ``average`` is unknown, or labels are
        not among 0 to k - 1.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.shift import shift_vectors
    >>> a = np.zeros((4, 2))
    >>> b = np.array([[1.0, 0.0], [3.0, 0.0], [8.0, 0.0], [0.0, 5.0]])
    >>> labels = np.array([0, 0, 0, 1])
    >>> shift_vectors(a, b, labels, k=2).tolist()
    [[4.0, 0.0], [0.0, 5.0]]
    >>> shift_vectors(a, b, labels, k=2, average="median").tolist()
    [[3.0, 0.0], [0.0, 5.0]]
    """
    require_one_of(average, AVERAGES, "way to average")
    pairs = _paired(a, b, labels, k)
    if average == "mean":
        totals = sum(member.T @ delta for member, delta in pairs.blocks())
        return totals.cpu().numpy() / pairs.sizes[:, None]
    centres = []
    for concept in range(k):
        deltas = pairs.differences(pairs.labels == concept).cpu().numpy()
        if average == "median":
            centres.append(np.median(deltas, axis=0))
        else:
            centres.append(trim_mean(deltas, 0.1, axis=0))
    return np.stack(centres)


def shifted(
    concepts: Float[Array, "k d"], shifts: Float[Array, "m _"], alpha: float | int = 1.0
) -> Float[np.ndarray, "k d"]:
    r"""Move concepts along their shifts, :math:`u_k^s = u_k^a + \alpha \Delta_k`.

    Use it before :func:`recovery`, which says whether the moved concepts arrive at those of the
    fine-tuned model. With means of k-means clusters, and shifts that are means over the same
    clusters, :math:`\alpha = 1` gives the mean of b over A_k.

    Parameters
    ----------
    concepts : array or tensor (k, d)
        Concepts of the original model, a row each.
    shifts : array or tensor (k, d)
        The shift of each concept, as :func:`shift_vectors` gives it.
    alpha : float
        The strength :math:`\alpha`; 1 (the default) is the paper's, 0 leaves the concepts in place.

    Returns
    -------
    ndarray (k, d)
        The moved concepts, in float64.

    Raises
    ------
    InputError
        If concepts or shifts are missing, NaN or infinite. If the two are not equally wide and
        equally many. If alpha is not a finite number, or so large that concepts become infinite.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.shift import shifted
    >>> shifted(np.array([[1.0, 1.0]]), np.array([[2.0, 0.0]]), alpha=0.5).tolist()
    [[2.0, 1.0]]
    """
    start, steps = _same_width(concepts, shifts, "concepts", "shifts")
    advice = "give one shift for each concept"
    require_equal("numbers of concepts and shifts", len(start), len(steps), advice)
    moved = start.double() + alpha * steps.double()
    if not moved.isfinite().all():
        raise InputError(
            f"alpha is {alpha}",
            "give a finite number with which concepts stay finite; 1 is the paper's",
        )
    return moved.cpu().numpy()


def consistency(
    a: Float[Array, "n d"], b: Float[Array, "m _"], labels: Int[Array, "l"], k: int
) -> Float[np.ndarray, "k"]:
    r"""Measure how far the samples of each concept move in its direction.

    Use it to see which shift vectors stand for their samples:
    :math:`\frac{1}{|A_k|} \sum_{m \in A_k} \cos(\delta_m, \Delta_k)`, at most 1
    (arXiv 2501.03012). A concept of one sample has 1 whatever it is.

    Parameters
    ----------
    a : array or tensor (n, d)
        Activations of the original model, a row for each sample.
    b : array or tensor (n, d)
        Activations of the fine-tuned model, of the same samples in the same order.
    labels : array or tensor of int (n,)
        The concept of each sample, 0 to k - 1.
    k : int
        The number of concepts; each must have a sample.

    Returns
    -------
    ndarray (k,)
        The mean cosine of each concept's samples with its shift vector.

    Raises
    ------
    InputError
        If a sample, or a concept on average, does not move, which has no direction; activations are
        missing, NaN or infinite; or a concept has no samples. If a and b are not equally wide, or
        a, b and labels not equally many. If labels are not among 0 to k - 1.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.shift import consistency
    >>> a = np.zeros((4, 2))
    >>> b = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    >>> consistency(a, b, np.array([0, 0, 1, 1]), k=2).round(2).tolist()
    [1.0, 0.71]
    """
    pairs = _paired(a, b, labels, k)
    totals, units, lengths = pairs.moments()
    norms = np.linalg.norm(totals, axis=1)
    _refuse_concepts(
        norms <= _ROUNDING * lengths,
        "concept(s) {} move by zero on average",
        "use pairwise_consistency, or fit other concepts",
    )
    along = (units * totals).sum(axis=1)
    return (along / (norms * pairs.sizes)).clip(-1, 1)


def pairwise_consistency(
    a: Float[Array, "n d"], b: Float[Array, "m _"], labels: Int[Array, "l"], k: int
) -> Float[np.ndarray, "k"]:
    r"""Average the cosines of the shifts of all pairs of samples of each concept.

    Use it where the shift vector of a concept may be zero, or to compare with the authors' released
    notebook, which calls it consistency. It is computed from the sum of unit shifts,
    :math:`(\lVert \sum_m \hat\delta_m \rVert^2 - |A_k|) / (|A_k| (|A_k| - 1))`. Where all
    :math:`\delta_m` are equally long it is :math:`(|A_k| c^2 - 1) / (|A_k| - 1)` of the
    :func:`consistency` c.

    Parameters
    ----------
    a : array or tensor (n, d)
        Activations of the original model, a row for each sample.
    b : array or tensor (n, d)
        Activations of the fine-tuned model, of the same samples in the same order.
    labels : array or tensor of int (n,)
        The concept of each sample, 0 to k - 1.
    k : int
        The number of concepts; each must have two samples.

    Returns
    -------
    ndarray (k,)
        The mean cosine over pairs of different samples, from -1 to 1.

    Raises
    ------
    InputError
        If a concept has no or only one sample, a sample does not move, or activations are missing,
        NaN or infinite. If a and b are not equally wide, or a, b and labels not equally many. If
        labels are not among 0 to k - 1.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.shift import pairwise_consistency
    >>> a = np.zeros((4, 2))
    >>> b = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    >>> pairwise_consistency(a, b, np.array([0, 0, 1, 1]), k=2).tolist()
    [1.0, 0.0]
    """
    pairs = _paired(a, b, labels, k)
    n = pairs.sizes
    _refuse_concepts(
        n == 1,
        "concept(s) {} have one sample and no pair",
        "fit fewer concepts, or give more samples",
    )
    _, units, _ = pairs.moments()
    squares = np.square(units).sum(axis=1)
    return ((squares - n) / (n * (n - 1))).clip(-1, 1)


def shift_magnitude(shifts: Float[Array, "k d"]) -> Float[np.ndarray, "k"]:
    r"""Measure the length of each shift, :math:`\lVert \Delta_k \rVert`.

    Use it to see which concepts fine-tuning moves far, and to make baselines of equal length.

    Parameters
    ----------
    shifts : array or tensor (k, d)
        The shift of each concept.

    Returns
    -------
    ndarray (k,)
        Lengths in float64, in units of the activations.

    Raises
    ------
    InputError
        If shifts are missing, NaN or infinite.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.shift import shift_magnitude
    >>> shift_magnitude(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [5.0, 0.0]
    """
    return _matrix(shifts, "shifts").double().norm(dim=1).cpu().numpy()


def t_overlap(words: WordLists, others: WordLists) -> Float[np.ndarray, "k"]:
    r"""Compute the share of each concept's words that its partner has too, in per cent.

    Use it to compare concepts by what they say (T-Overlap, arXiv 2501.03012):
    :math:`100 |T \cap T'| / |T|`. A word counts once, whatever its rank.

    Parameters
    ----------
    words : mapping or sequence of word lists
        The words T of each concept, one or more.
    others : mapping or sequence of word lists
        The words T' of each partner. Two mappings (from ``concepts.as_lists``) are paired by key,
        lists by position.

    Returns
    -------
    ndarray (k,)
        Shares from 0 to 100, in the order of ``words``.

    Raises
    ------
    InputError
        If there are no concepts, or a concept has no list of words. If two mappings have other
        keys, or the two are not equally many.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.shift import t_overlap
    >>> t_overlap([["dog", "cat"], ["red"]], [["dog"], ["red"]]).tolist()
    [50.0, 100.0]
    """
    if isinstance(words, Mapping) and isinstance(others, Mapping):
        advice = "give words of the same concepts"
        require_equal("concepts", sorted(words), sorted(others), advice)
        others = [others[concept] for concept in words]
    word_sets = _word_sets(words)
    partner_sets = _word_sets(others)
    require_same_length(words=word_sets, others=partner_sets)
    shares = []
    for word_set, partner_set in zip(word_sets, partner_sets, strict=True):
        shares.append(100 * len(word_set & partner_set) / len(word_set))
    return np.array(shares)


class _Pairs(NamedTuple):
    """Activations of the same samples in two models, with the concept of each sample.

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
        for start in range(0, len(self.labels), step):
            rows = slice(start, start + step)
            member = torch.nn.functional.one_hot(self.labels[rows], len(self.sizes))
            yield member.double(), self.differences(rows)

    def moments(
        self,
    ) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, "k d"], Float[np.ndarray, "k"]]:
        """Sums of shifts, of unit shifts and of lengths for each concept.

        ``InputError`` if a sample does not move.
        """
        totals = 0
        units = 0
        lengths = 0
        unmoved = 0
        for member, delta in self.blocks():
            length = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
            unmoved += int((length == 0).sum())
            totals = totals + member.T @ delta
            units = units + (member / length).T @ delta
            lengths = lengths + (member * length).sum(dim=0)
        if unmoved:
            raise InputError(
                f"{unmoved} of {len(self.labels)} samples have the same state in both models",
                (
                    "cosines need a direction; check that the two models differ, "
                    "or leave these samples out"
                ),
            )
        return totals.cpu().numpy(), units.cpu().numpy(), lengths.cpu().numpy()


def _rows_of(states: Activations, rows: Int[np.ndarray, "_"]) -> Activations:
    """Some rows of a capture, by number, in this order."""
    tensors = {key: tensor[rows] for key, tensor in states.tensors.items()}
    return Activations(tensors, states.table.iloc[rows], states.provenance)


def row_cosines(
    concepts: Float[Array, "k d"], others: Float[Array, "m _"]
) -> Float[np.ndarray, "k"]:
    """Cosine of each concept with the one in the same row of others, in float64."""
    first, second = _same_width(concepts, others, "concepts", "other concepts")
    cosines = (_unit_rows(first) * _unit_rows(second)).sum(dim=1)
    return cosines.clamp_(-1, 1).cpu().numpy()


def _unit_rows(concepts: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """Concepts scaled to length 1, in float64."""
    wide = concepts.double()
    lengths = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    _refuse_concepts(
        (lengths[:, 0] == 0).cpu().numpy(),
        "concepts {} are zero and have no direction",
        "leave out concepts that are never used",
    )
    return wide / lengths


def _paired(a: Array, b: Array, labels: Array, k: int) -> _Pairs:
    """Activations and labels that belong together, with no concept without samples."""
    original, tuned = _same_width(a, b, "states of a", "states of b")
    whole("k", k)
    groups = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    require_same_length(a=original, b=tuned, labels=groups.size)
    lowest, highest = groups.min(), groups.max()
    require(
        groups.ndim == 1 and groups.dtype.kind in "iu" and lowest >= 0 and highest < k,
        f"labels of {k} concepts are {groups.dtype} of shape {groups.shape}, from {lowest} to "
        f"{highest}",
        f"give the number of each sample's concept, 0 to {k - 1}",
    )
    sizes = np.bincount(groups, minlength=k)
    _refuse_concepts(
        sizes == 0,
        "no sample belongs to concept(s) {}",
        "fit fewer, or leave these out of concepts and codes",
    )
    numbers = torch.from_numpy(groups.astype(np.int64)).to(original.device)
    return _Pairs(original, tuned, numbers, sizes)


def _same_width(
    first: Array, second: Array, first_name: str, second_name: str
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Both as matrices of one width on the device of the first."""
    first_rows = _matrix(first, first_name)
    second_rows = _matrix(second, second_name)
    advice = "give both at the same layer, of models of one width"
    require_equal("widths", first_rows.shape[1], second_rows.shape[1], advice)
    return first_rows, second_rows.to(first_rows.device)


def _matrix(values: Array, name: str) -> Float[Tensor, "n d"]:
    if isinstance(values, Tensor):
        matrix = values.detach()
    else:  # torch warns of arrays that cannot be written to, which are copied here
        matrix = torch.from_numpy(np.require(values, requirements="W"))
    if matrix.ndim != 2 or not matrix.numel():
        raise InputError(
            f"{name} of shape {tuple(matrix.shape)}", "give one row and one column or more"
        )
    if not matrix.isfinite().all():
        raise InputError(
            f"{name} hold NaN or infinite values", "leave out the samples or concepts that do"
        )
    return matrix


def _word_sets(words: WordLists) -> list[set[str]]:
    """The words of each concept as a set; refuses a concept without words."""
    by_concept = dict(words) if isinstance(words, Mapping) else dict(enumerate(words))
    word_sets = []
    without = []
    for concept, listed in by_concept.items():
        if _is_word_list(listed):
            word_sets.append(set(listed))
        else:
            without.append(str(concept))
    if without or not by_concept:
        raise InputError(
            f"no list of words for {', '.join(without) or 'any concept'}",
            "give each concept one word or more, none missing",
        )
    return word_sets


def _is_word_list(words: object) -> bool:
    if isinstance(words, str) or not len(words):
        return False
    return all(isinstance(word, str) and word for word in words)


def _refuse_concepts(mask: np.ndarray, problem: str, advice: str) -> None:
    """Refuse the concepts where a mask is true; ``problem`` has a place for their numbers."""
    if mask.any():
        numbers = ", ".join(map(str, np.flatnonzero(mask)))
        raise InputError(problem.format(numbers), advice)


def require_equal(description: str, a: object, b: object, advice: str) -> None:
    """Refuse sides ``a`` and ``b`` that differ in what ``description`` says, with ``advice``."""
    if a != b:
        raise incomparable(description, a, b, advice)
