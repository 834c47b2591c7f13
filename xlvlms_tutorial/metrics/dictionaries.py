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

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.intervals import Estimate, bootstrap
from xlvlms_tutorial.metrics.plain import require_estimate
from xlvlms_tutorial.validation import (
    require,
    require_equal,
    require_one_of,
)

MATCHES = ("one-to-one", "argmax")

_BLOCK = 2**22  # numbers of one array at a time, to bound memory


class ReconstructionError(NamedTuple):
    """Hold the squared error of reconstructions, relative to the activations.

    :func:`reconstruction_error` makes it.

    Parameters
    ----------
    of_energy : float
        The error relative to the sum of squares of the activations.
    of_variance : float
        The error relative to their variance.
    explained_variance : float
        1 minus the latter.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics.dictionaries import ReconstructionError
    >>> ReconstructionError(of_energy=0.1, of_variance=0.25, explained_variance=0.75).of_variance
    0.25
    """

    of_energy: float
    of_variance: float
    explained_variance: float


class Sparsity(NamedTuple):
    """Hold how few concepts codes use.

    :func:`sparsity` makes it.

    Parameters
    ----------
    zeros : float
        The share of codes that are zero.
    active : float
        The mean number of active concepts per sample.
    dead : float
        The share of concepts that are active in no sample.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics.dictionaries import Sparsity
    >>> Sparsity(zeros=0.5, active=1.0, dead=0.0).active
    1.0
    """

    zeros: float
    active: float
    dead: float


def match_concepts(
    a: ArrayLike | Tensor, b: ArrayLike | Tensor, method: str = "one-to-one", absolute: bool = False
) -> pd.DataFrame:
    r"""Match the concepts of one dictionary with those of another by their cosines.

    Use it to see whether two runs, or two models, find the same concepts. They are compared by
    :math:`S_{ij} = \cos(a_i, b_j)`.

    Parameters
    ----------
    a, b : array-like or Tensor (k, d) and (l, d)
        Concepts, a row each.
    method : {"one-to-one", "argmax"}, default "one-to-one"
        "one-to-one" is the :math:`\gamma \in \{0, 1\}` that minimises
        :math:`\sum \gamma_{ij} (1 - S_{ij})`, each row and column used once; where the two differ
        in number the smaller set is assigned (arXiv 2501.03012). "argmax" takes :math:`\arg\max_j
        S_{ij}`, so that several may go with one.
    absolute : bool, default False
        Whether to compare by :math:`|S|`, for concepts whose sign is arbitrary (PCA).

    Returns
    -------
    pandas.DataFrame
        Columns a and b (numbers of rows) and cosine, in the order of ``a``.

    Raises
    ------
    InputError
        If ``method`` is unknown. If concepts are missing, not finite, or zero, which has no
        direction. If the two are not equally wide.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import match_concepts
    >>> match_concepts([[1, 0], [3, 4]], [[0, 2], [5, 0]])
       a  b  cosine
    0  0  1     1.0
    1  1  0     0.8
    """
    require_one_of(method, MATCHES, "matching")
    directions_a, directions_b = _directions(a, "a"), _directions(b, "b")
    require_equal(
        "widths of the components",
        directions_a.shape[1],
        directions_b.shape[1],
        "compare dictionaries of the same layer and model",
    )
    cosines = (directions_a @ directions_b.T).clip(-1, 1)
    if absolute:
        cosines = np.abs(cosines)
    if method == "argmax":
        rows = np.arange(len(directions_a))
        columns = cosines.argmax(axis=1)
    else:
        rows, columns = linear_sum_assignment(cosines, maximize=True)
    return pd.DataFrame({"a": rows, "b": columns, "cosine": cosines[rows, columns]})


