"""Show the ledger of claims on a page.

One figure with every measurement on one axis, and one entry a claim.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from xlvlms_tutorial.claims.claims import VERDICTS, Claim, claim
from xlvlms_tutorial.claims.headlines import corrected, headlines, in_half_widths
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.view import plots
from xlvlms_tutorial.view.cards import Html, style_of
from xlvlms_tutorial.view.tables import badge

Entry = Mapping[str, object]
COLOURS = {"confirmed": plots.ACCENT, "undecided": plots.MUTED, "refuted": "#c4500c"}
MARKERS = {"confirmed": "o", "undecided": "s", "refuted": "X"}
REACH = 12.0  # half intervals from the bar; what lies further out is drawn here
_HEAD = (
    "model",
    "data",
    "setting",
    "setting picked",
    "measured against",
    "value [95 % interval]",
    "interval over",
    "n",
    "seeds",
    "verdict",
)
# How a headline's fidelity reads in a table.
FIDELITY = {
    "method": "the paper's method",
    "proxy": "a proxy",
    "other question": "another question",
}


def distances(entries: Sequence[Entry]) -> pd.DataFrame:
    """Compute how far each measurement lies on the claimed side of its bar, in half intervals.

    Above 0 is the claimed side, so an interval that excludes 0 decides. For a claim of equality the
    bar is the nearer end of the margin. Claims that are not measured have no row.
    """
    names = ["id", "model", "variant", "verdict"]
    rows = []
    for entry in entries:
        if entry["value"] is not None:
            row = {name: entry[name] for name in names}
            rows.append(row | _scaled(claim(str(entry["id"])), entry))
    return pd.DataFrame(rows, columns=[*names, "value", "low", "high"])


def overview(entries: Sequence[Entry], ax: Axes | None = None) -> Axes:
    """Draw every measurement on one axis, a row a claim.

    Use it as the picture of all verdicts. Right of 0 is the claimed side, and an interval that
    touches 0 leaves the claim open. Distances from the bar are in half intervals, so that effects
    of different units compare, and are cut at 12.

    Parameters
    ----------
    entries : sequence of mapping
        The entries of :func:`merge`, one or more.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    InputError
        If there are no entries.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import overview
    >>> from xlvlms_tutorial.view import plots
    >>> names = {"id": "IMA-1", "model": "pocket-llava", "variant": "", "verdict": "confirmed"}
    >>> ax = overview([{**names, "value": 0.75, "low": 0.5, "high": 1.0}])
    >>> ax.get_xlabel(), [label.get_text() for label in ax.get_yticklabels()]
    ('distance from the bar, in half intervals', ['IMA-1'])
    >>> plots.png(ax.figure)[1:4]  # also closes the figure
    b'PNG'
    """
    if not entries:
        raise InputError("a ledger without entries", "give the entries of claims.merge")
    table = distances(entries)
    ids = [str(entry["id"]) for entry in entries]
    names = list(dict.fromkeys(ids))
    ax = plots._axes(ax, height=0.9 + 0.24 * len(names))
    row = table["id"].map(names.index).astype(float)
    by_claim = table.groupby("id")["id"]
    # several measurements of one claim lie one above the other
    row += 0.62 * ((by_claim.cumcount() + 0.5) / by_claim.transform("size") - 0.5)
    for verdict, colour in COLOURS.items():
        mask = table["verdict"] == verdict
        ends = table.loc[mask, ["low", "value", "high"]].clip(-REACH, REACH)
        ax.hlines(row[mask], ends["low"], ends["high"], color=colour, linewidth=1.2, alpha=0.6)
        ax.plot(
            ends["value"], row[mask], MARKERS[verdict], color=colour, markersize=4.2, label=verdict
        )
    ax.axvline(0, color=plots.INK, linewidth=1)
    for number, name in enumerate(names):
        if name not in set(table["id"]):
            ax.text(0.3, number, "not measured", color=plots.MUTED, fontsize=7, va="center")
    ax.set_yticks(range(len(names)), list(map(plots.literal, names)), fontsize=8)
    ax.set(
        ylim=(len(names) - 0.4, -0.6),
        xlim=(-REACH - 0.6, REACH + 0.6),
        xlabel="distance from the bar, in half intervals",
    )
    ax.set_xticks(np.arange(-REACH, REACH + 1, 4), ["≤ −12", "−8", "−4", "0", "4", "8", "≥ 12"])
    ax.legend(frameon=False, fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def counts(entries: Sequence[Entry]) -> pd.DataFrame:
    """Count measurements by part of the book and verdict; "not measured" counts claims.

    Parameters
    ----------
    entries : sequence of mapping
        The entries of :func:`merge`.

    Returns
    -------
    pandas.DataFrame
        A row for each part, and a column for each of :data:`VERDICTS`.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import counts
    >>> entries = [{"part": "I", "verdict": verdict} for verdict in ("confirmed", "refuted")]
    >>> counts(entries).loc["I"].to_dict()
    {'confirmed': 1, 'refuted': 1, 'undecided': 0, 'not measured': 0}
    """
    table = pd.DataFrame(entries, columns=["part", "verdict"])
    sizes = table.groupby(["part", "verdict"], sort=False).size().unstack(fill_value=0)
    return sizes.reindex(columns=list(VERDICTS), fill_value=0)


def ledger(entries: Sequence[Entry], link: str = "../{}.html") -> Html:
    """Show the ledger as HTML: one entry a claim, that opens.

    An entry says what is claimed and where, how it is tested, and lists every measurement.

    Parameters
    ----------
    entries : sequence of mapping
        The entries of :func:`merge`.
    link : str, default "../{}.html"
        The address of a chapter, with its name in place of the braces.

    Returns
    -------
    :class:`~xlvlms_tutorial.view.cards.Html`
        The ledger with its style.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.claims import CLAIMS, ledger, merge
    >>> with TemporaryDirectory() as folder:
    ...     html = ledger(merge(folder))
    >>> html.count("<details") == len(CLAIMS)
    True
    """
    parts = []
    for part, of_part in groupby(entries, key=lambda entry: entry["part"]):
        parts.append(f"<h3>{escape(str(part))}</h3>")
        for name, rows in groupby(of_part, key=lambda entry: entry["id"]):
            parts.append(_entry(claim(str(name)), list(rows), link))
    return Html(f'{style_of("sign")}{style_of("ledger")}<div class="ledger">{"".join(parts)}</div>')


def headline_table(entries: Sequence[Entry], link: str = "#{}") -> Html:
    """Show one line a claim: its headline, and what it rests on.

    Use it as the first table of a ledger; :func:`ledger` has the measurements below it.

    Parameters
    ----------
    entries : sequence of mapping
        The entries of :func:`merge`.
    link : str, default "#{}"
        The address of a claim's measurements, with its id in place of the braces.

    Returns
    -------
    :class:`~xlvlms_tutorial.view.cards.Html`
        The table with its style.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import headline_table, merge
    >>> str(headline_table(merge("no/such/folder"))).count("not measured") > 0
    True
    """
    head = "".join(f"<th>{name}</th>" for name in _HEADLINE_HEAD)
    body = ""
    for line in headlines(entries):
        name = escape(str(line["id"]))
        if line["survived"] is None:
            rival = ""
        else:
            outcome = "yes" if line["survived"] else "no"
            rival = f"{outcome}: {escape(str(line['strongest_rival']))}"
        over = ", ".join(map(str, line["interval_over"]))
        if line["about"] == "models" and line["measurements"] and not line["connectors_varied"]:
            over += " of one model"
        counted = f"{line['confirmed']} / {line['undecided']} / {line['refuted']}"
        cells = (
            f'<a href="{escape(link.format(name))}">{name}</a>',
            escape(str(line["statement"])),
            badge(str(line["headline"])),
            escape(FIDELITY[str(line["fidelity"])]),
            rival,
            escape(str(line["effect"] or "")),
            escape(", ".join(map(str, line["scales"]))),
            counted if line["measurements"] else "",
            escape(over),
            str(line["seeds"] or ""),
        )
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    table = _scrolling(head, body, "Headlines of all claims", "headlines")
    return Html(f'{style_of("sign")}{style_of("ledger")}<div class="ledger">{table}</div>')


_HEADLINE_HEAD = (
    "claim",
    "what is claimed",
    "headline",
    "measured by",
    "beats its strongest baseline",
    "effect",
    "scale",
    "confirmed / undecided / refuted",
    "intervals over",
    "seeds",
)


def _entry(claimed: Claim, rows: list[Entry], link: str) -> str:
    """A claim and its measurements, as an element that opens."""
    measured = [row for row in rows if row["value"] is not None]
    line = headlines(rows)[0]
    signs = badge(str(line["headline"]))
    verdicts = Counter(str(row["verdict"]) for row in measured)
    for verdict in VERDICTS:
        if verdict in verdicts:
            signs += f" <small>{verdicts[verdict]} {verdict}</small>"
    facts = (
        f"<b>Measured by</b> {escape(FIDELITY[claimed.fidelity])}: {escape(claimed.reason)} "
        f"<b>Source.</b> {escape(claimed.paper)} ({escape(claimed.where)}). "
        f"<b>Effect.</b> {escape(claimed.metric)}; claimed {escape(claimed.test)}. "
        f"<b>Baseline.</b> {escape(claimed.rival)}."
    )
    links = {}  # one for each chapter
    for row in rows:
        if row["chapter"]:
            name = str(row["chapter"])
            links[name] = f'<a href="{escape(link.format(name))}">{escape(name)}</a>'
    if links:
        facts += f" <b>Chapter.</b> {', '.join(links.values())}."
    title = f"{signs} <b>{claimed.id}</b> {escape(claimed.statement)}"
    return (
        f'<details id="{claimed.id}"><summary>{title}</summary>'
        f'<p class="facts">{facts}</p>{_table(rows)}</details>'
    )


def _table(rows: list[Entry]) -> str:
    """The measurements of a claim, one a row."""
    measured = [row for row in rows if row["value"] is not None]
    if not measured:
        return "<p>No record of a measurement.</p>"
    body = ""
    for row, after in zip(measured, corrected(measured), strict=True):
        body += _row(row, after)
    head = "".join(f"<th>{name}</th>" for name in _HEAD)
    return _scrolling(head, body, f"Measurements of {rows[0]['id']}", "measurements")


def _scrolling(head: str, body: str, title: str, kind: str) -> str:
    """A table that scrolls inside its own box, by finger, wheel or arrow keys."""
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table><tr>{head}</tr>{body}</table></div>"
    )


def _row(entry: Entry, after: str) -> str:
    """A measurement; ``after`` is its verdict after the correction for their number."""
    interval = f"[{entry['low']:.3g}, {entry['high']:.3g}]"
    cells = (
        entry["model"],
        entry["dataset"],
        entry["variant"] or "",
        entry["choice"],
        entry["against"],
        f"{entry['value']:.3g} {interval}",
        _over(entry),
        entry["n"],
        ", ".join(map(str, entry["seeds"])),
    )
    row = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
    between = " between machines" if entry.get("between_machines") else ""
    mark = badge(str(entry["verdict"]))
    if after != entry["verdict"]:
        between += f" <small>{after} after the correction</small>"
    return f"<tr>{row}<td>{mark}{between}</td></tr>"


def _over(entry: Entry) -> str:
    """What the interval is over; the range of random orders is called what it is."""
    over = str(entry["interval_over"])
    return "none: range of random orders" if over == "random orders" else over


def _scaled(claimed: Claim, entry: Entry) -> dict[str, float]:
    """The value of a measurement and the ends of its interval as distances from the bar."""
    value = float(entry["value"])
    low = float(entry["low"])
    high = float(entry["high"])
    half = (high - low) / 2
    above = np.array([value, low, high]) - (claimed.null - claimed.margin)
    below = (claimed.null + claimed.margin) - np.array([value, high, low])
    # inside the margin is the claimed side: the nearer end counts
    signed = {"greater": above, "less": below, "equal": np.minimum(above, below)}
    names = ("value", "low", "high")
    scaled = {}
    for name, distance in zip(names, signed[claimed.direction].tolist(), strict=True):
        scaled[name] = in_half_widths(distance, half)
    return scaled
