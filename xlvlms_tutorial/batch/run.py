"""Run one chapter by papermill.

Checked parameters in, one results file out, or a report of what failed.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import papermill
from filelock import FileLock, Timeout
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError, strip_color

from xlvlms_tutorial.batch.chapters import checked, code_of, defaults, find_chapter, read_chapter
from xlvlms_tutorial.claims.claims import judged, read_record
from xlvlms_tutorial.errors import (
    FileError,
    InputError,
    RunError,
    XlvlmsError,
    damaged_record,
    not_written,
)
from xlvlms_tutorial.io import (
    FOLDER_VARIABLE,
    output_of,
    read_sealed,
    replacing,
    versions,
    write_json,
    write_sealed,
)

RESULTS, FAILURE, NOTEBOOK = "results.json", "failure.json", "notebook.ipynb"
FIELDS = (
    "chapter",
    "code",
    "parameters",
    "given",
    "claims",
    "versions",
    "commit",
    "started",
    "seconds",
    "memory",
    "machine",
)
_WORK = ".work-"
# Runs after the chapter's own cells and is taken out of the notebook that is kept
_MEASURE = (
    "import json as _json\n"
    "from xlvlms_tutorial.io import peak_memory\n"
    "print(_json.dumps(peak_memory()))"
)


@dataclass(frozen=True)
class Chapter:
    """A chapter that was read: its file, its notebook, its parameters with their defaults."""

    file: Path
    notebook: NotebookNode
    defaults: Mapping[str, object]

    def run(self, parameters: Mapping[str, object] | None = None) -> "Run":
        """Make a run of the chapter with checked parameters.

        Raises what :func:`prepare` raises of them.
        """
        values = checked(self.file.stem, self.defaults, parameters or {})
        return Run(self.file, self.notebook, values, {**self.defaults, **values})


@dataclass(frozen=True)
class Run:
    """A chapter with the parameters given to it (``given``), and all it takes (``parameters``)."""

    file: Path
    notebook: NotebookNode
    given: Mapping[str, object]
    parameters: Mapping[str, object]

    @property
    def origin(self) -> dict[str, object]:
        """What tells this run from others: the chapter, its code and its parameters."""
        plain = json.loads(json.dumps({"parameters": self.parameters, "given": self.given}))
        return {"chapter": self.file.stem, "code": code_of(self.notebook), **plain}


def opened(chapter: str | Path, folder: str | Path | None = None) -> Chapter:
    """Read a chapter once for as many runs as are wanted.

    Raises
    ------
    InputError
        If there is no such chapter, or its parameters cannot be read.
    """
    file = find_chapter(chapter, folder)
    notebook = read_chapter(file)
    return Chapter(file, notebook, defaults(notebook))


def prepare(
    chapter: str | Path,
    parameters: Mapping[str, object] | None = None,
    folder: str | Path | None = None,
) -> Run:
    """Read a chapter and check parameters for it, without running it.

    Use it to see what a run would take.

    Parameters
    ----------
    chapter : path
        A name, such as "outside", or a path to an .md or .ipynb file.
    parameters : mapping, optional
        Values by parameter, of the types of the defaults; by default all defaults.
    folder : path, optional
        The folder of the chapters; by default that of the book.

    Returns
    -------
    Run
        The chapter's ``file`` and ``notebook``, the parameters ``given`` and all ``parameters``.

    Raises
    ------
    InputError
        If there is no such chapter or parameter, or a value is of the wrong type.

    Examples
    --------
    >>> from xlvlms_tutorial.batch import prepare
    >>> run = prepare("outside", {"n_samples": 20})
    >>> run.given, run.parameters["model"]
    ({'n_samples': 20}, 'pocket-llava')
    """
    return opened(chapter, folder).run(parameters)


def run_chapter(
    chapter: str | Path,
    out: str | Path,
    parameters: Mapping[str, object] | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
    resume: bool = False,
) -> Path:
    """Run a chapter and return its results file, ``out/results.json``.

    Use it for a chapter with another model, dataset, seed or number of samples. The results file is
    written last, with the notebook beside it. ``out`` belongs to this run alone: what an earlier
    one left there is replaced. A chapter that fails leaves ``failure.json`` and its notebook.

    Parameters
    ----------
    chapter : path
        A name, such as "outside", or a path to an .md or .ipynb file.
    out : path
        The folder of the run.
    parameters : mapping, optional
        Values by parameter, of the types of the defaults; by default all defaults.
    folder : path, optional
        The folder of the chapters; by default that of the book.
    progress : bool, default False
        Whether a bar counts the cells.
    resume : bool, default False
        Whether whole results of the very same run are kept, and a process that is at it is waited
        for.

    Returns
    -------
    pathlib.Path
        The results file, for :func:`read_results`.

    Raises
    ------
    InputError
        If there is no such chapter or parameter, or a value is of the wrong type.
    RunError
        If the chapter fails, or another process is running it in the same folder.
    FileError
        If a file cannot be written.

    Examples
    --------
    >>> from xlvlms_tutorial.batch import read_results, run_chapter
    >>> file = run_chapter("outside", "runs/outside", {"n_samples": 20})  # doctest: +SKIP
    >>> read_results(file)["claims"]  # doctest: +SKIP
    """
    run = prepare(chapter, parameters, folder)
    out = Path(out).resolve()
    with _locked(out, wait=resume):
        if resume and same_run(out / RESULTS, run):
            return out / RESULTS
        return _run(run, out, progress)


def read_results(path: str | Path) -> dict[str, object]:
    """Read the content of a results file.

    Parameters
    ----------
    path : path
        The file, as :func:`run_chapter` returns it.

    Returns
    -------
    dict
        Its fields: chapter, code, parameters, given, claims, versions, commit, started, seconds,
        memory and machine.

    Raises
    ------
    FileError
        If the file is damaged: cut off, changed by hand, or without one of its fields.

    Examples
    --------
    >>> from xlvlms_tutorial.batch import read_results
    >>> read_results("runs/outside/results.json")["seconds"]["total"]  # doctest: +SKIP
    """
    content = read_sealed(path)
    missing = [name for name in FIELDS if name not in content]
    if missing:
        raise damaged_record(path, f"no results of a run ({', '.join(missing)} missing)")
    if not isinstance(content["claims"], list):
        raise damaged_record(path, "no results of a run (claims are no list)")
    return content


def same_run(path: Path, run: Run) -> bool:
    """Whether whole results of this very run stand at ``path``.

    Of the same chapter, code and parameters.
    """
    try:
        content = read_results(path)
    except FileError:
        return False  # none, or damaged: to be made again
    origin = run.origin
    recorded = {name: content[name] for name in origin}
    return recorded == origin


@contextmanager
def _locked(out: Path, wait: bool) -> Iterator[None]:
    """Hold the folder of a run; the operating system lets go of it when its holder is killed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=-1 if wait else 0):
            yield
    except Timeout:
        raise RunError(
            f"another process is running a chapter in {out}", "give another folder, or wait for it"
        ) from None
    except FileError:
        raise
    except OSError as cause:
        raise not_written(out, cause.strerror or cause) from cause


