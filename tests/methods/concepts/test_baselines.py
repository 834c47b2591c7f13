"""Principal components, k-means and samples against scikit-learn, closed forms and slow loops."""

import numpy as np
import pytest
import sklearn.cluster
import sklearn.decomposition
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts import baselines
from xlvlms_tutorial.methods.concepts.baselines import PCA, KMeans, Simple


def activations(n=60, d=15, seed=0):
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((n, 4)) @ random.standard_normal((4, d)) * 3
        + random.standard_normal((n, d))
        + 10
    )


def clusters(n=120, d=8, k=5, seed=0, offset=0.0):
    random = np.random.default_rng(seed)
    centres = 20 * random.standard_normal((k, d))
    return centres[np.arange(n) % k] + random.standard_normal((n, d)) + offset


@pytest.mark.parametrize(("n", "d"), [(60, 15), (15, 60), (20, 20)])
@pytest.mark.parametrize(("dtype", "close"), [(np.float64, 1e-9), (np.float32, 1e-3)])
def test_principal_components_are_scikit_learns(n, d, dtype, close):
    A = activations(n, d).astype(dtype)
    ours, theirs = (
        PCA(4).fit(A),
        sklearn.decomposition.PCA(4, svd_solver="full").fit(A.astype(float)),
    )
    signs = np.sign((ours.components_ * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(ours.components_, signs[:, None] * theirs.components_, atol=close)
    np.testing.assert_allclose(
        ours.transform(A), signs * theirs.transform(A.astype(float)), atol=30 * close
    )
    np.testing.assert_allclose(
        ours.reconstruct(A),
        theirs.inverse_transform(theirs.transform(A.astype(float))),
        atol=30 * close,
    )
    np.testing.assert_allclose(
        ours.explained_variance_ratio_, theirs.explained_variance_ratio_, atol=close
    )
    largest = np.abs(ours.components_).argmax(axis=1)
    assert (ours.components_[np.arange(4), largest] > 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 12), st.integers(2, 12), st.integers(0, 2**20))
def test_components_are_orthonormal_also_where_nothing_varies_any_more(n, d, seed):
    random = np.random.default_rng(seed)
    A = random.standard_normal((n, d)) @ np.diag([1.0, *[1e-3] * (d - 1)])
    k = min(n, d)
    model = PCA(k).fit(A)
    np.testing.assert_allclose(model.components_ @ model.components_.T, np.eye(k), atol=1e-8)
    if k in (d, n):
        np.testing.assert_allclose(model.reconstruct(A), A, atol=1e-8)


def test_codes_of_components_have_both_signs_and_mean_zero():
    A = activations()
    codes = PCA(3).fit_transform(A)
    assert (codes.min(axis=0) < 0).all()
    np.testing.assert_allclose(codes.mean(axis=0), 0, atol=1e-10)


def test_more_components_than_dimensions_are_refused():
    with pytest.raises(
        InputError, match="n_components is 16; activations of width 15 have at most 15"
    ):
        PCA(16).fit(activations())


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_clear_clusters_are_those_of_scikit_learn(dtype, offset):
    A = clusters(offset=offset).astype(dtype)
    ours = KMeans(5).fit(A)
    theirs = sklearn.cluster.KMeans(5, n_init=10, random_state=0).fit(A.astype(float))
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
    assert len(set(zip(ours.labels_, theirs.labels_, strict=True))) == 5
    assert len(set(ours.labels_[:5])) == 5
    for k in range(5):
        np.testing.assert_allclose(
            ours.components_[k], A[ours.labels_ == k].mean(axis=0), rtol=1e-5, atol=1e-4
        )
    assert ours.converged_


@pytest.mark.parametrize("seed", range(3))
def test_clusters_of_what_has_none_are_as_good_as_scikit_learns(seed):
    A = activations(300, 20, seed=seed)
    ours = KMeans(8, n_init=8).fit(A)
    theirs = sklearn.cluster.KMeans(8, n_init=8, random_state=seed).fit(A)
    assert ours.inertia_ <= theirs.inertia_ * 1.03
    distances = ((A[:, None] - ours.components_) ** 2).sum(axis=2)
    np.testing.assert_array_equal(ours.labels_, distances.argmin(axis=1))
    assert ours.inertia_ == pytest.approx(distances.min(axis=1).sum(), rel=1e-9)


@pytest.mark.parametrize("kind", [KMeans, Simple])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_codes_fall_with_the_distance_and_stand_for_the_nearest_concept(kind, dtype, monkeypatch):
    monkeypatch.setattr(baselines, "_NUMBERS", 40)  # several blocks
    A = clusters(offset=30.0).astype(dtype)
    model = kind(5).fit(A)
    distances = np.linalg.norm(A.astype(float)[:, None] - model.components_, axis=2)
    np.testing.assert_allclose(
        model.transform(A), 1 / (1 + distances), rtol=1e-6 if dtype == np.float32 else 1e-12
    )
    np.testing.assert_array_equal(model.reconstruct(A), model.components_[distances.argmin(axis=1)])


def offset_clusters(n, d, k, norm, massive=()):
    """Clusters .7 wide around centres 10 apart, all moved by a vector of some norm, or
    only in the massive dimensions.
    """
    random = np.random.default_rng(d)
    away = np.zeros(d) if massive else random.standard_normal(d)
    away[list(massive)] = 1.0
    centres = 10 * random.standard_normal((k, d)) / np.sqrt(d)
    return (
        centres[np.arange(n) % k]
        + 0.7 * random.standard_normal((n, d))
        + norm * away / np.linalg.norm(away)
    )


@pytest.mark.parametrize("norm", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("massive", [(), (3, 40)])
@pytest.mark.parametrize("kind", [KMeans, Simple])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_codes_keep_their_digits_whatever_states_have_in_common(dtype, kind, massive, norm):
    A = offset_clusters(150, 64, 6, norm, massive).astype(dtype)
    model = kind(6).fit(A)
    codes = model.transform(A)
    distances = np.linalg.norm(A.astype(float)[:, None] - model.components_, axis=2)
    np.testing.assert_allclose(
        codes, 1 / (1 + distances), rtol=1e-6 if dtype == np.float32 else 1e-12
    )
    for rows in (1, 7, 24, 26, 149):
        np.testing.assert_array_equal(model.transform(A[:rows]), codes[:rows])
    if kind is Simple:
        assert (codes[model.rows_].diagonal() == 1).all()
    else:
        np.testing.assert_array_equal(codes.argmax(axis=1), model.labels_)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_of_halves_keep_their_digits(dtype):
    A = torch.from_numpy(offset_clusters(150, 64, 6, 2000.0)).to(dtype)
    for kind in (KMeans, Simple):
        model = kind(6).fit(A)
        distances = np.linalg.norm(A.double().numpy()[:, None] - model.components_, axis=2)
        np.testing.assert_allclose(model.transform(A), 1 / (1 + distances), rtol=1e-5)


def test_the_best_of_more_starts_is_no_worse_and_seeds_repeat():
    A = activations(200, 10)
    few, many = (KMeans(9, n_init=n).fit(A).inertia_ for n in (1, 6))
    assert many <= few
    np.testing.assert_array_equal(
        KMeans(4, seed=2).fit(A).components_, KMeans(4, seed=2).fit(A).components_
    )


def test_equal_samples_leave_no_cluster_undefined():
    A = np.repeat([[0.0, 1.0], [5.0, 2.0]], 4, axis=0)
    model = KMeans(3, max_iter=20)
    model.fit(A)
    assert np.isfinite(model.components_).all()
    assert model.inertia_ == pytest.approx(0, abs=1e-12)


def test_too_few_steps_are_reported():
    with pytest.warns(ConvergenceWarning, match="no convergence in 1 steps"):
        assert not KMeans(9, max_iter=1).fit(activations(200)).converged_


@pytest.mark.parametrize(("name", "value"), [("n_init", 0), ("max_iter", 0), ("seed", -1)])
def test_parameters_that_make_no_sense_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} is"):
        KMeans(3, **{name: value}).fit(activations())


def test_simple_concepts_are_the_largest_samples_in_order():
    A = activations()
    model = Simple(4).fit(A)
    expected = np.argsort(-np.linalg.norm(A, axis=1))[:4]
    np.testing.assert_array_equal(model.rows_, expected)
    np.testing.assert_array_equal(model.components_, A[expected])
    np.testing.assert_array_equal(model.transform(A)[expected].diagonal(), 1)
