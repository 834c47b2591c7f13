"""One shard of a store.

Its tensors and its part of the index, made as drafts and moved to their
places by one atomic step each.
"""

import errno
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xlvlms_tutorial.activations.activations import Key, States, described
from xlvlms_tutorial.errors import (
    DamagedShardError,
    SelectionError,
    StoreError,
    StoreSpaceError,
    XlvlmsError,
)
from xlvlms_tutorial.io import digest, file_digest

# the columns that the index has beyond those of States.table: where a row lies
ADDED = ("shard", "row")
_DRAFT = re.compile(r"\.(\d+)\.(.+)\.(\d+)(?:-(\d+))?")  # .shard.host.process-thread
# seconds: no write takes so long, so an older draft was left by a killed
# process, of whatever other machine
_DAY = 86_400
_PART = re.compile(r"[0-9]{5}|[1-9][0-9]{5,}")
_FULL = {errno.ENOSPC, errno.EDQUOT}
# the names in the metadata of a part of the index
_TOLD = ("sha256", "bytes", "tensors", "columns")
# in the metadata too, since a shard without rows says nowhere else which one it is
_NUMBER = "number"
# columns whose type is known even in a shard that has no value for them
_WHOLE_NUMBERS = {"sample", "position"}


class Record(NamedTuple):
    """What a part of the index says of its shard's file.

    Digest, size in bytes, number format and row shape of each tensor.
    """

    sha256: str
    size: int
    tensors: dict[str, list]


