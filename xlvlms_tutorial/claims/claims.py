"""Hold the register of published claims, record measurements of them, and give verdicts.

Chapters measure, and the verdict follows from the numbers alone.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from xlvlms_tutorial.claims import spread
from xlvlms_tutorial.errors import damaged_record, no_estimate, unknown_claim
from xlvlms_tutorial.io import FOLDER_VARIABLE as FOLDER_VARIABLE
from xlvlms_tutorial.io import default_folder, digest, read_json, reading, versions, write_json
from xlvlms_tutorial.metrics.intervals import Estimate
from xlvlms_tutorial.validation import require_one_of

DIRECTIONS = ("greater", "less", "equal")
# How near the measurement comes to what the paper did. A claim of this book is its own method.
FIDELITIES = ("method", "proxy", "other question")
# What kind of number an effect is: it decides from where on it is called large.
EFFECTS = ("share", "correlation", "cosine", "score", "nats", "ratio")
# What the observations of an interval are. "random orders" is no interval of the value, but the
# range that chance alone would reach around it.
OBSERVATIONS = (
    "pictures",
    "questions",
    "tokens",
    "concepts",
    "words",
    "layers",
    "blocks",
    "connectors",
    "encoders",
    "checkpoints",
    "seeds",
    "seeds and questions",
    "random orders",
)
# How a layer or a setting was picked.
CHOICES = ("fixed", "validation", "least favourable")
# On what a claim was measured: this book's small model, its second one, a published model, or a
# model that is none of these, such as one of a test.
SCALES = ("pocket", "second", "published", "own")
# What a measurement can say of a claim.
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
    "against",
    "interval_over",
    "choice",
    "scale",
    "versions",
)
# whether processors of other kinds, each by itself, would give another verdict
BETWEEN = "between_machines"

_KINDS = {
    **dict.fromkeys(("id", "model", "dataset", "chapter", "variant", "against"), str),
    **dict.fromkeys(("value", "low", "high"), (int, float)),
    "n": int,
    "seeds": list,
    "versions": dict,
}

# Set where pages are executed for the book: a name is then recorded once.
ONE_RECORD = "XLVLMS_ONE_RECORD"

_ALLOWED = {"interval_over": OBSERVATIONS, "choice": CHOICES, "scale": SCALES}

REGISTER = Path(__file__).with_name("register.yaml")


def _is_kind(kind: type | tuple[type, ...], value: object) -> bool:
    """Whether a value is of a kind.

    A list stands for one of integers, and a truth value is no number.
    """
    if kind is list:
        if not isinstance(value, (list, tuple)):
            return False
        return all(_is_kind(int, number) for number in value)
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Claim:
    """A published claim as an effect with a direction.

    Use :data:`CLAIMS` for those of this book; make your own only for a register of your own.

    Parameters
    ----------
    id : str
        The name of the claim, such as "IMA-1"; it stays for ever.
    part : str
        The part of the book.
    paper : str
        The paper, with its arXiv number.
    where : str
        The place in the paper, such as "Fig. 2".
    statement : str
        The claim in our words.
    metric : str
        The effect to measure, with the rival subtracted wherever there is one, so that ``null`` is
        a constant.
    direction : str, default "greater"
        "greater": the effect exceeds ``null - margin``; "less": it is below ``null + margin``;
        "equal": it differs from ``null`` by less than ``margin``.
    null : float, default 0.0
        The constant that the effect is held against.
    rival : str
        What the claim is measured against, such as "shuffled modality labels".
    margin : float, default 0.0
        What "about" or "little" is taken to mean. A margin is ours, not the paper's.
    fidelity : str
        "method": measured as in the paper; "proxy": with something in place of what the paper
        used; "other question": what is measured is not quite what is claimed.
    reason : str
        Why the fidelity is what it is.
    about : str
        What the claim speaks of: "models", where it says what models or trainings do, or
        "pictures", where it says what one model does to its inputs.
    effect : str, default "share"
        The kind of number: "share", "correlation", "cosine", "score", "nats" or "ratio".

    Raises
    ------
    InputError
        If a field is empty or of another kind, the direction is unknown, or null and margin give no
        test.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import CLAIMS
    >>> CLAIMS["IMA-2"].test, CLAIMS["IMA-2"].rival
    ('> 0', 'chance; two runs, same pictures')
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
    fidelity: str = field(kw_only=True)
    reason: str = field(kw_only=True)
    about: str = field(kw_only=True)
    effect: str = "share"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            kind = (int, float) if name in ("null", "margin") else str
            if not _is_kind(kind, value) or value == "":
                raise no_estimate(
                    f"{name} of claim {self.id}",
                    repr(value),
                    "text, or for null and margin a number",
                )
        choices = {
            "direction": DIRECTIONS,
            "fidelity": FIDELITIES,
            "about": ("models", "pictures"),
            "effect": EFFECTS,
        }
        for name, allowed in choices.items():
            require_one_of(getattr(self, name), allowed, f"{name} of {self.id}")
        finite = math.isfinite(self.null) and math.isfinite(self.margin)
        if not finite or self.margin < 0 or (self.direction == "equal" and self.margin == 0):
            values = f"null {self.null}, margin {self.margin}"
            raise no_estimate(
                f"claim {self.id}",
                values,
                'finite numbers, a margin of 0 or more, above 0 where the direction is "equal"',
            )

    @property
    def test(self) -> str:
        """The claim as an inequality on its effect, such as "> 0"."""
        if self.direction == "equal":
            return f"within {self.null:g} ± {self.margin:g}"
        if self.direction == "greater":
            return f"> {self.null - self.margin:g}"
        return f"< {self.null + self.margin:g}"


