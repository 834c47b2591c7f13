"""Read the chapters as programs.

Where they are, which parameters they take, and whether given values fit.
"""

import ast
import hashlib
import json
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

import jupytext
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from xlvlms_tutorial.batch.spelling import meant
from xlvlms_tutorial.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".md", ".ipynb")
TAG = "parameters"
# parameters that may name a folder, and so are made absolute: a chapter runs where it lies
FOLDERS = ("model", "dataset")
_LONGEST = 10_000  # numbers of a range that is a default
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (in quotes where it could be more)",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}


class Expression(str):
    """A default that is computed, as its source text: any value may replace it."""


def checkout() -> Path | None:
    """Find the repository: around the package, else around the working directory or cloned into it.

    None where there is none.
    """
    cwd = Path.cwd()
    for folder in (ROOT, cwd, *cwd.parents, cwd / "xlvlms-tutorial"):
        if (folder / "_toc.yml").exists() and (folder / "book").is_dir():
            return folder
    return None


def book_folder() -> Path:
    """Find the folder of the chapters.

    Beside the package in a checkout, else of one around the working directory or cloned into it
    (Colab).

    Raises
    ------
    InputError
        If there is none: the package was installed without its book.
    """
    folder = checkout()
    if folder is None:
        raise InputError(
            "no chapters found beside the package",
            "run inside a clone of the repository, or give the path of a chapter",
        )
    return folder / "book"


def find_chapter(chapter: str | Path, folder: str | Path | None = None) -> Path:
    """Find the file of a chapter.

    Parameters
    ----------
    chapter : path
        A name ("outside"), or a path to an .md or .ipynb file.
    folder : path, optional
        The folder of the chapters; by default that of the book.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    InputError
        If there is no such chapter.
    """
    path = Path(chapter)
    if path.suffix in SUFFIXES and os.path.isfile(path):
        return path.resolve()
    folder = Path(folder) if folder is not None else book_folder()
    for suffix in SUFFIXES:
        file = folder / f"{chapter}{suffix}"
        if path.name == str(chapter) and os.path.isfile(file):
            return file.resolve()
    names = []
    for page in sorted(folder.glob("*.md")):
        if f"[{TAG}]" in page.read_text(encoding="utf-8"):
            names.append(page.stem)
    message = f"no chapter {str(chapter)!r} in {folder}{closest(str(chapter), names)}"
    raise InputError(message, f"there are: {', '.join(names) or 'none'}")


def read_chapter(file: Path) -> NotebookNode:
    """Read a chapter as a notebook without outputs.

    Raises
    ------
    InputError
        If the file is not a notebook.
    """
    try:
        notebook = jupytext.read(file)
    except (OSError, ValueError, KeyError) as cause:
        raise InputError(
            f"{file} cannot be read as a notebook ({cause})",
            "give a chapter as .md (MyST) or .ipynb",
        ) from cause
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def code_of(notebook: NotebookNode) -> str:
    """Return a digest of all code of a chapter.

    Results made by other code are not results of this chapter.
    """
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\0\n".join(cells).encode()).hexdigest()


def defaults(notebook: NotebookNode) -> dict[str, object]:
    """Read the parameters of a chapter and their values, from its cell tagged "parameters".

    Raises
    ------
    InputError
        If there is not exactly one such cell, or it is no Python.
    """
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and TAG in cell.metadata.get("tags", []):
            cells.append(cell.source)
    if len(cells) != 1:
        raise InputError(f"{len(cells)} cells tagged {TAG!r}", "give a chapter with exactly one")
    try:
        # which makes plain calls of magics
        body = ast.parse(TransformerManager().transform_cell(cells[0])).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as cause:
        raise InputError(
            f"the cell tagged {TAG!r} cannot be read ({cause})", "write NAME = VALUE, one in a line"
        ) from cause
    parameters: dict[str, object] = {}
    for statement in body:
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            parameters |= _assigned(statement.target, statement.value)
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                parameters |= _assigned(target, statement.value)
    return parameters


def _assigned(target: ast.expr, value: ast.expr) -> dict[str, object]:
    if isinstance(target, ast.Name):
        return {target.id: _value(value)}
    if (
        isinstance(target, ast.Tuple)
        and isinstance(value, ast.Tuple)
        and len(target.elts) == len(value.elts)
    ):
        values: dict[str, object] = {}
        for element, expression in zip(target.elts, value.elts, strict=True):
            values |= _assigned(element, expression)
        return values
    return {}