class Shard:
    """The two files of a shard, ``shards/00012.safetensors`` and ``index/00012.parquet``.

    It is there if the second one is.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.names = f"shards/{number:05d}.safetensors", f"index/{number:05d}.parquet"
        self.file, self.part = (folder / name for name in self.names)
        # what the files were when they were last found whole, so that they are hashed once
        self._whole: tuple | None = None

    def index(self) -> pa.Table:
        """The shard's part of the index; ``DamagedShardError`` if it cannot be read."""
        with self._reading(), pq.ParquetFile(self.part, page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
            if _columns(table.schema, len(table)) != self._metadata(table.schema)["columns"]:
                raise ValueError("its columns are not those that were written")
            if set(table.column("shard").unique().to_pylist()) - {self.number}:
                raise ValueError("it is a copy of another shard's")
            return table

    def record(self) -> Record:
        """What the index says of the tensors' file; ``DamagedShardError`` if it cannot be read."""
        with self._reading():
            told = self._metadata(pq.read_schema(self.part))
            return Record(told["sha256"], int(told["bytes"]), json.loads(told["tensors"]))

    def _metadata(self, schema: pa.Schema) -> dict[str, str]:
        """What the metadata says, of this shard.

        Earlier versions did not write of which one it is.
        """
        metadata = _told(schema)
        if metadata.get(_NUMBER, str(self.number)) != str(self.number):
            raise ValueError("it is a copy of another shard's")
        return metadata

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except DamagedShardError:
            raise
        except PermissionError as cause:
            raise StoreError(self.folder, cause) from cause
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as cause:
            raise DamagedShardError([self.names[1]], self.folder) from cause

    def damage(self) -> str | None:
        """The name of the file that is damaged, None where both are whole.

        Whole files are read once, and then known by their stamp.
        """
        try:
            record = self.record()
            state = self.file.stat()
            stamp = (record, state.st_size, state.st_mtime_ns, state.st_ino)
            if stamp != self._whole and not self._as_recorded(record, self.index()):
                return self.names[0]
        except (DamagedShardError, FileNotFoundError, SafetensorError) as cause:
            return self.names[1] if isinstance(cause, DamagedShardError) else self.names[0]
        self._whole = stamp
        return None

    def _as_recorded(self, record: Record, index: pa.Table) -> bool:
        rows = index.column("row").to_numpy()
        if (
            not np.array_equal(rows, np.arange(len(rows)))
            or self.file.stat().st_size != record.size
            or file_digest(self.file) != record.sha256
        ):
            return False
        with safe_open(self.file, "pt") as file:
            # the file is not a dictionary
            found = {
                name: list(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118
            }
        return found == {name: [len(rows), *shape] for name, (_, *shape) in record.tensors.items()}

    def read(self, keys: list[Key], rows: Int[Tensor, " m"]) -> dict[Key, Shaped[Tensor, "m ..."]]:
        """These rows of these tensors; the others stay on the disk.

        ``DamagedShardError`` if the shard is not whole.
        """
        if damaged := self.damage():
            raise DamagedShardError([damaged], self.folder)
        with safe_open(self.file, "pt") as file:
            return {
                (layer, place): file.get_tensor(f"{layer}/{place}")[rows] for layer, place in keys
            }

    def write(self, states: States, keep: bool) -> None:
        """Write both files; with ``keep``, what is there must be the same."""
        with drafting(self.folder, self.number) as draft:
            save_file(_apart(states.tensors), draft / "shard")
            record = Record(
                file_digest(draft / "shard"), (draft / "shard").stat().st_size, described(states)
            )
            index = self._indexed(states, record)
            if keep and self.part.exists() and not same(index, self.index()):
                raise StoreError(self.folder, "it already holds other states")
            pq.write_table(index, draft / "part", write_page_checksum=True)
            self._put(draft, record.sha256)

    def copy(self, other: "Shard") -> None:
        """Copy both files from another store."""
        with drafting(self.folder, self.number) as draft:
            shutil.copyfile(other.file, draft / "shard")
            shutil.copyfile(other.part, draft / "part")
            if (copied := file_digest(draft / "shard")) != other.record().sha256:
                raise DamagedShardError([self.names[0]], other.folder)
            self._put(draft, copied)

    def remove(self) -> None:
        """Remove both files, the part of the index first."""
        with telling(self.folder, self.number):
            self.part.unlink(missing_ok=True)
            self.file.unlink(missing_ok=True)

    def _put(self, draft: Path, digest: str) -> None:
        """Move a draft to its place, the part of the index last.

        Until then the shard is not there.
        """
        for path in (draft / "shard", draft / "part"):
            os.chmod(path, 0o644)  # safetensors makes private files; results need not be
            sync(path)
        # an index must never stand beside other tensors than its own
        if self.part.exists() and self._recorded_digest() != digest:
            self.part.unlink(missing_ok=True)
            sync(self.part.parent)
        for drafted, path in ((draft / "shard", self.file), (draft / "part", self.part)):
            path.parent.mkdir(exist_ok=True)
            os.replace(drafted, path)
            sync(path.parent)
        sync(self.folder)

    def _recorded_digest(self) -> str:
        try:
            return self.record().sha256
        except DamagedShardError:
            return "damaged"  # the draft is going to replace it

    def _indexed(self, states: States, record: Record) -> pa.Table:
        if taken := set(ADDED) & set(states.table.columns):
            raise SelectionError(
                f"the table has a column {min(taken)!r}",
                "rename it: the index keeps there where a row lies",
            )
        table = states.table.assign(shard=self.number, row=np.arange(len(states)))
        found = pa.Table.from_pandas(table, preserve_index=False)
        schema = pa.schema(
            [field.with_type(_stored_type(field, len(states))) for field in found.schema]
        )
        told = {
            "sha256": record.sha256,
            "bytes": str(record.size),
            "tensors": json.dumps(record.tensors),
            _NUMBER: str(self.number),
        }
        told |= {"columns": _columns(schema, len(states))}
        return found.cast(schema.with_metadata(told | {"check": digest(told)}))


def numbers(folder: Path) -> list[int]:
    """The numbers of the shards that are in a folder, in order."""
    return sorted(
        int(part.stem)
        for part in (folder / "index").glob("*.parquet")
        if _PART.fullmatch(part.stem)
    )


def same(one: pa.Table, other: pa.Table) -> bool:
    """Whether two parts of an index hold the same rows, and record the same tensors."""
    said, also = (_told(part.schema) for part in (one, other))
    return one.equals(other) and all(said[name] == also[name] for name in _TOLD)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def telling(folder: Path, number: int) -> Iterator[None]:
    """Say what a failed write means.

    ``StoreSpaceError`` for a full disk or quota, ``StoreError`` for all else.
    """
    try:
        yield
    except XlvlmsError:
        raise
    except (OSError, SafetensorError, pa.ArrowException) as cause:
        if _error_number(cause) in _FULL:
            raise StoreSpaceError(folder, number, len(numbers(folder))) from cause
        raise StoreError(folder, f"shard {number} cannot be written ({cause})") from cause


@contextmanager
def drafting(folder: Path, number: int) -> Iterator[Path]:
    """Give an empty hidden folder inside ``folder`` to make files in.

    It is removed at the end with what is still in it.
    """
    draft = folder / f".{number:05d}.{socket.gethostname()}.{os.getpid()}-{threading.get_ident()}"
    with telling(folder, number):
        try:
            _sweep(folder, number)
            draft.mkdir(parents=True)
            yield draft
        finally:
            # if that fails the next write of this shard removes it
            shutil.rmtree(draft, ignore_errors=True)


def _sweep(folder: Path, number: int) -> None:
    """Remove what killed processes left.

    Drafts of this shard whose process is gone, and any of other machines that is older than a day.
    Clocks may jump: a draft of this machine is left alone as long as its process lives.
    """
    for draft in folder.glob(".*.*.*"):
        if not (named := _DRAFT.fullmatch(draft.name)):
            continue
        with suppress(FileNotFoundError):  # its process has just finished
            process, here = int(named[3]), named[2] == socket.gethostname()
            own = process == os.getpid() and named[4] in (None, str(threading.get_ident()))
            lives = here and not own and psutil.pid_exists(process)
            if not lives and (
                (here and int(named[1]) == number) or time.time() - draft.stat().st_mtime > _DAY
            ):
                shutil.rmtree(draft)


def _error_number(cause: Exception) -> int | None:
    if isinstance(cause, OSError):
        return cause.errno
    # safetensors passes on what the system said as text
    told = re.search(r"os error (\d+)", str(cause))
    return int(told[1]) if told else None


def _apart(tensors: dict[Key, Tensor]) -> dict[str, Tensor]:
    """The tensors by name, contiguous, and copied where they share memory.

    A file of safetensors does not share.
    """
    ready: dict[str, Tensor] = {}
    taken: list[tuple[int, int]] = []
    for (layer, place), tensor in tensors.items():
        flat = tensor.contiguous()
        start, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
        ready[f"{layer}/{place}"] = (
            flat.clone()
            if any(start < other_end and other < end for other, other_end in taken)
            else flat
        )
        taken.append((start, end))
    return ready


def _told(schema: pa.Schema) -> dict[str, str]:
    """What the metadata of a part of the index says.

    Parquet has checksums for values only, so that it needs one of its own.
    """
    metadata = schema.metadata or {}
    found = {name: metadata[name.encode()].decode() for name in _TOLD}
    found |= {_NUMBER: metadata[_NUMBER.encode()].decode()} if _NUMBER.encode() in metadata else {}
    if metadata[b"check"].decode() != digest(found):
        raise ValueError("the metadata was changed")
    return found


def _columns(schema: pa.Schema, rows: int) -> str:
    return json.dumps([rows, *([field.name, str(field.type)] for field in schema)])


def _stored_type(field: pa.Field, rows: int) -> pa.DataType:
    """One type for each column in all shards, also where a shard has no value that shows it.

    For pandas an empty list is float.
    """
    if pa.types.is_null(field.type) or (rows == 0 and pa.types.is_floating(field.type)):
        return pa.int64() if field.name in _WHOLE_NUMBERS else pa.string()
    if pa.types.is_dictionary(field.type):
        return field.type.value_type
    return pa.string() if pa.types.is_large_string(field.type) else field.type


def torch_dtype(name: str) -> torch.dtype:
    """The number format that ``str(dtype)`` names."""
    return getattr(torch, name.removeprefix("torch."))
