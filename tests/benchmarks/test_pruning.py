"""The smaller model of the benchmark is smaller, today's way merges to the
same masks, and memory is counted.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import pruning
from benchmarks.harness import Options, Report
from benchmarks.subjects import Subject
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.methods.pruning.scores import random_masks
from xlvlms_tutorial.methods.pruning.sparsify import alpha_subnet


@pytest.fixture(scope="module")
def subject():
    samples = [Sample(f"s{k}", Image.new("RGB", (32, 32), (10 * k, 90, 200))) for k in range(4)]
    return Subject("tiny-llava", tiny_llava(), dict, samples)


def test_everything_is_measured_and_the_dense_model_stays(subject):
    report = Report("trial", Options(device="cpu", repeats=2, quick=True))
    before = {name: value.clone() for name, value in subject.vlm.model.state_dict().items()}
    attention = subject.vlm.model.config._attn_implementation
    pruning.about(report, subject, 2)
    assert len(report.promises) == 2
    values = {finding.label: finding.estimate.value for finding in report.findings}
    assert all(value > 0 for value in values.values())
    counted = next(value for label, value in values.items() if label.startswith("counted work"))
    assert counted < 0.9
    assert next(value for label, value in values.items() if "set to zero, over dense" in label) == 1
    assert "needs a GPU" in report.setting["2:4"]
    after = subject.vlm.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert subject.vlm.model.config._attn_implementation == attention == "sdpa"


def test_todays_way_merges_to_the_same_masks(subject, tmp_path):
    paths = [random_masks(subject.vlm, 0.3, seed).save(tmp_path / str(seed)) for seed in range(3)]
    ours, today = alpha_subnet(paths), pruning.all_at_once(paths)
    assert all(torch.equal(ours.unpack(*key), today[key]) for key in ours)


def test_the_peak_is_counted_to_a_few_bytes():
    def call():
        first = np.zeros(1_000_000, np.uint8)
        del first
        return np.zeros(2_000_000, np.uint8), np.zeros(1_000_000, np.uint8)

    assert 3_000_000 <= pruning.peak(call) < 3_010_000
    assert pruning.peak(lambda: None) < 10_000
