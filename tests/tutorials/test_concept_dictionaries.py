"""Dictionaries of states that are made by hand: what they share and what they find again."""

import pandas as pd
import pytest
import torch

from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial.methods.concepts import DICTIONARIES
from xlvlms_tutorial.tutorials import concept_dictionaries

OFFSET = 20.0


@pytest.fixture(scope="module")
def noise():
    return torch.randn(60, 16, generator=torch.manual_seed(0)).double()


@pytest.fixture(scope="module")
def two_groups():
    """Two groups of states, which share an offset."""
    groups = torch.eye(2, 16).repeat(20, 1).double() * 5
    return groups + 1 + 0.01 * torch.randn(40, 16, generator=torch.manual_seed(1)).double()


@pytest.fixture
def no_words(monkeypatch):
    """The overlap of the words of a stand-in for a model: one word each."""
    monkeypatch.setattr(
        concept_dictionaries,
        "concept_words",
        lambda vlm, D, n, mean=None: pd.DataFrame(
            {"concept": range(len(D)), "word": [f"word {k}" for k in range(len(D))]}
        ),
    )


@pytest.mark.parametrize("name", DICTIONARIES)
def test_each_dictionary_has_the_number_of_concepts_it_was_asked_for(name, two_groups):
    fitted = concept_dictionaries.fit(name, two_groups, 4, penalty=0.1)
    assert fitted.components_.shape == (4, 16)
    assert isinstance(fitted, DICTIONARIES[name])


def test_halves_are_all_rows_once(noise):
    first, second = concept_dictionaries.halves(noise, seed=3)
    assert len(first) == len(second) == 30
    rows = {tuple(row.tolist()) for row in torch.cat([first, second])}
    assert rows == {tuple(row.tolist()) for row in noise}


def test_an_offset_alone_makes_centres_stable(noise):
    with_offset = concept_dictionaries.found_again("k-means", noise + OFFSET, 10, 0.0)
    without = concept_dictionaries.found_again("k-means", noise, 10, 0.0)
    assert with_offset["halves"] > 0.9 > without["halves"]


def test_a_fit_without_a_seed_has_no_stability_over_seeds(noise):
    assert pd.isna(concept_dictionaries.found_again("pca", noise, 4, 0.0)["seeds"])


def test_centres_of_groups_are_judged_by_the_groups(no_words, two_groups):
    values = ["walks", "falls"] * 20
    centres = concept_dictionaries.fit("k-means", two_groups, 2, 0.0)
    judged = concept_dictionaries.judge(tiny_reader(), centres, two_groups, values)
    assert judged["agreement"] == pytest.approx(1)
    assert judged["explained"] > 0.99
    assert judged["active"] == 1
    assert judged["overlap"] == 0
    D = torch.from_numpy(centres.components_)
    assert judged["two concepts"] == pytest.approx(torch.cosine_similarity(D[0], D[1], 0).item())


def test_clusters_name_their_usual_value(monkeypatch, two_groups):
    texts = {True: ["woman", "woman"], False: ["walks", "falls"]}
    monkeypatch.setattr(
        concept_dictionaries,
        "labels",
        lambda vlm, D, n, mean=None: texts[mean is None],
    )
    values = ["walking", "falling"] * 18 + ["walking"] * 4
    centres = concept_dictionaries.fit("k-means", two_groups, 2, 0.0)
    table = concept_dictionaries.cluster_table(tiny_reader(), centres, two_groups, values)
    assert table["samples"].tolist() == [20, 20]
    assert sorted(table["share"]) == [0.9, 1.0]
    assert set(table["usual"]) == {"walking", "falling"}
    assert concept_dictionaries.named(table, "words, mean taken off") == 0
    assert concept_dictionaries.named(table, "words") in (0, 1)  # clusters have any order


def test_a_larger_penalty_uses_fewer_concepts(no_words, noise):
    values = ["a", "b"] * 30
    active = []
    for penalty in (0.01, 3.0):
        _, row = concept_dictionaries.semi_nmf_row(tiny_reader(), noise, values, 6, penalty)
        active.append(row["active share"])
    assert 0 < active[1] < active[0] <= 1


def test_statements_about_five_dictionaries_can_hold_and_fail():
    columns = ["explained", "agreement", "overlap", "two concepts", "seeds", "halves"]
    rows = {
        "semi-nmf": [0.89, 0.71, 0.06, 0.26, 0.91, 0.68],
        "pca": [0.90, 0.24, 0.00, 0.00, float("nan"), 0.46],
        "k-means": [0.70, 0.65, 0.61, 0.82, 0.98, 0.94],
        "simple": [0.08, 0.43, 0.57, 0.79, float("nan"), 0.92],
        "sae": [0.81, 0.63, 0.03, 0.32, 0.64, 0.36],
    }
    judged = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    assert all(concept_dictionaries.comparison(judged).values())
    judged.loc["pca", "agreement"] = 0.7
    failed = [name for name, holds in concept_dictionaries.comparison(judged).items() if not holds]
    assert failed == ["agreement with the action does not follow the overlap"]


def test_statements_about_settings_can_hold_and_fail():
    columns = ["explained", "halves", "agreement", "active", "overlap"]
    sizes = pd.DataFrame([[0.7, 0.8, 0.6, 4, 0.3], [0.9, 0.6, 0.6, 15, 0.1]], columns=columns)
    rows = [[0.9, 0.7, 0.6, 15, 0.1], [0.4, 0.9, 0.6, 2, 0.6], [-0.1, 0.9, 0.6, 1, 0.7]]
    strengths = pd.DataFrame(rows, columns=columns)
    assert all(concept_dictionaries.trade_off(sizes, strengths, 0.6).values())
    turned = concept_dictionaries.trade_off(sizes[::-1], strengths[::-1], 0.9)
    assert not any(turned[name] for name in list(turned)[:1] + list(turned)[2:])
