"""Values that files hold in place of the right ones.

Refused with file and key, whatever else the folder has.
"""

import pytest

from tests.support.folders import answer, boxes, captions, pictures, question, write
from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.errors import AnnotationError

BOX = (1, 0, 0, 0, 9, 9)
FIRST = captions("a.png", "A dog.")


def box(*values, **fields):
    content = boxes("a.png", (1, 0, *values))
    content["annotations"][0] |= fields
    return content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (box(10**400, 0, 9, 9), r"'bbox' \[1000.*0, 0, 9, 9\] of an annotation"),
        (box(0, 0, float("nan"), 9), r"'bbox' \[0, 0, nan, 9\]"),
        (box(0, 0, float("inf"), 9), "'bbox'"),
        (box(0, 0, -9, 9), r"'bbox' \[0, 0, -9, 9\]"),
        (box(0, 0, True, 9), "'bbox'"),
        (box(0, 0, "9", 9), "'bbox'"),
        (box(0, 0, 9, 9, id=[1]), r"'id' of 'annotations' is \[1\]"),
        (box(0, 0, 9, 9, category_id=[0]), r"'category_id' of 'annotations' is \[0\]"),
        *(
            (boxes("a.png", BOX, kinds=(name,)), f"'name' of 'categories' is {name!r}")
            for name in ("", " ", 5, None, True)
        ),
        (
            boxes("a.png", BOX)
            | {"categories": [{"id": 0, "name": "dog"}, {"id": "0", "name": "cat"}]},
            "kind 0 is both dog and cat; give",
        ),
        (captions("a.png", "x", key="\ud800"), r"'id' of 'images' is '\\ud800'"),
        (captions("a.png", "x", key=True), "'id' of 'images' is True"),
        (captions("a.png", "x", key=""), "'id' of 'images' is ''"),
        (captions("a.png", "\ud800"), "'caption' of 'annotations' is"),
        (captions("a.png", ["x"]), r"'caption' of 'annotations' is \['x'\]"),
        (captions("", "x"), "'file_name' of 'images' is ''"),
        *(
            ({"images": [FIRST["images"][0] | {"split": split}], "annotations": []}, "'split' is ")
            for split in ([], ["train"], {"a": 1}, 5, "odd")
        ),
        *(
            (question(1, 1, text), "'question' of 'questions' is ")
            for text in ("", " ", 5, ["x"], None)
        ),
        *(
            (question(1, 1, **{key: wrong}), f"{key!r} of 'questions' is ")
            for key in ("type", "target", "stratum")
            for wrong in (5, ["x"], {"a": 1})
        ),
        *(
            (answer(1, wrong), "'multiple_choice_answer' of 'annotations' is ")
            for wrong in ("", " ", [], [""], {}, {"a": 1}, None, True, float("nan"))
        ),
        (
            {"images": [{"filename": "a.png", "filepath": ["x"], "sentences": []}]},
            r"'filepath' of 'images' is \['x'\]",
        ),
        ([{"id": 1, "regions": "x"}, {"id": 2, "regions": []}], "of no form"),
        ([{"id": 1, "regions": []}, {"id": 2, "regions": 5}], "'regions' of"),
    ],
)
def test_wrong_values_are_refused_although_the_folder_has_good_ones(tmp_path, content, expected):
    write(pictures(tmp_path, "a.png"), "captions.json", FIRST)
    write(write(tmp_path, "questions.json", question(1, 1)), "answers.json", answer(1, "red"))
    name = "wrong.json"
    if "questions" in content:
        name = "questions.json"
    elif list(content) == ["annotations"]:
        name = "answers.json"
    write(tmp_path, name, content)
    if expected == "of no form":
        with pytest.warns(UserWarning, match="wrong.json .is of no form that is known"):
            assert load_samples(tmp_path)
        return
    with pytest.raises(AnnotationError, match=rf"{name}: .*{expected}"):
        load_samples(tmp_path)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"multiple_choice_answer": 2}, "2"),
        ({"multiple_choice_answer": 2.0}, "2"),
        ({"multiple_choice_answer": 2.5}, "2.5"),
        (
            {
                "answers": [
                    {"answer": a, "answer_id": k} for k, a in enumerate(["a"] * 4 + ["b"] * 6)
                ]
            },
            "b",
        ),
        ({"answers": ["a", 2, 2]}, "2"),
        ({"answers": [{"answer": "", "raw_answer": "x"}, {"answer": "b"}]}, "b"),
        ({"multiple_choice_answer": "", "answers": ["c"]}, "c"),
    ],
)
def test_answers_are_texts_numbers_or_the_most_frequent_of_several(tmp_path, entry, text):
    write(
        write(pictures(tmp_path, "1.png"), "q.json", question(0, 1)),
        "a.json",
        {"annotations": [{"question_id": 0, "image_id": 1} | entry]},
    )
    assert load_samples(tmp_path)[0].questions[0].answer == text


def test_one_wrong_entry_among_good_ones_is_refused_and_a_file_of_none_is_left_alone(tmp_path):
    write(pictures(tmp_path, "a.png"), "captions.json", FIRST)
    # COCO's panoptic form
    stray = FIRST | {"categories": [], "annotations": [{"image_id": 1, "segments_info": []}]}
    with pytest.warns(
        UserWarning,
        match=(
            r"left alone: panoptic_val2017.json \(an entry of 'annotations' has no 'category_id'\)"
        ),
    ):
        (sample,) = load_samples(write(tmp_path, "panoptic_val2017.json", stray))
    assert sample.captions == ("A dog.",)
    (tmp_path / "panoptic_val2017.json").unlink()
    with pytest.raises(
        AnnotationError, match="an entry of 'annotations' has no 'category_id'; known forms"
    ):
        load_samples(
            write(
                tmp_path,
                "captions.json",
                FIRST | {"annotations": [*FIRST["annotations"], {"image_id": 1}]},
            )
        )


@pytest.mark.parametrize("key", ["x" * 300, "9" * 5000, "²", "a\0b"])
def test_ids_that_no_file_can_be_named_by_are_missing_pictures(tmp_path, key):
    write(write(tmp_path, "q.json", question(0, key)), "a.json", answer(0, "so"))
    with pytest.raises(AnnotationError, match=r"the picture .*\.jpg of image .* is missing"):
        load_samples(tmp_path)


def test_a_width_that_is_none_counts_as_not_told(tmp_path):
    content = boxes("a.png", (1, 0, 0, 0, 20, 20), (2, 1, 30, 0, 9, 9), kinds=("dog", "cup"))
    for width in (10**400, -1, "x", float("nan"), [], True):
        content["images"][0]["width"] = width
        (sample,) = load_samples(write(pictures(tmp_path, "a.png"), "c.json", content))
        assert [q.answer for q in sample.questions if q.type == "side"] == ["right"]
