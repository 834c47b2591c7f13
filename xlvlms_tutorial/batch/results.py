"""Gather the results files of a batch.

Parquet for analysis, the ledger as JSON for machines, a report for people.
"""

import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from xlvlms_tutorial.batch.job import PLAN, RUNS, read_plan
from xlvlms_tutorial.batch.run import FAILURE, RESULTS, read_results
from xlvlms_tutorial.claims.claims import CLAIMS, Claim, judged
from xlvlms_tutorial.errors import FileError, InputError, XlvlmsError, damaged_record
from xlvlms_tutorial.io import read_json, write_atomically, write_json, write_utf8

FILES = ("runs.parquet", "measurements.parquet", "claims.json", "report.md")
STATES = ("done", "failed", "missing", "damaged")
_WHERE = ("model", "dataset", "variant")
_MEASURED = (
    "against",
    "interval_over",
    "choice",
    "scale",
    "chapter",
    "seeds",
    "value",
    "low",
    "high",
    "n",
    "verdict",
    "run",
)
_CLAIMED = (
    "metric",
    "rival",
    "direction",
    "null",
    "margin",
    "test",
    "fidelity",
    "reason",
    "about",
    "effect",
)


@dataclass
class Gathered:
    """What a batch has come to.

    :func:`gather` and :func:`reproduce` return one.

    Parameters
    ----------
    states : dict of str to str
        A state for each run: done, failed, missing or damaged.
    results : dict of str to dict
        The content of the results files of runs that are done.
    problems : dict of str to str
        What went wrong, for runs that are not done.
    rows : list of dict
        The rows of the table of runs, one a run that is done.
    measurements : list of dict
        The measurements of claims, each with its verdict and its run.

    Examples
    --------
    >>> from xlvlms_tutorial.batch import Gathered
    >>> gathered = Gathered(states={"outside-s0": "done", "outside-s1": "failed"})
    >>> gathered.count("done")
    1
    """

    states: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, object]] = field(default_factory=list)
    measurements: list[dict[str, object]] = field(default_factory=list)

    def add(self, name: str, result: dict[str, object]) -> None:
        """Take the results of a run that is done.

        Its row of the table of runs, and its measurements with their verdicts. Nothing of it is
        taken where a part of it cannot be used, so that one bad run leaves the others alone.

        Parameters
        ----------
        name : str
            The name of the run.
        result : dict
            The content of its results file, from :func:`read_results`.

        Raises
        ------
        FileError, InputError
            If a measurement cannot be judged, or what is said of the run is not what a run says.
        """
        try:
            row = _row(name, result)
            measured = [judged(record, name) | {"run": name} for record in result["claims"]]
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            if isinstance(cause, XlvlmsError):
                raise
            raise damaged_record(
                name, f"no results of a run ({type(cause).__name__}: {cause})"
            ) from cause
        self.rows.append(row)
        self.measurements += measured
        self.results[name], self.states[name] = result, "done"

    def count(self, state: str) -> int:
        """Count the runs in a state.

        Parameters
        ----------
        state : str
            "done", "failed", "missing" or "damaged".

        Returns
        -------
        int
            How many there are.
        """
        return list(self.states.values()).count(state)


def gather(batch: str | Path, write: bool = True) -> Gathered:
    """Read the results of every run of a batch, and write its tables and report.

    Use it while a batch runs, or after it. A run whose results are damaged or missing is named, and
    the rest are gathered.

    Parameters
    ----------
    batch : path
        The folder of the batch.
    write : bool, default True
        Whether ``runs.parquet``, ``measurements.parquet``, ``claims.json`` and ``report.md`` are
        written into the folder.

    Returns
    -------
    Gathered
        The states and results of all runs.

    Raises
    ------
    FileError
        If the folder holds no plan of a batch. If a file cannot be written.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.batch import gather
    >>> with TemporaryDirectory() as folder:
    ...     size = (Path(folder) / "plan.json").write_text('{"runs": [{"id": "outside-s0"}]}')
    ...     gathered = gather(folder, write=False)
    >>> gathered.states, gathered.problems
    ({'outside-s0': 'missing'}, {'outside-s0': 'not run yet'})
    """
    batch = Path(batch)
    gathered = Gathered()
    for name in read_plan(batch / PLAN)["runs"]:
        folder = batch / RUNS / name
        try:
            gathered.add(name, read_results(folder / RESULTS))
        except (FileError, InputError) as error:
            if (folder / RESULTS).exists():
                gathered.states[name] = "damaged"
                gathered.problems[name] = str(error)
                continue
            failed = (folder / FAILURE).exists()
            gathered.states[name] = "failed" if failed else "missing"
            gathered.problems[name] = _failure(folder / FAILURE, batch / "logs" / f"{name}.log")
    if write:
        _write(batch, gathered)
    return gathered


