"""What a model takes of the machine that runs it: time in interleaved rounds, and memory."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from xlvlms_tutorial.errors import no_estimate
from xlvlms_tutorial.memory import measuring
from xlvlms_tutorial.metrics.intervals import bootstrap
from xlvlms_tutorial.metrics.plain import require_estimate
from xlvlms_tutorial.validation import require

Device = str | torch.device | None
ADDED = 4  # rounds at a time; an even number, so that each way is as often early as late


def measure_time(
    ways: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warm_up: int = 1,
    device: Device = None,
    progress: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    label: str = "",
    prepared: bool = False,
) -> pd.DataFrame:
    """Measure the wall time of several ways of doing something, in interleaved rounds.

    Use it to compare a model with its compressed form. Every round runs each way once, every other
    round in reverse, so that what the machine does meanwhile falls on all of them alike. A CUDA
    ``device`` is waited for on both sides of the clock, and no garbage is collected while it runs.
    :func:`time_ratios` gives the numbers with their intervals.

    Parameters
    ----------
    ways : mapping of str to callable
        What is timed, by name: functions that are called without arguments.
    rounds : int, default 7
        How often each way is timed.
    warm_up : int, default 1
        How many rounds come first and are left out.
    device : str or torch.device, optional
        The device on which the ways run; by default there is nothing to wait for.
    progress : bool, default False
        Whether to show a progress bar.
    clock : callable, default time.perf_counter
        What gives the seconds.
    label : str, default ""
        The text of the progress bar.
    prepared : bool, default False
        Whether each way gives a context manager instead of doing the work: entering it prepares and
        gives the function that is timed, leaving it tidies up; neither is timed.

    Returns
    -------
    pandas.DataFrame
        Columns way, round (from 0), seconds; a row for each run, in the order in which they ran.

    Raises
    ------
    InputError
        If there are no ways, ``rounds`` is below 1 or ``warm_up`` below 0.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import measure_time
    >>> ways = {"list": lambda: list(range(1000)), "range": lambda: range(1000)}
    >>> times = measure_time(ways, rounds=2)
    >>> times[["way", "round"]].to_numpy().tolist()
    [['list', 0], ['range', 0], ['range', 1], ['list', 1]]
    """
    require(
        ways and rounds >= 1 and warm_up >= 0,
        f"{len(ways)} ways, rounds={rounds}, warm_up={warm_up}",
        "give 1 way or more, 1 round or more, and 0 or more to warm up",
    )
    names = list(ways)
    wait = _waiter(device)
    enter = (lambda way: way()) if prepared else nullcontext
    rows = []
    with (
        tqdm(
            total=(warm_up + rounds) * len(names),
            desc=label,
            leave=False,
            unit="run",
            disable=not progress,
        ) as bar,
        no_collection(),
        measuring(),
    ):
        for number in range(-warm_up, rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                seconds = _once(enter(ways[name]), wait, clock)
                if number >= 0:  # rounds below 0 warm up
                    rows.append((name, number, seconds))
                bar.update()
    return pd.DataFrame(rows, columns=["way", "round", "seconds"])


def time_ratios(times: pd.DataFrame, to: str, seed: int = 0) -> pd.DataFrame:
    """Estimate the time of each way over that of a reference way.

    Use it to say how much faster a compressed model is. The value is the median over rounds of the
    ratio within a round, which cancels what slows a whole round.

    Parameters
    ----------
    times : pandas.DataFrame
        The table of :func:`measure_time`, of two rounds or more.
    to : str
        The name of the reference way.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns value, low, high, n; rows by way. The interval is the 95 % bootstrap interval of the
        ratio over rounds.

    Raises
    ------
    InputError
        If no way is called ``to``. If there are fewer than two rounds, a way was not timed in each,
        or ``to`` took no time.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.metrics import time_ratios
    >>> times = pd.DataFrame({"way": ["a", "b"] * 3, "round": [0, 0, 1, 1, 2, 2]})
    >>> times["seconds"] = [2.0, 1.0, 4.0, 2.0, 6.0, 3.0]
    >>> time_ratios(times, to="b")["value"].to_dict()
    {'a': 2.0, 'b': 1.0}
    """
    seconds = _rounds(times)
    ways = ", ".join(map(repr, seconds))
    require(to in seconds, f"no way is called {to!r}", f"allowed: {ways}")
    reference = seconds[to]
    require_estimate(
        (reference > 0).all(),
        f"seconds of {to!r}",
        reference.min(),
        "more than 0; let each way do more",
    )
    rows = {}
    for way in seconds:
        ratios = (seconds[way] / reference).to_numpy()
        rows[way] = bootstrap(ratios, statistic=np.median, seed=seed).asdict()
    return pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="way"))


def compare_times(
    ways: Mapping[str, Callable[[], object]],
    to: str,
    width: float = 0.1,
    most: int = 8,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Measure times as shares of a reference way's, and what difference the clock can see.

    Use it where a saving is to be stated. Rounds are added, four at a time, until no interval is
    wider than ``width`` or there are ``most`` rounds. When it stops depends on the widths alone,
    so stopping favours no way. The reference is timed a second time in every round, under the name
    "TO, again": its interval holds what this machine makes of no difference at all.

    Parameters
    ----------
    ways : mapping of str to callable
        What is timed, by name.
    to : str
        The name of the reference way.
    width : float, default 0.1
        How wide an interval may be, as a share of the time of ``to``.
    most : int, default 8
        How many rounds there are at most, 4 or more.
    seed : int, default 0
        Of the bootstrap.
    **options
        Passed on to :func:`measure_time`: ``device``, ``warm_up``, ``clock``, ...

    Returns
    -------
    pandas.DataFrame
        The table of :func:`time_ratios`, and a column resolved: whether the interval is no wider
        than ``width``.

    Raises
    ------
    InputError
        If no way is called ``to``, ``width`` is not above 0, or ``most`` is below 4.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import compare_times
    >>> ways = {"list": lambda: list(range(1000)), "range": lambda: range(1000)}
    >>> compare_times(ways, to="list", most=4).index.tolist()
    ['list', 'range', 'list, again']
    """
    require(to in ways, f"no way is called {to!r}", f"allowed: {', '.join(map(repr, ways))}")
    require(
        width > 0 and most >= ADDED,
        f"width={width}, most={most}",
        f"give a width above 0 and {ADDED} rounds or more",
    )
    ways = {**ways, f"{to}, again": ways[to]}
    times = measure_time(ways, rounds=ADDED, **options)
    options["warm_up"] = 0
    while True:
        ratios = time_ratios(times, to, seed)
        ratios["resolved"] = ratios["high"] - ratios["low"] <= width
        done = times["round"].nunique()
        if ratios["resolved"].all() or done + ADDED > most:
            return ratios
        further = measure_time(ways, rounds=ADDED, **options)
        times = pd.concat([times, further.assign(round=further["round"] + done)])


