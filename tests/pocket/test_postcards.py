"""The second world: its own pictures and words, the same factors, and records that cannot lie."""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.words import masked
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics import caption_attributes
from xlvlms_tutorial.pocket import language, postcards, world
from xlvlms_tutorial.pocket.postcard_texts import (
    OBJECTS,
    STRATA,
    absent,
    captions,
    popularity,
    questions,
)
from xlvlms_tutorial.pocket.postcards import (
    ACTIONS,
    COUNTS,
    CREATURES,
    FACTORS,
    FIGURES,
    HUES,
    ITEMS,
    PLACES,
    SIDES,
    SPLITS,
    SUBJECTS,
    TIMES,
    Postcard,
    draw,
)
from xlvlms_tutorial.samples import Sample

ROOT = Path(__file__).parents[2]
CARD = Postcard("woman", "walking", "key", "red", 2, "left", "snow", "dusk", 7)
PRINT = """
from tests.pocket.test_postcards import fingerprint
from xlvlms_tutorial.pocket.postcards import postcards
print(fingerprint(postcards(20, "test", 3)))
"""
PILLOW, PINNED = "13.0.0", "b939b75ead6cb1356810452906a4ae52c001ba04069f0ade3b394aded3addd25"
PINNED_TEXTS = "1a6cb54b67494a0c5c0ec53b500454fbb47c91c57c90e39378fce091aa5ce8da"

# Written out again here, so that a mistake in the package's own tables shows.
VERB = {
    "standing": "stand",
    "walking": "walk",
    "jumping": "jump",
    "falling": "fall",
    "climbing": "climb",
}
NUMBER = {1: "one", 2: "two", 3: "three"}
MANY = {"cactus": "cactuses", "bush": "bushes", "box": "boxes", "torch": "torches"}


@st.composite
def any_postcard(draw) -> Postcard:
    subject, item = draw(st.sampled_from(SUBJECTS)), draw(st.sampled_from(ITEMS))
    return Postcard(
        subject=subject,
        action=draw(st.sampled_from(ACTIONS)) if subject in FIGURES else None,
        item=item,
        colour=draw(st.sampled_from(HUES[item])) if item in HUES else None,
        count=draw(st.sampled_from(COUNTS)),
        side=draw(st.sampled_from(SIDES)),
        place=draw(st.sampled_from(PLACES)),
        time=draw(st.sampled_from(TIMES)),
        layout=draw(st.integers(0, 2**31 - 1)),
    )


def fingerprint(records) -> str:
    return hashlib.sha256(b"".join(draw(card).tobytes() for card in records)).hexdigest()


def says(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text.lower()) is not None


def many(noun: str) -> str:
    return MANY.get(noun, noun + "s")


