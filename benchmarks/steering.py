"""Steering: what a vector added at every position costs in generation.

As a hook and folded into a bias, what sweeps over layers cost, and a step of training. Today's way
is a forward hook that makes a mask of positions anew in every step and moves the vector each time,
one pass through the model for each layer of a sweep, and training of LoRA.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from benchmarks.command import start
from benchmarks.harness import Goal, Report, Way, always, median, ratio, timed, within
from benchmarks.subjects import Subject, subjects
from xlvlms_tutorial.activations.hooks import reading
from xlvlms_tutorial.interventions.edits import add, fold
from xlvlms_tutorial.methods.steering import LearnedSteering, SteeringVectors
from xlvlms_tutorial.methods.steering.representation_tuning import frozen
from xlvlms_tutorial.methods.steering.sweep import Run, fast_layers, first_ids
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.tutorials.tuning_ladder import RUNGS, Rung, attached

ROUNDS, SWEEP_ROUNDS = 15, 7  # a sweep takes many passes
N_LAYERS = 10
DEPTHS, STRENGTHS = (0.25, 0.5, 0.75, 1.0), (1.0, 2.0)


def measure(report: Report) -> None:
    """All promises about steering."""
    options = report.options
    size, tokens = options.pick(8, 2), options.pick(32, 4)
    report.setting |= {
        "batch_size": size,
        "new_tokens": tokens,
        "positions": "all",
        "rounds": options.rounds(ROUNDS),
    }
    report.setting |= {"rounds of sweeps": options.rounds(SWEEP_ROUNDS)}
    for subject in subjects(report):
        about(report, subject, size, tokens)
        sweeps(report, subject, size)
        learned(report, subject, size, tokens)
        tuning(report, subject, size)


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
    report.promise(
        "generation with a steering hook at all positions, over plain",
        ratio(seconds, "hook", "plain"),
        Goal("<=", 1.05),
    )
    folded = ratio(seconds, "folded", "plain")
    report.promise(
        "generation with the vector folded into a bias, over plain: no difference seen",
        folded,
        Goal("covers", 1.0),
    )
    report.promise(
        "generation with the vector folded into a bias, over plain", folded, Goal("<=", 1.02)
    )
    report.tell(
        "generation steered at the predicting positions only, over plain",
        ratio(seconds, "last", "plain"),
    )
    report.tell(
        "generation with a hook that makes its mask in every step (today's way), over plain",
        ratio(seconds, "today", "plain"),
    )
    report.tell(
        "plain generation over itself (noise of the machine)", ratio(seconds, "again", "plain")
    )
    report.tell(
        "milliseconds for a token of a plain generation, prefill included",
        median([1000 * s / tokens for s in seconds["plain"]]),
    )


def sweeps(report: Report, subject: Subject, size: int) -> None:
    """Vectors of many layers, and the first tokens that some layers and strengths lead to."""
    vlm, batch = subject.vlm, subject.batch(size)
    layers = sorted({round(k * vlm.n_layers / N_LAYERS) for k in range(1, N_LAYERS + 1)})
    ways: dict[str, Way] = {"together": always(lambda: mean_differences(vlm, batch, layers))}
    ways["one by one"] = always(lambda: [mean_differences(vlm, batch, [layer]) for layer in layers])
    seconds = timed(ways, report.options.rounds(SWEEP_ROUNDS), subject.device, label="vectors")
    description = f"vectors of {len(layers)} layers from one pass, over a pass for each layer"
    report.promise(description, ratio(seconds, "together", "one by one"), Goal("<=", 0.15))
    runs = runs_of(vlm, sorted({subject.layer(depth) for depth in DEPTHS}))
    fast = fast_layers(vlm, batch, {run.layer for run in runs})
    ways = {
        "fast": always(lambda: list(first_ids(vlm, batch, runs, "all", fast))),
        "whole": always(lambda: list(first_ids(vlm, batch, runs))),
    }
    seconds = timed(ways, report.options.rounds(SWEEP_ROUNDS), subject.device, label="first tokens")
    description = (
        f"first tokens steered in {len(runs)} ways, from the states of "
        f"{len(fast)} layers, over whole forwards"
    )
    report.tell(description, ratio(seconds, "fast", "whole"))


def learned(report: Report, subject: Subject, size: int, tokens: int) -> None:
    """A learned function of the state: its fit, and generations that it steers."""
    vlm, batch, layer = subject.vlm, subject.batch(size), subject.layer(0.5)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(report.options.pick(160, 20), vlm.width, generator=generator)
    shifts = 0.01 * torch.randn(states.shape, generator=generator)
    steering = LearnedSteering(min(64, vlm.width))
    fit = {"fit": always(lambda: steering.fit(states, shifts, vlm.name))}
    seconds = timed(fit, report.options.rounds(SWEEP_ROUNDS), subject.device, label="fits")
    report.promise(
        f"seconds to fit a learned function on {len(states)} states",
        median(seconds["fit"]),
        Goal("<=", 10.0),
    )
    generate = lambda: vlm.generate_ids(batch, tokens, min_new_tokens=tokens)
    ways = {"plain": within(nullcontext, generate)}
    ways["learned"] = within(lambda: steering.apply(vlm, layer), generate)
    seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label="generations")
    report.promise(
        "generation steered by a learned function, over plain",
        ratio(seconds, "learned", "plain"),
        Goal("<=", 1.05),
    )


def tuning(report: Report, subject: Subject, size: int) -> None:
    """Training steps of a tuning of representations and of LoRA, through the same frozen model."""
    vlm, batch = subject.vlm, subject.batch(size)
    rungs = {"loreft": RUNGS[0], "lora": RUNGS[1]}
    contexts = {name: partial(trained, rung, vlm, batch) for name, rung in rungs.items()}
    seconds = timed(contexts, report.options.rounds(SWEEP_ROUNDS), subject.device, label="steps")
    report.promise(
        f"a training step of {rungs['loreft'].name}, over one of {rungs['lora'].name}",
        ratio(seconds, "loreft", "lora"),
        Goal("<=", 1.0),
    )


@contextmanager
def trained(rung: Rung, vlm: VLM, batch: Batch) -> Iterator[Callable[[], None]]:
    """Attach a rung's parameters, and give a step: forward, gradient and AdamW."""
    # by number: for a count a CPU would copy the unembedding for each row
    last = {"logits_to_keep": torch.tensor([-1])} if "logits_to_keep" in vlm.accepts else {}
    with frozen(vlm.model), attached(rung, vlm) as parameters:
        optimiser = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)

        def step() -> None:
            with vlm.run(batch):
                logits = vlm.model(**batch, **last).logits[:, -1].float()
            optimiser.zero_grad()
            (-logits.log_softmax(dim=-1)[:, 0].mean()).backward()
            optimiser.step()

        yield step