def _value(node: ast.expr) -> object:
    """A default: what the source says, or the source where it is not a plain value."""
    try:
        value = _numbers(node) if _is_range(node) else ast.literal_eval(node)
        if _json(value) and _text_keys(value):
            return value
    except (ValueError, TypeError, OverflowError):
        pass
    return Expression(ast.unparse(node))


def _is_range(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call) or node.keywords:
        return False
    return isinstance(node.func, ast.Name) and node.func.id == "range"


def _numbers(node: ast.Call) -> list[int]:
    numbers = range(*map(ast.literal_eval, node.args))
    if len(numbers) > _LONGEST:
        raise ValueError("too long for a list")
    return list(numbers)


def checked(
    name: str, defaults: Mapping[str, object], values: Mapping[str, object]
) -> dict[str, object]:
    """Check values for parameters of a chapter, and return them as JSON knows them.

    Folders are made absolute. A tuple becomes the list that a record of the run holds, and words
    of YAML what the default says they mean (:func:`~xlvlms_tutorial.batch.spelling.meant`).

    Parameters
    ----------
    name : str
        The name of the chapter, for messages.
    defaults : mapping
        The chapter's parameters with their defaults.
    values : mapping
        The values to check, by parameter.

    Returns
    -------
    dict
        The values by parameter.

    Raises
    ------
    InputError
        If the chapter has no such parameter, a value is of another type than the default, or a key
        is no text.
    """
    ready = {}
    for parameter, written in values.items():
        if parameter not in defaults:
            guess = closest(str(parameter), defaults)
            raise InputError(
                f"chapter {name!r} has no parameter {parameter!r}{guess}",
                f"there are: {', '.join(defaults)}",
            )
        default = defaults[parameter]
        value = meant(default, written) if _json(written) else written
        if not _json(value) or not _fits(default, value):
            kind = _WORDS.get(type(default), type(default).__name__)
            raise InputError(
                f"parameter {parameter}={_short_repr(written)} of chapter {name!r} is of the "
                "wrong type",
                f"give {kind}, such as the default {default!r}",
            )
        ready[parameter] = _absolute(parameter, json.loads(json.dumps(value)))
    return ready


def _json(value: object) -> bool:
    """Whether a value can be written into a results file.

    No dates and sets, no NaN, nothing nested too deep.
    """
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _text_keys(value: object) -> bool:
    """Whether all keys are text: JSON would silently make text of a number."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return False
        return all(map(_text_keys, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_text_keys, value))
    return True


def _short_repr(value: object) -> str:
    """A value in short, also one that holds itself or has more digits than Python writes."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return type(value).__name__


def _fits(default: object, value: object) -> bool:
    """Whether a value may stand where the default stands.

    The elements of a list are held to the types of the default's elements.
    """
    if default is None or isinstance(default, Expression):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return type(default) is type(value)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and _all_fit(default, value)
    if isinstance(default, dict):
        return isinstance(value, dict) and _all_fit(default.values(), value.values())
    return isinstance(value, type(default))


def _all_fit(defaults: Collection[object], values: Iterable[object]) -> bool:
    """Whether each value fits one of the defaults; any does where there are none."""
    if not defaults:
        return True
    return all(_fits_any(defaults, value) for value in values)


def _fits_any(defaults: Iterable[object], value: object) -> bool:
    return any(_fits(default, value) for default in defaults)


def _absolute(parameter: str, value: object) -> object:
    """A folder's path made absolute.

    A dataset may carry the name of a style, as in "photos/coco-place".
    """
    if parameter in FOLDERS and isinstance(value, str) and "/" in value:
        folder = Path(os.path.expanduser(value))  # which leaves the ~ of nobody as it is
        base = folder.parent / (folder.name.rpartition("-")[0] or "-")
        if os.path.exists(folder) or os.path.exists(base):
            return str(folder.resolve())
    return value


def closest(name: str, candidates: Iterable[str]) -> str:
    """Say what was probably meant, as the end of a message; empty where nothing is near."""
    matches = get_close_matches(name, list(candidates), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
