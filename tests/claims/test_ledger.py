"""The ledger shows every claim once, every measurement where its interval says, and nothing
that was not measured as a number.
"""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlms_tutorial.claims.claims import CLAIMS, merge, record
from xlvlms_tutorial.claims.ledger import (
    REACH,
    counts,
    distances,
    headline_table,
    ledger,
    overview,
)
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.intervals import Estimate

KEY = {
    "model": "pocket-llava",
    "dataset": "scenes",
    "seeds": 0,
    "chapter": "inside",
    "against": "<i>chance</i>",
}


def entries_of(folder, **measured):
    for name, (value, low, high) in measured.items():
        record(
            name.replace("_", "-"),
            Estimate(value, low, high, 20),
            folder=folder,
            variant="<b>deep</b>",
            **KEY,
        )
    return merge(folder)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CLAIMS)), st.floats(-2, 2), st.floats(0.01, 1), st.floats(0, 1))
def test_the_side_of_zero_is_the_verdict(tmp_path_factory, name, value, width, part):
    folder = tmp_path_factory.mktemp("claims")
    record(
        name,
        Estimate(value, value - width * part, value + width * (1 - part) + 1e-6, 20),
        folder=folder,
        **KEY,
    )
    [row] = distances(merge(folder)).to_dict("records")
    side = "undecided"
    if row["low"] > 0:
        side = "confirmed"
    elif row["high"] <= 0:
        side = "refuted"
    assert side == row["verdict"]
    assert row["low"] <= row["value"] <= row["high"]


def test_an_interval_of_no_width_lies_beyond_every_axis(tmp_path):
    table = distances(entries_of(tmp_path, IMA_1=(0.2, 0.2, 0.2), IMA_9=(0.2, 0.2, 0.2))).set_index(
        "id"
    )
    assert table.loc["IMA-1", "value"] == np.inf
    assert table.loc["IMA-9", "value"] == -np.inf  # claimed to be negative


