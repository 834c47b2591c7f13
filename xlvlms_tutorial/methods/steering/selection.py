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
from xlvlms_tutorial.metrics.intervals import proportion

_RIDGE = 0.1  # of the mean squared length of standardised activations
_CONSTANT = 1e-9  # of its size: a dimension that varies by less is constant, but for rounding

Counts = Sequence[str] | Mapping[str, int]


def separability(source: States, target: States, folds: int = 5, seed: int = 0) -> pd.DataFrame:
    r"""Measure how far two sets of activations lie apart at each layer.

    Use it to see from which layer on a difference can be read, and compare it with where steering
    works (:func:`sweep`). All rows of one ``id`` are held out together.

    Parameters
    ----------
    source : States
        Activations (n, d) at the end of blocks, of one set of samples.
    target : States
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
    ComparisonError
        If model, prompt, layers, places, widths or kinds of positions differ.
    ActivationsError
        If a set is empty, not finite or not (n, d).
    SelectionError
        If no layer was captured at the end of its block, or there are fewer than 2 folds.
    EstimateError
        If a set has fewer samples than folds.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import States
    >>> from xlvlms_tutorial.methods.steering import separability
    >>> def activations(name, offset):
    ...     rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)) + offset
    ...     table = pd.DataFrame({"sample": range(10), "id": [f"{name} {k}" for k in range(10)]})
    ...     return States({(24, "block"): rows}, table, {"model": "pocket-llava"})
    >>> table = separability(activations("day", 0.0), activations("night", 100.0))
    >>> list(table)
    ['layer', 'accuracy', 'low', 'high', 'chance', 'fisher', 'n']
    >>> table[["accuracy", "chance", "n"]].to_numpy().tolist()
    [[1.0, 0.5, 20.0]]
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
        states[:, states.abs().amax(dim=0) <= _CONSTANT * size] = 0
        probe = RidgeClassifier(_RIDGE * max(1, int(states.any(dim=0).sum())))
        standardised = StandardScaler().fit_transform(states.numpy())
        correct = held_out_labels(standardised, sides, fold, probe) == sides
        accuracy = proportion(correct, samples, seed=seed)
        rows.append(
            {
                "layer": layer,
                "accuracy": accuracy.value,
                "low": accuracy.low,
                "high": accuracy.high,
                "chance": max(len(source), len(target)) / len(sides),
                "fisher": _fisher(states, torch.from_numpy(sides == "target"), fold),
                "n": len(sides),
            }
        )
    return pd.DataFrame(rows)


def choose(
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
    SelectionError
        If the table lacks a column or has no rows with numbers there, or no row is
        within the limit (with the closest).

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.steering import choose
    >>> table = pd.DataFrame({"layer": [12, 24, 24], "strength": [1.0, 1.0, 4.0]})
    >>> table["to target"] = [0.2, 0.7, 0.9]
    >>> table["elsewhere"] = [0.0, 0.05, 0.4]
    >>> choose(table, "to target")
    (24, 4.0)
    >>> choose(table, "to target", limit=("elsewhere", 0.1))
    (24, 1.0)
    """
    required = ["layer", "strength", by]
    if limit is not None:
        required.append(limit[0])
    absent = [name for name in required if name not in table]
    if absent:
        raise SelectionError(
            f"the table lacks {', '.join(map(repr, absent))}",
            f"there are: {', '.join(map(str, table.columns))}",
        )
    allowed = table.dropna(subset=required)
    if allowed.empty:
        raise SelectionError(
            f"no row has numbers in {', '.join(map(repr, required))}", "give the table of a sweep"
        )
    if limit is not None:
        allowed = _within(allowed, *limit)
    best = allowed[allowed[by] == allowed[by].max()]
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
    r"""Select the steering vectors that raise a few answers and no others.

    Use it to find, among the vectors between all pairs of concepts, those with a clear effect
    (arXiv 2501.03012). Of the ``top`` answers of largest change
    :math:`d = n_{steered} - n_{base}`, two means split d into main and other answers; the score is
    the smallest d of the main ones minus the largest of the others. A vector is kept if it has at
    most ``targets`` main answers, and of several with the same set of them the one of best score;
    one that raises no answer is left out.

    Parameters
    ----------
    before : sequence of str, or mapping of str to int
        The answers without steering, or how often each was given.
    after : mapping
        The answers by each vector, or how often each was given: as many as in ``before``.
    top : int
        How many answers of largest change are looked at, 2 or more; by default 5.
    targets : int
        How many main answers a vector may have; by default 2.
    keep : int or None
        How many vectors are returned; by default 5, None returns all.
    first_word : bool
        Whether answers count by their first word alone; by default they count whole.

    Returns
    -------
    pd.DataFrame
        One row a vector, best first. Columns vector, targets (its main answers), score, and
        changes, a dict with d of the ``top`` answers.

    Raises
    ------
    SelectionError
        If top is below 2, or targets or keep is below 1.
    ActivationsError
        If there are no answers or no vectors.
    LengthError
        If a vector's answers are not as many as those without steering.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.steering import meaningful
    >>> before = {"yes": 5, "no": 3, "red": 2}
    >>> table = meaningful(before, {"to no": {"no": 10}, "nothing": before})
    >>> table[["vector", "targets", "score"]].to_numpy().tolist()
    [['to no', ('no',), 9]]
    >>> table["changes"][0]
    {'no': 7, 'red': -2, 'yes': -5}
    """
    if top < 2 or targets < 1 or (keep is not None and keep < 1):
        raise SelectionError(
            f"top {top}, targets {targets}, keep {keep}",
            "give top of 2 or more, and at least 1 of the others",
        )
    base = _answer_counts(before, first_word)
    if not base or not after:
        raise ActivationsError(
            "no answers, or no vectors",
            "give the answers without steering, and those by each vector",
        )
    rows = []
    for name, answers in after.items():
        counts = _answer_counts(answers, first_word)
        if counts.total() != base.total():
            raise LengthError(before=base.total(), **{str(name): counts.total()})
        changes = {answer: counts[answer] - base[answer] for answer in sorted({*counts, *base})}
        largest = dict(sorted(changes.items(), key=lambda item: -item[1])[:top])
        d = list(largest.values())
        n = _main(d)
        if 0 < n <= targets:
            rows.append(
                {
                    "vector": name,
                    "targets": tuple(sorted(list(largest)[:n])),
                    "score": d[n - 1] - d[n],
                    "changes": largest,
                }
            )
    table = pd.DataFrame(rows, columns=["vector", "targets", "score", "changes"])
    table = table.sort_values("score", ascending=False, kind="stable").drop_duplicates("targets")
    return table.head(keep or len(table)).reset_index(drop=True)


