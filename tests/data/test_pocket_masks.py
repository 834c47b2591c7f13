"""Masks of samples are those of their scenes; where pixels are not known it is said."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from xlvlms_tutorial.data import Sample, load_samples, truth_masks
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.pocket import world


def test_masks_are_those_of_the_scenes_also_of_changed_samples():
    samples = load_samples("scenes", n=3, seed=2)
    samples[1] = replace(samples[1], questions=())
    masks = truth_masks(samples)
    assert list(masks) == list(world.PARTS)
    for number, scene in enumerate(world.scenes(3, "test", 2)):
        for part, mask in world.masks(scene).items():
            assert torch.equal(masks[part][number], torch.from_numpy(mask))


@pytest.mark.parametrize("dataset", ["postcards", "clips", "sounds"])
def test_other_worlds_have_no_masks(dataset):
    with pytest.raises(InputError, match="are not known; give samples of 'scenes'"):
        truth_masks(load_samples(dataset, n=1))


def test_pictures_of_others_have_no_masks():
    photo = Sample("photo", Image.new("RGB", (4, 4)))
    with pytest.raises(InputError, match="masks of sample 'photo'"):
        truth_masks([*load_samples("scenes", n=1), photo])
    with pytest.raises(InputError, match="no samples"):
        truth_masks([])
