"""Make the shipped weights again and measure them on unseen scenes: ``python -m xlvlms_tutorial.reproduce.train`` (make pocket)."""

import json

from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.models.loading import load
from xlvlms_tutorial.pocket.build import WEIGHTS
from xlvlms_tutorial.pocket.runs import train_image_connector
from xlvlms_tutorial.pocket.training import Recipe
from xlvlms_tutorial.reproduce.evaluate import evaluate

MEASURED_ON = {"scenes": 500, "composition": 200}


def measure(run: str = "image") -> dict:
    """Evaluate the shipped connector in float32 and write its metrics, with intervals, into the run's record."""
    vlm, file = load("pocket-llava", dtype="float32"), WEIGHTS / run / "training.json"
    record, metrics = json.loads(file.read_text()), {}
    for dataset, n in MEASURED_ON.items():
        summary = evaluate(vlm, load_samples(dataset, n=n), dataset=dataset, batch_size=32).summary().astype(object)
        summary = summary.where(summary.notna(), None)
        metrics[dataset] = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in summary.to_dict("records")]
    record["metrics"] = metrics
    file.write_text(json.dumps(record, indent=1) + "\n")
    return metrics


if __name__ == "__main__":
    train_image_connector(Recipe())
    measure()
