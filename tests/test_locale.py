"""The package writes and reads UTF-8 where the system's locale says
otherwise, as in containers without one.
"""

import ast
import json
import os
import subprocess
import sys

import pytest

from tools import ROOT

PLAIN = {
    "LC_ALL": "C",
    "LANG": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "HF_HUB_OFFLINE": "1",
}
MODULES = sorted((ROOT / "xlvlms_tutorial").rglob("*.py")) + sorted((ROOT / "tools").glob("*.py"))
READERS = {"open", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile", "FileHandler"}
BINARY = {"Image", "os", "av", "tarfile", "zipfile"}  # modules whose open reads no text


def silent_on_encoding(source: str) -> list[int]:
    """The lines of calls that read or write text in the encoding of the locale."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        keywords = {word.arg: word.value for word in call.keywords}
        name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        modes = [
            part.value
            for part in (*call.args, *keywords.values())
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
        text = (
            name in READERS
            and owner not in BINARY
            and not any("b" in mode for mode in modes if len(mode) <= 3)
        )
        text |= any(word in keywords for word in ("text", "universal_newlines")) and name in (
            "run",
            "Popen",
            "check_output",
        )
        if text and "encoding" not in keywords:
            lines.append(call.lineno)
    return lines


def test_a_call_without_an_encoding_is_found():
    silent = (
        'open("a")\n'
        'open("a", "wb")\n'
        "p.read_text()\n"
        'p.write_text("a", encoding="utf-8")\n'
        "subprocess.run(c, text=True)\n"
        "Image.open(p)\n"
    )
    assert silent_on_encoding(silent + 'p.open("rb")\np.open("w")\n') == [1, 3, 5, 8]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_is_read_and_written_as_utf8(module):
    assert silent_on_encoding(module.read_text(encoding="utf-8")) == []


def run(*command: str, **variables: str) -> str:
    """What a command prints where the locale knows ASCII only."""
    environment = os.environ | PLAIN | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode("utf-8")


@pytest.mark.parametrize("command", ["--help", "doctor", "claims", "fetch --help"])
def test_commands_print_in_any_locale(command):
    assert run("-c", "import sys; print(sys.stdout.encoding)") in ("ascii\n", "ANSI_X3.4-1968\n")
    assert run("-m", "xlvlms_tutorial", *command.split())


WRITING = """
import sys
from pathlib import Path
from xlvlms_tutorial.io import read_sealed, write_sealed
from xlvlms_tutorial.metrics.intervals import Estimate
from xlvlms_tutorial.claims.claims import record
here = Path(sys.argv[1])
said = {"said": "na\\u00efve \\u00b1 \\u732b"}
assert read_sealed(write_sealed(here / "a.json", said)) == said
names = {"model": "mod\\u00e8le", "dataset": "sc\\u00e8nes", "against": "\\u00e9galit\\u00e9"}
record("VLM-1", Estimate(0.5, 0.4, 0.6, 10), **names, seeds=0, folder=here / "claims")
"""


def test_records_are_written_and_read_in_any_locale(tmp_path):
    run("-c", WRITING, str(tmp_path))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["said"] == "naïve ± 猫"
    content = json.loads(
        run(
            "-m", "xlvlms_tutorial", "claims", "--json", "-", XLVLMS_CLAIMS=str(tmp_path / "claims")
        )
    )
    assert any(entry["model"] == "modèle" for entry in content["measurements"])
    assert "mod\\xe8le" in run(
        "-m", "xlvlms_tutorial", "claims", XLVLMS_CLAIMS=str(tmp_path / "claims")
    )


def test_all_is_there_or_fetched_in_any_locale():
    assert "SmolLM2 is in" in run("-m", "xlvlms_tutorial", "fetch")
