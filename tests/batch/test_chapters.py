"""Parameters are read from a chapter's own cell, and what does not
fit is refused with what would.
"""

import datetime
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from tests.support.toy_chapter import PARAMETERS, toy_chapter
from xlvlms_tutorial.batch.chapters import (
    Expression,
    book_folder,
    checked,
    code_of,
    defaults,
    find_chapter,
    read_chapter,
)
from xlvlms_tutorial.batch.spelling import read_yaml
from xlvlms_tutorial.errors import InputError

BOOK = sorted(
    page.stem
    for page in book_folder().glob("*.md")
    if "[parameters]" in page.read_text(encoding="utf-8")
)


@pytest.fixture
def toy_defaults(tmp_path):
    return defaults(read_chapter(toy_chapter(tmp_path)))


def test_the_defaults_are_those_of_the_cell(toy_defaults):
    ran: dict = {}
    exec(PARAMETERS, ran)
    assert toy_defaults == {name: ran[name] for name in toy_defaults} | {
        "wide": [2, 4, 6],
        "computed": "2 * 3",
    }
    assert (
        list(toy_defaults)[:4] == ["model", "dataset", "n_samples", "seed"]
        and len(toy_defaults) == 11
    )
    assert isinstance(toy_defaults["computed"], Expression)


@pytest.mark.parametrize("name", BOOK)
def test_every_chapter_of_the_book_has_readable_parameters(name):
    chapter_defaults = defaults(read_chapter(find_chapter(name)))
    assert list(chapter_defaults)[:4] == ["model", "dataset", "n_samples", "seed"]
    parameters = {"model": "a/b", "dataset": "coco", "n_samples": 3, "seed": 1}
    assert checked(name, chapter_defaults, parameters)["n_samples"] == 3
    plain = {
        key: value for key, value in chapter_defaults.items() if not isinstance(value, Expression)
    }
    assert (
        checked(name, chapter_defaults, plain).keys() == plain.keys()
    )  # every default fits itself
    with pytest.raises(InputError, match="did you mean 'n_samples'"):
        checked(name, chapter_defaults, {"n_sample": 3})


@pytest.mark.parametrize(
    ("parameter", "accepted", "wrong"),
    [
        ("model", ["a/b"], [3, None, True, ["a"]]),
        ("n_samples", [8, 0], [0.5, "8", True, None, [8]]),
        ("effect", [0.25, 1], ["1", True, math.nan, math.inf, None]),
        ("layers", [[3], [1, 2, 3], []], [3, "3", [0.5], ["a"], [True], {"a": 1}]),
        ("names", [{"x": "y"}, {}], [[], "a", {"x": 1}]),
        ("computed", [1, "a", None, [1]], [math.nan, datetime.date(2026, 1, 1)]),
    ],
)
def test_values_are_held_to_the_type_of_the_default(toy_defaults, parameter, accepted, wrong):
    for value in accepted:
        assert checked("toy", toy_defaults, {parameter: value}) == {parameter: value}
    for value in wrong:
        with pytest.raises(InputError, match=f"{parameter}=.*wrong type; give "):
            checked("toy", toy_defaults, {parameter: value})


def test_folders_become_absolute_and_names_stay(toy_defaults, tmp_path, monkeypatch):
    (tmp_path / "data" / "coco").mkdir(parents=True)
    (tmp_path / "scenes").mkdir()
    monkeypatch.chdir(tmp_path)
    parameters = {"dataset": "./data/coco", "model": "data/coco"}
    assert set(checked("toy", toy_defaults, parameters).values()) == {
        str(tmp_path / "data" / "coco")
    }
    assert checked("toy", toy_defaults, {"dataset": "data/coco-place"})["dataset"] == str(
        tmp_path / "data" / "coco-place"
    )
    for recorded in (
        {"dataset": "scenes"},
        {"model": "llava-hf/llava-1.5-7b-hf"},
        {"end": "data/coco"},
    ):
        assert checked("toy", toy_defaults, recorded) == recorded


def test_a_chapter_is_found_by_name_or_path(tmp_path, monkeypatch):
    file = toy_chapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find_chapter("toy", tmp_path) == find_chapter("toy.md") == find_chapter(file) == file
    assert find_chapter("outside").parent == book_folder()
    for wrong in ("tooy", "../toy", "toy.txt", ""):
        with pytest.raises(InputError, match="no chapter .*there are: toy"):
            find_chapter(wrong, tmp_path)
    with pytest.raises(InputError, match="did you mean 'toy'"):
        find_chapter("tooy", tmp_path)


def test_what_is_no_chapter_is_refused(tmp_path):
    (tmp_path / "a.ipynb").write_text("{")
    with pytest.raises(InputError, match="cannot be read as a notebook"):
        read_chapter(tmp_path / "a.ipynb")
    (tmp_path / "b.md").write_text("# Only words\n")
    with pytest.raises(InputError, match="0 cells tagged"):
        defaults(read_chapter(tmp_path / "b.md"))


def test_the_digest_follows_the_code_and_not_the_prose(tmp_path):
    file = toy_chapter(tmp_path)
    before = code_of(read_chapter(file))
    file.write_text(file.read_text().replace("# Toy", "# A toy"))
    assert code_of(read_chapter(file)) == before
    file.write_text(file.read_text().replace("seed / 100", "seed / 10"))
    assert code_of(read_chapter(file)) != before


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_what_runs_is_what_is_recorded(value):
    """Papermill writes the very value into the chapter that the results file will hold."""
    try:
        checked_parameters = checked("toy", {"computed": Expression("2 * 3")}, {"computed": value})
    except InputError:  # half of a surrogate pair, which no file can hold
        assert re.search("\\\\ud[89a-f]", json.dumps(value))
        return
    ran: dict = {}
    exec(PythonTranslator.codify(checked_parameters), ran)
    assert ran["computed"] == json.loads(json.dumps(value)) == checked_parameters["computed"]


