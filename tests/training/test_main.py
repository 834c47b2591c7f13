"""The measured metrics land in the record beside the weights, and
only runs of the table are made.
"""

import json
from contextlib import nullcontext
from unittest.mock import MagicMock

import pandas as pd
import pytest

from xlvlms_tutorial.data import DATASETS
from xlvlms_tutorial.errors import RevisionError
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.pocket.variants import VARIANTS
from xlvlms_tutorial.training import main
from xlvlms_tutorial.training.compressed import COMPRESSED

READ_BY = {"scenes": "image", "composition": "image", "clips": "video", "sounds": "audio"}


class Report:
    def summary(self):
        return pd.DataFrame(
            [{"metric": "qa/overall", "value": 0.123456, "low": 0.1, "high": float("nan"), "n": 7}]
        )


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder of weights without any; what is loaded and asked for is kept."""
    kept = {
        "loaded": [],
        "asked": [],
        "trained": [],
        "through": [],
        "connectors": [],
        "folder": tmp_path,
    }
    for run in (*main.RUNS, main.SCORER):
        (tmp_path / run).mkdir()
        (tmp_path / run / "training.json").write_text(
            json.dumps({"run": run, "recipe": {"steps": 3}})
        )
    monkeypatch.setattr(main, "WEIGHTS", tmp_path)
    monkeypatch.setattr(
        main,
        "load",
        lambda name, dtype: (
            kept["loaded"].append((name, dtype)) or MagicMock(spec=VLM, model=MagicMock())
        ),
    )
    monkeypatch.setattr(
        main, "through", lambda run, vlm: kept["through"].append(run) or nullcontext()
    )
    monkeypatch.setattr(main, "connector_state", kept["connectors"].append)
    monkeypatch.setattr(main, "load_samples", lambda dataset, n: kept["asked"].append((dataset, n)))
    monkeypatch.setattr(main, "evaluate", lambda vlm, samples, dataset, batch_size: Report())
    monkeypatch.setattr(main, "train_connector", lambda run, through: kept["trained"].append(run))
    monkeypatch.setattr(
        main, "load_scorer", lambda dtype: kept["loaded"].append(("pocket-scorer", dtype))
    )
    monkeypatch.setattr(main, "preferences", lambda scorer, samples: Report().summary())
    monkeypatch.setattr(main, "train_scorer", lambda: kept["trained"].append("scorer"))
    monkeypatch.setattr(main, "train_adapter", kept["trained"].append)
    monkeypatch.setattr(main, "measure_adapter", lambda name: None)
    return kept


def test_measure_writes_metrics_into_the_record_and_keeps_the_rest(made):
    metrics = main.measure()
    written = json.loads((made["folder"] / "image" / "training.json").read_text())
    assert written["recipe"] == {"steps": 3} and written["metrics"] == metrics
    assert made["loaded"] == [("pocket-llava", "float32")]
    assert made["asked"] == [("scenes", 500), ("composition", 200)]
    assert metrics["scenes"] == [
        {"metric": "qa/overall", "value": 0.1235, "low": 0.1, "high": None, "n": 7}
    ]


@pytest.mark.parametrize(("name", "variant"), VARIANTS.items())
def test_each_run_is_measured_with_its_model_on_what_it_reads(made, name, variant):
    metrics = main.measure(variant.run)
    assert made["loaded"] == [(name, "bfloat16" if variant.run in COMPRESSED else "float32")]
    assert dict(made["asked"]) == main.MEASURED_ON[variant.run]
    assert list(metrics) == [dataset for dataset, _ in made["asked"]]
    assert {READ_BY[dataset] for dataset in metrics} == set(variant.reads)
    assert set(metrics) <= set(DATASETS)
    others = [
        json.loads((made["folder"] / run / "training.json").read_text())
        for run in main.RUNS
        if run != variant.run
    ]
    assert not any("metrics" in record for record in others)


def test_further_seeds_are_measured_with_their_own_connector_through_what_they_trained_with(made):
    main.measure("skipped-2")
    assert (made["loaded"], made["connectors"], made["through"]) == (
        [("pocket-llava", "bfloat16")],
        ["skipped-2"],
        ["skipped-2"],
    )
    main.measure("skipped")
    assert made["loaded"][-1] == ("pocket-llava-skipped", "bfloat16")
    assert made["connectors"] == ["skipped-2"]


def test_the_runs_asked_for_are_trained_and_measured_and_without_any_all(made):
    main.main(["audio", "video"])
    assert made["trained"] == ["audio", "video"]
    assert [name for name, _ in made["loaded"]] == ["pocket-llava-audio", "pocket-llava-video"]
    made["trained"].clear()
    main.main([])
    assert made["trained"] == [*main.RUNS, "scorer", *main.RECIPES]


def test_the_scorer_is_trained_and_measured_by_its_own_measures(made):
    main.main(["scorer"])
    assert (made["trained"], made["loaded"]) == (["scorer"], [("pocket-scorer", "float32")])
    assert dict(made["asked"]) == main.MEASURED_ON["scorer"]
    written = json.loads((made["folder"] / "scorer" / "training.json").read_text())
    assert list(written["metrics"]) == list(main.MEASURED_ON["scorer"])
    assert written["recipe"] == {"steps": 3}
    assert written["metrics"]["scenes"] == [
        {"metric": "qa/overall", "value": 0.1235, "low": 0.1, "high": None, "n": 7}
    ]


def test_an_unknown_run_is_refused_before_anything_is_trained(made):
    with pytest.raises(RevisionError, match="'smell'.*image, video, audio, joint, encoder-lite0"):
        main.main(["image", "smell"])
    assert made["trained"] == made["loaded"] == []
