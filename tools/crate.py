"""Describe a folder of exports as an RO-Crate 1.2: ``ro-crate-metadata.json``.

What it says comes from elsewhere: files from the folder, authors and licence from CITATION.cff,
papers from the ledger and references.bib, software from the versions in the ledger's rows.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from pybtex.database import Person, parse_file
from pybtex.richtext import Text

from tools import ROOT
from tools.chapters import address
from xlvlms_tutorial.claims.tables import COLUMNS
from xlvlms_tutorial.io import write_json

NAME = "ro-crate-metadata.json"
VERSION = "https://w3id.org/ro/crate/1.2"
ARXIV = "https://arxiv.org/abs/"
LICENCES = {
    "MIT": ("https://spdx.org/licenses/MIT", "MIT License"),
    "CC0-1.0": ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0 1.0 Universal"),
}
# By name: the media type, and what the file is.
FILES = {
    "claims.json": ("application/json", "The ledger for machines: headlines and measurements"),
    "schema.json": ("application/schema+json", "The JSON schema of claims.json"),
    "ledger.csv": ("text/csv", "Every measurement of every claim"),
    "ledger.parquet": ("application/vnd.apache.parquet", "Every measurement of every claim"),
    "headlines.csv": ("text/csv", "One line for each claim"),
    "headlines.parquet": ("application/vnd.apache.parquet", "One line for each claim"),
    "dictionary.csv": ("text/csv", "The data dictionary: every column of the tables"),
    "report.md": ("text/markdown", "A short report of the ledger"),
    "world.json": ("application/ld+json", "The world in which it was measured, as Croissant"),
    "scenes.csv": ("text/csv", "The factors of the first scenes of each split of the world"),
    "world.py": ("text/x-python", "The code that draws a scene from its factors"),
    "language.py": ("text/x-python", "The code that writes captions and questions of a scene"),
    "CITATION.cff": ("application/yaml", "How to cite"),
    "LICENSE": ("text/plain", "The licence"),
}
HOMES = {
    "python": "https://www.python.org/",
    "torch": "https://pytorch.org/",
    "transformers": "https://github.com/huggingface/transformers",
    "tokenizers": "https://github.com/huggingface/tokenizers",
    "numpy": "https://numpy.org/",
    "pandas": "https://pandas.pydata.org/",
    "scikit-learn": "https://scikit-learn.org/",
}
Entity = dict[str, object]


def citation() -> Mapping[str, object]:
    """What CITATION.cff says."""
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def reference(target: str) -> dict[str, str]:
    """A link from one entity to another."""
    return {"@id": target}


def papers(content: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The papers of the ledger by their arXiv numbers: title, authors and, where known, year.

    From references.bib; a paper that is not there has the words of the register and no authors.
    """
    known = {}
    for entry in parse_file(str(ROOT / "references.bib"), bib_format="bibtex").entries.values():
        text = " ".join([entry.fields.get("eprint", ""), entry.fields.get("journal", "")])
        if number := re.search(r"\d{4}\.\d{5}", text):
            people = entry.persons.get("author", ())
            authors = [_name(person) for person in people if str(person) != "others"]
            known[number[0]] = {
                "title": _plain(entry.fields["title"]),
                "authors": authors,
                "year": entry.fields.get("year", ""),
            }
    listed = {}
    for row in content["measurements"]:
        for number in re.findall(r"\d{4}\.\d{5}", str(row["paper"])):
            title = re.search(rf"{number}, ([^;]+?)(, against arXiv|;|$)", str(row["paper"]))
            words = title[1] if title else str(row["paper"])
            listed[number] = known.get(number, {"title": words, "authors": [], "year": ""})
    return dict(sorted(listed.items()))


def _plain(text: str) -> str:
    return str(Text.from_latex(text))


def _name(person: Person) -> str:
    parts = (person.first_names, person.middle_names, person.prelast_names, person.last_names)
    return _plain(" ".join(word for part in parts for word in part))


def published(content: Mapping[str, object]) -> str:
    """Say how many rows are measured on published models; a sentence."""
    n = sum(row["scale"] == "published" for row in content["measurements"])
    if n == 0:
        return "No published model was run."
    return f"{n} measurements are of published models."


def software(content: Mapping[str, object]) -> list[tuple[str, str]]:
    """Every package of the ledger's rows with its version; a package may have several."""
    pairs = set()
    for row in content["measurements"]:
        pairs |= set((row["versions"] or {}).items())
    return sorted((str(name), str(version)) for name, version in pairs)


def _slug(*words: str) -> str:
    """An id within the crate, of letters and digits, whatever the words hold."""
    return "#" + re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-")


