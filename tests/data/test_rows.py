"""Rows of pictures: csv, metadata.jsonl, POPE's lines and VizWiz's list."""

import json
import math
import os

import pytest

from tests.support.folders import captions, pictures, write
from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.data.annotations import STRATA
from xlvlms_tutorial.errors import AnnotationError


def only(folder, split="test"):
    (sample,) = load_samples(folder, 9, split)
    return sample


def questions_of(sample, n):
    return [(q.type, q.text, q.answer, q.target, q.stratum) for q in sample.questions[:n]]


@pytest.mark.parametrize(
    "file", ["file", "file_name", "File Name", "image", "Image", "filename", "image_path"]
)
@pytest.mark.parametrize(
    "caption",
    [
        "caption",
        "Caption",
        "captions",
        "text",
        "TEXT",
        " caption_1",
        "Caption 2",
        "caption3",
        "description",
        "sentence",
    ],
)
def test_columns_of_pictures_and_captions_have_many_names(tmp_path, file, caption):
    sample = only(
        write(
            pictures(tmp_path, "a.png"),
            "metadata.csv",
            f"{file},{caption},Weather\na.png,A dog on grass.,rain\n",
        )
    )
    assert sample.captions == ("A dog on grass.",) and sample.truth["Weather"] == "rain"
    assert caption not in sample.truth and caption.strip() not in sample.truth


@pytest.mark.parametrize("caption", ["A dog.", ["A dog.", "It sleeps."], []])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.json"])
def test_json_lines_are_rows(tmp_path, caption, name):
    row = {
        "file_name": "a.png",
        "text" if isinstance(caption, str) else "captions": caption,
        "weight": 3,
        "tags": ["x"],
        "note": None,
        "size": math.nan,
    }
    sample = only(
        write(
            pictures(tmp_path, "a.png"),
            name,
            json.dumps(row) + "\n\n" + json.dumps({"file_name": "a.png", "caption": "B."}),
        )
    )
    assert sample.captions == (*([caption] if isinstance(caption, str) else caption), "B.")
    assert sample.truth["weight"] == 3
    assert "tags" not in sample.truth
    assert sample.truth["size"] is None


POPE = [
    {
        "question_id": k,
        "image": "COCO_val2014_1.png",
        "text": f"Is there a {noun} in the image?",
        "label": label,
    }
    for k, (noun, label) in enumerate([("dog", "yes"), ("hot dog", "no")])
]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stratum", STRATA)
@pytest.mark.parametrize("beside", [True, False])
def test_popes_own_files_are_read(tmp_path, n, stratum, beside):
    pictures(tmp_path, "COCO_val2014_1.png")
    if beside:
        write(tmp_path, "captions.json", captions("COCO_val2014_1.png", "A dog."))
    write(tmp_path, f"coco_pope_{stratum}.json", "\n".join(map(json.dumps, POPE[:n])) + "\n")
    expected = [
        ("presence", row["text"], row["label"], noun, stratum)
        for row, noun in zip(POPE, ("dog", "hot dog"), strict=True)
    ]
    assert questions_of(only(tmp_path), n) == expected[:n]


def test_popes_three_files_go_together(tmp_path):
    pictures(tmp_path, "COCO_val2014_1.png")
    for stratum in STRATA:
        write(tmp_path, f"coco_pope_{stratum}.json", "\n".join(map(json.dumps, POPE)))
    assert sorted(q.stratum for q in only(tmp_path).questions) == sorted(2 * STRATA)


