"""Similarity against a double loop in float64, for all modes, pairs
and shapes, ragged ones included.
"""

from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.made_states import states_of
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.errors import InputError, LayerError
from xlvlms_tutorial.methods.alignment.similarity import (
    BY_PAIR,
    BY_TOKEN,
    POOLED,
    Tokens,
    examples,
    similarity,
)

# the package offers a function of this name
module = import_module("xlvlms_tutorial.methods.alignment.similarity")
ALL_PAIRS = POOLED + BY_PAIR
few = settings(max_examples=25, deadline=None)
counts = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def random_tokens(sizes, d=7, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(t, d, generator=random) + 0.3).to(dtype) for t in sizes]


def one_pair(x, y, mode):
    """The definition, for one pair of examples, in float64."""
    x, y = x.double().numpy(), y.double().numpy()
    cosine = lambda u, v: u @ v / (np.linalg.norm(u) * np.linalg.norm(v))
    if mode == "avg":
        return cosine(x.mean(0), y.mean(0))
    s = np.array([[cosine(u, v) for v in y] for u in x])
    if mode == "max_mean":
        return s.max(axis=1).mean()
    return getattr(np, mode.removeprefix("token_"))(np.diag(s) if mode in BY_TOKEN else s)


def loop(x, y, mode):
    return np.array([[one_pair(a, b, mode) for b in y] for a in x])


@pytest.mark.parametrize("mode", ALL_PAIRS)
@given(counts, counts, st.integers(0, 99))
@few
def test_all_pairs_agree_with_a_double_loop(mode, of_x, of_y, seed):
    x, y = random_tokens(of_x, seed=seed), random_tokens(of_y, seed=seed + 100)
    result = similarity(x, y, mode)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, loop(x, y, mode), atol=1e-6)


@pytest.mark.parametrize("mode", ALL_PAIRS)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5),
    st.integers(0, 99),
)
@few
def test_matched_pairs_are_the_diagonal_of_all_pairs(mode, sizes, seed):
    x, y = (
        random_tokens([a for a, _ in sizes], seed=seed),
        random_tokens([b for _, b in sizes], seed=seed + 100),
    )
    result = similarity(x, y, mode, "matched")
    assert result.shape == (len(sizes),)
    np.testing.assert_allclose(result, np.diag(loop(x, y, mode)), atol=1e-6)


@pytest.mark.parametrize("mode", BY_TOKEN)
@given(counts, st.integers(0, 99))
@few
def test_token_by_token_agrees_with_the_diagonal_of_each_pair(mode, sizes, seed):
    x, y = random_tokens(sizes, seed=seed), random_tokens(sizes, seed=seed + 100)
    np.testing.assert_allclose(
        similarity(x, y, mode, "matched"),
        [one_pair(*pair, mode) for pair in zip(x, y, strict=True)],
        atol=1e-6,
    )


@pytest.mark.parametrize("mode", ALL_PAIRS)
@pytest.mark.parametrize("pairs", ["all", "matched"])
def test_blocks_do_not_change_the_result(monkeypatch, mode, pairs):
    x, y = random_tokens([3, 5, 3, 1, 5, 3]), random_tokens([2, 2, 4, 2, 4, 1], seed=1)
    whole = similarity(x, y, mode, pairs)
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(Tokens.alike, "__defaults__", (1,))
    torch.testing.assert_close(similarity(x, y, mode, pairs), whole)


@pytest.mark.parametrize("mode", ALL_PAIRS)
def test_one_tensor_is_the_same_as_a_list(mode):
    x, y = random_tokens([4] * 5), random_tokens([3] * 6, seed=1)
    torch.testing.assert_close(
        similarity(torch.stack(x), torch.stack(y), mode), similarity(x, y, mode), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2],
)
@pytest.mark.parametrize("mode", ALL_PAIRS)
def test_number_formats(mode, dtype, computed):
    x, y = random_tokens([3, 2], dtype=dtype), random_tokens([2, 4], seed=1, dtype=dtype)
    result = similarity(x, y, mode)
    assert result.dtype == computed
    np.testing.assert_allclose(
        result, loop(x, y, mode), atol=1e-6 if computed == torch.float32 else 1e-14
    )
    assert similarity(x, random_tokens([2, 4]), mode).dtype == computed


@given(counts, st.integers(0, 99))
@few
def test_invariants(sizes, seed):
    x, y = random_tokens(sizes, seed=seed), random_tokens(sizes[::-1], seed=seed + 100)
    scores = {mode: similarity(x, y, mode) for mode in ALL_PAIRS}
    slack = 1e-6
    assert (scores["max"] + slack >= scores["median"]).all()
    assert (scores["median"] + slack >= scores["min"]).all()
    assert (scores["max"] + slack >= scores["max_mean"]).all()
    assert (scores["max_mean"] + slack >= scores["mean"]).all()
    for mode in ALL_PAIRS:
        torch.testing.assert_close(
            similarity([1000 * t for t in x], [t / 64 for t in y], mode),
            scores[mode],
            rtol=0,
            atol=2e-6,
        )
        if mode != "max_mean":
            torch.testing.assert_close(similarity(y, x, mode), scores[mode].T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ALL_PAIRS)
