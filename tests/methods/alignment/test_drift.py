"""Consecutive cosines and norms against loops over the same tokens,
the probe against scikit-learn.
"""

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.support.geometry import cosine
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.errors import InputError, LayerError
from xlvlms_tutorial.methods.alignment import drift
from xlvlms_tutorial.methods.alignment.drift import (
    consecutive_profile,
    linear_probe,
    norms,
    persistence,
)
from xlvlms_tutorial.methods.alignment.scores import alignment_profile
from xlvlms_tutorial.methods.alignment.similarity import STATISTICS, examples, similarity
from xlvlms_tutorial.methods.probes import deal_folds
from xlvlms_tutorial.metrics.intervals import bootstrap, proportion
from xlvlms_tutorial.models.anatomy import SITES

SIZES = [3, 1, 4, 3, 2]
FAST = {"n_resamples": 200}


def captured(
    sizes=SIZES, layers=(0, 1, 2, 5), d=6, seed=0, shift=0.0, ids="s", site="resid_post"
) -> Activations:
    random = torch.Generator().manual_seed(seed)
    sample = np.repeat(np.arange(len(sizes)), sizes)
    table = pd.DataFrame({"sample": sample, "id": [f"{ids}{k}" for k in sample]})
    return Activations(
        {(layer, site): torch.randn(sum(sizes), d, generator=random) + shift for layer in layers},
        table,
        {},
    )


def tokens(states, layer):
    return [part.double().numpy() for part in examples(states, layer)]


