"""The table of what was verified: dated, with versions and differences, and nothing in it that failed."""

import re

from tests.contract import __main__ as report
from tests.contract.checks import CHECKS
from xlvlms_tutorial.models.architectures import ARCHITECTURES


def test_a_report_says_when_with_what_and_how_far(tmp_path, capsys):
    file = tmp_path / "verified.md"
    assert report.main(["--report", str(file), "llava", "gemma3"]) == 0
    text = file.read_text(encoding="utf-8")
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert re.match(r"Verified on \d{4}-\d\d-\d\d with Python 3[\d.]+, torch [\w.+]+, transformers [\w.]+, tokenizers [\w.]+: 2 arch", text)
    assert f"{len(CHECKS)} checks each, 0 fail" in text
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in text.splitlines()[2:])}
    assert rows["architecture"] == [check.replace("_", " ") for check in CHECKS] and list(rows)[2:] == ["LLaVA-1.5", "Gemma 3"]
    of = dict(zip(CHECKS, rows["Gemma 3"], strict=True))
    assert of["fold"].endswith("refused in layers 1, 2, 3") and of["spans"] == "0" and float(of["skip_block"]) < 1e-4
    assert 0 < float(of["batch_sizes"]) < 1e-4


def test_a_check_that_fails_is_in_the_table_and_in_the_exit_code(monkeypatch, capsys):
    def fails(case):
        raise AssertionError("layers differ\nby much")

    monkeypatch.setitem(CHECKS, "fold", fails)
    assert report.main(["llava"]) == 1
    told = capsys.readouterr().out
    assert "1 fail" in told and "FAILS: AssertionError layers differ |" in told


def test_what_the_book_shows_covers_every_architecture_and_holds_no_failure():
    text = report.REPORT.read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines()[4:] if line.startswith("|")]
    assert set(rows) == {known.name for known in ARCHITECTURES.values()} and report.FAILS not in text
    assert f"{len(rows)} architectures, {len(CHECKS)} checks each, 0 fail" in text
    assert text.splitlines()[2] == f"| architecture | {' | '.join(check.replace('_', ' ') for check in CHECKS)} |"
