"""Reliability: what becomes of a grid of chapters that is killed at random moments.

Whether it loses, changes or halves a result, and what a run costs. The chapters are
toys of a second: what is tested is the machinery around them, by the command that users
type, its own Snakemake included.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import numpy as np
import psutil
from tqdm.auto import tqdm

from benchmarks.command import start
from benchmarks.harness import Goal, Report, count, median
from xlvlms_tutorial.batch.run import RESULTS, read_results
from xlvlms_tutorial.errors import FileError
from xlvlms_tutorial.io import FOLDER_VARIABLE

RUNS = 12  # of the grid
ROUNDS = 5  # of the overhead
DISK = 600  # kB of the disk that gets full
PARAMETERS = 'model = "pocket-llava"\ndataset = "scenes"\nn_samples = 4\nseed = 0\nfail = False'
BODY = """\
import json, os, random, time
from pathlib import Path
assert not fail, "asked to fail"
time.sleep(0.5)
value = random.Random(seed).uniform(-1, 1)
key = {"id": "IMA-1", "chapter": "toy", "model": model, "dataset": dataset, "seeds": [seed]}
key |= {"variant": "", "versions": {}}
measured = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n_samples, "verdict": ""}
folder = Path(os.environ["XLVLMS_CLAIMS"]); folder.mkdir(parents=True)
(folder / "toy.json").write_text(json.dumps(key | measured))
print("measured", value)"""
# of results; times, memory and dates differ from run to run
SAME = ("chapter", "code", "parameters", "given", "claims")


def measure(report: Report) -> None:
    """All promises about grids that are killed, started twice, or have no disk left."""
    kills, parents = report.options.pick(20, 2), report.options.pick(5, 1)
    report.setting |= {
        "runs": RUNS,
        "kills of all processes": kills,
        "kills of Snakemake alone": parents,
        "cores of a grid": 2,
    }
    with tempfile.TemporaryDirectory(prefix="xlvlms-reliability-") as temporary:
        grid = Grid(Path(temporary))
        begun = time.perf_counter()
        assert grid.run("undisturbed").returncode == 0
        took = time.perf_counter() - begun
        truth = grid.results("undisturbed")
        report.tell(f"seconds of an undisturbed grid of {RUNS} runs", count(took))
        killed(report, grid, truth, took, kills, alone=False)
        killed(report, grid, truth, took, parents, alone=True)
        twice(report, grid, truth)
        failing(report, grid)
        damaged(report, grid, truth)
        full(report, grid, truth)
        overhead(report, grid, took)


class Grid:
    """A grid of toy runs and the command that runs it into one of several folders."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "grid.yaml"
        parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(BODY)])
        notebook.metadata.kernelspec = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        (folder / "chapters").mkdir()
        nbformat.write(notebook, folder / "chapters" / "toy.ipynb")
        self.file.write_text(
            "defaults: {retries: 0}\n"
            f"experiments: [{{chapters: toy, seeds: {list(range(RUNS))}}}]\n"
        )

    def command(self, out: str | Path, *extra: str, file: Path | None = None) -> list[str]:
        """The command as an argument list."""
        base = [
            sys.executable,
            "-m",
            "xlvlms_tutorial",
            "reproduce",
            str(file or self.file),
            "--cores",
            "2",
        ]
        return [
            *base,
            "--chapters",
            str(self.folder / "chapters"),
            "--out",
            str(self.folder / out),
            *extra,
        ]

    def start(self, out: str | Path) -> subprocess.Popen:
        """Start a grid in a process group of its own."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(self.command(out), start_new_session=True, **quiet)

    def run(self, out: str | Path, file: Path | None = None) -> subprocess.CompletedProcess:
        """Run a grid to its end."""
        return subprocess.run(
            self.command(out, file=file), capture_output=True, text=True, check=False
        )

    def files(self, out: str | Path) -> list[Path]:
        """The results files that there are."""
        return sorted((self.folder / out / "runs").glob(f"*/{RESULTS}"))

    def results(self, out: str | Path) -> dict[str, dict]:
        """What is to be the same in every results file, by run."""
        return {
            file.parent.name: {key: read_results(file)[key] for key in SAME}
            for file in self.files(out)
        }


def killed(report: Report, grid: Grid, truth: dict, took: float, kills: int, alone: bool) -> None:
    """Kill a grid again and again at random moments and start it again.

    A grid that is done is followed by a new one.
    """
    rng, out = random.Random(int(alone)), f"killed-{alone}-0"
    grids, previous = 0, {}
    counts = dict.fromkeys(("lost or made again", "half-written", "not as undisturbed"), 0)
    for _ in tqdm(range(kills), desc="kills", leave=False):
        _kill(grid.start(out), rng.uniform(0.05, 0.6) * took, alone)
        previous = _compare(grid, out, truth, previous, counts)
        if len(previous) == RUNS:
            grids, previous = grids + 1, {}
            out = f"killed-{alone}-{grids}"
    assert grid.run(out).returncode == 0
    compared = _compare(grid, out, truth, previous, counts)
    description = (
        f"{kills} kills of {'Snakemake alone' if alone else 'all processes'} at random moments"
    )
    for name, number in counts.items():
        report.promise(f"results {name} after {description}", count(number, kills), Goal("==", 0))
    report.promise(
        f"results of the last grid after {description}",
        count(len(compared), RUNS),
        Goal("==", RUNS),
    )
    report.tell(f"grids that took {description}", count(grids + 1, kills))


def _kill(process: subprocess.Popen, moment: float, alone: bool) -> None:
    """Kill all processes of a grid, or only its Snakemake, at a moment.

    Or after its end, if it was faster.
    """
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    if process.poll() is None and alone:
        for child in psutil.Process(process.pid).children():
            child.kill()
    elif process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _compare(
    grid: Grid, out: str, truth: dict, previous: dict[Path, bytes], counts: dict[str, int]
) -> dict[Path, bytes]:
    """Count results that are lost, changed or half-written, and return all.

    Lost or changed: not what they were when last seen, or not those of the undisturbed grid.
    """
    counts["lost or made again"] += sum(
        not file.exists() or file.read_bytes() != before for file, before in previous.items()
    )
    for file in grid.files(out):
        try:
            content = read_results(file)
        except FileError:
            counts["half-written"] += 1
        else:
            same = {key: content[key] for key in SAME}
            counts["not as undisturbed"] += same != truth[file.parent.name]
    return {file: file.read_bytes() for file in grid.files(out)}


def twice(report: Report, grid: Grid, truth: dict) -> None:
    """Start a second grid in the folder of the first.

    And a third when only the engine of the first is left.
    """
    first = grid.start("twice")
    _until((grid.folder / "twice" / "logs").exists)
    second = grid.run("twice")
    first.kill()
    first.wait()
    third = grid.run("twice")
    refusals = [
        run.returncode == 2 and "is running a batch in" in run.stderr for run in (second, third)
    ]
    _until(lambda: "is running a batch" not in grid.run("twice").stderr)
    report.promise(
        "second grids on one folder that were refused, of 2", count(sum(refusals), 2), Goal("==", 2)
    )
    report.promise(
        "their results that are those of the undisturbed grid",
        count(_same(grid, "twice", truth), RUNS),
        Goal("==", RUNS),
    )


def failing(report: Report, grid: Grid) -> None:
    """One chapter of the grid fails."""
    file = grid.folder / "failing.yaml"
    file.write_text(
        "defaults: {retries: 0}\n"
        "experiments: [{chapters: toy, seeds: [0, 1, 2]}, {chapters: toy, "
        "parameters: {fail: true}}]\n"
    )
    run = grid.run("failing", file)
    text = (grid.folder / "failing" / "report.md").read_text()
    named = (
        run.returncode == 1
        and "AssertionError (cell [3]): asked to fail" in text
        and "3 done, 1 failed" in text
    )
    report.promise(
        "results beside one chapter that fails, of 3",
        count(len(grid.files("failing")), 3),
        Goal("==", 3),
    )
    report.promise("reports that name the failure and its cell", count(int(named)), Goal("==", 1))


def damaged(report: Report, grid: Grid, truth: dict) -> None:
    """Cut off, empty and change three results files of a grid that is done."""
    files = grid.files("undisturbed")
    times = {file: file.stat().st_mtime_ns for file in files[3:]}
    text = files[2].read_text()
    for file, content in zip(
        files, (files[0].read_text()[:100], "", re.sub(r'"n": 4', '"n": 5', text)), strict=False
    ):
        file.write_text(content)
    run = grid.run("undisturbed")
    named = sum(f"damaged, to be made again: {file}" in run.stdout for file in files[:3])
    report.promise("damaged results files that are named, of 3", count(named, 3), Goal("==", 3))
    report.promise(
        "results that are right again",
        count(_same(grid, "undisturbed", truth), RUNS),
        Goal("==", RUNS),
    )
    touched = sum(file.stat().st_mtime_ns != before for file, before in times.items())
    report.promise(
        "whole results that were made again beside them", count(touched, len(times)), Goal("==", 0)
    )


def full(report: Report, grid: Grid, truth: dict) -> None:
    """Fill the disk of a grid, then make room and start it again."""
    with _small_disk(grid.folder / "full") as disk:
        report.setting["full disk"] = (
            f"a tmpfs of {DISK} kB"
            if disk
            else "not measured: mounting a small disk was not permitted"
        )
        if not disk:
            return
        filler = disk / "filler"
        filler.write_bytes(bytes((DISK - 120) * 1024))
        run = grid.run("full")
        disk_full = "No space left on device" in run.stdout + run.stderr
        written = len(grid.files("full"))
        whole = _same(grid, "full", truth)
        filler.unlink()
        again = grid.run("full")
        report.promise(
            "full disks that are reported",
            count(int(disk_full and run.returncode != 0)),
            Goal("==", 1),
        )
        report.tell("runs done before the disk was full", count(written, RUNS))
        report.promise(
            "results that are not whole on a full disk", count(written - whole, RUNS), Goal("==", 0)
        )
        done = _same(grid, "full", truth) if again.returncode == 0 else 0
        report.promise("results after there is room again", count(done, RUNS), Goal("==", RUNS))


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def overhead(report: Report, grid: Grid, took: float) -> None:
    """Seconds that a run takes beyond the notebook's own cells.

    Beside those of plain papermill on the same notebook.
    """
    chapter, overheads = (
        str(grid.folder / "chapters" / "toy.ipynb"),
        {"xlvlms run": [], "papermill": []},
    )
    for number in range(report.options.rounds(ROUNDS)):
        place, plain = grid.folder / f"run-{number}", grid.folder / f"plain-{number}.ipynb"
        ours = _seconds(
            ["xlvlms_tutorial", "run", chapter, "-p", "seed=1", "--out", str(place)], place
        )
        theirs = _seconds(
            [
                "papermill",
                chapter,
                str(plain),
                "-p",
                "seed",
                "1",
                "-k",
                "python3",
                "--no-progress-bar",
            ],
            place,
        )
        overheads["xlvlms run"].append(
            ours - float(read_results(place / RESULTS)["seconds"]["cells"])
        )
        overheads["papermill"].append(theirs - _cells(plain))
    report.setting["overhead"] = (
        "seconds of the whole process, start of Python included, minus those of the cells"
    )
    for name, seconds in overheads.items():
        report.tell(f"seconds of {name} beyond the cells", median(seconds))
    report.tell("seconds of xlvlms run minus papermill's", median(np.subtract(*overheads.values())))
    cells = sum(read_results(file)["seconds"]["cells"] for file in grid.files("undisturbed"))
    report.tell(
        "seconds of two cores a run of the grid takes beyond its cells",
        count((2 * took - cells) / RUNS, RUNS),
    )


def _seconds(module: list[str], place: Path) -> float:
    environment = os.environ | {FOLDER_VARIABLE: str(place / "claims")}
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", *module], check=True, capture_output=True, env=environment
    )
    return time.perf_counter() - begun


def _cells(notebook: Path) -> float:
    cells = nbformat.read(notebook, as_version=4).cells
    return sum(cell.metadata.papermill.duration or 0.0 for cell in cells)


def _same(grid: Grid, out: str, truth: dict) -> int:
    """How many results are those of the undisturbed grid."""
    results = grid.results(out)
    return sum(results.get(name) == content for name, content in truth.items())


def _until(holds: Callable[[], bool], seconds: float = 300.0) -> None:
    limit = time.perf_counter() + seconds
    while not holds():
        assert time.perf_counter() < limit, "waited too long"
        time.sleep(0.2)


if __name__ == "__main__":
    start({"reliability": measure})
