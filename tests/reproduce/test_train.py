"""The measured metrics land in the record beside the weights."""

import json

import pandas as pd

from xlvlms_tutorial.reproduce import train


def test_measure_writes_metrics_into_the_record_and_keeps_the_rest(tmp_path, monkeypatch):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "training.json").write_text('{"run": "image", "recipe": {"steps": 3}}')
    asked = []

    class Report:
        def summary(self):
            return pd.DataFrame([{"metric": "qa/overall", "value": 0.123456, "low": 0.1, "high": float("nan"), "n": 7}])

    monkeypatch.setattr(train, "WEIGHTS", tmp_path)
    monkeypatch.setattr(train, "load", lambda name, dtype: (name, dtype))
    monkeypatch.setattr(train, "load_samples", lambda dataset, n: asked.append((dataset, n)))
    monkeypatch.setattr(train, "evaluate", lambda vlm, samples, dataset, batch_size: Report())
    metrics = train.measure()
    written = json.loads((tmp_path / "image" / "training.json").read_text())
    assert written["recipe"] == {"steps": 3} and written["metrics"] == metrics
    assert asked == [("scenes", 500), ("composition", 200)]
    assert metrics["scenes"] == [{"metric": "qa/overall", "value": 0.1235, "low": 0.1, "high": None, "n": 7}]
