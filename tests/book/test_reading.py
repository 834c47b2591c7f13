"""Chapters are short, open with their answer, and say in each caption what is seen.

The bars are those of CONTRIBUTING.md. They are read off the sources; nothing is built for it.
"""

import re

import pytest

from tools.chapters import chapters, read
from tools.reading import reading

# The front page has no shape of a chapter.
PAGES = {page.stem: page for page in chapters() if page.stem != "welcome"}
READINGS = {name: reading(page) for name, page in PAGES.items()}
EACH = pytest.mark.parametrize("chapter", PAGES)
SOLUTION = {"tags": ["hide-cell"], "cellView": "form", "jupyter": {"source_hidden": True}}
BARS = {"words": 2000, "code": 200, "plumbing": 0.3, "functions": 8, "doors": 6}
# What is still over a bar: it may fall, and not grow.
OVER = {
    ("shift", "code"): 248,
}
# Words for each visible line of code, at least.
LEAST: dict[str, float] = {}
WITHOUT_CLAIMS = {"reproduce"}  # shows how, and finds nothing


@EACH
def test_a_chapter_opens_with_its_answer(chapter):
    assert READINGS[chapter].answer_on_top
    # a box begun twice nests, and Sphinx does not mind
    assert PAGES[chapter].read_text(encoding="utf-8").count(":class: tip in-short") == 1


@EACH
def test_a_chapter_ends_with_what_was_found_in_at_most_80_words(chapter):
    assert READINGS[chapter].ending <= 80
    assert READINGS[chapter].ending > 0 or chapter in WITHOUT_CLAIMS


@EACH
def test_the_first_figure_comes_early_and_no_long_cell_before_it(chapter):
    if READINGS[chapter].before is None:
        assert chapter == "models"  # it has tables
        return
    words, lines = READINGS[chapter].before
    assert words <= 300
    assert lines <= 25
    assert READINGS[chapter].longest_before <= 12


@EACH
def test_each_caption_opens_with_its_finding(chapter):
    assert READINGS[chapter].captions_without_finding == []


@EACH
def test_a_chapter_is_short_and_text_comes_first(chapter):
    result = READINGS[chapter]
    counts = {
        "words": result.words,
        "code": result.code,
        "plumbing": result.plumbing_share,
        "functions": len(result.functions),
        "doors": len(result.doors),
    }
    for what, count in counts.items():
        assert count <= OVER.get((chapter, what), BARS[what]), what
    assert result.undocumented == []
    assert result.words_a_line >= LEAST.get(chapter, 8)


@EACH
def test_exercises_have_a_stub_that_fails_a_test_and_a_solution_that_is_folded(chapter):
    cells = read(PAGES[chapter]).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    titles = re.findall(r"\{admonition\} Exercise (\d) · \w+ · \d+ minutes", text)
    assert titles == ["1", "2"]
    code = [cell for cell in cells if cell.cell_type == "code"]
    stubs = [number for number, cell in enumerate(code) if "NotImplementedError" in cell.source]
    tries = [number for number, cell in enumerate(code) if "try_exercise(" in cell.source]
    solutions = []
    for number, cell in enumerate(code):
        if cell.metadata.get("cellView") == "form":
            assert {key: cell.metadata[key] for key in SOLUTION} == SOLUTION
            assert cell.source.startswith("# @title Solution")
            solutions.append(number)
    # each exercise: its stub, its test on the stub, its solution with the same test
    assert len(stubs) == len(solutions) == 2
    assert len(tries) == 4
    for stub, tested, solution, again in zip(
        stubs, tries[::2], solutions, tries[1::2], strict=True
    ):
        assert stub <= tested < solution == again
