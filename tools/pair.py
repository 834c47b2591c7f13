"""Write the notebook beside each chapter, with the text that its checked cells show: ``python -m tools.pair [--all]``.

A notebook whose code has not changed keeps its outputs, so that prose and the repository's address can be changed
without running anything; ``--all`` runs every one again, which is needed when the package prints other numbers.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tools import ROOT
from tools.chapters import notebooks, read

CHECK = "# NBVAL_CHECK_OUTPUT"


def checked(cell: NotebookNode) -> bool:
    """Whether a cell's output is compared by the tests."""
    return cell.cell_type == "code" and (CHECK in cell.source or "nbval-check-output" in cell.metadata.get("tags", []))


def text_of(cell: NotebookNode, page: Path) -> list[NotebookNode]:
    """The text that a checked cell printed or showed: no pictures, no HTML, no widget state."""
    kept = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            if kept and kept[-1].output_type == "stream":  # a busy kernel sends one text in pieces
                kept[-1].text += output.text
            else:
                kept.append(nbformat.v4.new_output("stream", name="stdout", text=output.text))
        elif output.output_type in ("display_data", "execute_result"):
            if set(output.data) - {"text/plain", "text/html"}:
                raise SystemExit(f"{page.name}: a checked cell shows more than text ({', '.join(output.data)}):\n\n{cell.source}")
            kept.append(nbformat.v4.new_output(output.output_type, data={"text/plain": output.data["text/plain"]}))
    if not kept:
        raise SystemExit(f"{page.name}: a checked cell shows nothing that could be compared:\n\n{cell.source}")
    return kept


def code(notebook: NotebookNode) -> list[str]:
    """The code of a notebook without its first cell, which carries the address."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"][1:]


def execute(notebook: NotebookNode, page: Path) -> None:
    """Run a notebook where it lies and keep only the text that its checked cells show."""
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(page.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = text_of(cell, page) if checked(cell) else []
            cell.metadata.pop("execution", None)
    notebook.metadata = NotebookNode(kernelspec=notebook.metadata.kernelspec)


def number_outputs(notebook: NotebookNode) -> None:
    """Number the cells that have outputs, the same way each time: nbval takes a cell without a number as one that never ran."""
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
        cell.execution_count = number if cell.outputs else None
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number


def pair(page: Path, again: bool) -> str:
    """Write the notebook of one page; say what was done."""
    target = page.with_suffix(".ipynb")
    notebook = read(page)
    old = nbformat.read(target, 4) if target.exists() else None
    keep = not again and old is not None and code(old) == code(notebook)
    if keep:
        outputs = [cell.outputs for cell in old.cells if cell.cell_type == "code"]
        for cell, kept in zip((c for c in notebook.cells if c.cell_type == "code"), outputs, strict=True):
            cell.outputs = kept
    else:
        execute(notebook, page)
    number_outputs(notebook)
    nbformat.write(notebook, target)
    return "kept its outputs" if keep else "run"


def main() -> None:
    """Pair every notebook of the table of contents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="run every notebook again")
    again = parser.parse_args().all
    for page in notebooks():
        print(f"{page.relative_to(ROOT).with_suffix('.ipynb')}: {pair(page, again)}", flush=True)


if __name__ == "__main__":
    main()