def test_a_picture_is_the_same_to_the_pixel_again_and_in_another_process():
    expected = fingerprint(postcards.postcards(20, "test", 3))
    assert fingerprint(postcards.postcards(20, "test", 3)) == expected
    result = subprocess.run(
        [sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == expected


@pytest.mark.skipif(PIL.__version__ != PILLOW, reason=f"runs with Pillow {PILLOW}")
def test_pictures_are_those_of_the_release():
    assert fingerprint(postcards.postcards(20, "test", 3)) == PINNED


def test_texts_are_those_of_the_release():
    texts = []
    for card in postcards.postcards(50, "test", 3):
        texts += captions(card) + [f"{q.text} {q.answer}" for q in questions(card)]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == PINNED_TEXTS


@settings(max_examples=60, deadline=None)
@given(any_postcard())
def test_every_allowed_postcard_can_be_drawn(card):
    picture = draw(card)
    assert picture.mode == "RGB" and picture.size == (320, 240)
    pixels = np.asarray(picture)
    frame = np.ones(pixels.shape[:2], bool)
    frame[8:-8, 8:-8] = False
    assert len(np.unique(pixels[frame], axis=0)) == 1
    assert len(np.unique(pixels[~frame], axis=0)) > 100


def test_five_hundred_postcards_differ():
    assert len({draw(card).tobytes() for card in postcards.postcards(500)}) == 500


@pytest.mark.parametrize("split", SPLITS)
def test_a_shorter_list_is_the_start_of_a_longer_one(split):
    assert postcards.postcards(40, split, 5)[:13] == postcards.postcards(13, split, 5)
    assert postcards.postcards(40, split, 5) != postcards.postcards(40, split, 6)


def test_splits_share_no_combination_of_factors_under_any_seed():
    without_layout = lambda card: replace(card, layout=0)
    by_split = {}
    for split in SPLITS:
        cards = [card for seed in (0, 1) for card in postcards.postcards(1500, split, seed)]
        by_split[split] = set(map(without_layout, cards))
        assert len(by_split[split]) > 1000 and all(card.split == split for card in cards)
    assert sum(map(len, by_split.values())) == len(set().union(*by_split.values()))


def test_a_split_leaves_out_no_value_of_a_factor():
    for split in SPLITS:
        cards = postcards.postcards(1500, split)
        for factor, values in (
            ("subject", SUBJECTS),
            ("action", (*ACTIONS, None)),
            ("item", ITEMS),
            ("count", COUNTS),
            ("side", SIDES),
            ("place", PLACES),
            ("time", TIMES),
        ):
            assert {getattr(card, factor) for card in cards} == set(values)
        pairs = {(card.item, card.colour) for card in cards if card.colour}
        assert pairs == {(item, colour) for item in HUES for colour in HUES[item]}


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"subject": "robot"}, "alien"),
        ({"action": "flying"}, "climbing"),
        ({"action": None}, "walking"),
        ({"item": "bomb"}, "door"),
        ({"colour": "pink"}, "yellow"),
        ({"colour": None}, "blue"),
        ({"item": "flag", "colour": "blue"}, "green"),
        ({"item": "rock"}, "None"),
        ({"subject": "worm"}, "None"),
        ({"count": 4}, "3"),
        ({"count": 0}, "1"),
        ({"count": True}, "1"),
        ({"side": "top"}, "right"),
        ({"place": "moon"}, "stone"),
        ({"time": "noon"}, "dusk"),
        ({"layout": -1}, "0 or more"),
    ],
)
def test_impossible_factors_are_refused_with_the_allowed_ones(change, allowed):
    with pytest.raises(InputError, match=r"allowed: ") as error:
        replace(CARD, **change)
    assert allowed in str(error.value).split("allowed: ")[1]


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ((3, "dev"), "validation"),
        ((3, "composition"), "validation"),
        ((0, "train"), "1 or more"),
        ((-2, "test"), "1 or more"),
    ],
)
def test_impossible_lists_are_refused(arguments, allowed):
    with pytest.raises(InputError, match=allowed):
        postcards.postcards(*arguments)


@settings(max_examples=200, deadline=None)
@given(any_postcard())
def test_six_different_captions_name_every_factor(card):
    texts = captions(card)
    assert len(set(texts)) == 6
    for text in texts:
        assert text[0].isupper() and text.endswith(".") and "None" not in text and "  " not in text
        assert not re.search(r"\ba [aeiou]", text) and not re.search(r"\ban [^aeiou]", text)
        for factor in ("subject", "place", "time", "side"):
            assert says(text, getattr(card, factor))
        noun = card.item if card.count == 1 else many(card.item)
        number = "a" if card.count == 1 else NUMBER[card.count]
        assert says(text, f"{number} {card.colour} {noun}" if card.colour else f"{number} {noun}")
        if card.action:
            assert says(text, rf"{VERB[card.action]}(s|ing)")
        for missing in set(OBJECTS) - set(card.objects):
            assert not says(text, f"({missing}|{many(missing)})")
        wrong = {*PLACES, *TIMES, *SIDES} - {card.place, card.time, card.side}
        wrong |= set(postcards.COLOURS) - {card.colour}
        assert not any(says(text, word) for word in wrong)


