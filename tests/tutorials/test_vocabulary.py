"""Words of tokens and the squares they are written on, on cases made by hand."""

import pandas as pd
import pytest
from PIL import Image

from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.tutorials import vocabulary
from xlvlms_tutorial.view import plots

SCENES = [
    Sample(item, Image.new("RGB", (32, 32), colour), ("a red key .",), truth={"item": item})
    for item, colour in (("key", "red"), ("gem", "blue"), ("box", "green"), ("sign", "white"))
]


@pytest.fixture(scope="module")
def vlm():
    return tiny_reader()


def words(rows):
    return pd.DataFrame(rows, columns=["layer", "sample", "row", "rank", "word", "token_id"])


@pytest.mark.parametrize(
    "word, value, named",
    [
        (" climbs", "climbing", True),
        ("Gems", "gem", True),
        ("zomb", "zombie", True),
        ("zom", "zombie", False),
        ("monkey", "key", False),
        ("", "key", False),
    ],
)
def test_a_word_names_a_value_by_its_forms_and_long_pieces(word, value, named):
    assert vocabulary.names(word, value) is named


def test_the_words_of_a_token_are_compared_with_its_own_picture_and_the_next():
    table = words([(0, 0, 0, 1, "the", 1), (0, 0, 0, 2, "keys", 2), (0, 3, 1, 1, "key", 3)])
    named = vocabulary.naming(table, SCENES)
    assert named["own picture"].tolist() == [True, False]
    assert named["another picture"].tolist() == [False, True]  # the last is turned to the first
    assert vocabulary.by_factor(table, SCENES, ["item", "colour"]).to_dict() == {
        "item": 0.0,
        "colour": 0.0,
    }


def test_words_that_follow_the_place_agree_by_place_and_words_of_a_picture_by_picture():
    by_place = words([(0, s, 2 * s + c, 1, "", c) for s in range(3) for c in range(2)])
    by_picture = words([(0, s, 2 * s + c, 1, "", s) for s in range(3) for c in range(2)])
    assert list(vocabulary.agreement(by_place, 0).values()) == [1, 0]
    assert list(vocabulary.agreement(by_picture, 0).values()) == [0, 1]


@pytest.mark.parametrize(
    "n, size, grid", [(16, (40, 40), (4, 4)), (12, (40, 30), (3, 4)), (12, (30, 40), (4, 3))]
)
def test_tokens_cover_a_picture_in_its_shape(n, size, grid):
    top = pd.DataFrame({"word": ["a"] * n, "probability": 0.5})
    html = vocabulary.word_frame(Image.new("RGB", size), top)
    rows, columns = grid
    assert f"repeat({rows},minmax(0,1fr))/repeat({columns},minmax(0,1fr))" in html


def test_words_are_written_on_every_other_cell_where_there_are_many_and_escaped():
    top = pd.DataFrame({"word": [f"<{k}>" for k in range(16)], "probability": 0.5})
    html = vocabulary.word_frame(Image.new("RGB", (40, 40)), top, most=2)
    assert html.count("place-content:center") == 4
    assert ">&lt;10&gt;<" in html and ">&lt;1&gt;<" not in html


def test_tokens_of_pictures_and_captions_are_told_apart(vlm):
    P, T = vocabulary.tokens(vlm, SCENES[:2], [0, 3])
    assert len(P[3]) == 2 * 4
    assert T.table["span"].unique().tolist() == ["answer"]
    table = vocabulary.words_of(vlm, P, k=3)
    assert len(table) == 2 * 8 * 3
    assert set(table["sample"]) == {0, 1}


def test_a_crowd_is_nearer_to_its_other_half_than_to_the_other_kind(vlm):
    far = vocabulary.crowds(vlm, *vocabulary.tokens(vlm, SCENES, [0]), 0)
    assert far["T against T"] == pytest.approx(0, abs=1e-5)  # all captions are the same
    assert far["P against T"] > far["T against T"]


def test_distances_name_depths_and_crowds(vlm):
    row = vocabulary.distances(vlm, SCENES, depths=[0.34, 1.0])
    assert list(row)[:2] == ["34% of depth", "100% of depth"]
    assert row["100% of depth"].low <= row["100% of depth"].value <= row["100% of depth"].high


def test_bars_are_shares_of_the_most_frequent_words(vlm):
    P, _ = vocabulary.tokens(vlm, SCENES, [0])
    figure = vocabulary.histogram_figure(vlm, {"one": P[0], "two": P[0][:3]}, k=1, n=2)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == sorted(widths, reverse=True) and max(widths) <= 1
    plots.png(figure)
