"""Every reported number with an interval.

Shares by Wilson's score interval, everything else by the bootstrap.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from math import isfinite, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from xlvlms_tutorial.errors import EstimateError, LengthError
from xlvlms_tutorial.metrics.plain import plain

_CHUNK = 2**22  # indices drawn at once, to bound memory


@dataclass(frozen=True)
class Estimate:
    """A value, the interval that holds it, and the number of observations behind it.

    Of observations, not of clusters.

    Raises
    ------
    EstimateError
        If a number is not finite, the interval does not contain the value, or n is below 1.
    """

    value: float | np.floating
    low: float | np.floating
    high: float | np.floating
    n: int | np.integer

    def __post_init__(self) -> None:
        if not all(map(isfinite, (self.value, self.low, self.high))):
            raise EstimateError(
                "an estimate",
                f"value {self.value}, interval [{self.low}, {self.high}]",
                "finite numbers",
            )
        if not self.low <= self.value <= self.high:
            found = f"value {self.value} outside [{self.low}, {self.high}]"
            raise EstimateError("an estimate", found, "an interval that contains its value")
        if self.n < 1:
            raise EstimateError("an estimate", f"n = {self.n}", "1 observation or more")

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def asdict(self) -> dict[str, float]:
        """The four numbers by name, for a row of a table."""
        return {
            "value": float(self.value),
            "low": float(self.low),
            "high": float(self.high),
            "n": int(self.n),
        }


def proportion(successes: ArrayLike, level: float = 0.95) -> Estimate:
    """Share of True in independent trials ``(n,)`` with the Wilson score interval.

    The interval is honest at 0 and 1.

    Raises
    ------
    EstimateError
        If there are no trials, a value is neither 0 nor 1, or the level is not between 0 and 1.
    """
    trials = _checked(successes, flat=True)
    if not _binary(trials):
        raise EstimateError(
            "successes",
            f"values such as {trials[~np.isin(trials, (0, 1))][0]}",
            "True and False (or 1 and 0)",
        )
    return _wilson(float(trials.mean()), len(trials), len(trials), level)


def bootstrap(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    statistic: Callable[[np.ndarray], float] = np.mean,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """A statistic of ``values`` ``(n,)`` or ``(n, k)`` with the percentile interval.

    Rows are resampled. ``groups`` ``(n,)`` makes it a cluster bootstrap: all rows of a group (the
    questions about one scene) are drawn together. The interval is widened where needed to contain
    the value. A share that is exactly 0 or 1 has no spread to resample: use :func:`share`.

    Raises
    ------
    EstimateError
        If there are fewer than two rows or groups, a value is not finite,
        or the statistic is undefined.
    LengthError
        If ``groups`` has another length.
    """
    rows = _checked(values)
    labels = _labels(groups, len(rows))
    drawn = _resamples(rows, labels, statistic, n_resamples, seed)
    return interval(float(statistic(rows)), drawn, len(rows), level)


def share(
    successes: ArrayLike,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Share of True in trials ``(n,)``.

    Wilson where each trial is its own group, the cluster bootstrap elsewhere. Where
    all trials agree the bootstrap would claim certainty; then Wilson's interval
    counts groups instead of trials.

    Raises
    ------
    EstimateError, LengthError
        As :func:`proportion` and :func:`bootstrap`.
    """
    whole = proportion(successes, level)
    clusters = len(np.unique(_labels(groups, whole.n)))
    if clusters == whole.n:
        return whole
    if clusters == 1 or whole.value in (0.0, 1.0):
        return _wilson(whole.value, clusters, whole.n, level)
    return bootstrap(successes, groups, level=level, n_resamples=n_resamples, seed=seed)


