"""Which entries of several files are of one picture, one box, one question, and of which split."""

from collections import Counter

import pytest

from tests.support.folders import answer, boxes, captions, picture, pictures, question, write
from xlvlms_tutorial.data import folder, load_samples
from xlvlms_tutorial.data.gathered import Gathered, Part, Picture
from xlvlms_tutorial.data.tree import Tree
from xlvlms_tutorial.errors import AnnotationError, InputError
from xlvlms_tutorial.samples import Question

SPLITS = ("train", "validation", "test")
RED, BLUE = (255, 0, 0), (0, 0, 255)


def split_up(source, value=lambda sample: sample.id):
    """A value of every sample, for each split that there is."""
    gathered = {}
    for split in SPLITS:
        try:
            gathered[split] = sorted(value(sample) for sample in load_samples(source, 99, split))
        except InputError:
            continue
    return gathered


@pytest.mark.parametrize(
    "names",
    [
        ("train", "valid", "test"),
        ("training", "dev", "testing"),
        ("Train", "validation", "test-dev"),
        ("restval", "val", "TEST"),
    ],
)
@pytest.mark.parametrize(
    "form",
    [
        "{name}.json",
        "captions_{name}2017.json",
        "annotations/{name}/captions.json",
        "{name}/_annotations.coco.json",
    ],
)
def test_splits_are_those_of_the_names_of_files_and_folders(tmp_path, names, form):
    for name in names:
        picture(tmp_path, f"{name}.png")
        write(tmp_path, form.format(name=name), captions(f"{name}.png", "A dog.", key=name))
    assert split_up(tmp_path) == {split: [name] for split, name in zip(SPLITS, names, strict=True)}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metadata.csv", "file_name,text\na.png,{name}\n"),
        ("c.json", None),
        ("m.jsonl", '{{"file_name": "a.png", "text": "{name}"}}'),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_pictures_of_one_name_in_folders_of_splits_are_several(tmp_path, file, content, beside):
    for name, colour in (("train", RED), ("test", BLUE)):
        picture(tmp_path, f"{name}/a.png" if beside else f"images/{name}/a.png", colour)
        write(
            tmp_path,
            f"{name}/{file}",
            content.format(name=name) if content else captions("a.png", name),
        )
    values = split_up(tmp_path, lambda sample: (sample.captions, sample.image.getpixel((0, 0))))
    assert values == {"train": [(("train",), RED)], "test": [(("test",), BLUE)]}


def test_the_folder_decides_where_the_files_name_says_otherwise(tmp_path):
    write(pictures(tmp_path, "a.png"), "val/captions_train.json", captions("a.png", "A dog."))
    assert list(split_up(tmp_path)) == ["validation"]


def test_folders_of_pictures_tell_splits_where_nothing_else_does(tmp_path):
    table = "file,caption\ntrain/1.png,x\nval/2.png,y\n3.png,z\n"
    write(pictures(tmp_path, "train/1.png", "val/2.png", "3.png"), "t.csv", table)
    with pytest.warns(
        UserWarning, match="left alone: 1 pictures in no split, while others are in one"
    ):
        assert split_up(tmp_path) == {"train": ["train/1.png"], "validation": ["val/2.png"]}
    # all in one folder: its name divides nothing
    (tmp_path / "t.csv").write_text("file,caption\nval/2.png,y\n")
    assert split_up(tmp_path) == dict.fromkeys(SPLITS, ["val/2.png"])


@pytest.mark.parametrize("stray", ["captions_holdout.json", "captions_train_val.json", "more.json"])
def test_pictures_without_a_split_are_in_none_where_others_have_one(tmp_path, stray):
    pictures(tmp_path, "a.png", "b.png")
    write(tmp_path, "captions_train.json", captions("a.png", "A dog."))
    write(tmp_path, stray, captions("b.png", "A cat.", key=2))
    with pytest.warns(UserWarning, match="1 pictures in no split.*xlvlms data"):
        assert split_up(tmp_path) == {"train": ["1"]}


