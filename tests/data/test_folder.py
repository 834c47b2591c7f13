"""Folders in the formats of COCO, Karpathy, Visual Genome, VQA and csv, made on the spot."""

import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.support.folders import picture, pictures, write
from xlvlms_tutorial.data import load_samples, write_coco
from xlvlms_tutorial.data.folder import folder_report
from xlvlms_tutorial.errors import AnnotationError, FileError, InputError
from xlvlms_tutorial.pocket import world
from xlvlms_tutorial.samples import Question, Sample

IMAGES = [
    {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
    {"id": 9, "file_name": "b.png"},
]
CAPTIONS = [
    {"id": 1, "image_id": 7, "caption": " A dog by a red cup. "},
    {"id": 2, "image_id": 7, "caption": "On the beach."},
]
BOXES = [
    {"id": 1, "image_id": 7, "category_id": 18, "bbox": [0, 0, 20, 20], "area": 400, "iscrowd": 0},
    {"id": 2, "image_id": 7, "category_id": 47, "bbox": [30, 0, 5, 5], "area": 25, "iscrowd": 0},
    {"id": 3, "image_id": 9, "category_id": 18, "bbox": [30, 0, 9.5, 5], "area": 25, "iscrowd": 1},
]
CATEGORIES = [
    {"id": 18, "name": "dog", "supercategory": "animal"},
    {"id": 47, "name": "cup"},
    {"id": 1, "name": "cat"},
]
INSTANCES = {"images": IMAGES, "annotations": BOXES, "categories": CATEGORIES}


def coco(folder, **instances):
    pictures(folder, "val2017/a.png", "images/b.png")
    write(folder, "annotations/captions_val2017.json", {"images": IMAGES, "annotations": CAPTIONS})
    return write(folder, "annotations/instances_val2017.json", INSTANCES | instances)


def by_id(folder, n=10, **options):
    return {sample.id: sample for sample in load_samples(folder, n, **options)}


def test_coco_format_captions_boxes_and_pictures_in_subfolders(tmp_path):
    samples = by_id(coco(tmp_path), split="validation")
    assert set(samples) == {"7", "9"} == set(by_id(tmp_path, split="val"))
    assert samples["7"].captions == ("A dog by a red cup.", "On the beach.")
    assert samples["9"].captions == ()
    truth = {
        "subject": "dog",
        "item": "cup",
        "colour": "red",
        "count": 1,
        "side": "right",
        "place": "beach",
        "action": None,
        "time": None,
    }
    assert dict(samples["7"].truth) == truth
    assert [s.id for s in load_samples(tmp_path, 2, "val")] == [
        s.id for s in load_samples(tmp_path, 2, "validation")
    ]
    assert samples["7"].source == tmp_path / "val2017" / "a.png"
    assert samples["9"].source == tmp_path / "images" / "b.png"
    assert samples["9"].image.size == (40, 20)
    assert "count" not in {q.type for q in samples["9"].questions}  # a crowd cannot be counted
    questions = {
        (q.target, q.answer) for s in samples.values() for q in s.questions if q.type == "presence"
    }
    # the categories, not COCO's 80
    assert questions and questions <= {("dog", "yes"), ("cup", "yes"), ("cat", "no"), ("cup", "no")}


def test_keypoints_do_not_count_twice(tmp_path):
    coco(tmp_path)
    write(
        tmp_path,
        "annotations/person_keypoints_val2017.json",
        INSTANCES | {"annotations": BOXES[:2]},
    )
    assert by_id(tmp_path, split="val")["7"].truth["count"] == 1


def test_the_side_needs_no_width_in_the_file(tmp_path):
    images = [{k: v for k, v in image.items() if k != "width"} for image in IMAGES]
    coco(tmp_path, images=images)
    write(
        tmp_path, "annotations/captions_val2017.json", {"images": images, "annotations": CAPTIONS}
    )
    assert by_id(tmp_path, split="val")["7"].truth["side"] == "right"


KARPATHY = [
    {
        "filepath": "val2014",
        "filename": f"{k}.png",
        "imgid": k,
        "cocoid": 100 + k,
        "split": split,
        "sentids": [k],
        "sentences": [{"tokens": ["a", "dog"], "raw": f"A dog {k}.", "imgid": k, "sentid": k}],
    }
    for k, split in enumerate(["train", "restval", "val", "test", "test"])
]


def test_karpathys_splits(tmp_path):
    pictures(tmp_path, *(f"val2014/{k}.png" for k in range(5)))
    write(tmp_path, "dataset_coco.json", {"images": KARPATHY, "dataset": "coco"})
    assert {
        split: sorted(by_id(tmp_path, split=split)) for split in ("train", "validation", "test")
    } == {"train": ["100", "101"], "validation": ["102"], "test": ["103", "104"]}
    assert by_id(tmp_path, split="val")["102"].captions == ("A dog 2.",)
    # official files split otherwise
    for name, key in (("captions_train2014.json", 102), ("later_val2014.json", 103)):
        write(
            tmp_path,
            name,
            {
                "images": [{"id": key, "file_name": f"{key - 100}.png"}],
                "annotations": [CAPTIONS[1] | {"image_id": key}],
            },
        )
    # one picture, told of in two files
    assert by_id(tmp_path, split="val")["102"].captions == ("On the beach.", "A dog 2.")
    assert by_id(tmp_path, split="test")["103"].captions == ("A dog 3.", "On the beach.")


def vqa(folder):
    requests = [
        ("What color is it?", "red"),
        ("Is there a dog in the photo?", "no"),
        ("Is he happy?", "yes"),
    ]
    questions = [
        {"image_id": 7, "question": text, "question_id": 7000 + k}
        for k, (text, _) in enumerate(requests)
    ]
    answers = [
        {
            "question_id": 7000 + k,
            "image_id": 7,
            "multiple_choice_answer": answer,
            "answers": [{"answer": answer}],
        }
        for k, (_, answer) in enumerate(requests)
    ]
    write(
        folder,
        "v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": questions, "data_subtype": "val2014"},
    )
    return write(
        folder,
        "v2_mscoco_val2014_annotations.json",
        {"annotations": answers, "data_subtype": "val2014"},
    )