def difference(
    a: ArrayLike,
    b: ArrayLike,
    groups_a: ArrayLike | None = None,
    groups_b: ArrayLike | None = None,
    paired: bool = False,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of ``a`` ``(n,)`` minus mean of ``b`` ``(m,)`` with a bootstrap interval.

    ``paired`` takes a[i] and b[i] as the same case. With both ``groups_a`` and ``groups_b`` (or
    ``groups_a`` and ``paired``) whole groups are drawn, and one label in both is one group (one
    scene asked twice). Where the bootstrap would claim certainty, because all trials of a side
    agree, the interval is Newcombe's (1998, method 10), from the two Wilson intervals.

    Raises
    ------
    EstimateError
        If a side is empty or not finite, has fewer than two cases or
        groups, or only one side has groups.
    LengthError
        If paired sides, or a side and its groups, differ in length.
    """
    first, second = _checked(a, flat=True), _checked(b, flat=True)
    if paired and len(first) != len(second):
        raise LengthError(a=len(first), b=len(second))
    if not paired and (groups_a is None) != (groups_b is None):
        raise EstimateError(
            "groups", "groups of one side only", "groups for both sides or for none"
        )
    labels_a = _labels(groups_a, len(first))
    labels_b = labels_a if paired else _labels(groups_b, len(second))
    value, n = (
        float(first.mean() - second.mean()),
        len(first) if paired else len(first) + len(second),
    )
    flat = np.ptp(first - second) == 0 if paired else np.ptp(first) == 0 or np.ptp(second) == 0
    if flat and _binary(first) and _binary(second):
        return _newcombe(
            first, second, len(np.unique(labels_a)), len(np.unique(labels_b)), n, level
        )
    if paired:
        drawn = _resamples(first - second, labels_a, np.mean, n_resamples, seed)
    elif groups_a is None:
        drawn = _resamples(first, labels_a, np.mean, n_resamples, seed) - _resamples(
            second, labels_b, np.mean, n_resamples, seed + 1
        )
    else:
        drawn = _joint(first, second, labels_a, labels_b, n_resamples, seed)
    return interval(value, drawn, n, level)


def correlation(
    x: ArrayLike,
    y: ArrayLike,
    kind: str = "pearson",
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Correlation of ``x`` ``(n,)`` with ``y`` ``(n,)``, "pearson" or "spearman".

    With the percentile bootstrap interval over points. Resamples are ranked anew, ties sharing the
    mean rank; those in which one side has no spread are left out.

    Raises
    ------
    EstimateError, LengthError
        If there are fewer than 4 points, a value is not finite, one side is constant, the kind
        is unknown, or lengths differ.
    """
    first, second = _points(x, y, kind)
    draws = [np.arange(len(first))[None], *_draws(len(first), n_resamples, seed)]
    value, *drawn = np.concatenate([_correlated(first[draw], second[draw], kind) for draw in draws])
    return interval(float(value), np.array(drawn), len(first), level)


def permutation_p(
    x: ArrayLike, y: ArrayLike, kind: str = "pearson", n_permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of a correlation.

    The share of orders of ``y`` ``(n,)`` whose correlation with ``x`` is at least as far from 0.
    All orders are tried for 7 points or fewer, else so many random ones and the one that was
    found: p = (1 + hits) / (1 + tried).

    Raises
    ------
    EstimateError, LengthError
        As :func:`correlation`, or if fewer than 1,000 permutations are asked for.
    """
    first, second = (rankdata(side) if kind == "spearman" else side for side in _points(x, y, kind))
    if n_permutations < 1000:
        raise EstimateError("n_permutations", n_permutations, "1,000 or more")
    numbers, extra = np.arange(len(first)), int(len(first) > 7)
    orders = (
        np.random.default_rng(seed).permuted(np.tile(numbers, (n_permutations, 1)), axis=1)
        if extra
        else [*permutations(numbers)]
    )
    products = np.abs(
        (second - second.mean())[np.vstack([numbers, orders])] @ (first - first.mean())
    )
    # orders that tie with the one found differ from it by rounding
    hits = (products[1:] >= products[0] * (1 - 1e-9)).sum()
    return float((extra + hits) / (extra + len(orders)))


def resampled_shares(n: int, n_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """How much of each resample each of n cases is, ``(n_resamples, n)``, rows that sum to 1.

    For statistics that are matrix products.

    Raises
    ------
    EstimateError
        If there are fewer than 2 cases or 100 resamples.
    """
    draw = np.concatenate(_draws(n, n_resamples, seed))
    return (
        np.bincount(
            (draw + n * np.arange(n_resamples)[:, None]).ravel(), minlength=draw.size
        ).reshape(draw.shape)
        / n
    )


def interval(value: float, drawn: np.ndarray, n: int, level: float = 0.95) -> Estimate:
    """A statistic of n observations with the percentile interval of its resamples ``(r,)``.

    The interval is widened where needed to contain it.

    Raises
    ------
    EstimateError
        If the value is not finite, or more than half of the resamples
        are NaN, which means undefined.
    """
    if not 0 < level < 1:
        raise EstimateError("level", level, "a number between 0 and 1, such as 0.95")
    defined = drawn[np.isfinite(drawn)]
    if not isfinite(value) or 2 * len(defined) < len(drawn):
        found = (
            f"{value} on the data, undefined on "
            f"{len(drawn) - len(defined)} of {len(drawn)} resamples"
        )
        raise EstimateError(
            "the statistic", found, "a statistic defined on the data and on most resamples"
        )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, min(value, float(low)), max(value, float(high)), n)


def _checked(values: ArrayLike, flat: bool = False) -> np.ndarray:
    try:
        rows = np.asarray(plain(values), dtype=float)
    except (TypeError, ValueError) as cause:
        raise EstimateError("values", cause, "numbers without gaps") from cause
    if rows.ndim == 0 or rows.size == 0:
        raise EstimateError(
            "values", "no values", "one row of numbers for each observation, at least one"
        )
    if flat and rows.ndim > 1:
        raise EstimateError(
            "values", f"an array of shape {rows.shape}", "one number for each observation"
        )
    if bad := int((~np.isfinite(rows)).sum()):
        raise EstimateError(
            "values",
            f"{bad} of {rows.size} NaN or infinite",
            "finite numbers; leave out what was not measured",
        )
    return rows


def _labels(groups: ArrayLike | None, n: int) -> np.ndarray:
    labels = np.arange(n) if groups is None else np.asarray(groups)
    if len(labels) != n:
        raise LengthError(values=n, groups=len(labels))
    return labels


def _binary(rows: np.ndarray) -> bool:
    return bool(np.isin(rows, (0, 1)).all())


def _wilson(p: float, trials: int, n: int, level: float) -> Estimate:
    """Wilson (1927): centre and half width of the interval of a share.

    Centre (p + z^2/2t) / (1 + z^2/t), half width z sqrt(p(1-p)/t + z^2/4t^2) / (1 + z^2/t).
    """
    if not 0 < level < 1:
        raise EstimateError("level", level, "a number between 0 and 1, such as 0.95")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = sqrt(z2 * (p * (1 - p) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


def _newcombe(
    a: np.ndarray, b: np.ndarray, trials_a: int, trials_b: int, n: int, level: float
) -> Estimate:
    p, q = (
        _wilson(float(a.mean()), trials_a, len(a), level),
        _wilson(float(b.mean()), trials_b, len(b), level),
    )
    value = p.value - q.value
    low = value - sqrt((p.value - p.low) ** 2 + (q.high - q.value) ** 2)
    return Estimate(value, low, value + sqrt((p.high - p.value) ** 2 + (q.value - q.low) ** 2), n)


def _draws(clusters: int, n_resamples: int, seed: int) -> list[np.ndarray]:
    if clusters < 2:
        raise EstimateError(
            "the bootstrap",
            f"{clusters} case or group",
            "2 or more: the spread between cases is what it measures",
        )
    if n_resamples < 100:
        raise EstimateError("n_resamples", n_resamples, "100 or more")
    rng, size = np.random.default_rng(seed), max(1, _CHUNK // clusters)
    return [
        rng.integers(clusters, size=(min(size, n_resamples - start), clusters))
        for start in range(0, n_resamples, size)
    ]


def _resamples(
    rows: np.ndarray, labels: np.ndarray, statistic: Callable, n_resamples: int, seed: int
) -> np.ndarray:
    _, index = np.unique(labels, return_inverse=True)
    draws = _draws(int(index.max()) + 1, n_resamples, seed)
    # sums and sizes of groups are enough: no loop over resamples
    if statistic is np.mean and rows.ndim == 1:
        totals, sizes = np.bincount(index, rows), np.bincount(index)
        return np.concatenate(
            [totals[draw].sum(axis=1) / sizes[draw].sum(axis=1) for draw in draws]
        )
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    return np.array(
        [
            statistic(rows[np.concatenate([members[g] for g in one])])
            for draw in draws
            for one in draw
        ],
        dtype=float,
    )


def _joint(
    a: np.ndarray,
    b: np.ndarray,
    labels_a: np.ndarray,
    labels_b: np.ndarray,
    n_resamples: int,
    seed: int,
) -> np.ndarray:
    _, index = np.unique(np.concatenate([labels_a, labels_b]), return_inverse=True)
    clusters, (ia, ib) = int(index.max()) + 1, np.split(index, [len(a)])
    count = lambda i, weights=None: np.bincount(i, weights, minlength=clusters)
    columns = (count(ia, a), count(ia), count(ib, b), count(ib))
    drawn = []
    for draw in _draws(clusters, n_resamples, seed):
        total_a, size_a, total_b, size_b = (column[draw].sum(axis=1) for column in columns)
        with np.errstate(invalid="ignore"):  # a resample may miss one side altogether
            drawn.append(total_a / size_a - total_b / size_b)
    return np.concatenate(drawn)


def _points(x: ArrayLike, y: ArrayLike, kind: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = _checked(x, flat=True), _checked(y, flat=True)
    if kind not in ("pearson", "spearman"):
        raise EstimateError("kind of correlation", repr(kind), "pearson or spearman")
    if len(first) != len(second):
        raise LengthError(x=len(first), y=len(second))
    if len(first) < 4 or np.ptp(first) == 0 or np.ptp(second) == 0:
        raise EstimateError(
            "points",
            f"{len(first)}, x and y varying by {np.ptp(first)}, {np.ptp(second)}",
            "4 or more, varying in both",
        )
    return first, second


def _correlated(x: np.ndarray, y: np.ndarray, kind: str) -> np.ndarray:
    """Correlation of each row of x (r, n) with the same row of y; NaN where one has no spread."""
    flat = (np.ptp(x, axis=1) == 0) | (np.ptp(y, axis=1) == 0)
    x, y = (rankdata(side, axis=1) for side in (x, y)) if kind == "spearman" else (x, y)
    x, y = (side - side.mean(axis=1, keepdims=True) for side in (x, y))
    x, y = (side / np.where(flat, 1, np.linalg.norm(side, axis=1))[:, None] for side in (x, y))
    return np.where(flat, np.nan, np.clip((x * y).sum(axis=1), -1, 1))
