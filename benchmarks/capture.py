"""Capture: what reading a layer costs, and what stopping early saves.

In time and memory, over the forward that is needed anyway. Today's way is one sample at a time with
``output_hidden_states=True``, every layer and position moved to the CPU and kept.
"""

from collections.abc import Callable

import torch

from benchmarks.command import start
from benchmarks.harness import Goal, Report, Way, always, count, ratio, timed
from benchmarks.memory import peak_bytes
from benchmarks.subjects import Subject, batch_of, decoder_inputs, subjects
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.hooks import reading
from xlvlms_tutorial.data import PROMPTS
from xlvlms_tutorial.models import anatomy

ROUNDS, LONG_ROUNDS = 15, 7  # the long ones take all samples through the model
DEPTHS = (0.1, 1 / 3, 2 / 3)


def measure(report: Report) -> None:
    """All promises about capturing."""
    options = report.options
    n, size = options.pick(64, 8), options.pick(16, 4)
    rounds = {
        "rounds": options.rounds(ROUNDS),
        "rounds of all samples": options.rounds(LONG_ROUNDS),
    }
    report.setting |= {"samples": n, "batch_size": size, **rounds}
    for subject in subjects(report):
        about(report, subject, n, size)


def about(report: Report, subject: Subject, n: int, size: int) -> None:
    """All promises about capturing from one model."""
    cost_of_a_hook(report, subject, size)
    against_today(report, subject, n, size)
    stopping_early(report, subject, size)
    memory_of_one_layer(report, subject, size)
    if subject.samples is not None:
        memory_of_everything(report, subject, n)


def cost_of_a_hook(report: Report, subject: Subject, size: int) -> None:
    """The mean over the picture at the last layer, against the same forward without a hook.

    Neither stops early.
    """
    batch = subject.batch(size)
    bare = lambda: subject.vlm.forward(batch, logits=False, use_cache=False)
    hooked = lambda: _pooled(subject, subject.vlm.n_layers, bare)
    ways = {"bare": always(bare), "again": always(bare), "hooked": always(hooked)}
    seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label="hook")
    report.promise(
        "a forward that keeps one pooled layer, over the bare forward",
        ratio(seconds, "hooked", "bare"),
        Goal("<=", 1.05),
    )
    report.tell(
        "the bare forward over itself (noise of the machine)", ratio(seconds, "again", "bare")
    )


def against_today(report: Report, subject: Subject, n: int, size: int) -> None:
    """One pooled layer of all samples in batches, against everything of one sample at a time.

    Both prepare their inputs. A capture never goes on to the unembedding, so that one of the last
    layer may take less than the bare forwards.
    """
    middle, last = subject.layer(0.5), subject.vlm.n_layers
    ways = {
        "today": always(lambda: today(subject, n)),
        "bare": always(lambda: bare_batches(subject, n, size)),
    }
    ways |= {
        f"layer {layer}": always(lambda layer=layer: ours(subject, layer, n, size))
        for layer in (middle, last)
    }
    seconds = timed(ways, report.options.rounds(LONG_ROUNDS), subject.device, label="all samples")
    description = (
        f"{n} samples, everything kept one by one, over one pooled layer in batches of {size}"
    )
    report.promise(
        f"{description}: layer {middle}", ratio(seconds, "today", f"layer {middle}"), Goal(">=", 4)
    )
    report.tell(f"{description}: layer {last}", ratio(seconds, "today", f"layer {last}"))
    whole = (
        f"{n} samples from pictures to a table, one pooled layer ({last}), "
        "over the bare batched forwards"
    )
    report.promise(whole, ratio(seconds, f"layer {last}", "bare"), Goal("<=", 1.05))


def ours(subject: Subject, layer: int, n: int, size: int) -> list[torch.Tensor]:
    """One pooled layer (n, d) of n samples."""
    if subject.samples is not None:
        return [
            capture(subject.vlm, subject.samples[:n], layer, span="image", batch_size=size)[layer]
        ]
    batch, recorded = subject.batch(size), []
    for _ in range(0, n, size):
        recorded.append(
            _pooled(
                subject,
                layer,
                lambda: subject.vlm.forward(batch, logits=False, use_cache=False),
                stop=True,
            )
        )
    return recorded


@torch.no_grad()
def today(subject: Subject, n: int) -> list[list[torch.Tensor]]:
    """Every layer (1, t, d) of n samples, as most published code reads them."""
    vlm, recorded = subject.vlm, []
    prepared = subject.batch(1) if subject.samples is None else None
    for k in range(n):
        if prepared is None:
            sample = subject.samples[k]
            inputs = vlm.processor(
                text=[vlm.prompt(PROMPTS["image"])], images=[sample.image], return_tensors="pt"
            ).to(vlm.device, vlm.dtype)
        else:
            inputs = prepared
        states = vlm.model(**inputs, output_hidden_states=True).hidden_states
        recorded.append([layer.cpu() for layer in states])
    return recorded


