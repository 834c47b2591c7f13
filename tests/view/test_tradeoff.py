"""Each setting shows the blocks that run, its costs as bars and what is said, in a frame of its
own that the browser can change to.
"""

import re

import ipywidgets
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from ipywidgets.widgets.widget_link import Link
from PIL import Image

from xlvlms_tutorial.errors import FramesError
from xlvlms_tutorial.view.dial import tradeoff

PICTURES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
TOLD = {
    0: ["a red key", "two <b>balls</b>"],
    2: ["a red dog", "a dog & a ball"],
    4: ["dogs", "dogs"],
}
COSTS = pd.DataFrame(
    {"time": [1, 0.625, 0.3], "flops": [1, 0.5, 0.0], "score": [1, 1.1, 0.25]}, index=[0, 2, 4]
)
LAYERS = {0: [], 2: (4, 2), 4: range(1, 5)}


def widgets(top):
    yield top
    for child in getattr(top, "children", ()):
        yield from widgets(child)


def frames(top):
    """The frames as parsed HTML, in order."""
    found = [
        one.value
        for one in widgets(top)
        if isinstance(one, ipywidgets.HTML) and 'class="tradeoff"' in one.value
    ]
    return [BeautifulSoup(value, "html.parser") for value in found]


def bars(frame):
    """Width, number and kind of each bar by name."""
    names = [one.get_text() for one in frame.select(".costs b")]
    widths = [
        float(re.search(r"--share:([\d.]+)", one["style"])[1]) for one in frame.select(".costs i")
    ]
    kinds = [one["class"][0] for one in frame.select(".costs i")]
    numbers = [one.get_text() for one in frame.select(".costs span")]
    return {name: rest for name, *rest in zip(names, widths, numbers, kinds, strict=True)}


def test_bars_are_as_wide_as_the_shares_and_at_most_full():
    shown = [bars(frame) for frame in frames(tradeoff(PICTURES, TOLD, COSTS))]
    assert shown[1] == {
        "time": [0.625, "62 %", "cost"],
        "flops": [0.5, "50 %", "cost"],
        "score": [1, "110 %", "score"],
    }
    assert [frame["flops"][:2] for frame in shown] == [[1, "100 %"], [0.5, "50 %"], [0, "0 %"]]


def test_rows_of_costs_are_found_by_setting_whatever_their_order():
    shown = frames(tradeoff(PICTURES, TOLD, COSTS.iloc[::-1]))
    assert [bars(frame)["time"][0] for frame in shown] == [1, 0.625, 0.3]


def test_blocks_that_run_are_filled_and_those_left_out_hollow():
    shown = frames(tradeoff(PICTURES, TOLD, COSTS, LAYERS, 4))
    drawn = [[one["class"][0] for one in frame.select(".plan i")] for frame in shown]
    assert drawn == [["on"] * 4, ["on", "off", "on", "off"], ["off"] * 4]
    words = [
        "4 of 4 blocks run",
        "2 of 4 blocks run; skipped: 2, 4",
        "0 of 4 blocks run; skipped: 1, 2, 3, 4",
    ]
    assert [frame.select_one(".plan")["aria-label"] for frame in shown] == words
    assert [frame.select_one(".legend").get_text() for frame in shown] == words
    assert not frames(tradeoff(PICTURES, TOLD, COSTS))[0].select(".plan, .legend")


def test_texts_stand_beneath_their_pictures_escaped_and_marked_by_what_is_true_of_each():
    shown = frames(
        tradeoff(PICTURES, TOLD, COSTS, right=[["key", "red"], ["ball"]], wrong=[["ball"], ["dog"]])
    )
    assert [[one.get_text() for one in frame.select(".told")] for frame in shown] == list(
        TOLD.values()
    )
    marks = [[(one["class"][0], one.get_text()) for one in frame.select("mark")] for frame in shown]
    assert marks == [
        [("right", "red"), ("right", "key"), ("right", "balls")],
        [("right", "red"), ("wrong", "dog"), ("right", "ball")],
        [("wrong", "dogs")],
    ]
    assert not shown[0].select("b + b, .told b")
    assert not frames(tradeoff(PICTURES, TOLD, COSTS))[0].select("mark")


def test_frames_with_the_same_content_differ_and_pictures_are_embedded_once():
    costs = pd.DataFrame({"score": [0.5, 0.5]}, index=["a<b", "c"])
    top = tradeoff(PICTURES, {"a<b": ["x"] * 2, "c": ["x"] * 2}, costs, alt=["one", "two"])
    first, second = frames(top)
    assert first.select_one(".tradeoff")["data-setting"] == "a<b" and str(first) != str(second)
    html = "".join(one.value for one in widgets(top) if isinstance(one, ipywidgets.HTML))
    assert html.count("data:image/webp") == 2 and html.count('class="thumb ') == 4
    assert [one["aria-label"] for one in second.select(".thumb")] == ["one", "two"]


def test_slider_and_frames_are_linked_in_the_browser(monkeypatch):
    made, real = [], Link.__init__
    monkeypatch.setattr(
        Link, "__init__", lambda self, *a, **k: (made.append(self), real(self, *a, **k))[1]
    )
    top = tradeoff(PICTURES, TOLD, COSTS, names=["blocks"], start=2)
    (slider,) = (one for one in widgets(top) if isinstance(one, ipywidgets.SelectionSlider))
    (stack,) = (one for one in widgets(top) if isinstance(one, ipywidgets.Stack))
    assert [label for label, _ in slider.options] == ["0", "2", "4"]
    assert slider.description == "blocks"
    assert slider.index == stack.selected_index == 1
    assert [(link.source, link.target) for link in made] == [
        ((slider, "index"), (stack, "selected_index"))
    ]


def test_settings_of_two_parts_have_a_dropdown_and_a_slider():
    told = {(scope, k): [f"{scope} {k}"] for scope in ("both", "decode") for k in (0, 2)}
    costs = pd.DataFrame({"time": [1.0, 0.5, 1.0, 0.9]}, index=pd.MultiIndex.from_tuples(told))
    top = tradeoff(
        PICTURES[:1],
        told,
        costs,
        dict.fromkeys(told, [1]),
        2,
        names=("scope", "skipped"),
        start=("decode", 2),
    )
    (dropdown,) = (one for one in widgets(top) if isinstance(one, ipywidgets.Dropdown))
    assert (dropdown.description, dropdown.index) == ("scope", 1)
    assert [bars(frame)["time"][0] for frame in frames(top)] == costs["time"].tolist()
    assert [frame.select_one(".told").get_text() for frame in frames(top)] == [
        text for (text,) in told.values()
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"told": {0: TOLD[0]}}, "2 or more"),
        ({"told": TOLD | {2: ["a"]}}, r"setting 2 has 1 text"),
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
        ({"right": [["key"]]}, "right has not"),
        ({"wrong": ["key", "dog"]}, "wrong has not"),
        ({"start": 3}, "start"),
    ],
)
def test_what_does_not_go_together_is_refused(change, problem):
    with pytest.raises(FramesError, match=problem):
        tradeoff(PICTURES, **{"told": TOLD, "costs": COSTS} | change)
