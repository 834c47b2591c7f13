"""Similarity of examples that have many tokens each.

All pairs or matched ones, by blocked matrix products in bounded memory. After Shukor
and Cord, "Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to
Multimodal Inputs" (arXiv 2405.16700).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, States
from xlvlms_tutorial.errors import ActivationsError, ComparisonError, LengthError, SelectionError

# (n, t, d), or n tensors (t_i, d)
Examples = Float[Tensor, "_ _ _"] | Sequence[Float[Tensor, "_ _"]]

POOLED = ("avg", "mean")
BY_PAIR = ("max", "min", "median", "max_mean")
BY_TOKEN = ("token_mean", "token_median", "token_max")
PAIRS = ("all", "matched")
STATISTICS = ("median", "mean", "max", "min")

# of each side: a block of cosines has 16 MB in float32, unless one example alone has more tokens
_TOKENS_AT_ONCE = 2048


def similarity(
    x: Examples, y: Examples, mode: str = "avg", pairs: str = "all"
) -> Float[Tensor, "n m"] | Float[Tensor, " n"]:
    r"""Similarity of every example of x with every one of y, (n_x, n_y).

    Or (n,) of example i with example i for ``pairs`` "matched". With :math:`S_{ij}` the cosine of
    token i of one with token j of the other, ``mode`` is "avg" (the cosine of the mean tokens),
    "max", "min", "mean" or "median" of all :math:`S_{ij}`, or "max_mean",
    :math:`\mathrm{mean}_i \max_j S_{ij}`. For matched pairs of equally many tokens also
    "token_mean", "token_median" and "token_max", over :math:`S_{ii}`. Examples are one tensor (n,
    t, d), or n tensors (t_i, d) of any lengths; 16-bit formats are computed in float32. The modes
    are those of arXiv 2405.16700.

    Raises
    ------
    SelectionError
        If a mode or kind of pairs is unknown, or the mode needs matched pairs.
    ActivationsError
        If there are no examples or no tokens, or tokens are NaN, infinite or zero.
    ComparisonError
        If widths differ, or token counts where tokens are matched.
    LengthError
        If matched examples are not equally many.
    """
    require_mode(mode, pairs)
    return compared(directions(x, mode), directions(y, mode), mode, pairs)


def examples(states: States, layer: int, place: str = WHOLE_BLOCK) -> list[Float[Tensor, "_ _"]]:
    """The states of a layer and place as one tensor (t_i, d) for each sample.

    In the order of the samples' numbers.

    Raises
    ------
    LayerError, SelectionError
        If the layer or the place was not captured.
    ActivationsError
        If there are no rows, or a row is not one vector.
    """
    rows, samples = states[layer, place], states.table["sample"].to_numpy()
    if not len(rows) or rows.dim() != 2:
        raise ActivationsError(
            f"states of shape {tuple(rows.shape)} at layer {layer}",
            "allowed: (n, d) with one row or more",
        )
    if (np.diff(samples) < 0).any():
        rows = rows[torch.from_numpy(np.argsort(samples, kind="stable"))]
    return list(rows.split(np.unique(samples, return_counts=True)[1].tolist()))


class Tokens(NamedTuple):
    """The tokens of all examples, one below the other, and how many each example has."""

    rows: Float[Tensor, "tokens d"]
    counts: Int[Tensor, " n"]

    @staticmethod
    def of(given: Examples) -> "Tokens":
        """The tokens on the CPU, in float32 or float64.

        Raises
        ------
        ActivationsError
            If there are no examples, one has no tokens, or values are NaN, infinite
            or no floating-point numbers.
        ComparisonError
            If examples differ in width.
        """
        parts = list(given)
        if not parts or not all(
            part.dim() == 2 and part.numel() and part.is_floating_point() for part in parts
        ):
            shapes = sorted({f"{tuple(part.shape)} {part.dtype}" for part in parts})
            raise ActivationsError(
                f"examples are {', '.join(shapes) or 'none'}",
                "allowed: one or more of shape (t, d), none of them empty",
            )
        widths = {part.shape[1] for part in parts}
        if len(widths) > 1:
            raise ComparisonError(
                "widths of examples",
                min(widths),
                max(widths),
                "give examples of one model and place",
            )
        whole = isinstance(given, Tensor)
        rows = (given.flatten(0, 1) if whole else torch.cat(parts)).detach().cpu()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if bad := int((~torch.isfinite(rows)).any(dim=1).sum()):
            raise ActivationsError(
                f"{bad} of {len(rows)} tokens hold NaN or infinite values",
                "allowed: finite numbers",
            )
        return Tokens(rows, torch.tensor([len(part) for part in parts]))

    def alike(self, at_once: int = _TOKENS_AT_ONCE) -> Iterator[Int[Tensor, " g"]]:
        """Numbers of examples that have equally many tokens.

        Together no more than ``at_once`` where one alone does not exceed it.
        """
        for count in self.counts.unique().tolist():
            yield from (self.counts == count).nonzero().flatten().split(max(1, at_once // count))

    def at(self, numbers: Int[Tensor, " g"]) -> Float[Tensor, "g t d"]:
        """The tokens of these examples, which have equally many."""
        first = (self.counts.cumsum(0) - self.counts)[numbers]
        return self.rows[first[:, None] + torch.arange(int(self.counts[numbers[0]]))]

    def reduced(self, statistic: str) -> Float[Tensor, "n d"]:
        """A statistic of each example's tokens, column by column.

        Raises
        ------
        SelectionError
            If the statistic is unknown.
        """
        if statistic not in STATISTICS:
            raise SelectionError(
                f"unknown statistic {statistic!r}", f"allowed: {', '.join(STATISTICS)}"
            )
        take = {
            "mean": lambda x: x.mean(1),
            "max": lambda x: x.amax(1),
            "min": lambda x: x.amin(1),
            "median": lambda x: _median(x.mT),
        }
        found = self.rows.new_empty(len(self.counts), self.rows.shape[1])
        for numbers in self.alike():
            found[numbers] = take[statistic](self.at(numbers))
        return found

    def unit(self) -> "Tokens":
        """The same tokens at norm 1.

        Raises
        ------
        ActivationsError
            If a token is zero, or its norm too small or too large for its number format.
        """
        norms = torch.linalg.vector_norm(self.rows, dim=1, keepdim=True)
        bad = int((~torch.isfinite(norms) | (norms <= torch.finfo(norms.dtype).tiny ** 0.5)).sum())
        if bad:
            raise ActivationsError(
                f"{bad} of {len(norms)} tokens or means of tokens have no direction",
                "allowed: norms above 0",
            )
        return Tokens(self.rows / norms, self.counts)


def directions(given: Examples, mode: str) -> Tokens:
    """What a mode compares.

    Unit tokens, or one vector for each example where the mode needs no single tokens.

    Raises
    ------
    ActivationsError, ComparisonError
        As :func:`similarity`.
    """
    tokens = Tokens.of(given)
    unit = tokens.unit()  # for "avg" too: a zero token is a mistake in every mode
    if mode not in POOLED:
        return unit
    ones = torch.ones_like(tokens.counts)
    return (
        Tokens(tokens.reduced("mean"), ones).unit()
        if mode == "avg"
        else Tokens(unit.reduced("mean"), ones)
    )


def compared(
    x: Tokens, y: Tokens, mode: str, pairs: str
) -> Float[Tensor, "n m"] | Float[Tensor, " n"]:
    """The similarity of what :func:`directions` has made.

    One side need not be made anew for every layer.

    Raises
    ------
    SelectionError, ComparisonError, LengthError
        As :func:`similarity`.
    """
    require_mode(mode, pairs)
    if x.rows.shape[1] != y.rows.shape[1]:
        raise ComparisonError(
            "widths", x.rows.shape[1], y.rows.shape[1], "give states of one model and place"
        )
    if pairs == "matched" and len(x.counts) != len(y.counts):
        raise LengthError(x=len(x.counts), y=len(y.counts))
    kind = torch.promote_types(x.rows.dtype, y.rows.dtype)
    x, y = (Tokens(side.rows.to(kind), side.counts) for side in (x, y))
    if mode in POOLED:
        found = x.rows @ y.rows.T if pairs == "all" else (x.rows * y.rows).sum(dim=1)
    elif mode in BY_TOKEN:
        found = _token_by_token(x, y, mode)
    else:
        found = _all(x, y, mode) if pairs == "all" else _matched(x, y, mode)
    return found.clamp_(-1, 1)  # rounding takes the cosine of equal tokens beyond 1


def require_mode(mode: str, pairs: str) -> None:
    """Refuse a mode or a kind of pairs that is unknown, or the two together.

    Raises
    ------
    SelectionError
        With those that are allowed.
    """
    if pairs not in PAIRS:
        raise SelectionError(f"unknown pairs {pairs!r}", f"allowed: {', '.join(PAIRS)}")
    allowed = POOLED + BY_PAIR + (BY_TOKEN if pairs == "matched" else ())
    if mode not in allowed:
        needs = (
            f"mode {mode!r} needs pairs='matched'" if mode in BY_TOKEN else f"unknown mode {mode!r}"
        )
        raise SelectionError(needs, f"allowed for {pairs} pairs: {', '.join(allowed)}")


def _all(x: Tokens, y: Tokens, mode: str) -> Float[Tensor, "n m"]:
    found = x.rows.new_empty(len(y.counts), len(x.counts))
    for right in y.alike():
        of_right = y.at(right)
        for left in x.alike():
            of_left = x.at(left)
            cosines = of_right.flatten(0, 1) @ of_left.flatten(0, 1).T
            found[right[:, None], left] = _reduced(
                cosines.view(*of_right.shape[:2], *of_left.shape[:2]), mode
            )
    return found.T


def _matched(x: Tokens, y: Tokens, mode: str) -> Float[Tensor, " n"]:
    found = x.rows.new_empty(len(x.counts))
    # one number for each pair of token counts
    both = Tokens(x.rows, x.counts * (int(y.counts.max()) + 1) + y.counts)
    for numbers in both.alike(_TOKENS_AT_ONCE**2):
        found[numbers] = _reduced(torch.bmm(y.at(numbers), x.at(numbers).mT), mode)
    return found


def _reduced(cosines: Float[Tensor, "g ty *h tx"], mode: str) -> Float[Tensor, "g *h"]:
    """One number for each pair.

    The tokens of y come first: a maximum over rows runs along contiguous memory.
    """
    if mode == "median":
        return _median(cosines.movedim(1, -2).flatten(-2))
    if mode == "min":
        return cosines.amin(1).amin(-1)
    return cosines.amax(1).amax(-1) if mode == "max" else cosines.amax(1).mean(-1)


def _median(values: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """The median over the last dimension.

    In numpy, whose partition is many times faster than sorting, kthvalue or median in PyTorch.
    """
    ordered, half = values.numpy(), values.shape[-1] // 2
    ordered = np.partition(ordered, half, axis=-1)
    upper = ordered[..., half]
    return torch.from_numpy(
        upper.copy() if values.shape[-1] % 2 else (upper + ordered[..., :half].max(axis=-1)) / 2
    )


def _token_by_token(x: Tokens, y: Tokens, mode: str) -> Float[Tensor, " n"]:
    if not torch.equal(x.counts, y.counts):
        where = int((x.counts != y.counts).nonzero()[0])
        one, other = int(x.counts[where]), int(y.counts[where])
        raise ComparisonError(
            f"token counts of example {where}",
            one,
            other,
            "token by token, give equally many of each",
        )
    cosines = (x.rows * y.rows).sum(dim=1, keepdim=True)
    return Tokens(cosines, x.counts).reduced(mode.removeprefix("token_")).flatten()
