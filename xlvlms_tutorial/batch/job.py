"""Run one run of a batch, as its engine starts it, on GPUs of its own.

``python -m xlvlms_tutorial.batch.job PLAN RUN RESULTS THREADS``.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from xlvlms_tutorial.batch.run import environment, run_chapter
from xlvlms_tutorial.errors import InputError, RunError, XlvlmsError
from xlvlms_tutorial.io import read_json, reading

PLAN, RUNS = "plan.json", "runs"
VARIABLE = "CUDA_VISIBLE_DEVICES"
PAUSE = 2.0  # seconds between two looks for a free GPU


def read_plan(file: Path) -> dict[str, Any]:
    """Read the plan of a batch.

    Its "runs" by name, the number of "gpus" of this machine, and the folder of the "chapters".

    Raises
    ------
    FileError
        If the file is no plan of a batch.
    """
    with reading(file, "no plan of a batch"):
        plan = read_json(file)
        runs = {cell["id"]: cell for cell in plan["runs"]}
        return {"runs": runs, "gpus": plan.get("gpus", 0), "chapters": plan.get("chapters")}


@contextmanager
def gpus(count: int, among: int) -> Iterator[str]:
    """Hold GPUs of this machine, waiting until they are free.

    Snakemake counts how many GPUs are in use, but not which, and knows its own jobs alone. So a job
    holds a lock on each GPU that it uses, and no two jobs, of any batch, share one. The operating
    system lets go of the locks when their holder is killed.

    Parameters
    ----------
    count : int
        GPUs to hold.
    among : int
        GPUs of the machine, the first ones.

    Yields
    ------
    str
        The value of ``CUDA_VISIBLE_DEVICES`` meanwhile; empty where no GPU is held.

    Raises
    ------
    InputError
        If there are fewer.
    RunError
        If the locks cannot be held: another user has made their folder, or it cannot be written.
    """
    names = devices(among)
    if count > among:
        raise InputError(
            f"{count} GPUs wanted of {among}", "give a number of GPUs that this machine has"
        )
    folder = Path(tempfile.gettempdir()) / f"xlvlms-gpus-{os.getuid()}"
    with ExitStack() as locks:
        try:
            _require_own(folder)
            visible = ",".join(_lock_free(names, count, folder, locks))
        except OSError as cause:
            message = f"the locks of GPUs in {folder} cannot be held ({cause.strerror or cause})"
            raise RunError(
                message, "set TMPDIR to a folder of your own, the same one for all batches"
            ) from cause
        with environment({VARIABLE: visible}):
            yield visible


def devices(number: int) -> list[str]:
    """Name the first ``number`` GPUs.

    Of those that ``CUDA_VISIBLE_DEVICES`` lists where it is set.

    Raises
    ------
    InputError
        If it lists fewer.
    """
    visible = os.environ.get(VARIABLE)
    if visible is None:
        return [str(index) for index in range(number)]
    parts = map(str.strip, visible.split(","))
    names = [name for name in parts if name]
    if len(names) < number:
        raise InputError(
            f"{number} GPUs asked for, but {VARIABLE}={visible!r}",
            f"give {len(names)} or fewer, or set it to more",
        )
    return names[:number]


def _require_own(folder: Path) -> None:
    """Make the folder of the locks, and refuse that of another user.

    In the temporary folder anyone may have made one of its name first.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # of a link, who made the link
        raise PermissionError("it belongs to another user")


def _lock_free(names: list[str], count: int, folder: Path, locks: ExitStack) -> list[str]:
    """Lock as many GPUs, waiting until so many are free at once, and name them."""
    while True:
        acquired: list[str] = []
        for name in names:
            if len(acquired) == count:
                break
            with suppress(Timeout):  # it is in use
                locks.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
                acquired.append(name)
        if len(acquired) == count:
            return acquired
        # never hold some while waiting for others: two such jobs would wait for each other
        locks.close()
        time.sleep(PAUSE)


def run_cell(plan: dict[str, Any], name: str, out: Path, threads: int) -> Path:
    """Run one run of a plan in its folder, on as many threads and GPUs as it was given.

    Whole results of the same run are kept.

    Parameters
    ----------
    plan : dict
        The plan, from :func:`read_plan`.
    name : str
        The name of the run.
    out : pathlib.Path
        The folder of the run.
    threads : int
        Threads of the processor.

    Returns
    -------
    pathlib.Path
        The results file.

    Raises
    ------
    XlvlmsError
        What :func:`~xlvlms_tutorial.batch.run.run_chapter` raises.
    """
    cell = plan["runs"][name]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # on a cluster the scheduler says which GPUs a job sees
    with gpus(cell["gpus"], plan["gpus"]) if plan["gpus"] else nullcontext():
        return run_chapter(
            cell["chapter"], out, cell["parameters"], folder=plan["chapters"], resume=True
        )


def main() -> None:
    """Run what the command line names.

    Exit code 1 if it fails, with the traceback of the chapter.
    """
    plan, name, results, threads = sys.argv[1:]
    try:
        run_cell(read_plan(Path(plan)), name, Path(results).parent, int(threads))
    except XlvlmsError as error:
        cause = f"{error.__cause__}\n" if error.__cause__ else ""
        sys.exit(f"{cause}{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
