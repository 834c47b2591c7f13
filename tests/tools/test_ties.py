"""A sentence that the run does not bear out stops the build of its page."""

import pytest

from tools import build, chapters, ties
from xlvlms_tutorial.claims import check, record
from xlvlms_tutorial.metrics.intervals import Estimate

RUN = {"model": "pocket-llava", "dataset": "scenes", "seeds": 0, "chapter": "page"}
CONFIRMED, REFUTED = Estimate(0.2, 0.1, 0.3, 40), Estimate(-0.2, -0.3, -0.1, 40)
TEXT = """# A page

Tokens of a modality lie closer than chance has it.
<!-- tied: IMA-1 | layer 3 | confirmed -->

Norms grow with depth. <!-- checked: norms grow -->

The paper keeps 97 %. <!-- from: abstract of arXiv 2410.09454 -->

In all, the claim holds. <!-- tied: IMA-1 headline | holds -->
"""


@pytest.fixture
def page(tmp_path):
    """A page whose sentences its records bear out."""
    folder = tmp_path / "claims"
    record("IMA-1", CONFIRMED, folder=folder, variant="layer 3", against="chance", **RUN)
    check("norms grow", True, folder=folder, **RUN)
    file = tmp_path / "page.md"
    file.write_text(TEXT, encoding="utf-8")
    (tmp_path / "README.md").write_text("No outcome.\n", encoding="utf-8")
    return file


def problems(page):
    return ties.problems([page], page.parent / "claims")


def test_what_the_records_bear_out_is_no_problem(page):
    assert problems(page) == []
    assert [tie.kind for tie in ties.ties(page)] == ["tied", "checked", "from", "tied"]
    assert [tie.line for tie in ties.ties(page)] == [4, 6, 8, 10]


def test_a_flipped_verdict_stops_the_build_of_the_page(page, monkeypatch, capsys):
    folder = page.parent / "claims"
    started = []
    monkeypatch.setattr(build, "CLAIMS", folder)
    monkeypatch.setattr(build, "BUILD", page.parent)
    monkeypatch.setattr(build, "ROOT", page.parent)
    monkeypatch.setattr(build, "pages", lambda: ["page"])
    for name in ("fetch", "refresh_cache"):
        monkeypatch.setattr(build, name, lambda: [])
    monkeypatch.setattr(build, "notebooks", lambda: [page])
    monkeypatch.setattr(build, "fill", lambda notebooks: [])
    monkeypatch.setattr(build, "write_config", lambda offline: page)
    monkeypatch.setattr(build, "build_pages", lambda *arguments: started.append(1) or 7)
    assert build.main([]) == 7 and started == [1]  # the build itself was started
    record("IMA-1", REFUTED, folder=folder, variant="layer 3", against="chance", **RUN)
    assert build.main([]) == 1 and started == [1]
    said = capsys.readouterr().out
    assert "page:4: tied: IMA-1 | layer 3 | confirmed: the verdict is: refuted" in said
    assert "page:10: tied: IMA-1 headline | holds: the headline is: does not hold" in said


@pytest.mark.parametrize("name", ["README", "live"])
def test_the_readme_and_the_live_page_rest_on_what_any_page_recorded(page, name):
    readme = page.parent / f"{name}.md"
    readme.write_text(
        "It holds.\n<!-- tied: IMA-1 | layer 3 | confirmed -->\n<!-- checked: norms grow -->\n",
        encoding="utf-8",
    )
    assert problems(readme) == []
    check("norms grow", False, folder=page.parent / "claims", **RUN)
    assert problems(readme) == [f"{name}:3: checked: norms grow: does not hold in this run"]


def test_a_relation_that_does_not_hold_is_named(page):
    check("norms grow", False, folder=page.parent / "claims", **RUN)
    assert problems(page) == ["page:6: checked: norms grow: does not hold in this run"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("| layer 3 |", "| layer 4 |", "recorded no such measurement"),
        ("tied: IMA-1 |", "tied: IMA-2 |", "recorded no such measurement"),
        ("| confirmed -->", "-->", "write: ID"),
        ("| confirmed -->", "| holds -->", "write: ID"),
        ("IMA-1 headline", "IMA-99 headline", "no claim IMA-99"),
        ("| holds -->", "| confirmed -->", "write: ID headline"),
        ("checked: norms grow", "checked: norms shrink", "checked no such statement"),
        ("from: abstract of arXiv 2410.09454", "from:", "no source"),
    ],
)
def test_a_tie_to_nothing_is_named(page, old, new, problem):
    page.write_text(TEXT.replace(old, new), encoding="utf-8")
    found = problems(page)
    assert len([line for line in found if problem in line]) == 1, found


def test_records_of_other_pages_and_of_a_readers_models_do_not_count(page):
    folder = page.parent / "claims"
    for change in ({"chapter": "other"}, {"model": "a-lab/a-model"}):
        names = RUN | change
        record("IMA-1", REFUTED, folder=folder, variant="layer 3", against="chance", **names)
        check("norms grow", False, folder=folder, **names)
    assert [line for line in problems(page) if "headline" not in line] == []


def test_a_claim_that_is_recorded_needs_a_sentence(page):
    record("IMA-2", CONFIRMED, folder=page.parent / "claims", against="chance", **RUN)
    assert problems(page) == ["page: IMA-2 is recorded, and no sentence is tied to it"]
    (page.parent / "api").mkdir()
    page = page.rename(page.parent / "api" / "page.md")  # of a package of the same name
    assert ties.problems([page], page.parents[1] / "claims") == []


UNTIED = """---
kernelspec: 1.5
---

# Confirmed in 5 %

It is confirmed.

It is 0.5 of all,
and more. <!-- checked: half -->

Layer 3 of `0.5` is {math}`0.5`, [see](v1.2.html), as in arXiv 2405.16700.

```{code-cell}
share = 0.5
```

Two in three, or 67 %.

## On a real model

It takes 14.5 GB.
"""


def test_paragraphs_that_state_an_outcome_and_carry_no_tie_are_listed(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(UNTIED, encoding="utf-8")
    assert [line.split(": ")[0] for line in ties.untied(file)] == ["page:7", "page:18"]


@pytest.mark.parametrize("page", chapters.chapters(), ids=lambda page: page.stem)
def test_every_paragraph_of_a_chapter_that_states_an_outcome_is_tied(page):
    assert ties.untied(page) == []


def test_a_page_of_the_api_with_the_name_of_a_chapter_needs_no_ties(page, tmp_path):
    api = tmp_path / "api"
    api.mkdir()
    (api / "page.md").write_text("# Functions\n", encoding="utf-8")
    assert ties.problems([api / "page.md"], tmp_path / "claims") == []
    bare = tmp_path / "other" / "page.md"
    bare.parent.mkdir()
    bare.write_text("# A page\n", encoding="utf-8")
    [problem] = ties.problems([bare], tmp_path / "claims")
    assert "IMA-1 is recorded" in problem
