"""Vocabulary: entropies and divergences of many tokens in bounded memory.

And the mean over all pairs without any one pair. Today's way is the softmax of all tokens kept in
memory, and a loop over pairs.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.command import start
from benchmarks.harness import Goal, Report, always, count, median, ratio, timed
from benchmarks.memory import peak_bytes
from benchmarks.subjects import Subject, subjects
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.methods.logit_lens import (
    ContextualNeighbours,
    TextStates,
    decoder_fingerprint,
    readouts,
)
from xlvlms_tutorial.methods.logit_lens.measures import (
    entropy,
    kl_divergence,
    mean_distribution,
    modality_divergence,
)
from xlvlms_tutorial.models.spans import SPANS

ROUNDS = 7
GB = 1e9


def measure(report: Report) -> None:
    """All promises about distributions over the vocabulary."""
    options = report.options
    sizes = {
        "tokens": options.pick(10_000, 200),
        "part": options.pick(1000, 50),
        "pairs": options.pick(128, 8),
        "index": options.pick(50_000, 300),
    }
    report.setting |= sizes | {"rounds": options.rounds(ROUNDS)}
    for subject in subjects(report):
        about(report, subject, *sizes.values())


def about(
    report: Report, subject: Subject, n: int, part: int, pairs: int, index: int = 300
) -> None:
    """All promises about one model."""
    states = tokens(subject, n)
    memory(report, subject, states, part)
    against_today(report, subject, states[:part])
    all_pairs(report, subject, states, pairs)
    contextual_neighbours(report, subject, states, index)


def tokens(subject: Subject, n: int) -> Tensor:
    """So many states (n, d) of all layers of real inputs, in random order."""
    subject_batch = subject.batch(1)
    # one more, for what is padding
    size = -(-n // (subject_batch["input_ids"].shape[1] * (subject.vlm.n_layers + 1))) + 1
    batch = subject.batch(size)
    recorded = torch.cat(
        list(
            read(
                subject.vlm, batch, "all", positions=batch.spans != SPANS.index("padding")
            ).values()
        )
    )
    return recorded[torch.randperm(len(recorded), generator=torch.Generator().manual_seed(0))[:n]]


def memory(report: Report, subject: Subject, states: Tensor, part: int) -> None:
    """What is needed beyond the states, for all tokens; of today's way for a part of them."""
    vlm, n, device = subject.vlm, len(states), subject.device
    shuffled, eighths, sides = (
        states.roll(1, 0),
        states.split(n // 8)[:2],
        as_sides(states, n // 16),
    )
    calls = {
        f"the entropies of {n:,} tokens": lambda: entropy(vlm, states),
        f"the divergences of {n:,} tokens from others": lambda: kl_divergence(
            vlm, states, shuffled
        ),
        f"the divergences of all pairs of {n // 8:,} and {n // 8:,} tokens": lambda: kl_divergence(
            vlm, *eighths, pairs="all"
        ),
        f"the mean distribution of {n:,} tokens": lambda: mean_distribution(vlm, states),
        f"the mean divergence over all pairs of {n // 2:,} and {n // 2:,} tokens": lambda: (
            modality_divergence(vlm, *sides, 0, n_tokens=None)
        ),
    }
    for name, call in calls.items():
        report.promise(
            f"peak extra memory, in GB: {name}", count(peak_bytes(call, device) / GB), Goal("<=", 1)
        )
    peak = peak_bytes(lambda: entropy_held(subject, states[:part]), device)
    report.tell(
        f"peak extra memory, in GB: the entropies of {part:,} tokens, all held (today's way)",
        count(peak / GB),
    )


def against_today(report: Report, subject: Subject, states: Tensor) -> None:
    """Entropies and matched divergences of as many tokens as today's way can hold."""
    shuffled = states.roll(1, 0)
    ways = {
        "entropy": always(lambda: entropy(subject.vlm, states)),
        "entropy held": always(lambda: entropy_held(subject, states)),
        "divergence": always(lambda: kl_divergence(subject.vlm, states, shuffled)),
        "divergence held": always(lambda: divergence_held(subject, states, shuffled)),
        "unembedding": always(lambda: logits_alone(subject, states)),
    }
    seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label="tokens")
    description = f"of {len(states):,} tokens, all held in memory (today's way), over ours"
    report.promise(
        f"the entropies {description}", ratio(seconds, "entropy held", "entropy"), Goal(">=", 1)
    )
    report.promise(
        f"the divergences {description}",
        ratio(seconds, "divergence held", "divergence"),
        Goal(">=", 1),
    )
    report.tell(
        "the entropies over the bare logits, in the same chunks",
        ratio(seconds, "entropy", "unembedding"),
    )


def all_pairs(report: Report, subject: Subject, states: Tensor, pairs: int) -> None:
    """Every token of one side against every token of the other."""
    p, q = states[:pairs], states[pairs : 2 * pairs]
    ways = {
        "ours": always(lambda: kl_divergence(subject.vlm, p, q, pairs="all")),
        "mean": always(
            lambda: modality_divergence(
                subject.vlm, *as_sides(states[: 2 * pairs], 4), 0, n_tokens=None
            )
        ),
        "loop": always(lambda: divergence_looped(subject, p, q)),
    }
    seconds = timed(ways, report.options.rounds(ROUNDS), subject.device, label="pairs")
    description = (
        f"all pairs of {pairs} and {pairs} tokens, one token after the other (today's way), over"
    )
    report.promise(f"{description} ours", ratio(seconds, "loop", "ours"), Goal(">=", 4))
    report.promise(
        f"{description} the mean by layer with its null and intervals",
        ratio(seconds, "loop", "mean"),
        Goal(">=", 4),
    )


def contextual_neighbours(report: Report, subject: Subject, states: Tensor, index: int) -> None:
    """The nearest of so many states of text, of every state, beside the bare matrix product."""
    vlm, device = subject.vlm, subject.device
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(index, vlm.width, generator=random)
    text = TextStates(
        {1: drawn},
        tuple(f"word{number}" for number in range(index)),
        np.zeros(index, dtype=int),
        ("a sentence",),
        vlm.name,
        decoder_fingerprint(vlm),
    )
    reader = ContextualNeighbours(vlm).fit(text)
    units = drawn.to(device)
    states = states.to(device).float()
    ways = {
        "ours": always(lambda: reader.neighbours(states, 1, 5)),
        "product": always(lambda: products_alone(states, units)),
    }
    description = f"the five nearest of {index:,} states of text, for {len(states):,} states"
    peak = peak_bytes(lambda: reader.neighbours(states, 1, 5), device)
    report.promise(f"peak extra memory, in GB: {description}", count(peak / GB), Goal("<=", 0.5))
    seconds = timed(ways, report.options.rounds(ROUNDS), device, label="neighbours")
    report.promise(
        f"{description}, over the bare matrix product in the same blocks",
        ratio(seconds, "ours", "product"),
        Goal("<=", 1.5),
    )
    report.tell(f"seconds: {description}", median(seconds["ours"]))


def products_alone(states: Tensor, units: Tensor) -> None:
    """The products of states with an index alone, in blocks that are thrown away."""
    for block in states.split(max(1, readouts.BLOCK // (4 * len(units)))):
        block @ units.T


def as_sides(states: Tensor, samples: int) -> tuple[Activations, Activations]:
    """The two halves of the states as perceptual and textual tokens of so many samples."""
    half = len(states) // 2
    number = torch.arange(half).remainder(samples).tolist()
    table = pd.DataFrame({"sample": number, "id": [f"s{k}" for k in number]})
    return tuple(
        Activations({(0, "resid_post"): part}, table, {})
        for part in (states[:half], states[half : 2 * half])
    )


def entropy_held(subject: Subject, states: Tensor) -> Tensor:
    """Entropies from the probabilities of all tokens at once, as published code has them."""
    p = subject.vlm.unembed(states).softmax(dim=-1)
    return -(p * p.log()).nan_to_num(0, 0, 0).sum(dim=-1)


def divergence_held(subject: Subject, states: Tensor, others: Tensor) -> Tensor:
    """Divergences from the probabilities of all tokens at once."""
    p, q = (subject.vlm.unembed(side).softmax(dim=-1) for side in (states, others))
    return (p * (p / q).log()).nan_to_num(0, 0, 0).sum(dim=-1)


def divergence_looped(subject: Subject, states: Tensor, others: Tensor) -> Tensor:
    """Divergences of each token from all tokens of the other side."""
    p, q = (subject.vlm.unembed(side).softmax(dim=-1) for side in (states, others))
    return torch.stack([(row * (row / q).log()).nan_to_num(0, 0, 0).sum(dim=-1) for row in p])


def logits_alone(subject: Subject, states: Tensor) -> None:
    """The logits alone, in chunks that are thrown away."""
    for chunk in states.split(340):
        subject.vlm.unembed(chunk)


if __name__ == "__main__":
    start({"vocabulary": measure})
