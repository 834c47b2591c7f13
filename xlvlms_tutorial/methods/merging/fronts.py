"""How well a mixture does: the front between two experts, and the barrier on the way."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import trapezoid

from xlvlms_tutorial.validation import require, require_same_length


def above_chord(scores: ArrayLike, weights: ArrayLike) -> np.ndarray:
    r"""Measure how far the scores of mixtures lie above the chord between the two experts.

    The chord is what mixing gains if scores mix as weights do: :math:`(1 - \lambda) s(0) + \lambda
    s(1)`. The area between the scores and the chord is positive where mixtures keep more of both
    skills than that (Shukor et al., 2023, arXiv 2307.16184, figure 5). Sum or average it over the
    tasks of both experts.

    Parameters
    ----------
    scores : array of shape (..., n)
        The score of each mixture; leading axes are tasks, samples or seeds.
    weights : array of shape (n,)
        The share :math:`\lambda` of the second expert, growing from 0 to 1.

    Returns
    -------
    array of shape (...)
        The area above the chord, in units of the score; negative below it.

    Raises
    ------
    InputError
        If the weights do not grow from 0 to 1, or are not as many as the scores.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.merging import above_chord
    >>> above_chord([0.0, 0.5, 1.0], [0, 0.5, 1]).item()  # on the chord
    0.0
    >>> above_chord([0.0, 1.0, 1.0], [0, 0.5, 1]).item()
    0.25
    """
    scores, weights = _checked(scores, weights)
    chord = scores[..., :1] * (1 - weights) + scores[..., -1:] * weights
    return np.asarray(trapezoid(scores - chord, weights, axis=-1))


def loss_barrier(losses: ArrayLike, weights: ArrayLike) -> np.ndarray:
    r"""Measure the barrier between two experts: how far the loss rises above the chord on the way.

    :math:`\max_\lambda L(\lambda) - [(1 - \lambda) L(0) + \lambda L(1)]`. It is near 0 for experts
    of one start, which are connected linearly, and large where the two lie in different basins
    (Frankle et al., 2020, arXiv 1912.05671).

    Parameters
    ----------
    losses : array of shape (..., n)
        The loss of each mixture, in nats a token.
    weights : array of shape (n,)
        The share :math:`\lambda` of the second expert, growing from 0 to 1.

    Returns
    -------
    array of shape (...)
        The barrier in nats a token; 0 or more, as both ends lie on the chord.

    Raises
    ------
    InputError
        If the weights do not grow from 0 to 1, or are not as many as the losses.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.merging import loss_barrier
    >>> loss_barrier([1.0, 4.0, 3.0], [0, 0.5, 1]).item()
    2.0
    """
    losses, weights = _checked(losses, weights)
    chord = losses[..., :1] * (1 - weights) + losses[..., -1:] * weights
    return np.asarray((losses - chord).max(axis=-1))


def _checked(values: ArrayLike, weights: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    require(values.ndim > 0, "a single value", "give one value for each weight")
    require_same_length(values=values.shape[-1], weights=weights)
    ends = weights.size > 1 and weights[0] == 0 and weights[-1] == 1
    require(
        ends and (np.diff(weights) > 0).all(),
        f"weights are {weights.tolist()}",
        "give growing numbers from 0 to 1, both included",
    )
    require(np.isfinite(values).all(), "a value is not finite", "leave such mixtures out")
    return values, weights
