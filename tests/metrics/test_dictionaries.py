from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.geometry import cosine
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics import dictionaries
from xlvlms_tutorial.metrics.dictionaries import (
    match_concepts,
    reconstruction_error,
    sparsity,
    stability,
)


@given(st.integers(0, 1000), st.booleans())
@settings(deadline=None, max_examples=20)
def test_matched_is_the_best_of_all_assignments(seed, absolute):
    a, b = np.random.default_rng(seed).normal(size=(2, 4, 6))
    sign = abs if absolute else float
    best = max(
        sum(sign(cosine(a[i], b[j])) for i, j in enumerate(order))
        for order in permutations(range(4))
    )
    matches = match_concepts(a, b, absolute=absolute)
    assert matches["cosine"].sum() == pytest.approx(best)
    assert sorted(matches["b"]) == list(matches["a"]) == [0, 1, 2, 3]
    for row in matches.itertuples():
        assert row.cosine == pytest.approx(sign(cosine(a[row.a], b[row.b])))


def test_matched_finds_a_shuffled_and_scaled_copy_and_a_smaller_set():
    a = np.random.default_rng(0).normal(size=(5, 8))
    order = [3, 0, 4, 1, 2]
    matches = match_concepts(torch.from_numpy(a[order] * 7).float(), a)
    assert list(matches["b"]) == order
    np.testing.assert_allclose(matches["cosine"], 1, atol=1e-6)
    assert list(match_concepts(a[[4, 1]], a)["b"]) == [4, 1]
    flipped = match_concepts(-a[order], a, absolute=True)
    assert list(flipped["b"]) == order


def test_matched_refuses_what_has_no_direction_or_another_width():
    with pytest.raises(InputError, match="zero"):
        match_concepts(np.zeros((2, 3)), np.ones((2, 3)))
    with pytest.raises(InputError):
        match_concepts(np.full((2, 3), np.nan), np.ones((2, 3)))
    with pytest.raises(InputError):
        match_concepts(np.ones(3), np.ones((2, 3)))
    with pytest.raises(InputError):
        match_concepts(np.ones((2, 3)), np.ones((2, 4)))


@given(st.integers(0, 1000), st.booleans())
@settings(deadline=None, max_examples=20)
def test_argmax_takes_the_nearest_of_all_whoever_else_does(seed, absolute):
    a, b = np.random.default_rng(seed).normal(size=(2, 5, 6))
    sign = abs if absolute else float
    table = match_concepts(a, b[:3], "argmax", absolute)
    assert list(table["a"]) == [0, 1, 2, 3, 4]  # five go with three: some share one
    for row in table.itertuples():
        assert row.cosine == pytest.approx(
            max(sign(cosine(a[row.a], candidate)) for candidate in b[:3])
        )
        assert row.cosine == pytest.approx(sign(cosine(a[row.a], b[row.b])))


def test_of_equal_concepts_the_first_is_the_nearest():
    a = np.random.default_rng(0).normal(size=(2, 7))
    assert list(match_concepts(a, a[[1, 1, 0, 0]] * [[1], [3], [1], [0.1]], "argmax")["b"]) == [
        2,
        0,
    ]
    with pytest.raises(
        InputError, match="unknown matching 'hungarian'; allowed: 'one-to-one', 'argmax'"
    ):
        match_concepts(a, a, "hungarian")


def test_stability_is_the_mean_over_all_pairs_of_runs():
    runs = np.random.default_rng(1).normal(size=(4, 5, 9))
    expected = np.mean(
        [match_concepts(runs[i], runs[j])["cosine"].mean() for i in range(4) for j in range(i)]
    )
    estimate = stability(list(runs))
    assert estimate.value == pytest.approx(expected)
    assert estimate.n == 6 * 5
    assert estimate.low < estimate.value < estimate.high


def test_stability_of_shuffled_copies_is_1_and_an_unstable_concept_widens_the_interval():
    rng = np.random.default_rng(2)
    base = rng.normal(size=(6, 40))
    copies = [base[rng.permutation(6)] * rng.uniform(1, 3) for _ in range(3)]
    same = stability(copies)
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    partly = []
    for _ in range(3):  # five concepts matches by every run, the sixth never twice
        run = base.copy()
        run[5] = rng.normal(size=40)
        partly.append(run[rng.permutation(6)])
    estimate = stability(partly)
    assert estimate.value == pytest.approx(5 / 6, abs=0.06)
    assert estimate.low < 0.7
    # resamples without the sixth: it is drawn with all its counterparts or not at all
    assert estimate.high == pytest.approx(1)


def test_stability_refuses_a_single_run_and_runs_that_do_not_fit():
    with pytest.raises(InputError):
        stability([np.ones((2, 3))])
    with pytest.raises(InputError):
        stability([np.eye(3), np.eye(3)[:2]])
    with pytest.raises(InputError):
        stability([np.ones((1, 3)), np.ones((1, 3))])


def test_reconstruction_error_agrees_with_a_plain_loop(monkeypatch):
    rng = np.random.default_rng(3)
    A = rng.normal(size=(37, 5)) + 4
    A_hat = A + 0.3 * rng.normal(size=A.shape)
    error = energy = variance = 0.0
    for a, b in zip(A, A_hat, strict=True):
        error += sum((a - b) ** 2)
        energy += sum(a**2)
        variance += sum((a - A.mean(axis=0)) ** 2)
    expected = pytest.approx((error / energy, error / variance, 1 - error / variance), rel=1e-10)
    assert reconstruction_error(A, A_hat) == expected
    monkeypatch.setattr(dictionaries, "_BLOCK", 10)
    assert reconstruction_error(torch.from_numpy(A), A_hat) == expected


def test_reconstruction_error_of_the_mean_and_of_everything():
    A = np.random.default_rng(4).normal(size=(50, 3)).astype(np.float32)
    mean = np.broadcast_to(A.mean(axis=0, dtype=np.float64), A.shape)
    assert reconstruction_error(A, mean)[1:] == pytest.approx((1, 0))
    assert reconstruction_error(A, A) == (0, 0, 1)
    assert reconstruction_error(A, np.zeros_like(A)).of_energy == pytest.approx(1)


def test_reconstruction_error_refuses_what_gives_no_number():
    A = np.random.default_rng(5).normal(size=(6, 3))
    with pytest.raises(InputError):
        reconstruction_error(A, A[:, :2])
    with pytest.raises(InputError):
        reconstruction_error(A, np.where(A > 0, np.inf, A))
    with pytest.raises(InputError):
        reconstruction_error(np.ones((6, 3)), A)
    with pytest.raises(InputError):
        reconstruction_error([["a"]], A)


def test_sparsity_counts_zeros_active_concepts_and_dead_ones():
    codes = np.array([[0, 2.0, 0, 0], [0, -1, 3, 0], [0, 0.5, 0, 0]])
    assert sparsity(codes) == pytest.approx((8 / 12, 4 / 3, 1 / 2))
    assert sparsity(torch.from_numpy(codes), threshold=1.0) == pytest.approx(
        (10 / 12, 2 / 3, 1 / 2)
    )
    assert sparsity(np.zeros((3, 2), dtype=int)) == pytest.approx((1, 0, 1))


def test_sparsity_refuses_what_gives_no_number():
    with pytest.raises(InputError):
        sparsity(np.ones((2, 2)), threshold=-1)
    with pytest.raises(InputError):
        sparsity(np.ones((2, 2)), threshold=float("nan"))
    with pytest.raises(InputError):
        sparsity(np.empty((0, 3)))
