"""Compare what the pages say with what their run recorded: ``python -m tools.ties [--list]``.

A sentence that states an outcome rests on a record. A comment under its paragraph, which no reader
sees, says on which::

    The connector brings both closer, at the input alone.
    <!-- tied: IMA-6 | input | confirmed -->
    <!-- tied: IMA-1 headline | holds in part -->
    <!-- checked: sounds break earlier than pictures -->
    <!-- from: abstract of arXiv 2405.16700 -->

``tied`` names a claim, the variant of the record and the verdict that the sentence assumes; with
"headline" in place of a variant it is the headline of the claim. ``checked`` repeats a statement
that ``claims.check`` wrote down in a cell of the page. ``from`` names the source of a number that
is not ours. The build stops where a verdict is another one, a check fails, or a comment names what
was not recorded. A paragraph with a verdict or a decimal number in it and no such comment stops the
tests.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import ROOT
from tools.chapters import pages
from tools.execute import CLAIMS
from xlvlms_tutorial.claims import VERDICTS, findings, headlines, merge, read_checks
from xlvlms_tutorial.claims.headlines import HEADLINES

# What the book itself runs on. Records of other models and data are those of a reader.
BOOK_MODELS = "pocket-"
COMMENT = re.compile(r"<!--\s*(?P<kind>tied|checked|from):\s*(?P<text>.*?)\s*-->", re.DOTALL)
HEADLINE = " headline"
ABOUT_ALL = ("README", "live")  # record nothing, and speak of what any page recorded
FINDINGS = "findings"  # the page whose sentences stand in claims/findings.yaml
# What makes a paragraph one that states an outcome: a verdict, a decimal number or a percentage.
OUTCOME = re.compile(r"\b(confirmed|refuted|undecided)\b|\b\d+\.\d+\b|\b\d+ ?%", re.IGNORECASE)
# Text in which a number is no outcome: code, formulas, addresses, versions and names of models.
NEUTRAL = re.compile(
    r"\$\$[^$]*\$\$|`[^`]*`|\{\w+\}`[^`]*`|\$[^$]*\$|\]\([^)]*\)|arXiv \d+\.\d+|\bv?\d+\.\d+\.\d+"
    r"|\b[A-Z][A-Za-z]+[\d-]*\d\.\d"
)


@dataclass(frozen=True)
class Tie:
    """A comment that ties a paragraph to what was recorded.

    ``kind`` is "tied", "checked" or "from"; ``parts`` is its text, split at the bars.
    """

    page: str
    line: int
    kind: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        """Page, line and text, for messages."""
        return f"{self.page}:{self.line}: {self.kind}: {' | '.join(self.parts)}"


def ties(page: Path) -> list[Tie]:
    """The ties of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    result = []
    for match in COMMENT.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        parts = tuple(part.strip() for part in match["text"].split("|"))
        result.append(Tie(page.stem, line, match["kind"], parts))
    return result


def problems(files: Iterable[Path], folder: Path = CLAIMS) -> list[str]:
    """What pages say that the records in a folder do not bear out, a line each."""
    entries = [entry for entry in merge(folder) if _of_book(entry)]
    by_claim = {str(line["id"]): line for line in headlines(merge(folder))}
    checks = [check for check in read_checks(folder) if _of_book(check)]
    lines = []
    for file in files:
        for tie in ties(file):
            if problem := _problem(tie, entries, by_claim, checks):
                lines.append(f"{tie}: {problem}")
        lines += _unmentioned(file, entries)
        if file.stem == FINDINGS:
            lines += _unfounded(entries, checks)
    return lines


def _unfounded(entries: Sequence[dict], checks: Sequence[dict]) -> list[str]:
    """The sentences of the page of findings that do not hold, a line each."""
    lines = []
    for number, result in enumerate(findings(entries, checks), 1):
        if not result["holds"]:
            lines.append(f"{FINDINGS}, sentence {number}: {result['problem']}")
    return lines


def _unmentioned(file: Path, entries: Sequence[dict]) -> list[str]:
    """The claims that a page records without a sentence that is tied to them, a line each."""
    if file.parent.name == "api":  # the page of a package, such as that of methods.alignment
        return []
    recorded = []
    for entry in entries:
        if entry["chapter"] == file.stem:
            recorded.append(entry["id"])
    tied = {tie.parts[0].removesuffix(HEADLINE) for tie in ties(file) if tie.kind == "tied"}
    names = [name for name in dict.fromkeys(recorded) if name not in tied]
    return [f"{file.stem}: {name} is recorded, and no sentence is tied to it" for name in names]


