"""The report says what the ledger says, and shows what comes from data as it is."""

import re

import pytest
from bs4 import BeautifulSoup

from tools import report
from xlvlms_tutorial.claims import CLAIMS, merge, record, write_claims
from xlvlms_tutorial.metrics import Estimate

DAY = "2026-03-04"
AWKWARD = "<script>alert(1)</script> | [a](http://b) *c* `d` &lt; <!-- e --> ![f](g)"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """The file of a ledger, and what it holds."""
    folder = tmp_path_factory.mktemp("records")
    run = {"model": "pocket-llava", "dataset": "scenes", "seeds": 0, "folder": folder}
    record("IMA-1", Estimate(0.3, 0.2, 0.4, 20), against=AWKWARD, variant="a", **run)
    record("IMA-1", Estimate(-0.3, -0.4, -0.2, 20), against=AWKWARD, variant="b", **run)
    record("IMA-3", Estimate(0.25, 0.2, 0.3, 20), against="neighbouring token", **run)
    file = folder.parent / f"{folder.name}.json"
    return file, write_claims(merge(folder), file)


@pytest.fixture(scope="module")
def text(ledger):
    return report.markdown(ledger[1], DAY)


@pytest.fixture(scope="module")
def shown(ledger, text):
    return BeautifulSoup(report.page(text, report.title(ledger[1])), "html.parser")


def cells(shown, claim):
    row = next(row for row in shown.find_all("tr") if row.find("td", string=claim))
    return [cell.get_text() for cell in row.find_all("td")]


def test_the_abstract_counts(ledger, text):
    content = ledger[1]
    assert f"We state {len(CLAIMS)} claims" in text
    assert "and measure them 3 times" in text
    assert f"1 *holds*, 1 *holds in part*, {len(CLAIMS) - 2} *not measured*" in text
    assert "1 of the 2 measured claims hold against the strongest baseline" in text
    assert "3 intervals exclude their bar, where about 0 would by chance alone" in text
    assert "No published model was run." in text
    assert report.title(content).endswith(
        "2 published claims, re-run on small models whose world is known"
    )


def test_each_claim_has_a_line_with_headline_effects_and_counts(shown):
    lines = cells(shown, "IMA-3")
    assert lines[1] == CLAIMS["IMA-3"].statement
    assert lines[2] == "holds"
    assert lines[3].startswith("0.25 (")
    assert lines[4:] == ["neighbouring token (survived)", "1 / 0 / 0", "the paper's method"]
    assert cells(shown, "IMA-1")[3].startswith("-0.3 to 0.3 (")
    assert cells(shown, "VLM-1")[2:6] == ["not measured", "", "", "0 / 0 / 0"]
    results = shown.find("table")
    lines = [row.td.get_text() for row in results("tr") if row.td]
    assert lines == list(CLAIMS)


def test_pooled_headlines_stand_by_model(monkeypatch):
    lines = {
        "IMA-1": {"pocket-gemma": {"headline": "holds", "runs": 3}},
        "SKIP-1": {
            "pocket-llava": {"headline": "cannot tell", "runs": 5},
            "pocket-gemma": {"headline": "does not hold", "runs": 4},
        },
    }
    monkeypatch.setattr(report, "pooled_headlines", lambda: lines)
    head, _, first, second, _, note = report.pooled().splitlines()
    assert head.endswith("| claim | SmolLM2, first connector | Gemma 3 270M |")
    assert first.startswith("| IMA-1 |") and first.endswith("|  | holds (3 runs) |")
    assert second.endswith("| cannot tell (5 runs) | does not hold (4 runs) |")
    assert "unofficial repackage" in note


def test_data_is_shown_as_it_is(shown):
    assert cells(shown, "IMA-1")[4] == AWKWARD
    assert shown.find("script") is None
    assert shown.find("img") is None
    assert all(link["href"].startswith("https://arxiv.org/abs/") for link in shown("a"))


@pytest.mark.parametrize("character", "\\`*_{}[]<>|#~$&!^")
def test_a_sign_of_markdown_is_no_markdown(character):
    shown = report.page(report.table(["a"], [[f"{character}b{character} c{character}"]]), "x")
    cell = BeautifulSoup(shown, "html.parser").find("td")
    assert cell.get_text() == f"{character}b{character} c{character}"
    assert cell.find() is None


def test_a_line_break_in_data_ends_no_line():
    assert report.plain("a\n# b\r\nc") == "a \\# b c"


def test_the_title_of_the_page_is_escaped():
    assert "<title>&lt;b&gt;</title>" in report.page("", "<b>")


def test_sections_and_references(shown, text):
    headings = [heading.get_text() for heading in shown("h2")]
    assert headings == [
        "Abstract",
        "Method",
        "Results",
        "Over samples, connectors and language models",
        "Limits",
        "Hardware and software",
        "References",
    ]
    assert "Mustafa Shukor, Matthieu Cord. Implicit Multimodal Alignment" in text
    assert DAY in text


def test_it_is_the_same_twice(ledger, text):
    assert report.markdown(ledger[1], DAY) == text


def test_without_chromium_there_is_markdown_and_a_page(ledger, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "browser", lambda: None)
    assert report.main(["--claims", str(ledger[0]), "--out", str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert "Chromium is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "no json", "{}"])
def test_what_is_no_ledger_is_refused(tmp_path, capsys, text):
    file = tmp_path / "claims.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    assert report.main(["--claims", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "is no ledger" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(report.browser() is None, reason="runs where Chromium is installed")
def test_the_pdf_has_pages_a_title_and_no_time(ledger, tmp_path):
    for name in "ab":
        assert report.main(["--claims", str(ledger[0]), "--out", str(tmp_path / name)]) == 0
    content = (tmp_path / "a" / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
    assert b"/Title (Inside vision-language models: 2 published claims" in content
    assert re.search(rb"/CreationDate \(D:0{14}", content)
    assert content == (tmp_path / "b" / "report.pdf").read_bytes()
