"""Each setting shows the blocks that run, its costs as bars and what is said, in a frame of its
own that the browser can change to.
"""

import re

import ipywidgets
import pandas as pd
import pytest
from ipywidgets.widgets.widget_link import Link
from PIL import Image

from tests.support.frames import frames, widgets
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.view.dial import tradeoff

PICTURES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
CAPTIONS = {
    0: ["a red key", "two <b>balls</b>"],
    2: ["a red dog", "a dog & a ball"],
    4: ["dogs", "dogs"],
}
COSTS = pd.DataFrame(
    {"time": [1, 0.625, 0.3], "flops": [1, 0.5, 0.0], "score": [1, 1.1, 0.25]}, index=[0, 2, 4]
)
LAYERS = {0: [], 2: (4, 2), 4: range(1, 5)}


def bars(frame):
    """Width, number and kind of each bar by name."""
    names = [tag.get_text() for tag in frame.select(".costs b")]
    widths = [
        float(re.search(r"--share:([\d.]+)", tag["style"])[1]) for tag in frame.select(".costs i")
    ]
    kinds = [tag["class"][0] for tag in frame.select(".costs i")]
    numbers = [tag.get_text() for tag in frame.select(".costs span")]
    return {name: rest for name, *rest in zip(names, widths, numbers, kinds, strict=True)}


def test_bars_are_as_wide_as_the_shares_and_at_most_full():
    views = [bars(frame) for frame in frames(tradeoff(PICTURES, CAPTIONS, COSTS))]
    assert views[1] == {
        "time": [0.625, "62 %", "cost"],
        "flops": [0.5, "50 %", "cost"],
        "score": [1, "110 %", "score"],
    }
    assert [frame["flops"][:2] for frame in views] == [[1, "100 %"], [0.5, "50 %"], [0, "0 %"]]


def test_rows_of_costs_are_found_by_setting_whatever_their_order():
    views = frames(tradeoff(PICTURES, CAPTIONS, COSTS.iloc[::-1]))
    assert [bars(frame)["time"][0] for frame in views] == [1, 0.625, 0.3]


def test_blocks_that_run_are_filled_and_those_left_out_hollow():
    views = frames(tradeoff(PICTURES, CAPTIONS, COSTS, LAYERS, 4))
    classes = [[tag["class"][0] for tag in frame.select(".plan i")] for frame in views]
    assert classes == [["on"] * 4, ["on", "off", "on", "off"], ["off"] * 4]
    words = [
        "4 of 4 blocks run",
        "2 of 4 blocks run; skipped: 2, 4",
        "0 of 4 blocks run; skipped: 1, 2, 3, 4",
    ]
    assert [frame.select_one(".plan")["aria-label"] for frame in views] == words
    assert [frame.select_one(".legend").get_text() for frame in views] == words
    assert not frames(tradeoff(PICTURES, CAPTIONS, COSTS))[0].select(".plan, .legend")


def test_texts_stand_beneath_their_pictures_escaped_and_marked_by_what_is_true_of_each():
    views = frames(
        tradeoff(
            PICTURES, CAPTIONS, COSTS, correct=[["key", "red"], ["ball"]], wrong=[["ball"], ["dog"]]
        )
    )
    assert [[tag.get_text() for tag in frame.select(".card-caption")] for frame in views] == list(
        CAPTIONS.values()
    )
    marks = [[(tag["class"][0], tag.get_text()) for tag in frame.select("mark")] for frame in views]
    assert marks == [
        [("right", "red"), ("right", "key"), ("right", "balls")],
        [("right", "red"), ("wrong", "dog"), ("right", "ball")],
        [("wrong", "dogs")],
    ]
    assert not views[0].select("b + b, .card-caption b")
    assert not frames(tradeoff(PICTURES, CAPTIONS, COSTS))[0].select("mark")