def test_of_one_token_each_every_mode_is_the_cosine(mode):
    x, y = random_tokens([1] * 4), random_tokens([1] * 3, seed=1)
    expected = torch.nn.functional.cosine_similarity(
        torch.cat(x)[:, None], torch.cat(y)[None], dim=-1
    )
    torch.testing.assert_close(similarity(x, y, mode), expected, rtol=0, atol=1e-6)


def test_an_example_is_like_itself_and_never_more():
    x = random_tokens([5, 3, 4])
    assert similarity(x, x, "avg").diagonal().tolist() == pytest.approx([1, 1, 1])
    assert similarity(x, x, "max").max() <= 1
    assert similarity(x, [-t for t in x], "min").min() >= -1
    assert similarity(x, x, "max_mean", "matched").tolist() == pytest.approx([1, 1, 1])


def test_inputs_are_left_as_they_are():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for mode in ALL_PAIRS:
        similarity(x, x, mode)
    assert torch.equal(x, before)


def test_examples_are_split_by_sample_in_order():
    states = states_of([2, 0, 1, 2, 0], rows=1)
    groups = examples(states, 0)
    assert [tokens[:, 0].tolist() for tokens in groups] == [[0, 0], [1], [2, 2]]
    twice = examples(states_of([0, 1], rows=2), 3)
    assert [tokens[:, 0].tolist() for tokens in twice] == [[0, 0.25], [2, 2.25]]


def test_examples_must_be_there():
    with pytest.raises(LayerError):
        examples(states_of([0, 1]), 4)
    with pytest.raises(InputError, match="mlp_out"):
        examples(states_of([0, 1]), 0, "mlp_out")
    with pytest.raises(InputError, match="one row"):
        examples(states_of([0, 1]), 3, "mlp_out")
    empty = Activations(
        {(0, "resid_post"): torch.zeros(0, 4)}, pd.DataFrame({"sample": [], "id": []}), {}
    )
    with pytest.raises(InputError, match="shape"):
        examples(empty, 0)


@pytest.mark.parametrize("mode", [*ALL_PAIRS, *BY_TOKEN])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tokens_must_be_finite(mode, bad):
    x = random_tokens([3, 3])
    x[1][2, 4] = bad
    with pytest.raises(InputError, match="1 of 6 tokens"):
        similarity(random_tokens([3, 3], seed=1), x, mode, "matched")


@pytest.mark.parametrize("mode", [*ALL_PAIRS, *BY_TOKEN])
def test_tokens_must_have_a_direction(mode):
    x = random_tokens([3, 3])
    x[0][1] = 0
    with pytest.raises(InputError, match="1 of 6 tokens"):
        similarity(x, random_tokens([3, 3], seed=1), mode, "matched")


def test_a_mean_of_opposite_tokens_has_no_direction():
    x = [torch.tensor([[1.0, 2.0], [-1.0, -2.0]])]
    with pytest.raises(InputError, match="no direction"):
        similarity(x, x, "avg")
    assert similarity(x, x, "mean").item() == pytest.approx(0)


@pytest.mark.parametrize(
    "none", [[], [torch.zeros(0, 7)], torch.zeros(0, 2, 7), torch.zeros(2, 0, 7)]
)
def test_there_must_be_tokens(none):
    with pytest.raises(InputError, match="none"):
        similarity(none, random_tokens([2]))


def test_what_does_not_belong_together_raises():
    with pytest.raises(InputError, match="7 and 8"):
        similarity(random_tokens([2]), random_tokens([2], d=8))
    with pytest.raises(InputError, match="widths of examples"):
        similarity([*random_tokens([2]), *random_tokens([2], d=8)], random_tokens([2]))
    with pytest.raises(InputError, match="x: 2, y: 3"):
        similarity(random_tokens([2, 2]), random_tokens([2, 2, 2]), pairs="matched")
    with pytest.raises(InputError, match="example 1 differ: 2 and 3"):
        similarity(random_tokens([2, 2]), random_tokens([2, 3]), "token_mean", "matched")


def test_unknown_choices_name_the_allowed_ones():
    x = random_tokens([2])
    with pytest.raises(InputError, match="max_mean"):
        similarity(x, x, "normal")
    with pytest.raises(InputError, match="matched"):
        similarity(x, x, pairs="diagonal")
    with pytest.raises(InputError, match="needs pairs='matched'"):
        similarity(x, x, "token_mean")
    with pytest.raises(InputError, match="median"):
        Tokens.of(x).reduced("frobenius")
