"""Every reported number with an interval.

Shares by Wilson's score interval, everything else by the bootstrap.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import permutation_test, rankdata
from scipy.stats import t as student_t

from xlvlms_tutorial.errors import no_estimate
from xlvlms_tutorial.metrics.plain import plain, require_estimate, require_level
from xlvlms_tutorial.validation import require_same_length

_CHUNK = 2**22  # indices drawn at once, to bound memory


@dataclass(frozen=True)
class Estimate:
    """Hold a value, its interval, and the number of observations that it rests on.

    Every function of this package that estimates something returns one; its text is the value with
    the interval in brackets, to two digits.

    Parameters
    ----------
    value : float
        The estimate.
    low, high : float
        The ends of the interval, with ``low <= value <= high``.
    n : int
        The number of observations: of trials, not of the groups (clusters) that they form.

    Raises
    ------
    InputError
        If a number is not finite, the interval does not contain the value, or n is below 1.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import Estimate
    >>> estimate = Estimate(0.75, 0.25, 0.875, n=4)
    >>> print(estimate)
    0.75 [0.25, 0.88]
    >>> estimate.asdict()
    {'value': 0.75, 'low': 0.25, 'high': 0.875, 'n': 4}
    """

    value: float | np.floating
    low: float | np.floating
    high: float | np.floating
    n: int | np.integer

    def __post_init__(self) -> None:
        """Refuse what is no estimate: not finite, or outside its interval."""
        value, low, high = self.value, self.low, self.high
        require_estimate(
            isfinite(value) and isfinite(low) and isfinite(high),
            "an estimate",
            f"value {value}, interval [{low}, {high}]",
            "finite numbers",
        )
        require_estimate(
            low <= value <= high,
            "an estimate",
            f"value {value} outside [{low}, {high}]",
            "an interval that contains its value",
        )
        require_estimate(self.n >= 1, "an estimate", f"n = {self.n}", "1 observation or more")

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def asdict(self) -> dict[str, float]:
        """Return the four numbers by name, for a row of a table.

        Returns
        -------
        dict of str to float
            The keys value, low, high and n (an int).
        """
        return {
            "value": float(self.value),
            "low": float(self.low),
            "high": float(self.high),
            "n": int(self.n),
        }


def proportion(
    successes: ArrayLike,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate the share of True in trials, by Wilson or by the cluster bootstrap.

    Use it for accuracies and rates, with ``groups`` where several trials belong together, such as
    the questions about one scene. The interval is Wilson's score interval where each trial is its
    own group, which is honest at 0 and 1, and the cluster bootstrap's elsewhere. Where all trials
    agree the bootstrap would claim certainty; then Wilson's interval counts groups instead of
    trials.

    Parameters
    ----------
    successes : array-like (n,)
        True and False, or 1 and 0.
    groups : array-like (n,), optional
        A label for each trial; by default each trial is its own group.
    level : float, default 0.95
        The confidence level, between 0 and 1.
    n_resamples : int, default 2000
        How often groups are resampled, 100 or more.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Estimate
        The share, its interval, and the number of trials.

    Raises
    ------
    InputError
        If there are no trials, a value is neither 0 nor 1, or the level is not between 0 and 1. If
        ``groups`` has another length.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import proportion
    >>> print(proportion([True, True, True, False]))
    0.75 [0.30, 0.95]
    >>> print(proportion([True, True, False, False], groups=["a", "a", "b", "b"]))
    0.50 [0.00, 1.00]
    """
    trials = _checked(successes, flat=True)
    if not _binary(trials):
        others = trials[~np.isin(trials, (0, 1))]
        raise no_estimate("successes", f"values such as {others[0]}", "True and False (or 1 and 0)")
    value = float(trials.mean())
    n_groups = len(np.unique(_labels(groups, len(trials))))
    if n_groups in (1, len(trials)) or value in (0.0, 1.0):
        return _wilson(value, n_groups, len(trials), level)
    return bootstrap(trials, groups, level=level, n_resamples=n_resamples, seed=seed)


