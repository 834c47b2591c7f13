"""Where and how strongly to steer.

How far two sets lie apart at each layer, and what steering does to answers. After
"Analyzing Finetuning Representation Shift for Multimodal LLMs Steering" (arXiv 2501.03012).
"""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Activations
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts.base import whole
from xlvlms_tutorial.methods.probes import deal_folds, held_out_labels
from xlvlms_tutorial.methods.steering.vectors import require_like
from xlvlms_tutorial.metrics.intervals import proportion
from xlvlms_tutorial.validation import require

_RIDGE = 0.1  # of the mean squared length of standardised activations
_CONSTANT = 1e-9  # of its size: a dimension that varies by less is constant, but for rounding


def separability(
    source: Activations, target: Activations, folds: int = 5, seed: int = 0
) -> pd.DataFrame:
    r"""Measure how far two sets of activations lie apart at each layer.

    Use it to see from which layer on a difference can be read, and compare it with where steering
    works (:func:`sweep`). All rows of one ``id`` are held out together.

    Parameters
    ----------
    source : Activations
        Activations (n, d) at the end of blocks, of one set of samples.
    target : Activations
        Activations (m, d) of the other set, captured in the same way.
    folds : int
        The number of parts of the samples, each held out once from what the probe is fitted on;
        by default 5.
    seed : int
        Of the assignment to folds, and of the resamples of intervals.

    Returns
    -------
    pd.DataFrame
        One row a layer. Columns layer; accuracy, low, high, the share of held-out activations that
        a linear probe (ridge regression on -1 and 1, dimensions at unit scale) tells apart, with
        its interval; chance, the share of the larger set; fisher,
        :math:`(\mu_b - \mu_a)^2 / (\sigma_a^2 + \sigma_b^2)` of held-out activations along the
        difference of the other samples' means, 0 where they fall the other way round; and n, the
        number of rows.

    Raises
    ------
    InputError
        If model, prompt, layers, sites, widths or kinds of positions differ. If a set is empty, not
        finite or not (n, d). If no layer was captured at the end of its block, or there are fewer
        than 2 folds. If a set has fewer samples than folds.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.methods.steering import separability
    >>> def activations(name, offset):
    ...     rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)) + offset
    ...     table = pd.DataFrame({"sample": range(10), "id": [f"{name} {k}" for k in range(10)]})
    ...     return Activations({(24, "resid_post"): rows}, table, {"model": "pocket-llava"})
    >>> table = separability(activations("day", 0.0), activations("night", 100.0))
    >>> list(table)
    ['layer', 'accuracy', 'low', 'high', 'chance', 'fisher', 'n']
    >>> table[["accuracy", "chance", "n"]].to_numpy().tolist()
    [[1.0, 0.5, 20.0]]
    """
    layers = require_like(source, target)
    whole("folds", folds, least=2)
    sizes = [len(source), len(target)]
    sides = np.repeat(["source", "target"], sizes)
    is_target = torch.from_numpy(sides == "target")
    samples, _ = pd.factorize(pd.concat([source.table["id"], target.table["id"]]))
    fold = deal_folds(samples, sides, folds, seed)[samples]
    rows = []
    for layer in layers:
        states = torch.cat(
            [source[layer, WHOLE_BLOCK].double(), target[layer, WHOLE_BLOCK].double()]
        )
        size = states.abs().amax(dim=0)
        states -= states.mean(dim=0)
        constant = states.abs().amax(dim=0) <= _CONSTANT * size
        states[:, constant] = 0
        n_varying = int(states.any(dim=0).sum())
        probe = RidgeClassifier(_RIDGE * max(1, n_varying))
        standardised = StandardScaler().fit_transform(states.numpy())
        correct = held_out_labels(standardised, sides, fold, probe) == sides
        accuracy = proportion(correct, samples, seed=seed)
        row = {"layer": layer, "accuracy": accuracy.value}
        row |= {"low": accuracy.low, "high": accuracy.high}
        row["chance"] = max(sizes) / len(sides)
        row["fisher"] = _fisher(states, is_target, fold)
        row["n"] = len(sides)
        rows.append(row)
    return pd.DataFrame(rows)


