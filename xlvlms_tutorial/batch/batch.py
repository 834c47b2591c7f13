"""Run a grid: plan it, see what is there already, let Snakemake run the rest, gather."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import psutil

from xlvlms_tutorial.batch.chapters import ROOT, checkout
from xlvlms_tutorial.batch.grid import Cell, read_grid
from xlvlms_tutorial.batch.job import PLAN, RUNS
from xlvlms_tutorial.batch.results import Gathered, gather
from xlvlms_tutorial.batch.run import RESULTS, Chapter, opened, read_results, same_run
from xlvlms_tutorial.batch.spelling import plain, read_yaml
from xlvlms_tutorial.errors import FileError, InputError, RunError, not_written
from xlvlms_tutorial.io import write_json

# The folder of the Snakefile, the experiments and the profiles.
FOLDER = (checkout() or ROOT) / "reproduce"
# The file of the book's own grid, for reproduce and read_grid.
EXPERIMENTS = FOLDER / "experiments.yaml"
PROFILES = ("local", "slurm", "kubernetes")
SNAKEFILE, LOCK = "Snakefile", ".batch.lock"
# asked to end, or the terminal is gone
_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_GRACE = 10.0  # seconds that an engine has to take back what it gave to a cluster


@dataclass(frozen=True)
class Options:
    """How a batch is run.

    Give it to :func:`reproduce` where the defaults, one machine without GPUs, do not fit.

    Parameters
    ----------
    profile : str, default "local"
        "local", "slurm", "kubernetes", or a folder with a profile of Snakemake.
    cores : int, optional
        Processor cores for all jobs at once; by default as the profile says.
    gpus : int, default 0
        GPUs of this machine that are shared out, so that no two jobs use one at a time.
    chapters : path, optional
        The folder of the chapters; by default that of the book.
    dry_run : bool, default False
        Whether everything is checked and nothing is run.

    Examples
    --------
    >>> from xlvlms_tutorial.batch import Options
    >>> Options(cores=8).profile, Options().gpus
    ('local', 0)
    """

    profile: str = "local"
    cores: int | None = None
    gpus: int = 0
    chapters: Path | None = None
    dry_run: bool = False


def reproduce(
    experiments: str | Path,
    out: str | Path,
    options: Options | None = None,
    embedded: Collection[str] = (),
    say: Callable[[str], object] = print,
) -> Gathered:
    """Run every run of a grid that is not done yet, and gather them all.

    Use it for many chapters, models, datasets and seeds; :func:`run_chapter` runs one. A run that
    fails leaves the others alone. Damaged results are named, moved aside and made again, as are
    those of other code of their chapter. Whatever ends this process, but for SIGKILL, ends the
    engine and its jobs too; then the same call goes on.

    Parameters
    ----------
    experiments : path
        The file of the grid, as :func:`read_grid` reads it; ``EXPERIMENTS`` is that of the book.
    out : path
        The folder of the batch.
    options : Options, optional
        How it is run; by default on this machine, without GPUs.
    embedded : collection of str, default ()
        The names of models that need neither folder nor hub. Where they are given, any other model
        has to be a folder or an id of the hub (owner/name).
    say : callable, default print
        It is called with each line on what was found.

    Returns
    -------
    Gathered
        The states and results of all runs.

    Raises
    ------
    InputError
        If the grid, the profile or the number of GPUs is wrong; nothing has been started then.
    RunError
        If another batch is at work in ``out``.
    FileError
        If a file cannot be written.

    Examples
    --------
    >>> from xlvlms_tutorial.batch import EXPERIMENTS, Options, reproduce
    >>> gathered = reproduce(EXPERIMENTS, "runs", Options(cores=8))  # doctest: +SKIP
    >>> gathered.count("done")  # doctest: +SKIP
    """
    options = options or Options()
    out = Path(out).resolve()
    cells = read_grid(experiments, options.chapters, embedded)
    profile = _profile(options.profile)
    max_gpus = max(cell.gpus for cell in cells)
    if profile.local and max_gpus > options.gpus:
        raise InputError(
            f"a run wants {max_gpus} GPUs of {options.gpus}",
            "give --gpus N, the number that this machine lends to the batch",
        )
    with _only(out) as lock:
        plan = {"runs": list(map(asdict, cells))}
        plan["gpus"] = options.gpus if profile.local else 0
        plan["chapters"] = options.chapters and str(Path(options.chapters).resolve())
        write_json(out / PLAN, plan)
        _copy(FOLDER / SNAKEFILE, out / SNAKEFILE)
        read = cache(partial(opened, folder=options.chapters))  # each chapter once
        for cell in cells:
            notice = _move_aside(cell, out, read(cell.chapter), options.dry_run)
            if notice:
                say(notice)
        code = _engine(_command(out, profile, options), out, lock)
        if code:
            say(f"Snakemake ended with code {code}")
        return gather(out, write=not options.dry_run)


@dataclass(frozen=True)
class _Profile:
    """A profile of Snakemake.

    Its folder, whether jobs run on this machine, whether results come through a storage.
    """

    folder: Path
    local: bool
    storage: bool


def _profile(name: str) -> _Profile:
    folder = FOLDER / "profiles" / name if name in PROFILES else Path(name)
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        content = plain(read_yaml(text, "config.yaml")[0] or {})
        if not isinstance(content, dict):
            raise ValueError("config.yaml is no mapping")
    except (OSError, ValueError) as cause:
        reason = " ".join(str(cause).split())
        allowed = (
            f"there are: {', '.join(PROFILES)}, or a folder with config.yaml "
            "(in a clone of the repository)"
        )
        raise InputError(f"profile {name!r} cannot be read ({reason})", allowed) from cause
    executor = content.get("executor", "local")
    storage = content.get("default-storage-provider")
    plugins = []
    if executor != "local":
        plugins.append(f"executor-plugin-{executor}")
    if storage:
        plugins.append(f"storage-plugin-{storage}")
    packages = []
    for plugin in plugins:
        if find_spec(f"snakemake_{plugin.replace('-', '_')}") is None:
            packages.append(f"snakemake-{plugin}")
    if packages:
        raise InputError(
            f"profile {name!r} needs {' and '.join(packages)}",
            f"run pip install {' '.join(packages)}, and start again",
        )
    return _Profile(folder.resolve(), executor == "local", bool(storage))


def _copy(file: Path, target: Path) -> None:
    """Keep the rules beside the plan: on a cluster they travel with it."""
    try:
        shutil.copyfile(file, target)
    except OSError as cause:
        raise not_written(target, cause.strerror or cause) from cause


def _move_aside(cell: Cell, out: Path, chapter: Chapter, dry_run: bool) -> str:
    """Move aside results that are damaged or of other code, and say so.

    Empty where there is nothing to say.
    """
    file = out / RUNS / cell.id / RESULTS
    if not file.exists():
        return ""
    try:
        # measurements that cannot be judged are damaged too
        Gathered().add(cell.id, read_results(file))
    except (FileError, InputError) as error:
        kind, problem = "damaged", str(error)
    else:
        if same_run(file, chapter.run(cell.parameters)):
            return ""
        kind, problem = "outdated", f"{file}: made by other code of the chapter"
    if not dry_run:
        os.replace(file, file.with_name(f"{RESULTS}.{kind}"))
    return f"{kind}, to be made again: {problem}"


def _command(out: Path, profile: _Profile, options: Options) -> list[str]:
    """Snakemake as an argument list, without its own locks and marks.

    Ours end with their holder, and results are whole or absent.
    """
    command = [sys.executable, "-m", "snakemake", "all", "--nolock", "--ignore-incomplete"]
    command += ["--snakefile", SNAKEFILE, "--configfile", PLAN]
    command += ["--workflow-profile", "none", "--profile", str(profile.folder)]
    if options.cores:
        command += ["--cores", str(options.cores)]
    if profile.local:
        # jobs that together need more wait for each other
        memory = int(0.9 * psutil.virtual_memory().total / 1e6)
        command += ["--resources", f"gpu={options.gpus}", f"mem_mb={memory}"]
    if profile.storage:
        command += ["--default-storage-prefix", str(out)]
    if options.dry_run:
        command.append("--dry-run")
    return command


def _engine(command: list[str], out: Path, lock: int) -> int:
    """Run Snakemake to its end, and give its exit code.

    It is named in the lock, which it holds as long as it lives.
    """
    with _leaving_on_signals(), subprocess.Popen(command, pass_fds=(lock,), cwd=out) as engine:
        _write_holder(lock, engine.pid)
        try:
            return engine.wait()
        except BaseException:
            _terminate(engine.pid)
            raise


@contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """Leave by an exception where a signal asks this process to end.

    The signal would otherwise end it and leave its children at work.
    """

    def leave(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # asked once more, it goes on ending its children
        raise SystemExit(128 + number)

    previous = {}
    if threading.current_thread() is threading.main_thread():  # signals come to it alone
        for number in _ENDINGS:
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _terminate(number: int) -> None:
    """End an engine and all that it has started.

    Asked first, so that it takes back what it gave to a cluster; then killed.
    """
    with suppress(psutil.NoSuchProcess):
        engine = psutil.Process(number)
        children = engine.children(recursive=True)
        engine.send_signal(signal.SIGINT)  # from now on it starts no job
        for process in children:
            with suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs([engine, *children], timeout=_GRACE)
        with suppress(psutil.NoSuchProcess):
            children += engine.children(recursive=True)
        for process in [engine, *children]:
            with suppress(psutil.Error):
                process.kill()


def _write_holder(lock: int, process: int) -> None:
    """Write into the lock who holds it."""
    holder = (
        f"process {process} on {platform.node()}, started "
        f"{datetime.now().isoformat(timespec='seconds')},"
    )
    os.ftruncate(lock, 0)
    os.pwrite(lock, holder.encode(), 0)


@contextmanager
def _only(out: Path) -> Iterator[int]:
    """Hold the folder of a batch.

    Yields the open lock, which Snakemake inherits, so that it ends only when both have ended.
    """
    import fcntl  # not on Windows, where Snakemake does not run either

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as cause:
        raise not_written(out, cause.strerror or cause) from cause
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise RunError(
            f"{holder} is running a batch in {out}",
            "wait for it, or give another folder with --out",
        ) from None
    try:
        _write_holder(lock, os.getpid())
        yield lock
    finally:
        os.close(lock)
