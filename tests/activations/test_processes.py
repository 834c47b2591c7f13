"""Several processes fill one store.

Each makes its shards and returns the whole, or names the shards that did not come.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.made_states import PROVENANCE, assert_same, states_of
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.store import ActivationStore, shard_plan
from xlvlms_tutorial.errors import InputError, RunError
from xlvlms_tutorial.samples import Sample

# the package offers a function of this name
capture_module = import_module("xlvlms_tutorial.activations.capture")
ROOT = Path(__file__).parents[2]
ASKED = {
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
from tests.activations.test_processes import ASKED, pictures
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.store import ActivationStore, dealt

folder, (rank, world), write, wrote = Path(sys.argv[1]), dealt(), ActivationStore.write, []

def noted(store, number, states):
    write(store, number, states)
    wrote.append(number)
    if sys.argv[2:] == ["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)

ActivationStore.write = noted
found = capture(tiny_llava(), pictures(), store=folder / "store", **ASKED)
(folder / f"{rank}-of-{world}").write_text(f"{wrote} {len(found)}")
"""


TOLD = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(folder: Path) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --multi_gpu starts the processes, whether there are GPUs or not; with
    # --cpu accelerate starts one alone
    asked = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *asked,
        "--main_process_port",
        str(port),
    ]
    return subprocess.run(
        [*command, folder / "script.py", folder],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=TOLD,
    )


def test_what_a_killed_process_began_a_launch_of_several_ends_as_one_process_would(tmp_path):
    (tmp_path / "script.py").write_text(LAUNCHED)
    number = {"RANK": "1", "WORLD_SIZE": "2"}
    killed = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path, "killed"],
        check=False,
        timeout=300,
        env=TOLD | number,
    )
    assert killed.returncode == -signal.SIGKILL
    store = ActivationStore(tmp_path / "store")
    assert store.done == [1]
    # a process beside it would not have waited for ever
    with pytest.raises(RunError, match=r"missing are 2 shards: 3, 5"):
        capture_module._await_shards(store, 6, 0, 2, wait=5)
    again = launch(tmp_path)
    assert again.returncode == 0, again.stderr
    made = {rank: (tmp_path / f"{rank}-of-2").read_text() for rank in (0, 1)}
    rows = sum(len(states) for states in store.iterate())
    assert made == {0: f"[0, 2, 4] {rows}", 1: f"[3, 5] {rows}"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    capture(tiny_llava(), pictures(), store=tmp_path / "alone", **ASKED)
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
def store(tmp_path, monkeypatch) -> ActivationStore:
    """Of process 0, which has made its shards 0, 2, 4; looked at often."""
    monkeypatch.setattr(capture_module, "_LOOK_EVERY", 0.01)
    made = ActivationStore(tmp_path / "store", PROVENANCE)
    for number in range(0, 6, 2):
        made.write(number, states_of(PLAN[number]))
    return made


def await_others(store: ActivationStore, wait: float = 60) -> None:
    """Wait as process 0 of 2 for the 6 shards of the plan."""
    capture_module._await_shards(store, 6, 0, 2, wait)


def test_a_process_waits_for_the_shards_of_the_others(store):
    came = []

    def other():
        for number in (1, 3, 5):
            time.sleep(0.05)
            came.append(number)
            ActivationStore(store.folder).write(number, states_of(PLAN[number]))

    thread = threading.Thread(target=other)
    thread.start()
    await_others(store)
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
        await_others(store, wait=0.05)
    repair = threading.Timer(
        0.1, lambda: ActivationStore(store.folder).write(3, states_of(PLAN[3]))
    )
    repair.start()
    await_others(store)
    assert store.verify() == []
    repair.join()


def test_a_new_shard_prolongs_the_wait(store):
    def other():
        for number in (1, 3, 5):
            time.sleep(0.5)
            ActivationStore(store.folder).write(number, states_of(PLAN[number]))

    thread = threading.Thread(target=other)
    thread.start()
    began = time.monotonic()
    await_others(store, wait=1.2)
    assert time.monotonic() - began > 1.2
    thread.join()


def test_one_process_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(capture_module, "dealt", lambda: (0, 1))
    capture(tiny_llava(), pictures(3), store=tmp_path, wait=0.01, **ASKED)
    assert {path.name for path in tmp_path.iterdir()} == {"provenance.json", "shards", "index"}


def test_a_capture_gives_up_where_its_shards_do_not_come_and_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(capture_module, "dealt", lambda: (0, 2))
    with pytest.raises(RunError, match=r"process 0 of 2 waited 0\.1 s .* missing are 1 shards: 1"):
        capture(tiny_llava(), pictures(3), store=tmp_path, wait=0.1, **ASKED)
    assert ActivationStore(tmp_path).done == [0]


@pytest.mark.parametrize("wait", [-1, float("nan")])
def test_a_wait_that_is_no_time_is_refused(wait):
    with pytest.raises(InputError, match=re.escape(f"wait={wait!r}")):
        capture(tiny_llava(), pictures(1), wait=wait, **ASKED)
