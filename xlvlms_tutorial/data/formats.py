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
    """Read a file of any form that is known.

    Pictures that it lists are added at once; what only refers to them is given back
    with the order in which to do it.

    Parameters
    ----------
    gathered : Gathered
        What the folder says, to which is added.
    part : Part
        The file.
    linked : bool
        Whether the file is a link that leads out of the folder.

    Returns
    -------
    list of (int, callable)
        What is to be added later, each with its place in the order.

    Raises
    ------
    AnnotationError
        If something of the file fits a form that is known and something does not; a
        :class:`Stray` if nothing does.
    """
    path = part.path.lower()
    if path.endswith(".csv"):
        rows = read_csv(part, linked)
        return [(0, partial(add_rows, gathered, part, rows, "csv"))]
    content = _json(part)
    sections = ("questions", "images", "annotations")
    if isinstance(content, dict) and not set(sections) & set(content) and roles_of(content)["file"]:
        content = [content]  # one line of json lines
    is_list = isinstance(content, list)
    first = content[0] if is_list and content else content
    has = lambda key: isinstance(first, dict) and isinstance(first.get(key), list)
    if is_list and has("regions"):
        return [(1, _read_regions(gathered, part, content))]
    roles = roles_of(first) if is_list and isinstance(first, dict) else {}
    if roles.get("file") and (roles["question"] or roles["captions"] or path.endswith(".jsonl")):
        return [(0, partial(add_rows, gathered, part, content, "json lines"))]
    if not isinstance(content, dict) or not any(map(has, sections)):
        raise Stray(f"{part} is of no form that is known", KNOWN)
    later = [(2, _read_questions(gathered, part, content))] if has("questions") else []
    if has("images"):
        entries = content["images"]
        has_sentences = any(isinstance(entry, dict) and "sentences" in entry for entry in entries)
        if has_sentences:
            _read_karpathy(gathered, part, content)
        else:
            _read_coco(gathered, part, content)
    elif has("annotations"):
        _read_answers(gathered, part, content["annotations"])
    return later


def _json(part: Part) -> object:
    """Read the content of a json file, or of json lines.

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
    """Return the picture's name and the split that an entry tells."""
    name = inside(part, value(part, "images", entry, key, str))
    return name, split_of(part, entry.get("split"))


def _read_karpathy(gathered: Gathered, part: Part, content: dict) -> None:
    part.form = "Karpathy's captions"

    def image(entry: object) -> tuple:
        sentences = value(part, "images", entry, "sentences", list)
        captions = [value(part, "sentences", s, "raw", str, True) for s in sentences]
        folder = optional(part, "images", entry, "filepath") or "."
        file = f"{folder}/{value(part, 'images', entry, 'filename', str)}"
        name, split = _listed(part, entry | {"filename": file}, "filename")
        for key in ("cocoid", "imgid"):
            if key in entry:
                return str(value(part, "images", entry, key)), name, split, captions
        return name, name, split, captions

    for key, name, split, captions in each(content["images"], image):
        picture = gathered.listed(part, key, name, split)
        for text in captions:
            gathered.caption(part, picture, text)


def _read_coco(gathered: Gathered, part: Part, content: dict) -> None:
    part.form = "COCO's"
    boxed = isinstance(content.get("categories"), list)
    entries = content.get("annotations")
    names: dict[str, str] = {}
    listed: dict[str, str] = {}
    if not isinstance(entries, list):
        raise Stray(f"{part}: an entry of 'file' has no 'annotations'", KNOWN)

    def kind(entry: object) -> None:
        key = str(value(part, "categories", entry, "id"))
        name = value(part, "categories", entry, "name", str).strip()
        _require_one_name(part, names, key, name, "kind", "kind")

    def image(entry: object) -> tuple:
        key = str(value(part, "images", entry, "id"))
        name, split = _listed(part, entry)
        _require_one_name(part, listed, key, name, "image", "picture")
        width = entry.get("width")
        if not measured(width) or width <= 0:
            width = None
        return key, name, split, width

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

    each(content["categories"] if boxed else (), kind)
    images = each(content["images"], image)
    annotations = each(entries, annotation)
    gathered.names |= dict.fromkeys(names.values())
    pictures: dict[str, Picture] = {}
    for key, name, split, width in images:
        pictures[key] = picture = gathered.listed(part, key, name, split)
        picture.width = picture.width or width
        picture.boxes = [] if boxed and picture.boxes is None else picture.boxes
    for key, entry, number, crowd in annotations:
        picture = pictures[key]
        if isinstance(entry, str):
            gathered.caption(part, picture, entry)
        else:
            picture.boxes = picture.boxes or []
            gathered.box(part, picture, entry, number, crowd)


