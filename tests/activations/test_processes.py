"""Several processes fill one store.

Each makes its shards, all return the whole, and none waits for one that is gone.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module

import pytest
import torch
from PIL import Image

from tests.support.launching import WITHOUT_GPUS, launch
from tests.support.made_states import PROVENANCE, assert_same, states_of
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.activations import processes
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.processes import await_others, making_shards
from xlvlms_tutorial.activations.store import Store, shard_plan
from xlvlms_tutorial.errors import RunError, SelectionError
from xlvlms_tutorial.samples import Sample

# the package offers a function of this name
capture_module = import_module("xlvlms_tutorial.activations.capture")
SETTINGS = {
    "layers": "all",
    "span": "image",
    "reduce": None,
    "prompt": "Describe the picture .",
    "shard_size": 2,
    "batch_size": 2,
}
PLAN = shard_plan(11, 2)


def pictures(n: int = 11) -> list[Sample]:
    return [
        Sample(f"s{k}", Image.new("RGB", (32, 32), (20 * k, 255 - 20 * k, 99))) for k in range(n)
    ]


LAUNCHED = """
import os, signal, sys
from pathlib import Path
from tests.activations.test_processes import SETTINGS, pictures
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.store import Store, dealt

folder, (rank, world), write, wrote = Path(sys.argv[1]), dealt(), Store.write, []

