"""Local folders as datasets: COCO-format json (also Karpathy's), VQA-format json and csv, with pictures beside them."""

import csv
import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import isfinite
from pathlib import Path

import numpy as np

from xlvlms_tutorial.data.annotations import Record, objects_in, question_type, samples_of
from xlvlms_tutorial.data.samples import Question, Sample
from xlvlms_tutorial.errors import AnnotationError, SelectionError
from xlvlms_tutorial.metrics.styles import STYLE_WORDS, style_rate

SPLITS = {"train": "train", "restval": "train", "val": "validation", "validation": "validation", "test": "test"}
_FORMS = """COCO's (images and annotations), Karpathy's (images with sentences), Visual Genome's (regions), VQA's (questions; annotations),
csv with a column file""".replace("\n", " ")
STYLES = tuple(STYLE_WORDS)
_FILE_COLUMNS = ("file", "image", "file_name")


class _Folder:
    """What the files of a folder say, gathered picture by picture."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.by_file: dict[str, Record] = {}
        self.names: list[str] = []
        self.answers: dict[str, tuple[Path, dict]] = {}
        self.asked: list[tuple[Path, dict, dict]] = []
        self.seen: set[tuple[str, str]] = set()

    def record(self, file: Path, key: object, name: str | None, split: str | None) -> Record:
        """The record of a picture by its id, made when it is new; a file name that leaves the folder is refused."""
        name = None if name is None else _inside(file, name)
        known = self.records.get(str(key)) or self.by_file.get(name or "") or Record(str(key))
        self.records[str(key)] = known
        if name and known.source and Path(name).name != Path(known.source).name:
            raise AnnotationError(f"{file}: image {key} is both {known.source} and {name}", "give every picture an id of its own")
        known.source, known.split = known.source or name, known.split or split
        if name:
            self.by_file.setdefault(name, known)
        return known


def folder_samples(folder: str | Path, n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """At most ``n`` samples of a folder's split, drawn by the seed; the first of a longer list are those of a shorter one.

    Splits are told by a key or column "split", else by the names of files (captions_val2017.json). A folder without splits gives every
    split from everything, in an order of its own: samples of two splits may then be the same.
    Pictures are opened when asked for. Truth and questions are those of :func:`~xlvlms_tutorial.data.annotations.samples_of`.

    Raises
    ------
    AnnotationError
        If the files are missing, malformed or lack a key, a picture is missing or outside of the folder.
    SelectionError
        If ``n`` is below 1, or the folder has no such split.
    """
    if not isinstance(n, int) or n < 1:
        raise SelectionError(f"n={n!r}", "give 1 or more")
    if split not in SPLITS:
        raise SelectionError(f"no split {split!r}", "allowed: train, validation, test")
    folder = Path(folder)
    found = _read(folder, tuple((p, p.stat().st_mtime_ns, p.stat().st_size) for p in _files(folder)))
    records = {r.id: r for r in found.records.values()}.values()
    records = [r for r in records if r.captions or r.boxes is not None or r.questions or r.truth]
    splits = sorted({r.split for r in records} - {None})
    if splits:
        records = [r for r in records if r.split in (None, SPLITS[split])]
    if not records:
        raise SelectionError(f"{folder}: no split {SPLITS[split]!r}", f"there are: {', '.join(splits) or 'no annotated pictures'}")
    records.sort(key=lambda r: r.id)
    order = np.random.default_rng([seed, list(SPLITS.values()).index(SPLITS[split])]).permutation(len(records))
    drawn = [records[k] for k in order[:n]]
    roots = _roots(folder)
    drawn = [replace(record, source=_picture(folder, roots, record)) for record in drawn]
    return samples_of(records, drawn, found.names, seed)


def _files(folder: Path) -> list[Path]:
    files = (p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.suffix in (".json", ".csv") and p.is_file())
    return sorted(files, key=lambda p: (p.suffix == ".csv", p))  # csv adds to the pictures of json


@lru_cache(maxsize=1)  # COCO's files take minutes, and a chapter asks for several splits
def _read(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> _Folder:
    """What the files say, by their paths, times and sizes."""
    found, understood = _Folder(), 0
    for file, *_ in files:
        understood += _read_csv(found, file) if file.suffix == ".csv" else _read_json(found, file)
    if not understood:
        told = f"{', '.join(file.name for file, *_ in files[:5])} is of no form that is known" if files else "no json or csv file"
        raise AnnotationError(f"{folder}: {told}", f"known forms: {_FORMS}")
    for file, entry, about in found.asked:
        _add_question(found, file, entry, about)
    return found


def _read_json(found: _Folder, file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as cause:  # a UnicodeDecodeError is a ValueError
        raise AnnotationError(f"{file} is no json that can be read ({cause})", "write it again") from cause
    if isinstance(content, list) and content and isinstance(content[0], dict) and "regions" in content[0]:
        _read_regions(found, file, content)
        return True
    if not isinstance(content, dict):
        return False
    if isinstance(content.get("questions"), list):
        found.asked += [(file, entry, content) for entry in content["questions"]]
    elif isinstance(content.get("images"), list):
        entries = content["images"]
        karpathy = bool(entries) and all(isinstance(e, dict) and "sentences" in e for e in entries)
        (_read_karpathy if karpathy else _read_coco)(found, file, content)
    elif isinstance(content.get("annotations"), list):
        for entry in content["annotations"]:
            found.answers[str(_get(file, "annotations", entry, "question_id"))] = file, entry
    else:
        return False
    return True


def _get(file: Path, part: str, entry: object, key: str, kind: type | tuple[type, ...] = (int, str)) -> object:
    """A value of an entry, or an error that names file and key."""
    if not isinstance(entry, dict) or key not in entry:
        raise AnnotationError(f"{file}: an entry of {part!r} has no {key!r}", f"known forms: {_FORMS}")
    if not isinstance(entry[key], kind):
        raise AnnotationError(f"{file}: {key!r} of {part!r} is {entry[key]!r}", f"known forms: {_FORMS}")
    return entry[key]


def _named_split(name: object) -> str | None:
    """The split that a file's or folder's name tells: "captions_val2017.json" is of validation."""
    found = re.search(r"(?<![a-z])(train|validation|val|test)(?![a-z])", str(name or "").lower())
    return SPLITS[found[1]] if found else None


def _told_split(file: Path, split: object) -> str | None:
    if split in (None, ""):
        return None
    if split not in SPLITS:
        raise AnnotationError(f"{file}: 'split' is {split!r}", f"allowed: {', '.join(SPLITS)}")
    return SPLITS[split]


def _read_karpathy(found: _Folder, file: Path, content: dict) -> None:
    for entry in content["images"]:
        name = f"{entry.get('filepath') or '.'}/{_get(file, 'images', entry, 'filename', str)}"
        key = entry.get("cocoid", entry.get("imgid", name))
        record = found.record(file, key, name, None)
        record.split = _told_split(file, entry.get("split")) or record.split  # which an official file's name told otherwise
        for sentence in _get(file, "images", entry, "sentences", list):
            _add_caption(record, _get(file, "sentences", sentence, "raw", str))


def _read_coco(found: _Folder, file: Path, content: dict) -> None:
    split, boxed = _named_split(file.stem), isinstance(content.get("categories"), list)
    listed = content["categories"] if boxed else []
    names = {_get(file, "categories", entry, "id"): _get(file, "categories", entry, "name", str) for entry in listed}
    for entry in content["images"]:
        key, name = _get(file, "images", entry, "id"), _get(file, "images", entry, "file_name", str)
        record = found.record(file, key, name, _told_split(file, entry.get("split")) or split)
        width = entry.get("width")
        record.width = record.width or (width if isinstance(width, (int, float)) and width > 0 else None)
        if boxed and record.boxes is None:
            record.boxes = []
    found.names = list(dict.fromkeys([*found.names, *names.values()]))
    for entry in _get(file, "file", content, "annotations", list):
        key = str(_get(file, "annotations", entry, "image_id"))
        if key not in found.records:
            raise AnnotationError(f"{file}: 'image_id' {key} is not among its 'images'", "add the picture, or take the annotation out")
        if "caption" in entry:
            _add_caption(found.records[key], _get(file, "annotations", entry, "caption", str))
        else:
            _add_box(found, file, names, found.records[key], entry)


def _read_regions(found: _Folder, file: Path, content: list) -> None:
    """Visual Genome's region descriptions: every phrase is a caption."""
    for entry in content:
        record = found.record(file, _get(file, "file", entry, "id"), None, None)
        for region in _get(file, "file", entry, "regions", list):
            _add_caption(record, _get(file, "regions", region, "phrase", str))


