"""Captions in two ways, settings and scores of the chapter on style, on hand-made cases."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support.tiny import tiny_llava
from xlvlms_tutorial import load_samples
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.steering import SteeringVectors
from xlvlms_tutorial.tutorials import Experiment, steering_style
from xlvlms_tutorial.tutorials.steering_style import StyleStudy

TIMES = ["day", "dusk", "night"]
TINY = tiny_llava()


def pictured(*captions: str) -> Sample:
    return Sample("a", None, captions, truth={"subject": "frog", "item": "key", "time": "day"})


def study_of(samples: list[Sample], dataset: str = "photographs") -> StyleStudy:
    return StyleStudy(TINY, dataset, [1], samples, samples, samples, seed=0)


def test_captions_are_sorted_by_whether_they_have_a_word_of_the_style():
    samples = [pictured("A frog.", "A frog by day.", "Frogs."), pictured("A frog at night.")]
    pairs = steering_style.caption_pairs(study_of(samples), "train", "time", TIMES)
    assert pairs == [("A frog.", "A frog by day."), (None, "A frog at night.")]
    pictures, plain, styled = steering_style.with_both(study_of(samples), "time", TIMES)
    assert (pictures, plain, styled) == (samples[:1], ["A frog."], ["A frog by day."])


def test_data_with_styled_captions_has_a_pair_for_each_picture():
    samples = load_samples("scenes", n=3)
    pairs = steering_style.caption_pairs(study_of(samples, "scenes"), "train", "mood", ["calm"])
    assert [plain for plain, _ in pairs] == [sample.captions[0] for sample in samples]
    assert all(styled and styled != plain for plain, styled in pairs)


def test_a_style_needs_more_than_three_captions_of_either_kind():
    both = [pictured("A frog.", "A frog by day.")]
    words = {"time": TIMES, "sea": ["ship"]}
    assert steering_style.usable_styles(study_of(both * 3), words)["published"] == []
    enough = steering_style.usable_styles(study_of(both * 4), words)
    assert enough == {"published": ["time"], "paired": ["time"]}
    apart = [pictured("A frog."), pictured("A frog by day.")] * 4
    enough = steering_style.usable_styles(study_of(apart), words)
    assert enough == {"published": ["time"], "paired": []}


def test_colours_and_times_are_compared_in_pairs_before_other_styles():
    sample = pictured("A frog.", "A red frog.", "A calm frog.")
    words = {"mood": ["calm"], "colour": ["red"]}
    assert steering_style.usable_styles(study_of([sample] * 4), words)["paired"] == ["colour"]
    words = {"mood": ["calm"]}
    assert steering_style.usable_styles(study_of([sample] * 4), words)["paired"] == ["mood"]


def test_an_intact_caption_names_both_and_does_not_stutter():
    captions = ["A frog with a key.", "A frog.", "frog key " * 8]
    sample = pictured("A frog with a key.")
    assert steering_style.intact(captions, [sample] * 3).tolist() == [True, False, False]


def test_the_best_setting_is_within_the_limit_or_the_least_bad():
    table = pd.DataFrame({"layer": [1, 2], "strength": [1.0, 1.0], "rate": [0.1, 0.9]})
    table["broken"] = [0.2, 0.8]
    assert steering_style.best_within(table, "rate", "broken", 0.25) == (1, 1.0)
    assert steering_style.best_within(table, "rate", "broken", 0.9) == (2, 1.0)
    assert steering_style.best_within(table, "rate", "broken", 0.1) == (1, 1.0)


def test_phrases_are_replaced_whole():
    phrases = {"by day": "in a quiet mood", "day": "quiet"}
    assert steering_style.replace_phrases("by day, days, day", phrases) == (
        "in a quiet mood, days, quiet"
    )


def test_facts_and_the_right_time_are_counted_over_captions_that_tell_one():
    captions = {"all": ["A frog with a key by day."], "wrong": ["A frog at night."]}
    table = steering_style.facts_table(captions, [pictured("A frog.")], TIMES)
    assert table["time, where told"].tolist() == [1.0, 0.0]
    assert table.loc["all", "all facts"] == 1 and table.loc["wrong", "all facts"] == 0.5
    silent = steering_style.facts_table({"none": ["A frog."]}, [pictured("A frog.")], TIMES)
    assert np.isnan(silent["time, where told"]).all()


def test_captions_of_a_style_win_by_its_references():
    samples = load_samples("scenes", n=6)
    of = study_of(samples, "scenes")
    pairs = steering_style.caption_pairs(of, "test", "mood", ["calm"])
    answers = {
        ("adapter", "mood"): [styled for _, styled in pairs],
        ("prompt", "mood"): [plain for plain, _ in pairs],
    }
    table = steering_style.score_table(answers, {"adapter": of, "prompt": of}, {"mood": ["calm"]})
    adapter, prompt = table.loc[("mood", "adapter")], table.loc[("mood", "prompt")]
    assert adapter["CIDEr, styled"] > prompt["CIDEr, styled"]
    assert adapter["CIDEr"] < prompt["CIDEr"]


def test_steering_returns_the_captions_of_each_strength(monkeypatch):
    written = [["a1", "b1"], ["a2", "b2"]]
    monkeypatch.setattr(steering_style, "describe_steered", lambda *a, **k: written)
    vectors = SteeringVectors({1: torch.ones(TINY.width)}, {"model": TINY.name})
    samples = [pictured("A frog.")] * 2
    found = steering_style.steer(TINY, vectors, 1, (0.5, 2.0), samples)
    assert found == {0.5: ["a1", "b1"], 2.0: ["a2", "b2"]}


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InputError, match="recipe"):
        steering_style.contrast(study_of([]), "time", TIMES, "guessed")


def outcomes(check, *arguments):
    """Return whether each sentence holds that a function writes down."""
    experiment, holds = Experiment("steering-style", "tiny", "scenes"), []
    experiment.check = lambda statement, value: holds.append(bool(value))
    check(experiment, *arguments)
    return holds


def test_sentences_about_usual_captions_follow_their_words():
    words = {"place": ["sand"], "mood": ["calm"], "time": TIMES}
    captions = ["A frog on sand at night.", "A frog on sand."]
    assert outcomes(steering_style.check_usual, captions, words) == [True] * 3
    captions = ["A calm frog at night.", "A frog on sand by day."]
    assert outcomes(steering_style.check_usual, captions, words) == [False] * 3


def test_sentences_about_the_sweep_mind_broken_captions():
    table = pd.DataFrame(
        {"style": ["time", "time", "mood"], "gain": [0.03, 0.2, 0.01], "broken": [0.1, 0.9, 0]}
    )
    assert outcomes(steering_style.check_sweep, table, 0.25) == [True, True]
    table.loc[0, "gain"], table.loc[2, "gain"] = 0.0, 0.06
    assert outcomes(steering_style.check_sweep, table, 0.25) == [False, False]


def test_sentences_about_gains_are_about_the_papers_styles():
    rows = [("time", "paired", 0.3), ("mood", "paired", 0.01), ("mood", "prompt", 0.02)]
    rows += [("mood", "adapter", 0.1), ("colour", "adapter", 0.2)]
    bands = pd.DataFrame(rows, columns=["style", "recipe", "value"])
    assert outcomes(steering_style.check_gains, bands) == [True] * 3
    bands["value"] = [0.3, 0.06, 0.07, 0.05, 0.2]
    assert outcomes(steering_style.check_gains, bands) == [False] * 3


def test_sentences_about_facts_follow_the_table():
    facts = pd.DataFrame(
        {"all facts": [0.9, 0.85, 0.5], "time, where told": [0.9, 0.9, 0.9]},
        index=["as it is", "vector of times", "paired, colour"],
    )
    assert outcomes(steering_style.check_facts, facts, "time") == [True] * 3
    facts.loc["vector of times"] = [0.9, 0.8]
    assert outcomes(steering_style.check_facts, facts[:2], "time") == [False] * 3


def test_moods_and_strengths_follow_the_captions():
    samples = [pictured("A frog."), pictured("A frog.")]
    study = study_of(samples)
    study.__dict__["usual"] = ["A frog.", "A frog."]
    words = {"time": TIMES, "mood": ["calm"]}
    timed = ["A frog at night.", "A frog by day."]
    for captions, holds in ((timed, True), (["A calm night."] * 2, False), (study.usual, False)):
        assert outcomes(steering_style.check_moods, study, captions, words, "time") == [holds]
    turned = {0.0: study.usual, 1.0: timed, 3.0: ["day day day day"] * 2}
    assert outcomes(steering_style.check_strengths, turned, samples, TIMES) == [True, True]
    whole = {0.0: timed, 1.0: study.usual, 3.0: ["A frog on a key."] * 2}
    assert outcomes(steering_style.check_strengths, whole, samples, TIMES)[0] is False


def test_gains_are_recorded_for_vectors_and_the_prompt_is_a_baseline():
    study = study_of([pictured("A frog."), pictured("A frog.")])
    study.__dict__["usual"] = ["A frog.", "A frog."]
    answers = {
        ("paired", "time"): ["A frog at night."] * 2,
        ("prompt", "time"): ["A frog."] * 2,
        ("adapter", "time"): ["Night."] * 2,
    }
    experiment = Experiment("steering-style", "tiny", "scenes")
    studies = dict.fromkeys(("paired", "prompt", "adapter"), study)
    gains = steering_style.record_gains(experiment, studies, answers, {"time": TIMES}, "time")
    assert gains["time", "paired"].value == pytest.approx(0.25)
    assert gains["time", "adapter"].value == 1
    variants = [record["variant"] for record in experiment.records]
    assert variants == ["style=time, paired", "style=time, paired, minus the prompt"]
    assert all(record["value"] == pytest.approx(0.25) for record in experiment.records)