VQA = [
    ("colour", "What color is it?", "red", ""),
    ("presence", "Is there a dog in the photo?", "no", "dog"),
    ("yes/no", "Is he happy?", "yes", ""),
]


@pytest.mark.parametrize(
    "name", ["val2014/COCO_val2014_000000000007.jpg", "000000000007.jpg", "images/7.png"]
)
def test_vqa_format_alone(tmp_path, name):
    pictures(tmp_path, name)
    (sample,) = load_samples(vqa(tmp_path), 5, "validation")
    assert [(q.type, q.text, q.answer, q.target) for q in sample.questions] == VQA
    assert sample.source == tmp_path / name and set(sample.truth.values()) == {None}


def test_vqa_and_coco_in_one_folder_have_both_the_files_questions_first(tmp_path):
    coco(vqa(tmp_path))
    questions = by_id(tmp_path, split="val")["7"].questions
    assert [(q.type, q.text, q.answer, q.target) for q in questions[:3]] == VQA
    expected = {"presence": 4, "colour": 1, "yes/no": 1, "place": 1, "side": 1, "count": 1}
    assert Counter(q.type for q in questions) == expected  # no second question about the colour
    assert [q.stratum for q in questions if q.type == "presence"] == [
        None,
        "random",
        "popular",
        "adversarial",
    ]


def test_csv_rows_of_one_picture_belong_together(tmp_path):
    pictures(tmp_path, "a.png", "more/b.png")
    table = (
        "file,caption_1,caption_2,question,answer,split,item,weight,note\n"
        'a.png,"A dog, asleep.",Ein Hündchen.,How many dogs?,1,test,bone,12,\n'
        "a.png,,,Is there a cat?,no,test,,12,\nmore/b.png,A cup.,,,,train,,,x\n"
    )
    (sample,) = load_samples(write(tmp_path, "t.csv", "\ufeff" + table), 5)
    assert sample.captions == ("A dog, asleep.", "Ein Hündchen.")
    assert [(q.type, q.answer) for q in sample.questions[:2]] == [
        ("count", "1"),
        ("presence", "no"),
    ]
    factors = {factor: sample.truth[factor] for factor in ("subject", "item", "weight", "note")}
    assert factors == {"subject": "dog", "item": "bone", "weight": 12, "note": None}
    (second,) = load_samples(tmp_path, 5, "train")
    assert second.source == tmp_path / "more" / "b.png" and second.truth["note"] == "x"


def test_csv_adds_to_the_pictures_of_json(tmp_path):
    write(coco(tmp_path), "labels.csv", "image,mood\na.png,calm\n")
    samples = by_id(tmp_path, split="val")
    assert set(samples) == {"7", "9"}
    assert samples["7"].truth["mood"] == "calm"
    assert samples["7"].truth["subject"] == "dog"


