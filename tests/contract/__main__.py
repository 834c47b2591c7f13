"""Run the contract and print a markdown table, architectures x checks: ``python -m tests.contract [model ...]``."""

import sys

import torch
import transformers

from tests.contract.checks import CHECKS
from tests.contract.reference import case, generated, traces
from tests.zoo import MODELS
from xlvlms_tutorial.models.architectures import ARCHITECTURES


def outcome(name: str, check: str) -> str:
    """A cell: yes, what holds instead, or FAILS with the reason."""
    at = case(name)
    before = generated(at)[1]
    try:
        told = CHECKS[check](at)
        assert traces(at.vlm) == [] and torch.equal(generated(at)[1], before), "the model is not as it was"
    except Exception as error:  # the table shows what failed, and goes on
        return f"FAILS: {type(error).__name__} {str(error).splitlines()[0][:80]}"
    return told or "yes"


def main(names: tuple[str, ...]) -> int:
    """Print the table, row by row; the exit code is 1 if any check failed."""
    print("| architecture |", " | ".join(check.replace("_", " ") for check in CHECKS), "|")  # noqa: T201
    print("|" + " --- |" * (len(CHECKS) + 1))  # noqa: T201
    failed = 0
    for name in names:
        cells = [outcome(name, check) for check in CHECKS]
        failed += sum(cell.startswith("FAILS") for cell in cells)
        kind = case(name).vlm.model.config.model_type
        print(f"| {ARCHITECTURES[kind].name} |", " | ".join(cells), "|", flush=True)  # noqa: T201
    print(f"\n{len(names)} architectures, {len(CHECKS)} checks each, {failed} fail; batches of two rows, left-padded, eager and sdpa")  # noqa: T201
    return int(failed > 0)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    raise SystemExit(main(tuple(sys.argv[1:]) or MODELS))
