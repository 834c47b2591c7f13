"""The tables of the ledger have every row and column of it, and each column is explained."""

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest

from xlvlms_tutorial.claims import (
    data_dictionary,
    ledger_tables,
    merge,
    record,
    write_claims,
    write_tables,
)
from xlvlms_tutorial.claims.headlines import SCHEMA
from xlvlms_tutorial.claims.tables import COLUMNS, KEYS, TYPES
from xlvlms_tutorial.errors import FileError
from xlvlms_tutorial.io import read_json
from xlvlms_tutorial.metrics import Estimate

AWKWARD = 'a "b", c; <i>d</i>\n=1+1 | é'
JSON_TYPES = {
    "text": {"string"},
    "number": {"number"},
    "integer": {"integer"},
    "truth value": {"boolean"},
    "list of integers": {"array"},
    "list of texts": {"array"},
    "JSON": {"object", "array"},
}


@pytest.fixture
def content(tmp_path):
    run = {"model": "pocket-llava", "dataset": "scenes", "seeds": [0, 2], "folder": tmp_path}
    record("IMA-1", Estimate(1 / 3, 0.1, 0.5, 20), against=AWKWARD, **run)
    record("IMA-1", Estimate(-0.2, -0.3, -0.1, 20), against="chance", variant="b", **run)
    return write_claims(merge(tmp_path), tmp_path / "claims.json")


def measured(frame):
    return frame[frame["id"] == "IMA-1"].sort_values("value", ascending=False)


@pytest.mark.parametrize("table", COLUMNS)
def test_every_column_of_the_schema_is_explained_in_its_type(table):
    rules = read_json(SCHEMA)["properties"][KEYS[table]]["items"]
    columns = {column.name: column for column in COLUMNS[table]}
    assert set(columns) == set(rules["properties"]) == set(rules["required"])
    assert len(columns) == len(COLUMNS[table])
    for name, rule in rules["properties"].items():
        column = columns[name]
        assert column.type in TYPES
        assert column.meaning.endswith(".") and len(column.meaning) > 10
        if "type" in rule:
            stated = {rule["type"]} if isinstance(rule["type"], str) else set(rule["type"])
            assert stated - {"null"} <= JSON_TYPES[column.type], name
        else:
            assert column.type == "text"  # an enumeration


def test_numbers_have_a_unit():
    dictionary = data_dictionary()
    numbers = dictionary[dictionary["type"].isin(["number", "integer"])]
    assert (numbers["unit"] != "").all()


def test_allowed_values_are_those_of_the_schema():
    rows = data_dictionary().set_index(["table", "column"])["values"]
    assert rows[("ledger", "choice")] == "fixed; validation; least favourable"
    assert rows[("headlines", "scales")].split("; ")[0] == "pocket"
    assert rows[("ledger", "statement")] == ""


def test_csv_and_parquet_hold_what_the_ledger_holds(content, tmp_path):
    files = {file.name: file for file in write_tables(content, tmp_path / "out")}
    table = pq.read_table(files["ledger.parquet"])
    rows = table.to_pylist()
    assert len(rows) == len(content["measurements"])
    for row, entry in zip(rows, content["measurements"], strict=True):
        versions = row.pop("versions")
        expected = dict(entry)
        assert (versions and json.loads(versions)) == expected.pop("versions")
        assert row == expected
    frame = pd.read_csv(files["ledger.csv"])
    assert list(frame.columns) == table.column_names
    first = measured(frame).iloc[0]
    assert (first["value"], first["against"]) == (1 / 3, AWKWARD)
    assert json.loads(first["seeds"]) == [0, 2]
    assert '"[0, 2]"' in files["ledger.csv"].read_text(encoding="utf-8")
    assert ',20,"[0, 2]"' in files["ledger.csv"].read_text(encoding="utf-8")  # no 20.0
    headlines = pd.read_csv(files["headlines.csv"])
    assert list(headlines["headline"]) == [line["headline"] for line in content["headlines"]]
    assert len(pd.read_csv(files["dictionary.csv"])) == sum(map(len, COLUMNS.values()))


def test_columns_of_parquet_carry_their_meaning(content, tmp_path):
    write_tables(content, tmp_path)
    field = pq.read_schema(tmp_path / "ledger.parquet").field("n")
    assert field.metadata == {
        b"description": b"How many observations the interval rests on.",
        b"unit": b"count",
    }


def test_writing_twice_gives_the_same_bytes(content, tmp_path):
    first, second = (write_tables(content, tmp_path / name) for name in "ab")
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]


def test_a_column_that_nobody_explained_is_refused(content):
    content["measurements"][0]["mood"] = "good"
    with pytest.raises(FileError, match=r"mood.*explain each in claims/tables.py"):
        ledger_tables(content)


def test_a_column_that_is_missing_is_refused(content):
    del content["headlines"][0]["effect"]
    with pytest.raises(FileError, match="only in the dictionary: effect"):
        ledger_tables(content)


@pytest.mark.parametrize("content", [{}, {"measurements": 3, "headlines": []}])
def test_what_is_no_ledger_is_refused(content):
    with pytest.raises(FileError, match="not what write_claims writes"):
        ledger_tables(content)
