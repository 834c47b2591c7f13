"""What happens to shards.

Processes killed at any moment, disks that fill up, files that are
damaged. Nothing written is ever lost.
"""

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.support.made_states import PROVENANCE, assert_same, states_of
from xlvlms_tutorial.activations import shards as shards_module
from xlvlms_tutorial.activations.store import ActivationStore
from xlvlms_tutorial.errors import StoreError

ROOT = Path(__file__).parents[2]
# a forked process has torch already, so that a kill strikes while it writes
FORK = multiprocessing.get_context("fork")
KILLS = int(os.environ.get("XLVLMS_KILLS", "8"))
PER_SHARD, SHARDS_PER_KILL = 3, 25
STEPS = [
    (os, "replace"),
    (os, "link"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "mkdir"),
    (os, "rmdir"),
    (os, "chmod"),
]
STEPS += [(shards_module, "save_file"), (pq, "write_table")]


def samples_of(number: int) -> range:
    return range(number * PER_SHARD, (number + 1) * PER_SHARD)


def capture(folder: Path, n_shards: int) -> None:
    store = ActivationStore(folder, PROVENANCE)
    for number in store.missing(n_shards):
        store.write(number, states_of(samples_of(number), rows=2))


def drafts(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_kills_at_random_moments_lose_nothing(tmp_path):
    folder, rng = tmp_path / "s", random.Random(0)
    struck = n_shards = 0
    while struck < KILLS:
        n_shards += SHARDS_PER_KILL
        process = FORK.Process(target=capture, args=(folder, n_shards))
        process.start()
        time.sleep(rng.uniform(0, 0.08))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        struck += process.exitcode == -signal.SIGKILL
        if (folder / "provenance.json").exists():
            store = ActivationStore(folder)
            assert store.verify() == []
            if store.done:
                assert_same(
                    store.states(),
                    states_of([s for number in store.done for s in samples_of(number)], rows=2),
                )
    capture(folder, n_shards)
    whole = ActivationStore(folder).states()
    assert whole.table["sample"].tolist() == [
        sample for sample in range(n_shards * PER_SHARD) for _ in range(2)
    ]
    assert_same(whole, states_of(range(n_shards * PER_SHARD), rows=2))
    assert ActivationStore(folder).verify() == []
    assert len(drafts(folder)) <= 2 * struck  # of the tensors and of the index


def at_step(monkeypatch, k: int, act) -> list[int]:
    """Let the k-th step that touches the disk (from 0) be ``act`` in place of what it is.

    Gives the list of steps taken.
    """
    calls: list[int] = []

    def watched(step):
        def run(*args, **kwargs):
            calls.append(len(calls))
            return act() if calls[-1] == k else step(*args, **kwargs)

        return run

    for owner, name in STEPS:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return calls


def _killed_at(k: int, write) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, k, lambda: os._exit(9))
        write()


