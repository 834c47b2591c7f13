"""A grid of toy chapters through the real Snakemake.

It goes on where it was stopped, and one failure leaves the others alone.
"""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import yaml

from tests.support.toy_chapter import BODY, toy_chapter
from tools import ROOT
from xlvlms_tutorial.batch import batch
from xlvlms_tutorial.batch.batch import FOLDER, PROFILES, Options, reproduce
from xlvlms_tutorial.batch.run import NOTEBOOK, read_results
from xlvlms_tutorial.errors import FileError, InputError, RunError
from xlvlms_tutorial.io import write_sealed

GRID = """\
defaults: {retries: 0, mem_mb: 100}
experiments:
  - {chapters: toy, seeds: [0, 1], gpus: 1}
  - {chapters: toy, parameters: {end: raise}}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A batch of two runs that go well on two GPUs, which nothing here needs to exist, and one
    that fails; and what was said.
    """
    folder, messages = tmp_path_factory.mktemp("grid"), []
    toy_chapter(folder / "chapters")
    (folder / "grid.yaml").write_text(GRID)
    options = Options(cores=3, gpus=2, chapters=folder / "chapters")
    gathered = reproduce(folder / "grid.yaml", folder / "out", options, say=messages.append)
    return folder, gathered, messages


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """A grid whose engine only keeps its command."""
    toy_chapter(tmp_path / "chapters")
    (tmp_path / "grid.yaml").write_text(GRID)
    calls = []

    monkeypatch.setattr(
        batch, "_engine", lambda command, out, lock: calls.append((command, out)) or 0
    )
    return tmp_path, calls


def run_of(gathered, end):
    return next(name for name in gathered.states if f"-s{end}-" in name)


def test_a_run_that_fails_leaves_the_others_and_a_report(ran):
    folder, gathered, messages = ran
    assert sorted(gathered.states.values()) == ["done", "done", "failed"]
    (problem,) = gathered.problems.values()
    assert problem == "ValueError (cell [3]): asked to fail"
    report = (folder / "out" / "report.md").read_text()
    assert report.startswith("# 3 runs: 2 done, 1 failed") and problem in report
    (failed,) = gathered.problems
    log = (folder / "out" / "logs" / f"{failed}.log").read_text()
    assert "raise ValueError" in log and "\x1b[31m" not in log
    assert messages == ["Snakemake ended with code 1"]


def test_results_claims_and_tables_lie_where_they_should(ran):
    folder, gathered, _ = ran
    entries = json.loads((folder / "out" / "claims.json").read_text())
    measured = {entry["id"]: entry["measurements"] for entry in entries if entry["measurements"]}
    assert list(measured) == ["IMA-1"] and [row["seeds"] for row in measured["IMA-1"]] == [[0], [1]]
    assert {row["run"] for row in measured["IMA-1"]} == set(gathered.results)
    assert {"runs.parquet", "measurements.parquet", "report.md", "plan.json"} <= {
        path.name for path in (folder / "out").iterdir()
    }


def test_jobs_at_the_same_time_see_one_gpu_each(ran):
    folder, gathered, _ = ran
    environments = []
    for name in gathered.results:
        notebook = nbformat.read(folder / "out" / "runs" / name / NOTEBOOK, as_version=4)
        environments.append(
            "".join(
                output.text
                for output in notebook.cells[-1].outputs
                if output.output_type == "stream"
            ).split()
        )
    assert all(
        gpu in ("0", "1") and threads == "1" and directory == "chapters"
        for gpu, threads, directory in environments
    )


def test_it_goes_on_with_what_is_missing_damaged_or_of_other_code(ran):
    """One process of Snakemake.

    A damaged run is made again and named, a whole one is left alone, the
    chapter that failed now works.
    """
    folder, gathered, _ = ran
    whole, torn = sorted(gathered.results)
    (failed,) = gathered.problems
    results = {
        name: folder / "out" / "runs" / name / "results.json" for name in (whole, torn, failed)
    }
    before, good = results[whole].stat().st_mtime_ns, read_results(results[torn])["claims"]
    results[torn].write_text(results[torn].read_text()[:60])
    messages = []
    options = Options(cores=2, gpus=1, chapters=folder / "chapters")
    again = reproduce(folder / "grid.yaml", folder / "out", options, say=messages.append)
    assert again.states == {whole: "done", torn: "done", failed: "failed"}
    assert results[whole].stat().st_mtime_ns == before
    assert read_results(results[torn])["claims"] == good
    assert (results[torn].parent / "results.json.damaged").exists()
    assert [line for line in messages if "damaged" in line and str(results[torn]) in line]


