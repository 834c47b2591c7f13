"""The arithmetic of distributions over a vocabulary: what ``vocabulary`` rests on.

A bounded part of the (n, V) numbers at a time.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import vecdot

from xlvlms_tutorial.errors import ActivationsError, ComparisonError
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

# bytes of logits made by one product with the unembedding, which is fast only for hundreds of rows
CHUNK = 64 * 2**20
# bytes of them worked on at a time, so that exponentials stay in the processor's cache
SLICE = 8 * 2**20
# bytes of probabilities kept while the other side of all pairs passes by, to
# make that side's logits less often
HELD = 4 * CHUNK


def check(vlm: VLM, states: Float[Tensor, "n d"]) -> None:
    """Refuse states that have no distribution over this model's vocabulary.

    Raises
    ------
    ActivationsError
        If there are none, or one is NaN or infinite.
    ComparisonError
        If they are not as wide as the model.
    """
    if states.shape[-1] != vlm.width:
        raise ComparisonError(
            "widths",
            f"states of {states.shape[-1]}",
            f"{vlm.width} of {vlm.name}",
            "read states with their own model",
        )
    if not len(states):
        raise ActivationsError("there are no states", "give at least one")
    if not torch.isfinite(states).all():
        raise ActivationsError(
            "the states hold NaN or infinite values",
            "keep them in float32 or bfloat16, and check the inputs",
        )


def size(vlm: VLM) -> int:
    """Number V of words in the vocabulary."""
    return anatomy.vocabulary_size(vlm.model)


def rows(vlm: VLM, budget: int) -> int:
    """How many rows of V numbers in float32 fit into so many bytes, at least 1."""
    return max(1, budget // (4 * size(vlm)))


def chunks(vlm: VLM, states: Float[Tensor, "n d"], norm: bool) -> Iterator[Float[Tensor, "c v"]]:
    """The logits of the states, some rows at a time, each chunk the caller's own to change."""
    for chunk in states.split(rows(vlm, CHUNK)):
        yield vlm.unembed(chunk, norm)


