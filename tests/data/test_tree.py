"""Which split a name tells, and which picture."""

import pytest

from tests.support.folders import picture
from xlvlms_tutorial.data.tree import Tree, folder_split, listing, named_split
from xlvlms_tutorial.errors import AnnotationError


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            (
                "train training captions_train2017 train-00 TRAIN v2_mscoco_train2014_questions "
                "captionsTrain trainset restval"
            ),
        ),
        (
            "validation",
            (
                "val valid validation dev captions_val2014 valid_annotations.coco "
                "validation-1 devset imagesVal"
            ),
        ),
        ("test", "test testing image_info_test2017 test-dev2015 testdev test_split Test"),
        (
            None,
            (
                "trainer trainval2017 annotations_trainval2014 valley latest devil invalid "
                "train_val test_and_train carnaval captions"
            ),
        ),
    ],
)
def test_names_of_splits_are_whole_words(split, names):
    assert {name: named_split(name) for name in names.split()} == dict.fromkeys(
        names.split(), split
    )


def test_the_nearest_folder_that_names_a_split_tells_it():
    expected = {
        "a.json": None,
        "train/a.json": "train",
        "train/val/a.json": "validation",
        "train/images/a.png": "train",
        "test.png": None,
    }
    assert {file: folder_split(file) for file in expected} == expected


def tree(folder):
    return Tree(folder, listing(folder))


def test_a_picture_is_the_one_beside_the_file_else_of_the_split_else_of_the_folder(tmp_path):
    for shade, name in enumerate(
        (
            "train/a.png",
            "val/a.png",
            "a.png",
            "val/b.png",
            "train/b.png",
            "deep/er/c.png",
            "x/y/z/d.png",
        )
    ):
        picture(tmp_path, name, (shade, 0, 0))
    picture_of = tree(tmp_path).picture
    assert picture_of("val/captions.json", "a.png", "train") == "val/a.png"
    assert picture_of("annotations/captions_train.json", "a.png", "train") == "train/a.png"
    assert picture_of("annotations/captions.json", "a.png", None) == "a.png"
    assert (
        picture_of("captions.json", "c.png", None)
        == picture_of("captions.json", "er/c.png", None)
        == "deep/er/c.png"
    )
    assert picture_of("captions.json", "y/z/d.png", None) == "x/y/z/d.png"
    assert picture_of("captions.json", "e.png", None) is None
    with pytest.raises(
        AnnotationError,
        match=(
            "captions.json: 'b.png' may be train/b.png or val/b.png, which "
            "are different pictures; give"
        ),
    ):
        picture_of("captions.json", "b.png", None)


def test_copies_of_a_picture_are_one(tmp_path):
    for name in ("one/a.png", "two/a.png"):
        picture(tmp_path, name)
    assert tree(tmp_path).picture("c.json", "a.png", None) == "one/a.png"


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0.png", "\ud800.png", "one"])
def test_names_that_no_picture_can_have_are_not_there(tmp_path, name):
    picture(tmp_path, "one/a.png")
    assert tree(tmp_path).picture("c.json", name, None) is None


def test_hidden_folders_hold_nothing(tmp_path):
    for name in (".cache/a.png", "__MACOSX/a.png", "b/.ipynb_checkpoints/a.png"):
        picture(tmp_path, name)
    assert not tree(tmp_path).pictures and tree(tmp_path).picture("c.json", "a.png", None) is None
