import pytest

from tools.reading import reading, words_of

HEAD = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
CELL = "```{code-cell} ipython3\n"


@pytest.fixture
def page(tmp_path):
    def write(text):
        file = tmp_path / "page.md"
        file.write_text(HEAD + text, encoding="utf-8")
        return reading(file)

    return write


def test_words_are_those_that_a_reader_sees():
    text = "One two.\n<!-- checked: not seen -->\n:::{note}\n:class: tip\nthree\n:::\n"
    assert words_of(text) == 3


def test_words_and_code_count_up_to_the_section_on_real_models(page):
    code = f"{CELL}x = 1\n# why\n\ny = 2\n```\n"
    text = f"One two three.\n\n{code}\n## On a real model\n\nFour five.\n\n{code}"
    assert (page(text).words, page(text).code) == (3, 2)


def test_parameters_and_the_first_cell_are_no_code_of_a_chapter(page):
    assert page(f"{CELL}:tags: [parameters]\nmodel = 1\n```\n").code == 0


def test_imports_helpers_and_hidden_cells_are_plumbing(page):
    visible = f"{CELL}import math\nx = math.pi\ndef f(x):\n    return x\n```\n"
    hidden = f"{CELL}:tags: [hide-input]\ny = 1\n```\n"
    result = page(visible + "\ntext\n\n" + hidden)
    assert (result.code, result.visible, result.plumbing) == (5, 4, 4)
    assert result.functions == ["f"] == result.undocumented


def test_a_figure_pasted_at_the_top_is_the_first(page):
    top = "One two.\n\n```{glue:figure} key\n:alt: words\n\n**It rises.** A line.\n```\n\nThree.\n"
    result = page(top + f"\n{CELL}x = 1\n```\n")
    assert result.before == (2, 0)
    assert result.captions_without_finding == []


def test_what_stands_before_a_drawn_figure_is_counted(page):
    long = "".join(f"x = {n}\n" for n in range(14))
    figure = '---\nmystnb:\n  figure:\n    caption: "A line."\n    name: fig-x\n---\nplot()\n'
    result = page(f"One two three.\n\n{CELL}{long}```\n\nFour.\n\n{CELL}{figure}```\n")
    assert result.before == (4, 14)
    assert result.longest_before == 14
    assert result.captions_without_finding == ["A line."]


def test_a_finding_is_one_sentence_of_at_most_fifteen_words(page):
    def captions(text):
        figure = f'---\nmystnb:\n  figure:\n    caption: "{text}"\n    name: fig-x\n---\nplot()\n'
        return page(f"{CELL}{figure}```\n").captions_without_finding

    assert captions("**Words come late.** A line for each layer.") == []
    assert captions("**" + "word " * 15 + "word.** A line.") != []


def test_the_ending_is_counted_up_to_the_next_section(page):
    result = page(
        "text\n\n## What we found\n\nOne two three.\n<!-- checked: x -->\n\n## More\n\nFour.\n"
    )
    assert result.ending == 3


def test_the_box_at_the_top_is_seen(page):
    assert page(":::{admonition} In short\n:class: tip\nYes.\n:::\n").answer_on_top
    assert not page("In short, no.\n").answer_on_top
