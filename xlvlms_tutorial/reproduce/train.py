"""Make shipped weights again and measure them on unseen samples: ``python -m xlvlms_tutorial.reproduce.train RUN ...`` (make pocket)."""

import json
import sys
from collections.abc import Sequence

from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.errors import RevisionError
from xlvlms_tutorial.models.loading import load
from xlvlms_tutorial.pocket.build import WEIGHTS
from xlvlms_tutorial.pocket.runs import RUNS, train_connector
from xlvlms_tutorial.pocket.variants import VARIANTS
from xlvlms_tutorial.reproduce.evaluate import evaluate

MEASURED_ON = {
    "image": {"scenes": 500, "composition": 200}, "video": {"clips": 120}, "audio": {"sounds": 160},
    "joint": {"scenes": 50, "clips": 50, "sounds": 50},
} | {run: {"scenes": 50} for run in RUNS if run.startswith("encoder-")}  # fmt: skip


def measure(run: str = "image") -> dict:
    """Evaluate a shipped connector in float32 and write its metrics, with intervals, into the run's record."""
    name = next(name for name, variant in VARIANTS.items() if variant.run == run)
    vlm, file = load(name, dtype="float32"), WEIGHTS / run / "training.json"
    record, metrics = json.loads(file.read_text()), {}
    for dataset, n in MEASURED_ON[run].items():
        summary = evaluate(vlm, load_samples(dataset, n=n), dataset=dataset, batch_size=32).summary().astype(object)
        summary = summary.where(summary.notna(), None)
        metrics[dataset] = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in summary.to_dict("records")]
    record["metrics"] = metrics
    file.write_text(json.dumps(record, indent=1) + "\n")
    return metrics


def main(asked: Sequence[str]) -> None:
    """Train and measure the runs asked for, or all of them in order: some start from the image connector.

    Raises
    ------
    RevisionError
        If there is no such run.
    """
    for run in asked:
        if run not in RUNS:
            raise RevisionError(run, list(RUNS))
    for run in asked or RUNS:
        train_connector(run)
        measure(run)


if __name__ == "__main__":
    main(sys.argv[1:])
