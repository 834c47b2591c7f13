"""Semi-NMF against slow loops, the conditions of a minimum, and
scikit-learn's solvers of the same problem.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import DictionaryLearning, sparse_encode
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts import descent
from xlvlms_tutorial.methods.concepts.descent import exact_codes, sweep
from xlvlms_tutorial.methods.concepts.semi_nmf import SemiNMF


def activations(n=80, d=30, k=6, noise=0.3, offset=4.0, seed=0):
    """Sparse non-negative sums of unit directions, with a common offset, as hidden states have."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((k, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = random.gamma(2.0, 3.0, (n, k)) * (random.random((n, k)) < 0.4)
    common = random.standard_normal(d)
    return (
        codes @ directions
        + offset * common / np.linalg.norm(common)
        + noise * random.standard_normal((n, d))
    )


def objective(A, Z, D, penalty):
    return math.fsum(((A - Z @ D) ** 2).ravel()) + penalty * math.fsum(Z.ravel())


def tensors(*arrays):
    return [torch.from_numpy(np.array(array)) for array in arrays]


def test_a_sweep_over_the_codes_is_the_double_loop():
    random = np.random.default_rng(0)
    A, D, Z = random.standard_normal((7, 5)), random.standard_normal((4, 5)), random.random((7, 4))
    D[2] = 0  # an atom of norm 0 gets no code
    ours, products, gram = tensors(Z.T, D @ A.T, D @ D.T)
    sweep(ours, products, gram, 0.3)
    for i in range(7):
        for j in range(4):
            rest = A[i] - sum(Z[i, k] * D[k] for k in range(4) if k != j)
            Z[i, j] = max(0.0, (rest @ D[j] - 0.3) / (D[j] @ D[j])) if j != 2 else 0.0
    np.testing.assert_allclose(ours.numpy().T, Z, atol=1e-12)


def test_a_sweep_over_the_atoms_is_the_loop():
    random = np.random.default_rng(1)
    A, D, Z = (
        random.standard_normal((9, 5)),
        random.standard_normal((4, 5)) / 4,
        random.random((9, 4)),
    )
    Z[:, 1] = 0  # an atom that is not used stays
    Z[:, 3] *= 100  # and this one's best place is well within the ball
    ours, products, gram = tensors(D, Z.T @ A, Z.T @ Z)
    descent._dictionary_sweep(ours, products, gram)
    for j in (0, 2, 3):
        rest = A - sum(np.outer(Z[:, k], D[k]) for k in range(4) if k != j)
        best = Z[:, j] @ rest / (Z[:, j] @ Z[:, j])
        D[j] = best / max(1.0, np.linalg.norm(best))
    np.testing.assert_allclose(ours.numpy(), D, atol=1e-12)
    assert np.linalg.norm(D[3]) < 1


def test_blocks_of_samples_change_nothing(monkeypatch):
    A, D = tensors(activations(), np.random.default_rng(0).standard_normal((5, 30)))
    whole = exact_codes(D, A, 1.0)
    monkeypatch.setattr(descent, "_BLOCK", 7)
    torch.testing.assert_close(exact_codes(D, A, 1.0), whole, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 8),
    st.integers(1, 6),
    st.floats(0.01, 5),
    st.floats(0, 0.999),
    st.integers(0, 2**20),
)
def test_codes_meet_the_conditions_of_a_minimum(n, d, k, penalty, alike, seed):
    random = np.random.default_rng(seed)
    A, D = random.standard_normal((n, d)), random.standard_normal((k, d))
    D = (1 - alike) * D + alike * D[0]  # up to atoms that are almost the same
    Z = exact_codes(*tensors(D, A), penalty).numpy()
    gradient = 2 * (Z @ D - A) @ D.T + penalty
    assert (Z >= 0).all()
    assert (gradient >= -1e-6).all()
    assert np.abs(gradient[Z > 1e-9]).max(initial=0) <= 1e-6


