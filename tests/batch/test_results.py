"""What a batch gathers: whole results, named gaps, verdicts that follow from numbers alone."""

import hashlib
import json

import pandas as pd
import pytest

from xlvlms_tutorial.batch import results
from xlvlms_tutorial.batch.results import (
    FILES,
    gather,
    ledger,
    measurements,
    pooled,
    report,
    run_table,
    summary,
)
from xlvlms_tutorial.batch.run import FAILURE, RESULTS
from xlvlms_tutorial.claims.claims import CLAIMS
from xlvlms_tutorial.errors import FileError
from xlvlms_tutorial.io import write_json, write_sealed

EMPTY = {
    "code": "x",
    "versions": {},
    "commit": None,
    "started": "2026-01-01T00:00:00+00:00",
    "machine": {"cores": 2},
}


def claim(low, high, seed=0, model="a", name="IMA-1", verdict="confirmed", variant=""):
    middle = (low + high) / 2
    key = {
        "id": name,
        "model": model,
        "dataset": "d",
        "seeds": [seed],
        "variant": variant,
        "chapter": "toy",
        "against": "chance",
        "interval_over": "pictures",
        "choice": "fixed",
        "scale": "own",
        "versions": {"torch": "2"},
    }
    return key | {"value": middle, "low": low, "high": high, "n": 9, "verdict": verdict}


def write(batch, name, *claims, seed=0):
    parameters = {"model": "a", "dataset": "d", "seed": seed, "n_samples": 4}
    content = {"chapter": "toy", "parameters": parameters, "given": {}, "claims": list(claims)}
    took = {
        "seconds": {"total": 5.0, "kernel_start": 1.0, "cells": 3.0},
        "memory": {"peak_bytes": 2 * 10**9, "peak_gpu_bytes": None},
    }
    write_sealed(batch / "runs" / name / RESULTS, EMPTY | content | took)


@pytest.fixture
def batch(tmp_path):
    """Five planned runs: two done, one failed, one damaged, one that never ran."""
    write_json(
        tmp_path / "plan.json",
        {"runs": [{"id": name} for name in ("one", "two", "bad", "torn", "late")]},
    )
    write(tmp_path, "one", claim(0.1, 0.3), claim(-0.2, -0.1, name="IMA-2"))
    write(tmp_path, "two", claim(-0.3, -0.1, seed=1), seed=1)
    failure = {"error": "ValueError", "cell": 3, "message": "of two\nlines"}
    write_json(tmp_path / "runs" / "bad" / FAILURE, failure)
    write(tmp_path, "torn")
    file = tmp_path / "runs" / "torn" / RESULTS
    file.write_text(file.read_text()[:50])
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "late.log").write_text("one\nNo space left on device\n\n")
    return tmp_path


def test_every_run_has_a_state_and_every_gap_a_reason(batch):
    gathered = gather(batch)
    assert gathered.states == {
        "one": "done",
        "two": "done",
        "bad": "failed",
        "torn": "damaged",
        "late": "missing",
    }
    assert gathered.problems["bad"] == "ValueError (cell [3]): of two lines"
    assert "runs/torn/results.json" in gathered.problems["torn"]
    assert gathered.problems["late"] == "No space left on device"
    assert set(gathered.problems) == {"bad", "torn", "late"}
    assert [gathered.count(state) for state in results.STATES] == [2, 1, 1, 1]


def test_four_files_are_written_whole(batch):
    gather(batch)
    assert {path.name for path in batch.iterdir() if path.is_file()} == {"plan.json", *FILES}
    runs, measured = (
        pd.read_parquet(batch / name) for name in ("runs.parquet", "measurements.parquet")
    )
    assert runs["run"].tolist() == ["one", "two"]
    assert runs["seconds_overhead"].tolist() == [2.0, 2.0]
    assert json.loads(runs["parameters"][0])["n_samples"] == 4
    assert measured["run"].tolist() == ["one", "one", "two"]
    assert measured["verdict"].tolist() == ["confirmed", "refuted", "refuted"]
    page = (batch / "report.md").read_text()
    assert page.startswith("# 5 runs: 2 done, 1 failed, 1 missing, 1 damaged\n")
    assert "`bad` failed: ValueError (cell [3]): of two lines" in page
    assert "| IMA-1 | a | d |  | undecided | 2 |" in page


def test_a_batch_of_nothing_is_gathered_too(tmp_path):
    write_json(tmp_path / "plan.json", {"runs": [{"id": "late"}]})
    gathered = gather(tmp_path)
    assert gathered.problems == {"late": "not run yet"} and run_table(gathered).empty
    assert {entry["verdict"] for entry in json.loads((tmp_path / "claims.json").read_text())} == {
        "not measured"
    }
    assert report(gathered).startswith("# 1 runs: 1 missing")


