"""One shard of a store: a file of tensors, and its part of the index.

Each is written beside its place and moved there by one atomic step, the part of the index last.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xlvlms_tutorial.activations.activations import Activations, Key, described
from xlvlms_tutorial.errors import (
    InputError,
    StoreError,
    XlvlmsError,
    damaged_shards,
    full_disk,
    unusable_store,
)
from xlvlms_tutorial.io import file_digest, replacing

# the columns that the index has beyond those of States.table: where a row lies
ADDED = ("shard", "row")
_PART = re.compile(r"[0-9]{5}|[1-9][0-9]{5,}")
_FULL = {errno.ENOSPC, errno.EDQUOT}
# what io.replacing makes beside the files of a store
_DRAFTS = (".provenance.json.*", "shards/.*.safetensors.*", "index/.*.parquet.*")
# seconds: no shard takes so long to write, so an older draft was left by a killed process
_STALE_AFTER = 3600
# stands for the digest of a part of the index until that is known
_NO_DIGEST = b"0" * 64
# columns whose type is known even in a shard that has no value for them
_INTEGER_COLUMNS = {"sample", "position"}


class Record(NamedTuple):
    """What a part of the index records of its shard's file.

    It holds the sha256, the dtype and row shape of each tensor, and the number of rows.
    """

    sha256: str
    tensors: dict[str, list]
    n_rows: int


class Shard:
    """The two files of a shard, ``shards/00012.safetensors`` and ``index/00012.parquet``.

    The shard exists if the second file does, which holds the sha256 of both.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.number = number
        self.names = f"shards/{number:05d}.safetensors", f"index/{number:05d}.parquet"
        self.file = folder / self.names[0]
        self.part = folder / self.names[1]
        # the files when they were last found intact, so that they are hashed once
        self._intact_stamp: tuple | None = None

    def index(self) -> pa.Table:
        """Read the shard's part of the index; ``StoreError`` if it cannot be read."""
        with self._opened() as file:
            return file.read(use_threads=False)

    def record(self) -> Record:
        """Read what the index records of the tensors' file; ``StoreError`` if it cannot."""
        with self._opened() as file:
            metadata = file.metadata.metadata
            tensors = json.loads(metadata[b"tensors"])
            return Record(metadata[b"sha256"].decode(), tensors, file.metadata.num_rows)

    def holds(self, index: pa.Table, record: Record) -> bool:
        """Whether the shard has the rows of this table and the tensors of this record."""
        return self.index().equals(index) and self.record() == record

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        """Open the part of the index, once its own digest and number are found right."""
        try:
            content = self.part.read_bytes()
            with pq.ParquetFile(pa.BufferReader(content)) as file:
                metadata = file.metadata.metadata
                if _with_digest(content, metadata[b"index_sha256"]) != content:
                    raise ValueError("its content is not what was written")
                if int(metadata[b"shard"]) != self.number:
                    raise ValueError("it is a copy of another shard's")
                yield file
        except PermissionError as cause:
            raise unusable_store(self.folder, cause) from cause
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as cause:
            raise damaged_shards([self.names[1]], self.folder) from cause

    def damage(self) -> str | None:
        """Return the name of the damaged file, or None where both are intact.

        Intact files are hashed once, and later recognised by size, time and inode.
        """
        try:
            record = self.record()
        except StoreError as error:
            if not error.damaged:
                raise
            return self.names[1]
        try:
            status = self.file.stat()
            stamp = (record, status.st_size, status.st_mtime_ns, status.st_ino)
            if stamp != self._intact_stamp and not self._as_recorded(record):
                return self.names[0]
        except (FileNotFoundError, SafetensorError):
            return self.names[0]
        self._intact_stamp = stamp
        return None

    def _as_recorded(self, record: Record) -> bool:
        if file_digest(self.file) != record.sha256:
            return False
        with safe_open(self.file, "pt") as file:
            # the file is not a dictionary
            names = file.keys()
            shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
        recorded = {}
        for name, (_, *shape) in record.tensors.items():
            recorded[name] = [record.n_rows, *shape]
        return shapes == recorded

    def read(self, keys: list[Key], rows: Int[Tensor, " m"]) -> dict[Key, Shaped[Tensor, "m ..."]]:
        """Read these rows of these tensors; the others stay on the disk.

        It raises ``StoreError`` if the shard is not intact.
        """
        if damaged := self.damage():
            raise damaged_shards([damaged], self.folder)
        states = {}
        with safe_open(self.file, "pt") as file:
            for layer, site in keys:
                states[layer, site] = file.get_tensor(f"{layer}/{site}")[rows]
        return states

    def write(self, states: Activations, keep: bool) -> None:
        """Write both files; with ``keep``, an existing shard must hold the same."""
        with self._drafts() as (file, part):
            save_file(_without_sharing(states.tensors), file)
            record = Record(file_digest(file), described(states), len(states))
            index = self._indexed(states, record)
            if keep and self.part.exists() and not self.holds(index, record):
                raise unusable_store(self.folder, "it already holds other states")
            pq.write_table(index, part)
            part.write_bytes(_with_digest(part.read_bytes(), _NO_DIGEST))

    def copy(self, source: "Shard") -> None:
        """Copy both files from another store."""
        with self._drafts() as (file, part):
            shutil.copyfile(source.file, file)
            shutil.copyfile(source.part, part)
            if file_digest(file) != source.record().sha256:
                raise damaged_shards([self.names[0]], source.folder)

    def remove(self) -> None:
        """Remove both files, the part of the index first."""
        with write_errors(self.folder, self.number):
            self.part.unlink(missing_ok=True)
            self.file.unlink(missing_ok=True)

    @contextmanager
    def _drafts(self) -> Iterator[tuple[Path, Path]]:
        """Provide two empty files, which become the shard when the block ends.

        The part of the index takes its place last: until then the shard does not exist.
        """
        with write_errors(self.folder, self.number):
            with replacing(self.part) as part:
                with replacing(self.file) as file:
                    yield file, part
                    sync(file)
                    sync(part)
                    # an index must never stand beside other tensors than its own
                    if self.part.exists() and self._recorded_digest() != file_digest(file):
                        self.part.unlink(missing_ok=True)
                        sync(self.part.parent)
                sync(self.file.parent)
            sync(self.part.parent)
            sync(self.folder)

    def _recorded_digest(self) -> str:
        try:
            return self.record().sha256
        except StoreError as error:
            if not error.damaged:
                raise
            return "damaged"  # the draft is going to replace it

    def _indexed(self, states: Activations, record: Record) -> pa.Table:
        """Return a shard's part of the index, with the digests of its files."""
        if reserved := set(ADDED) & set(states.table.columns):
            raise InputError(
                f"the table has a column {min(reserved)!r}",
                "rename it: the index keeps there where a row lies",
            )
        n_rows = len(states)
        table = states.table.assign(shard=self.number, row=np.arange(n_rows))
        index = pa.Table.from_pandas(table, preserve_index=False)
        fields = []
        for field in index.schema:
            fields.append(field.with_type(_stored_type(field, n_rows)))
        metadata = {
            "shard": str(self.number),
            "sha256": record.sha256,
            "tensors": json.dumps(record.tensors),
            "index_sha256": _NO_DIGEST,
        }
        return index.cast(pa.schema(fields, metadata))