@pytest.mark.parametrize(
    "answers", [["soup"] * 6 + ["can"] * 4, ["can", "soup", "soup", ""], ["soup"]]
)
def test_vizwiz_has_ten_answers_of_which_the_most_frequent_counts(tmp_path, answers):
    row = {
        "image": "1.png",
        "question": "What is this?",
        "answers": [{"answer": a, "answer_confidence": "yes"} for a in answers],
        "answer_type": "other",
        "answerable": 1,
    }
    sample = only(write(pictures(tmp_path, "val/1.png"), "annotations/val.json", [row]), "val")
    assert questions_of(sample, 1) == [("other", "What is this?", "soup", "", None)]
    assert (sample.truth["answer_type"], sample.truth["answerable"]) == ("other", 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        # nobody answers
        (
            "questions.jsonl",
            {"question_id": 1, "image": "a.png", "text": "What is it?", "category": "conv"},
        ),
        ("test.json", [{"image": "a.png", "question": "What is it?"}]),
        (
            "conversations.json",
            [{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "x"}]}],
        ),
        ("results.json", [{"image_id": 1, "caption": "A cat."}]),
        ("settings.json", {"path": "/etc", "batch": 4}),
        ("scores.csv", "caption,score\nA cat.,1\n"),
        ("empty.csv", ""),
        ("asked.csv", "file,question\na.png,Why?\n"),
    ],
)
def test_rows_that_say_nothing_of_pictures_are_left_alone(tmp_path, name, content):
    write(
        write(pictures(tmp_path, "a.png"), "captions.json", captions("a.png", "A dog.")),
        name,
        content,
    )
    with pytest.warns(UserWarning, match=rf"left alone: {name} \("):
        sample = only(tmp_path)
    assert sample.captions == ("A dog.",)
    assert all("in the picture?" in q.text for q in sample.questions)


@pytest.mark.parametrize("digits", [5000, 19])
def test_numbers_of_more_digits_than_a_number_has_stay_text(tmp_path, digits):
    long = "9" * digits
    assert (
        only(
            write(pictures(tmp_path, "a.png"), "t.csv", f"file,weight,depth\na.png,{long},-12\n")
        ).truth["weight"]
        == long
    )
    assert only(tmp_path).truth["depth"] == -12


def test_a_link_to_another_file_does_not_show_its_first_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").write_text("xyzzy:x:0:0,key\n")
    os.symlink(tmp_path / "secret", tmp_path / "data" / "t.csv")
    with pytest.raises(
        AnnotationError, match="t.csv: no column file or image; columns of a link are not shown"
    ) as raised:
        load_samples(tmp_path / "data")
    assert "xyzzy" not in str(raised.value)
    # a link to a folder, here one that holds itself
    os.symlink(tmp_path / "data", tmp_path / "data" / "more")
    with pytest.raises(AnnotationError) as raised:
        load_samples(tmp_path / "data")
    assert "xyzzy" not in str(raised.value)


def test_a_link_to_a_table_is_read(tmp_path):
    write(tmp_path, "elsewhere.csv", "file,caption\na.png,A dog.\n")
    os.symlink(tmp_path / "elsewhere.csv", pictures(tmp_path / "data", "a.png") / "t.csv")
    assert only(tmp_path / "data").captions == ("A dog.",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("file,caption,caption\na.png,x,y\n", "two columns have one name"),
        ("file,question,answer\na.png,,yes\n", "'question' of .* is ''"),
        ("file,question,answer\na.png,Why?,so\na.png,Who?,\n", "'answer' of 'row of a.png' is ''"),
        ('{"file_name": "a.png", "text": 5}', "'text' of 'row of a.png' is 5"),
        ('{"file_name": 5, "text": "x"}', "a row has no 'file_name'"),
        (
            '{"file_name": "a.png", "captions": ["x", ["y"]]}',
            r"'captions' of 'row of a.png' is \['y'\]",
        ),
        ('{"file_name": "a.png", "text": "\\ud800"}', "'text' of 'row of a.png' is"),
        ('{"file_name": "\\ud800", "text": "x"}', "no 'file_name'"),
        ('{"file_name": "a.png", "text": "x", "split": ["train"]}', r"'split' is \['train'\]"),
        (
            '{"file_name": "a.png", "question": ["x"], "answer": "y"}',
            r"'question' of 'row of a.png' is \['x'\]",
        ),
        (
            '{"file_name": "a.png", "question": "x?", "answer": {"a": 1}}',
            "'answer' of 'row of a.png' is {'a': 1}; give a text",
        ),
        ('{"file_name": "a.png", "mood": "\\ud800"}', "'mood' of 'row of a.png' is"),
        ('{"file_name": "a.png", "text": "x"}\n[1]', "a row has no 'file'"),
        ("file,caption\n" + "z" * 300 + ".png,x\n", "the picture zz.* is missing"),
    ],
)
def test_wrong_rows_are_told_with_file_and_column(tmp_path, content, expected):
    with pytest.raises(AnnotationError, match=expected):
        load_samples(
            write(
                pictures(tmp_path, "a.png"),
                "t.csv" if content.startswith("file") else "t.jsonl",
                content,
            )
        )
