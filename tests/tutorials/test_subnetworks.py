"""What the chapter on subnetworks compares masks with, on samples and masks made by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.support.tiny import tiny_llava
from xlvlms_tutorial import calibrate, load_samples, wanda
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.pruning import Masks, magnitude_masks
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.tutorials import Experiment, subnetworks


@pytest.fixture(scope="module")
def vlm():
    return tiny_llava()


@pytest.fixture(scope="module")
def samples():
    questions = (Question("colour", "What colour is the key ?", "red"),)
    scenes = load_samples("scenes", n=4)
    captions = ("a red key", "a woman on the grass", "a blue key", "a red woman")
    return [
        replace(scene, questions=questions, captions=(caption,))
        for scene, caption in zip(scenes, captions, strict=True)
    ]


@pytest.fixture(scope="module")
def calibration(vlm, samples):
    return calibrate(vlm, samples, span="image")


def test_types_that_nobody_asks_are_replaced_by_the_frequent_ones(samples):
    assert subnetworks.question_types(samples, ["place", "colour"]) == ["colour"]
    assert subnetworks.question_types(samples, ["taste"]) == ["colour"]


def test_questions_of_an_unknown_type_are_refused(vlm, samples):
    with pytest.raises(InputError, match="'taste'"):
        subnetworks.calibrate_questions(vlm, samples, "taste", 2)


def test_the_diagonal_alone_is_left_out():
    overlaps = pd.DataFrame(np.full((3, 3), 0.5), index=list("abc"), columns=list("abc"))
    left = subnetworks.off_diagonal(overlaps)
    assert left.isna().sum(axis=None) == 3
    assert left.loc["a", "b"] == 0.5


def test_permuted_norms_keep_their_spread_and_lose_their_order(calibration):
    shuffled = subnetworks.permuted(calibration, np.random.default_rng(0))
    key = next(iter(calibration.squares))
    before, after = calibration.squares[key], shuffled.squares[key]
    assert sorted(before.tolist()) == sorted(after.tolist())
    assert before.tolist() != after.tolist()
    assert subnetworks.norm_correlation(calibration, calibration) == pytest.approx(1)


def test_noise_keeps_size_and_all_but_the_pixels(samples):
    noisy = subnetworks.noise_pictures(samples, np.random.default_rng(0))
    assert [s.id for s in noisy] == [s.id for s in samples]
    assert noisy[0].image.size == samples[0].image.size
    pixels = np.array(noisy[0].image).astype(float)
    assert abs(pixels.mean() - 127.5) < 5


def test_random_texts_hold_no_mark(vlm):
    texts = subnetworks.random_texts(vlm, 20, np.random.default_rng(0))
    assert len(texts) == 20
    marks = vlm.tokenizer.get_added_vocab()
    assert not any(mark in text for text in texts for mark in marks)


def test_a_mask_shares_all_with_itself_and_what_chance_gives_stays_below(vlm, calibration):
    masks, large = wanda(vlm, calibration, 0.5), magnitude_masks(vlm, 0.5)
    rest = subnetworks.without_large(masks, masks, large)
    assert rest["IoU"] == 1
    assert 0 < rest["by chance"] < 1
    assert rest["share kept"] == pytest.approx((masks - large).density)
    assert subnetworks.overlap_by_layer(masks, masks).stack().unique().tolist() == [1]
    assert subnetworks.overlaps(vlm, [calibration] * 2, [calibration] * 2, 0.5).tolist() == [1, 1]


def test_two_sets_of_a_value_share_no_sample(samples):
    places = ["sand", "sand", "snow", "sand"]
    named = [replace(s, truth={"place": p}) for s, p in zip(samples, places, strict=True)]
    sets = subnetworks.disjoint_sets(named, "place", ["sand", "snow"])
    assert {name: [s.id for s in part] for name, part in sets.items()} == {
        "sand a": [named[0].id],
        "sand b": [named[1].id],
    }
    assert list(subnetworks.disjoint_sets(named, "place", ["moon"])) == ["sand a", "sand b"]


class Speaker:
    """Says the same of every picture."""

    name = "speaker"

    def generate(self, images, texts, max_new_tokens):
        return ["a key on the sand"] * len(images)


def test_factors_are_counted_where_captions_name_them(samples):
    truths = [{"place": "sand", "item": "key"}, {"place": "snow", "item": None}]
    named = [replace(s, truth=truth) for s, truth in zip(samples[:2], truths, strict=True)]
    counts = subnetworks.factors_named(Speaker(), named, ["place", "item", "taste"])
    assert counts == {"place": 1, "item": 1}
    shares = subnetworks.shares_of({"whole": {"place": 4}, "part": counts}, "whole")
    assert shares["part"] == pytest.approx(0.5)


class Notes(Experiment):
    """Keeps the checks it is given."""

    def __init__(self):
        super().__init__("subnetworks", "tiny", "scenes")
        self.held = {}

    def check(self, statement, holds):
        self.held[statement] = bool(holds)
        return bool(holds)


class OfDensity(Masks):
    """Masks of which nothing but the density is known."""

    def __init__(self, density):
        self._density = density

    @property
    def density(self):
        return self._density


def checks_of(function, *tables):
    notes = Notes()
    function(notes, *tables)
    return list(notes.held.values())


def test_checks_of_pairs_hold_for_two_groups_and_not_for_one():
    kinds = ["image", "video", "text", "colour?"]
    seen, read = kinds[:2], kinds[2:]
    table = pd.DataFrame(0.5, kinds, kinds)
    table.loc[seen, seen], table.loc[read, read] = 0.6, 0.7
    table = table.where(~np.eye(4, dtype=bool))
    assert checks_of(subnetworks.check_pairs, table, seen, read) == [True] * 3
    flat = table.clip(upper=0.5)
    assert checks_of(subnetworks.check_pairs, flat, seen, read) == [True, False, False]
    assert checks_of(subnetworks.check_pairs, flat - 0.2, seen, read) == [False] * 3
    rest = table.drop(index="video", columns="video")
    assert checks_of(subnetworks.check_pairs, rest, ["image"], read) == [True, True, False]


def test_checks_of_the_scale():
    names = ["other captions", "magnitude", "nonsense", "image", "permuted norms", "noise"]
    mean = pd.Series([0.9, 0.8, 0.7, 0.62, 0.6, 0.5], names)
    assert checks_of(subnetworks.check_scale, mean) == [True] * 4
    mean["image"] = 0.75
    assert checks_of(subnetworks.check_scale, mean) == [True, False, False, True]
    mean["noise"] = 0.95
    assert checks_of(subnetworks.check_scale, mean)[3] is False


def test_checks_without_the_largest_weights():
    columns = ["IoU", "by chance", "share kept", "correlation of norms"]
    rows = {
        "other captions": [0.8, 0.2, 0.1, 0.9],
        "image": [0.6, 0.2, 0.1, 0.6],
        "noise": [0.5, 0.2, 0.3, 0.4],
        "permuted norms": [0.3, 0.2, 0.1, 0.0],
    }
    rest = pd.DataFrame(rows, columns).T
    assert checks_of(subnetworks.check_rest, rest) == [True] * 4
    rest.loc["permuted norms", "correlation of norms"] = 0.5
    rest.loc["noise"] = [0.2, 0.2, 0.0, 0.1]
    assert checks_of(subnetworks.check_rest, rest) == [False] * 4


def test_checks_of_captions_under_masks():
    masks = {"magnitude": OfDensity(0.7)}
    named = {"no mask": 10, "image": 4, "text": 9, "image and text": 9}
    able = {kind: {"place": count} for kind, count in named.items()}
    able |= {"magnitude": {"place": 3}, "random": {"place": 0}}
    assert checks_of(subnetworks.check_ways, masks, able, 0.8) == [True] * 7
    able["text"] = {"place": 1}
    half = {"magnitude": OfDensity(0.5)}
    held = checks_of(subnetworks.check_ways, half, able, 0.6)
    assert held == [False, True, True, True, False, False, False]