def mean_differences(vlm: VLM, batch: Batch, layers: list[int]) -> dict[int, Tensor]:
    """For each layer the mean state of a half of the batch minus that of the other.

    The first half's minus the second's, at the prompts' last positions, from one pass.
    """
    with reading(vlm, layers, positions="last", dtype=torch.float32) as recorded:
        vlm.forward(batch, logits=False, use_cache=False)
    half = len(batch["input_ids"]) // 2
    return {
        layer: (states[:half].mean(dim=0) - states[half:].mean(dim=0))[0]
        for (layer, _), (states,) in recorded.items()
    }


def runs_of(vlm: VLM, layers: list[int]) -> list[Run]:
    """Random vectors at these layers, each at two strengths."""
    generator = torch.Generator().manual_seed(0)
    vectors = SteeringVectors(
        {layer: torch.randn(vlm.width, generator=generator) for layer in layers},
        {"model": vlm.name},
    )
    return [Run(None, vectors, layer, strength) for layer in layers for strength in STRENGTHS]


@contextmanager
def masked_anew(vlm: VLM, vector: Tensor, layer: int) -> Iterator[None]:
    """Add a vector as most published code does.

    The mask is made, and mask and vector are moved, in every step.
    """

    def hook(module: torch.nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        states = anatomy.states_of(output)
        mask = torch.zeros(states.shape[:2])
        for row in range(states.shape[0]):
            mask[row, torch.arange(states.shape[1])] = 1
        moved = mask.to(states.device, states.dtype)[..., None] * vector.to(
            states.device, states.dtype
        )
        return anatomy.with_states(output, states + moved)

    handle = vlm.blocks[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


if __name__ == "__main__":
    start({"steering": measure})
