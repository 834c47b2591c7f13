"""Write the notebook beside each chapter, with the text that its checked cells show.

``python -m tools.pair [--all]``. A notebook whose code has not changed keeps its outputs,
so that prose and the repository's address can be changed without running anything;
``--all`` writes the outputs of every one anew, which is needed when the package prints
other numbers. Outputs come from the cache that the tests fill and the book is built from;
what is not in it is executed into it first.
"""

import argparse
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools import ROOT, execute
from tools.build import refresh_cache
from tools.chapters import notebooks, read

CHECK = "# NBVAL_CHECK_OUTPUT"


def checked(cell: NotebookNode) -> bool:
    """Whether a cell's output is compared by the tests."""
    return cell.cell_type == "code" and (
        CHECK in cell.source or "nbval-check-output" in cell.metadata.get("tags", [])
    )


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
                raise SystemExit(
                    f"{page.name}: a checked cell shows more than text "
                    f"({', '.join(output.data)}):\n"
                    "\n"
                    f"{cell.source}"
                )
            kept.append(
                nbformat.v4.new_output(
                    output.output_type, data={"text/plain": output.data["text/plain"]}
                )
            )
    if not kept:
        raise SystemExit(
            f"{page.name}: a checked cell shows nothing that could be compared:\n\n{cell.source}"
        )
    return kept


def cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code(notebook: NotebookNode) -> list[str]:
    """The code of a notebook without its first cell, which carries the address."""
    return [cell.source for cell in cells(notebook)][1:]


def take(notebook: NotebookNode, executed: NotebookNode, page: Path) -> None:
    """Give a notebook the text that its checked cells showed when the page was executed."""
    for cell, shown in zip(cells(notebook), cells(executed), strict=True):
        cell.outputs = text_of(shown, page) if checked(shown) else []


def number_outputs(notebook: NotebookNode) -> None:
    """Number the cells that have outputs, the same way each time.

    nbval takes a cell without a number as one that never ran.
    """
    for number, cell in enumerate(cells(notebook), start=1):
        cell.execution_count = number if cell.outputs else None
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number


def old(page: Path) -> NotebookNode | None:
    """The notebook that lies beside a page, if its code is that of the page."""
    target = page.with_suffix(".ipynb")
    found = nbformat.read(target, 4) if target.exists() else None
    return found if found is not None and code(found) == code(read(page)) else None


def pair(page: Path, again: bool) -> str:
    """Write the notebook of one page; say where its outputs come from."""
    notebook, kept = read(page), None if again else old(page)
    if kept is None:
        take(notebook, execute.shown(page), page)
    else:
        for cell, then in zip(cells(notebook), cells(kept), strict=True):
            cell.outputs = then.outputs
    number_outputs(notebook)
    nbformat.write(notebook, page.with_suffix(".ipynb"))
    return "as executed" if kept is None else "kept its outputs"


def main() -> int:
    """Pair every notebook of the table of contents; 1 if a page could not be executed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--all", action="store_true", help="write the outputs of every notebook anew"
    )
    again = parser.parse_args().all
    refresh_cache()
    failed = execute.fill([page for page in notebooks() if again or old(page) is None])
    for page in notebooks():
        said = "could not be executed" if page.stem in failed else pair(page, again)
        print(f"{page.relative_to(ROOT).with_suffix('.ipynb')}: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