@settings(max_examples=60, deadline=None)
@given(any_postcard())
def test_the_metric_of_the_first_world_scores_every_caption_as_right(card):
    texts = captions(card)
    factors = ("subject", "action", "item", "colour", "place", "time")
    named = caption_attributes(texts, [asdict(card)] * len(texts), factors)
    known = {factor for factor in factors if getattr(card, factor) is not None}
    assert set(named.columns[named.notna().all()]) == known
    assert named[sorted(known)].all(axis=None)


@settings(max_examples=300, deadline=None)
@given(any_postcard(), st.integers(0, 1000))
def test_answers_follow_from_the_factors(card, seed):
    written = questions(card, seed)
    for question in written:
        text = question.text
        assert text[0].isupper() and text.endswith("?") and "{" not in text and "None" not in text
        if question.type == "presence":
            assert says(text, question.target)
            assert question.answer == ("yes" if question.target in card.objects else "no")
        elif question.type == "count":
            assert question.answer == NUMBER[card.count] and says(text, many(card.item))
        else:
            assert question.answer == getattr(card, question.type)
            about = card.subject if question.type in ("place", "action") else card.item
            assert question.target == about
        assert (
            question.answer == "yes"
            or not says(text, question.answer)
            or (question.type == "side" and says(text, "left or right"))
        )
    expected = Counter({"presence": 3, "place": 1, "side": 1, "count": 1})
    expected.update({"action": card.action is not None, "colour": card.colour is not None})
    assert Counter(question.type for question in written) == +expected
    assert [q.stratum for q in written if q.type == "presence"] == list(STRATA)
    assert questions(card, seed) == written


@settings(max_examples=100, deadline=None)
@given(any_postcard())
def test_negatives_are_absent_and_hard_in_the_way_their_stratum_says(card):
    for stratum in STRATA:
        assert absent(card, stratum)
        assert set(absent(card, stratum)) <= set(OBJECTS) - set(card.objects)
    assert len(absent(card, "random")) == len(OBJECTS) - 2
    share = popularity()
    rare = set(absent(card, "random")) - set(absent(card, "popular"))
    assert min(map(share.get, absent(card, "popular"))) >= max(map(share.get, rare))
    kin = FIGURES if card.subject in FIGURES else CREATURES
    assert set(absent(card, "adversarial")) & set(SUBJECTS) == set(kin) - {card.subject}


def test_yes_is_as_frequent_as_no_and_popularity_is_the_share_of_postcards():
    cards = postcards.postcards(3000)
    for stratum in STRATA:
        answers = [q.answer for card in cards for q in questions(card) if q.stratum == stratum]
        assert abs(answers.count("yes") / 3000 - 0.5) < 4 * 0.5 / np.sqrt(3000)
    shown = Counter(kind for card in cards for kind in card.objects)
    for kind, share in popularity().items():
        assert shown[kind] / 3000 == pytest.approx(share, abs=0.03), kind


def test_no_caption_and_no_question_has_a_template_of_the_first_world():
    factors = ("woman", "walking", "flag", "red", 2, "left", "sand", "day")
    scene, card = world.Scene(*factors), Postcard(*factors)
    of_scenes = {masked(text) for text in language.captions(scene)}
    of_cards = {masked(text) for text in captions(card)}
    assert len(of_scenes) == 5 and len(of_cards) == 6 and not of_scenes & of_cards
    scene_questions, card_questions = set(), set()
    for seed in range(60):
        for written, texts in (
            (language.questions(scene, seed), scene_questions),
            (questions(card, seed), card_questions),
        ):
            texts.update(re.sub(rf"\ban? {q.target}\b", "a O", q.text) for q in written)
    assert len(scene_questions) == len(card_questions) == 18
    assert not scene_questions & card_questions


