"""Keep whether what a page says of its numbers is so.

A page states relations that are no claims of a paper, such as "sounds break earlier than
pictures". :func:`check` writes down whether the run bears one out. The build compares: a sentence
that is tied to a check which is not there, or does not hold, stops it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xlvlms_tutorial.errors import damaged_record
from xlvlms_tutorial.io import default_folder, digest, read_json, reading, write_json
from xlvlms_tutorial.validation import require

CHECKS = "checks"  # the folder beside the records


def check(
    statement: str,
    holds: bool | np.bool_,
    *,
    model: str,
    dataset: str,
    seeds: int | Sequence[int | np.integer],
    chapter: str,
    folder: str | Path | None = None,
) -> bool:
    """Write down whether a statement of a page holds in this run.

    Use it in the cell above a sentence that states a relation, with the same ``model``,
    ``dataset``, ``seeds`` and ``chapter`` as :func:`record`. It does not raise where the statement
    fails, since a chapter runs on any model; the build of the book does, for the model and data of
    the book.

    Parameters
    ----------
    statement : str
        What the page says, in one short sentence. The comment ``<!-- checked: statement -->`` under
        a paragraph ties the paragraph to it.
    holds : bool
        Whether it holds here, computed from the numbers of the run.
    model, dataset : str
        What the page ran on.
    seeds : int or sequence of int
        The seeds of the run.
    chapter : str
        The name of the page.
    folder : path, optional
        Where records lie; by default as for :func:`record`.

    Returns
    -------
    bool
        ``holds``.

    Raises
    ------
    InputError
        If ``holds`` is not a truth value, or a text is empty or of several lines.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.claims import check
    >>> run = {"model": "pocket-llava", "dataset": "scenes", "seeds": 0, "chapter": "inside"}
    >>> with TemporaryDirectory() as folder:
    ...     check("norms grow with depth", 3.2 < 41.0, folder=folder, **run)
    True
    """
    require(
        isinstance(holds, (bool, np.bool_)),
        f"check {statement!r} is {holds!r}",
        "give a truth value, computed from numbers of the run",
    )
    for name, text in {"statement": statement, "chapter": chapter}.items():
        require(
            bool(text) and "\n" not in text and "--" not in text,
            f"{name} of a check is {text!r}",
            'give one line of text without "--"',
        )
    key = {
        "chapter": chapter,
        "statement": statement,
        "model": model,
        "dataset": dataset,
        "seeds": [int(seed) for seed in np.atleast_1d(seeds)],
    }
    slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{chapter}-{statement}")[:60]
    file = Path(folder or default_folder()) / CHECKS / f"{slug}-{digest(key)[:12]}.json"
    write_json(file, key | {"holds": bool(holds)})
    return bool(holds)


def read_checks(folder: str | Path | None = None) -> list[dict[str, object]]:
    """Read what :func:`check` has written.

    Use it to list what a page states of its run, and whether it is so.

    Parameters
    ----------
    folder : path, optional
        Where records lie; by default as for :func:`check`.

    Returns
    -------
    list of dict
        One a check: chapter, statement, model, dataset, seeds and holds.

    Raises
    ------
    FileError
        If a file is no check.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import read_checks
    >>> read_checks("no/such/folder")
    []
    """
    checks = []
    for file in sorted((Path(folder or default_folder()) / CHECKS).glob("*.json")):
        with reading(file, "not a check of a page"):
            content = read_json(file)
            if not isinstance(content["holds"], bool):
                raise damaged_record(file, f"holds is {content['holds']!r}, not true or false")
            checks.append({name: content[name] for name in _FIELDS})
    return checks


_FIELDS = ("chapter", "statement", "model", "dataset", "seeds", "holds")
