"""Validate a folder of exports with the validators of their formats, offline.

``python tools/check_exports.py FOLDER``, in an environment of tools/exports-requirements.txt; see
.ci/exports. RO-Crate 1.2 by CRS4's validator, Croissant by MLCommons' library. No request leaves
the machine: the one that the first needs, for the terms of RO-Crate, is answered from the package
rocrate. That has the terms of version 1.1, all of which stand in 1.2; so a term that only 1.2 knows
would fail here. Then both have to find the fault in a damaged copy.
"""

import csv
import json
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import mlcroissant
import requests
from requests.adapters import BaseAdapter
from rocrate_validator import services
from rocrate_validator.models import Severity
from rocrate_validator.utils.http import HttpRequester

CONTEXT = "https://w3id.org/ro/crate/1.2/context"


class Answers(BaseAdapter):
    """Answers requests for the terms of RO-Crate, and refuses all others."""

    def send(self, request: requests.PreparedRequest, **_: object) -> requests.Response:
        """Answer a request."""
        response = requests.Response()
        response.request, response.url = request, request.url
        response.status_code = 504
        if request.url == CONTEXT:
            response.status_code = 200
            response.headers["Content-Type"] = "application/ld+json"
            response._content = (files("rocrate") / "data" / "ro-crate.jsonld").read_bytes()
        return response

    def close(self) -> None:
        """There is nothing to close."""


def crate_problems(folder: Path) -> list[str]:
    """What RO-Crate 1.2 requires and the folder lacks."""
    settings = services.ValidationSettings(
        rocrate_uri=str(folder),
        profile_identifier="ro-crate-1.2",
        requirement_severity=Severity.REQUIRED,
        no_cache=True,
    )
    # the settings have opened the session that all requests take
    for scheme in ("https://", "http://"):
        HttpRequester().session.mount(scheme, Answers())
    result = services.validate(settings)
    return [f"{issue.check.identifier}: {issue.message}" for issue in result.get_issues()]


def world_problems(folder: Path) -> list[str]:
    """What Croissant requires and the description of the world lacks, and rows that it misreads."""
    data = mlcroissant.Dataset(jsonld=str(folder / "world.json"))
    issues = data.metadata.ctx.issues
    problems = [*issues.errors, *issues.warnings]
    with (folder / "scenes.csv").open(encoding="utf-8", newline="") as file:
        written = [row["id"] for row in csv.DictReader(file)]
    rows = [row["scenes/id"].decode() for row in data.records("scenes")]
    if rows != written:
        problems.append(f"{len(rows)} scenes are read where {len(written)} are written")
    return problems


def damaged(folder: Path, copy: Path) -> Path:
    """Copy the folder, without the day of the crate and with a column that scenes.csv lacks."""
    shutil.copytree(folder, copy)
    crate = copy / "ro-crate-metadata.json"
    content = json.loads(crate.read_text(encoding="utf-8"))
    for entity in content["@graph"]:
        if entity["@id"] == "./":
            del entity["datePublished"]
    crate.write_text(json.dumps(content), encoding="utf-8")
    world = copy / "world.json"
    text = world.read_text(encoding="utf-8")
    world.write_text(text.replace('"column": "id"', '"column": "gone"'), encoding="utf-8")
    return copy


def finds_faults(folder: Path) -> list[str]:
    """The validators that find nothing in a damaged copy."""
    with TemporaryDirectory() as place:
        copy = damaged(folder, Path(place) / "copy")
        blind = []
        if not any("datePublished" in problem for problem in crate_problems(copy)):
            blind.append("the validator of RO-Crate misses a root without datePublished")
        try:
            if not world_problems(copy):
                blind.append("the validator of Croissant misses a column that is not there")
        except (mlcroissant.ValidationError, mlcroissant.GenerationError, KeyError):
            pass  # it says so by raising
        return blind


def main() -> int:
    """Validate both; 1 where something is missing."""
    folder = Path(sys.argv[1])
    problems = [*crate_problems(folder), *world_problems(folder)] or finds_faults(folder)
    print("\n".join(problems) or f"{folder}: a valid RO-Crate 1.2 and a valid Croissant data set")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
