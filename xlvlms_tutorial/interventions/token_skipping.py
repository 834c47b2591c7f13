"""Leave out the MLPs of some positions only.

The others are gathered, computed and scattered back, so that the work really goes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from xlvlms_tutorial.activations.clock import Clock
from xlvlms_tutorial.activations.hooks import span_mask
from xlvlms_tutorial.errors import InterventionError, SelectionError, SpanError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.overrides import (
    Layers,
    check_length,
    checked_layers,
    fit,
    overridden,
    refuse_folded,
)
from xlvlms_tutorial.interventions.skipping import bypassing, nothing
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS
from xlvlms_tutorial.models.support import require
from xlvlms_tutorial.models.vlm import VLM

Span = str | tuple[str, ...] | Bool[Tensor, "b t"]


@recorded
@contextmanager
def skip_mlp_tokens(
    vlm: VLM,
    layers: Layers,
    share: float = 1.0,
    span: Span = "image",
    seed: int = 0,
    n_tokens: int | None = None,
) -> Iterator[None]:
    r"""Skip the MLPs of these blocks at a share of each sample's positions of a span.

    Shukor and Cord, 2024, arXiv 2405.16700, figure 11.

    .. math::

        h_i \leftarrow h_i + m_i \, \mathrm{MLP}(\mathrm{LN}_2 h_i),
        \quad m_i = 0 \text{ at the positions drawn, else } 1

    Attention keeps all positions. Of the :math:`n` positions of the span that a sample has,
    :math:`\lfloor share \cdot n + 1/2 \rfloor` are drawn, or ``n_tokens``; at all layers the same.
    The draw depends on ``seed`` and on the sample's row in its batch alone, and what a smaller
    share draws, a larger one draws too. ``span`` is a name such as "image", "question" or "answer",
    several in a tuple, or a mask (b, t) over the prompt. Only the prompt's positions are skipped:
    tokens that are generated have their MLPs.

    Raises
    ------
    LayerError
        If a layer is out of range.
    SelectionError
        If the share is not in [0, 1], ``n_tokens`` is negative or given with a share,
        or a sample has fewer positions.
    SpanError
        If the kind of positions is unknown, or the running model or some sample has none.
    InterventionError
        If it is not known where the span is, or the mask is for another batch.
    AnatomyError
        If a block has no single MLP, as one with experts beside a dense MLP.
    FoldError
        If a vector is folded into an MLP that would be skipped.
    """
    chosen = checked_layers(vlm, layers)
    require(vlm, "skip", "mlp", chosen)
    refuse_folded(vlm, chosen, "skipping")
    draw = _Draw(vlm, span, share, n_tokens, seed)
    with draw.clock.ticking(), bypassing(vlm, chosen), ExitStack() as stack:
        for layer in dict.fromkeys(chosen):
            stack.enter_context(_drawn_at(vlm.blocks[layer - 1], draw))
        yield


def check_share(share: float, n_tokens: int | None = None) -> None:
    """Stop a share or a number of positions that cannot be drawn.

    Raises
    ------
    SelectionError
        If the share is not in [0, 1], or ``n_tokens`` is negative or given together with a share.
    """
    if not 0 <= share <= 1:
        raise SelectionError(f"share {share!r} of the positions", "give 0 to 1")
    if n_tokens is not None and (
        isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 0 or share != 1
    ):
        raise SelectionError(
            f"n_tokens {n_tokens!r} with share {share!r}",
            "give a whole number from 0 on and no share, or a share alone",
        )


def check_spans(span: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of kinds of positions, in a tuple.

    Raises
    ------
    SpanError
        If there is none, or one is unknown.
    """
    names = (span,) if isinstance(span, str) else tuple(span)
    if unknown := [name for name in names if name not in SPANS]:
        raise SpanError(unknown[0], "unknown kind", SPANS)
    if not names:
        raise SpanError("", "no kind named", SPANS)
    return names


