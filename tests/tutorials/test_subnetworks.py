"""What the chapter on subnetworks compares masks with, on samples and masks made by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.support.tiny import tiny_llava
from xlvlms_tutorial import calibrate, load_samples, wanda
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.pruning import magnitude_masks
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.tutorials import subnetworks


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
