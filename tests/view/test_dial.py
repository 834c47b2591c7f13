"""The dial shows each picture with what is said of it at a setting, embeds pictures once,
and marks words in escaped text.
"""

import ipywidgets
import pytest
from ipywidgets.widgets.widget_link import Link
from PIL import Image

from tests.support.frames import frames, widgets
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.text import STYLE_WORDS
from xlvlms_tutorial.view.dial import dial

PICTURES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
CAPTIONS = {
    0: ["a red key", "two <b>keys</b>"],
    0.5: ["red & blue", "quiet snow"],
    1: ["", "KEYS! keyboards"],
}


def texts(frame):
    return [tag.get_text() for tag in frame.select(".card-caption")]


def marked(frame):
    return [(mark["class"][0], mark.get_text()) for mark in frame.select("mark")]


def test_each_setting_shows_every_text_beneath_its_picture():
    views = frames(dial(PICTURES, CAPTIONS))
    assert [texts(frame) for frame in views] == list(CAPTIONS.values())
    for frame in views:
        cards = frame.select(".dial > div")
        assert [len(card.select(".thumb")) for card in cards] == [1, 1]
        assert [card.select_one(".thumb")["aria-label"] for card in cards] == [
            "picture 1",
            "picture 2",
        ]
    assert not views[0].select("b, mark, .card-question")


def test_pictures_are_embedded_once():
    html = "".join(
        widget.value
        for widget in widgets(dial(PICTURES, CAPTIONS, size=32))
        if isinstance(widget, ipywidgets.HTML)
    )
    assert html.count("data:image/webp") == 2
    assert html.count('class="thumb ') == 6


def test_two_dials_of_a_page_keep_each_its_own_size():
    small, large = (frames(dial(PICTURES, CAPTIONS, size=size)) for size in (32, 64))
    assert {frame.select_one(".dial")["style"] for frame in small} == {"--size:32px"}
    assert {frame.select_one(".dial")["style"] for frame in large} == {"--size:64px"}


def test_slider_and_frames_are_linked_in_the_browser(monkeypatch):
    links, real = [], Link.__init__
    monkeypatch.setattr(
        Link, "__init__", lambda self, *a, **k: (links.append(self), real(self, *a, **k))[1]
    )
    top = dial(PICTURES, CAPTIONS, start=0.5)
    (slider,) = (
        widget for widget in widgets(top) if isinstance(widget, ipywidgets.SelectionSlider)
    )
    (stack,) = (widget for widget in widgets(top) if isinstance(widget, ipywidgets.Stack))
    assert [label for label, _ in slider.options] == ["0", "0.5", "1"]
    assert slider.description == "strength"
    assert slider.index == stack.selected_index == 1
    assert [(link.source, link.target) for link in links] == [
        ((slider, "index"), (stack, "selected_index"))
    ]


def test_settings_of_two_parts_have_a_dropdown_and_a_slider():
    captions = {
        (layer, strength): [f"{layer} {strength}"] for layer in (4, 8) for strength in (0, 1)
    }
    top = dial(PICTURES[:1], captions, names=("layer", "strength"), start=(8, 0))
    (dropdown,) = (widget for widget in widgets(top) if isinstance(widget, ipywidgets.Dropdown))
    assert (dropdown.description, dropdown.index) == ("layer", 1)
    assert [texts(frame) for frame in frames(top)] == list(captions.values())


def test_words_are_marked_whole_in_their_forms_and_kinds():
    views = frames(dial(PICTURES, CAPTIONS, ["key", "red"]))
    assert [marked(frame) for frame in views] == [
        [("kind-0", "red"), ("kind-0", "key"), ("kind-0", "keys")],
        [("kind-0", "red")],
        [("kind-0", "KEYS")],
    ]
    assert [texts(frame) for frame in views] == list(CAPTIONS.values())
    styled = frames(dial(PICTURES, CAPTIONS, STYLE_WORDS))[1]
    assert marked(styled) == [
        ("kind-1", "red"),
        ("kind-1", "blue"),
        ("kind-2", "quiet"),
        ("kind-0", "snow"),
    ]
    assert [mark["title"] for mark in styled.select("mark")] == [
        "colour",
        "colour",
        "mood",
        "place",
    ]


def test_marks_do_not_break_what_is_escaped():
    captions = [["amp & lt <i>amp</i>"], ['a "traffic  lights" \u017fnow']]
    first, second = frames(
        dial(
            PICTURES[:1],
            dict(enumerate(captions)),
            {'a"<b>': ["amp", "lt", "traffic light", "snow"], "none": []},
        )
    )
    assert texts(first) == captions[0] and texts(second) == captions[1]
    assert [word for _, word in marked(first)] == ["amp", "lt", "amp"]
    assert [word for _, word in marked(second)] == ["traffic  lights", "\u017fnow"]
    assert first.select_one("mark")["title"] == 'a"<b>' and not first.select("i, b")


def test_one_word_is_a_word_not_its_letters():
    assert [marked(frame) for frame in frames(dial(PICTURES, CAPTIONS, "blue"))] == [
        [],
        [("kind-0", "blue")],
        [],
    ]


def test_questions_stand_above_and_alternative_texts_are_taken():
    frame = frames(
        dial(PICTURES, CAPTIONS, questions=["Where <is> it?", "Who?"], alt=["a key", "b"])
    )[2]
    assert [line.get_text() for line in frame.select(".card-question")] == [
        "Where <is> it?",
        "Who?",
    ]
    assert [tag["aria-label"] for tag in frame.select(".thumb")] == ["a key", "b"]


@pytest.mark.parametrize(
    ("captions", "options", "problem"),
    [
        ({0: ["a", "b"]}, {}, "a dial needs 2 or more"),
        ({}, {}, "a dial needs 2 or more"),
        ({0: ["a", "b"], 1: ["a"]}, {}, r"setting 1 has 1 text\(s\) for 2 picture"),
        ({0: ["a", "b"], 1: "ab"}, {}, "setting 1 has one text"),
        (CAPTIONS, {"questions": ["a"]}, "questions has 1"),
        (CAPTIONS, {"start": 2}, "start"),
        (CAPTIONS, {"names": ("layer", "strength")}, "names"),
        (CAPTIONS, {"alt": ["a"]}, "alternative texts"),
        (CAPTIONS, {"highlight": dict.fromkeys("abcd", ())}, "4 kinds"),
    ],
)
def test_what_does_not_go_together_is_refused(captions, options, problem):
    with pytest.raises(InputError, match=problem):
        dial(PICTURES, captions, **options)


def test_settings_with_the_same_texts_are_different_frames():
    views = frames(dial(PICTURES, {1: ["same"] * 2, 2: ["same"] * 2}))
    assert texts(views[0]) == texts(views[1]) and str(views[0]) != str(views[1])
