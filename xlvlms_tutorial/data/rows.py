"""Tables of pictures, a row each.

csv, and json lines as metadata.jsonl, POPE and VizWiz have them.
"""

import csv
import re
from functools import lru_cache, partial
from pathlib import PurePosixPath

from xlvlms_tutorial.data.annotations import STRATA, objects_in, question_type
from xlvlms_tutorial.data.entries import Stray, answer_of, checked, each, plain, split_of
from xlvlms_tutorial.data.gathered import Gathered, Part
from xlvlms_tutorial.data.tree import inside
from xlvlms_tutorial.errors import AnnotationError
from xlvlms_tutorial.samples import Question

_FILE_COLUMNS = ("file", "image", "file_name", "filename", "image_path", "path")
_ANSWERS = ("answer", "label", "answers")


def read_csv(part: Part, linked: bool) -> list[dict]:
    """The rows of a csv file.

    Raises
    ------
    AnnotationError
        If two columns have one name; a :class:`Stray` if it cannot be read
        or has no column for pictures.
    """
    try:
        with open(part.path, encoding="utf-8-sig", newline="") as opened:
            table = csv.DictReader(opened)
            rows, columns = list(table), list(table.fieldnames or ())
    except (ValueError, csv.Error, OSError) as cause:
        raise Stray(
            f"{part} is no csv that can be read ({cause})", "write it again in UTF-8"
        ) from cause
    if not roles_of(dict.fromkeys(columns))["file"]:
        # A link may lead to any file of this machine: its first line is nobody's business
        there = (
            "columns of a link are not shown"
            if linked
            else f"there are: {', '.join(columns)[:200] or 'none'}"
        )
        raise Stray(f"{part}: no column {' or '.join(_FILE_COLUMNS[:2])}", there)
    if len(set(columns)) < len(columns):
        raise AnnotationError(
            f"{part}: two columns have one name", "give every column a name of its own"
        )
    return rows


def roles_of(row: dict) -> dict[str, object]:
    """Which columns of a row are what, in any case: file, question, answer, split, captions.

    All others are facts.
    """
    columns = {name: _column(name) for name in row if isinstance(name, str)}
    first = lambda *wanted: next(
        (name for want in wanted for name, said in columns.items() if said == want), None
    )
    roles = {"file": first(*_FILE_COLUMNS), "question": first("question"), "split": first("split")}
    captions = [
        name
        for name, said in columns.items()
        if re.fullmatch(r"(caption|text|description|sentence)s?(_?\d+)?", said)
    ]
    text = first("text")
    is_question = text and (
        first("question_id") or first(*_ANSWERS) and str(row[text]).strip().endswith("?")
    )
    if is_question and not roles["question"]:  # POPE's text and label
        roles["question"], captions = text, [name for name in captions if name != text]
    roles["answers"] = (
        [name for want in _ANSWERS for name, said in columns.items() if said == want]
        if roles["question"]
        else []
    )
    return roles | {"captions": captions}


@lru_cache(maxsize=1024)
def _column(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def add_rows(gathered: Gathered, part: Part, rows: list, form: str) -> None:
    """Add what rows say: captions, a question with its answer, and facts.

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
                part.left["facts that a later row says otherwise"] += picture.truth.get(
                    fact, value
                ) not in (None, value)
                picture.truth[fact] = value
                part.taken["facts"] += value is not None


def _row(gathered: Gathered, part: Part, row: object) -> tuple:
    roles = roles_of(row if isinstance(row, dict) else {})
    column = roles["file"] or _FILE_COLUMNS[0]
    name = row.get(column) if isinstance(row, dict) and None not in row else None
    if not isinstance(name, str) or not name.strip() or not plain(name):
        raise AnnotationError(
            f"{part}: a row has no {column!r} or more cells than the header",
            "give every row one cell a column",
        )
    name, where = inside(part, name.strip()), f"row of {name.strip()[:200]}"
    captions = [
        text
        for column in roles["captions"]
        for text in _captions(part, where, column, row.get(column))
    ]
    text, question = row.get(roles["question"]), None
    left = {roles["file"], roles["split"], roles["question"], *roles["captions"], *roles["answers"]}
    if any(value not in (None, "", []) for value in (text, *map(row.get, roles["answers"]))):
        checked(part, where, roles["question"], text, str)
        keys = roles["answers"] or ["answer"]
        if all(row.get(key) in (None, "", []) for key in keys):
            raise Stray(
                f"{part}: {keys[0]!r} of {where!r} is {row.get(keys[0])!r}",
                "give every question an answer",
            )
        answer = answer_of(part, where, row, keys)
        kind = question_type(text, answer)
        strata = (str(row.get(key)) for key in ("stratum", "category") if key in row)
        named = (word for word in re.split(r"[^a-z]+", PurePosixPath(part.file).stem.lower()))
        stratum = (
            next((said for said in (*strata, *named) if said in STRATA), None)
            if kind == "presence"
            else None
        )
        left |= {"question_id"} | ({"category", "stratum"} if stratum else set())
        question = Question(
            kind, text, answer, next(iter(objects_in(text, tuple(gathered.names))), ""), stratum
        )
    cells = {
        key: value
        for key, value in row.items()
        if key not in left and not isinstance(value, (list, dict))
    }
    facts = {
        key: _fact(checked(part, where, key, value, str, True) if isinstance(value, str) else value)
        for key, value in cells.items()
    }
    return name, split_of(part, row.get(roles["split"])), captions, question, facts


def _captions(part: Part, where: str, column: str, value: object) -> list[str]:
    """The captions of a cell: a text, or a list of texts in json lines."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return [checked(part, where, column, text, str, True) for text in listed]


def _fact(value: object) -> object:
    """A cell as a fact.

    A whole number where it reads so, None where it is empty or not a number.
    """
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?\d{1,18}", value) else value or None
    return value if value == value else None
