"""Defects of the released code of arXiv 2501.03012 (xl-vlms) that ours must not have.

Here what other tests do not cover. Where each defect is tested (files
under tests; without a file: here).

1. A concept without samples ends in a crash inside torch: test_a_concept_without_samples_is_named,
   methods/shift/test_vectors.py::test_states_and_labels_belong_together.
2. Agreement of a single sample is NaN: test_a_concept_of_one_sample_gives_no_nan.
3. Shifts are made "unit" by the norm of the whole matrix:
   test_the_length_of_one_shift_does_not_change_what_is_said_of_another.
4. Of 15 words the last 10 are compared, without the five best: test_the_best_words_count.
5. Samples belong to the concept of the largest signed code: test_a_strong_negative_code_counts,
   methods/shift/test_vectors.py::test_a_sample_belongs_to_the_concept_of_its_largest_code_in_size.
6. What the notebook calls consistency is not the paper's formula:
   test_the_two_kinds_of_consistency_are_not_one_number.
7. States of different sample sets are paired by their place in the list:
   test_states_are_paired_by_sample_and_not_by_place, methods/shift/test_vectors.py::
   test_states_that_do_not_belong_together_are_refused.
8. Samples without the word have a row all the same, and whether the mask is a list or a tensor
   depends on who reads it: test_states_of_samples_without_the_word_are_not_there.
9. k-means has no seed, so that no two runs agree: test_two_runs_agree,
   methods/shift/test_recovery.py::test_rivals_depend_on_the_seed_and_on_nothing_else.
10. Principal components crash and samples as concepts are not implemented:
    test_every_dictionary_can_be_shifted.
11. Overlap is a count divided by 15, however many words there are, and repeated words count again:
    test_overlap_is_a_share_of_the_words, methods/shift/test_vectors.py::
    test_overlap_is_that_of_loops_and_forgets_order_and_repetition.
12. Improvement is divided by a cosine that may be negative, which turns
    its sign: test_improvement_never_has_the_wrong_sign.
13. There is nothing to compare recovery with, although it is high by construction:
    methods/shift/test_vectors.py::
    test_with_k_means_a_shifted_concept_is_the_mean_of_b_over_its_samples,
    methods/shift/test_recovery.py::test_each_rival_is_what_its_name_says.
14. How concepts change is read off a one-to-one matching too:
    metrics/test_dictionaries.py::test_argmax_takes_the_nearest_of_all_whoever_else_does.
"""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from tests.support.geometry import cosine
from tests.support.shift import PROVENANCE, moved
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.store import load_activations, save_activations
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods import shift
from xlvlms_tutorial.methods.concepts import DICTIONARIES
from xlvlms_tutorial.methods.concepts.baselines import KMeans
from xlvlms_tutorial.methods.shift.recovery import null_shifts, recovery, recovery_curve
from xlvlms_tutorial.methods.shift.vectors import AVERAGES
from xlvlms_tutorial.samples import Sample


def test_the_table_above_names_tests_that_exist():
    named = re.findall(r"(?:((?:\w+/)+\w+\.py)::\s*)?(test_\w+)\b(?!\.py)", __doc__)
    assert len(named) > 14
    for file, name in named:
        path = Path(__file__).parents[2] / file if file else Path(__file__)
        assert f"def {name}(" in path.read_text(), f"{file or 'here'}: no {name}"


def test_a_concept_without_samples_is_named():
    a, b, labels = moved()
    with pytest.raises(
        InputError,
        match=r"no sample belongs to concept\(s\) 2; fit fewer, or leave these out",
    ):
        shift.shift_vectors(a, b, np.where(labels == 2, 1, labels), 4)


def test_a_concept_of_one_sample_gives_no_nan():
    """The mean over no pairs is 0 / 0.

    The shift itself and the formula of the paper have a value.
    """
    a, b, labels = moved()
    labels, a, b = np.concatenate([labels, [4]]), np.vstack([a, a[:1]]), np.vstack([b, b[:1]])
    with pytest.raises(
        InputError, match=r"concept\(s\) 4 have one sample and no pair; fit fewer concepts"
    ):
        shift.pairwise_consistency(a, b, labels, 5)
    assert shift.consistency(a, b, labels, 5)[4] == pytest.approx(1)
    for centre in AVERAGES:
        np.testing.assert_allclose(
            shift.shift_vectors(a, b, labels, 5, centre)[4], b[0] - a[0], atol=1e-12
        )


