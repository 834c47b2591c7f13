"""Share out the GPUs of one machine as slots.

A job holds a lock on each that it uses, so that no two jobs, of any batch, share one.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from xlvlms_tutorial.errors import RunError, SelectionError

VARIABLE = "CUDA_VISIBLE_DEVICES"
PAUSE = 2.0  # seconds between two looks for a free GPU


def devices(number: int) -> list[str]:
    """Name the first ``number`` GPUs.

    Of those that ``CUDA_VISIBLE_DEVICES`` lists where it is set.

    Raises
    ------
    SelectionError
        If it lists fewer.
    """
    if (visible := os.environ.get(VARIABLE)) is None:
        return [str(k) for k in range(number)]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if len(names) < number:
        raise SelectionError(
            f"{number} GPUs asked for, but {VARIABLE}={visible!r}",
            f"give {len(names)} or fewer, or set it to more",
        )
    return names[:number]


@contextmanager
def gpus(wanted: int, among: int, folder: Path | None = None) -> Iterator[str]:
    """Hold GPUs of this machine, waiting until they are free.

    ``CUDA_VISIBLE_DEVICES`` is set to them, and yielded. No GPU is visible where none is wanted.

    Parameters
    ----------
    wanted : int
        GPUs to hold.
    among : int
        GPUs of the machine, the first ones.
    folder : pathlib.Path, optional
        Where the locks lie, by default in a folder for this user on this machine. The operating
        system lets go of them when their holder is killed.

    Yields
    ------
    str
        The value of ``CUDA_VISIBLE_DEVICES``.

    Raises
    ------
    SelectionError
        If more are wanted than there are.
    RunError
        If the locks cannot be held: another user has made their folder, or it cannot be written.
    """
    names = devices(among)
    previous = os.environ.get(VARIABLE)
    if wanted > among:
        raise SelectionError(
            f"{wanted} GPUs wanted of {among}", "give a number of GPUs that this machine has"
        )
    folder = folder or _own_folder(
        Path(tempfile.gettempdir()) / f"xlvlms-gpus-{os.getuid() if hasattr(os, 'getuid') else ''}"
    )
    with ExitStack() as locks:
        while len(acquired := _acquire(names, wanted, folder, locks)) < wanted:
            # never hold some while waiting for others: two such jobs would wait for each other
            locks.close()
            time.sleep(PAUSE)
        os.environ[VARIABLE] = ",".join(acquired)
        try:
            yield os.environ[VARIABLE]
        finally:
            if previous is None:
                os.environ.pop(VARIABLE)
            else:
                os.environ[VARIABLE] = previous


def _own_folder(folder: Path) -> Path:
    """The folder for the locks, if it is this user's.

    In the temporary folder anyone may have made one of its name first.
    """
    with _locking(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # of a link, who made the link
        if hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid():
            raise PermissionError("it belongs to another user")
    return folder


@contextmanager
def _locking(folder: Path) -> Iterator[None]:
    """Say what to do where the system refuses a lock."""
    try:
        yield
    except Timeout:
        raise
    except OSError as cause:
        message = f"the locks of GPUs in {folder} cannot be held ({cause.strerror or cause})"
        raise RunError(
            message, "set TMPDIR to a folder of your own, the same one for all batches"
        ) from cause


def _acquire(names: list[str], count: int, folder: Path, locks: ExitStack) -> list[str]:
    acquired: list[str] = []
    for name in names:
        if len(acquired) == count:
            break
        try:
            with _locking(folder):
                locks.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
        except Timeout:
            continue
        acquired.append(name)
    return acquired
