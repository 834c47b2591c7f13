"""Rounds are interleaved and paired, on a clock of the test's own; memory counts storage once."""

import gc
from contextlib import contextmanager, nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.intervals import bootstrap
from xlvlms_tutorial.metrics.timing import compare_times, measure_time, memory_of, time_ratios


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
    shuffled = times.sample(frac=1, random_state=seed)
    ratio = bootstrap(values / rounds, statistic=np.median, seed=seed).asdict()
    assert time_ratios(shuffled, "one", seed).loc["x"].to_dict() == ratio


def test_times_that_cannot_be_compared_are_refused():
    for options in ({"rounds": 0}, {"warm_up": -1}):
        with pytest.raises(InputError, match="1 round or more"):
            measure_time({"a": lambda: None}, **options)
    with pytest.raises(InputError, match="0 ways"):
        measure_time({})
    good = series(a=[1.0, 2.0], b=[1.0, 0.0])
    with pytest.raises(InputError, match="allowed: 'a', 'b'"):
        time_ratios(good, "c")
    with pytest.raises(InputError, match="seconds of 'b'"):
        time_ratios(good, "b")
    for bad in (good[:3], good[good["round"] == 0], pd.concat([good, good]), good[:0]):
        with pytest.raises(InputError, match="2 rounds or more"):
            time_ratios(bad, "a")
    with pytest.raises(InputError, match="no column seconds"):
        time_ratios(good.drop(columns="seconds"), "a")


def test_a_steady_clock_needs_no_further_rounds():
    clock = Clock()
    ways = {"dense": clock.way("dense", 2.0), "half": clock.way("half", 1.0)}
    table = compare_times(ways, "dense", clock=clock)
    assert table.index.tolist() == ["dense", "half", "dense, again"]
    assert table["n"].tolist() == [4, 4, 4]
    assert table.loc["half", ["value", "low", "high"]].tolist() == [0.5, 0.5, 0.5]
    assert table.loc["dense, again", "value"] == 1 and table["resolved"].all()
    assert clock.ran.count("half") == 1 + 4 and clock.ran.count("dense") == 2 * (1 + 4)


def test_rounds_are_added_until_the_intervals_are_narrow_or_the_last_is_reached():
    calm = Clock()  # noisy in its first rounds only
    noise = [1.0, 1.0, 9.0, 3.0, 5.0]
    ways = {
        "dense": calm.way("dense", 1.0),
        "other": calm.way("other", lambda n: noise[n - 1] if n <= len(noise) else 2.0),
    }
    table = compare_times(ways, "dense", width=0.5, most=40, clock=calm)
    assert 4 < table.loc["other", "n"] < 40 and table["resolved"].all()
    assert table.loc["other", "value"] == 2
    wild = Clock()
    ways = {
        "dense": wild.way("dense", 1.0),
        "other": wild.way("other", lambda n: 1.0 + 9.0 * (n % 2)),
    }
    table = compare_times(ways, "dense", most=11, clock=wild)
    assert table["n"].tolist() == [8, 8, 8]  # four more would be too many
    assert table["resolved"].to_dict() == {"dense": True, "other": False, "dense, again": True}


def test_a_comparison_of_times_that_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="allowed: 'a'"):
        compare_times({"a": lambda: None}, "b")
    for options in ({"width": 0.0}, {"most": 3}):
        with pytest.raises(InputError, match="width above 0 and 4 rounds"):
            compare_times({"a": lambda: None}, "a", **options)


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
    with pytest.raises(InputError, match="memory of weight"):
        memory_of(nn.Linear(2, 2, device="meta"))
    model = nn.Module()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(InputError, match="sparse_coo"):
        memory_of(model)
