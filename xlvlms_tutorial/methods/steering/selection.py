"""Where and how strongly to steer: how far two sets lie apart at each layer, what steering does to answers, which vectors matter.

After "Analyzing Finetuning Representation Shift for Multimodal LLMs Steering" (arXiv 2501.03012).
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, States
from xlvlms_tutorial.errors import ActivationsError, EstimateError, LengthError, SelectionError
from xlvlms_tutorial.methods.steering.vectors import require_like
from xlvlms_tutorial.metrics.intervals import share

_RIDGE = 0.1  # of the mean squared length of standardised states
_NOTHING = 1e-9  # of its size: a dimension that varies by less is constant, but for rounding
_INTERCEPT = 1000.0  # how much more freely than other weights the probe's constant moves

Counts = Sequence[str] | Mapping[str, int]


def separability(source: States, target: States, folds: int = 5, seed: int = 0) -> pd.DataFrame:
    r"""How far two sets of states lie apart at each layer: columns layer, accuracy, low, high, chance, fisher, n.

    ``accuracy``, with its interval, is that of a linear probe (ridge regression on -1 and 1, dimensions at unit scale) on samples that it
    was not fitted on, and ``chance`` the share of the larger set. ``fisher`` is :math:`(\mu_b - \mu_a)^2 / (\sigma_a^2 + \sigma_b^2)` of
    held-out states along the difference of the other samples' means, 0 where they fall the other way round. All rows of one ``id`` are
    held out together. The probes of all folds come from one factorisation a layer: with the residuals e of the fit to all rows and its
    hat matrix H, those of a fold fitted without it are :math:`(I - H_{FF})^{-1} e_F`.

    Raises
    ------
    ComparisonError, ActivationsError, SelectionError
        As :func:`coarse`, or if there are fewer than 2 folds.
    EstimateError
        If a set has fewer samples than folds.
    """
    layers = require_like(source, target)
    if isinstance(folds, bool) or not isinstance(folds, Integral) or folds < 2:
        raise SelectionError(f"folds is {folds!r}", "give a whole number of 2 or more")
    labels = torch.arange(len(source) + len(target)) >= len(source)
    samples = pd.factorize(pd.concat([source.table["id"], target.table["id"]]))[0]
    fold = _dealt(samples, labels.numpy(), folds, seed)
    rows = []
    for layer in layers:
        states = torch.cat([side[layer, WHOLE_BLOCK].double() for side in (source, target)])
        size = states.abs().amax(dim=0)
        states -= states.mean(dim=0)
        states[:, states.abs().amax(dim=0) <= _NOTHING * size] = 0
        right = (_held_out(states, 2.0 * labels.double() - 1, fold) >= 0) == labels
        found = share(right.numpy(), samples, seed=seed)
        told = {"accuracy": found.value, "low": found.low, "high": found.high, "chance": max(len(source), len(target)) / len(labels)}
        rows.append({"layer": layer, **told, "fisher": _fisher(states, labels, fold), "n": len(labels)})
    return pd.DataFrame(rows)


def choose(table: pd.DataFrame, by: str, limit: tuple[str, float] | None = None) -> tuple[int, float]:
    """Layer and strength of the row of a :func:`sweep` that is best by a column; equal ones: the smaller strength, then the earlier row.

    ``limit`` names a column of side effects and how large it may be at most, as in ``("elsewhere", 0.05)``. Choose on samples that
    nothing else is reported on.

    Raises
    ------
    SelectionError
        If the table lacks a column or has no rows with numbers there, or no row is within the limit (with the closest).
    """
    needed = ["layer", "strength", by, *([limit[0]] if limit else [])]
    if absent := [name for name in needed if name not in table]:
        raise SelectionError(f"the table lacks {', '.join(map(repr, absent))}", f"there are: {', '.join(map(str, table.columns))}")
    known = table.dropna(subset=needed)
    if known.empty:
        raise SelectionError(f"no row has numbers in {', '.join(map(repr, needed))}", "give the table of a sweep")
    if limit is not None:
        name, most = limit
        within = known[known[name] <= most]
        if within.empty:
            closest = known.loc[known[name].idxmin()]
            told = f"layer {int(closest['layer'])}, strength {closest['strength']:g} with {closest[name]:.3g}"
            raise SelectionError(f"no row has {name} of {most:g} or less", f"the closest is {told}; raise the limit, or add strengths")
        known = within
    best = known[known[by] == known[by].max()]
    row = best.loc[best["strength"].abs().sort_values(kind="stable").index[0]]
    return int(row["layer"]), float(row["strength"])


def meaningful(before: Counts, after: Mapping[Hashable, Counts], top: int = 5, targets: int = 2, keep: int | None = 5,
               first_word: bool = False) -> pd.DataFrame:  # fmt: skip
    r"""The vectors that raise a few answers and no others: columns vector, targets (their answers), score, changes; best first.

    ``before`` are the answers without steering (or how often each was given), ``after`` those by each vector. Of the ``top`` answers of
    largest change :math:`d = n_{steered} - n_{base}`, two means split d into main and other answers; the score is the least d of the main
    ones minus the largest of the others. Kept are vectors with at most ``targets`` main answers, the best for each set of them, and of
    these the first ``keep``. A vector that raises no answer is left out (arXiv 2501.03012).

    Raises
    ------
    SelectionError
        If top is below 2, or targets or keep is below 1.
    ActivationsError
        If there are no answers or no vectors.
    LengthError
        If a vector's answers are not as many as those without steering.
    """
    if top < 2 or targets < 1 or (keep is not None and keep < 1):
        raise SelectionError(f"top {top}, targets {targets}, keep {keep}", "give top of 2 or more, and at least 1 of the others")
    base = _counted(before, first_word)
    if not base or not after:
        raise ActivationsError("no answers, or no vectors", "give the answers without steering, and those by each vector")
    rows = []
    for name, told in after.items():
        counts = _counted(told, first_word)
        if counts.total() != base.total():
            raise LengthError(before=base.total(), **{str(name): counts.total()})
        changes = {answer: counts[answer] - base[answer] for answer in sorted({*counts, *base})}
        largest = dict(sorted(changes.items(), key=lambda item: -item[1])[:top])
        n = _main(list(largest.values()))
        if 0 < n <= targets:
            d = list(largest.values())
            rows.append({"vector": name, "targets": tuple(sorted([*largest][:n])), "score": d[n - 1] - d[n], "changes": largest})
    table = pd.DataFrame(rows, columns=["vector", "targets", "score", "changes"])
    table = table.sort_values("score", ascending=False, kind="stable").drop_duplicates("targets")
    return table.head(keep or len(table)).reset_index(drop=True)


def _dealt(samples: Int[np.ndarray, "n"], labels: Bool[np.ndarray, "n"], folds: int, seed: int) -> Int[np.ndarray, "n"]:
    """The fold of each row: samples dealt out in random order, those of either set evenly."""
    sides = [len(np.unique(samples[labels == side])) for side in (False, True)]
    if min(sides) < folds:
        raise EstimateError(f"samples for {folds} folds", f"{sides[0]} source and {sides[1]} target", "as many as folds in each set")
    shares = np.bincount(samples, labels) / np.bincount(samples)
    order = np.random.default_rng(seed).permutation(len(shares))
    order = order[np.argsort(shares[order], kind="stable")]
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) % folds
    return place[samples]


def _held_out(states: Float[Tensor, "n d"], y: Float[Tensor, "n"], fold: Int[np.ndarray, "n"]) -> Float[Tensor, "n"]:
    """The ridge probe's value for each row when the rows of its fold are left out."""
    scale = states.std(dim=0, correction=0)
    Z = torch.where(scale > 0, states / scale, 0.0) / max(1, int((scale > 0).sum())) ** 0.5
    Z = torch.cat([Z, Z.new_full((len(Z), 1), _INTERCEPT**0.5)], dim=1)
    n, d = Z.shape
    if n <= d:
        whole = _RIDGE * torch.linalg.inv(Z @ Z.T + _RIDGE * torch.eye(n, dtype=Z.dtype))  # I - H
        residual, rest = whole @ y, lambda rows: whole[rows][:, rows]
    else:
        A = torch.linalg.inv(Z.T @ Z + _RIDGE * torch.eye(d, dtype=Z.dtype))
        residual, rest = y - Z @ (A @ (Z.T @ y)), lambda rows: torch.eye(len(rows), dtype=Z.dtype) - Z[rows] @ A @ Z[rows].T
    found = torch.empty_like(y)
    for number in range(int(fold.max()) + 1):
        rows = torch.from_numpy((fold == number).nonzero()[0])
        found[rows] = y[rows] - torch.linalg.solve(rest(rows), residual[rows])
    return found