def test_no_sprite_is_one_of_the_first_worlds(monkeypatch):
    opened = {"world": set(), "postcards": set()}
    for module, names in ((world, opened["world"]), (postcards, opened["postcards"])):
        original = module.open_sprite

        def noted(name, names=names, original=original):
            names.add(name)
            return original(name)

        monkeypatch.setattr(module, "open_sprite", noted)
    for cache in (world._sprite, world._backdrop, postcards._cut_out, postcards._thing):
        cache.cache_clear()
    for scene in world.scenes(600):
        world.render(scene)
    for card in postcards.postcards(600):
        draw(card)
    assert len(opened["world"]) > 40 and len(opened["postcards"]) > 25
    assert not opened["world"] & opened["postcards"]


def test_the_modules_share_no_drawing_and_no_sentences():
    for module in ("postcards", "postcard_texts"):
        source = (ROOT / "xlvlms_tutorial/pocket" / f"{module}.py").read_text("utf-8")
        imported = re.findall(r"^from (xlvlms_tutorial\S*) import|^import (xlv\S*)", source, re.M)
        names = {first or second for first, second in imported}
        assert not names & {f"xlvlms_tutorial.pocket.{m}" for m in ("world", "language", "clips")}
        assert "xlvlms_tutorial.pocket" not in names


def test_the_picture_of_the_same_factors_is_another_one():
    factors = ("woman", "walking", "flag", "red", 2, "left", "sand", "day", 5)
    scene = world.render(world.Scene(*factors))
    card = draw(Postcard(*factors))
    assert scene.size != card.size
    first = np.asarray(scene.resize((64, 64))).astype(float)
    second = np.asarray(card.resize((64, 64))).astype(float)
    assert np.abs(first - second).mean() > 15


def changed_columns(card: Postcard, **change) -> np.ndarray:
    before = np.asarray(draw(card)).astype(int)
    after = np.asarray(draw(replace(card, **change))).astype(int)
    return np.abs(after - before).sum((0, 2)).nonzero()[0]


def test_things_and_subject_are_on_the_sides_that_the_record_says():
    for card in postcards.postcards(40, "test", 9):
        other = "rock" if card.item != "rock" else "star"
        of_things = changed_columns(card, item=other, colour=None)
        other = "woman" if card.subject in CREATURES else "fish"
        action = "standing" if other == "woman" else None
        of_subject = changed_columns(card, subject=other, action=action)
        left, right = of_things, of_subject
        if card.side == "right":
            left, right = right, left
        assert left.max() < 160 < right.min()


def test_another_colour_action_or_subject_leaves_the_rest_alone():
    for row in range(20):
        card = replace(CARD, layout=row)
        for colour in set(HUES["key"]) - {"red"}:
            assert changed_columns(card, colour=colour).max() < 160
        for action in set(ACTIONS) - {"walking"}:
            assert changed_columns(card, action=action).min() > 160


@pytest.mark.parametrize("factor", FACTORS)
def test_every_factor_shows(factor):
    values = {
        "subject": FIGURES,
        "action": ACTIONS,
        "item": ("key", "gem"),
        "colour": HUES["key"],
        "count": COUNTS,
        "side": SIDES,
        "place": PLACES,
        "time": TIMES,
    }[factor]
    drawn = {draw(replace(CARD, **{factor: value})).tobytes() for value in values}
    assert len(drawn) == len(values)


def test_the_subject_stands_whole_inside_the_frame():
    for subject, action, layout in product(FIGURES, ACTIONS, range(12)):
        card = Postcard(subject, action, "box", None, 1, "left", "stone", "night", layout)
        columns = changed_columns(card, subject="fish", action=None)
        assert columns.min() > 160 and columns.max() < 311


def test_samples_take_the_picture_of_the_record():
    sample = Sample("a", lambda: draw(CARD))
    assert sample.image.tobytes() == draw(CARD).tobytes()
