"""Records of small encoders: gains against closed forms, what is recorded, what is drawn."""

import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from scipy import stats

from xlvlms_tutorial import load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.training import aim
from xlvlms_tutorial.tutorials import Experiment, encoders

SHRINKS = "the gain in what all captions say shrinks from the first look to the last"
FACTORS = (*encoders.ALWAYS, *encoders.SOMETIMES)


def run(seed, alpha, *values):
    scores = {}
    for step, value in zip((0, 5, 10), values, strict=True):
        scores[str(step)] = dict.fromkeys(FACTORS, value) | {"time": 1.0}
    return {"seed": seed, "alpha": alpha, "scores": scores}


RECORDS = {
    "controls": {
        "raw pixels": dict.fromkeys(FACTORS, 0.9),
        "most frequent value": dict.fromkeys(FACTORS, 0.2),
    },
    "runs": [
        run(2, 0.0, 0.3, 0.4, 0.7),
        run(1, 0.4, 0.3, 0.6, 0.8),
        run(1, 0.0, 0.3, 0.4, 0.6),
        run(2, 0.4, 0.3, 0.8, 0.7),
    ],
}


def test_curves_are_by_seed_and_look():
    assert encoders.looks(RECORDS) == [0, 5, 10]
    values = encoders.curve(RECORDS, 0.0, ["subject"])
    np.testing.assert_allclose(values, [[0.3, 0.4, 0.6], [0.3, 0.4, 0.7]])
    mixed = encoders.curve(RECORDS, 0.4, ["side", "time"])
    np.testing.assert_allclose(mixed[:, 1], [0.8, 0.9])


def test_a_gain_is_paired_by_seed_with_students_interval():
    estimate = encoders.gain(RECORDS, ["subject"], look=1)
    expected = stats.ttest_1samp([0.2, 0.4], 0).confidence_interval(0.95)
    assert estimate.value == pytest.approx(0.3) and estimate.n == 2
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
    assert encoders.gain(RECORDS, ["time"]).high == 0


def test_the_table_has_both_encoders_and_what_is_simpler():
    table = encoders.results(RECORDS)
    assert table.index.tolist() == list(FACTORS)
    row = table.loc["item"]
    assert row["words alone"] == pytest.approx(0.65)
    assert row["words and pixels"] == pytest.approx(0.75)
    assert row["difference"] == pytest.approx(0.1)
    assert row[["untrained", "raw pixels", "most frequent value"]].tolist() == [0.3, 0.9, 0.2]


def test_the_claim_is_recorded_for_the_world_of_the_records_alone():
    experiment = Experiment("encoders", "pocket-llava", "scenes")
    verdicts = encoders.record(experiment, RECORDS)
    assert list(verdicts) == ["in all captions", "in two captions of five"]
    assert {row["interval_over"] for row in experiment.records} == {"seeds"}
    assert {row["against"] for row in experiment.records} == {"words alone"}
    assert encoders.record(Experiment("encoders", "pocket-llava", "coco"), RECORDS) == {}


def test_sentences_follow_the_records():
    experiment = Experiment("encoders", "pocket-llava", "scenes")
    sentences = {}
    experiment.check = lambda statement, holds: sentences.update({statement: bool(holds)})
    steady = []
    for seed in range(4):
        shift = 0.01 * seed
        steady.append(run(seed, 0.0, 0.3, 0.4 + shift, 0.6 + shift))
        steady.append(run(seed, 0.4, 0.3, 0.6 + shift, 0.7 + shift))
    encoders.check_records(experiment, encoders.load_records())
    assert all(sentences.values()) and len(sentences) == 11
    encoders.check_records(experiment, RECORDS | {"runs": steady})
    assert sentences[SHRINKS]
    assert not sentences["place and time are read by anything"]
    assert not sentences["the gain in the side grows from the first look to the last"]
    assert not sentences["most of the last gain is in the count"]
    assert not sentences["subject and colour are undecided"]
    swapped = [run | {"alpha": 0.4 - run["alpha"]} for run in steady]
    encoders.check_records(experiment, RECORDS | {"runs": swapped})
    assert not sentences["pixels help early, with what all captions say"]
    assert not sentences[SHRINKS]


def test_groups_are_what_captions_of_the_world_say():
    for scene in load_samples("scenes", 40, "train", 11):
        words = [aim.split(caption) for caption in scene.captions]
        assert len(words) == 5
        number = {1: {"a", "an"}, 2: {"two"}, 3: {"three"}}[scene.truth["count"]]
        assert all(number & set(line) for line in words)
        for factor in ("subject", "colour", "place"):
            value = scene.truth[factor]
            assert value is None or all(value in line for line in words)
        for factor in encoders.SOMETIMES:
            assert sum(scene.truth[factor] in line for line in words) == 2


def test_what_is_not_in_the_records_is_refused():
    with pytest.raises(InputError, match="alpha=0.2"):
        encoders.curve(RECORDS, 0.2, ["subject"])
    with pytest.raises(InputError, match="factor"):
        encoders.curve(RECORDS, 0.0, ["mood"])


def test_shipped_records_are_whole():
    records = encoders.load_records()
    pairs = [(run["seed"], run["alpha"]) for run in records["runs"]]
    assert sorted(pairs) == [(seed, alpha) for seed in range(1, 11) for alpha in (0.0, 0.4)]
    for run in records["runs"]:
        assert set(run["scores"]["900"]) == set(FACTORS)


def test_published_encoders_have_their_published_sizes():
    table = encoders.published(336)
    # of the papers: about 0.3 thousand million parameters each
    assert table["parameters"].between(300, 320).all()
    assert table["tokens"].to_dict() == {"CLIP": 576, "SigLIP": 441, "DINOv2": 576, "AIMv2": 576}


def test_true_patches_continue_a_picture_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    real = pixels.astype(np.float32) / 255
    predicted = torch.zeros(4, 192)
    for number, (top, left) in enumerate([(0, 8), (8, 0), (8, 8)]):
        window = real[top : top + 8, left : left + 8]
        normalised = (window - window.mean()) / (window.std() + 1e-2)
        predicted[number] = torch.from_numpy(normalised.reshape(-1))
    shown = np.asarray(encoders.continued(picture, predicted, 1, 8))
    assert np.abs(shown.astype(int) - pixels).max() <= 1
    flat = np.asarray(encoders.continued(picture, torch.zeros(4, 192), 3, 8))
    assert np.array_equal(flat[:8], pixels[:8]) and len(np.unique(flat[8:, 8:])) == 1
    for prefix in (0, 5):
        with pytest.raises(InputError, match="1 to 4 patches"):
            encoders.continued(picture, predicted, prefix, 8)


def test_each_panel_has_both_encoders_and_both_baselines():
    figure, axes = plt.subplots(1, 2)
    encoders.draw(axes, RECORDS)
    for ax in axes:
        labels = [line.get_label() for line in ax.lines]
        expected = ["words alone", "words and pixels", "raw pixels", "most frequent value"]
        assert labels == expected
    plt.close(figure)


def test_pictures_stand_side_by_side():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (300, 300), "blue")
    row = encoders.beside([red, blue], size=20)
    assert row.size == (48, 20)
    assert row.getpixel((3, 3)) == (255, 0, 0) and row.getpixel((40, 3)) == (0, 0, 255)
    assert row.getpixel((24, 3)) == (255, 255, 255)
    assert math.isclose(row.width, 2 * 20 + 8)