@pytest.mark.parametrize(
    "second_file",
    [
        captions("a.png", "A cat."),
        captions("a.png", "A dog.", key=9),
        boxes("a.png", (1, 0, 1, 1, 2, 2)),
    ],
)
def test_a_picture_in_two_splits_is_refused(tmp_path, second_file):
    write(pictures(tmp_path, "a.png"), "captions_train.json", captions("a.png", "A dog."))
    write(tmp_path, "captions_val.json", second_file)
    with pytest.raises(
        AnnotationError,
        match=(
            r"captions_val.json: a.png is of validation, but of train by "
            r".*captions_train.json; leave every"
        ),
    ):
        load_samples(tmp_path, 1, "train")


def test_rows_that_put_one_picture_into_two_splits_are_refused(tmp_path):
    write(pictures(tmp_path, "a.png"), "t.csv", "file,caption,split\na.png,x,train\na.png,y,test\n")
    with pytest.raises(AnnotationError, match="a.png is of test, but of train"):
        load_samples(tmp_path)


def test_a_question_follows_its_picture_into_the_split_that_lists_it(tmp_path):
    pictures(tmp_path, "train2017/000000000007.jpg", "val2017/000000000008.jpg")
    for name, key in (("train", 7), ("val", 8)):
        write(tmp_path, f"captions_{name}2017.json", captions(f"{key:012d}.jpg", "A dog.", key=key))
    # 2014 divided the same pictures otherwise
    write(tmp_path, "v2_OpenEnded_mscoco_val2014_questions.json", question(1, 7))
    write(tmp_path, "v2_mscoco_val2014_annotations.json", answer(1, "red", image_id=7))
    assert split_up(tmp_path, lambda sample: [q.answer for q in sample.questions][:1])["train"] == [
        ["red"]
    ]


@pytest.mark.parametrize(
    "form", ["{name}_{what}.json", "{name}/{what}.json", "v2_{what}_{name}2014.json"]
)
@pytest.mark.parametrize("images", [(1, 2), (1, 1)])
@pytest.mark.parametrize("with_image", [True, False])
def test_questions_whose_numbers_start_anew_have_their_own_answers(
    tmp_path, form, images, with_image
):
    for name, image, values in zip(("train", "val"), images, ("red", "blue"), strict=True):
        picture(tmp_path, f"{name}/{image}.png", RED if values == "red" else BLUE)
        write(tmp_path, form.format(name=name, what="questions"), question(0, image))
        write(
            tmp_path,
            form.format(name=name, what="annotations"),
            answer(0, values, **({"image_id": image} if with_image else {})),
        )
    values = split_up(
        tmp_path,
        lambda sample: ([q.answer for q in sample.questions], sample.image.getpixel((0, 0))),
    )
    assert values == {"train": [(["red"], RED)], "validation": [(["blue"], BLUE)]}


@pytest.mark.parametrize("files", ["a.json b.json", "train_a.json train_b.json"])
def test_two_answers_to_one_question_are_refused(tmp_path, files):
    write(
        write(pictures(tmp_path, "1.png"), "train_questions.json", question(0, 1)),
        files.split()[0],
        answer(0, "red"),
    )
    assert (
        load_samples(write(tmp_path, files.split()[1], answer(0, "red")), 1, "train")[0]
        .questions[0]
        .answer
        == "red"
    )
    write(tmp_path, files.split()[1], answer(0, "blue"))
    with pytest.raises(
        AnnotationError,
        match=r"question 0 has two answers: 'red' \(.*\) and 'blue' \(.*\); leave one",
    ):
        load_samples(tmp_path, 1, "train")
    write(
        tmp_path,
        files.split()[1],
        {"annotations": answer(0, "red")["annotations"] + answer(0, "green")["annotations"]},
    )
    with pytest.raises(AnnotationError, match="two answers: 'red' .* and 'green'"):
        load_samples(tmp_path, 1, "train")


def test_answers_of_another_split_are_none(tmp_path):
    write(
        write(pictures(tmp_path, "1.png"), "val_questions.json", question(0, 1)),
        "train_annotations.json",
        answer(0, "red"),
    )
    with pytest.raises(AnnotationError, match="val_questions.json: question 0 has no answer"):
        load_samples(tmp_path, 1, "val")


