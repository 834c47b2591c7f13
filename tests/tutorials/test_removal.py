"""Taking concepts out: which fact, which directions, and what is counted."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.support.tiny import PICTURE, PROMPTS, lively, tiny_llava
from xlvlms_tutorial import Sample
from xlvlms_tutorial.activations import capture, read
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts import Dictionary
from xlvlms_tutorial.tutorials import Experiment, removal
from xlvlms_tutorial.tutorials.removal import Target


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava())


@pytest.fixture
def checks(monkeypatch):
    written = {}
    experiment = Experiment("explain", "tiny-llava", "none")
    monkeypatch.setattr(experiment, "check", written.__setitem__)
    return experiment, written


def sample(caption: str, **truth: str) -> Sample:
    return Sample("s", Image.new("RGB", (8, 8)), (caption,), truth=truth)


def test_the_fact_is_the_first_that_captions_tell_after_the_word():
    known = [
        sample("A walking man on sand.", action="walking", place="sand"),
        sample("A man on snow.", action="walking", place="snow"),
    ]
    target = removal.choose_target("man", known, ["A man on snow.", "A man on sand.", "A man."])
    assert (target.factor, target.values) == ("place", ["sand", "snow"])
    assert target.due == ["sand", "snow"]
    assert target.spoken == ["snow", "sand", None]
    assert target.number(["snow", "sand"]) == [1, 0]


class Fixed(Dictionary):
    """A dictionary with given codes."""

    def __init__(self, codes):
        self.codes = np.asarray(codes, float)
        self.components_ = np.eye(self.codes.shape[1], dtype=np.float32)

    def transform(self, A):
        return self.codes


def test_each_value_gets_its_concept_and_one_of_another_fact():
    pictures = []
    codes = []
    for number in range(40):
        action, time = ("walking", "falling")[number % 2], ("day", "night")[number // 20]
        pictures.append(sample("A man.", action=action, time=time))
        codes.append(
            [action == "walking", action == "falling", 5 * (time == "day"), time == "night"]
        )
    due = [picture.truth["action"] for picture in pictures]
    target = Target("action", ["falling", "walking"], due, [])
    concepts = removal.concepts_of_values(Fixed(codes), torch.zeros(40, 4), pictures, target)
    assert concepts["own"].argmax(dim=1).tolist() == [1, 0]
    assert concepts["another"].argmax(dim=1).tolist() == [2, 2]


def test_each_picture_of_a_batch_loses_its_own_direction(vlm):
    batch = vlm.batch([PICTURE] * 3, PROMPTS[:3])
    plain = read(vlm, batch, 2, positions="last")[2, "resid_post"].reshape(3, -1)
    directions = torch.eye(vlm.width)[[0, 5, 0]]
    with removal.ablate_each(vlm, directions, 2):
        left = read(vlm, batch, 2, positions="last")[2, "resid_post"].reshape(3, -1)
    expected = plain - plain * directions
    torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-5)


def test_the_first_pictures_of_each_value_are_taken_in_their_order():
    target = Target("place", ["sand", "snow"], ["snow", None, "sand", "snow", "snow"], [])
    assert removal.few_of_each(target, 2) == [2, 0, 3]


def test_words_are_lost_where_another_word_replaces_them(vlm):
    picture = Sample("s", PICTURE, ("a key is red",))
    another = Sample("t", PICTURE, ("a key is blue",))
    values = ["red", "blue"]
    beginnings = removal.Beginnings(vlm, [picture, another], values)
    lost = beginnings.lost(1, nullcontext())
    batch = vlm.batch([PICTURE], ["Describe the picture."], ["a key is"])
    top = vlm.tokenizer.decode(vlm.forward(batch).logits[0, batch.mask("answer")[0]][-1].argmax())
    assert lost.tolist() == [value != top for value in values]


@pytest.mark.parametrize("side", ["predicting", "token"])
def test_a_change_at_an_upper_layer_has_the_effect_that_it_has_in_a_whole_forward(vlm, side):
    samples = [sample("a key is red"), sample("here a key")]
    words = ["red", "key"]
    directions = torch.eye(vlm.width)[[0, 5]]
    layers = range(1, 3)
    with removal.ablate_each(vlm, directions, layers):
        expected = capture(
            vlm,
            samples,
            vlm.n_layers,
            words=words,
            side=side,
            answers=["a key is red", "here a key"],
        )
    # "key" comes first in both for a capture of both words: each is read at its own word here
    beginnings = removal.Beginnings(vlm, samples, words, side)
    states = beginnings.read(1, removal.ablate_each(vlm, directions, layers))
    torch.testing.assert_close(states[1], expected[vlm.n_layers][1], atol=1e-5, rtol=1e-5)
    unchanged = beginnings.read(1, nullcontext())
    assert not torch.allclose(states, unchanged, atol=1e-3)
    again = beginnings.read(1, removal.ablate_each(vlm, directions, layers))
    torch.testing.assert_close(states, again)


def test_a_caption_without_its_word_is_refused(vlm):
    with pytest.raises(InputError, match="no 'gem' in answer 0"):
        removal.Beginnings(vlm, [sample("a key is red")], ["gem"])


def test_a_plural_or_another_form_still_names_the_value():
    captions = ["Two keys.", "A man walks.", "A gem."]
    assert removal.still_named(captions, ["key", "walking", "key"]).tolist() == [1, 1, 0]


def loss_of(own: list[float], another: float = 0.0, whole: float = 1.0) -> dict:
    lost = {}
    for layer, share in zip((20, 24, 27), own, strict=True):
        lost[layer, "the action's, own part"] = np.array([share])
        lost[layer, "another, own part"] = np.array([another])
        lost[layer, "random, own part"] = np.array([0.0])
        lost[layer, "the action's, whole"] = np.array([1.0])
        lost[layer, "another, whole"] = np.array([whole])
    return lost


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        (loss_of([0.0, 0.2, 0.6]), [True, True, True]),
        (loss_of([0.0, 0.6, 0.5]), [True, True, False]),
        (loss_of([0.0, 0.2, 0.6], another=0.5, whole=0.2), [False, False, True]),
    ],
)
def test_checks_of_layers(checks, lost, expected):
    experiment, written = checks
    removal.check_layers(experiment, Target("action", [], [], []), lost)
    assert list(written.values()) == expected


def test_the_own_part_has_to_take_the_action_and_leave_the_rest(checks):
    experiment, written = checks
    index = ["nothing", "the action's, own part", "the action's, whole", "another, whole"]
    shares = pd.DataFrame({"action": [1, 0.3, 0, 0], "place": [1, 1, 0.1, 0.5]}, index=index)
    target = Target("action", [], [], [])
    removal.check_captions(experiment, target, shares)
    assert list(written.values()) == [True, True]
    removal.check_captions(experiment, target, shares.assign(action=1.0))
    assert list(written.values()) == [True, False]


def test_captions_are_shown_for_pictures_of_different_values():
    captions = {"nothing": list("abcdefg"), "concept": list("hijklmn")}
    cards = removal.caption_cards([PICTURE] * 7, captions, ["x", "x", "y", "y", "z", "x", "w"])
    assert len(cards) == 5
    for card, letter in zip(cards, "aceg", strict=False):
        assert f">{letter}<" in card


def test_nearness_to_the_mean_is_compared_with_what_stays_named(checks):
    experiment, written = checks
    target = Target("action", ["falling", "walking"], [], [])
    directions = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    named = np.array([1.0, 1.0, 0.0])
    values = ["falling", "falling", "walking"]
    removal.check_mean(experiment, target, directions, torch.tensor([3.0, 0.0]), values, named)
    removal.check_mean(experiment, target, directions, torch.tensor([0.0, 3.0]), values, named)
    assert written == {"concepts nearer to the mean leave the action more often": False}


def test_the_true_word_can_win_without_a_concept(vlm):
    class Only(Fixed):
        pass

    states = torch.zeros(2, vlm.width)
    states[:, 0] = torch.tensor([3.0, -3.0])
    dictionary = Only([[3.0], [-3.0]])
    dictionary.components_ = np.eye(1, vlm.width, dtype=np.float32)
    wins = removal.repaired(vlm, dictionary, states, "red", "blue")
    assert wins.shape == (2, 1)
    assert wins[0] == wins[1]  # nothing is left of either state
