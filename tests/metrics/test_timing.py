"""Rounds are interleaved and paired, on a clock of the test's own; memory counts storage once.

Energy is read off made-up meters.
"""

import gc
import sys
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xlvlms_tutorial.errors import EstimateError, SelectionError
from xlvlms_tutorial.metrics.intervals import bootstrap
from xlvlms_tutorial.metrics.timing import (
    energy,
    measure_time,
    memory_of,
    peak_memory,
    time_medians,
    time_ratios,
)


class Clock:
    """A clock that only the ways move on."""

    def __init__(self):
        self.now, self.ran = 0.0, []

    def __call__(self):
        return self.now

    def way(self, name, seconds):
        def run():
            self.ran.append(name)
            self.now += seconds(self.ran.count(name)) if callable(seconds) else seconds

        return run


def test_every_round_runs_each_way_once_in_turns():
    clock = Clock()
    ways = {"a": clock.way("a", 1.0), "b": clock.way("b", lambda n: 10.0 * n)}
    times = measure_time(ways, rounds=3, warm_up=1, clock=clock)
    assert clock.ran == list("baabbaab")
    assert times.to_numpy().tolist() == [
        ["a", 0, 1.0],
        ["b", 0, 20.0],
        ["b", 1, 30.0],
        ["a", 1, 1.0],
        ["a", 2, 1.0],
        ["b", 2, 40.0],
    ]
    assert times.columns.tolist() == ["way", "round", "seconds"]


def test_what_prepares_and_tidies_up_is_not_timed():
    clock, events = Clock(), []

    @contextmanager
    def slow():
        clock.now += 100
        events.append("in")
        yield lambda: events.append("call")
        clock.now += 100
        events.append("out")

    ways = {"slow": slow, "plain": lambda: nullcontext(clock.way("plain", 2.0))}
    times = measure_time(ways, rounds=2, warm_up=0, clock=clock, prepared=True)
    assert times["way"].tolist() == ["slow", "plain", "plain", "slow"]
    assert times["seconds"].tolist() == [0, 2, 2, 0]
    assert events == ["in", "call", "out"] * 2


def test_no_garbage_is_collected_while_the_clock_runs_and_then_again():
    gc_states = []
    measure_time({"a": lambda: gc_states.append(gc.isenabled())}, rounds=2, warm_up=0)
    assert gc_states == [False, False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure_time({"a": lambda: 1 / 0})
    assert gc.isenabled()
    gc.disable()
    try:
        measure_time({"a": lambda: None}, rounds=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_cuda_device_is_waited_for_on_both_sides_of_the_clock(monkeypatch):
    clock = Clock()
    devices = []
    monkeypatch.setattr(
        torch.cuda,
        "synchronize",
        lambda device: (devices.append(str(device)), clock.way("wait", 1.0)()),
    )
    times = measure_time(
        {"a": clock.way("a", 2.0)}, rounds=2, warm_up=0, device="cuda:1", clock=clock
    )
    assert clock.ran == ["wait", "a", "wait"] * 2 and set(devices) == {"cuda:1"}
    assert times["seconds"].tolist() == [3.0, 3.0]


def series(**seconds):
    return pd.DataFrame(
        [(way, k, s) for way, values in seconds.items() for k, s in enumerate(values)],
        columns=["way", "round", "seconds"],
    )


def test_ratios_are_medians_of_pairs_whatever_slows_a_round():
    slow = np.array([1.0, 7.0, 2.0, 100.0, 3.0])
    table = time_ratios(series(dense=slow, half=slow / 2, third=slow / [3, 3, 4, 3, 2]), to="dense")
    assert table.index.tolist() == ["dense", "half", "third"]
    assert table.columns.tolist() == ["value", "low", "high", "n"]
    assert table.loc["half"].tolist() == [0.5, 0.5, 0.5, 5]
    assert table.loc["dense"].tolist() == [1, 1, 1, 5]
    assert table.loc["third", "value"] == pytest.approx(1 / 3)
    assert table.loc["third", "low"] < 1 / 3 < table.loc["third", "high"]


@settings(max_examples=5, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=9), st.integers(0, 3))
def test_intervals_are_those_of_the_bootstrap_of_the_median(seconds, seed):
    values, rounds = np.array(seconds), np.arange(1, len(seconds) + 1)
    times = series(x=values, one=rounds.astype(float))
    medians = time_medians(times, seed)
    assert medians.loc["x"].to_dict() == bootstrap(values, statistic=np.median, seed=seed).asdict()
    shuffled = times.sample(frac=1, random_state=seed)
    ratio = bootstrap(values / rounds, statistic=np.median, seed=seed).asdict()
    assert time_ratios(shuffled, "one", seed).loc["x"].to_dict() == ratio


def test_times_that_cannot_be_compared_are_refused():
    for options in ({"rounds": 0}, {"warm_up": -1}):
        with pytest.raises(SelectionError, match="1 round or more"):
            measure_time({"a": lambda: None}, **options)
    with pytest.raises(SelectionError, match="0 ways"):
        measure_time({})
    good = series(a=[1.0, 2.0], b=[1.0, 0.0])
    with pytest.raises(SelectionError, match="allowed: 'a', 'b'"):
        time_ratios(good, "c")
    with pytest.raises(EstimateError, match="seconds of 'b'"):
        time_ratios(good, "b")
    for bad in (good[:3], good[good["round"] == 0], pd.concat([good, good]), good[:0]):
        with pytest.raises(EstimateError, match="2 rounds or more"):
            time_medians(bad)
    with pytest.raises(EstimateError, match="no column seconds"):
        time_medians(good.drop(columns="seconds"))


# Memory


def test_storage_is_counted_once():
    model = nn.Sequential(
        nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5)
    )
    apart = memory_of(model)
    assert apart == 4 * (15 + 15 + 5 * 4) + 8  # the norm also counts its batches
    model[1].weight = model[0].weight
    assert memory_of(model) == apart - 4 * 15
    # a view keeps all of what it looks at
    model[1].weight = nn.Parameter(model[0].weight.detach()[:2])
    assert memory_of(model) == apart - 4 * 15
    model[1].weight = nn.Parameter(model[0].weight.detach()[:2].clone())
    assert memory_of(model) == apart - 4 * 9
    assert memory_of(model.to(torch.bfloat16)) == (apart - 4 * 9 - 8) / 2 + 8
    assert memory_of(nn.ReLU()) == 0


