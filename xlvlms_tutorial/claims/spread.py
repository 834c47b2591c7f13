"""Say how far a measurement moves between processors.

Intervals measured as on several of them are joined to the one measured here. Processors add
numbers in different orders. ``make numerics`` executes every chapter under settings that stand
for four kinds of processor, and keeps in ``spread.json`` what moved: for each measurement the
value and interval under each setting. A measurement that did not move by more than a hundredth
of its interval is not in the file.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from xlvlms_tutorial.io import read_json
from xlvlms_tutorial.metrics.intervals import Estimate

FILE = Path(__file__).with_name("spread.json")
KEY = ("id", "chapter", "model", "dataset", "seeds", "variant")
MOVED = 0.01  # share of the interval's width


def name_of(record: Mapping[str, object]) -> str:
    """Return the name of a measurement in the file, made of the fields of ``KEY``."""
    return " | ".join(str(record[part]) for part in KEY)


@lru_cache
def _read_spread(file: Path) -> dict[str, list[dict[str, float]]]:
    return read_json(file) if file.exists() else {}


def of(key: Mapping[str, object], estimate: Estimate) -> list[Estimate]:
    """Return what a measurement was under each setting.

    Empty where it did not move, or was made with another number of observations.
    """
    rows = _read_spread(FILE).get(name_of(key), [])
    return [Estimate(**row) for row in rows if row["n"] == estimate.n]


def joined(estimate: Estimate, others: Iterable[Estimate]) -> Estimate:
    """Return the estimate with the smallest interval that holds its own and those of the others."""
    intervals = [estimate, *others]
    low = min(interval.low for interval in intervals)
    high = max(interval.high for interval in intervals)
    return Estimate(estimate.value, low, high, estimate.n)


def moved(estimates: Sequence[Estimate]) -> bool:
    """Whether two estimates differ by more than rounding.

    In an end of the interval, or in the value.
    """
    numbers = np.array([(interval.value, interval.low, interval.high) for interval in estimates])
    width = (numbers[:, 2] - numbers[:, 1]).max()
    changes = np.ptp(numbers, axis=0)
    return bool((changes > MOVED * width).any())
