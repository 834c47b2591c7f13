"""Whether shifted concepts find those of the fine-tuned model.

Slow loops, identities, and what each rival is.
"""

from importlib import import_module
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.geometry import cosine
from tests.support.shift import moved
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods import shift
from xlvlms_tutorial.methods.concepts.baselines import KMeans
from xlvlms_tutorial.methods.shift.recovery import (
    NULLS,
    mean_recovery,
    null_shifts,
    recovery,
    recovery_curve,
)
from xlvlms_tutorial.metrics.dictionaries import match_concepts
from xlvlms_tutorial.metrics.intervals import bootstrap

# the package offers a function of this name
module = import_module("xlvlms_tutorial.methods.shift.recovery")
MEASURES = ["cosine_before", "cosine_after", "cosine_gain"]


def fitted(n=80, d=8, k=4, seed=0):
    """States of both models, labels, the shift vectors, and concepts of both."""
    a, b, _ = moved(n, d, k, seed)
    of_a, of_b = KMeans(k).fit(a), KMeans(k).fit(b)
    labels = shift.assign_concepts(of_a.transform(a))
    return a, b, labels, shift.shift_vectors(a, b, labels, k), of_b.components_, of_a.components_


def spoken(concepts):
    """Words of concepts: the three largest dimensions."""
    assert isinstance(concepts, np.ndarray)
    return {k: [f"w{j}" for j in np.argsort(-row)[:3]] for k, row in enumerate(concepts)}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**20))
def test_recovery_is_that_of_loops(k, d, seed):
    candidates, tuned, original = np.random.default_rng(seed).standard_normal((3, k, d))
    table = recovery(candidates, tuned, original, spoken if d > 2 else None)
    partner = max(
        permutations(range(k)),
        key=lambda order: sum(cosine(original[i], tuned[order[i]]) for i in range(k)),
    )
    assert table["match"].tolist() == list(partner) and table["concept"].tolist() == list(range(k))
    for i, row in table.iterrows():
        before, after = (
            cosine(original[i], tuned[partner[i]]),
            cosine(candidates[i], tuned[partner[i]]),
        )
        assert (row["cosine_before"], row["cosine_after"]) == (
            pytest.approx(before, abs=1e-12),
            pytest.approx(after, abs=1e-12),
        )
        if before > 1e-9:
            assert row["improvement"] == pytest.approx((after - before) / before)
        elif before < -1e-9:
            assert np.isnan(row["improvement"])
        if d > 2:
            candidate_words, of_tuned, of_original = (
                set(spoken(concepts)[j])
                for concepts, j in ((candidates, i), (tuned, partner[i]), (original, i))
            )
            assert row["t_overlap_before"] == pytest.approx(100 * len(of_original & of_tuned) / 3)
            assert row["t_overlap_after"] == pytest.approx(
                100 * len(candidate_words & of_tuned) / 3
            )


def test_what_did_not_move_has_not_come_nearer_and_the_match_itself_is_found():
    _, _, _, _, tuned, original = fitted()
    still = recovery(original, tuned, original, spoken)
    assert still["improvement"].tolist() == [0.0] * 4
    assert (still["t_overlap_before"] == still["t_overlap_after"]).all()
    recovered = recovery(tuned[still["match"]], tuned, original, spoken)
    np.testing.assert_allclose(recovered["cosine_after"], 1, atol=1e-12)
    assert (recovered["t_overlap_after"] == 100).all()
    assert (recovered["cosine_before"] == still["cosine_before"]).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20))
def test_recovery_follows_the_order_of_concepts(seed):
    random = np.random.default_rng(seed)
    candidates, tuned, original = random.standard_normal((3, 4, 5))
    candidate_order, tuned_order = random.permutation(4), random.permutation(4)
    table = recovery(candidates, tuned, original, spoken)
    again = recovery(
        candidates[candidate_order], tuned[tuned_order], original[candidate_order], spoken
    )
    assert tuned_order[again["match"]].tolist() == table["match"][candidate_order].tolist()
    columns = [name for name in table if name not in ("concept", "match")]
    np.testing.assert_allclose(again[columns], table[columns].iloc[candidate_order], atol=1e-9)


