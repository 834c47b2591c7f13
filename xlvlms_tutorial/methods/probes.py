"""A linear probe: whether a plane tells sets of states apart, on samples that it was not fitted on.

The probe is scikit-learn's ridge classifier. It has a closed form, so that all layers of a
model are probed in seconds. Which samples are held out together is decided here, and each call
with the same seed decides alike.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.base import ClassifierMixin
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from xlvlms_tutorial.errors import EstimateError


def deal_folds(
    samples: Int[np.ndarray, "rows"],
    labels: Shaped[np.ndarray, "rows"],
    folds: int = 5,
    seed: int = 0,
) -> Int[np.ndarray, "n"]:
    """The fold of each sample, so that its rows are held out together.

    Of two labels every fold has samples of both. Samples are dealt out in random order, those whose
    rows are all of the first label before those of both, and these before the rest.

    Parameters
    ----------
    samples
        The number of each row's sample, from 0 on with none left out.
    labels
        The set that each row belongs to: numbers or names.
    folds
        How many folds, two or more.
    seed
        Of the random order.

    Returns
    -------
    Int[np.ndarray, "n"]
        A fold from 0 to ``folds - 1`` for each sample; index it with
        ``samples`` for that of each row.

    Raises
    ------
    EstimateError
        If a label has fewer samples than there are folds.

    Examples
    --------
    >>> samples = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    >>> labels = np.array(["picture"] * 4 + ["text"] * 4)
    >>> deal_folds(samples, labels, folds=2)[samples]
    array([0, 0, 1, 1, 0, 0, 1, 1])
    """
    names, codes = np.unique(labels, return_inverse=True)
    counts = [len(np.unique(samples[codes == code])) for code in range(len(names))]
    if min(counts) < folds:
        found = " and ".join(f"{count} {name}" for count, name in zip(counts, names, strict=True))
        raise EstimateError(f"samples for {folds} folds", found, "as many as folds in each set")
    means = np.bincount(samples, codes) / np.bincount(samples)
    order = np.random.default_rng(seed).permutation(len(means))
    order = order[np.argsort(means[order], kind="stable")]
    fold = np.empty_like(order)
    fold[order] = np.arange(len(order)) % folds
    return fold


def balanced_probe(penalty: float = 1.0) -> Pipeline:
    r"""A ridge classifier of standardised states, to which all labels weigh alike.

    Of two labels it is linear discriminant analysis, shrunk: with y of :math:`\pm 1` and weights c
    of rows, :math:`w = \arg\min \sum_i c_i (y_i - w^\top z_i - b)^2 + \lambda \lVert w \rVert^2`.

    Parameters
    ----------
    penalty
        :math:`\lambda`, in units of standardised states.

    Returns
    -------
    Pipeline
        An estimator of scikit-learn that is not fitted yet.

    Examples
    --------
    >>> rows = np.array([[0.0, 3.0], [1.0, 1.0], [5.0, 2.0], [6.0, 2.0]])
    >>> balanced_probe().fit(rows, ["low", "low", "high", "high"]).predict([[0.5, 2.0]]).tolist()
    ['low']
    """
    return make_pipeline(StandardScaler(), RidgeClassifier(penalty, class_weight="balanced"))


def held_out_labels(
    rows: Float[Tensor | np.ndarray, "rows d"],
    labels: Shaped[np.ndarray, "rows"],
    folds: Int[np.ndarray, "rows"],
    probe: ClassifierMixin | Pipeline | None = None,
) -> Shaped[np.ndarray, "rows"]:
    """What a probe says of each row when it is fitted on the rows of all other folds.

    Parameters
    ----------
    rows
        States, computed with in float64.
    labels
        The set that each row belongs to, of two sets or more.
    folds
        The fold of each row, from :func:`deal_folds`.
    probe
        A classifier of scikit-learn; None is :func:`balanced_probe`.

    Returns
    -------
    Shaped[np.ndarray, "rows"]
        One of the labels for each row.

    Examples
    --------
    >>> labels = np.repeat(["picture", "text"], 20)
    >>> rows = np.random.default_rng(0).standard_normal((40, 8)) + 2 * (labels == "text")[:, None]
    >>> said = held_out_labels(rows, labels, deal_folds(np.arange(40), labels))
    >>> float((said == labels).mean())
    1.0
    """
    rows = rows.detach().double().cpu().numpy() if isinstance(rows, Tensor) else rows.astype(float)
    probe = balanced_probe() if probe is None else probe
    return cross_val_predict(probe, rows, labels, cv=PredefinedSplit(folds))
