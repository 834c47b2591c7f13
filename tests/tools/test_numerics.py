"""Pages are executed under each setting once.

What differs is counted, and what moved is written where records find it.
"""

import json

import pytest

from tools import numerics
from xlvlms_tutorial.claims import spread

HEAD = "---\nkernelspec:\n  name: python3\n---\n\n# A page\n\n"
CODE = """
# NBVAL_CHECK_OUTPUT
import os
from xlvlms_tutorial.metrics.intervals import Estimate
from xlvlms_tutorial import claims
old = os.environ.get("ATEN_CPU_CAPABILITY") == "default"
low = -0.1 if old else 0.1
names = {"model": "m", "dataset": "d", "chapter": "one", "against": "chance"}
claims.record("IMA-1", Estimate(0.2, low, 0.3, 9), seeds=0, **names)
claims.check("it is above 0", low > 0, model="m", dataset="d", seeds=0, chapter="one")
print("took 1.2 s" if old else "took 3.4 s", low)
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page whose measurement depends on the processor."""
    monkeypatch.setattr(numerics, "FOLDER", tmp_path / "numerics")
    for setting in numerics.SETTINGS:
        (tmp_path / "numerics" / setting).mkdir(parents=True)
    file = tmp_path / "one.md"
    file.write_text(f"{HEAD}```{{code-cell}} ipython3\n{CODE.strip()}\n```\n", encoding="utf-8")
    return file


def write_result(folder, setting, low, text="0.2", verdict="confirmed"):
    """A result as `run` writes it."""
    entry = {
        "id": "IMA-1",
        "chapter": "one",
        "model": "m",
        "dataset": "d",
        "seeds": [0],
        "variant": "",
        "verdict": verdict,
    }
    entry |= {"value": 0.2, "low": low, "high": 0.3, "n": 9, "alone": [low, 0.3]}
    cells = [
        {"source": "", "seconds": 1.0, "checked": True, "text": [text]},
        {"source": "", "seconds": 1.0, "checked": False, "text": []},
    ]
    content = {"digest": "now", "seconds": 2.0, "error": None, "cells": cells, "claims": [entry]}
    content["checks"] = {"it is above 0": low > 0, "it is a number": True}
    (folder / "numerics" / setting / "one.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_page_is_executed_with_the_setting_in_its_environment(page, monkeypatch):
    monkeypatch.setattr(numerics.os, "environ", dict(numerics.os.environ))
    assert numerics.run(page, "sse41", "now").startswith("sse41 one:")
    [result] = numerics.results(page).values()
    assert result["claims"][0]["alone"] == [-0.1, 0.3]
    assert result["checks"] == {"it is above 0": False}
    assert result["cells"][0]["checked"] and result["cells"][0]["text"] == ["took TIME -0.1\n"]
    assert numerics.done(page, "sse41", "now")
    assert not numerics.done(page, "sse41", "other code")
    assert not numerics.done(page, "native", "now")


def test_a_page_that_fails_is_named_and_not_taken_as_done(page, monkeypatch):
    monkeypatch.setattr(numerics.os, "environ", dict(numerics.os.environ))
    page.write_text(page.read_text().replace("import os", "1 / 0"), encoding="utf-8")
    assert "ZeroDivisionError" in numerics.run(page, "native", "now")
    assert not numerics.done(page, "native", "now")
    assert numerics.results(page) == {}


def test_the_digest_follows_the_code_and_not_the_prose(page):
    before = numerics.digest(page)
    page.write_text(page.read_text() + "\nMore prose.\n", encoding="utf-8")
    assert numerics.digest(page) == before
    page.write_text(page.read_text().replace("0.3", "0.4"), encoding="utf-8")
    assert numerics.digest(page) != before


def test_cells_verdicts_and_digits_that_differ_are_counted(page, tmp_path):
    write_result(tmp_path, "native", 0.1)
    write_result(tmp_path, "avx2", 0.1)
    write_result(tmp_path, "sse41", -0.1, text="0.3")
    row = numerics.table([page]).loc["one"]
    assert (row["checked"], row["measured"]) == (1, 1)
    assert (row["avx2"], row["sse41"]) == ("0 / 0 / 0 / 0", "1 / 1 / 1 / 1")


def test_what_moved_is_written_in_the_form_that_records_are_joined_with(
    page, tmp_path, monkeypatch
):
    write_result(tmp_path, "native", 0.1)
    write_result(tmp_path, "avx2", 0.1)
    assert numerics.moved([page]) == {}
    write_result(tmp_path, "sse41", -0.1)
    [(name, several)] = numerics.moved([page]).items()
    assert [row["low"] for row in several] == [0.1, -0.1]
    monkeypatch.setattr(spread, "FILE", tmp_path / "spread.json")
    spread.FILE.write_text(json.dumps({name: several}), encoding="utf-8")
    key = {
        "id": "IMA-1",
        "chapter": "one",
        "model": "m",
        "dataset": "d",
        "seeds": [0],
        "variant": "",
    }
    assert [estimate.low for estimate in spread.of(key, spread.Estimate(0.2, 0.0, 0.3, 9))] == [
        0.1,
        -0.1,
    ]


def test_what_is_known_of_pages_that_were_not_executed_stays(page, tmp_path, monkeypatch):
    monkeypatch.setattr(spread, "FILE", tmp_path / "spread.json")
    earlier = {"IMA-1 | two | m | d | [0] | ": [{"value": 0.2, "low": 0.1, "high": 0.3, "n": 9}]}
    stale = {"IMA-1 | one | m | d | [0] | gone": earlier["IMA-1 | two | m | d | [0] | "]}
    spread.FILE.write_text(json.dumps(earlier | stale), encoding="utf-8")
    write_result(tmp_path, "native", 0.1)
    write_result(tmp_path, "avx2", -0.1)
    entries = numerics.moved([page, page.with_name("two.md")])
    assert list(entries) == ["IMA-1 | one | m | d | [0] | ", "IMA-1 | two | m | d | [0] | "]
    assert entries["IMA-1 | two | m | d | [0] | "] == earlier["IMA-1 | two | m | d | [0] | "]
