"""Show what a saving costs: which blocks run, what the model then says, time and operations.

All of it is moved by a slider.
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
    """Show, for the setting that a slider chooses, which blocks run, its costs, and what is said.

    Use it to compare plans of skipping or degrees of pruning. Costs and score are drawn as bars,
    and beneath each picture stands what the model says about it. All moves in the browser, without
    a kernel.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        The pictures.
    told : mapping of setting to sequence of str
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
    right : sequence of iterable of str, optional
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
    FramesError
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
    check_texts(len(images), told, None, 2)
    bars = _bars(told, costs)
    plans = _plans(told, layers, n_layers)
    patterns = _patterns(len(images), right, wrong)
    style, tags = thumbnails(
        images, size, alt=[f"picture {k + 1}" for k in range(len(images))] if alt is None else alt
    )
    frames = {}
    for setting, texts in told.items():
        cards = ""
        for tag, pattern, text in zip(tags.values(), patterns, texts, strict=True):
            cards += f'<div>{tag}<p class="told">{marked(text, pattern, _MARKS)}</p></div>'
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
    if invalid := [layer for layer in skipped if layer not in range(1, n_layers + 1)]:
        raise FramesError(f"layer {invalid[0]!r} is skipped", f"allowed: 1 to {n_layers}")
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


def _patterns(images: int, right_words: Words | None, wrong_words: Words | None) -> list:
    for name, words in (("right", right_words), ("wrong", wrong_words)):
        if words is not None and (
            isinstance(words, str)
            or len(words) != images
            or any(isinstance(group, str) for group in words)
        ):
            raise FramesError(
                f"{name} has not a list of words for each of {images} picture(s)",
                "give one list for each, empty for none",
            )
    empty: Words = [()] * images
    patterns = []
    for true, false in zip(right_words or empty, wrong_words or empty, strict=True):
        patterns.append(word_pattern({"right": true, "wrong": false}))
    return patterns