def _run(run: Run, out: Path, progress: bool) -> Path:
    """Execute a run in a folder of its own, and write its results or what failed."""
    for name in (RESULTS, FAILURE, NOTEBOOK):
        (out / name).unlink(missing_ok=True)
    for stale in out.glob(f"{_WORK}*"):  # by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=_WORK, dir=out))
    started = datetime.now(UTC)
    try:
        executed = _execute(run, work, progress)
        seconds = _seconds(executed, started)
        memory = _memory(executed.cells.pop())
        files = sorted((work / "claims").glob("*.json"))
        claims = [_claim(file) for file in files]
    except (PapermillExecutionError, DeadKernelError, FileError, InputError) as failure:
        _report(run, out, work, started, failure)
    finally:
        # a kernel that is dying may still hold a file there
        shutil.rmtree(work, ignore_errors=True)
    _save_notebook(executed, out)
    machine = _machine() | {"gpu": memory.pop("gpu")}
    results = dict(run.origin)
    results["claims"] = claims
    results["versions"] = versions()
    results["commit"] = _commit(run.file)
    results["started"] = started.isoformat(timespec="seconds")
    results |= {"seconds": seconds, "memory": memory, "machine": machine}
    return write_sealed(out / RESULTS, results)


def _claim(file: Path) -> dict[str, object]:
    """A record as the chapter wrote it.

    One that could not be judged later fails the run that made it.
    """
    content = read_record(file)
    judged(content, file.name)
    return content


