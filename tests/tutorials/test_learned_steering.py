"""The behaviours of learned steering, how answers are scored, and prompts that run once."""

import pandas as pd
import pytest
import torch
from PIL import Image

from tests.contract.reference import traces
from tests.support.tiny import lively, tiny_llava
from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions import add
from xlvlms_tutorial.methods.steering import contrast_shifts, mean_shifts_by_class, remaining
from xlvlms_tutorial.samples import Question, Sample
from xlvlms_tutorial.tutorials import learned_steering
from xlvlms_tutorial.tutorials.learned_steering import Item, Primed, said_group, succeeded

COLOURS = ((200, 30, 40), (10, 90, 200), (40, 160, 60))
TEXTS = ("What colour is the key ?", "Is there a key ?", "Is there a woman on the grass ?")


def item(group, answer="two", target=None, opposite=None, number=0):
    question = Question("count", TEXTS[number % 3], answer)
    picture = Image.new("RGB", (32, 32), COLOURS[number % 3])
    sample = Sample(f"{number}", picture, questions=(question,))
    return Item(sample, group, target or answer, opposite or answer)


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava())


@pytest.fixture(autouse=True)
def nothing_is_left_behind(vlm):
    yield
    assert traces(vlm) == []


@pytest.fixture
def items():
    words = [("yes", "no"), ("no", "yes"), ("a red key", "a blue key"), ("red", "red")]
    made = []
    for number, (target, opposite) in enumerate(words):
        made.append(item("yes", "yes", target, opposite, number))
    return made


# Behaviours


def test_the_splits_show_different_pictures_and_every_class():
    for parts in (learned_steering.presence(40, 20, 20), learned_steering.forms(14, 7, 7)):
        ids = {name: {item.sample.id for item in part} for name, part in parts.items()}
        scenes = [tuple(item.sample.truth.items()) for part in parts.values() for item in part]
        assert len(set(scenes)) == len(scenes)
        assert not ids["train"] & ids["validation"] and not ids["validation"] & ids["test"]
        for part in parts.values():
            counts = pd.Series([item.group for item in part]).value_counts()
            assert counts.nunique() == 1


def test_the_form_follows_the_place_and_the_question_does_not_ask_for_it():
    for item in learned_steering.forms(10, 5, 5)["train"]:
        place = item.sample.truth["place"]
        assert item.group == learned_steering.FORMS.get(place, "plain")
        assert item.question.type not in ("place", "presence")
        wanted = {"capitals": item.question.answer.upper(), "unsure": "I am not sure"}
        assert item.target == wanted.get(item.group, item.question.answer)
        assert item.opposite == item.question.answer


def test_yes_and_no_are_opposite():
    for item in learned_steering.presence(10, 4, 4)["test"]:
        assert {item.target, item.opposite} == {"yes", "no"}
        assert item.target == item.group == item.question.answer


def test_other_pictures_have_their_own_frequent_words(monkeypatch):
    few = [sample for sample in load_samples("scenes", 60, "train") if sample.questions]
    dry = [sample for sample in few if sample.truth["place"] not in ("sand", "snow")]
    monkeypatch.setattr(learned_steering, "load_samples", lambda *args: dry)
    parts = learned_steering.forms(2, 2, 2, dataset="others")
    assert {item.group for item in parts["train"]} == {"capitals", "unsure", "plain"}
    monkeypatch.setattr(learned_steering, "load_samples", lambda *args: dry[:1])
    with pytest.raises(InputError, match="classes"):
        learned_steering.presence(2, 2, 2)


# Scores


@pytest.mark.parametrize(
    ("answer", "group"),
    [
        ("no", "no"),
        ("No, it is not.", "no"),
        ("snow", "other"),
        ("not", "other"),
        ("I know", "other"),
        ("nobody", "other"),
        ("YES!", "yes"),
        ("", "other"),
    ],
)
def test_the_first_word_decides_between_yes_and_no(answer, group):
    assert said_group(item("no", "no"), answer) == group


