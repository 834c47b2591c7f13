"""Dropping: whether image tokens left out of the upper blocks save their time.

Half of the 576 image tokens of LLaVA-1.5's shapes are left out behind block 2. Measured is the
decoder, from embeddings with the picture merged in to the final norm, in the prefill and in decode
steps. The saving in time is told as a share of the saving that is counted.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from benchmarks.command import start
from benchmarks.harness import CPU, Goal, Report, count, median, ratio, timed, within
from benchmarks.skipping import NARROW_TEXT, NARROW_VISION, counted, decoding, prefill
from benchmarks.subjects import Subject, decoder_inputs, llava_shape
from xlvlms_tutorial.methods.dropping.dropping import METHODS, drop_tokens
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM

ROUNDS = 9
LAYER = 2
PROMISED = 0.85
# six blocks, of which four see half of the picture
TEXT = NARROW_TEXT | {"num_hidden_layers": 6}

Context = Callable[[], AbstractContextManager]


def measure(report: Report) -> None:
    """All promises about dropping."""
    options = report.options
    steps = options.pick(16, 4)
    report.setting |= {"layer": LAYER, "decode_steps": steps, "rounds": options.rounds(ROUNDS)}
    if options.device in ("auto", "cpu"):
        about(
            report,
            llava_shape(CPU, torch.float32, TEXT, NARROW_VISION, "llava of width 1024 in 6 blocks"),
            1,
            steps,
        )
    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        about(report, llava_shape(torch.device("cuda")), options.pick(8, 2), steps)


def about(report: Report, subject: Subject, size: int, steps: int) -> None:
    """Prefill and decode with half of the image tokens, by each way of choosing them."""
    report.about(subject.name)
    vlm, batch = subject.vlm, subject.batch(size)
    inputs, n = decoder_inputs(vlm, batch), int(batch.mask("image")[0].sum())
    contexts: dict[str, Context] = {"dense": nullcontext}
    contexts |= {by: lambda by=by: drop_tokens(vlm, LAYER, n // 2, by) for by in METHODS}
    running = {
        name: lambda context=context: _running(vlm, batch, context)
        for name, context in contexts.items()
    }
    ways = {
        name: within(context, lambda: prefill(vlm, inputs)) for name, context in running.items()
    }
    flops = {name: counted(vlm, way) for name, way in ways.items()}
    rounds = report.options.rounds(ROUNDS)
    seconds = timed(ways, rounds, subject.device, label="prefill")
    for by in METHODS:
        saved = 1 - flops[by] / flops["dense"]
        pairs = zip(seconds[by], seconds["dense"], strict=True)
        measured = median([(1 - less / whole) / saved for less, whole in pairs])
        description = (
            f"saving in time over counted saving, prefill with {n // 2} of {n} image tokens "
            f"behind block {LAYER}, by {by}"
        )
        if by == "attention":
            report.promise(description, measured, Goal(">=", PROMISED))
            report.tell("counted share of the FLOPs saved in the prefill", count(saved))
        else:
            report.tell(description, measured)
    decode = {name: decoding(vlm, inputs, running[name], steps) for name in ("dense", "attention")}
    seconds = timed(decode, rounds, subject.device, label="decode")
    report.tell(
        f"decode steps with {n // 2} of {n} image tokens behind block {LAYER}, over dense",
        ratio(seconds, "attention", "dense"),
    )


@contextmanager
def _running(vlm: VLM, batch: Batch, context: Context) -> Iterator[None]:
    # the decoder is called alone, and where the picture is must be known
    with vlm.run(batch), context():
        yield


if __name__ == "__main__":
    start({"dropping": measure})
