"""Where things are in a picture: against the sprites themselves, for any scene."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings

from tests.support.strategies import any_scene
from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.pocket import world
from xlvlms_tutorial.pocket.regions import regions
from xlvlms_tutorial.pocket.world import Scene, render

SCENE = Scene("frog", None, "key", "red", 2, "left", "snow", "day", 7)


def test_a_subject_fills_the_opaque_pixels_of_its_sprite():
    sprite = world._sprite(world.subject_sprite(SCENE, 0), 104)
    opaque = (np.asarray(sprite)[..., 3] > 0).sum()
    # the snow below is as light as parts of a frog are not; few pixels may agree by chance
    assert 0.97 * opaque <= regions(SCENE)["frog"].sum() <= opaque


@settings(max_examples=15, deadline=None)
@given(scene=any_scene())
def test_masks_do_not_overlap_and_nothing_else_changes(scene):
    masks = regions(scene)
    subject, item, place = (masks[word] for word in (scene.subject, scene.item, scene.place))
    assert not (subject & item).any() and not (place & (subject | item)).any()
    assert subject.any() and item.any() and place.any()
    assert not place[:192].any()
    if scene.colour is not None:
        assert (masks[scene.colour] == item).all()
    # outside the masks of subject and items, a picture of other things is the same
    changed = replace(scene, count=scene.count % 3 + 1)
    same = (np.asarray(render(scene)) == np.asarray(render(changed))).all(axis=-1)
    second = regions(changed)
    assert same[~(item | second[scene.item] | subject)].all()


def test_items_stand_on_their_side():
    for side in ("left", "right"):
        masks = regions(replace(SCENE, side=side))
        key, frog = (masks[word].nonzero()[1].mean() for word in ("key", "frog"))
        assert (key < frog) == (side == "left")


def test_samples_know_the_regions_of_their_own_picture():
    samples = load_samples("scenes", n=2)
    for sample, scene in zip(samples, world.scenes(2, "test"), strict=True):
        masks, expected = sample.regions(), regions(scene)
        assert masks.keys() == expected.keys()
        assert all((masks[word] == expected[word]).all() for word in masks)