def bare_batches(subject: Subject, n: int, size: int) -> None:
    """The forwards of n samples in batches, inputs prepared, nothing kept."""
    prepared = subject.batch(size) if subject.samples is None else None
    for first in range(0, n, size):
        batch = (
            prepared
            if prepared is not None
            else batch_of(subject.vlm, subject.samples[first : min(first + size, n)])
        )
        subject.vlm.forward(batch, logits=False, use_cache=False)


def stopping_early(report: Report, subject: Subject, size: int) -> None:
    """A capture that stops after layer l, over the bare forward.

    With the tower, and for the decoder alone, whose layers they are.
    """
    batch, n_layers = subject.batch(size), subject.vlm.n_layers
    inputs, decoder = decoder_inputs(subject.vlm, batch), anatomy.decoder(subject.vlm.model)
    forwards = {
        "the whole forward": lambda: subject.vlm.forward(batch, logits=False, use_cache=False),
        "the decoder, picture encoded beforehand": lambda: _decoded(
            subject, batch, decoder, inputs
        ),
    }
    layers = sorted({subject.layer(depth) for depth in DEPTHS})
    for name, forward in forwards.items():
        ways: dict[str, Way] = {"bare": always(forward)}
        ways |= {
            str(layer): always(
                lambda layer=layer, forward=forward: _pooled(subject, layer, forward, stop=True)
            )
            for layer in layers
        }
        seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label=name)
        for example in layers:
            description = f"stopping at layer {example} of {n_layers}, over {name}"
            report.promise(
                description,
                ratio(seconds, str(example), "bare"),
                Goal("<=", round((example + 1) / n_layers + 0.1, 3)),
            )


def memory_of_one_layer(report: Report, subject: Subject, size: int) -> None:
    """The first layer of a pass that goes on to the end.

    What is kept then adds to all that follows. The decoder alone: the tower may need more memory
    than any block, and would hide what is kept.
    """
    batch = subject.batch(size)
    inputs, decoder = decoder_inputs(subject.vlm, batch), anatomy.decoder(subject.vlm.model)
    forward = lambda: _decoded(subject, batch, decoder, inputs)
    bare = peak_bytes(forward, subject.device)
    for name, options in (
        ("one pooled layer", {"positions": "image", "reduce": "mean"}),
        ("all positions of one layer", {}),
    ):
        recorded = []

        def reads(recorded: list = recorded, options: dict = options) -> None:
            with reading(subject.vlm, 1, **options) as steps:
                forward()
            recorded.append(steps[1, "resid_post"][0])

        extra = peak_bytes(reads, subject.device) - bare
        report.promise(
            f"peak extra memory over what is kept: {name}",
            count(extra / recorded[0].nbytes),
            Goal("<=", 1.1),
        )


def memory_of_everything(report: Report, subject: Subject, n: int, size: int = 2) -> None:
    """All positions of all layers of all samples.

    By ``capture`` itself, also while it puts its batches together. Batches are small, since what is
    kept has to outweigh a forward: the memory of that is free again when batches are put together.
    """
    bare = peak_bytes(lambda: bare_batches(subject, n, size), subject.device)
    n_bytes = []

    def captures() -> None:
        states = capture(
            subject.vlm, subject.samples[:n], "all", positions="all", reduce=None, batch_size=size
        )
        n_bytes.append(sum(tensor.nbytes for tensor in states.tensors.values()))

    extra = peak_bytes(captures, subject.device) - bare
    sizes = f"{n_bytes[0] / 1e6:,.0f} MB; a bare forward takes {bare / 1e6:,.0f} MB"
    description = f"all positions of all layers of {n} samples in batches of {size} ({sizes})"
    report.promise(
        f"peak extra memory over what is kept: {description}",
        count(extra / n_bytes[0]),
        Goal("<=", 1.1),
    )


def _pooled(
    subject: Subject, layer: int, forward: Callable[[], object], stop: bool = False
) -> torch.Tensor:
    with reading(subject.vlm, layer, positions="image", reduce="mean", stop=stop) as steps:
        forward()
    return steps[layer, "resid_post"][0]


@torch.no_grad()
def _decoded(
    subject: Subject, batch: object, decoder: torch.nn.Module, inputs: dict[str, object]
) -> object:
    with subject.vlm.run(batch):  # so that a reading knows where the picture is
        return decoder(**inputs)


if __name__ == "__main__":
    start({"capture": measure})