def memory_of(model: nn.Module) -> int:
    """Compute the bytes that a model's parameters and buffers occupy.

    Use it to see what pruning saves: a masked model occupies as much as the dense one, a cut one
    less. Storage that several tensors share is counted once. Compressed tensors (2:4, quantised)
    count what they keep inside.

    Parameters
    ----------
    model : Module
        The model, or any part of it.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    InputError
        If a tensor is on the meta device (offloaded weights) or its
        layout has no storage of its own.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.metrics import memory_of
    >>> memory_of(torch.nn.Linear(4, 3))  # 15 numbers of 4 bytes
    60
    """
    sizes: dict[tuple[torch.device, int], int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for inner in _inner(tensor):
            if inner.is_meta or inner.layout != torch.strided:
                raise no_estimate(
                    f"memory of {name}",
                    f"{inner.layout} on {inner.device}",
                    "strided tensors that are loaded on a device",
                )
            storage = inner.untyped_storage()
            if storage.nbytes():
                sizes[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _once(
    way: AbstractContextManager[Callable[[], object]],
    wait: Callable[[], None],
    clock: Callable[[], float],
) -> float:
    with way as timed:
        gc.collect()
        wait()
        start = clock()
        timed()
        wait()
        return clock() - start


def _waiter(device: Device) -> Callable[[], None]:
    """Make a function that waits for the device: kernels on CUDA run on after the call returned."""
    if device is None or torch.device(device).type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage while the clock runs.

    By chance it would fall on one way or another.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()  # what is there already need not be looked through before each call
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _rounds(times: pd.DataFrame) -> pd.DataFrame:
    """Arrange seconds by round (rows) and way (columns, in the order of the table)."""
    missing = ", ".join(sorted({"way", "round", "seconds"} - set(times)))
    require_estimate(
        not missing, "table of times", f"no column {missing}", "the table of measure_time"
    )
    counts = times.groupby(["round", "way"]).size()
    rounds = times["round"].nunique()
    ways = times["way"].unique()
    complete = len(counts) == rounds * len(ways) and (counts == 1).all()
    require_estimate(
        rounds >= 2 and complete,
        "times",
        f"{len(times)} times of {len(ways)} way(s) in {rounds} round(s)",
        "2 rounds or more, with each way once in every round",
    )
    return times.pivot(index="round", columns="way", values="seconds")[ways]


def _inner(tensor: Tensor) -> list[Tensor]:
    """List the tensors that hold the data of one that wraps others, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    tensors = []
    for name in names:
        tensors += _inner(getattr(tensor, name))
    return tensors