def _add_caption(record: Record, caption: str) -> None:
    if caption.strip() and caption.strip() not in record.captions:
        record.captions.append(caption.strip())


def _add_box(found: _Folder, file: Path, names: dict, record: Record, entry: dict) -> None:
    kind, box = _get(file, "annotations", entry, "category_id"), _get(file, "annotations", entry, "bbox", list)
    if kind not in names or len(box) != 4 or not all(isinstance(v, (int, float)) and isfinite(v) for v in box):
        told = f"'category_id' {kind!r} and 'bbox' {box!r}"
        raise AnnotationError(f"{file}: {told} of an annotation", "give a category that is listed, and x, y, width, height in pixels")
    mark = (record.id, str(entry.get("id", (kind, *box))))  # keypoints repeat the boxes of instances under the same id
    if mark not in found.seen:
        found.seen.add(mark)
        record.boxes = [*(record.boxes or ()), (names[kind], *map(float, box))]
        record.crowds |= {names[kind]} if entry.get("iscrowd") else set()


def _add_question(found: _Folder, file: Path, entry: dict, about: dict) -> None:
    """A question of a VQA file with its answer; type, target and stratum are read where a file has them, else told by the wording."""
    text, key = _get(file, "questions", entry, "question", str), str(_get(file, "questions", entry, "image_id"))
    number = str(_get(file, "questions", entry, "question_id"))
    if number not in found.answers:
        raise AnnotationError(f"{file}: question {number} has no answer", "add a json with annotations for all questions")
    source, answer = found.answers[number]
    told = _get(source, "annotations", answer, "multiple_choice_answer", str)
    record = found.record(file, key, None, _named_split(about.get("data_subtype")) or _named_split(file.stem))
    kind = entry.get("type") or question_type(text, told)
    target = entry.get("target") or next(iter(objects_in(text, found.names)), "")
    record.questions.append(Question(kind, text, told, target, entry.get("stratum")))


