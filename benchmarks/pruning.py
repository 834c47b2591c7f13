"""Pruning: neurons that are really cut out save the time that they are counted for.

Zeros save none; masks are merged in little memory. Counted is by PyTorch's own counter, over the
whole forward with tower and last logits, the products of the attention included. Today's way of
merging masks holds all of them at once, one byte a weight. Masks live in NumPy's memory, so
Python's tracemalloc counts it.
"""

import gc
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import start
from benchmarks.harness import Goal, Report, always, count, median, ratio, timed
from benchmarks.subjects import Subject, subjects
from xlvlms_tutorial.methods.pruning.calibration import linear_maps
from xlvlms_tutorial.methods.pruning.masks import Masks
from xlvlms_tutorial.methods.pruning.scores import magnitude_masks, random_masks
from xlvlms_tutorial.methods.pruning.sparsify import alpha_subnet, apply_masks, n_m_masks
from xlvlms_tutorial.methods.pruning.structured import neuron_scores, prune_neurons
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM

ROUNDS, LONG_ROUNDS = 9, 3
SHARE = 0.5
N_MASKS = 8
MOST_MEGABYTES = 500
CAPABILITY = (8, 0)  # from which on GPUs multiply two of four weights


def measure(report: Report) -> None:
    """All promises about pruning."""
    options = report.options
    size = options.pick(8, 2)
    report.setting |= {
        "batch_size": size,
        "share of neurons": SHARE,
        "sparsity": SHARE,
        "masks": N_MASKS,
    }
    report.setting |= {
        "rounds": options.rounds(ROUNDS),
        "rounds of merging": options.rounds(LONG_ROUNDS),
    }
    for subject in subjects(report):
        about(report, subject, size)


def about(report: Report, subject: Subject, size: int) -> None:
    """All promises about one model."""
    smaller(report, subject, size)
    two_of_four(report, subject, size)
    merged(report, subject)


def smaller(report: Report, subject: Subject, size: int) -> None:
    """A forward without half of the neurons, or with half of the weights set to zero.

    Over the dense one.
    """
    batch, dense = subject.batch(size), subject.vlm
    cut = copied(dense)
    prune_neurons(cut, neuron_scores(cut), SHARE)
    counted = flops(cut, batch) / flops(dense, batch)
    ways = {
        name: always(lambda vlm=vlm: vlm.forward(batch, logits=False))
        for name, vlm in {"dense": dense, "cut": cut}.items()
    }
    seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label="cut")
    description = f"forward without {SHARE:.0%} of the MLPs' neurons, over dense"
    report.promise(
        f"{description} (counted: {counted:.3f})",
        ratio(seconds, "cut", "dense"),
        Goal("<=", round(1.15 * counted, 3)),
    )
    report.tell(f"counted work of the {description}", count(counted))
    report.tell(
        "bytes of the parameters without them, over dense",
        count(nbytes(cut.model) / nbytes(dense.model)),
    )
    del cut, ways["cut"]
    masked = copied(dense)
    apply_masks(masked, magnitude_masks(masked, SHARE))
    seconds = timed(
        ways | {"masked": always(lambda: masked.forward(batch, logits=False))},
        report.options.rounds(ROUNDS),
        subject.device,
    )
    report.tell(
        f"forward with {SHARE:.0%} of the weights set to zero (today's way), over dense",
        ratio(seconds, "masked", "dense"),
    )
    report.tell(
        "bytes of the parameters with them set to zero, over dense",
        count(nbytes(masked.model) / nbytes(dense.model)),
    )


