"""Samples: pictures opened when asked for, datasets by name."""

import numpy as np
import pytest
from PIL import Image

from xlvlms_tutorial import load_samples
from xlvlms_tutorial.data.samples import Sample, as_image
from xlvlms_tutorial.errors import DatasetError, ImageError, SceneError
from xlvlms_tutorial.pocket import world


def test_sources_may_be_pictures_files_or_functions(tmp_path):
    picture = Image.new("RGBA", (4, 3), (1, 2, 3, 255))
    picture.save(tmp_path / "a.png")
    for source in (picture, tmp_path / "a.png", lambda: picture):
        image = Sample("a", source).image
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("wrong", [b"bytes", 3.5, None])
def test_other_sources_are_refused(wrong):
    with pytest.raises(ImageError, match="give a PIL image"):
        as_image(wrong)


def test_a_truncated_file_is_refused(tmp_path):
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ImageError, match="cut.png"):
        as_image(tmp_path / "cut.png")


def test_scenes_carry_references_questions_and_truth():
    samples = load_samples("scenes", n=5, seed=3)
    scenes = world.scenes(5, "test", 3)
    assert [s.truth["subject"] for s in samples] == [s.subject for s in scenes]
    assert all(len(s.captions) == 5 and len(s.questions) >= 6 and set(s.truth) == set(world.FACTORS) for s in samples)
    assert np.array_equal(np.asarray(samples[2].image), np.asarray(world.render(scenes[2])))
    assert len({s.id for s in samples}) == 5


def test_composition_holds_only_combinations_kept_out_of_training():
    for sample in load_samples("composition", n=20):
        pair, colour = (sample.truth["subject"], sample.truth["place"]), (sample.truth["item"], sample.truth["colour"])
        assert pair in world.HELD_OUT_SUBJECT_PLACE or colour in world.HELD_OUT_ITEM_COLOUR


def test_unknown_datasets_and_splits_list_what_there_is():
    with pytest.raises(DatasetError, match="scenes, composition"):
        load_samples("coco")
    with pytest.raises(SceneError, match="validation"):
        load_samples("scenes", split="dev")
    with pytest.raises(SceneError, match="1 or more"):
        load_samples("scenes", n=0)
