"""A widget is joined to its frames in the browser, its pictures have
words, and bad input is refused.
"""

import base64
import io
import re

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from ipywidgets.embed import embed_data
from ipywidgets.widgets.widget_link import Link
from PIL import Image

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.view.cards import (
    Html,
    concept_card,
    picture_card,
    picture_html,
    thumbnails,
    token_strip,
)
from xlvlms_tutorial.view.dial import dial, tradeoff
from xlvlms_tutorial.view.widgets import explorer, stack

HTML = ["<b>one</b>", "<b>two</b>", "<b>three</b>"]


@pytest.fixture
def links(monkeypatch):
    created = []
    real = Link.__init__
    monkeypatch.setattr(
        Link, "__init__", lambda self, *a, **k: (created.append(self), real(self, *a, **k))[1]
    )
    return created


def test_slider_and_stack_are_linked_in_the_browser(links):
    slider, pane = stack(HTML, [0, 10, 20], "layer").children
    assert isinstance(pane, ipywidgets.Stack)
    assert [part.value for part in pane.children] == [
        f'<div class="frame">{text}</div>' for text in HTML
    ]
    (link,) = links
    assert (link.source, link.target) == ((slider, "index"), (pane, "selected_index"))
    assert [label for label, _ in slider.options] == ["0", "10", "20"]


def test_dropdown_is_linked_too(links):
    chooser, pane = stack(HTML, "abc", "word", control="dropdown").children
    assert isinstance(chooser, ipywidgets.Dropdown)
    assert links[0].target == (pane, "selected_index")


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
    slider, pane = stack(HTML, description="layer", start=2).children
    assert [label for label, _ in slider.options] == ["0", "1", "2"]
    assert (slider.index, pane.selected_index) == (2, 2)


def decoded(part: ipywidgets.HTML) -> Image.Image:
    code = part.value.split("base64,")[1].split('"')[0]
    return Image.open(io.BytesIO(base64.b64decode(code)))


def test_pictures_become_images_with_alternative_text():
    images = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    _, pane = stack(
        images, ["red", "blue"], "colour", alt=['a "red" field', "a blue field"]
    ).children
    assert 'alt="a &quot;red&quot; field"' in pane.children[0].value
    assert [decoded(part).convert("RGB").getpixel((0, 0)) for part in pane.children] == [
        (255, 0, 0),
        (0, 0, 255),
    ]


def test_alternative_text_is_description_and_label_by_default():
    images = [Image.new("RGB", (2, 2))] * 2
    _, pane = stack(images, [1, 2], "layer").children
    assert 'alt="layer: 2"' in pane.children[1].value


def test_figures_are_drawn_and_closed():
    figures = [plt.figure(figsize=(1, 1)) for _ in range(2)]
    _, pane = stack(figures, [0, 1], "layer").children
    assert decoded(pane.children[0]).format == "PNG"
    assert not plt.get_fignums()


def test_without_stack_the_kernel_changes_the_frame(monkeypatch):
    monkeypatch.delattr(ipywidgets, "Stack")
    slider, pane = stack(HTML, "abc", "frame").children
    slider.index = 2
    assert ["three" in part.value for part in pane.children] == [True]


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
    with pytest.raises(InputError, match=words):
        stack(frames, labels, "frame", **options)


def test_picture_html_is_shown_by_a_notebook_and_keeps_its_pixels():
    html = picture_html(Image.new("RGB", (2, 2), "red"), "a red field", width=64)
    assert html._repr_html_() == html
    assert "width:64px" in html
    assert decoded(ipywidgets.HTML(html)).convert("RGB").getpixel((1, 1)) == (255, 0, 0)


def test_picture_card_marks_wrong_answers_and_escapes_what_a_model_says():
    answers = [("Is there a key?", "yes", ""), ("What colour?", "<b>", "(is: red)")]
    card = picture_card(Image.new("RGB", (2, 2)), "a & b", answers)
    assert card.count("<tr") == 2
    assert card.count("class=wrong") == 1
    assert "a &amp; b" in card
    assert "&lt;b&gt;" in card