def _execute(run: Run, work: Path, progress: bool) -> NotebookNode:
    """Execute a chapter's notebook with its parameters, and a last cell that measures memory."""
    notebook = nbformat.from_dict(run.notebook)
    notebook.cells = [*notebook.cells, nbformat.v4.new_code_cell(_MEASURE)]
    nbformat.write(notebook, work / "chapter.ipynb")
    variables = {FOLDER_VARIABLE: str(work / "claims"), "TQDM_DISABLE": "1"}
    with environment(variables):
        return papermill.execute_notebook(
            _unformatted(work / "chapter.ipynb"),
            _unformatted(work / NOTEBOOK),
            dict(run.given),
            kernel_name="python3",
            start_timeout=300,
            progress_bar=progress,
            cwd=run.file.parent,
        )


def _unformatted(path: Path) -> str:
    """A path in which papermill, which puts parameters between braces, finds no place for one."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables for the kernel, which inherits those of this process."""
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _seconds(executed: NotebookNode, started: datetime) -> dict[str, float]:
    """Wall clock: all of it, until the kernel took the first cell, and the chapter's own cells."""
    timings = [cell.metadata.papermill for cell in executed.cells]
    durations = [timing.get("duration") or 0 for timing in timings[:-1]]
    cells = sum(durations)
    total = (datetime.now(UTC) - started).total_seconds()
    first = datetime.fromisoformat(timings[0].start_time).replace(tzinfo=UTC)
    start = (first - started).total_seconds()
    return {"total": round(total, 3), "kernel_start": round(start, 3), "cells": round(cells, 3)}


def _memory(cell: NotebookNode) -> dict[str, Any]:
    """What the measuring cell has printed."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream"]
    return json.loads("".join(texts))


def _save_notebook(executed: NotebookNode, out: Path) -> None:
    """Put the executed notebook into its place at once.

    Without the paths of this machine's working folder.
    """
    executed.metadata.papermill |= {
        "input_path": executed.metadata.papermill.input_path.rpartition("/")[2],
        "output_path": NOTEBOOK,
    }
    with replacing(out / NOTEBOOK) as draft:
        nbformat.write(executed, draft)


def _report(run: Run, out: Path, work: Path, started: datetime, failure: Exception) -> None:
    """Write what failed, and where; then raise it as an error of this package."""
    executed = nbformat.read(work / NOTEBOOK, as_version=4)
    executed.cells.pop()  # the measuring cell, which was not reached
    problem = _problem(failure, executed)
    _save_notebook(executed, out)
    origin = {
        "started": started.isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": _machine(),
    }
    write_json(out / FAILURE, run.origin | problem | origin)
    location = "" if problem["cell"] is None else f" in cell [{problem['cell']}]"
    reason = " ".join(problem["message"].split())
    raise RunError(
        f"chapter {run.file.stem!r} failed{location}: {problem['error']}: {reason}",
        f"the traceback is in {out / FAILURE}, the notebook as far as it came beside it",
    ) from failure


def _problem(failure: Exception, executed: NotebookNode) -> dict[str, Any]:
    """What failed, and in which cell."""
    if isinstance(failure, PapermillExecutionError):
        return {
            "error": failure.ename,
            "message": strip_color(str(failure.evalue)),
            "cell": failure.exec_count,
            "source": failure.source,
            "traceback": strip_color("\n".join(failure.traceback)),
        }
    problem = {
        "error": type(failure).__name__,
        "message": str(failure),
        "cell": None,
        "source": "",
        "traceback": "",
    }
    if not isinstance(failure, XlvlmsError):
        problem["message"] = "the kernel died: killed from outside, or out of memory"
        for cell in executed.cells:
            if cell.metadata.get("papermill", {}).get("start_time"):
                problem["source"] = cell.source  # of the last that was started
    return problem


def _commit(file: Path) -> str | None:
    """The commit of the checkout that holds a file, with "-dirty" where tracked files were changed.

    None outside of one.
    """
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return output_of(*command, folder=file.parent, seconds=30).strip() or None


def _machine() -> dict[str, object]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    """The name of the processor, by Linux where it says it."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
