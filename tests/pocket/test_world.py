"""The world: the same to the pixel each time, splits that keep apart, records that cannot lie."""

import hashlib
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import pytest
from hypothesis import given, settings

from tests.support.strategies import any_scene
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.pocket.world import (
    ACTIONS,
    COLOURED,
    FACTORS,
    HELD_OUT_ITEM_COLOUR,
    HELD_OUT_SUBJECT_PLACE,
    ITEMS,
    PEOPLE,
    SPLITS,
    Scene,
    counterfactuals,
    masks,
    render,
    scenes,
)

ROOT = Path(__file__).parents[2]
SCENE = Scene("woman", "walking", "key", "red", 2, "left", "snow", "dusk", 7)
PRINT = """
from tests.pocket.test_world import fingerprint
from xlvlms_tutorial.pocket.world import scenes
print(fingerprint(scenes(20, "test", 3)))
"""
PILLOW, PINNED = "13.0.0", "1e96ba16dbc18f05c4d8018eaf3680b76333ad1c79f8db4b1dacf96b7ee6a779"


def fingerprint(records) -> str:
    return hashlib.sha256(b"".join(render(scene).tobytes() for scene in records)).hexdigest()


def test_a_picture_is_the_same_to_the_pixel_again_and_in_another_process():
    expected = fingerprint(scenes(20, "test", 3))
    assert fingerprint(scenes(20, "test", 3)) == expected
    result = subprocess.run(
        [sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == expected


@pytest.mark.skipif(PIL.__version__ != PILLOW, reason=f"runs with Pillow {PILLOW}")
def test_pictures_are_those_of_the_release():
    assert fingerprint(scenes(20, "test", 3)) == PINNED


@settings(max_examples=60, deadline=None)
@given(any_scene())
def test_every_allowed_scene_can_be_drawn(scene):
    picture = render(scene)
    assert picture.mode == "RGB" and picture.size == (256, 256)
    assert len(picture.resize((64, 64), 0).getcolors(4096) or range(4097)) > 20


def test_a_thousand_scenes_differ():
    images = {render(scene).tobytes() for scene in scenes(1000, "train", 0)}
    assert len(images) == 1000


@pytest.mark.parametrize("split", SPLITS)
def test_a_shorter_list_is_the_start_of_a_longer_one(split):
    assert scenes(40, split, 5)[:13] == scenes(13, split, 5)
    assert scenes(40, split, 5) != scenes(40, split, 6)


def test_splits_share_no_scene_and_only_composition_holds_the_held_out():
    by_split = {split: scenes(2000, split) for split in SPLITS}
    for a in SPLITS:
        assert all(scene.held_out == (a == "composition") for scene in by_split[a])
        assert not any(set(by_split[a]) & set(by_split[b]) for b in SPLITS if b != a)
    combinations = {(s.subject, s.place) for s in by_split["composition"]} | {
        (s.item, s.colour) for s in by_split["composition"]
    }
    assert combinations >= HELD_OUT_SUBJECT_PLACE | HELD_OUT_ITEM_COLOUR


def test_training_shows_each_part_of_a_held_out_combination():
    sampled = scenes(2000)
    for subject, place in HELD_OUT_SUBJECT_PLACE:
        assert any(s.subject == subject for s in sampled) and any(s.place == place for s in sampled)
    for item, colour in HELD_OUT_ITEM_COLOUR:
        assert any(s.item == item for s in sampled)
        assert any(s.colour == colour and s.item != item for s in sampled)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"subject": "dragon"}, "woman"),
        ({"action": "flying"}, "climbing"),
        ({"action": None}, "walking"),
        ({"item": "sword"}, "cactus"),
        ({"colour": "pink"}, "yellow"),
        ({"colour": None}, "blue"),
        ({"item": "flag", "colour": "blue"}, "green"),
        ({"item": "rock"}, "None"),
        ({"subject": "bee"}, "None"),
        ({"count": 4}, "3"),
        ({"count": 0}, "1"),
        ({"side": "top"}, "right"),
        ({"place": "moon"}, "stone"),
        ({"time": "noon"}, "dusk"),
    ],
)
def test_impossible_attributes_are_refused_with_the_allowed_ones(change, named):
    with pytest.raises(InputError, match=r"allowed: ") as error:
        replace(SCENE, **change)
    assert named in str(error.value).split("allowed: ")[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((3, "dev"), "composition"), ((0, "train"), "1 or more"), ((-2, "test"), "1 or more")],
)
def test_impossible_lists_are_refused(arguments, named):
    with pytest.raises(InputError, match=named):
        scenes(*arguments)