@pytest.mark.parametrize(
    "value", [{1: "a"}, {"a": {None: "b"}}, [{True: 1}], {(1, 2): 3}, {1.5: "a"}]
)
def test_keys_that_are_no_text_are_refused(toy_defaults, value):
    with pytest.raises(InputError, match="no text; put it into quotes|wrong type"):
        checked("toy", toy_defaults, {"computed": value})
    with pytest.raises(InputError, match="no text; put it into quotes"):
        checked("toy", toy_defaults, {"names": read_yaml("{1: a}", "-p")[0]})


def test_values_without_end_or_form_are_refused(toy_defaults):
    endless, deep = [], []
    endless.append(endless)
    for _ in range(5000):
        deep = [deep]
    for value in (endless, deep, {1, 2}, b"x", "\ud800", 10**5000, [math.nan]):
        with pytest.raises(InputError, match="wrong type"):
            checked("toy", toy_defaults, {"computed": value})


def test_magics_and_defaults_that_json_does_not_know_are_read(tmp_path):
    strange = 'raw = b"x"\nmany = {1, 2}\nlong = range(10**12)\nby = {1: "a"}\nwide = 1e999'
    cell = f"seed = 1\n%matplotlib inline\n!ls\n{strange}\npair = (1, (2, 3))"
    chapter_defaults = defaults(read_chapter(chapter_with(tmp_path, cell)))
    plain = {"seed": 1, "pair": (1, (2, 3))}
    assert {
        name: value for name, value in chapter_defaults.items() if not isinstance(value, Expression)
    } == plain
    assert (
        set(chapter_defaults) == {*plain, "raw", "many", "long", "by", "wide"}
        and chapter_defaults["raw"] == "b'x'"
    )
    assert json.loads(json.dumps(chapter_defaults))["raw"] == "b'x'"


@pytest.mark.parametrize(
    "cell",
    ["seed = ", "seed = 010", "seed = (1", "f(", "seed = 1 2", "seed = " + "[" * 500 + "]" * 500],
)
def test_a_cell_that_is_no_python_is_refused(tmp_path, cell):
    with pytest.raises(InputError, match="cell tagged 'parameters' cannot be read"):
        defaults(read_chapter(chapter_with(tmp_path, cell)))


def chapter_with(folder, cell):
    file = toy_chapter(folder)
    file.write_text(file.read_text().replace(PARAMETERS, cell + "\n"))
    return file


@pytest.mark.parametrize(
    "name",
    [
        "~nosuch-user/x",
        "x/" + "y" * 300,
        "x/.-place",
        "x/..-place",
        "/-",
        "a/\0",
        "~/nowhere-to-be-found",
    ],
)
def test_a_path_that_leads_nowhere_stays_as_it_is(toy_defaults, name):
    assert checked("toy", toy_defaults, {"model": name, "dataset": name}) == {
        "model": name,
        "dataset": name,
    }
    with pytest.raises(InputError, match="no chapter"):
        find_chapter(f"{name}.md")


def test_a_folder_in_the_home_is_found(toy_defaults, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "llava").mkdir()
    assert checked("toy", toy_defaults, {"model": "~/llava"})["model"] == str(tmp_path / "llava")


@pytest.mark.parametrize(
    ("parameter", "written", "meant"),
    [
        ("effect", "1e-3", 0.001),
        ("effect", "-1E+2", -100.0),
        ("effect", ".5", 0.5),
        ("effect", "3", 3),
        ("n_samples", "010", 10),
        ("n_samples", "1_000", 1000),
        ("n_samples", "0x10", 16),
        ("end", "no", "no"),
        ("end", "3", "3"),
        ("end", "1e-3", "1e-3"),
        ("end", "null", "null"),
        ("end", "'no'", "no"),
        ("end", "12:30", "12:30"),
        ("end", "2026-01-01", "2026-01-01"),
        ("layers", "[01, 2]", [1, 2]),
        ("names", "{a: no, off: yes}", {"a": "no", "off": "yes"}),
        ("computed", "[1, no, 1e-3, true, ~]", [1, "no", 0.001, True, None]),
        ("truth", "yes", True),
        ("truth", "Off", False),
        ("words", "[yes, no, key, 1]", ["yes", "no", "key", "1"]),
    ],
)
def test_words_of_yaml_are_what_the_default_says(toy_defaults, parameter, written, meant):
    toy_defaults |= {"truth": False, "words": ("lamp",)}
    parsed = checked("toy", toy_defaults, {parameter: read_yaml(written, "-p")[0]})[parameter]
    assert parsed == meant and type(parsed) is type(meant)


@pytest.mark.parametrize(
    ("parameter", "written"),
    [
        ("n_samples", "0.5"),
        ("n_samples", "1:30"),
        ("n_samples", "'3'"),
        ("effect", "high"),
        ("effect", ".nan"),
        ("end", "[a]"),
        ("end", "a: b"),
        ("truth", "3"),
        ("truth", "maybe"),
        ("layers", "[1, a]"),
        ("n_samples", "9" * 5000),
        ("n_samples", "yes"),
    ],
)
def test_words_that_cannot_be_what_the_default_says_are_refused(toy_defaults, parameter, written):
    with pytest.raises(InputError, match="wrong type; give "):
        checked("toy", toy_defaults | {"truth": False}, {parameter: read_yaml(written, "-p")[0]})