def _within(table: pd.DataFrame, name: str, maximum: float) -> pd.DataFrame:
    """The rows of a sweep whose side effects are small enough."""
    allowed = table[table[name] <= maximum]
    if not allowed.empty:
        return allowed
    closest = table.loc[table[name].idxmin()]
    setting = (
        f"layer {int(closest['layer'])}, strength {closest['strength']:g} with {closest[name]:.3g}"
    )
    raise SelectionError(
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
    spread = float(source.var(correction=0) + target.var(correction=0))
    if spread:
        return distance**2 / spread
    return float("inf") if distance else 0.0


def _means_of(
    states: Float[Tensor, "n d"], members: Bool[Tensor, "folds n"]
) -> Float[Tensor, "folds d"]:
    """The mean of the rows that each mask selects."""
    return members.double() @ states / members.sum(dim=1, keepdim=True)


def _answer_counts(answers: Counts, first_word: bool) -> Counter[str]:
    counts = Counter(dict(answers)) if isinstance(answers, Mapping) else Counter(answers)
    if not first_word:
        return counts
    by_first_word: Counter[str] = Counter()
    for answer, n in counts.items():
        words = answer.split() or [""]
        by_first_word[words[0]] += n
    return by_first_word


def _main(d: list[int]) -> int:
    """How many of these falling numbers belong to the upper of two means.

    0 if none has risen or they are all the same.
    """
    values = np.array(d, dtype=float)
    if values[0] <= 0 or len(values) < 2 or values[0] == values[-1]:
        return 0
    inertias = []
    for n in range(1, len(values)):
        inertias.append(_inertia(values[:n]) + _inertia(values[n:]))
    return 1 + int(np.argmin(inertias))


def _inertia(values: Float[np.ndarray, "n"]) -> float:
    return float(((values - values.mean()) ** 2).sum())
