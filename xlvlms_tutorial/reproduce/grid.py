"""From a file of experiments to a list of runs: chapter x model x dataset x seed x parameters, checked before anything starts."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import yaml

from xlvlms_tutorial.data import DATASETS
from xlvlms_tutorial.data.hub import HUB
from xlvlms_tutorial.errors import SelectionError
from xlvlms_tutorial.reproduce.chapters import closest
from xlvlms_tutorial.reproduce.run import prepare

AXES = {"models": ("model", "pocket-llava"), "datasets": ("dataset", "scenes"), "seeds": ("seed", 0)}  # key: parameter, default
NEEDS = {"threads": 1, "gpus": 0, "mem_mb": 4000, "minutes": 60, "retries": 1}  # of one run
_COMMON = (*AXES, "parameters", *NEEDS)
_LEAST = {"threads": 1, "gpus": 0, "mem_mb": 1, "minutes": 1, "retries": 0}
STYLES = ("-place", "-colour", "-mood")


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
        """The run in plain types."""
        return asdict(self)


def read_grid(path: str | Path, folder: str | Path | None = None, embedded: Collection[str] = ()) -> list[Cell]:
    """The runs that a file of experiments asks for, in its order.

    The file is YAML: ``experiments`` is a list of entries, each with ``chapters`` and, where wanted, ``models``, ``datasets``, ``seeds``
    (one value or a list: every combination is a run), ``parameters`` (of all runs of the entry), ``vary`` (lists of values by parameter)
    and the needs ``threads``, ``gpus``, ``mem_mb``, ``minutes``, ``retries``. ``defaults`` holds what entries share. Folders of models and
    datasets are relative to the working directory. ``embedded`` are the names of models that need neither folder nor hub.

    Raises
    ------
    SelectionError
        If the file cannot be read, or a key, chapter, parameter, model or dataset is unknown, a value is of the wrong type, or two
        entries ask for the same run; the message names the line.
    """
    content, lines = _read(Path(path))
    cells: dict[str, Cell] = {}
    for number, entry in enumerate(content["experiments"]):
        where = f"{Path(path).name}, line {lines[number]}, experiment {number + 1}"
        for cell in _cells(where, content["defaults"], entry, folder, embedded):
            if cell.id in cells:
                raise SelectionError(f"{where}: the run {cell.id} is asked for twice", "give each combination once")
            cells[cell.id] = cell
    return list(cells.values())


def _read(path: Path) -> tuple[dict[str, object], list[int]]:
    """The checked outline of the file, and the line of each experiment."""
    try:
        text = path.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise SelectionError(f"{path} cannot be read: {' '.join(str(cause).split())}", "give a YAML file of experiments") from cause
    where, form = path.name, "give a mapping with experiments: a list of entries, each a mapping with chapters"
    _twice(where, tree)
    _keys(where, content, ("defaults", "experiments"), form)
    entries, common = content.get("experiments"), content.get("defaults") or {}
    if not isinstance(entries, list) or not entries:
        raise SelectionError(f"{where}: no list of experiments", form)
    _keys(f"{where}, defaults", common, _COMMON, form)
    (listed,) = [value for key, value in tree.value if key.value == "experiments"]
    lines = [node.start_mark.line + 1 for node in listed.value]
    for line, entry in zip(lines, entries, strict=True):
        _keys(f"{where}, line {line}", entry, ("chapters", "vary", *_COMMON), form)
    return {"experiments": entries, "defaults": common}, lines


def _twice(where: str, node: yaml.Node | None) -> None:
    """Refuse a key that is given twice: YAML would silently take the last."""
    for child in node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else ():
        for part in child if isinstance(child, tuple) else (child,):
            _twice(where, part)
    if isinstance(node, yaml.MappingNode):
        seen: set[object] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.value in seen or seen.add(key.value)):
                raise SelectionError(f"{where}, line {key.start_mark.line + 1}: {key.value!r} stands twice", "give each key once")


def _keys(where: str, content: object, allowed: Sequence[str], form: str) -> None:
    if not isinstance(content, dict):
        raise SelectionError(f"{where}: {content!r} is no mapping", form)
    for key in content:
        if key not in allowed:
            raise SelectionError(f"{where}: unknown key {key!r}{closest(str(key), allowed)}", f"there are: {', '.join(allowed)}")


def _cells(where: str, common: Mapping, entry: Mapping, folder: str | Path | None, embedded: Collection[str]) -> Iterator[Cell]:
    needs = {name: _need(where, name, entry.get(name, common.get(name, value))) for name, value in NEEDS.items()}
    axes = {name: _list(where, key, entry.get(key, common.get(key, value))) for key, (name, value) in AXES.items()}
    for model, dataset in product(axes["model"], axes["dataset"]):
        _known(where, model, dataset, embedded)
    given, vary = {**(common.get("parameters") or {}), **(entry.get("parameters") or {})}, entry.get("vary") or {}
    if doubled := [name for name in (*given, *vary) if name in axes or (name in vary and name in given)]:
        allowed = f"set {', '.join(axes)} by {', '.join(AXES)}, and any other in one of parameters and vary"
        raise SelectionError(f"{where}: parameter {doubled[0]!r} is given in two places, or in the wrong one", allowed)
    axes |= {name: _list(where, f"vary: {name}", values) for name, values in vary.items()}
    for chapter in _list(where, "chapters", entry.get("chapters")):
        for values in product(*axes.values()):
            parameters = dict(zip(axes, values, strict=True)) | given
            checked = _checked(where, str(chapter), parameters, folder)
            yield Cell(_name(str(chapter), parameters), str(chapter), checked, **needs)


def _checked(where: str, chapter: str, parameters: Mapping[str, object], folder: str | Path | None) -> dict[str, object]:
    """The parameters as the chapter takes them."""
    try:
        return dict(prepare(chapter, parameters, folder).given)
    except SelectionError as error:
        raise SelectionError(f"{where}: {error}") from None


def _list(where: str, key: str, value: object) -> list[object]:
    values = value if isinstance(value, list) else [value]
    if not values or None in values:
        raise SelectionError(f"{where}: {key} has no value", "give one value, or a list of one or more")
    if len({json.dumps(one, sort_keys=True, default=str) for one in values}) < len(values):
        raise SelectionError(f"{where}: {key} has a value twice", "give each value once")
    return values


def _need(where: str, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < _LEAST[name]:
        raise SelectionError(f"{where}: {name}={value!r}", f"give a whole number of {_LEAST[name]} or more")
    return value


def _known(where: str, model: object, dataset: object, embedded: Collection[str]) -> None:
    """Refuse names that are neither embedded nor a folder, nor (a model) look like an id of the hub."""
    base = next((str(dataset).removesuffix(style) for style in STYLES if str(dataset).endswith(style)), str(dataset))
    known = (*DATASETS, *HUB)
    if str(dataset) not in known and base not in HUB and not Path(base).is_dir() and not Path(str(dataset)).is_dir():
        allowed = f"there are: {', '.join(known)}, and folders"
        raise SelectionError(f"{where}: unknown dataset {dataset!r}{closest(str(dataset), known)}", allowed)
    if embedded and "/" not in str(model) and str(model) not in embedded and not Path(str(model)).is_dir():
        allowed = f"there are: {', '.join(embedded)}, folders, and hub ids (owner/name)"
        raise SelectionError(f"{where}: unknown model {model!r}{closest(str(model), embedded)}", allowed)


def _name(chapter: str, parameters: Mapping[str, object]) -> str:
    """A name that a reader can tell and that stays the same: chapter, model, dataset, seed, and a digest of all parameters."""
    told = (Path(chapter).stem, str(parameters["model"]).rstrip("/").rpartition("/")[2], Path(str(parameters["dataset"])).name)
    slugs = [re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:28] for text in told]
    digest = hashlib.sha256(json.dumps([chapter, parameters], sort_keys=True).encode()).hexdigest()[:6]
    return "-".join([*slugs, f"s{parameters['seed']}", digest])
