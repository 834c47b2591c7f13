"""Run the contract and print a markdown table, architectures x checks.

``python -m tests.contract [model ...] [--report [FILE]]``. ``--report`` writes the table, with its
date and versions, where the page "Add your model" shows it, or to a file.
"""

import argparse
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import tokenizers
import torch
import transformers

from tests.contract.checks import CHECKS
from tests.contract.reference import DIFFERENCES, ROUNDING, case, generated, traces
from tests.zoo import MODELS
from xlvlms_tutorial.models.architectures import ARCHITECTURES

REPORT = Path(__file__).parents[2] / "book/reference/verified.txt"
FAILS = "FAILS"


def outcome(name: str, check: str) -> str:
    """A cell: the largest difference as a share of the largest value (0 where none is allowed),
    what holds instead, or what fails.
    """
    checked_case = case(name)
    before = generated(checked_case)[1]
    DIFFERENCES.clear()
    try:
        detail = CHECKS[check](checked_case)
        assert traces(checked_case.vlm) == [], "the model is not as it was"
        assert torch.equal(generated(checked_case)[1], before), "the model is not as it was"
    except Exception as error:  # the table shows what failed, and goes on
        first = next(iter(str(error).splitlines()), "")
        return f"{FAILS}: {type(error).__name__} {first[:80]}"
    largest = max(DIFFERENCES, default=0.0)
    parts = [f"{largest:.0e}".replace("e-0", "e-")] if largest > 0 else []
    return "; ".join([*parts, *([detail] if detail else [])]) or "0"


def label(name: str, names: tuple[str, ...]) -> str:
    """What users call an architecture, and which model of it this is
    where several of these names are.
    """
    kinds = [case(architecture).vlm.model.config.model_type for architecture in names]
    kind = case(name).vlm.model.config.model_type
    return ARCHITECTURES[kind].name + f" (`{name}`)" * (kinds.count(kind) > 1)


def table(names: tuple[str, ...]) -> tuple[list[str], int]:
    """The lines of the table, and how many checks failed."""
    lines = [
        f"| architecture | {' | '.join(check.replace('_', ' ') for check in CHECKS)} |",
        "|" + " --- |" * (len(CHECKS) + 1),
    ]
    failed = 0
    for name in names:
        cells = [outcome(name, check) for check in CHECKS]
        failed += sum(cell.startswith(FAILS) for cell in cells)
        lines.append(f"| {label(name, names)} | {' | '.join(cells)} |")
    return lines, failed


def head(names: tuple[str, ...], failed: int) -> str:
    """What was verified, when and with what."""
    versions = {
        "Python": platform.python_version(),
        **{part.__name__: part.__version__ for part in (torch, transformers, tokenizers)},
    }
    kinds = len({case(name).vlm.model.config.model_type for name in names})
    installed = ", ".join(f"{part} {version}" for part, version in versions.items())
    return (
        f"Verified on {datetime.now(UTC):%Y-%m-%d} with {installed}: {len(names)} models of "
        f"{kinds} architectures, {len(CHECKS)} checks each, {failed} fail. A cell holds the "
        "largest difference from a reference, as a share of the largest value "
        f"({ROUNDING:.0e} is allowed; "
        "0: equal to the bit, or nothing to measure). Batches are left-padded, with eager "
        "attention and sdpa; batch sizes are 1, 2, 4 and 8."
    )


def main(arguments: list[str]) -> int:
    """Print or write the table; the exit code is 1 if any check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.contract", description="Run the contract and print a table."
    )
    parser.add_argument("models", nargs="*", help="names in tests/zoo; all by default")
    parser.add_argument(
        "--report", nargs="?", type=Path, const=REPORT, metavar="FILE", help="write the table"
    )
    options = parser.parse_args(arguments)
    names = tuple(options.models) or MODELS
    lines, failed = table(names)
    text = "\n".join([head(names, failed), "", *lines, ""])
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")
    print(text)  # noqa: T201
    return int(failed > 0)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    raise SystemExit(main(sys.argv[1:]))
