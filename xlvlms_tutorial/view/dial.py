"""Show what a model says about pictures at the setting that a slider chooses.

The steering dial has pictures, and beneath each the caption or answer at this setting; the
trade-off also has the blocks that run, and what they cost.
"""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from html import escape
from math import isfinite
from numbers import Real

import pandas as pd
from ipywidgets import Widget
from PIL import Image

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.text import forms, whole_words
from xlvlms_tutorial.view.cards import Html, style_of, thumbnails
from xlvlms_tutorial.view.widgets import explorer

_MARKS = (
    '<mark class="right" title="true of the picture">',
    '<mark class="wrong" title="not true of the picture">',
)

Words = Sequence[Iterable[str]]


def dial(
    images: Sequence[Image.Image],
    answers: Mapping[Hashable, Sequence[str]],
    highlight: Mapping[str, Iterable[str]] | Iterable[str] = (),
    names: Sequence[str] = ("strength",),
    start: Hashable | None = None,
    questions: Sequence[str] | None = None,
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
    answers : mapping of setting to sequence of str
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
    questions : sequence of str, optional
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
    InputError
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
    _require_texts(len(images), answers, questions)
    if isinstance(highlight, str):
        highlight = [highlight]
    kinds = highlight if isinstance(highlight, Mapping) else {"": highlight}
    if len(kinds) > 3:
        raise InputError(f"{len(kinds)} kinds of words to highlight", "allowed: 3 or fewer")
    style, pictures = _pictures(images, size, alt)
    pattern = _word_pattern(kinds.values())
    marks = []
    for number, kind in enumerate(kinds):
        marks.append(f'<mark class="kind-{number}" title="{escape(kind)}">')
    if questions is not None:
        for number, question in enumerate(questions):
            pictures[number] += f'<p class="card-question">{escape(question)}</p>'
    frames = {}
    for setting, texts in answers.items():
        captions = [_marked(text, pattern, marks) for text in texts]
        frames[setting] = _cards(pictures, captions)
    return _explorer("dial", frames, names, start, size, style)


def tradeoff(
    images: Sequence[Image.Image],
    answers: Mapping[Hashable, Sequence[str]],
    costs: pd.DataFrame,
    layers: Mapping[Hashable, Iterable[int]] | None = None,
    n_layers: int | None = None,
    correct: Words | None = None,
    wrong: Words | None = None,
    names: Sequence[str] = ("skipped",),
    start: Hashable | None = None,
    alt: Sequence[str] | None = None,
    size: int = 160,
) -> Widget:
    """Show, for the setting that a slider chooses, which blocks run, its costs, and what is said.

    Use it to compare plans of skipping or degrees of pruning. Costs and score are drawn as bars,
    and beneath each picture stands what the model says about it. All moves in the browser, without
    a kernel.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        The pictures.
    answers : mapping of setting to sequence of str
        The captions or answers of all ``images``, by setting, in the order of the slider.
    costs : pandas.DataFrame
        A row for each setting and columns such as time, flops and score: shares of the whole
        model's, where 1 is a full bar and the number beside it says more. The column ``score`` is
        drawn in another colour.
    layers : mapping of setting to iterable of int, optional
        The layers (from 1) that are skipped; they are drawn hollow in a row of blocks. By default
        no blocks are drawn.
    n_layers : int, optional
        Number of layers of the model; given together with ``layers``.
    correct : sequence of iterable of str, optional
        Words that are true of each picture, a list for each; they are marked in the forms of
        :func:`text.forms`. By default none.
    wrong : sequence of iterable of str, optional
        Words that are not true of each picture, marked likewise.
    names : sequence of str, default ("skipped",)
        The names of the parts of a setting. Settings of several parts (scope, skipped) have as many
        names, and dropdowns above the slider.
    start : hashable, optional
        The setting shown first; by default the first one.
    alt : sequence of str, optional
        What each picture shows; by default "picture 1", "picture 2" and so on.
    size : int, default 160
        The longer side of a picture in pixels.

    Returns
    -------
    ipywidgets.Widget
        Blocks, bars and pictures below their controls.

    Raises
    ------
    InputError
        If there are fewer than two settings, a setting has not one text for each picture, no row of
        costs or no layers, a cost is negative or not finite, a layer is none of the model's, or
        words are not listed for each picture.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.view import tradeoff
    >>> captions = {0: ["two red keys"] * 4, 2: ["two keys"] * 4}
    >>> costs = pd.DataFrame({"time": [1.0, 0.93], "score": [1.0, 0.8]}, index=[0, 2])
    >>> images = [sample.image for sample in samples]
    >>> widget = tradeoff(images, captions, costs, layers={0: [], 2: [9, 10]}, n_layers=30)
    >>> type(widget).__name__
    'VBox'
    """
    _require_texts(len(images), answers)
    bars = _bars(answers, costs)
    plans = _plans(answers, layers, n_layers)
    patterns = _patterns(len(images), correct, wrong)
    style, pictures = _pictures(images, size, alt)
    frames = {}
    for setting, texts in answers.items():
        captions = []
        for text, pattern in zip(texts, patterns, strict=True):
            captions.append(_marked(text, pattern, _MARKS))
        cards = f'<div class="said">{_cards(pictures, captions)}</div>'
        frames[setting] = plans[setting] + bars[setting] + cards
    return _explorer("tradeoff", frames, names, start, size, style)


def _require_texts(
    images: int,
    texts: Mapping[Hashable, Sequence[str]],
    questions: Sequence[str] | None = None,
) -> None:
    """Refuse texts that do not go with the pictures."""
    if len(texts) < 2:
        raise InputError(f"{len(texts)} setting(s) of the dial", "a dial needs 2 or more")
    lists = {f"setting {setting!r}": captions for setting, captions in texts.items()}
    if questions is not None:
        lists["questions"] = questions
    for name, captions in lists.items():
        if isinstance(captions, str) or len(captions) != images:
            count = "one text" if isinstance(captions, str) else f"{len(captions)} text(s)"
            raise InputError(
                f"{name} has {count} for {images} picture(s)",
                "give a list with one text for each picture",
            )


def _pictures(
    images: Sequence[Image.Image], size: int, alt: Sequence[str] | None
) -> tuple[str, list[str]]:
    """The style that holds the pictures, and the tag of each."""
    if alt is None:
        alt = [f"picture {number}" for number in range(1, len(images) + 1)]
    style, tags = thumbnails(images, size, alt=alt)
    return style, list(tags.values())


def _cards(pictures: Sequence[str], captions: Sequence[str]) -> str:
    """The pictures, each above its caption."""
    cards = ""
    for picture, caption in zip(pictures, captions, strict=True):
        cards += f'<div>{picture}<p class="card-caption">{caption}</p></div>'
    return cards


def _explorer(
    kind: str,
    contents: Mapping[Hashable, str],
    names: Sequence[str],
    start: Hashable | None,
    size: int,
    style: str,
) -> Widget:
    """The frames of all settings below their controls."""
    frames = {}
    for setting, content in contents.items():
        key = _frame_key(setting)
        # the setting is in the frame too: two settings with the same content are still two frames
        label = escape(", ".join(map(str, key)))
        frames[key] = Html(
            f'<div class="{kind}" style="--size:{size}px" data-setting="{label}">{content}</div>'
        )
    first = None if start is None else _frame_key(start)
    return explorer(frames, names, first, style=style + style_of(kind))


def _frame_key(setting: Hashable) -> tuple[Hashable, ...]:
    """A setting as the explorer takes it, a tuple."""
    return setting if isinstance(setting, tuple) else (setting,)


def _word_pattern(kinds: Iterable[Iterable[str]]) -> re.Pattern[str]:
    """What finds every form of the words, with a group for each kind.

    A word of two kinds has the first.
    """
    groups = []
    for words in kinds:
        group = []
        for word in words:
            group += forms(" ".join(word.split()))
        groups.append(group)
    return whole_words(*groups)


def _marked(text: str, pattern: re.Pattern[str], tags: Sequence[str]) -> str:
    """The text as HTML, escaped, with its words in the tags of their kinds."""
    html = ""
    end = 0
    for match in pattern.finditer(text):
        html += escape(text[end : match.start()])
        html += f"{tags[match.lastindex - 1]}{escape(match[0])}</mark>"
        end = match.end()
    return html + escape(text[end:])


def _bars(settings: Iterable[Hashable], costs: pd.DataFrame) -> dict[Hashable, str]:
    """The costs of each setting as bars."""
    if not costs.index.is_unique:
        repeated = costs.index[costs.index.duplicated()]
        raise InputError(
            f"two rows of costs for setting {repeated[0]}", "give one for each setting"
        )
    rows = dict(zip(costs.index, costs.to_dict("records"), strict=True))
    bars = {}
    for setting in settings:
        if setting not in rows or not rows[setting]:
            raise InputError(
                f"no costs of setting {setting!r}",
                "give a table with one row for each setting, and 1 column or more",
            )
        cells = []
        for name, value in rows[setting].items():
            if not (isinstance(value, Real) and isfinite(value) and value >= 0):
                raise InputError(
                    f"{name} of setting {setting!r} is {value!r}",
                    "allowed: shares of the whole model's, finite, 0 or more",
                )
            kind = "score" if name == "score" else "cost"
            bar = f'<i class="{kind}" style="--share:{min(value, 1):.4f}"></i>'
            cells.append(f"<b>{escape(str(name))}</b>{bar}<span>{100 * value:.0f} %</span>")
        bars[setting] = f'<div class="costs">{"".join(cells)}</div>'
    return bars


def _plans(
    settings: Iterable[Hashable],
    layers: Mapping[Hashable, Iterable[int]] | None,
    n_layers: int | None,
) -> dict[Hashable, str]:
    """The blocks that run at each setting; empty where no layers are given."""
    if (layers is None) != (n_layers is None):
        raise InputError("only one of layers and n_layers was given", "give both, or none")
    if layers is None:
        return dict.fromkeys(settings, "")
    plans = {}
    for setting in settings:
        if setting not in layers:
            raise InputError(
                f"no layers of setting {setting!r}",
                "give the skipped layers of each setting, an empty list for none",
            )
        plans[setting] = _plan(sorted(set(layers[setting])), n_layers)
    return plans


def _plan(skipped: list[int], n_layers: int) -> str:
    """A row of blocks from the first to the last, those left out hollow."""
    for layer in skipped:
        if layer not in range(1, n_layers + 1):
            raise InputError(f"layer {layer!r} is skipped", f"allowed: 1 to {n_layers}")
    blocks = ""
    for layer in range(1, n_layers + 1):
        if layer in skipped:
            blocks += f'<i class="off" title="block {layer}, skipped"></i>'
        else:
            blocks += f'<i class="on" title="block {layer}"></i>'
    words = f"{n_layers - len(skipped)} of {n_layers} blocks run"
    if skipped:
        words += f"; skipped: {', '.join(map(str, skipped))}"
    return (
        '<div class="plan" role="img" '
        f'aria-label="{words}">{blocks}</div><p class="legend">{words}</p>'
    )


def _patterns(images: int, true: Words | None, false: Words | None) -> list[re.Pattern[str]]:
    """What finds the words that are true of each picture, and those that are not."""
    for name, words in (("correct", true), ("wrong", false)):
        if words is not None and not _is_list_for_each(words, images):
            raise InputError(
                f"{name} has not a list of words for each of {images} picture(s)",
                "give one list for each, empty for none",
            )
    empty: Words = [()] * images
    pairs = zip(true or empty, false or empty, strict=True)
    return [_word_pattern(pair) for pair in pairs]


def _is_list_for_each(words: Words, images: int) -> bool:
    if isinstance(words, str) or len(words) != images:
        return False
    return not any(isinstance(group, str) for group in words)
