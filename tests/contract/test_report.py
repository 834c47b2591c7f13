"""The table of what was verified: dated, with versions and differences, and nothing in it that failed."""

import re

import pytest

from tests.contract import __main__ as report
from tests.contract.checks import CHECKS


@pytest.fixture
def few(monkeypatch):
    """Some of the checks, which take a moment."""
    some = {name: CHECKS[name] for name in ("parts", "spans", "states_forward", "batch_sizes", "fold")}
    monkeypatch.setattr(report, "CHECKS", some)
    return some


def test_a_report_says_when_with_what_and_how_far(few, tmp_path, capsys):
    file = tmp_path / "verified.md"
    assert report.main(["--report", str(file), "llava", "gemma3"]) == 0
    text = file.read_text(encoding="utf-8")
    assert text + "\n" == capsys.readouterr().out
    said = (
        r"Verified on \d{4}-\d\d-\d\d with Python 3[\d.]+, torch [\w.+]+, transformers [\w.]+, tokenizers [\w.]+: 2 architectures, 5 checks"
    )
    assert re.match(said, text) and "5 checks each, 0 fail" in text
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in text.splitlines()[2:])}
    assert rows["architecture"] == [check.replace("_", " ") for check in few] and list(rows)[2:] == ["LLaVA-1.5", "Gemma 3"]
    of = dict(zip(few, rows["Gemma 3"], strict=True))
    assert of["fold"].endswith("refused in layers 1, 2, 3") and of["spans"] == of["states_forward"] == "0"
    assert 0 < float(of["batch_sizes"]) < 1e-4


def test_a_check_that_fails_is_in_the_table_and_in_the_exit_code(few, monkeypatch, capsys):
    def fails(case):
        raise AssertionError("layers differ\nby much")

    monkeypatch.setitem(few, "fold", fails)
    assert report.main(["llava"]) == 1
    told = capsys.readouterr().out
    assert "1 fail" in told and "FAILS: AssertionError layers differ |" in told