def test_frames_with_the_same_content_differ_and_pictures_are_embedded_once():
    costs = pd.DataFrame({"score": [0.5, 0.5]}, index=["a<b", "c"])
    top = tradeoff(PICTURES, {"a<b": ["x"] * 2, "c": ["x"] * 2}, costs, alt=["one", "two"])
    first, second = frames(top)
    assert first.select_one(".tradeoff")["data-setting"] == "a<b" and str(first) != str(second)
    html = "".join(widget.value for widget in widgets(top) if isinstance(widget, ipywidgets.HTML))
    assert html.count("data:image/webp") == 2 and html.count('class="thumb ') == 4
    assert [tag["aria-label"] for tag in second.select(".thumb")] == ["one", "two"]


def test_slider_and_frames_are_linked_in_the_browser(monkeypatch):
    links, real = [], Link.__init__
    monkeypatch.setattr(
        Link, "__init__", lambda self, *a, **k: (links.append(self), real(self, *a, **k))[1]
    )
    top = tradeoff(PICTURES, CAPTIONS, COSTS, names=["blocks"], start=2)
    (slider,) = (
        widget for widget in widgets(top) if isinstance(widget, ipywidgets.SelectionSlider)
    )
    (stack,) = (widget for widget in widgets(top) if isinstance(widget, ipywidgets.Stack))
    assert [label for label, _ in slider.options] == ["0", "2", "4"]
    assert slider.description == "blocks"
    assert slider.index == stack.selected_index == 1
    assert [(link.source, link.target) for link in links] == [
        ((slider, "index"), (stack, "selected_index"))
    ]


def test_settings_of_two_parts_have_a_dropdown_and_a_slider():
    captions = {(scope, k): [f"{scope} {k}"] for scope in ("both", "decode") for k in (0, 2)}
    costs = pd.DataFrame({"time": [1.0, 0.5, 1.0, 0.9]}, index=pd.MultiIndex.from_tuples(captions))
    top = tradeoff(
        PICTURES[:1],
        captions,
        costs,
        dict.fromkeys(captions, [1]),
        2,
        names=("scope", "skipped"),
        start=("decode", 2),
    )
    (dropdown,) = (widget for widget in widgets(top) if isinstance(widget, ipywidgets.Dropdown))
    assert (dropdown.description, dropdown.index) == ("scope", 1)
    assert [bars(frame)["time"][0] for frame in frames(top)] == costs["time"].tolist()
    assert [frame.select_one(".card-caption").get_text() for frame in frames(top)] == [
        text for (text,) in captions.values()
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answers": {0: CAPTIONS[0]}}, "2 or more"),
        ({"answers": CAPTIONS | {2: ["a"]}}, r"setting 2 has 1 text"),
        ({"costs": COSTS[:2]}, "no costs of setting 4"),
        ({"costs": COSTS[[]]}, "no costs of setting 0"),
        ({"costs": COSTS.replace(0.3, -0.3)}, "time of setting 4 is -0.3"),
        ({"costs": COSTS.replace(0.3, float("nan"))}, "is nan"),
        ({"costs": COSTS.astype(str)}, "is '1.0'"),
        ({"costs": pd.concat([COSTS, COSTS[:1]])}, "two rows of costs for setting 0;"),
        ({"layers": LAYERS}, "only one of layers"),
        ({"n_layers": 4}, "only one of layers"),
        ({"layers": {0: []}, "n_layers": 4}, "no layers of setting 2"),
        ({"layers": LAYERS, "n_layers": 3}, "allowed: 1 to 3"),
        ({"correct": [["key"]]}, "correct has not"),
        ({"wrong": ["key", "dog"]}, "wrong has not"),
        ({"start": 3}, "start"),
    ],
)
def test_what_does_not_go_together_is_refused(change, problem):
    with pytest.raises(InputError, match=problem):
        tradeoff(PICTURES, **{"answers": CAPTIONS, "costs": COSTS} | change)
