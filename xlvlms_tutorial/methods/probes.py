"""A linear probe of how well a plane separates sets of activations, on held-out samples.

The probe is scikit-learn's ridge classifier. It has a closed form, so that all layers of a
model are probed in seconds. The folds that samples are held out in are decided here; the same seed
gives the same folds.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.base import ClassifierMixin
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from xlvlms_tutorial.errors import no_estimate


def deal_folds(
    samples: Int[np.ndarray, "rows"],
    labels: Shaped[np.ndarray, "rows"],
    folds: int = 5,
    seed: int = 0,
) -> Int[np.ndarray, "n"]:
    """Assign each sample to a fold of a cross-validation, so that its rows are held out together.

    Use it where a sample has several rows (tokens, or an image and its caption): a probe must not
    be tested on a sample that it was fitted on. Of two labels every fold has samples of both.
    Samples are assigned in random order: first those whose rows all have the first label, then
    those with rows of both, then the rest.

    Parameters
    ----------
    samples : array of int (rows,)
        The sample of each row. Samples are numbered from 0, without gaps.
    labels : array (rows,)
        The set that each row belongs to, as numbers or names.
    folds : int, default 5
        Number of folds, two or more.
    seed : int, default 0
        Seed of the random order; the same seed gives the same folds.

    Returns
    -------
    array of int (n,)
        The fold of each sample, from 0 to ``folds - 1``. Index it with ``samples`` to get the fold
        of each row.

    Raises
    ------
    InputError
        If a label has fewer samples than there are folds.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.probes import deal_folds
    >>> samples = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    >>> labels = np.array(["picture"] * 4 + ["text"] * 4)
    >>> deal_folds(samples, labels, folds=2)[samples]
    array([0, 0, 1, 1, 0, 0, 1, 1])
    """
    names, codes = np.unique(labels, return_inverse=True)
    counts = {}
    for code, name in enumerate(names):
        counts[name] = len(np.unique(samples[codes == code]))
    if min(counts.values()) < folds:
        sizes = " and ".join(f"{count} {name}" for name, count in counts.items())
        raise no_estimate(f"samples for {folds} folds", sizes, "as many as folds in each set")
    means = np.bincount(samples, codes) / np.bincount(samples)
    order = np.random.default_rng(seed).permutation(len(means))
    order = order[np.argsort(means[order], kind="stable")]
    fold = np.empty_like(order)
    fold[order] = np.arange(len(order)) % folds
    return fold


def balanced_probe(penalty: float = 1.0) -> Pipeline:
    r"""Make a ridge classifier of standardised activations in which all labels have equal weight.

    Use it as the probe of :func:`held_out_labels`, or fit it yourself to get a direction. With two
    labels it is a regularised linear discriminant analysis. With standardised activations
    :math:`z_i`, labels :math:`y_i = \pm 1` and row weights :math:`c_i` that balance the labels, it
    solves :math:`w = \arg\min \sum_i c_i (y_i - w^\top z_i - b)^2 + \lambda \lVert w \rVert^2`.

    Parameters
    ----------
    penalty : float, default 1.0
        :math:`\lambda`, in units of standardised activations.

    Returns
    -------
    sklearn.pipeline.Pipeline
        An estimator that is not fitted yet.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.probes import balanced_probe
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
    """Predict the label of each row by a probe that is fitted on the rows of all other folds.

    Compare the predictions with the labels to see how well a plane separates the sets of
    activations on samples that the probe has not seen.

    Parameters
    ----------
    rows : tensor or array (rows, d)
        Activations, computed with in float64.
    labels : array (rows,)
        The set that each row belongs to, of two sets or more.
    folds : array of int (rows,)
        The fold of each row, from :func:`deal_folds`.
    probe : scikit-learn classifier, optional
        The classifier to fit. None means :func:`balanced_probe`.

    Returns
    -------
    array (rows,)
        The predicted label of each row.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.probes import deal_folds, held_out_labels
    >>> labels = np.repeat(["picture", "text"], 20)
    >>> rows = np.random.default_rng(0).standard_normal((40, 8)) + 2 * (labels == "text")[:, None]
    >>> predicted = held_out_labels(rows, labels, deal_folds(np.arange(40), labels))
    >>> float((predicted == labels).mean())
    1.0
    """
    rows = rows.detach().double().cpu().numpy() if isinstance(rows, Tensor) else rows.astype(float)
    split = PredefinedSplit(folds)
    if probe is None:
        probe = balanced_probe()
    return cross_val_predict(probe, rows, labels, cv=split)