@pytest.mark.parametrize("case", ["new", "rewritten"])
def test_a_kill_before_any_step_leaves_a_store_that_continues(tmp_path, case):
    def write(folder):
        if case == "new":
            return capture(folder, 2)
        return ActivationStore(folder, PROVENANCE).write(1, states_of(samples_of(1), rows=2))

    expected, kills = states_of(range(2 * PER_SHARD), rows=2), 0
    while True:
        folder = tmp_path / str(kills)
        if case == "rewritten":
            capture(folder, 1)
            ActivationStore(folder).write(1, states_of(samples_of(1), rows=2, shift=1))
        process = FORK.Process(target=_killed_at, args=(kills, lambda target=folder: write(target)))
        process.start()
        process.join()
        if (folder / "provenance.json").exists():
            store = ActivationStore(folder)
            assert store.verify() == []
            assert set(store.done) <= {0, 1}
            if case == "rewritten":
                assert_same(store.states(samples=samples_of(0)), states_of(samples_of(0), rows=2))
        write(folder)
        assert_same(ActivationStore(folder).states(), expected)
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        kills += 1
    assert kills > 10
    assert drafts(folder) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failure_of_any_step_loses_nothing_and_says_so(tmp_path, monkeypatch, number):
    def fail():
        raise OSError(number, os.strerror(number))

    store, k, failures = ActivationStore(tmp_path, PROVENANCE), 0, 0
    store.write(4, states_of(samples_of(4)))
    while True:
        with monkeypatch.context() as patch:
            calls = at_step(patch, k, fail)
            try:
                store.write(2, states_of(samples_of(2)))
            except StoreError as raised:
                message = (
                    f"no space for shard 2, and the {len(store.done)} "
                    "shards written so far are safe"
                )
                assert (os.strerror(number) if number == errno.EIO else message) in str(raised)
                failures += 1
        if len(calls) <= k:
            break
        assert store.verify() == []
        assert_same(store.states(samples=samples_of(4)), states_of(samples_of(4)))
        store.write(2, states_of(samples_of(2)))
        assert_same(store.states(), states_of([*samples_of(2), *samples_of(4)]))
        store.discard(2)
        k += 1
    assert failures > 8
    assert drafts(tmp_path) == []


