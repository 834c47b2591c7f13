from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, pearsonr, spearmanr, ttest_1samp

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.intervals import (
    Estimate,
    bootstrap,
    correlation,
    difference,
    mean_interval,
    percentile_interval,
    permutation_p,
    proportion,
    resampled_shares,
    subtract,
)

trials = st.lists(st.booleans(), min_size=1, max_size=60)
numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


@given(trials, st.sampled_from([0.8, 0.95, 0.99]))
def test_proportion_agrees_with_scipys_wilson_interval(values, level):
    ours = proportion(values, level=level)
    theirs = binomtest(sum(values), len(values)).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.value == np.mean(values)
    assert ours.n == len(values)


@given(trials)
def test_proportion_of_the_opposite_mirrors_the_interval(values):
    ours, opposite = proportion(values), proportion([not v for v in values])
    assert (1 - ours.high, 1 - ours.low) == pytest.approx((opposite.low, opposite.high), abs=1e-12)


def test_proportion_is_not_certain_when_all_trials_agree():
    assert proportion([True] * 20).low == pytest.approx(20 / (20 + 1.959964**2))
    assert proportion([False] * 20).high == pytest.approx(1.959964**2 / (20 + 1.959964**2))


def test_bootstrap_of_groups_agrees_with_a_plain_loop():
    rng = np.random.default_rng(3)
    values, groups = rng.normal(size=40), rng.integers(7, size=40)
    members = [values[groups == g] for g in np.unique(groups)]
    draws = np.random.default_rng(11).integers(len(members), size=(500, len(members)))
    means = [np.concatenate([members[g] for g in draw]).mean() for draw in draws]
    ours = bootstrap(values, groups, n_resamples=500, seed=11)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert ours.value == pytest.approx(values.mean())


def test_bootstrap_takes_any_statistic_and_resamples_rows_together():
    x = np.random.default_rng(0).normal(size=(80, 1))
    pairs = np.hstack([x, 2 * x])
    correlation = bootstrap(
        pairs, statistic=lambda rows: np.corrcoef(rows.T)[0, 1], n_resamples=200
    )
    assert (correlation.low, correlation.high) == pytest.approx((1, 1))
    shortcut, loop = (
        bootstrap(x[:, 0], seed=5),
        bootstrap(x[:, 0], statistic=lambda rows: rows.mean(), seed=5),
    )
    assert (shortcut.low, shortcut.high) == pytest.approx((loop.low, loop.high))


def test_groups_that_agree_within_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 10)
    grouped, alone = bootstrap(values, np.repeat(np.arange(20), 10)), bootstrap(values)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = []
    for seed in range(200):
        estimate = bootstrap(rng.exponential(size=60), n_resamples=300, seed=seed)
        hits.append(estimate.low <= 1 <= estimate.high)
    assert 0.87 <= np.mean(hits) <= 0.99


@given(numbers, st.integers(0, 3))
def test_bootstrap_interval_holds_its_value_lies_in_the_data_and_repeats(values, seed):
    first = bootstrap(values, seed=seed, n_resamples=100)
    assert min(values) - 1e-9 <= first.low <= first.value <= first.high <= max(values) + 1e-9
    assert first == bootstrap(values, seed=seed, n_resamples=100)


