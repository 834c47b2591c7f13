"""Storing: whether a process that is killed at any moment loses or doubles a sample.

And what writing to disk costs a capture. Today's way is one file saved at the end: a kill at any
moment loses everything, so there is nothing to compare with.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from tqdm.auto import tqdm

from benchmarks.command import start
from benchmarks.harness import Goal, Report, always, count, ratio, timed
from benchmarks.subjects import Subject, subjects
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.store import ActivationStore

ROUNDS = 7
SAMPLES_PER_SHARD, ROWS_PER_SAMPLE, SHARDS_PER_KILL, WIDTH = 3, 2, 25, 64
PROVENANCE = {"model": "none", "revision": "none", "layers": [1], "prompt": "none"}
# a forked process has PyTorch already, so that the kill strikes while it
# writes and not while it imports
FORK = multiprocessing.get_context("fork")


@dataclass
class Toll:
    """What kills did to a store."""

    kills: int = 0
    in_a_draft: int = 0
    lost: set[int] = field(default_factory=set)
    doubled: set[int] = field(default_factory=set)


def measure(report: Report) -> None:
    """All promises about storing."""
    options = report.options
    kills = options.pick(60, 6)
    report.setting |= {
        "kills": kills,
        "samples a shard": SAMPLES_PER_SHARD,
        "rounds": options.rounds(ROUNDS),
    }
    with TemporaryDirectory() as folder:
        toll = killed(Path(folder) / "store", kills)
    report.promise(
        f"samples lost by {toll.kills} kills at random moments",
        count(len(toll.lost), toll.kills),
        Goal("==", 0),
    )
    report.promise(
        f"samples doubled by {toll.kills} kills at random moments",
        count(len(toll.doubled), toll.kills),
        Goal("==", 0),
    )
    report.tell(
        "kills that struck while a shard was being written", count(toll.in_a_draft, toll.kills)
    )
    for subject in subjects(report):
        if subject.samples is not None:
            overhead(report, subject, options.pick(64, 8), options.pick(16, 4))


def killed(folder: Path, kills: int, seed: int = 0) -> Toll:
    """Let a process write shards of known samples and kill it at random moments.

    Each time, look at what is there, and go on.
    """
    rng, toll = random.Random(seed), Toll()
    present, drafts, n_shards = set(), set(), 0
    longest = _seconds_unharmed(folder.with_name("unharmed"))
    with tqdm(total=kills, desc="kills", leave=False) as bar:
        while toll.kills < kills:
            n_shards += SHARDS_PER_KILL
            process = FORK.Process(target=write_missing, args=(folder, n_shards))
            process.start()
            time.sleep(rng.uniform(0, longest))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            if process.exitcode != -signal.SIGKILL:
                continue  # it had ended already
            toll.kills += 1
            now = set(folder.rglob(".*"))
            toll.in_a_draft += bool(now - drafts)
            drafts = now
            present = inspect(folder, present, toll)
            bar.update()
    write_missing(folder, n_shards)
    inspect(folder, set(range(n_shards * SAMPLES_PER_SHARD)), toll)
    return toll


def write_missing(folder: Path, n_shards: int) -> None:
    """What a capture into a store does, with states that cost nothing."""
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    store = ActivationStore(folder, PROVENANCE)
    for number in store.missing(n_shards):
        store.write(
            number,
            known_states(range(number * SAMPLES_PER_SHARD, (number + 1) * SAMPLES_PER_SHARD)),
        )


def known_states(samples: range) -> Activations:
    """States whose every value tells its sample and row."""
    pairs = [(sample, row) for sample in samples for row in range(ROWS_PER_SAMPLE)]
    table = pd.DataFrame(
        {
            "sample": [s for s, _ in pairs],
            "id": [f"s{s}" for s, _ in pairs],
            "position": [r for _, r in pairs],
        }
    )
    return Activations({(1, "resid_post"): _values(table)}, table, PROVENANCE)


def inspect(folder: Path, expected: set[int], toll: Toll) -> set[int]:
    """The samples that the store has.

    Those of ``expected`` that are gone or changed are lost, those with too many rows doubled.
    """
    if not (folder / "provenance.json").exists() or not ActivationStore(folder).done:
        toll.lost |= expected
        return set()
    store = ActivationStore(folder)
    if store.verify():
        toll.lost |= expected  # nothing can be read of a store with a damaged shard
        return set()
    states = store.states()
    rows = states.table["sample"].value_counts()
    correct = (states[1] == _values(states.table)).all(dim=1).numpy()
    whole = set(rows.index[rows >= ROWS_PER_SAMPLE]) - set(states.table.loc[~correct, "sample"])
    toll.lost |= expected - whole
    toll.doubled |= set(rows.index[rows > ROWS_PER_SAMPLE])
    return {int(sample) for sample in rows.index}


def overhead(report: Report, subject: Subject, n: int, size: int) -> None:
    """A capture into a new folder, over the same capture in memory."""
    ways = {
        "memory": always(
            lambda: capture(
                subject.vlm,
                subject.samples[:n],
                subject.vlm.n_layers,
                span="image",
                batch_size=size,
            )
        )
    }

    @contextmanager
    def stored() -> Iterator[Callable[[], Activations]]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "store"
            yield lambda: capture(
                subject.vlm,
                subject.samples[:n],
                subject.vlm.n_layers,
                span="image",
                batch_size=size,
                store=path,
            )

    seconds = timed(
        ways | {"stored": stored}, report.options.rounds(ROUNDS), subject.device, label="stored"
    )
    report.tell(
        f"capture of {n} samples into a store, over the same in memory (wanted: at most 1.05)",
        ratio(seconds, "stored", "memory"),
    )


def _values(table: pd.DataFrame) -> torch.Tensor:
    first = torch.tensor(table["sample"].to_numpy(copy=True)) * ROWS_PER_SAMPLE + torch.tensor(
        table["position"].to_numpy(copy=True)
    )
    return first[:, None].float() + torch.arange(WIDTH) / (2 * WIDTH)


def _seconds_unharmed(folder: Path) -> float:
    """How long one process takes when nothing strikes it.

    Kills then fall anywhere in its work.
    """
    begin = time.perf_counter()
    process = FORK.Process(target=write_missing, args=(folder, SHARDS_PER_KILL))
    process.start()
    process.join()
    return time.perf_counter() - begin


if __name__ == "__main__":
    start({"storing": measure})
