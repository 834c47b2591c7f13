"""Say how chapters read, in numbers: ``python -m tools.reading [NAME ...]``.

Words and code lines before "On a real model", what stands before the first figure, and which
captions do not open with their finding.
"""

import argparse
import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbformat import NotebookNode

from tools.chapters import chapters, read

END = "## On a real model"
SHORT = "In short"
FOUND = "## What we found"
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCE = re.compile(r"^\s*(```|:::).*$|^\s*:[\w-]+:.*$", re.MULTILINE)  # directives, their options
FINDING = re.compile(r"\s*\*\*(?P<text>[^*]+)\*\*")
FIGURE = re.compile(r"^```\{(glue:)?figure\}.*?^```", re.DOTALL | re.MULTILINE)
HIDDEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}


@dataclass
class Reading:
    """How a chapter reads.

    ``words``, ``code`` and ``visible`` count up to the section on real models; ``before`` are the
    words and visible code lines before the first figure, ``longest_before`` the lines of the
    longest cell there; ``plumbing`` are lines of imports, of helpers and of hidden cells that draw
    no figure.
    """

    page: str
    words: int = 0
    code: int = 0
    visible: int = 0
    plumbing: int = 0
    functions: list[str] = field(default_factory=list)
    undocumented: list[str] = field(default_factory=list)
    doors: set[str] = field(default_factory=set)
    before: tuple[int, int] | None = None
    longest_before: int = 0
    captions: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    ending: int = 0  # words of "What we found"
    answer_on_top: bool = False

    @property
    def words_a_line(self) -> float:
        """Words for each visible line of code."""
        return self.words / max(self.visible, 1)

    @property
    def plumbing_share(self) -> float:
        """The share of code lines that are plumbing."""
        return self.plumbing / max(self.code, 1)

    @property
    def captions_without_finding(self) -> list[str]:
        """Captions that do not open with a sentence of at most 15 words in bold."""
        lacking = []
        for caption in self.captions:
            finding = FINDING.match(caption)
            if finding is None or len(finding["text"].split()) > 15:
                lacking.append(caption)
        return lacking


def reading(page: Path) -> Reading:
    """Read a page and count."""
    result = Reading(page.stem)
    counting = True
    for cell in read(page).cells:
        if cell.cell_type == "markdown":
            head, end, _ = cell.source.partition(END)
            _read_prose(result, head if counting else "", cell.source)
            counting = counting and not end
        elif not {"first-cell", "parameters"} & set(cell.metadata.get("tags", ())):
            _read_code(result, cell, counting)
    return result


def words_of(text: str) -> int:
    """Count the words of a Markdown text that a reader sees."""
    return len(FENCE.sub("", COMMENT.sub("", text)).split())


def _read_prose(result: Reading, counted: str, whole: str) -> None:
    figure = FIGURE.search(counted)
    if figure and result.before is None:
        words = result.words + words_of(counted[: figure.start()])
        result.before = (words, result.visible)
    for found in FIGURE.finditer(whole):
        text = FENCE.sub("", found[0]).strip()
        result.captions.append(text)
    result.words += words_of(counted)
    result.headings += re.findall(r"^##+ .*$", whole, re.MULTILINE)
    result.answer_on_top |= "{admonition} " + SHORT in counted
    if FOUND in whole:
        section = re.split(r"^## ", whole.split(FOUND)[1], flags=re.MULTILINE)[0]
        result.ending = words_of(section)


def _read_code(result: Reading, cell: NotebookNode, counting: bool) -> None:
    tags = set(cell.metadata.get("tags", ()))
    figure = cell.metadata.get("mystnb", {}).get("figure")
    if figure:
        result.captions.append(str(figure["caption"]))
        if result.before is None:
            result.before = (result.words, result.visible)
    if not counting or (cell.metadata.get("mystnb") or {}).get("code_prompt_show"):
        return
    tree = ast.parse(cell.source)
    numbered = enumerate(cell.source.splitlines(), 1)
    lines = {n for n, line in numbered if line.strip() and not line.strip().startswith("#")}
    around = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            around |= set(range(node.lineno, node.end_lineno + 1))
            module = getattr(node, "module", None) or ""
            if module.startswith("xlvlms_tutorial"):
                result.doors.add(module)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            around |= set(range(node.lineno, node.end_lineno + 1))
            name = getattr(node, "name", "lambda")
            result.functions.append(name)
            if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node):
                result.undocumented.append(name)
    hidden = bool(tags & HIDDEN)
    result.code += len(lines)
    result.visible += 0 if hidden else len(lines)
    if hidden:
        result.plumbing += 0 if figure else len(lines)
    else:
        result.plumbing += len(lines & around)
        if result.before is None:
            result.longest_before = max(result.longest_before, len(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each chapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="chapters; all by default")
    names = parser.parse_args(arguments).names
    print(
        f"{'':20}{'words':>7}{'code':>6}{'a line':>8}{'plumbing':>10}{'functions':>11}"
        f"{'first figure':>14}{'captions':>10}{'ending':>8}"
    )
    for page in chapters():
        if names and page.stem not in names:
            continue
        one = reading(page)
        first = "none" if one.before is None else f"{one.before[0]}/{one.before[1]}"
        findings = len(one.captions) - len(one.captions_without_finding)
        print(
            f"{one.page:20}{one.words:7}{one.code:6}{one.words_a_line:8.1f}"
            f"{one.plumbing_share:10.0%}{len(one.functions):11}{first:>14}"
            f"{f'{findings}/{len(one.captions)}':>10}{one.ending or 'none':>8}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