def test_token_strip_draws_a_run_of_image_tokens_as_one():
    strip = token_strip(
        ["<s>", "P", "P", "P", "Why", "\n"],
        ["system", "image", "image", "image", "question", "question"],
    )
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


NAMES = ["token", "layer", "concept"]
KEYS = [
    ("cat", 5, 0),
    ("cat", 5, 1),
    ("cat", 9, 0),
    ("cat", 9, 1),
    ("cat", 9, 2),
    ("dog", 5, 0),
    ("dog", 5, 1),
    ("dog", 9, 0),
]
TREE = {key: f"<b>{key}</b>" for key in KEYS}


def displayed(widget):
    """The path of labels that a reader sees, and the frame at its end,
    following stacks as the browser does.
    """
    path = []
    while isinstance(widget, ipywidgets.VBox):
        head, widget = widget.children
        path.append(head.label if hasattr(head, "options") else head.value)
        if isinstance(widget, ipywidgets.Stack):
            widget = widget.children[widget.selected_index]
    return path, widget.value


def controls(widget):
    """The controls that a reader sees, from the top."""
    values = []
    while isinstance(widget, ipywidgets.VBox):
        head, widget = widget.children
        values += [head] if hasattr(head, "options") else []
        widget = (
            widget.children[widget.selected_index]
            if isinstance(widget, ipywidgets.Stack)
            else widget
        )
    return values


def follow(links):
    """Do in the kernel what the links do in a browser."""
    for link in links:
        (control, source_trait), (target, target_trait) = link.source, link.target
        control.observe(
            lambda change, target=target, target_trait=target_trait: setattr(
                target, target_trait, change["new"]
            ),
            names=source_trait,
        )


def test_explorer_reaches_every_frame_through_its_own_branch(links):
    tree = explorer(TREE, NAMES)
    follow(links)
    for key in KEYS:
        for level, label in enumerate(map(str, key)):
            for control in controls(tree)[level : level + 1]:
                control.index = [text for text, _ in control.options].index(label)
        path, frame = displayed(tree)
        assert frame == f'<div class="frame"><b>{key}</b></div>'
        assert [text.split(": ")[-1] for text in path] == list(map(str, key))


def test_explorer_has_dropdowns_above_a_slider_and_no_control_without_a_choice(links):
    tree = explorer(TREE, NAMES, start=("dog", 9, 0))
    assert [type(control) for control in controls(tree)] == [
        ipywidgets.Dropdown,
        ipywidgets.Dropdown,
    ]
    assert displayed(tree) == (
        ["dog", "9", "concept: 0"],
        "<div class=\"frame\"><b>('dog', 9, 0)</b></div>",
    )
    controls_of_cat = controls(explorer(TREE, NAMES))
    assert [type(control) for control in controls_of_cat] == [
        ipywidgets.Dropdown,
        ipywidgets.Dropdown,
        ipywidgets.SelectionSlider,
    ]


def test_branches_that_offer_the_same_share_a_control(links):
    tree = explorer(TREE, NAMES, start=("cat", 9, 1))
    follow(links)
    token, layer, _ = controls(tree)
    token.index = 1
    assert controls(tree)[1] is layer
    assert displayed(tree)[0] == ["dog", "9", "concept: 0"]


def test_explorer_starts_where_it_is_told_and_at_the_first_key_by_default():
    assert displayed(explorer(TREE, NAMES))[0] == ["cat", "5", "0"]
    assert displayed(explorer(TREE, NAMES, start=("cat", 9, 2)))[0] == ["cat", "9", "2"]