@pytest.mark.parametrize("name", ["0001.png", "{name}_1.png"])
@pytest.mark.parametrize(
    "form", ["annotations/captions_{name}.json", "{name}/_annotations.coco.json"]
)
def test_pictures_whose_ids_start_anew_are_several(tmp_path, name, form):
    for split, colour, sentence in (
        ("train", RED, "A red bus."),
        ("valid", BLUE, "A blue cat."),
        ("test", (0, 9, 0), "A tree."),
    ):
        picture(tmp_path, f"{split}/{name.format(name=split)}", colour)
        write(tmp_path, form.format(name=split), captions(name.format(name=split), sentence, key=0))
    gathered = split_up(
        tmp_path, lambda sample: (sample.captions[0], sample.image.getpixel((0, 0)))
    )
    assert gathered == {
        "train": [("A red bus.", RED)],
        "validation": [("A blue cat.", BLUE)],
        "test": [("A tree.", (0, 9, 0))],
    }
    ids = [sample_id for values in split_up(tmp_path).values() for sample_id in values]
    assert sorted(ids) == sorted(
        f"{split}/{name.format(name=split)}" for split in ("train", "valid", "test")
    )


def test_a_picture_that_is_missing_is_not_that_of_another_split(tmp_path):
    pictures(tmp_path, "train/other.png", "val/0001.png")
    write(tmp_path, "captions_train.json", captions("0001.png", "A red bus."))
    with pytest.raises(AnnotationError, match="the picture 0001.png of image 1 is missing"):
        load_samples(tmp_path, 1, "train")
    write(tmp_path, "captions_val.json", captions("0001.png", "A blue cat."))
    with pytest.warns(
        UserWarning, match=r"captions_train.json \(.*the picture 0001.png of image 1 is missing"
    ):
        assert split_up(tmp_path, lambda sample: sample.captions) == {
            "validation": [("A blue cat.",)]
        }


@pytest.mark.parametrize("names", [("train/1.png", "val/1.png"), ("train/a.png", "val/b.png")])
@pytest.mark.parametrize("keys", [(1, 1), (1, 2)])
@pytest.mark.parametrize("second_colour", [RED, BLUE])
def test_copies_of_a_picture_in_two_splits_are_told(tmp_path, names, keys, second_colour, recwarn):
    for name, key, colour in zip(names, keys, (RED, second_colour), strict=True):
        write(
            picture(tmp_path, name, colour),
            f"{name.split('/')[0]}/c.json",
            captions(name.split("/")[1], "A dog.", key=key),
        )
    alike = second_colour == RED and (keys[0] == keys[1] or names[0][-5:] == names[1][-5:])
    assert all(map(len, split_up(tmp_path).values())) and len(split_up(tmp_path)) == 2
    values = (
        "1 pictures are in two splits as copies, the first as "
        f"{' and '.join(names)}. Next: leave one copy"
    )
    assert any(values in str(warned.message) for warned in recwarn) == alike
    assert (
        folder.folder_report(tmp_path)["left alone"].iloc[-1].startswith("1 in two splits") == alike
    )


def test_karpathys_files_of_several_sets_go_together(tmp_path):
    for shade, (name, key) in enumerate(
        {"coco": "cocoid", "flickr8k": "imgid", "flickr30k": "imgid"}.items()
    ):
        picture(tmp_path, f"{name}/{name}_0.jpg", (80 * shade, 0, 0))
        values = {
            "filename": f"{name}_0.jpg",
            key: 0,
            "split": "test",
            "sentences": [{"raw": f"A {name}."}],
        }
        write(tmp_path, f"dataset_{name}.json", {"images": [values], "dataset": name})
    gathered = {
        sample.source.name: (sample.id, sample.captions) for sample in load_samples(tmp_path)
    }
    assert gathered == {
        f"{n}_0.jpg": (f"{n}/{n}_0.jpg", (f"A {n}.",)) for n in ("coco", "flickr8k", "flickr30k")
    }


