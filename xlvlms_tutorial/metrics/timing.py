"""What a call takes of the machine that runs it.

Time in interleaved rounds, memory, and energy where the device reports it.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from xlvlms_tutorial.errors import EstimateError, SelectionError
from xlvlms_tutorial.metrics.intervals import bootstrap

POWERCAP = Path("/sys/class/powercap")
Device = str | torch.device | None


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
    :func:`time_ratios` and :func:`time_medians` give the numbers with their intervals.

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
    SelectionError
        If there are no ways, ``rounds`` is below 1 or ``warm_up`` below 0.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import measure_time
    >>> ways = {"list": lambda: list(range(1000)), "range": lambda: range(1000)}
    >>> times = measure_time(ways, rounds=2)
    >>> times[["way", "round"]].to_numpy().tolist()
    [['list', 0], ['range', 0], ['range', 1], ['list', 1]]
    """
    if not ways or rounds < 1 or warm_up < 0:
        allowed = "give 1 way or more, 1 round or more, and 0 or more to warm up"
        raise SelectionError(f"{len(ways)} ways, rounds={rounds}, warm_up={warm_up}", allowed)
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
    ):
        for number in range(-warm_up, rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                seconds = _once(enter(ways[name]), wait, clock)
                if number >= 0:  # rounds below 0 warm up
                    rows.append((name, number, seconds))
                bar.update()
    return pd.DataFrame(rows, columns=["way", "round", "seconds"])


def time_medians(times: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Estimate the median seconds of each way over the rounds of :func:`measure_time`.

    Parameters
    ----------
    times : pandas.DataFrame
        The table of :func:`measure_time`, of two rounds or more.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns value, low, high, n; rows by way. The interval is the 95 % bootstrap interval of the
        median over rounds.

    Raises
    ------
    EstimateError
        If there are fewer than two rounds, or a way was not timed in each.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.metrics import time_medians
    >>> times = pd.DataFrame({"way": ["a", "b"] * 3, "round": [0, 0, 1, 1, 2, 2]})
    >>> times["seconds"] = [2.0, 1.0, 4.0, 2.0, 6.0, 3.0]
    >>> time_medians(times)["value"].to_dict()
    {'a': 4.0, 'b': 2.0}
    """
    seconds = _rounds(times)
    return _estimates({way: seconds[way].to_numpy() for way in seconds}, seed)


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
    SelectionError
        If no way is called ``to``.
    EstimateError
        If there are fewer than two rounds, a way was not timed in each, or ``to`` took no time.

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
    if to not in seconds:
        raise SelectionError(
            f"no way is called {to!r}", f"allowed: {', '.join(map(repr, seconds))}"
        )
    if not (seconds[to] > 0).all():
        raise EstimateError(
            f"seconds of {to!r}", seconds[to].min(), "more than 0; let each way do more"
        )
    return _estimates({way: (seconds[way] / seconds[to]).to_numpy() for way in seconds}, seed)


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
    EstimateError
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
                raise EstimateError(
                    f"memory of {name}",
                    f"{inner.layout} on {inner.device}",
                    "strided tensors that are loaded on a device",
                )
            storage = inner.untyped_storage()
            if storage.nbytes():
                sizes[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak_memory(call: Callable[[], object], device: Device = None) -> int | None:
    """Measure the bytes that a call allocates at its peak on a CUDA device, beyond those before it.

    On a CPU there is no such number: what a process occupies says what the allocator keeps, not
    what the call needed.

    Parameters
    ----------
    call : callable
        Called without arguments.
    device : str or torch.device, optional
        The device on which the call runs; by default, and on other devices than CUDA, nothing is
        measured and the call is not run.

    Returns
    -------
    int or None
        Bytes, None where nothing is measured.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import peak_memory
    >>> peak_memory(lambda: list(range(1000)), device="cpu") is None
    True
    """
    if device is None or torch.device(device).type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def energy(
    call: Callable[[], object], device: Device = None, powercap: str | Path = POWERCAP
) -> float | None:
    """Measure the joules that the device takes while a call runs.

    A CUDA device is asked through NVML (the package ``nvidia-ml-py``), a CPU through Linux's
    ``powercap`` folder, which usually only root may read. Both meters count all that runs on the
    device and advance in steps of some milliseconds: let the call take a second or more on a quiet
    machine.

    Parameters
    ----------
    call : callable
        Called without arguments, unless the device does not report its energy.
    device : str or torch.device, optional
        The device on which the call runs; by default the CPU.
    powercap : str or Path, default POWERCAP
        The folder of the CPU's meters.

    Returns
    -------
    float or None
        Joules, None where the device does not report them.

    Raises
    ------
    EstimateError
        If the meter did not advance during the call.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import energy
    >>> energy(lambda: sum(range(1000)), powercap="a folder that does not exist") is None
    True
    """
    cuda = device is not None and torch.device(device).type == "cuda"
    meters = _gpu_meters(torch.device(device)) if cuda else _cpu_meters(Path(powercap))
    if not meters:
        return None
    wait = _waiter(device)
    wait()
    before = [read() for read, _ in meters]
    call()
    wait()
    # a meter that has wrapped around shows less than before
    used = sum((read() - start) % wrap for start, (read, wrap) in zip(before, meters, strict=True))
    if used <= 0:
        raise EstimateError(
            "energy of the call",
            "0 J",
            "a call that takes longer than the meter's step; repeat it inside the call",
        )
    return used


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
    if missing := {"way", "round", "seconds"} - set(times):
        raise EstimateError(
            "table of times", f"no column {', '.join(sorted(missing))}", "the table of measure_time"
        )
    counts = times.groupby(["round", "way"]).size()
    rounds, ways = times["round"].nunique(), times["way"].unique()
    if rounds < 2 or len(counts) != rounds * len(ways) or (counts != 1).any():
        problem = f"{len(times)} times of {len(ways)} way(s) in {rounds} round(s)"
        raise EstimateError("times", problem, "2 rounds or more, with each way once in every round")
    return times.pivot(index="round", columns="way", values="seconds")[ways]


def _estimates(values: dict[str, np.ndarray], seed: int) -> pd.DataFrame:
    estimates = [bootstrap(row, statistic=np.median, seed=seed) for row in values.values()]
    rows = [estimate.asdict() for estimate in estimates]
    return pd.DataFrame(rows, index=pd.Index(values, name="way"))


def _inner(tensor: Tensor) -> list[Tensor]:
    """List the tensors that hold the data of one that wraps others, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    tensors = []
    for name in names:
        tensors += _inner(getattr(tensor, name))
    return tensors


def _cpu_meters(folder: Path) -> list[tuple[Callable[[], float], float]]:
    """List what reads the joules of each processor, and where its meter starts again.

    Empty unless all can be read.
    """
    # intel-rapl:0:1 is part of intel-rapl:0, psys holds all packages, and
    # intel-rapl-mmio shows one of them again
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    meters = []
    for zone in zones:
        try:
            if not (zone / "name").read_text(encoding="utf-8").startswith("package"):
                continue
            read = lambda zone=zone: int((zone / "energy_uj").read_text(encoding="utf-8")) / 1e6
            read()
            wrap = int((zone / "max_energy_range_uj").read_text(encoding="utf-8")) + 1
            meters.append((read, wrap / 1e6))
        except OSError:  # only root may read: the device does not report
            return []
    return meters


def _gpu_meters(device: torch.device) -> list[tuple[Callable[[], float], float]]:
    if find_spec("pynvml") is None:
        return []
    import pynvml

    pynvml.nvmlInit()
    # NVML numbers devices in an order of its own
    handle = pynvml.nvmlDeviceGetHandleByUUID(
        f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    )
    read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    try:
        read()
    except pynvml.NVMLError_NotSupported:
        return []
    return [(read, float("inf"))]