def test_codes_are_those_of_scikit_learns_lasso_with_half_the_penalty():
    A = activations()
    model = SemiNMF(6, penalty=2.0).fit(A)
    ours = model.transform(A)
    D = model.components_
    theirs = sparse_encode(A, D, algorithm="lasso_cd", alpha=1.0, positive=True, max_iter=10_000)
    np.testing.assert_allclose(ours, theirs, atol=5e-3 * ours.max())
    assert objective(A, ours, D, 2.0) <= objective(A, theirs, D, 2.0) * (1 + 1e-12)
    lasso = Lasso(
        alpha=1.0 / len(D[0]), positive=True, fit_intercept=False, tol=1e-12, max_iter=100_000
    ).fit(D.T, A[3])
    np.testing.assert_allclose(ours[3], lasso.coef_, atol=1e-6)


def test_almost_equal_atoms_get_exact_codes_without_a_warning():
    D = np.random.default_rng(0).standard_normal((3, 10)) * 1e-3 + 1
    A = activations(d=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Z = exact_codes(*tensors(D, A), 0.1).numpy()
    gradient = 2 * (Z @ D - A) @ D.T + 0.1
    assert gradient.min() > -1e-6
    assert np.abs(gradient[Z > 1e-6]).max() < 1e-6


def test_equal_atoms_leave_the_codes_finite():
    A, D = activations(), np.ones((3, 30))
    Z = exact_codes(*tensors(D, A), 0.1).numpy()
    once = exact_codes(*tensors(D[:1], A), 0.1).numpy()
    np.testing.assert_allclose(Z.sum(axis=1), once[:, 0], rtol=1e-9)


@pytest.mark.parametrize(("dtype", "rounding"), [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize(
    ("n", "d", "k"), [(80, 30, 6), (25, 90, 6), (90, 6, 6), (60, 5, 9), (150, 120, 12)]
)
def test_the_objective_never_rises_and_is_what_it_says(dtype, rounding, n, d, k):
    A = activations(n, d).astype(dtype)
    model = SemiNMF(k, penalty=1.0).fit(A)
    values = np.array(model.objective_)
    assert (np.diff(values) <= rounding * values[0]).all()
    assert (model.n_iter_, model.converged_) == (len(values) - 1, True)
    Z = model.transform(A)
    assert (Z >= 0).all()
    assert (np.linalg.norm(model.components_, axis=1) <= 1 + 1e-6).all()
    true = objective(A.astype(float), Z.astype(float), model.components_.astype(float), 1.0)
    assert values[-1] == pytest.approx(true, rel=max(rounding, 1e-10))


@pytest.mark.parametrize("penalty", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("n", "d", "k"), [(80, 30, 6), (25, 90, 6), (120, 20, 4), (200, 60, 8)])
def test_the_minimum_is_no_higher_than_scikit_learns(n, d, k, penalty):
    A = activations(n, d, k=8)
    ours = SemiNMF(k, penalty=penalty).fit(A).objective_[-1]
    with warnings.catch_warnings():
        # its lassos do not converge, least of all without a penalty
        warnings.simplefilter("ignore")
        theirs = DictionaryLearning(
            k,
            alpha=penalty / 2,
            positive_code=True,
            fit_algorithm="cd",
            transform_algorithm="lasso_cd",
            max_iter=300,
            random_state=0,
        ).fit(A)
        D = theirs.components_
    assert ours <= objective(A, exact_codes(*tensors(D, A), penalty).numpy(), D, penalty) * (
        1 + 1e-3
    )


def test_the_dictionary_cannot_be_improved_outside_the_subspace():
    A = activations(150, 120, k=12, noise=1.0)
    model = SemiNMF(5, penalty=1.0, tol=1e-10, max_iter=5000).fit(A)
    Z, D = model.transform(A), model.components_
    gradient = 2 * Z.T @ (Z @ D - A)
    tangent = gradient - (gradient * D).sum(axis=1, keepdims=True) * D  # at atoms of norm 1
    np.testing.assert_allclose(np.linalg.norm(D, axis=1), 1, atol=1e-9)
    assert np.linalg.norm(tangent) < 1e-3 * np.linalg.norm(Z.T @ A)


def test_directions_without_noise_are_found():
    A = activations(300, 40, k=5, noise=0.0, offset=0.0)
    model = SemiNMF(5, penalty=0.02, max_iter=3000).fit(A)
    assert np.linalg.norm(A - model.reconstruct(A)) < 0.02 * np.linalg.norm(A)
    random = np.random.default_rng(0).standard_normal((5, 40))
    cosines = model.components_ @ (random / np.linalg.norm(random, axis=1, keepdims=True)).T
    assert cosines.max(axis=0).min() > 0.95


def test_unused_atoms_begin_anew_and_the_objective_stays():
    A = torch.from_numpy(activations())
    space = descent._Subspace(A.T.contiguous(), float(A.square().sum()), 1.0)
    D = torch.nn.functional.normalize(
        torch.from_numpy(np.random.default_rng(0).standard_normal((4, 30)))
    )
    D[2] = -torch.nn.functional.normalize(A.mean(dim=0), dim=0)
    Z = torch.zeros(4, 80, dtype=torch.float64)
    _, point = space.step(Z, D, Z, 0.0)
    assert point.Z[2].amax() == 0
    value = objective(A.numpy(), point.Z.numpy().T, point.D.numpy(), 1.0)
    rest = (A - point.Z.T @ point.D).norm(dim=1)
    assert space.revive(point)
    assert objective(A.numpy(), point.Z.numpy().T, point.D.numpy(), 1.0) == pytest.approx(
        value, rel=1e-12
    )
    assert point.D[2].norm() == pytest.approx(1)
    _, after = space.step(point.Z, point.D, point.Z, 0.0)
    assert after.Z[2, rest.argmax()] > 0
    assert after.value < value
    assert not space.revive(after)


def test_atoms_that_would_not_be_used_either_are_left():
    D = torch.nn.functional.normalize(
        torch.tensor([[1.0, 1, 1], [-1, -1, -1]], dtype=torch.float64)
    )
    A = 2 * D[:1] + torch.eye(5, 3, dtype=torch.float64) / 100
    space = descent._Subspace(A.T.contiguous(), float(A.square().sum()), 1.0)
    point = descent._Point(torch.tensor([[2.0] * 5, [0.0] * 5], dtype=torch.float64), D.clone())
    assert not space.revive(point)  # what is left is smaller than half of the penalty
    assert torch.equal(point.D[1], D[1])


def test_the_same_seed_gives_the_same_dictionary_on_any_number_of_threads():
    A = activations()
    first, second, third = (SemiNMF(6, seed=seed).fit(A) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.components_, second.components_)
    assert first.objective_ == second.objective_
    assert not np.array_equal(first.components_, third.components_)


def test_threads_are_as_before():
    before = torch.get_num_threads()
    SemiNMF(2).fit(activations())
    assert torch.get_num_threads() == before


def test_too_few_steps_are_reported():
    with pytest.warns(ConvergenceWarning, match="no convergence in 2 steps"):
        model = SemiNMF(6, max_iter=2).fit(activations())
    assert (model.converged_, model.n_iter_) == (False, 2)


def test_a_larger_penalty_gives_sparser_codes_and_one_beyond_all_activations_is_refused():
    A = activations()
    shares = [
        (SemiNMF(6, penalty=penalty).fit_transform(A) > 0).mean() for penalty in (0.0, 4.0, 12.0)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    largest = np.linalg.norm(A, axis=1).max()
    with pytest.raises(InputError, match="every code is 0"):
        SemiNMF(6, penalty=2 * largest).fit(A)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("penalty", -1.0),
        ("penalty", math.nan),
        ("penalty", math.inf),
        ("tol", -1e-9),
        ("max_iter", 0),
        ("seed", -1),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} is"):
        SemiNMF(3, **{name: value}).fit(activations())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("side", ["dictionary", "activations"])
def test_codes_of_what_is_not_finite_are_refused_and_end(bad, side):
    D, A = (torch.from_numpy(activations(n, 6, 3)) for n in (4, 9))
    {"dictionary": D, "activations": A}[side][2, 1] = bad
    D, A = (D, A * 1e200) if bad == 1e200 else (D, A)
    with pytest.raises(InputError, match="NaN or infinite"):
        exact_codes(D, A, 0.5)


def test_samples_of_zero_have_zero_codes_and_all_zero_activations_are_refused():
    model = SemiNMF(3).fit(activations())
    assert not model.transform(np.zeros((2, 30))).any()
    with pytest.raises(InputError, match="all 10 samples are the same"):
        SemiNMF(3).fit(np.zeros((10, 4)))