@settings(max_examples=80, deadline=None)
@given(any_scene())
def test_counterfactuals_change_one_factor_only_and_the_picture_with_it(scene):
    allowed = {
        "action": len(ACTIONS) if scene.subject in PEOPLE else 0,
        "colour": len(COLOURED.get(scene.item, ())),
    }
    for factor in FACTORS:
        if allowed.get(factor) == 0 or (factor == "item" and scene.colour):
            with pytest.raises(InputError, match="factor"):
                list(counterfactuals(scene, factor))
            continue
        others = list(counterfactuals(scene, factor))
        assert len(others) == len({getattr(o, factor) for o in others}) > 0
        for variant in others:
            changed = [k for k, v in asdict(scene).items() if asdict(variant)[k] != v]
            assert changed == [factor]


def test_a_counterfactual_leaves_the_rest_of_the_picture_alone():
    before = np.asarray(render(SCENE)).astype(int)
    for factor, region in (
        ("colour", np.s_[:, 150:]),
        ("action", np.s_[190:, :100]),
        ("subject", np.s_[205:]),
    ):
        for variant in counterfactuals(SCENE, factor):
            after = np.asarray(render(variant)).astype(int)
            assert (after != before).any(), factor
            assert (after[region] == before[region]).all(), factor


def test_things_are_on_the_side_that_the_record_says():
    for scene in scenes(60, "test", 9):
        if scene.item == "rock":
            continue
        plain = np.asarray(render(replace(scene, item="rock", colour=None))).astype(int)
        columns = np.abs(np.asarray(render(scene)).astype(int) - plain).sum((0, 2)).nonzero()[0]
        assert abs(columns.mean() - (64 if scene.side == "left" else 192)) < 64


def test_every_item_occurs_and_count_and_side_are_balanced():
    frame = pd.DataFrame([asdict(scene) for scene in scenes(4000, "train", 1)])
    assert set(frame["item"]) == set(ITEMS)
    assert frame["count"].value_counts(normalize=True).between(0.30, 0.37).all()
    assert frame["side"].value_counts(normalize=True).between(0.46, 0.54).all()


@settings(max_examples=20, deadline=None)
@given(any_scene())
def test_no_pixel_is_two_things_and_everything_is_seen(scene):
    parts = masks(scene)
    assert list(parts) == ["subject", "item", "ground"]
    assert sum(mask.astype(int) for mask in parts.values()).max() == 1
    assert all(mask.shape == (256, 256) and mask.sum() > 50 for mask in parts.values())


def test_masks_hold_the_pixels_that_change_when_the_thing_does():
    changed = replace(SCENE, colour="green")
    before, after = (np.asarray(render(scene)).astype(int) for scene in (SCENE, changed))
    differ = (before != after).any(axis=2)
    item = masks(SCENE)["item"]
    assert differ.any() and (differ & ~item).sum() < 0.2 * differ.sum()  # soft edges
    assert (differ & masks(SCENE)["subject"]).sum() == 0


def test_what_stands_in_front_hides_what_is_behind():
    for scene in scenes(30, "test", 1):
        parts = masks(scene)
        people = parts["subject"]
        assert not (people & parts["item"]).any() and not (people & parts["ground"]).any()
