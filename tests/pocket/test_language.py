"""What is said about a scene follows from its record.

Captions name the factors, questions are answered truthfully.
"""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.strategies import any_scene
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.pocket import language, world
from xlvlms_tutorial.pocket.language import (
    OBJECTS,
    STRATA,
    STYLES,
    absent,
    captions,
    popularity,
    questions,
    styled_caption,
)

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


def says(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text.lower()) is not None


def many(noun: str) -> str:
    return MANY.get(noun, noun + "s")


@settings(max_examples=200, deadline=None)
@given(any_scene())
def test_five_different_captions_name_every_factor(scene):
    texts = captions(scene)
    assert len(set(texts)) == 5
    for text in texts:
        assert text[0].isupper() and text.endswith(".") and "None" not in text and "  " not in text
        assert says(text, scene.subject) and says(text, scene.place)
        noun = scene.item if scene.count == 1 else many(scene.item)
        number = r"an?" if scene.count == 1 else NUMBER[scene.count]
        assert says(text, f"{number} {scene.colour} {noun}" if scene.colour else f"{number} {noun}")
        if scene.action:
            assert says(text, rf"{VERB[scene.action]}(s|ing)")
        for missing in set(OBJECTS) - set(scene.objects):
            assert not says(text, f"({missing}|{many(missing)})")
        for wrong in set(world.PLACES) - {scene.place} | set(world.COLOURS) - {scene.colour}:
            assert not says(text, wrong)
    assert any(says(text, scene.side) for text in texts)
    assert any(says(text, scene.time) for text in texts)


@settings(max_examples=100, deadline=None)
@given(any_scene())
def test_an_article_fits_its_noun(scene):
    for text in captions(scene) + [styled_caption(scene, style) for style in STYLES]:
        assert not re.search(r"\ba [aeiou]", text) and not re.search(r"\ban [^aeiou]", text)


def truthful(scene, question) -> bool:
    """Whether the answer follows from the record, and the question speaks of what is there."""
    text, answer = question.text, question.answer
    if question.type == "presence":
        assert says(text, question.target)
        return answer == ("yes" if question.target in (scene.subject, scene.item) else "no")
    noun = scene.item if scene.count == 1 else many(scene.item)
    if question.type in ("colour", "side"):
        assert says(text, noun)
        assert not says(text, "is the " + many(scene.item))
        assert question.target == scene.item
        return answer == getattr(scene, question.type)
    if question.type == "count":
        assert says(text, many(scene.item)) and question.target == scene.item
        return answer == NUMBER[scene.count]
    assert question.target == scene.subject
    return answer == getattr(scene, question.type)


@settings(max_examples=300, deadline=None)
@given(any_scene(), st.integers(0, 1000))
def test_questions_are_truthful_and_complete(scene, seed):
    asked_questions = questions(scene, seed)
    assert all(truthful(scene, question) for question in asked_questions)
    assert all(
        q.text[0].isupper() and "{" not in q.text and "None" not in q.text for q in asked_questions
    )
    expected = Counter({"presence": 3, "place": 1, "side": 1, "count": 1})
    expected.update({"action": scene.action is not None, "colour": scene.colour is not None})
    assert Counter(q.type for q in asked_questions) == +expected
    assert [q.stratum for q in asked_questions if q.type == "presence"] == list(STRATA)
    assert questions(scene, seed) == asked_questions


@settings(max_examples=200, deadline=None)
@given(any_scene())
def test_negatives_are_absent_and_hard_in_the_way_their_stratum_says(scene):
    for stratum in STRATA:
        offered = absent(scene, stratum)
        assert offered
        assert not set(offered) & {scene.subject, scene.item}
        assert set(offered) <= set(OBJECTS)
    assert len(absent(scene, "random")) == len(OBJECTS) - 2
    share = popularity()
    left_out = set(absent(scene, "random")) - set(absent(scene, "popular"))
    assert min(share[o] for o in absent(scene, "popular")) >= max(share[o] for o in left_out)
    kin = world.PEOPLE if scene.subject in world.PEOPLE else world.ANIMALS
    assert set(kin) - {scene.subject} <= set(absent(scene, "adversarial"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_yes_is_as_frequent_as_no_in_each_stratum(split):
    answers = {stratum: [] for stratum in STRATA}
    for scene in world.scenes(2000, split):
        for question in questions(scene):
            if question.stratum:
                answers[question.stratum].append(question.answer == "yes")
    for replies in answers.values():
        assert abs(np.mean(replies) - 0.5) < 4 * 0.5 / np.sqrt(len(replies))


def test_popularity_is_the_share_of_scenes_before_anything_is_held_out():
    rng, share = np.random.default_rng(11), popularity()
    counts = Counter(o for _ in range(20_000) for o in world._draw_factors(rng).objects)
    for thing in OBJECTS:
        assert counts[thing] / 20_000 == pytest.approx(share[thing], abs=0.012), thing
    assert (
        sum(share[s] for s in world.SUBJECTS)
        == pytest.approx(1)
        == sum(share[i] for i in world.ITEMS)
    )


def test_popular_objects_are_the_frequent_ones_in_training_too():
    counts = Counter(o for scene in world.scenes(20_000) for o in scene.objects)
    top = sorted(OBJECTS, key=popularity().get, reverse=True)[:8]
    assert set(top) == {o for o, _ in counts.most_common(8)}


@settings(max_examples=60, deadline=None)
@given(any_scene())
def test_a_style_dwells_on_its_aspect(scene):
    texts = {style: styled_caption(scene, style) for style in STYLES}
    assert len(set(texts.values())) == 3
    for text in texts.values():
        assert says(text, scene.subject) and "None" not in text and text.endswith(".")
    assert len(re.findall(rf"\b{scene.place}\b", texts["place"])) >= 2
    assert not any(says(texts["mood"], colour) for colour in set(world.COLOURS) - {scene.colour})
    with pytest.raises(InputError, match="place, colour, mood"):
        styled_caption(scene, "rhyme")


def test_plurals_are_the_tests_own():
    assert {noun: language.plural(noun) for noun in world.ITEMS} == {
        noun: many(noun) for noun in world.ITEMS
    }