@pytest.mark.parametrize(
    ("group", "answer", "success"),
    [
        ("capitals", "TWO", True),
        ("capitals", "TWO.", True),
        ("capitals", "THREE", False),
        ("capitals", "two", False),
        ("capitals", "Two", False),
        ("capitals", "I AM NOT SURE", False),
        ("unsure", "I am not sure.", True),
        ("unsure", "I am", False),
        ("plain", "two", True),
        ("plain", "three", False),
        ("plain", "TWO", False),
        ("plain", "", False),
    ],
)
def test_success_is_form_and_word(group, answer, success):
    assert succeeded(item(group), answer) is success


def test_leakage_has_a_row_a_class():
    items = [item("capitals"), item("capitals"), item("plain")]
    table = learned_steering.leakage(items, ["TWO", "I am not sure", "TWO"])
    assert table.loc["capitals"].to_dict() == {"capitals": 0.5, "plain": 0.0, "unsure": 0.5}
    assert table.loc["plain", "capitals"] == 1
    assert (table.sum(axis=1) == 1).all()
    shares = learned_steering.forms_by_answer(items, ["TWO", "I am not sure", "TWO"])
    assert shares == {"capitals": 0.5, "plain": 0.0, "all": 0.25}


# Prompts that run once


@pytest.fixture(params=["cached", "whole"])
def primed(request, vlm, items, monkeypatch):
    if request.param == "whole":
        monkeypatch.setattr(vlm.model.config, "model_type", "another")
    made = Primed(vlm, items, [1, 2], batch_size=3)
    monkeypatch.undo()
    return made


def test_primed_questions_are_answered_as_whole_ones_are(vlm, items, primed):
    pictures, prompts = [i.image for i in items], [i.prompt for i in items]
    expected = vlm.generate(pictures, prompts, 4)
    assert primed.answers(n_tokens=4) == expected
    assert primed.answers(n_tokens=4) == expected  # nothing is left in the cache
    vectors = torch.randn(4, vlm.width, generator=torch.Generator().manual_seed(0))
    with add(vlm, vectors, 1, 3.0, "last"):
        steered = vlm.generate(pictures, prompts, 4)
    assert steered != expected
    assert primed.answers(1, vectors, 3.0, 4) == steered
    with add(vlm, vectors[0], 2, 3.0, "last"):
        steered = vlm.generate(pictures, prompts, 4)
    assert primed.answers(2, vectors[0], 3.0, 4) == steered


@pytest.mark.parametrize("read", ["last", "mean"])
def test_primed_shifts_are_those_of_the_method(vlm, items, primed, read):
    expected = contrast_shifts(
        vlm,
        [i.sample for i in items],
        [i.target for i in items],
        [i.opposite for i in items],
        2,
        prompt=lambda sample: sample.questions[0].text,
        read=read,
    )
    assert torch.allclose(primed.shifts(2, read), expected, atol=1e-4)
    assert not primed.shifts(2, read)[-1].any()


def test_primed_states_and_logits_are_those_of_the_prompts_last_token(vlm, items, primed):
    batch = vlm.batch([i.image for i in items], [i.prompt for i in items])
    output = vlm.forward(batch, output_hidden_states=True)
    for layer in (1, 2):
        expected = output.hidden_states[layer][:, -1]
        assert torch.allclose(primed.states[layer], expected, atol=1e-4)
    assert torch.allclose(primed.logits, output.logits[:, -1], atol=1e-3)


def test_divergence_is_that_of_the_words_of_a_text(vlm, items, primed):
    zero = torch.zeros(vlm.width)
    assert primed.divergence(1, zero, 1.0) == pytest.approx(0, abs=1e-6)
    vector = torch.randn(vlm.width, generator=torch.Generator().manual_seed(0))
    texts = [i.target for i in items]
    total, n = 0.0, 0
    for one, text in zip(items, texts, strict=True):
        batch = vlm.batch([one.image], [one.prompt], [text])
        plain = vlm.forward(batch).logits[0].double().log_softmax(-1)
        with add(vlm, vector, 1, 2.0, "last"):
            steered = vlm.forward(batch).logits[0].double().log_softmax(-1)
        for place in batch.mask("answer")[0].nonzero().flatten() - 1:
            total += float((plain[place].exp() * (plain[place] - steered[place])).sum())
            n += 1
    assert primed.divergence(1, vector, 2.0) == pytest.approx(total / n, rel=1e-3)


