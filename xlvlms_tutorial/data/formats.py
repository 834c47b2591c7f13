"""The forms in which files of a folder speak of pictures, each read into what is gathered.

Nothing is added of a file that does not fit.
"""

import json
import reprlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from xlvlms_tutorial.data.annotations import objects_in, question_type
from xlvlms_tutorial.data.entries import (
    KNOWN,
    Stray,
    answer_of,
    each,
    measured,
    optional,
    split_of,
    value,
)
from xlvlms_tutorial.data.gathered import Gathered, Part, Picture
from xlvlms_tutorial.data.rows import add_rows, read_csv, roles_of
from xlvlms_tutorial.data.tree import inside, named_split
from xlvlms_tutorial.errors import AnnotationError
from xlvlms_tutorial.samples import Question

Later = Callable[[], None]


def read(gathered: Gathered, part: Part, linked: bool) -> list[tuple[int, Later]]:
    """Read a file.

    Pictures that it lists are added at once; what only refers to them is given back
    with the order in which to do it.

    Raises
    ------
    AnnotationError
        If something of the file fits a form that is known and something does not; a
        :class:`Stray` if nothing does.
    """
    if part.path.lower().endswith(".csv"):
        return [(0, partial(add_rows, gathered, part, read_csv(part, linked), "csv"))]
    content = _json(part)
    if (
        isinstance(content, dict)
        and roles_of(content)["file"]
        and not {"questions", "images", "annotations"} & set(content)
    ):
        content = [content]  # one line of json lines
    first = content[0] if isinstance(content, list) and content else content
    has = lambda key: isinstance(first, dict) and isinstance(first.get(key), list)
    if isinstance(content, list) and has("regions"):
        return [(1, _read_regions(gathered, part, content))]
    roles = roles_of(first) if isinstance(content, list) and isinstance(first, dict) else {}
    if roles.get("file") and (
        roles["question"] or roles["captions"] or part.path.lower().endswith(".jsonl")
    ):
        return [(0, partial(add_rows, gathered, part, content, "json lines"))]
    if not isinstance(content, dict) or not any(map(has, ("questions", "images", "annotations"))):
        raise Stray(f"{part} is of no form that is known", KNOWN)
    later = [(2, _read_questions(gathered, part, content))] if has("questions") else []
    if has("images"):
        entries = content["images"]
        karpathy = any(isinstance(e, dict) and "sentences" in e for e in entries)
        (_read_karpathy if karpathy else _read_coco)(gathered, part, content)
    elif has("annotations"):
        _read_answers(gathered, part, content["annotations"])
    return later


def _json(part: Part) -> object:
    """The content of a json file, or of json lines.

    POPE's files are json lines under the name of json.
    """
    try:
        text = Path(part.path).read_text(encoding="utf-8-sig")
        try:
            return json.loads(text)
        except json.JSONDecodeError as cause:
            if cause.msg != "Extra data":
                raise
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError, RecursionError) as cause:  # a UnicodeDecodeError is a ValueError
        raise Stray(f"{part} is no json that can be read ({cause})", "write it again") from cause


def _listed(part: Part, entry: object, key: str = "file_name") -> tuple[str, str | None]:
    """The picture's name and the split that an entry tells."""
    name = inside(part, value(part, "images", entry, key, str))
    return name, split_of(part, entry.get("split"))


def _read_karpathy(gathered: Gathered, part: Part, content: dict) -> None:
    part.form = "Karpathy's captions"

    def one(entry: object) -> tuple:
        said = [
            value(part, "sentences", s, "raw", str, True)
            for s in value(part, "images", entry, "sentences", list)
        ]
        folder = optional(part, "images", entry, "filepath") or "."
        name, split = _listed(
            part,
            entry | {"filename": f"{folder}/{value(part, 'images', entry, 'filename', str)}"},
            "filename",
        )
        key = next(
            (value(part, "images", entry, key) for key in ("cocoid", "imgid") if key in entry), name
        )
        return str(key), name, split, said

    for key, name, split, said in each(content["images"], one):
        picture = gathered.listed(part, key, name, split)
        for text in said:
            gathered.caption(part, picture, text)


