"""What cells hold, which words are right, and what that is compared with: by hand and by loops."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.tutorials import reading

RANDOM = np.random.default_rng(0)


def boxed(**boxes):
    """A picture of 8 x 8 pixels with masks of (rows, columns)."""
    masks = {}
    for word, (rows, columns) in boxes.items():
        masks[word] = np.zeros((8, 8), dtype=bool)
        masks[word][rows, columns] = True
    return Sample("a", Image.new("RGB", (8, 8)), ("a key .",), regions=lambda: masks)


def test_a_cell_holds_what_covers_enough_of_it():
    sample = boxed(key=(slice(0, 2), slice(0, 8)), frog=(slice(4, 5), slice(0, 1)))
    truth = reading.cell_truth([sample], ["frog", "key", "sand"], 4, min_share=0.1)
    assert truth[0, :, 1].tolist() == [True, True, False, False]  # half of each upper cell
    assert not truth[0, :, [0, 2]].any()  # a sixteenth of a cell is too little
    assert reading.cell_truth([sample], ["frog"], 4, 1 / 16)[0, :, 0].tolist() == [False] * 2 + [
        True,
        False,
    ]
    # six tokens are two rows of three
    assert reading.cell_truth([sample], ["key"], 6)[0, :, 0].tolist() == [True] * 3 + [False] * 3


def test_without_regions_captions_tell_what_a_picture_holds():
    sample = Sample("b", None, ("Two keys on the sand.",))
    truth = reading.cell_truth([sample], ["key", "sand", "frog"], 4)
    assert truth.all(axis=1).tolist() == [[True, True, False]]


def test_scenes_hold_their_ground_in_the_last_row_and_things_on_their_side():
    samples = load_samples("scenes", n=6)
    for sample in samples:
        facts = sample.truth
        truth = reading.cell_truth([sample], [facts["place"], facts["item"]], 16)[0]
        place, item = truth.T.reshape(2, 4, 4)
        assert place[3].any() and not place[:3].any()
        columns = np.flatnonzero(item.any(axis=0))
        assert (columns.mean() < 1.5) == (facts["side"] == "left")


def test_shares_of_shuffled_cells_and_of_other_cells_are_those_of_loops():
    n, n_words = 24, 5
    right = RANDOM.random((n, n_words)) < 0.3
    truth = reading.Truth(right, np.repeat(np.arange(6), 4), np.tile(np.arange(4), 6))
    scores = {("lens", 3): RANDOM.random((n, n_words))}
    table = reading.judged(scores, truth).set_index("token")
    some = np.flatnonzero(right.any(axis=1))
    assert table.index.tolist() == some.tolist()
    for token in some:
        word = scores["lens", 3][token].argmax()
        row = table.loc[token]
        assert row["word"] == word and row["right"] == right[token, word]
        for column, groups in (("shuffled", truth.cells), ("elsewhere", truth.pictures)):
            others = [
                right[other, word]
                for other in some
                if other != token and groups[other] == groups[token]
            ]
            assert row[column] == pytest.approx(np.mean(others) if others else 0)
        first_three = np.argsort(-scores["lens", 3][token])[:3]
        assert row["recalled"] == pytest.approx(
            right[token, first_three].sum() / right[token].sum()
        )


def test_a_reader_that_always_says_the_same_does_not_exceed_shuffled_cells():
    right = np.zeros((40, 3), dtype=bool)
    right[np.arange(40), RANDOM.integers(0, 3, 40)] = True
    truth = reading.Truth(right, np.arange(40), np.zeros(40, dtype=int))
    blind = np.tile([0.0, 1.0, 0.0], (40, 1))
    table = reading.judged({("blind", 0): blind, ("seeing", 0): right.astype(float)}, truth)
    gains = reading.excess(table)
    assert gains["blind", 0].value == pytest.approx(0, abs=1e-9)
    assert gains["seeing", 0].value > 0.5 and gains["seeing", 0].low > 0.4
    chosen = reading.at_layers(table, reading.best_layers(table))
    assert reading.more_than(chosen, "seeing", "blind").value == pytest.approx(
        gains["seeing", 0].value
    )


def test_standardising_removes_what_a_word_scores_anyway():
    values = RANDOM.random((30, 4)) * [1, 10, 100, 0.1] + [5, -5, 0, 50]
    result = reading.standardised({"lens": values}, {"lens": values})["lens"]
    assert np.allclose(result.mean(axis=0), 0) and np.allclose(result.std(axis=0), 1, atol=1e-3)


def test_no_token_without_a_right_word_is_judged():
    truth = reading.Truth(np.zeros((2, 2), dtype=bool), np.arange(2), np.zeros(2, dtype=int))
    with pytest.raises(InputError, match="no token has a right word"):
        reading.judged({("lens", 0): np.ones((2, 2))}, truth)


def test_maps_tick_the_words_that_are_right():
    picture = Image.new("RGB", (8, 8))
    html = reading.maps(picture, {"a <lens>": ["key", "frog"]}, {"a <lens>": [True, False]})
    assert "✓ key" in html and "✓ frog" not in html and ">frog<" in html
    assert "a &lt;lens&gt;: 1 right" in html


def test_words_are_sorted_by_what_they_name():
    table = pd.DataFrame({"word": [0, 1, 1, 1], "right": [1, 1, 0, 0], "shuffled": 0.0})
    sample = Sample("a", None, truth={"subject": "frog", "place": "sand", "item": None})
    result = reading.by_factor(table, ["frog", "sand"], [sample])
    assert result["said"].to_dict() == {"subject": 0.25, "place": 0.75}
    assert result.loc["place", "right"] == pytest.approx(1 / 3)
