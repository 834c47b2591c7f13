from dataclasses import asdict

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.captions import caption_attributes, names
from xlvlms_tutorial.pocket.language import captions
from xlvlms_tutorial.pocket.world import counterfactuals, scenes


@pytest.mark.parametrize(
    ("caption", "word"),
    [
        ("A robot is here.", "robot"),
        ("ROBOTS!", "robot"),
        ("two boxes", "box"),
        ("three bushes", "bush"),
        ("many torches", "torch"),
        ("cactuses", "cactus"),
        ("two flies", "fly"),
        ("men", "man"),
        ("three mice", "mouse"),
        ("the man's hat", "man"),
        ("it walks", "walking"),
        ("they walk", "walking"),
        ("while walking", "walking"),
        ("a man falls", "falling"),
        ("she runs", "running"),
        ("he rides", "riding"),
        ("a  traffic\nlight", "traffic light"),
        ("traffic lights", "traffic light"),
    ],
)
def test_names_finds_the_forms_of_a_word(caption, word):
    assert names(caption, word)


@pytest.mark.parametrize(
    ("caption", "word"),
    [
        ("A woman.", "man"),
        ("men", "woman"),
        ("sandy", "sand"),
        ("keyboard", "key"),
        ("", "key"),
        ("planes", "plan"),
        ("capes", "cap"),
        ("a walkway", "walking"),
        ("k", "king"),
        ("a street", "string"),
        ("a robot", "."),
        ("lights of traffic", "traffic light"),
    ],
)
def test_names_does_not_find_parts_of_words(caption, word):
    assert not names(caption, word)


@given(
    st.text(max_size=20), st.sampled_from(["robot", "walking", "key", "fly"]), st.text(max_size=20)
)
def test_a_word_set_apart_is_always_named_in_any_case(before, word, after):
    assert names(f"{before} {word.upper()} {after}", word)


TRUTH = {
    "subject": "robot",
    "action": "walking",
    "item": "key",
    "colour": "red",
    "place": "snow",
    "count": 2,
}


def test_each_factor_has_its_column():
    row = caption_attributes(["A robot walks in the snow beside two red keys."], [TRUTH]).iloc[0]
    assert row.to_dict() == dict.fromkeys(("subject", "action", "item", "colour", "place"), True)
    row = caption_attributes(["A zombie jumps in the snow beside two blue rocks."], [TRUTH]).iloc[0]
    assert row.to_dict() == {
        "subject": False,
        "action": False,
        "item": False,
        "colour": False,
        "place": True,
    }


@pytest.mark.parametrize(
    ("caption", "correct"),
    [
        ("a red key", True),
        ("Red  keys", True),
        ("a red robot and a key", False),
        ("the key is red", False),
        ("a red blue key", False),
        ("red keyboards", False),
    ],
)
def test_a_colour_counts_only_right_before_its_item(caption, correct):
    assert caption_attributes([caption], [TRUTH], ["colour"])["colour"].tolist() == [correct]


def test_a_colour_without_an_item_counts_anywhere():
    named = caption_attributes(["the sky is red"], [{"colour": "red"}], ["colour"])
    assert named["colour"].tolist() == [True]


@pytest.mark.parametrize("nothing", [None, float("nan"), pd.NA])
def test_a_factor_without_truth_is_missing_not_wrong(nothing):
    table = caption_attributes(
        ["a frog", "a robot"],
        [{"subject": "frog", "action": nothing}, {"subject": "frog"}],
        ["subject", "action"],
    )
    assert table["action"].isna().all()
    assert table["subject"].tolist() == [True, False]
    assert (table.dtypes == "boolean").all()


def test_the_worlds_own_captions_name_every_factor():
    for scene in scenes(200, seed=4):
        texts = captions(scene)
        assert (
            caption_attributes(texts, [asdict(scene)] * len(texts)).fillna(True).all(axis=None)
        ), texts


def test_a_changed_factor_is_no_longer_named():
    for scene in scenes(60, seed=5):
        for factor in ("subject", "action", "item", "colour", "place"):
            if getattr(scene, factor) is not None and (factor != "item" or scene.colour is None):
                texts = captions(counterfactuals(scene, factor)[0])
                assert not caption_attributes(texts, [asdict(scene)] * len(texts))[factor].any(), (
                    factor,
                    texts,
                )


def test_captions_and_truths_must_be_equally_many():
    with pytest.raises(InputError, match="captions: 1, truths: 2"):
        caption_attributes(["a"], [{}, {}])
