"""Coordinate several processes that fill one store.

Each process leaves a note in the store's folder, and waits for the shards of the others. No port,
no process group and no order of starting is needed: the processes may run on one machine or on
many, as long as they share the file system.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from xlvlms_tutorial.activations.shards import telling
from xlvlms_tutorial.activations.store import Store
from xlvlms_tutorial.errors import RunError, SelectionError
from xlvlms_tutorial.io import read_json, replacing

WAIT = 1800.0  # seconds, as long as torch's own processes wait for each other
_LOOK_EVERY = 0.5  # seconds


@contextmanager
def making_shards(store: Store, rank: int, world: int) -> Iterator[None]:
    """Leave a note for the other processes while this one makes its shards.

    The note in the folder of ``store`` says who process ``rank`` of ``world`` is and, if it fails,
    why.
    """
    if world == 1:
        yield
        return
    note = _note(store, rank, world)
    record = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "began": psutil.Process().create_time(),
        "at": time.time(),
    }
    with telling(store.folder, rank):  # the number of its first shard too
        _write(note, record)
    try:
        yield
    except BaseException as cause:
        with suppress(OSError):  # a full disk may be the cause, and must be what is raised
            failure = {"failed": f"{type(cause).__name__}: {cause}", "at": time.time()}
            _write(note, record | failure)
        raise
    note.unlink(missing_ok=True)


def await_others(store: Store, n_shards: int, rank: int, world: int, wait: float = WAIT) -> None:
    """Return once all shards exist and are intact.

    ``store`` is to have ``n_shards`` shards, of which process ``rank`` of ``world`` has made its
    own. ``wait`` is the time in seconds without a new shard after which waiting is given up.

    Raises
    ------
    RunError
        If a process that has shards to make has failed or ended, or no shard has come for too long;
        it names the missing shards.
    """
    pending = {number for number in range(n_shards) if number % world != rank}
    launched = _launched()
    deadline = time.monotonic() + wait
    while pending:
        arrived = {number for number in set(store.done) & pending if store.whole(number)}
        if arrived:
            pending -= arrived
            deadline = time.monotonic() + wait
            continue
        for peer in sorted({number % world for number in pending}):
            ending = _end(_note(store, peer, world), launched)
            lost = _lacking(store, pending, peer, world) if ending else []
            if lost:
                raise _given_up(
                    f"process {peer} of {world} {ending}", lost, "its own message says more"
                )
        if time.monotonic() > deadline:
            raise _given_up(
                f"process {rank} of {world} waited {wait:g} s in which no shard came",
                sorted(pending),
                "look whether the others still run, and raise wait if they are slow",
            )
        time.sleep(_LOOK_EVERY)


def checked_wait(wait: float) -> float:
    """Return the time to wait for other processes, in seconds, once it is checked.

    Raises
    ------
    SelectionError
        If it is below 0 or NaN.
    """
    if not wait >= 0:  # NaN neither
        raise SelectionError(
            f"wait={wait!r}", "give seconds, or 0 to take only what this process made"
        )
    return wait


def _given_up(problem: str, missing: list[int], advice: str) -> RunError:
    listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    return RunError(
        f"{problem}; missing are {len(missing)} shards: {listed}",
        f"{advice}; run the same again, it continues",
    )


def _lacking(store: Store, pending: set[int], rank: int, world: int) -> list[int]:
    # the store is read again: the process may have written its last shard just before it ended
    existing = set(store.done)
    missing = []
    for number in sorted(pending):
        if number % world != rank:
            continue
        if number not in existing or not store.whole(number):
            missing.append(number)
    return missing


def _note(store: Store, rank: int, world: int) -> Path:
    return store.folder / f".process-{rank}-of-{world}.json"


def _write(note: Path, record: dict[str, object]) -> None:
    with replacing(note) as draft:
        draft.write_text(json.dumps(record), encoding="utf-8")


def _launched() -> float:
    """When the launcher of this process began: notes from before are of earlier runs."""
    with suppress(psutil.Error):
        return psutil.Process(os.getppid()).create_time()
    return psutil.Process().create_time()


def _end(note: Path, launched: float) -> str | None:
    """How a process ended; None as long as nothing says that it did."""
    try:
        record = read_json(note)
    except (OSError, ValueError):
        # the process has not begun, or has made its shards, or its note is being replaced on a
        # file system whose moves are not atomic
        return None
    same_host = record["host"] == socket.gethostname()
    # The system measures starts by another clock than that of ``at``, up to a second apart: on one
    # machine starts are compared.
    began = record["began"] if same_host else record["at"]
    if began < launched:
        return None
    if "failed" in record:
        return f"failed ({record['failed']})"
    if same_host and not _runs(record["process"]):
        return f"has ended (number {record['process']} on {record['host']})"
    return None


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