def metadata(folder: Path, content: Mapping[str, object], date: str) -> dict[str, object]:
    """The description of what lies in a folder.

    ``content`` is the ledger, and ``date`` the day of its state, such as "2026-12-01".
    """
    names = [name for name in FILES if (folder / name).is_file()]
    cited = papers(content)
    programs = [_slug(*pair) for pair in software(content)]
    entities = [
        {
            "@id": NAME,
            "@type": "CreativeWork",
            "conformsTo": reference(VERSION),
            "about": reference("./"),
        },
        _root(content, names, list(cited), date),
        *(_file(folder / name) for name in names),
        *_columns(names),
        *_people(cited),
        *_programs(content),
        {
            "@id": "#measuring",
            "@type": "CreateAction",
            "name": "Measuring the claims while the book was built",
            "description": "Each page of the book records what it measured; the verdicts follow "
            "from the intervals.",
            "agent": reference("#contributors"),
            "instrument": [reference(program) for program in programs],
            "result": [reference(name) for name in names if name.startswith("claims")],
            "endTime": date,
        },
    ]
    for terms, name in LICENCES.values():
        entities.append(
            {
                "@id": terms,
                "@type": "CreativeWork",
                "name": name,
                "description": f"The terms of the {name}",
            }
        )
    # not a term of every version of the context
    digest = {"sha256": "http://schema.org/sha256"}
    return {"@context": [f"{VERSION}/context", digest], "@graph": entities}


def _root(
    content: Mapping[str, object], names: Sequence[str], numbers: Sequence[str], date: str
) -> Entity:
    said = citation()
    n_claims = len(content["headlines"])
    n_intervals = content["multiplicity"]["intervals"]
    return {
        "@id": "./",
        "@type": "Dataset",
        "name": f"{said['title']}: the ledger of claims",
        "description": f"{n_claims} published claims about vision-language models with "
        f"{n_intervals} measurements, most on small models in a drawn world. {published(content)}",
        "datePublished": date,
        "version": str(said["version"]),
        "license": reference(LICENCES[said["license"]][0]),
        "author": reference("#contributors"),
        "publisher": reference("#contributors"),
        "keywords": "vision-language models, interpretability, reproducibility",
        "hasPart": [reference(name) for name in names],
        "citation": [reference(f"{ARXIV}{number}") for number in numbers],
        "mentions": reference("#measuring"),
    }


def _file(file: Path) -> Entity:
    kind, meaning = FILES[file.name]
    entity: Entity = {
        "@id": file.name,
        "@type": "File",
        "name": file.name,
        "description": meaning,
        "encodingFormat": kind,
        "contentSize": str(file.stat().st_size),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "license": reference(LICENCES["MIT"][0]),
        "author": reference("#contributors"),
    }
    if file.stem in COLUMNS:
        columns = COLUMNS[file.stem]
        entity["variableMeasured"] = [
            reference(_slug("column", file.stem, column.name)) for column in columns
        ]
    if file.name == "claims.json":
        entity["conformsTo"] = reference("schema.json")
    return entity


def _columns(names: Sequence[str]) -> Iterator[Entity]:
    for table, columns in COLUMNS.items():
        if f"{table}.csv" not in names:
            continue
        for column in columns:
            entity = {
                "@id": _slug("column", table, column.name),
                "@type": "PropertyValue",
                "name": column.name,
                "description": column.meaning,
            }
            if column.unit:
                entity["unitText"] = column.unit
            yield entity


def _people(cited: Mapping[str, Mapping[str, object]]) -> Iterator[Entity]:
    yield {
        "@id": "#contributors",
        "@type": "Organization",
        "name": citation()["authors"][0]["name"],
    }
    authors = {}
    for number, paper in cited.items():
        entity = {
            "@id": f"{ARXIV}{number}",
            "@type": "ScholarlyArticle",
            "name": paper["title"],
            "identifier": f"arXiv:{number}",
        }
        if paper["authors"]:
            entity["author"] = [reference(_slug("person", name)) for name in paper["authors"]]
        if paper["year"]:
            entity["datePublished"] = paper["year"]
        authors |= dict.fromkeys(paper["authors"])
        yield entity
    for name in authors:
        yield {"@id": _slug("person", name), "@type": "Person", "name": name}


def _programs(content: Mapping[str, object]) -> Iterator[Entity]:
    homes = HOMES | {"xlvlms_tutorial": address()}
    for name, version in software(content):
        entity = {
            "@id": _slug(name, version),
            "@type": "SoftwareApplication",
            "name": name,
            "softwareVersion": version,
            "version": version,
        }
        if name in homes:
            entity["url"] = homes[name]
        else:  # software without an address is none by the specification
            entity["@type"] = "CreativeWork"
            del entity["softwareVersion"]
        yield entity


def write_crate(folder: Path, content: Mapping[str, object], date: str) -> Path:
    """Write the description of a folder into it."""
    return write_json(folder / NAME, metadata(folder, content, date))
