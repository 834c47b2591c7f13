"""A run leaves whole results or a readable report, never halves; it keeps to its own folder."""

import copy
import errno
import json
import os
import re

import nbformat
import pytest
from filelock import FileLock
from nbclient.exceptions import DeadKernelError

from tests.support.toy_chapter import BODY, toy_chapter
from xlvlms_tutorial.batch import run
from xlvlms_tutorial.batch.run import FAILURE, FIELDS, NOTEBOOK, RESULTS, read_results, run_chapter
from xlvlms_tutorial.errors import FileError, InputError, RunError
from xlvlms_tutorial.io import peak_memory, read_sealed, write_sealed

PARAMETERS = {"seed": 3, "layers": [4, 5], "model": "a/b"}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a run that went well."""
    folder = tmp_path_factory.mktemp("made")
    toy_chapter(folder / "chapters")
    run_chapter("toy", folder / "out", PARAMETERS, folder=folder / "chapters")
    return folder


@pytest.fixture
def never(monkeypatch):
    """Whoever starts a notebook fails the test."""
    monkeypatch.setattr(
        run.papermill, "execute_notebook", lambda *_, **__: pytest.fail("a notebook was started")
    )


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_results_hold_what_was_measured_and_how(finished_run):
    content = read_results(finished_run / "out" / RESULTS)
    assert set(FIELDS) <= set(content)
    assert (content["chapter"], content["given"]) == ("toy", PARAMETERS)
    assert content["parameters"] == {
        "model": "a/b",
        "dataset": "scenes",
        "n_samples": 4,
        "seed": 3,
        "effect": 0.5,
        "end": "",
        "layers": [4, 5],
        "wide": [2, 4, 6],
        "share": 0.5,
        "names": {"a": "b"},
        "computed": "2 * 3",
    }
    (claim,) = content["claims"]
    assert (claim["id"], claim["model"], claim["seeds"], claim["value"]) == (
        "IMA-1",
        "a/b",
        [3],
        0.53,
    )
    seconds = content["seconds"]
    assert min(seconds.values()) > 0
    assert seconds["cells"] + seconds["kernel_start"] <= seconds["total"]
    assert content["memory"]["peak_bytes"] > 10e6 and content["machine"]["cores"] == os.cpu_count()
    assert content["versions"]["torch"]


def test_the_notebook_beside_is_the_chapter_with_its_outputs_and_nothing_of_ours(finished_run):
    assert files(finished_run / "out") == [".lock", NOTEBOOK, RESULTS]
    notebook = nbformat.read(finished_run / "out" / NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "injected-parameters" in code[1].metadata.tags and "layers = [4, 5]" in code[1].source
    assert code[-1].source == BODY.strip() and "chapters" in code[-1].outputs[0].text
    assert str(finished_run) not in (finished_run / "out" / NOTEBOOK).read_text()


RECORD = '(folder / "toy.json").write_text('


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "json.dumps(key | measured | {'id': 'IMA-99'})",
            "InputError: claim 'IMA-99' is not in the register",
        ),
        ("json.dumps(key | measured | {'model': [model]})", "FileError: toy.json: not a record"),
        ("'{'", "FileError: .*toy.json: not a record"),
        ("'[' * 5000", "FileError: .*toy.json: not a record"),
    ],
)
def test_a_record_that_could_not_be_judged_fails_the_run_that_made_it(tmp_path, written, message):
    before, after = BODY.split(RECORD)
    toy_chapter(
        tmp_path / "chapters", body=f"{before}{RECORD}{written})\n{after.partition(chr(10))[2]}"
    )
    with pytest.raises(RunError, match=f"chapter 'toy' failed: {message}"):
        run_chapter("toy", tmp_path / "out", folder=tmp_path / "chapters")
    assert files(tmp_path / "out") == [".lock", FAILURE, NOTEBOOK]
    assert json.loads((tmp_path / "out" / FAILURE).read_text())["cell"] is None


def test_what_runs_is_what_is_recorded_also_in_a_folder_with_braces(tmp_path):
    toy_chapter(
        tmp_path / "{seed} {no} {}",
        body=BODY.replace("effect + seed / 100", "sum(layers) + len(layers)"),
    )
    run_chapter(
        "toy", tmp_path / "{model}}{", {"layers": (3, 4)}, folder=tmp_path / "{seed} {no} {}"
    )
    content = read_results(tmp_path / "{model}}{" / RESULTS)
    assert content["given"] == {"layers": [3, 4]} and content["claims"][0]["value"] == 9


def test_whole_results_of_the_same_run_are_kept_and_of_another_are_not(finished_run, never):
    before = (finished_run / "out" / RESULTS).read_bytes()
    run_chapter(
        "toy", finished_run / "out", PARAMETERS, folder=finished_run / "chapters", resume=True
    )
    assert (finished_run / "out" / RESULTS).read_bytes() == before
    for parameters in (PARAMETERS | {"seed": 4}, {}):
        assert not run.same_run(
            finished_run / "out" / RESULTS,
            run.prepare("toy", parameters, finished_run / "chapters"),
        )
    toy_chapter(finished_run / "changed", body=BODY.replace("100", "10"))
    assert not run.same_run(
        finished_run / "out" / RESULTS, run.prepare("toy", PARAMETERS, finished_run / "changed")
    )


def test_a_chapter_that_fails_leaves_a_report_and_no_results(tmp_path):
    toy_chapter(tmp_path / "chapters")
    out = tmp_path / "out"
    out.mkdir()
    (out / RESULTS).write_text("of an earlier run")
    (out / ".work-left").mkdir()
    with pytest.raises(
        RunError,
        match=(
            r"'toy' failed in cell \[3\]: ValueError: asked to fail; the "
            r"traceback is in .*failure.json"
        ),
    ):
        run_chapter("toy", out, {"end": "raise"}, folder=tmp_path / "chapters")
    assert files(out) == [".lock", FAILURE, NOTEBOOK]
    failure = json.loads((out / FAILURE).read_text())
    assert (failure["error"], failure["message"], failure["cell"], failure["given"]) == (
        "ValueError",
        "asked to fail",
        3,
        {"end": "raise"},
    )
    assert "raise ValueError" in failure["source"] and "asked to fail" in failure["traceback"]
    assert "\x1b" not in json.dumps(failure, ensure_ascii=False)
    cells = nbformat.read(out / NOTEBOOK, as_version=4).cells
    assert "An Exception was encountered" in cells[0].source
    assert "peak_memory" not in cells[-1].source


def test_a_kernel_that_dies_is_reported_like_a_failure(tmp_path):
    toy_chapter(tmp_path / "chapters")
    with pytest.raises(
        RunError, match="DeadKernelError: the kernel died: killed from outside, or out of memory"
    ):
        run_chapter("toy", tmp_path / "out", {"end": "die"}, folder=tmp_path / "chapters")
    failure = json.loads((tmp_path / "out" / FAILURE).read_text())
    assert failure["error"] == DeadKernelError.__name__ and "os._exit(9)" in failure["source"]


def test_wrong_parameters_are_refused_before_anything_is_made(tmp_path, never):
    toy_chapter(tmp_path / "chapters")
    for wrong in ({"sed": 1}, {"seed": "1"}):
        with pytest.raises(InputError, match="seed"):
            run_chapter("toy", tmp_path / "out", wrong, folder=tmp_path / "chapters")
    assert not (tmp_path / "out").exists()


def test_a_second_run_in_the_same_folder_is_refused(finished_run, never):
    with (
        FileLock(finished_run / "out" / ".lock"),
        pytest.raises(RunError, match="another process is running a chapter in"),
    ):
        run_chapter("toy", finished_run / "out", PARAMETERS, folder=finished_run / "chapters")
    assert read_results(finished_run / "out" / RESULTS)["given"] == PARAMETERS


@pytest.mark.parametrize("stage", ["notebook", "results"])
def test_a_full_disk_is_said_and_leaves_no_results(finished_run, tmp_path, monkeypatch, stage):
    """The notebook of a run that went well is what papermill gives; then the disk is full."""
    executed = nbformat.read(finished_run / "out" / NOTEBOOK, as_version=4)
    measured = nbformat.v4.new_output("stream", text=json.dumps(peak_memory()))
    cell = nbformat.v4.new_code_cell(
        "", outputs=[measured], metadata={"papermill": executed.cells[-1].metadata.papermill}
    )
    executed.cells.append(cell)
    monkeypatch.setattr(run.papermill, "execute_notebook", lambda *_, **__: copy.deepcopy(executed))
    real = os.replace

    def full(source, target):
        if str(target).endswith({"notebook": NOTEBOOK, "results": RESULTS}[stage]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileError, match="No space left on device.*free space there"):
        run_chapter("toy", tmp_path / "out", PARAMETERS, folder=finished_run / "chapters")
    assert RESULTS not in files(tmp_path / "out")
    assert not [name for name in files(tmp_path / "out") if name.startswith(".work")]
    monkeypatch.setattr(os, "replace", real)
    assert run_chapter(
        "toy", tmp_path / "out", PARAMETERS, folder=finished_run / "chapters", resume=True
    ).exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-40],
        lambda text: text.replace("0.53", "0.63"),
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
    ],
    ids=["cut off", "changed", "empty", "a list", "without fields"],
)
def test_damaged_results_are_named(finished_run, tmp_path, damage):
    file = tmp_path / RESULTS
    file.write_text(damage((finished_run / "out" / RESULTS).read_text()))
    with pytest.raises(FileError, match=re.escape(str(file))):
        read_results(file)
    assert not run.same_run(file, run.prepare("toy", PARAMETERS, finished_run / "chapters"))


def test_results_without_a_field_are_damaged(finished_run, tmp_path):
    content = read_sealed(finished_run / "out" / RESULTS)
    write_sealed(
        tmp_path / RESULTS, {name: value for name, value in content.items() if name != "claims"}
    )
    with pytest.raises(FileError, match="claims missing"):
        read_results(tmp_path / RESULTS)


def test_the_environment_is_as_before(finished_run, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.delenv("XLVLMS_CLAIMS", raising=False)
    with run.environment({"TQDM_DISABLE": "1", "XLVLMS_CLAIMS": "there"}):
        assert (os.environ["TQDM_DISABLE"], os.environ["XLVLMS_CLAIMS"]) == ("1", "there")
    assert os.environ["TQDM_DISABLE"] == "0" and "XLVLMS_CLAIMS" not in os.environ
