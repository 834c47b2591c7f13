"""Batches become the table of runs of the package: what is taken, and what is said of machines."""

import json

import pytest

from tests.support.runs import run
from tools.pool import collect, hardware_of, main, recipe_of
from xlvlms_tutorial.claims import pool, read_runs
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.io import write_sealed

MACHINE = {"system": "Linux-6.1-x86_64-with-glibc", "processor": "some", "cores": 2, "gpu": None}


def result(seed, claims, n_samples=8, code="c"):
    parameters = {"model": "pocket-llava", "dataset": "scenes", "seed": seed}
    return {
        "chapter": "alignment",
        "code": code,
        "parameters": parameters | {"n_samples": n_samples},
        "given": {},
        "claims": claims,
        "versions": {},
        "commit": "abc",
        "started": "2026",
        "seconds": {"total": 1.0, "cells": 1.0},
        "memory": {"peak_bytes": 1},
        "machine": MACHINE,
    }


def batch(folder, *results):
    names = [f"run-{number}" for number in range(len(results) + 1)]  # the last is not run yet
    (folder / "plan.json").write_text(json.dumps({"runs": [{"id": name} for name in names]}))
    for name, content in zip(names, results, strict=False):
        (folder / "runs" / name).mkdir(parents=True)
        write_sealed(folder / "runs" / name / "results.json", content)
    return str(folder)


def test_a_batch_becomes_a_table_that_pools(tmp_path):
    elsewhere = run(0.9, model="pocket-llava-video")
    results = [result(seed, [run(0.3 + seed / 9, seed), elsewhere]) for seed in range(3)]
    file = tmp_path / "runs.parquet"
    main([batch(tmp_path, *results), "--out", str(file)])
    [entry] = pool(read_runs(file))
    assert (entry["runs"], entry["model"]) == (3, "pocket-llava")
    about = json.loads(file.with_suffix(".json").read_text())
    assert list(about["recipes"].values()) == [
        {"chapter": "alignment", "parameters": {"n_samples": 8}}
    ]
    assert about["hardware"] == [hardware_of(MACHINE)]
    assert "abc" not in json.dumps(about)  # no commit


@pytest.mark.parametrize("change", [{"n_samples": 9}, {"code": "d"}])
def test_runs_of_other_sizes_or_code_are_refused(tmp_path, change):
    folder = batch(tmp_path, result(0, [run(0.3, 0)]), result(1, [run(0.4, 1)], **change))
    with pytest.raises(InputError, match="recipe .* differ"):
        main([folder, "--out", str(tmp_path / "runs.parquet")])
    assert not (tmp_path / "runs.parquet").exists()


def test_a_batch_without_a_run_that_is_done_is_refused(tmp_path):
    with pytest.raises(InputError, match="run the batch first"):
        collect([batch(tmp_path)])


def test_a_machine_is_described_by_its_class_alone():
    assert hardware_of(MACHINE)["system"] == "Linux x86_64"
    assert hardware_of(MACHINE | {"system": "Plan9"})["system"] == "Plan9"


def test_a_recipe_has_neither_model_nor_data_nor_seed():
    assert recipe_of(result(0, [])) == recipe_of(result(5, []))
