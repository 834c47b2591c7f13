"""Tracing: what activation patching costs, and what cut attention costs.

Patching is compared with whole forwards, one for each cell; a knock-out with a plain forward.
"""

from contextlib import nullcontext

import torch

from benchmarks.command import start
from benchmarks.harness import Goal, Report, always, ratio, timed, within
from benchmarks.subjects import Subject, subjects
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.interventions import knock_out, patch, patch_spans
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM

ROUNDS, GRID_ROUNDS = 25, 3  # a grid takes many passes


def measure(report: Report) -> None:
    """All promises about tracing."""
    options = report.options
    size = options.pick(8, 2)
    rows = options.pick(4, 2)
    report.setting |= {"batch_size": size, "rounds": options.rounds(ROUNDS)}
    report.setting |= {"pairs of a grid": rows, "rounds of grids": options.rounds(GRID_ROUNDS)}
    for subject in subjects(report):
        cut(report, subject, size)
        grids(report, subject, rows)


def cut(report: Report, subject: Subject, size: int) -> None:
    """A forward with the predicting position cut off from the picture, over a plain one."""
    vlm, batch = subject.vlm, subject.batch(size)
    middle = range(subject.layer(0.4), subject.layer(0.6))
    contexts = {
        "plain": nullcontext,
        "again": nullcontext,
        "window": lambda: knock_out(vlm, "last", "image", middle),
        "all": lambda: knock_out(vlm, "last", "image", range(1, vlm.n_layers + 1)),
    }
    forward = lambda: vlm.forward(batch, logits=False, use_cache=False)
    ways = {name: within(context, forward) for name, context in contexts.items()}
    seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label="forwards")
    for way, layers in {"window": f"{len(middle)} layers", "all": "all layers"}.items():
        report.promise(
            f"a forward with attention to the picture cut in {layers}, over plain",
            ratio(seconds, way, "plain"),
            Goal("<=", 1.1),
        )
    report.tell(
        "plain forward over itself (noise of the machine)", ratio(seconds, "again", "plain")
    )


def grids(report: Report, subject: Subject, size: int) -> None:
    """A grid of all layers and five spans, over a whole forward for each of its cells."""
    vlm, clean = subject.vlm, subject.batch(size)
    corrupt = rolled(clean)
    layers = list(range(1, vlm.n_layers + 1))
    spans = {"image": "image", "question": "question", "all": "all", "last": "last"}
    spans["both"] = ("image", "question")
    metric = lambda logits: logits[:, 0]
    ways = {
        "grid": always(lambda: patch_spans(vlm, clean, corrupt, spans, layers, metric)),
        "whole": always(lambda: whole(vlm, clean, corrupt, spans, layers)),
    }
    seconds = timed(ways, report.options.rounds(GRID_ROUNDS), subject.device, label="grids")
    report.promise(
        f"patching {len(layers)} layers x {len(spans)} spans, over whole forwards",
        ratio(seconds, "grid", "whole"),
        Goal("<=", 0.6),
    )


def whole(vlm: VLM, clean: Batch, corrupt: Batch, spans: dict, layers: list[int]) -> None:
    """The usual way: the clean states once, then a whole forward for each layer and span."""
    states = read(vlm, clean, layers)
    for layer in layers:
        for positions in spans.values():
            with patch(vlm, states[layer, "resid_post"], layer, positions):
                vlm.forward(corrupt, logits=False, use_cache=False)


def rolled(batch: Batch) -> Batch:
    """The same prompts with their words moved by one: another input of the same spans."""
    result = Batch(dict(batch) | {"input_ids": batch["input_ids"].clone()})
    result.spans = batch.spans
    for row, kinds in enumerate(batch.spans):
        words = (kinds == SPANS.index("question")).nonzero().flatten()
        result["input_ids"][row, words] = torch.roll(batch["input_ids"][row, words], 1)
    return result


if __name__ == "__main__":
    start({"tracing": measure})
