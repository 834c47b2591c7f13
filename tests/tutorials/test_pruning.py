"""Masked and cut models are judged as said: on made reports, and on a tiny model."""

import pandas as pd
import pytest
import torch
from PIL import Image

from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial.data import Question, Sample, load_samples
from xlvlms_tutorial.evaluation import Report
from xlvlms_tutorial.methods.pruning import (
    calibrate,
    magnitude_masks,
    prune_blocks,
    prune_neurons,
    wanda,
)
from xlvlms_tutorial.tutorials import Experiment, pruning

GREY = Image.new("RGB", (32, 32), "grey")
PRESENCE = [Question("presence", f"is there a {word}?", "no") for word in ("fish", "frog", "worm")]
OTHERS = [Question("place", f"what is {word}?", "sand") for word in ("here", "there")]


def sample(place="sand", questions=(), name="s"):
    return Sample(name, GREY, ("a fish on sand",), tuple(questions), {"place": place})


def report(captions, correct, factors=None, predictions=None):
    names = [str(number) for number in range(len(captions))]
    said = pd.DataFrame({"sample": names, "caption": captions} | (factors or {"place": True}))
    answers = pd.DataFrame({"sample": names, "type": "presence", "correct": correct})
    return Report("small", "made", 0, said, answers.assign(prediction=predictions or "no"))


@pytest.fixture(scope="module")
def vlm():
    return tiny_reader()


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch_of(load_samples("scenes", n=1), ["describe the picture"])


def test_two_questions_turn_with_the_place():
    first, second, third = pruning.two_questions([sample(questions=[*PRESENCE, *OTHERS])] * 3)
    assert first.questions == (PRESENCE[0], OTHERS[0])
    assert second.questions == (PRESENCE[1], OTHERS[1])
    assert third.questions == (PRESENCE[2], OTHERS[0])


def test_a_kind_that_is_missing_is_left_out():
    (one,) = pruning.two_questions([sample(questions=OTHERS)])
    assert one.questions == (OTHERS[0],)


def test_means_and_bands_are_those_of_the_samples():
    reports = {"dense": report(["a", "b"], [True, False])}
    assert pruning.mean_scores(reports).loc["dense"].to_dict() == {"captions": 1.0, "answers": 0.5}
    bands = pruning.score_bands({("dense", 0.3): reports["dense"]}).set_index("task")
    assert bands.loc["answers", ["name", "x", "value", "n"]].tolist() == ["dense", 0.3, 0.5, 2]


def test_the_shared_mask_is_compared_with_the_better_baseline(tmp_path, monkeypatch):
    monkeypatch.setenv("XLVLMS_CLAIMS", str(tmp_path))
    n = 20
    reports = {
        "alpha-SubNet": report(["a"] * n, [True] * n),
        "magnitude": report(["a"] * n, [True] * (n - 1) + [False]),
        "random": report(["a"] * n, [False] * n),
    }
    experiment = Experiment("pruning", "small", "made")
    verdicts = pruning.record_shared(experiment, reports, "pictures", 0.3)
    values = {one["variant"]: one["value"] for one in experiment.records}
    against = "pictures, 30% sparsity, against magnitude or random"
    assert verdicts.keys() == {f"captions, {against}", f"answers, {against}"}
    assert values[f"answers, {against}"] == pytest.approx(1 / n)
    assert verdicts[f"answers, {against}"] == "undecided"
    against_random = pruning.record_shared(experiment, reports, "x", 0.5, ["random"])
    assert against_random["answers, x, 50% sparsity, against random"] == "confirmed"
    assert [one["against"] for one in experiment.records] == (
        ["better of magnitude, random"] * 2 + ["random"] * 2
    )


def test_baselines_are_as_sparse_in_every_row(vlm):
    calibration = calibrate(vlm, load_samples("scenes", n=2))
    masks = pruning.baseline_masks(vlm, {"one": calibration}, 0.25)
    shared = masks["alpha-SubNet"]
    for name in pruning.BASELINES:
        for key in shared:
            ours, theirs = shared.unpack(*key), masks[name].unpack(*key)
            assert torch.equal(ours.sum(dim=1), theirs.sum(dim=1))
    assert not torch.equal(masks["magnitude"].unpack(*key), masks["random"].unpack(*key))