def test_the_length_of_one_shift_does_not_change_what_is_said_of_another():
    a, b, labels = moved()
    longer = np.where((labels == 3)[:, None], a + 1000 * (b - a), b)
    vectors, others = (shift.shift_vectors(a, side, labels, 4) for side in (b, longer))
    whole = np.linalg.norm
    # the fault's cause is there
    assert np.abs(vectors / whole(vectors) - others / whole(others))[:3].max() > 0.1
    cosines = cosine_similarity(vectors)
    np.testing.assert_allclose(cosine_similarity(others), cosines, atol=1e-12)
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-12)
    for measure in (shift.consistency, shift.pairwise_consistency):
        np.testing.assert_allclose(
            measure(a, longer, labels, 4), measure(a, b, labels, 4), atol=1e-9
        )
    rival = null_shifts(a, longer, labels, vectors, vectors)["random"]
    np.testing.assert_allclose(
        shift.shift_magnitude(rival), shift.shift_magnitude(others), rtol=1e-12
    )


def test_the_best_words_count():
    words = [[f"best{k}" for k in range(5)] + [f"mine{k}" for k in range(10)]]
    others = [[f"best{k}" for k in range(5)] + [f"theirs{k}" for k in range(10)]]
    assert not set(words[0][-10:]) & set(others[0][-10:])
    assert shift.t_overlap(words, others).tolist() == [pytest.approx(100 * 5 / 15)]
    table = recovery(np.eye(1, 3), np.eye(1, 3), np.eye(1, 3), (words, others, words))
    assert table["t_overlap_after"].tolist() == [pytest.approx(100 * 5 / 15)]


def test_a_strong_negative_code_counts():
    codes = np.array([[0.1, -5.0], [0.2, 0.1], [-4.0, 3.0], [0.1, -6.0]])
    assert codes.argmax(axis=1).tolist() == [0, 0, 1, 0]
    assert shift.assign_concepts(codes).tolist() == [1, 0, 0, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**20))
def test_the_two_kinds_of_consistency_are_not_one_number(n, seed):
    random = np.random.default_rng(seed)
    a, delta = random.standard_normal((2, n, 4))
    labels, far = np.zeros(n, dtype=int), delta + 1
    formula, pairs = (
        find(a, a + far, labels, 1)[0] for find in (shift.consistency, shift.pairwise_consistency)
    )
    assert formula == pytest.approx(np.mean([cosine(vector, far.mean(axis=0)) for vector in far]))
    assert pairs == pytest.approx(
        np.mean([cosine(first, second) for first, second in combinations(far, 2)])
    )
    assert formula != pytest.approx(pairs, abs=1e-6)
    equal = delta / np.linalg.norm(delta, axis=1, keepdims=True)
    formula, pairs = (
        find(a, a + equal, labels, 1)[0] for find in (shift.consistency, shift.pairwise_consistency)
    )
    assert pairs == pytest.approx((n * formula**2 - 1) / (n - 1), abs=1e-9)


def test_states_are_paired_by_sample_and_not_by_place():
    a, b, _ = moved(n=12)
    ids = [f"s{k}" for k in range(12)]

    def states_at(rows, values):
        table = {"sample": rows, "id": [ids[row] for row in rows]}
        return Activations(
            {(1, "resid_post"): torch.from_numpy(values[rows])}, pd.DataFrame(table), PROVENANCE
        )

    first, second = states_at([0, 2, 3, 5, 8, 9], a), states_at([0, 1, 2, 3, 5, 9], b)
    result = shift.shift_vectors(
        *(states[1] for states in shift.common_samples(first, second)), np.zeros(5, dtype=int), 1
    )
    np.testing.assert_allclose(result[0], (b - a)[[0, 2, 3, 5, 9]].mean(axis=0), atol=1e-12)
    by_place = shift.shift_vectors(first[1], second[1], np.zeros(6, dtype=int), 1)
    assert np.abs(by_place - result).max() > 0.1
    another = Activations(
        second.tensors, second.table, PROVENANCE | {"ids_sha256": "other samples"}
    )
    with pytest.raises(InputError, match="sample sets differ"):
        shift.common_samples(first, another)


