"""The book's figures: one theme on a light ground that reads in the dark too.

Its colours are those that colour-blind readers tell apart. All texts are drawn as they are written:
a price in a caption is no formula.
"""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

from xlvlms_tutorial.errors import ActivationsError, LengthError

GROUND = "#fbfaf7"  # opaque, so that black text stays readable on a dark page
INK = "#22292d"
ACCENT = "#17809a"
MUTED = "#8a949b"
HEAT = ListedColormap(["#0a5ad6", "#d62a0a"])  # below and above 0


def theme() -> None:
    """Set the one look of all figures: seaborn's colour-blind palette on a light, opaque ground.

    Every function here calls it.
    """
    rc = {
        "figure.facecolor": GROUND,
        "axes.facecolor": GROUND,
        "savefig.facecolor": GROUND,
        "figure.dpi": 110,
        "savefig.dpi": 110,
        "figure.figsize": (6.4, 3.6),
        "figure.constrained_layout.use": True,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": "medium",
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    sns.set_theme(style="ticks", palette="colorblind", rc=rc)


def intervals(
    table: pd.DataFrame,
    reference: pd.Series | float | int | None = None,
    xlabel: str = "",
    xlim: tuple[float | int, float | int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one dot and one interval for each row of ``table``, first row on top.

    ``table`` has the columns ``value``, ``low`` and ``high`` and the names of the rows in its
    index. ``reference`` is what the values must beat: a number draws a dashed line, a series with
    the same names a tick in each row it has.
    """
    ax = _axes(ax, height=0.9 + 0.36 * len(table))
    rows = np.arange(len(table))
    value = table["value"].to_numpy(float)
    reach = np.abs(
        np.stack([value - table["low"].to_numpy(float), table["high"].to_numpy(float) - value])
    )
    ax.errorbar(
        value, rows, xerr=reach, fmt="o", color=ACCENT, ecolor=MUTED, elinewidth=2, capsize=0
    )
    ax.set_yticks(rows, [literal(str(name)) for name in table.index])
    ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=literal(xlabel), xlim=xlim)
    if isinstance(reference, pd.Series):
        ax.plot(
            reference.reindex(table.index).to_numpy(float),
            rows,
            "|",
            color=INK,
            markersize=14,
            markeredgewidth=2,
        )
    elif reference is not None:
        ax.axvline(reference, color=MUTED, linestyle="--", linewidth=1, zorder=0)
    return ax


def lines(table: pd.DataFrame, ylabel: str = "", log: bool = False, ax: Axes | None = None) -> Axes:
    """Draw one line for each column of ``table`` over its index.

    Told apart by dashes as well as by colour.
    """
    ax = _axes(ax)
    table = _literally(table)
    sns.lineplot(data=table, ax=ax)
    ax.set(xlabel=table.index.name or "", ylabel=literal(ylabel))
    if log:
        ax.set_yscale("log")
    if table.shape[1] > 1:
        ax.legend(frameon=False, title=table.columns.name)
    else:
        ax.get_legend().remove()  # one line needs no name beside the axis's
    return ax


def profile(
    table: pd.DataFrame,
    group: str | None = None,
    x: str = "layer",
    reference: float | int | None = None,
    ylabel: str = "",
    xlabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw ``value`` over ``x`` with its interval as a band.

    One line for each value of the column ``group``. ``table`` has the columns ``value``,
    ``low`` and ``high``; lines are told apart by dashes and markers as well as by colour.
    ``reference`` draws a dashed level.
    """
    ax = _axes(ax)
    parts = (
        [("", table)] if group is None else list(table.groupby(group, sort=False, observed=True))
    )
    colours = sns.color_palette("colorblind", len(parts))
    for number, (name, part) in enumerate(parts):
        x_values = part[x].to_numpy(float)
        colour = colours[number]
        ax.fill_between(
            x_values,
            part["low"].to_numpy(float),
            part["high"].to_numpy(float),
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
        style = ("-", "--", "-.", ":")[number % 4]
        ax.plot(
            x_values,
            part["value"],
            style,
            color=colour,
            marker="osD^vP"[number % 6],
            markersize=3,
            label=literal(str(name)),
        )
    if reference is not None:
        ax.axhline(reference, color=MUTED, linestyle="--", linewidth=1, zorder=0)
    ax.set(xlabel=literal(xlabel or x), ylabel=literal(ylabel))
    if group is not None:
        ax.legend(frameon=False, title=None, fontsize="small")
    return ax


def points(
    places: ArrayLike,
    labels: Sequence[object],
    styles: Sequence[object] | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw a map of points (n, 2), such as one of t-SNE.

    Colour by ``labels``, marker by ``styles``; the axes of such maps mean nothing.
    """
    ax = _axes(ax, height=4.2)
    places = np.asarray(places, float)
    hue, style = (
        named if named is None else list(map(literal, named)) for named in (labels, styles)
    )
    sns.scatterplot(
        x=places[:, 0], y=places[:, 1], hue=hue, style=style, s=26, linewidth=0.3, ax=ax
    )
    ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    if legend:
        sns.move_legend(
            ax, "center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small"
        )
    else:
        ax.get_legend().remove()
    return ax


def matrix(
    table: pd.DataFrame,
    decimals: int = 2,
    vmin: float | int | None = None,
    vmax: float | int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a table of numbers as a map with each number written in its cell.

    Cells that are NaN stay empty.
    """
    ax = _axes(ax, height=1.2 + 0.42 * len(table))
    table = _literally(table)
    colours = sns.light_palette(ACCENT, as_cmap=True)
    sns.heatmap(
        table.astype(float),
        annot=True,
        fmt=f".{decimals}f",
        cmap=colours,
        vmin=vmin,
        vmax=vmax,
        cbar=False,
        ax=ax,
        linewidths=1,
        linecolor=GROUND,
    )
    ax.set(xlabel=table.columns.name or "", ylabel=table.index.name or "")
    ax.tick_params(length=0)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
    return ax


def gallery(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, width: float = 6.8
) -> Figure:
    """Draw pictures in rows of ``columns`` with a caption under each.

    ``width`` is that of the figure in inches.

    Raises
    ------
    LengthError
        If there are not as many captions as pictures.
    """
    if len(images) != len(captions):
        raise LengthError(images=len(images), captions=len(captions))
    figure, places = _places(captions, columns, width)
    for ax, image in zip(places, images, strict=True):
        ax.imshow(image)
    return figure


def heat(
    image: Image.Image,
    values: ArrayLike,
    ax: Axes | None = None,
    alpha: float | int = 0.75,
    vmax: float | int | None = None,
) -> Axes:
    """Draw the values of the image tokens, (rows, columns), over the picture.

    The further from 0, the more a cell is tinted. Values above 0 are red and those below 0 blue.
    The tint of a cell is as opaque as its share of ``vmax`` (the largest magnitude by default), up
    to ``alpha``; the picture is drawn grey, so that no colour of its own is taken for a value.

    Raises
    ------
    ActivationsError
        If values are not a table of finite numbers.
    """
    values = _cells(values)
    ax = _axes(ax)
    top = float(vmax or np.abs(values).max() or 1)
    opacity = alpha * np.clip(np.abs(values) / top, 0, 1)
    extent = (0, image.width, image.height, 0)
    # no darker than grey, on which tints show
    ax.imshow(image.convert("L"), cmap="gray", vmin=-128, vmax=255, extent=extent)
    ax.imshow(
        np.sign(values),
        cmap=HEAT,
        vmin=-1,
        vmax=1,
        alpha=opacity,
        extent=extent,
        interpolation="nearest",
    )
    ax.axis("off")
    return ax


def heats(
    images: Sequence[Image.Image],
    maps: Sequence[ArrayLike],
    captions: Sequence[str],
    columns: int = 4,
    width: float = 6.8,
    vmax: float | int | None = None,
) -> Figure:
    """Draw a heat map over each picture as :func:`heat` does, in rows, all on one scale.

    In rows as :func:`gallery` does. ``vmax`` is the magnitude of the strongest tint, by default the
    largest of all maps, so that pictures can be compared.

    Raises
    ------
    LengthError
        If there are not as many maps and captions as pictures.
    ActivationsError
        As :func:`heat`, or if there are none.
    """
    if not len(images) == len(maps) == len(captions):
        raise LengthError(images=len(images), maps=len(maps), captions=len(captions))
    if not len(maps):
        raise ActivationsError("no maps", "give one or more, each with its picture and caption")
    top = vmax or max(float(np.abs(_cells(values)).max()) for values in maps)
    figure, places = _places(captions, columns, width)
    for ax, image, values in zip(places, images, maps, strict=True):
        heat(image, values, ax, vmax=top)
    return figure


def lens(
    values: ArrayLike,
    words: Sequence[Sequence[str]],
    columns: Sequence[str],
    rows: Sequence[object] | None = None,
) -> Figure:
    """Draw a map with the word of each cell written in it.

    Layer 0 at the bottom, positions from left to right. ``values`` are probabilities between 0 and
    1 of shape (layers, positions), ``words`` has the same shape; ``columns`` names the positions
    and ``rows`` the layers (their numbers by default).
    """
    theme()
    values = np.asarray(values, float)
    names = range(len(values)) if rows is None else rows
    figure, ax = plt.subplots(figsize=(1.0 + 0.6 * values.shape[1], 1.0 + 0.22 * len(values)))
    ax.imshow(
        values,
        cmap=sns.light_palette(ACCENT, as_cmap=True),
        vmin=0,
        vmax=1,
        aspect="auto",
        origin="lower",
    )
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.6 else INK
        ax.text(
            column,
            row,
            printable(words[row][column], 9),
            ha="center",
            va="center",
            fontsize=7.5,
            color=colour,
        )
    ax.set_xticks(
        range(len(columns)), [printable(word) for word in columns], rotation=45, ha="right"
    )
    ax.set_yticks(range(len(values)), [literal(str(name)) for name in names], fontsize=8)
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, the same bytes each time.

    Closes the figure, so that a notebook does not show it twice.
    """
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", metadata={"Software": None})
        plt.close(figure)
        return buffer.getvalue()


def wrapped(text: str, letters: int) -> str:
    """The text broken between words into lines of at most ``letters``.

    A longer word keeps its own line.
    """
    broken = [""]
    for word in text.split():
        if broken[-1] and len(broken[-1]) + 1 + len(word) > letters:
            broken.append(word)
        else:
            broken[-1] = f"{broken[-1]} {word}".strip()
    return "\n".join(broken)


def literal(label: Any) -> Any:
    """A text as matplotlib draws it sign by sign.

    Between two unescaped ``$`` it would read a formula, and fail at most prices. For texts
    that go to axes directly; the functions here do it by themselves. What is no text, such as
    a number, is left to the axis.
    """
    return label.replace("$", r"\$") if isinstance(label, str) else label


def printable(word: str, letters: int | None = None) -> str:
    """A token as matplotlib's font can draw it.

    No space around, line breaks visible, foreign scripts as a dot, no
    maths. At most ``letters`` of it.
    """
    visible = word.strip(" ").replace("\n", "\\n")[:letters]
    return literal("".join(letter if " " <= letter < "\u0250" else "\u00b7" for letter in visible))


def _literally(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its names as :func:`literal` writes them."""
    named = {
        axis: literal(getattr(table, axis).name)
        for axis in ("index", "columns")
        if isinstance(getattr(table, axis).name, str)
    }
    return table.rename(index=literal, columns=literal).rename_axis(**named)


def _places(captions: Sequence[str], columns: int, width: float) -> tuple[Figure, list[Axes]]:
    """A figure with a place for a picture above each caption."""
    theme()
    columns = min(columns, len(captions))
    letters = max(12, int(width / columns * 13))
    texts = [wrapped(caption, letters) for caption in captions]
    side = width / columns
    below = 0.18 + 0.16 * max(text.count("\n") + 1 for text in texts)
    rows = -(-len(captions) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, rows * (side + below)), squeeze=False, layout="none"
    )
    share = below / (side + below) / rows
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.01 / rows, bottom=share, hspace=below / side, wspace=0.05
    )
    for ax in axes.flat:
        ax.axis("off")
    for ax, text in zip(axes.flat, texts, strict=False):
        ax.set_title(
            literal(text), y=-0.05, va="top", fontsize=8.5, fontweight="normal", loc="center"
        )
    return figure, list(axes.flat)[: len(texts)]


def _cells(values: ArrayLike) -> np.ndarray:
    cells = np.asarray(values, float)
    if cells.ndim != 2 or not cells.size or not np.isfinite(cells).all():
        raise ActivationsError(
            f"values of shape {cells.shape} for a picture", "give (rows, columns) of finite numbers"
        )
    return cells


def _axes(ax: Axes | None, height: float = 3.6) -> Axes:
    theme()
    return plt.subplots(figsize=(6.4, height))[1] if ax is None else ax
