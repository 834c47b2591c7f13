"""The register of published claims, the recorder of measurements, and the verdict.

Chapters measure, and the verdict follows from the numbers alone.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from xlvlms_tutorial.claims import spread
from xlvlms_tutorial.errors import ClaimError, EstimateError, RecordError
from xlvlms_tutorial.io import FOLDER_VARIABLE as FOLDER_VARIABLE
from xlvlms_tutorial.io import default_folder, digest, read_json, reading, versions, write_json
from xlvlms_tutorial.metrics.intervals import Estimate

DIRECTIONS = ("greater", "less", "equal")
VERDICTS = ("confirmed", "refuted", "undecided", "not measured")
MEASURED = (
    "verdict",
    "value",
    "low",
    "high",
    "n",
    "seeds",
    "model",
    "dataset",
    "chapter",
    "variant",
    "versions",
)
# whether processors of other kinds, each by itself, would give another verdict
BETWEEN = "between_machines"

_KINDS = {
    **dict.fromkeys(("id", "model", "dataset", "chapter", "variant"), str),
    **dict.fromkeys(("value", "low", "high"), (int, float)),
    "n": int,
    "seeds": list,
    "versions": dict,
}

REGISTER = Path(__file__).with_name("register.yaml")


def _of(kind: type | tuple[type, ...], value: object) -> bool:
    """Whether a value is of a kind.

    A list stands for one of whole numbers, and a truth value is no number.
    """
    if kind is list:
        return isinstance(value, (list, tuple)) and all(_of(int, one) for one in value)
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Claim:
    """A published claim as an effect with a direction.

    ``metric`` is the effect to measure, with the rival subtracted wherever there is one, so that
    ``null`` is a constant. "greater": the effect exceeds ``null - margin``; "less": it is below
    ``null + margin``; "equal": it differs from ``null`` by less than ``margin``. A margin is ours:
    it says what "about" or "little" is taken to mean.
    """

    id: str
    part: str
    paper: str
    where: str
    statement: str
    metric: str
    direction: str = "greater"
    null: float = 0.0
    rival: str = field(kw_only=True)
    margin: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not _of((int, float) if name in ("null", "margin") else str, value) or value == "":
                raise EstimateError(
                    f"{name} of claim {self.id}",
                    repr(value),
                    "text, or for null and margin a number",
                )
        if self.direction not in DIRECTIONS:
            raise EstimateError(f"direction of {self.id}", self.direction, ", ".join(DIRECTIONS))
        finite = math.isfinite(self.null) and math.isfinite(self.margin)
        if not finite or self.margin < 0 or (self.direction == "equal" and self.margin == 0):
            found = f"null {self.null}, margin {self.margin}"
            raise EstimateError(
                f"claim {self.id}",
                found,
                'finite numbers, a margin of 0 or more, above 0 where the direction is "equal"',
            )

    @property
    def test(self) -> str:
        """The claim as an inequality on its effect: "> 0"."""
        if self.direction == "equal":
            return f"within {self.null:g} ± {self.margin:g}"
        return (
            f"> {self.null - self.margin:g}"
            if self.direction == "greater"
            else f"< {self.null + self.margin:g}"
        )


class _OneOfAKey(yaml.SafeLoader):  # of a key that stands twice YAML takes the last
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if doubled := [
            key for key, count in Counter(key.value for key, _ in node.value).items() if count > 1
        ]:
            raise ValueError(f"{', '.join(doubled)} twice from line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep)


def read_register(file: str | Path | None = None) -> dict[str, Claim]:
    """Read a register of claims, and check every field of it.

    Parameters
    ----------
    file : path, optional
        A YAML file, by default the register of this book. It has two keys: "sources" maps the
        beginning of an id ("IMA") to a part of the book and a paper; "claims" maps ids to the
        other fields of :class:`Claim`.

    Returns
    -------
    dict of str to Claim
        The claims by their ids, in the order of the file.

    Raises
    ------
    RecordError
        If the file is no such register: a field is missing, unknown or of another kind, a key
        stands there twice, or a claim cannot be judged.

    Examples
    --------
    >>> register = read_register()
    >>> register["SKIP-3"].statement, register["SKIP-3"].test
    ('Training with half of the blocks skipped keeps about 97 %.', '> 0.95')
    """
    register, name = {}, "sources and claims"
    file = REGISTER if file is None else Path(file)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _OneOfAKey)
        if content.keys() != {"sources", "claims"}:
            raise ValueError(f"the keys are {', '.join(content)}")
        for name, entry in content["claims"].items():
            register[name] = Claim(id=name, **content["sources"][name.partition("-")[0]], **entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as cause:
        raise RecordError(
            f"{file}, {name}", f"not a register of claims ({type(cause).__name__}: {cause})"
        ) from cause
    return register


CLAIMS = read_register()


def claim(claim_id: str) -> Claim:
    """A claim by its id.

    Raises
    ------
    ClaimError
        If the register does not hold the id.
    """
    if claim_id not in CLAIMS:
        raise ClaimError(claim_id, CLAIMS)
    return CLAIMS[claim_id]


def verdict(claimed: Claim, estimate: Estimate | None) -> str:
    """What an interval says of a claim.

    "confirmed" if all of it lies on the claimed side of the bar, "refuted" if none of
    it does. Elsewhere "undecided"; "not measured" without an estimate. A value on the
    bar is not on the claimed side.
    """
    if estimate is None:
        return "not measured"
    above, below = claimed.null - claimed.margin, claimed.null + claimed.margin
    low, high = estimate.low, estimate.high
    whole, none = {
        "greater": (low > above, high <= above),
        "less": (high < below, low >= below),
        "equal": (low > above and high < below, high <= above or low >= below),
    }[claimed.direction]
    return "confirmed" if whole else "refuted" if none else "undecided"


def record(
    claim_id: str,
    estimate: Estimate,
    *,
    model: str,
    dataset: str,
    seeds: int | Sequence[int | np.integer],
    chapter: str = "",
    variant: str = "",
    folder: str | Path | None = None,
) -> dict[str, object]:
    """Write one measurement of a claim, and return it with its verdict.

    Where runs as on other processors gave this measurement other intervals, its interval is
    joined with theirs, and a verdict that one of them alone would change is called undecided
    between machines (:mod:`~xlvlms_tutorial.claims.spread`).

    Claim, chapter, model, dataset, seeds and variant (a layer, a task, a setting) make up its name:
    the same run again replaces its own record and no other.

    Raises
    ------
    ClaimError
        If the register does not hold the id.
    RecordError
        If the estimate is not an Estimate, or model, dataset or seeds are missing.
    OutputError
        If the record cannot be written.
    """
    claimed, numbers = claim(claim_id), [int(seed) for seed in np.atleast_1d(seeds)]
    if not isinstance(estimate, Estimate):
        raise RecordError(
            f"record of {claim_id}", f"{estimate!r} is not an Estimate with value, low, high and n"
        )
    if not model or not dataset or not numbers:
        raise RecordError(
            f"record of {claim_id}",
            f"model={model!r}, dataset={dataset!r}, seeds={numbers} must all be given",
        )
    key = {
        "id": claim_id,
        "chapter": chapter,
        "model": model,
        "dataset": dataset,
        "seeds": numbers,
        "variant": variant,
    }
    known = spread.of(key, estimate)
    wide = spread.joined(estimate, known)
    alone = {verdict(claimed, one) for one in (estimate, *known)}
    written = {
        **key,
        **wide.asdict(),
        "verdict": verdict(claimed, wide),
        BETWEEN: alone != {verdict(claimed, wide)},
        "alone": [float(estimate.low), float(estimate.high)],
        "versions": versions(),
    }
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{claim_id}-{model}-{dataset}")[:80]
    write_json(Path(folder or default_folder()) / f"{slug}-{digest(key)[:12]}.json", written)
    return written


def sentence(measured: dict[str, object]) -> str:
    """One line on a measurement: "IMA-1 confirmed: 0.31 [0.28, 0.34], claimed > 0"."""
    value, low, high = (f"{measured[name]:.3g}" for name in ("value", "low", "high"))
    between = " between machines" if measured.get(BETWEEN) else ""
    return (
        f"{measured['id']} {measured['verdict']}{between}: {value} [{low}, {high}], "
        f"claimed {claim(measured['id']).test}"
    )


def gather(folder: str | Path | None = None) -> pd.DataFrame:
    """All records of a folder, one a row; the verdicts are computed again from the numbers.

    Raises
    ------
    RecordError
        If a record is damaged or incomplete.
    ClaimError
        If a record names a claim that the register does not hold.
    """
    return pd.DataFrame(_rows(folder), columns=["id", *MEASURED, BETWEEN])


def merge(
    folder: str | Path | None = None,
    path: str | Path | None = None,
    more: Iterable[Mapping[str, object]] = (),
) -> list[dict[str, object]]:
    """Every claim with every measurement of it, in the register's order.

    Written to ``path`` where one is given. One entry a claim and measurement; a claim without one
    has the verdict "not measured" and None elsewhere. ``more`` are records from elsewhere, such as
    the measurements of a batch; one that a record of the folder repeats is not listed twice.

    Raises
    ------
    RecordError, ClaimError
        As :func:`gather`.
    OutputError
        If ``path`` cannot be written.
    """
    unmeasured = dict.fromkeys(MEASURED) | {"verdict": "not measured", BETWEEN: False}
    found: dict[str, list[dict[str, object]]] = {name: [] for name in CLAIMS}
    for row in (*_rows(folder), *(judged(record, "a record") for record in more)):
        found[row["id"]] += [] if row in found[row["id"]] else [row]
    entries = [
        {**asdict(known), **row}
        for known in CLAIMS.values()
        for row in found[known.id] or [unmeasured]
    ]
    if path is not None:
        write_json(path, entries)
    return entries


def _rows(folder: str | Path | None) -> list[dict[str, object]]:
    folder = Path(folder or default_folder())
    try:
        files = sorted(
            file
            for file in folder.iterdir()
            if file.suffix == ".json" and not file.name.startswith(".")
        )
    except FileNotFoundError:
        return []  # nothing is measured yet
    except OSError as cause:
        raise RecordError(folder, f"no folder of records ({cause.strerror})") from cause
    return [judged(read_record(file), file) for file in files]


def read_record(file: Path) -> object:
    """What a file of :func:`record` holds; whether it is a record, :func:`judged` says.

    Raises
    ------
    RecordError
        If it is no JSON.
    """
    with reading(file, "not a record of a measurement"):
        return read_json(file)


def judged(record: Any, where: object) -> dict[str, object]:
    """A record with the verdict that follows from its numbers, whatever verdict it carries.

    ``where`` it stands is for messages.

    Raises
    ------
    RecordError
        If the record is incomplete, or its numbers are no estimate.
    ClaimError
        If it names a claim that the register does not hold.
    """
    with reading(where, "not a record of a measurement"):
        row = {name: record[name] for name in ("id", *MEASURED)}
        if wrong := [name for name, kind in _KINDS.items() if not _of(kind, row[name])]:
            raise ValueError(f"{wrong[0]} is {row[wrong[0]]!r}")
        estimate = Estimate(**{field.name: record[field.name] for field in fields(Estimate)})
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
    # results of earlier versions do not say it
    between = {BETWEEN: bool(record.get(BETWEEN, False))}
    return row | {"verdict": verdict(claim(row["id"]), estimate)} | between
