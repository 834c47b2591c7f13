"""No two jobs see the same GPU.

None is needed to test it, only the variable that says which one a job sees.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock
from xlvlms_tutorial.batch.slots import VARIABLE, devices, gpus

from xlvlms_tutorial.batch import slots
from xlvlms_tutorial.errors import InputError, RunError

JOB = """
import sys, time
from pathlib import Path
from xlvlms_tutorial.batch import slots
slots.PAUSE = 0.05
with slots.gpus(int(sys.argv[1]), 3, Path(sys.argv[2])) as seen:
    start = time.time(); time.sleep(0.4); print(seen, start, time.time())
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(slots, "PAUSE", 0.01)
    monkeypatch.delenv(VARIABLE, raising=False)


def test_processes_at_the_same_time_never_share_a_gpu(tmp_path):
    def job(n_gpus):
        command = [sys.executable, "-c", JOB, str(n_gpus), str(tmp_path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return set(output[0].split(",")), float(output[1]), float(output[2])

    with ThreadPoolExecutor(6) as pool:
        ran = list(pool.map(job, [1, 2, 1, 3, 1, 2]))
    assert [len(visible) for visible, *_ in ran] == [1, 2, 1, 3, 1, 2]
    for k, (visible, start, end) in enumerate(ran):
        for its_devices, its_start, its_end in ran[:k]:
            assert end <= its_start or its_end <= start or visible.isdisjoint(its_devices)


def test_a_taken_gpu_is_passed_over_and_a_free_one_seen(tmp_path):
    with FileLock(tmp_path / "0.lock"), gpus(1, 3, tmp_path) as visible:
        assert visible == os.environ[VARIABLE] == "1"
    assert VARIABLE not in os.environ
    with gpus(2, 3, tmp_path) as visible:
        assert visible == "0,1"


def test_the_gpus_are_those_that_this_process_may_see(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "4, GPU-7f,6")
    assert devices(2) == ["4", "GPU-7f"]
    with gpus(1, 3, tmp_path) as visible:
        assert visible == "4"
    with gpus(0, 3, tmp_path) as visible:
        assert visible == os.environ[VARIABLE] == ""  # a job that asked for none sees none
    assert os.environ[VARIABLE] == "4, GPU-7f,6"
    with pytest.raises(InputError, match="4 GPUs asked for, but CUDA_VISIBLE_DEVICES="):
        devices(4)


def test_the_lock_ends_with_a_job_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), gpus(1, 1, tmp_path):
        _ = 1 / 0
    with gpus(1, 1, tmp_path) as visible:
        assert visible == "0"


def test_more_than_there_are_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="2 GPUs wanted of 1"), gpus(2, 1, tmp_path):
        pass


@pytest.mark.skipif(
    not hasattr(os, "getuid"),
    reason="runs on Linux and macOS, where users share one such folder",
)
@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_folder_of_locks_that_is_not_ours_is_refused_with_what_to_do(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(slots.tempfile, "gettempdir", lambda: str(tmp_path))
    place = tmp_path / f"xlvlms-gpus-{os.getuid()}"
    {"folder": place.mkdir, "file": place.touch, "link": lambda: place.symlink_to(tmp_path)}[kind]()
    if kind != "file":
        monkeypatch.setattr(os, "getuid", lambda: -1)
        place.rename(tmp_path / "xlvlms-gpus--1")
    with (
        pytest.raises(
            RunError,
            match="locks of GPUs in .* cannot be held .*set TMPDIR to a folder of your own",
        ),
        gpus(1, 1),
    ):
        pass


@pytest.mark.parametrize(
    "harm",
    [lambda lock: lock.symlink_to(lock), lambda lock: lock.mkdir()],
    ids=["a link to itself", "a folder"],
)
def test_a_lock_that_cannot_be_held_is_said(tmp_path, harm):
    harm(tmp_path / "0.lock")
    with pytest.raises(RunError, match="locks of GPUs"), gpus(1, 1, tmp_path):
        pass


def test_the_folder_of_locks_is_made_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(slots.tempfile, "gettempdir", lambda: str(tmp_path))
    with gpus(1, 1) as visible:
        assert visible == "0"
    (place,) = tmp_path.iterdir()
    assert place.stat().st_mode & 0o077 == 0 or os.name == "nt"
    with gpus(1, 1) as visible:  # and is taken again
        assert visible == "0"
