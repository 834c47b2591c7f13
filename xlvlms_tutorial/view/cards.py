"""Build the pieces of HTML that pages and frames of widgets show.

Pictures, cards, tokens in a row, concepts.
"""

import base64
import hashlib
import io
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from html import escape
from math import inf
from numbers import Integral, Real
from pathlib import Path

from PIL import Image

from xlvlms_tutorial.errors import InputError


class Html(str):
    """HTML that a notebook shows as it is, and that can be a frame of a widget.

    Use it for HTML of your own that stands at the end of a cell or in a frame. It is a ``str``;
    nothing in it is escaped.

    Examples
    --------
    >>> from xlvlms_tutorial.view import cards
    >>> cards.Html("<b>two keys</b>")._repr_html_()
    '<b>two keys</b>'
    """

    def _repr_html_(self) -> str:
        return str(self)


@cache
def style_of(piece: str) -> Html:
    """Return the style rules of a piece of a page, to be put into the output that shows it.

    The file of all styles, ``style.css``, is beside this one.

    Parameters
    ----------
    piece : str
        "thumb", "dial", "tradeoff", "ledger", "shown" or "sign".

    Returns
    -------
    Html
        Its rules as a tag.

    Examples
    --------
    >>> print(style_of("thumb").splitlines()[1][:34])
    .thumb{display:inline-block;margin
    """
    text = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    pieces = {}
    for part in text.split("/* ")[2:]:  # the first comment is for readers
        name, rules = part.split(" */")
        pieces[name] = rules
    return Html(f"<style>{pieces[piece]}</style>")


def picture_html(image: Image.Image, alt: str, width: int = 256) -> Html:
    """Embed a picture in HTML, as a PNG within the tag.

    Use it where one picture is shown once; :func:`thumbnails` embeds pictures that are shown
    many times.

    Parameters
    ----------
    image : PIL.Image.Image
        The picture, kept at its own resolution.
    alt : str
        What the picture shows, for those who do not see it.
    width : int, default 256
        Width in pixels on a page that has the room.

    Returns
    -------
    Html
        An ``img`` tag.

    Examples
    --------
    >>> from PIL import Image
    >>> from xlvlms_tutorial.view import cards
    >>> html = cards.picture_html(Image.new("RGB", (8, 8)), alt="a black square", width=64)
    >>> html.partition(" src=")[0]
    '<img alt="a black square" style="width:64px"'
    """
    with io.BytesIO() as buffer:
        image.save(buffer, format="png")
        return png_html(buffer.getvalue(), alt, f' style="width:{width}px"')


def png_html(data: bytes, alt: str, style: str = "") -> Html:
    """Embed the bytes of a PNG file in HTML.

    Use it for figures that were drawn before, such as those of :func:`plots.png`.

    Parameters
    ----------
    data : bytes
        The content of the file.
    alt : str
        What the picture shows, for those who do not see it.
    style : str, default ""
        More attributes of the tag, with a space in front, such as ``' style="width:64px"'``.

    Returns
    -------
    Html
        An ``img`` tag.

    Examples
    --------
    >>> from xlvlms_tutorial.view import cards
    >>> print(cards.png_html(b"bytes", alt="two keys"))
    <img alt="two keys" src="data:image/png;base64,Ynl0ZXM=">
    """
    return Html(
        f'<img alt="{escape(alt)}"{style} '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )


def picture_card(
    image: Image.Image, caption: str, answers: Sequence[tuple[str, str, str]], alt: str = ""
) -> Html:
    """Show a picture beside its caption and a table of questions and answers.

    Use it to look at single samples: what the model says of a picture, and where it is wrong.

    Parameters
    ----------
    image : PIL.Image.Image
        The picture, shown 224 pixels wide.
    caption : str
        The caption, such as the model's.
    answers : sequence of (question, answer, note)
        One row of the table each. The note is empty when all is well; a row with a note is marked
        as wrong.
    alt : str, default ""
        What the picture shows; by default the caption, named as the model's.

    Returns
    -------
    Html
        The card.

    Examples
    --------
    >>> from xlvlms_tutorial.view import cards
    >>> answers = [("Where is the key?", "left", ""), ("How many keys?", "two", "there is one")]
    >>> card = cards.picture_card(samples[0].image, samples[0].captions[0], answers)
    >>> card.count("<tr"), card.count("<tr class=wrong>")
    (2, 1)
    """
    rows = []
    for question, answer, note in answers:
        cells = "".join(f"<td>{escape(text)}</td>" for text in (question, answer, note))
        rows.append(f"<tr{' class=wrong' if note else ''}>{cells}</tr>")
    picture = picture_html(image, alt or f"The picture that the model calls: {caption}", width=224)
    return Html(
        f'<div class="card-row">{picture}<div><p class="card-caption">{escape(caption)}</p>'
        f'<table class="answers">{"".join(rows)}</table></div></div>'
    )


