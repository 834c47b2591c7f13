"""No two jobs see the same GPU.

None is needed to test it, only the variable that says which one a job sees.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from xlvlms_tutorial.batch import job
from xlvlms_tutorial.batch.job import VARIABLE, devices, gpus
from xlvlms_tutorial.errors import InputError, RunError

pytestmark = pytest.mark.skipif(
    not hasattr(os, "getuid"), reason="Snakemake, which starts jobs, does not run on Windows"
)

JOB = """
import sys, time
from xlvlms_tutorial.batch import job
job.PAUSE = 0.05
with job.gpus(int(sys.argv[1]), 3) as visible:
    start = time.time(); time.sleep(0.4); print(visible, start, time.time())
"""


@pytest.fixture(autouse=True)
def locks(monkeypatch, tmp_path):
    """The folder of the locks, in a temporary folder of the test's own."""
    monkeypatch.setattr(job, "PAUSE", 0.01)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(job.tempfile, "tempdir", None)  # so that the variable is read again
    return tmp_path / f"xlvlms-gpus-{os.getuid()}"


def test_processes_at_the_same_time_never_share_a_gpu():
    def start_job(count):
        command = [sys.executable, "-c", JOB, str(count)]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return set(words[0].split(",")), float(words[1]), float(words[2])

    with ThreadPoolExecutor(6) as pool:
        jobs = list(pool.map(start_job, [1, 2, 1, 3, 1, 2]))
    assert [len(visible) for visible, *_ in jobs] == [1, 2, 1, 3, 1, 2]
    for number, (visible, start, end) in enumerate(jobs):
        for others, others_start, others_end in jobs[:number]:
            assert end <= others_start or others_end <= start or visible.isdisjoint(others)


def test_a_taken_gpu_is_passed_over_and_a_free_one_seen(locks):
    locks.mkdir()
    with FileLock(locks / "0.lock"), gpus(1, 3) as visible:
        assert visible == os.environ[VARIABLE] == "1"
    assert VARIABLE not in os.environ
    with gpus(2, 3) as visible:
        assert visible == "0,1"


def test_a_job_that_is_killed_lets_go_of_its_gpu():
    code = """
from xlvlms_tutorial.batch import job
with job.gpus(1, 1):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline()
        holder.kill()
    with gpus(1, 1) as visible:
        assert visible == "0"


def test_the_gpus_are_those_that_this_process_may_see(monkeypatch):
    monkeypatch.setenv(VARIABLE, "4, GPU-7f,6")
    assert devices(2) == ["4", "GPU-7f"]
    with gpus(1, 3) as visible:
        assert visible == "4"
    with gpus(0, 3) as visible:
        assert visible == os.environ[VARIABLE] == ""  # a job that asked for none sees none
    assert os.environ[VARIABLE] == "4, GPU-7f,6"
    with pytest.raises(InputError, match="4 GPUs asked for, but CUDA_VISIBLE_DEVICES="):
        devices(4)


def test_the_lock_ends_with_a_job_that_fails():
    with pytest.raises(ZeroDivisionError), gpus(1, 1):
        _ = 1 / 0
    with gpus(1, 1) as visible:
        assert visible == "0"


def test_more_than_there_are_is_refused_at_once():
    with pytest.raises(InputError, match="2 GPUs wanted of 1"), gpus(2, 1):
        pass


@pytest.mark.parametrize("made", ["folder", "link", "file"])
def test_a_folder_of_locks_that_is_not_ours_is_refused_with_what_to_do(
    tmp_path, locks, monkeypatch, made
):
    {"folder": locks.mkdir, "file": locks.touch, "link": lambda: locks.symlink_to(tmp_path)}[made]()
    if made != "file":
        monkeypatch.setattr(os, "getuid", lambda: -1)
        locks.rename(tmp_path / "xlvlms-gpus--1")
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
def test_a_lock_that_cannot_be_held_is_said(locks, harm):
    locks.mkdir()
    harm(locks / "0.lock")
    with pytest.raises(RunError, match="locks of GPUs"), gpus(1, 1):
        pass


def test_the_folder_of_locks_is_made_for_this_user_alone(locks):
    with gpus(1, 1) as visible:
        assert visible == "0"
    assert locks.stat().st_mode & 0o077 == 0
    with gpus(1, 1) as visible:  # and is taken again
        assert visible == "0"