def test_visual_genomes_regions_are_captions_and_styles_choose_among_them(tmp_path):
    pictures(tmp_path, "VG_100K/2.jpg", "VG_100K_2/3.jpg")
    phrases = {2: ["a tall tree", "green grass by a green river"], 3: ["a wall", "two cups"]}
    regions = [
        {
            "id": k,
            "regions": [{"phrase": p, "x": 0, "y": 0, "width": 9, "height": 9} for p in texts],
        }
        for k, texts in phrases.items()
    ]
    write(tmp_path, "region_descriptions.json", regions)
    assert {k: s.captions for k, s in by_id(tmp_path).items()} == {
        str(k): tuple(texts) for k, texts in phrases.items()
    }
    assert by_id(f"{tmp_path}-colour")["2"].captions == ("green grass by a green river",)
    assert by_id(f"{tmp_path}-place")["3"].captions == ("a wall",)
    plain, styled = (load_samples(name, 2, seed=4) for name in (tmp_path, f"{tmp_path}-place"))
    assert [s.id for s in plain] == [s.id for s in styled]
    assert plain[0].questions == styled[0].questions
    with pytest.raises(AnnotationError, match="no caption of 2 samples has a word of mood"):
        load_samples(f"{tmp_path}-mood")


def numbered(folder, n=30):
    pictures(folder, *(f"{k}.png" for k in range(n)))
    return write(folder, "t.csv", "file,caption\n" + "".join(f"{k}.png,A dog.\n" for k in range(n)))


def test_the_seed_draws_a_subset_and_more_begins_with_fewer(tmp_path):
    ids = lambda n, **options: [s.id for s in load_samples(numbered(tmp_path), n, **options)]
    assert ids(5, seed=1) == ids(12, seed=1)[:5] and len(set(ids(12, seed=1))) == 12
    assert ids(5, seed=1) != ids(5, seed=2)
    assert len(ids(100)) == 30  # all there are
    assert sorted(ids(30, split="train")) == sorted(ids(30)) and ids(30, split="train") != ids(30)


def test_pictures_are_opened_when_asked_for(tmp_path):
    (numbered(tmp_path, 1) / "0.png").write_bytes(b"no picture")
    (sample,) = load_samples(tmp_path, 1)
    with pytest.raises(InputError, match="0.png"):
        _ = sample.image


@pytest.mark.parametrize(("dataset", "n"), [("scenes", 3), ("scenes", 40), ("postcards", 20)])
def test_what_is_written_comes_back(tmp_path, dataset, n):
    samples = load_samples(dataset, n, seed=5)
    folder = write_coco(samples, tmp_path / "made")
    loaded = by_id(folder, n, split="train")
    assert len(loaded) == n
    for k, sample in enumerate(samples, 1):
        back = loaded[str(k)]
        assert back.captions == sample.captions and dict(back.truth) == dict(sample.truth)
        assert back.questions[: len(sample.questions)] == sample.questions
        assert {q.type for q in back.questions} == {q.type for q in sample.questions}
        assert np.array_equal(np.asarray(back.image), np.asarray(sample.image))
    again = write_coco(list(loaded.values()), tmp_path / "again")
    assert sorted((again / "captions.json").read_text()) == sorted(
        (folder / "captions.json").read_text()
    )


def test_made_questions_of_the_world_have_the_worlds_answers(tmp_path):
    samples = load_samples("scenes", 40, seed=6)
    folder = write_coco(samples, tmp_path / "made")
    for name in ("questions", "answers"):
        os.remove(folder / f"{name}.json")
    for key, back in by_id(folder, 40).items():
        truth = samples[int(key) - 1].truth
        answers = {
            q.type: q.answer for q in samples[int(key) - 1].questions if q.type != "presence"
        }
        assert {q.type: q.answer for q in back.questions if q.type != "presence"} == answers
        presence = [q for q in back.questions if q.type == "presence"]
        assert len(presence) == 3
        assert all(
            (q.answer == "yes") == (q.target in (truth["subject"], truth["item"])) for q in presence
        )
        assert {q.target for q in presence} <= {*world.SUBJECTS, *world.ITEMS}


