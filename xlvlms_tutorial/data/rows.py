"""Tables of pictures, a row each.

csv, and json lines as metadata.jsonl, POPE and VizWiz have them.
"""

import csv
import re
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import PurePosixPath

from xlvlms_tutorial.data.annotations import STRATA, objects_in, question_type
from xlvlms_tutorial.data.entries import (
    Stray,
    answer_of,
    checked,
    each,
    first_filled,
    plain,
    split_of,
)
from xlvlms_tutorial.data.gathered import Gathered, Part
from xlvlms_tutorial.data.tree import inside
from xlvlms_tutorial.errors import AnnotationError
from xlvlms_tutorial.samples import Question

_FILE_COLUMNS = ("file", "image", "file_name", "filename", "image_path", "path")
_ANSWERS = ("answer", "label", "answers")


def read_csv(part: Part, linked: bool) -> list[dict]:
    """Read the rows of a csv file.

    Raises
    ------
    AnnotationError
        If two columns have one name; a :class:`Stray` if it cannot be read
        or has no column for pictures.
    """
    try:
        with open(part.path, encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream)
            rows = list(table)
            columns = list(table.fieldnames or ())
    except (ValueError, csv.Error, OSError) as cause:
        raise Stray(
            f"{part} is no csv that can be read ({cause})", "write it again in UTF-8"
        ) from cause
    if not roles_of(dict.fromkeys(columns))["file"]:
        # A link may lead to any file of this machine: its first line is nobody's business
        if linked:
            advice = "columns of a link are not shown"
        else:
            advice = f"there are: {', '.join(columns)[:200] or 'none'}"
        raise Stray(f"{part}: no column {' or '.join(_FILE_COLUMNS[:2])}", advice)
    if len(set(columns)) < len(columns):
        raise AnnotationError(
            f"{part}: two columns have one name", "give every column a name of its own"
        )
    return rows


def roles_of(row: dict) -> dict[str, object]:
    """Find which columns of a row are what, in any case: file, question, answer, split, captions.

    All others are facts.
    """
    columns = defaultdict(list)  # the names of columns by their plain form
    captions = []
    for name in row:
        if not isinstance(name, str):
            continue
        column = _column(name)
        columns[column].append(name)
        if re.fullmatch(r"(caption|text|description|sentence)s?(_?\d+)?", column):
            captions.append(name)

    def first(*labels: str) -> str | None:
        for label in labels:
            if label in columns:
                return columns[label][0]
        return None

    roles = {"file": first(*_FILE_COLUMNS), "question": first("question"), "split": first("split")}
    text = first("text")
    if text and not roles["question"]:
        asks = str(row[text]).strip().endswith("?")
        if first("question_id") or (asks and first(*_ANSWERS)):  # POPE's text and label
            roles["question"] = text
            captions.remove(text)
    roles["answers"] = []
    if roles["question"]:
        for label in _ANSWERS:
            roles["answers"] += columns.get(label, [])
    return roles | {"captions": captions}


@lru_cache(maxsize=1024)
def _column(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def add_rows(gathered: Gathered, part: Part, rows: list, form: str) -> None:
    """Add what rows say: captions, a question with its answer, and facts.

    Parameters
    ----------
    gathered : Gathered
        What the folder says, to which is added.
    part : Part
        The file.
    rows : list
        Its rows, each a dict.
    form : str
        The form of the file, for the report.

    Raises
    ------
    AnnotationError
        If a row has no picture or a wrong value; a :class:`Stray` if no question has an answer.
    """
    part.form = form
    for name, split, captions, question, facts in each(rows, partial(_row, gathered, part)):
        picture = gathered.listed(part, name, name, split)
        for text in captions:
            gathered.caption(part, picture, text)
        if question:
            gathered.question(part, picture, question)
        for fact, value in facts.items():
            if value is not None or fact not in picture.truth:
                differs = picture.truth.get(fact, value) not in (None, value)
                part.unused["facts that a later row says otherwise"] += differs
                picture.truth[fact] = value
                part.used["facts"] += value is not None


def _row(gathered: Gathered, part: Part, row: object) -> tuple:
    """Read a row of a table: its picture's file and split, captions, question and facts."""
    roles = roles_of(row if isinstance(row, dict) else {})
    column = roles["file"] or _FILE_COLUMNS[0]
    name = row.get(column) if isinstance(row, dict) and None not in row else None
    if not isinstance(name, str) or not name.strip() or not plain(name):
        raise AnnotationError(
            f"{part}: a row has no {column!r} or more cells than the header",
            "give every row one cell a column",
        )
    place = f"row of {name.strip()[:200]}"
    name = inside(part, name.strip())
    captions = []
    for column in roles["captions"]:
        captions += _captions(part, place, column, row.get(column))
    used = {roles["file"], roles["split"], roles["question"], *roles["captions"], *roles["answers"]}
    question = _question(gathered, part, place, row, roles)
    if question:
        used.add("question_id")
        if question.stratum:
            used |= {"category", "stratum"}
    facts = {}
    for key, value in row.items():
        if key in used or isinstance(value, (list, dict)):
            continue
        if isinstance(value, str):
            checked(part, place, key, value, str, True)
        facts[key] = _fact(value)
    return name, split_of(part, row.get(roles["split"])), captions, question, facts


def _question(
    gathered: Gathered, part: Part, place: str, row: dict, roles: dict[str, object]
) -> Question | None:
    """Return the question of a row with its answer, None where it asks nothing."""
    column = roles["question"]
    text = row.get(column)
    if first_filled(row, [column, *roles["answers"]]) is None:
        return None
    checked(part, place, column, text, str)
    keys = roles["answers"] or ["answer"]
    if first_filled(row, keys) is None:
        raise Stray(
            f"{part}: {keys[0]!r} of {place!r} is {row.get(keys[0])!r}",
            "give every question an answer",
        )
    answer = answer_of(part, place, row, keys)
    kind = question_type(text, answer)
    stratum = _stratum(part, row) if kind == "presence" else None
    objects = objects_in(text, tuple(gathered.names))
    target = next(iter(objects), "")
    return Question(kind, text, answer, target, stratum)


def _stratum(part: Part, row: dict) -> str | None:
    """Return the stratum that a row tells, or else the name of its file."""
    words = [str(row[key]) for key in ("stratum", "category") if key in row]
    words += re.split(r"[^a-z]+", PurePosixPath(part.file).stem.lower())
    return next((word for word in words if word in STRATA), None)


def _captions(part: Part, place: str, column: str, value: object) -> list[str]:
    """List the captions of a cell: a text, or a list of texts in json lines."""
    if value is None:
        return []
    texts = value if isinstance(value, list) else [value]
    return [checked(part, place, column, text, str, True) for text in texts]


def _fact(value: object) -> object:
    """Convert a cell to a fact.

    A whole number where it reads so, None where it is empty or not a number.
    """
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?\d{1,18}", value) else value or None
    return value if value == value else None
