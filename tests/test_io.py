import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from tools import ROOT
from xlvlms_tutorial import io
from xlvlms_tutorial.errors import FileError, damaged_record


def test_versions_name_what_the_numbers_depend_on():
    versions = io.versions()
    assert {"python", "xlvlms_tutorial", "torch", "transformers", "numpy"} <= set(versions)
    assert versions["torch"][0].isdigit()


def test_a_file_is_whole_and_its_folder_is_made(tmp_path):
    path = io.write_json(tmp_path / "deep" / "a.json", {"colour": "grün", "n": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"colour": "grün", "n": [1, None]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_killed_writer_leaves_the_old_file(tmp_path, monkeypatch):
    path = io.write_json(tmp_path / "a.json", 1)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FileError, match="No space left"):
        io.write_json(path, 2)
    assert json.loads(path.read_text()) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        io.write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="another path"):
        io.write_json(tmp_path / "file" / "a.json", 1)


# Files that are whole or absent


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = io.write_utf8(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), io.replacing(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="runs on Linux and macOS, which have SIGKILL")
def test_a_writer_that_is_killed_leaves_the_old_file_and_a_hidden_draft(tmp_path):
    path = io.write_utf8(tmp_path / "a", "old")
    code = (
        "import os, signal, sys\n"
        "from xlvlms_tutorial.io import replacing\n"
        "with replacing(sys.argv[1]) as draft:\n"
        "    draft.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert all(file == path or file.name.startswith(".a.") for file in tmp_path.iterdir())
    assert io.write_utf8(path, "new").read_text() == "new"


def test_writers_of_one_file_do_not_take_each_other_s_drafts(tmp_path):
    texts = [str(k) * 10_000 for k in range(8)]
    writers = [
        threading.Thread(target=io.write_utf8, args=(tmp_path / "a", text)) for text in texts
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() in texts


@pytest.mark.skipif(sys.platform == "win32", reason="runs on Linux and macOS, which have umask")
def test_what_is_written_may_be_read_by_everybody(tmp_path):
    before = os.umask(0o077)
    try:
        for path in (
            io.write_utf8(tmp_path / "a", ""),
            io.save_tensors(tmp_path / "b", {"x": torch.ones(1)}),
        ):
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_half_of_a_surrogate_pair_comes_back_from_json_and_is_a_number_in_text(tmp_path):
    content = {"file": "na\udcefve ± 猫"}
    assert io.read_json(io.write_json(tmp_path / "a.json", content)) == content
    assert (
        io.write_utf8(tmp_path / "a.txt", content["file"]).read_text(encoding="utf-8")
        == "na\\udcefve ± 猫"
    )


@pytest.mark.parametrize(
    "function, content",
    [(io.write_utf8, ""), (io.write_json, 1), (io.save_tensors, {"x": np.ones(2)})],
)
def test_every_writer_names_a_path_that_cannot_be_written(tmp_path, function, content):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="inside cannot be written"):
        function(tmp_path / "file" / "inside", content)


# What reads says what is wrong


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_told(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises((ValueError, RecursionError)):
        io.read_json(tmp_path / "a")
    with pytest.raises(FileError, match="a: no list"), io.reading(tmp_path / "a", "no list"):
        io.read_json(tmp_path / "a")


@pytest.mark.parametrize(
    "cause",
    [
        OSError("gone"),
        ValueError("odd"),
        KeyError("n"),
        TypeError("none"),
        AttributeError("pop"),
        RecursionError("deep"),
    ],
)
def test_what_a_damaged_file_raises_becomes_a_record_error(cause):
    with pytest.raises(FileError) as raised, io.reading("a.json", "no plan"):
        raise cause
    assert str(raised.value).startswith(f"a.json: no plan ({type(cause).__name__}: {cause}); ")
    assert raised.value.__cause__ is cause


@pytest.mark.parametrize(
    "cause", [damaged_record("b.json", "damaged"), ZeroDivisionError("a mistake of ours")]
)
def test_what_says_enough_or_is_no_damage_goes_through(cause):
    with pytest.raises(type(cause)) as raised, io.reading("a.json", "no plan"):
        raise cause
    assert raised.value is cause


def test_a_digest_is_that_of_sorted_json():
    assert (
        io.digest({"b": "ü", "a": [1, None]})
        == hashlib.sha256(b'{"a": [1, null], "b": "\\u00fc"}').hexdigest()
    )
    assert (
        io.digest(["ü"], ensure_ascii=False)
        == hashlib.sha256('["ü"]'.encode()).hexdigest()
        != io.digest(["ü"])
    )
    with pytest.raises(ValueError, match="JSON"):
        io.digest([float("nan")])


def test_a_file_s_digest_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert (
        io.file_digest(tmp_path / "a")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    with pytest.raises(FileNotFoundError):
        io.file_digest(tmp_path / "absent")


# Tensors with metadata


def test_tensors_come_back_as_they_were(tmp_path):
    grid = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    tensors = {
        "turned": grid.T,
        "half": grid.bfloat16(),
        "one": torch.tensor(2),
        "none": torch.ones(0, 3),
        "bits": grid > 2,
    }
    loaded, metadata = io.load_tensors(
        io.save_tensors(tmp_path / "new" / "a", tensors, {"kind": "grün 1"})
    )
    assert metadata == {"kind": "grün 1"} and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a"]


def test_arrays_come_back_as_they_were_in_either_framework(tmp_path):
    grid = np.arange(6.0).reshape(2, 3)
    arrays = {
        "turned": grid.T,
        "every other": grid[:, ::2],
        "one": np.array(2),
        "none": np.ones((0, 3), dtype=np.uint8),
    }
    path = io.save_tensors(tmp_path / "a", arrays)
    loaded, metadata = io.load_tensors(path, "np")
    assert metadata == {} and loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array, strict=True)
        np.testing.assert_array_equal(io.load_tensors(path)[0][name].numpy(), array, strict=True)


def test_a_file_may_hold_metadata_alone(tmp_path):
    assert io.load_tensors(io.save_tensors(tmp_path / "a", {}, {"kind": "none"})) == (
        {},
        {"kind": "none"},
    )


def test_tensors_that_cannot_be_written_leave_the_old_file(tmp_path):
    path = io.save_tensors(tmp_path / "a", {"x": torch.ones(2)})
    with pytest.raises(RuntimeError, match="share memory"):
        whole = torch.ones(4)
        io.save_tensors(path, {"x": whole, "y": whole})
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert io.load_tensors(path)[0]["x"].tolist() == [1, 1]


def test_what_safetensors_says_of_a_failed_write_is_told(tmp_path, monkeypatch):
    def full(*_, **__):
        raise io.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(FileError, match="No space left on device"):
        io.save_tensors(tmp_path / "a", {"x": torch.ones(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_files_that_hold_no_tensors_are_refused(tmp_path, framework):
    whole = io.save_tensors(tmp_path / "a", {"x": torch.ones(8)}).read_bytes()
    for name, content in {"cut": whole[:-3], "text": b"no tensors", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("cut", "text", "empty", "absent", "."):
        with pytest.raises(OSError):
            io.load_tensors(tmp_path / name, framework)


def test_a_dtype_that_numpy_does_not_have_is_told(tmp_path):
    path = io.save_tensors(tmp_path / "a", {"x": torch.ones(2, dtype=torch.bfloat16)})
    with pytest.raises(OSError, match="bfloat16"):
        io.load_tensors(path, "np")


def test_what_a_command_writes_comes_back_and_what_does_not_run_gives_nothing(tmp_path):
    program = "import os; print(os.getcwd())"
    assert io.output_of(sys.executable, "-c", program, folder=tmp_path) == f"{tmp_path}\n"
    assert io.output_of("a-program-that-is-not-there") == ""
    assert io.output_of(sys.executable, "-c", "input()", seconds=0.01) == ""