def test_the_figure_has_a_row_for_each_claim_and_a_mark_for_each_measurement(tmp_path):
    ax = overview(
        entries_of(
            tmp_path, IMA_1=(0.3, 0.2, 0.4), IMA_5=(-9.0, -9.1, -8.9), VLM_1=(0.0, -0.1, 0.1)
        )
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == list(CLAIMS)
    marks = {line.get_label(): line.get_xdata() for line in ax.lines}
    assert marks["confirmed"] == pytest.approx([3.0])
    assert marks["refuted"] == [-REACH]
    assert marks["undecided"] == pytest.approx([0.0])
    assert sum(text.get_text() == "not measured" for text in ax.texts) == len(CLAIMS) - 3
    plt.close("all")


def test_without_a_measurement_the_figure_says_so_and_without_claims_there_is_none(tmp_path):
    ax = overview(merge(tmp_path))
    assert len(ax.texts) == len(CLAIMS)
    plt.close("all")
    with pytest.raises(InputError, match="without entries"):
        overview([])


def test_the_entries_name_every_claim_link_to_its_chapter_and_escape_what_was_written(tmp_path):
    page = BeautifulSoup(
        str(ledger(entries_of(tmp_path, IMA_1=(0.3, 0.2, 0.4)), link="../{}.html")), "html.parser"
    )
    assert [entry["id"] for entry in page.find_all("details")] == list(CLAIMS)
    measured, unmeasured = page.find(id="IMA-1"), page.find(id="IMA-2")
    assert measured.find("a")["href"] == "../inside.html"
    assert "0.3 [0.2, 0.4]" in measured.get_text()
    assert "<b>deep</b>" in measured.get_text()
    assert measured.find(class_="sign").get_text() == "✓ holds"
    assert "<i>chance</i>" in measured.get_text()
    assert measured.find("table").find(class_="sign").get_text() == "✓ confirmed"
    assert unmeasured.find(class_="not-measured").get_text() == "– not measured"
    assert unmeasured.find("table") is None


def test_counts_add_up_to_the_entries(tmp_path):
    entries = entries_of(tmp_path, IMA_1=(0.3, 0.2, 0.4), VLM_1=(-0.3, -0.4, -0.2))
    table = counts(entries)
    assert table.to_numpy().sum() == len(entries)
    assert table.loc["Start", "refuted"] == 1
    assert table.loc["I Alignment", "confirmed"] == 1


def test_the_table_of_headlines_has_a_line_for_each_claim_and_says_what_it_rests_on(
    tmp_path, monkeypatch
):
    other = replace(CLAIMS["SKIP-1"], fidelity="other question")
    monkeypatch.setitem(CLAIMS, "SKIP-1", other)
    entries = entries_of(tmp_path, IMA_1=(0.3, 0.2, 0.4), SKIP_1=(0.3, 0.2, 0.4))
    page = BeautifulSoup(str(headline_table(entries, link="#{}")), "html.parser")
    rows = {}
    for row in page.find_all("tr")[1:]:
        cells = [cell.get_text() for cell in row.find_all("td")]
        rows[cells[0]] = cells
    assert list(rows) == list(CLAIMS)
    assert page.find("a", string="IMA-1")["href"] == "#IMA-1"
    assert rows["IMA-1"][2:6] == [
        "✓ holds",
        "the paper's method",
        "yes: <i>chance</i>",
        "large, on the claimed side",
    ]
    # about models, and measured on pictures of one
    assert rows["IMA-1"][-2:] == ["pictures of one model", "1"]
    assert rows["SKIP-1"][2:4] == ["? cannot tell", "another question"]
    assert rows["IMA-2"][2] == "– not measured" and rows["IMA-2"][4] == ""


def test_a_verdict_that_the_correction_does_not_leave_standing_says_so(tmp_path):
    narrow = Estimate(0.5, 0.01, 0.99, 20)
    open_ones = Estimate(0.1, -0.2, 0.4, 20)
    for number in range(10):
        estimate = narrow if number == 0 else open_ones
        record("IMA-1", estimate, folder=tmp_path, variant=str(number), **KEY)
    page = BeautifulSoup(str(ledger(merge(tmp_path))), "html.parser")
    verdicts = {}
    for row in page.find(id="IMA-1").find_all("tr")[1:]:
        cells = row.find_all("td")
        verdicts[cells[2].get_text()] = cells[-1].get_text(" ", strip=True)
    assert verdicts["0"] == "✓ confirmed undecided after the correction"
    assert {verdicts[str(number)] for number in range(1, 10)} == {"? undecided"}


def test_a_measurement_says_what_it_was_measured_against_and_what_its_interval_is_over(tmp_path):
    how = KEY | {"interval_over": "seeds", "choice": "least favourable", "seeds": [0, 1, 2]}
    record("IMA-1", Estimate(0.3, 0.2, 0.4, 3), folder=tmp_path, variant="deep", **how)
    record(
        "IMA-10", Estimate(0.3, 0.2, 0.4, 3), folder=tmp_path, interval_over="random orders", **KEY
    )
    page = BeautifulSoup(str(ledger(merge(tmp_path))), "html.parser")
    rows = {}
    for name in ("IMA-1", "IMA-10"):
        head, row = page.find(id=name).find_all("tr")
        names = [cell.get_text() for cell in head.find_all("th")]
        cells = [cell.get_text() for cell in row.find_all("td")]
        rows[name] = dict(zip(names, cells, strict=True))
    assert rows["IMA-1"]["setting picked"] == "least favourable"
    assert rows["IMA-1"]["measured against"] == "<i>chance</i>"
    assert rows["IMA-1"]["interval over"] == "seeds"
    assert rows["IMA-1"]["seeds"] == "0, 1, 2"
    assert rows["IMA-10"]["interval over"] == "none: range of random orders"


def test_every_table_scrolls_in_a_box_that_the_keyboard_reaches(tmp_path):
    entries = entries_of(tmp_path, IMA_1=(0.3, 0.2, 0.4))
    for shown in (headline_table(entries), ledger(entries)):
        page = BeautifulSoup(str(shown), "html.parser")
        assert page.find("table")
        for table in page.find_all("table"):
            assert "scroll" in table.parent["class"]
            assert table.parent["tabindex"] == "0" and table.parent["aria-label"]


def test_every_word_of_a_verdict_or_headline_has_a_badge_of_its_own(tmp_path):
    entries = entries_of(
        tmp_path, IMA_1=(0.3, 0.2, 0.4), IMA_4=(-0.3, -0.4, -0.2), IMA_6=(0.0, -0.1, 0.1)
    )
    record("IMA-1", Estimate(0.0, -0.1, 0.1, 20), folder=tmp_path, variant="shallow", **KEY)
    page = BeautifulSoup(str(headline_table(merge(tmp_path))), "html.parser")
    kinds = {badge["class"][1] for badge in page.find_all(class_="sign")}
    assert kinds == {"holds-in-part", "does-not-hold", "cannot-tell", "not-measured"}
    for kind in (*kinds, "holds"):
        assert f".sign.{kind}" in page.find("style").get_text()
    assert len(entries) == len(CLAIMS)
