"""Build widgets that move in the built page.

Control and frames are joined in the browser, so no kernel is needed.
"""

from collections.abc import Hashable, Mapping, Sequence
from html import escape

import ipywidgets
from ipywidgets import Widget
from matplotlib.figure import Figure
from PIL import Image

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.view.cards import (
    Html,
    concept_card,
    picture_card,
    picture_html,
    png_html,
    thumbnails,
    token_strip,
)
from xlvlms_tutorial.view.plots import png

__all__ = [
    "Html",
    "concept_card",
    "explorer",
    "picture_card",
    "picture_html",
    "stack",
    "thumbnails",
    "token_strip",
]

Frame = Figure | Image.Image | bytes | str
CONTROLS = ("slider", "dropdown")
_SAFE = str.maketrans({"<": "\u2039", ">": "\u203a"})  # ‹ and ›


def stack(
    frames: Sequence[Frame],
    labels: Sequence[object] | None = None,
    description: str = "frame",
    alt: Sequence[str] | None = None,
    start: int = 0,
    control: str = "slider",
    play: bool = False,
) -> Widget:
    """Show one of several frames, chosen by a slider or a dropdown.

    Use it for one thing that changes, such as the layer; :func:`explorer` takes several.

    Parameters
    ----------
    frames : sequence of figure, picture, bytes or str
        Two or more. A frame is a matplotlib figure (closed here), a PIL image, the bytes of a PNG
        file, or HTML.
    labels : sequence, optional
        The label of each frame; by default its number from 0. ``<`` and ``>`` are shown as ‹ and ›.
    description : str, default "frame"
        The name of what is chosen, beside the control; ``<`` and ``>`` are shown as ‹ and ›.
    alt : sequence of str, optional
        What each picture shows; by default the description and the label.
    start : int, default 0
        The number of the frame shown first.
    control : str, default "slider"
        "slider" or "dropdown".
    play : bool, default False
        Whether a button runs through the frames.

    Returns
    -------
    ipywidgets.Widget
        The control above the frames.

    Raises
    ------
    InputError
        If there are fewer than two frames, a label or an alternative text too many or too few, no
        such first frame, or an unknown control.

    Examples
    --------
    >>> from xlvlms_tutorial.view import widgets
    >>> widget = widgets.stack(["<b>early</b>", "<b>late</b>"], labels=[1, 30], description="layer")
    >>> [label for label, _ in widget.children[0].options]
    ['1', '30']
    """
    if labels is None:
        labels = range(len(frames))
    labels = list(map(str, labels))
    if alt is None:
        alt = [f"{description}: {label}" for label in labels]
    alt = list(alt)
    _check(len(frames), len(labels), len(alt), start, control)
    parts = _frame_widgets(frames, alt)
    chooser = _chooser(labels, description, start, control)
    head = chooser
    if play:
        head = ipywidgets.HBox([chooser, _player(chooser, len(parts))])
    return ipywidgets.VBox([head, _linked(chooser, parts)])


def explorer(
    frames: Mapping[tuple[Hashable, ...], Frame],
    names: Sequence[str],
    start: tuple[Hashable, ...] | None = None,
    style: str = "",
) -> Widget:
    """Show one of many frames, chosen level by level: dropdowns, and a slider for the last level.

    Use it where frames depend on several things, such as token, layer and concept. Branches may
    differ in what they offer. Those that offer the same labels share one control, so that a layer
    stays chosen when the token changes; a level with one label shows it without a control.

    Parameters
    ----------
    frames : mapping of tuple to frame
        Frames as of :func:`stack` by keys such as (token, layer, concept), in the order of the
        choices.
    names : sequence of str
        The names of the levels.
    start : tuple, optional
        The key shown first; by default the first one.
    style : str, default ""
        HTML put into the same output once, such as the pictures of :func:`thumbnails`.

    Returns
    -------
    ipywidgets.Widget
        The controls above the frames.

    Raises
    ------
    InputError
        If there are fewer than two frames, a key has not as many parts as there are names, or
        ``start`` is no key.

    Examples
    --------
    >>> from xlvlms_tutorial.view import widgets
    >>> frames = {}
    >>> for layer in (1, 2):
    ...     for concept in ("a", "b"):
    ...         frames[layer, concept] = f"layer {layer}, concept {concept}"
    >>> widget = widgets.explorer(frames, names=["layer", "concept"])
    >>> type(widget.children[0]).__name__
    'Dropdown'
    """
    keys = list(frames)
    _check_keys(keys, len(names), start)
    alt = []
    for key in keys:
        choices = zip(names, key, strict=True)
        alt.append(", ".join(f"{name}: {label}" for name, label in choices))
    parts = _frame_widgets(list(frames.values()), alt)
    leaves = list(zip(keys, parts, strict=True))
    tree = _branch(leaves, list(names), start or keys[0], {})
    if not style:
        return tree
    hidden = ipywidgets.HTML(style, layout={"display": "none"})
    return ipywidgets.VBox([hidden, tree])