def measurements(path: str | Path) -> list[dict[str, object]]:
    """Read the claims that a batch, or one run, has measured.

    Use it to put the measurements of a batch into the ledger: ``claims.merge(more=...)``. A warning
    names the runs of a batch that are damaged.

    Parameters
    ----------
    path : path
        The folder of a batch or of a run, or a results file.

    Returns
    -------
    list of dict
        The records with their verdicts.

    Raises
    ------
    FileError
        If there are no results, or they are damaged.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.batch import measurements
    >>> with TemporaryDirectory() as folder:
    ...     size = (Path(folder) / "plan.json").write_text('{"runs": [{"id": "outside-s0"}]}')
    ...     records = measurements(folder)
    >>> records  # nothing was run yet
    []
    """
    path = Path(path)
    if (path / PLAN).exists():
        batch = gather(path, write=False)
        damaged = []
        for name, state in batch.states.items():
            if state == "damaged":
                damaged.append(f"{name} ({batch.problems[name]})")
        if damaged:
            warnings.warn(f"left out of {path}, damaged: {'; '.join(damaged)}", stacklevel=2)
        return batch.measurements
    file = path / RESULTS if path.is_dir() else path
    records = read_results(file)["claims"]
    return [judged(record, file) for record in records]


def _failure(file: Path, log: Path) -> str:
    """What a failure report says in one line, or where there is none the last line of the log."""
    try:
        report = read_json(file)
        location = "" if report["cell"] is None else f" (cell [{report['cell']}])"
        return f"{report['error']}{location}: {' '.join(str(report['message']).split())}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = text.strip().split("\n")
    return lines[-1].strip() or "not run yet"


def run_table(gathered: Gathered) -> pd.DataFrame:
    """List the runs that are done, one a row.

    Columns: run, chapter, parameters, seconds (in all, of its cells, of all else), peak memory,
    machine and versions.
    """
    return pd.DataFrame(gathered.rows)


def _row(name: str, result: Mapping[str, Any]) -> dict[str, object]:
    """Return the row of a run in the table of runs."""
    row: dict[str, object] = {"run": name, "chapter": result["chapter"]}
    parameters = result["parameters"]
    for key in ("model", "dataset", "seed", "n_samples"):
        if key in parameters:
            row[key] = parameters[key]
    row["parameters"] = json.dumps(parameters)
    seconds = result["seconds"]
    for key, value in seconds.items():
        row[f"seconds_{key}"] = value
    row["seconds_overhead"] = round(seconds["total"] - seconds["cells"], 3)
    row = row | result["memory"]
    if row["peak_bytes"] is not None:
        row["peak_bytes"] = int(row["peak_bytes"])
    for key in ("started", "commit", "code"):
        row[key] = result[key]
    row = row | result["machine"]
    row["versions"] = json.dumps(result["versions"])
    row["claims"] = len(result["claims"])
    return row


def pooled(verdicts: Iterable[str]) -> str:
    """Give one verdict for several, such as those of all seeds.

    Parameters
    ----------
    verdicts : iterable of str
        Verdicts, such as "confirmed".

    Returns
    -------
    str
        Theirs if they agree, "undecided" if not, "not measured" if there are none.

    Examples
    --------
    >>> from xlvlms_tutorial.batch import pooled
    >>> pooled(["confirmed", "confirmed"]), pooled(["confirmed", "refuted"]), pooled([])
    ('confirmed', 'undecided', 'not measured')
    """
    distinct = set(verdicts)
    if not distinct:
        return "not measured"
    return distinct.pop() if len(distinct) == 1 else "undecided"


