"""The chapter on class activation maps: regions, rulers and records on cases made by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from tests.support.tiny import lively, tiny_llava
from xlvlms_tutorial.claims import claims
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.attribution import WordScores, control_maps
from xlvlms_tutorial.tutorials import Experiment, cam


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setenv(claims.FOLDER_VARIABLE, str(tmp_path))
    return Experiment("cam", "tiny", "scenes")


def test_constant_maps_are_cut_as_they_are_and_others_stretched():
    maps = {name: control_maps(2, 3, 3, name) for name in ("empty", "full")}
    maps["some"] = torch.stack([torch.arange(9.0).view(3, 3), torch.zeros(3, 3)])
    regions = cam.above(maps, 0.5)
    assert not regions["empty"].any() and regions["full"].all()
    assert regions["some"][0].flatten().tolist() == [False] * 5 + [True] * 4
    assert not regions["some"][1].any()


def test_what_is_hidden_is_filled_and_what_is_shown_may_differ_from_the_region():
    pictures = torch.full((2, 1, 2, 2), 0.5)
    truth = torch.tensor([[[True, True], [False, False]]]).expand(2, -1, -1).clone()
    nothing = {"nothing": torch.zeros_like(truth)}
    predict = lambda shown: shown[:, 0]
    dark = cam.judge(predict, pictures, truth, nothing)
    assert dark["confidence"].tolist() == [0, 0] == dark["entropy"].tolist()
    grey = cam.judge(predict, pictures, truth, nothing, fill=0.25)
    assert grey["confidence"].tolist() == [0.25, 0.25]
    shown = cam.judge(predict, pictures, truth, nothing, {"nothing": truth})
    assert shown["confidence"].tolist() == [0.5, 0.5]
    assert shown["area"].tolist() == shown["overlap"].tolist() == [0, 0]


def test_agreement_is_spearmans_correlation_in_each_picture():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"map": list("abcd") * 3, "picture": np.repeat(range(3), 4)})
    for column in ("entropy", "confidence", "overlap"):
        rows[column] = rng.integers(0, 4, size=12) / 4
    for ruler, sign in (("entropy", -1), ("confidence", 1)):
        expected = []
        for _, part in rows[rows["map"] != "d"].groupby("picture"):
            expected.append(spearmanr(sign * part[ruler], part["overlap"]).statistic)
        values = cam.agreement(rows, ruler, ["a", "b", "c"])
        np.testing.assert_allclose(values, np.nan_to_num(expected), atol=1e-12)


def test_ranks_are_recorded_against_confidence_and_against_counting_pixels(experiment):
    rows = pd.DataFrame({"map": list("abc") * 4, "picture": np.repeat(range(4), 3)})
    rows["overlap"] = [0.1, 0.4, 0.9] * 4
    rows["entropy"] = rows["binary entropy"] = [3, 2, 1] * 4
    rows["confidence"] = [0.9, 0.5, 0.1] * 4
    rows["area"] = 0.3
    agreed = cam.record_ranks(experiment, {"published": (rows, ["a", "b", "c"])})
    assert agreed["published"]["confidence"].tolist() == [-1] * 4
    values = {record["variant"]: record["value"] for record in experiment.records}
    assert values == {"published": 2, "published, against counting pixels": 1}


def test_named_things_end_where_the_word_does_and_are_seen():
    for part in ("subject", "item"):
        named = cam.named_things(6, part, seed=1)
        assert len(named.samples) == 6 == len(named.masks)
        assert named.masks.any(dim=2).any(dim=1).all()
        for sample, word, answer in zip(named.samples, named.words, named.answers, strict=True):
            assert answer.endswith(word) and sample.captions[0].startswith(answer)
            assert str(sample.truth[part])[:3] in word


def test_pictures_without_masks_are_taken_and_others_replaced_by_scenes(monkeypatch):
    bare = [Sample(f"s{k}", None, ("A cat.",), truth={"subject": "cat"}) for k in range(3)]
    load = cam.load_samples
    monkeypatch.setattr(
        cam, "load_samples", lambda name, *args: bare if name == "cats" else load(name, *args)
    )
    named = cam.named_things(2, dataset="cats")
    assert named.answers == ["A cat", "A cat"] and named.masks is None and named.dataset == "cats"
    assert cam.named_things(2, "item", "cats").dataset == "scenes"
    with pytest.raises(InputError, match="give two or more"):
        cam.named_things(1)


class Additive(WordScores):
    """A score that is the logarithm of a weighted count of what is kept."""

    def __init__(self, weights):
        self.weights, self.side = weights, weights.shape[-1]

    def __len__(self):
        return len(self.weights)

    def __call__(self, kept):
        return (self.weights * kept).sum(dim=(1, 2)).log()


def test_tokens_are_judged_by_truth_and_by_the_model(experiment):
    truth = torch.zeros(2, 2, 2)
    truth[:, 0, 0] = 0.5
    weights = torch.tensor([[[0.6, 0.2], [0.1, 0.1]]]).expand(2, -1, -1)
    maps = {"gradient": weights, "wrong": -weights}
    rows = cam.judge_tokens(Additive(weights), maps, truth, [0.25, 0.5])
    best = rows[rows["map"] == "gradient"].iloc[0]
    assert best["hit"] == 1 and best["on it"] == pytest.approx(0.3)
    assert best["insertion"] == pytest.approx(0.7) and best["deletion"] == pytest.approx(0.3)
    wrong = rows[rows["map"] == "wrong"].iloc[0]
    assert wrong["hit"] == 0 and wrong["insertion"] == pytest.approx(0.15)
    cam.record_tokens(experiment, rows, {"wrong": "a wrong map"})
    assert experiment.verdict("CAM-2", "insertion minus deletion, against a wrong map") == (
        "confirmed"
    )
    blind = cam.judge_tokens(Additive(weights), maps, None, [0.5])
    assert list(blind) == ["map", "picture", "insertion", "deletion"]


def checks(experiment, call, *tables):
    """Return what a function writes down, by sentence."""
    results = {}
    experiment.check = lambda statement, holds: results.update({statement: bool(holds)})
    call(experiment, *tables)
    return results


def test_sentences_about_the_protocols_follow_the_tables(experiment):
    names = list(cam.NAMES.values())
    published = pd.DataFrame(
        {"overlap": 0.5, "confidence": 0.1, "entropy": 2.0}, index=[*names, "empty"]
    )
    published.loc["Score-CAM"] = [0.05, 0.6, 9.0]
    alone = published.copy()
    alone.loc["empty"] = [0.0, 0.01, 0.1]
    sentences = checks(experiment, cam.check_protocols, published, alone)
    assert len(sentences) == 5 and all(sentences.values())
    published.loc["LayerCAM"] = [0.5, 0.7, 1.0]
    alone.loc["empty", "confidence"] = 0.06
    sentences = checks(experiment, cam.check_protocols, published, alone)
    assert [text for text, holds in sentences.items() if not holds] == [
        "the method that keeps the thing recognised has the highest entropy",
        "alone, the empty map leaves nothing of the thing",
    ]


def test_sentences_about_tokens_follow_the_tables_and_need_the_truth(experiment):
    summary = pd.DataFrame(
        {"on it": [0.2, 0.5, 0.1, 0.15, 0.3], "hit": [0.5, 0.95, 0.1, 0.1, 0.7]},
        index=["gradient", "occlusion", "rollout", "random", "attention"],
    )
    by_word = pd.DataFrame({("item", "subject"): [0.4], ("item", "item"): [0.2]})
    sentences = checks(experiment, cam.check_tokens, summary, by_word)
    assert len(sentences) == 5 and all(sentences.values())
    summary.loc["gradient"] = [0.5, 0.65]
    sentences = checks(experiment, cam.check_tokens, summary, by_word)
    assert sum(sentences.values()) == 3
    blind = checks(experiment, cam.check_tokens, summary[[]], by_word)
    assert sum(blind.values()) == 1


def test_words_of_a_real_model_are_scored():
    vlm = lively(tiny_llava())
    samples = [Sample(f"s{k}", torch.full((32, 32, 3), k * 90).byte().numpy()) for k in range(2)]
    named = cam.Named(samples, ["key", "woman"], ["a red key", "a woman"], None)
    scores = cam.score_words(vlm, named)
    assert scores(torch.ones(2, 2, 2, dtype=torch.bool)).shape == (2,)


def test_strips_hide():
    pictures = torch.ones(2, 3, 2, 2)
    kept = torch.zeros(2, 2, 2, dtype=torch.bool)
    kept[0] = True
    pixels = np.asarray(cam.strip(pictures, kept, pixels=4))
    assert pixels[:, :4].min() == 255 and pixels[:, 8:].max() == 0