def test_masks_to_compare_are_as_sparse_in_every_row(vlm):
    calibration = calibrate(vlm, load_samples("scenes", n=2))
    shared = {s: wanda(vlm, calibration, s) for s in (0.25, 0.3, 0.5)}
    masks = pruning.masks_to_compare(vlm, shared, calibration, (0.25, 0.3, 0.5))
    baselines = ["magnitude", "random"]
    assert [list(by_name) for by_name in masks.values()] == [
        [pruning.SHARED, "Wanda, pictures", *baselines],
        [pruning.SHARED, "Wanda, pictures"],
        [pruning.SHARED, *baselines],
    ]
    for sparsity, by_name in masks.items():
        for mask in by_name.values():
            for key in mask:
                per_row = mask.unpack(*key).sum(dim=1)
                assert torch.equal(per_row, shared[sparsity].unpack(*key).sum(dim=1))
    assert masks[0.25]["Wanda, pictures"] == shared[0.25]


def test_a_changed_copy_leaves_the_model_alone(vlm):
    before = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    masks = magnitude_masks(vlm, 0.5)
    copy = pruning.changed(vlm, pruning.zero_weights, masks)
    assert all(torch.equal(weight, before[n]) for n, weight in vlm.model.state_dict().items())
    modules = dict(copy.model.named_modules())
    for name, mask in masks.tensors(copy).items():
        assert (modules[name].weight[~mask] == 0).all()
        assert torch.equal(modules[name].weight[mask], before[f"{name}.weight"][mask])


def test_masks_are_undone_after_a_judgement(vlm):
    samples = pruning.two_questions(load_samples("scenes", n=2))
    before = vlm.blocks[0].mlp.up_proj.weight.clone()
    masked = pruning.judge(vlm, samples, magnitude_masks(vlm, 0.9))
    assert masked.captions["sample"].tolist() == [one.id for one in samples]
    assert torch.equal(vlm.blocks[0].mlp.up_proj.weight, before)


def test_a_mask_costs_what_the_dense_model_costs_and_a_cut_less(vlm, batch):
    dense = pruning.counted(vlm, batch)
    masked = pruning.changed(vlm, pruning.zero_weights, magnitude_masks(vlm, 0.5))
    assert pruning.counted(masked, batch) == dense
    for cut in (
        pruning.changed(vlm, prune_neurons, {n: torch.arange(64.0) for n in (1, 2, 3)}, 0.5),
        pruning.changed(vlm, prune_blocks, [2]),
    ):
        assert all(value < dense[name] for name, value in pruning.counted(cut, batch).items())


def test_the_tower_alone_sees_the_pictures_of_the_batch(vlm, batch):
    ways = pruning.ways_to_read({"dense": vlm, "again": vlm}, batch)
    assert list(ways) == ["dense", "again", "tower alone"]
    states = ways["tower alone"]()
    assert not torch.is_grad_enabled() or not states[0].requires_grad
    assert torch.equal(ways["dense"]()[0], ways["again"]()[0])


def test_facts_are_counted_by_hand():
    captions = ["a fish on sand", "a fish on snow", "a fish"]
    named = {"subject": [True, True, True], "place": [True, False, False]}
    samples = [sample(name=name) for name in ("0", "1", "2", "not asked")]
    made = report(captions, [True] * 3, named, ["Yes", "no", "yes."])
    facts = pruning.facts_named({"x": made}, samples, ["sand", "snow", "grass"]).loc["x"]
    assert facts["subject"] == 1 and facts["place"] == pytest.approx(1 / 3)
    assert facts["another place"] == pytest.approx(1 / 3)
    assert facts["says yes"] == pytest.approx(2 / 3)
    assert pd.isna(facts["colour"])


def test_a_saving_is_seen_only_below_a_difference_of_nothing():
    columns = ["value", "low", "high", "n", "resolved"]
    rows = [[1, 1, 1, 8, True], [0.9, 0.85, 0.97, 8, False], [0.8, 0.7, 0.9, 8, False]]
    times = pd.DataFrame([*rows, [1, 0.95, 1.05, 8, True]], columns=columns)
    times.index = ["dense", "near", "cut", "dense, again"]
    shown = pruning.savings(times, pd.Series({"dense": 1.0, "near": 0.9, "cut": 0.75}))
    assert shown["saving"].to_dict() == {
        "near": "not seen",
        "cut": "seen",
        "dense, again": "not seen",
    }
    assert shown.loc["cut", ["counted", "measured"]].tolist() == [0.75, 0.8]