def stability(
    components: Sequence[ArrayLike | Tensor],
    absolute: bool = False,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate how far runs with different seeds find the same components.

    It is the mean matched cosine over all pairs of runs, 1 where every seed finds the same
    components up to their order. The interval resamples the concepts of the first run, each drawn
    together with what the other runs have for it; it says how the mean varies with the concepts,
    not with further seeds.

    Parameters
    ----------
    components : sequence of array-like or Tensor (k, d)
        The components of each run, 2 runs or more.
    absolute : bool, default False
        Whether to take the absolute cosines, for components whose sign is arbitrary (PCA).
    level : float, default 0.95
        The confidence level, between 0 and 1.
    n_resamples : int, default 2000
        How often the concepts of the first run are resampled, 100 or more.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Estimate
        The mean cosine and its interval; n is the number of pairs of runs times k.

    Raises
    ------
    InputError
        If components are missing, not finite, or zero, which has no direction. If runs differ in
        their number of components or in width. If there are fewer than 2 runs or 2 components.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import stability
    >>> print(stability([[[1, 0], [0, 1]], [[0, 2], [3, 0]]]))
    1.00 [1.00, 1.00]
    """
    directions = [_directions(run, f"run {i}") for i, run in enumerate(components)]
    n_runs = len(directions)
    require_estimate(n_runs >= 2, "runs", n_runs, "2 or more, fitted with different seeds")
    advice = "fit the runs with the same settings"
    for run in directions:
        require_equal("shapes of the components", directions[0].shape, run.shape, advice)
    matches = {}
    for i, j in combinations(range(n_runs), 2):
        matches[i, j] = match_concepts(directions[i], directions[j], absolute=absolute)
    # for each run and component, the concept of the first run that it stands for
    first = [np.arange(len(directions[0]))]
    for i in range(1, n_runs):
        partners = matches[0, i]["b"].to_numpy()
        first.append(np.argsort(partners))
    cosines = []
    groups = []
    for (i, _), match in matches.items():
        cosines.append(match["cosine"])
        groups.append(first[i][match["a"]])
    return bootstrap(
        np.concatenate(cosines),
        np.concatenate(groups),
        level=level,
        n_resamples=n_resamples,
        seed=seed,
    )


def reconstruction_error(A: ArrayLike | Tensor, A_hat: ArrayLike | Tensor) -> ReconstructionError:
    r"""Measure how much of activations is lost in their reconstructions.

    The error is :math:`\|A - \hat A\|^2 / \|A\|^2`, and relative to the variance
    :math:`\|A - \bar A\|^2`. The first flatters dictionaries of activations with a large common
    mean, which one concept reconstructs. Giving back the mean has an error of 1 of the variance,
    and an ``explained_variance`` of 0; worse than that is negative.

    Parameters
    ----------
    A : array-like or Tensor (n, d)
        The activations, at least two that differ.
    A_hat : array-like or Tensor (n, d)
        Their reconstructions.

    Returns
    -------
    ReconstructionError
        The numbers of_energy, of_variance and explained_variance.

    Raises
    ------
    InputError
        If either is no matrix of finite numbers, or all activations are the same. If shapes differ.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import reconstruction_error
    >>> reconstruction_error([[1.0, 0.0], [3.0, 0.0]], [[2.0, 0.0], [2.0, 0.0]])
    ReconstructionError(of_energy=0.2, of_variance=1.0, explained_variance=0.0)
    """
    activations = _matrix(A, "activations")
    reconstructions = _matrix(A_hat, "reconstructions")
    require_equal(
        "shapes",
        tuple(activations.shape),
        tuple(reconstructions.shape),
        "give the reconstructions of these activations",
    )
    require(
        (activations != activations[0]).any(),
        "the activations are all the same",
        "give at least two samples that differ",
    )
    reconstructions = reconstructions.to(activations.device)
    mean = activations.mean(dim=0, dtype=torch.float64)
    step = max(1, _BLOCK // activations.shape[1])
    sums = torch.zeros(3, dtype=torch.float64, device=activations.device)
    blocks = zip(activations.split(step), reconstructions.split(step), strict=True)
    for rows, rows_hat in blocks:
        exact = rows.double()
        differences = (exact - rows_hat, exact, exact - mean)
        squares = [difference.square().sum() for difference in differences]
        sums += torch.stack(squares)
    error, energy, variance = sums.tolist()
    return ReconstructionError(error / energy, error / variance, 1 - error / variance)


def sparsity(codes: ArrayLike | Tensor, threshold: float = 0.0) -> Sparsity:
    """Measure how few concepts codes use.

    Use it beside :func:`reconstruction_error`: a dictionary that uses more concepts loses less.

    Parameters
    ----------
    codes : array-like or Tensor (n, k)
        How active each concept is in each sample.
    threshold : float, default 0.0
        A code is active where its absolute value exceeds this, by default any but 0.

    Returns
    -------
    Sparsity
        The numbers zeros, active and dead.

    Raises
    ------
    InputError
        If the codes are no matrix of finite numbers. If the threshold is negative.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import sparsity
    >>> sparsity([[1.0, 0.0], [0.5, 0.0]])
    Sparsity(zeros=0.5, active=1.0, dead=0.5)
    """
    require(threshold >= 0, f"threshold={threshold}", "give 0 or more")
    active = _matrix(codes, "codes").abs() > threshold
    share = active.double().mean().item()
    used = active.any(dim=0).double().mean().item()
    return Sparsity(1 - share, share * active.shape[1], 1 - used)


def _matrix(values: ArrayLike | Tensor, name: str) -> Float[Tensor, "n d"]:
    """Return values as a matrix of finite floating-point numbers, or refuse them."""
    try:
        if isinstance(values, Tensor):
            matrix = values.detach()
        else:
            matrix = torch.from_numpy(np.require(values, requirements="W"))
    except (TypeError, ValueError) as cause:
        raise InputError(
            f"{name} are not numbers ({cause})", "give an array or a tensor of numbers"
        ) from cause
    if not matrix.is_floating_point():
        matrix = matrix.double()
    require(
        matrix.ndim == 2 and matrix.numel() > 0,
        f"{name} have the shape {tuple(matrix.shape)}",
        "give one row for each of one or more",
    )
    n_bad = int((~matrix.isfinite()).sum())
    require(
        n_bad == 0,
        f"{name}: {n_bad} of {matrix.numel()} numbers are NaN or infinite",
        "give finite numbers",
    )
    return matrix


def _directions(components: ArrayLike | Tensor, name: str) -> Float[np.ndarray, "k d"]:
    """Return components of length 1, in float64; one of length 0 has no direction."""
    matrix = _matrix(components, f"components of {name}").double().cpu().numpy()
    sizes = np.linalg.norm(matrix, axis=1, keepdims=True)
    require(
        sizes.all(),
        f"components of {name}: {int((sizes == 0).sum())} are zero",
        "leave them out, they have no direction",
    )
    return matrix / sizes
