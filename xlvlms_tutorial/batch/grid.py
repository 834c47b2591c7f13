"""Read a file of experiments as a list of runs.

Chapter x model x dataset x seed x parameters, checked before anything starts.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

from xlvlms_tutorial.batch.chapters import closest
from xlvlms_tutorial.batch.run import Chapter, opened
from xlvlms_tutorial.batch.spelling import meant, plain, read_yaml
from xlvlms_tutorial.data import DATASETS
from xlvlms_tutorial.data.hub import HUB
from xlvlms_tutorial.errors import SelectionError
from xlvlms_tutorial.io import digest
from xlvlms_tutorial.text import STYLES

# key: parameter, default
AXES = {
    "models": ("model", "pocket-llava"),
    "datasets": ("dataset", "scenes"),
    "seeds": ("seed", 0),
}
NEEDS = {"threads": 1, "gpus": 0, "mem_mb": 4000, "minutes": 60, "retries": 1}  # of one run
_COMMON = (*AXES, "parameters", *NEEDS)
_MINIMUM = {"threads": 1, "gpus": 0, "mem_mb": 1, "minutes": 1, "retries": 0}
# of the digest in a name: among a million runs two of one name come once in five hundred grids
_DIGITS = 12


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its name, the chapter with its parameters, and what it needs."""

    id: str
    chapter: str
    parameters: Mapping[str, object]
    threads: int
    gpus: int
    mem_mb: int
    minutes: int
    retries: int

    def asdict(self) -> dict[str, object]:
        """Return the run in plain types."""
        return asdict(self)


def read_grid(
    path: str | Path, folder: str | Path | None = None, embedded: Collection[str] = ()
) -> list[Cell]:
    """List the runs that a file of experiments asks for, in its order.

    Use it to check a grid before it is run. The file is YAML: ``experiments`` is a list of entries,
    each with ``chapters`` and, where wanted, ``models``, ``datasets``, ``seeds`` (one value or a
    list: every combination is a run), ``parameters`` (of all runs of the entry), ``vary`` (lists of
    values by parameter) and the needs ``threads``, ``gpus``, ``mem_mb``, ``minutes``, ``retries``.
    ``defaults`` holds what entries share. Folders of models and datasets are relative to the
    working directory.

    Parameters
    ----------
    path : path
        The file of experiments.
    folder : path, optional
        The folder of the chapters; by default that of the book.
    embedded : collection of str, default ()
        The names of models that need neither folder nor hub. Where they are given, any other model
        has to be a folder or an id of the hub (owner/name); by default models are not checked.

    Returns
    -------
    list of Cell
        The runs, each with its id, chapter, parameters and needs.

    Raises
    ------
    SelectionError
        If the file cannot be read, or a key, chapter, parameter, model or dataset is unknown, a
        value is of the wrong type, or two entries ask for the same run; the message names the line.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.batch import read_grid
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / "grid.yaml"
    ...     size = file.write_text("experiments: [{chapters: outside, seeds: [0, 1]}]")
    ...     cells = read_grid(file)
    >>> [(cell.chapter, cell.parameters["seed"]) for cell in cells]
    [('outside', 0), ('outside', 1)]
    """
    content, lines = _read(Path(path))
    cells: dict[str, Cell] = {}
    chapters: dict[str, Chapter] = {}  # those that were read
    for number, entry in enumerate(content["experiments"]):
        location = f"{Path(path).name}, line {lines[number]}, experiment {number + 1}"
        for cell in _cells(
            location,
            content["defaults"],
            entry,
            embedded,
            partial(_opened, location, folder, chapters),
        ):
            if cell.id in cells:
                raise SelectionError(
                    f"{location}: the run {cell.id} is asked for twice",
                    "give each combination once",
                )
            cells[cell.id] = cell
    return list(cells.values())


