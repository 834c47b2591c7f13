"""Probes, controls and readings by depth, on cases whose answers are known by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.methods.concepts import KMeans
from xlvlms_tutorial.tutorials import grounding, grounding_depth

LABELS = ["walking", "falling"] * 12


def test_values_that_one_sample_has_are_left_out():
    samples = []
    for action in ("walking", "falling", None, "walking"):
        samples.append(Sample("scene", None, (), truth={"action": action}))
    values = grounding_depth.repeated_values(samples, "action")
    assert values.to_dict() == {0: "walking", 3: "walking"}


def test_a_probe_has_one_on_what_tells_the_label_and_nothing_on_noise():
    random = np.random.default_rng(0)
    noise = random.normal(size=(len(LABELS), 4))
    telling = np.array([[float(label == "walking")] for label in LABELS])
    assert grounding_depth.probe_above_chance(np.hstack([noise, telling]), LABELS) == 1
    assert grounding_depth.probe_above_chance(np.zeros_like(noise), LABELS) == pytest.approx(0)


def test_random_blocks_last_as_long_as_the_context_and_after_an_error_no_longer():
    vlm = tiny_llava()
    before = {name: weight.clone() for name, weight in vlm.blocks.state_dict().items()}
    with pytest.raises(ValueError), grounding_depth.random_blocks(vlm, seed=1):
        inside = vlm.blocks.state_dict()
        for name, weight in before.items():
            assert weight.equal(inside[name]) is (weight.ndim < 2)
            if weight.ndim > 1:
                assert inside[name].std() == pytest.approx(weight.std().item(), rel=0.2)
        raise ValueError
    after = vlm.blocks.state_dict()
    assert all(weight.equal(after[name]) for name, weight in before.items())


def test_a_seed_draws_the_same_blocks():
    vlm = tiny_llava()
    drawn = []
    for seed in (0, 0, 1):
        with grounding_depth.random_blocks(vlm, seed):
            weights = [weight.flatten() for weight in vlm.blocks.parameters() if weight.ndim > 1]
            drawn.append(torch.cat(weights).clone())
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_words_that_all_samples_have_are_readable_by_chance():
    largest = np.array([0, 1] * 12)
    both = {0: ["walk", "fall"], 1: ["walk", "fall"]}
    with pytest.warns(RuntimeWarning):
        assert np.isnan(grounding_depth.readable_share(LABELS, largest, both))
    assert grounding_depth.readable_share(LABELS, largest, {0: ["key"], 1: ["rock"]}) == 0
    assert grounding_depth.readable_share(LABELS, largest, {0: ["walks"], 1: ["falls"]}) == 1
    assert grounding_depth.readable_share(LABELS, largest, {0: ["falls"], 1: ["walks"]}) < 0


def test_a_layer_that_holds_the_factor_is_told_from_its_controls():
    random = np.random.default_rng(0)
    codes = np.eye(2)[[0, 1] * 12]
    words = {0: ["walk"], 1: ["fall"]}
    learnt = grounding.Concepts(KMeans(2), codes, words, np.array([[0], [1]]))
    noise = random.normal(size=codes.shape)
    measured = grounding_depth.depths_of_factor(pd.Series(LABELS), codes, noise, learnt)
    assert measured["known"] == measured["readable"] == 1
    assert measured["separated"] > 0.95
    assert max(measured["known, random blocks"], measured["known, shuffled labels"]) < 0.6


def test_the_concept_that_goes_with_a_value_is_followed(monkeypatch):
    codes = np.array([[1.0, 0.0], [1.0, 5.0], [0.0, 6.0]])
    assert grounding_depth._following(codes, [False, True, True]) == 1
    assert grounding_depth._following(codes, [True, True, False]) == 0


def test_the_loudest_dimension_is_found_and_its_part_taken_out():
    vlm = tiny_llava()
    components = torch.randn(2, vlm.width, generator=torch.Generator().manual_seed(0)).numpy()
    components[:, 3] = 1000
    words, loudest = grounding_depth.three_readings(vlm, components, 1, n_words=3)
    assert loudest == 3
    assert set(words) == {"with the norm", "without", "without, 3 dimensions off"}
    assert words["without"] != words["without, 3 dimensions off"]
