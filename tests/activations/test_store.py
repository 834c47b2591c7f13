"""The store: what is written is read, by whom and in how many shards it may be written.

What does not match is named.
"""

import json
import multiprocessing
import random
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.launching import launch
from tests.support.made_states import DTYPES, PROVENANCE, assert_same, states_of
from xlvlms_tutorial.activations import shards as shards_module
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.activations.store import ActivationStore, dealt, shard_plan
from xlvlms_tutorial.errors import InputError, LayerError, StoreError

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    """Samples 0 to 9, two rows each, in three shards."""
    built = ActivationStore(tmp_path / "store", PROVENANCE)
    for number, samples in enumerate(shard_plan(10, 4)):
        built.write(number, states_of(samples, rows=2))
    return built


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_shards_are_read_back(tmp_path, dtype):
    store = ActivationStore(tmp_path / "s", PROVENANCE)
    for number, samples in enumerate(shard_plan(7, 3)):
        store.write(number, states_of(samples, dtype=dtype, rows=2))
    assert store.done == [0, 1, 2]
    assert_same(ActivationStore(tmp_path / "s").states(), states_of(range(7), dtype=dtype, rows=2))
    assert store.verify() == []


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_split_into_shards_in_any_order_equals_one_shard(data):
    n, rows = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 3))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    parts = list(zip([0, *cuts], [*cuts, n], strict=True))
    with TemporaryDirectory() as folder:
        store = ActivationStore(folder, PROVENANCE)
        for number in data.draw(st.permutations(range(len(parts)))):
            store.write(number, states_of(range(*parts[number]), rows=rows))
        assert_same(store.states(), states_of(range(n), rows=rows))
        assert_same(Activations.concat(list(store.iterate())), store.states())
        index = pd.read_parquet(store.folder / "index")
        assert len(index) == n * rows
        assert store.verify() == []


def test_shards_that_hold_later_samples_are_put_in_order(tmp_path):
    store = ActivationStore(tmp_path, PROVENANCE)
    store.write(0, states_of([5, 1], rows=2))
    store.write(1, states_of([4, 0], rows=2))
    assert_same(store.states(), states_of([0, 1, 4, 5], rows=2))


def test_plain_pandas_reads_the_index_also_after_an_empty_first_shard(tmp_path):
    store = ActivationStore(tmp_path, PROVENANCE)
    store.write(0, states_of([]))
    assert (len(store.states()), store.states()[3, "mlp_out"].shape) == (0, (0, 2, 3))
    store.write(1, states_of([1]))  # no word in it
    store.write(2, states_of([3]))
    index = pd.read_parquet(tmp_path / "index")
    assert index[["sample", "position", "shard", "row"]].to_numpy().tolist() == [
        [1, 0, 1, 0],
        [3, 0, 2, 0],
    ]
    assert index["sample"].dtype == index["position"].dtype == "int64"
    assert index["id"].tolist() == ["s1", "s3"]
    assert index["word"].fillna("").tolist() == ["", "key"]
    assert_same(store.states(), states_of([1, 3]))


def test_a_column_without_values_in_one_shard_takes_its_type_from_the_others(tmp_path):
    store = ActivationStore(tmp_path, PROVENANCE)
    for number, score in enumerate(([None, None], [3, 4], [None, 5.5])):
        part = states_of([2 * number, 2 * number + 1])
        part.table["score"] = score
        store.write(number, part)
    assert store.states().table["score"].isna().tolist() == [True, True, False, False, True, False]
    assert store.states().table["score"].dropna().tolist() == [3, 4, 5.5]


def test_categories_are_kept_as_text(tmp_path):
    part = states_of([0, 3])
    part.table["word"] = part.table["word"].astype("category")
    ActivationStore(tmp_path, PROVENANCE).write(0, part)
    assert pd.read_parquet(tmp_path / "index")["word"].tolist() == ["key", "key"]


def test_columns_that_do_not_go_together_are_named(tmp_path):
    store = ActivationStore(tmp_path, PROVENANCE)
    for number, score in enumerate(("high", 3)):
        part = states_of([number])
        part.table["score"] = score
        store.write(number, part)
    with pytest.raises(StoreError, match="score"):
        store.states()


@pytest.mark.parametrize("column", ["shard", "row"])
def test_the_index_keeps_its_own_columns(tmp_path, column):
    part = states_of([0])
    part.table[column] = 1
    store = ActivationStore(tmp_path, PROVENANCE)
    with pytest.raises(InputError, match=f"'{column}'; rename it"):
        store.write(0, part)
    assert store.done == []


def test_reading_takes_the_chosen_layer_site_and_samples(store):
    whole = states_of(range(10), rows=2)
    assert list(store.states(3).tensors) == [(3, "resid_post"), (3, "mlp_out")]
    assert list(store.states(site="mlp_out").tensors) == [(3, "mlp_out")]
    subset = store.states(3, "mlp_out", samples=[8, 1, 99])
    assert torch.equal(subset[3], whole[3, "mlp_out"][[2, 3, 16, 17]])
    assert subset.table["sample"].tolist() == [1, 1, 8, 8]
    assert [len(part) for part in store.iterate(0)] == [8, 8, 4]


