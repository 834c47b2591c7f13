"""A pair keeps the text of checked cells, and refuses what cannot be compared."""

from pathlib import Path

import nbformat
import pytest

from tools.pair import checked, execute, number_outputs, text_of

PAGE = Path("chapter.md")


def cell(source="# NBVAL_CHECK_OUTPUT\n1", **data):
    made = nbformat.v4.new_code_cell(source)
    made.outputs = [nbformat.v4.new_output("execute_result", data=data)] if data else []
    return made


def test_a_table_is_kept_as_plain_text():
    (output,) = text_of(cell(**{"text/plain": "a 1", "text/html": "<table>"}), PAGE)
    assert output.data == {"text/plain": "a 1"}


def test_what_goes_to_stderr_is_dropped():
    made = cell(**{"text/plain": "1"})
    made.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="warning"))
    assert len(text_of(made, PAGE)) == 1


def test_text_that_comes_in_pieces_is_one():
    made = cell(**{"text/plain": "1"})
    made.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in ("a\n", "b\n")]
    assert [output.text for output in text_of(made, PAGE)] == ["a\nb\n"]


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


def test_execute_keeps_checked_text_only(tmp_path):
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.cells = [nbformat.v4.new_code_cell("2"), nbformat.v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1 + 1)")]
    execute(notebook, tmp_path / "chapter.md")
    assert [[output.text for output in c.outputs] for c in notebook.cells] == [[], ["2\n"]]
    number_outputs(notebook)
    assert [c.execution_count for c in notebook.cells] == [None, 2]