def test_a_full_disk_that_safetensors_tells_of_is_understood(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    store = ActivationStore(tmp_path, PROVENANCE)
    monkeypatch.setattr(shards_module, "save_file", full)
    with pytest.raises(StoreError, match="no space for shard 0, and the 0 shards"):
        store.write(0, states_of([0]))
    assert drafts(tmp_path) == []


FILLING = """
import shutil, subprocess, sys
from pathlib import Path
from tests.support.made_states import PROVENANCE, assert_same, states_of
from xlvlms_tutorial.errors import StoreError
from xlvlms_tutorial.activations.store import ActivationStore

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], check=True)
(disk / "filler").write_bytes(bytes(100_000))
store = ActivationStore(disk / "s", PROVENANCE)
try:
    for number in range(99):
        store.write(number, states_of(range(number * 100, number * 100 + 100)))
except StoreError as error:
    assert f"the {number} shards written so far are safe" in str(error), error
assert store.done == list(range(number)) and 0 < number < 99 and store.verify() == []
assert_same(store.states(), states_of(range(number * 100)))
(disk / "filler").unlink()
store.write(number, states_of(range(number * 100, number * 100 + 100)))
assert_same(store.states(), states_of(range(number * 100 + 100)))
print("filled, freed and continued")
"""


def test_a_disk_that_is_really_full_loses_nothing(tmp_path):
    spaces = ["unshare", "--map-root-user", "--mount"]  # a disk of its own, for this process alone
    trial = [*spaces, "mount", "-t", "tmpfs", "tmpfs", tmp_path]
    if (
        not shutil.which("unshare")
        or subprocess.run(trial, check=False, capture_output=True).returncode
    ):
        pytest.skip("runs where a process may mount a small disk of its own: `unshare` on Linux")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    filling = [*spaces, sys.executable, "-c", FILLING, tmp_path]
    done = subprocess.run(filling, env=environment, check=False, capture_output=True, text=True)
    assert done.stdout == "filled, freed and continued\n", done.stderr


def test_a_limit_on_the_size_of_files_is_told_as_it_is(tmp_path):
    resource = pytest.importorskip("resource", reason="runs on Linux and macOS, which limit files")
    store, before = ActivationStore(tmp_path, PROVENANCE), resource.getrlimit(resource.RLIMIT_FSIZE)
    store.write(0, states_of(range(3)))
    handled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        with pytest.raises(StoreError, match="shard 1 cannot be written .*File too large"):
            store.write(1, states_of(range(3, 3000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handled)
    assert store.done == [0]
    assert drafts(tmp_path) == []


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def _swap(path: Path) -> None:
    shutil.copyfile(path.with_stem("00000"), path)


DAMAGE = {
    "flipped at the start": lambda path: _flip(path, 9),
    "flipped in the middle": lambda path: _flip(path, path.stat().st_size // 2),
    "flipped at the end": lambda path: _flip(path, -1),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "another shard's": _swap,
}


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    capture(tmp_path / "s", 3)
    return ActivationStore(tmp_path / "s")


@pytest.mark.parametrize("damage", [*DAMAGE, "deleted"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "read before"])
def test_damaged_tensors_are_named_refused_and_made_anew(store, damage, fresh):
    if not fresh:
        store.states()
    path = store.folder / "shards" / "00001.safetensors"
    (DAMAGE | {"deleted": Path.unlink})[damage](path)
    assert store.verify() == ["shards/00001.safetensors"]
    with pytest.raises(StoreError, match=r"shards/00001\.safetensors"):
        store.states()
    with pytest.raises(StoreError, match=r"shards/00001\.safetensors"):
        list(store.iterate())
    assert_same(store.states(samples=samples_of(2)), states_of(samples_of(2), rows=2))
    with pytest.warns(UserWarning, match=r"to be made anew: shards/00001\.safetensors"):
        assert store.missing(3) == [1]
    assert store.missing(3, rank=0, world=2) == []
    store.write(1, states_of(samples_of(1), rows=2))
    assert store.verify() == []
    assert_same(store.states(), states_of(range(9), rows=2))


@pytest.mark.parametrize(
    "damage", ["flipped at the start", "flipped at the end", "truncated", "emptied", "longer"]
)
def test_a_damaged_part_of_the_index_is_named_discarded_and_made_anew(store, damage):
    DAMAGE[damage](store.folder / "index" / "00001.parquet")
    assert store.verify() == ["index/00001.parquet"]
    with pytest.raises(StoreError, match=r"index/00001\.parquet"):
        store.states()
    store.write(3, states_of(samples_of(3), rows=2))  # others can go on
    store.discard(1)
    assert store.done == [0, 2, 3]
    assert store.missing(4) == [1]
    store.write(1, states_of(samples_of(1), rows=2))
    assert store.verify() == []
    assert_same(store.states(), states_of(range(12), rows=2))


def test_every_changed_byte_of_an_index_is_found(store):
    path = store.folder / "index" / "00001.parquet"
    content = path.read_bytes()
    for offset in range(0, len(content), 7):
        _flip(path, offset)
        assert ActivationStore(store.folder).verify() == ["index/00001.parquet"], offset
        path.write_bytes(content)
    assert store.verify() == []


def test_an_orphan_is_no_shard_and_is_overwritten(store):
    (store.folder / "index" / "00001.parquet").unlink()
    (store.folder / "shards" / "00001.safetensors").write_bytes(b"left by a kill")
    assert store.done == [0, 2]
    assert store.verify() == []
    capture(store.folder, 3)
    assert_same(store.states(), states_of(range(9), rows=2))


def test_a_shard_without_the_recorded_tensors_is_damaged(store, monkeypatch):
    def forget(tensors, path):
        save_file({name: tensor for name, tensor in tensors.items() if name != "3/mlp_out"}, path)

    monkeypatch.setattr(shards_module, "save_file", forget)
    store.write(1, states_of(samples_of(1), rows=2))
    assert store.verify() == ["shards/00001.safetensors"]


def test_drafts_of_killed_processes_are_removed_and_those_at_work_are_not(tmp_path):
    ActivationStore(tmp_path, PROVENANCE).write(1, states_of([0]))
    names = [
        ".provenance.json.abc",
        "shards/.00002.safetensors.abc",
        "index/.00002.parquet.abc",
        "index/.another",
    ]
    two_hours_ago = time.time() - 2 * 3600
    for name in names:
        (tmp_path / name).write_bytes(b"half of it")
        os.utime(tmp_path / name, (two_hours_ago, two_hours_ago))
    (tmp_path / "shards" / ".00003.safetensors.abc").write_bytes(b"half of it")
    before = ActivationStore(tmp_path).states()
    assert len(drafts(tmp_path)) == 5  # who only reads removes nothing
    assert_same(ActivationStore(tmp_path, PROVENANCE).states(), before)
    assert sorted(drafts(tmp_path)) == [".00003.safetensors.abc", ".another"]


def test_files_can_be_read_by_others(store):
    assert {oct(path.stat().st_mode & 0o777) for path in store.folder.rglob("0*")} == {"0o644"}


def test_a_rewritten_shard_is_never_seen_beside_another_index(store, monkeypatch):
    observed, replace = [], os.replace

    def watched(*paths):
        fresh = ActivationStore(store.folder)
        observed.append((fresh.done, fresh.verify()))
        replace(*paths)

    monkeypatch.setattr(os, "replace", watched)
    store.write(1, states_of(samples_of(1), rows=2))
    assert observed == [([0, 1, 2], [])] * 2
    observed.clear()
    store.write(1, states_of(samples_of(1), rows=2, shift=1))
    assert observed == [([0, 2], [])] * 2
    assert re.fullmatch(r"ActivationStore\(.*, 3 shards\)", repr(store))


def shard_files(folder: Path, number: int) -> list[Path]:
    return [
        folder / "shards" / f"{number:05d}.safetensors",
        folder / "index" / f"{number:05d}.parquet",
    ]


@pytest.mark.parametrize("rows", [2, 0], ids=["rows", "no rows"])
@pytest.mark.parametrize(("source", "target"), [(1, 0), (0, 1), (1, 7)])
@pytest.mark.parametrize("which", [slice(0, 2), slice(1, 2)], ids=["both files", "the index"])
def test_a_shard_that_is_a_copy_of_another_is_damaged_and_made_anew(
    tmp_path, rows, source, target, which
):
    store = ActivationStore(tmp_path, PROVENANCE)
    for number in (0, 1):
        store.write(number, states_of(samples_of(number), rows=rows if number == source else 2))
    for old, new in list(
        zip(shard_files(tmp_path, source), shard_files(tmp_path, target), strict=True)
    )[which]:
        shutil.copyfile(old, new)
    store = ActivationStore(tmp_path)
    assert store.verify() == [f"index/{target:05d}.parquet"]
    with pytest.raises(StoreError, match=f"index/{target:05d}.parquet"):
        _ = store.table
    with pytest.raises(StoreError):
        store.states()
    with pytest.warns(UserWarning, match="to be made anew"):
        assert target in ActivationStore(tmp_path).missing(8)
    if target < 2:
        store.write(target, states_of(samples_of(target), rows=2))
        assert sorted(set(ActivationStore(tmp_path).states().table["sample"])) == [
            sample for number in (0, 1) for sample in samples_of(number) if number == target or rows
        ]


@pytest.mark.parametrize(
    "name",
    [
        "1",
        "0001",
        "000001",
        "00001 copy",
        "-0001",
        "\u0661\u0661\u0661\u0661\u0661",
        "00001.bak",
        "1e4",
    ],
)
def test_a_stray_part_of_the_index_does_not_count(tmp_path, name):
    capture(tmp_path, 2)
    before = ActivationStore(tmp_path).table
    shutil.copyfile(tmp_path / "index" / "00001.parquet", tmp_path / "index" / f"{name}.parquet")
    assert ActivationStore(tmp_path).done == [0, 1] and ActivationStore(tmp_path).table.equals(
        before
    )


def test_threads_that_write_one_shard_do_not_take_each_other_s_drafts(tmp_path):
    store, expected = ActivationStore(tmp_path, PROVENANCE), states_of(range(6))
    with ThreadPoolExecutor(4) as pool:
        for job in [
            pool.submit(store.write, number, expected) for _ in range(20) for number in (0, 0, 0, 0)
        ]:
            job.result()
    assert store.verify() == [] and drafts(tmp_path) == []
    assert_same(store.states(), expected)
