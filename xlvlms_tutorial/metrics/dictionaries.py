"""What a dictionary keeps, how few concepts it uses, and whether another seed finds the same.

Nothing here needs the fitted object: activations A (n, d), what a dictionary gives back
of them, codes Z (n, k) or components D (k, d) are enough. NumPy arrays and torch
tensors of any device are read.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from xlvlms_tutorial.errors import ActivationsError, ComparisonError, EstimateError, SelectionError
from xlvlms_tutorial.metrics.intervals import Estimate, bootstrap

MATCHES = ("one-to-one", "argmax")

_BLOCK = 2**22  # numbers of one array at a time, to bound memory


class ReconstructionError(NamedTuple):
    """Squared error relative to the sum of squares and to the variance, and 1 minus the latter.

    Both are those of the activations.
    """

    of_energy: float
    of_variance: float
    explained_variance: float


class Sparsity(NamedTuple):
    """Share of codes that are zero, active concepts per sample, and share of unused concepts.

    The mean number of active concepts per sample; unused ones are active in no sample.
    """

    zeros: float
    active: float
    dead: float


def match_concepts(
    a: ArrayLike | Tensor, b: ArrayLike | Tensor, how: str = "one-to-one", absolute: bool = False
) -> pd.DataFrame:
    r"""Which of the concepts b goes with each of the concepts a, by their cosines.

    They are compared by :math:`S_{ij} = \cos(a_i, b_j)`.

    "one-to-one" is the :math:`\gamma \in \{0, 1\}` that minimises
    :math:`\sum \gamma_{ij} (1 - S_{ij})`, each row and column used once; where the two differ in
    number the smaller set is assigned (arXiv 2501.03012). "argmax" takes :math:`\arg\max_j S_{ij}`,
    so that several may go with one.

    Parameters
    ----------
    a, b
        Concepts (k, d) and (l, d), a row each.
    how
        "one-to-one" or "argmax".
    absolute
        Take :math:`|S|`, for concepts whose sign is arbitrary (PCA).

    Returns
    -------
    pd.DataFrame
        Columns a and b (numbers of rows) and cosine, in the order of ``a``.

    Raises
    ------
    SelectionError
        If ``how`` is unknown.
    ActivationsError
        If concepts are missing, not finite, or zero, which has no direction.
    ComparisonError
        If the two are not equally wide.

    Examples
    --------
    >>> match_concepts([[1, 0], [3, 4]], [[0, 2], [5, 0]])
       a  b  cosine
    0  0  1     1.0
    1  1  0     0.8
    """
    if how not in MATCHES:
        raise SelectionError(
            f"unknown matching {how!r}", f"allowed: {', '.join(map(repr, MATCHES))}"
        )
    one, other = _directions(a, "a"), _directions(b, "b")
    if one.shape[1] != other.shape[1]:
        raise ComparisonError(
            "widths of the components",
            one.shape[1],
            other.shape[1],
            "compare dictionaries of the same layer and model",
        )
    cosines = (one @ other.T).clip(-1, 1)
    cosines = np.abs(cosines) if absolute else cosines
    if how == "argmax":
        rows, columns = np.arange(len(one)), cosines.argmax(axis=1)
    else:
        rows, columns = linear_sum_assignment(cosines, maximize=True)
    return pd.DataFrame({"a": rows, "b": columns, "cosine": cosines[rows, columns]})


def matched(a: ArrayLike | Tensor, b: ArrayLike | Tensor, absolute: bool = False) -> pd.DataFrame:
    r"""Components ``a`` matched one to one with ``b`` (by :math:`|S|` if ``absolute``)."""
    return match_concepts(a, b, absolute=absolute)


def stability(
    components: Sequence[ArrayLike | Tensor],
    absolute: bool = False,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean matched cosine over all pairs of runs.

    1 where every seed finds the same (k, d) components up to their order. The interval
    resamples the concepts of the first run, each drawn together with what the other runs have
    for it; it says how the mean varies with the concepts, not with further seeds. n is the
    number of pairs of runs times k.

    Raises
    ------
    ActivationsError
        As :func:`match_concepts`.
    ComparisonError
        If runs differ in their number of components or in width.
    EstimateError
        If there are fewer than 2 runs or 2 components.
    """
    runs = [_directions(run, f"run {i}") for i, run in enumerate(components)]
    if len(runs) < 2:
        raise EstimateError("runs", len(runs), "2 or more, fitted with different seeds")
    if differing := [run.shape for run in runs if run.shape != runs[0].shape]:
        raise ComparisonError(
            "shapes of the components",
            runs[0].shape,
            differing[0],
            "fit the runs with the same settings",
        )
    pairs = {
        pair: match_concepts(runs[pair[0]], runs[pair[1]], absolute=absolute)
        for pair in combinations(range(len(runs)), 2)
    }
    # for each run and component, the concept of the first run that it stands for
    first = [np.arange(len(runs[0]))]
    first += [np.argsort(pairs[0, i]["b"].to_numpy()) for i in range(1, len(runs))]
    cosines = np.concatenate([found["cosine"] for found in pairs.values()])
    groups = np.concatenate([first[i][found["a"]] for (i, _), found in pairs.items()])
    return bootstrap(cosines, groups, level=level, n_resamples=n_resamples, seed=seed)


