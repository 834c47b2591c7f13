"""Steering: what a vector added at every position costs in generation, as a hook and folded into a bias.

Today's way is a forward hook that makes a mask of positions anew in every step and moves the vector each time.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from benchmarks.command import start
from benchmarks.harness import Goal, Report, median, ratio, timed, within
from benchmarks.subjects import Subject, subjects
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.states.intervene import add, fold

ROUNDS = 15


def measure(report: Report) -> None:
    """All promises about steering."""
    options = report.options
    size, tokens = options.pick(8, 2), options.pick(32, 4)
    report.setting |= {"batch_size": size, "new_tokens": tokens, "positions": "all", "rounds": options.rounds(ROUNDS)}
    for subject in subjects(report):
        about(report, subject, size, tokens)


def about(report: Report, subject: Subject, size: int, tokens: int) -> None:
    """Whole generations of the same number of tokens, prefill included, steered and plain."""
    vlm, batch, layer = subject.vlm, subject.batch(size), subject.layer(0.5)
    vector = 0.01 * torch.randn(vlm.width, generator=torch.Generator().manual_seed(0))
    contexts = {
        "plain": nullcontext,
        "again": nullcontext,
        "hook": lambda: add(vlm, vector, layer),
        "last": lambda: add(vlm, vector, layer, positions="last"),
        "folded": lambda: fold(vlm, vector, layer),
        "today": lambda: masked_anew(vlm, vector, layer),
    }
    generate = lambda: vlm.generate_ids(batch, tokens, min_new_tokens=tokens)
    ways = {name: within(context, generate) for name, context in contexts.items()}
    seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label="generations")
    report.promise("generation with a steering hook at all positions, over plain", ratio(seconds, "hook", "plain"), Goal("<=", 1.05))
    folded = ratio(seconds, "folded", "plain")
    report.promise("generation with the vector folded into a bias, over plain: no difference seen", folded, Goal("covers", 1.0))
    report.promise("generation with the vector folded into a bias, over plain", folded, Goal("<=", 1.02))
    report.tell("generation steered at the predicting positions only, over plain", ratio(seconds, "last", "plain"))
    report.tell("generation with a hook that makes its mask in every step (today's way), over plain", ratio(seconds, "today", "plain"))
    report.tell("plain generation over itself (noise of the machine)", ratio(seconds, "again", "plain"))
    report.tell("milliseconds for a token of a plain generation, prefill included", median([1000 * s / tokens for s in seconds["plain"]]))


@contextmanager
def masked_anew(vlm: VLM, vector: Tensor, layer: int) -> Iterator[None]:
    """Add a vector as most published code does: the mask is made, and mask and vector are moved, in every step."""

    def hook(module: torch.nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        states = anatomy.states_of(output)
        mask = torch.zeros(states.shape[:2])
        for row in range(states.shape[0]):
            mask[row, torch.arange(states.shape[1])] = 1
        moved = mask.to(states.device, states.dtype)[..., None] * vector.to(states.device, states.dtype)
        return anatomy.with_states(output, states + moved)

    handle = vlm.blocks[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


if __name__ == "__main__":
    start({"steering": measure})
