"""Samples, baselines and scores of grounding, on cases whose answers are known by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from xlvlms_tutorial.claims import claims
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.loading.scorers import Scorer
from xlvlms_tutorial.methods.concepts import KMeans
from xlvlms_tutorial.tutorials import Experiment, grounding

SPACE = {"key": 0, "rock": 1, "snow": 2}


class ByHand(Scorer):
    """Embeds a picture or a text by the words of ``SPACE`` that are in its name or text."""

    def __init__(self):
        self.name = "by hand"

    def images(self, pictures, batch_size=32):
        return self.texts(pictures)

    def texts(self, texts, batch_size=64):
        rows = []
        for text in texts:
            rows.append([float(word in text) for word in SPACE] + [0.01])
        return torch.tensor(rows)


class Scene(Sample):
    """A sample whose picture is its id."""

    @property
    def image(self):
        return self.id


def scene(name: str, *captions: str, **truth: str) -> Scene:
    return Scene(name, None, captions, truth=truth)


def concepts(words: list[list[str]], rows: list[list[int]], n: int) -> grounding.Concepts:
    lists = dict(enumerate(words))
    return grounding.Concepts(KMeans(len(words)), np.ones((n, len(words))), lists, np.array(rows))


@pytest.fixture
def judges():
    return grounding.Judges(ByHand())


def test_a_caption_with_the_token_comes_first_and_whole_words_count():
    scenes = [scene("0", "A robot.", "The Key."), scene("1", "A monkey.")]
    (sample,) = grounding.samples_about("key", scenes)
    assert sample.captions == ("The Key.", "A robot.")
    assert scenes[0].captions[0] == "A robot."


def test_unseen_samples_are_not_those_learnt_from():
    scenes = [scene(str(number), "A key.") for number in range(5)]
    unseen = grounding.unseen_samples("key", scenes, scenes[:3], n=9)
    assert [sample.id for sample in unseen] == ["3", "4"]


def test_own_words_are_the_diagonal_and_others_the_rest_of_the_row():
    scores = np.random.default_rng(0).random((6, 3))
    rows = np.array([[0, 1], [2, 3], [4, 5]])
    table = grounding.own_and_others(scores, rows)
    for concept, best in enumerate(rows):
        means = scores[best].mean(axis=0)
        assert table["own"][concept] == pytest.approx(means[concept])
        assert table["others"][concept] == pytest.approx(np.delete(means, concept).mean())
    alike = np.repeat(scores[:, :1], 3, axis=1)
    table = grounding.own_and_others(alike, rows)
    assert np.allclose(table["own"], table["others"])


def test_own_words_of_a_picture_fit_and_those_of_others_do_not(judges):
    embedded = judges.embed([scene("a key"), scene("a rock")])
    learnt = concepts([["key"], ["rock"]], [[0], [1]], 2)
    baselines = {"random words": {0: ["treaty"], 1: ["snow"]}}
    table = grounding.score_concepts(judges, embedded, learnt, baselines)["CLIPScore"]
    assert table["own"].min() > 2.4
    assert table["others"].max() < 0.01
    assert list(table.columns) == ["own", "others", "random words"]


def test_lists_that_are_all_alike_have_no_share_of_their_own(judges):
    embedded = judges.embed([scene("a key"), scene("a key and a rock")])
    same = grounding.distinctness(judges, embedded, concepts([["key"], ["key"]], [[0], [1]], 2))
    assert same["own minus others"] == pytest.approx(0)
    assert same["overlap"] == 1
    learnt = concepts([["key"], ["rock"]], [[0], [1]], 2)
    assert grounding.distinctness(judges, embedded, learnt)["own share"] > 0.4


def test_codes_choose_the_concept_and_not_scores(judges):
    embedded = judges.embed([scene("a key"), scene("a rock")])
    words = {0: ["key"], 1: ["rock"], 2: ["snow"]}
    codes = np.array([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    table = grounding.score_unseen(judges, embedded, {"top": (codes, words)})
    assert table["top_1"].tolist() == pytest.approx([2.5, 0.0], abs=0.01)
    assert table["id"].tolist() == ["a key", "a rock"]


def test_lists_of_known_truth_go_from_true_to_alien(judges):
    samples = [
        scene("a key on snow", item="key", place="snow"),
        scene("a rock on snow", item="rock", place="snow"),
        scene("a cloud", item="cloud"),
    ]
    with pytest.raises(InputError, match="most lack"):
        judges.exam([scene("nothing")])
    exam = judges.exam(samples[:2] * 5)["CLIPScore"]
    assert list(exam.index)[:2] == ["2 true words", "1 true, 1 alien"]
    assert exam.iloc[0] == exam.max() and exam.iloc[-1] < 0.1


def test_a_second_caption_is_scored_where_there_is_one(judges):
    samples = [scene("a key", "A key.", "There is a key."), scene("a rock", "A rock.")]
    assert judges.second_captions(samples)["CLIPScore"] == pytest.approx(2.5, abs=0.01)
    assert judges.second_captions(samples[1:]) == {}


@pytest.mark.parametrize(
    "word, value, names",
    [
        ("climbs", "climbing", True),
        ("climbing", "climbing", True),
        ("climate", "climbing", False),
        ("zomb", "zombie", True),
        ("zom", "zombie", False),
        ("", "snow", False),
    ],
)
def test_a_word_names_a_value_in_its_forms_or_as_a_long_piece(word, value, names):
    assert grounding.names_value(word, value) is names


def test_words_that_are_true_of_everything_are_true_of_others_too():
    learnt = concepts([["snow"], ["snow"]], [[0], [1]], 2)
    assert grounding.true_share(["snow", "snow"], learnt) == (1.0, 1.0)
    learnt = concepts([["snow", "sand"], ["rock", "sand"]], [[0], [1]], 2)
    assert grounding.true_share(["snow", "rock"], learnt) == (0.5, 0.0)


def test_scores_of_all_tokens_can_be_laid_under_one_another(judges):
    embedded = judges.embed([scene("a key"), scene("a rock")])
    learnt = concepts([["key"], ["rock"]], [[0], [1]], 2)
    table = grounding.score_concepts(judges, embedded, learnt, {}, noise=learnt)
    both = pd.concat({"first": table, "second": table}, names=["token", "concept"])
    assert both["CLIPScore"]["noise images"].equals(both["CLIPScore"]["own"].rename("noise images"))


def test_own_words_are_recorded_against_each_baseline(monkeypatch, tmp_path):
    monkeypatch.setenv(claims.FOLDER_VARIABLE, str(tmp_path))
    scores = {}
    for metric, ahead in (("pictures", 0.2), ("texts", -0.2)):
        for name in ("others", "random words", "random directions", "noise images"):
            scores[metric, name] = [0.3, 0.31, 0.32, 0.33]
        scores[metric, "own"] = [value + ahead for value in scores[metric, "others"]]
    table = pd.DataFrame(scores)
    for tokens, over in ((["key"], "concepts"), (["key", "rock"], "words")):
        experiment = Experiment("grounding", "tiny", "scenes")
        by_token = pd.concat(dict.fromkeys(tokens, table), names=["token", "concept"])
        grounding.record_own(experiment, by_token)
        assert len(experiment.records) == 8
        assert {record["interval_over"] for record in experiment.records} == {over}
        for claim_id, verdict in (("COX-1", "confirmed"), ("COX-2", "refuted")):
            variants = ("random words", "random directions", "others", "noise images")
            for name in variants:
                assert experiment.verdict(claim_id, f"against {name}") == verdict
