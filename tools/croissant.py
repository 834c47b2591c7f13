"""Describe the world as a Croissant data set: ``world.json``, with ``scenes.csv``.

The world is drawn, not downloaded: a scene is a row of factors, and a picture comes from a row by
code. So the description has the rows of the first scenes of each split and the code that draws
them, and no pictures.
"""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from tools import ROOT
from tools.chapters import address
from tools.crate import LICENCES, citation
from xlvlms_tutorial.io import write_json, write_utf8
from xlvlms_tutorial.pocket import language, world

CODE = ("world.py", "language.py")
PER_SPLIT = 256
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
SPLITS = {
    "train": ("cr:TrainingSplit", "What connectors are trained on."),
    "validation": ("cr:ValidationSplit", "Where layers and settings are chosen."),
    "test": ("cr:TestSplit", "What most measurements are made on."),
    "composition": (
        "cr:TestSplit",
        "Nothing but combinations of factors that the others never show.",
    ),
}
# By column of scenes.csv: the type, and what it means.
FIELDS = {
    "id": ("sc:Text", "The id that load_samples gives the scene."),
    "split": ("sc:Text", "The split."),
    "seed": ("sc:Integer", "The seed of the list of scenes."),
    "number": ("sc:Integer", "The place in that list, from 0 on."),
    "subject": ("sc:Text", "A person or an animal."),
    "action": ("sc:Text", "What a person does; empty for animals."),
    "item": ("sc:Text", "The kind of the things beside the subject."),
    "colour": ("sc:Text", "The colour of the things; empty where they have none."),
    "count": ("sc:Integer", "How many things there are."),
    "side": ("sc:Text", "Where the things are, relative to the subject, as the viewer sees it."),
    "place": ("sc:Text", "What the ground is made of."),
    "time": ("sc:Text", "The time of day."),
    "layout": ("sc:Integer", "The seed of the small accidents of the layout."),
    "held_out": ("sc:Boolean", "Whether training never sees this combination of factors."),
    "caption": ("sc:Text", "The first of the captions that the generator writes."),
}
VALUES = {
    "subject": world.SUBJECTS,
    "action": world.ACTIONS,
    "item": world.ITEMS,
    "colour": world.COLOURS,
    "count": world.COUNTS,
    "side": world.SIDES,
    "place": world.PLACES,
    "time": world.TIMES,
}
DESCRIPTION = (
    "Drawn scenes whose truth is known: pictures of 256 x 256 pixels with captions and questions. "
    "The pictures are not in this data set, and are not downloaded from anywhere: the generator "
    "renders each from a row of factors and the seed of its layout, the same to the pixel each "
    "time, with render(Scene(...)) of xlvlms_tutorial.pocket. It draws as many scenes as are "
    "wanted, by split and seed; scenes.csv has the rows of the first of each split, at seed 0. "
    "The sprites are by Kenney, in the public domain (CC0); they come with a wheel that the "
    "package fetches."
)


def scene_rows(n: int = PER_SPLIT, seed: int = 0) -> list[dict[str, object]]:
    """The first scenes of each split as rows, with the columns of :data:`FIELDS`."""
    rows = []
    for split in world.SPLITS:
        for number, scene in enumerate(world.scenes(n, split, seed)):
            name = f"{split}-{seed}-{number:05d}"
            row = {"id": name, "split": split, "seed": seed, "number": number}
            row |= {factor: getattr(scene, factor) for factor in (*world.FACTORS, "layout")}
            row |= {"held_out": scene.held_out, "caption": language.captions(scene)[0]}
            rows.append(row)
    return rows


def metadata(folder: Path, date: str) -> dict[str, object]:
    """The description of the world, with the files of it that lie in a folder."""
    said = citation()
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": "pocket-world",
        "description": DESCRIPTION,
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "license": [terms for terms, _ in LICENCES.values()],
        "url": address(),
        "version": str(said["version"]),
        "datePublished": date,
        "creator": {"@type": "sc:Organization", "name": said["authors"][0]["name"]},
        "citeAs": _bibtex(said, date),
        "distribution": [
            _file(folder / "scenes.csv", "text/csv", "The factors of scenes, a row each."),
            *(_file(folder / name, "text/x-python", "The generator.") for name in CODE),
        ],
        "recordSet": [_splits(), _factor_values(), _scenes()],
    }


def _bibtex(said: dict, date: str) -> str:
    fields = {
        "title": f"{{{said['title']}}}",
        "author": f"{{{said['authors'][0]['name']}}}",
        "year": date[:4],
        "note": f"Version {said['version']}",
    }
    return "@software{xlvlms, " + ", ".join(f"{k} = {{{v}}}" for k, v in fields.items()) + "}"


def _file(file: Path, kind: str, meaning: str) -> dict[str, object]:
    return {
        "@type": "cr:FileObject",
        "@id": file.name,
        "name": file.name,
        "description": meaning,
        "contentUrl": file.name,
        "contentSize": f"{file.stat().st_size} B",
        "encodingFormat": kind,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def _field(record_set: str, name: str, kind: str, meaning: str) -> dict[str, object]:
    return {
        "@type": "cr:Field",
        "@id": f"{record_set}/{name}",
        "name": name,
        "description": meaning,
        "dataType": kind,
    }


def _record_set(name: str, meaning: str, fields: Sequence[object], **more: object) -> dict:
    head = {"@type": "cr:RecordSet", "@id": name, "name": name, "description": meaning}
    return head | more | {"field": fields}


def _splits() -> dict[str, object]:
    fields = [
        _field("splits", "name", "sc:Text", "The split."),
        _field("splits", "url", "sc:URL", "The kind of split."),
        _field("splits", "meaning", "sc:Text", "What it is for."),
    ]
    data = []
    for name, (kind, meaning) in SPLITS.items():
        url = kind.replace("cr:", CONTEXT["cr"])
        data.append({"splits/name": name, "splits/url": url, "splits/meaning": meaning})
    key = {"key": {"@id": "splits/name"}, "dataType": "cr:Split", "data": data}
    return _record_set("splits", "The splits of the world.", fields, **key)


def _factor_values() -> dict[str, object]:
    fields = [
        _field("factor_values", "factor", "sc:Text", "The factor, a column of scenes."),
        _field("factor_values", "value", "sc:Text", "A value that it can take."),
    ]
    data = []
    for factor, values in VALUES.items():
        for value in values:
            data.append({"factor_values/factor": factor, "factor_values/value": str(value)})
    meaning = "The factors of a scene, and every value of each."
    return _record_set("factor_values", meaning, fields, data=data)


def _scenes() -> dict[str, object]:
    fields = []
    for name, (kind, meaning) in FIELDS.items():
        field = _field("scenes", name, kind, meaning)
        field["source"] = {"fileObject": {"@id": "scenes.csv"}, "extract": {"column": name}}
        if name == "split":
            field["references"] = {"field": {"@id": "splits/name"}}
        fields.append(field)
    meaning = "Scenes as rows of factors; the generator draws the picture of a row."
    return _record_set("scenes", meaning, fields, key={"@id": "scenes/id"})


def write_world(folder: Path, date: str, n: int = PER_SPLIT) -> Path:
    """Write the rows of scenes, the generator and the description of both into a folder."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(scene_rows(n))
    write_utf8(folder / "scenes.csv", text.getvalue())
    for name in CODE:
        code = (ROOT / "xlvlms_tutorial" / "pocket" / name).read_text(encoding="utf-8")
        write_utf8(folder / name, code)
    return write_json(folder / "world.json", metadata(folder, date))
