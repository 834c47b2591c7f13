"""Rates of yes, objects and cards of the chapter on a model from outside, on answers by rule."""

import pandas as pd
import pytest

from xlvlms_tutorial import evaluate, load_samples
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.tutorials import Experiment, outside


@pytest.fixture(scope="module")
def scenes():
    return load_samples("scenes", n=24)


def answerer(scenes, presence):
    """Answer all questions right, but for presence: ``presence(question)`` decides there."""
    known = {scene.image.tobytes(): scene for scene in scenes}

    def say(picture, text):
        scene = known[picture.tobytes()]
        if text == PROMPTS["image"]:
            return scene.captions[0]
        question = next(one for one in scene.questions if one.text == text)
        return presence(question) if question.type == "presence" else question.answer

    return say


def report_of(fake_vlm, scenes, presence):
    return evaluate(fake_vlm(answerer(scenes, presence)), scenes, progress=False)


def test_a_model_that_looks_says_yes_to_what_is_there_alone(fake_vlm, scenes):
    rates = outside.yes_rates(report_of(fake_vlm, scenes, lambda q: q.answer).answers)
    kinds = ["present", "absent, random", "absent, popular", "absent, adversarial"]
    assert list(rates.index) == kinds
    assert rates["value"].tolist() == [1, 0, 0, 0]
    lazy = outside.yes_rates(report_of(fake_vlm, scenes, lambda q: "yes").answers)
    assert (lazy["value"] == 1).all()
    assert not any(
        outside.check_yes(rates, rates)[text]
        for text in outside.check_yes(lazy, lazy)
        if "early" in text
    )
    assert all(outside.check_yes(lazy, rates).values())


def test_a_model_that_is_tempted_by_what_is_popular_shows_a_difference(fake_vlm, scenes):
    tempted = report_of(fake_vlm, scenes, lambda q: "yes" if q.stratum == "popular" else q.answer)
    assert outside.popular_minus_random(tempted.answers).value == 1
    honest = report_of(fake_vlm, scenes, lambda q: q.answer)
    assert outside.popular_minus_random(honest.answers).value == 0
    others = honest.answers[honest.answers["stratum"] != "popular"]
    assert outside.popular_minus_random(others) is None


def test_without_presence_questions_there_are_no_rates(fake_vlm, scenes):
    answers = report_of(fake_vlm, scenes, lambda q: q.answer).answers
    rates = outside.yes_rates(answers[answers["type"] != "presence"])
    assert rates.empty and list(rates.columns) == ["value", "low", "high"]
    assert not outside.check_yes(rates, rates)[
        "hardly any absent object gets a yes, of whatever kind"
    ]


def test_the_vocabulary_has_what_is_shown_and_what_is_asked(scenes):
    present, vocabulary = outside.objects_of(scenes)
    targets = {q.target for scene in scenes for q in scene.questions if q.type == "presence"}
    assert present[0] == {scenes[0].truth["subject"], scenes[0].truth["item"]}
    assert set(vocabulary) == set().union(*present) | targets
    assert vocabulary == sorted(vocabulary)


def test_wrong_answers_are_marked_and_the_right_one_stands_beside(fake_vlm, scenes):
    wrong = report_of(fake_vlm, scenes, lambda q: "no" if q.answer == "yes" else "yes")
    cards = outside.answer_cards(scenes[:3], wrong)
    for scene, card in zip(scenes[:3], cards, strict=True):
        n_presence = sum(question.type == "presence" for question in scene.questions)
        assert card.count("<tr class=wrong>") == card.count("(is: ") == n_presence
        assert scene.captions[0] in card


def test_a_finished_model_has_nothing_of_an_early_one():
    names = ["overall", "presence", "colour", "place", "side"]
    shares = pd.DataFrame([[1.0, 0.9, 1.0]] * 5, names, ["value", "low", "high"])
    checks = outside.check_types(shares, shares, pd.Series(0.5, names[1:]))
    assert checks["every interval lies above guessing"]
    assert not checks["the early model fails on presence and colour"]
    assert not checks["the early model is at chance on presence"]


@pytest.fixture
def checks(monkeypatch):
    written = {}
    experiment = Experiment("outside", "tiny-llava", "none")
    monkeypatch.setattr(experiment, "check", written.__setitem__)
    return experiment, written


def rates(value, low):
    return pd.DataFrame({"value": [value], "low": [low]}, index=["CHAIR_i"])


def test_captions_with_absent_objects_are_written_down(checks):
    experiment, written = checks
    outside.check_chairs(experiment, {})
    assert not written
    outside.check_chairs(experiment, {"early": rates(0.2, 0.1), "finished": rates(0.01, 0)})
    assert list(written.values()) == [True, True]
    outside.check_chairs(experiment, {"early": rates(0.2, 0.0), "finished": rates(0.1, 0)})
    assert list(written.values()) == [False, False]


def test_the_zombie_has_to_be_the_early_models(checks, scenes):
    experiment, written = checks
    man = next(scene for scene in scenes if scene.truth["subject"] == "man")
    woman = next(scene for scene in scenes if scene.truth["subject"] == "woman")
    for captions, scene, expected in (
        ("EARLY: A man and a zombie. FINISHED: A man.", man, True),
        ("EARLY: A man. FINISHED: A man and a zombie.", man, False),
        ("EARLY: A man and a zombie. FINISHED: A man.", woman, False),
    ):
        outside.check_first_caption(experiment, captions, scene)
        assert list(written.values()) == [expected]


def test_what_fails_in_combinations_is_written_down(checks):
    experiment, written = checks
    parts = ["caption/subject", "caption/colour", "caption/place", "caption/all", "qa/overall"]
    seen = pd.DataFrame({"value": 0.99, "low": 0.97, "high": 1.0}, index=parts)
    unseen = seen.copy()
    unseen.loc["caption/colour"] = [0.5, 0.4, 0.6]
    outside.check_combinations(experiment, seen, unseen)
    assert list(written.values()) == [True, True, True]
    outside.check_combinations(experiment, seen.assign(value=0.9), seen.assign(value=0.8))
    assert list(written.values()) == [False, False, False]
