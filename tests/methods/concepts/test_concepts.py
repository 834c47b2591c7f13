"""Which concepts a sample has most of, and which samples have most of a concept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods import concepts
from xlvlms_tutorial.methods.concepts import DICTIONARIES, Dictionary, most_activating, top_concepts

CODES = np.array([[0.0, -3.0, 1.0], [2.0, 0.5, -2.0], [0.0, 0.0, 0.0], [1.0, 4.0, 0.2]])


def test_top_concepts_are_the_largest_in_size_and_ties_go_to_the_first():
    assert top_concepts(CODES).tolist() == [[1], [0], [0], [1]]
    assert top_concepts(CODES, 3).tolist() == [[1, 2, 0], [0, 2, 1], [0, 1, 2], [1, 0, 2]]


def test_most_activating_samples_keep_the_sign_of_their_code():
    table = most_activating(CODES, n=2)
    assert list(table.columns) == ["concept", "rank", "row", "activation"]
    assert table["concept"].tolist() == [0, 0, 1, 1, 2, 2]
    assert table["rank"].tolist() == [1, 2] * 3
    assert table["row"].tolist() == [1, 3, 3, 0, 1, 0]
    assert table["activation"].tolist() == [2.0, 1.0, 4.0, -3.0, -2.0, 1.0]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**20), st.data())
def test_no_code_that_is_left_out_is_larger(m, k, seed, data):
    codes = np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)
    n = data.draw(st.integers(1, k))
    sizes, top = np.abs(codes), top_concepts(codes, n)
    for row in range(m):
        expected = sorted(range(k), key=lambda j: -sizes[row, j])[:n]
        assert top[row].tolist() == expected
    table = most_activating(codes, m)
    assert sorted(map(tuple, table[["concept", "row"]].to_numpy())) == [
        (j, i) for j in range(k) for i in range(m)
    ]
    assert table["activation"].dtype == np.float32
    assert (
        table.groupby("concept")["activation"].apply(
            lambda values: np.diff(values.abs()).max(initial=-1)
        )
        <= 0
    ).all()


@pytest.mark.parametrize("use", [top_concepts, most_activating])
def test_what_is_no_matrix_of_codes_is_refused(use):
    for codes in (np.ones(3), np.ones((0, 3)), np.array([[1.0, np.nan]])):
        with pytest.raises(InputError, match="codes of shape"):
            use(codes, 1)
    for n in (0, 5):
        with pytest.raises(InputError, match=f"n is {n}; there are"):
            use(CODES, n)


def test_every_dictionary_has_a_name_and_is_in_the_module():
    assert list(DICTIONARIES) == ["semi-nmf", "pca", "k-means", "simple", "sae"]
    assert all(
        issubclass(kind, Dictionary) and getattr(concepts, kind.__name__) is kind
        for kind in DICTIONARIES.values()
    )
