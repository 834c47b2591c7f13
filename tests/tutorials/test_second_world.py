"""The comparison of the two worlds, on models whose answers are known."""

import math

import pytest

from xlvlms_tutorial import load_samples
from xlvlms_tutorial.data.pocket import crossed_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics import Estimate
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.tutorials import second_world

N = 30
SHARED = {"subject": {"woman", "man", "fish", "frog", "worm"}}
SHARED["item"] = {"gem", "key", "flag", "cactus", "bush", "rock", "box", "torch", "sign"}


@pytest.fixture(scope="module")
def known() -> dict[bytes, object]:
    """The sample of each picture, by its pixels."""
    samples = load_samples("scenes", n=N) + load_samples("postcards", n=N)
    return {sample.image.tobytes(): sample for sample in samples}


def reader(known: dict, knows=lambda sample: True):
    """Say what is true of a picture, or nothing of use where the sample is not known."""

    def say(picture, text: str) -> str:
        sample = known[picture.tobytes()]
        if not knows(sample):
            return "nothing"
        if text == PROMPTS["image"]:
            time = sample.truth["time"]
            return f"{sample.captions[0]} {time}"
        return next(question.answer for question in sample.questions if question.text == text)

    return say


def test_a_model_that_reads_both_worlds_gets_everything_right(fake_vlm, known):
    table = second_world.compare_worlds(fake_vlm(reader(known)), n=N)
    assert table.columns.tolist() == ["scenes", "postcards", "difference", "constant"]
    rows = table.drop("yes to presence questions")
    assert {cell.value for cell in [*rows["scenes"], *rows["postcards"]]} == {1.0}
    for change in rows["difference"]:
        assert change.value == 0 and change.low < 0 < change.high
    expected = {f"caption, {factor}" for factor in second_world._FACTORS}
    expected |= {f"answer, {kind}" for kind in ("colour", "count", "side", "place", "action")}
    assert expected | {"answer, presence"} <= set(table.index)


def test_a_model_that_reads_scenes_alone_differs_by_one(fake_vlm, known):
    of_scenes = lambda sample: not sample.id.startswith("postcard")
    table = second_world.compare_worlds(fake_vlm(reader(known, of_scenes)), n=N)
    rows = table.drop("yes to presence questions")
    assert {cell.value for cell in rows["scenes"]} == {1.0}
    assert {cell.value for cell in rows["postcards"]} == {0.0}
    for change in rows["difference"]:
        assert change.value == -1 and -1 <= change.low <= change.high < -0.5


def test_numbers_of_cases_are_those_of_the_samples(fake_vlm, known):
    table = second_world.compare_worlds(fake_vlm(reader(known)), n=N)
    for world in second_world.WORLDS:
        samples = load_samples(world, n=N)
        for factor in second_world._FACTORS:
            n = sum(sample.truth[factor] is not None for sample in samples)
            assert table.loc[f"caption, {factor}", world].n == n
        for factor, kinds in SHARED.items():
            n = sum(sample.truth[factor] in kinds for sample in samples)
            if world == "scenes":
                n = N
            assert table.loc[f"caption, {factor}, kinds of both worlds", world].n == n
        questions = [question for sample in samples for question in sample.questions]
        for kind in {question.type for question in questions}:
            n = sum(question.type == kind for question in questions)
            assert table.loc[f"answer, {kind}", world].n == n
        yes = [question.answer for question in questions if question.type == "presence"]
        share = table.loc["yes to presence questions", world].value
        assert share == pytest.approx(yes.count("yes") / len(yes))


def test_the_constant_is_what_always_the_same_answer_gets_right(fake_vlm, known):
    answers = {"place": "sand", "count": "two", "side": "left"}
    samples = load_samples("postcards", n=N)
    table = second_world.compare_worlds(fake_vlm(reader(known)), n=N)
    for kind in answers:
        replies = [q.answer for sample in samples for q in sample.questions if q.type == kind]
        best = max(replies.count(reply) for reply in set(replies)) / len(replies)
        assert table.loc[f"answer, {kind}", "constant"] == pytest.approx(best)
    assert math.isnan(table.loc["yes to presence questions", "constant"])
    things = [(s.truth["colour"], s.truth["item"]) for s in samples if s.truth["colour"]]
    best = max(things.count(thing) for thing in set(things)) / len(things)
    assert table.loc["caption, colour", "constant"] == pytest.approx(best)