def _check(frames: int, labels: int, texts: int, start: int, control: str) -> None:
    if frames < 2:
        raise InputError(f"{frames} frame(s) were given", "a widget needs 2 or more")
    if labels != frames:
        raise InputError(
            f"{labels} labels for {frames} frames", "give one label for each frame, or none"
        )
    if texts != frames:
        raise InputError(
            f"{texts} alternative texts for {frames} frames", "give one for each frame, or none"
        )
    if not 0 <= start < frames:
        raise InputError(f"start={start}", f"allowed: 0 to {frames - 1}")
    if control not in CONTROLS:
        raise InputError(f"control={control!r}", f"allowed: {', '.join(CONTROLS)}")


def _check_keys(keys: list[tuple], levels: int, start: tuple | None) -> None:
    """Refuse keys that are not those of a tree of choices, or a start that is no key."""
    if len(keys) < 2:
        raise InputError(f"{len(keys)} frame(s) were given", "a widget needs 2 or more")
    if invalid := [key for key in keys if len(key) != levels]:
        raise InputError(
            f"key {invalid[0]!r} for {levels} names", "give tuples with one part for each name"
        )
    if start is not None and start not in keys:
        raise InputError(
            f"start={start!r} is not a key", f"allowed: {', '.join(map(repr, keys[:3]))}, ..."
        )


def _frame_widgets(frames: Sequence[Frame], alt: Sequence[str]) -> list[Widget]:
    """Make a widget of each frame."""
    parts = [ipywidgets.HTML(_frame(frames[0], alt[0]))]
    # two models for all frames instead of two for each
    shared = {"layout": parts[0].layout, "style": parts[0].style}
    for frame, words in zip(frames[1:], alt[1:], strict=True):
        parts.append(ipywidgets.HTML(_frame(frame, words), **shared))
    return parts


def _branch(
    leaves: list[tuple[tuple, Widget]],
    names: list[str],
    start: tuple,
    choosers: dict[tuple, Widget],
) -> Widget:
    """The control of the first level above the branches of the next.

    ``choosers`` holds the controls made so far.
    """
    if not names:
        _, widget = leaves[0]
        return widget
    name, *deeper = names
    groups: dict[Hashable, list[tuple[tuple, Widget]]] = {}
    for key, leaf in leaves:
        groups.setdefault(key[0], []).append((key[1:], leaf))
    parts = [_branch(group, deeper, start[1:], choosers) for group in groups.values()]
    labels = tuple(map(str, groups))
    if len(parts) == 1:
        heading = ipywidgets.HTML(f"{escape(name)}: {escape(labels[0])}")
        return ipywidgets.VBox([heading, parts[0]])
    level = (len(names), labels)
    if level not in choosers:
        first = list(groups).index(start[0]) if start[0] in groups else 0
        control = "dropdown" if deeper else "slider"
        choosers[level] = _chooser(list(labels), name, first, control)
    chooser = choosers[level]
    return ipywidgets.VBox([chooser, _linked(chooser, parts)])


def _frame(frame: Frame, alt: str) -> str:
    if isinstance(frame, str):
        return f'<div class="frame">{frame}</div>'
    if isinstance(frame, Figure):
        frame = png(frame)
    picture = (
        picture_html(frame, alt, frame.width)
        if isinstance(frame, Image.Image)
        else png_html(frame, alt)
    )
    return f'<div class="frame">{picture}</div>'


def _chooser(labels: list[str], description: str, start: int, control: str) -> Widget:
    # Pairs of label and index: two frames may carry the same label. A page holds labels in a
    # script, as they are, where "</script" or "<!--" of a token would end or swallow what follows;
    # and browsers show them as text, so that entities would be seen as such.
    options = [(label.translate(_SAFE), number) for number, label in enumerate(labels)]
    make = ipywidgets.SelectionSlider if control == "slider" else ipywidgets.Dropdown
    chooser = make(
        options=options,
        index=start,
        description=description.translate(_SAFE),
        style={"description_width": "initial"},
    )
    chooser.layout.width = "auto"
    return chooser


def _player(chooser: Widget, count: int) -> Widget:
    player = ipywidgets.Play(min=0, max=count - 1, value=chooser.index, interval=600)
    ipywidgets.jslink((player, "value"), (chooser, "index"))
    return player


def _linked(chooser: Widget, parts: list[Widget]) -> Widget:
    if hasattr(ipywidgets, "Stack"):
        frame_box = ipywidgets.Stack(parts, selected_index=chooser.index)
        ipywidgets.jslink((chooser, "index"), (frame_box, "selected_index"))
        return frame_box
    # ipywidgets 7, which hosted notebooks still have, knows no Stack: there a kernel
    # is at hand to change the frame.
    frame_box = ipywidgets.VBox([parts[chooser.index]])
    chooser.observe(
        lambda change: setattr(frame_box, "children", (parts[change["new"]],)), names="index"
    )
    return frame_box
