"""Activations on disk: append-only safetensors shards with a parquet index.

A killed run continues, and several processes write.
"""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from xlvlms_tutorial.activations.activations import (
    Activations,
    Key,
    as_json_knows,
    chosen,
    described,
    differences,
)
from xlvlms_tutorial.activations.shards import (
    ADDED,
    Record,
    Shard,
    numbers,
    remove_stale_drafts,
    sync,
    torch_dtype,
    write_errors,
)
from xlvlms_tutorial.errors import (
    InputError,
    StoreError,
    damaged_shards,
    other_store,
    unusable_store,
)
from xlvlms_tutorial.io import as_json, read_json, replacing

_PROVENANCE = "provenance.json"


class ActivationStore:
    """Keep activations in a folder of shards, which survives kills and several writers.

    ``capture(..., store=folder)`` writes such a folder. Use this class to read parts of it, to
    check and repair it, to merge folders, or to write shards of your own.

    A folder holds ``provenance.json`` and, for each shard, ``shards/00012.safetensors`` and
    ``index/00012.parquet``. A shard exists if and only if its part of the index does, and that is
    moved to its place last: a kill at any moment leaves complete shards, and drafts that do not
    count, which a later writer removes. Several processes may write at once: different shards, or
    the same shard with the same content. ``pandas.read_parquet(folder / "index")`` reads the whole
    index.

    Parameters
    ----------
    folder : path
        The folder of the store.
    provenance : dict, optional
        How the states are made. With it the store is created where there is none, and an existing
        one must have the same provenance (versions and times are not compared). By default the
        store must exist.

    Attributes
    ----------
    folder : Path
        The folder of the store.
    provenance : dict
        How its states were made, as it is stored.

    Raises
    ------
    StoreError
        If ``provenance`` is None and there is no store, or the folder holds other files, or cannot
        be read or written. If the store was made with another provenance.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations, ActivationStore
    >>> table = pd.DataFrame({"sample": [0, 1], "id": ["a", "b"]})
    >>> states = Activations({(12, "resid_post"): torch.eye(2)}, table, {"model": "toy"})
    >>> folder = TemporaryDirectory()
    >>> store = ActivationStore(folder.name, states.provenance)
    >>> store.missing(2)
    [0, 1]
    >>> store.write(0, states.select("sample == 0"))
    >>> store.write(1, states.select("sample == 1"))
    >>> store.done
    [0, 1]
    >>> store.verify()
    []
    >>> store.whole(0)
    True
    >>> store.table["shard"].tolist()
    [0, 1]
    >>> store.states(samples=[1])[12].tolist()
    [[0.0, 1.0]]
    >>> [len(part) for part in store.iterate()]
    [1, 1]

    A shard that is discarded is missing again:

    >>> store.discard(1)
    >>> store.missing(2)
    [1]
    >>> folder.cleanup()
    """

    def __init__(self, folder: str | Path, provenance: dict | None = None) -> None:
        self.folder = Path(folder)
        self._shards: dict[int, Shard] = {}
        requested = None if provenance is None else as_json_knows(provenance)
        if requested is not None:
            self._create(requested)
        self.provenance = self._stored_provenance()
        if requested is not None:
            _require_same(self.provenance, requested)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.folder)!r}, {len(self.done)} shards)"

    @property
    def done(self) -> list[int]:
        """The numbers of the shards that exist, in ascending order."""
        return numbers(self.folder)

    @property
    def table(self) -> pd.DataFrame:
        """The whole index as a DataFrame, ordered by sample.

        It has the columns of ``Activations.table``, then ``shard`` and ``row``, which say where
        each row lies.

        Raises
        ------
        StoreError
            If no shard exists yet, or the columns of shards do not go together. If a part of the
            index is damaged; it names the file.
        """
        parts = [self._shard(number).index() for number in self.done]
        if not parts:
            raise unusable_store(self.folder, "no shard is there yet")
        try:
            table = _join_parts(parts).to_pandas()
        except pa.ArrowException as cause:
            raise unusable_store(
                self.folder, f"shards with columns that do not go together ({cause})"
            ) from cause
        return table.sort_values(["sample", *ADDED], ignore_index=True)

    def write(self, number: int, states: Activations) -> None:
        """Write a shard, or replace it.

        Afterwards the shard is complete, or the store is as it was before.

        Parameters
        ----------
        number : int
            The number of the shard, from 0.
        states : Activations
            Its content, with the provenance of the store.

        Raises
        ------
        StoreError
            If the states were made with another provenance, or have other tensors, than the store.
            If the disk is full. If the shard cannot be written for another reason.
        """
        self._write(number, states, keep=False)

    def hold(self, states: Activations) -> None:
        """Make these states the only content of the store.

        ``save_activations`` uses it. Saving the same states again changes nothing.

        Parameters
        ----------
        states : Activations
            The content, with the provenance of the store.

        Raises
        ------
        StoreError
            If the states were made with another provenance than the store. If the disk is full. If
            the store has other content, or cannot be written.

        Examples
        --------
        >>> from tempfile import TemporaryDirectory
        >>> import pandas as pd
        >>> import torch
        >>> from xlvlms_tutorial.activations import Activations, ActivationStore
        >>> table = pd.DataFrame({"sample": [0, 1], "id": ["a", "b"]})
        >>> states = Activations({(12, "resid_post"): torch.eye(2)}, table, {"model": "toy"})
        >>> folder = TemporaryDirectory()
        >>> store = ActivationStore(folder.name, states.provenance)
        >>> store.hold(states)
        >>> len(store.states())
        2
        >>> folder.cleanup()
        """
        if foreign := set(self.done) - {0}:
            raise unusable_store(
                self.folder, f"it already holds {len(foreign)} shards of other content"
            )
        self._write(0, states, keep=True)

    def missing(self, n_shards: int, rank: int = 0, world: int = 1) -> list[int]:
        """List the shards that a process still has to make: absent and damaged ones.

        A warning names the damaged ones. Each shard of this process is compared with its sha256,
        and not again when it is read.

        Parameters
        ----------
        n_shards : int
            The number of shards of the complete store.
        rank : int
            The number of this process, from 0.
        world : int
            The number of processes; process ``rank`` makes every ``world``-th shard. With the
            defaults one process makes all.

        Returns
        -------
        list of int
            Shard numbers, in ascending order.

        Raises
        ------
        InputError
            If there is no such process.
        """
        if n_shards < 0 or not 0 <= rank < world:
            raise InputError(
                f"{n_shards} shards for process {rank} of {world}",
                "give 0 or more shards, and 0 <= rank < world",
            )
        existing = set(self.done)
        missing = []
        damaged = []
        for number in range(rank, n_shards, world):
            name = self._shard(number).damage() if number in existing else None
            if name is not None:
                damaged.append(name)
            if number not in existing or name is not None:
                missing.append(number)
        if damaged:
            warnings.warn(
                f"damaged in {self.folder!s}, to be made anew: {', '.join(damaged)}",
                stacklevel=2,
            )
        return missing

    def verify(self) -> list[str]:
        """List the names of damaged files, at most one for each shard.

        A file is damaged if it is absent or unreadable, or does not have the sha256 and rows that
        the index records.

        Returns
        -------
        list of str
            Names such as "shards/00002.safetensors"; empty for a store without damage.
        """
        names = [self._shard(number).damage() for number in self.done]
        return [name for name in names if name is not None]

    def whole(self, number: int) -> bool:
        """Whether a shard exists and has the sha256 that its index records.

        The shard is read once, and not again while its file is unchanged.

        Parameters
        ----------
        number : int
            The number of the shard.
        """
        return self._shard(number).damage() is None

    def discard(self, number: int) -> None:
        """Remove a shard, so that it is made anew; nothing happens if it does not exist.

        Parameters
        ----------
        number : int
            The number of the shard.
        """
        self._shard(number).remove()

    def states(
        self,
        layer: int | None = None,
        site: str | None = None,
        samples: Iterable[int] | None = None,
    ) -> Activations:
        """Read the stored states, ordered by sample.

        Only the tensors and shards that are needed are read. A sample of which no position was
        captured gives no row.

        Parameters
        ----------
        layer : int, optional
            Read this layer only; by default all layers.
        site : str, optional
            Read this site only; by default all sites.
        samples : iterable of int, optional
            Read the rows of these samples only, by their numbers in the capture; by default of all.

        Returns
        -------
        Activations
            The states, with the provenance of the store.

        Raises
        ------
        LayerError, InputError
            If the layer or site is not stored, or none of the samples is.
        StoreError
            If a shard that is needed is damaged; it names the file. If no shard exists yet, or
            shards hold different tensors.
        """
        table = self.table
        if samples is not None:
            requested = list(samples)
            table = table[table["sample"].isin(requested)].reset_index(drop=True)
            if table.empty:
                raise InputError(
                    f"none of the samples {str(requested)[:80]} is stored",
                    "the column sample of ActivationStore.table has all",
                )
        return self._read(table, layer, site, alike=self.done[0])

    def iterate(self, layer: int | None = None, site: str | None = None) -> Iterator[Activations]:
        """Read the stored states shard by shard, in the order of their numbers.

        Use it where all states together do not fit in memory.

        Parameters
        ----------
        layer : int, optional
            Read this layer only; by default all layers.
        site : str, optional
            Read this site only; by default all sites.

        Yields
        ------
        Activations
            The states of one shard.

        Raises
        ------
        LayerError, InputError
            If the layer or site is not stored.
        StoreError
            If a shard is damaged; it names the file.
        """
        for number in self.done:
            yield self._read(self._shard(number).index().to_pandas(), layer, site, alike=number)

    def merge(self, *folders: str | Path) -> list[int]:
        """Copy the shards of stores that were made elsewhere into this one.

        A shard that exists here already is not copied. Everything is checked before the first copy.

        Parameters
        ----------
        *folders : path
            The folders of the other stores, made with the same provenance.

        Returns
        -------
        list of int
            The numbers of the shards that were copied.

        Raises
        ------
        StoreError
            If a store was made with another provenance. If a shard of another store is damaged; it
            names the file. If two stores have the same shard with different content, or a shard
            cannot be written. If the disk is full.

        Examples
        --------
        >>> from tempfile import TemporaryDirectory
        >>> import pandas as pd
        >>> import torch
        >>> from xlvlms_tutorial.activations import Activations, ActivationStore
        >>> table = pd.DataFrame({"sample": [0, 1], "id": ["a", "b"]})
        >>> states = Activations({(12, "resid_post"): torch.eye(2)}, table, {"model": "toy"})
        >>> first, second = TemporaryDirectory(), TemporaryDirectory()
        >>> ActivationStore(second.name, states.provenance).write(1, states)
        >>> ActivationStore(first.name, states.provenance).merge(second.name)
        [1]
        >>> first.cleanup()
        >>> second.cleanup()
        """
        sources = {number: self._shard(number) for number in self.done if self.whole(number)}
        existing = set(sources)
        for store in map(ActivationStore, folders):
            _require_same(self.provenance, store.provenance)
            if damaged := store.verify():
                raise damaged_shards(damaged, store.folder)
            for number in store.done:
                candidate = store._shard(number)
                shard = sources.setdefault(number, candidate)
                if not shard.holds(candidate.index(), candidate.record()):
                    raise unusable_store(
                        store.folder, f"shard {number} has other content than in {shard.folder!s}"
                    )
        added = sorted(sources.keys() - existing)
        for number in added:
            self._shard(number).copy(sources[number])
        return added

    def _write(self, number: int, states: Activations, keep: bool) -> None:
        if number < 0:
            raise InputError(f"there is no shard {number}", "shards are numbered from 0")
        # read anew: another capture may have made the store in the same moment
        _require_same(self._stored_provenance(), states.provenance)
        if record := self._any_record(but=number):
            _require_same(record.tensors, described(states))
        self._shard(number).write(states, keep)

    def _read(
        self, table: pd.DataFrame, layer: int | None, site: str | None, alike: int
    ) -> Activations:
        """Read the rows that a table of the index names.

        ``alike`` is the number of a shard whose tensors give dtypes and shapes where there are no
        rows.
        """
        needed: dict[int, Tensor] = {}
        for number, positions in table.groupby("shard").indices.items():
            needed[int(number)] = torch.from_numpy(positions)
        first = next(iter(needed), alike)
        formats = self._shard(first).record().tensors
        for number in needed:
            others = self._shard(number).record().tensors
            _require_same(formats, others)
        names = {_key(name): name for name in formats}
        tensors: dict[Key, Tensor] = {}
        for key in chosen(names, layer, site):
            dtype, *shape = formats[names[key]]
            tensors[key] = torch.empty((len(table), *shape), dtype=torch_dtype(dtype))
        rows = torch.from_numpy(table["row"].to_numpy(copy=True))
        for number, targets in needed.items():
            parts = self._shard(number).read(list(tensors), rows[targets])
            for key, values in parts.items():
                tensors[key][targets] = values
        table = table.drop(columns=list(ADDED))
        return Activations(tensors, table, self.provenance)

    def _shard(self, number: int) -> Shard:
        return self._shards.setdefault(number, Shard(self.folder, number))

    def _any_record(self, but: int) -> Record | None:
        for number in self.done:
            # verify() and missing() name a damaged shard; any other one serves here
            try:
                if number != but:
                    return self._shard(number).record()
            except StoreError as error:
                if not error.damaged:
                    raise
        return None

    def _create(self, provenance: dict) -> None:
        path = self.folder / _PROVENANCE
        remove_stale_drafts(self.folder)
        if path.exists():
            return
        with write_errors(self.folder, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
            foreign = [
                entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")
            ]
            # checked again: another process may have made the store meanwhile
            if foreign and not path.exists():
                raise unusable_store(self.folder, f"it holds other files ({min(foreign)!r})")
            with replacing(path) as draft:
                draft.write_text(as_json(provenance), encoding="utf-8")
                sync(draft)
            sync(self.folder)

    def _stored_provenance(self) -> dict:
        try:
            return read_json(self.folder / _PROVENANCE)
        except (FileNotFoundError, NotADirectoryError) as cause:
            raise unusable_store(self.folder, "there is no store here") from cause
        except (OSError, ValueError, RecursionError) as cause:
            raise unusable_store(self.folder, f"{_PROVENANCE} cannot be read ({cause})") from cause


def save_activations(states: Activations, folder: str | Path) -> Path:
    """Write states to a folder, as a store of one shard.

    Use it for states that you have in memory; ``load_activations`` and ``ActivationStore`` read the
    folder. Saving the same states again changes nothing.

    Parameters
    ----------
    states : Activations
        What to save.
    folder : path
        A new or empty folder, or the one that holds the same states already.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    StoreError
        If the folder holds a store with another provenance. If it holds a store with other content,
        or other files, or cannot be written. If the disk is full.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations, load_activations, save_activations
    >>> table = pd.DataFrame({"sample": [0, 1], "id": ["a", "b"]})
    >>> states = Activations({(12, "resid_post"): torch.eye(2)}, table, {"model": "toy"})
    >>> folder = TemporaryDirectory()
    >>> path = save_activations(states, folder.name)
    >>> load_activations(path)
    Activations(2 rows, layers 12, resid_post, float32, 0.0 MB)
    >>> folder.cleanup()
    """
    store = ActivationStore(folder, states.provenance)
    store.hold(states)
    return store.folder


def load_activations(folder: str | Path) -> Activations:
    """Read all states of a store, of one shard or many, ordered by sample.

    Use it to continue with states that ``save_activations`` or ``capture(..., store=folder)``
    wrote; a ``ActivationStore`` reads parts of a folder.

    Parameters
    ----------
    folder : path
        The folder of the store.

    Returns
    -------
    Activations
        The states with their table and provenance.

    Raises
    ------
    StoreError
        If there is no store, or nothing in it. If a shard is damaged; it names the file.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations, load_activations, save_activations
    >>> table = pd.DataFrame({"sample": [0, 1], "id": ["a", "b"]})
    >>> states = Activations({(12, "resid_post"): torch.eye(2)}, table, {"model": "toy"})
    >>> folder = TemporaryDirectory()
    >>> path = save_activations(states, folder.name)
    >>> load_activations(path)
    Activations(2 rows, layers 12, resid_post, float32, 0.0 MB)
    >>> folder.cleanup()
    """
    return ActivationStore(folder).states()


def shard_plan(n_samples: int, shard_size: int) -> list[range]:
    """Divide the numbers of the samples into shards.

    Use it to make the shards of a ``ActivationStore`` yourself; ``capture`` uses it too.

    Parameters
    ----------
    n_samples : int
        The number of samples.
    shard_size : int
        The number of samples in a shard; the last one may have fewer.

    Returns
    -------
    list of range
        The sample numbers of each shard.

    Raises
    ------
    InputError
        If there are fewer than 0 samples, or a shard would have none.

    Examples
    --------
    >>> from xlvlms_tutorial.activations.store import shard_plan
    >>> shard_plan(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    if n_samples < 0 or shard_size < 1:
        raise InputError(
            f"{n_samples} samples in shards of {shard_size}",
            "give 0 or more samples, and at least 1 in a shard",
        )
    plan = []
    for start in range(0, n_samples, shard_size):
        stop = min(start + shard_size, n_samples)
        plan.append(range(start, stop))
    return plan


def dealt() -> tuple[int, int]:
    """Return the number of this process and the number of processes; (0, 1) in a plain run.

    ``accelerate launch``, torchrun and MPI set them in the environment. Nothing is initialised:
    shards need no communication. Under Slurm, set RANK=$SLURM_PROCID and WORLD_SIZE=$SLURM_NTASKS.
    """
    # here: importing accelerate takes a second
    from accelerate.utils.environment import get_cpu_distributed_information

    # reads only the environment, which is the same for processes that use GPUs
    information = get_cpu_distributed_information()
    return information.rank, information.world_size


def _require_same(stored: dict, requested: dict) -> None:
    if mismatch := differences(stored, requested):
        raise other_store(mismatch)


def _key(name: str) -> Key:
    layer, _, site = name.partition("/")
    return int(layer), site


def _join_parts(parts: list[pa.Table]) -> pa.Table:
    """Join the rows of all parts.

    Where a part has no value in a column, its type for that column does not count.
    """
    joined = pa.concat_tables(map(_untyped_where_empty, parts), promote_options="permissive")
    fields = []
    for field in joined.schema:
        untyped = pa.types.is_null(field.type)
        fields.append(parts[0].schema.field(field.name) if untyped else field)
    return joined.cast(pa.schema(fields))


def _untyped_where_empty(part: pa.Table) -> pa.Table:
    for number, field in enumerate(part.schema):
        if part.column(number).null_count == len(part):
            part = part.set_column(number, field.name, pa.nulls(len(part)))
    return part