def _require_one_name(
    part: Part, names: dict[str, str], key: str, name: str, kind: str, thing: str
) -> None:
    """Note the name that an id stands for, and refuse an id that stands for two."""
    if names.setdefault(key, name) != name:
        raise AnnotationError(
            f"{part}: {kind} {key} is both {names[key]} and {name}",
            f"give every {thing} an id of its own",
        )


def _box(part: Part, names: dict[str, str], entry: dict) -> tuple[tuple, str | None, bool]:
    """Return a box with its kind, its id and whether it holds more than one."""
    kind = str(value(part, "annotations", entry, "category_id"))
    box = value(part, "annotations", entry, "bbox", list)
    is_box = len(box) == 4 and all(map(measured, box)) and min(box[2:]) >= 0
    if kind not in names or not is_box:
        category = reprlib.repr(entry["category_id"])
        raise AnnotationError(
            f"{part}: 'category_id' {category} and 'bbox' {reprlib.repr(box)} of an annotation",
            "give a category that is listed, and x, y, width, height in pixels",
        )
    number = None
    if entry.get("id") is not None:
        number = str(value(part, "annotations", entry, "id"))
    several = bool(entry.get("iscrowd"))
    return (names[kind], *map(float, box)), number, several


def _read_regions(gathered: Gathered, part: Part, content: list) -> Later:
    """Read Visual Genome's region descriptions: every phrase is a caption."""
    part.form = "Visual Genome's regions"

    def image(entry: object) -> tuple:
        key = str(value(part, "file", entry, "id"))
        regions = value(part, "file", entry, "regions", list)
        return key, [value(part, "regions", region, "phrase", str, True) for region in regions]

    entries = each(content, image)

    def add() -> None:
        for key, phrases in entries:
            picture = gathered.numbered(part, key, part.split, by_name=True)
            for text in phrases:
                gathered.caption(part, picture, text)

    return add


def _read_answers(gathered: Gathered, part: Part, entries: list) -> None:
    part.form = "VQA answers"

    def annotation(entry: object) -> tuple:
        number = str(value(part, "annotations", entry, "question_id"))
        image = None
        if entry.get("image_id") is not None:
            image = str(value(part, "annotations", entry, "image_id"))
        text = answer_of(part, "annotations", entry, ("multiple_choice_answer", "answers"))
        return number, image, text

    for number, image, text in each(entries, annotation):
        gathered.answer(part, number, image, text)


def _read_questions(gathered: Gathered, part: Part, content: dict) -> Later:
    """Read the questions of a VQA file.

    Type, target and stratum are read where a file has them, else told by the wording.
    """
    part.form = "VQA questions"
    subset = content.get("data_subtype")
    if not part.split and isinstance(subset, str):
        part.split = named_split(subset)

    def question(entry: object) -> tuple:
        text = value(part, "questions", entry, "question", str)
        key = str(value(part, "questions", entry, "image_id"))
        number = str(value(part, "questions", entry, "question_id"))
        extra = [optional(part, "questions", entry, name) for name in ("type", "target", "stratum")]
        return number, key, text, extra

    entries = each(content["questions"], question)

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
            objects = objects_in(text, tuple(gathered.names))
            target = named or next(iter(objects), "")
            type_of_question = kind or question_type(text, answer)
            question = Question(type_of_question, text, answer, target, stratum)
            picture = gathered.numbered(part, key, part.split)
            gathered.question(part, picture, question, number)

    return add