def bootstrap(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    statistic: Callable[[np.ndarray], float] = np.mean,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate a statistic of the rows of an array with the percentile bootstrap interval.

    Use it for means, medians and any other statistic of samples. A share that is exactly 0 or 1 has
    no spread to resample: use :func:`proportion`.

    Parameters
    ----------
    values : array-like (n,) or (n, k)
        One row for each observation.
    groups : array-like (n,), optional
        A label for each row. It makes this a cluster bootstrap: all rows of a group (the questions
        about one scene) are drawn together. By default each row is its own group.
    statistic : callable, default numpy.mean
        Called with an array of rows, it returns a number.
    level : float, default 0.95
        The confidence level, between 0 and 1.
    n_resamples : int, default 2000
        How often rows are resampled, 100 or more.
    seed : int, default 0
        Of the random numbers.

    Returns
    -------
    Estimate
        The statistic of all rows, its interval (widened where needed to contain it), and n.

    Raises
    ------
    InputError
        If there are fewer than two rows or groups, a value is not finite, or the statistic is
        undefined on the data or on most resamples. If ``groups`` has another length.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import bootstrap
    >>> print(bootstrap([1.0, 2.0, 3.0, 6.0], groups=["a", "a", "b", "b"]))
    3.00 [1.50, 4.50]
    """
    rows = _checked(values)
    labels = _labels(groups, len(rows))
    resamples = _resamples(rows, labels, statistic, n_resamples, seed)
    value = float(statistic(rows))
    return percentile_interval(value, resamples, len(rows), level)


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
    """Estimate the mean of ``a`` minus the mean of ``b`` with a bootstrap interval.

    Use it to compare two models or two settings, paired where both saw the same cases. Where the
    bootstrap would claim certainty, because all trials of a side agree, the interval is Newcombe's
    (1998, method 10), from the two Wilson intervals.

    Parameters
    ----------
    a : array-like (n,)
        The values of one side.
    b : array-like (m,)
        The values of the side that is subtracted.
    groups_a, groups_b : array-like (n,) and (m,), optional
        Labels of the groups that are drawn as a whole. With both (or ``groups_a`` and ``paired``)
        one label in both sides is one group, such as one scene asked twice.
    paired : bool, default False
        Whether ``a[i]`` and ``b[i]`` are the same case.
    level : float, default 0.95
        The confidence level, between 0 and 1.
    n_resamples : int, default 2000
        How often cases or groups are resampled, 100 or more.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Estimate
        The difference and its interval; n is the number of pairs, or of the values of both sides.

    Raises
    ------
    InputError
        If a side is empty or not finite, has fewer than two cases or groups, or only one side has
        groups. If paired sides, or a side and its groups, differ in length.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import difference
    >>> after, before = [1, 1, 0, 1], [0, 0, 0, 1]
    >>> print(difference(after, before, groups_a=["s", "s", "t", "t"], paired=True))
    0.50 [0.00, 1.00]
    """
    first = _checked(a, flat=True)
    second = _checked(b, flat=True)
    if paired:
        require_same_length(a=first, b=second)
    require_estimate(
        paired or (groups_a is None) == (groups_b is None),
        "groups",
        "groups of one side only",
        "groups for both sides or for none",
    )
    value = float(first.mean() - second.mean())
    labels_a = _labels(groups_a, len(first))
    if paired:
        sides = [first - second]
        labels_b = labels_a
        n = len(first)
    else:
        sides = [first, second]
        labels_b = _labels(groups_b, len(second))
        n = len(first) + len(second)
    constant = any(np.ptp(side) == 0 for side in sides)
    if constant and _binary(first) and _binary(second):
        n_groups_a = len(np.unique(labels_a))
        n_groups_b = len(np.unique(labels_b))
        return _newcombe(first, second, n_groups_a, n_groups_b, n, level)
    if paired:
        resamples = _resamples(sides[0], labels_a, np.mean, n_resamples, seed)
    elif groups_a is None:
        resamples_a = _resamples(first, labels_a, np.mean, n_resamples, seed)
        resamples_b = _resamples(second, labels_b, np.mean, n_resamples, seed + 1)
        resamples = resamples_a - resamples_b
    else:
        resamples = _joint(first, second, labels_a, labels_b, n_resamples, seed)
    return percentile_interval(value, resamples, n, level)


def correlation(
    x: ArrayLike,
    y: ArrayLike,
    kind: str = "pearson",
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate the correlation of two lists of values with its bootstrap interval.

    The interval is that of percentiles, over points. Use "pearson" for linear relations and
    "spearman" for monotonic ones. Resamples are ranked anew, ties sharing the mean rank; resamples
    in which one side has no spread are left out.

    Parameters
    ----------
    x, y : array-like (n,)
        The two sides, 4 points or more.
    kind : {"pearson", "spearman"}, default "pearson"
        Of the values, or of their ranks.
    level : float, default 0.95
        The confidence level, between 0 and 1.
    n_resamples : int, default 2000
        How often points are resampled, 100 or more.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Estimate
        The correlation, from -1 to 1, its interval, and the number of points.

    Raises
    ------
    InputError
        If there are fewer than 4 points, a value is not finite, one side is constant, or the kind
        is unknown. If the two sides differ in length.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import correlation
    >>> print(correlation([1, 2, 3, 4], [1, 10, 100, 1000], kind="spearman"))
    1.00 [1.00, 1.00]
    """
    first, second = _points(x, y, kind)
    n = len(first)
    data = np.arange(n)[None]  # the data themselves are the first draw
    correlations = []
    for draw in [data, *_draws(n, n_resamples, seed)]:
        correlations.append(_correlated(first[draw], second[draw], kind))
    value, *resamples = np.concatenate(correlations)
    return percentile_interval(float(value), np.array(resamples), n, level)


def permutation_p(
    x: ArrayLike, y: ArrayLike, kind: str = "pearson", n_permutations: int = 10_000, seed: int = 0
) -> float:
    """Return the two-sided p-value of a correlation, by permutation.

    It is the share of orders of ``y`` whose correlation with ``x`` is at least as far from 0 as
    that of the data. Use it beside :func:`correlation` where there are few points.

    Parameters
    ----------
    x, y : array-like (n,)
        The two sides, 4 points or more.
    kind : {"pearson", "spearman"}, default "pearson"
        Of the values, or of their ranks.
    n_permutations : int, default 10_000
        How many random orders are tried, 1,000 or more. Where there are no more orders than that
        (by default for 7 points or fewer) each is tried once instead.
    seed : int, default 0
        Of the random orders.

    Returns
    -------
    float
        Of random orders, which take the order of the data with them, (1 + hits) / (1 + tried).

    Raises
    ------
    InputError
        If there are fewer than 4 points, a value is not finite, one side is constant, the kind is
        unknown, or fewer than 1,000 permutations are asked for. If the two sides differ in length.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import permutation_p
    >>> round(permutation_p([1, 2, 3, 4], [1, 2, 3, 4]), 3)  # 2 of 24 orders
    0.083
    """
    first, second = _points(x, y, kind)
    require_estimate(n_permutations >= 1000, "n_permutations", n_permutations, "1,000 or more")
    if kind == "spearman":
        first = rankdata(first)
        second = rankdata(second)
    centred_x = first - first.mean()
    centred_y = second - second.mean()
    result = permutation_test(
        (centred_y,),
        lambda order, axis: np.abs(order @ centred_x),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=n_permutations,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def resampled_shares(n: int, n_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Draw bootstrap resamples of n cases as the share of each resample that each case makes up.

    Use it for statistics that are matrix products: one product with the shares gives all resamples.

    Parameters
    ----------
    n : int
        The number of cases, 2 or more.
    n_resamples : int, default 2000
        The number of resamples, 100 or more.
    seed : int, default 0
        Of the random numbers.

    Returns
    -------
    ndarray (n_resamples, n)
        Rows that sum to 1.

    Raises
    ------
    InputError
        If there are fewer than 2 cases or 100 resamples.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics.intervals import resampled_shares
    >>> shares = resampled_shares(4, n_resamples=100)
    >>> shares.shape, bool((shares.sum(axis=1) == 1).all())
    ((100, 4), True)
    """
    draw = np.concatenate(_draws(n, n_resamples, seed))
    cells = draw + n * np.arange(n_resamples)[:, None]  # one count over all resamples
    counts = np.bincount(cells.ravel(), minlength=draw.size)
    return counts.reshape(draw.shape) / n


def percentile_interval(
    value: float, resampled: np.ndarray, n: int, level: float = 0.95
) -> Estimate:
    """Make an estimate from a statistic and its values on resamples, by percentiles.

    Use it where resamples come from elsewhere, such as from :func:`resampled_shares`; else
    :func:`bootstrap` does both. The interval is widened where needed to contain the value.

    Parameters
    ----------
    value : float
        The statistic of the data.
    resampled : ndarray (r,)
        The statistic of each resample; NaN where it is undefined.
    n : int
        The number of observations.
    level : float, default 0.95
        The confidence level, between 0 and 1.

    Returns
    -------
    Estimate
        The value, the percentile interval of the resamples, and n.

    Raises
    ------
    InputError
        If the value is not finite, more than half of the resamples are NaN, or the level is not
        between 0 and 1.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.metrics import percentile_interval
    >>> print(percentile_interval(2.0, np.arange(5.0), n=10))
    2.00 [0.10, 3.90]
    """
    require_level(level)
    defined = resampled[np.isfinite(resampled)]
    undefined = len(resampled) - len(defined)
    require_estimate(
        isfinite(value) and 2 * len(defined) >= len(resampled),
        "the statistic",
        f"{value} on the data, undefined on {undefined} of {len(resampled)} resamples",
        "a statistic defined on the data and on most resamples",
    )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    low = min(value, float(low))
    high = max(value, float(high))
    return Estimate(value, low, high, n)


def mean_interval(values: ArrayLike, level: float = 0.95) -> Estimate:
    r"""Estimate a mean of few values with Student's t interval.

    Use it for numbers of a few models, such as connectors that were trained from different seeds.
    The bootstrap of three values knows ten resamples, and its interval is far too narrow. This one
    is :math:`\bar x \pm t_{n-1} s / \sqrt n`, for values that are drawn alike and roughly normal.

    Parameters
    ----------
    values : array-like (n,)
        One number for each model, two or more.
    level : float, default 0.95
        The confidence level, between 0 and 1.

    Returns
    -------
    Estimate
        The mean, its interval, and n.

    Raises
    ------
    InputError
        If there are fewer than two values, or one is not finite, or the level is not between 0 and
        1.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import mean_interval
    >>> print(mean_interval([0.5, 0.6, 0.7]))
    0.60 [0.35, 0.85]
    """
    require_level(level)
    numbers = _checked(values, flat=True)
    n = len(numbers)
    require_estimate(n >= 2, "a mean", f"{n} value", "2 or more: their spread gives the interval")
    value = float(numbers.mean())
    error = float(numbers.std(ddof=1)) / sqrt(n)
    half = float(student_t.ppf((1 + level) / 2, n - 1)) * error
    return Estimate(value, value - half, value + half, n)


def subtract(a: Estimate, b: Estimate) -> Estimate:
    r"""Estimate the difference of two estimates from their intervals.

    Use it where two numbers with intervals come from elsewhere, such as the accuracies of two
    probes; :func:`difference` compares the cases themselves. The distances of the ends from the
    values add up as squares (Zou and Donner, 2008), as if the two were independent. Where the same
    cases are behind both, the interval is wider than need be.

    Parameters
    ----------
    a : Estimate
        One side, with an interval of 95 %.
    b : Estimate
        The side that is subtracted, with an interval of the same level.

    Returns
    -------
    Estimate
        The difference and its interval; n is the smaller one of the two.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import Estimate, subtract
    >>> print(subtract(Estimate(0.9, 0.87, 0.92, 40), Estimate(0.6, 0.5, 0.64, 20)))
    0.30 [0.25, 0.40]
    """
    value = a.value - b.value
    low = value - sqrt((a.value - a.low) ** 2 + (b.high - b.value) ** 2)
    high = value + sqrt((a.high - a.value) ** 2 + (b.value - b.low) ** 2)
    return Estimate(value, low, high, min(a.n, b.n))


def _checked(values: ArrayLike, flat: bool = False) -> np.ndarray:
    """Return values as finite numbers, a row for each observation, or refuse them."""
    try:
        rows = np.asarray(plain(values), dtype=float)
    except (TypeError, ValueError) as cause:
        raise no_estimate("values", cause, "numbers without gaps") from cause
    require_estimate(
        rows.ndim > 0 and rows.size > 0,
        "values",
        "no values",
        "one row of numbers for each observation, at least one",
    )
    require_estimate(
        rows.ndim == 1 or not flat,
        "values",
        f"an array of shape {rows.shape}",
        "one number for each observation",
    )
    n_bad = int((~np.isfinite(rows)).sum())
    require_estimate(
        n_bad == 0,
        "values",
        f"{n_bad} of {rows.size} NaN or infinite",
        "finite numbers; leave out what was not measured",
    )
    return rows


def _labels(groups: ArrayLike | None, n: int) -> np.ndarray:
    labels = np.arange(n) if groups is None else np.asarray(groups)
    require_same_length(values=n, groups=labels)
    return labels


def _binary(rows: np.ndarray) -> bool:
    return bool(np.isin(rows, (0, 1)).all())


def _wilson(p: float, trials: int, n: int, level: float) -> Estimate:
    """Return Wilson's interval (1927) of the share ``p`` in so many ``trials``.

    Centre (p + z^2/2t) / (1 + z^2/t), half width z sqrt(p(1-p)/t + z^2/4t^2) / (1 + z^2/t).
    """
    require_level(level)
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    scale = 1 + z2 / trials
    centre = (p + z2 / (2 * trials)) / scale
    spread = p * (1 - p) / trials + z2 / (4 * trials**2)
    half = sqrt(z2 * spread) / scale
    low = max(0.0, min(p, centre - half))
    high = min(1.0, max(p, centre + half))
    return Estimate(p, low, high, n)


def _newcombe(
    a: np.ndarray, b: np.ndarray, trials_a: int, trials_b: int, n: int, level: float
) -> Estimate:
    """Return Newcombe's interval (1998) of the difference of two shares."""
    p = _wilson(float(a.mean()), trials_a, len(a), level)
    q = _wilson(float(b.mean()), trials_b, len(b), level)
    gap = subtract(p, q)
    return Estimate(gap.value, gap.low, gap.high, n)


def _draws(clusters: int, n_resamples: int, seed: int) -> list[np.ndarray]:
    require_estimate(
        clusters >= 2,
        "the bootstrap",
        f"{clusters} case or group",
        "2 or more: the spread between cases is what it measures",
    )
    require_estimate(n_resamples >= 100, "n_resamples", n_resamples, "100 or more")
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // clusters)
    draws = []
    for start in range(0, n_resamples, size):
        shape = (min(size, n_resamples - start), clusters)
        draws.append(rng.integers(clusters, size=shape))
    return draws


def _resamples(
    rows: np.ndarray, labels: np.ndarray, statistic: Callable, n_resamples: int, seed: int
) -> np.ndarray:
    """Compute a statistic on resamples of groups of rows."""
    _, index = np.unique(labels, return_inverse=True)
    draws = _draws(int(index.max()) + 1, n_resamples, seed)
    # sums and sizes of groups are enough: no loop over resamples
    if statistic is np.mean and rows.ndim == 1:
        totals = np.bincount(index, rows)
        sizes = np.bincount(index)
        means = []
        for draw in draws:
            means.append(totals[draw].sum(axis=1) / sizes[draw].sum(axis=1))
        return np.concatenate(means)
    ends = np.cumsum(np.bincount(index))
    members = np.split(np.argsort(index, kind="stable"), ends[:-1])
    values = []
    for draw in draws:
        for clusters in draw:
            rows_drawn = np.concatenate([members[cluster] for cluster in clusters])
            values.append(statistic(rows[rows_drawn]))
    return np.array(values, dtype=float)


def _joint(
    a: np.ndarray,
    b: np.ndarray,
    labels_a: np.ndarray,
    labels_b: np.ndarray,
    n_resamples: int,
    seed: int,
) -> np.ndarray:
    """Compute the difference of two means on resamples of groups that both sides share."""
    _, index = np.unique(np.concatenate([labels_a, labels_b]), return_inverse=True)
    clusters = int(index.max()) + 1
    index_a, index_b = np.split(index, [len(a)])
    totals_a = np.bincount(index_a, a, minlength=clusters)
    totals_b = np.bincount(index_b, b, minlength=clusters)
    sizes_a = np.bincount(index_a, minlength=clusters)
    sizes_b = np.bincount(index_b, minlength=clusters)
    differences = []
    for draw in _draws(clusters, n_resamples, seed):
        with np.errstate(invalid="ignore"):  # a resample may miss one side altogether
            mean_a = totals_a[draw].sum(axis=1) / sizes_a[draw].sum(axis=1)
            mean_b = totals_b[draw].sum(axis=1) / sizes_b[draw].sum(axis=1)
        differences.append(mean_a - mean_b)
    return np.concatenate(differences)


def _points(x: ArrayLike, y: ArrayLike, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the two lists of values, or refuse what has no correlation."""
    first = _checked(x, flat=True)
    second = _checked(y, flat=True)
    require_estimate(
        kind in ("pearson", "spearman"), "kind of correlation", repr(kind), "pearson or spearman"
    )
    require_same_length(x=first, y=second)
    range_x = np.ptp(first)
    range_y = np.ptp(second)
    require_estimate(
        len(first) >= 4 and range_x > 0 and range_y > 0,
        "points",
        f"{len(first)}, x and y varying by {range_x}, {range_y}",
        "4 or more, varying in both",
    )
    return first, second


def _correlated(x: np.ndarray, y: np.ndarray, kind: str) -> np.ndarray:
    """Correlate each row of x (r, n) with the same row of y; NaN where one has no spread."""
    flat = (np.ptp(x, axis=1) == 0) | (np.ptp(y, axis=1) == 0)
    if kind == "spearman":
        x = rankdata(x, axis=1)
        y = rankdata(y, axis=1)
    products = _unit_rows(x, flat) * _unit_rows(y, flat)
    cosines = np.clip(products.sum(axis=1), -1, 1)
    return np.where(flat, np.nan, cosines)


def _unit_rows(rows: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Centre each row and scale it to length 1, but for those without spread."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    return centred / np.where(flat, 1, np.linalg.norm(centred, axis=1))[:, None]