def token_strip(
    tokens: Iterable[str],
    spans: Iterable[str] | None = None,
    weights: Iterable[float | int] | None = None,
    picture: Image.Image | None = None,
) -> Html:
    """Show tokens in a row, tinted by the span they belong to or by a weight.

    Use it to show where image tokens stand in a prompt, or how much each token counts. Image,
    video, audio or padding tokens that follow each other are drawn as one, with their number.

    Parameters
    ----------
    tokens : iterable of str
        The texts of the tokens, in order.
    spans : iterable of str, optional
        The span of each token, such as "image" or "text". Where it is given, ``weights`` are not
        used.
    weights : iterable of float, optional
        A weight between 0 and 1 for each token; by default 0, no tint.
    picture : PIL.Image.Image, optional
        A picture shown above the tokens; by default none.

    Returns
    -------
    Html
        The tokens.

    Examples
    --------
    >>> from xlvlms_tutorial.view import cards
    >>> tokens = ["Describe", "<image>", "<image>", "it"]
    >>> strip = cards.token_strip(tokens, spans=["text", "image", "image", "text"])
    >>> strip.count("<span"), "image × 2" in strip
    (3, True)
    """
    tokens = list(tokens)
    chips = []
    if spans is not None:
        for text, span in _merged_runs(tokens, list(spans)):
            chips.append(_chip(text, f"span-{escape(span)}", span))
    else:
        if weights is None:
            weights = [0.0] * len(tokens)
        for text, weight in zip(tokens, map(float, weights), strict=True):
            style = f' style="--weight:{weight:.3f}"'
            chips.append(_chip(text, "weighed", f"{weight:.2f}", style))
    header = ""
    if picture is not None:
        header = picture_html(picture, "The picture that the tokens describe", width=160)
    return Html(f'<div class="tokens">{header}<p>{"".join(chips)}</p></div>')


def thumbnails(
    images: Mapping[Hashable, Image.Image] | Sequence[Image.Image],
    size: int = 96,
    quality: int = 80,
    alt: Sequence[str] | None = None,
) -> tuple[Html, dict[Hashable, Html]]:
    """Embed small pictures once, and return a short tag for each that may be shown many times.

    Use it where the same pictures appear in many frames or cards. The style must be in the same
    output as the tags: give it to :func:`explorer`, or put it in front of a frame. Equal pictures
    share one rule of style.

    Parameters
    ----------
    images : mapping or sequence of PIL.Image.Image
        The pictures; keys of a sequence are its numbers.
    size : int, default 96
        The longer side in pixels.
    quality : int, default 80
        Quality of the WebP files, 1 to 100.
    alt : sequence of str, optional
        What each picture shows; by default its key.

    Returns
    -------
    style : Html
        The style that holds the pictures.
    tags : dict
        A tag for each key.

    Raises
    ------
    InputError
        If there are no pictures, alternative texts too many or too few, or size or quality make no
        picture.

    Examples
    --------
    >>> from PIL import Image
    >>> from xlvlms_tutorial.view import cards
    >>> square = Image.new("RGB", (8, 4))
    >>> style, tags = cards.thumbnails({"first": square, "second": square}, size=32)
    >>> list(tags), style.count("width:32px;aspect-ratio:32/16")
    (['first', 'second'], 1)
    """
    pictures = dict(images) if isinstance(images, Mapping) else dict(enumerate(images))
    texts = list(map(str, pictures)) if alt is None else list(alt)
    if not pictures or len(texts) != len(pictures):
        raise InputError(
            f"{len(texts)} alternative texts for {len(pictures)} pictures",
            "give one picture or more, and one text for each",
        )
    if size < 1 or not 1 <= quality <= 100:
        raise InputError(f"size={size}, quality={quality}", "allowed: 1 pixel or more, 1 to 100")
    rules = {}  # one for each content: equal pictures share it
    tags = {}
    for (key, image), text in zip(pictures.items(), texts, strict=True):
        name, rule = _style_class(image, size, quality)
        rules[name] = rule
        label = escape(text)
        tags[key] = Html(f'<span class="thumb {name}" role="img" aria-label="{label}"></span>')
    return Html(f"{style_of('thumb')}<style>{''.join(rules.values())}</style>"), tags