def test_concepts_in_any_format_and_lists_instead_of_a_callable_give_the_same():
    _, _, _, vectors, tuned, original = fitted()
    shifted_concepts = shift.shifted(original, vectors)
    table = recovery(shifted_concepts, tuned, original, spoken)
    tensors = [torch.from_numpy(x) for x in (shifted_concepts, tuned, original)]
    pd.testing.assert_frame_equal(recovery(*tensors, spoken), table)
    lists = tuple(spoken(x) for x in (shifted_concepts, tuned, original))
    pd.testing.assert_frame_equal(recovery(shifted_concepts, tuned, original, lists), table)
    in_another_order = tuple(dict(reversed(word_list.items())) for word_list in lists)
    pd.testing.assert_frame_equal(
        recovery(shifted_concepts, tuned, original, in_another_order), table
    )
    pd.testing.assert_frame_equal(
        recovery(
            shifted_concepts,
            tuned,
            original,
            tuple(list(word_list.values()) for word_list in lists),
        ),
        table,
    )
    pd.testing.assert_frame_equal(recovery(shifted_concepts, tuned, original), table.iloc[:, :5])


def test_what_does_not_belong_together_is_refused():
    _, _, _, _, tuned, original = fitted()
    lists = spoken(original)
    empty = lists | {2: []}
    for inputs, error, message in (
        ((original[:3], tuned, original), InputError, "candidates: 3, original: 4"),
        ((original, tuned[:3], original), InputError, "numbers of concepts differ: 4 and 3"),
        ((original[:, :3], tuned, original), InputError, "widths differ: 3 and 8"),
        (
            (original, tuned * np.nan, original),
            InputError,
            "components of b: 32 of 32 numbers are NaN",
        ),
        ((original * 0, tuned, original), InputError, "concepts 0, 1, 2, 3 are zero"),
        (
            (original, tuned, original, (lists, lists, empty)),
            InputError,
            "no list of words for 2",
        ),
        (
            (original, tuned, original, (empty, lists, lists)),
            InputError,
            "no list of words for 2",
        ),
        (
            (original, tuned, original, ({0: ["a"]}, lists, lists)),
            InputError,
            "words: 1, concepts: 4",
        ),
        (
            (original, tuned, original, (lists, {k + 1: ["a"] for k in range(4)}, lists)),
            InputError,
            r"concepts differ: \[4\] and 0 to 3",
        ),
    ):
        with pytest.raises(error, match=message):
            recovery(*inputs)


def test_each_rival_is_what_its_name_says():
    a, b, labels, vectors, tuned, original = fitted()
    nulls = null_shifts(a, b, labels, tuned, original, seed=3)
    assert tuple(nulls) == NULLS and all(null.shape == vectors.shape for null in nulls.values())
    assert not nulls["original"].any()
    np.testing.assert_allclose(nulls["global"], np.tile((b - a).mean(axis=0), (4, 1)), atol=1e-12)
    np.testing.assert_allclose(
        shift.shift_magnitude(nulls["random"]), shift.shift_magnitude(vectors), rtol=1e-12
    )
    assert np.abs(match_concepts(nulls["random"], vectors)["cosine"]).max() < 0.99
    counts = np.bincount(labels)
    np.testing.assert_allclose(
        counts @ nulls["shuffled"] / len(a), (b - a).mean(axis=0), atol=1e-12
    )
    assert np.abs(nulls["shuffled"] - vectors).max() > 0.1
    second = shift.shifted(original, nulls["seed"])
    again = KMeans(4, seed=3).fit(b).components_
    table = recovery(second, tuned, original)
    for concept, partner in enumerate(table["match"]):
        np.testing.assert_allclose(
            second[concept], again[match_concepts(tuned, again)["b"][partner]], atol=1e-12
        )


def test_rivals_depend_on_the_seed_and_on_nothing_else():
    inputs = fitted()
    first, same, second = (null_shifts(*inputs[:3], *inputs[4:], seed=seed) for seed in (1, 1, 2))
    tensors = [torch.from_numpy(x) for x in (*inputs[:3], *inputs[4:])]
    of_tensors = null_shifts(*tensors, seed=1)
    for name in NULLS:
        np.testing.assert_array_equal(first[name], same[name])
        np.testing.assert_allclose(of_tensors[name], first[name], atol=1e-10)
    assert all((first[name] != second[name]).any() for name in ("shuffled", "random"))
    assert all((first[name] == second[name]).all() for name in ("original", "global"))


def test_on_average_shuffled_shifts_are_the_global_one(monkeypatch):
    a, b, labels, _, tuned, original = fitted(n=40)

    class Fixed:
        def __init__(self, *_, **__):
            self.components_ = tuned

        def fit(self, _):
            return self

    monkeypatch.setattr(module, "KMeans", Fixed)
    draws = np.stack(
        [null_shifts(a, b, labels, tuned, original, seed=seed)["shuffled"] for seed in range(300)]
    )
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - (b - a).mean(axis=0)) < 5 * error).all()


