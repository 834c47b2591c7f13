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
EACH = pytest.mark.parametrize("name", PAGES)
SOLUTION = {"tags": ["hide-cell"], "cellView": "form", "jupyter": {"source_hidden": True}}


@EACH
def test_a_chapter_opens_with_its_answer(name):
    assert READINGS[name].answer_on_top


@EACH
def test_a_chapter_ends_with_what_was_found_in_at_most_80_words(name):
    assert 0 < READINGS[name].ending <= 80


@EACH
def test_the_first_figure_comes_early_and_no_long_cell_before_it(name):
    words, lines = READINGS[name].before or (0, 0)
    assert words <= 300
    assert lines <= 25
    assert READINGS[name].longest_before <= 12


@EACH
def test_each_caption_opens_with_its_finding(name):
    assert READINGS[name].captions_without_finding == []


@EACH
def test_a_chapter_is_short(name):
    assert READINGS[name].words <= 2000
    assert READINGS[name].code <= 200


@EACH
def test_text_comes_first(name):
    assert READINGS[name].words_a_line >= 8
    assert READINGS[name].plumbing_share <= 0.3
    assert len(READINGS[name].functions) <= 8
    assert READINGS[name].undocumented == []
    assert len(READINGS[name].doors) <= 6


@EACH
def test_exercises_have_a_stub_that_fails_a_test_and_a_solution_that_is_folded(name):
    cells = read(PAGES[name]).cells
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