def merged(report: Report, subject: Subject) -> None:
    """The intersection of masks from files.

    Promised for the embedded model, since one mask of 7B weights takes 800 MB alone.
    """
    with TemporaryDirectory() as folder:
        paths = [
            random_masks(subject.vlm, 0.1, seed).save(Path(folder) / f"{seed}.masks")
            for seed in range(N_MASKS)
        ]
        description = (
            f"megabytes beyond the model while {N_MASKS} masks of all linear maps "
            "are merged from their files"
        )
        if subject.samples is None:
            report.tell(description, count(peak(lambda: alpha_subnet(paths)) / 1e6))
            return
        ours, today = (peak(lambda way=way: way(paths)) for way in (alpha_subnet, all_at_once))
        report.promise(description, count(ours / 1e6), Goal("<=", MOST_MEGABYTES))
        report.tell(
            "megabytes beyond the model while booleans of all masks are merged (today's way)",
            count(today / 1e6),
        )
        ways = {
            "packed": always(lambda: alpha_subnet(paths)),
            "booleans": always(lambda: all_at_once(paths)),
        }
        seconds = timed(ways, report.options.rounds(LONG_ROUNDS), label="merge")
        report.tell(
            "merging packed masks one at a time, over booleans all at once",
            ratio(seconds, "packed", "booleans"),
        )
        report.tell(
            f"milliseconds of merging {N_MASKS} masks from their files",
            median([1000 * s for s in seconds["packed"]]),
        )


def two_of_four(report: Report, subject: Subject, size: int) -> None:
    """The linear maps of one block with two of four weights kept, by the GPU's sparse kernels.

    At the tokens of a prefill.
    """
    if (
        subject.device.type != "cuda"
        or torch.cuda.get_device_capability(subject.device) < CAPABILITY
    ):
        report.setting["2:4"] = "not measured: it needs a GPU of compute capability 8.0 or more"
        return
    tokens, layer = subject.batch(size)["input_ids"].numel() // 64 * 64, subject.layer(0.5)
    report.setting["2:4"] = f"layer {layer}, {tokens} tokens"
    masks = n_m_masks(subject.vlm, "magnitude", 2, 4, layers=layer)
    dense: dict[tuple[int, int], Tensor] = {}
    for key, linear in linear_maps(subject.vlm).items():
        if key in masks.shapes:
            dense.setdefault(
                masks.shapes[key], linear.weight * masks.unpack(*key).to(subject.device)
            )
    for shape, weight in dense.items():
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        inputs = torch.randn(tokens, shape[1], device=subject.device, dtype=weight.dtype)
        ways = {
            name: always(lambda w=w, x=inputs: repeated(w, x))
            for name, w in (("dense", weight), ("sparse", sparse))
        }
        seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label="2:4")
        report.tell(
            f"a linear map of {shape[1]} x {shape[0]} with 2:4 kernels, over dense",
            ratio(seconds, "sparse", "dense"),
        )


@torch.no_grad()
def repeated(weight: Tensor, inputs: Tensor) -> None:
    """Ten products, so that what starting a kernel takes is small beside them."""
    for _ in range(10):
        nn.functional.linear(inputs, weight)


def all_at_once(paths: Sequence[Path]) -> dict[tuple[int, str], Tensor]:
    """The intersection as most published code computes it: booleans of all masks in memory."""
    opened = []
    for path in paths:
        masks = Masks.load(path)
        opened.append({key: masks.unpack(*key) for key in masks})
    first, *others = opened
    for entry in others:
        for key, keep in entry.items():
            first[key] &= keep
    return first


def copied(vlm: VLM) -> VLM:
    """The model with weights of its own."""
    return VLM(deepcopy(vlm.model), vlm.processor, vlm.name)


def nbytes(model: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def flops(vlm: VLM, batch: Batch) -> int:
    """Floating-point operations of a forward, by PyTorch's counter."""
    with eager(vlm), FlopCounterMode(display=False) as counter:
        vlm.forward(batch, logits=False)
    return counter.get_total_flops()


@contextmanager
def eager(vlm: VLM) -> Iterator[None]:
    """Attention as plain products, which the counter knows on every device."""
    configs = {
        id(module.config): module.config
        for module in vlm.model.modules()
        if hasattr(module, "config")
    }
    before = {number: config._attn_implementation for number, config in configs.items()}
    try:
        for config in configs.values():
            # asked for by name, transformers refuses models that know no other on the way back
            config._attn_implementation = "eager"
        yield
    finally:
        for number, config in configs.items():
            config._attn_implementation = before[number]


def peak(call: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy held at once during a call.

    Beyond what they held before it.
    """
    gc.collect()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    start({"pruning": measure})