def test_chunks_do_not_change_the_resamples(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap(values)
    monkeypatch.setattr("xlvlms_tutorial.metrics.intervals._CHUNK", 1000)
    assert bootstrap(values) == whole


def test_a_proportion_is_wilsons_alone_and_the_bootstraps_in_groups():
    values, groups = [True, True, False, True] * 10, np.repeat(np.arange(20), 2)
    assert proportion(values, np.arange(40)) == proportion(values)
    assert proportion(values, groups) == bootstrap(values, groups)


def test_a_proportion_in_groups_counts_groups_where_all_trials_agree():
    assert proportion([True] * 40, np.repeat(np.arange(10), 4)) == Estimate(
        1.0, proportion([True] * 10).low, 1.0, 40
    )


def test_difference_agrees_with_a_plain_loop_over_shared_groups():
    rng = np.random.default_rng(1)
    a, b, ga, gb = (
        rng.normal(size=30),
        rng.normal(size=25),
        rng.integers(8, size=30),
        rng.integers(8, size=25),
    )
    differences = []
    for draw in np.random.default_rng(4).integers(8, size=(400, 8)):
        first, second = (np.concatenate([v[g == k] for k in draw]) for v, g in ((a, ga), (b, gb)))
        differences.append(first.mean() - second.mean())
    ours = difference(a, b, ga, gb, n_resamples=400, seed=4)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
    assert ours.n == 55


def test_pairing_narrows_the_difference_of_similar_sides():
    a = np.random.default_rng(0).normal(size=50)
    paired, alone = difference(a + 0.1, a, paired=True), difference(a + 0.1, a)
    assert paired.low == pytest.approx(0.1)
    assert alone.low < 0
    assert alone.high > paired.high


def test_difference_of_sides_that_never_vary_is_newcombes_and_not_certain():
    never = [False] * 56
    ours = difference([True] * 9, never[:9])
    # Newcombe (1998), method 10, by hand from the two Wilson intervals of 9/9 and 0/9
    bound = 1.959964**2 / (9 + 1.959964**2)
    assert (ours.low, ours.high) == pytest.approx((1 - np.sqrt(2) * bound, 1.0))
    none = difference(never, never, paired=True)
    assert none.value == 0
    assert none.low < 0 < none.high


@given(numbers, numbers)
def test_difference_changes_sign_with_its_sides(a, b):
    assert difference(a, b, n_resamples=100).value == pytest.approx(
        -difference(b, a, n_resamples=100).value
    )


@pytest.mark.parametrize("bad", [[], [1.0, np.nan], [np.inf, 0.0], ["a", "b"], 3.0, [None, 1.0]])
@pytest.mark.parametrize("function", [bootstrap, proportion, lambda v: difference(v, [1.0, 0.5])])
def test_bad_values_raise_instead_of_giving_a_number(function, bad):
    with pytest.raises(InputError, match="allowed"):
        function(bad)


@pytest.mark.parametrize(
    "call",
    [
        lambda: proportion([0.5, 1]),
        lambda: proportion([[0, 1]]),
        lambda: proportion([0, 1], level=95),
        lambda: bootstrap([1.0]),
        lambda: bootstrap([1.0, 2.0], [0, 0]),
        lambda: bootstrap([1.0, 2.0], level=1.0),
        lambda: bootstrap([1.0, 2.0], n_resamples=10),
        lambda: bootstrap([1.0, 2.0], statistic=lambda v: np.nan),
        lambda: difference([1.0, 2.0], [1.0, 3.0], groups_a=[0, 1]),
    ],
)
def test_what_cannot_be_estimated_raises(call):
    with pytest.raises(InputError):
        call()


def test_lengths_must_agree():
    with pytest.raises(InputError, match="groups: 3"):
        bootstrap([1.0, 2.0], [0, 1, 2])
    with pytest.raises(InputError, match="a: 2, b: 3"):
        difference([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)


@pytest.mark.parametrize(
    "numbers",
    [
        (0.5, 0.6, 0.7, 3),
        (0.5, 0.1, 0.4, 3),
        (np.nan, 0, 1, 3),
        (0.5, 0.4, np.inf, 3),
        (0.5, 0.4, 0.6, 0),
    ],
)
def test_an_estimate_must_be_consistent(numbers):
    with pytest.raises(InputError):
        Estimate(*numbers)


def test_an_estimate_reads_well():
    assert str(Estimate(0.931, 0.91, 0.95, 100)) == "0.93 [0.91, 0.95]"


THEIRS = {"pearson": pearsonr, "spearman": spearmanr}
kinds = pytest.mark.parametrize("kind", THEIRS)


def points(n, seed=0, slope=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    return x, slope * x + rng.normal(size=n)


@kinds
def test_correlation_agrees_with_scipy_and_a_plain_bootstrap(kind):
    x, y = points(15)
    y[3] = y[7]  # ranks with ties
    ours = correlation(x, y, kind, n_resamples=300, seed=2)
    assert ours.value == pytest.approx(THEIRS[kind](x, y).statistic)
    draws = [
        THEIRS[kind](x[draw], y[draw]).statistic
        for draw in np.random.default_rng(2).integers(15, size=(300, 15))
    ]
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert ours.n == 15


@kinds
@given(st.integers(4, 12), st.integers(0, 99), st.floats(0.1, 50), st.floats(-10, 10))
def test_correlation_is_symmetric_keeps_under_scaling_and_turns_with_the_sign(
    kind, n, seed, scale, shift
):
    x, y = points(n, seed)
    ours, again = (
        correlation(x, y, kind, n_resamples=100),
        correlation(y, scale * x + shift, kind, n_resamples=100),
    )
    assert (again.value, again.low, again.high) == pytest.approx((ours.value, ours.low, ours.high))
    assert correlation(x, -y, kind, n_resamples=100).value == pytest.approx(-ours.value)
    assert -1 <= ours.low <= ours.value <= ours.high <= 1


@kinds
def test_points_on_a_line_correlate_perfectly(kind):
    estimate = correlation(np.arange(8), 3 - 2.5 * np.arange(8), kind)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((-1, -1, -1))


def test_ranks_see_what_a_line_does_not():
    x = np.arange(1.0, 9)
    assert correlation(x, x**6, "spearman").value == pytest.approx(1)
    assert correlation(x, x**6).value < 0.9


def test_resamples_without_spread_are_left_out():
    estimate = correlation([0, 0, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1], n_resamples=500)
    assert -1 <= estimate.low < estimate.value < estimate.high <= 1
    with pytest.raises(InputError, match="undefined on"):
        # more than half of the resamples are without one of the ones
        correlation([0, 0, 0, 1], [0, 1, 0, 0], n_resamples=500)


@kinds
@pytest.mark.parametrize("n", [4, 6])
def test_permutations_of_few_points_are_all_tried(kind, n):
    x, y = points(n, seed=5)
    statistic = abs(THEIRS[kind](x, y).statistic)
    every = [abs(THEIRS[kind](x, np.array(order)).statistic) for order in permutations(y)]
    assert permutation_p(x, y, kind) == pytest.approx(np.mean(np.array(every) >= statistic - 1e-9))


@kinds
def test_permutations_of_more_points_are_drawn_and_agree_with_theory(kind):
    x, y = points(25, slope=0.4)
    ours, theirs = permutation_p(x, y, kind), THEIRS[kind](x, y).pvalue
    assert ours == pytest.approx(theirs, abs=4 * np.sqrt(theirs / 10_000) + 2e-3)
    assert permutation_p(*points(40, slope=5), kind, n_permutations=2000) == pytest.approx(1 / 2001)
    assert permutation_p(x, y, kind, seed=1) == permutation_p(x, y, kind, seed=1)


def test_p_values_without_correlation_are_spread_evenly():
    p_values = [permutation_p(*points(6, seed, slope=0)) for seed in range(200)]
    assert 0.4 < np.mean(p_values) < 0.6
    assert 0.01 < np.mean(np.array(p_values) < 0.1) < 0.2


@pytest.mark.parametrize("function", [correlation, permutation_p])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2, 3], [1, 2, 4], "found 3, x and y varying by 2.0, 3.0"),
        ([1, 2, 3, 4], [5, 5, 5, 5], "varying by 3.0, 0.0"),
        ([1, 2, 3, np.nan], [1, 2, 3, 4], "1 of 4 NaN"),
        ([], [], "no values"),
        ([[1, 2], [3, 4]], [1, 2], "shape"),
    ],
)
def test_what_cannot_be_correlated_raises(function, x, y, message):
    with pytest.raises(InputError, match=message):
        function(x, y)


