"""Show tables as people read them: few decimals, no gaps named NaN, verdicts as coloured marks."""

from collections.abc import Mapping
from html import escape
from numbers import Integral, Real

import numpy as np
import pandas as pd

from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view.cards import Html, style_of

EMPTY = "–"  # what stands where there is no number
# The sign before a verdict or a headline, so that nothing rests on colours.
SIGNS = {
    "confirmed": "✓",
    "refuted": "✗",
    "undecided": "?",
    "not measured": "–",
    "holds": "✓",
    "holds in part": "◐",
    "does not hold": "✗",
    "cannot tell": "?",
}


class Table:
    """A table that a page shows as HTML and a terminal as text.

    :func:`table` makes it.

    Parameters
    ----------
    cells : pandas.DataFrame
        The cells as they are written, all of them strings; the index is the first column.
    caption : str
        What stands above the table; "" for nothing.
    numeric : set of str
        The columns whose cells are set flush right.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.view import table
    >>> shown = table(pd.DataFrame({"share": [0.51, None]}, index=["image", "text"]))
    >>> "<td class='number'>0.51</td>" in shown._repr_html_()
    True
    """

    def __init__(self, cells: pd.DataFrame, caption: str, numeric: set[object]) -> None:
        self.cells = cells
        self.caption = caption
        self.numeric = numeric

    def __repr__(self) -> str:
        return self.cells.to_string()

    def _repr_html_(self) -> str:
        names = [str(name or "") for name in self.cells.index.names]
        heads = "".join(f"<th>{escape(name)}</th>" for name in names)
        for column in self.cells.columns:
            kind = " class='number'" if column in self.numeric else ""
            label = " ".join(map(str, column)) if isinstance(column, tuple) else str(column)
            heads += f"<th{kind}>{escape(label)}</th>"
        rows = ""
        earlier: tuple[object, ...] = ()
        for key, row in zip(self.cells.index, self.cells.to_numpy(), strict=True):
            levels = key if isinstance(key, tuple) else (key,)
            rows += "<tr>"
            for depth, level in enumerate(levels):
                # a group is named in its first row alone
                repeats = depth < len(levels) - 1 and earlier[: depth + 1] == levels[: depth + 1]
                rows += f"<th>{'' if repeats else escape(str(level))}</th>"
            earlier = levels
            for column, cell in zip(self.cells.columns, row, strict=True):
                kind = " class='number'" if column in self.numeric else ""
                rows += f"<td{kind}>{badge(cell) if cell in SIGNS else escape(cell)}</td>"
            rows += "</tr>"
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        return (
            f"{style_of('sign')}{style_of('shown')}<div class='shown'><table>{caption}"
            f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        )


def table(
    numbers: pd.DataFrame | pd.Series | Mapping[str, object],
    decimals: int | Mapping[str, int] = 2,
    caption: str = "",
) -> Table:
    """Show a table with the same number of decimals down each column.

    Use it for every table that a reader is to read; a ``DataFrame`` prints all its digits, and NaN
    where nothing was measured. Columns of whole numbers are shown without decimals, true and false
    as yes and no, and a verdict or headline as a coloured mark.

    Parameters
    ----------
    numbers : pandas.DataFrame, pandas.Series or mapping
        The table. A series or a mapping of names to values becomes one column.
    decimals : int or mapping of column to int, default 2
        How many decimals numbers have; in a mapping, columns that are not named have 2.
    caption : str, default ""
        What stands above it, best the finding.

    Returns
    -------
    Table
        What a page shows at the end of a cell.

    Raises
    ------
    InputError
        If the table has no rows.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.view import table
    >>> numbers = {"share": [0.5125, float("nan")], "samples": [40.0, 8.0]}
    >>> table(pd.DataFrame(numbers, index=["image", "text"]))
          share samples
    image  0.51      40
    text      –       8
    """
    if isinstance(numbers, Mapping):
        numbers = pd.Series(numbers)
    if isinstance(numbers, pd.Series):
        numbers = numbers.to_frame(numbers.name if numbers.name is not None else "")
    require(len(numbers) > 0, "a table without rows", "give it at least one")
    numeric = set()
    columns = {}
    for position, column in enumerate(numbers.columns):
        values = numbers.iloc[:, position].tolist()
        places = decimals if isinstance(decimals, int) else decimals.get(column, 2)
        whole = all(_is_whole(value) for value in values if not _is_missing(value))
        columns[position] = [_written(value, 0 if whole else places) for value in values]
        if any(_is_number(value) for value in values):
            numeric.add(column)
    cells = pd.DataFrame(columns, index=numbers.index)
    cells.columns = numbers.columns
    return Table(cells, caption, numeric)


def badge(word: str) -> Html:
    """Return a verdict or a headline as a small coloured mark.

    Use it inside HTML of your own, with ``style_of("sign")`` in front.

    Parameters
    ----------
    word : str
        One of ``SIGNS``, such as "confirmed" or "holds in part".

    Returns
    -------
    Html
        The mark.

    Examples
    --------
    >>> from xlvlms_tutorial.view.tables import badge
    >>> badge("holds in part")
    '<span class="sign holds-in-part">◐ holds in part</span>'
    """
    kind = word.replace(" ", "-")
    return Html(f'<span class="sign {kind}">{SIGNS[word]} {word}</span>')


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def _is_missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, Real) and bool(np.isnan(value)))


def _is_whole(value: object) -> bool:
    if isinstance(value, Integral):
        return True
    return isinstance(value, Real) and float(value).is_integer()


def _written(value: object, decimals: int) -> str:
    if _is_missing(value):
        return EMPTY
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, Real):
        text = f"{value:,.{decimals}f}"
        return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text
    return str(value)
