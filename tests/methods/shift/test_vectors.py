"""Shift vectors and agreement of samples against slow loops in float64, and identities."""

from itertools import combinations

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean
from sklearn.metrics.pairwise import cosine_similarity

from tests.support.geometry import cosine
from tests.support.shift import PROVENANCE, moved
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods import shift
from xlvlms_tutorial.methods.concepts.baselines import PCA, KMeans
from xlvlms_tutorial.methods.concepts.words import as_lists
from xlvlms_tutorial.methods.shift import vectors as module
from xlvlms_tutorial.methods.shift.vectors import AVERAGES

sizes = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**20))


def states(ids, seed=0, **provenance):
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((len(ids), 4)))
    table = pd.DataFrame(
        {"sample": range(len(ids)), "id": ids, "word": [f"{name} in {seed}" for name in ids]}
    )
    return Activations(
        {(3, "resid_post"): rows, (5, "mlp_out"): 2 * rows}, table, PROVENANCE | provenance
    )


def test_samples_that_both_have_are_matched_by_id_in_the_order_of_the_first():
    a, b = states(["s4", "s1", "s7", "s2"]), states(["s7", "s9", "s2", "s4"], seed=1)
    first, second = shift.common_samples(a, b)
    assert first.table["id"].tolist() == second.table["id"].tolist() == ["s4", "s7", "s2"]
    assert second.table["word"].tolist() == ["s4 in 1", "s7 in 1", "s2 in 1"]
    for key, factor in (((3, "resid_post"), 1), ((5, "mlp_out"), 2)):
        torch.testing.assert_close(first[key], factor * a[3][[0, 2, 3]])
        torch.testing.assert_close(second[key], factor * b[3][[3, 0, 2]])
    assert first.provenance == a.provenance
    again = shift.common_samples(first, second)
    assert all(
        torch.equal(actual[3], original[3])
        for actual, original in zip(again, (first, second), strict=True)
    )


@pytest.mark.parametrize(
    ("ids", "second_ids", "provenance", "message"),
    [
        (
            ["s1"],
            ["s1"],
            {"ids_sha256": "9bc1"},
            "sample sets differ: 3fa9 and 9bc1; capture both models on the same samples",
        ),
        (["s1"], ["s1"], {"n_samples": 4}, "numbers of samples differ: 9 and 4"),
        (
            ["s1"],
            ["s1"],
            {"selection": {"words": ["dog"], "side": "token"}},
            "captured positions differ: .*'side': 'token'",
        ),
        (["s1"], ["s1"], {"reduce": "last"}, "reductions differ: None and last"),
        (
            ["s1", "s2"],
            ["s3"],
            {},
            (
                "samples differ: 2 in a and 1 in b; none is in both, so choose "
                "a word that both models say"
            ),
        ),
        (
            ["s1", "s1", "s2"],
            ["s1"],
            {},
            "numbers of rows and of samples differ: 3 and 2; capture one row a sample",
        ),
        (["s1"], ["s1", "s1"], {}, "numbers of rows and of samples differ: 2 and 1"),
    ],
)
def test_states_that_do_not_belong_together_are_refused(ids, second_ids, provenance, message):
    with pytest.raises(InputError, match=message):
        shift.common_samples(states(ids), states(second_ids, **provenance))


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32, torch.bfloat16])
def test_cosines_of_rows_are_those_of_scikit_learn_whatever_the_number_format(kind):
    pair = []
    for array in np.random.default_rng(0).standard_normal((2, 6, 5)):
        is_tensor = isinstance(kind, torch.dtype)
        pair.append(torch.from_numpy(array).to(kind) if is_tensor else array.astype(kind))
    cosines = module.row_cosines(*pair)
    exact = [torch.as_tensor(array).double().numpy() for array in pair]
    assert cosines.dtype == np.float64
    np.testing.assert_allclose(cosines, cosine_similarity(*exact).diagonal(), atol=1e-12)
    assert module.row_cosines(pair[0], pair[0]).max() <= 1


def test_what_has_no_cosine_is_refused():
    good = np.ones((2, 3))
    for bad, message in (
        (np.array([[1.0, 0, 0], [0, 0, 0]]), "concepts 1 are zero"),
        (np.full((2, 3), np.nan), "concepts hold NaN"),
        (np.ones((0, 3)), r"concepts of shape \(0, 3\)"),
    ):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(InputError, match=message):
                module.row_cosines(*pair)
    with pytest.raises(InputError, match="widths differ: 3 and 4"):
        module.row_cosines(good, np.ones((2, 4)))


