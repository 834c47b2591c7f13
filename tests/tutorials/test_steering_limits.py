"""What a vector is compared with: constants on logits, prompts, fewer samples."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support.quizzes import ask, bare_study, quiz
from tests.support.steering import by_hand
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.methods.steering import first_pieces, mean_logits_bias
from xlvlms_tutorial.tutorials import steering_limits
from xlvlms_tutorial.tutorials.steering_answers import Quiz
from xlvlms_tutorial.tutorials.steering_limits import Way

WORDS = np.array(["yes", "no", "red", "blue"], dtype=object)


@pytest.fixture
def study():
    return bare_study()


@pytest.fixture
def spoken(study, monkeypatch):
    """A study whose logits are those of four words, one state a word."""
    answers = ["yes"] * 4 + ["red"] * 4
    states = torch.eye(4)[[0] * 4 + [2] * 4]
    study.validation = Quiz(ask(answers), states, np.array(answers, dtype=object))
    study.test = study.validation
    monkeypatch.setattr(study, "say", lambda logits: WORDS[logits.argmax(dim=-1).numpy()])
    study.vlm = type("Model", (), {"n_layers": 30})()
    return study


def pushing(word, strengths):
    """A way that adds its strength to one word."""
    bias = torch.eye(4)[list(WORDS).index(word)]
    return Way(lambda states, strength: states + strength * bias, strengths)


def test_ways_are_tuned_on_validation_and_the_weakest_that_does_as_well_is_found(spoken):
    ways = {"no": pushing("no", (0.5, 2, 4)), "blue": pushing("blue", (0.5, 2))}
    tried = steering_limits.tune(spoken, "yes to no", ways)
    rows = tried.set_index(["way", "strength"])
    assert rows["to target"].tolist() == [0, 1, 1, 0, 0]
    assert rows["lost"].tolist() == [0, 1, 1, 0, 1]
    assert steering_limits.weakest_as_good(spoken, "yes to no", ways, ["no"] * 8) == {"no": 2}
    best = steering_limits.at_best(spoken, ways, tried, limit=1.0)
    assert set(best["no"]) == {"no"}
    # within a limit of nothing the weak constant alone is allowed, which changes nothing
    best = steering_limits.at_best(spoken, ways, tried, limit=0.0)
    assert best["no"].tolist() == spoken.test.answers.tolist()


def test_ways_at_the_last_layer_are_vectors_and_constants(study):
    study.vlm = tiny_llava()
    source, target = by_hand(5, seed=1), by_hand(5, seed=2)
    ways = steering_limits.ways_at_last_layer(study, "yes to no", source, target)
    states = by_hand(3, seed=3)[3]
    plain = study.vlm.unembed(states)
    for way in ways.values():
        assert torch.allclose(way.logits(states, 0.0), plain, atol=1e-5)
    every = ways["constant, every word"].logits(states, 2.0) - plain
    expected = 2 * mean_logits_bias(study.vlm, source, target)
    assert torch.allclose(every, expected.expand_as(every), atol=1e-4)
    both = ways["constant, both"].logits(states, 3.0) - plain
    (no,), (yes,) = first_pieces(study.vlm, "no"), first_pieces(study.vlm, "yes")
    assert torch.allclose(both[:, no], torch.tensor(3.0)) and both.sum().abs() < 1e-3
    assert torch.allclose(both[:, yes], torch.tensor(-3.0))
    shift = target[3].mean(0) - source[3].mean(0)
    moved = ways["vector, last layer"].logits(states, 1.0)
    assert torch.allclose(moved, study.vlm.unembed(states + shift), atol=1e-5)


def test_what_is_the_same_for_all_questions_is_between_none_and_all(study, monkeypatch):
    monkeypatch.setattr(study, "likely_token", {"yes": 0, "no": 1, "red": 2, "blue": 3}.get)
    row = torch.tensor([-2.0, 3.0, 0.0, 0.0])
    same, opposite = torch.stack([row, row]), torch.stack([row, -row])
    table = steering_limits.change_table(study, {"yes to no": same, "red to blue": opposite})
    assert table["same for all"].tolist() == pytest.approx([1.0, 0.0])
    assert table.loc["yes to no", ["source, mean", "target, mean"]].tolist() == [-2.0, 3.0]
    assert table.loc["yes to no", "target, spread"] == 0


def test_few_samples_do_on_average_what_all_do_and_more_of_them_more_alike():
    torch.manual_seed(0)
    source, target = torch.randn(40, 3), torch.randn(40, 3) + 2
    shares = steering_limits.shares_of_draws(
        source, target, lambda v: float(v.sum()), [4, 40, 80], np.random.default_rng(0), 200
    )
    assert list(shares) == [4, 40]  # 80 are all
    assert shares[4].value == pytest.approx(1, abs=0.1)
    assert shares[40].high - shares[40].low < shares[4].high - shares[4].low
    nothing = steering_limits.shares_of_draws(
        source, target, lambda v: 0.0, [4], np.random.default_rng(0)
    )
    assert nothing == {}  # of no effect there is no share


def test_a_vector_changes_questions_by_their_right_answer(study):
    study.test = quiz(["yes", "yes", "no", "red"], ["yes", "yes", "no", "red"])
    rows = steering_limits.changes_by_right_answer(study, "yes to no", ["no", "yes", "no", "blue"])
    assert rows["questions"].tolist() == [2, 1, 1]  # no other answer of the type is asked for
    assert rows["says no"].tolist() == [0.5, 1.0, 0.0]
    assert rows["other change"].tolist() == [0.0, 0.0, 1.0]


def test_answers_are_true_of_the_picture_of_their_question(study):
    study.test = quiz(["yes", "yes", "red"], scenes=["a", "b", "a"])
    study.scenes = ask(["red", "blue"], ["a", "b"])
    scenes = study.scenes
    for scene in scenes:
        object.__setattr__(scene, "id", scene.id.partition("/")[0])
    assert steering_limits.true_answers(study, "colour").tolist() == ["red", "blue", "red"]
    study.tasks = {"presence to colour": study.tasks["yes to no"]._replace(target=("red", "blue"))}
    says = {"vector": ["red", "red", "red"], "prompt": ["red", "blue", "no"]}
    rates = steering_limits.true_answer_rates(study, "presence to colour", says)
    assert rates["says the true one"].to_dict() == {"vector": 0.5, "prompt": 1.0}
    assert rates["chance"].tolist() == [0.5, 0.5]
    study.scenes = []
    assert (
        steering_limits.true_answer_rates(study, "presence to colour", says).isna().all(axis=None)
    )
    study.scenes = scenes
    assert [scene.id for scene in steering_limits.scenes_with(study, ["blue"])] == ["b"]


def test_colours_are_whole_words_of_either_group_of_captions():
    captions = {
        0.0: ["a redder key", "a red key", "a green box"],
        2.0: ["a blue key"] * 2 + ["red"],
    }
    named = steering_limits.named_colours(captions, 2, "red", "blue", ["green", "yellow"])
    assert named.to_numpy().tolist() == [[0.5, 0.0, 1.0], [0.0, 1.0, 0.0]]
    alone = steering_limits.named_colours({0.0: ["a red key"]}, 1, "red", "blue", ["green"])
    assert np.isnan(alone.iloc[0, 2])


def test_without_a_layer_that_works_the_first_is_taken():
    changed = pd.DataFrame({5: [0, 0], 9: [1, 0]})
    assert steering_limits.first_layer(changed, 0.5) == 9
    assert steering_limits.first_layer(changed, 0.6) == 5