# The ladder


def test_the_rungs_are_what_they_say(vlm, items):
    groups = ["yes", "no", "yes", "no"]
    made = []
    for number, group in enumerate(groups):
        target, opposite = group, "no" if group == "yes" else "yes"
        made.append(item(group, group, target, opposite, number))
    primed = Primed(vlm, made, [2])
    rungs = learned_steering.ladder(primed, 2, n_hidden=3)
    states, shifts = primed.states[2], primed.shifts(2)
    vectors = {name: rung.vectors(states) for name, rung in rungs.items()}
    assert torch.allclose(vectors["mean"], shifts.mean(0).expand(4, -1), atol=1e-6)
    lengths = vectors["random"].norm(dim=1)
    assert torch.allclose(lengths, shifts.norm(dim=1).mean().expand(4))
    means = mean_shifts_by_class(shifts, groups)
    for vector in vectors["probe"]:
        assert any(torch.allclose(vector, mean) for mean in means.values())
    assert remaining(shifts) < 1
    assert rungs["L2S"].n_parameters == 2 * 3 * 32 + 3
    again = learned_steering.ladder(primed, 2, n_hidden=3)
    assert torch.equal(again["L2S"].vectors(states), vectors["L2S"])


def test_the_strength_is_the_weakest_of_the_best():
    rows = pd.DataFrame(
        {
            "rung": ["a", "a", "a", "b", "b"],
            "strength": [4.0, -2.0, 1.0, -1.0, 1.0],
            "all": [0.9, 0.9, 0.5, 0.2, 0.3],
        }
    )
    assert learned_steering.best_strengths(rows) == {"a": -2.0, "b": 1.0}


def test_curves_and_trials_score_what_primed_questions_answer(vlm, items):
    primed = Primed(vlm, items[:2], [1])
    curve = learned_steering.oracle_curve(primed, [1], [-3.0, 3.0], n_tokens=1)
    answers = primed.answers(1, primed.shifts(1), 3.0, 1)
    expected = learned_steering.forms_by_answer(items[:2], answers)["all"]
    assert curve["all"].iloc[1] == expected
    rung = learned_steering.Rung(lambda states: 0 * states, 0, 0.0)
    rows = learned_steering.tried(primed, {"nothing": rung}, 1, [5.0], 2)
    assert rows["answers"].iloc[0] == primed.answers(n_tokens=2)


def test_the_threshold_of_validation_answers_the_test(vlm, items):
    primed = Primed(vlm, items[:2], [1])
    primed.items = [item("yes", "yes"), item("no", "no")]
    yes, no = (vlm.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    primed.logits = torch.zeros_like(primed.logits)
    primed.logits[:, no] = 5.0  # no is always likelier, and yes is nearer where it is right
    primed.logits[0, yes] = 4.0
    assert learned_steering.by_threshold(primed, primed) == ["yes", "no"]


def test_side_effects_are_of_other_questions_and_captions(vlm):
    others = [item("colour", "red", number=0), item("count", "two", number=1)]
    others = Primed(vlm, others, [1])
    neutral = Primed(vlm, [item("caption", "a red key", number=2)], [1])
    shout = 50 * torch.randn(vlm.width, generator=torch.Generator().manual_seed(1))
    rungs = {
        "nothing": learned_steering.Rung(torch.zeros_like, 0, 0.0),
        "shout": learned_steering.Rung(shout.expand_as, 0, 0.0),
    }
    table, correct = learned_steering.side_effects(
        others, neutral, rungs, 1, {"nothing": 1.0, "shout": 1.0}
    )
    assert table.index.tolist() == ["none", "nothing", "shout"]
    assert table.loc["nothing"].equals(table.loc["none"]) or table.loc["nothing", "nats"] < 1e-6
    assert table.loc["shout", "nats"] > 0.1
    assert set(table) == {"nats", "others", "colour", "count"}
    assert all(len(values) == 2 for values in correct.values())
