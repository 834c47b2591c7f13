"""Lay the ledger beside the built pages, in every form: ``python -m tools.exports``.

`make book` does it. The folder is a research object by itself (RO-Crate 1.2): tables with their
dictionary, the ledger for machines with its schema, a report, and the world in which it was
measured (Croissant).
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tools import ROOT
from tools.crate import NAME, write_crate
from tools.croissant import write_world
from tools.execute import BUILD
from tools.release import day
from tools.report import markdown
from xlvlms_tutorial.claims import write_tables
from xlvlms_tutorial.claims.headlines import SCHEMA
from xlvlms_tutorial.io import read_json, write_json, write_utf8

FOLDER = "ledger"  # under the built pages


def lay(content: Mapping[str, object], folder: Path, date: str) -> Path:
    """Write all exports of a ledger into a folder, and return the crate's description.

    What else lies there goes, so that nothing is published that the crate does not know.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_tables(content, folder)
    write_json(folder / "claims.json", content)
    for file in (SCHEMA, ROOT / "CITATION.cff", ROOT / "LICENSE"):
        shutil.copyfile(file, folder / file.name)
    write_utf8(folder / "report.md", markdown(content, date))
    write_world(folder, date)
    return write_crate(folder, content, date)


def main() -> int:
    """Lay the exports of the last build."""
    source = BUILD / "claims.json"
    if not source.exists():
        print(f"{source} is missing; `make book` writes it", file=sys.stderr)
        return 1
    lay(read_json(source), BUILD / "html" / FOLDER, day())
    print(f"written: {BUILD / 'html' / FOLDER / NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
