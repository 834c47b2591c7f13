"""Folders of data made by hand, for the tests of what reads them."""

import json

from PIL import Image


def picture(folder, name, colour=(0, 0, 0)):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20), colour).save(folder / name)
    return folder


def pictures(folder, *names):
    for shade, name in enumerate(names):
        picture(folder, name, (shade, 0, 0))
    return folder


def write(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )
    return folder


def captions(name, *texts, key=1):
    """COCO's captions of one picture."""
    return {
        "images": [{"id": key, "file_name": name}],
        "annotations": [{"image_id": key, "caption": text} for text in texts],
    }


def boxes(name, *boxes, kinds=("dog",), key=1):
    """COCO's boxes of one picture, each as (id, kind's number, x, y, width, height)."""
    listed = [{"id": k, "name": kind} for k, kind in enumerate(kinds)]
    annotations = [
        {"id": number, "image_id": key, "category_id": kind, "bbox": list(box)}
        for number, kind, *box in boxes
    ]
    return {
        "images": [{"id": key, "file_name": name, "width": 40}],
        "categories": listed,
        "annotations": annotations,
    }


def question(number, image, text="What color is the bus?", **fields):
    return {"questions": [{"question_id": number, "image_id": image, "question": text} | fields]}


def answer(number, text, **fields):
    return {"annotations": [{"question_id": number, "multiple_choice_answer": text} | fields]}
