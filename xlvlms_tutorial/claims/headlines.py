"""Sum up the measurements of a claim in one headline.

A claim has many measurements: by layer, by task, against several baselines. Its headline follows
from all of them by the rules of :func:`headlines`, after a correction for their number.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import copysign, inf
from pathlib import Path
from statistics import NormalDist, median

import numpy as np

from xlvlms_tutorial.claims.claims import Claim, claim
from xlvlms_tutorial.io import write_json

Entry = Mapping[str, object]
HEADLINES = ("holds", "holds in part", "does not hold", "cannot tell", "not measured")
LEVEL = 0.05  # of the intervals, and of the correction
# From where on an effect is called small, medium and large. The bounds are ours; those of
# correlations are Cohen's.
SIZES = {
    "share": (0.02, 0.1, 0.3),
    "correlation": (0.1, 0.3, 0.5),
    "cosine": (0.02, 0.1, 0.3),
    "score": (0.02, 0.1, 0.3),
    "nats": (0.02, 0.2, 1.0),
    "ratio": (0.02, 0.1, 0.3),
}
_WORDS = ("next to nothing", "small", "medium", "large")
# The weakest first.
_STRENGTH = ("does not hold", "cannot tell", "holds in part", "holds")
# Describes claims.json. Its number is 2: the first form was a bare list of measurements.
SCHEMA = Path(__file__).with_name("schema.json")


def distance(claimed: Claim, number: float) -> float:
    """Compute how far a number lies on the claimed side of the bar, below 0 on the other side.

    For a claim of equality the bar is the nearer end of the margin.
    """
    above = number - (claimed.null - claimed.margin)
    below = claimed.null + claimed.margin - number
    if claimed.direction == "equal":
        return min(above, below)
    return above if claimed.direction == "greater" else below


def p_value(claimed: Claim, entry: Entry) -> float:
    """Compute the two-sided p-value of the bar from an interval of 95 %, as of a normal estimate.

    Only the half of the interval that points to the bar counts.
    """
    value, low, high = (float(entry[name]) for name in ("value", "low", "high"))
    bars = {
        "greater": [claimed.null - claimed.margin],
        "less": [claimed.null + claimed.margin],
        "equal": [claimed.null - claimed.margin, claimed.null + claimed.margin],
    }[claimed.direction]
    p_values = []
    for bar in bars:
        half = value - low if bar < value else high - value
        if half > 0:
            z = NormalDist().inv_cdf(1 - LEVEL / 2) * abs(value - bar) / half
            p_values.append(2 * (1 - NormalDist().cdf(z)))
        else:
            p_values.append(0.0 if value != bar else 1.0)
    inside = claimed.direction == "equal" and distance(claimed, value) > 0
    if inside or len(p_values) == 1:
        return max(p_values)  # inside a margin both of its ends have to be excluded
    return p_values[0] if value <= claimed.null else p_values[1]  # outside of it the nearer one


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of one family for their number, by Holm's step-down method.

    Use it where several measurements speak of one claim.

    Parameters
    ----------
    p_values : sequence of float
        The p-values, from 0 to 1.

    Returns
    -------
    list of float
        The adjusted p-values in the same order. Where one is below 0.05, its test still rejects
        when the chance of any false rejection in the family is held at 5 %.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import holm
    >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def corrected(entries: Sequence[Entry]) -> list[str]:
    """Give the verdicts of the measurements of one claim after Holm's correction.

    A verdict that the correction does not leave standing becomes "undecided".
    """
    claimed = claim(str(entries[0]["id"]))
    adjusted = holm([p_value(claimed, entry) for entry in entries])
    verdicts = []
    for entry, p in zip(entries, adjusted, strict=True):
        verdicts.append(str(entry["verdict"]) if p < LEVEL else "undecided")
    return verdicts


def summed_up(verdicts: Sequence[str]) -> str:
    """Give the headline that verdicts alone make, see :func:`headlines`."""
    counts = Counter(verdicts)
    if not verdicts:
        return "not measured"
    if counts["confirmed"] == len(verdicts):
        return "holds"
    if counts["confirmed"]:
        return "holds in part"
    return "does not hold" if 2 * counts["refuted"] > len(verdicts) else "cannot tell"


def effect_in_words(claimed: Claim, values: Sequence[float]) -> str:
    """Say how large an effect is, by its distance from the bar.

    The middle of several values is taken; where they lie on both sides, the words say so.
    """
    distances = [distance(claimed, value) for value in values]
    middle = median(distances)
    size = _WORDS[sum(abs(middle) >= bound for bound in SIZES[claimed.effect])]
    if min(distances) < 0 < max(distances):
        return f"{size}, on both sides of the bar"
    side = "on the claimed side" if middle > 0 else "on the other side"
    return size if size == _WORDS[0] else f"{size}, {side}"


def headlines(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """Sum up each claim in one line.

    Use it for the ledger and for the page of findings. The rules:

    1. Every measurement counts. Their verdicts are corrected for their number (:func:`holm`); what
       the correction does not leave standing counts as undecided.
    2. "holds": all confirmed. "holds in part": some confirmed. "does not hold": none confirmed and
       more than half refuted. "cannot tell": all else.
    3. The strongest rival is the baseline against which the claim does worst. It is survived where
       the claim holds against it.
    4. A measurement that asks another question cannot settle the claim: "holds" and "does not hold"
       become "cannot tell".

    Parameters
    ----------
    entries : sequence of mapping
        The entries of :func:`merge`.

    Returns
    -------
    list of dict
        One a claim, in the order of the register: id, part, statement, headline, fidelity, reason,
        strongest_rival and survived (None where nothing is measured), rivals (the headline against
        each), effect, scales, interval_over, about, measurements, confirmed, refuted and undecided
        (numbers, after the correction), seeds and connectors_varied (whether an interval over
        models is among them).

    Examples
    --------
    >>> from xlvlms_tutorial.claims import headlines, merge
    >>> lines = headlines(merge("no/such/folder"))
    >>> lines[1]["id"], lines[1]["headline"]
    ('IMA-1', 'not measured')
    """
    lines = []
    for name, rows in groupby(entries, key=lambda entry: entry["id"]):
        measured = [row for row in rows if row["value"] is not None]
        lines.append(_line(claim(str(name)), measured))
    return lines


def _line(claimed: Claim, rows: list[Entry]) -> dict[str, object]:
    verdicts = corrected(rows) if rows else []
    by_rival: dict[str, list[str]] = {}
    distances: dict[str, list[float]] = {}
    for row, verdict in zip(rows, verdicts, strict=True):
        rival = str(row["against"])
        by_rival.setdefault(rival, []).append(verdict)
        signed = distance(claimed, float(row["value"]))
        half = (float(row["high"]) - float(row["low"])) / 2
        distances.setdefault(rival, []).append(in_half_widths(signed, half))
    rivals = []
    for rival, of_rival in by_rival.items():
        rivals.append(
            {"against": rival, "headline": summed_up(of_rival), "measurements": len(of_rival)}
        )
    strongest = None
    if rivals:
        strongest = min(
            rivals,
            key=lambda one: (
                _STRENGTH.index(one["headline"]),
                median(distances[one["against"]]),
            ),
        )
    headline = summed_up(verdicts)
    if claimed.fidelity == "other question" and headline in ("holds", "does not hold"):
        headline = "cannot tell"
    counts = Counter(verdicts)
    seeds = set()
    for row in rows:
        seeds.update(row["seeds"])
    over = _distinct(rows, "interval_over")
    return {
        "id": claimed.id,
        "part": claimed.part,
        "statement": claimed.statement,
        "headline": headline,
        "fidelity": claimed.fidelity,
        "reason": claimed.reason,
        "strongest_rival": strongest["against"] if strongest else None,
        "survived": strongest["headline"] == "holds" if strongest else None,
        "rivals": rivals,
        "effect": effect_in_words(claimed, [float(row["value"]) for row in rows]) if rows else None,
        "scales": _distinct(rows, "scale"),
        "about": claimed.about,
        "interval_over": over,
        "connectors_varied": bool({"connectors", "encoders", "seeds"} & set(over)),
        "measurements": len(rows),
        "confirmed": counts["confirmed"],
        "refuted": counts["refuted"],
        "undecided": counts["undecided"],
        "seeds": len(seeds),
    }


def _distinct(rows: Sequence[Entry], name: str) -> list[str]:
    return list(dict.fromkeys(str(row[name]) for row in rows))


def in_half_widths(signed: float, half: float) -> float:
    """Return a distance in half intervals; an interval of no width decides by the sign alone."""
    if half:
        return signed / half
    return copysign(inf, signed) if signed else 0.0


def multiplicity(entries: Sequence[Entry]) -> dict[str, object]:
    """Count how many intervals exclude their bar, and how many would by chance alone.

    Use it beside the ledger: of a hundred intervals of 95 % about five miss what they are meant to
    hold.

    Parameters
    ----------
    entries : sequence of mapping
        The entries of :func:`merge`.

    Returns
    -------
    dict
        intervals: how many measurements there are; excluding: how many exclude their bar;
        by_chance: how many would if no claim and no opposite of one were true; after_holm: how
        many still do after Holm's correction within each claim; families: the number of claims
        measured.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import merge, multiplicity
    >>> multiplicity(merge("no/such/folder"))["intervals"]
    0
    """
    measured = [entry for entry in entries if entry["value"] is not None]
    after = 0
    families = 0
    for _, rows in groupby(measured, key=lambda entry: entry["id"]):
        verdicts = corrected(list(rows))
        after += len(verdicts) - verdicts.count("undecided")
        families += 1
    decided = [entry for entry in measured if entry["verdict"] in ("confirmed", "refuted")]
    return {
        "intervals": len(measured),
        "excluding": len(decided),
        "by_chance": round(LEVEL * len(measured), 1),
        "after_holm": after,
        "families": families,
    }


def write_claims(entries: Sequence[Entry], path: str | Path) -> dict[str, object]:
    """Write headlines and measurements as JSON for machines.

    Use it for an archive of results. ``claims/schema.json`` in the package describes the file.

    Parameters
    ----------
    entries : sequence of mapping
        The entries of :func:`merge`.
    path : path
        The file to write.

    Returns
    -------
    dict
        What was written: schema (2), headlines, measurements and multiplicity.

    Raises
    ------
    FileError
        If the file cannot be written.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.claims import CLAIMS, merge, write_claims
    >>> with TemporaryDirectory() as folder:
    ...     content = write_claims(merge(folder), Path(folder) / "claims.json")
    >>> len(content["headlines"]) == len(CLAIMS)
    True
    """
    content = as_content(entries)
    write_json(path, content)
    return content


def as_content(entries: Sequence[Entry]) -> dict[str, object]:
    """Return what :func:`write_claims` writes."""
    return {
        "schema": 2,
        "headlines": headlines(entries),
        "multiplicity": multiplicity(entries),
        "measurements": [dict(entry) for entry in entries],
    }