def test_consecutive_similarity_is_of_the_same_token_of_the_same_example():
    states = captured(shift=0.4)
    x, y = tokens(states, 1), tokens(states, 2)
    expected = []
    for a, b in zip(x, y, strict=True):
        expected.append(np.mean([cosine(u, v) for u, v in zip(a, b, strict=True)]))
    np.testing.assert_allclose(
        similarity(examples(states, 1), examples(states, 2), "token_mean", "matched"),
        expected,
        atol=1e-6,
    )
    row = consecutive_profile(states, **FAST).set_index("layer").loc[1]
    assert row["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    every_pair = similarity(examples(states, 1), examples(states, 2), "mean").mean().item()
    assert abs(row["value"] - every_pair) > 1e-2  # what upstream averaged
    theirs = bootstrap(expected, **FAST)
    assert (row["low"], row["high"], row["n"]) == pytest.approx(
        (theirs.low, theirs.high, 5), abs=1e-6
    )


def rivals(x, y, others):
    """For each example the mean cosine of its tokens with other tokens, by loop."""
    flat = [(i, k, v) for i, part in enumerate(y) for k, v in enumerate(part)]
    means = []
    for i, part in enumerate(x):
        cosines = []
        for k, u in enumerate(part):
            if others == "neighbour":
                cosines.append(cosine(u, y[i][k - 1]))
                continue
            cosines += [cosine(u, v) for j, m, v in flat if (j, m) != (i, k)]
        means.append(np.mean(cosines))
    return means


@pytest.mark.parametrize("others", ["all", "neighbour"])
@given(st.lists(st.integers(2, 4), min_size=2, max_size=5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_rival_is_the_mean_over_all_other_tokens(others, sizes, seed):
    states = captured(sizes, layers=(0, 1), seed=seed, shift=0.4)
    expected = rivals(tokens(states, 0), tokens(states, 1), others)
    profile = consecutive_profile(states, others=others, **FAST)
    assert profile["rival"][0] == pytest.approx(np.mean(expected), abs=1e-6)
    own = similarity(examples(states, 0), examples(states, 1), "token_mean", "matched").numpy()
    effect = persistence(states, others=others, **FAST)
    assert effect.value == pytest.approx(np.mean(own - expected), abs=1e-6)


def test_a_sample_of_one_token_has_others_in_other_samples_alone():
    states = captured([1, 3, 2], layers=(0, 1))
    expected = rivals(tokens(states, 0), tokens(states, 1), "all")
    assert consecutive_profile(states, **FAST)["rival"][0] == pytest.approx(np.mean(expected))
    with pytest.raises(InputError, match="one token"):
        consecutive_profile(states, others="neighbour")
    with pytest.raises(InputError, match="'all', 'neighbour'"):
        persistence(states, others="picture")


def test_steps_are_in_layers_not_in_captured_ones():
    states = captured()
    table = consecutive_profile(states, **FAST)
    assert table[["layer", "to"]].values.tolist() == [[0, 1], [1, 2]]
    assert consecutive_profile(states, step=4, **FAST)[["layer", "to"]].values.tolist() == [[1, 5]]
    assert consecutive_profile(states, step=3, **FAST)["layer"].tolist() == [2]
    for step in (7, 0, -1):
        with pytest.raises(InputError, match="captured at site 'resid_post': 0, 1, 2, 5"):
            consecutive_profile(states, step=step)


def test_tokens_that_do_not_change_have_cosine_1_at_any_length():
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    table = pd.DataFrame({"sample": np.repeat(range(4), 2), "id": np.repeat(list("abcd"), 2)})
    states = Activations({(1, "mlp_out"): rows, (2, "mlp_out"): 3 * rows}, table, {})
    row = consecutive_profile(states, site="mlp_out").iloc[0]
    assert row[["value", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    assert persistence(states, site="mlp_out").value == pytest.approx(1 - row["rival"])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_norms_are_of_tokens_upstreams_mean_was_the_norm_of_the_matrix(statistic):
    states = captured()
    expected = [getattr(np, statistic)(np.linalg.norm(part, axis=1)) for part in tokens(states, 2)]
    table = norms(states, statistic, **FAST)
    row, theirs = table.set_index("layer").loc[2], bootstrap(expected, **FAST)
    assert table.columns.tolist() == ["layer", "value", "low", "high", "n"]
    assert row.tolist() == pytest.approx([theirs.value, theirs.low, theirs.high, 5], abs=1e-5)
    frobenius = np.mean([np.linalg.norm(part) for part in tokens(states, 2)])
    assert row["value"] < frobenius - 0.1


@pytest.mark.parametrize("statistic", STATISTICS)
def test_norms_scale_and_may_be_zero(statistic):
    states = captured()
    scaled = Activations({key: 4 * rows for key, rows in states.tensors.items()}, states.table, {})
    np.testing.assert_allclose(
        norms(scaled, statistic)["value"], 4 * norms(states, statistic)["value"], rtol=1e-6
    )
    zero = Activations({(0, "resid_post"): torch.zeros(14, 3)}, captured([7, 7]).table, {})
    assert norms(zero, statistic)["value"].tolist() == [0]


def test_bad_states_raise():
    states = captured()
    with pytest.raises(InputError, match="median, mean, max, min"):
        norms(states, "frobenius")
    with pytest.raises(InputError, match="mlp_out"):
        norms(states, site="mlp_out")
    for call in (norms, consecutive_profile, persistence):
        with pytest.raises(InputError, match="one sample"):
            call(captured([5]))
        broken = captured()
        broken.tensors[1, "resid_post"][3, 2] = float("nan")
        with pytest.raises(InputError, match="1 of 13"):
            call(broken)
    zero = captured()
    zero.tensors[1, "resid_post"][3] = 0
    with pytest.raises(InputError, match="no direction"):
        consecutive_profile(zero)
    with pytest.raises(InputError):
        similarity(examples(states, 1), examples(states, 2)[:-1], "token_mean", "matched")
    with pytest.raises(InputError, match="token counts"):
        similarity(
            examples(states, 1), examples(captured([3, 1, 4, 3, 1]), 1), "token_mean", "matched"
        )


def dealt(samples, kinds, folds, seed):
    """The fold of each row, when a sample's many rows count once for each side."""
    return deal_folds(*np.array(sorted(set(zip(samples, kinds, strict=True)))).T, folds, seed)[
        samples
    ]


def by_sklearn(a, b, layer, folds, seed=0):
    """The same folds, with scikit-learn's scaler and ridge classifier."""
    samples, kinds = drift._clusters(a, b)
    parts = dealt(samples, kinds, folds, seed)
    x, correct = torch.cat([a[layer], b[layer]]).double().numpy(), np.zeros(len(kinds), dtype=bool)
    for part in range(folds):
        test = parts == part
        probe = make_pipeline(StandardScaler(), RidgeClassifier(1.0, class_weight="balanced")).fit(
            x[~test], kinds[~test]
        )
        correct[test] = probe.predict(x[test]) == kinds[test]
    return correct, samples, kinds


@pytest.mark.parametrize("d", [4, 60])  # fewer columns than rows, and more
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_probe_agrees_with_scikit_learn(d, shift):
    a, b = captured([3] * 8, d=d, shift=shift), captured([2] * 9, d=d, seed=1)
    for layer in (0, 5):
        correct, samples, kinds = by_sklearn(a, b, layer, 4)
        row = linear_probe(a, b, [layer], folds=4, **FAST).iloc[0]
        assert row["value"] == pytest.approx(
            (correct[kinds == 1].mean() + correct[kinds == 0].mean()) / 2
        )
        assert row["n"] == len(correct) == 42
        assert row["low"] < row["value"] < row["high"]


def test_the_probe_finds_what_a_plane_tells_apart_and_nothing_else():
    a, b = (
        captured([2] * 30, layers=(0, 1), shift=2.0),
        captured([2] * 30, layers=(0, 1), seed=1, shift=-2.0),
    )
    table = linear_probe(a, b)
    assert table["value"].tolist() == [1, 1]
    assert table["low"].tolist() == [proportion([True] * 30).low] * 2
    chance = linear_probe(
        captured([2] * 60, layers=(1,), d=3), captured([2] * 60, layers=(1,), d=3, seed=1)
    ).iloc[0]
    assert chance["low"] < 0.5 < chance["high"]


def test_scale_and_shift_of_columns_do_not_matter():
    a, b = captured([3] * 8, shift=0.5), captured([2] * 8, seed=1)
    moved = [
        Activations(
            {key: rows.double() * 1000 + 7 for key, rows in side.tensors.items()}, side.table, {}
        )
        for side in (a, b)
    ]
    pd.testing.assert_frame_equal(linear_probe(a, b, **FAST), linear_probe(*moved, **FAST))


def test_constant_columns_are_no_harm():
    a, b = captured([2] * 8, layers=(1,), shift=0.5), captured([2] * 8, layers=(1,), seed=1)
    wider = [
        Activations(
            {(1, "resid_post"): torch.cat([side[1], torch.full((16, 2), 0.1)], dim=1)},
            side.table,
            {},
        )
        for side in (a, b)
    ]
    pd.testing.assert_frame_equal(linear_probe(a, b, **FAST), linear_probe(*wider, **FAST))


@given(st.integers(5, 12), st.integers(5, 12), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_no_sample_is_in_two_folds_and_every_fold_has_both_kinds(n, m, folds, seed):
    for ids in ("s", "t"):  # the same samples in both, or others
        samples, kinds = drift._clusters(
            captured([2] * n, layers=(1,)), captured([1] * m, layers=(1,), ids=ids)
        )
        parts = dealt(samples, kinds, folds, seed)
        assert all(len(np.unique(parts[samples == sample])) == 1 for sample in np.unique(samples))
        for part in range(folds):
            assert set(kinds[parts != part]) == {0, 1}
        assert len(np.unique(samples)) == (max(n, m) if ids == "s" else n + m)


@pytest.mark.parametrize("folds", [1, 0, -3, float("nan"), float("inf"), 2.5, True, "3", None])
def test_folds_that_are_no_whole_number_are_refused(folds, monkeypatch):
    # its checks refuse some of these already
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="folds is .*; give a whole number of 2 or more"):
        linear_probe(captured(), captured(seed=1), folds=folds)


def test_what_cannot_be_probed_raises():
    a, b = captured(), captured(seed=1)
    same = Activations({key: torch.ones_like(rows) for key, rows in a.tensors.items()}, a.table, {})
    with pytest.raises(InputError, match="all equal"):
        linear_probe(same, same)
    broken = captured()
    broken.tensors[1, "resid_post"][0, 0] = float("inf")
    with pytest.raises(InputError, match="layer 1"):
        linear_probe(broken, b)
    with pytest.raises(InputError, match="5 samples on one side for 6 folds"):
        linear_probe(a, b, folds=6)
    with pytest.raises(InputError, match="at least one layer"):
        linear_probe(a, b, layers=[])
    with pytest.raises(LayerError, match="layer 3"):
        linear_probe(a, b, layers=[3])
    with pytest.raises(InputError, match="layers"):
        linear_probe(a, captured(layers=(0, 1)))
    with pytest.raises(InputError, match="widths"):
        linear_probe(a, captured(d=5))


def test_a_model_is_measured_at_every_site_inside_its_blocks(samples):
    vlm = tiny_llava()
    # of 6 and of 4 tokens
    prompts = ["What colour is the key ?", "Describe the picture ."]
    question = lambda sample: prompts[int(sample.id[1:]) % 2]
    options = {"sites": SITES, "reduce": None, "prompt": question, "layers": "all"}
    p, t = (capture(vlm, samples(6), span=span, **options) for span in ("image", "question"))
    for site in SITES:
        layers = list(range(site != "resid_post", vlm.n_layers + 1))
        assert alignment_profile(p, t, site=site, **FAST)["layer"].tolist() == layers
        for kind in (p, t):
            table = consecutive_profile(kind, site=site, **FAST)
            assert table["layer"].tolist() == layers[:-1]
            assert table[["value", "rival"]].abs().max().max() <= 1 + 1e-6
            rows = kind[1, site].double().norm(dim=1)
            medians = [
                np.median(part)
                for part in np.split(rows, np.flatnonzero(np.diff(kind.table["sample"])) + 1)
            ]
            assert norms(kind, site=site, **FAST).set_index("layer")["value"][1] == pytest.approx(
                np.mean(medians), rel=1e-5
            )
        assert linear_probe(p, t, site=site, folds=3, **FAST)["value"].between(0, 1).all()
