"""Make shipped weights again and measure them on unseen samples.

``python -m xlvlms_tutorial.training.main RUN ...`` (make pocket).
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import pandas as pd
from torch import nn

from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.errors import unknown_revision
from xlvlms_tutorial.evaluation import evaluate
from xlvlms_tutorial.io import read_json, write_json
from xlvlms_tutorial.loading import load, load_scorer
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.pocket.build import connector_state
from xlvlms_tutorial.pocket.encoders import ENCODERS, WEIGHTS
from xlvlms_tutorial.pocket.scorer import RUN as SCORER
from xlvlms_tutorial.pocket.segmenter import RUN as SEGMENTER
from xlvlms_tutorial.pocket.variants import VARIANTS
from xlvlms_tutorial.training.adapters import RECIPES, measure_adapter, train_adapter
from xlvlms_tutorial.training.compressed import COMPRESSED, through
from xlvlms_tutorial.training.connector_runs import EXPERTS, RUNS, train_connector
from xlvlms_tutorial.training.scorer import train_scorer
from xlvlms_tutorial.training.scorer_metrics import preferences
from xlvlms_tutorial.training.segmenter import train_segmenter

# How many samples of which datasets each run is measured on.
MEASURED_ON = {
    "image": {"scenes": 500, "composition": 200},
    "gemma": {"scenes": 500, "composition": 200},
    "image-1": {"scenes": 100},
    "image-2": {"scenes": 100},
    "video": {"clips": 120},
    "audio": {"sounds": 160},
    "joint": {"scenes": 50, "clips": 50, "sounds": 50},
    SCORER: {"scenes": 500, "composition": 200},
    **{f"encoder-{encoder}": {"scenes": 50} for encoder in ENCODERS},
    **dict.fromkeys(COMPRESSED, {"scenes": 100}),
}


def measure(run: str = "image") -> dict:
    """Evaluate a connector, or the scorer, and write its metrics into the run's record.

    The metrics have intervals.
    """
    tables = {}
    if run == SCORER:
        scorer = load_scorer(dtype="float32")
        for dataset, n in MEASURED_ON[run].items():
            tables[dataset] = preferences(scorer, load_samples(dataset, n=n))
    else:
        vlm = _load_run(run)
        with through(run, vlm):
            for dataset, n in MEASURED_ON[run].items():
                samples = load_samples(dataset, n=n)
                report = evaluate(vlm, samples, dataset=dataset, batch_size=32)
                tables[dataset] = report.summary()
    file = WEIGHTS / run / "training.json"
    metrics = {dataset: _rows(table) for dataset, table in tables.items()}
    write_json(file, read_json(file) | {"metrics": metrics}, indent=1)
    return metrics


def _through(run: str, model: nn.Module, processor: object) -> AbstractContextManager:
    return through(run, VLM(model, processor, run))


def _load_run(run: str) -> VLM:
    shipped = {variant.run: name for name, variant in VARIANTS.items()}
    # those trained through a bfloat16 language model with less work are measured through the same
    dtype = "bfloat16" if run in COMPRESSED else "float32"
    vlm = load(shipped.get(run, "pocket-llava"), dtype=dtype)
    if run not in shipped:  # other seeds, of which only the records are
        vlm.model.model.multi_modal_projector.load_state_dict(connector_state(run))
    return vlm


def _rows(table: pd.DataFrame) -> list[dict]:
    plain = table.astype(object)
    rows = plain.where(plain.notna(), None).to_dict("records")
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float):
                row[key] = round(value, 4)
    return rows


def main(names: Sequence[str]) -> None:
    """Train and measure the runs of these names, or all of them in order where there are none.

    Some start from the image connector.

    Raises
    ------
    LoadError
        If there is no such run.
    """
    runs = [*RUNS, SCORER, SEGMENTER, *RECIPES]
    for run in names:
        if run not in runs:
            raise unknown_revision(run, runs)
    for run in names or runs:
        if run in RECIPES:
            train_adapter(run)
            measure_adapter(run)
            continue
        if run == SEGMENTER:
            train_segmenter()  # which measures it
            continue
        if run == SCORER:
            train_scorer()
        else:
            train_connector(run, partial(_through, run) if run in COMPRESSED else None)
        if run not in EXPERTS:  # those are measured together: python -m tools.expert_scores
            measure(run)


if __name__ == "__main__":
    main(sys.argv[1:])