class UniqueKeyLoader(yaml.SafeLoader):
    """Read YAML and refuse a key that stands twice, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Make a dict of a mapping, or raise ValueError with the keys that stand twice."""
        counts = Counter(key.value for key, _ in node.value)
        duplicates = [key for key, count in counts.items() if count > 1]
        if duplicates:
            raise ValueError(
                f"{', '.join(duplicates)} twice from line {node.start_mark.line + 1} on"
            )
        return super().construct_mapping(node, deep)


def read_register(file: str | Path | None = None) -> dict[str, Claim]:
    """Read a register of claims, and check every field of it.

    Parameters
    ----------
    file : path, optional
        A YAML file, by default the register of this book. It has two keys: "sources" maps the
        beginning of an id ("IMA"), or a whole id, to a part of the book and a paper; "claims" maps
        ids to the other fields of :class:`Claim`.

    Returns
    -------
    dict of str to Claim
        The claims by their ids, in the order of the file.

    Raises
    ------
    FileError
        If the file is no such register: a field is missing, unknown or of another kind, a key
        stands there twice, or a claim cannot be judged.

    Examples
    --------
    >>> register = read_register()
    >>> register["SKIP-3"].statement, register["SKIP-3"].test
    ('Training with half of the blocks skipped keeps about 97 %.', '> 0.95')
    """
    register = {}
    name = "sources and claims"
    file = REGISTER if file is None else Path(file)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), UniqueKeyLoader)
        if content.keys() != {"sources", "claims"}:
            raise ValueError(f"the keys are {', '.join(content)}")
        for name, entry in content["claims"].items():
            sources = content["sources"]
            # a claim of another paper than the rest of its family has a source by its whole id
            source = sources[name if name in sources else name.partition("-")[0]]
            register[name] = Claim(id=name, **source, **entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as cause:
        raise damaged_record(
            f"{file}, {name}", f"not a register of claims ({type(cause).__name__}: {cause})"
        ) from cause
    return register


# The claims of this book by their ids, in the order of the register.
CLAIMS = read_register()


def claim(claim_id: str) -> Claim:
    """Look up a claim of the register by its id.

    Parameters
    ----------
    claim_id : str
        Such as "IMA-1".

    Returns
    -------
    Claim
        The claim.

    Raises
    ------
    InputError
        If the register does not hold the id; the message lists those it has.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import claim
    >>> claim("IMA-1").statement
    'Tokens of each modality live in their own narrow cone.'
    """
    if claim_id not in CLAIMS:
        raise unknown_claim(claim_id, CLAIMS)
    return CLAIMS[claim_id]


def verdict(claimed: Claim, estimate: Estimate | None) -> str:
    """Judge a claim by the interval of its measured effect.

    Use it where a verdict is wanted without a record; :func:`record` gives it too. A value on the
    bar is not on the claimed side.

    Parameters
    ----------
    claimed : Claim
        The claim.
    estimate : Estimate or None
        The measured effect with its interval, None where there is none.

    Returns
    -------
    str
        "confirmed" if all of the interval lies on the claimed side of the bar, "refuted" if none of
        it does, elsewhere "undecided"; "not measured" without an estimate.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import claim, verdict
    >>> from xlvlms_tutorial.metrics import Estimate
    >>> verdict(claim("IMA-1"), Estimate(0.31, 0.28, 0.34, 200))
    'confirmed'
    >>> verdict(claim("IMA-1"), Estimate(0.02, -0.05, 0.09, 200))
    'undecided'
    """
    if estimate is None:
        return "not measured"
    lower_bar, upper_bar = claimed.null - claimed.margin, claimed.null + claimed.margin
    low, high = estimate.low, estimate.high
    confirmed, refuted = {
        "greater": (low > lower_bar, high <= lower_bar),
        "less": (high < upper_bar, low >= upper_bar),
        "equal": (low > lower_bar and high < upper_bar, high <= lower_bar or low >= upper_bar),
    }[claimed.direction]
    if confirmed:
        return "confirmed"
    return "refuted" if refuted else "undecided"


def record(
    claim_id: str,
    estimate: Estimate,
    *,
    model: str,
    dataset: str,
    seeds: int | Sequence[int | np.integer],
    against: str,
    interval_over: str = "pictures",
    choice: str = "fixed",
    scale: str | None = None,
    chapter: str = "",
    variant: str = "",
    folder: str | Path | None = None,
) -> dict[str, object]:
    """Write one measurement of a claim, and return it with its verdict.

    Use it at the end of an experiment. Claim, chapter, model, dataset, seeds and variant make up
    the name of the record: the same run again replaces its own record and no other. Where runs as
    on other processors gave this measurement other intervals, its interval is joined with theirs,
    and a verdict that one of them alone would change is called undecided between machines
    (:mod:`~xlvlms_tutorial.claims.spread`).

    Parameters
    ----------
    claim_id : str
        The id of the claim, such as "IMA-1".
    estimate : Estimate
        The measured effect with its interval.
    model : str
        The name of the model.
    dataset : str
        The name of the dataset.
    seeds : int or sequence of int
        The seeds behind the measurement, one or more.
    against : str
        What the effect was measured against, such as "random words". Measurements against harder
        baselines belong to the same claim: its headline says whether the strongest was beaten.
    interval_over : str, default "pictures"
        What was drawn again for the interval: one of :data:`OBSERVATIONS`.
    choice : str, default "fixed"
        How a layer or a setting was picked: "fixed" before anything was measured, on "validation"
        data, or as the "least favourable" one for the claim.
    scale : str, optional
        "pocket", "second", "published" or "own"; by default told from the name of the model.
    chapter : str, default ""
        The chapter that measured.
    variant : str, default ""
        What tells measurements of one claim apart: a layer, a task, a setting.
    folder : path, optional
        Where records lie; by default ``$XLVLMS_CLAIMS``, else ``_build/claims`` of the book.

    Returns
    -------
    dict
        What was written: the parts of the name, value, low, high, n, verdict, between_machines,
        alone (the interval measured here) and versions.

    Raises
    ------
    InputError
        If the register does not hold the id, or ``interval_over``, ``choice`` or ``scale`` is not
        one of those allowed.
    FileError
        If the estimate is not an Estimate, or model, dataset, seeds or ``against`` are missing. If
        the record cannot be written. If a page that is built for the book records two different
        measurements under one name.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.claims import record
    >>> from xlvlms_tutorial.metrics import Estimate
    >>> effect = Estimate(0.31, 0.28, 0.34, 200)
    >>> with TemporaryDirectory() as folder:
    ...     entry = record(
    ...         "IMA-1",
    ...         effect,
    ...         model="pocket-llava",
    ...         dataset="scenes",
    ...         seeds=0,
    ...         against="shuffled modality labels",
    ...         folder=folder,
    ...     )
    >>> entry["verdict"], entry["seeds"]
    ('confirmed', [0])
    """
    claimed = claim(claim_id)
    numbers = [int(seed) for seed in np.atleast_1d(seeds)]
    if not isinstance(estimate, Estimate):
        raise damaged_record(
            f"record of {claim_id}", f"{estimate!r} is not an Estimate with value, low, high and n"
        )
    if not model or not dataset or not numbers:
        raise damaged_record(
            f"record of {claim_id}",
            f"model={model!r}, dataset={dataset!r}, seeds={numbers} must all be given",
        )
    if not against:
        raise damaged_record(
            f"record of {claim_id} ({variant or chapter})",
            "nothing to measure against; say in against= what the effect was compared with",
        )
    scale = scale_of(model) if scale is None else scale
    require_one_of(interval_over, OBSERVATIONS, f"interval_over of {claim_id}")
    require_one_of(choice, CHOICES, f"choice of {claim_id}")
    require_one_of(scale, SCALES, f"scale of {claim_id}")
    key = {
        "id": claim_id,
        "chapter": chapter,
        "model": model,
        "dataset": dataset,
        "seeds": numbers,
        "variant": variant,
    }
    others = spread.of(key, estimate)
    combined = spread.joined(estimate, others)
    combined_verdict = verdict(claimed, combined)
    separate_verdicts = {verdict(claimed, interval) for interval in (estimate, *others)}
    entry = {
        **key,
        "against": against,
        "interval_over": interval_over,
        "choice": choice,
        "scale": scale,
        "test": claimed.test,
        **combined.asdict(),
        "verdict": combined_verdict,
        BETWEEN: separate_verdicts != {combined_verdict},
        "alone": [float(estimate.low), float(estimate.high)],
        "versions": versions(),
    }
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{claim_id}-{model}-{dataset}")[:80]
    file = Path(folder or default_folder()) / f"{slug}-{digest(key)[:12]}.json"
    _refuse_second(file, entry)
    write_json(file, entry)
    return entry


def scale_of(model: str) -> str:
    """Tell from a model's name on what scale a measurement is.

    Use it where records are made by hand; :func:`record` does it by itself.

    Parameters
    ----------
    model : str
        The name, as :func:`~xlvlms_tutorial.load` takes it.

    Returns
    -------
    str
        "pocket" for the models of this package, "published" for a name of the hub, "own" for a
        folder and all else.

    Examples
    --------
    >>> from xlvlms_tutorial.claims.claims import scale_of
    >>> scale_of("pocket-llava"), scale_of("llava-hf/llava-1.5-7b-hf"), scale_of("./mine")
    ('pocket', 'published', 'own')
    """
    if model.startswith("pocket-"):
        return "pocket"
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) and not Path(model).exists()
    return "published" if on_hub else "own"