def _fisher(states: Float[Tensor, "n d"], labels: Bool[Tensor, "n"], fold: Int[np.ndarray, "n"]) -> float:
    """The squared distance of the sets over their variances, of rows along directions that were found without their fold."""
    held = torch.from_numpy(fold)[None] == torch.arange(int(fold.max()) + 1)[:, None]  # (folds, n)
    means = [(~held & side).double() @ states / (~held & side).sum(dim=1, keepdim=True) for side in (~labels, labels)]
    directions = torch.nn.functional.normalize(means[1] - means[0], dim=1)
    along = ((states - (means[0] + means[1])[fold] / 2) * directions[fold]).sum(dim=1)
    one, other = along[~labels], along[labels]
    distance, spread = max(0.0, float(other.mean() - one.mean())), float(one.var(correction=0) + other.var(correction=0))
    return distance**2 / spread if spread else (float("inf") if distance else 0.0)


def _counted(told: Counts, first_word: bool) -> Counter[str]:
    given = Counter(dict(told)) if isinstance(told, Mapping) else Counter(told)
    if not first_word:
        return given
    found: Counter[str] = Counter()
    for answer, n in given.items():
        found[(answer.split() or [""])[0]] += n
    return found


def _main(d: list[int]) -> int:
    """How many of these falling numbers belong to the upper of two means; 0 if none has risen or they are all the same."""
    values = np.array(d, dtype=float)
    if values[0] <= 0 or len(values) < 2 or values[0] == values[-1]:
        return 0
    spread = lambda part: ((part - part.mean()) ** 2).sum()
    return 1 + int(np.argmin([spread(values[:n]) + spread(values[n:]) for n in range(1, len(values))]))