def _read_csv(found: _Folder, file: Path) -> bool:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            table = csv.DictReader(opened)
            rows, columns = list(table), list(table.fieldnames or ())
    except (ValueError, csv.Error, OSError) as cause:
        raise AnnotationError(f"{file} is no csv that can be read ({cause})", "write it again in UTF-8") from cause
    column = next((name for name in _FILE_COLUMNS if name in columns), None)
    if column is None:
        raise AnnotationError(f"{file}: no column {' or '.join(_FILE_COLUMNS[:2])}", f"there are: {', '.join(columns) or 'none'}")
    for row in rows:
        _add_row(found, file, column, row)
    return True


def _add_row(found: _Folder, file: Path, column: str, row: dict) -> None:
    name = (row.pop(column) or "").strip()
    if not name or None in row:
        raise AnnotationError(f"{file}: a row has no {column!r} or more cells than the header", "give every row one cell a column")
    record = found.record(file, name, name, _named_split(file.stem))
    record.split = _told_split(file, row.pop("split", None)) or record.split
    text, answer = row.pop("question", None), row.pop("answer", None)
    if text:
        kind = question_type(text, answer or "")
        record.questions.append(Question(kind, text, _get(file, f"row of {name}", {"answer": answer or None}, "answer", str)))
    for key, value in row.items():
        if re.fullmatch(r"caption(_\d+)?", key):
            _add_caption(record, value or "")
        elif value or key not in record.truth:
            record.truth[key] = int(value) if re.fullmatch(r"-?\d+", value or "") else value or None


def _inside(file: Path, name: str) -> str:
    """A file name in its plain form; refused where it leaves the folder."""
    plain = posixpath.normpath(name.replace("\\", "/"))
    if posixpath.isabs(plain) or plain.split("/")[0] == ".." or re.match(r"[A-Za-z]:", plain):
        raise AnnotationError(f"{file}: the picture {name!r} is outside of the folder", "give paths below the folder")
    return plain


def _roots(folder: Path) -> list[Path]:
    """Where pictures may lie: the folder and its folders, two levels down."""
    return [folder, *sorted(p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.is_dir())]


def _picture(folder: Path, roots: Sequence[Path], record: Record) -> Path:
    """The file of a picture: by its name, else by its id as COCO and Visual Genome write it."""
    stems = [record.id]
    if record.id.isdigit():
        number = f"{int(record.id):012d}"
        stems += [number, *(f"COCO_{part}_{number}" for part in ("train2014", "val2014", "test2015"))]
    ends = (".jpg", ".png", ".jpeg", ".webp")
    names = [record.source] if record.source else [_inside(folder, f"{stem}{end}") for stem in stems for end in ends]
    for path in (root / name for name in names for root in roots):
        if path.is_file():
            return path
    raise AnnotationError(f"{folder}: the picture {names[0]} of image {record.id} is missing", "put it into the folder or one below it")


def in_style(samples: Sequence[Sample], style: str, where: str) -> list[Sample]:
    """The same samples, each with its one caption that has most of a style: "place", "colour" or "mood".

    Raises
    ------
    AnnotationError
        If no caption of any sample has a word of the style.
    """
    samples = [sample for sample in samples if sample.captions]
    rates = [style_rate(sample.captions, style) for sample in samples]
    if not any(rate.any() for rate in rates):
        raise AnnotationError(f"{where}: no caption of {len(samples)} samples has a word of {style}", "give more samples or other captions")
    return [replace(s, captions=(s.captions[int(rate.argmax())],)) for s, rate in zip(samples, rates, strict=True)]
