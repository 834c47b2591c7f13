"""One shard of a store: its tensors and its part of the index.

Both are written as drafts, and each is moved to its place by one atomic step.
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
# seconds: no write takes so long, so an older draft was left by a killed process, on whichever
# machine
_STALE_AFTER = 86_400
_PART = re.compile(r"[0-9]{5}|[1-9][0-9]{5,}")
_FULL = {errno.ENOSPC, errno.EDQUOT}
# the entries in the metadata of a part of the index
_ENTRIES = ("sha256", "bytes", "tensors", "columns")
# in the metadata too: in a shard without rows nothing else says which shard it is
_NUMBER = "number"
# columns whose type is known even in a shard that has no value for them
_INTEGER_COLUMNS = {"sample", "position"}


class Record(NamedTuple):
    """What a part of the index records of its shard's file.

    It holds the sha256, the size in bytes, and the dtype and row shape of each tensor.
    """

    sha256: str
    size: int
    tensors: dict[str, list]


class Shard:
    """The two files of a shard, ``shards/00012.safetensors`` and ``index/00012.parquet``.

    The shard exists if the second file does.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.names = f"shards/{number:05d}.safetensors", f"index/{number:05d}.parquet"
        self.file, self.part = (folder / name for name in self.names)
        # the files when they were last found intact, so that they are hashed once
        self._intact_stamp: tuple | None = None

    def index(self) -> pa.Table:
        """Read the shard's part of the index; ``DamagedShardError`` if it cannot be read."""
        with self._reading(), pq.ParquetFile(self.part, page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
            if _columns(table.schema, len(table)) != self._metadata(table.schema)["columns"]:
                raise ValueError("its columns are not those that were written")
            if set(table.column("shard").unique().to_pylist()) - {self.number}:
                raise ValueError("it is a copy of another shard's")
            return table

    def record(self) -> Record:
        """Read what the index records of the tensors' file; ``DamagedShardError`` if it cannot."""
        with self._reading():
            metadata = self._metadata(pq.read_schema(self.part))
            return Record(
                metadata["sha256"], int(metadata["bytes"]), json.loads(metadata["tensors"])
            )

    def _metadata(self, schema: pa.Schema) -> dict[str, str]:
        """The metadata of the index, which must be of this shard.

        Earlier versions did not record the shard's number.
        """
        metadata = _metadata_entries(schema)
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
        """Return the name of the damaged file, or None where both are intact.

        Intact files are hashed once, and later recognised by size, time and inode.
        """
        try:
            record = self.record()
            status = self.file.stat()
            stamp = (record, status.st_size, status.st_mtime_ns, status.st_ino)
            if stamp != self._intact_stamp and not self._as_recorded(record, self.index()):
                return self.names[0]
        except (DamagedShardError, FileNotFoundError, SafetensorError) as cause:
            return self.names[1] if isinstance(cause, DamagedShardError) else self.names[0]
        self._intact_stamp = stamp
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
            names = file.keys()
            shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
        return shapes == {name: [len(rows), *shape] for name, (_, *shape) in record.tensors.items()}

    def read(self, keys: list[Key], rows: Int[Tensor, " m"]) -> dict[Key, Shaped[Tensor, "m ..."]]:
        """Read these rows of these tensors; the others stay on the disk.

        It raises ``DamagedShardError`` if the shard is not intact.
        """
        if damaged := self.damage():
            raise DamagedShardError([damaged], self.folder)
        with safe_open(self.file, "pt") as file:
            return {
                (layer, place): file.get_tensor(f"{layer}/{place}")[rows] for layer, place in keys
            }

    def write(self, states: States, keep: bool) -> None:
        """Write both files; with ``keep``, an existing shard must hold the same."""
        with drafting(self.folder, self.number) as draft:
            save_file(_without_sharing(states.tensors), draft / "shard")
            record = Record(
                file_digest(draft / "shard"), (draft / "shard").stat().st_size, described(states)
            )
            index = self._indexed(states, record)
            if keep and self.part.exists() and not same(index, self.index()):
                raise StoreError(self.folder, "it already holds other states")
            pq.write_table(index, draft / "part", write_page_checksum=True)
            self._put(draft, record.sha256)

    def copy(self, source: "Shard") -> None:
        """Copy both files from another store."""
        with drafting(self.folder, self.number) as draft:
            shutil.copyfile(source.file, draft / "shard")
            shutil.copyfile(source.part, draft / "part")
            if (copied := file_digest(draft / "shard")) != source.record().sha256:
                raise DamagedShardError([self.names[0]], source.folder)
            self._put(draft, copied)

    def remove(self) -> None:
        """Remove both files, the part of the index first."""
        with telling(self.folder, self.number):
            self.part.unlink(missing_ok=True)
            self.file.unlink(missing_ok=True)

    def _put(self, draft: Path, digest: str) -> None:
        """Move a draft to its place, the part of the index last.

        Until then the shard does not exist.
        """
        for path in (draft / "shard", draft / "part"):
            os.chmod(path, 0o644)  # safetensors makes private files; results need not be
            sync(path)
        # an index must never stand beside other tensors than its own
        if self.part.exists() and self._recorded_digest() != digest:
            self.part.unlink(missing_ok=True)
            sync(self.part.parent)
        for source, target in ((draft / "shard", self.file), (draft / "part", self.part)):
            target.parent.mkdir(exist_ok=True)
            os.replace(source, target)
            sync(target.parent)
        sync(self.folder)

    def _recorded_digest(self) -> str:
        try:
            return self.record().sha256
        except DamagedShardError:
            return "damaged"  # the draft is going to replace it

    def _indexed(self, states: States, record: Record) -> pa.Table:
        if reserved := set(ADDED) & set(states.table.columns):
            raise SelectionError(
                f"the table has a column {min(reserved)!r}",
                "rename it: the index keeps there where a row lies",
            )
        table = states.table.assign(shard=self.number, row=np.arange(len(states)))
        index = pa.Table.from_pandas(table, preserve_index=False)
        fields = [field.with_type(_stored_type(field, len(states))) for field in index.schema]
        schema = pa.schema(fields)
        metadata = {
            "sha256": record.sha256,
            "bytes": str(record.size),
            "tensors": json.dumps(record.tensors),
            _NUMBER: str(self.number),
            "columns": _columns(schema, len(states)),
        }
        return index.cast(schema.with_metadata(metadata | {"check": digest(metadata)}))


def numbers(folder: Path) -> list[int]:
    """List the numbers of the shards that exist in a folder, in ascending order."""
    return sorted(
        int(part.stem)
        for part in (folder / "index").glob("*.parquet")
        if _PART.fullmatch(part.stem)
    )


def same(first: pa.Table, second: pa.Table) -> bool:
    """Whether two parts of an index hold the same rows and record the same tensors."""
    first_metadata = _metadata_entries(first.schema)
    second_metadata = _metadata_entries(second.schema)
    recorded_alike = all(first_metadata[name] == second_metadata[name] for name in _ENTRIES)
    return first.equals(second) and recorded_alike


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
    """Turn the error of a failed write into one of a store.

    It is ``StoreSpaceError`` for a full disk or quota, and ``StoreError`` otherwise.
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
    """Provide an empty hidden folder inside ``folder`` for the files of a draft.

    It is removed at the end, with whatever is still in it.
    """
    draft = folder / f".{number:05d}.{socket.gethostname()}.{os.getpid()}-{threading.get_ident()}"
    with telling(folder, number):
        try:
            _remove_stale_drafts(folder, number)
            draft.mkdir(parents=True)
            yield draft
        finally:
            # if that fails the next write of this shard removes it
            shutil.rmtree(draft, ignore_errors=True)


def _remove_stale_drafts(folder: Path, number: int) -> None:
    """Remove drafts that killed processes left.

    These are drafts of this shard whose process is gone, and any of other machines that are older
    than a day. Clocks may jump: a draft of this machine stays as long as its process lives.
    """
    for draft in folder.glob(".*.*.*"):
        name = _DRAFT.fullmatch(draft.name)
        if name is None:
            continue
        with suppress(FileNotFoundError):  # its process has just finished
            process = int(name[3])
            same_host = name[2] == socket.gethostname()
            same_thread = process == os.getpid() and name[4] in (None, str(threading.get_ident()))
            if same_host and not same_thread and psutil.pid_exists(process):
                continue
            of_this_shard = same_host and int(name[1]) == number
            if of_this_shard or time.time() - draft.stat().st_mtime > _STALE_AFTER:
                shutil.rmtree(draft)


def _error_number(cause: Exception) -> int | None:
    if isinstance(cause, OSError):
        return cause.errno
    # safetensors passes on the system's error as text
    match = re.search(r"os error (\d+)", str(cause))
    return int(match[1]) if match else None


def _without_sharing(tensors: dict[Key, Tensor]) -> dict[str, Tensor]:
    """The tensors by name, contiguous, and copied where they share memory.

    A safetensors file cannot hold tensors that share memory.
    """
    separate: dict[str, Tensor] = {}
    occupied: list[tuple[int, int]] = []
    for (layer, place), tensor in tensors.items():
        flat = tensor.contiguous()
        start, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
        if any(start < last and first < end for first, last in occupied):
            flat = flat.clone()
        separate[f"{layer}/{place}"] = flat
        occupied.append((start, end))
    return separate


def _metadata_entries(schema: pa.Schema) -> dict[str, str]:
    """The entries in the metadata of a part of the index, once their checksum is verified.

    Parquet has checksums for values only, so the metadata has one of its own.
    """
    metadata = schema.metadata or {}
    entries = {name: metadata[name.encode()].decode() for name in _ENTRIES}
    if _NUMBER.encode() in metadata:
        entries[_NUMBER] = metadata[_NUMBER.encode()].decode()
    if metadata[b"check"].decode() != digest(entries):
        raise ValueError("the metadata was changed")
    return entries


def _columns(schema: pa.Schema, rows: int) -> str:
    return json.dumps([rows, *([field.name, str(field.type)] for field in schema)])


def _stored_type(field: pa.Field, rows: int) -> pa.DataType:
    """One type for each column in all shards, also where a shard has no value that shows it.

    pandas reads an empty list as float.
    """
    if pa.types.is_null(field.type) or (rows == 0 and pa.types.is_floating(field.type)):
        return pa.int64() if field.name in _INTEGER_COLUMNS else pa.string()
    if pa.types.is_dictionary(field.type):
        return field.type.value_type
    return pa.string() if pa.types.is_large_string(field.type) else field.type


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype that ``str(dtype)`` names."""
    return getattr(torch, name.removeprefix("torch."))