def test_a_sample_belongs_to_the_concept_of_its_largest_code_in_size():
    codes = np.array([[0.1, -3.0, 2.0], [0.5, 0.5, 0.0], [0.0, 0.0, -1.0]])
    for inputs in (codes, torch.from_numpy(codes), torch.from_numpy(codes).half()):
        assert shift.assign_concepts(inputs).tolist() == [1, 0, 2]
    with pytest.raises(InputError, match="no concept is active in 1 of 2 samples"):
        shift.assign_concepts(np.array([[0.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(InputError, match="codes hold NaN"):
        shift.assign_concepts(np.array([[np.inf, 0.0]]))


def test_samples_of_k_means_belong_to_their_cluster():
    a, _, _ = moved()
    model = KMeans(4).fit(a)
    np.testing.assert_array_equal(shift.assign_concepts(model.transform(a)), model.labels_)


@pytest.mark.parametrize("centre", AVERAGES)
@pytest.mark.parametrize("block", [1, 2**20])
def test_shift_vectors_are_those_of_loops(centre, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    a, b, labels = moved()
    expected = np.zeros((4, 8))
    for concept in range(4):
        for column in range(8):
            values = [b[m, column] - a[m, column] for m in range(len(a)) if labels[m] == concept]
            ordered, n, cut = sorted(values), len(values), int(len(values) * 0.1)
            middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
            inner = ordered[cut : n - cut]
            expected[concept, column] = {
                "mean": sum(values) / n,
                "median": middle,
                "trimmed": sum(inner) / len(inner),
            }[centre]
    result = shift.shift_vectors(a, b, labels, 4, centre)
    np.testing.assert_allclose(result, expected, atol=1e-12)
    tensors = [torch.from_numpy(x) for x in (a, b, labels)]
    np.testing.assert_allclose(shift.shift_vectors(*tensors, 4, centre), expected, atol=1e-12)
    if centre == "trimmed":
        np.testing.assert_allclose(result[0], trim_mean((b - a)[labels == 0], 0.1), atol=1e-12)


def test_a_far_sample_moves_the_mean_and_not_the_others():
    a, b, labels = moved()
    far = b.copy()
    far[0] += 1e6
    for centre, limit in (("mean", np.inf), ("median", 1.0), ("trimmed", 1.0)):
        change = np.abs(
            shift.shift_vectors(a, far, labels, 4, centre)
            - shift.shift_vectors(a, b, labels, 4, centre)
        )
        assert (change[0] > 1e3).all() == (centre == "mean") and change[0].max() < limit
        assert change[1:].max() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**20))
def test_the_order_of_samples_and_the_names_of_concepts_do_not_matter(k, seed):
    a, b, labels = moved(n=40, k=k, seed=seed)
    random = np.random.default_rng(seed)
    rows, name = random.permutation(len(a)), random.permutation(k)
    for measure in (
        *(
            lambda *arguments, centre=centre: shift.shift_vectors(*arguments, centre)
            for centre in AVERAGES
        ),
        shift.consistency,
    ):
        result, again = measure(a, b, labels, k), measure(a[rows], b[rows], name[labels[rows]], k)
        np.testing.assert_allclose(again[name], result, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**20))
def test_with_k_means_a_shifted_concept_is_the_mean_of_b_over_its_samples(k, seed):
    a, b, _ = moved(n=40, seed=seed)
    model = KMeans(k).fit(a)
    labels = shift.assign_concepts(model.transform(a))
    shifted_concepts = shift.shifted(model.components_, shift.shift_vectors(a, b, labels, k))
    np.testing.assert_allclose(
        shifted_concepts, [b[labels == concept].mean(axis=0) for concept in range(k)], atol=1e-10
    )


def test_float32_states_far_from_zero_keep_their_shift():
    a, b, labels = (torch.from_numpy(x) for x in moved(n=4000))
    a, b = (a + 1e3).float(), (b + 1e3).float()
    expected = shift.shift_vectors(a.double(), b.double(), labels, 4)
    assert np.abs(shift.shift_vectors(a, b, labels, 4) - expected).max() < 1e-12


def test_alpha_goes_from_the_original_through_the_shift():
    concepts, shifts = np.random.default_rng(0).standard_normal((2, 3, 5))
    np.testing.assert_array_equal(shift.shifted(concepts, shifts, 0), concepts)
    np.testing.assert_allclose(
        shift.shifted(concepts, torch.from_numpy(shifts), -0.5), concepts - shifts / 2
    )
    np.testing.assert_allclose(
        shift.shifted(torch.from_numpy(concepts).float(), shifts), concepts + shifts, atol=1e-6
    )
    for alpha in (np.nan, np.inf, -1e308 * 10, 1.7e308):
        with pytest.raises(InputError, match="alpha is"):
            shift.shifted(concepts, shifts, alpha)
    with pytest.raises(InputError, match="numbers of concepts and shifts differ: 3 and 2"):
        shift.shifted(concepts, shifts[:2])
    with pytest.raises(InputError, match="widths differ: 5 and 4"):
        shift.shifted(concepts, shifts[:, :4])


@pytest.mark.parametrize("block", [1, 2**20])
def test_agreement_of_samples_is_that_of_loops(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    a, b, labels = moved()
    groups = [(b - a)[labels == concept] for concept in range(4)]
    formula = [
        np.mean([cosine(vector, group.mean(axis=0)) for vector in group]) for group in groups
    ]
    pairs = []
    for group in groups:
        pairs.append(np.mean([cosine(first, second) for first, second in combinations(group, 2)]))
    for convert in (lambda x: x, torch.from_numpy):
        inputs = [convert(x) for x in (a, b, labels)]
        np.testing.assert_allclose(shift.consistency(*inputs, 4), formula, atol=1e-12)
        np.testing.assert_allclose(shift.pairwise_consistency(*inputs, 4), pairs, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**20), st.floats(-3, 3))
def test_agreement_depends_on_directions_and_is_one_where_they_are_equal(k, seed, log):
    a, b, labels = moved(n=30, k=k, seed=seed)
    labels = np.concatenate([labels, np.arange(k)])  # no concept alone
    a, b = np.concatenate([a, a[:k] + 1]), np.concatenate([b, b[:k]])
    for measure in (shift.consistency, shift.pairwise_consistency):
        result = measure(a, b, labels, k)
        assert (np.abs(result) <= 1).all()
        np.testing.assert_allclose(measure(10**log * a, 10**log * b, labels, k), result, atol=1e-9)
        same = a + np.random.default_rng(seed).standard_normal((k, 8))[labels]
        np.testing.assert_allclose(measure(a, same, labels, k), 1, atol=1e-12)


def test_where_there_is_no_direction_there_is_no_agreement():
    a, labels = np.zeros((4, 2)), np.array([0, 0, 1, 1])
    still = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    for measure in (shift.consistency, shift.pairwise_consistency):
        with pytest.raises(InputError, match="1 of 4 samples have the same state in both models"):
            measure(a, still, labels, 2)
    against = np.array([[0.1, 0.2], [-0.1, -0.2], [0.0, 1.0], [0.0, 2.0]])
    with pytest.raises(InputError, match=r"concept\(s\) 0 move by zero on average"):
        shift.consistency(a, against, labels, 2)
    # but for rounding
    with pytest.raises(InputError, match=r"concept\(s\) 0 move by zero on average"):
        shift.consistency(a, against + np.array([[1e-18, 0]]), labels, 2)
    np.testing.assert_allclose(
        shift.pairwise_consistency(a, against, labels, 2), [-1, 1], atol=1e-12
    )


def test_magnitude_is_the_length():
    shifts = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert shift.shift_magnitude(shifts).tolist() == [5.0, 0.0]
    assert shift.shift_magnitude(torch.from_numpy(shifts).half()).tolist() == [5.0, 0.0]
    with pytest.raises(InputError, match="shifts hold NaN"):
        shift.shift_magnitude(shifts * np.nan)


@pytest.mark.parametrize(
    "measure", [shift.shift_vectors, shift.consistency, shift.pairwise_consistency]
)
def test_states_and_labels_belong_together(measure):
    a, b, labels = moved()
    for inputs, error, message in (
        ((a, b[:-1], labels, 4), InputError, r"\(a: 60, b: 59, labels: 60\)"),
        ((a, b, labels[:-1], 4), InputError, r"\(a: 60, b: 60, labels: 59\)"),
        ((a, b[:, :-1], labels, 4), InputError, "widths differ: 8 and 7"),
        (
            (a, b, labels, 3),
            InputError,
            "labels of 3 concepts are int64 of shape .*, from 0 to 3; .* 0 to 2",
        ),
        ((a, b, labels - 1, 4), InputError, "from -1 to 2"),
        ((a, b, labels, 0), InputError, "k is 0"),
        ((a, b, labels, 6), InputError, r"no sample belongs to concept\(s\) 4, 5; fit fewer"),
        ((a * np.nan, b, labels, 4), InputError, "states of a hold NaN"),
        ((a, b * np.inf, labels, 4), InputError, "states of b hold NaN or infinite"),
        ((a[:0], b[:0], labels[:0], 4), InputError, r"states of a of shape \(0, 8\)"),
    ):
        with pytest.raises(error, match=message):
            measure(*inputs)


def test_other_ways_to_average_are_refused():
    with pytest.raises(
        InputError, match="unknown way to average 'mode'; allowed: 'mean', 'median', 'trimmed'"
    ):
        shift.shift_vectors(*moved(), 4, "mode")


def test_arrays_that_cannot_be_written_are_read(recwarn):
    a, b, labels = moved()
    for x in (a, b, labels):
        x.flags.writeable = False
    assert shift.shift_vectors(a, b, labels, 4).shape == (4, 8)
    assert not recwarn.list


def test_overlap_of_words_is_the_share_of_sets_in_per_cent():
    words = [["snow", "ice", "white", "cold"], ["dog", "dog", "cat"], ["red"]]
    others = [["white", "snow", "sand"], ["bird"], ["red", "blue"]]
    assert shift.t_overlap(words, others).tolist() == [50.0, 0.0, 100.0]
    assert shift.t_overlap(others, words).tolist() == [pytest.approx(200 / 3), 0.0, 50.0]
    named = {4: words[0], 2: words[1], 9: words[2]}
    assert shift.t_overlap(named, {9: others[2], 4: others[0], 2: others[1]}).tolist() == [
        50.0,
        0.0,
        100.0,
    ]
    assert shift.t_overlap(named, others).tolist() == [50.0, 0.0, 100.0]


@pytest.mark.parametrize("missing", [np.nan, None, "", 3, ["dog"]])
def test_what_is_missing_counts_as_no_word(missing, monkeypatch):
    # its checks refuse some of these already
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for words, others in (
        ([["dog"], ["cat", missing]], [["dog"], ["cat"]]),
        ([["dog"], ["cat"]], [["dog"], [missing]]),
    ):
        with pytest.raises(
            InputError,
            match="no list of words for 1; give each concept one word or more, none missing",
        ):
            shift.t_overlap(words, others)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1), min_size=1), st.data())
