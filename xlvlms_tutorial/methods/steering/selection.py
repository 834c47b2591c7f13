"""Where and how strongly to steer.

How far two sets lie apart at each layer, what steering does to answers, which vectors matter. After
"Analyzing Finetuning Representation Shift for Multimodal LLMs Steering" (arXiv 2501.03012).
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, States
from xlvlms_tutorial.errors import ActivationsError, LengthError, SelectionError
from xlvlms_tutorial.methods.concepts.base import whole
from xlvlms_tutorial.methods.probes import deal_folds, held_out_labels
from xlvlms_tutorial.methods.steering.vectors import require_like
from xlvlms_tutorial.metrics.intervals import share

_RIDGE = 0.1  # of the mean squared length of standardised states
_NOTHING = 1e-9  # of its size: a dimension that varies by less is constant, but for rounding

Counts = Sequence[str] | Mapping[str, int]


def separability(source: States, target: States, folds: int = 5, seed: int = 0) -> pd.DataFrame:
    r"""How far two sets of states lie apart at each layer.

    Columns layer, accuracy, low, high, chance, fisher, n. ``accuracy``, with its interval, is
    that of a linear probe (ridge regression on -1 and 1, dimensions at unit scale) on samples
    that it was not fitted on, and ``chance`` the share of the larger set. ``fisher`` is
    :math:`(\mu_b - \mu_a)^2 / (\sigma_a^2 + \sigma_b^2)` of held-out states along the
    difference of the other samples' means, 0 where they fall the other way round. All rows of
    one ``id`` are held out together.

    Raises
    ------
    ComparisonError, ActivationsError, SelectionError
        As :func:`coarse`, or if there are fewer than 2 folds.
    EstimateError
        If a set has fewer samples than folds.
    """
    layers = require_like(source, target)
    whole("folds", folds, least=2)
    sides = np.repeat(["source", "target"], [len(source), len(target)])
    samples = pd.factorize(pd.concat([source.table["id"], target.table["id"]]))[0]
    fold = deal_folds(samples, sides, folds, seed)[samples]
    rows = []
    for layer in layers:
        states = torch.cat([side[layer, WHOLE_BLOCK].double() for side in (source, target)])
        size = states.abs().amax(dim=0)
        states -= states.mean(dim=0)
        states[:, states.abs().amax(dim=0) <= _NOTHING * size] = 0
        probe = RidgeClassifier(_RIDGE * max(1, int(states.any(dim=0).sum())))
        right = (
            held_out_labels(StandardScaler().fit_transform(states.numpy()), sides, fold, probe)
            == sides
        )
        found = share(right, samples, seed=seed)
        told = {
            "accuracy": found.value,
            "low": found.low,
            "high": found.high,
            "chance": max(len(source), len(target)) / len(sides),
        }
        rows.append(
            {
                "layer": layer,
                **told,
                "fisher": _fisher(states, torch.from_numpy(sides == "target"), fold),
                "n": len(sides),
            }
        )
    return pd.DataFrame(rows)


def choose(
    table: pd.DataFrame, by: str, limit: tuple[str, float] | None = None
) -> tuple[int, float]:
    """Layer and strength of the row of a :func:`sweep` that is best by a column.

    Equal ones: the smaller strength, then the earlier row. ``limit`` names a column of side
    effects and how large it may be at most, as in ``("elsewhere", 0.05)``. Choose on samples
    that nothing else is reported on.

    Raises
    ------
    SelectionError
        If the table lacks a column or has no rows with numbers there, or no row is
        within the limit (with the closest).
    """
    needed = ["layer", "strength", by, *([limit[0]] if limit else [])]
    if absent := [name for name in needed if name not in table]:
        raise SelectionError(
            f"the table lacks {', '.join(map(repr, absent))}",
            f"there are: {', '.join(map(str, table.columns))}",
        )
    known = table.dropna(subset=needed)
    if known.empty:
        raise SelectionError(
            f"no row has numbers in {', '.join(map(repr, needed))}", "give the table of a sweep"
        )
    if limit is not None:
        name, most = limit
        within = known[known[name] <= most]
        if within.empty:
            closest = known.loc[known[name].idxmin()]
            told = (
                f"layer {int(closest['layer'])}, strength "
                f"{closest['strength']:g} with {closest[name]:.3g}"
            )
            raise SelectionError(
                f"no row has {name} of {most:g} or less",
                f"the closest is {told}; raise the limit, or add strengths",
            )
        known = within
    best = known[known[by] == known[by].max()]
    row = best.loc[best["strength"].abs().sort_values(kind="stable").index[0]]
    return int(row["layer"]), float(row["strength"])


def meaningful(
    before: Counts,
    after: Mapping[Hashable, Counts],
    top: int = 5,
    targets: int = 2,
    keep: int | None = 5,
    first_word: bool = False,
) -> pd.DataFrame:
    r"""The vectors that raise a few answers and no others.

    Columns vector, targets (their answers), score, changes; best first. ``before`` are the answers
    without steering (or how often each was given), ``after`` those by each vector. Of the ``top``
    answers of largest change :math:`d = n_{steered} - n_{base}`, two means split d into main and
    other answers; the score is the least d of the main ones minus the largest of the others. Kept
    are vectors with at most ``targets`` main answers, the best for each set of them, and of these
    the first ``keep``. A vector that raises no answer is left out (arXiv 2501.03012).

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
        raise SelectionError(
            f"top {top}, targets {targets}, keep {keep}",
            "give top of 2 or more, and at least 1 of the others",
        )
    base = _counted(before, first_word)
    if not base or not after:
        raise ActivationsError(
            "no answers, or no vectors",
            "give the answers without steering, and those by each vector",
        )
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
            rows.append(
                {
                    "vector": name,
                    "targets": tuple(sorted([*largest][:n])),
                    "score": d[n - 1] - d[n],
                    "changes": largest,
                }
            )
    table = pd.DataFrame(rows, columns=["vector", "targets", "score", "changes"])
    table = table.sort_values("score", ascending=False, kind="stable").drop_duplicates("targets")
    return table.head(keep or len(table)).reset_index(drop=True)


def _fisher(
    states: Float[Tensor, "n d"], labels: Bool[Tensor, "n"], fold: Int[np.ndarray, "n"]
) -> float:
    """The squared distance of the sets over their variances.

    Of rows along directions that were found without their fold.
    """
    held = torch.from_numpy(fold)[None] == torch.arange(int(fold.max()) + 1)[:, None]  # (folds, n)
    means = [
        (~held & side).double() @ states / (~held & side).sum(dim=1, keepdim=True)
        for side in (~labels, labels)
    ]
    directions = torch.nn.functional.normalize(means[1] - means[0], dim=1)
    along = ((states - (means[0] + means[1])[fold] / 2) * directions[fold]).sum(dim=1)
    one, other = along[~labels], along[labels]
    distance, spread = (
        max(0.0, float(other.mean() - one.mean())),
        float(one.var(correction=0) + other.var(correction=0)),
    )
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
    """How many of these falling numbers belong to the upper of two means.

    0 if none has risen or they are all the same.
    """
    values = np.array(d, dtype=float)
    if values[0] <= 0 or len(values) < 2 or values[0] == values[-1]:
        return 0
    spread = lambda part: ((part - part.mean()) ** 2).sum()
    return 1 + int(
        np.argmin([spread(values[:n]) + spread(values[n:]) for n in range(1, len(values))])
    )
