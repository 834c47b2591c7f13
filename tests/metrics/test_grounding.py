"""Scores of grounding agree with plain loops in float64, with closed
forms, and refuse what has no score.
"""

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics import grounding
from xlvlms_tutorial.metrics.grounding import (
    bert_scores,
    clip_score,
    top_scores,
    word_overlap,
)


def normals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def texts(count, seed, longest=7, width=5):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(rng.integers(1, longest + 1), width)) + 0.8 for _ in range(count)]


def looped(candidate, reference):
    """Precision, recall and F1 of one pair, one cosine at a time."""
    cosine = lambda a, b: (
        sum(x * y for x, y in zip(a, b, strict=True))
        / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    )
    precision = np.mean([max(cosine(a, b) for b in reference) for a in candidate])
    recall = np.mean([max(cosine(a, b) for a in candidate) for b in reference])
    return (
        precision,
        recall,
        2 * precision * recall / (precision + recall) if min(precision, recall) > 0 else 0.0,
    )


def test_clip_score_is_w_times_the_positive_part_of_the_cosine():
    images, words = normals(6, 4), normals(3, 4, seed=1)
    expected = [[2.5 * max(a @ b / np.sqrt((a @ a) * (b @ b)), 0) for b in words] for a in images]
    assert np.allclose(clip_score(images, words), expected, atol=1e-14)
    assert (clip_score(images, words) == 0).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 100), st.floats(0.5, 5))
def test_clip_score_ignores_lengths_and_lies_between_0_and_w(seed, factor, w):
    images, words = normals(4, 3, seed=seed), normals(5, 3, seed=seed + 100)
    scores = clip_score(factor * images, words, w)
    assert np.allclose(scores, clip_score(images, words / factor, w))
    assert scores.min() >= 0 and scores.max() <= w
    assert np.allclose(np.diag(clip_score(images, images, w)), w)


def test_clip_score_takes_tensors_and_keeps_their_precision():
    images, words = torch.tensor(normals(3, 4)), torch.tensor(normals(2, 4, seed=1))
    exact = clip_score(images, words)
    assert exact.dtype == np.float64
    assert clip_score(images.float(), words.float()).dtype == np.float32
    assert np.allclose(clip_score(images.bfloat16(), words), exact, atol=0.05)


@pytest.mark.parametrize(
    "bad", [np.zeros((1, 4)), np.full((1, 4), np.nan), np.full((1, 4), np.inf), np.empty((0, 4))]
)
def test_embeddings_without_a_direction_are_refused(bad):
    with pytest.raises(InputError, match="image embeddings"):
        clip_score(bad, normals(2, 4))
    with pytest.raises(InputError, match="text embeddings"):
        clip_score(normals(2, 4), bad)
    with pytest.raises(
        InputError, match="tokens of candidates|token embeddings of candidates|candidate 0"
    ):
        bert_scores([bad], [normals(2, 4)])


def test_spaces_of_different_widths_are_refused():
    with pytest.raises(InputError, match="4 and 5"):
        clip_score(normals(2, 4), normals(2, 5))
    with pytest.raises(InputError, match="4 and 5"):
        bert_scores([normals(2, 4)], [normals(2, 5)])
    with pytest.raises(InputError, match="widths of candidates"):
        bert_scores([normals(2, 4), normals(2, 5)], [normals(2, 4)])


@pytest.mark.parametrize("w", [0, -1.0, np.inf, np.nan])
def test_clip_score_refuses_a_weight_that_is_not_positive(w):
    with pytest.raises(InputError, match="2.5"):
        clip_score(normals(2, 4), normals(2, 4), w)


@pytest.mark.parametrize("block", [2**20, 40, 1])
def test_bert_scores_agree_with_a_loop_over_pairs(monkeypatch, block):
    monkeypatch.setattr(grounding, "_BLOCK", block)
    ours, theirs = texts(8, 2), texts(11, 3)
    expected = [[looped(a, b)[2] for b in theirs] for a in ours]
    assert np.allclose(bert_scores(ours, theirs), expected, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_bert_score_of_a_text_with_itself_is_1_and_sides_swap(seed):
    ours, theirs = texts(4, seed), texts(4, seed + 1000)
    assert np.allclose(np.diag(bert_scores(ours, [text[::-1].copy() for text in ours])), 1)
    assert np.allclose(bert_scores(ours, theirs), bert_scores(theirs, ours).T)


def test_bert_score_in_single_precision_and_from_tensors():
    ours, theirs = texts(5, 4), texts(5, 5)
    single = bert_scores(
        [torch.tensor(text).float() for text in ours],
        [torch.tensor(text).float() for text in theirs],
    )
    assert single.dtype == np.float32
    assert np.allclose(single, bert_scores(ours, theirs), atol=1e-5)


def test_opposite_texts_have_an_f1_of_0():
    ours = [np.array([[1.0, 0.1]])]
    assert bert_scores(ours, [-ours[0]])[0, 0] == 0


def test_baseline_maps_itself_to_0_and_keeps_1():
    ours, theirs = texts(3, 8), texts(3, 9)
    plain, scaled = bert_scores(ours, theirs), bert_scores(ours, theirs, baseline=0.25)
    assert np.allclose(scaled, (plain - 0.25) / 0.75)
    assert np.allclose(np.diag(bert_scores(ours, ours, baseline=0.25)), 1)


@pytest.mark.parametrize("baseline", [1, np.nan, -2.0])
def test_unknown_options_of_bert_score_are_refused(baseline):
    with pytest.raises(InputError, match="allowed"):
        bert_scores(texts(2, 0), texts(2, 1), baseline=baseline)


def test_texts_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match="no candidates"):
        bert_scores([], texts(1, 1))
    with pytest.raises(InputError, match=r"reference 1 has shape \(5,\)"):
        bert_scores(texts(1, 0), [np.ones((1, 5)), np.ones(5)])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1), min_size=2, max_size=6))
