"""Draw the book's figures in one theme, on a light ground that reads in the dark too.

Its colours are those that colour-blind readers tell apart. All texts are drawn as they are written:
a price in a caption is no formula.
"""

import io
import re
import textwrap
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

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.validation import require_same_length

GROUND = "#fbfaf7"  # opaque, so that black text stays readable on a dark page
INK = "#22292d"
ACCENT = "#17809a"
MUTED = "#8a949b"
_UNDRAWN = re.compile("[^ -\u024f]")  # control characters and foreign scripts
HEAT = ListedColormap(["#0a5ad6", "#d62a0a"])  # below and above 0


def theme() -> None:
    """Set the one look of all figures: seaborn's colour-blind palette on a light, opaque ground.

    Every function here calls it; call it yourself before figures of your own.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from xlvlms_tutorial.view import plots
    >>> plots.theme()
    >>> plt.rcParams["axes.titlelocation"]
    'left'
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
    """Draw one dot and one interval for each row of a table, first row on top.

    Use it for values with confidence intervals that are compared with a baseline.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``value``, ``low`` and ``high``; the index names the rows.
    reference : float or pandas.Series, optional
        What the values must beat: a number draws a dashed line, a series with the same names a tick
        in each row it has. By default nothing.
    xlabel : str, default ""
        The label of the axis.
    xlim : (float, float), optional
        The ends of the axis; by default those of the data.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.view import plots
    >>> columns = {"value": [0.4, 0.6], "low": [0.3, 0.5], "high": [0.5, 0.7]}
    >>> table = pd.DataFrame(columns, index=["image", "text"])
    >>> ax = plots.intervals(table, reference=0.5, xlabel="accuracy")
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['image', 'text']
    >>> plots.png(ax.figure)[1:4]  # also closes the figure
    b'PNG'
    """
    ax = _axes(ax, height=0.9 + 0.36 * len(table))
    rows = np.arange(len(table))
    value = table["value"].to_numpy(float)
    low = table["low"].to_numpy(float)
    high = table["high"].to_numpy(float)
    reach = np.abs(np.stack([value - low, high - value]))
    ax.errorbar(
        value, rows, xerr=reach, fmt="o", color=ACCENT, ecolor=MUTED, elinewidth=2, capsize=0
    )
    names = [literal(str(name)) for name in table.index]
    ax.set_yticks(rows, names)
    ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=literal(xlabel), xlim=xlim)
    if isinstance(reference, pd.Series):
        levels = reference.reindex(table.index).to_numpy(float)
        ax.plot(levels, rows, "|", color=INK, markersize=14, markeredgewidth=2)
    elif reference is not None:
        ax.axvline(reference, color=MUTED, linestyle="--", linewidth=1, zorder=0)
    return ax


def lines(table: pd.DataFrame, ylabel: str = "", log: bool = False, ax: Axes | None = None) -> Axes:
    """Draw one line for each column of a table over its index.

    Use it for curves without intervals, such as a loss over steps; :func:`profile` draws intervals
    too. Lines are told apart by dashes as well as by colour.

    Parameters
    ----------
    table : pandas.DataFrame
        A column a line. The name of the index labels the axis, that of the columns the legend.
    ylabel : str, default ""
        The label of the vertical axis.
    log : bool, default False
        Whether the vertical axis is logarithmic.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.view import plots
    >>> index = pd.Index([0, 1], name="layer")
    >>> table = pd.DataFrame({"image": [1.0, 2.0], "text": [1.0, 1.5]}, index=index)
    >>> ax = plots.lines(table, ylabel="norm")
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('layer', 'norm')
    >>> plots.png(ax.figure)[1:4]  # also closes the figure
    b'PNG'
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
    """Draw values over the layers with their intervals as bands, one line for each group.

    Use it for a measure at every layer. Lines are told apart by dashes and markers as well as by
    colour.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``value``, ``low`` and ``high``, the column ``x``, and that of ``group``.
    group : str, optional
        The column whose values are the lines; by default all rows are one line.
    x : str, default "layer"
        The column of the horizontal axis.
    reference : float, optional
        A level drawn as a dashed line; by default none.
    ylabel : str, default ""
        The label of the vertical axis.
    xlabel : str, default ""
        The label of the horizontal axis; by default the name ``x``.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.view import plots
    >>> columns = {"layer": [0, 1, 0, 1], "span": ["image", "image", "text", "text"]}
    >>> table = pd.DataFrame(columns).assign(value=0.5, low=0.4, high=0.6)
    >>> ax = plots.profile(table, group="span", ylabel="cosine")
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['image', 'text']
    >>> plots.png(ax.figure)[1:4]  # also closes the figure
    b'PNG'
    """
    ax = _axes(ax)
    if group is None:
        parts = [("", table)]
    else:
        parts = list(table.groupby(group, sort=False, observed=True))
    colours = sns.color_palette("colorblind", len(parts))
    for number, (name, part) in enumerate(parts):
        x_values = part[x].to_numpy(float)
        low = part["low"].to_numpy(float)
        high = part["high"].to_numpy(float)
        colour = colours[number]
        ax.fill_between(x_values, low, high, color=colour, alpha=0.2, linewidth=0)
        style = ("-", "--", "-.", ":")[number % 4]
        marker = "osD^vP"[number % 6]
        label = literal(str(name))
        ax.plot(
            x_values,
            part["value"],
            style,
            color=colour,
            marker=marker,
            markersize=3,
            label=label,
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
    """Draw a map of points, such as one of t-SNE, coloured by their labels.

    Use it to see which activations lie together; the axes of such maps mean nothing.

    Parameters
    ----------
    places : array_like of shape (n, 2)
        The points.
    labels : sequence of length n
        What the colour says.
    styles : sequence of length n, optional
        What the marker says; by default all markers are the same.
    legend : bool, default True
        Whether colours and markers are explained beside the map.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Examples
    --------
    >>> from xlvlms_tutorial.view import plots
    >>> ax = plots.points([[0, 0], [1, 0], [0, 1]], labels=["image", "image", "text"])
    >>> ax.collections[0].get_offsets().shape
    (3, 2)
    >>> plots.png(ax.figure)[1:4]  # also closes the figure
    b'PNG'
    """
    ax = _axes(ax, height=4.2)
    places = np.asarray(places, float)
    hue = [literal(label) for label in labels]
    style = None if styles is None else [literal(name) for name in styles]
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


def panels(
    n: int, columns: int = 2, width: float = 6.8, height: float = 2.3, same: bool = True
) -> tuple[Figure, list[Axes]]:
    """Make a figure of several panels side by side.

    Use it for the same curves of several tasks, models or settings.

    Parameters
    ----------
    n : int
        How many panels.
    columns : int, default 2
        How many of them stand side by side.
    width : float, default 6.8
        The width of the figure in inches.
    height : float, default 2.3
        The height of a row of panels in inches.
    same : bool, default True
        Whether all panels have the same axes.

    Returns
    -------
    tuple of matplotlib.figure.Figure and list of matplotlib.axes.Axes
        The figure and its panels, row by row.

    Examples
    --------
    >>> from xlvlms_tutorial.view import plots
    >>> figure, axes = plots.panels(3)
    >>> len(axes)
    3
    >>> plots.png(figure)[1:4]  # also closes the figure
    b'PNG'
    """
    theme()
    columns = min(n, columns)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, rows * height),
        sharex=same,
        sharey=same,
        squeeze=False,
    )
    for ax in axes.flat[n:]:
        ax.remove()
    return figure, list(axes.flat[:n])


