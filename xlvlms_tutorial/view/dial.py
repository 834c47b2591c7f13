"""The steering dial: pictures, and beneath each what a model says about it.

At the setting that a slider chooses.
"""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from html import escape

from ipywidgets import Widget
from PIL import Image

from xlvlms_tutorial.errors import FramesError
from xlvlms_tutorial.text import forms, whole_words
from xlvlms_tutorial.view.cards import Html, style_of, thumbnails
from xlvlms_tutorial.view.widgets import explorer


def dial(
    images: Sequence[Image.Image],
    told: Mapping[Hashable, Sequence[str]],
    highlight: Mapping[str, Iterable[str]] | Iterable[str] = (),
    names: Sequence[str] = ("strength",),
    start: Hashable | None = None,
    asked: Sequence[str] | None = None,
    alt: Sequence[str] | None = None,
    size: int = 160,
) -> Widget:
    """Show what a model says about each picture at a setting that a slider chooses.

    Such as strengths of steering. ``told`` maps settings, in the order of the slider, to the
    captions or answers of all ``images``. A setting is a label, or a tuple with a part for
    each of ``names``: ("layer", "strength") gives a dropdown of layers above the slider.
    Words of ``highlight`` are marked, whole and in the forms of :func:`text.forms`; a mapping
    such as ``STYLE_WORDS`` gives each kind of word a colour of its own, three at most.
    ``start`` is the setting shown first, ``asked`` a question (or the truth) above each text,
    ``alt`` says what each picture shows. Pictures are ``size`` pixels long and embedded once,
    however many settings there are.

    Raises
    ------
    FramesError
        If there are fewer than two settings, not one text for each picture, more than three kinds
        of words, a setting has not as many parts as there are names, or ``start`` is no setting.
    """
    if isinstance(highlight, Mapping):
        kinds = highlight
    else:
        kinds = {"": [highlight] if isinstance(highlight, str) else highlight}
    check_texts(len(images), told, asked, len(kinds))
    style, tags = thumbnails(
        images, size, alt=[f"picture {k + 1}" for k in range(len(images))] if alt is None else alt
    )
    pattern = word_pattern(kinds)
    marks = [
        f'<mark class="kind-{number}" title="{escape(kind)}">' for number, kind in enumerate(kinds)
    ]
    above = (
        [""] * len(images)
        if asked is None
        else [f'<p class="asked">{escape(text)}</p>' for text in asked]
    )
    frames = {}
    for setting, texts in told.items():
        cards = "".join(
            f'<div>{tag}{line}<p class="told">{marked(text, pattern, marks)}</p></div>'
            for tag, line, text in zip(tags.values(), above, texts, strict=True)
        )
        key = frame_key(setting)
        # the setting is in the frame too: two settings with the same texts are still two frames
        label = escape(", ".join(map(str, key)))
        frames[key] = Html(
            f'<div class="dial" style="--size:{size}px" data-setting="{label}">{cards}</div>'
        )
    return explorer(
        frames, names, None if start is None else frame_key(start), style=style + style_of("dial")
    )


def check_texts(
    images: int, told: Mapping[Hashable, Sequence[str]], asked: Sequence[str] | None, kinds: int
) -> None:
    """Stop texts that do not go with the pictures.

    Raises
    ------
    FramesError
        If there are fewer than two settings, a setting has not one text for each picture, or there
        are more than three kinds of words.
    """
    if len(told) < 2:
        raise FramesError(f"{len(told)} setting(s) of the dial", "a dial needs 2 or more")
    wrong = [
        (f"setting {key!r}", texts)
        for key, texts in told.items()
        if isinstance(texts, str) or len(texts) != images
    ]
    if asked is not None and (isinstance(asked, str) or len(asked) != images):
        wrong.append(("asked", asked))
    if wrong:
        count = "one text" if isinstance(wrong[0][1], str) else f"{len(wrong[0][1])} text(s)"
        raise FramesError(
            f"{wrong[0][0]} has {count} for {images} picture(s)",
            "give a list with one text for each picture",
        )
    if kinds > 3:
        raise FramesError(f"{kinds} kinds of words to highlight", "allowed: 3 or fewer")


def frame_key(setting: Hashable) -> tuple[Hashable, ...]:
    """A setting as the explorer wants it, a tuple."""
    return setting if isinstance(setting, tuple) else (setting,)


def word_pattern(kinds: Mapping[str, Iterable[str]]) -> re.Pattern[str]:
    """What finds every form of the words, with a group for each kind.

    A word of two kinds has the first.
    """
    groups = []
    for words in kinds.values():
        group = []
        for word in words:
            group += forms(" ".join(word.split()))
        groups.append(group)
    return whole_words(*groups)


def marked(text: str, pattern: re.Pattern[str], tags: Sequence[str]) -> str:
    """The text as HTML, escaped, with its words in the tags of their kinds."""
    parts = []
    end = 0
    for match in pattern.finditer(text):
        parts += [
            escape(text[end : match.start()]),
            tags[match.lastindex - 1],
            escape(match[0]),
            "</mark>",
        ]
        end = match.end()
    return "".join([*parts, escape(text[end:])])