def test_the_same_seed_gives_the_same_table_and_cells_are_estimates(fake_vlm, known):
    say = reader(known, lambda sample: sample.truth["count"] == 1)
    first = second_world.compare_worlds(fake_vlm(say), n=N)
    second = second_world.compare_worlds(fake_vlm(say), n=N)
    assert first.astype(str).equals(second.astype(str))
    for cell in first[["scenes", "postcards", "difference"]].to_numpy().ravel():
        assert isinstance(cell, Estimate) and cell.low <= cell.value <= cell.high


@pytest.mark.parametrize("seed", range(4))
def test_few_pictures_give_wide_intervals_and_no_gap(fake_vlm, seed):
    table = second_world.compare_worlds(fake_vlm(lambda picture, text: "two"), n=10, seed=seed)
    assert table.loc["answer, count", "postcards"].n == 10
    for cell in table["difference"]:
        assert cell.high - cell.low > 0.1


@pytest.mark.parametrize("n", [0, 9])
def test_too_few_pictures_are_refused(fake_vlm, n):
    with pytest.raises(InputError, match=f"n is {n}; give 10 pictures or more"):
        second_world.compare_worlds(fake_vlm(lambda picture, text: "yes"), n=n)


def test_a_seed_that_is_none_is_refused(fake_vlm):
    with pytest.raises(InputError, match="seed=-1"):
        second_world.compare_worlds(fake_vlm(lambda picture, text: "yes"), seed=-1)


@pytest.fixture(scope="module")
def crossed() -> dict[tuple[str, str], list]:
    """Samples by the world of their pictures and that of their words."""
    worlds = second_world.WORLDS
    return {(a, b): crossed_samples(12, a, b) for a in worlds for b in worlds}


def test_crossed_samples_have_one_worlds_pictures_and_one_worlds_words(crossed):
    for pictures in second_world.WORLDS:
        first, second = crossed[pictures, "scenes"], crossed[pictures, "postcards"]
        for one, other in zip(first, second, strict=True):
            assert one.image.tobytes() == other.image.tobytes() and one.truth == other.truth
            assert one.truth["subject"] in SHARED["subject"] and one.truth["item"] in SHARED["item"]
            assert not set(one.captions) & set(other.captions)
            answers = [
                {q.type: q.answer for q in sample.questions if q.type != "presence"}
                for sample in (one, other)
            ]
            assert answers[0] == answers[1] and len(answers[0]) >= 3
            texts = [{question.text for question in sample.questions} for sample in (one, other)]
            assert not texts[0] & texts[1]
        own = load_samples(pictures, n=60)
        written = {sample.captions: sample.questions for sample in own}
        for sample in crossed[pictures, pictures]:
            assert written[sample.captions] == sample.questions
    ids = [sample.id for samples in crossed.values() for sample in samples]
    assert len(set(ids)) == 4 * 12


@pytest.mark.parametrize("arguments", [("clips", "scenes"), ("scenes", "clips")])
def test_worlds_that_are_none_cannot_be_crossed(arguments):
    with pytest.raises(InputError, match="'clips'; allowed: 'scenes', 'postcards'"):
        crossed_samples(3, *arguments)
    with pytest.raises(InputError, match="n is 0"):
        crossed_samples(0, "scenes", "postcards")


def test_a_model_that_knows_some_pictures_or_some_words_is_right_about_these(fake_vlm, crossed):
    samples = [sample for part in crossed.values() for sample in part]
    replies = {}
    for sample in samples:
        for question in sample.questions:
            replies[sample.image.tobytes(), question.text] = question.answer
    sizes = {"scenes": (256, 256), "postcards": (320, 240)}
    of_scenes = lambda picture, text: (
        replies.get((picture.tobytes(), text), "") if picture.size == sizes["scenes"] else "?"
    )
    table = second_world.swap_words(fake_vlm(of_scenes), n=12)
    assert table.columns.names == ["pictures", "words"] and len(table) == 6
    for pictures, right in (("scenes", 1.0), ("postcards", 0.0)):
        assert {cell.value for cell in table[pictures].to_numpy().ravel()} == {right}
    scene_texts = {q.text for s in crossed["scenes", "scenes"] for q in s.questions}
    scene_texts |= {q.text for s in crossed["postcards", "scenes"] for q in s.questions}
    in_words = lambda picture, text: (
        replies.get((picture.tobytes(), text), "") if text in scene_texts else "?"
    )
    table = second_world.swap_words(fake_vlm(in_words), n=12)
    for texts, right in (("scenes", 1.0), ("postcards", 0.0)):
        cells = table.xs(texts, axis=1, level="words").to_numpy().ravel()
        assert {cell.value for cell in cells} == {right}


def test_words_of_one_picture_are_too_few(fake_vlm):
    with pytest.raises(InputError, match="n is 1; give 2 pictures or more"):
        second_world.swap_words(fake_vlm(lambda picture, text: "yes"), n=1)
