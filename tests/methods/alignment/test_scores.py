"""Cones and the alignment score against double loops in float64, the bootstrap against plain
resampling, and the defects of upstream.
"""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.geometry import cosine
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.errors import InputError, LayerError
from xlvlms_tutorial.methods.alignment.scores import (
    alignment,
    alignment_profile,
    cones,
    layers_at,
    narrowness,
    shared_layers,
    shuffle_labels,
)
from xlvlms_tutorial.methods.alignment.similarity import BY_PAIR, POOLED, similarity
from xlvlms_tutorial.metrics.intervals import Estimate

LAYERS, D = (0, 1, 2, 4), 6
FAST = {"n_resamples": 200}


def captured(
    n=5, tokens=3, seed=0, layers=LAYERS, d=D, sites=("resid_post",), ids="s", shift=0.0
) -> Activations:
    """Random states with ``tokens`` rows a sample, or a number of rows for each."""
    random = torch.Generator().manual_seed(seed)
    sizes = [tokens] * n if isinstance(tokens, int) else tokens
    sample = np.repeat(np.arange(n), sizes)
    table = pd.DataFrame({"sample": sample, "id": [f"{ids}{k}" for k in sample]})
    keys = product(layers, sites)
    return Activations(
        {key: torch.randn(sum(sizes), d, generator=random) + shift for key in keys},
        table,
        {"model": ids},
    )


def tokens_at(states, layer, sample):
    return (
        states[layer, "resid_post"].double().numpy()[(states.table["sample"] == sample).to_numpy()]
    )


def pooled(p, t, layer_p, layer_t, n=5):
    """Cosine of mean tokens for all pairs of samples, by loop."""
    cosines = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            mean_p = tokens_at(p, layer_p, i).mean(0)
            cosines[i, j] = cosine(mean_p, tokens_at(t, layer_t, j).mean(0))
    return cosines


P, T = captured(seed=1, shift=0.5), captured(tokens=[2, 4, 1, 4, 2], seed=2, shift=0.3)


def test_the_layer_of_the_perceptual_tokens_follows_upstream_stuck_at_the_first():
    by_layer, by_input = (
        alignment_profile(P, T, reading=reading, **FAST) for reading in ("layer", "input")
    )
    assert by_layer["layer"].tolist() == by_input["layer"].tolist() == list(LAYERS)
    for row, layer in enumerate(LAYERS):
        assert by_layer["value"][row] == pytest.approx(pooled(P, T, layer, layer).mean(), abs=1e-6)
        assert by_input["value"][row] == pytest.approx(pooled(P, T, 0, layer).mean(), abs=1e-6)
    assert (by_layer["value"][1:] - by_input["value"][1:]).abs().min() > 1e-3


@pytest.mark.parametrize("mode", POOLED + BY_PAIR)
@pytest.mark.parametrize("pairs", ["all", "matched"])
def test_at_layer_0_the_score_is_the_similarity_at_layer_0_in_both_readings(mode, pairs):
    first, second = (
        alignment_profile(P, T, mode=mode, pairs=pairs, reading=reading, **FAST)
        for reading in ("layer", "input")
    )
    pd.testing.assert_series_equal(first.iloc[0], second.iloc[0], rtol=1e-6)


def test_all_pairs_are_used_for_all_and_the_diagonal_alone_for_matched():
    s = pooled(P, T, 2, 2)
    every, matched = (
        alignment_profile(P, T, pairs=pairs, **FAST).set_index("layer")["value"]
        for pairs in ("all", "matched")
    )
    assert every[2] == pytest.approx(s.mean(), abs=1e-6)
    assert matched[2] == pytest.approx(s.diagonal().mean(), abs=1e-6)
    assert abs(every[2] - matched[2]) > 1e-3


def test_score_and_slope_are_of_the_profile_with_one_bootstrap_for_all_layers():
    result = alignment(P, T, **FAST)
    values = result.profile["value"].to_numpy()
    assert result.score.value == pytest.approx(values.mean())
    assert result.slope.value == pytest.approx(np.polyfit(np.array(LAYERS) / 4, values, 1)[0])
    slopes = np.polyfit(np.array(LAYERS) / 4, result.resampled.T, 1)[0]
    assert (result.slope.low, result.slope.high) == pytest.approx(
        tuple(np.nanquantile(slopes, [0.025, 0.975]))
    )
    assert result.n == result.score.n == 5


def plain(n, n_resamples=200, seed=0):
    return np.random.default_rng(seed).integers(n, size=(n_resamples, n))


def test_independent_samples_are_resampled_on_their_own():
    strangers = captured(n=4, seed=3, ids="t")
    result = alignment(P, strangers, **FAST)
    s = similarity(
        [torch.from_numpy(tokens_at(P, 1, i)) for i in range(5)],
        [torch.from_numpy(tokens_at(strangers, 1, j)) for j in range(4)],
    ).numpy()
    expected = [
        s[np.ix_(rows, columns)].mean()
        for rows, columns in zip(plain(5), plain(4, seed=1), strict=True)
    ]
    np.testing.assert_allclose(result.resampled[:, 1], expected, atol=1e-6)
    assert result.n == 9
    assert result.values[1] == pytest.approx(s.mean(), abs=1e-6)