def test_reading_what_is_not_stored_says_what_is(store, tmp_path):
    with pytest.raises(LayerError, match="layer 9 is not one of 0 to 3"):
        store.states(9)
    with pytest.raises(InputError, match="there are: resid_post, mlp_out"):
        store.states(3, "attn_out")
    with pytest.raises(InputError, match=r"none of the samples \[77\]"):
        store.states(samples=[77])
    with pytest.raises(StoreError, match="no shard is there yet"):
        ActivationStore(tmp_path / "new", PROVENANCE).states()


def test_only_what_is_needed_is_opened_and_each_shard_is_hashed_once(store, monkeypatch):
    hashed, opened = [], []
    file_digest, safe_open = shards_module.file_digest, shards_module.safe_open

    class Watched:
        def __init__(self, path, framework):
            self.file, self.path = safe_open(path, framework), path

        def __enter__(self):
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *raised):
            return self.file.__exit__(*raised)

        def keys(self):
            return self.inner.keys()

        def get_slice(self, name):
            return self.inner.get_slice(name)

        def get_tensor(self, name):
            opened.append((self.path.stem, name))
            return self.inner.get_tensor(name)

    monkeypatch.setattr(
        shards_module, "file_digest", lambda path: hashed.append(path.stem) or file_digest(path)
    )
    monkeypatch.setattr(shards_module, "safe_open", Watched)
    fresh = ActivationStore(store.folder)
    fresh.states(3, "mlp_out", samples=[5])
    assert (hashed, opened) == (["00001"], [("00001", "3/mlp_out")])
    fresh.states()
    fresh.states()
    assert fresh.missing(3) == []
    assert sorted(hashed) == ["00000", "00001", "00002"]


def test_missing_deals_shards_out(store):
    store.discard(1)
    assert store.missing(6) == [1, 3, 4, 5]
    dealt_out = [store.missing(6, rank, 4) for rank in range(4)]
    assert dealt_out == [[4], [1, 5], [], [3]]
    assert store.missing(2, 1, 2) == [1]
    for wrong in ((-1, 0, 1), (3, 2, 2), (3, -1, 2), (3, 0, 0)):
        with pytest.raises(InputError, match="0 <= rank < world"):
            store.missing(*wrong)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 5))
def test_every_sample_is_in_one_shard_of_one_process(n_samples, shard_size, world):
    plan = shard_plan(n_samples, shard_size)
    mine = []
    for rank in range(world):
        for number in range(rank, len(plan), world):
            mine += plan[number]
    assert sorted(mine) == list(range(n_samples))
    assert all(len(samples) == shard_size for samples in plan[:-1])


def test_a_plan_without_samples_in_a_shard_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        shard_plan(3, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "other"}, "model is 'fake' in the store and 'other' here"),
        ({"revision": "2"}, "revision is '1' in the store and '2' here"),
        ({"layers": [0]}, r"layers is \[0, 3\] in the store and \[0\] here"),
        (
            {"prompt": "Where ?", "seed": 1},
            "prompt is .* 'Where .' here; seed is 0 in the store and 1 here",
        ),
        ({"selection": {"span": "text"}}, "selection.span is 'image' in the store and 'text' here"),
    ],
)
def test_a_store_of_another_capture_names_what_differs(store, changed, message):
    with pytest.raises(StoreError, match=message):
        ActivationStore(store.folder, PROVENANCE | changed)
    with pytest.raises(StoreError, match=message):
        store.write(3, states_of([10], provenance=PROVENANCE | changed))
    assert store.done == [0, 1, 2]


def test_other_versions_continue_the_same_store(store):
    again = ActivationStore(
        store.folder, PROVENANCE | {"versions": {"torch": "9"}, "layers": (0, 3)}
    )
    assert again.provenance["versions"] == {"torch": "2.4"}
    assert again.missing(4) == [3]


def test_other_tensors_are_refused(store):
    with pytest.raises(
        StoreError,
        match=(
            r"3/mlp_out is \['torch.float32', 2, 3\] in the store and "
            r"\['torch.float16', 2, 3\] here"
        ),
    ):
        store.write(3, states_of([10], dtype=torch.float16))
    with pytest.raises(InputError, match="shard -1"):
        store.write(-1, states_of([10]))


def test_a_damaged_provenance_is_named(store):
    (store.folder / "provenance.json").write_text("{")
    with pytest.raises(StoreError, match=r"provenance\.json cannot be read"):
        ActivationStore(store.folder)


