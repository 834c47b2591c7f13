"""A widget is joined to its frames in the browser, its pictures have words, and bad input is refused."""

import base64
import io

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from ipywidgets.widgets.widget_link import Link
from PIL import Image

from xlvlms_tutorial.view.widgets import FramesError, Html, picture_card, picture_html, stack, token_strip

HTML = ["<b>one</b>", "<b>two</b>", "<b>three</b>"]


@pytest.fixture
def links(monkeypatch):
    made = []
    real = Link.__init__
    monkeypatch.setattr(Link, "__init__", lambda self, *a, **k: (made.append(self), real(self, *a, **k))[1])
    return made


def test_slider_and_stack_are_linked_in_the_browser(links):
    slider, shown = stack(HTML, [0, 10, 20], "layer").children
    assert isinstance(shown, ipywidgets.Stack)
    assert [part.value for part in shown.children] == [f'<div class="frame">{text}</div>' for text in HTML]
    (link,) = links
    assert (link.source, link.target) == ((slider, "index"), (shown, "selected_index"))
    assert [label for label, _ in slider.options] == ["0", "10", "20"]


def test_dropdown_is_linked_too(links):
    chooser, shown = stack(HTML, "abc", "word", control="dropdown").children
    assert isinstance(chooser, ipywidgets.Dropdown)
    assert links[0].target == (shown, "selected_index")


def test_play_moves_the_slider_over_all_frames(links):
    head, _ = stack(HTML, "abc", "frame", play=True).children
    slider, player = head.children
    assert (player.min, player.max) == (0, 2)
    assert (player, "value") in [link.source for link in links]
    assert [link.target for link in links if link.source[0] is player] == [(slider, "index")]


def test_two_frames_may_carry_one_label():
    slider, _ = stack(HTML, ["the", "cat", "the"], "token").children
    slider.index = 2
    assert slider.value == 2


def test_labels_count_the_frames_by_default_and_start_is_shown_first():
    slider, shown = stack(HTML, description="layer", start=2).children
    assert [label for label, _ in slider.options] == ["0", "1", "2"]
    assert (slider.index, shown.selected_index) == (2, 2)


def decoded(part: ipywidgets.HTML) -> Image.Image:
    code = part.value.split("base64,")[1].split('"')[0]
    return Image.open(io.BytesIO(base64.b64decode(code)))


def test_pictures_become_images_with_alternative_text():
    images = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    _, shown = stack(images, ["red", "blue"], "colour", alt=['a "red" field', "a blue field"]).children
    assert 'alt="a &quot;red&quot; field"' in shown.children[0].value
    assert [decoded(part).convert("RGB").getpixel((0, 0)) for part in shown.children] == [(255, 0, 0), (0, 0, 255)]


def test_alternative_text_is_description_and_label_by_default():
    images = [Image.new("RGB", (2, 2))] * 2
    _, shown = stack(images, [1, 2], "layer").children
    assert 'alt="layer: 2"' in shown.children[1].value


def test_figures_are_drawn_and_closed():
    figures = [plt.figure(figsize=(1, 1)) for _ in range(2)]
    _, shown = stack(figures, [0, 1], "layer").children
    assert decoded(shown.children[0]).format == "PNG"
    assert not plt.get_fignums()


def test_without_stack_the_kernel_changes_the_frame(monkeypatch):
    monkeypatch.delattr(ipywidgets, "Stack")
    slider, shown = stack(HTML, "abc", "frame").children
    slider.index = 2
    assert "three" in shown.value


@pytest.mark.parametrize(
    ("frames", "labels", "options", "words"),
    [
        (HTML[:1], ["a"], {}, "2 or more"),
        (HTML, ["a"], {}, "1 labels for 3 frames"),
        (HTML, "abc", {"alt": ["x"]}, "1 alternative texts"),
        (HTML, "abc", {"start": 3}, "0 to 2"),
        (HTML, "abc", {"control": "knob"}, "slider, dropdown"),
    ],
)
def test_bad_input_is_refused_with_what_is_allowed(frames, labels, options, words):
    with pytest.raises(FramesError, match=words):
        stack(frames, labels, "frame", **options)


def test_picture_html_is_shown_by_a_notebook_and_keeps_its_pixels():
    shown = picture_html(Image.new("RGB", (2, 2), "red"), "a red field", width=64)
    assert shown._repr_html_() == shown
    assert "width:64px" in shown
    assert decoded(ipywidgets.HTML(shown)).convert("RGB").getpixel((1, 1)) == (255, 0, 0)


def test_picture_card_marks_wrong_answers_and_escapes_what_a_model_says():
    answers = [("Is there a key?", "yes", ""), ("What colour?", "<b>", "(is: red)")]
    card = picture_card(Image.new("RGB", (2, 2)), "a & b", answers)
    assert card.count("<tr") == 2
    assert card.count("class=wrong") == 1
    assert "a &amp; b" in card
    assert "&lt;b&gt;" in card


def test_token_strip_draws_a_run_of_image_tokens_as_one():
    strip = token_strip(["<s>", "P", "P", "P", "Why", "\n"], ["system", "image", "image", "image", "question", "question"])
    assert isinstance(strip, Html)
    assert strip.count('class="token ') == 4
    assert "image \u00d7 3" in strip
    assert "\u21b5" in strip


def test_token_strip_tints_by_weight_and_shows_the_picture():
    strip = token_strip(["a", "b"], weights=[0.25, 1], picture=Image.new("RGB", (2, 2)))
    assert "--weight:0.250" in strip
    assert "--weight:1.000" in strip
    assert strip.count("<img") == 1


def test_token_strip_refuses_spans_that_do_not_fit():
    with pytest.raises(ValueError, match="zip"):
        token_strip(["a", "b"], ["image"])