def test_overlap_agrees_with_its_definition(lists):
    sets = [set(words) for words in lists]
    expected = []
    for i, a in enumerate(sets):
        shares = [len(a & b) / len(a) for j, b in enumerate(sets) if j != i]
        expected.append(np.mean(shares))
    overlaps = word_overlap(dict(enumerate(lists)))
    assert np.allclose(overlaps, expected)
    table = pd.DataFrame(
        [(k, word) for k, words in enumerate(lists) for word in words], columns=["concept", "word"]
    )
    assert word_overlap(table).equals(overlaps)


def test_overlap_keeps_the_order_of_concepts_and_counts_duplicates_once():
    overlaps = word_overlap({7: ["dog", "dog", "cat"], 2: ["dog"], 5: ["bus"]})
    assert overlaps.to_dict() == {7: 0.25, 2: 0.5, 5: 0.0}
    assert (list(overlaps.index), overlaps.index.name, overlaps.name) == (
        [7, 2, 5],
        "concept",
        "overlap",
    )


@pytest.mark.parametrize(
    "words", [{0: ["a"], 1: []}, {0: ["a"], 1: "dog"}, {0: ["a"], 1: [""]}, {0: ["a"], 1: [None]}]
)
def test_overlap_refuses_concepts_without_words(words):
    with pytest.raises(InputError, match="word"):
        word_overlap(words)


@pytest.mark.parametrize("w", [0, -1, np.nan, np.inf, 1e308, 1e31, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_with_which_scores_are_no_numbers_are_refused(w, dtype):
    with pytest.raises(InputError, match="w="):
        clip_score(torch.ones(2, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype), w)
    assert np.isfinite(
        clip_score(torch.ones(2, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype), 1e30)
    ).all()


@pytest.mark.parametrize("lacking", ["concept", "word"])
def test_tables_without_a_column_are_refused(lacking):
    table = pd.DataFrame({"concept": [0, 1], "word": ["a", "b"], "rank": [1, 1]}).drop(
        columns=lacking
    )
    with pytest.raises(InputError, match=f"no column '{lacking}' among"):
        word_overlap(table)


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 1, 3)])
def test_what_is_no_row_of_embeddings_is_refused(shape, monkeypatch):
    # its checks refuse some of these already
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for images, words in (
        (torch.ones(shape), torch.ones(2, 3)),
        (torch.ones(2, 3), torch.ones(shape)),
    ):
        with pytest.raises(InputError, match="no (image|text) embeddings: torch.float32 of shape"):
            clip_score(images, words)


def test_overlap_needs_two_concepts():
    with pytest.raises(InputError, match="2 concepts"):
        word_overlap({0: ["a"]})


def test_top_scores_agree_with_a_loop():
    codes, scores = normals(12, 9), normals(12, 9, seed=1)
    for row, code, score in zip(top_scores(codes, scores).itertuples(), codes, scores, strict=True):
        strongest = sorted(range(9), key=lambda k: -abs(code[k]))[:5]
        assert (row.top_1, row.active) == (score[strongest[0]], 5)
        assert row.top_3 == pytest.approx(np.mean([score[k] for k in strongest[:3]]))


def test_top_scores_are_those_of_the_released_protocol():
    codes, scores = np.abs(normals(40, 12)), normals(40, 12, seed=1)
    # ascending, and the last ones are taken
    released = np.take_along_axis(scores, codes.argsort(axis=1)[:, -5:], axis=1)
    table = top_scores(codes, scores)
    np.testing.assert_allclose(table["top_1"], released[:, -1:].mean(axis=1))
    np.testing.assert_allclose(table["top_3"], released[:, -3:].mean(axis=1))


def test_random_scores_gain_nothing_by_the_choice_of_concepts():
    table = top_scores(normals(4000, 20), normals(4000, 20, seed=1)).mean()
    assert abs(table["top_1"]) < 0.06
    assert abs(table["top_3"]) < 0.04


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(3, 9))
def test_how_many_concepts_are_listed_changes_no_score(seed, n_concepts):
    codes, scores = normals(6, 9, seed=seed), normals(6, 9, seed=seed + 1)
    pd.testing.assert_frame_equal(
        top_scores(codes, scores, n_concepts)[["top_1", "top_3"]],
        top_scores(codes, scores)[["top_1", "top_3"]],
    )


def test_top_scores_say_how_many_concepts_are_active():
    table = top_scores(
        np.array([[0, 2.0, 0, -3.0]]), np.array([[0.1, 0.2, 0.3, 0.4]]), n_concepts=3
    )
    assert table.loc[0].to_dict() == pytest.approx({"top_1": 0.4, "top_3": 0.7 / 3, "active": 2})


def test_top_scores_refuse_what_has_no_answer():
    good = np.ones((2, 4))
    with pytest.raises(InputError, match=r"\(2, 4\) and \(2, 3\)"):
        top_scores(good, good[:, :3], 3)
    with pytest.raises(InputError, match="3 to 4"):
        top_scores(good, good)
    with pytest.raises(InputError, match="n_concepts=2"):
        top_scores(good, good, 2)
    with pytest.raises(InputError, match="1 of 2 samples"):
        top_scores(good * [[1], [0]], good, 3)
    with pytest.raises(InputError, match="scores: 8 of 8"):
        top_scores(good, good * np.nan, 3)
    with pytest.raises(InputError, match="codes of shape"):
        top_scores(np.empty((0, 4)), good, 3)
