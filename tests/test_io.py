import json
import os

import pytest

from xlvlms_tutorial import io
from xlvlms_tutorial.errors import OutputError


def test_versions_name_what_the_numbers_depend_on():
    found = io.versions()
    assert {"python", "xlvlms_tutorial", "torch", "transformers", "numpy"} <= set(found)
    assert found["torch"][0].isdigit()


def test_a_file_is_whole_and_its_folder_is_made(tmp_path):
    path = io.write_json(tmp_path / "deep" / "a.json", {"colour": "grün", "n": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"colour": "grün", "n": [1, None]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_killed_writer_leaves_the_old_file(tmp_path, monkeypatch):
    path = io.write_json(tmp_path / "a.json", 1)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        io.write_json(path, 2)
    assert json.loads(path.read_text()) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        io.write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="another path"):
        io.write_json(tmp_path / "file" / "a.json", 1)
