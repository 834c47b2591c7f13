"""A pair keeps the text of checked cells, and refuses what cannot be compared."""

from pathlib import Path

import nbformat
import pytest

from tools import ROOT, execute, pair
from tools.pair import checked, text_of

PAGE = Path("chapter.md")


def cell(source="# NBVAL_CHECK_OUTPUT\n1", **data):
    new_cell = nbformat.v4.new_code_cell(source)
    new_cell.outputs = [nbformat.v4.new_output("execute_result", data=data)] if data else []
    return new_cell


def test_a_table_is_kept_as_plain_text():
    (output,) = text_of(cell(**{"text/plain": "a 1", "text/html": "<table>"}), PAGE)
    assert output.data == {"text/plain": "a 1"}


def test_what_goes_to_stderr_is_dropped():
    new_cell = cell(**{"text/plain": "1"})
    new_cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="warning"))
    assert len(text_of(new_cell, PAGE)) == 1


def test_text_that_comes_in_pieces_is_one():
    new_cell = cell(**{"text/plain": "1"})
    new_cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=text) for text in ("a\n", "b\n")
    ]
    assert [output.text for output in text_of(new_cell, PAGE)] == ["a\nb\n"]


def test_pictures_and_silence_are_refused():
    with pytest.raises(SystemExit, match="image/png"):
        text_of(cell(**{"text/plain": "x", "image/png": "00"}), PAGE)
    with pytest.raises(SystemExit, match="nothing that could be compared"):
        text_of(cell(), PAGE)


def test_a_cell_is_checked_by_comment_or_tag():
    tagged = cell("1")
    tagged.metadata["tags"] = ["nbval-check-output"]
    assert checked(cell())
    assert checked(tagged)
    assert not checked(cell("1"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name, path in {
        "ROOT": "",
        "BUILD": "_build",
        "CACHE": "_build/cache",
        "CLAIMS": "_build/claims",
    }.items():
        monkeypatch.setattr(execute, name, tmp_path / path)
    return tmp_path


def run(file, **texts):
    """Put the page into the cache as if its cells had shown these texts."""
    notebook = execute.read(file)
    for code_cell, text in zip(pair.cells(notebook), texts.values(), strict=True):
        code_cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    execute.keep(file, notebook, 1.0)


def paired(file):
    cells = pair.cells(nbformat.read(file.with_suffix(".ipynb"), 4))
    return [(cell.execution_count, [output.text for output in cell.outputs]) for cell in cells]


def test_a_pair_takes_the_checked_text_of_the_last_run_and_keeps_it_while_the_code_is_the_same(
    root,
):
    file = root / "page.md"
    cells = "".join(
        f"```{{code-cell}} ipython3\n{source}\n```\n\n"
        for source in ("1", "2", "# NBVAL_CHECK_OUTPUT\nprint(3)")
    )
    file.write_text((ROOT / "book" / "welcome.md").read_text().split("```")[0] + cells)
    run(file, one="1", two="2", three="3\n")
    assert pair.pair(file, again=False) == "as executed"
    assert paired(file) == [(None, []), (None, []), (3, ["3\n"])]
    run(file, one="1", two="2", three="three\n")
    file.write_text(file.read_text() + "More prose.\n")
    assert pair.pair(file, again=False) == "kept its outputs"
    assert paired(file)[-1] == (3, ["3\n"])
    assert pair.pair(file, again=True) == "as executed"
    assert paired(file)[-1] == (3, ["three\n"])
    file.write_text(file.read_text().replace("print(3)", "print(4)"))
    with pytest.raises(KeyError):
        pair.pair(file, again=False)
