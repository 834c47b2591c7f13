"""What the chapters on concepts prepare, on cases made by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial import load_samples
from xlvlms_tutorial.methods.concepts import Simple
from xlvlms_tutorial.tutorials import concept_pages
from xlvlms_tutorial.view import plots

PICTURE = Image.new("RGB", (4, 4))


@pytest.fixture(scope="module")
def samples():
    return load_samples("scenes", n=6)


def test_captions_end_with_the_word_and_samples_without_it_are_left_out(fake_vlm, samples):
    captions = ["A woman walks.", "Two frogs.", "The Woman falls.", "womanly", "A woman", "woman"]
    by_picture = {
        sample.image.tobytes(): caption for sample, caption in zip(samples, captions, strict=True)
    }
    vlm = fake_vlm(lambda picture, text: by_picture[picture.tobytes()])
    selected, kept = concept_pages.captions_with(vlm, samples, "woman")
    assert [caption.strip() for caption in kept] == ["A woman", "The Woman", "A woman", "woman"]
    assert [sample.id for sample in selected] == [samples[k].id for k in (0, 2, 4, 5)]


def test_references_are_read_where_the_model_hardly_says_the_word(fake_vlm, samples):
    vlm = fake_vlm(lambda picture, text: "Nothing.")
    some = [replace(sample, captions=("A key.", "A red gem lies.")) for sample in samples]
    selected, captions = concept_pages.captions_with(vlm, some, "gem")
    assert captions == ["A red gem"] * len(samples)
    assert selected == some


def test_a_penalty_grows_with_the_states():
    A = torch.eye(4).double()
    assert concept_pages.scaled_penalty(2.0, concept_pages.USUAL_NORM * A) == 2.0
    assert concept_pages.scaled_penalty(2.0, 3 * concept_pages.USUAL_NORM * A) == 6.0


def test_purity_is_the_share_of_the_most_frequent_value_among_the_largest_codes():
    codes = np.array([[4.0, 0.0], [3.0, 1.0], [2.0, 3.0], [0.0, 2.0]])
    values = ["walks", "walks", "falls", "stands"]
    assert concept_pages.purity(codes, values, 2).tolist() == [1.0, 0.5]
    assert concept_pages.purity(codes, values, 9).tolist() == [0.5, 0.5]


def test_a_row_of_pictures_is_that_of_its_concept():
    pictures = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 80, 160)]
    codes = np.array([[0.0, 5.0], [1.0, 3.0], [2.0, 4.0]])
    figure = concept_pages.concept_figure(pictures, codes, {1: "first", 0: "second"}, n=2)
    shades = [int(ax.images[0].get_array()[0, 0, 0]) for ax in figure.axes]
    assert shades == [0, 160, 160, 80]
    assert [row.get_suptitle() for row in figure.subfigs] == ["first", "second"]
    plots.png(figure)


def test_a_map_groups_concepts_by_the_factor_they_tell_most():
    rows = [
        (0, "snow", "place", 0.3),
        (0, "snow", "action", 0.1),
        (1, "walk", "action", 0.2),
        (2, "fall", "action", 0.4),
    ]
    table = pd.DataFrame(rows, columns=["concept", "words", "factor", "share"])
    shares = concept_pages.truth_map(table, ["action", "place", "time"])
    assert shares.index.tolist() == ["fall", "walk", "snow"]
    assert shares.columns.tolist() == ["action", "place"]
    assert np.isnan(shares.loc["walk", "place"])


def test_a_map_of_nothing_is_empty():
    table = pd.DataFrame({"concept": [], "words": [], "factor": [], "share": []})
    assert len(concept_pages.truth_map(table, ["action"])) == 0


def test_naming_counts_texts_and_not_words():
    texts = ["walks, walking", "a woman", "falls, woman"]
    assert concept_pages.naming(texts, ["walking", "falling"]) == pytest.approx(2 / 3)


def test_the_largest_concept_agrees_with_the_factor_that_decides_it_and_with_no_other():
    codes = np.tile(np.eye(2), (24, 1))
    truth = pd.DataFrame({"action": ["walks", "falls"] * 24, "side": list("llrr") * 12})
    agreed = concept_pages.agreements(codes, truth)
    assert agreed["action"].value == pytest.approx(1)
    assert abs(agreed["side"].value) < 0.05


def test_a_table_of_concepts_counts_each_sample_once(monkeypatch):
    monkeypatch.setattr(concept_pages, "labels", lambda vlm, D, n: ["words"] * len(D))
    A = torch.rand(20, 6, generator=torch.manual_seed(0))
    table = concept_pages.concept_table(tiny_reader(), Simple(3).fit(A), A)
    assert table["top in"].sum() == 20
    assert table["top in"].is_monotonic_decreasing
    assert (table["cosine with mean"] > 0.5).all()  # of positive numbers