def test_overlap_is_that_of_loops_and_forgets_order_and_repetition(words, data):
    others = [data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1)) for _ in words]
    overlaps = shift.t_overlap(words, others)
    for concept, (mine, theirs) in enumerate(zip(words, others, strict=True)):
        different = [word for number, word in enumerate(mine) if word not in mine[:number]]
        assert overlaps[concept] == pytest.approx(
            100 * sum(word in theirs for word in different) / len(different)
        )
    assert (
        shift.t_overlap([word_list[::-1] * 2 for word_list in words], others).tolist()
        == overlaps.tolist()
    )
    assert (shift.t_overlap(words, words) == 100).all()


def test_lists_of_a_table_of_words_are_read():
    table = pd.DataFrame({"concept": [1, 0, 0], "rank": [1, 2, 1], "word": ["red", "dog", "cat"]})
    assert shift.t_overlap(as_lists(table), [["dog"], ["red"]]).tolist() == [50.0, 100.0]


@pytest.mark.parametrize(
    ("words", "others", "error", "message"),
    [
        (
            [["a"], []],
            [["a"], ["b"]],
            InputError,
            "no list of words for 1; give each concept one word or more",
        ),
        ([["a"]], [[]], InputError, "no list of words for 0"),
        ([], [], InputError, "no list of words for any concept"),
        (["word"], [["word"]], InputError, "no list of words for 0"),
        ([["a"]], [["a"], ["b"]], InputError, "words: 1, others: 2"),
        ({0: ["a"]}, {1: ["a"]}, InputError, r"concepts differ: \[0\] and \[1\]"),
    ],
)
def test_concepts_without_words_are_refused(words, others, error, message):
    with pytest.raises(error, match=message):
        shift.t_overlap(words, others)


def test_k_means_and_signed_components_are_associated_by_size():
    a, _, _ = moved()
    codes = PCA(3).fit_transform(a)
    assert (shift.assign_concepts(codes) == np.abs(codes).argmax(axis=1)).all()
    assert (shift.assign_concepts(codes) != codes.argmax(axis=1)).any()
