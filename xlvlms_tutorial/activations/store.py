"""States on disk: append-only safetensors shards with a parquet index.

A killed run continues, and several processes write.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from xlvlms_tutorial.activations.activations import (
    Key,
    States,
    as_json_knows,
    chosen,
    described,
    differences,
)
from xlvlms_tutorial.activations.shards import (
    ADDED,
    Record,
    Shard,
    drafting,
    numbers,
    same,
    sync,
    torch_dtype,
)
from xlvlms_tutorial.errors import DamagedShardError, SelectionError, StoreError, StoreMismatchError
from xlvlms_tutorial.io import as_json, read_json

_PROVENANCE = "provenance.json"


class Store:
    """A folder of shards of States.

    ``provenance.json``, ``shards/00012.safetensors`` and ``index/00012.parquet``. A shard is there
    if and only if its part of the index is, and that is moved to its place last. So a kill at any
    moment leaves whole shards and drafts that do not count. Several processes may write at once:
    different shards, or the same shard with the same content.
    ``pandas.read_parquet(folder / "index")`` reads the whole index.

    Raises
    ------
    StoreError
        If ``provenance`` is None and there is no store, or the folder holds other
        files, or cannot be read or written.
    StoreMismatchError
        If the store was made in another way than ``provenance`` says;
        versions and times are not compared.
    """

    def __init__(self, folder: str | Path, provenance: dict | None = None) -> None:
        self.folder = Path(folder)
        self._shards: dict[int, Shard] = {}
        asked = None if provenance is None else as_json_knows(provenance)
        if asked is not None:
            self._create(asked)
        self.provenance = self._stored_provenance()
        if asked is not None:
            _require_same(self.provenance, asked)

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r}, {len(self.done)} shards)"

    @property
    def done(self) -> list[int]:
        """The numbers of the shards that are there, in order."""
        return numbers(self.folder)

    @property
    def table(self) -> pd.DataFrame:
        """The whole index, ordered by sample.

        The table of the captured states, and ``shard`` and ``row`` where each row lies.

        Raises
        ------
        StoreError
            If no shard is there yet, or shards have columns that do not go together.
        DamagedShardError
            If a part of the index is damaged, named.
        """
        parts = [self._shard(number).index() for number in self.done]
        if not parts:
            raise StoreError(self.folder, "no shard is there yet")
        try:
            whole = _together(parts).to_pandas()
        except pa.ArrowException as cause:
            raise StoreError(
                self.folder, f"shards with columns that do not go together ({cause})"
            ) from cause
        return whole.sort_values(["sample", *ADDED], ignore_index=True)

    def write(self, number: int, states: States) -> None:
        """Write a shard, or write it anew.

        Afterwards it is there, whole, or the store is as it was.

        Raises
        ------
        StoreMismatchError
            If the states were made in another way than those of the store.
        StoreSpaceError
            If the disk is full.
        StoreError
            If the shard cannot be written for another reason.
        """
        self._write(number, states, keep=False)

    def hold(self, states: States) -> None:
        """Make these states the only content of the store.

        Raises what ``write`` raises, and ``StoreError`` if it has other content.
        """
        if others := set(self.done) - {0}:
            raise StoreError(self.folder, f"it already holds {len(others)} shards of other content")
        self._write(0, states, keep=True)

    def missing(self, n_shards: int, rank: int = 0, world: int = 1) -> list[int]:
        """The shards of ``n_shards`` that process ``rank`` of ``world`` still has to make.

        Absent ones, and damaged ones. A warning names the damaged ones. Each shard of this process
        is compared with its sha256, and not again when it is read.

        Raises
        ------
        SelectionError
            If there is no such process.
        """
        if n_shards < 0 or not 0 <= rank < world:
            raise SelectionError(
                f"{n_shards} shards for process {rank} of {world}",
                "give 0 or more shards, and 0 <= rank < world",
            )
        mine, there = range(rank, n_shards, world), set(self.done)
        damaged = {
            number: name
            for number in mine
            if number in there and (name := self._shard(number).damage())
        }
        if damaged:
            warnings.warn(
                f"damaged in {self.folder!s}, to be made anew: {', '.join(damaged.values())}",
                stacklevel=2,
            )
        return [number for number in mine if number in damaged or number not in there]

    def verify(self) -> list[str]:
        """The names of damaged files, one a shard.

        Absent, not readable, or not of the size, sha256 and rows that the index says.
        """
        return [name for number in self.done if (name := self._shard(number).damage())]

    def whole(self, number: int) -> bool:
        """Whether a shard is there and of the sha256 that its index says.

        It is read once, and not again while its file is the same.
        """
        return self._shard(number).damage() is None

    def discard(self, number: int) -> None:
        """Remove a shard, so that it is made anew; nothing happens if it is not there."""
        self._shard(number).remove()

    def states(
        self,
        layer: int | None = None,
        place: str | None = None,
        samples: Iterable[int] | None = None,
    ) -> States:
        """The stored states, ordered by sample.

        Of all layers, places and samples or of those that are named. Only the tensors and shards
        that are needed are read. A sample of which no position was captured gives no row.

        Raises
        ------
        LayerError, SelectionError
            If the layer or place is not stored, or none of the samples.
        DamagedShardError
            If a shard that is needed is damaged, named.
        StoreError, StoreMismatchError
            If no shard is there yet, or shards hold different tensors.
        """
        table = self.table
        if samples is not None:
            wanted = list(samples)
            table = table[table["sample"].isin(wanted)].reset_index(drop=True)
            if table.empty:
                raise SelectionError(
                    f"none of the samples {str(wanted)[:80]} is stored",
                    "the column sample of Store.table has all",
                )
        return self._read(table, layer, place, alike=self.done[0])

    def iterate(self, layer: int | None = None, place: str | None = None) -> Iterator[States]:
        """The stored states shard by shard, in the order of their numbers.

        Raises what ``states`` raises.
        """
        for number in self.done:
            yield self._read(self._shard(number).index().to_pandas(), layer, place, alike=number)

    def merge(self, *folders: str | Path) -> list[int]:
        """Copy the shards of stores made elsewhere, and tell which.

        A shard that is here already is kept. All is checked before the first is copied.

        Raises
        ------
        StoreMismatchError
            If a store was made in another way than this one.
        DamagedShardError
            If a shard of another store is damaged, named.
        StoreError
            If two stores have the same shard with different content, or a shard cannot be written.
        StoreSpaceError
            If the disk is full.
        """
        sources = {
            number: self._shard(number) for number in self.done if not self._shard(number).damage()
        }
        here = set(sources)
        for other in map(Store, folders):
            _require_same(self.provenance, other.provenance)
            if damaged := other.verify():
                raise DamagedShardError(damaged, other.folder)
            for number in other.done:
                first = sources.setdefault(number, other._shard(number))
                if not same(first.index(), other._shard(number).index()):
                    raise StoreError(
                        other.folder, f"shard {number} has other content than in {first.folder!s}"
                    )
        for number in sorted(sources.keys() - here):
            self._shard(number).copy(sources[number])
        return sorted(sources.keys() - here)

    def _write(self, number: int, states: States, keep: bool) -> None:
        if number < 0:
            raise SelectionError(f"there is no shard {number}", "shards are numbered from 0")
        _require_same(self.provenance, states.provenance)
        if found := self._any_record(but=number):
            _require_same(found.tensors, described(states))
        self._shard(number).write(states, keep)

    def _read(
        self, table: pd.DataFrame, layer: int | None, place: str | None, alike: int
    ) -> States:
        """The rows that a table of the index names.

        ``alike`` is a shard that shows the tensors where there are no rows.
        """
        needed = {
            int(number): torch.from_numpy(at)
            for number, at in table.groupby("shard").indices.items()
        }
        kinds = self._shard(next(iter(needed), alike)).record().tensors
        for number in needed:
            _require_same(kinds, self._shard(number).record().tensors)
        names = {_key(name): name for name in kinds}
        tensors: dict[Key, Tensor] = {}
        for key in chosen(names, layer, place):
            dtype, *shape = kinds[names[key]]
            tensors[key] = torch.empty((len(table), *shape), dtype=torch_dtype(dtype))
        rows = torch.from_numpy(table["row"].to_numpy(copy=True))
        for number, to in needed.items():
            for key, values in self._shard(number).read(list(tensors), rows[to]).items():
                tensors[key][to] = values
        return States(tensors, table.drop(columns=list(ADDED)), self.provenance)

    def _shard(self, number: int) -> Shard:
        return self._shards.setdefault(number, Shard(self.folder, number))

    def _any_record(self, but: int) -> Record | None:
        for number in self.done:
            # verify() and missing() name it; any other shard tells as much
            with suppress(DamagedShardError):
                if number != but:
                    return self._shard(number).record()
        return None

    def _create(self, provenance: dict) -> None:
        path = self.folder / _PROVENANCE
        if path.exists():
            return
        with drafting(self.folder, 0) as draft:
            foreign = [
                entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")
            ]
            # asked again: another process may have made the store meanwhile
            if foreign and not path.exists():
                raise StoreError(self.folder, f"it holds other files ({min(foreign)!r})")
            drafted = draft / _PROVENANCE
            drafted.write_text(as_json(provenance), encoding="utf-8")
            sync(drafted)
            _publish(drafted, path)
            sync(self.folder)

    def _stored_provenance(self) -> dict:
        try:
            return read_json(self.folder / _PROVENANCE)
        except (FileNotFoundError, NotADirectoryError) as cause:
            raise StoreError(self.folder, "there is no store here") from cause
        except (OSError, ValueError, RecursionError) as cause:
            raise StoreError(self.folder, f"{_PROVENANCE} cannot be read ({cause})") from cause


def save_activations(states: States, folder: str | Path) -> Path:
    """Write states as a store of one shard, which :func:`load_activations` and ``Store`` read.

    Saving the same again changes nothing.

    Raises
    ------
    StoreMismatchError
        If the folder holds a store that was made in another way.
    StoreError
        If it holds a store with other content, or other files, or cannot be written.
    StoreSpaceError
        If the disk is full.
    """
    store = Store(folder, states.provenance)
    store.hold(states)
    return store.folder


def load_activations(folder: str | Path) -> States:
    """All states of a store, of however many shards, ordered by sample.

    Raises
    ------
    StoreError
        If there is no store, or nothing in it.
    DamagedShardError
        If a shard is damaged, named.
    """
    return Store(folder).states()


def shard_plan(n_samples: int, shard_size: int) -> list[range]:
    """The numbers of the samples of each shard.

    Raises
    ------
    SelectionError
        If there are fewer than 0 samples, or a shard would have none.
    """
    if n_samples < 0 or shard_size < 1:
        raise SelectionError(
            f"{n_samples} samples in shards of {shard_size}",
            "give 0 or more samples, and at least 1 in a shard",
        )
    return [
        range(start, min(start + shard_size, n_samples))
        for start in range(0, n_samples, shard_size)
    ]


def dealt() -> tuple[int, int]:
    """Number of this process and number of processes; (0, 1) in a plain run.

    As ``accelerate launch``, torchrun or MPI set them. Nothing is initialised: shards need no
    communication. Under Slurm, RANK=$SLURM_PROCID and WORLD_SIZE=$SLURM_NTASKS tell the same.
    """
    # here: importing accelerate takes a second
    from accelerate.utils.environment import get_cpu_distributed_information

    # reads only the environment, which is the same for processes that use GPUs
    found = get_cpu_distributed_information()
    return found.rank, found.world_size


def _publish(drafted: Path, path: Path) -> None:
    try:
        os.link(drafted, path)  # unlike os.replace it leaves what another process has put there
    except FileExistsError:
        return  # and that is compared next
    except OSError:
        os.replace(drafted, path)  # a file system without hard links


def _require_same(stored: dict, asked: dict) -> None:
    if found := differences(stored, asked):
        raise StoreMismatchError(found)


def _key(name: str) -> Key:
    layer, _, place = name.partition("/")
    return int(layer), place


def _together(parts: list[pa.Table]) -> pa.Table:
    """The rows of all parts.

    Where a part has no value in a column, its type for that column does not count.
    """
    whole = pa.concat_tables(map(_untyped_where_empty, parts), promote_options="permissive")
    typed = pa.schema(
        [
            parts[0].schema.field(field.name) if pa.types.is_null(field.type) else field
            for field in whole.schema
        ]
    )
    return whole.cast(typed)


def _untyped_where_empty(part: pa.Table) -> pa.Table:
    for at, field in enumerate(part.schema):
        if part.column(at).null_count == len(part):
            part = part.set_column(at, field.name, pa.nulls(len(part)))
    return part
