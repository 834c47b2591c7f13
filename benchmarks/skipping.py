"""Skipping: whether leaving out k of L blocks takes only (L - k) / L of the time.

And whether MLPs left out at image tokens save theirs. Measured is the decoder, from
embeddings with the picture merged in to the final norm: tower and unembedding are no blocks.
Today's way is a forward hook that returns the block's input: the answers are those of a
skip, but all is still computed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from benchmarks.command import start
from benchmarks.harness import CPU, Goal, Report, Way, count, median, ratio, timed, within
from benchmarks.subjects import LLAVA, Subject, decoder_inputs, llava_shape, subjects
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.interventions.token_skipping import skip_tokens
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM

ROUNDS = 9
SHARES = (1 / 6, 1 / 3, 1 / 2)  # 5, 10 and 15 of pocket LLaVA's 30 blocks
IMAGE_TOKENS = 576  # of LLaVA-1.5, where the promise about their MLPs is made
PROMISED = 0.85
# LLaVA-1.5-7B's picture and proportions at a quarter of its width,
# for a CPU; the tower is not timed
NARROW_TEXT = {
    "vocab_size": 2064,
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
NARROW_VISION = LLAVA["vision_config"] | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

Context = Callable[[], AbstractContextManager]


def measure(report: Report) -> None:
    """All promises about skipping."""
    options = report.options
    size, steps = options.pick(8, 2), options.pick(16, 4)
    report.setting |= {
        "batch_size": size,
        "decode_steps": steps,
        "scope": "both",
        "rounds": options.rounds(ROUNDS),
    }
    for subject in subjects(report):
        about(report, subject, size, steps)
        if int(subject.batch(1).mask("image").sum()) >= IMAGE_TOKENS:
            image_mlps(report, subject, size)
    if options.device in ("auto", "cpu"):
        subject = llava_shape(
            CPU, torch.float32, NARROW_TEXT, NARROW_VISION, "llava of width 1024 in 4 blocks"
        )
        report.about(subject.name)
        image_mlps(report, subject, 1)


def about(report: Report, subject: Subject, size: int, steps: int) -> None:
    """Prefill and decode of one model with ever more blocks left out.

    And the whole forward for comparison.
    """
    vlm, batch = subject.vlm, subject.batch(size)
    n_layers, inputs = vlm.n_layers, decoder_inputs(vlm, batch)
    counts = sorted({max(1, round(share * n_layers)) for share in SHARES})
    contexts: dict[str, Context] = {"dense": nullcontext}
    contexts |= {str(k): lambda k=k: skip(vlm, spread(n_layers, k)) for k in counts}
    middle = counts[len(counts) // 2]
    contexts["today"] = lambda: computed_in_vain(vlm, spread(n_layers, middle))
    phases: dict[str, Callable[[Context], Way]] = {
        "prefill": lambda context: within(context, lambda: prefill(vlm, inputs)),
        "decode": lambda context: decoding(vlm, inputs, context, steps),
    }
    for phase, way in phases.items():
        ways = {name: way(context) for name, context in contexts.items()}
        seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label=phase)
        for k in counts:
            goal = Goal("<=", round(1.1 * (n_layers - k) / n_layers, 3))
            report.promise(
                f"{phase} without {k} of {n_layers} blocks, over dense",
                ratio(seconds, str(k), "dense"),
                goal,
            )
        description = (
            f"{phase} with {middle} of {n_layers} blocks bypassed by a "
            "hook (today's way), over dense"
        )
        report.tell(description, ratio(seconds, "today", "dense"))
    whole = {
        name: within(contexts[name], lambda: vlm.forward(batch, logits=False))
        for name in ("dense", *map(str, counts))
    }
    seconds = timed(whole, report.options.rounds(ROUNDS), subject.device, label="whole prefill")
    for k in counts:
        report.tell(
            f"prefill with tower and unembedding without {k} of {n_layers} blocks, over dense",
            ratio(seconds, str(k), "dense"),
        )


def image_mlps(report: Report, subject: Subject, size: int) -> None:
    """How much of the counted work is saved in time by MLPs left out at image tokens.

    In all blocks, in the prefill.
    """
    vlm, batch = subject.vlm, subject.batch(size)
    inputs, n = decoder_inputs(vlm, batch), int(batch.mask("image")[0].sum())
    layers = list(range(1, vlm.n_layers + 1))
    contexts: dict[str, Context] = {"dense": nullcontext}
    contexts |= {
        f"{share:.0%}": lambda share=share: skip_tokens(vlm, layers, share) for share in (0.5, 1.0)
    }
    ways = {
        name: within(
            lambda context=context: _running(vlm, batch, context), lambda: prefill(vlm, inputs)
        )
        for name, context in contexts.items()
    }
    flops = {name: counted(vlm, way) for name, way in ways.items()}
    seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label="image tokens' MLPs")
    for name in list(contexts)[1:]:
        saved = 1 - flops[name] / flops["dense"]
        measured = median(
            [
                (1 - less / all_) / saved
                for less, all_ in zip(seconds[name], seconds["dense"], strict=True)
            ]
        )
        description = (
            f"saving in time over counted saving, without the MLPs of {name} of {n} "
            "image tokens in the prefill"
        )
        if name == "100%":
            report.promise(description, measured, Goal(">=", PROMISED))
        else:
            report.tell(description, measured)
        report.tell(
            f"counted share of the FLOPs saved without the MLPs of {name} of {n} image tokens",
            count(saved),
        )


@contextmanager
def _running(vlm: VLM, batch: Batch, context: Context) -> Iterator[None]:
    # the decoder is called alone, and where the picture is must be known
    with vlm.run(batch), context():
        yield


def counted(vlm: VLM, way: Way) -> int:
    """FLOPs of matrix products, those of attention scores among them.

    For these, attention has to be written out.
    """
    before = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    try:
        with way() as call, FlopCounterMode(display=False) as counter:
            call()
    finally:
        vlm.model.set_attn_implementation(before)
    return counter.get_total_flops()


def spread(n_layers: int, k: int) -> list[int]:
    """The numbers of k of the layers 1 to L, evenly spread.

    No first or last block is favoured.
    """
    return [int((2 * j + 1) * n_layers / (2 * k)) + 1 for j in range(k)]


@torch.no_grad()
def prefill(vlm: VLM, inputs: dict[str, object]) -> DynamicCache:
    """The decoder over the whole prompt; gives its cache."""
    cache = DynamicCache(config=vlm.model.config.get_text_config(decoder=True))
    anatomy.decoder(vlm.model)(**inputs | {"past_key_values": cache, "use_cache": True})
    return cache


def decoding(vlm: VLM, inputs: dict[str, object], context: Context, steps: int) -> Way:
    """Decode steps after a prefill, which is not timed."""

    @torch.no_grad()
    def decode(cache: DynamicCache, token: torch.Tensor) -> None:
        decoder = anatomy.decoder(vlm.model)
        for _ in range(steps):
            decoder(inputs_embeds=token, past_key_values=cache, use_cache=True)

    @contextmanager
    def way() -> Iterator[Callable[[], None]]:
        with context():
            cache = prefill(vlm, inputs)
            token = inputs["inputs_embeds"][:, -1:]
            yield lambda: decode(cache, token)

    return way


@contextmanager
def computed_in_vain(vlm: VLM, layers: list[int]) -> Iterator[None]:
    """Skip as most published code does: every block runs, and a hook throws its output away."""

    def hook(
        module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple
    ) -> torch.Tensor | tuple:
        return anatomy.with_states(output, anatomy.states_in(args, kwargs))

    handles = [
        vlm.blocks[layer - 1].register_forward_hook(hook, with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    start({"skipping": measure})