def _read(path: Path) -> tuple[dict[str, object], list[int]]:
    """The checked outline of the file, and the line of each experiment."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as cause:
        raise SelectionError(
            f"{path} cannot be read: {' '.join(str(cause).split())}",
            "give a YAML file of experiments",
        ) from cause
    name = path.name
    form = "give a mapping with experiments: a list of entries, each a mapping with chapters"
    content, tree = read_yaml(text, name, "give a YAML file of experiments")
    _require_keys(name, content, ("defaults", "experiments"), form)
    entries = content.get("experiments")
    common = content.get("defaults") or {}
    if not isinstance(entries, list) or not entries:
        raise SelectionError(f"{name}: no list of experiments", form)
    _require_keys(f"{name}, defaults", common, _COMMON, form)
    (experiments,) = [value for key, value in tree.value if key.value == "experiments"]
    lines = [node.start_mark.line + 1 for node in experiments.value]
    for line, entry in zip(lines, entries, strict=True):
        _require_keys(f"{name}, line {line}", entry, ("chapters", "vary", *_COMMON), form)
    return {"experiments": entries, "defaults": common}, lines


def _require_keys(location: str, content: object, allowed: Sequence[str], form: str) -> None:
    if not isinstance(content, dict):
        raise SelectionError(f"{location}: {content!r} is no mapping", form)
    for key in content:
        if key not in allowed:
            raise SelectionError(
                f"{location}: unknown key {key!r}{closest(str(key), allowed)}",
                f"there are: {', '.join(allowed)}",
            )


def _cells(
    location: str,
    common: Mapping,
    entry: Mapping,
    embedded: Collection[str],
    read: Callable[[str], Chapter],
) -> Iterator[Cell]:
    needs = {}
    for name, default in NEEDS.items():
        needs[name] = _need(location, name, entry.get(name, common.get(name, default)))
    axes = {}
    for key, (name, default) in AXES.items():
        axes[name] = _as_list(location, key, entry.get(key, common.get(key, default)))
    for model, dataset in product(axes["model"], axes["dataset"]):
        _require_known(location, model, dataset, embedded)
    fixed = _mapping(location, "parameters", common.get("parameters")) | _mapping(
        location, "parameters", entry.get("parameters")
    )
    vary = _mapping(location, "vary", entry.get("vary"))
    if duplicates := [
        name for name in (*fixed, *vary) if name in axes or (name in vary and name in fixed)
    ]:
        allowed = (
            f"set {', '.join(axes)} by {', '.join(AXES)}, and any other "
            "in one of parameters and vary"
        )
        raise SelectionError(
            f"{location}: parameter {duplicates[0]!r} is given in two places, or in the wrong one",
            allowed,
        )
    for name, values in vary.items():
        axes[name] = _as_list(location, f"vary: {name}", values)
    for name in map(str, _as_list(location, "chapters", entry.get("chapters"))):
        chapter = read(name)
        for values in product(*axes.values()):
            parameters = dict(zip(axes, values, strict=True)) | fixed
            with _located(location):
                parameters = {
                    key: meant(chapter.defaults.get(key), value)
                    for key, value in parameters.items()
                }
                run_parameters = dict(chapter.run(parameters).given)
            yield Cell(_name(name, parameters), name, run_parameters, **needs)


def _opened(
    location: str, folder: str | Path | None, chapters: dict[str, Chapter], name: str
) -> Chapter:
    """A chapter, read only when it is met first."""
    if name not in chapters:
        with _located(location):
            chapters[name] = opened(name, folder)
    return chapters[name]


@contextmanager
def _located(location: str) -> Iterator[None]:
    """Say where in the file stands what is wrong."""
    try:
        yield
    except SelectionError as error:
        raise SelectionError(f"{location}: {error}") from None


def _mapping(location: str, key: str, value: object) -> dict[str, object]:
    if value and not isinstance(value, dict):
        raise SelectionError(
            f"{location}: {key} is {value!r}, no mapping",
            f"give {key} as NAME: VALUE, one in a line",
        )
    return value or {}


def _as_list(location: str, key: str, value: object) -> list[object]:
    values = value if isinstance(value, list) else [value]
    if not values or None in map(plain, values):
        raise SelectionError(
            f"{location}: {key} has no value", "give one value, or a list of one or more"
        )
    if len({json.dumps(element, sort_keys=True, default=str) for element in values}) < len(values):
        raise SelectionError(f"{location}: {key} has a value twice", "give each value once")
    return values


def _need(location: str, name: str, value: object) -> int:
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < _MINIMUM[name]:
        raise SelectionError(
            f"{location}: {name}={value!r}", f"give a whole number of {_MINIMUM[name]} or more"
        )
    return value


def _require_known(
    location: str, model: object, dataset: object, embedded: Collection[str]
) -> None:
    """Refuse names that are neither embedded nor a folder.

    Nor (a model) look like an id of the hub.
    """
    base, dash, style = str(dataset).rpartition("-")
    if not dash or style not in STYLES:
        base = str(dataset)
    names = (*DATASETS, *HUB)
    if (
        str(dataset) not in names
        and base not in HUB
        and not os.path.isdir(base)
        and not os.path.isdir(str(dataset))
    ):
        allowed = f"there are: {', '.join(names)}, and folders"
        raise SelectionError(
            f"{location}: unknown dataset {dataset!r}{closest(str(dataset), names)}", allowed
        )
    if (
        embedded
        and "/" not in str(model)
        and str(model) not in embedded
        and not os.path.isdir(str(model))
    ):
        allowed = f"there are: {', '.join(embedded)}, folders, and hub ids (owner/name)"
        raise SelectionError(
            f"{location}: unknown model {model!r}{closest(str(model), embedded)}", allowed
        )


def _name(chapter: str, parameters: Mapping[str, object]) -> str:
    """A name that a reader can tell and that stays the same.

    Chapter, model, dataset, seed, and a digest of all parameters.
    """
    parts = (
        Path(chapter).stem,
        str(parameters["model"]).rstrip("/").rpartition("/")[2],
        Path(str(parameters["dataset"])).name,
    )
    slugs = [
        re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:28]
        for text in (*parts, f"s{parameters['seed']}")
    ]
    return "-".join([*slugs, digest([chapter, parameters])[:_DIGITS]])
