"""Say what the book found, each sentence with the records that it rests on.

The sentences stand in ``findings.yaml``, each with what it assumes: verdicts of records, or
statements that a chapter checked. A sentence whose assumptions this run does not bear out is shown
as one that does not hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml

from xlvlms_tutorial.claims.claims import CLAIMS, VERDICTS, UniqueKeyLoader, scale_of
from xlvlms_tutorial.claims.headlines import headlines
from xlvlms_tutorial.errors import damaged_record
from xlvlms_tutorial.view.cards import Html, style_of
from xlvlms_tutorial.view.tables import badge

Record = Mapping[str, object]
FINDINGS = Path(__file__).with_name("findings.yaml")
# What the sentences of this book speak of; records of a reader's models do not count.
SCALES = ("pocket", "second")
NOT_HERE = "does not hold in this run"
_KINDS = ("findings", "surprises")
_OF_RECORD = {"claim", "chapter", "variant", "verdict"}
_OF_CHECK = {"checked", "chapter"}


@dataclass(frozen=True)
class Finding:
    """A sentence, and what it rests on.

    ``rests_on`` has either claim, chapter, variant and verdict, or checked and chapter, in each
    mapping.
    """

    kind: str
    sentence: str
    link: str
    rests_on: tuple[Mapping[str, str], ...]


def read_findings(file: str | Path | None = None) -> list[Finding]:
    """Read the sentences of the page of findings, and check every field of them.

    Parameters
    ----------
    file : path, optional
        A YAML file with the lists "findings" and "surprises", by default that of this book.

    Returns
    -------
    list of Finding
        The findings, then the surprises, in the order of the file.

    Raises
    ------
    FileError
        If a field is missing, unknown or empty, or names a claim or verdict that is unknown.
    """
    file = FINDINGS if file is None else Path(file)
    read = []
    place = "its keys"
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), UniqueKeyLoader)
        if content.keys() != set(_KINDS):
            raise ValueError(f"the keys are {', '.join(content)}")
        for kind in _KINDS:
            for number, entry in enumerate(content[kind], 1):
                place = f"entry {number} of {kind}"
                read.append(_checked(kind, entry))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as cause:
        raise damaged_record(
            f"{file}, {place}", f"not a list of findings ({type(cause).__name__}: {cause})"
        ) from cause
    return read


def _checked(kind: str, entry: Record) -> Finding:
    """An entry of the file as a Finding."""
    if entry.keys() != {"sentence", "link", "rests_on"}:
        raise ValueError(f"fields are {', '.join(map(str, entry))}")
    if not entry["rests_on"]:
        raise ValueError("rests_on is empty")
    for ground in entry["rests_on"]:
        if set(ground) not in (_OF_RECORD, _OF_CHECK):
            raise ValueError(f"rests_on has {', '.join(map(str, ground))}")
        if "claim" in ground and ground["claim"] not in CLAIMS:
            raise ValueError(f"there is no claim {ground['claim']}")
        if "verdict" in ground and ground["verdict"] not in VERDICTS:
            raise ValueError(f"verdict is {ground['verdict']!r}")
    texts = [entry["sentence"], entry["link"]]
    for ground in entry["rests_on"]:
        texts += [value for name, value in ground.items() if name != "variant"]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("a text is missing")
    return Finding(kind, entry["sentence"], entry["link"], tuple(entry["rests_on"]))


def findings(
    entries: Sequence[Record], checks: Sequence[Record], file: str | Path | None = None
) -> list[dict[str, object]]:
    """Compare every finding with what a run recorded.

    Use it for the page of findings and before a build. Only records of the embedded models count.

    Parameters
    ----------
    entries : sequence of mapping
        The entries of :func:`merge`.
    checks : sequence of mapping
        What :func:`read_checks` gives.
    file : path, optional
        The sentences, by default those of this book.

    Returns
    -------
    list of dict
        One a sentence: kind ("findings" or "surprises"), sentence, link (a page), holds, problem
        (why it does not hold, else None), and measured: a dict for each record that it rests on,
        with id, verdict, value, low, high, interval_over, against, chapter, scale, headline and
        entry (that of ``entries``).

    Raises
    ------
    FileError
        If the file is no list of findings.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import findings, merge
    >>> results = findings(merge("no/such/folder"), [])
    >>> any(result["holds"] for result in results)
    False
    """
    by_claim = {str(line["id"]): line["headline"] for line in headlines(entries)}
    results = []
    for finding in read_findings(file):
        problems, measured = [], []
        for ground in finding.rests_on:
            if "checked" in ground:
                problems.append(_failed_check(ground, checks))
                continue
            rows = _rows(ground, entries)
            problems.append(_other_verdict(ground, rows))
            measured += [_summary(row, by_claim) for row in rows[:1]]
        problem = "; ".join(problem for problem in problems if problem)
        results.append(
            {
                "kind": finding.kind,
                "sentence": finding.sentence,
                "link": finding.link,
                "holds": not problem,
                "problem": problem or None,
                "measured": measured,
            }
        )
    return results


def _rows(ground: Mapping[str, str], entries: Sequence[Record]) -> list[Record]:
    """The records that a sentence names."""
    rows = []
    for entry in entries:
        names = (entry["id"], entry["chapter"], entry["variant"])
        same = names == (ground["claim"], ground["chapter"], ground["variant"])
        if same and entry["scale"] in SCALES:
            rows.append(entry)
    return rows


def _other_verdict(ground: Mapping[str, str], rows: Sequence[Record]) -> str | None:
    name = f"{ground['claim']} ({ground['chapter']}, {ground['variant']})"
    if not rows:
        return f"{name} is not recorded"
    verdicts = sorted({str(row["verdict"]) for row in rows})
    if verdicts == [ground["verdict"]]:
        return None
    return f"{name} is {', '.join(verdicts)}, the sentence assumes {ground['verdict']}"


def _failed_check(ground: Mapping[str, str], checks: Sequence[Record]) -> str | None:
    outcomes = []
    for check in checks:
        same = (check["chapter"], check["statement"]) == (ground["chapter"], ground["checked"])
        if same and scale_of(str(check["model"])) in SCALES:
            outcomes.append(check["holds"])
    if not outcomes:
        return f"{ground['chapter']} did not check: {ground['checked']}"
    return None if all(outcomes) else f"not so in {ground['chapter']}: {ground['checked']}"


def _summary(row: Record, by_claim: Mapping[str, object]) -> dict[str, object]:
    names = ("id", "verdict", "value", "low", "high", "interval_over", "against", "chapter")
    summary = {name: row[name] for name in (*names, "scale")}
    return summary | {"headline": by_claim[str(row["id"])], "entry": row}


def findings_table(
    results: Sequence[Record],
    kind: str = "findings",
    link: str = "../{}.html",
    ledger: str = "claims.html#{}",
) -> Html:
    """Show findings as a table: the sentence, what was measured, on what scale, and where.

    Use it on a page, one table for each kind.

    Parameters
    ----------
    results : sequence of mapping
        What :func:`findings` gives.
    kind : str, default "findings"
        "findings" or "surprises".
    link : str, default "../{}.html"
        The address of a chapter, with its name in place of the braces.
    ledger : str, default "claims.html#{}"
        The address of a claim in the ledger, with its id in place of the braces.

    Returns
    -------
    :class:`~xlvlms_tutorial.view.cards.Html`
        The table with its style. A sentence that this run does not bear out is marked, with the
        reason.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import findings, findings_table, merge
    >>> table = findings_table(findings(merge("no/such/folder"), []))
    >>> "does not hold in this run" in str(table)
    True
    """
    names = ("", "what was found", "measured", "scale", "chapter")
    body = ""
    number = 0
    for result in results:
        if result["kind"] == kind:
            number += 1
            body += _table_row(number, result, link, ledger)
    head = "".join(f"<th>{name}</th>" for name in names)
    table = f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
    return Html(f'{style_of("sign")}{style_of("ledger")}<div class="ledger">{table}</div>')


def _table_row(number: int, result: Record, link: str, ledger: str) -> str:
    sentence = escape(str(result["sentence"]))
    if not result["holds"]:
        sentence = f"<s>{sentence}</s> <b>{NOT_HERE}</b>: {escape(str(result['problem']))}"
    lines = [_measurement(one, ledger) for one in result["measured"]]
    scales = dict.fromkeys(str(one["scale"]) for one in result["measured"])
    chapter = escape(str(result["link"]))
    cells = (
        str(number),
        sentence,
        "<br>".join(lines) or "a relation, checked in the chapter",
        escape(", ".join(scales)) or "pocket",
        f'<a href="{escape(link.format(result["link"]))}">{chapter}</a>',
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _measurement(entry: Record, ledger: str) -> str:
    """One record: its claim with the headline, its verdict and its interval."""
    interval = f"{entry['value']:.2g} [{entry['low']:.2g}, {entry['high']:.2g}]"
    if entry["interval_over"] == "random orders":
        interval = (
            f"{entry['value']:.2g}, among random orders {entry['low']:.2g} to {entry['high']:.2g}"
        )
    against = escape(str(entry["against"]))
    name = escape(str(entry["id"]))
    return (
        f'{badge(str(entry["verdict"]))} <a href="{escape(ledger.format(entry["id"]))}">{name}</a> '
        f"<small>{interval} against {against}; headline: {entry['headline']}</small>"
    )