def test_samples_of_which_little_is_known_can_be_written(tmp_path):
    picture = Image.new("RGB", (30, 10))
    truths = [{}, {"subject": "dog"}, {"subject": "dog", "item": "cup"}]
    samples = [
        Sample(f"x/{k}", picture, ("A dog.",), (Question("other", "Why?", "no reason"),), truth)
        for k, truth in enumerate(truths)
    ]
    loaded = by_id(write_coco(samples, tmp_path / "c"))
    factors = {
        key: tuple(sample.truth[f] for f in ("subject", "item", "count", "side"))
        for key, sample in loaded.items()
    }
    assert factors == {
        "1": (None,) * 4,
        "2": ("dog", None, None, None),
        "3": ("dog", "cup", 1, None),
    }
    assert all(sample.questions[0] == samples[0].questions[0] for sample in loaded.values())


def test_writing_refuses_folders_in_use_and_other_media(tmp_path):
    scenes = load_samples("scenes", 1)
    with pytest.raises(FileError, match="it holds files already"):
        write_coco(scenes, write(tmp_path, "notes.txt", "x"))
    with pytest.raises(FileError, match="notes.txt"):
        write_coco(scenes, tmp_path / "notes.txt" / "below")
    broken = Sample("x", tmp_path / "notes.txt")
    with pytest.raises(InputError, match="notes.txt"):
        write_coco([*scenes, broken], tmp_path / "half")
    # nothing half-written is left
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="modality image"):
        write_coco(load_samples("sounds", 1), tmp_path / "s")
    with pytest.raises(InputError, match="give one sample or more"):
        write_coco([], tmp_path / "s")
    for name in ("q" * 300, "q\0", "q" * 5000):
        with pytest.raises(FileError, match="cannot be written"):
            write_coco(scenes, tmp_path / name)


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/hostname", "images/../../a.png", "..\\a.png", "C:\\a.png"]
)
def test_file_names_that_leave_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "c"
    pictures(tmp_path, "a.png")
    write(
        folder,
        "c.json",
        {"images": [{"id": 1, "file_name": name}], "annotations": [CAPTIONS[0] | {"image_id": 1}]},
    )
    with pytest.raises(AnnotationError, match="c.json: the picture .* is outside of the folder"):
        load_samples(folder)
    (folder / "c.json").unlink()
    with pytest.raises(AnnotationError, match="outside"):
        load_samples(write(folder, "t.csv", f"file,caption\n{name},x\n"))
    (folder / "t.csv").unlink()
    write(
        folder,
        "q.json",
        {
            "questions": [
                {"image_id": name.removesuffix(".png"), "question": "Why?", "question_id": 1}
            ]
        },
    )
    write(folder, "a.json", {"annotations": [{"question_id": 1, "multiple_choice_answer": "so"}]})
    # an id becomes a file name where no file says another
    with pytest.raises(AnnotationError, match="outside"):
        load_samples(folder)