@pytest.mark.parametrize("same", [True, False])
def test_one_id_for_two_files_is_one_picture_where_they_hold_the_same(tmp_path, same):
    picture(
        picture(tmp_path, "COCO_val2014_000000000001.jpg", RED),
        "000000000001.jpg",
        RED if same else BLUE,
    )
    write(tmp_path, "one.json", captions("COCO_val2014_000000000001.jpg", "A dog."))
    write(tmp_path, "two.json", captions("000000000001.jpg", "A cat."))
    gathered = [sample.captions for sample in load_samples(tmp_path)]
    assert (
        gathered == [("A dog.", "A cat.")]
        if same
        else sorted(gathered) == [("A cat.",), ("A dog.",)]
    )


@pytest.mark.parametrize(
    ("json", "table"),
    [
        ("a.png", "images/a.png"),
        ("images/a.png", "a.png"),
        ("a.png", "a.png"),
        ("./images//a.png", "images\\a.png"),
    ],
)
def test_one_picture_by_two_paths_is_one_sample(tmp_path, json, table):
    write(pictures(tmp_path, "images/a.png"), "captions.json", captions(json, "A dog."))
    (sample,) = load_samples(write(tmp_path, "more.csv", f"file,weather\n{table},rain\n"), 9)
    assert (sample.id, sample.captions, sample.truth["weather"]) == ("1", ("A dog.",), "rain")


DOG, CAR = (1, 0, 0, 0, 20, 10), (1, 0, 30, 10, 5, 5)


@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [
        # ids start anew in each file
        (boxes("1.png", DOG), boxes("1.png", CAR, kinds=("car",)), {"dog": 1, "car": 1}),
        (boxes("1.png", DOG), boxes("1.png", CAR), {"dog": 2}),
        (boxes("1.png", DOG), boxes("1.png", DOG), {"dog": 1}),  # keypoints
        # the same drawn anew under other ids
        (boxes("1.png", DOG), boxes("1.png", (77, *DOG[1:])), {"dog": 1}),
        # kinds are one by name
        (
            boxes("1.png", DOG),
            boxes("1.png", (1, 5, *DOG[2:]), kinds=(*"abcde", "dog")),
            {"dog": 1},
        ),
        # two at one place of one file
        (boxes("1.png", DOG, (2, *DOG[1:])), boxes("1.png", DOG), {"dog": 2}),
        (boxes("1.png", DOG, DOG), boxes("1.png", DOG), {"dog": 1}),
        (boxes("1.png", DOG, CAR), boxes("1.png", DOG, kinds=("car",)), {"dog": 2, "car": 1}),
    ],
)
def test_boxes_are_one_by_kind_and_place(tmp_path, first, second, counts):
    write(write(pictures(tmp_path, "1.png"), "animals.json", first), "vehicles.json", second)
    (merged,) = folder._gathered(tmp_path).pictures
    assert Counter(kind for kind, *_ in merged.boxes) == counts
    (sample,) = load_samples(tmp_path, 1)
    assert all(
        q.answer == "yes" for q in sample.questions if q.type == "presence" and q.target in counts
    )


class Sealed(list):
    """A list that takes what is appended and may not be looked through, which for each of
    n entries would cost n squared.
    """

    def __iter__(self):
        raise AssertionError("looked through")

    __contains__ = __eq__ = __add__ = index = copy = lambda self, *_: self.__iter__()
    __hash__ = None


def test_what_is_told_of_one_picture_costs_the_same_however_much_is_told_already(tmp_path):
    gathered, part = Gathered(Tree(tmp_path, ())), Part("a.json", "a.json")
    sealed = Picture("1", "1.png", captions=Sealed(), boxes=Sealed(), questions=Sealed())
    for k in range(40):
        gathered.caption(part, sealed, f"A dog {k // 2}.")
        gathered.box(part, sealed, ("dog", k // 2, 0, 1, 1), None, False)
        gathered.question(part, sealed, Question("other", f"Why {k // 2}?", "so"), "1")
    assert [
        list.__len__(records) for records in (sealed.captions, sealed.boxes, sealed.questions)
    ] == [
        20,
        20,
        20,
    ]
    assert part.unused == {"repeated captions": 20, "repeated boxes": 20, "repeated questions": 20}
