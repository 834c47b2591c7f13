"""Read a file of experiments as a list of runs.

Chapter x model x dataset x seed x parameters, checked before anything starts.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

from xlvlms_tutorial.batch.chapters import closest
from xlvlms_tutorial.batch.run import Chapter, opened
from xlvlms_tutorial.batch.spelling import meant, plain, read_yaml
from xlvlms_tutorial.data import DATASETS
from xlvlms_tutorial.data.hub import HUB
from xlvlms_tutorial.errors import InputError
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
    InputError
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
    path = Path(path)
    common, entries, lines = _read(path)
    read = cache(partial(opened, folder=folder))  # each chapter once
    cells: dict[str, Cell] = {}
    for number, (line, entry) in enumerate(zip(lines, entries, strict=True), start=1):
        with _located(f"{path.name}, line {line}, experiment {number}"):
            for cell in _cells(common, entry, embedded, read):
                if cell.id in cells:
                    raise InputError(
                        f"the run {cell.id} is asked for twice", "give each combination once"
                    )
                cells[cell.id] = cell
    return list(cells.values())


def _read(path: Path) -> tuple[dict[str, object], list[dict], list[int]]:
    """What entries share, the entries, and the line of each; the keys of all are checked."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as cause:
        raise InputError(
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
        raise InputError(f"{name}: no list of experiments", form)
    _require_keys(f"{name}, defaults", common, _COMMON, form)
    nodes = {key.value: value for key, value in tree.value}
    # a list that comes in by a merge key ("<<") has no lines of its own here
    lines = [tree.start_mark.line + 1] * len(entries)
    if "experiments" in nodes:
        lines = [node.start_mark.line + 1 for node in nodes["experiments"].value]
    for line, entry in zip(lines, entries, strict=True):
        _require_keys(f"{name}, line {line}", entry, ("chapters", "vary", *_COMMON), form)
    return common, entries, lines


def _require_keys(location: str, content: object, allowed: Sequence[str], form: str) -> None:
    if not isinstance(content, dict):
        raise InputError(f"{location}: {content!r} is no mapping", form)
    for key in content:
        if key not in allowed:
            raise InputError(
                f"{location}: unknown key {key!r}{closest(str(key), allowed)}",
                f"there are: {', '.join(allowed)}",
            )


def _cells(
    common: Mapping,
    entry: Mapping,
    embedded: Collection[str],
    read: Callable[[str], Chapter],
) -> Iterator[Cell]:
    """The runs of one entry."""
    needs = {}
    for name, default in NEEDS.items():
        needs[name] = _need(name, entry.get(name, common.get(name, default)))
    axes = {}
    for key, (name, default) in AXES.items():
        axes[name] = _as_list(key, entry.get(key, common.get(key, default)))
    for dataset in map(str, axes["dataset"]):
        _require_dataset(dataset)
    for model in map(str, axes["model"]):
        _require_model(model, embedded)
    fixed = _mapping("parameters", common.get("parameters"))
    fixed = fixed | _mapping("parameters", entry.get("parameters"))
    vary = _mapping("vary", entry.get("vary"))
    for name in (*fixed, *vary):
        if name in axes or (name in fixed and name in vary):
            raise InputError(
                f"parameter {name!r} is given in two places, or in the wrong one",
                f"set {', '.join(axes)} by {', '.join(AXES)}, and any other "
                "in one of parameters and vary",
            )
    for name, values in vary.items():
        axes[name] = _as_list(f"vary: {name}", values)
    for name in map(str, _as_list("chapters", entry.get("chapters"))):
        chapter = read(name)
        for values in product(*axes.values()):
            parameters = dict(zip(axes, values, strict=True)) | fixed
            for key, value in parameters.items():
                parameters[key] = meant(chapter.defaults.get(key), value)
            run_parameters = dict(chapter.run(parameters).given)
            yield Cell(_name(name, parameters), name, run_parameters, **needs)


@contextmanager
def _located(location: str) -> Iterator[None]:
    """Say where in the file stands what is wrong."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{location}: {error}") from None


def _mapping(key: str, value: object) -> dict[str, object]:
    if value and not isinstance(value, dict):
        raise InputError(
            f"{key} is {value!r}, no mapping", f"give {key} as NAME: VALUE, one in a line"
        )
    return value or {}


def _as_list(key: str, value: object) -> list[object]:
    values = value if isinstance(value, list) else [value]
    if not values or None in map(plain, values):
        raise InputError(f"{key} has no value", "give one value, or a list of one or more")
    texts = {json.dumps(element, sort_keys=True, default=str) for element in values}
    if len(texts) < len(values):
        raise InputError(f"{key} has a value twice", "give each value once")
    return values


def _need(name: str, value: object) -> int:
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < _MINIMUM[name]:
        raise InputError(f"{name}={value!r}", f"give a whole number of {_MINIMUM[name]} or more")
    return value


def _require_dataset(dataset: str) -> None:
    """Refuse a data set that is neither embedded, on the hub nor a folder, in any style."""
    base, dash, style = dataset.rpartition("-")
    if not dash or style not in STYLES:
        base = dataset
    names = (*DATASETS, *HUB)
    if dataset in names or base in HUB or os.path.isdir(base) or os.path.isdir(dataset):
        return
    raise InputError(
        f"unknown dataset {dataset!r}{closest(dataset, names)}",
        f"there are: {', '.join(names)}, and folders",
    )


def _require_model(model: str, embedded: Collection[str]) -> None:
    """Refuse a model that is neither embedded nor a folder, and no id of the hub."""
    if not embedded or model in embedded or "/" in model or os.path.isdir(model):
        return
    raise InputError(
        f"unknown model {model!r}{closest(model, embedded)}",
        f"there are: {', '.join(embedded)}, folders, and hub ids (owner/name)",
    )


def _name(chapter: str, parameters: Mapping[str, object]) -> str:
    """A name that a reader can tell and that stays the same.

    Chapter, model, dataset, seed, and a digest of all parameters.
    """
    _, _, model = str(parameters["model"]).rstrip("/").rpartition("/")
    dataset = Path(str(parameters["dataset"])).name
    parts = (Path(chapter).stem, model, dataset, f"s{parameters['seed']}")
    mark = digest([chapter, parameters])[:_DIGITS]
    return "-".join([*map(_slug, parts), mark])


def _slug(text: str) -> str:
    """A text in small letters and digits, with dashes for all else, cut off where it is long."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:28]