def summary(measurements: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """Pool the verdicts of each claim on each model, dataset and variant over all seeds.

    Columns id, model, dataset, variant, verdict, n. "confirmed" if all ``n`` measurements confirm,
    "refuted" if all refute, else "undecided".
    """
    columns = ["id", *_WHERE, "verdict"]
    table = pd.DataFrame(measurements, columns=columns)
    grouped = table.groupby(["id", *_WHERE], sort=False)["verdict"]
    return grouped.agg(verdict=pooled, n="size").reset_index()


def ledger(measurements: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
    """List every claim of the register for machines.

    What is claimed and how near the measurement comes to it, the verdict by model over all
    measurements, and these, each with what it was measured against.
    """
    by_claim: dict[str, list[Mapping[str, object]]] = {}
    for measurement in measurements:
        by_claim.setdefault(str(measurement["id"]), []).append(measurement)
    entries = []
    for claimed in CLAIMS.values():
        entries.append(_entry(claimed, by_claim.get(claimed.id, [])))
    return entries


def _entry(claimed: Claim, rows: list[Mapping[str, object]]) -> dict[str, object]:
    """Return what a batch has measured of a claim, with verdicts pooled over its runs."""
    verdicts: dict[str, list[str]] = {}
    for row in rows:
        verdicts.setdefault(str(row["model"]), []).append(str(row["verdict"]))
    by_model = {model: pooled(of_model) for model, of_model in verdicts.items()}
    entry = {
        "id": claimed.id,
        "statement": claimed.statement,
        "source": {"paper": claimed.paper, "where": claimed.where},
    }
    for name in _CLAIMED:
        entry[name] = getattr(claimed, name)
    entry["verdict"] = pooled(str(row["verdict"]) for row in rows)
    entry["by_model"] = by_model
    entry["measurements"] = []
    for row in rows:
        measurement = {name: row.get(name) for name in (*_WHERE, *_MEASURED)}
        entry["measurements"].append(measurement)
    return entry


def _write(batch: Path, gathered: Gathered) -> None:
    measured = gathered.measurements
    rows = []
    for measurement in measured:
        rows.append(measurement | {"versions": json.dumps(measurement["versions"])})
    _write_parquet(batch / "runs.parquet", run_table(gathered))
    _write_parquet(batch / "measurements.parquet", pd.DataFrame(rows))
    write_json(batch / "claims.json", ledger(measured))
    write_utf8(batch / "report.md", report(gathered))


def _write_parquet(file: Path, table: pd.DataFrame) -> None:
    """Write a table; a column of several types, or of numbers that are too large, as JSON text.

    Parquet has one type a column.
    """
    table = table.copy()
    for name in table:
        try:
            pa.Array.from_pandas(table[name])
        except (pa.ArrowException, OverflowError, ValueError):
            table[name] = table[name].map(json.dumps)
    write_atomically(file, partial(table.to_parquet, index=False))


def report(gathered: Gathered) -> str:
    """Write the batch in words, as Markdown.

    How many runs are done, what went wrong where, times, and verdicts by model.
    """
    counts = Counter(gathered.states.values())
    listed = []
    for state in STATES:
        if counts[state]:
            listed.append(f"{counts[state]} {state}")
    parts = [f"# {len(gathered.states)} runs: {', '.join(listed) or 'none'}"]
    if gathered.problems:
        lines = []
        for name, problem in gathered.problems.items():
            lines.append(f"- `{name}` {gathered.states[name]}: {' '.join(problem.split())}")
        parts += [
            "## Not done",
            "\n".join(lines),
            f"Tracebacks: `{RUNS}/RUN/{FAILURE}`, the notebook beside it; logs: `logs/RUN.log`.",
        ]
    if gathered.results:
        parts += ["## Times and memory", _table(_times(run_table(gathered)))]
    if gathered.measurements:
        parts += ["## Verdicts over seeds", _table(summary(gathered.measurements))]
    return "\n\n".join(parts) + "\n"


def _times(table: pd.DataFrame) -> pd.DataFrame:
    names = {
        "seconds_total": "seconds",
        "seconds_cells": "in cells",
        "seconds_overhead": "overhead",
    }
    memory = (table["peak_bytes"].astype(float) / 1e9).round(2)
    return table[["run", *names]].rename(columns=names).assign(**{"peak GB": memory})


def _table(table: pd.DataFrame) -> str:
    lines = [map(str, table.columns), ["---"] * len(table.columns)]
    lines += table.astype(str).to_numpy().tolist()
    rows = []
    for line in lines:
        cells = map(_cell, line)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    """A text in one line, without the sign that parts cells."""
    return " ".join(text.replace("|", "/").split())


def main() -> None:
    """Gather the batch in the folder that the command line names.

    Exit code 1 unless all of its runs are done.
    """
    try:
        gathered = gather(sys.argv[1])
    except XlvlmsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.exit(int(bool(gathered.problems)))


if __name__ == "__main__":
    main()