def _of_book(record: dict) -> bool:
    return str(record["model"] or "").startswith(BOOK_MODELS)


def _problem(
    tie: Tie, entries: Sequence[dict], by_claim: dict[str, dict], checks: Sequence[dict]
) -> str | None:
    """What is wrong with a tie, or None."""
    if tie.kind == "from":
        return None if tie.parts[0] else "no source is named"
    if tie.kind == "checked":
        return _failed_check(tie, checks)
    if tie.parts[0].endswith(HEADLINE):
        return _other_headline(tie, by_claim)
    return _other_verdict(tie, entries)


def _failed_check(tie: Tie, checks: Sequence[dict]) -> str | None:
    statement = " | ".join(tie.parts)
    results = []
    for check in checks:
        if tie.page in (*ABOUT_ALL, check["chapter"]) and check["statement"] == statement:
            results.append(check["holds"])
    if not results:
        return "the page checked no such statement"
    return None if all(results) else "does not hold in this run"


def _other_headline(tie: Tie, by_claim: dict[str, dict]) -> str | None:
    name = tie.parts[0].removesuffix(HEADLINE)
    if len(tie.parts) != 2 or tie.parts[1] not in HEADLINES:
        return f"write: ID headline | {' or '.join(HEADLINES)}"
    if name not in by_claim:
        return f"there is no claim {name}"
    current = by_claim[name]["headline"]
    return None if current == tie.parts[1] else f"the headline is: {current}"


def _other_verdict(tie: Tie, entries: Sequence[dict]) -> str | None:
    if len(tie.parts) != 3 or tie.parts[2] not in VERDICTS:
        return f"write: ID | variant | {' or '.join(VERDICTS)}"
    name, variant, verdict = tie.parts
    current = set()
    for entry in entries:
        if (entry["id"], entry["variant"]) != (name, variant):
            continue
        if tie.page in (*ABOUT_ALL, entry["chapter"]):
            current.add(entry["verdict"])
    if not current:
        return "the page recorded no such measurement"
    return None if current == {verdict} else f"the verdict is: {', '.join(sorted(current))}"


def untied(page: Path) -> list[str]:
    """The paragraphs of a page that state an outcome and carry no tie, a line each.

    Paragraphs before the first cell that measures anything are not looked at, nor those of "On a
    real model" and of exercises, which speak of other runs.
    """
    lines = []
    for number, paragraph in paragraphs(page):
        plain = NEUTRAL.sub("", paragraph)
        if OUTCOME.search(plain) and not COMMENT.search(paragraph):
            lines.append(f"{page.stem}:{number}: {plain[:90].strip()}")
    return lines


def paragraphs(page: Path) -> list[tuple[int, str]]:
    """The paragraphs of a page's prose with the numbers of their first lines."""
    result: list[tuple[int, str]] = []
    fence, current, start, skipped = "", [], 0, False
    text = page.read_text(encoding="utf-8")
    head = text.find("\n---\n", 4) if text.startswith("---\n") else 0
    first = text.count("\n", 0, head) + 2 if head > 0 else 1  # after the page's settings
    for number, line in enumerate(text.splitlines()[first - 1 :], first):
        mark = re.match(r"(`{3,}|~{3,})", line)
        if fence:
            if mark and line.strip() == fence:
                fence = ""
            continue
        if mark:
            fence = mark[1]
        if line.startswith("#"):
            skipped = line.lstrip("# ").startswith(("On a real model", "Exercise"))
        if mark or not line.strip() or line.startswith("#"):
            if current and not skipped:
                result.append((start, "\n".join(current)))
            current = []
            continue
        start = start if current else number
        current.append(line)
    if current and not skipped:
        result.append((start, "\n".join(current)))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is not borne out, or with ``--list`` the paragraphs that carry no tie."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", help="pages, such as inside; all by default")
    parser.add_argument("--list", action="store_true", help="list paragraphs without a tie")
    options = parser.parse_args(arguments)
    files = [ROOT / "README.md", *(ROOT / f"{page}.md" for page in pages())]
    files = [file for file in files if not options.pages or file.stem in options.pages]
    lines = []
    for file in files:
        lines += untied(file) if options.list else []
    lines = lines if options.list else problems(files)
    print("\n".join(lines) or "nothing")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