def test_the_same_samples_are_resampled_together_and_matched_pairs_keep_their_share():
    result, s = alignment(P, T, **FAST), pooled(P, T, 1, 1)
    expected = []
    for draw in plain(5):
        others = [s[i, j] for i in draw for j in draw if i != j]
        expected.append(
            s.diagonal()[draw].mean() / 5 + np.mean(others) * 4 / 5 if others else np.nan
        )
    np.testing.assert_allclose(result.resampled[:, 1], expected, atol=1e-6)


def test_matched_pairs_are_resampled_as_pairs():
    result, s = alignment(P, T, pairs="matched", **FAST), pooled(P, T, 4, 4).diagonal()
    np.testing.assert_allclose(result.resampled[:, 3], s[plain(5)].mean(axis=1), atol=1e-6)


@given(st.floats(0.01, 100), st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_scale_does_not_matter_and_swapping_sides_does_not_either(scale, seed):
    p, t = captured(seed=seed), captured(seed=seed + 1)
    scaled = Activations(
        {key: scale * rows for key, rows in p.tensors.items()}, p.table, p.provenance
    )
    first, second, swapped = (
        alignment(p, t, **FAST).score,
        alignment(scaled, t, **FAST).score,
        alignment(t, p, **FAST).score,
    )
    assert (second.value, second.low, second.high) == pytest.approx(
        (first.value, first.low, first.high), abs=1e-5
    )
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
        (first.value, first.low, first.high), abs=1e-6
    )


def test_a_known_slope_is_found():
    angle = [0.9, 0.6, 0.3]  # cosine falls with the angle: the slope is positive
    table = pd.DataFrame({"sample": range(4), "id": [f"s{k}" for k in range(4)]})
    p = Activations(
        {(layer, "resid_post"): torch.tensor([[1.0, 0.0]] * 4) for layer in range(3)}, table, {}
    )
    t = Activations(
        {
            (layer, "resid_post"): torch.tensor([[np.cos(a), np.sin(a)]] * 4).float()
            for layer, a in enumerate(angle)
        },
        table,
        {},
    )
    slope = alignment(p, t).slope
    assert slope.value == pytest.approx(np.cos(0.3) - np.cos(0.9), abs=1e-6)
    assert (slope.low, slope.high) == pytest.approx((slope.value, slope.value), abs=1e-6)


def test_other_sites_inside_a_block():
    p, t = (captured(seed=seed, layers=(1, 2), sites=("mlp_out", "resid_post")) for seed in (1, 2))
    table = alignment_profile(p, t, site="mlp_out", **FAST)
    expected = [
        cosine(x.double().numpy().mean(0), y.double().numpy().mean(0))
        for x, y in [(p[2, "mlp_out"][:3], t[2, "mlp_out"][:3])]
    ]
    assert similarity([p[2, "mlp_out"][:3]], [t[2, "mlp_out"][:3]]).item() == pytest.approx(
        expected[0], abs=1e-6
    )
    assert table["value"].tolist() != pytest.approx(
        alignment_profile(p, t, **FAST)["value"].tolist()
    )
    with pytest.raises(InputError, match="attn_out"):
        alignment(p, t, site="attn_out")
    with pytest.raises(LayerError, match="layer 0"):
        alignment(p, t, reading="input")


def test_for_the_input_the_perceptual_tokens_are_needed_at_layer_0_alone():
    only = captured(seed=1, shift=0.5, layers=(0,))
    found = alignment(only, T, reading="input", **FAST)
    assert found.score == alignment(P, T, reading="input", **FAST).score


def test_states_that_do_not_belong_together_raise():
    with pytest.raises(InputError, match="layers at site 'resid_post' differ"):
        alignment(P, captured(layers=(0, 1)))
    with pytest.raises(InputError, match="6 and 7"):
        alignment(P, captured(d=7))
    with pytest.raises(InputError, match="samples differ: 5 from s0 to s4 and 5 from t0 to t4"):
        alignment(P, captured(ids="t"), pairs="matched")
    with pytest.raises(InputError):
        alignment(P, captured(n=4), pairs="matched")
    with pytest.raises(InputError, match="allowed: layer, input"):
        alignment(P, T, reading="imagelayer0")
    with pytest.raises(InputError, match="max_mean"):
        alignment(P, T, mode="sum")
    single = alignment(captured(layers=(2,)), captured(layers=(2,)))
    with pytest.raises(InputError, match="a slope over layer 2 alone"):
        _ = single.slope
    assert (layers_at(P), shared_layers(P, T)) == ([*LAYERS], [*LAYERS])


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("pairs", ["all", "matched"])
def test_too_few_examples_raise(n, pairs):
    with pytest.raises(InputError, match=f"{n} example"):
        alignment(captured(n=n), captured(n=n, seed=1), pairs=pairs)


