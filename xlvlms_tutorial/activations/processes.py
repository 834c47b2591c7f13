"""Several processes that fill one store.

Who they are, what became of them, and how one waits for the shards of the others. All goes through
the store's folder, so that no port, no process group and no order of starting is needed: processes
of one machine or of many, which share the file system.
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
    """Tell the other processes who this one is, while it makes its shards.

    And if it cannot go on, why.
    """
    if world == 1:
        yield
        return
    note = _note(store, rank, world)
    told = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "began": psutil.Process().create_time(),
        "at": time.time(),
    }
    with telling(store.folder, rank):  # the number of its first shard too
        _write(note, told)
    try:
        yield
    except BaseException as cause:
        with suppress(OSError):  # a full disk may be the cause, and that is what must be told
            _write(note, told | {"failed": f"{type(cause).__name__}: {cause}", "at": time.time()})
        raise
    note.unlink(missing_ok=True)


def await_others(store: Store, n_shards: int, rank: int, world: int, wait: float = WAIT) -> None:
    """Return once all shards are there, whole.

    ``wait`` is the time in seconds without a new shard after which that is given up.

    Raises
    ------
    RunError
        If a process that has shards to make has failed or ended, or no shard has come for too
        long, with the missing shards.
    """
    left = {number for number in range(n_shards) if number % world != rank}
    since = _launched()
    until = time.monotonic() + wait
    while left:
        there = set(store.done) & left
        if come := {number for number in there if store.whole(number)}:
            left, until = left - come, time.monotonic() + wait
            continue
        for other in sorted({number % world for number in left}):
            if (end := _end(_note(store, other, world), since)) and (
                lost := _lacking(store, left, other, world)
            ):
                raise _given_up(
                    f"process {other} of {world} {end}", lost, "its own message says more"
                )
        if time.monotonic() > until:
            waited = f"process {rank} of {world} waited {wait:g} s in which no shard came"
            raise _given_up(
                waited,
                sorted(left),
                "look whether the others still run, and raise wait if they are slow",
            )
        time.sleep(_LOOK_EVERY)


def checked_wait(wait: float) -> float:
    """The time to wait for others, in seconds.

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


def _given_up(what: str, lost: list[int], advice: str) -> RunError:
    shown = ", ".join(map(str, lost[:10])) + (", ..." if len(lost) > 10 else "")
    return RunError(
        f"{what}; missing are {len(lost)} shards: {shown}",
        f"{advice}; run the same again, it continues",
    )


def _lacking(store: Store, left: set[int], other: int, world: int) -> list[int]:
    # looked at once more: it may have written the last one just before it ended
    there = set(store.done)
    return sorted(
        number
        for number in left
        if number % world == other and not (number in there and store.whole(number))
    )


def _note(store: Store, rank: int, world: int) -> Path:
    return store.folder / f".process-{rank}-of-{world}.json"


def _write(note: Path, told: dict[str, object]) -> None:
    with replacing(note) as draft:
        draft.write_text(json.dumps(told), encoding="utf-8")


def _launched() -> float:
    """When the launcher of this process began: notes of before are of earlier runs."""
    with suppress(psutil.Error):
        return psutil.Process(os.getppid()).create_time()
    return psutil.Process().create_time()


def _end(note: Path, since: float) -> str | None:
    """How a process ended, None as long as nothing says that it did."""
    try:
        told = read_json(note)
    except (OSError, ValueError):
        # not there yet, or made its shards, or is being read on a file
        # system whose moves are not atomic
        return None
    here = told["host"] == socket.gethostname()
    # The system counts starts in another clock than that of ``at``, up to a second apart: on
    # one machine starts are compared.
    if (told["began"] if here else told["at"]) < since:
        return None
    if "failed" in told:
        return f"failed ({told['failed']})"
    gone = here and not _runs(told["process"])
    return f"has ended (number {told['process']} on {told['host']})" if gone else None


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
