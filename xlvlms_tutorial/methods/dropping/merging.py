"""Merge similar tokens into their mean, by bipartite matching."""

from jaxtyping import Float, Int
from torch import Tensor, arange, nn, ones

from xlvlms_tutorial.validation import require


def merge_tokens(
    states: Float[Tensor, "n d"], keep: int
) -> tuple[Int[Tensor, "keep"], Float[Tensor, "keep d"]]:
    r"""Merge the most similar tokens until a number of them is left.

    Use it to see what ``drop_tokens(..., by="merge")`` does to one picture. In each round every
    other token looks for the token most similar to it among the rest, by the cosine, and the most
    similar pairs are merged into their mean (Bolya et al., 2023, Token Merging, arXiv 2210.09461):

    .. math::

        h_j \leftarrow \frac{n_i h_i + n_j h_j}{n_i + n_j}

    with :math:`n` the number of tokens that each already stands for. A round halves the number of
    tokens at most, so several may follow one another. Unlike the paper, the size of a token is not
    added to its attention later on.

    Parameters
    ----------
    states : tensor (n, d)
        The states of n tokens, in their order.
    keep : int
        How many are left, 1 to n.

    Returns
    -------
    positions : tensor (keep,)
        The places of the tokens that are left, rising.
    means : tensor (keep, d)
        Their states: each the mean of all tokens that it stands for.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.dropping import merge_tokens
    >>> states = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> positions, means = merge_tokens(states, keep=2)
    >>> positions.tolist(), means.tolist()
    ([1, 3], [[2.0, 0.0], [0.0, 1.0]])
    """
    n = len(states)
    require(1 <= keep <= n, f"{keep} of {n} tokens to keep", f"give 1 to {n}")
    positions = arange(n, device=states.device)
    means = states
    sizes = ones(n, 1, dtype=states.dtype, device=states.device)
    while len(positions) > keep:
        n_merged = min(len(positions) - keep, len(positions) // 2)
        directions = nn.functional.normalize(means, dim=-1)
        similarity = directions[::2] @ directions[1::2].T
        best, partner = similarity.max(dim=1)
        merged = best.topk(n_merged).indices
        sources, targets = 2 * merged, 2 * partner[merged] + 1
        # sums first: several tokens may go into one
        sums = (means * sizes).index_add(0, targets, (means * sizes)[sources])
        sizes = sizes.index_add(0, targets, sizes[sources])
        remaining = ones(len(positions), dtype=bool, device=states.device)
        remaining[sources] = False
        positions, sizes = positions[remaining], sizes[remaining]
        means = sums[remaining] / sizes
    return positions, means
