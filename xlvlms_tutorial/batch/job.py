"""Run one cell of a batch, as its engine starts it.

``python -m xlvlms_tutorial.batch.job PLAN RUN RESULTS THREADS``.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from xlvlms_tutorial.batch.run import run_chapter
from xlvlms_tutorial.batch.slots import gpus
from xlvlms_tutorial.errors import XlvlmsError
from xlvlms_tutorial.io import read_json, reading

PLAN, RUNS = "plan.json", "runs"


def read_plan(file: Path) -> dict[str, dict[str, object]]:
    """Read the runs of a plan by name, with what ``run_cell`` has to know of each.

    Its cell, the GPUs there are, where the chapters lie.

    Raises
    ------
    RecordError
        If the file is no plan of a batch.
    """
    with reading(file, "no plan of a batch"):
        plan = read_json(file)
        common = {"gpus": plan.get("gpus", 0), "chapters": plan.get("chapters")}
        return {cell["id"]: {"cell": cell, **common} for cell in plan["runs"]}


def run_cell(told: Mapping[str, object], out: Path, threads: int) -> Path:
    """Run one cell of a plan in its folder, on as many threads and GPUs as it was given.

    Whole results of the same run are kept.

    Parameters
    ----------
    told : mapping
        What :func:`read_plan` says of the run: "cell", "gpus" and "chapters".
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
    cell = told["cell"]
    among = told["gpus"]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # on a cluster the scheduler says which GPUs a job sees
    with gpus(cell["gpus"], among) if among else nullcontext():
        return run_chapter(
            cell["chapter"], out, cell["parameters"], folder=told["chapters"], resume=True
        )


def main() -> None:
    """Run what the command line tells.

    Exit code 1 if it fails, with the traceback of the chapter.
    """
    plan, run, results, threads = sys.argv[1:]
    try:
        run_cell(read_plan(Path(plan))[run], Path(results).parent, int(threads))
    except XlvlmsError as error:
        cause = f"{error.__cause__}\n" if error.__cause__ else ""
        sys.exit(f"{cause}{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
