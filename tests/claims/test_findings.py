"""A finding is shown as such only while every record and check that it rests on says so."""

import sys

import pytest

from tools import ROOT, ties
from xlvlms_tutorial.claims import check, findings, findings_table, merge, read_checks, record
from xlvlms_tutorial.claims.findings import NOT_HERE, read_findings
from xlvlms_tutorial.errors import FileError
from xlvlms_tutorial.metrics.intervals import Estimate

RUN = {"model": "pocket-llava", "dataset": "scenes", "seeds": 0}
SENTENCE = "Modalities <keep> apart."
TEXT = f"""
findings:
  - sentence: {SENTENCE}
    link: alignment
    rests_on:
      - {{claim: IMA-1, chapter: alignment, variant: layer 3, verdict: confirmed}}
      - {{checked: norms grow, chapter: inside}}
surprises: []
"""
ABOVE, BELOW = Estimate(0.3, 0.2, 0.4, 20), Estimate(-0.3, -0.4, -0.2, 20)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "findings.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "claims"


def measure(folder, estimate=ABOVE, model="pocket-llava", **other):
    run = RUN | {"model": model, "chapter": "alignment", "variant": "layer 3"} | other
    return record("IMA-1", estimate, against="shuffled labels", folder=folder, **run)


def results(folder, file):
    return findings(merge(folder), read_checks(folder), file)


def test_a_finding_holds_with_its_record_and_its_check(folder, file):
    measure(folder)
    check("norms grow", True, folder=folder, **RUN, chapter="inside")
    [result] = results(folder, file)
    assert result["holds"] and result["problem"] is None
    assert result["kind"] == "findings" and result["link"] == "alignment"
    [one] = result["measured"]
    numbers = (one["value"], one["low"], one["high"], one["against"], one["headline"])
    assert numbers == (0.3, 0.2, 0.4, "shuffled labels", "holds")
    table = str(findings_table([result], link="there/{}.html"))
    assert "Modalities &lt;keep&gt; apart." in table and 'href="there/alignment.html"' in table
    assert "✓ confirmed" in table and "headline: holds" in table and "pocket" in table
    assert NOT_HERE not in table


def test_another_verdict_takes_the_finding_down(folder, file):
    measure(folder, BELOW)
    check("norms grow", True, folder=folder, **RUN, chapter="inside")
    [result] = results(folder, file)
    assert not result["holds"]
    assert result["problem"].endswith("is refuted, the sentence assumes confirmed")
    assert "IMA-1 (alignment, layer 3)" in result["problem"]
    table = str(findings_table([result]))
    assert NOT_HERE in table and "✗ refuted" in table


@pytest.mark.parametrize(
    "other",
    [
        {"variant": "layer 4"},
        {"chapter": "inside"},
        {"model": "./mine"},
        {"model": "llava-hf/llava-1.5-7b-hf"},
    ],
    ids=str,
)
def test_a_record_that_is_missing_takes_the_finding_down(folder, file, other):
    measure(folder, **other)
    check("norms grow", True, folder=folder, **RUN, chapter="inside")
    [result] = results(folder, file)
    assert result["problem"] == "IMA-1 (alignment, layer 3) is not recorded"
    assert result["measured"] == []


@pytest.mark.parametrize(
    ("holds", "chapter", "problem"),
    [(False, "inside", "not so in inside: "), (True, "alignment", "inside did not check: ")],
)
def test_a_check_that_fails_or_is_missing_takes_the_finding_down(
    folder, file, holds, chapter, problem
):
    measure(folder)
    check("norms grow", holds, folder=folder, **RUN, chapter=chapter)
    [result] = results(folder, file)
    assert result["problem"] == f"{problem}norms grow"


def test_every_problem_is_named(folder, file):
    [result] = results(folder, file)
    assert "is not recorded; inside did not check" in result["problem"]


def test_two_records_of_one_name_must_agree(folder, file):
    check("norms grow", True, folder=folder, **RUN, chapter="inside")
    measure(folder)
    measure(folder, BELOW, dataset="composition")
    [result] = results(folder, file)
    assert "is confirmed, refuted, the sentence" in result["problem"]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("IMA-1", "IMA-99", "no claim IMA-99"),
        ("verdict: confirmed", "verdict: sure", "verdict is 'sure'"),
        ("link: alignment", "link:", "a text is missing"),
        ("chapter: inside", "page: inside", "rests_on has checked, page"),
        ("surprises: []", "", "the keys are findings"),
        ("    link: alignment\n", "", "fields are sentence, rests_on"),
        ("surprises: []", "findings: []", "twice"),
    ],
    ids=str,
)
def test_a_file_that_is_no_list_of_findings_is_refused(folder, file, old, new, named):
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(FileError, match=named):
        results(folder, file)


def test_a_finding_that_rests_on_nothing_is_refused(folder, file):
    file.write_text("findings:\n  - {sentence: a, link: b, rests_on: []}\nsurprises: []\n")
    with pytest.raises(FileError, match="entry 1.*rests_on is empty"):
        results(folder, file)


def test_a_file_that_is_not_there_is_refused(folder, tmp_path):
    with pytest.raises(FileError, match="gone.yaml"):
        results(folder, tmp_path / "gone.yaml")


def test_the_findings_of_the_book_are_as_many_as_pages_say_and_rest_on_pages_of_the_book():
    read = read_findings()
    assert [finding.kind for finding in read].count("findings") == 21
    for page in ("reference/findings", "start", "welcome"):
        text = (ROOT / f"book/{page}.md").read_text(encoding="utf-8")
        assert "twenty-one" in text.lower()
    sentences = [finding.sentence for finding in read]
    assert len(set(sentences)) == len(sentences)
    stems = {page.name for page in ties.pages()}
    for finding in read:
        assert finding.link.rpartition("/")[2] in stems
        for ground in finding.rests_on:
            assert ground["chapter"] in stems


def test_a_flipped_verdict_stops_the_build(folder, file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[read_findings.__module__], "FINDINGS", file)
    page = tmp_path / "findings.md"
    page.write_text("# Findings\n")
    check("norms grow", True, folder=folder, **RUN, chapter="inside")
    measure(folder)
    assert ties.problems([page], folder) == []
    measure(folder, BELOW)
    [problem] = ties.problems([page], folder)
    assert problem.startswith("findings, sentence 1: IMA-1") and "is refuted" in problem
