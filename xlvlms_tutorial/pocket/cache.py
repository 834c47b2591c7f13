"""Keep what is fetched or converted once in the cache folder.

Built beside its place and put there whole, and known by its digests.
"""

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partialmethod
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from xlvlms_tutorial.errors import XlvlmsError, full_cache, unusable_cache
from xlvlms_tutorial.io import file_digest, read_json, write_json

CACHE_VARIABLE = "XLVLMS_CACHE"
# bytes: the digest of a larger file is noted on disk, so that it is
# computed once and not in each session
_LARGE = 1_000_000
_NOTES = "digests.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


def cache_dir() -> Path:
    """The folder for what is fetched or converted once.

    ``XLVLMS_CACHE``, else the user's cache folder. Where there is no home folder, as in some
    containers, it is one below the system's temporary folder, and that is said.

    Raises
    ------
    AssetError
        If the folder named has a ``~`` that stands for nothing, or no working directory to be in,
        or the one below the temporary folder is another user's.
    """
    if configured := os.environ.get(CACHE_VARIABLE):
        folder = os.path.expanduser(configured)
        if folder.startswith("~"):
            raise unusable_cache(
                configured, "no home folder is known that ~ could stand for", CACHE_VARIABLE
            )
        try:
            return Path(folder).absolute()
        except FileNotFoundError as cause:
            raise unusable_cache(
                configured,
                "the working directory, below which it would be, was removed",
                CACHE_VARIABLE,
            ) from cause
    try:
        usual = Path(platformdirs.user_cache_dir("xlvlms"))
    except RuntimeError:  # what newer versions say where older ones leave a ~
        usual = Path("~")
    if _has_home(usual):
        return usual
    return _without_home(Path(tempfile.gettempdir()) / f"xlvlms-{_user()}")


def _has_home(folder: Path) -> bool:
    """Whether a home folder is there.

    Without one, what is named is "~", or would be made right below the root.
    """
    nearest = next((place for place in (folder, *folder.parents) if os.path.exists(place)), None)
    return folder.is_absolute() and nearest is not None and nearest != Path(folder.anchor)


@lru_cache
def _without_home(folder: Path) -> Path:
    # anyone may put files into the temporary folder
    if os.path.lexists(folder) and folder.lstat().st_uid != _user():
        raise unusable_cache(folder, "it belongs to another user", CACHE_VARIABLE)
    say(
        f"There is no home folder: what is fetched and converted is kept in {folder}; set "
        f"{CACHE_VARIABLE} for another place."
    )
    return folder


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


@contextmanager
def building(folder: Path, needed: int) -> Iterator[Path]:
    """Hold the lock of ``folder`` and give an empty folder beside it to build in.

    It is removed at the end.

    Raises
    ------
    AssetError
        If fewer than ``needed`` bytes are free, or the disk fills up meanwhile. If the folder
        cannot be written.
    """
    beside = folder.parent
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"), _empty_folder(folder) as build:
            require_space(beside, needed)
            yield build
    except XlvlmsError:
        raise
    except Exception as cause:
        if (number := _error_number(cause)) in _FULL:
            raise full_cache(
                beside, needed, shutil.disk_usage(beside).free, CACHE_VARIABLE
            ) from cause
        if (number in _REFUSALS or not os.path.isdir(beside)) and _concerns(cause, beside):
            raise unusable_cache(beside, cause, CACHE_VARIABLE) from cause
        raise


def _error_number(cause: Exception) -> int | None:
    """The number of the operating system's error.

    Libraries written in Rust hide it in the text of an error of their own.
    """
    if isinstance(cause, OSError) and cause.errno:
        return cause.errno
    hidden = re.search(r"\(os error (\d+)\)", str(cause))
    return int(hidden[1]) if hidden else None


def _concerns(cause: Exception, folder: Path) -> bool:
    """Whether an error is about the cache folder, one above it or one inside.

    And not about a file elsewhere.
    """
    filename = getattr(cause, "filename", None)
    place = folder if filename is None else Path(os.fsdecode(filename))
    return place == folder or folder in place.parents or place in folder.parents


def sweep() -> list[Path]:
    """Remove what killed processes left half-built, of any version, and return these folders.

    What a living process builds is left.
    """
    removed = []
    folder = cache_dir()
    if not os.path.isdir(folder):
        return removed
    for build in (
        *sorted(folder.glob("*.build-*")),
        *sorted((folder / "wheels").glob("*.build-*")),
    ):
        lock = build.with_name(f"{build.name.rpartition('.build-')[0]}.lock")
        try:
            with FileLock(lock, timeout=0):
                shutil.rmtree(build)
        except (Timeout, OSError):
            continue  # at work, or not ours to remove
        removed.append(build)
    return removed


@contextmanager
def _empty_folder(folder: Path) -> Iterator[Path]:
    # left by a killed process: the lock is ours now
    for stale in folder.parent.glob(f"{folder.name}.build-*"):
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
    AssetError
        If they are not.
    """
    available = shutil.disk_usage(folder).free
    if available < needed:
        raise full_cache(folder, needed, available, CACHE_VARIABLE)


def put(build: Path, folder: Path) -> None:
    """Put a folder that was built in its place at once.

    What lay there is moved away first, whole.
    """
    # a name that the next build removes as stale
    old = folder.with_name(f"{folder.name}.build-old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(build, folder)
    shutil.rmtree(old, ignore_errors=True)


def quiet() -> bool:
    """Whether bars and notes are unwanted, as on pages: ``TQDM_DISABLE`` is set.

    In notebooks tqdm itself does not look at it.
    """
    return os.environ.get("TQDM_DISABLE", "").strip().lower() not in ("", "0", "false", "no", "off")


def say(message: str) -> None:
    """Tell the user something on the error stream, without breaking a progress bar.

    Nothing where bars are unwanted.
    """
    if not quiet():
        tqdm.write(message, file=sys.stderr)


@contextmanager
def hushed() -> Iterator[None]:
    """Show none of the bars of libraries where bars are unwanted: they take no option for it."""
    if not quiet():
        yield
        return
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original


def digest(path: Path) -> str:
    """Compute the sha256 of a file, once for each size and time of change.

    "no file" where there is none.
    """
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "no file"
    return _digest(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int) -> str:
    notes = cache_dir() / _NOTES
    note = _read(notes).get(str(path))
    if note and note[:2] == [size, changed]:
        return note[2]
    sha256 = file_digest(path)
    if size > _LARGE:
        with suppress(OSError):  # a memory that cannot be written costs time, nothing else
            write_json(notes, _read(notes) | {str(path): [size, changed, sha256]}, indent=1)
    return sha256


def _read(notes: Path) -> dict[str, list]:
    try:
        content = read_json(notes)
    except (OSError, ValueError, RecursionError):
        return {}  # only a memory: without it the digest is computed again
    if not isinstance(content, dict):
        return {}
    return {name: note for name, note in content.items() if _is_note(note)}


def _is_note(note: object) -> bool:
    return isinstance(note, list) and len(note) == 3 and isinstance(note[2], str)
