"""The cache folder: what is fetched or converted once, built beside its place and put there whole, and known by its digests."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import platformdirs
from filelock import FileLock
from tqdm.auto import tqdm

from xlvlms_tutorial.errors import CacheFolderError, CacheSpaceError

CACHE_VARIABLE = "XLVLMS_CACHE"
_LARGE = 1_000_000  # bytes: the digest of a larger file is noted on disk, so that it is computed once and not in each session
_NOTES = "digests.json"
_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def cache_dir() -> Path:
    """The folder for what is fetched or converted once: ``XLVLMS_CACHE``, else the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else Path(platformdirs.user_cache_dir("xlvlms"))


@contextmanager
def building(folder: Path, needed: int) -> Iterator[Path]:
    """Hold the lock of ``folder`` and give an empty folder beside it to build in, removed at the end.

    Raises
    ------
    CacheSpaceError
        If fewer than ``needed`` bytes are free, or the disk fills up meanwhile.
    CacheFolderError
        If the folder cannot be written.
    """
    beside = folder.parent
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"), _empty_folder(folder) as build:
            require_space(beside, needed)
            yield build
    except OSError as cause:
        if cause.errno == errno.ENOSPC:
            raise CacheSpaceError(beside, needed, shutil.disk_usage(beside).free, CACHE_VARIABLE) from cause
        if cause.errno in _REFUSALS:
            raise CacheFolderError(beside, cause, CACHE_VARIABLE) from cause
        raise


@contextmanager
def _empty_folder(folder: Path) -> Iterator[Path]:
    for stale in folder.parent.glob(f"{folder.name}.build-*"):  # left by a killed process: the lock is ours now
        shutil.rmtree(stale, ignore_errors=True)
    build = folder.with_name(f"{folder.name}.build-{os.getpid()}")
    build.mkdir()
    try:
        yield build
    finally:
        shutil.rmtree(build, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """Check that ``needed`` bytes are free on the disk of ``folder``.

    Raises
    ------
    CacheSpaceError
        If they are not.
    """
    available = shutil.disk_usage(folder).free
    if available < needed:
        raise CacheSpaceError(folder, needed, available, CACHE_VARIABLE)


def put(build: Path, folder: Path) -> None:
    """Put a folder that was built in its place at once; what lay there is moved away first, whole."""
    old = folder.with_name(f"{folder.name}.build-old")  # a name that the next build removes as stale
    if folder.exists():
        os.replace(folder, old)
    os.replace(build, folder)
    shutil.rmtree(old, ignore_errors=True)


def say(message: str) -> None:
    """Tell the user something on the error stream, without breaking a progress bar."""
    tqdm.write(message, file=sys.stderr)


def digest(path: Path) -> str:
    """sha256 of a file, computed once for each size and time of change; "no file" where there is none."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return "no file"
    return _digest(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int) -> str:
    notes = cache_dir() / _NOTES
    known = _read(notes).get(str(path))
    if known and known[:2] == [size, changed]:
        return known[2]
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if size > _LARGE:
        _write(notes, _read(notes) | {str(path): [size, changed, found]})
    return found


def _read(notes: Path) -> dict[str, list]:
    try:
        content = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # only a memory: without it the digest is computed again
    return content if isinstance(content, dict) else {}


def _write(notes: Path, content: dict[str, list]) -> None:
    draft = notes.with_name(f"{notes.name}.{os.getpid()}")
    try:
        notes.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(draft, notes)
    except OSError:
        draft.unlink(missing_ok=True)  # a memory that cannot be written costs time, nothing else
