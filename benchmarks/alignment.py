"""Alignment: similarity of all pairs of examples at every layer.

Over the bare matrix products of the same sizes and over a loop. Today's way is a double loop in
Python over pairs of examples, which casts and normalises the tokens of both anew for each pair.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.command import start
from benchmarks.harness import CPU, Goal, Report, always, median, ratio, timed
from xlvlms_tutorial.methods.alignment.similarity import BY_PAIR, POOLED, similarity

ROUNDS = 5


@dataclass(frozen=True)
class Sizes:
    """How many examples, tokens of either kind, layers and columns there are.

    ``pairs`` is how many pairs of the loop are timed.
    """

    examples: int
    perceptual: int
    textual: int
    width: int
    layers: int
    pairs: int

    def tokens(self) -> tuple[list[Tensor], list[Tensor]]:
        """Random P and T of every layer, each (examples, tokens, width)."""
        random = torch.Generator().manual_seed(0)
        draw = lambda count: torch.randn(self.examples, count, self.width, generator=random)
        return [draw(self.perceptual) for _ in range(self.layers)], [
            draw(self.textual) for _ in range(self.layers)
        ]


def measure(report: Report) -> None:
    """All promises about similarity."""
    pick = report.options.pick
    sizes = Sizes(pick(200, 8), pick(16, 4), pick(20, 5), pick(576, 32), pick(30, 2), pick(200, 4))
    report.setting |= {
        "device": "cpu",
        **vars(sizes),
        "rounds": report.options.rounds(ROUNDS),
        "formats": "float32, the loop's float16",
    }
    about(report, sizes)


def about(report: Report, sizes: Sizes) -> None:
    """Each mode, and the matrix products that it cannot do without, at all layers.

    The loop at a sample of the pairs.
    """
    p, t = sizes.tokens()
    halves = p[0].half().numpy(), t[0].half().numpy()
    ways = {"products": always(lambda: products(p, t))} | {
        mode: always(ours(p, t, mode)) for mode in POOLED + BY_PAIR
    }
    ways |= {
        f"loop {mode}": always(looped(*halves, mode, sizes.pairs)) for mode in POOLED + BY_PAIR
    }
    seconds = timed(ways, report.options.rounds(ROUNDS), CPU, label="similarity")
    for mode in BY_PAIR + POOLED:
        over = ratio(seconds, mode, "products")
        report.promise(
            f"all-pairs similarity, {mode}, over the bare matrix products of all tokens",
            over,
            Goal("<=", 2.0),
        )
    every = sizes.layers * sizes.examples**2
    for mode in POOLED + BY_PAIR:
        seconds[f"loop {mode}"] = [
            every / sizes.pairs * duration for duration in seconds[f"loop {mode}"]
        ]
        description = (
            f"loop over pairs, {mode}, extrapolated from {sizes.pairs} of "
            f"{every:,} pairs, over ours"
        )
        report.promise(description, ratio(seconds, f"loop {mode}", mode), Goal(">=", 100.0))
    message = (
        "loop over pairs, median, over the bare matrix products: the most that any way of "
        "forming all cosines could gain"
    )
    report.tell(message, ratio(seconds, "loop median", "products"))
    for name in ("products", *POOLED, *BY_PAIR, "loop median"):
        report.tell(f"seconds for {every:,} pairs: {name}", median(seconds[name]))


def ours(p: list[Tensor], t: list[Tensor], mode: str) -> Callable[[], list[Tensor]]:
    """Similarity of all pairs at every layer."""
    return lambda: [similarity(x, y, mode) for x, y in zip(p, t, strict=True)]


def products(p: list[Tensor], t: list[Tensor]) -> None:
    """Products of all tokens of P with all of T at every layer.

    Nothing is normalised and nothing kept.
    """
    for x, y in zip(p, t, strict=True):
        x.flatten(0, 1) @ y.flatten(0, 1).T


def looped(
    p: np.ndarray, t: np.ndarray, mode: str, pairs: int, seed: int = 0
) -> Callable[[], list[float]]:
    """Similarity of so many random pairs, one after the other."""
    index_pairs = np.random.default_rng(seed).integers(len(p), size=(pairs, 2)).tolist()
    return lambda: [one_pair(p[i], t[j], mode) for i, j in index_pairs]


def one_pair(x: np.ndarray, y: np.ndarray, mode: str) -> float:
    """Similarity of one example (t, d) with another the way it is done in a loop.

    Cast and normalised for this pair.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    if mode == "avg":
        x, y = x.mean(axis=0, keepdims=True), y.mean(axis=0, keepdims=True)
    cosines = x @ y.T / (np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1))
    if mode == "max_mean":
        return float(cosines.max(axis=1).mean())
    return float(
        {"avg": np.mean, "mean": np.mean, "max": np.max, "min": np.min, "median": np.median}[mode](
            cosines
        )
    )


if __name__ == "__main__":
    start({"alignment": measure})
