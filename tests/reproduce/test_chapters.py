"""Parameters are read from a chapter's own cell, and what does not fit is refused with what would."""

import datetime
import math

import pytest

from tests.toy_chapter import PARAMETERS, toy_chapter
from xlvlms_tutorial.errors import SelectionError
from xlvlms_tutorial.reproduce.chapters import Expression, book_folder, checked, code_of, defaults, find_chapter, read_chapter

BOOK = sorted(page.stem for page in book_folder().glob("*.md") if "[parameters]" in page.read_text(encoding="utf-8"))


@pytest.fixture
def known(tmp_path):
    return defaults(read_chapter(toy_chapter(tmp_path)))


def test_the_defaults_are_those_of_the_cell(known):
    ran: dict = {}
    exec(PARAMETERS, ran)
    assert known == {name: ran[name] for name in known} | {"wide": [2, 4, 6], "computed": "2 * 3"}
    assert list(known)[:4] == ["model", "dataset", "n_samples", "seed"] and len(known) == 11
    assert isinstance(known["computed"], Expression)


@pytest.mark.parametrize("name", BOOK)
def test_every_chapter_of_the_book_has_readable_parameters(name):
    found = defaults(read_chapter(find_chapter(name)))
    assert list(found)[:4] == ["model", "dataset", "n_samples", "seed"]
    assert checked(name, found, {"model": "a/b", "dataset": "coco", "n_samples": 3, "seed": 1})["n_samples"] == 3
    plain = {key: value for key, value in found.items() if not isinstance(value, Expression)}
    assert checked(name, found, plain).keys() == plain.keys()  # every default fits itself
    with pytest.raises(SelectionError, match="did you mean 'n_samples'"):
        checked(name, found, {"n_sample": 3})


@pytest.mark.parametrize(
    ("parameter", "right", "wrong"),
    [
        ("model", ["a/b"], [3, None, True, ["a"]]),
        ("n_samples", [8, 0], [0.5, "8", True, None, [8]]),
        ("effect", [0.25, 1], ["1", True, math.nan, math.inf, None]),
        ("layers", [[3], [1, 2, 3], []], [3, "3", [0.5], ["a"], [True], {"a": 1}]),
        ("names", [{"x": "y"}, {}], [[], "a", {"x": 1}]),
        ("computed", [1, "a", None, [1]], [math.nan, datetime.date(2026, 1, 1)]),
    ],
)
def test_values_are_held_to_the_type_of_the_default(known, parameter, right, wrong):
    for value in right:
        assert checked("toy", known, {parameter: value}) == {parameter: value}
    for value in wrong:
        with pytest.raises(SelectionError, match=f"{parameter}=.*wrong type; give "):
            checked("toy", known, {parameter: value})


def test_folders_become_absolute_and_names_stay(known, tmp_path, monkeypatch):
    (tmp_path / "data" / "coco").mkdir(parents=True)
    (tmp_path / "scenes").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"dataset": "./data/coco", "model": "data/coco"}
    assert set(checked("toy", known, given).values()) == {str(tmp_path / "data" / "coco")}
    assert checked("toy", known, {"dataset": "data/coco-place"})["dataset"] == str(tmp_path / "data" / "coco-place")
    for kept in ({"dataset": "scenes"}, {"model": "llava-hf/llava-1.5-7b-hf"}, {"end": "data/coco"}):
        assert checked("toy", known, kept) == kept


def test_a_chapter_is_found_by_name_or_path(tmp_path, monkeypatch):
    file = toy_chapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find_chapter("toy", tmp_path) == find_chapter("toy.md") == find_chapter(file) == file
    assert find_chapter("outside").parent == book_folder()
    for wrong in ("tooy", "../toy", "toy.txt", ""):
        with pytest.raises(SelectionError, match="no chapter .*there are: toy"):
            find_chapter(wrong, tmp_path)
    with pytest.raises(SelectionError, match="did you mean 'toy'"):
        find_chapter("tooy", tmp_path)


def test_what_is_no_chapter_is_refused(tmp_path):
    (tmp_path / "a.ipynb").write_text("{")
    with pytest.raises(SelectionError, match="cannot be read as a notebook"):
        read_chapter(tmp_path / "a.ipynb")
    (tmp_path / "b.md").write_text("# Only words\n")
    with pytest.raises(SelectionError, match="0 cells tagged"):
        defaults(read_chapter(tmp_path / "b.md"))


def test_the_digest_follows_the_code_and_not_the_prose(tmp_path):
    file = toy_chapter(tmp_path)
    before = code_of(read_chapter(file))
    file.write_text(file.read_text().replace("# Toy", "# A toy"))
    assert code_of(read_chapter(file)) == before
    file.write_text(file.read_text().replace("seed / 100", "seed / 10"))
    assert code_of(read_chapter(file)) != before
