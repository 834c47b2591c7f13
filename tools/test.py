"""Run the tests part by part and say how long each took: ``python -m tools.test [PART ...]``.

All parts but the quick one by default. A part that fails does not keep the others
from running, only a failed lint does: it is repaired in seconds. The exit status is
that of the first part that failed.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from tools import ROOT
from tools.execute import BUILD, LIMIT

PYTHON = (sys.executable, "-m")
# Two workers of one thread each. Tests that share what is dear to make lie in one file,
# and a file stays on one worker.
PYTEST = (*PYTHON, "pytest", "-q", "-n", "2", "--dist", "loadfile")
NBVAL = (
    "-p",
    "tools.nbval_cache",
    "--nbval-lax",
    "--nbval-current-env",
    "--nbval-sanitize-with=tests/sanitize.cfg",
)
WITHOUT = ("--ignore=tests/chapters", "--ignore=tests/book")
PARTS = {
    "lint": (
        "ruff, and which module imports which",
        [
            (*PYTHON, "ruff", "check", "."),
            (*PYTHON, "ruff", "format", "--check", "."),
            ("lint-imports", "--no-cache"),
        ],
    ),
    "quick": ("the unit tests that are not slow", [(*PYTEST, "-m", "not slow", *WITHOUT, "tests")]),
    "unit": (
        "all tests of package, tools and repository, and the examples of docstrings",
        [
            (*PYTEST, *WITHOUT, "tests"),
            (*PYTEST, "--doctest-modules", "xlvlms_tutorial"),
        ],
    ),
    "models": (
        "every chapter on two other models, pictures from a folder",
        [(*PYTEST[:-2], "--maxschedchunk=1", "tests/chapters")],
    ),
    # Long pages come first; how many cells they have says nothing of that.
    "pages": (
        (
            "every page once: its checked cells against the paired notebook; all that "
            "it shows is kept for the book"
        ),
        [(*PYTEST, "--no-loadscope-reorder", *NBVAL, f"--nbval-cell-timeout={LIMIT}", "book")],
    ),
}
ALL = ("lint", "unit", "models", "pages")


def run(part: str) -> int:
    """Run the commands of a part; the exit status of the first that fails, or 0."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    for command in PARTS[part][1]:
        if status := subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            return status
    return 0


def summary(times: dict[str, float], status: dict[str, int], parts: Sequence[str]) -> str:
    """A line for each part: how long it took and whether it passed."""
    said = {part: "passed" if status[part] == 0 else "FAILED" for part in status}
    lines = [f"  {part:8}{times[part]:6.0f} s  {said.get(part, 'stopped')}" for part in times]
    return "\n".join(
        [*lines, *(f"  {part:8}          not run" for part in parts if part not in times)]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what will run, run it, say how long it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all but quick by default"
    )
    parts = parser.parse_args(arguments).parts or ALL
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    print("\n".join(["to run:", *(f"  {part:8}{PARTS[part][0]}" for part in parts)]), flush=True)
    times, status = {}, {}
    try:
        for part in parts:
            print(f"\n--- {part}", flush=True)
            start, times[part] = perf_counter(), 0.0
            try:
                status[part] = run(part)
            finally:
                times[part] = perf_counter() - start
            if part == "lint" and status[part]:
                break
    finally:  # also when it is stopped from the keyboard
        told = summary(times, status, parts)
        BUILD.mkdir(exist_ok=True)
        (BUILD / "seconds.txt").write_text(f"{told}\n", encoding="utf-8")
        print(f"\n{told}", flush=True)
    return next(filter(None, status.values()), 0)


if __name__ == "__main__":
    sys.exit(main())