def concept_card(
    title: str,
    words: Mapping[str, Real] | Sequence[str],
    pictures: Sequence[str] = (),
    facts: Mapping[str, object] | None = None,
    note: str = "",
) -> Html:
    """Show a concept: its words, its pictures and facts about it.

    Use it to look at the atoms of a dictionary. Facts may be the share of pictures in which each
    factor holds.

    Parameters
    ----------
    title : str
        The name of the concept.
    words : mapping of str to number, or sequence of str
        Its words. Words with weights of 0 or more are larger and darker the more they weigh,
        relative to the largest.
    pictures : sequence of str, default ()
        Tags of :func:`thumbnails`, such as those of the samples that activate the concept most.
    facts : mapping, optional
        A value by name. A float between 0 and 1 is drawn as a bar behind its number.
    note : str, default ""
        A line below; by default none.

    Returns
    -------
    Html
        The card.

    Raises
    ------
    InputError
        If a weight is negative, NaN or infinite.

    Examples
    --------
    >>> from xlvlms_tutorial.view import cards
    >>> card = cards.concept_card("concept 3", {"key": 2.0, "gem": 1.0}, facts={"a key": 0.75})
    >>> "--weight:1.00" in card, "--weight:0.50" in card, '"--weight:0.750">0.75</td>' in card
    (True, True, True)
    """
    weights = {}
    if isinstance(words, Mapping):
        weights = {str(word): float(weight) for word, weight in words.items()}
    if not all(0 <= weight < inf for weight in weights.values()):
        raise InputError(
            f"weights {list(weights.values())} of words", "allowed: finite numbers of 0 or more"
        )
    largest = max(weights.values(), default=0) or 1
    chips = []
    for word in words:
        tooltip = f"{weights[word]:.3g}" if weights else ""
        style = f' style="--weight:{weights.get(word, 0) / largest:.2f}"'
        chips.append(_chip(word, "weighed", tooltip, style))
    listing = "".join(chips) or "no words"
    parts = [f'<p class="name">{escape(title)}</p><p class="words">{listing}</p>']
    if pictures:
        parts.append(f'<div class="thumbs">{"".join(pictures)}</div>')
    if facts:
        rows = "".join(map(_fact_row, facts, facts.values()))
        parts.append(f'<table class="answers">{rows}</table>')
    if note:
        parts.append(f'<p class="note">{escape(note)}</p>')
    return Html(f'<div class="concept">{"".join(parts)}</div>')


def _merged_runs(tokens: list[str], spans: list[str]) -> list[tuple[str, str]]:
    pieces: list[tuple[str, str]] = []
    count = 0
    for number, (text, span) in enumerate(zip(tokens, spans, strict=True)):
        if span not in ("image", "video", "audio", "padding"):
            pieces.append((text, span))
            continue
        count += 1
        if number + 1 == len(spans) or spans[number + 1] != span:
            pieces.append((f"{span} \u00d7 {count}", span))
            count = 0
    return pieces


def _chip(text: str, kind: str, title: str, style: str = "") -> str:
    label = escape(text.replace("\n", "\u21b5")) or "&nbsp;"
    return f'<span class="token {kind}" title="{escape(title)}"{style}>{label}</span> '


def _style_class(image: Image.Image, size: int, quality: int) -> tuple[str, str]:
    """A name that follows from the picture's content, and the rule of style that draws it."""
    longer = max(image.size)
    width = max(1, round(image.width * size / longer))
    height = max(1, round(image.height * size / longer))
    small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    with io.BytesIO() as buffer:
        small.save(buffer, format="webp", quality=quality, method=6)
        data = buffer.getvalue()
    name = f"t{hashlib.sha256(data).hexdigest()[:10]}"
    picture = f"url(data:image/webp;base64,{base64.b64encode(data).decode()})"
    # by its ratio, so that a narrow screen makes the picture smaller and cuts nothing off
    shape = f"width:{width}px;aspect-ratio:{width}/{height}"
    return name, f".{name}{{{shape};background-image:{picture}}}"


def _fact_row(name: str, value: object) -> str:
    fractional = isinstance(value, Real) and not isinstance(value, Integral)  # numpy's numbers too
    if fractional and 0 <= value <= 1:
        cell = f'<td class="bar" style="--weight:{value:.3f}">{value:.2f}</td>'
    else:
        text = f"{value:.3g}" if fractional else str(value)
        cell = f"<td>{escape(text)}</td>"
    return f"<tr><td>{escape(str(name))}</td>{cell}</tr>"