def noted(store, number, states):
    write(store, number, states)
    wrote.append(number)
    if sys.argv[2:] == ["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)

Store.write = noted
found = capture(tiny_llava(), pictures(), store=folder / "store", **SETTINGS)
(folder / f"{rank}-of-{world}").write_text(f"{wrote} {len(found)}")
"""


def test_what_a_killed_process_began_a_launch_of_several_ends_as_one_process_would(tmp_path):
    (tmp_path / "script.py").write_text(LAUNCHED)
    number = {"RANK": "1", "WORLD_SIZE": "2"}
    killed = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path, "killed"],
        check=False,
        timeout=300,
        env=os.environ | WITHOUT_GPUS | number,
    )
    assert killed.returncode == -signal.SIGKILL
    store = Store(tmp_path / "store")
    assert store.done == [1]
    # a process beside it would not have waited for ever
    with pytest.raises(RunError, match=r"missing are 2 shards: 3, 5"):
        await_others(store, 6, 0, 2, wait=5)
    again = launch(tmp_path / "script.py", tmp_path)
    assert again.returncode == 0, again.stderr
    texts = {rank: (tmp_path / f"{rank}-of-2").read_text() for rank in (0, 1)}
    rows = sum(len(states) for states in store.iterate())
    assert texts == {0: f"[0, 2, 4] {rows}", 1: f"[3, 5] {rows}"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    capture(tiny_llava(), pictures(), store=tmp_path / "alone", **SETTINGS)
    torch.set_num_threads(threads)
    files = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "store", tmp_path / "alone")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 2 * len(PLAN) + 1


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    """Of process 0, which has made its shards 0, 2, 4; looked at often."""
    monkeypatch.setattr(processes, "_LOOK_EVERY", 0.01)
    built = Store(tmp_path / "store", PROVENANCE)
    for number in range(0, 6, 2):
        built.write(number, states_of(PLAN[number]))
    return built


def note(store: Store, **fields: object) -> None:
    now = time.time()
    whole = {"host": socket.gethostname(), "process": os.getpid(), "began": now, "at": now} | fields
    (store.folder / ".process-1-of-2.json").write_text(json.dumps(whole))


def gone() -> int:
    """The number of a process that was killed, and that nobody has asked for its end yet.

    It is still in the table.
    """
    process = subprocess.Popen(["sleep", "60"])
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process.pid


def test_a_process_waits_for_the_shards_of_the_others(store):
    came = []

    def run_second():
        mine = Store(store.folder)
        with making_shards(mine, 1, 2):
            for number in (1, 3, 5):
                time.sleep(0.05)
                came.append(number)
                mine.write(number, states_of(PLAN[number]))

    thread = threading.Thread(target=run_second)
    thread.start()
    await_others(store, 6, 0, 2)
    assert came == [1, 3, 5]
    thread.join()
    assert_same(store.states(), states_of(range(11)))
    assert {path.name for path in store.folder.iterdir()} == {"provenance.json", "shards", "index"}


def test_a_damaged_shard_of_another_process_is_waited_for_until_it_is_made_anew(store):
    for number in (1, 3, 5):
        store.write(number, states_of(PLAN[number]))
    file = store.folder / "shards" / "00003.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match=r"no shard came; missing are 1 shards: 3"):
        await_others(store, 6, 0, 2, wait=0.05)
    repair = threading.Timer(0.1, lambda: Store(store.folder).write(3, states_of(PLAN[3])))
    repair.start()
    await_others(store, 6, 0, 2)
    assert store.verify() == []
    repair.join()


def test_a_process_that_was_killed_is_named_with_its_shards(store):
    store.write(1, states_of(PLAN[1]))
    note(store, process=gone())
    with pytest.raises(
        RunError,
        match=(
            r"process 1 of 2 has ended \(number \d+ on .*\); missing are 2 "
            r"shards: 3, 5; .* it continues"
        ),
    ):
        await_others(store, 6, 0, 2)


def test_a_process_that_failed_tells_the_others_why(store):
    with pytest.raises(KeyError), making_shards(store, 1, 2):
        raise KeyError("the cause")
    with pytest.raises(
        RunError,
        match=r"process 1 of 2 failed \(KeyError: 'the cause'\); missing are 3 shards: 1, 3, 5",
    ):
        await_others(store, 6, 0, 2)


def test_a_failure_on_another_machine_is_told_and_an_end_there_is_not_guessed(store):
    note(store, host="elsewhere", process=gone())
    with pytest.raises(RunError, match=r"waited 0\.05 s in which no shard came; missing are 3"):
        await_others(store, 6, 0, 2, wait=0.05)
    note(store, host="elsewhere", failed="StateError: NaN")
    with pytest.raises(RunError, match="StateError: NaN"):
        await_others(store, 6, 0, 2)


def test_what_an_earlier_launch_left_is_no_news(store):
    # On this machine it counts when the process began, by the clock of the processes' table: it
    # runs up to a second apart from the other.
    before = processes._launched() - 1
    for fields in ({"began": before, "at": time.time()}, {"host": "elsewhere", "at": before}):
        note(store, **({"process": gone(), "failed": "KeyboardInterrupt: "} | fields))
        with pytest.raises(RunError, match=r"waited 0\.05 s"):
            await_others(store, 6, 0, 2, wait=0.05)


def test_a_process_of_this_launch_that_ended_is_no_old_news_whatever_the_clocks_say(
    store, monkeypatch
):
    # one clock behind the other
    monkeypatch.setattr(processes.time, "time", lambda: processes._launched() - 1)
    with pytest.raises(KeyError), making_shards(store, 1, 2):
        raise KeyError("the cause")
    with pytest.raises(RunError, match="failed"):
        await_others(store, 6, 0, 2, wait=0.05)


def test_a_new_shard_prolongs_the_wait(store):
    def run_second():
        for number in (1, 3, 5):
            time.sleep(0.25)
            Store(store.folder).write(number, states_of(PLAN[number]))

    thread = threading.Thread(target=run_second)
    thread.start()
    began = time.monotonic()
    await_others(store, 6, 0, 2, wait=0.6)
    assert time.monotonic() - began > 0.6
    thread.join()


def test_one_process_leaves_no_note_and_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(capture_module, "dealt", lambda: (0, 1))
    capture(tiny_llava(), pictures(3), store=tmp_path, wait=0.01, **SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"provenance.json", "shards", "index"}


def test_a_capture_gives_up_where_its_shards_do_not_come_and_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(capture_module, "dealt", lambda: (0, 2))
    with pytest.raises(RunError, match=r"process 0 of 2 waited 0\.1 s .* missing are 1 shards: 1"):
        capture(tiny_llava(), pictures(3), store=tmp_path, wait=0.1, **SETTINGS)
    assert Store(tmp_path).done == [0]


@pytest.mark.parametrize("wait", [-1, float("nan")])
def test_a_wait_that_is_no_time_is_refused(wait):
    with pytest.raises(SelectionError, match=re.escape(f"wait={wait!r}")):
        capture(tiny_llava(), pictures(1), wait=wait, **SETTINGS)