def best_setting(
    table: pd.DataFrame, by: str, limit: tuple[str, float] | None = None
) -> tuple[int, float]:
    """Choose layer and strength of the row of a :func:`sweep` that is best by a column.

    Use it on validation samples, on which nothing else is reported. Of equally good rows it takes
    the smaller strength, then the earlier row.

    Parameters
    ----------
    table : DataFrame
        The table of a sweep: columns layer, strength and scores.
    by : str
        The column that is to be as large as possible.
    limit : tuple of str and float, optional
        A column of side effects and how large it may be at most, as in ``("elsewhere", 0.05)``.
        None (the default) allows any.

    Returns
    -------
    tuple of int and float
        Layer and strength.

    Raises
    ------
    InputError
        If the table lacks a column or has no rows with numbers there, or no row is
        within the limit (with the closest).

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.steering import best_setting
    >>> table = pd.DataFrame({"layer": [12, 24, 24], "strength": [1.0, 1.0, 4.0]})
    >>> table["to target"] = [0.2, 0.7, 0.9]
    >>> table["elsewhere"] = [0.0, 0.05, 0.4]
    >>> best_setting(table, "to target")
    (24, 4.0)
    >>> best_setting(table, "to target", limit=("elsewhere", 0.1))
    (24, 1.0)
    """
    required = ["layer", "strength", by]
    if limit is not None:
        required.append(limit[0])
    absent = [name for name in required if name not in table]
    require(
        not absent,
        f"the table lacks {', '.join(map(repr, absent))}",
        f"there are: {', '.join(map(str, table.columns))}",
    )
    allowed = table.dropna(subset=required)
    require(
        not allowed.empty,
        f"no row has numbers in {', '.join(map(repr, required))}",
        "give the table of a sweep",
    )
    if limit is not None:
        allowed = _within(allowed, *limit)
    best = allowed[allowed[by] == allowed[by].max()]
    by_size = best["strength"].abs().sort_values(kind="stable")
    row = best.loc[by_size.index[0]]
    return int(row["layer"]), float(row["strength"])


def _within(table: pd.DataFrame, name: str, maximum: float) -> pd.DataFrame:
    """The rows of a sweep whose side effects are small enough."""
    allowed = table[table[name] <= maximum]
    if not allowed.empty:
        return allowed
    closest = table.loc[table[name].idxmin()]
    setting = (
        f"layer {int(closest['layer'])}, strength {closest['strength']:g} with {closest[name]:.3g}"
    )
    raise InputError(
        f"no row has {name} of {maximum:g} or less",
        f"the closest is {setting}; raise the limit, or add strengths",
    )


def _fisher(
    states: Float[Tensor, "n d"], labels: Bool[Tensor, "n"], fold: Int[np.ndarray, "n"]
) -> float:
    """The squared distance of the sets over their variances.

    Of rows along directions that were found without their fold.
    """
    numbers = torch.arange(int(fold.max()) + 1)
    held_out = torch.from_numpy(fold)[None] == numbers[:, None]  # (folds, n)
    source_means = _means_of(states, ~held_out & ~labels)
    target_means = _means_of(states, ~held_out & labels)
    directions = torch.nn.functional.normalize(target_means - source_means, dim=1)
    midpoints = (source_means + target_means) / 2
    along = ((states - midpoints[fold]) * directions[fold]).sum(dim=1)
    source = along[~labels]
    target = along[labels]
    distance = max(0.0, float(target.mean() - source.mean()))
    variance = source.var(correction=0) + target.var(correction=0)
    spread = float(variance)
    if spread:
        return distance**2 / spread
    return float("inf") if distance else 0.0


def _means_of(
    states: Float[Tensor, "n d"], members: Bool[Tensor, "folds n"]
) -> Float[Tensor, "folds d"]:
    """The mean of the rows that each mask selects."""
    return members.double() @ states / members.sum(dim=1, keepdim=True)
