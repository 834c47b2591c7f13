"""Records of tuning under a shift: closed forms of scores and margins, and what is recorded."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from tests.support.tiny import lively, tiny_llava
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.models import tune
from xlvlms_tutorial.samples import PROMPTS, Question, Sample
from xlvlms_tutorial.tutorials import Experiment, peft

SPLIT = dict.fromkeys(peft.PARTS, "11 1")


def run(way, seed, words, parameters=10, validation=0.5, labels=64):
    scores = dict.fromkeys(peft.PARTS, words)
    row = {
        "way": way,
        "labels": labels,
        "seed": seed,
        "parameters": parameters,
        "total": 1000,
        "scores": scores,
    }
    return row | {"validation": validation, "rate": 0.1, "seconds": 2.0}


def made(*runs):
    blind = [dict.fromkeys(peft.PARTS, "00 1")] * 2
    settings = {"model": "pocket-llava"}
    return {"settings": settings, "base": SPLIT, "blind": blind, "runs": list(runs)}


RECORDS = made(
    run("full tuning", 0, "11 1", 900, 0.9),
    run("full tuning", 1, "10 1", 900, 0.9),
    run("IA3", 1, "00 1", 5, 0.7),
    run("IA3", 0, "11 0", 5, 0.5),
    run("random subset", 0, "11 1", 5, 1.0),
    run("norm tuning", 0, "11 1", 9, 0.4),
)


def test_a_score_is_the_share_of_all_questions_and_no_mean_of_pictures():
    assert peft.score(RECORDS, "full tuning", "in domain").value == pytest.approx(5 / 6)
    assert peft.score(RECORDS, "no tuning", "in domain").value == 1
    assert peft.score(RECORDS, "most frequent answer", "old domain").value == pytest.approx(1 / 3)
    right, total = peft.correct(RECORDS, "IA3", "in domain")
    assert right.tolist() == [[2, 0], [0, 1]]  # in the order of seeds
    assert total.tolist() == [2, 1]


def test_margins_are_paired_by_seed_and_picture():
    difference = peft.margin(RECORDS, "IA3", "full tuning", "old domain")
    assert difference.value == pytest.approx(3 / 6 - 5 / 6)
    same = peft.margin(RECORDS, "IA3", "IA3", "old domain")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    unpaired = peft.margin(RECORDS, "IA3", "norm tuning", "old domain")
    assert unpaired.value == pytest.approx(3 / 6 - 1)


def test_an_interval_covers_seeds_too():
    alike = made(*(run("IA3", seed, "1 0 " * 20) for seed in range(3)))
    apart = made(*(run("IA3", seed, f"{seed % 2} " * 40) for seed in range(3)))
    widths = []
    for records in (alike, apart):
        estimate = peft.score(records, "IA3", "in domain")
        widths.append(estimate.high - estimate.low)
    assert widths[0] < 0.4
    assert widths[1] == pytest.approx(1)


def test_the_table_has_counts_beside_percentages_and_the_fewest_first():
    table = peft.results(RECORDS)
    assert table.index.tolist() == [
        "no tuning",
        "most frequent answer",
        "IA3",
        "random subset",
        "norm tuning",
        "full tuning",
    ]
    assert table.loc["full tuning", ["parameters", "percent", "seeds"]].tolist() == [900, 90, 2]
    assert table.loc["no tuning", "parameters"] == 0


def test_validation_chooses_among_the_few_and_no_random_subset():
    assert peft.best_few(RECORDS) == "IA3"
    assert peft.best_few(RECORDS, limit=1.0) == "full tuning"


def test_other_numbers_of_labels_stand_apart():
    fewer = [run("IA3", seed, "00 0", 5, labels=16) for seed in (0, 1)]
    records = made(*RECORDS["runs"], *fewer)
    for part in peft.PARTS:
        assert peft.score(records, "IA3", part) == peft.score(RECORDS, "IA3", part)
    pd.testing.assert_frame_equal(peft.results(records), peft.results(RECORDS))
    table = peft.by_labels(records)
    assert table.index.tolist() == [("IA3", 16), ("IA3", 64)]
    assert table["in domain"].tolist() == [0, 0.5]
    with pytest.raises(InputError, match="way"):
        peft.margin(records, "IA3", "full tuning", "in domain", labels=16)
    figure, axes = plt.subplots(1, 3)
    peft.draw_labels(axes, table)
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["16", "64"]
    plt.close(figure)


def test_unknown_ways_and_parts_are_refused():
    with pytest.raises(InputError, match="'BitFit'"):
        peft.score(RECORDS, "BitFit", "in domain")
    with pytest.raises(InputError, match="part"):
        peft.score(RECORDS, "IA3", "test")


def test_claims_are_recorded_for_the_model_of_the_records_alone():
    experiment = Experiment("peft", "pocket-llava", "scenes", [0, 1, 2])
    verdicts = peft.record(experiment, RECORDS)
    assert list(verdicts) == ["PEFT-1, in domain", "PEFT-1, out of domain", "PEFT-2, old domain"]
    assert {row["against"] for row in experiment.records} == {"full tuning"}
    assert peft.record(Experiment("peft", "another", "scenes"), RECORDS) == {}


def test_shipped_records_are_whole():
    records = peft.load_records()
    ways = set(records["settings"]["rates"])
    runs = [(entry["way"], entry["labels"], entry["seed"]) for entry in records["runs"]]
    assert len(set(runs)) == len(runs) == 3 * len(ways) + 2 * 3 * 4
    assert sum(labels == 64 for _, labels, _ in runs) == 3 * len(ways)
    for entry in records["runs"]:
        assert entry["step"] in records["settings"]["checks"]
        for part, n in records["settings"]["parts"].items():
            assert len(entry["scores"][part].split()) == n


def test_each_way_is_a_point_in_each_panel():
    figure, axes = plt.subplots(1, 3)
    peft.draw(axes, peft.results(RECORDS))
    for ax in axes:
        assert ax.get_xscale() == "log"
        assert len(ax.containers) == 4
    plt.close(figure)


def test_comparisons_are_with_what_is_simpler():
    records = made(*RECORDS["runs"], run("connector", 0, "11 1"))
    table = peft.comparisons(records, "IA3")
    assert set(table.index.get_level_values("against")) == {
        "connector",
        "random subset",
        "most frequent answer",
    }
    assert np.isfinite(table.to_numpy(dtype=float)).all()


def test_sentences_follow_the_records():
    experiment = Experiment("peft", "pocket-llava", "scenes")
    sentences = {}
    experiment.check = lambda statement, holds: sentences.update({statement: bool(holds)})
    peft.check_scores(experiment, peft.load_records())
    assert all(sentences.values()) and len(sentences) == 8
    swapped = {"connector": "full tuning", "full tuning": "connector"}
    runs = []
    for row in peft.load_records()["runs"]:
        runs.append(row | {"way": swapped.get(row["way"], row["way"])})
    peft.check_scores(experiment, peft.load_records() | {"runs": runs})
    assert not sentences["full tuning forgets most"]
    assert not sentences["the best of the few is the connector"]


def test_more_labels_are_compared_in_pairs():
    fewer = [run("IA3", 0, "00 0", 5, labels=16), run("IA3", 1, "00 1", 5, labels=16)]
    records = made(*RECORDS["runs"], *fewer)
    gain = peft.label_gain(records, "IA3", "old domain", 16, 64)
    assert gain.value == pytest.approx(3 / 6 - 1 / 6)
    sentences = {}
    experiment = Experiment("peft", "pocket-llava", "scenes")
    experiment.check = lambda statement, holds: sentences.update({statement: bool(holds)})
    peft.check_labels(experiment, peft.load_records())
    assert all(sentences.values()) and len(sentences) == 4


def pictures():
    image = Image.new("RGB", (32, 32), (200, 30, 40))
    questions = (Question("presence", "Is there a key ?", "yes"),)
    return [Sample("a", image, ("a key",), questions), Sample("b", image, ("a red key",))]


def test_the_live_training_lowers_the_loss_and_moves_the_tuned_alone():
    vlm = lively(tiny_llava())
    before = {name: weight.clone() for name, weight in vlm.model.named_parameters()}
    steps = []
    with tune(vlm, "norm") as tuning:
        losses = peft.train(vlm, tuning, pictures(), 12, 0.05, at_step=steps.append)
    assert losses[-1] < losses[0]
    assert steps == list(range(1, 13))
    for name, weight in vlm.model.named_parameters():
        assert torch.equal(weight, before[name])


def test_what_has_no_question_is_described():
    first, second = pictures()
    assert peft.asked(first) == ("Is there a key ?", "yes")
    assert peft.asked(first, kind=5) == ("Is there a key ?", "yes")
    assert peft.asked(second) == (PROMPTS["image"], "a red key")
    assert len(peft.ask(lively(tiny_llava()), [first, second])) == 2
