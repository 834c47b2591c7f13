"""Show what a model says about pictures at the setting that a slider chooses.

The steering dial: pictures, and beneath each the caption or answer at this setting.
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

    Use it for captions at several strengths of steering. All moves in the browser, without a
    kernel. Pictures are embedded once, however many settings there are.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        The pictures.
    told : mapping of setting to sequence of str
        The captions or answers of all ``images``, by setting, in the order of the slider. A setting
        is a label, or a tuple with a part for each of ``names``: ("layer", "strength") gives a
        dropdown of layers above the slider.
    highlight : iterable of str, or mapping of str to iterable of str, default ()
        Words that are marked, whole and in the forms of :func:`text.forms`. A mapping such as
        ``STYLE_WORDS`` gives each kind of word a colour of its own, three at most.
    names : sequence of str, default ("strength",)
        The names of the parts of a setting.
    start : hashable, optional
        The setting shown first; by default the first one.
    asked : sequence of str, optional
        A question (or the truth) above each text; by default none.
    alt : sequence of str, optional
        What each picture shows; by default "picture 1", "picture 2" and so on.
    size : int, default 160
        The longer side of a picture in pixels.

    Returns
    -------
    ipywidgets.Widget
        The pictures below their controls.

    Raises
    ------
    FramesError
        If there are fewer than two settings, not one text for each picture, more than three kinds
        of words, a setting has not as many parts as there are names, or ``start`` is no setting.

    Examples
    --------
    >>> from xlvlms_tutorial.view import dial
    >>> captions = {0: ["two keys"] * 4, 2: ["two red keys"] * 4}
    >>> widget = dial([sample.image for sample in samples], captions, highlight=["red"])
    >>> type(widget).__name__
    'VBox'
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
    headings = (
        [""] * len(images)
        if asked is None
        else [f'<p class="asked">{escape(text)}</p>' for text in asked]
    )
    frames = {}
    for setting, texts in told.items():
        cards = ""
        for tag, heading, text in zip(tags.values(), headings, texts, strict=True):
            words = marked(text, pattern, marks)
            cards += f'<div>{tag}{heading}<p class="told">{words}</p></div>'
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

    Parameters
    ----------
    images : int
        Number of pictures.
    told : mapping of setting to sequence of str
        The texts of all pictures by setting.
    asked : sequence of str, optional
        A text above each picture; None for none.
    kinds : int
        Number of kinds of words to highlight.

    Raises
    ------
    FramesError
        If there are fewer than two settings, a setting has not one text for each picture, or there
        are more than three kinds of words.
    """
    if len(told) < 2:
        raise FramesError(f"{len(told)} setting(s) of the dial", "a dial needs 2 or more")
    lists = [(f"setting {key!r}", texts) for key, texts in told.items()]
    if asked is not None:
        lists.append(("asked", asked))
    for name, texts in lists:
        if isinstance(texts, str) or len(texts) != images:
            count = "one text" if isinstance(texts, str) else f"{len(texts)} text(s)"
            raise FramesError(
                f"{name} has {count} for {images} picture(s)",
                "give a list with one text for each picture",
            )
    if kinds > 3:
        raise FramesError(f"{kinds} kinds of words to highlight", "allowed: 3 or fewer")


def frame_key(setting: Hashable) -> tuple[Hashable, ...]:
    """Return a setting as the explorer takes it, a tuple."""
    return setting if isinstance(setting, tuple) else (setting,)


def word_pattern(kinds: Mapping[str, Iterable[str]]) -> re.Pattern[str]:
    """Compile an expression that finds every form of the words, with a group for each kind.

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
    """Write a text as HTML, escaped, with its words in the tags of their kinds.

    Parameters
    ----------
    text : str
        The text.
    pattern : re.Pattern
        What finds the words, from :func:`word_pattern`.
    tags : sequence of str
        The opening tag of each kind, in the order of the pattern's groups.

    Returns
    -------
    str
        The HTML.
    """
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