def _read_coco(gathered: Gathered, part: Part, content: dict) -> None:
    part.form, boxed = "COCO's", isinstance(content.get("categories"), list)
    entries, names = content.get("annotations"), {}
    if not isinstance(entries, list):
        raise Stray(f"{part}: an entry of 'file' has no 'annotations'", KNOWN)

    def kind(entry: object) -> None:
        key, name = (
            str(value(part, "categories", entry, "id")),
            value(part, "categories", entry, "name", str).strip(),
        )
        if names.setdefault(key, name) != name:
            raise AnnotationError(
                f"{part}: kind {key} is both {names[key]} and {name}",
                "give every kind an id of its own",
            )

    def image(entry: object) -> tuple:
        key, (name, split) = str(value(part, "images", entry, "id")), _listed(part, entry)
        if listed.setdefault(key, name) != name:
            raise AnnotationError(
                f"{part}: image {key} is both {listed[key]} and {name}",
                "give every picture an id of its own",
            )
        return (
            key,
            name,
            split,
            entry.get("width") if measured(entry.get("width")) and entry["width"] > 0 else None,
        )

    def annotation(entry: object) -> tuple:
        key = str(value(part, "annotations", entry, "image_id"))
        if key not in listed:
            raise AnnotationError(
                f"{part}: 'image_id' {key} is not among its 'images'",
                "add the picture, or take the annotation out",
            )
        if "caption" in entry:
            return key, value(part, "annotations", entry, "caption", str, True), None, False
        return key, *_box(part, names, entry)

    listed: dict[str, str] = {}
    each(content["categories"] if boxed else (), kind)
    images, annotations = each(content["images"], image), each(entries, annotation)
    gathered.names |= dict.fromkeys(names.values())
    pictures: dict[str, Picture] = {}
    for key, name, split, width in images:
        pictures[key] = picture = gathered.listed(part, key, name, split)
        picture.width = picture.width or width
        picture.boxes = [] if boxed and picture.boxes is None else picture.boxes
    for key, said, number, crowd in annotations:
        if isinstance(said, str):
            gathered.caption(part, pictures[key], said)
        else:
            pictures[key].boxes = pictures[key].boxes or []
            gathered.box(part, pictures[key], said, number, crowd)


def _box(part: Part, names: dict[str, str], entry: dict) -> tuple[tuple, str | None, bool]:
    """A box with its kind, its id and whether it holds more than one."""
    kind, box = (
        str(value(part, "annotations", entry, "category_id")),
        value(part, "annotations", entry, "bbox", list),
    )
    if kind not in names or len(box) != 4 or not all(map(measured, box)) or min(box[2:]) < 0:
        message = (
            f"'category_id' {reprlib.repr(entry['category_id'])} and 'bbox' {reprlib.repr(box)}"
        )
        raise AnnotationError(
            f"{part}: {message} of an annotation",
            "give a category that is listed, and x, y, width, height in pixels",
        )
    number = None if entry.get("id") is None else str(value(part, "annotations", entry, "id"))
    return (names[kind], *map(float, box)), number, bool(entry.get("iscrowd"))


def _read_regions(gathered: Gathered, part: Part, content: list) -> Later:
    """Visual Genome's region descriptions: every phrase is a caption."""
    part.form = "Visual Genome's regions"

    def one(entry: object) -> tuple:
        key = str(value(part, "file", entry, "id"))
        return key, [
            value(part, "regions", r, "phrase", str, True)
            for r in value(part, "file", entry, "regions", list)
        ]

    entries = each(content, one)

    def add() -> None:
        for key, said in entries:
            picture = gathered.numbered(part, key, part.split, by_name=True)
            for text in said:
                gathered.caption(part, picture, text)

    return add


def _read_answers(gathered: Gathered, part: Part, entries: list) -> None:
    part.form = "VQA answers"

    def one(entry: object) -> tuple:
        number = str(value(part, "annotations", entry, "question_id"))
        image = (
            str(value(part, "annotations", entry, "image_id"))
            if entry.get("image_id") is not None
            else None
        )
        return (
            number,
            image,
            answer_of(part, "annotations", entry, ("multiple_choice_answer", "answers")),
        )

    for entry in each(entries, one):
        gathered.answer(part, *entry)


def _read_questions(gathered: Gathered, part: Part, content: dict) -> Later:
    """Questions of a VQA file.

    Type, target and stratum are read where a file has them, else told by the wording.
    """
    part.form, subset = "VQA questions", content.get("data_subtype")
    part.split = part.split or (named_split(subset) if isinstance(subset, str) else None)

    def one(entry: object) -> tuple:
        text, key = (
            value(part, "questions", entry, "question", str),
            str(value(part, "questions", entry, "image_id")),
        )
        extra = [optional(part, "questions", entry, name) for name in ("type", "target", "stratum")]
        return str(value(part, "questions", entry, "question_id")), key, text, extra

    entries = each(content["questions"], one)

    def with_answer(entry: tuple) -> tuple:
        number, key, text, extra = entry
        answer = gathered.answer_to(part, number, key, part.split)
        if answer is None:
            raise Stray(
                f"{part}: question {number} has no answer",
                "add a json with annotations for all questions",
            )
        return number, key, text, answer, extra

    def add() -> None:
        for number, key, text, answer, (kind, named, stratum) in each(entries, with_answer):
            target = named or next(iter(objects_in(text, tuple(gathered.names))), "")
            question = Question(kind or question_type(text, answer), text, answer, target, stratum)
            gathered.question(part, gathered.numbered(part, key, part.split), question, number)

    return add