def test_results_whose_measurements_cannot_be_judged_are_made_again(ran, monkeypatch):
    folder, gathered, _ = ran
    name = sorted(gathered.results)[0]
    file = folder / "out" / "runs" / name / "results.json"
    whole, content = file.read_bytes(), read_results(file)
    content["claims"][0]["id"] = "IMA-99"  # as by a later version, whose register holds it
    write_sealed(file, content)
    monkeypatch.setattr(batch, "_engine", lambda *_: 0)
    messages = []
    options = Options(cores=1, gpus=1, chapters=folder / "chapters")
    again = reproduce(folder / "grid.yaml", folder / "out", options, say=messages.append)
    assert again.states[name] == "missing"
    assert any("damaged, to be made again" in line and "IMA-99" in line for line in messages)
    file.write_bytes(whole)


def test_parameters_longer_than_a_command_line_reach_the_chapter(tmp_path):
    toy_chapter(
        tmp_path / "chapters",
        body=BODY.replace("effect + seed / 100", "len(model) + len(names['a'])"),
    )
    entry = {
        "chapters": "toy",
        "models": "m/" + "é'$" * 50_000,
        "parameters": {"names": {"a": "\\ \n" * 70_000}},
        "mem_mb": 100,
    }
    (tmp_path / "grid.yaml").write_text(json.dumps({"experiments": [entry]}))
    gathered = reproduce(
        tmp_path / "grid.yaml", tmp_path / "out", Options(cores=1, chapters=tmp_path / "chapters")
    )
    (measured,) = gathered.measurements
    assert measured["value"] == 150_002 + 210_000