WRONG = {
    "malformed": ('{"images": [', "c.json is no json that can be read"),
    "bytes": ("\udcff", "c.json is no json that can be read"),
    "no form": ([1, 2], "c.json is of no form that is known; known forms: COCO's"),
    "no annotations": ({"images": IMAGES}, "c.json: an entry of 'file' has no 'annotations'"),
    "no id": (
        {"images": [{"file_name": "a.png"}], "annotations": []},
        "c.json: an entry of 'images' has no 'id'",
    ),
    "no file": (
        {"images": [{"id": 1}], "annotations": []},
        "c.json: an entry of 'images' has no 'file_name'",
    ),
    "no image": (
        {"images": IMAGES, "annotations": [{"caption": "x"}]},
        "c.json: an entry of 'annotations' has no 'image_id'",
    ),
    "stranger": (
        {"images": IMAGES, "annotations": [CAPTIONS[0] | {"image_id": 8}]},
        "'image_id' 8 is not among its 'images'",
    ),
    "no caption": ({"images": IMAGES, "annotations": [{"image_id": 7}]}, "has no 'category_id'"),
    "number": (
        {"images": IMAGES, "annotations": [{"image_id": 7, "caption": 3}]},
        "'caption' of 'annotations' is 3",
    ),
    "kind": (INSTANCES | {"categories": CATEGORIES[1:2]}, "'category_id' 18 and 'bbox'"),
    "box": (
        INSTANCES | {"annotations": [BOXES[0] | {"bbox": [1, 2, 3]}]},
        r"'bbox' \[1, 2, 3\] of an annotation",
    ),
    "twice": (
        {"images": [IMAGES[0], IMAGES[1] | {"id": 7}], "annotations": []},
        "image 7 is both a.png and b.png",
    ),
    "split": (
        {"images": [KARPATHY[0] | {"split": "odd"}]},
        "'split' is 'odd'; allowed: train, training, restval",
    ),
    "no raw": (
        {"images": [KARPATHY[0] | {"sentences": [{}]}]},
        "an entry of 'sentences' has no 'raw'",
    ),
    "unanswered": (
        {"questions": [{"image_id": 7, "question": "Why?", "question_id": 1}]},
        "question 1 has no answer",
    ),
    "no question": (
        {"questions": [{"image_id": 7, "question_id": 1}]},
        "c.json: an entry of 'questions' has no 'question'",
    ),
    "missing": (
        {"images": IMAGES, "annotations": CAPTIONS},
        "the picture a.png of image 7 is missing",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_json_is_told_with_file_and_key(tmp_path, case):
    content, message = WRONG[case]
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "c.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AnnotationError, match=message):
        load_samples(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("picture,caption\na.png,x\n", "no column file or image; there are: picture, caption"),
        ("", "there are: none"),
        ("file,caption\n,x\n", "a row has no 'file'"),
        ("file,caption\na.png,x,y\n", "more cells than the header"),
        ("file,question\na.png,Why?\n", "'answer' of 'row of a.png' is None"),
        ("file,split\na.png,odd\n", "'split' is 'odd'"),
        ("file,caption\na.png,x\n", "the picture a.png of image a.png is missing"),
    ],
)
def test_wrong_csv_is_told_with_file_and_column(tmp_path, table, message):
    with pytest.raises(AnnotationError, match=message):
        load_samples(write(tmp_path, "t.csv", table))


def test_what_a_folder_does_not_have_cannot_be_asked_for(tmp_path):
    with pytest.raises(AnnotationError, match="no json or csv file"):
        load_samples(tmp_path)
    coco(tmp_path)
    with pytest.raises(InputError, match="no split 'test'; there are: validation"):
        load_samples(tmp_path)
    with pytest.raises(InputError, match="no split 'odd'; allowed: train, validation, test"):
        load_samples(tmp_path, split="odd")
    for n in (0, -1):
        with pytest.raises(InputError, match="give 1 or more"):
            load_samples(tmp_path, n, "val")


STRAYS = {
    "truncated.json": ('{"images": [', "is no json that can be read"),
    "zero.json": ("", "is no json that can be read"),
    "deep.json": ("[" * 100_000, "is no json that can be read"),
    "list.json": ([1, 2], "is of no form that is known"),
    "more.csv": ("caption,score\nx,1\n", "no column file or image; there are: caption, score"),
    "zero.csv": ("", "there are: none"),
    "image_info_test2017.json": (
        {"images": IMAGES, "categories": CATEGORIES},
        "an entry of 'file' has no 'annotations'",
    ),
    "v2_mscoco_test2015_questions.json": (
        {"questions": [{"question_id": 5, "image_id": 5, "question": "Why?"}]},
        "question 5 has no answer",
    ),
    "answers.json": (
        {"annotations": [{"question_id": 9, "multiple_choice_answer": "x"}]},
        "no question asks for its answers",
    ),
    "captions_train2017.json": (
        {
            "images": [{"id": k, "file_name": f"{k}.png"} for k in (1, 2)],
            "annotations": [CAPTIONS[0] | {"image_id": 1}],
        },
        "the picture 1.png of image 1 is missing, as are 1 more",
    ),
}


@pytest.mark.parametrize("name", STRAYS)
def test_a_file_too_many_is_left_alone_with_the_reason(tmp_path, name):
    content, reason = STRAYS[name]
    before = load_samples(coco(tmp_path), 9, "val")
    with pytest.warns(UserWarning, match=rf"left alone: {name} \(.*Next: xlvlms data "):
        after = load_samples(write(tmp_path, name, content), 9, "val")
    assert after == before
    (row,) = folder_report(tmp_path).set_index("file").loc[[name]].to_dict("records")
    assert row["taken"] == "" and reason in row["left alone"]


@pytest.mark.parametrize(
    "name",
    [
        "._captions.json",
        "__MACOSX/._captions.json",
        ".ipynb_checkpoints/captions.json",
        "images/._b.csv",
        ".~a.csv",
    ],
)
def test_what_systems_and_editors_leave_is_no_data(tmp_path, name, recwarn):
    before = load_samples(coco(tmp_path), 9, "val")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xb0\xff")
    assert load_samples(tmp_path, 9, "val") == before and not recwarn.list
    reasons = folder_report(tmp_path).set_index("file")["left alone"]
    assert reasons[name if name in reasons else name.split("/")[0]].startswith("hidden")


def test_a_link_to_nothing_and_what_is_no_file_are_left_alone(tmp_path):
    os.symlink(tmp_path / "gone", coco(tmp_path) / "link.json")
    os.mkfifo(tmp_path / "pipe.csv")  # to read it would wait for ever
    with pytest.warns(
        UserWarning, match=r"left alone: link.json \(is no file.*pipe.csv \(is no file"
    ):
        load_samples(tmp_path, 9, "val")


def test_json_may_begin_with_a_mark_as_csv_may(tmp_path):
    marked = lambda content: "\ufeff" + json.dumps(content)
    write(pictures(tmp_path, "a.png", "b.png"), "c.json", marked(INSTANCES))
    assert set(by_id(tmp_path)) == {"7", "9"}


def test_the_report_says_what_each_file_gave(tmp_path):
    write(
        coco(tmp_path),
        "annotations/person_keypoints_val2017.json",
        INSTANCES | {"annotations": BOXES[:2]},
    )
    picture(
        write(
            vqa(tmp_path),
            "labels.csv",
            "image,mood,caption\na.png,calm,\nimages/b.png,,On the beach.\n",
        ),
        "c.png",
    )
    rows = {file: tuple(row) for file, *row in folder_report(tmp_path).itertuples(index=False)}
    assert rows == {
        "annotations/captions_val2017.json": (
            "COCO's",
            "validation",
            "captions: 2, pictures: 2",
            "",
        ),
        "annotations/instances_val2017.json": ("COCO's", "validation", "boxes: 3, pictures: 2", ""),
        "annotations/person_keypoints_val2017.json": (
            "COCO's",
            "validation",
            "pictures: 2",
            "repeated boxes: 2",
        ),
        "labels.csv": ("csv", "", "captions: 1, facts: 1, pictures: 2", "empty captions: 1"),
        "v2_OpenEnded_mscoco_val2014_questions.json": (
            "VQA questions",
            "validation",
            "pictures: 1, questions: 3",
            "",
        ),
        "v2_mscoco_val2014_annotations.json": ("VQA answers", "validation", "answers: 3", ""),
        "pictures": ("", "", "validation: 2", "1 of which no file says anything"),
    }


def test_the_report_counts_what_is_in_no_split_or_missing(tmp_path):
    table = (
        "file,caption,split,mood\na.png,x,train,calm\nb.png,y,,\nc.png,z,test,\na.png,,train,sad\n"
    )
    row = folder_report(write(pictures(tmp_path, "a.png", "b.png"), "t.csv", table)).iloc[0]
    reasons = [
        "empty captions: 1",
        "facts that a later row says otherwise: 1",
        "pictures in no split, while others are in one: 1",
    ]
    assert row["left alone"] == ", ".join([*reasons, "pictures that are missing: 1"])
    with (
        pytest.warns(UserWarning, match="1 pictures in no split"),
        pytest.raises(AnnotationError, match="the picture c.png .* is missing"),
    ):
        load_samples(tmp_path)


def test_a_report_needs_a_folder(tmp_path):
    for name in (tmp_path / "none", write(tmp_path, "x", "y") / "x", "q" * 300):
        with pytest.raises(InputError, match="folders that exist"):
            folder_report(name)
    with pytest.raises(AnnotationError, match="no json or csv file"):
        folder_report(tmp_path)


def test_pictures_and_files_that_come_later_are_seen(tmp_path):
    write(pictures(tmp_path, "a.png"), "t.csv", "file,caption\nb.png,x\n")
    with pytest.raises(AnnotationError, match="missing"):
        load_samples(tmp_path)
    assert load_samples(pictures(tmp_path, "b.png"))[0].source == tmp_path / "b.png"
    assert len(load_samples(write(tmp_path, "u.csv", "file,caption\na.png,x\n"))) == 2


@pytest.mark.parametrize("name", ["q" * 300, "q" * 5000, "q\0", "q/" * 3000])
def test_names_that_no_folder_can_have_are_unknown_data(name):
    for dataset in (name, f"{name}-place"):
        with pytest.raises(InputError, match="or a folder"):
            load_samples(dataset)


@pytest.mark.parametrize("dataset", ["folder", "scenes", "postcards", "sounds", "coco"])
def test_seeds_are_whole_numbers_of_0_or_more(tmp_path, dataset):
    with pytest.raises(InputError, match="give a whole number of 0 or more"):
        load_samples(coco(tmp_path) if dataset == "folder" else dataset, 1, "test", -1)
