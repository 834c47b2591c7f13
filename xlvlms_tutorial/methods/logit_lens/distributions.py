"""The arithmetic of distributions over a vocabulary, on which the measures rest.

A bounded part of the (n, V) numbers exists at a time.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import vecdot

from xlvlms_tutorial.errors import InputError, incomparable
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

# bytes of logits in one product with the unembedding, which is fast only for hundreds of rows
CHUNK = 64 * 2**20
# bytes of logits that are worked on together, so that exponentials stay in the processor's cache
SLICE = 8 * 2**20
# bytes of probabilities of one side of all pairs that are kept in memory, so that the logits of
# the second side are computed less often
HELD = 4 * CHUNK


def check(vlm: VLM, states: Float[Tensor, "n d"]) -> None:
    """Refuse states that have no distribution over this model's vocabulary.

    Raises
    ------
    InputError
        If there are no states, or one is NaN or infinite. If they are not as wide as the model.
    """
    if states.shape[-1] != vlm.width:
        raise incomparable(
            "widths",
            f"states of {states.shape[-1]}",
            f"{vlm.width} of {vlm.name}",
            "read states with their own model",
        )
    if not len(states):
        raise InputError("there are no states", "give at least one")
    if not torch.isfinite(states).all():
        raise InputError(
            "the states hold NaN or infinite values",
            "keep them in float32 or bfloat16, and check the inputs",
        )


def check_logits(*numbers: Tensor) -> None:
    """Refuse logits, or numbers made of them, that are NaN or infinite."""
    if not all(torch.isfinite(part).all() for part in numbers):
        raise InputError(
            "the logits hold NaN or infinite values", "load the model in float32 or bfloat16"
        )


def require_tokenizer(vlm: VLM) -> None:
    """Refuse a model whose tokens cannot be read as words."""
    if vlm.tokenizer is None:
        raise InputError(
            "this model came without a tokenizer, so its words have no names",
            "load it with its processor",
        )


def size(vlm: VLM) -> int:
    """Number V of words in the vocabulary."""
    return anatomy.vocabulary_size(vlm.model)


def rows(vlm: VLM, budget: int) -> int:
    """Number of rows of V numbers in float32 that fit into ``budget`` bytes, at least 1."""
    return max(1, budget // (4 * size(vlm)))


def chunks(vlm: VLM, states: Float[Tensor, "n d"], norm: bool) -> Iterator[Float[Tensor, "c v"]]:
    """Compute the logits of states, some rows at a time; the caller may change each chunk.

    Parameters
    ----------
    vlm
        The model whose unembedding is used.
    states
        Rows of the residual stream.
    norm
        Whether they go through the final norm first.
    """
    for chunk in states.split(rows(vlm, CHUNK)):
        yield vlm.unembed(chunk, norm)


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows of the first tensor (c, V), and the same rows of all further ones."""
    n_rows = max(1, SLICE // (4 * tensors[0].shape[-1]))
    pieces = [tensor.split(n_rows) for tensor in tensors]
    return zip(*pieces, strict=True)


def by_slices(measure: Callable[..., Tensor], *logits: Float[Tensor, "c v"]) -> Float[Tensor, "c"]:
    """One number for each row, on the CPU; the logits are overwritten."""
    return torch.cat([measure(*parts) for parts in slices(*logits)]).cpu()


def by_rows(
    vlm: VLM, measure: Callable[..., Tensor], norm: bool, *sides: Float[Tensor, "n d"]
) -> Float[Tensor, "n"]:
    """Measure the logits of each row, of one side or of several of the same length.

    Parameters
    ----------
    vlm
        The model whose unembedding is used.
    measure
        A function of logits (c, V), one argument for each side, that returns (c,).
    norm
        Whether states go through the final norm first.
    *sides
        Rows of the residual stream.
    """
    n_rows = rows(vlm, CHUNK)
    pieces = [side.split(n_rows) for side in sides]
    values = []
    for parts in zip(*pieces, strict=True):
        # the logits get no name, so that they are freed before the next ones are computed
        values.append(by_slices(measure, *(vlm.unembed(part, norm) for part in parts)))
    return torch.cat(values)


def exponentials(z: Float[Tensor, "c v"]) -> tuple[Float[Tensor, "c v"], Float[Tensor, "c"]]:
    """Exponentials of logits and the sum of each row.

    Each row is shifted, in place, to a maximum of 0 before: nothing overflows.

    Raises
    ------
    InputError
        If a logit is NaN or infinite.
    """
    low, high = z.aminmax(dim=-1)
    check_logits(low, high)
    e = z.sub_(high[:, None]).exp()
    return e, e.sum(dim=-1)


def entropies(z: Float[Tensor, "c v"]) -> Float[Tensor, "c"]:
    """Entropy of each row of logits, in nats."""
    e, total = exponentials(z)
    return total.log() - vecdot(e, z) / total  # neither term can be below 0


def divergences(z: Float[Tensor, "c v"], y: Float[Tensor, "c v"]) -> Float[Tensor, "c"]:
    """Divergence of each row of logits z from the same row of y, in nats."""
    e, total = exponentials(z)
    _, y_total = exponentials(y)
    # differences of logits come first, so that equal distributions give 0
    # and close ones keep their digits
    expected = vecdot(e, z.sub_(y)) / total
    return (expected + y_total.log() - total.log()).clamp_(min=0)


def cosines(z: Float[Tensor, "c v"], y: Float[Tensor, "c v"]) -> Float[Tensor, "c"]:
    """Cosine of the probabilities of each row of logits z with those of the same row of y."""
    e, _ = exponentials(z)
    f, _ = exponentials(y)
    norms = e.norm(dim=-1) * f.norm(dim=-1)
    return (vecdot(e, f) / norms).clamp_(max=1)


def layer_divergence(
    vlm: VLM,
    states: dict[int, Float[Tensor, "n d"]],
    step: int,
    norm: bool,
    measure: Callable[..., Tensor],
) -> dict[int, Float[Tensor, "n"]]:
    """Measure each row's logits at layer l together with those at layer l + step, by l in order.

    The logits of each layer are computed once.

    Parameters
    ----------
    vlm
        The model whose unembedding is used.
    states
        The same rows at several layers.
    step
        Distance of the two layers.
    norm
        Whether states go through the final norm first.
    measure
        A function of the logits (c, V) of both layers that returns (c,).
    """
    # in this order only the logits of one previous layer are needed
    order = sorted(states, key=lambda layer: (layer % step, layer))
    values: dict[int, list[Tensor]] = {}
    for layer in sorted(states):
        if layer + step in states:
            values[layer] = []
    numbers = torch.arange(len(states[order[0]]))
    for chunk in numbers.split(rows(vlm, CHUNK)):
        previous = None
        previous_logits = None
        for layer in order:
            logits = vlm.unembed(states[layer][chunk], norm)
            if previous == layer - step:
                values[previous].append(by_slices(measure, previous_logits, logits))
            previous = layer
            previous_logits = logits
    return {layer: torch.cat(parts) for layer, parts in values.items()}


def all_divergences(
    vlm: VLM, p: Float[Tensor, "n d"], q: Float[Tensor, "m d"], norm: bool
) -> Float[Tensor, "n m"]:
    r"""Compute the divergence of the distribution of each row of p from that of each row of q.

    :math:`-H(p_i) - \sum_v p_{iv} \log q_{jv}`, by products of blocks.

    Parameters
    ----------
    vlm
        The model whose unembedding is used.
    p, q
        Rows of the residual stream.
    norm
        Whether they go through the final norm first.
    """
    result = torch.empty(len(p), len(q))
    p_start = 0
    for block in p.split(rows(vlm, HELD)):
        probabilities, entropy = _probabilities(vlm, block, norm)
        p_end = p_start + len(block)
        q_start = 0
        for logits in chunks(vlm, q, norm):
            for (z,) in slices(logits):
                _, total = exponentials(z)
                z.sub_(total.log()[:, None])
            q_end = q_start + len(logits)
            divergence = (-entropy[:, None] - probabilities @ logits.T).clamp_(min=0)
            result[p_start:p_end, q_start:q_end] = divergence.cpu()
            q_start = q_end
        p_start = p_end
    return result


def _probabilities(
    vlm: VLM, states: Tensor, norm: bool
) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n"]]:
    """Probabilities and entropy of each row."""
    probabilities = None
    entropy = []
    start = 0
    for logits in chunks(vlm, states, norm):
        if probabilities is None:
            probabilities = logits.new_empty(len(states), logits.shape[-1])
        for z, p in slices(logits, probabilities[start : start + len(logits)]):
            e, total = exponentials(z)
            entropy.append(total.log() - vecdot(e, z) / total)
            torch.div(e, total[:, None], out=p)
        start += len(logits)
    return probabilities, torch.cat(entropy)


def mean_distributions(
    vlm: VLM, states: Float[Tensor, "n d"], groups: Int[Tensor, "n"], norm: bool, logs: bool = False
) -> tuple[Float[Tensor, "g v"], Float[Tensor, "g v"] | None, Float[Tensor, "g"]]:
    """Compute means over groups of states, in one pass.

    Parameters
    ----------
    vlm
        The model whose unembedding is used.
    states
        Rows of the residual stream.
    groups
        The group of each row, numbered from 0.
    norm
        Whether states go through the final norm first.
    logs
        Whether the mean of log p is computed too.

    Returns
    -------
    tuple
        The mean of p, that of log p (None without ``logs``), and the mean entropy of each group.
    """
    sizes = torch.bincount(groups)
    total = None
    log_total = None
    entropy = []
    group_chunks = groups.split(rows(vlm, CHUNK))
    for logits, chunk in zip(chunks(vlm, states, norm), group_chunks, strict=True):
        if total is None:
            sizes = sizes.to(logits.device)
            total = logits.new_zeros(len(sizes), logits.shape[-1])
            log_total = torch.zeros_like(total) if logs else None
        for z, group in slices(logits, chunk.to(logits.device)):
            e, s = exponentials(z)
            log_sum = s.log()
            entropy.append(log_sum - vecdot(e, z) / s)
            total.index_add_(0, group, e.div_(s[:, None]))
            if logs:
                log_total.index_add_(0, group, z.sub_(log_sum[:, None]))
    summed = torch.zeros_like(total[:, 0])
    summed.index_add_(0, groups.to(total.device), torch.cat(entropy))
    total.div_(sizes[:, None])
    if logs:
        log_total.div_(sizes[:, None])
    return total, log_total, summed / sizes


def most_probable(
    vlm: VLM, states: Float[Tensor, "n d"], k: int, norm: bool
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Find the k most probable tokens of each state, best first: ids and probabilities.

    Parameters
    ----------
    vlm
        The model whose unembedding is used.
    states
        Rows of the residual stream.
    k
        Number of tokens for each state.
    norm
        Whether states go through the final norm first.
    """
    ids, probabilities = [], []
    for logits in chunks(vlm, states, norm):
        for (z,) in slices(logits):
            _, total = exponentials(z)  # shifts z to a maximum of 0, in place
            values, indices = z.topk(k)
            top = values.exp() / total[:, None]
            ids.append(indices.cpu())
            probabilities.append(top.cpu())
    return torch.cat(ids), torch.cat(probabilities)