def test_what_another_capture_has_made_of_the_store_meanwhile_is_seen(store):
    (store.folder / "provenance.json").write_text(json.dumps(PROVENANCE | {"seed": 1}))
    with pytest.raises(StoreError, match="seed is 1 in the store and 0 here"):
        store.write(3, states_of([10]))
    assert store.done == [0, 1, 2]


def test_merge_copies_what_is_absent_and_keeps_what_is_equal(store, tmp_path):
    parts = [
        ActivationStore(tmp_path / name, PROVENANCE | {"versions": {"torch": name}})
        for name in ("a", "b", "all")
    ]
    for number, samples in enumerate(shard_plan(10, 4)):
        for part in (parts[number % 2], parts[0]):
            part.write(number, states_of(samples, rows=2))
    parts[2].write(2, states_of(range(8, 10), rows=2))
    before = (parts[2].folder / "shards" / "00002.safetensors").stat().st_ino
    assert parts[2].merge(parts[0].folder, parts[1].folder) == [0, 1]
    assert (parts[2].folder / "shards" / "00002.safetensors").stat().st_ino == before
    assert all(
        torch.equal(parts[2].states()[key], tensor)
        for key, tensor in store.states().tensors.items()
    )
    assert parts[2].table.equals(store.table)
    assert parts[2].verify() == []
    assert parts[2].merge(parts[0].folder, store.folder) == []


def test_merge_repairs_a_damaged_shard_from_another_store(store, tmp_path):
    copy = ActivationStore(tmp_path / "copy", PROVENANCE)
    copy.merge(store.folder)
    (copy.folder / "shards" / "00001.safetensors").write_bytes(b"damaged")
    assert copy.merge(store.folder) == [1]
    assert_same(copy.states(), store.states())


def test_merge_refuses_what_does_not_match_and_copies_nothing(store, tmp_path):
    second_store = ActivationStore(tmp_path / "other", PROVENANCE)
    second_store.write(3, states_of([10], rows=2))
    second_store.write(1, states_of(range(4, 8), rows=2, shift=1))
    with pytest.raises(StoreError, match="shard 1 has other content"):
        store.merge(second_store.folder)
    second_store.discard(1)
    (second_store.folder / "shards" / "00003.safetensors").unlink()
    with pytest.raises(StoreError, match=r"shards/00003\.safetensors"):
        store.merge(second_store.folder)
    seeded = ActivationStore(tmp_path / "seeded", PROVENANCE | {"seed": 1})
    with pytest.raises(StoreError, match="seed is 0 in the store and 1 here"):
        store.merge(seeded.folder)
    with pytest.raises(StoreError, match="no store here"):
        store.merge(tmp_path / "absent")
    assert store.done == [0, 1, 2]
    assert not (tmp_path / "absent").exists()


def _write_some(folder, numbers, start):
    start.wait()
    store = ActivationStore(folder, PROVENANCE)
    for number in numbers:
        store.write(number, states_of([number], rows=3))


@pytest.mark.parametrize("same", [False, True], ids=["interleaved", "the same shards"])
def test_two_processes_write_at_once(tmp_path, same):
    start, n = FORK.Barrier(2), 40
    dealt_out = [
        random.Random(seed).sample(range(n), n) if same else range(seed, n, 2) for seed in (0, 1)
    ]
    processes = [
        FORK.Process(target=_write_some, args=(tmp_path / "s", numbers, start))
        for numbers in dealt_out
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same(ActivationStore(tmp_path / "s").states(), states_of(range(n), rows=3))
    assert ActivationStore(tmp_path / "s").verify() == []
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "provenance.json",
        "shards",
        "index",
    }


def test_a_plain_run_is_one_process_of_one(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "PMI_RANK",
        "PMI_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    assert dealt() == (0, 1)


@pytest.mark.parametrize(
    "names", [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")]
)
def test_a_launched_process_knows_its_number_and_initialises_nothing(monkeypatch, names):
    for name, value in zip(names, ("2", "5"), strict=True):
        monkeypatch.setenv(name, value)
    assert dealt() == (2, 5)
    assert not torch.distributed.is_initialized()


CAPTURE = """
import sys
from tests.support.made_states import PROVENANCE, states_of
from xlvlms_tutorial.activations.store import ActivationStore, dealt, shard_plan

store, plan = ActivationStore(sys.argv[1], PROVENANCE), shard_plan(23, 4)
rank, world = dealt()
for number in store.missing(len(plan), rank, world):
    store.write(number, states_of(plan[number]))
(store.folder.parent / f"process-{rank}-of-{world}").touch()
"""


def test_accelerate_launch_deals_the_shards_to_its_processes(tmp_path):
    (tmp_path / "fake_capture.py").write_text(CAPTURE)
    done = launch(tmp_path / "fake_capture.py", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("process-*")) == [
        "process-0-of-2",
        "process-1-of-2",
    ]
    assert_same(ActivationStore(tmp_path / "s").states(), states_of(range(23)))
    assert json.loads((tmp_path / "s" / "provenance.json").read_text()) == PROVENANCE