# What this process has recorded, by file.
_WRITTEN: dict[Path, list[object]] = {}


def _refuse_second(file: Path, entry: Mapping[str, object]) -> None:
    """Refuse another measurement under a name that this process has used.

    Only where a page is built: whoever works in a notebook runs a cell again with other settings.
    """
    numbers = [entry[name] for name in ("value", "low", "high", "n")]
    earlier = _WRITTEN.setdefault(file, numbers)
    if earlier != numbers and os.environ.get(ONE_RECORD):
        name = spread.name_of(entry)
        raise damaged_record(
            f"record {name}", "recorded twice with other numbers; give each its own variant"
        )
    _WRITTEN[file] = numbers


def sentence(measured: dict[str, object]) -> str:
    """Write a measurement as one line.

    Use it to print what :func:`record` returned.

    Parameters
    ----------
    measured : dict
        A record, or a row of :func:`merge` that is measured.

    Returns
    -------
    str
        Id, verdict, value with its interval, and the test.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import sentence
    >>> numbers = {"value": 0.31, "low": 0.28, "high": 0.34}
    >>> sentence({"id": "IMA-1", "verdict": "confirmed", **numbers})
    'IMA-1 confirmed: 0.31 [0.28, 0.34], claimed > 0'
    """
    interval = f"[{measured['low']:.3g}, {measured['high']:.3g}]"
    if measured.get("interval_over") == "random orders":
        interval = f"(random orders: {interval[1:-1].replace(', ', ' to ')})"
    between = " between machines" if measured.get(BETWEEN) else ""
    return (
        f"{measured['id']} {measured['verdict']}{between}: {measured['value']:.3g} {interval}, "
        f"claimed {claim(measured['id']).test}"
    )