def reconstruction_error(A: ArrayLike | Tensor, A_hat: ArrayLike | Tensor) -> ReconstructionError:
    r"""How much of activations (n, d) is lost.

    :math:`\|A - \hat A\|^2 / \|A\|^2`, and relative to the variance :math:`\|A - \bar A\|^2`. The
    first flatters dictionaries of activations with a large common mean, which one concept
    reconstructs. Giving back the mean has an error of 1 of the variance, and an
    ``explained_variance`` of 0; worse than that is negative.

    Raises
    ------
    ActivationsError
        If either is no matrix of finite numbers, or all activations are the same.
    ComparisonError
        If shapes differ.
    """
    given, found = _matrix(A, "activations"), _matrix(A_hat, "reconstructions")
    if given.shape != found.shape:
        raise ComparisonError(
            "shapes",
            tuple(given.shape),
            tuple(found.shape),
            "give the reconstructions of these activations",
        )
    if (given == given[0]).all():
        raise ActivationsError(
            "the activations are all the same", "give at least two samples that differ"
        )
    found = found.to(given.device)
    mean, step = given.mean(dim=0, dtype=torch.float64), max(1, _BLOCK // given.shape[1])
    sums = torch.zeros(3, dtype=torch.float64, device=given.device)
    for block, other in zip(given.split(step), found.split(step), strict=True):
        one = block.double()
        sums += torch.stack(
            [(one - other).square().sum(), one.square().sum(), (one - mean).square().sum()]
        )
    error, energy, variance = sums.tolist()
    return ReconstructionError(error / energy, error / variance, 1 - error / variance)


def sparsity(codes: ArrayLike | Tensor, threshold: float = 0.0) -> Sparsity:
    """How few concepts codes (n, k) use.

    A code is active where its absolute value exceeds the threshold, by default any but 0.

    Raises
    ------
    ActivationsError
        If the codes are no matrix of finite numbers.
    SelectionError
        If the threshold is negative.
    """
    if not threshold >= 0:
        raise SelectionError(f"threshold={threshold}", "give 0 or more")
    active = _matrix(codes, "codes").abs() > threshold
    share = active.double().mean().item()
    return Sparsity(
        1 - share, share * active.shape[1], 1 - active.any(dim=0).double().mean().item()
    )


def _matrix(values: ArrayLike | Tensor, name: str) -> Float[Tensor, "n d"]:
    try:
        found = (
            values.detach()
            if isinstance(values, Tensor)
            else torch.from_numpy(np.require(values, requirements="W"))
        )
    except (TypeError, ValueError) as cause:
        raise ActivationsError(
            f"{name} are not numbers ({cause})", "give an array or a tensor of numbers"
        ) from cause
    found = found if found.is_floating_point() else found.double()
    if found.ndim != 2 or not found.numel():
        raise ActivationsError(
            f"{name} have the shape {tuple(found.shape)}", "give one row for each of one or more"
        )
    if bad := int((~found.isfinite()).sum()):
        raise ActivationsError(
            f"{name}: {bad} of {found.numel()} numbers are NaN or infinite", "give finite numbers"
        )
    return found


def _directions(components: ArrayLike | Tensor, name: str) -> Float[np.ndarray, "k d"]:
    found = _matrix(components, f"components of {name}").double().cpu().numpy()
    sizes = np.linalg.norm(found, axis=1, keepdims=True)
    if not sizes.all():
        raise ActivationsError(
            f"components of {name}: {int((sizes == 0).sum())} are zero",
            "leave them out, they have no direction",
        )
    return found / sizes