def slices(*of: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows of the first tensor (c, V), and the same rows of the others."""
    few = max(1, SLICE // (4 * of[0].shape[-1]))
    return zip(*(tensor.split(few) for tensor in of), strict=True)


def by_slices(measure: Callable[..., Tensor], *logits: Float[Tensor, "c v"]) -> Float[Tensor, "c"]:
    """A number for each row, on the CPU; the logits are used up."""
    return torch.cat([measure(*parts) for parts in slices(*logits)]).cpu()


def by_rows(
    vlm: VLM, measure: Callable[..., Tensor], norm: bool, *sides: Float[Tensor, "n d"]
) -> Float[Tensor, "n"]:
    """What ``measure`` says of each row's logits, of one side or of more of the same length."""
    parts = zip(*(side.split(rows(vlm, CHUNK)) for side in sides), strict=True)
    # logits have no name here, so that those of one chunk are gone before the next are made
    return torch.cat(
        [by_slices(measure, *(vlm.unembed(chunk, norm) for chunk in some)) for some in parts]
    )


def exponentials(z: Float[Tensor, "c v"]) -> tuple[Float[Tensor, "c v"], Float[Tensor, "c"]]:
    """Exponentials of logits and the sum of each row.

    Each row is shifted, in place, to a maximum of 0 before: nothing overflows.

    Raises
    ------
    ActivationsError
        If a logit is NaN or infinite.
    """
    low, high = z.aminmax(dim=-1)
    if not (torch.isfinite(low) & torch.isfinite(high)).all():
        raise ActivationsError(
            "the logits hold NaN or infinite values", "load the model in float32 or bfloat16"
        )
    e = z.sub_(high[:, None]).exp()
    return e, e.sum(dim=-1)


def entropies(z: Float[Tensor, "c v"]) -> Float[Tensor, "c"]:
    """Entropy of each row of logits, in nats."""
    e, total = exponentials(z)
    return total.log() - vecdot(e, z) / total  # neither term can be below 0


def divergences(z: Float[Tensor, "c v"], y: Float[Tensor, "c v"]) -> Float[Tensor, "c"]:
    """Divergence of each row of logits from the same row of the others, in nats."""
    (e, total), (_, other) = exponentials(z), exponentials(y)
    # differences of logits come first, so that equal distributions give 0
    # and close ones keep their digits
    return (vecdot(e, z.sub_(y)) / total + other.log() - total.log()).clamp_(min=0)


def cosines(z: Float[Tensor, "c v"], y: Float[Tensor, "c v"]) -> Float[Tensor, "c"]:
    """Cosine of the two vectors of probabilities that two rows of logits stand for.

    Each row with the same row of the others.
    """
    (e, _), (f, _) = exponentials(z), exponentials(y)
    return (vecdot(e, f) / (e.norm(dim=-1) * f.norm(dim=-1))).clamp_(max=1)


def moves(
    vlm: VLM,
    states: dict[int, Float[Tensor, "n d"]],
    step: int,
    norm: bool,
    measure: Callable[..., Tensor],
) -> dict[int, Float[Tensor, "n"]]:
    """By layer l, in order, what ``measure`` says of each row's logits at l and at l + step.

    The logits of each layer are made once.
    """
    # so that of all others only the layer before is kept
    order = sorted(states, key=lambda layer: (layer % step, layer))
    found: dict[int, list[Tensor]] = {
        layer: [] for layer in sorted(states) if layer + step in states
    }
    for chunk in torch.arange(len(states[order[0]])).split(rows(vlm, CHUNK)):
        last, before = None, None
        for layer in order:
            logits = vlm.unembed(states[layer][chunk], norm)
            if last == layer - step:
                found[last].append(by_slices(measure, before, logits))
            last, before = layer, logits
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def all_divergences(
    vlm: VLM, p: Float[Tensor, "n d"], q: Float[Tensor, "m d"], norm: bool
) -> Float[Tensor, "n m"]:
    r"""Divergence of each row's distribution from each other row's.

    :math:`-H(p_i) - \sum_v p_{iv} \log q_{jv}`, by products of blocks.
    """
    found = torch.empty(len(p), len(q))
    for i, some in zip(
        torch.arange(len(p)).split(rows(vlm, HELD)), p.split(rows(vlm, HELD)), strict=True
    ):
        held, entropy = _probabilities(vlm, some, norm)
        for j, logits in zip(
            torch.arange(len(q)).split(rows(vlm, CHUNK)), chunks(vlm, q, norm), strict=True
        ):
            for (z,) in slices(logits):
                z.sub_(exponentials(z)[1].log()[:, None])
            found[i[0] : i[-1] + 1, j[0] : j[-1] + 1] = (
                (-entropy[:, None] - held @ logits.T).clamp_(min=0).cpu()
            )
    return found


def _probabilities(
    vlm: VLM, states: Tensor, norm: bool
) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n"]]:
    held, entropy, start = None, [], 0
    for logits in chunks(vlm, states, norm):
        held = logits.new_empty(len(states), logits.shape[-1]) if held is None else held
        for z, p in slices(logits, held[start : start + len(logits)]):
            e, total = exponentials(z)
            entropy.append(total.log() - vecdot(e, z) / total)
            torch.div(e, total[:, None], out=p)
        start += len(logits)
    return held, torch.cat(entropy)


def means(
    vlm: VLM, states: Float[Tensor, "n d"], of: Int[Tensor, "n"], norm: bool, logs: bool = False
) -> tuple[Float[Tensor, "g v"], Float[Tensor, "g v"] | None, Float[Tensor, "g"]]:
    """Means by group, the groups numbered from 0 in ``of``.

    The mean of p, with ``logs`` also that of log p, and the mean entropy; all in one pass.
    """
    sizes, total, log_total, entropy = torch.bincount(of), None, None, []
    for logits, chunk in zip(chunks(vlm, states, norm), of.split(rows(vlm, CHUNK)), strict=True):
        if total is None:
            sizes, total = sizes.to(logits.device), logits.new_zeros(len(sizes), logits.shape[-1])
            log_total = torch.zeros_like(total) if logs else None
        for z, at in slices(logits, chunk.to(logits.device)):
            e, s = exponentials(z)
            entropy.append(s.log() - vecdot(e, z) / s)
            total.index_add_(0, at, e.div_(s[:, None]))
            if logs:
                log_total.index_add_(0, at, z.sub_(s.log()[:, None]))
    summed = torch.zeros_like(total[:, 0]).index_add_(0, of.to(total.device), torch.cat(entropy))
    return (
        total.div_(sizes[:, None]),
        log_total.div_(sizes[:, None]) if logs else None,
        summed / sizes,
    )


def most_probable(
    vlm: VLM, states: Float[Tensor, "n d"], k: int, norm: bool
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The ids of the k most probable words of each state, best first, and their probabilities."""
    ids, probabilities = [], []
    for logits in chunks(vlm, states, norm):
        for (z,) in slices(logits):
            total, top = exponentials(z)[1], z.topk(k)
            ids.append(top.indices.cpu())
            probabilities.append((top.values.exp() / total[:, None]).cpu())
    return torch.cat(ids), torch.cat(probabilities)