def legend_below(figure: Figure, columns: int = 3) -> None:
    """Put one legend below all panels of a figure, in place of the legend of each.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        A figure whose panels show the same kinds of lines.
    columns : int, default 3
        How many entries stand side by side.

    Examples
    --------
    >>> from xlvlms_tutorial.view import plots
    >>> figure, (left, right) = plots.panels(2)
    >>> lines = left.plot([0, 1], label="image") + right.plot([1, 0], label="image")
    >>> plots.legend_below(figure)
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['image']
    >>> plots.png(figure)[1:4]  # also closes the figure
    b'PNG'
    """
    entries = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
        if ax.get_legend():
            ax.get_legend().remove()
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def matrix(
    table: pd.DataFrame,
    decimals: int = 2,
    vmin: float | int | None = None,
    vmax: float | int | None = None,
    ax: Axes | None = None,
    centre: float | int | None = None,
) -> Axes:
    """Draw a table of numbers as a map with each number written in its cell.

    Use it for comparisons of all pairs, such as models by datasets.

    Parameters
    ----------
    table : pandas.DataFrame
        The numbers. Cells that are NaN stay empty. The names of index and columns label the axes.
    decimals : int, default 2
        Decimals of the numbers written.
    vmin : float, optional
        The value of the lightest colour; by default the smallest number.
    vmax : float, optional
        The value of the darkest colour; by default the largest number.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.
    centre : float, optional
        The value that has no colour, such as 0 for numbers with a sign: those above and below it
        then have colours of their own. By default one colour for all.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.view import plots
    >>> table = pd.DataFrame({"image": [1.0, 0.5], "text": [0.5, 1.0]}, index=["image", "text"])
    >>> ax = plots.matrix(table, decimals=1)
    >>> [text.get_text() for text in ax.texts]
    ['1.0', '0.5', '0.5', '1.0']
    >>> plots.png(ax.figure)[1:4]  # also closes the figure
    b'PNG'
    """
    ax = _axes(ax, height=1.2 + 0.42 * len(table))
    table = _literally(table)
    if centre is None:
        colours = sns.light_palette(ACCENT, as_cmap=True)
    else:
        colours = sns.diverging_palette(25, 220, s=75, l=55, as_cmap=True)
    sns.heatmap(
        table.astype(float),
        annot=True,
        fmt=f".{decimals}f",
        cmap=colours,
        vmin=vmin,
        vmax=vmax,
        center=centre,
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
    """Draw pictures in rows with a caption under each.

    Use it to look at several samples with what is said of them.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        The pictures.
    captions : sequence of str
        A caption for each; it is broken into lines as wide as the picture.
    columns : int, default 4
        Pictures a row.
    width : float, default 6.8
        Width of the figure in inches.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Raises
    ------
    InputError
        If there are not as many captions as pictures.

    Examples
    --------
    >>> from xlvlms_tutorial.view import plots
    >>> images = [sample.image for sample in samples]
    >>> figure = plots.gallery(images, [sample.captions[0] for sample in samples], columns=2)
    >>> len(figure.axes)
    4
    >>> plots.png(figure)[1:4]  # also closes the figure
    b'PNG'
    """
    require_same_length(images=images, captions=captions)
    figure, places = _places(captions, columns, width)
    for ax, image in zip(places, images, strict=True):
        ax.imshow(image)
    return figure


def heatmap(
    image: Image.Image,
    values: ArrayLike,
    ax: Axes | None = None,
    alpha: float | int = 0.75,
    vmax: float | int | None = None,
) -> Axes:
    """Draw the values of the image tokens over the picture.

    Use it to show where in a picture a concept or an answer comes from. The further from 0, the
    more a cell is tinted: values above 0 are red and those below 0 blue. The picture is drawn grey,
    so that no colour of its own is taken for a value.

    Parameters
    ----------
    image : PIL.Image.Image
        The picture.
    values : array_like of shape (rows, columns)
        A value for each image token, row by row from the top left.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.
    alpha : float, default 0.75
        Opacity of the strongest tint, 0 to 1. The tint of a cell is as opaque as its share of
        ``vmax``, up to this.
    vmax : float, optional
        The magnitude of the strongest tint; by default the largest of ``values``.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    InputError
        If values are not a table of finite numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.view import plots
    >>> ax = plots.heatmap(samples[0].image, np.eye(4))
    >>> len(ax.images)  # the picture and its tints
    2
    >>> plots.png(ax.figure)[1:4]  # also closes the figure
    b'PNG'
    """
    values = _cells(values)
    ax = _axes(ax)
    sizes = np.abs(values)
    top = float(vmax or sizes.max() or 1)
    opacity = alpha * np.clip(sizes / top, 0, 1)
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


def heatmaps(
    images: Sequence[Image.Image],
    maps: Sequence[ArrayLike],
    captions: Sequence[str],
    columns: int = 4,
    width: float = 6.8,
    vmax: float | int | None = None,
) -> Figure:
    """Draw a heat map over each picture, in rows and all on one scale.

    Use it to compare pictures: a tint means the same value in each. Each map is drawn as by
    :func:`heatmap`, the rows are those of :func:`gallery`.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        The pictures.
    maps : sequence of array_like of shape (rows, columns)
        The values of the image tokens of each picture.
    captions : sequence of str
        A caption for each.
    columns : int, default 4
        Pictures a row.
    width : float, default 6.8
        Width of the figure in inches.
    vmax : float, optional
        The magnitude of the strongest tint; by default the largest of all maps.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Raises
    ------
    InputError
        If there are not as many maps and captions as pictures. If there are no maps, or one is not
        a table of finite numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.view import plots
    >>> images = [sample.image for sample in samples[:2]]
    >>> figure = plots.heatmaps(images, [np.eye(4), -np.eye(4)], captions=["a key", "a gem"])
    >>> len(figure.axes)
    2
    >>> plots.png(figure)[1:4]  # also closes the figure
    b'PNG'
    """
    require_same_length(images=images, maps=maps, captions=captions)
    if not len(maps):
        raise InputError("no maps", "give one or more, each with its picture and caption")
    top = vmax or max(map(_magnitude, maps))
    figure, places = _places(captions, columns, width)
    for ax, image, values in zip(places, images, maps, strict=True):
        heatmap(image, values, ax, vmax=top)
    return figure


def lens(
    values: ArrayLike,
    words: Sequence[Sequence[str]],
    columns: Sequence[str],
    rows: Sequence[object] | None = None,
) -> Figure:
    """Draw a map of layers by positions with the word of each cell written in it.

    Use it for the logit lens: the most probable token of each layer at each position. Layer 0 is at
    the bottom, positions go from left to right.

    Parameters
    ----------
    values : array_like of shape (layers, positions)
        Probabilities between 0 and 1, drawn as colour.
    words : sequence of sequence of str
        The word of each cell, of the same shape.
    columns : sequence of str
        The names of the positions.
    rows : sequence, optional
        The names of the layers; by default their numbers from 0.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Examples
    --------
    >>> from xlvlms_tutorial.view import plots
    >>> words = [["the", "a"], ["key", "gem"]]
    >>> figure = plots.lens([[0.1, 0.2], [0.9, 0.7]], words, columns=["two", "red"])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['the', 'a', 'key', 'gem']
    >>> plots.png(figure)[1:4]  # also closes the figure
    b'PNG'
    """
    theme()
    values = np.asarray(values, float)
    n_rows, n_columns = values.shape
    rows = range(n_rows) if rows is None else rows
    figure, ax = plt.subplots(figsize=(1.0 + 0.6 * n_columns, 1.0 + 0.22 * n_rows))
    colours = sns.light_palette(ACCENT, as_cmap=True)
    ax.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.6 else INK
        word = printable(words[row][column], 9)
        ax.text(column, row, word, ha="center", va="center", fontsize=7.5, color=colour)
    column_names = list(map(printable, columns))
    row_names = [literal(str(name)) for name in rows]
    ax.set_xticks(range(len(columns)), column_names, rotation=45, ha="right")
    ax.set_yticks(range(n_rows), row_names, fontsize=8)
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return figure


def png(figure: Figure) -> bytes:
    """Save a figure as the bytes of a PNG file, and close it.

    The bytes are the same each time. A closed figure is not shown twice by a notebook.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The figure.

    Returns
    -------
    bytes
        The content of the file.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from xlvlms_tutorial.view import plots
    >>> plots.png(Figure())[1:4]
    b'PNG'
    """
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", metadata={"Software": None})
        plt.close(figure)
        return buffer.getvalue()


def wrapped(text: str, letters: int) -> str:
    """Break a text between words into lines of a largest length.

    Parameters
    ----------
    text : str
        The text.
    letters : int
        Letters a line at most; a longer word keeps its own line.

    Returns
    -------
    str
        The text with line breaks.

    Examples
    --------
    >>> from xlvlms_tutorial.view import plots
    >>> print(plots.wrapped("two red keys on the sand", 12))
    two red keys
    on the sand
    """
    return textwrap.fill(
        " ".join(text.split()), letters, break_long_words=False, break_on_hyphens=False
    )


def literal(label: Any) -> Any:
    r"""Write a text so that matplotlib draws it sign by sign.

    Between two unescaped ``$`` it would read a formula, and fail at most prices. Use it for texts
    that go to axes directly; the functions here do it by themselves.

    Parameters
    ----------
    label : object
        The text. What is no text, such as a number, is left to the axis.

    Returns
    -------
    object
        The text with each ``$`` escaped, or what was given.

    Examples
    --------
    >>> from xlvlms_tutorial.view import plots
    >>> print(plots.literal("from $5 to $6"), plots.literal(7))
    from \$5 to \$6 7
    """
    return label.replace("$", r"\$") if isinstance(label, str) else label


def printable(word: str, letters: int | None = None) -> str:
    """Write a token so that matplotlib's font can draw it.

    No space around, line breaks visible, foreign scripts as a dot, no formulas.

    Parameters
    ----------
    word : str
        The token.
    letters : int, optional
        Letters of it at most; by default all.

    Returns
    -------
    str
        The text to draw.

    Examples
    --------
    >>> from xlvlms_tutorial.view import plots
    >>> plots.printable(" keys"), plots.printable(" mushroom", 4)
    ('keys', 'mush')
    """
    visible = word.strip(" ").replace("\n", "\\n")[:letters]
    return literal(_UNDRAWN.sub("\u00b7", visible))


def _literally(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its names as :func:`literal` writes them."""
    axis_names = {}
    for axis in ("index", "columns"):
        name = getattr(table, axis).name
        if isinstance(name, str):
            axis_names[axis] = literal(name)
    return table.rename(index=literal, columns=literal).rename_axis(**axis_names)


def _places(captions: Sequence[str], columns: int, width: float) -> tuple[Figure, list[Axes]]:
    """A figure with a place for a picture above each caption."""
    theme()
    columns = min(columns, len(captions))
    letters = max(12, int(width / columns * 13))
    texts = [wrapped(caption, letters) for caption in captions]
    side = width / columns
    n_lines = max(text.count("\n") + 1 for text in texts)
    caption_height = 0.18 + 0.16 * n_lines
    row_height = side + caption_height
    rows = -(-len(captions) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, rows * row_height), squeeze=False, layout="none"
    )
    share = caption_height / row_height / rows
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.01 / rows, bottom=share)
    figure.subplots_adjust(hspace=caption_height / side, wspace=0.05)
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
        raise InputError(
            f"values of shape {cells.shape} for a picture", "give (rows, columns) of finite numbers"
        )
    return cells


def _magnitude(values: ArrayLike) -> float:
    """The largest absolute value of a map."""
    return float(np.abs(_cells(values)).max())


def _axes(ax: Axes | None, height: float = 3.6) -> Axes:
    theme()
    return plt.subplots(figsize=(6.4, height))[1] if ax is None else ax
