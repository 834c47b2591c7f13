"""Skipping: whether leaving out k of L blocks takes only (L - k) / L of the time, in the prefill and in decode steps.

Measured is the decoder, from embeddings with the picture merged in to the final norm: tower and unembedding are no blocks.
Today's way is a forward hook that returns the block's input: the answers are those of a skip, but all is still computed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import DynamicCache

from benchmarks.command import start
from benchmarks.harness import Goal, Report, Way, ratio, timed, within
from benchmarks.subjects import Subject, decoder_inputs, subjects
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.states.intervene import skip

ROUNDS = 9
SHARES = (1 / 6, 1 / 3, 1 / 2)  # 5, 10 and 15 of pocket LLaVA's 30 blocks

Context = Callable[[], AbstractContextManager]


def measure(report: Report) -> None:
    """All promises about skipping."""
    options = report.options
    size, steps = options.pick(8, 2), options.pick(16, 4)
    report.setting |= {"batch_size": size, "decode_steps": steps, "scope": "both", "rounds": options.rounds(ROUNDS)}
    for subject in subjects(report):
        about(report, subject, size, steps)


def about(report: Report, subject: Subject, size: int, steps: int) -> None:
    """Prefill and decode of one model with ever more blocks left out, and the whole forward for comparison."""
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
            report.promise(f"{phase} without {k} of {n_layers} blocks, over dense", ratio(seconds, str(k), "dense"), goal)
        told = f"{phase} with {middle} of {n_layers} blocks bypassed by a hook (today's way), over dense"
        report.tell(told, ratio(seconds, "today", "dense"))
    whole = {name: within(contexts[name], lambda: vlm.forward(batch, logits=False)) for name in ("dense", *map(str, counts))}
    seconds = timed(whole, report.options.rounds(ROUNDS), subject.device, label="whole prefill")
    for k in counts:
        report.tell(f"prefill with tower and unembedding without {k} of {n_layers} blocks, over dense", ratio(seconds, str(k), "dense"))


def spread(n_layers: int, k: int) -> list[int]:
    """The numbers of k of the layers 1 to L, evenly spread, so that no first or last block is favoured."""
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

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        return anatomy.with_states(output, args[0] if args else kwargs["hidden_states"])

    handles = [vlm.blocks[layer - 1].register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    start({"skipping": measure})