def test_explorer_of_one_level_is_a_slider_and_pictures_have_words():
    tree = explorer(
        {("red",): Image.new("RGB", (2, 2)), ("blue",): Image.new("RGB", (2, 2))},
        ["colour"],
        start=("blue",),
    )
    (slider,) = controls(tree)
    assert isinstance(slider, ipywidgets.SelectionSlider)
    assert 'alt="colour: blue"' in displayed(tree)[1]


def test_explorer_puts_the_style_into_the_same_output_once():
    style, tree = explorer(TREE, NAMES, style="<style>.x{}</style>").children
    assert (style.value, style.layout.display) == ("<style>.x{}</style>", "none")
    assert displayed(tree)[0] == ["cat", "5", "0"]


def test_frames_share_layout_and_style():
    parts = explorer({(n,): str(n) for n in range(9)}, ["n"]).children[1].children
    assert len({part.layout for part in parts}) == len({part.style for part in parts}) == 1


def test_explorer_without_stack_is_moved_by_the_kernel(monkeypatch):
    monkeypatch.delattr(ipywidgets, "Stack")
    token, branch = explorer(TREE, NAMES).children
    token.index = 1
    layer, below = branch.children[0].children
    layer.index = 1
    assert "('dog', 9, 0)" in below.children[0].children[1].value


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        ({}, {}, "0 frame"),
        ({("a", 1, 2): "x"}, {}, "2 or more"),
        ({("a", 1, 2): "x", ("a", 1): "y"}, {}, r"\('a', 1\) for 3 names"),
        (TREE, {"start": ("cat", 5, 7)}, "start="),
    ],
)
def test_explorer_refuses_keys_that_make_no_tree(frames, options, words):
    with pytest.raises(InputError, match=words):
        explorer(frames, NAMES, **options)


def scenes(count, size=(64, 48)):
    return {f"s{n}": Image.effect_noise(size, 20 + n).convert("RGB") for n in range(count)}


def test_thumbnails_are_embedded_once_however_often_they_are_shown():
    style, tags = thumbnails(scenes(3), size=32)
    many = style + "".join(tags.values()) * 50
    assert many.count("data:image/webp") == 3
    assert max(map(len, tags.values())) < 100 < len(style) // 3
    for tag in tags.values():
        name = re.search(r"thumb (t[0-9a-f]{10})", tag).group(1)
        assert style.count(f".{name}{{width:32px;aspect-ratio:32/24;") == 1


def test_equal_pictures_share_their_bytes_and_names_follow_from_content():
    picture, second_picture = scenes(2).values()
    style, tags = thumbnails(
        [picture, second_picture, picture.copy()], alt=["one", 'a "second"', "third"]
    )
    assert style.count("base64,") == 2
    assert re.sub("one", "third", tags[0]) == tags[2]
    assert 'aria-label="a &quot;second&quot;"' in tags[1]
    assert thumbnails([picture], alt=["one"])[1][0] == tags[0]
    assert 'aria-label="s1"' in thumbnails(scenes(2))[1]["s1"]


def test_thumbnails_keep_the_picture():
    style, _ = thumbnails([Image.new("RGBA", (40, 40), (250, 20, 30, 255))], size=16)
    data = base64.b64decode(re.search(r"base64,([^)]*)", style).group(1))
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("WEBP", (16, 16))
    assert image.getpixel((8, 8)) == pytest.approx((250, 20, 30), abs=8)


def test_thumbnails_refuse_what_is_no_picture():
    picture = Image.new("RGB", (4, 4))
    for images, options in (
        ({}, {}),
        ([picture], {"alt": []}),
        ([picture], {"size": 0}),
        ([picture], {"quality": 0}),
    ):
        with pytest.raises(InputError, match="allowed|give one"):
            thumbnails(images, **options)


