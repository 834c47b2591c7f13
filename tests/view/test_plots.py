"""Figures show what they were given, look the same twice, and leave nothing open."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.view import plots


@pytest.fixture(autouse=True)
def clean():
    with plt.rc_context():
        plots.theme()
        yield
    plt.close("all")


@pytest.fixture
def table():
    return pd.DataFrame(
        {"value": [0.9, 0.5], "low": [0.8, 0.4], "high": [0.95, 0.65]}, index=["colour", "count"]
    )


def test_theme_sets_an_opaque_light_ground_and_the_colour_blind_palette():
    assert min(to_rgb(plt.rcParams["figure.facecolor"])) > 0.9
    first = plt.rcParams["axes.prop_cycle"].by_key()["color"][0]
    assert to_rgb(first) == pytest.approx(to_rgb("#0173b2"), abs=0.005)


def test_intervals_draws_each_row_where_its_numbers_are(table):
    ax = plots.intervals(table, xlabel="share", xlim=(0, 1))
    assert list(ax.lines[0].get_xdata()) == [0.9, 0.5]
    ends = [segment[:, 0] for segment in ax.collections[0].get_segments()]
    assert np.allclose(ends, [[0.8, 0.95], [0.4, 0.65]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["colour", "count"]
    assert (ax.get_xlabel(), ax.get_xlim()) == ("share", (0, 1))


def test_intervals_puts_the_first_row_on_top_and_a_number_to_beat_as_a_line(table):
    ax = plots.intervals(table, reference=0.25)
    bottom, top = ax.get_ylim()
    assert bottom > top
    assert list(ax.lines[-1].get_xdata()) == [0.25, 0.25]


def test_intervals_ticks_a_series_by_name_and_leaves_out_what_it_lacks(table):
    ax = plots.intervals(table, reference=pd.Series({"count": 0.3, "side": 0.5}))
    ticks = ax.lines[-1]
    assert np.array_equal(ticks.get_xdata(), [np.nan, 0.3], equal_nan=True)
    assert list(ticks.get_ydata()) == [0, 1]


def test_intervals_uses_the_axes_it_is_given(table):
    _, ax = plt.subplots()
    assert plots.intervals(table, ax=ax) is ax


def test_lines_draws_each_column_over_the_index():
    frame = pd.DataFrame({"image": [1.0, 10.0, 100.0], "answer": [2.0, 3.0, 4.0]}).rename_axis(
        "layer"
    )
    ax = plots.lines(frame, ylabel="norm", log=True)
    assert [list(line.get_ydata()) for line in ax.lines[:2]] == [[1, 10, 100], [2, 3, 4]]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("layer", "norm", "log")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["image", "answer"]
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()


def test_a_gallery_with_a_caption_too_few_is_refused():
    with pytest.raises(InputError, match="images: 2, captions: 1"):
        plots.gallery([Image.new("RGB", (4, 4))] * 2, ["one"])


def test_gallery_shows_every_picture_with_its_caption():
    images = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(5)]
    figure = plots.gallery(images, [f"caption {n}" for n in range(5)], columns=2)
    filled = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in filled] == [f"caption {n}" for n in range(5)]
    assert [int(ax.images[0].get_array()[0, 0, 0]) for ax in filled] == list(range(5))


def test_lens_writes_the_words_with_layer_0_at_the_bottom():
    values = np.array([[0.1, 0.9], [0.4, 1.0]])
    figure = plots.lens(values, [[" a", "$b"], ["c", "longer than ten"]], ["x", "y"])
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == ["a", r"\$b", "c", "longer th"]
    assert np.array_equal(ax.images[0].get_array(), values)
    bottom, top = ax.get_ylim()
    assert bottom < top
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [(" the ", "the"), ("\n", "\\n"), ("\u4e2d\u6587", "\u00b7\u00b7"), ("caf\u00e9", "caf\u00e9")],
)
def test_printable_keeps_what_the_font_can_draw(word, expected):
    assert plots.printable(word) == expected


def test_png_gives_the_same_bytes_twice_and_closes_the_figure(table):
    first = plots.png(plots.intervals(table).figure)
    second = plots.png(plots.intervals(table).figure)
    assert first == second
    assert not plt.get_fignums()
    assert Image.open(io.BytesIO(first)).format == "PNG"


PRICES = [
    "Pay $5 #1 or $10.",
    "costs $5% $",
    "$\\frac{1$",
    "$$",
    r"\$5 and $6_$",
    "$a$ & $b",
    "from 5 $ to 6 $ a $piece$",
]


def texts_of(figure_or_axes):
    """Draw, so that every text is parsed; the texts as they are shown."""
    figure = getattr(figure_or_axes, "figure", figure_or_axes)
    png = plots.png(figure)
    assert Image.open(io.BytesIO(png)).format == "PNG"
    return [
        text._preprocess_math(text.get_text())[0]
        for text in figure.findobj(Text)
        if text.get_visible()
    ]


@pytest.mark.parametrize("price", PRICES)
def test_a_text_is_drawn_as_it_is_written(price, table):
    picture, values = Image.new("RGB", (8, 8)), pd.DataFrame({"a": [1.0, 2.0], "b": [2.0, 1.0]})
    named = values.rename(columns={"a": price}).rename_axis(
        index=f"i {price}", columns=f"c {price}"
    )
    profiled = pd.concat([layers(price), layers("text")])
    everywhere = {
        "gallery": plots.gallery([picture] * 2, [price, "x"], width=20),
        "heats": plots.heatmaps([picture] * 2, [np.eye(2)] * 2, [price, "x"], width=20),
        "intervals": plots.intervals(table.rename(index={"colour": price}), xlabel=f"x {price}"),
        "lines": plots.lines(named, ylabel=f"y {price}"),
        "lines over texts": plots.lines(values.set_axis([price, "x"])),
        "lines, log": plots.lines(named, ylabel=f"y {price}", log=True),
        "profile": plots.profile(profiled, group="kind", ylabel=f"y {price}", xlabel=f"x {price}"),
        "points": plots.points([[0, 1], [2, 3]], [price, "x"], ["x", price]),
        "matrix": plots.matrix(named.set_axis([price, "x"]).rename_axis(f"i {price}")),
        "lens": plots.lens([[0.1], [0.9]], [[price], ["a"]], [price], [price, "x"]),
    }
    for name, figure in everywhere.items():
        texts = texts_of(figure)
        assert price in texts, name  # lens cuts its words, and has the price at an axis too
        for place in ("x", "y", "i", "c"):
            assert f"{place} {price}" in texts or not any(
                text.startswith(f"{place} ") for text in texts
            ), name


def test_axes_made_before_draw_texts_as_they_are_written_too(table):
    _, ax = plt.subplots()
    texts = texts_of(
        plots.intervals(table.rename(index={"colour": PRICES[0]}), xlabel=PRICES[1], ax=ax)
    )
    assert {PRICES[0], PRICES[1]} <= set(texts)


def test_labels_that_are_numbers_stay_numbers():
    ax = plots.lines(pd.DataFrame({1: [1.0, 2.0], 2: [2.0, 1.0]}, index=[10, 20]))
    assert [line.get_xdata().tolist() for line in ax.lines[:2]] == [[10, 20]] * 2
    assert plots.literal(3) == 3 and plots.literal(None) is None


def test_labels_of_several_levels_are_drawn_as_they_are_written():
    rows = pd.MultiIndex.from_product([["$5 $6_", "a"], [1, 2]], names=["$x_$", "n"])
    texts = texts_of(plots.matrix(pd.DataFrame({"c": range(4)}, index=rows)))
    assert "$5 $6_-1" in texts and "a-2" in texts


def test_a_word_is_cut_between_signs_not_within_an_escaped_one():
    assert plots.printable("12345678$9", 9) == r"12345678\$"
    assert plots.printable("$$$", 2) == r"\$\$"


@pytest.mark.parametrize(
    ("text", "letters", "expected"),
    [
        ("one two three", 7, "one two\nthree"),
        ("incomprehensible", 5, "incomprehensible"),
        ("", 5, ""),
        ("a b", 80, "a b"),
    ],
)
def test_wrapped_breaks_between_words_only(text, letters, expected):
    assert plots.wrapped(text, letters) == expected


def layers(name):
    return pd.DataFrame(
        {
            "layer": [0, 1, 2],
            "value": [1.0, 2, 3],
            "low": [0.5, 1, 2],
            "high": [2.0, 3, 4],
            "kind": name,
        }
    )


def test_profile_draws_a_line_and_a_band_for_each_group():
    ax = plots.profile(
        pd.concat([layers("image"), layers("text")]), group="kind", reference=1.5, ylabel="cosine"
    )
    assert [list(line.get_ydata()) for line in ax.lines[:2]] == [[1, 2, 3]] * 2
    assert len(ax.collections) == 2 and ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.5, 4)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["image", "text"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.lines[2].get_ydata()[0]) == (
        "layer",
        "cosine",
        1.5,
    )


def test_profile_of_one_line_has_no_legend():
    assert plots.profile(layers("image")).get_legend() is None


def test_points_are_where_they_were_put_in_the_colours_of_their_labels():
    ax = plots.points([[0, 1], [2, 3], [4, 5]], ["image", "text", "image"], ["P", "T", "P"])
    assert ax.collections[0].get_offsets().tolist() == [[0, 1], [2, 3], [4, 5]]
    colours = ax.collections[0].get_facecolors()
    assert np.allclose(colours[0], colours[2]) and not np.allclose(colours[0], colours[1])
    assert plots.points([[0, 1], [1, 1]], ["a", "b"], legend=False).get_legend() is None


def test_matrix_writes_each_number_and_leaves_nan_empty():
    ax = plots.matrix(
        pd.DataFrame([[0.123, np.nan], [0.5, 1]], index=["a", "b"], columns=["c", "d"])
    )
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["0.12", "0.50", "1.00"]


def pixels(ax):
    """What was drawn in the axes, (height, width, 3)."""
    ax.set_position([0, 0, 1, 1])
    ax.figure.set_layout_engine("none")
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())[..., :3].astype(float)


def test_heat_tints_cells_by_sign_and_magnitude_where_they_are():
    values = np.array([[0.0, 2.0], [-2.0, 1.0]])
    _, ax = plt.subplots(figsize=(2, 2))
    image = pixels(plots.heatmap(Image.new("RGB", (10, 10), (120, 200, 40)), values, ax))
    side = len(image) // 2
    cells = np.array(
        [
            [image[r : r + side, c : c + side].mean(axis=(0, 1)) for c in (0, side)]
            for r in (0, side)
        ]
    )
    redness = cells[..., 0] - cells[..., 2]
    assert abs(redness[0, 0]) < 2 and redness[1, 0] < -50
    assert redness[0, 1] > 1.6 * redness[1, 1] > 50


def test_heat_of_nothing_shows_the_picture_and_vmax_sets_the_scale():
    picture, zeros = Image.new("RGB", (4, 6)), np.zeros((3, 2))
    assert not plots.heatmap(picture, zeros).images[1].get_alpha().any()
    weak = plots.heatmap(picture, zeros + 0.1, alpha=0.5, vmax=0.4)
    assert np.allclose(weak.images[1].get_alpha(), 0.125)
    assert np.allclose(
        plots.heatmap(picture, zeros + 9, alpha=0.5, vmax=0.4).images[1].get_alpha(), 0.5
    )
    assert [list(image.get_extent()) for image in weak.images] == [[0, 4, 6, 0]] * 2


def test_heats_share_one_scale_and_keep_their_captions():
    images, maps = [Image.new("RGB", (8, 8))] * 3, [np.eye(2) * size for size in (1, 2, -4)]
    figure = plots.heatmaps(images, maps, ["a", "b", "c"], columns=2)
    filled = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in filled] == ["a", "b", "c"]
    strongest = np.array([ax.images[1].get_alpha().max() for ax in filled])
    assert np.allclose(strongest / strongest[2], [0.25, 0.5, 1])


def test_heat_refuses_what_has_no_cells():
    picture = Image.new("RGB", (4, 4))
    for values in ([1.0, 2.0], [[np.nan]], np.empty((0, 2))):
        with pytest.raises(InputError, match="finite numbers"):
            plots.heatmap(picture, values)
    with pytest.raises(InputError, match="maps: 1"):
        plots.heatmaps([picture] * 2, [np.eye(2)], ["a", "b"])
    with pytest.raises(InputError, match="no maps"):
        plots.heatmaps([], [], [])