def test_choices_of_a_correlation_are_checked():
    x, y = points(5)
    for function in (correlation, permutation_p):
        with pytest.raises(InputError, match="pearson or spearman"):
            function(x, y, kind="kendall")
        with pytest.raises(InputError, match="x: 5, y: 4"):
            function(x, y[:4])
    with pytest.raises(InputError, match="1,000 or more"):
        permutation_p(x, y, n_permutations=999)


def test_shares_of_resamples_give_the_bootstrap_of_a_mean():
    values = np.random.default_rng(0).normal(size=30)
    shares = resampled_shares(30, 500, seed=4)
    assert shares.shape == (500, 30)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    ours, theirs = (
        percentile_interval(values.mean(), shares @ values, 30),
        bootstrap(values, n_resamples=500, seed=4),
    )
    assert (ours.value, ours.low, ours.high, ours.n) == pytest.approx(
        (theirs.value, theirs.low, theirs.high, theirs.n)
    )
    with pytest.raises(InputError, match="2 or more"):
        resampled_shares(1)
    with pytest.raises(InputError, match="100 or more"):
        resampled_shares(5, 10)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9), st.sampled_from([0.8, 0.95]))
def test_the_interval_of_a_mean_is_that_of_scipys_t_test(values, level):
    ours = mean_interval(values, level)
    assert (ours.value, ours.n) == (pytest.approx(np.mean(values)), len(values))
    if np.ptp(values) > 1e-6:
        theirs = ttest_1samp(values, 0).confidence_interval(level)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    else:
        assert ours.high - ours.low < 1e-3


def test_a_mean_of_one_value_has_no_interval():
    for values in ([0.5], [], [0.5, float("nan")]):
        with pytest.raises(InputError):
            mean_interval(values)


def test_a_difference_of_independent_normal_means_adds_variances():
    rng = np.random.default_rng(0)
    half = 1.959964
    covered = 0
    for _ in range(400):
        x, y = rng.normal(1.0, 1.0), rng.normal(0.2, 3.0)
        a, b = Estimate(x, x - half, x + half, 9), Estimate(y, y - 3 * half, y + 3 * half, 4)
        gap = subtract(a, b)
        assert gap.high - gap.low == pytest.approx(2 * half * np.sqrt(10))
        assert (gap.value, gap.n) == (pytest.approx(x - y), 4)
        covered += gap.low <= 0.8 <= gap.high
    assert 0.92 < covered / 400 < 0.98


def test_a_difference_uses_the_halves_that_face_each_other():
    gap = subtract(Estimate(0.9, 0.6, 0.9, 5), Estimate(0.5, 0.5, 0.9, 5))
    assert (gap.low, gap.high) == (pytest.approx(0.4 - 0.5), pytest.approx(0.4))
