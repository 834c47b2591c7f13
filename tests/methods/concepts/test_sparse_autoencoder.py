import jaxtyping
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.utils.estimator_checks import parametrize_with_checks

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts import sparse_autoencoder
from xlvlms_tutorial.methods.concepts.base import load_dictionary
from xlvlms_tutorial.methods.concepts.sparse_autoencoder import TopKSAE

K, ACTIVE = 16, 3


def planted(n=400, d=48, offset=2.0, noise=0.1, seed=0):
    """Activations of which each is an offset, three of sixteen directions, and a
    little noise; and these directions.
    """
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(K, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    places = rng.random((n, K)).argsort(axis=1)[:, :ACTIVE]
    codes = np.zeros((n, K))
    np.put_along_axis(codes, places, rng.uniform(0.5, 1.5, size=(n, ACTIVE)), axis=1)
    return codes @ directions + noise * rng.normal(size=(n, d)) / np.sqrt(d) + offset * rng.normal(
        size=d
    ) / np.sqrt(d), directions


def likeness(estimated, directions):
    cosines = estimated @ directions.T
    return cosines[linear_sum_assignment(cosines, maximize=True)].mean()


@pytest.fixture(scope="module")
def data():
    return planted()


@pytest.fixture(scope="module")
def fitted(data):
    return TopKSAE(K, ACTIVE).fit(data[0])


def test_no_sample_has_more_than_k_active_concepts_and_codes_are_not_negative(data, fitted):
    codes = fitted.transform(data[0])
    assert (codes >= 0).all()
    assert (codes > 0).sum(axis=1).max() == ACTIVE
    assert (codes > 0).sum(axis=1).mean() > ACTIVE - 0.2


def test_planted_directions_are_found_where_random_ones_would_not_match(data, fitted):
    chance = likeness(np.linalg.qr(np.random.default_rng(1).normal(size=(48, K)))[0].T, data[1])
    assert chance < 0.5
    assert likeness(fitted.components_, data[1]) > 0.85


def test_atoms_have_norm_1_and_none_is_dead(data, fitted):
    np.testing.assert_allclose(np.linalg.norm(fitted.components_, axis=1), 1, rtol=1e-6)
    assert fitted.transform(data[0]).any(axis=0).all()


def test_objective_is_the_share_of_the_variance_that_is_lost(data, fitted):
    A = data[0]
    lost = np.square(A - fitted.reconstruct(A)).sum() / np.square(A - A.mean(axis=0)).sum()
    assert fitted.objective_[-1] == pytest.approx(lost, rel=1e-4)
    assert fitted.n_iter_ == 500 == len(fitted.objective_) - 1
    assert fitted.objective_[-1] < 0.1 < fitted.objective_[0]


def test_codes_and_reconstructions_agree_with_a_plain_loop(data, fitted):
    A = data[0][:5]
    codes, given_back = fitted.transform(A), fitted.reconstruct(A)
    for i, a in enumerate(A):
        expected = np.maximum((a - fitted.bias_) @ fitted.encoder_ + fitted.encoder_bias_, 0)
        expected[np.argsort(expected)[:-ACTIVE]] = 0
        np.testing.assert_allclose(codes[i], expected, rtol=1e-10)
        np.testing.assert_allclose(
            given_back[i], expected @ fitted.components_ + fitted.bias_, rtol=1e-10
        )


def test_the_seed_decides_everything_and_the_number_format_nothing(data):
    A = data[0]
    first, again, second = (
        TopKSAE(K, ACTIVE, max_iter=60, batch_size=100, seed=seed).fit(A) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.components_, again.components_)
    np.testing.assert_array_equal(first.transform(A), again.transform(A))
    assert not np.allclose(first.components_, second.components_)
    single = TopKSAE(K, ACTIVE, max_iter=60, batch_size=100, seed=3).fit(A.astype(np.float32))
    assert single.transform(A.astype(np.float32)).dtype == single.components_.dtype == np.float32
    assert likeness(single.components_, first.components_) > 0.95


def test_the_units_of_the_activations_do_not_matter(data):
    A = data[0]
    first, second = (
        TopKSAE(K, ACTIVE, max_iter=30).fit(A),
        TopKSAE(K, ACTIVE, max_iter=30).fit(A * 1024),
    )
    np.testing.assert_allclose(second.components_, first.components_, atol=1e-4)
    np.testing.assert_allclose(
        second.transform(A * 1024), 1024 * first.transform(A), rtol=1e-3, atol=0.1
    )


def test_dead_concepts_begin_anew_at_what_is_lacking():
    A = torch.from_numpy(planted(offset=0.0)[0]).float()
    training = sparse_autoencoder._Training(TopKSAE(K, ACTIVE), A)
    training.parameters[2].data[:4] = -100.0
    training._step(A)
    assert (training.used > 0).tolist() == [False] * 4 + [True] * 12
    before = training.loss()
    training._revive(A)
    for moments in training.adam.state[training.parameters[0]].values():
        assert moments.ndim == 0 or not moments[:4].any()
    training._step(A)
    assert (training.used > 0).all()
    assert training.loss() < before


@pytest.mark.parametrize(("n_components", "d"), [(1, 4), (3, 1)])
def test_encoder_and_decoder_are_learnt_apart(n_components, d):
    A = torch.randn(20, d, generator=torch.Generator().manual_seed(0))
    training = sparse_autoencoder._Training(TopKSAE(n_components, 1), A)
    decoder, encoder, *_ = training.parameters
    assert decoder.is_leaf and encoder.is_leaf
    assert decoder.data_ptr() != encoder.data_ptr()


def test_batches_see_every_sample_once_a_round():
    A = torch.arange(20.0)[:, None] * torch.ones(3)
    training = sparse_autoencoder._Training(TopKSAE(2, 1, max_iter=4, batch_size=5), A)
    order = torch.cat([batch[:, 0] for batch in training._batches()])
    assert sorted(order.tolist()) == list(range(20))


def test_saved_and_loaded_it_gives_the_same_codes(data, fitted, tmp_path):
    path = fitted.save(tmp_path / "sae.safetensors", {"layer": 3})
    np.testing.assert_array_equal(
        load_dictionary(path).transform(data[0]), fitted.transform(data[0])
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 0},
        {"k": 17},
        {"k": 1.5},
        {"max_iter": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": "fast"},
        {"n_components": 0},
    ],
)
def test_parameters_without_meaning_are_refused_before_anything_is_learnt(data, settings):
    with pytest.raises(InputError):
        TopKSAE(K, ACTIVE).set_params(**settings).fit(data[0])


def test_activations_that_cannot_be_used_are_refused(data, fitted):
    with pytest.raises(InputError):
        TopKSAE(K, ACTIVE).fit(data[0][: K - 1])
    with pytest.raises(InputError):
        TopKSAE(K, ACTIVE).fit(np.where(np.arange(48) == 3, np.nan, data[0]))
    with pytest.raises(InputError):
        fitted.transform(data[0][:, :10])


@parametrize_with_checks([TopKSAE(n_components=2, k=1, max_iter=20)])
def test_it_is_a_scikit_learn_estimator(estimator, check, monkeypatch):
    # it would refuse a sparse matrix before the estimator does
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    check(estimator)
