"""Write the ledger as tables, csv and parquet, with a dictionary of their columns.

:data:`COLUMNS` is the one place where a column is explained: the tables, their dictionary and the
descriptions of an archive all come from it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from xlvlms_tutorial.claims.headlines import SCHEMA
from xlvlms_tutorial.errors import damaged_record
from xlvlms_tutorial.io import read_json, reading, write_atomically, write_utf8

FORMATS = ("csv", "parquet")
TYPES = {
    "text": pa.string(),
    "number": pa.float64(),
    "integer": pa.int64(),
    "truth value": pa.bool_(),
    "list of integers": pa.list_(pa.int64()),
    "list of texts": pa.list_(pa.string()),
    "JSON": pa.string(),
}


class Column(NamedTuple):
    """A column: its name, type (one of :data:`TYPES`), what it means, and its unit."""

    name: str
    type: str
    meaning: str
    unit: str = ""


_OF_EFFECT = "as effect"  # the column of that name says which
# By table, and there in the order of the columns.
COLUMNS = {
    "ledger": (
        Column("id", "text", "The id of the claim; it stays for ever."),
        Column("part", "text", "The part of the book."),
        Column("paper", "text", "The paper or papers that made the claim, by arXiv number."),
        Column("where", "text", "The place in the paper."),
        Column("statement", "text", "The claim in our words."),
        Column("metric", "text", "The effect that is measured, its baseline subtracted."),
        Column(
            "direction",
            "text",
            "greater: the effect is above null - margin; less: below null + margin; "
            "equal: within null ± margin.",
        ),
        Column("null", "number", "The constant that the effect is compared with.", _OF_EFFECT),
        Column("rival", "text", "The baseline that the claim names; against has that of the row."),
        Column("margin", "number", "What about or little is taken to mean; ours.", _OF_EFFECT),
        Column("fidelity", "text", "How near the measurement comes to what the paper did."),
        Column("reason", "text", "Why the fidelity is what it is."),
        Column("about", "text", "Whether the claim speaks of models or of pictures."),
        Column(
            "effect",
            "text",
            "The kind of number. share, correlation and cosine: a number without unit, at most 1 "
            "in size, or a difference of two; score: points of a metric whose best value is 1, "
            "or a difference; nats: natural units of information; ratio: a quotient.",
        ),
        Column("verdict", "text", "What this measurement says by itself, before any correction."),
        Column("value", "number", "The measured effect; empty where not measured.", _OF_EFFECT),
        Column("low", "number", "The lower end of the 95 % interval.", _OF_EFFECT),
        Column("high", "number", "The upper end of the 95 % interval.", _OF_EFFECT),
        Column("n", "integer", "How many observations the interval rests on.", "count"),
        Column("seeds", "list of integers", "The seeds behind the measurement."),
        Column("model", "text", "The model, as load() takes it."),
        Column("dataset", "text", "The data, as load_samples() takes it."),
        Column("chapter", "text", "The page that measured."),
        Column("variant", "text", "The layer, task or setting that tells measurements apart."),
        Column("against", "text", "What the effect was measured against in this row."),
        Column(
            "interval_over",
            "text",
            "What was drawn again for the interval; random orders is no interval of the value, "
            "but the range that chance alone reaches.",
        ),
        Column("choice", "text", "How a layer or a setting was picked."),
        Column("scale", "text", "The kind of model: pocket and second are small ones made here."),
        Column("versions", "JSON", "The versions of Python and packages, an object by name."),
        Column(
            "between_machines",
            "truth value",
            "Whether a processor of another kind would give another verdict.",
        ),
    ),
    "headlines": (
        Column("id", "text", "The id of the claim, as in the ledger."),
        Column("part", "text", "The part of the book."),
        Column("statement", "text", "The claim in our words."),
        Column(
            "headline",
            "text",
            "What all measurements say together, after Holm's correction within the claim.",
        ),
        Column("fidelity", "text", "How near the measurement comes to what the paper did."),
        Column("reason", "text", "Why the fidelity is what it is."),
        Column("strongest_rival", "text", "The baseline against which the claim does worst."),
        Column("survived", "truth value", "Whether the claim holds against the strongest rival."),
        Column("rivals", "JSON", "A list of objects: a baseline, its headline and its rows."),
        Column("effect", "text", "The size of the effect in words."),
        Column("scales", "list of texts", "The kinds of models that were measured."),
        Column("about", "text", "Whether the claim speaks of models or of pictures."),
        Column("interval_over", "list of texts", "What was drawn again for the intervals."),
        Column(
            "connectors_varied",
            "truth value",
            "Whether an interval is over models rather than over inputs of one.",
        ),
        Column("measurements", "integer", "How many rows of the ledger are measured.", "count"),
        Column("confirmed", "integer", "Rows that confirm, after the correction.", "count"),
        Column("refuted", "integer", "Rows that refute, after the correction.", "count"),
        Column("undecided", "integer", "All other measured rows.", "count"),
        Column("seeds", "integer", "How many different seeds.", "count"),
    ),
}
# The key of claims.json whose rows a table holds.
KEYS = {"ledger": "measurements", "headlines": "headlines"}


def data_dictionary() -> pd.DataFrame:
    """Explain every column of the exported tables.

    Use it to read a downloaded ledger; it is also written beside the tables.

    Returns
    -------
    pandas.DataFrame
        A row for each column of each table: table, column, type, unit (empty where there is none),
        values (those allowed, divided by "; "; empty where any is) and meaning.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import data_dictionary
    >>> rows = data_dictionary().set_index(["table", "column"])
    >>> rows.loc[("ledger", "low"), "meaning"]
    'The lower end of the 95 % interval.'
    """
    schema = read_json(SCHEMA)["properties"]
    rows = []
    for table, columns in COLUMNS.items():
        properties = schema[KEYS[table]]["items"]["properties"]
        for column in columns:
            rows.append(
                {
                    "table": table,
                    "column": column.name,
                    "type": column.type,
                    "unit": column.unit,
                    "values": _allowed(properties.get(column.name, {})),
                    "meaning": column.meaning,
                }
            )
    return pd.DataFrame(rows)


def _allowed(rule: Mapping[str, object]) -> str:
    """List the values that a rule of the schema allows, divided by semicolons."""
    values = rule.get("enum", rule.get("items", {}).get("enum", ()))
    return "; ".join(value for value in values if value is not None)


def ledger_tables(content: Mapping[str, object]) -> dict[str, pa.Table]:
    """Turn the ledger for machines into tables.

    Use it for an analysis of your own; ``table.to_pandas()`` gives a data frame.

    Parameters
    ----------
    content : mapping
        What :func:`write_claims` writes and returns.

    Returns
    -------
    dict of str to pyarrow.Table
        "ledger", a row for each measurement (and one for each claim without any), and "headlines",
        a row for each claim. Each column carries its meaning and unit as metadata.

    Raises
    ------
    FileError
        If the content is no ledger, or has a column that the dictionary does not explain, or lacks
        one that it does.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.claims import ledger_tables, merge, write_claims
    >>> with TemporaryDirectory() as folder:
    ...     content = write_claims(merge(folder), f"{folder}/claims.json")
    >>> tables = ledger_tables(content)
    >>> list(tables), tables["ledger"].column_names[:2]
    (['ledger', 'headlines'], ['id', 'part'])
    """
    tables = {}
    for table, columns in COLUMNS.items():
        with reading("ledger", "not what write_claims writes"):
            rows = content[KEYS[table]]
            _require_explained(rows, columns, table)
            arrays = [_array(rows, column) for column in columns]
        tables[table] = pa.Table.from_arrays(arrays, schema=pa.schema(map(_field, columns)))
    return tables


def _require_explained(
    rows: Sequence[Mapping[str, object]], columns: Sequence[Column], table: str
) -> None:
    expected = {column.name for column in columns}
    for row in rows:
        if row.keys() != expected:
            differing = ", ".join(sorted(row.keys() ^ expected))
            raise damaged_record(
                f"table {table}",
                f"these columns are only in the rows or only in the dictionary: {differing}; "
                "explain each in claims/tables.py",
            )


def _array(rows: Sequence[Mapping[str, object]], column: Column) -> pa.Array:
    values = [row[column.name] for row in rows]
    if column.type == "JSON":
        values = [None if value is None else _as_text(value) for value in values]
    return pa.array(values, TYPES[column.type])


def _as_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _field(column: Column) -> pa.Field:
    notes = {"description": column.meaning, "unit": column.unit}
    return pa.field(column.name, TYPES[column.type], metadata=notes)


def write_tables(content: Mapping[str, object], folder: str | Path) -> list[Path]:
    """Write the ledger and its headlines as csv and parquet, with the data dictionary.

    Use it to hand a ledger on. In csv, lists and objects are JSON text and an empty field is a
    missing value; parquet keeps lists.

    Parameters
    ----------
    content : mapping
        What :func:`write_claims` writes and returns.
    folder : path
        Where the files go; it is made where it is missing.

    Returns
    -------
    list of Path
        ledger.csv, ledger.parquet, headlines.csv, headlines.parquet and dictionary.csv.

    Raises
    ------
    FileError
        If the content is no ledger whose columns the dictionary explains, or a file cannot be
        written.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.claims import merge, write_claims, write_tables
    >>> with TemporaryDirectory() as folder:
    ...     content = write_claims(merge(folder), f"{folder}/claims.json")
    ...     files = write_tables(content, folder)
    >>> [file.name for file in files][::2]
    ['ledger.csv', 'headlines.csv', 'dictionary.csv']
    """
    folder = Path(folder)
    files = []
    for name, table in ledger_tables(content).items():
        files.append(write_utf8(folder / f"{name}.csv", _csv(table, COLUMNS[name])))
        files.append(
            write_atomically(
                folder / f"{name}.parquet", lambda draft, table=table: pq.write_table(table, draft)
            )
        )
    dictionary = data_dictionary().to_csv(index=False, lineterminator="\n")
    files.append(write_utf8(folder / "dictionary.csv", dictionary))
    return files


def _csv(table: pa.Table, columns: Sequence[Column]) -> str:
    frame = pd.DataFrame(index=range(table.num_rows))
    for column in columns:
        values = table[column.name].to_pylist()
        if column.type.startswith("list"):
            values = [None if value is None else _as_text(value) for value in values]
        # of objects, so that integers with gaps stay integers
        frame[column.name] = pd.Series(values, dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")