def numbers(folder: Path) -> list[int]:
    """List the numbers of the shards that exist in a folder, in ascending order."""
    existing = []
    for part in (folder / "index").glob("*.parquet"):
        if _PART.fullmatch(part.stem):
            existing.append(int(part.stem))
    return sorted(existing)


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
def write_errors(folder: Path, number: int) -> Iterator[None]:
    """Turn the error of a failed write into one of a store.

    It tells a full disk or quota from whatever else may be.
    """
    try:
        yield
    except XlvlmsError:
        raise
    except (OSError, SafetensorError, pa.ArrowException) as cause:
        if _error_number(cause) in _FULL:
            raise full_disk(folder, number, len(numbers(folder))) from cause
        raise unusable_store(folder, f"shard {number} cannot be written ({cause})") from cause


def remove_stale_drafts(folder: Path) -> None:
    """Remove the drafts that killed processes left in a folder, an hour after they wrote."""
    for pattern in _DRAFTS:
        for draft in folder.glob(pattern):
            with suppress(OSError):  # another process has just removed it, or it is not ours
                if time.time() - draft.stat().st_mtime > _STALE_AFTER:
                    draft.unlink()


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
    for (layer, site), tensor in tensors.items():
        flat = tensor.contiguous()
        start, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
        shared = any(start < last and first < end for first, last in occupied)
        if shared:
            flat = flat.clone()
        separate[f"{layer}/{site}"] = flat
        occupied.append((start, end))
    return separate


def _with_digest(content: bytes, placeholder: bytes) -> bytes:
    """Put the sha256 of a part of the index in the place of a text that it holds.

    The digest is of all bytes but its own, so that it changes nothing where it stands already.
    """
    before, _, after = content.rpartition(placeholder)
    computed = hashlib.sha256(before + after).hexdigest()
    return before + computed.encode() + after


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