def words(process: psutil.Process) -> str:
    """The command line of a process; nothing of one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=["TERM", "HUP", "INT"]
)
def test_a_batch_that_is_asked_to_end_leaves_no_process_behind_and_goes_on(tmp_path, number):
    waiting = (
        "import time; from pathlib import Path\n"
        f"while not Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.1)\n"
    )
    toy_chapter(tmp_path / "chapters", body=waiting + BODY)
    (tmp_path / "grid.yaml").write_text("experiments: [{chapters: toy, retries: 2, mem_mb: 100}]")
    command = [
        sys.executable,
        "-m",
        "xlvlms_tutorial",
        "reproduce",
        "grid.yaml",
        "--out",
        "out",
        "--chapters",
        "chapters",
        "--cores",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # what started the tests may ignore it, as nohup does, and children would inherit that
    before = signal.signal(number, signal.SIG_DFL)
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    signal.signal(number, before)
    family = []
    while not any("ipykernel" in words(process) for process in family):
        assert running.poll() is None
        time.sleep(0.2)
        family = psutil.Process(running.pid).children(recursive=True)
    engine = next(
        child for child in psutil.Process(running.pid).children() if "snakemake" in words(child)
    )
    assert f"process {engine.pid} on " in (tmp_path / "out" / batch.LOCK).read_text()
    running.send_signal(number)
    assert running.wait(60) != 0
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and len(gone) == len(family) >= 3
    if number == signal.SIGTERM:
        (tmp_path / "go").touch()
        assert (
            subprocess.run(
                command, cwd=tmp_path, env=environment, check=False, stderr=subprocess.DEVNULL
            ).returncode
            == 0
        )


def test_outdated_results_are_named_and_moved_only_when_it_is_meant(ran, monkeypatch):
    folder, gathered, _ = ran
    toy_chapter(folder / "changed", body=BODY + "print('more')")
    monkeypatch.setattr(batch, "_engine", lambda *_: 0)
    messages = []
    options = Options(cores=1, gpus=1, chapters=folder / "changed", dry_run=True)
    reproduce(folder / "grid.yaml", folder / "out", options, say=messages.append)
    assert len(messages) == 2 and all(
        line.startswith("outdated, to be made again") for line in messages
    )
    for name in gathered.results:
        assert (folder / "out" / "runs" / name / "results.json").exists()


def test_snakemake_is_started_on_the_plan(engine):
    folder, calls = engine
    gathered = reproduce(
        folder / "grid.yaml", folder / "out", Options(cores=2, gpus=1, chapters=folder / "chapters")
    )
    ((command, out),) = calls
    assert command[:4] == [sys.executable, "-m", "snakemake", "all"] and out == folder / "out"
    assert command[command.index("--cores") + 1] == "2"
    gpu, memory = command[command.index("--resources") + 1 :][:2]
    assert gpu == "gpu=1"
    assert 0 < int(memory.removeprefix("mem_mb=")) < psutil.virtual_memory().total / 1e6
    assert (folder / "out" / "Snakefile").read_text() == (FOLDER / "Snakefile").read_text()
    plan = json.loads((folder / "out" / "plan.json").read_text())
    assert plan["gpus"] == 1
    assert plan["chapters"] == str(folder / "chapters")
    assert len(plan["runs"]) == 3
    assert set(gathered.states.values()) == {"missing"}


def test_a_second_batch_in_the_same_folder_is_refused_until_engine_and_command_have_ended(
    engine,
):
    folder, calls = engine
    options = Options(gpus=1, chapters=folder / "chapters")
    with batch._only(folder / "out") as lock:
        heir = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)
        )
        with pytest.raises(
            RunError, match=f"process {os.getpid()} on .* is running a batch in .*--out"
        ):
            reproduce(folder / "grid.yaml", folder / "out", options)
    # the heir of the lock, as Snakemake is, still lives
    with pytest.raises(RunError, match="is running a batch"):
        reproduce(folder / "grid.yaml", folder / "out", options)
    heir.kill()
    heir.wait()
    heir.stdin.close()
    assert not calls
    reproduce(folder / "grid.yaml", folder / "out", options)
    assert len(calls) == 1


def test_wrong_input_starts_nothing(engine):
    folder, calls = engine
    grid, out, chapters = folder / "grid.yaml", folder / "out", folder / "chapters"
    for options, message in [
        (Options(chapters=chapters), "a run wants 1 GPUs of 0; give --gpus N"),
        (
            Options("lokal", gpus=1, chapters=chapters),
            "profile 'lokal' cannot be read .*there are: local, slurm, kubernetes",
        ),
        (Options(gpus=1, chapters=folder), "no chapter 'toy'"),
    ]:
        with pytest.raises(InputError, match=message):
            reproduce(grid, out, options)
    assert not calls and not out.exists()
    (folder / "file").touch()
    with pytest.raises(FileError, match="cannot be written"):
        reproduce(grid, folder / "file" / "out", Options(gpus=1, chapters=chapters))


def test_a_profile_whose_plugin_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(batch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs snakemake-executor-plugin-slurm; run pip install"):
        batch._profile("slurm")
    with pytest.raises(
        InputError,
        match="needs snakemake-executor-plugin-kubernetes and snakemake-storage-plugin-fs",
    ):
        batch._profile("kubernetes")
    looked_up = []
    monkeypatch.setattr(batch, "find_spec", lambda name: looked_up.append(name) or True)
    assert (batch._profile("slurm").local, batch._profile("kubernetes").storage) == (False, True)
    assert looked_up[0] == "snakemake_executor_plugin_slurm"


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_hold_only_options_that_snakemake_knows(name):
    """A plugin's own options start with its name.

    All others are in Snakemake's parser, whatever is installed.
    """
    from snakemake.cli import get_argument_parser

    content = yaml.safe_load((FOLDER / "profiles" / name / "config.yaml").read_text())
    flags = {
        option for action in get_argument_parser()._actions for option in action.option_strings
    }
    assert {f"--{key}" for key in content if not key.startswith(f"{name}-")} <= flags
    assert content["keep-going"] is True and content.get("executor", name) == name
