"""The table of what was verified.

Dated, with versions and differences, and nothing in it that failed.
"""

import re

import pytest

from tests.contract import __main__ as report
from tests.contract.checks import CHECKS
from xlvlms_tutorial.models.architectures import ARCHITECTURES


@pytest.fixture
def few(monkeypatch):
    """Some of the checks, which take a moment."""
    checks = {
        name: CHECKS[name] for name in ("parts", "spans", "states_forward", "batch_sizes", "fold")
    }
    monkeypatch.setattr(report, "CHECKS", checks)
    return checks


def test_a_report_says_when_with_what_and_how_far(few, tmp_path, capsys):
    file = tmp_path / "verified.txt"
    assert report.main(["llava", "gemma3", "--report", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert text + "\n" == capsys.readouterr().out
    pattern = (
        r"Verified on \d{4}-\d\d-\d\d with Python 3[\d.]+, torch [\w.+]+, transformers [\w.]+, "
        r"tokenizers [\w.]+: 2 models of 2 archi"
    )
    assert re.match(pattern, text) and "2 architectures, 5 checks each, 0 fail" in text
    rows = {}
    for line in text.splitlines()[2:]:
        name, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        rows[name] = cells
    assert rows["architecture"] == [check.replace("_", " ") for check in few]
    assert list(rows)[2:] == ["LLaVA-1.5", "Gemma 3"]
    gemma = dict(zip(few, rows["Gemma 3"], strict=True))
    assert gemma["fold"].endswith("refused in layers 1, 2, 3")
    assert gemma["spans"] == gemma["states_forward"] == "0"
    assert 0 < float(gemma["batch_sizes"]) < 1e-4


def test_a_check_that_fails_is_in_the_table_and_in_the_exit_code(few, monkeypatch, capsys):
    def fails(case):
        raise AssertionError("layers differ\nby much")

    monkeypatch.setitem(few, "fold", fails)
    assert report.main(["llava"]) == 1
    output = capsys.readouterr().out
    assert "1 fail" in output and "FAILS: AssertionError layers differ |" in output


def test_what_the_book_shows_covers_every_architecture_and_holds_no_failure():
    text = report.REPORT.read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines()[4:] if line.startswith("|")]
    names = {row.partition(" (`")[0] for row in rows}
    assert (
        names == {architecture.name for architecture in ARCHITECTURES.values()}
        and report.FAILS not in text
    )
    assert (
        f"{len(rows)} models of {len(ARCHITECTURES)} architectures, "
        f"{len(CHECKS)} checks each, 0 fail"
    ) in text
    assert (
        text.splitlines()[2]
        == f"| architecture | {' | '.join(check.replace('_', ' ') for check in CHECKS)} |"
    )
