"""Folds by what they must keep apart, the probe against its normal equations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.probes import balanced_probe, deal_folds, held_out_labels


def noise(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


# Folds


@given(
    st.integers(2, 5), st.integers(0, 8), st.integers(5, 8), st.integers(0, 8), st.integers(0, 999)
)
@settings(max_examples=60, deadline=None)
def test_every_fold_has_its_share_of_either_label(folds, first, both, second, seed):
    # the labels of two rows of each sample
    pairs = [(0, 0)] * first + [(0, 1)] * both + [(1, 1)] * second
    pairs = np.random.default_rng(seed).permutation(pairs)
    samples = np.repeat(np.arange(len(pairs)), 2)
    fold = deal_folds(samples, pairs.ravel(), folds, seed)
    assert fold.shape == (len(pairs),)
    for having in (pairs.min(axis=1) == 0, pairs.max(axis=1) == 1, np.full(len(pairs), True)):
        counts = np.bincount(fold[having], minlength=folds)
        assert counts.min() >= 1 and np.ptp(counts) <= 1


def test_the_seed_decides_and_names_of_labels_do_not():
    samples, labels = np.arange(40), np.repeat([0, 1], 20)
    fold = deal_folds(samples, labels, seed=3)
    np.testing.assert_array_equal(fold, deal_folds(samples, np.array(["a", "b"])[labels], seed=3))
    assert (fold != deal_folds(samples, labels, seed=4)).any()


def test_samples_of_three_labels_are_spread():
    labels = np.repeat(["picture", "sound", "text"], [10, 5, 15])
    fold = deal_folds(np.arange(30), labels)
    for name, count in (("picture", 2), ("sound", 1), ("text", 3)):
        assert np.bincount(fold[labels == name]).tolist() == [count] * 5


def test_a_label_with_fewer_samples_than_folds_is_refused():
    samples, labels = np.array([0, 0, 0, 1, 2, 3]), np.repeat(["few", "many"], 3)
    with pytest.raises(
        InputError,
        match="samples for 2 folds: found 1 few and 3 many; allowed: as many as folds in each set",
    ):
        deal_folds(samples, labels, 2)
    deal_folds(samples, np.array(["a", "b"] * 3), 2)


# The probe


def by_hand(train, y, test, penalty):
    """Scores of ridge regression on -1 and 1, classes weighing alike, from its
    normal equations with an intercept.
    """
    mean, scale = train.mean(axis=0), train.std(axis=0)
    design = lambda rows: np.column_stack([(rows - mean) / scale, np.ones(len(rows))])
    X, c = design(train), np.where(y > 0, 0.5 / np.mean(y > 0), 0.5 / np.mean(y < 0))
    shrink = penalty * np.diag([1.0] * train.shape[1] + [0.0])
    return design(test) @ np.linalg.solve(X.T @ (c[:, None] * X) + shrink, X.T @ (c * y))


@pytest.mark.parametrize("d", [3, 50])  # fewer columns than rows, and more
@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
def test_each_row_is_judged_by_the_ridge_regression_of_the_other_folds(d, penalty):
    y = np.repeat([-1, 1], [24, 12])
    rows, fold = (
        noise(36, d) * np.exp(noise(1, d, 1)) + 0.4 * (y > 0)[:, None],
        deal_folds(np.arange(36), y, 4),
    )
    expected = np.empty(36)
    for number in range(4):
        held_out = fold == number
        expected[held_out] = by_hand(rows[~held_out], y[~held_out], rows[held_out], penalty)
    result = held_out_labels(rows, y, fold, balanced_probe(penalty))
    np.testing.assert_array_equal(result, np.where(expected > 0, 1, -1))
    assert 0 < np.mean(result == y) < 1


def test_arrays_and_tensors_of_any_format_are_read():
    labels = np.repeat(["low", "high"], 15)
    rows = torch.from_numpy(noise(30, 8) + 0.5 * (labels == "high")[:, None]).bfloat16()
    fold = deal_folds(np.arange(30), labels)
    expected = held_out_labels(rows.double().numpy(), labels, fold)
    for form in (rows.requires_grad_(), rows.detach().float(), rows.detach().float().numpy()):
        np.testing.assert_array_equal(held_out_labels(form, labels, fold), expected)


def test_three_sets_are_told_apart_and_a_rare_one_weighs_as_much():
    labels = np.repeat([0, 1, 2], [100, 100, 10])
    rows = noise(210, 6) + 6 * np.eye(3, 6)[labels]
    fold = deal_folds(np.arange(210), labels)
    assert np.mean(held_out_labels(rows, labels, fold) == labels) == 1
    # two sets at the same place: all rows go to the larger unless labels weigh alike
    labels, rows = np.repeat([0, 1], [180, 30]), noise(210, 2)
    fold = deal_folds(np.arange(210), labels)
    assert np.mean(held_out_labels(rows, labels, fold)) == pytest.approx(0.5, abs=0.15)
    assert not held_out_labels(rows, labels, fold, RidgeClassifier()).any()
