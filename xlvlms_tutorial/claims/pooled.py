"""Pool what many runs measured: one effect for each claim, setting and model.

A chapter measures its claims on the samples of one seed. The runs of a batch repeat it with other
seeds, other connectors and another language model. What they measured lies in the package, so that
every page can say what came of it; ``make reproduce FULL=1`` makes the rest of the grid.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, nan, sqrt
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from xlvlms_tutorial.claims.claims import CLAIMS, Claim, claim, judged, verdict
from xlvlms_tutorial.claims.headlines import distance
from xlvlms_tutorial.errors import InputError, damaged_record, incomparable
from xlvlms_tutorial.io import read_json, reading, write_atomically, write_json
from xlvlms_tutorial.metrics.intervals import Estimate
from xlvlms_tutorial.validation import require

FILE = Path(__file__).with_name("runs.parquet")
_SETTING = ("id", "chapter", "model", "dataset", "variant")
# What runs of one setting share; where they do not, something was changed between them.
_SHARED = {
    "test": "bar",
    "against": "baseline",
    "interval_over": "population (interval_over)",
    "choice": "choice of a setting",
    "scale": "scale",
    "recipe": "recipe (code and parameters of the chapter)",
}
_NUMBERS = ("value", "low", "high", "n")
_COLUMNS = (*_SETTING, "seeds", *_SHARED, *_NUMBERS, "verdict", "between_machines")
_Z = NormalDist().inv_cdf(0.975)
_MAX_SAMPLES, _MAX_RUNS = 10**6, 1000  # what needs more is not decided in practice


@dataclass(frozen=True)
class Pooled:
    """What several runs say together; :func:`random_effects` returns one.

    Parameters
    ----------
    estimate : Estimate
        The mean effect over runs with its interval of 95 %; ``n`` is the sum of the runs' samples.
    runs : int
        The number of runs, k.
    between : float
        The between-seed spread τ: the standard deviation of the true effect from run to run, in the
        unit of the effect. NaN for one run.
    inconsistency : float
        I², the share of the spread of the runs' values that their own intervals do not explain, 0
        to 1. NaN for one run.
    """

    estimate: Estimate
    runs: int
    between: float
    inconsistency: float


def random_effects(estimates: Sequence[Estimate]) -> Pooled:
    r"""Pool the estimates of independent runs whose true effects may differ.

    Use it for one measurement that was made with several seeds. Run i of k measured :math:`y_i`
    with the standard error :math:`s_i`, its interval's width over 3.92. With
    :math:`v_i = 1/s_i^2`, their weighted mean :math:`\bar y` and
    :math:`Q = \sum v_i (y_i - \bar y)^2`, the variance between runs is

    .. math:: \tau^2 = \max(0, (Q - k + 1) / (\sum v_i - \sum v_i^2 / \sum v_i))

    in closed form (DerSimonian and Laird, 1986). With :math:`w_i = 1 / (s_i^2 + \tau^2)` the pooled
    effect is :math:`\mu = \sum w_i y_i / \sum w_i`, and its interval is

    .. math:: \mu \pm t_{k-1} \sqrt{\max(1, q) / \sum w_i}, \quad
        q = \sum w_i (y_i - \mu)^2 / (k - 1)

    (Knapp and Hartung, 2003; q is not let below 1, so that runs which agree by luck do not make
    it too narrow). :math:`I^2 = \max(0, 1 - (k - 1) / Q)`. A run whose interval has no width, since
    all its samples were alike, is weighted as the run with the widest.

    Parameters
    ----------
    estimates : sequence of Estimate
        One for each run, (k,). A single one is returned with its interval unchanged.

    Returns
    -------
    Pooled
        The pooled effect, the number of runs, and how much they differ.

    Raises
    ------
    InputError
        If there is no estimate.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import random_effects
    >>> from xlvlms_tutorial.metrics import Estimate
    >>> runs = [Estimate(y, y - 0.1, y + 0.1, n=50) for y in (0.2, 0.3, 0.4)]
    >>> pooled = random_effects(runs)
    >>> print(pooled.estimate, pooled.runs, f"{pooled.between:.3f}")
    0.30 [0.05, 0.55] 3 0.086
    """
    require(len(estimates) > 0, "no estimates to pool", "give at least one run")
    if len(estimates) == 1:
        return Pooled(estimates[0], 1, nan, nan)
    values = np.array([float(estimate.value) for estimate in estimates])
    widths = np.array([float(estimate.high) - float(estimate.low) for estimate in estimates])
    widest = widths.max() or 1e-9
    errors = np.where(widths > 0, widths, widest) / (2 * _Z)
    k = len(values)
    fixed = errors**-2
    q_total = float(fixed @ (values - np.average(values, weights=fixed)) ** 2)
    scale = float(fixed.sum() - (fixed**2).sum() / fixed.sum())
    tau2 = max(0.0, (q_total - k + 1) / scale)
    weights = 1 / (errors**2 + tau2)
    mean = float(np.average(values, weights=weights))
    q = float(weights @ (values - mean) ** 2) / (k - 1)
    half = float(stdtrit(k - 1, 0.975)) * sqrt(max(1.0, q) / float(weights.sum()))
    inconsistency = max(0.0, 1 - (k - 1) / q_total) if q_total > 0 else 0.0
    n = sum(int(estimate.n) for estimate in estimates)
    return Pooled(Estimate(mean, mean - half, mean + half, n), k, sqrt(tau2), inconsistency)


def samples_needed(claimed: Claim, estimate: Estimate) -> int | None:
    """Compute how many samples would decide a measurement of one run, if its value stayed.

    Use it for the plan of a further run. An interval shrinks with the root of its samples, so
    ``n (half / distance)²`` samples bring its end to the bar, with ``half`` half its width and
    ``distance`` that of the value from the bar. A new run of this size decides about every second
    time, since its value moves as well.

    Parameters
    ----------
    claimed : Claim
        The claim.
    estimate : Estimate
        The measured effect.

    Returns
    -------
    int or None
        The number of samples in all. None where a million would not do.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import claim
    >>> from xlvlms_tutorial.claims.pooled import samples_needed
    >>> from xlvlms_tutorial.metrics import Estimate
    >>> samples_needed(claim("IMA-1"), Estimate(0.05, -0.05, 0.15, n=100))
    400
    """
    from_bar = abs(distance(claimed, float(estimate.value)))
    half = (float(estimate.high) - float(estimate.low)) / 2
    needed = int(estimate.n) * (half / from_bar) ** 2 if from_bar else float("inf")
    return ceil(needed - 1e-9) if needed <= _MAX_SAMPLES else None


def runs_needed(claimed: Claim, pooled: Pooled) -> int | None:
    r"""Compute how many runs of the same size would decide a pooled measurement.

    Use it for the plan of a batch. With the variance :math:`V` of one run, between runs and within
    them together, the half width of k runs is :math:`t_{k-1} \sqrt{V / k}`; the answer is the
    smallest k whose half width is below the distance from the bar. Spread and value are taken to
    stay; as for :func:`samples_needed` this decides about every second time.

    Parameters
    ----------
    claimed : Claim
        The claim.
    pooled : Pooled
        What two or more runs say together.

    Returns
    -------
    int or None
        The number of runs in all. None where a thousand would not do.

    Raises
    ------
    InputError
        If it is of one run, which says nothing about the spread between runs.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import claim, random_effects
    >>> from xlvlms_tutorial.claims.pooled import runs_needed
    >>> from xlvlms_tutorial.metrics import Estimate
    >>> runs = [Estimate(y, y - 0.1, y + 0.1, n=50) for y in (0.0, 0.05, 0.1)]
    >>> runs_needed(claim("IMA-1"), random_effects(runs))
    7
    """
    require(pooled.runs > 1, "one run has no spread between runs", "give two or more")
    estimate = pooled.estimate
    from_bar = abs(distance(claimed, float(estimate.value)))
    half = (float(estimate.high) - float(estimate.low)) / 2
    # the standard deviation of one run
    spread = half / float(stdtrit(pooled.runs - 1, 0.975)) * sqrt(pooled.runs)
    for k in range(2, _MAX_RUNS + 1):
        if float(stdtrit(k - 1, 0.975)) * spread / sqrt(k) < from_bar:
            return k
    return None


def pool(records: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
    """Pool the records of many runs: one entry for each claim, setting and model.

    Use it before :func:`headlines`, which takes what it returns. Runs of one setting differ in
    their seeds alone. Where the numbers of all of them are the same, the measurement does not
    depend on the seed and counts as one run. Ranges of random orders are no intervals of a value,
    so that they are left out.

    Parameters
    ----------
    records : iterable of mapping
        What :func:`record` wrote in each run, or :func:`~xlvlms_tutorial.batch.measurements` reads.
        They may carry "test" (the bar that they were held against) and "recipe" (a digest of the
        code and the parameters of the chapter).

    Returns
    -------
    list of dict
        In the order of the register: the fields of a record with the pooled value, low, high, n and
        verdict, all seeds, and runs, between, inconsistency (:class:`Pooled`), same_sign (whether
        all runs lie on one side of the bar), needed_runs and needed_samples (:func:`runs_needed`,
        :func:`samples_needed`; None where the verdict is not "undecided").

    Raises
    ------
    InputError
        If there are no records; two runs of one setting share a seed; or they come from different
        versions of a claim (its bar, direction or population) or different recipes.
    FileError
        If a record is damaged.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import pool, read_runs
    >>> entries = pool(read_runs())
    >>> all(entry["low"] <= entry["value"] <= entry["high"] for entry in entries)
    True
    """
    groups: dict[tuple[str, ...], list[dict[str, object]]] = {}
    for record in records:
        row = _row(record)
        groups.setdefault(tuple(str(row[name]) for name in _SETTING), []).append(row)
    require(len(groups) > 0, "no records to pool", "run a batch first: make reproduce FULL=1")
    order = {name: number for number, name in enumerate(CLAIMS)}
    entries = []
    for key in sorted(groups, key=lambda key: (order[key[0]], *key[1:])):
        rows = groups[key]
        _require_one_experiment(rows)
        if rows[0]["interval_over"] != "random orders":
            entries.append(_pooled_entry(rows))
    return entries


def _row(record: Mapping[str, object]) -> dict[str, object]:
    """A record with its verdict of today; one of another version of its claim is refused."""
    row = judged(record, f"a record of {record.get('id', 'no claim')}")
    bar = claim(str(row["id"])).test
    where = f"{row['id']} ({row['variant'] or row['chapter']})"
    advice = "the claim was changed since this run: run its chapter again"
    earlier = record.get("test", bar)
    if earlier != bar:
        raise incomparable(f"bars of {where} in a run and in the register", earlier, bar, advice)
    if row["verdict"] != record["verdict"]:
        what = f"verdicts of {where} in a run and by the register"
        raise incomparable(what, record["verdict"], row["verdict"], advice)
    return row | {"test": bar, "recipe": str(record.get("recipe", ""))}


def _require_one_experiment(rows: Sequence[Mapping[str, object]]) -> None:
    """Refuse runs that share a seed, or that are not the same experiment."""
    first = rows[0]
    where = f"{first['id']} ({first['variant'] or first['chapter']}) on {first['model']}"
    used: set[int] = set()
    for row in rows:
        repeated = used & set(row["seeds"])
        if repeated:
            raise InputError(
                f"two runs of {where} share the seeds {sorted(repeated)}",
                "give each run once, and runs whose samples do not overlap",
            )
        used |= set(row["seeds"])
        for name, meaning in _SHARED.items():
            if row[name] != first[name]:
                advice = "they come from different versions of a chapter: run all with one"
                raise incomparable(f"{meaning} of runs of {where}", first[name], row[name], advice)


def _pooled_entry(rows: Sequence[dict[str, object]]) -> dict[str, object]:
    estimates = [Estimate(*(row[name] for name in _NUMBERS)) for row in rows]
    claimed = claim(str(rows[0]["id"]))
    if len(set(map(_numbers_of, estimates))) == 1:
        estimates = estimates[:1]  # the same numbers for all seeds: nothing was drawn again
    pooled = random_effects(estimates)
    outcome = verdict(claimed, pooled.estimate)
    needed_runs = needed_samples = None
    if outcome == "undecided" and pooled.runs == 1:
        needed_samples = samples_needed(claimed, pooled.estimate)
    elif outcome == "undecided":
        needed_runs = runs_needed(claimed, pooled)
        if needed_runs:
            needed_samples = ceil(needed_runs * pooled.estimate.n / pooled.runs)
    sides = {distance(claimed, float(estimate.value)) > 0 for estimate in estimates}
    seeds = set()
    for row in rows:
        seeds.update(row["seeds"])
    return rows[0] | {
        **pooled.estimate.asdict(),
        "seeds": sorted(seeds),
        "verdict": outcome,
        "runs": pooled.runs,
        "between": pooled.between,
        "inconsistency": pooled.inconsistency,
        "same_sign": len(sides) == 1,
        "needed_runs": needed_runs,
        "needed_samples": needed_samples,
    }


def _numbers_of(estimate: Estimate) -> tuple[float, ...]:
    return (estimate.value, estimate.low, estimate.high, estimate.n)


def write_runs(
    records: Iterable[Mapping[str, object]],
    file: str | Path,
    made_with: Mapping[str, object] | None = None,
) -> pd.DataFrame:
    """Write the measurements of many runs as one small table, and beside it what made them.

    Use it after a batch. The table is parquet; JSON of the same name has versions and hardware.

    Parameters
    ----------
    records : iterable of mapping
        The records of all runs, as for :func:`pool`, each with its versions.
    file : path
        The table.
    made_with : mapping of str to object, optional
        More to say in the JSON, such as the hardware.

    Returns
    -------
    pandas.DataFrame
        What was written, a row a run and measurement.

    Raises
    ------
    InputError
        If the records cannot be pooled, or come from different versions of the package.
    FileError
        If a record is damaged, or a file cannot be written.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.claims import read_runs
    >>> from xlvlms_tutorial.claims.pooled import write_runs
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / "runs.parquet"
    ...     table = write_runs(read_runs(), file)
    ...     same = len(read_runs(file)) == len(table)
    >>> same
    True
    """
    records = list(records)
    pool(records)  # refuses what does not belong together
    versions = records[0]["versions"]
    rows = []
    for record in records:
        if record["versions"] != versions:
            raise incomparable("versions of runs", versions, record["versions"], "use one")
        rows.append(_row(record))
    rows.sort(key=lambda row: [row[name] for name in (*_SETTING, "seeds")])
    table = pd.DataFrame(rows, columns=list(_COLUMNS))
    file = Path(file)
    write_atomically(file, partial(table.to_parquet, index=False))
    about = {"records": len(table), "versions": versions} | dict(made_with or {})
    write_json(file.with_suffix(".json"), about)
    return table


def read_runs(file: str | Path | None = None) -> list[dict[str, object]]:
    """Read the measurements of runs that :func:`~xlvlms_tutorial.claims.pooled.write_runs` wrote.

    Use it for :func:`pool`.

    Parameters
    ----------
    file : path, optional
        The table; by default that of the package.

    Returns
    -------
    list of dict
        The records, with the versions that made them.

    Raises
    ------
    FileError
        If the table, or the JSON beside it, is missing or damaged.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import read_runs
    >>> {"id", "model", "seeds", "value", "low", "high"} <= set(read_runs()[0])
    True
    """
    file = FILE if file is None else Path(file)
    with reading(file, "not a table of runs"):
        about = read_json(file.with_suffix(".json"))
        versions = about["versions"]
        table = pd.read_parquet(file)[list(_COLUMNS)]
        records = table.to_dict("records")
    if len(records) != about["records"]:
        raise damaged_record(file, f"{len(records)} records of {about['records']}")
    for record in records:
        record["seeds"] = [int(seed) for seed in record["seeds"]]
        record["versions"] = versions
    return records
