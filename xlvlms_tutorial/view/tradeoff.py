"""What a saving costs: which blocks run, and what the model then says.

What that takes of time and operations; moved by a slider.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from html import escape
from math import isfinite
from numbers import Real

import pandas as pd
from ipywidgets import Widget
from PIL import Image

from xlvlms_tutorial.errors import FramesError
from xlvlms_tutorial.view.cards import Html, style_of, thumbnails
from xlvlms_tutorial.view.dial import check_texts, frame_key, marked, word_pattern
from xlvlms_tutorial.view.widgets import explorer

_MARKS = (
    '<mark class="right" title="true of the picture">',
    '<mark class="wrong" title="not true of the picture">',
)

Words = Sequence[Iterable[str]]


def tradeoff(
    images: Sequence[Image.Image],
    told: Mapping[Hashable, Sequence[str]],
    costs: pd.DataFrame,
    layers: Mapping[Hashable, Iterable[int]] | None = None,
    n_layers: int | None = None,
    right: Words | None = None,
    wrong: Words | None = None,
    names: Sequence[str] = ("skipped",),
    start: Hashable | None = None,
    alt: Sequence[str] | None = None,
    size: int = 160,
) -> Widget:
    """Show, for the setting that a slider chooses, which blocks run and what is said.

    Its costs and score as bars, and what is said about each picture. ``told`` maps settings, in the
    order of the slider, to the captions or answers of all ``images``. ``costs`` has a row for each
    setting and columns such as time, flops and score: shares of the whole model's, where 1 is a
    full bar and the number beside it says more; the column ``score`` is drawn in another colour.
    ``layers`` maps settings to the layers (from 1) that are skipped, of ``n_layers``; they are
    drawn hollow in a row of blocks. Words of ``right`` and ``wrong``, a list for each picture, are
    marked in the forms of :func:`text.forms`. Settings of several parts (scope, skipped) have as
    many ``names``, and dropdowns above the slider, as in :func:`view.dial.dial`, whose ``start``,
    ``alt`` and ``size`` these are. All moves in the browser, without a kernel.

    Raises
    ------
    FramesError
        If there are fewer than two settings, a setting has not one text for each picture, no row of
        costs or no layers, a cost is negative or not finite, a layer is none of the model's, or
        words are not listed for each picture.
    """
    check_texts(len(images), told, None, 2)
    bars = _bars(told, costs)
    plans = _plans(told, layers, n_layers)
    patterns = _patterns(len(images), right, wrong)
    style, tags = thumbnails(
        images, size, alt=[f"picture {k + 1}" for k in range(len(images))] if alt is None else alt
    )
    frames = {}
    for setting, texts in told.items():
        cards = "".join(
            f'<div>{tag}<p class="told">{marked(text, pattern, _MARKS)}</p></div>'
            for tag, pattern, text in zip(tags.values(), patterns, texts, strict=True)
        )
        key = frame_key(setting)
        # the setting is in the frame too: two settings with the same content are still two frames
        label = escape(", ".join(map(str, key)))
        frames[key] = Html(
            f'<div class="tradeoff" style="--size:{size}px" '
            f'data-setting="{label}">{plans[setting]}{bars[setting]}<div '
            f'class="said">{cards}</div></div>'
        )
    return explorer(
        frames,
        names,
        None if start is None else frame_key(start),
        style=style + style_of("tradeoff"),
    )


def _bars(settings: Iterable[Hashable], costs: pd.DataFrame) -> dict[Hashable, str]:
    if not costs.index.is_unique:
        raise FramesError(
            f"two rows of costs for setting {costs.index[costs.index.duplicated()][0]}",
            "give one for each setting",
        )
    rows = dict(zip(costs.index, costs.to_dict("records"), strict=True))
    bars = {}
    for setting in settings:
        if setting not in rows or not rows[setting]:
            raise FramesError(
                f"no costs of setting {setting!r}",
                "give a table with one row for each setting, and 1 column or more",
            )
        cells = []
        for name, value in rows[setting].items():
            if not (isinstance(value, Real) and isfinite(value) and value >= 0):
                raise FramesError(
                    f"{name} of setting {setting!r} is {value!r}",
                    "allowed: shares of the whole model's, finite, 0 or more",
                )
            bar = (
                f'<i class="{"score" if name == "score" else "cost"}" '
                f'style="--share:{min(value, 1):.4f}"></i>'
            )
            cells.append(f"<b>{escape(str(name))}</b>{bar}<span>{100 * value:.0f} %</span>")
        bars[setting] = f'<div class="costs">{"".join(cells)}</div>'
    return bars


def _plans(
    settings: Iterable[Hashable],
    layers: Mapping[Hashable, Iterable[int]] | None,
    n_layers: int | None,
) -> dict[Hashable, str]:
    if (layers is None) != (n_layers is None):
        raise FramesError("only one of layers and n_layers was given", "give both, or none")
    if layers is None:
        return dict.fromkeys(settings, "")
    if missing := [setting for setting in settings if setting not in layers]:
        raise FramesError(
            f"no layers of setting {missing[0]!r}",
            "give the skipped layers of each setting, an empty list for none",
        )
    return {setting: _plan(sorted(set(layers[setting])), n_layers) for setting in settings}


def _plan(skipped: list[int], n_layers: int) -> str:
    """A row of blocks from the first to the last, those left out hollow."""
    if wrong := [layer for layer in skipped if layer not in range(1, n_layers + 1)]:
        raise FramesError(f"layer {wrong[0]!r} is skipped", f"allowed: 1 to {n_layers}")
    blocks = "".join(
        (
            f'<i class="{"off" if layer in skipped else "on"}" title="block '
            f'{layer}{", skipped" if layer in skipped else ""}"></i>'
        )
        for layer in range(1, n_layers + 1)
    )
    words = f"{n_layers - len(skipped)} of {n_layers} blocks run" + (
        f"; skipped: {', '.join(map(str, skipped))}" if skipped else ""
    )
    return (
        '<div class="plan" role="img" '
        f'aria-label="{words}">{blocks}</div><p class="legend">{words}</p>'
    )


def _patterns(images: int, right_words: Words | None, wrong_words: Words | None) -> list:
    for name, words in (("right", right_words), ("wrong", wrong_words)):
        if words is not None and (
            isinstance(words, str)
            or len(words) != images
            or any(isinstance(listed, str) for listed in words)
        ):
            raise FramesError(
                f"{name} has not a list of words for each of {images} picture(s)",
                "give one list for each, empty for none",
            )
    empty: Words = [()] * images
    return [
        word_pattern({"right": yes, "wrong": no})
        for yes, no in zip(right_words or empty, wrong_words or empty, strict=True)
    ]