BAD = {
    "an id that the register lacks": {"id": "IMA-99"},
    "a list as id": {"id": ["IMA-1"]},
    "a list as model": {"model": ["a"]},
    "no model": {"model": None},
    "a number as dataset": {"dataset": 3},
    "a mapping as variant": {"variant": {"layer": 3}},
    "text as value": {"value": "0.2"},
    "a truth value as bound": {"low": False},
    "no number": {"value": float("nan")},
    "an interval elsewhere": {"low": 5},
    "half an observation": {"n": 0.5},
    "no observation": {"n": 0},
    "seeds that are text": {"seeds": "0"},
    "seeds of text": {"seeds": ["a"]},
    "versions that are text": {"versions": "2"},
    "nothing to measure against": {"against": ""},
    "an interval over what is not known": {"interval_over": "stars"},
    "a list as choice": {"choice": ["fixed"]},
    "no scale": {"scale": None},
    "half a character": {"model": "\ud800"},
}


@pytest.mark.parametrize("wrong", BAD.values(), ids=list(BAD))
def test_a_record_that_cannot_be_judged_leaves_the_report_of_the_others(batch, wrong):
    record = claim(0.1, 0.3) | wrong
    file = batch / "runs" / "two" / RESULTS
    write(batch, "two", claim(0.1, 0.3))
    content = json.loads(file.read_text()) | {"claims": [claim(0.1, 0.2), record]}
    content.pop("sha256")
    file.write_text(
        json.dumps(
            content
            | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
        )
    )
    gathered = gather(batch)
    assert gathered.states["two"] == "damaged"
    assert gathered.states["one"] == "done"
    assert gathered.problems["two"]
    assert {row["run"] for row in gathered.measurements} == {"one"}  # nothing of a bad run is taken
    runs, measured = (
        pd.read_parquet(batch / name) for name in ("runs.parquet", "measurements.parquet")
    )
    assert runs["run"].tolist() == ["one"] and set(measured["run"]) == {"one"}
    assert "`two` damaged: " in (batch / "report.md").read_text()
    assert (batch / "claims.json").exists()
    with pytest.warns(UserWarning, match="left out of .*damaged: two"):
        assert {row["run"] for row in measurements(batch)} == {"one"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"claims": None},
        {"claims": {"id": "IMA-1"}},
        {"claims": [None]},
        {"claims": ["text"]},
        {"seconds": {}},
        {"seconds": None},
        {"parameters": None},
        {"memory": {}},
        {"memory": {"peak_bytes": "much"}},
        {"machine": None},
    ],
)
def test_results_that_are_none_leave_the_report_of_the_others(batch, wrong):
    content = json.loads((batch / "runs" / "two" / RESULTS).read_text()) | wrong
    content.pop("sha256")
    write_sealed(batch / "runs" / "two" / RESULTS, content)
    gathered = gather(batch)
    assert gathered.states["two"] == "damaged" and gathered.results.keys() == {"one"}
    assert pd.read_parquet(batch / "runs.parquet")["run"].tolist() == ["one"]


def test_values_of_several_types_are_tabled_together(tmp_path):
    """Chapters may give a parameter of one name another type each.

    Parquet has one type a column.
    """
    write_json(tmp_path / "plan.json", {"runs": [{"id": name} for name in "abc"]})
    for name, seed in zip("abc", (0, "a|b\nc", [1, {"x": 2}]), strict=True):
        write(tmp_path, name, claim(0.1, 0.3), seed=seed)
    write(tmp_path, "b", claim(0.1, 0.3, seed=10**30), seed=10**30)
    assert gather(tmp_path).count("done") == 3
    runs, measured = (
        pd.read_parquet(tmp_path / name) for name in ("runs.parquet", "measurements.parquet")
    )
    assert list(map(json.loads, runs["seed"])) == [0, 10**30, [1, {"x": 2}]]
    assert list(map(json.loads, measured["seeds"])) == [[0], [10**30], [0]]