def test_concept_card_weighs_words_relative_to_the_largest():
    card = concept_card(
        "concept <3>",
        {"snow": 4, "<b>": np.float32(1)},
        facts={"place": np.float32(0.25), "samples": 31, "norm": 12.5},
        note="a & b",
    )
    assert re.findall(r"--weight:([\d.]+)\"[^>]*>([^<]+)<", card) == [
        ("1.00", "snow"),
        ("0.25", "&lt;b&gt;"),
        ("0.250", "0.25"),
    ]
    assert "concept &lt;3&gt;" in card and "a &amp; b" in card
    assert "<td>31</td>" in card and "<td>12.5</td>" in card
    assert "thumbs" not in card


def test_concept_card_shows_pictures_and_words_without_weights():
    _, tags = thumbnails(scenes(2))
    card = concept_card("c", ["dog", "dog"], list(tags.values()))
    assert card.count('class="thumb ') == 2
    assert card.count('title="" style="--weight:0.00">dog<') == 2
    assert "no words" in concept_card("c", []) and "<table" not in card


HOSTILE = [
    "</SCRIPT ><img src=x onerror=alert(1)>",
    "<!--<script>",
    "</script",
    "<s>",
    "a < b",
    "]]><svg/onload=x>",
]


def shown_by_pages(widget):
    """All texts of a widget's state that a page holds: of labels and descriptions, and of HTML."""
    plain, html = [], []
    for state in embed_data([widget], drop_defaults=False)["manager_state"]["state"].values():
        for name, value in state["state"].items():
            texts = []
            if isinstance(value, str):
                texts = [value]
            elif isinstance(value, list):
                texts = [text for text in value if isinstance(text, str)]
            (
                html if state["state"]["_model_name"] == "HTMLModel" and name == "value" else plain
            ).extend(texts)
    return plain, html


@pytest.mark.parametrize("text", HOSTILE)
def test_no_label_reaches_the_page_as_a_tag(text):
    picture, costs = (
        Image.new("RGB", (4, 4)),
        pd.DataFrame({"time": [1, 0.5], text: [1, 0.5]}, index=[text, "b"]),
    )
    created = [
        stack(["<b>a</b>", "<b>b</b>"], labels=[text, "b"], description=text, control="dropdown"),
        stack([picture, picture], labels=[text, "b"], description=text, play=True),
        explorer(
            {(text, "a"): "<b>a</b>", (text, text): "<b>b</b>", ("c", text): "<b>c</b>"},
            [text, text],
        ),
        dial(
            [picture],
            {text: [text], "b": [text]},
            {text: [text]},
            names=[text],
            questions=[text],
            alt=[text],
        ),
        dial([picture], {(text, 1): [text], (text, 2): ["b"], ("b", 1): ["b"]}, names=[text, text]),
        tradeoff(
            [picture],
            {text: [text], "b": ["b"]},
            costs,
            names=[text],
            correct=[[text]],
            wrong=[["b"]],
            alt=[text],
        ),
    ]
    for widget in created:
        plain, html = shown_by_pages(widget)
        assert not [value for value in plain if "<" in value]
        assert any(text.replace("<", "\u2039").replace(">", "\u203a") in value for value in plain)
        assert not [value for value in html if text in value]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_card_reaches_the_page_as_a_tag(text):
    picture = Image.new("RGB", (4, 4))
    cards = [
        picture_card(picture, text, [(text, text, text)], text),
        token_strip([text, "b"], [text, "image"], picture=picture),
        token_strip([text], weights=[0.5]),
        concept_card(text, {text: 1.0}, facts={text: text}, note=text),
        concept_card(text, [text]),
        picture_html(picture, text),
        *thumbnails({text: picture})[1].values(),
        *thumbnails([picture], alt=[text])[1].values(),
    ]
    assert not [card for card in cards if text in card]


def test_two_labels_that_look_alike_are_two_frames():
    chooser = stack(HTML[:2], ["<s>", "\u2039s\u203a"]).children[0]
    assert [number for _, number in chooser.options] == [0, 1]


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_concept_card_refuses_weights_that_are_no_weights(weight):
    with pytest.raises(InputError, match="0 or more"):
        concept_card("c", {"dog": 1, "cat": weight})