def merge(
    folder: str | Path | None = None,
    more: Iterable[Mapping[str, object]] = (),
) -> list[dict[str, object]]:
    """List every claim with every measurement of it, in the register's order.

    Use it for the ledger: :func:`ledger`, :func:`overview` and :func:`counts` take its entries.

    Parameters
    ----------
    folder : path, optional
        Where records lie; by default ``$XLVLMS_CLAIMS``, else ``_build/claims`` of the book. A
        folder that is not there holds none.
    more : iterable of mapping, default ()
        Records from elsewhere, such as the measurements of a batch; one that a record of the folder
        repeats is not listed twice.

    Returns
    -------
    list of dict
        One entry a claim and measurement: the fields of :class:`Claim`, and verdict, value, low,
        high, n, seeds, model, dataset, chapter, variant, against, interval_over, choice, scale,
        versions and between_machines of the measurement. The verdicts are computed again from the
        numbers. A claim without a measurement has the verdict "not measured" and None elsewhere.

    Raises
    ------
    FileError
        If a record is damaged or incomplete, or two files hold a record of one name.
    InputError
        If a record names a claim that the register does not hold.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.claims import CLAIMS, merge
    >>> with TemporaryDirectory() as folder:
    ...     entries = merge(folder)
    >>> len(entries) == len(CLAIMS), entries[0]["verdict"]
    (True, 'not measured')
    """
    unmeasured = dict.fromkeys(MEASURED) | {"verdict": "not measured", BETWEEN: False}
    measured: dict[str, list[dict[str, object]]] = {name: [] for name in CLAIMS}
    rows = _rows(folder)
    rows += [judged(record, "a record") for record in more]
    for row in rows:
        if row not in measured[row["id"]]:
            measured[row["id"]].append(row)
    entries = []
    for registered in CLAIMS.values():
        for row in measured[registered.id] or [unmeasured]:
            entries.append(asdict(registered) | row)
    return entries


