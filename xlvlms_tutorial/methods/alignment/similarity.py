"""Similarity of examples that have many tokens each.

Of all pairs or of matched ones, by blocked matrix products in bounded memory. After Shukor
and Cord, "Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to
Multimodal Inputs" (2024, arXiv 2405.16700).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Activations
from xlvlms_tutorial.errors import InputError, incomparable
from xlvlms_tutorial.validation import (
    require,
    require_equal,
    require_same_length,
)

# Tokens of n examples: one tensor (n, t, d), or n tensors (t_i, d)
Examples = Float[Tensor, "_ _ _"] | Sequence[Float[Tensor, "_ _"]]

POOLED = ("avg", "mean")
BY_PAIR = ("max", "min", "median", "max_mean")
BY_TOKEN = ("token_mean", "token_median", "token_max")
_PAIRS = ("all", "matched")
STATISTICS = ("median", "mean", "max", "min")

# tokens of each side in a block of cosines: it has 16 MB in float32, unless a single example has
# more tokens
_TOKENS_AT_ONCE = 2048


def similarity(
    x: Examples, y: Examples, mode: str = "avg", pairs: str = "all"
) -> Float[Tensor, "n m"] | Float[Tensor, " n"]:
    r"""Compute the similarity of examples that have many tokens each.

    Use it to compare images with captions, or tokens of two layers. The modes are those of Shukor
    and Cord (2024, arXiv 2405.16700). :math:`S_{ij}` is the cosine of token i of an example of x
    with token j of an example of y.

    Parameters
    ----------
    x : tensor (n, t, d) or sequence of tensors (t_i, d)
        Tokens of each example; examples may have different numbers of tokens. 16-bit formats are
        computed in float32.
    y : tensor (m, t, d) or sequence of tensors (t_i, d)
        Tokens of the examples to compare with, of the same width.
    mode : str, default "avg"
        "avg" is the cosine of the mean tokens; "max", "min", "mean" and "median" are over all
        :math:`S_{ij}`; "max_mean" is :math:`\mathrm{mean}_i \max_j S_{ij}`. "token_mean",
        "token_median" and "token_max" are over :math:`S_{ii}`, for matched pairs with the same
        number of tokens.
    pairs : {"all", "matched"}, default "all"
        "all" compares every example of x with every example of y, "matched" example i with
        example i.

    Returns
    -------
    Tensor (n, m) or (n,)
        Similarities from -1 to 1; (n,) for matched pairs.

    Raises
    ------
    InputError
        If a mode or kind of pairs is unknown, or the mode needs matched pairs. If there are no
        examples or no tokens, or tokens are NaN, infinite or zero. If widths differ, or token
        counts where tokens are matched. If the numbers of matched examples differ.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.alignment import similarity
    >>> x = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])]
    >>> y = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> similarity(x, y, mode="max").tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    >>> similarity(x, y, mode="mean", pairs="matched").tolist()
    [0.5, 0.0]
    """
    require_mode(mode, pairs)
    return compared(directions(x, mode), directions(y, mode), mode, pairs)


def examples(
    states: Activations, layer: int, site: str = WHOLE_BLOCK
) -> list[Float[Tensor, "_ _"]]:
    """Split the states of a layer into one tensor of tokens for each sample.

    Use it to pass captured activations to :func:`similarity` or :func:`cones`.

    Parameters
    ----------
    states : Activations
        Captured activations with one row for each token (``reduce=None``) or sample.
    layer : int
        A captured layer.
    site : str, default "resid_post"
        Where in the layer they were captured; "resid_post" is the residual stream after the block.

    Returns
    -------
    list of Tensor (t_i, d)
        The tokens of each sample, in the order of the samples' numbers.

    Raises
    ------
    LayerError
        If the layer or the site was not captured.
    InputError
        If the layer or the site was not captured. If there are no rows, or a row is not one vector.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations
    >>> from xlvlms_tutorial.methods.alignment import examples
    >>> table = pd.DataFrame({"sample": [0, 0, 1], "id": ["a", "a", "b"]})
    >>> states = Activations({(15, "resid_post"): torch.ones(3, 8)}, table, {})
    >>> [tuple(tokens.shape) for tokens in examples(states, layer=15)]
    [(2, 8), (1, 8)]
    """
    rows = states[layer, site]
    samples = states.table["sample"].to_numpy()
    require(
        len(rows) and rows.dim() == 2,
        f"states of shape {tuple(rows.shape)} at layer {layer}",
        "allowed: (n, d) with one row or more",
    )
    if (np.diff(samples) < 0).any():
        order = np.argsort(samples, kind="stable")
        rows = rows[torch.from_numpy(order)]
    _, counts = np.unique(samples, return_counts=True)
    return list(rows.split(counts.tolist()))


class Tokens(NamedTuple):
    """The tokens of all examples as rows of one tensor, and the number of tokens of each."""

    rows: Float[Tensor, "tokens d"]
    counts: Int[Tensor, " n"]

    @staticmethod
    def of(tensors: Examples) -> "Tokens":
        """Collect the tokens of examples on the CPU, in float32 or float64.

        Raises
        ------
        InputError
            If there are no examples, one has no tokens, or values are NaN, infinite or no
            floating-point numbers. If examples differ in width.
        """
        parts = list(tensors)
        valid = [part.dim() == 2 and part.numel() and part.is_floating_point() for part in parts]
        if not parts or not all(valid):
            shapes = sorted({f"{tuple(part.shape)} {part.dtype}" for part in parts})
            raise InputError(
                f"examples are {', '.join(shapes) or 'none'}",
                "allowed: one or more of shape (t, d), none of them empty",
            )
        widths = {part.shape[1] for part in parts}
        if len(widths) > 1:
            raise incomparable(
                "widths of examples",
                min(widths),
                max(widths),
                "give examples of one model and site",
            )
        rows = tensors.flatten(0, 1) if isinstance(tensors, Tensor) else torch.cat(parts)
        rows = rows.detach().cpu()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        if bad:
            raise InputError(
                f"{bad} of {len(rows)} tokens hold NaN or infinite values",
                "allowed: finite numbers",
            )
        counts = torch.tensor(list(map(len, parts)))
        return Tokens(rows, counts)

    def alike(self, at_once: int = _TOKENS_AT_ONCE) -> Iterator[Int[Tensor, " g"]]:
        """Yield numbers of examples that have the same number of tokens.

        Together they have at most ``at_once`` tokens, unless a single example has more.
        """
        for count in self.counts.unique().tolist():
            yield from (self.counts == count).nonzero().flatten().split(max(1, at_once // count))

    def at(self, numbers: Int[Tensor, " g"]) -> Float[Tensor, "g t d"]:
        """The tokens of some examples, which have the same number of tokens."""
        first = (self.counts.cumsum(0) - self.counts)[numbers]
        within = torch.arange(int(self.counts[numbers[0]]))
        return self.rows[first[:, None] + within]

    def reduced(self, statistic: str) -> Float[Tensor, "n d"]:
        """Compute a statistic of the tokens of each example, column by column.

        Raises
        ------
        InputError
            If the statistic is unknown.
        """
        if statistic not in STATISTICS:
            raise InputError(
                f"unknown statistic {statistic!r}", f"allowed: {', '.join(STATISTICS)}"
            )
        functions = {
            "mean": lambda x: x.mean(1),
            "max": lambda x: x.amax(1),
            "min": lambda x: x.amin(1),
            "median": lambda x: _median(x.mT),
        }
        result = self.rows.new_empty(len(self.counts), self.rows.shape[1])
        for numbers in self.alike():
            result[numbers] = functions[statistic](self.at(numbers))
        return result

    def unit(self) -> "Tokens":
        """Scale all tokens to norm 1.

        Raises
        ------
        InputError
            If a token is zero, or its norm too small or too large for its dtype.
        """
        norms = torch.linalg.vector_norm(self.rows, dim=1, keepdim=True)
        bad = int((~torch.isfinite(norms) | (norms <= torch.finfo(norms.dtype).tiny ** 0.5)).sum())
        if bad:
            raise InputError(
                f"{bad} of {len(norms)} tokens or means of tokens have no direction",
                "allowed: norms above 0",
            )
        return Tokens(self.rows / norms, self.counts)


def directions(tensors: Examples, mode: str) -> Tokens:
    """Prepare examples for a mode: unit tokens, or one vector for each example in pooled modes.

    Raises
    ------
    InputError
        If there are no examples or no tokens, or tokens are NaN, infinite or zero. If widths
        differ.
    """
    tokens = Tokens.of(tensors)
    unit = tokens.unit()  # for "avg" too: a zero token is a mistake in every mode
    if mode not in POOLED:
        return unit
    ones = torch.ones_like(tokens.counts)
    if mode == "avg":
        return Tokens(tokens.reduced("mean"), ones).unit()
    return Tokens(unit.reduced("mean"), ones)


def compared(
    x: Tokens, y: Tokens, mode: str, pairs: str
) -> Float[Tensor, "n m"] | Float[Tensor, " n"]:
    """Compute the similarity of examples that :func:`directions` has prepared.

    So a side that stays the same is prepared once for all layers.

    Parameters
    ----------
    x, y
        Prepared examples.
    mode
        The mode that both were prepared for.
    pairs
        "all" or "matched".

    Raises
    ------
    InputError
        If a mode or kind of pairs is unknown, or the mode needs matched pairs. If widths differ, or
        token counts where tokens are matched. If the numbers of matched examples differ.
    """
    require_mode(mode, pairs)
    require_equal("widths", x.rows.shape[1], y.rows.shape[1], "give states of one model and site")
    if pairs == "matched":
        require_same_length(x=x.counts, y=y.counts)
    dtype = torch.promote_types(x.rows.dtype, y.rows.dtype)
    x = Tokens(x.rows.to(dtype), x.counts)
    y = Tokens(y.rows.to(dtype), y.counts)
    if mode in POOLED:
        cosines = x.rows @ y.rows.T if pairs == "all" else (x.rows * y.rows).sum(dim=1)
    elif mode in BY_TOKEN:
        cosines = _token_by_token(x, y, mode)
    else:
        cosines = _all(x, y, mode) if pairs == "all" else _matched(x, y, mode)
    return cosines.clamp_(-1, 1)  # rounding takes the cosine of equal tokens beyond 1


def require_mode(mode: str, pairs: str) -> None:
    """Refuse an unknown mode or kind of pairs, or a mode that these pairs do not allow.

    Raises
    ------
    InputError
        With those that are allowed.
    """
    require(pairs in _PAIRS, f"unknown pairs {pairs!r}", f"allowed: {', '.join(_PAIRS)}")
    allowed = POOLED + BY_PAIR + (BY_TOKEN if pairs == "matched" else ())
    if mode not in allowed:
        problem = f"unknown mode {mode!r}"
        if mode in BY_TOKEN:
            problem = f"mode {mode!r} needs pairs='matched'"
        raise InputError(problem, f"allowed for {pairs} pairs: {', '.join(allowed)}")


def _all(x: Tokens, y: Tokens, mode: str) -> Float[Tensor, "n m"]:
    """Compute the similarity of every two examples, those with equally many tokens at once."""
    result = x.rows.new_empty(len(y.counts), len(x.counts))
    for y_numbers in y.alike():
        y_tokens = y.at(y_numbers)
        for x_numbers in x.alike():
            x_tokens = x.at(x_numbers)
            cosines = y_tokens.flatten(0, 1) @ x_tokens.flatten(0, 1).T
            cosines = cosines.view(*y_tokens.shape[:2], *x_tokens.shape[:2])
            result[y_numbers[:, None], x_numbers] = _reduced(cosines, mode)
    return result.T


def _matched(x: Tokens, y: Tokens, mode: str) -> Float[Tensor, " n"]:
    """Compute the similarity of each example with the one of the same number."""
    result = x.rows.new_empty(len(x.counts))
    # each pair of token counts gets a number of its own, by which examples are grouped
    both = Tokens(x.rows, x.counts * (int(y.counts.max()) + 1) + y.counts)
    for numbers in both.alike(_TOKENS_AT_ONCE**2):
        cosines = torch.bmm(y.at(numbers), x.at(numbers).mT)
        result[numbers] = _reduced(cosines, mode)
    return result


def _reduced(cosines: Float[Tensor, "g ty *h tx"], mode: str) -> Float[Tensor, "g *h"]:
    """One number for each pair.

    The tokens of y come first: a maximum over rows runs along contiguous memory.
    """
    if mode == "median":
        return _median(cosines.movedim(1, -2).flatten(-2))
    if mode == "min":
        return cosines.amin(1).amin(-1)
    if mode == "max":
        return cosines.amax(1).amax(-1)
    return cosines.amax(1).mean(-1)


def _median(values: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """The median over the last dimension.

    In numpy, whose partition is many times faster than sorting, kthvalue or median in PyTorch.
    """
    half = values.shape[-1] // 2
    ordered = np.partition(values.numpy(), half, axis=-1)
    upper = ordered[..., half]
    if values.shape[-1] % 2:
        return torch.from_numpy(upper.copy())
    return torch.from_numpy((upper + ordered[..., :half].max(axis=-1)) / 2)


def _token_by_token(x: Tokens, y: Tokens, mode: str) -> Float[Tensor, " n"]:
    """Compute the similarity of matched examples from their matched tokens."""
    if not torch.equal(x.counts, y.counts):
        example = int((x.counts != y.counts).nonzero()[0])
        raise incomparable(
            f"token counts of example {example}",
            int(x.counts[example]),
            int(y.counts[example]),
            "token by token, give equally many of each",
        )
    cosines = (x.rows * y.rows).sum(dim=1, keepdim=True)
    statistic = mode.removeprefix("token_")
    return Tokens(cosines, x.counts).reduced(statistic).flatten()
