"""The measured metrics land in the record beside the weights, and
only runs of the table are made.
"""

import json
from contextlib import nullcontext
from unittest.mock import MagicMock

import pandas as pd
import pytest

from xlvlms_tutorial.data import DATASETS
from xlvlms_tutorial.errors import LoadError
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
def calls(tmp_path, monkeypatch):
    """A folder of weights without any; what is loaded and asked for is kept."""
    recorded = {
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
            recorded["loaded"].append((name, dtype)) or MagicMock(spec=VLM, model=MagicMock())
        ),
    )
    monkeypatch.setattr(
        main, "through", lambda run, vlm: recorded["through"].append(run) or nullcontext()
    )
    monkeypatch.setattr(main, "connector_state", recorded["connectors"].append)
    monkeypatch.setattr(
        main, "load_samples", lambda dataset, n: recorded["asked"].append((dataset, n))
    )
    monkeypatch.setattr(main, "evaluate", lambda vlm, samples, dataset, batch_size: Report())
    monkeypatch.setattr(
        main, "train_connector", lambda run, through: recorded["trained"].append(run)
    )
    monkeypatch.setattr(
        main, "load_scorer", lambda dtype: recorded["loaded"].append(("pocket-scorer", dtype))
    )
    monkeypatch.setattr(main, "preferences", lambda scorer, samples: Report().summary())
    monkeypatch.setattr(main, "train_scorer", lambda: recorded["trained"].append("scorer"))
    monkeypatch.setattr(main, "train_segmenter", lambda: recorded["trained"].append("segmenter"))
    monkeypatch.setattr(main, "train_adapter", recorded["trained"].append)
    monkeypatch.setattr(main, "measure_adapter", lambda name: None)
    return recorded


def test_measure_writes_metrics_into_the_record_and_keeps_the_rest(calls):
    metrics = main.measure()
    written = json.loads((calls["folder"] / "image" / "training.json").read_text())
    assert written["recipe"] == {"steps": 3} and written["metrics"] == metrics
    assert calls["loaded"] == [("pocket-llava", "float32")]
    assert calls["asked"] == [("scenes", 500), ("composition", 200)]
    assert metrics["scenes"] == [
        {"metric": "qa/overall", "value": 0.1235, "low": 0.1, "high": None, "n": 7}
    ]


@pytest.mark.parametrize(("name", "variant"), VARIANTS.items())
def test_each_run_is_measured_with_its_model_on_what_it_reads(calls, name, variant):
    metrics = main.measure(variant.run)
    assert calls["loaded"] == [(name, "bfloat16" if variant.run in COMPRESSED else "float32")]
    assert dict(calls["asked"]) == main.MEASURED_ON[variant.run]
    assert list(metrics) == [dataset for dataset, _ in calls["asked"]]
    assert {READ_BY[dataset] for dataset in metrics} == set(variant.reads)
    assert set(metrics) <= set(DATASETS)
    others = [
        json.loads((calls["folder"] / run / "training.json").read_text())
        for run in main.RUNS
        if run != variant.run
    ]
    assert not any("metrics" in record for record in others)


def test_further_seeds_are_measured_with_their_own_connector_through_what_they_trained_with(calls):
    main.measure("skipped-2")
    assert (calls["loaded"], calls["connectors"], calls["through"]) == (
        [("pocket-llava", "bfloat16")],
        ["skipped-2"],
        ["skipped-2"],
    )
    main.measure("skipped")
    assert calls["loaded"][-1] == ("pocket-llava-skipped", "bfloat16")
    assert calls["connectors"] == ["skipped-2"]


def test_the_runs_asked_for_are_trained_and_measured_and_without_any_all(calls):
    main.main(["audio", "video"])
    assert calls["trained"] == ["audio", "video"]
    assert [name for name, _ in calls["loaded"]] == ["pocket-llava-audio", "pocket-llava-video"]
    calls["trained"].clear()
    main.main([])
    assert calls["trained"] == [*main.RUNS, "scorer", "segmenter", *main.RECIPES]


def test_experts_are_trained_and_measured_elsewhere(calls):
    main.main(["expert-captions-0", "expert-captions-other"])
    assert calls["trained"] == ["expert-captions-0", "expert-captions-other"]
    assert calls["asked"] == []


def test_the_scorer_is_trained_and_measured_by_its_own_measures(calls):
    main.main(["scorer"])
    assert (calls["trained"], calls["loaded"]) == (["scorer"], [("pocket-scorer", "float32")])
    assert dict(calls["asked"]) == main.MEASURED_ON["scorer"]
    written = json.loads((calls["folder"] / "scorer" / "training.json").read_text())
    assert list(written["metrics"]) == list(main.MEASURED_ON["scorer"])
    assert written["recipe"] == {"steps": 3}
    assert written["metrics"]["scenes"] == [
        {"metric": "qa/overall", "value": 0.1235, "low": 0.1, "high": None, "n": 7}
    ]


def test_an_unknown_run_is_refused_before_anything_is_trained(calls):
    with pytest.raises(
        LoadError,
        match="'smell'.*image, video, audio, joint, gemma, image-1, image-2, encoder-lite0",
    ):
        main.main(["image", "smell"])
    assert calls["trained"] == calls["loaded"] == []
