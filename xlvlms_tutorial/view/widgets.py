"""Widgets that move in the built page: control and frames are joined in the browser, so no kernel is needed."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import ipywidgets
from ipywidgets import Widget
from matplotlib.figure import Figure
from PIL import Image

from xlvlms_tutorial.errors import FramesError
from xlvlms_tutorial.view.plots import png

Frame = Figure | Image.Image | bytes | str
CONTROLS = ("slider", "dropdown")


class Html(str):
    """HTML that a notebook shows as it is, and that can be a frame of a widget."""

    def _repr_html_(self) -> str:
        return str(self)


def stack(
    frames: Sequence[Frame],
    labels: Sequence[object] | None = None,
    description: str = "frame",
    alt: Sequence[str] | None = None,
    start: int = 0,
    control: str = "slider",
    play: bool = False,
) -> Widget:
    """Show one of several frames, chosen by a slider or a dropdown; ``play`` adds a button that runs through them.

    A frame is a matplotlib figure (closed here), a PIL image, the bytes of a PNG file, or HTML. ``labels`` are their
    numbers by default, ``start`` is the frame shown first, and ``alt`` says in words what each picture shows; by
    default it is the description and the label.

    Raises
    ------
    FramesError
        If there are fewer than two frames, a label or an alternative text too many or too few, no such first frame, or an unknown control.
    """
    labels = [str(label) for label in (range(len(frames)) if labels is None else labels)]
    alt = [f"{description}: {label}" for label in labels] if alt is None else list(alt)
    _check(len(frames), len(labels), len(alt), start, control)
    parts = [ipywidgets.HTML(_frame(frame, words)) for frame, words in zip(frames, alt, strict=True)]
    chooser = _chooser(labels, description, start, control)
    head = ipywidgets.HBox([chooser, _player(chooser, len(parts))]) if play else chooser
    return ipywidgets.VBox([head, _joined(chooser, parts)])


def picture_html(image: Image.Image, alt: str, width: int = 256) -> Html:
    """A picture as HTML, ``width`` pixels wide on a page that has the room."""
    with io.BytesIO() as buffer:
        image.save(buffer, format="png")
        return _img(buffer.getvalue(), alt, f' style="width:{width}px"')


def picture_card(image: Image.Image, caption: str, answers: Sequence[tuple[str, str, str]], alt: str = "") -> Html:
    """A picture beside what a model says about it: its caption, then question, answer and a note (empty when all is well)."""
    rows = "".join(
        f"<tr{' class=wrong' if note else ''}><td>{escape(question)}</td><td>{escape(answer)}</td><td>{escape(note)}</td></tr>"
        for question, answer, note in answers
    )
    shown = picture_html(image, alt or f"The picture that the model calls: {caption}", width=224)
    return Html(f'<div class="card-row">{shown}<div><p class="told">{escape(caption)}</p><table class="answers">{rows}</table></div></div>')


def token_strip(
    tokens: Iterable[str],
    spans: Iterable[str] | None = None,
    weights: Iterable[float | int] | None = None,
    picture: Image.Image | None = None,
) -> Html:
    """Tokens in a row: tinted by the span they belong to (runs of image tokens drawn together) or by a weight between 0 and 1.

    ``picture`` is shown above them.
    """
    tokens = list(tokens)
    if spans is not None:
        chips = "".join(_chip(text, f"span-{escape(span)}", span) for text, span in _runs(tokens, list(spans)))
    else:
        weights = [0.0] * len(tokens) if weights is None else [float(w) for w in weights]
        chips = "".join(_chip(text, "weighed", f"{w:.2f}", f' style="--weight:{w:.3f}"') for text, w in zip(tokens, weights, strict=True))
    above = picture_html(picture, "The picture that the tokens describe", width=160) if picture is not None else ""
    return Html(f'<div class="tokens">{above}<p>{chips}</p></div>')


def _runs(tokens: list[str], spans: list[str]) -> list[tuple[str, str]]:
    shown: list[tuple[str, str]] = []
    count = 0
    for number, (text, span) in enumerate(zip(tokens, spans, strict=True)):
        if span not in ("image", "video", "audio", "padding"):
            shown.append((text, span))
            continue
        count += 1
        if number + 1 == len(spans) or spans[number + 1] != span:
            shown.append((f"{span} \u00d7 {count}", span))
            count = 0
    return shown


def _chip(text: str, kind: str, title: str, style: str = "") -> str:
    shown = escape(text.replace("\n", "\u21b5")) or "&nbsp;"
    return f'<span class="token {kind}" title="{escape(title)}"{style}>{shown}</span> '


def _check(frames: int, labels: int, texts: int, start: int, control: str) -> None:
    if frames < 2:
        raise FramesError(f"{frames} frame(s) were given", "a widget needs 2 or more")
    if labels != frames:
        raise FramesError(f"{labels} labels for {frames} frames", "give one label for each frame, or none")
    if texts != frames:
        raise FramesError(f"{texts} alternative texts for {frames} frames", "give one for each frame, or none")
    if not 0 <= start < frames:
        raise FramesError(f"start={start}", f"allowed: 0 to {frames - 1}")
    if control not in CONTROLS:
        raise FramesError(f"control={control!r}", f"allowed: {', '.join(CONTROLS)}")


def _frame(frame: Frame, alt: str) -> str:
    if isinstance(frame, str):
        return f'<div class="frame">{frame}</div>'
    if isinstance(frame, Figure):
        frame = png(frame)
    shown = picture_html(frame, alt, frame.width) if isinstance(frame, Image.Image) else _img(frame, alt)
    return f'<div class="frame">{shown}</div>'


def _img(data: bytes, alt: str, style: str = "") -> Html:
    return Html(f'<img alt="{escape(alt)}"{style} src="data:image/png;base64,{base64.b64encode(data).decode()}">')


def _chooser(labels: list[str], description: str, start: int, control: str) -> Widget:
    # Pairs of label and index: two frames may carry the same label.
    options = [(label, number) for number, label in enumerate(labels)]
    make = ipywidgets.SelectionSlider if control == "slider" else ipywidgets.Dropdown
    chooser = make(options=options, index=start, description=description, style={"description_width": "initial"})
    chooser.layout.width = "auto"
    return chooser


def _player(chooser: Widget, count: int) -> Widget:
    player = ipywidgets.Play(min=0, max=count - 1, value=chooser.index, interval=600)
    ipywidgets.jslink((player, "value"), (chooser, "index"))
    return player


def _joined(chooser: Widget, parts: list[Widget]) -> Widget:
    if hasattr(ipywidgets, "Stack"):
        shown = ipywidgets.Stack(parts, selected_index=chooser.index)
        ipywidgets.jslink((chooser, "index"), (shown, "selected_index"))
        return shown
    # ipywidgets 7, which hosted notebooks still have, knows no Stack: there a kernel is at hand to change the frame.
    shown = ipywidgets.HTML(parts[chooser.index].value)
    chooser.observe(lambda change: setattr(shown, "value", parts[change["new"]].value), names="index")
    return shown
