"""What pooled runs say beside a build: headlines by model, what differs, where models disagree."""

import pytest
from bs4 import BeautifulSoup

from tests.support.runs import run
from xlvlms_tutorial.claims import agreement, merge, pool, pooled_table, read_runs
from xlvlms_tutorial.claims.pooled_ledger import (
    MIN_RUNS,
    entry_table,
    pooled_headlines,
    runs_listed,
    what_differs,
)

SECOND = {"model": "pocket-llava-seed1"}


def runs(value, count=MIN_RUNS, **changes):
    records = []
    for seed in range(count):
        records.append(run(value + 0.01 * seed, seed, **changes))
    return records


def test_headlines_are_by_model_and_need_three_runs():
    entries = pool([*runs(0.3), *runs(-0.4, **SECOND), *runs(0.3, 2, model="pocket-gemma")])
    by_model = pooled_headlines(entries)["IMA-1"]
    shown = {model: (line["headline"], line["runs"]) for model, line in by_model.items()}
    assert shown == {"pocket-llava": ("holds", 3), "pocket-llava-seed1": ("does not hold", 3)}


def test_a_measurement_of_one_run_does_not_count():
    entries = pool([*runs(0.3), run(-0.4, variant="w")])
    assert pooled_headlines(entries)["IMA-1"]["pocket-llava"]["measurements"] == 1


def test_agreement_tells_sides_verdicts_and_contradictions():
    records = [
        *runs(0.3),
        *runs(0.35, **SECOND),
        *runs(0.3, variant="apart"),
        *runs(-0.4, variant="apart", **SECOND),
        *runs(0.3, variant="open"),
        *runs(0.02, variant="open", **SECOND),
        *runs(0.3, variant="of one model"),
    ]
    table = agreement(pool(records)).set_index("setting")
    assert set(table.index) == {"v", "apart", "open"}
    assert list(table["same side"]) == [False, True, True]
    assert list(table["same verdict"]) == [False, False, True]
    assert list(table["contradict"]) == [True, False, False]
    assert set(table["models"]) == {2}


def test_the_table_shows_this_build_beside_each_model_and_escapes():
    records = [*runs(0.3), *runs(-0.4, **SECOND), *runs(0.3, **{"model": "<i>mine</i>"})]
    build = merge("no/such/folder", more=[run(0.3)])
    page = BeautifulSoup(str(pooled_table(build, pool(records))), "html.parser")
    head, row = page.find_all("tr")
    assert [cell.text for cell in head.find_all("th")] == [
        "claim",
        "what is claimed",
        "this build",
        "SmolLM2, first connector",
        "SmolLM2, second connector",
        "<i>mine</i>",
        "what differs",
    ]
    texts = [cell.text.strip() for cell in row.find_all("td")]
    assert texts[0] == "IMA-1" and texts[-1] == "SmolLM2, second connector"
    assert "holds" in texts[2] and "3 runs, 1 / 0 / 0" in texts[3]
    assert "does not hold" in texts[4] and "3 runs, 0 / 0 / 1" in texts[4]


def test_a_claim_that_a_model_has_no_runs_of_says_so():
    records = [*runs(0.3), *runs(0.3, **SECOND, id="IMA-2")]
    html = str(pooled_table(merge("no/such/folder"), pool(records)))
    assert html.count("not run") == 2


def test_nothing_differs_from_a_build_that_has_not_measured():
    by_model = {"pocket-llava": {"headline": "holds"}}
    assert what_differs({"headline": "not measured"}, by_model) == ""
    assert what_differs({"headline": "holds"}, by_model) == ""
    assert what_differs({"headline": "cannot tell"}, by_model) == "SmolLM2, first connector"


def test_a_table_of_entries_has_the_spread_or_what_would_decide():
    records = [run(value, seed) for seed, value in enumerate((0.0, 0.05, 0.1))]
    entries = pool([*records, *runs(0.3, variant="w")])
    spread = entry_table(entries)
    assert list(spread["verdict"]) == ["undecided", "confirmed"]
    assert list(spread["I²"]) == ["0%", "0%"]
    power = entry_table(entries, power=True)
    needed = entries[0]["needed_runs"]
    assert list(power["runs needed"]) == [str(needed), "-"]
    assert list(power["samples needed"]) == [str(50 * needed), "-"]
    assert entry_table([]).empty and list(entry_table([]).columns) == list(spread.columns)


def test_the_runs_of_the_package_are_listed_from_their_records():
    records = read_runs()
    table = runs_listed()
    assert set(table.index) == {record["chapter"] for record in records}
    seeds = {int(seed) for cell in table.to_numpy().ravel() for seed in cell.split(", ") if seed}
    assert seeds == {seed for record in records for seed in record["seeds"]}


def test_the_package_compares_connectors():
    table = agreement()
    assert len(table)
    assert not (table["contradict"] & table["same side"]).any()
    assert not (table["contradict"] & table["same verdict"]).any()


@pytest.mark.parametrize("name", ["READ-1", "COX-6"])
def test_claims_of_the_package_are_pooled_on_three_connectors(name):
    assert len(pooled_headlines()[name]) >= 3