def test_states_of_samples_without_the_word_are_not_there(tmp_path):
    """Two models, whose answers have the word for different samples.

    Captured, stored, read back and paired.
    """
    vlm = tiny_llava()
    samples = [Sample(f"s{k}", Image.new("RGB", (32, 32), (40 * k, 90, 200))) for k in range(4)]
    options = {"words": "key", "prompt": "What is there ?"}
    a = capture(
        vlm, samples, [0, 2], answers=["a key", "a key", "a", "the key"], batch_size=3, **options
    )
    with torch.no_grad():
        vlm.model.get_input_embeddings().weight.mul_(1.5)
    b = capture(
        vlm, samples, [0, 2], answers=["a key", "a", "a key", "the key"], batch_size=2, **options
    )
    first, second = shift.common_samples(a, b)
    assert first.table["id"].tolist() == second.table["id"].tolist() == ["s0", "s3"]
    torch.testing.assert_close(second[0], 1.5 * first[0], atol=1e-5, rtol=1e-5)
    stored = [
        load_activations(save_activations(states, tmp_path / name))
        for name, states in (("a", a), ("b", b))
    ]
    for actual, expected in zip(shift.common_samples(*stored), (first, second), strict=True):
        assert torch.equal(actual[2], expected[2])
    at_word = capture(vlm, samples, [0, 2], answers=["a key"] * 4, side="token", **options)
    with pytest.raises(InputError, match="captured positions differ"):
        shift.common_samples(a, at_word)
    with pytest.raises(InputError, match="numbers of samples differ: 4 and 3"):
        shift.common_samples(a, capture(vlm, samples[:3], [0, 2], answers=["a key"] * 3, **options))


def test_two_runs_agree():
    a, b, _ = moved()

    def run():
        of_a, of_b = KMeans(4).fit(a), KMeans(4).fit(b)
        labels = shift.assign_concepts(of_a.transform(a))
        shifts = {"shifted": shift.shift_vectors(a, b, labels, 4)}
        shifts |= null_shifts(a, b, labels, of_b.components_, of_a.components_)
        return recovery_curve(shifts, of_b.components_, of_a.components_)

    assert run().equals(run())


@pytest.mark.parametrize("name", DICTIONARIES)
def test_every_dictionary_can_be_shifted(name):
    """Concepts that are no sample's strongest are left out, as the error says."""
    a, b, _ = moved()
    of_a, of_b = (DICTIONARIES[name](4).fit(side) for side in (a, b))
    codes = of_a.transform(a)
    active = np.abs(codes).max(axis=1) > 0
    used, labels = np.unique(shift.assign_concepts(codes[active]), return_inverse=True)
    vectors = shift.shift_vectors(a[active], b[active], labels, len(used))
    original, tuned = of_a.components_[used], of_b.components_[: len(used)]
    table = recovery(shift.shifted(original, vectors), tuned, original)
    assert len(table) == len(used) >= 2
    assert np.isfinite(table["cosine_after"]).all()


def test_overlap_is_a_share_of_the_words():
    assert shift.t_overlap([["a", "b", "c"]], [["c", "a", "b"]]).tolist() == [100.0]
    assert shift.t_overlap([["a", "b", "a", "a"]], [["a"]]).tolist() == [50.0]


def test_improvement_never_has_the_wrong_sign():
    original, tuned = np.array([[-1.0, 0.5]]), np.array([[1.0, 0.0]])
    table = recovery(tuned, tuned, original)
    before, after = table["cosine_before"][0], table["cosine_after"][0]
    assert before < 0 < after and (after - before) / before < 0  # the fault's cause is there
    assert np.isnan(table["improvement"][0])
    assert recovery(tuned, tuned, np.array([[1.0, 0.5]]))["improvement"][0] > 0
