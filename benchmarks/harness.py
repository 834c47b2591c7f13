"""Measure promises: paired times, goals that numbers meet or do not, a table, and a file."""

import operator
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xlvlms_tutorial.io import versions, write_json
from xlvlms_tutorial.metrics.intervals import Estimate, bootstrap
from xlvlms_tutorial.metrics.timing import measure_time

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path(__file__).parents[1] / "_build" / "benchmarks"
SPREAD = (
    "95 % interval of the median of the paired ratios, by the bootstrap over "
    "rounds; counts and bytes have none"
)
# numbers are rounded before they are judged, so that the file alone shows why a promise holds
DIGITS = 4
CPU = torch.device("cpu")

_RELATIONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}

# A way of doing something: entering it prepares, the call that it gives
# is timed, leaving it tidies up
Way = Callable[[], AbstractContextManager[Callable[[], object]]]


@dataclass(frozen=True)
class Options:
    """How thoroughly to measure, on what, and where the results go."""

    device: str = "auto"
    repeats: int | None = None
    quick: bool = False
    folder: Path | None = None

    def pick(self, full: int, quick: int) -> int:
        """A size of the measurement, or the small one that only shows that it works."""
        return quick if self.quick else full

    def rounds(self, usual: int) -> int:
        """How often to repeat: as asked for, else 3 times if quick, else as usual."""
        return self.repeats or self.pick(usual, 3)

    @property
    def results(self) -> Path:
        """The folder for results; quick ones never replace those that are kept."""
        return self.folder or (QUICK_RESULTS if self.quick else RESULTS)


@dataclass(frozen=True)
class Goal:
    """What a number has to be.

    "<=", ">=" or "==" a bound, or (relation "covers") an interval that holds it.
    """

    relation: str
    bound: float

    def __str__(self) -> str:
        bound = (
            str(self.bound)
            if isinstance(self.bound, int)
            else f"{self.bound:.3f}".removesuffix("0")
        )
        return (
            f"interval covers {bound}" if self.relation == "covers" else f"{self.relation} {bound}"
        )

    def holds(self, estimate: Estimate) -> bool:
        """Whether the number, or its interval, is as wanted."""
        if self.relation == "covers":
            return bool(estimate.low <= self.bound <= estimate.high)
        return bool(_RELATIONS[self.relation](estimate.value, round(self.bound, 3)))


@dataclass(frozen=True)
class Finding:
    """A measured number, and the goal it was promised to meet; without a goal it is information."""

    label: str
    estimate: Estimate
    goal: Goal | None = None

    @property
    def rounded(self) -> Estimate:
        """The number as it stands in the file."""
        return Estimate(
            *(
                round(float(x), DIGITS)
                for x in (self.estimate.value, self.estimate.low, self.estimate.high)
            ),
            self.estimate.n,
        )

    @property
    def holds(self) -> bool | None:
        """Whether the promise holds, or None where nothing is promised."""
        return None if self.goal is None else self.goal.holds(self.rounded)

    def asdict(self) -> dict[str, object]:
        """The row of the file."""
        record = {
            "what": self.label,
            "measured": self.rounded.value,
            "spread": [self.rounded.low, self.rounded.high],
        }
        return (
            record if self.goal is None else record | {"goal": str(self.goal), "holds": self.holds}
        )


@dataclass
class Report:
    """What one script has measured, and on what."""

    name: str
    options: Options = field(default_factory=Options)
    setting: dict[str, object] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def about(self, model: str) -> None:
        """What follows is measured on this model."""
        self.models.append(model)

    def promise(self, label: str, estimate: Estimate, goal: Goal) -> None:
        """Add a number that was promised to meet a goal."""
        self.findings.append(Finding(self._named(label), estimate, goal))

    def tell(self, label: str, estimate: Estimate) -> None:
        """Add a number about which nothing is promised."""
        self.findings.append(Finding(self._named(label), estimate))

    def _named(self, label: str) -> str:
        return f"{self.models[-1]}: {label}" if self.models else label

    @property
    def promises(self) -> list[Finding]:
        """The findings that have a goal."""
        return [finding for finding in self.findings if finding.goal is not None]

    def asdict(self) -> dict[str, object]:
        """The content of the file."""
        all_versions = versions()
        reported = {
            name: all_versions[name]
            for name in ("python", "torch", "transformers", "xlvlms_tutorial")
        }
        return {
            "name": self.name,
            "created": date.today().isoformat(),
            "versions": reported,
            "hardware": hardware(),
            "model": self.models,
            "setting": self.setting | {"quick": self.options.quick},
            "spread": SPREAD,
            "promises": [finding.asdict() for finding in self.promises],
            "information": [finding.asdict() for finding in self.findings if finding.goal is None],
        }

    def table(self) -> Table:
        """The findings as a table for the terminal."""
        table = Table(
            title=" on ".join([self.name, *([", ".join(self.models)] if self.models else [])])
        )
        for heading, justify in (
            ("what", "left"),
            ("measured", "right"),
            ("spread", "right"),
            ("goal", "left"),
            ("holds", "left"),
        ):
            table.add_column(heading, justify=justify, overflow="fold")
        for finding in self.findings:
            number = finding.rounded
            goal = (
                ("", "")
                if finding.goal is None
                else (str(finding.goal), "yes" if finding.holds else "NO")
            )
            table.add_row(
                finding.label,
                f"{number.value:.4g}",
                f"{number.low:.4g} to {number.high:.4g}",
                *goal,
            )
        return table


def always(call: Callable[[], object]) -> Way:
    """A way that needs no preparation."""
    return lambda: nullcontext(call)


def within(context: Callable[[], AbstractContextManager], call: Callable[[], object]) -> Way:
    """A call inside a context that is entered before the clock starts."""

    @contextmanager
    def way() -> Iterator[Callable[[], object]]:
        with context():
            yield call

    return way


def timed(
    ways: dict[str, Way], repeats: int, device: torch.device = CPU, **options: object
) -> dict[str, list[float]]:
    """Seconds of each way in each round, as ``measure_time`` takes them.

    ``options`` are more of its arguments.
    """
    times = measure_time(ways, repeats, device=device, progress=True, prepared=True, **options)
    return {name: rows["seconds"].tolist() for name, rows in times.groupby("way", sort=False)}


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> Estimate:
    """The median over rounds of the time of one way over that of the other, with its interval."""
    return bootstrap(np.array(seconds[over]) / np.array(seconds[under]), statistic=np.median)


def median(values: Sequence[float]) -> Estimate:
    """The median of numbers with its interval."""
    return bootstrap(values, statistic=np.median)


def count(number: float, n: int = 1) -> Estimate:
    """A number that was counted, so that its interval is itself."""
    return Estimate(float(number), float(number), float(number), n)


def hardware() -> dict[str, object]:
    """Processor, cores, threads of PyTorch and GPU if there is one.

    And how busy the machine was over the last minute.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    busy = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "load_average": busy,
    }


def _cpu() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def run(name: str, measure: Callable[[Report], None], options: Options) -> Report:
    """Run one script: measure, print the table, write the file."""
    report = Report(name, options)
    measure(report)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(report.table())
    write_json(options.results / f"{name}.json", report.asdict())
    return report


def verdict(reports: Sequence[Report]) -> str:
    """How many promises there are and how many hold."""
    promises = [finding for report in reports for finding in report.promises]
    return f"{len(promises)} promises, {sum(bool(finding.holds) for finding in promises)} hold"
