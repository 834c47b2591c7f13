"""Pictures, matches and maps of the chapter "Explain one answer with concepts", by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from xlvlms_tutorial import Sample, load_samples
from xlvlms_tutorial.tutorials import Experiment, explain

EXPERIMENT = ("explain", "tiny-llava", "none")


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("XLVLMS_CLAIMS", str(tmp_path))
    return Experiment(*EXPERIMENT)


def sample(caption: str = "A key.", **truth: str) -> Sample:
    return Sample("s", Image.new("RGB", (8, 4)), (caption,), truth=truth)


@pytest.mark.parametrize(
    ("caption", "beginning"),
    [
        ("A woman walks to a woman.", "A woman"),
        ("A snowwoman, a Woman.", "A snowwoman, a Woman"),
        ("A man.", "A man."),
    ],
)
def test_a_caption_is_cut_after_the_first_whole_word(caption, beginning):
    assert explain.caption_up_to("woman")(sample(caption)) == beginning


def test_a_concept_is_matched_to_what_its_pictures_share():
    pictures = load_samples("scenes", n=60)
    place = [float(picture.truth["place"] == "sand") for picture in pictures]
    time = [float(picture.truth["time"] == "night") for picture in pictures]
    match = explain.match_concepts(np.stack([place, time], axis=1), pictures)
    assert match["value"].tolist() == ["sand", "night"]
    assert match["purity"].tolist() == pytest.approx([1, 1])


def test_values_that_occur_once_match_nothing():
    pictures = [sample(place="sand", time="day"), sample(place="sand", time="night")] * 10
    pictures.append(sample(place="moon", time="day"))
    codes = np.ones((21, 2))
    codes[20, 0] = 9  # strongest where the place occurs once
    table = explain.factor_table(codes, pictures)
    assert "moon" not in set(table["value"])


def match_of(*rows: tuple[str, str, float]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["factor", "value", "share"])
    return table.rename_axis("concept")


def test_of_two_concepts_of_one_value_the_one_with_more_share_counts():
    match = match_of(("place", "sand", 0.2), ("place", "sand", 0.6), ("time", "day", 0.9))
    pictures = [sample(place="sand"), sample(place="snow"), sample(time="day")]
    assert explain.with_concept(match, "place", pictures) == [(0, 1, "sand")]


def test_pictures_with_most_concepts_come_first_as_squares_of_one_size():
    match = match_of(("action", "walking", 0.5), ("item", "key", 0.5), ("place", "sand", 0.5))
    pictures = [sample(item="gem"), sample(item="key"), sample(item="key", action="walking")]
    chosen, factors = explain.pictures_to_map(match, pictures, n=2)
    assert factors == ["action", "item"]
    assert [one.truth for one in chosen] == [pictures[2].truth, pictures[1].truth]
    assert {one.image.size for one in chosen} == {(4, 4)}


@pytest.mark.parametrize(
    ("side", "heat", "expected"),
    [
        ("left", [[1.0, 0.0]], 1),
        ("right", [[1.0, 0.0]], -1),
        ("left", [[1.0, 9.0, 1.0]], 0),  # the middle column is on no half
        ("right", [[-5.0, 2.0]], 1),  # heat below zero does not count
        ("left", [[-5.0, -2.0]], 0),
    ],
)
def test_balance_of_heat(side, heat, expected):
    match = match_of(("item", "key", 0.5))
    maps = torch.tensor(heat)[None, None]
    balance = explain.side_balance(maps, match, "item", [sample(item="key", side=side)])
    assert balance.tolist() == [expected]


def test_balance_leaves_out_pictures_without_a_side_or_a_concept():
    match = match_of(("item", "key", 0.5))
    pictures = [
        sample(item="key"),
        sample(item="gem", side="left"),
        sample(item="key", side="left"),
    ]
    balance = explain.side_balance(torch.ones(3, 1, 2, 2), match, "item", pictures)
    assert balance.to_dict() == {2: 0}


def test_explanations_are_checked_by_their_three_largest_concepts(experiment, monkeypatch):
    written = {}
    monkeypatch.setattr(experiment, "check", written.__setitem__)
    match = match_of(
        ("action", "walking", 1), ("time", "day", 1), ("time", "night", 1), ("side", "left", 1)
    )
    codes = np.array([[4.0, 3.0, 2.0, 1.0], [0.0, 3.0, 2.0, 1.0]])
    explain.check_explanations(experiment, match, codes)
    assert written == {
        "most explanations hold the action": False,
        "many explanations hold the object or where it is": True,
    }


def test_checks_of_maps_compare_the_same_pictures(experiment, monkeypatch):
    written = {}
    monkeypatch.setattr(experiment, "check", written.__setitem__)
    action = pd.Series([-0.9, -0.8, -0.7, -0.9], index=[0, 1, 2, 3])
    item = pd.Series([0.4, -0.3, 0.2, -0.2], index=[0, 1, 2, 4])
    balance = {("action", "occlusion"): action, ("item", "occlusion"): item}
    explain.check_maps(experiment, balance | {("item", "activation"): item + 0.1})
    assert list(written.values()) == [True, True, True, False]


def test_an_empty_table_of_false_sentences_is_not_checked(experiment, monkeypatch):
    monkeypatch.setattr(experiment, "check", pytest.fail)
    explain.check_false_sentences(experiment, pd.DataFrame())
    explain.check_maps(experiment, {})


def test_the_baseline_asks_about_other_pictures_only():
    match = match_of(("place", "sand", 1), ("place", "snow", 1))
    pictures = [sample(place="sand")] * 3 + [sample(place="snow")]
    truths = explain.is_true_elsewhere(match, [0, 0, 0, 1], pictures)
    assert truths.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0])


def test_maps_are_scaled_each_by_its_largest_magnitude():
    match = match_of(("item", "key", 0.5), ("item", "gem", 0.5))
    pictures = [sample(item="gem"), sample(item="key"), sample(item="key")]
    maps = torch.arange(6.0).reshape(3, 2, 1, 1) * torch.tensor([1.0, -2.0])
    images, heat, values = explain.map_panels(maps, match, ["item"], pictures, n=2)
    assert values == ["gem", "key"]
    assert heat[0].flatten().tolist() == [0.5, -1]  # concept 1 of the first picture
    assert heat[1].flatten().tolist() == [0.5, -1]
    assert len(images) == 2