def test_what_a_report_names_is_one_line_of_its_table(tmp_path):
    write_json(tmp_path / "plan.json", {"runs": [{"id": "a"}, {"id": "b"}]})
    write(tmp_path, "a", claim(0.1, 0.3, model="a|b\nc"))
    write_json(
        tmp_path / "runs" / "b" / FAILURE,
        {"error": "E", "cell": None, "message": "\ud800 and\n| more"},
    )
    gather(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| IMA-1 | a/b c | d |" in page and "`b` failed: E: \\ud800 and | more" in page


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", '{"runs": [3]}', '{"runs": {"a": 1}}', "[" * 5000, "null"]
)
def test_a_plan_that_is_none_is_named(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(FileError, match="no plan of a batch"):
        gather(tmp_path)


def test_a_failure_report_that_cannot_be_read_leaves_the_log(batch):
    for text in ("{", "[]", "[" * 5000, '{"error": 1}'):
        (batch / "runs" / "bad" / FAILURE).write_text(text)
        assert gather(batch, write=False).problems["bad"] == "not run yet"


def test_without_a_plan_there_is_no_batch(tmp_path):
    with pytest.raises(FileError, match="plan.json: no plan of a batch"):
        gather(tmp_path)


def test_a_planted_wrong_direction_flips_the_verdict_whatever_the_file_says(tmp_path):
    write_json(tmp_path / "plan.json", {"runs": [{"id": "one"}]})
    for (low, high), expected in {
        (0.1, 0.3): "confirmed",
        (-0.3, -0.1): "refuted",
        (-0.1, 0.1): "undecided",
    }.items():
        write(tmp_path, "one", claim(low, high, verdict="confirmed"))
        gather(tmp_path)
        (entry,) = [
            entry
            for entry in json.loads((tmp_path / "claims.json").read_text())
            if entry["id"] == "IMA-1"
        ]
        assert (
            entry["verdict"]
            == entry["by_model"]["a"]
            == entry["measurements"][0]["verdict"]
            == expected
        )
        assert pd.read_parquet(tmp_path / "measurements.parquet")["verdict"].tolist() == [expected]


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        ([], "not measured"),
        (["confirmed"] * 3, "confirmed"),
        (["refuted"] * 2, "refuted"),
        (["confirmed", "refuted"], "undecided"),
        (["confirmed", "undecided"], "undecided"),
        (["undecided"], "undecided"),
    ],
)
def test_several_verdicts_are_one_only_where_they_agree(verdicts, together):
    assert pooled(verdicts) == together == pooled(reversed(verdicts))


def test_the_summary_pools_seeds_and_nothing_else():
    rows = [
        claim(0.1, 0.3),
        claim(0.1, 0.2, seed=1),
        claim(-0.3, -0.1, model="b"),
        claim(-0.1, 0.1, variant="layer 3"),
    ]
    judged = [
        row | {"verdict": verdict}
        for row, verdict in zip(
            rows, ("confirmed", "confirmed", "refuted", "undecided"), strict=True
        )
    ]
    table = summary(judged)
    assert table[["model", "variant", "verdict", "n"]].values.tolist() == [
        ["a", "", "confirmed", 2],
        ["b", "", "refuted", 1],
        ["a", "layer 3", "undecided", 1],
    ]


def test_the_ledger_for_machines_holds_every_claim_and_every_measurement():
    entries = {
        entry["id"]: entry
        for entry in ledger(
            [claim(0.1, 0.3) | {"run": "one"}, claim(0.1, 0.4, model="b") | {"run": "two"}]
        )
    }
    assert list(entries) == list(CLAIMS)
    entry = entries["IMA-1"]
    assert entry["source"]["paper"] == CLAIMS["IMA-1"].paper
    assert (entry["null"], entry["test"]) == (0.0, "> 0")
    assert entry["by_model"] == {"a": "confirmed", "b": "confirmed"}
    assert [measurement["run"] for measurement in entry["measurements"]] == ["one", "two"]
    claimed = CLAIMS["IMA-1"]
    assert (entry["fidelity"], entry["reason"]) == (claimed.fidelity, claimed.reason)
    assert (entry["about"], entry["effect"]) == (claimed.about, claimed.effect)
    names = ("against", "interval_over", "choice", "scale")
    for measurement in entry["measurements"]:
        said = tuple(measurement[name] for name in names)
        assert said == ("chance", "pictures", "fixed", "own")
    assert entries["IMA-2"]["verdict"] == "not measured" and entries["IMA-2"]["measurements"] == []


def test_measurements_come_from_a_batch_a_run_or_a_file(batch):
    with pytest.warns(UserWarning, match="left out of .*damaged: torn"):
        rows = measurements(batch)
    assert [(row["id"], row["verdict"]) for row in rows] == [
        ("IMA-1", "confirmed"),
        ("IMA-2", "refuted"),
        ("IMA-1", "refuted"),
    ]
    for path in (batch / "runs" / "two", batch / "runs" / "two" / RESULTS):
        assert [row["verdict"] for row in measurements(path)] == ["refuted"]
    for path in (batch / "runs" / "torn", batch / "absent"):
        with pytest.raises(FileError):
            measurements(path)


def test_a_full_disk_leaves_the_files_of_before(batch, monkeypatch):
    gather(batch)
    before = {name: (batch / name).read_bytes() for name in FILES}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    write(batch, "late", claim(0.1, 0.2))
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(FileError, match="runs.parquet cannot be written .No space left"):
        gather(batch)
    assert before == {name: (batch / name).read_bytes() for name in FILES}
    monkeypatch.undo()
    assert gather(batch).count("done") == 3


def test_the_command_of_the_engine_says_whether_all_is_done(batch, monkeypatch):
    monkeypatch.setattr(results.sys, "argv", ["results", str(batch)])
    with pytest.raises(SystemExit) as error:
        results.main()
    assert error.value.code == 1
    write_json(batch / "plan.json", {"runs": [{"id": "one"}]})
    with pytest.raises(SystemExit) as error:
        results.main()
    assert error.value.code == 0
    (batch / "plan.json").unlink()
    with pytest.raises(SystemExit, match="FileError: .*no plan of a batch"):
        results.main()