def test_shifts_beat_rivals_where_each_concept_moves_its_own_way():
    random = np.random.default_rng(0)
    centres, ways = 8 * random.standard_normal((2, 5, 12))
    member = np.arange(100) % 5
    a = centres[member] + random.standard_normal((100, 12)) + 10
    b = a + ways[member] + 0.1 * random.standard_normal((100, 12))
    of_a, of_b = KMeans(5).fit(a), KMeans(5).fit(b)
    vectors = shift.shift_vectors(a, b, of_a.labels_, 5)
    nulls = null_shifts(a, b, of_a.labels_, of_b.components_, of_a.components_)
    table = recovery_curve({"shifted": vectors} | nulls, of_b.components_, of_a.components_).query(
        "measure == 'cosine_after'"
    )
    after = table.set_index("shift")["value"]
    assert after["shifted"] > 0.999 and after["seed"] > 0.999
    assert (after[["original", "global", "shuffled", "random"]] < 0.97).all()


def test_means_are_those_of_tables_with_the_intervals_of_the_bootstrap():
    _, _, _, vectors, tuned, original = fitted()
    tables = {
        layer: recovery(shift.shifted(original, scale * vectors), tuned, original, spoken)
        for layer, scale in ((3, 1.0), (5, 2.0))
    }
    result = mean_recovery(tables, "layer", seed=4)
    assert list(result.columns) == ["layer", "measure", "value", "low", "high", "n"]
    assert result["layer"].tolist() == [3] * 6 + [5] * 6
    assert result["measure"].tolist() == 2 * [
        *MEASURES,
        *(name.replace("cosine", "t_overlap") for name in MEASURES),
    ]
    for layer, table in tables.items():
        rows = result[result["layer"] == layer].set_index("measure")
        assert (
            rows.loc["cosine_after"].drop("layer").to_dict()
            == bootstrap(table["cosine_after"], seed=4).asdict()
        )
        gain = table["t_overlap_after"] - table["t_overlap_before"]
        assert (
            rows.loc["t_overlap_gain"].drop("layer").to_dict() == bootstrap(gain, seed=4).asdict()
        )
        assert rows.loc["cosine_gain", "value"] == pytest.approx(
            rows.loc["cosine_after", "value"] - rows.loc["cosine_before", "value"]
        )
    table = tables[3].drop(columns=["t_overlap_before", "t_overlap_after"])
    assert mean_recovery({"x": table})["measure"].tolist() == MEASURES


def test_the_curve_begins_at_the_original_and_passes_the_mean_of_b():
    a, b, labels, vectors, tuned, original = fitted()
    calls = []

    def words(concepts):
        calls.append(concepts)
        return spoken(concepts)

    table = recovery_curve(
        {"shifted": vectors, "none": 0 * vectors}, tuned, original, (0, 0.5, 1), words
    )
    assert list(table.columns) == ["shift", "alpha", "measure", "value", "low", "high", "n"]
    assert len(table) == 2 * 3 * 6 and len(calls) == 2 + 2 * 3  # words of tuned and original once
    by = table.set_index(["shift", "alpha", "measure"])["value"]
    for kind in ("cosine", "t_overlap"):
        assert by["shifted", 0.0, f"{kind}_gain"] == 0.0
        for alpha in (0.0, 0.5, 1.0):
            assert (
                by["none", alpha, f"{kind}_after"]
                == by["shifted", alpha, f"{kind}_before"]
                == by["shifted", 0.0, f"{kind}_after"]
            )
    centres = np.stack([b[labels == concept].mean(axis=0) for concept in range(4)])
    expected = recovery(centres, tuned, original, spoken)
    assert by["shifted", 1.0, "cosine_after"] == pytest.approx(
        expected["cosine_after"].mean(), abs=1e-12
    )
    assert by["shifted", 1.0, "t_overlap_after"] == pytest.approx(
        expected["t_overlap_after"].mean()
    )


def test_curves_of_nothing_are_refused():
    _, _, _, vectors, tuned, original = fitted()
    for inputs, message in (
        (({}, tuned, original), "0 shifts and 1 alphas"),
        (({"x": vectors}, tuned, original, []), "1 shifts and 0 alphas"),
    ):
        with pytest.raises(InputError, match=message):
            recovery_curve(*inputs)
    with pytest.raises(InputError, match="alpha is nan"):
        recovery_curve({"x": vectors}, tuned, original, [np.nan])
    with pytest.raises(InputError, match="there are no tables"):
        mean_recovery({})
    with pytest.raises(InputError, match="1 case or group"):
        mean_recovery({1: recovery(original[:1], tuned[:1], original[:1])})
    with pytest.raises(InputError, match="widths differ"):
        recovery_curve({"x": vectors[:, :3]}, tuned, original)