def three_cones(n=6, spread=0.1, seed=0):
    """Three groups around three axes."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: list(torch.eye(8)[k] + spread * torch.randn(n, 2, 8, generator=random))
        for k, name in enumerate(("I", "V", "T"))
    }


def test_cones_agree_with_loops_over_pairs():
    groups = three_cones()
    table = cones(groups, **FAST).set_index(["a", "b"])
    means = {
        name: [tokens.double().numpy().mean(0) for tokens in group]
        for name, group in groups.items()
    }
    for name, group in means.items():
        others = [cosine(u, v) for i, u in enumerate(group) for j, v in enumerate(group) if i != j]
        assert table.loc[(name, name), "value"] == pytest.approx(np.mean(others), abs=1e-6)
        assert tuple(table.loc[(name, name), ["kind", "n"]]) == ("intra", 6)
    for pair in (("I", "V"), ("I", "T"), ("V", "T")):
        every = [cosine(u, v) for u in means[pair[0]] for v in means[pair[1]]]
        assert table.loc[pair, "value"] == pytest.approx(np.mean(every), abs=1e-6)
        assert tuple(table.loc[pair, ["kind", "n"]]) == ("inter", 12)
    assert len(table) == 6
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_an_example_is_never_compared_with_itself():
    apart = {"a": torch.eye(4)[:, None]}
    assert cones(apart).loc[0, ["value", "low", "high"]].tolist() == [0, 0, 0]


def test_intervals_are_over_examples_and_wider_than_those_over_pairs():
    groups = {
        "a": torch.randn(12, 1, 3, generator=torch.Generator().manual_seed(0))
        + torch.tensor([1.0, 0, 0])
    }
    s = similarity(groups["a"], groups["a"]).double().numpy()
    draws = np.random.default_rng(0).integers(12, size=(400, 12))
    expected = [np.mean([s[i, j] for i in draw for j in draw if i != j]) for draw in draws]
    row = cones(groups, n_resamples=400).iloc[0]
    assert (row["low"], row["high"]) == pytest.approx(
        tuple(np.quantile(expected, [0.025, 0.975])), abs=1e-6
    )
    over_pairs = 2 * 1.96 * s[~np.eye(12, dtype=bool)].std() / np.sqrt(12 * 11)
    assert row["high"] - row["low"] > 1.5 * over_pairs


def test_narrowness_is_large_with_cones_and_none_when_labels_are_shuffled():
    groups = three_cones(n=20)
    result = narrowness(groups)
    table = cones(groups).groupby("kind")["value"].mean()
    assert result.value == pytest.approx(table["intra"] - table["inter"])
    assert result.low > 0.7
    assert result.n == 60
    null = [narrowness(shuffle_labels(groups, seed), n_resamples=100).value for seed in range(30)]
    assert abs(np.mean(null)) < 0.02
    assert max(null) < 0.2


def test_shuffling_keeps_the_examples_and_the_sizes():
    groups = {
        "a": list(torch.arange(6.0).reshape(3, 2, 1)),
        "b": list(torch.arange(10.0, 14).reshape(2, 2, 1)),
    }
    dealt = shuffle_labels(groups, 1)
    assert {name: len(group) for name, group in dealt.items()} == {"a": 3, "b": 2}
    assert sorted(tokens[0].item() for group in dealt.values() for tokens in group) == [
        0,
        2,
        4,
        10,
        12,
    ]
    assert [t[0].item() for t in shuffle_labels(groups, 1)["a"]] == [
        t[0].item() for t in dealt["a"]
    ]
    assert any(
        [t[0].item() for t in shuffle_labels(groups, seed)["a"]] != [0, 2, 4] for seed in range(5)
    )


def test_paired_groups_are_resampled_together():
    base = torch.randn(20, 1, 8, generator=torch.Generator().manual_seed(0)) + 1
    groups = {"a": base, "b": base + 1e-3}
    paired, alone = narrowness(groups, paired=True), narrowness(groups)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    assert (paired.n, alone.n) == (20, 40)
    assert paired.value == pytest.approx(alone.value)
    assert cones(groups, paired=True)["n"].tolist() == [20, 20, 20]


def test_cones_need_groups_of_examples():
    with pytest.raises(InputError, match="no groups"):
        cones({})
    with pytest.raises(InputError, match="no groups"):
        shuffle_labels({})
    with pytest.raises(InputError, match="1 group"):
        narrowness({"a": torch.ones(3, 1, 2)})
    with pytest.raises(InputError, match="1 example;"):
        cones({"a": torch.ones(1, 1, 2)})
    with pytest.raises(InputError, match="a: 3, b: 4"):
        cones({"a": torch.ones(3, 1, 2), "b": torch.ones(4, 1, 2)}, paired=True)
    with pytest.raises(InputError, match="allowed for all pairs"):
        cones({"a": torch.ones(3, 1, 2)}, mode="token_mean")
    with pytest.raises(InputError, match="widths"):
        cones({"a": torch.ones(3, 1, 2), "b": torch.ones(4, 1, 3)})


def test_a_score_is_an_estimate_that_a_claim_can_record():
    assert isinstance(alignment(P, T, **FAST).score, Estimate)
    assert isinstance(narrowness(three_cones(), **FAST), Estimate)
