"""What is compared solves the same problem, and everything that is promised is measured.

A rival that is missing is a row.
"""

import numpy as np
import pytest
import torch

from benchmarks import concepts
from benchmarks.harness import Options, Report


def test_activations_have_a_common_offset_and_sparse_parts():
    A = concepts.activations(300, 40, directions=5)
    assert (A.shape, A.dtype) == ((300, 40), np.float32)
    np.testing.assert_array_equal(A, concepts.activations(300, 40, directions=5))
    values = np.linalg.svd(A, compute_uv=False)
    assert values[5] > 3 * values[6]  # five directions and the offset
    assert np.linalg.norm(A.mean(axis=0)) > 30


def test_objectives_are_sums_over_all_entries():
    A, Z, D = (
        concepts.activations(9, 6, 3),
        np.ones((9, 2), np.float32),
        np.eye(2, 6, dtype=np.float32),
    )
    squares = sum((A[i, j] - (Z @ D)[i, j]) ** 2.0 for i in range(9) for j in range(6))
    assert concepts.objective(A, Z, D) == pytest.approx(squares + 2 * 18, rel=1e-5)
    assert concepts.squared_error(*map(torch.from_numpy, (A, Z, D))) == pytest.approx(
        squares, rel=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_the_authors_way_is_measured(report):
    concepts.against_scikit_learn(report, concepts.activations(60, 24), steps=2)
    objective, speed = report.promises
    assert objective.holds
    assert speed.estimate.value > 0
    assert len(report.findings) == 7


def test_overcomplete_is_measured_or_a_row_says_that_it_is_not_there(report, monkeypatch):
    if concepts.overcomplete_semi_nmf() is not None:
        concepts.against_overcomplete(report, concepts.activations(60, 24))
        assert [promise.estimate.value > 0 for promise in report.promises] == [True, True]
    monkeypatch.setattr(concepts, "find_spec", lambda name: None)
    absent = Report("trial", Options(repeats=2, quick=True))
    concepts.against_overcomplete(absent, concepts.activations(60, 24))
    assert "not installed" in absent.findings[0].label
    assert absent.promises == []


def test_growth_is_a_row_for_each_size(report):
    concepts.growth(report, 30, 12, 2)
    assert [finding.label.partition("fit: ")[2].partition(" (")[0] for finding in report.findings][
        -1
    ] == "30 samples, 12 dimensions, 8 concepts"
    assert len(report.findings) == 7
