"""Words, concepts and the gate of the experiment on neutral wording, on hand-made states."""

import pandas as pd
import pytest
import torch

from tests.support.tiny import tiny_llava
from xlvlms_tutorial import Activations
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.steering import SteeringVectors, concept_vectors
from xlvlms_tutorial.tutorials import Experiment, neutral_wording
from xlvlms_tutorial.tutorials.neutral_wording import Wording

WORDS = ["woman", "man"]
LAYER = 1


@pytest.fixture
def wording() -> Wording:
    vlm = tiny_llava()
    coarse = SteeringVectors({LAYER: torch.ones(vlm.width)}, {"model": vlm.name})
    return Wording(vlm, coarse, {}, WORDS, "person")


def states(rows: list[list[float]]) -> Activations:
    table = pd.DataFrame({"sample": range(len(rows)), "id": [f"{k}" for k in range(len(rows))]})
    return Activations({(LAYER, "resid_post"): torch.tensor(rows)}, table, {})


def concepts(rows: list[list[float]], n: int):
    return concept_vectors(states(rows), LAYER, n, seed=0)


def test_words_count_whole_and_the_first_is_taken():
    assert neutral_wording.first_word("A woman and a man.", WORDS) == "woman"
    assert neutral_wording.first_word("A manor of mankind.", WORDS) is None
    assert neutral_wording.replace_words("A man in a manor.", WORDS, "person") == (
        "A person in a manor."
    )


def test_people_and_others_are_as_many(monkeypatch):
    captions = [("A man.",), ("A frog.",), ("A frog.", "A man."), ("A woman.",), ("A man.",), ()]
    samples = [Sample(f"{k}", None, one) for k, one in enumerate(captions)]
    monkeypatch.setattr(neutral_wording, "load_samples", lambda *a: samples)
    people, others = neutral_wording.people_and_others("x", 6, 9, "train", WORDS)
    assert [sample.id for sample in people] == ["0"]  # as many as there are others
    assert [sample.id for sample in others] == ["1"]


def test_less_the_mean_of_each_picture_its_two_states_are_opposite():
    left = neutral_wording.less_picture(states([[1.0, 5.0], [9.0, 9.0], [3.0, 5.0], [9.0, 7.0]]))
    rows = left[LAYER]
    assert torch.equal(rows[:2], -rows[2:])
    assert rows[0].tolist() == [-1.0, 0.0]


def test_concepts_sort_by_picture_or_by_word():
    # two pictures, far apart; what the word changes is small
    by_picture = concepts([[0.0, 0.0], [50.0, 0.0], [0.0, 1.0], [50.0, 1.0]], 2)
    assert neutral_wording.sorting(by_picture, WORDS) == {"by picture": 1.0, "by word": 0.0}
    by_word = concepts([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]], 4)
    assert neutral_wording.sorting(by_word, WORDS) == {"by picture": 0.0, "by word": 1.0}


def test_the_gate_lets_in_states_of_the_words_alone_and_gives_the_vector_between():
    sides = concepts([[0.0, 0.0], [0.1, 0.0], [0.0, 8.0], [0.1, 8.0]], 2)
    kinds = {
        "words": states([[5.0, 0.1], [5.0, 0.2]]),
        "subjects": states([[-5.0, 0.0], [-5.0, 1.0]]),
        "rest": states([[0.0, -5.0], [1.0, -5.0]]),
    }
    centres, shifts = neutral_wording.build_gate(kinds, sides, torch.ones(2))
    assert shifts.any(dim=1).tolist() == [True] * 2 + [False] * 4
    assert torch.allclose(shifts[:2], torch.tensor([[0.0, 8.0]] * 2))
    assert centres.shape == shifts.shape


def test_the_gate_falls_back_where_no_picture_has_two_concepts():
    same = concepts([[0.0], [9.0], [0.1], [9.1]], 2)
    kinds = {"words": states([[5.0], [4.0]])}
    kinds |= dict.fromkeys(("subjects", "rest"), states([[-1.0], [-2.0]]))
    _, shifts = neutral_wording.build_gate(kinds, same, torch.tensor([7.0]))
    assert shifts[:2].flatten().tolist() == [7.0, 7.0]


def test_a_converted_caption_has_the_neutral_word_and_no_other(wording):
    captions = ["A person.", "A person and a man.", "A frog."]
    assert wording.converted(captions).tolist() == [True, False, False]


def test_effects_are_counted_on_their_half(wording):
    sample = Sample("a", None, ("A frog.",), truth={"subject": "man", "item": "key"})
    captions = ["A person with a key.", "A man.", "A frog.", "A bee."]
    usual = ["A man with a key.", "A man.", "A frog.", "A worm."]
    result = wording.effects(captions, usual, [sample] * 4)
    assert result == {"converted": 0.5, "elsewhere": 0.5, "facts kept": 0.5}


def test_an_unknown_way_is_refused(wording):
    with pytest.raises(InputError, match="way"):
        wording.captions("guess", 1, 1.0, [])


def test_both_namings_of_a_person_stop_where_the_word_would_stand():
    people = [Sample("a", None, ("A woman.",)), Sample("b", None, ("The man.",))]
    words, sentences = neutral_wording.named_both_ways(people, ["woman", "man"], "person")
    assert words == ["woman", "man"]
    assert sentences[1] == "A man. A man. A man. A"
    assert sentences[2:] == ["A person. A person. A person. A"] * 2


def test_sentences_about_sorting_and_strengths_follow_the_numbers(wording):
    experiment, holds = Experiment("steering-style", "tiny", "scenes"), []
    experiment.check = lambda statement, value: holds.append(bool(value))
    index = ["by picture", "by word"]
    for before, after in (([0.9, 0], [0, 1]), ([0.4, 0], [1, 0])):
        shares = pd.DataFrame({"as they are": before, "less the mean": after}, index=index)
        neutral_wording.check_sorting(experiment, shares)
    assert holds == [True, True, False, False]
    holds.clear()
    plain = ["A man."] * 3 + ["A frog."] * 3
    neutral = ["A person."] * 3 + ["A frog."] * 3
    neutral_wording.check_strengths(experiment, {0.0: plain, 3.0: neutral}, wording)
    changed = [*plain[:3], "A person.", *plain[4:]]
    neutral_wording.check_strengths(experiment, {0.0: plain, 3.0: changed}, wording)
    assert holds == [True, True, False, False]


def test_leads_are_recorded_against_each_baseline():
    converted = {"by concept": [True, True, True, False], "coarse": [False] * 4}
    converted |= {
        "coarse, at any price": [True] * 4,
        "coarse, same gate": [True, True, True, False],
    }
    converted["prompt"] = [True, False, False, False]
    experiment = Experiment("steering-style", "tiny", "scenes")
    neutral_wording.record_leads(experiment, converted)
    values = {record["against"]: record["value"] for record in experiment.records}
    assert values == {
        "coarse vector": 0.75,
        "coarse vector, any side effect": -0.25,
        "coarse vector, same gate": 0,
        "prompt": 0.5,
    }