def _rows(folder: str | Path | None) -> list[dict[str, object]]:
    folder = Path(folder or default_folder())
    try:
        files = sorted(folder.iterdir())
    except FileNotFoundError:
        return []  # nothing is measured yet
    except OSError as cause:
        raise damaged_record(folder, f"no folder of records ({cause.strerror})") from cause
    rows = []
    names: dict[str, Path] = {}
    for file in files:
        if file.suffix == ".json" and not file.name.startswith("."):
            row = judged(read_record(file), file)
            first = names.setdefault(spread.name_of(row), file)
            if first != file:
                raise damaged_record(file, f"a second record of the name of {first.name}")
            rows.append(row)
    return rows


def read_record(file: Path) -> object:
    """Read what a file of :func:`record` holds; whether it is a record, :func:`judged` says.

    Raises
    ------
    FileError
        If it is no JSON.
    """
    with reading(file, "not a record of a measurement"):
        return read_json(file)


def judged(record: Any, where: object) -> dict[str, object]:
    """Give a record the verdict that follows from its numbers, whatever verdict it carries.

    Parameters
    ----------
    record : mapping
        What :func:`record` wrote.
    where : object
        The file or run it comes from, for messages.

    Returns
    -------
    dict
        Id, the measured fields, verdict and between_machines.

    Raises
    ------
    FileError
        If the record is incomplete, or its numbers are no estimate.
    InputError
        If it names a claim that the register does not hold.
    """
    with reading(where, "not a record of a measurement"):
        row = {name: record[name] for name in ("id", *MEASURED)}
        for name, kind in _KINDS.items():
            if not _is_kind(kind, row[name]):
                raise ValueError(f"{name} is {row[name]!r}")
        for name, allowed in _ALLOWED.items():
            if row[name] not in allowed:
                raise ValueError(f"{name} is {row[name]!r}; allowed: {', '.join(allowed)}")
        if not row["against"]:
            raise ValueError("against is empty: a record needs what it was measured against")
        numbers = {field.name: record[field.name] for field in fields(Estimate)}
        estimate = Estimate(**numbers)
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
    # results of earlier versions do not say it
    between = {BETWEEN: bool(record.get(BETWEEN, False))}
    return row | {"verdict": verdict(claim(row["id"]), estimate)} | between