def test_masked_weights_occupy_as_much_as_dense_ones_and_cut_ones_less():
    dense = nn.Linear(8, 8)
    full = memory_of(dense)
    with torch.no_grad():
        dense.weight[:4] = 0
    assert memory_of(dense) == full == 4 * 72
    assert memory_of(nn.Linear(8, 4)) == full / 2


class Packed(torch.Tensor):
    """A tensor that keeps its data in two others, as compressed weights do."""

    @staticmethod
    def __new__(cls, values, places):
        return torch.Tensor._make_wrapper_subclass(cls, (8, 8), dtype=values.dtype)

    def __init__(self, values, places):
        self.values_, self.places_ = values, places

    def __tensor_flatten__(self):
        return ["values_", "places_"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].places_)
        raise NotImplementedError(func)


def test_a_compressed_tensor_counts_what_it_keeps():
    model = nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(
        Packed(torch.zeros(8, 4), torch.zeros(8, dtype=torch.int8)), requires_grad=False
    )
    assert memory_of(model) == 4 * 32 + 8


def test_memory_that_is_not_there_is_refused():
    with pytest.raises(EstimateError, match="memory of weight"):
        memory_of(nn.Linear(2, 2, device="meta"))
    model = nn.Module()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(EstimateError, match="sparse_coo"):
        memory_of(model)


def test_the_peak_is_what_a_call_adds_on_a_gpu_and_unknown_on_a_cpu(monkeypatch):
    assert peak_memory(lambda: 1 / 0) is peak_memory(lambda: 1 / 0, "cpu") is None
    memory = SimpleNamespace(now=100, peak=900)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory.peak)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: setattr(memory, "peak", memory.now)
    )
    assert peak_memory(lambda: setattr(memory, "peak", 350), "cuda") == 250


# Energy


def meter(folder, zone, name, used=0, maximum=1_000_000):
    """The files of an energy meter as Linux shows them; the path of its count."""
    directory = folder / zone
    directory.mkdir(parents=True)
    for file, content in (("name", name), ("energy_uj", used), ("max_energy_range_uj", maximum)):
        (directory / file).write_text(f"{content}\n")
    return directory / "energy_uj"


def test_joules_of_all_packages_and_of_nothing_else(tmp_path):
    first, second = (
        meter(tmp_path, "intel-rapl:0", "package-0", 100),
        meter(tmp_path, "intel-rapl:1", "package-1", 999_000),
    )
    others = [
        meter(tmp_path, zone, name)
        for zone, name in (
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:2", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        )
    ]
    (tmp_path / "intel-rapl").mkdir()

    def call():
        first.write_text("500100")
        second.write_text("1999")  # went round: 1001 to the start, and 1999 on
        for file in others:
            file.write_text("77")

    assert energy(call, powercap=tmp_path) == pytest.approx((500_000 + 1_001 + 1_999) / 1e6)
    with pytest.raises(EstimateError, match="takes longer"):
        energy(lambda: None, "cpu", tmp_path)


def test_without_a_meter_there_is_no_number_and_no_call(tmp_path):
    assert (
        energy(lambda: 1 / 0, powercap=tmp_path / "none")
        is energy(lambda: 1 / 0, powercap=tmp_path)
        is None
    )
    (meter(tmp_path, "intel-rapl:0", "package-0").parent / "max_energy_range_uj").unlink()
    assert energy(lambda: 1 / 0, powercap=str(tmp_path)) is None


class NotSupported(Exception):
    """As NVML raises it."""


def nvml(monkeypatch, read):
    module = ModuleType("pynvml")
    module.__spec__ = SimpleNamespace(name="pynvml")
    module.NVMLError_NotSupported = NotSupported
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetTotalEnergyConsumption = read
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=f"of-{device.index}"),
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def test_joules_of_a_gpu_by_its_own_name(monkeypatch):
    used = {"GPU-of-1": 5_000}
    nvml(monkeypatch, used.__getitem__)
    assert energy(lambda: used.update({"GPU-of-1": 7_500}), "cuda:1") == 2.5


def test_a_gpu_that_reports_nothing(monkeypatch):
    def refuse(handle):
        raise NotSupported

    nvml(monkeypatch, refuse)
    assert energy(lambda: 1 / 0, "cuda:0") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("xlvlms_tutorial.metrics.timing.find_spec", lambda name: None)
    assert energy(lambda: 1 / 0, "cuda:0") is None