class _Draw:
    """Which positions one context skips, drawn once for each batch."""

    def __init__(self, vlm: VLM, span: Span, share: float, n_tokens: int | None, seed: int) -> None:
        check_share(share, n_tokens)
        self.span = span if isinstance(span, Tensor) else check_spans(span)
        self.vlm, self.share, self.n_tokens, self.seed = vlm, share, n_tokens, seed
        self.clock = Clock(vlm)
        # the batch, rows and positions that the draw is for
        self._of: tuple[object, tuple[int, int]] | None = None
        self._skipped = self._rest = torch.empty(0)

    def skipped(self) -> Bool[Tensor, "b t"]:
        """Where the MLP is left out, on the CPU."""
        self._update()
        return self._skipped

    def rest(self) -> Int[Tensor, "n"]:
        """The numbers of the other positions, on the model's device.

        All rows of the batch one after the other.
        """
        self._update()
        return self._rest

    def _update(self) -> None:
        batch, shape = self.vlm.running, self.clock.shape
        # by identity: a batch is never changed, and the next one may have pictures elsewhere
        if self._of is not None and self._of[0] is batch and self._of[1] == shape:
            return
        drawn = fit(self._drawn(self._where().cpu()), shape[0], "span")
        if (missing := shape[1] - drawn.shape[1]) < 0:
            what = f"{shape[1]} positions of a prompt that has {drawn.shape[1]}"
            raise InterventionError(
                what, "run the whole prompt at once: no prefill in chunks, no assisted decoding"
            )
        # without a cache every step sees the whole sequence: what
        # follows the prompt has been generated
        self._skipped = nn.functional.pad(drawn, (0, missing))
        self._rest, self._of = _numbers(~self._skipped).to(self.vlm.device), (batch, shape)

    def _where(self) -> Bool[Tensor, "b t"]:
        if isinstance(self.span, Tensor):
            check_length(self.vlm, self.span, "span")
            return self.span
        if self.vlm.running is None:
            raise InterventionError(
                f"span {' or '.join(self.span)!r} of unknown inputs",
                "run the model by vlm.forward or vlm.generate",
            )
        return span_mask(self.vlm, self.vlm.running, self.span)

    def _drawn(self, where: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        drawn = torch.zeros_like(where)
        for row, found in enumerate(where):
            at = found.nonzero().flatten()
            n = int(self.share * len(at) + 0.5) if self.n_tokens is None else self.n_tokens
            if n > len(at):
                raise SelectionError(
                    f"{n} positions of row {row} of the batch, which has {len(at)} of them",
                    "give fewer n_tokens",
                )
            drawn[row, at[np.random.default_rng([self.seed, row]).permutation(len(at))[:n]]] = True
        return drawn


# of each block, in order of entry
_DRAWS: WeakKeyDictionary[nn.Module, list[_Draw]] = WeakKeyDictionary()


@contextmanager
def _drawn_at(block: nn.Module, draw: _Draw) -> Iterator[None]:
    """Let a draw hold at a block; nested ones skip what any of them draws, by one gather."""
    draws = _DRAWS.setdefault(block, [])
    draws.append(draw)
    try:
        with overridden(_gathering(block, draws) if len(draws) == 1 else {}):
            yield
    finally:
        draws.remove(draw)


def _gathering(block: nn.Module, draws: list[_Draw]) -> dict[nn.Module, Callable]:
    entry, exit_ = anatomy.mlp_entry(block), anatomy.mlp(block)

    def whole(original: Callable, states: Tensor) -> Tensor | tuple:
        if (rest := _rest(draws, states.device)) is None:
            return original(states)
        if not len(rest):
            return nothing(exit_, states)
        output = original(_gathered(states, rest))
        return anatomy.with_states(
            output, _scattered(anatomy.states_of(output), rest, draws[0].clock.shape)
        )

    def first(original: Callable, states: Tensor) -> Tensor:
        rest = _rest(draws, states.device)
        return original(states if rest is None else _gathered(states, rest))

    def last(original: Callable, hidden: Tensor) -> Tensor:
        rest = _rest(draws, hidden.device)
        return (
            original(hidden)
            if rest is None
            else _scattered(original(hidden), rest, draws[0].clock.shape)
        )

    return {exit_: whole} if entry is exit_ else {entry: first, exit_: last}


def _rest(draws: list[_Draw], device: torch.device) -> Int[Tensor, "n"] | None:
    """The positions whose MLP runs, or None where that is all of them."""
    if draws[0].clock.decoding:
        return None
    one = (
        draws[0].rest()
        if len(draws) == 1
        else _numbers(~torch.stack([draw.skipped() for draw in draws]).any(dim=0))
    )
    rows, length = draws[0].clock.shape
    return None if len(one) == rows * length else one.to(device)


def _numbers(mask: Bool[Tensor, "b t"]) -> Int[Tensor, "n"]:
    """Where a mask is True, counted through all rows."""
    return mask.flatten().nonzero().flatten()


def _gathered(
    states: Tensor, rest: Int[Tensor, "n"]
) -> Float[Tensor, "1 n d"] | Float[Tensor, "n d"]:
    rows = states.reshape(-1, states.shape[-1]).index_select(0, rest)
    return rows if states.ndim == 2 else rows[None]  # OPT's MLP gets all positions in one row


def _scattered(
    made: Tensor, rest: Int[Tensor, "n"], shape: tuple[int, int]
) -> Float[Tensor, "b t d"] | Float[Tensor, "positions d"]:
    width = made.shape[-1]
    rows = made.new_zeros(shape[0] * shape[1], width).index_copy_(0, rest, made.reshape(-1, width))
    return rows if made.ndim == 2 else rows.view(*shape, width)
