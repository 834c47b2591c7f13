"""Skip the MLPs of some positions only.

The other positions are gathered, computed and scattered back, so that the work is really saved.
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
from xlvlms_tutorial.errors import InputError, InterventionError, SpanError
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
from xlvlms_tutorial.models.spans import SPANS, kind_of
from xlvlms_tutorial.models.support import require_support
from xlvlms_tutorial.models.vlm import VLM

Span = str | tuple[str, ...] | Bool[Tensor, "b t"]


@recorded
@contextmanager
def skip_tokens(
    vlm: VLM,
    layers: Layers,
    share: float = 1.0,
    span: Span = "image",
    seed: int = 0,
    n_tokens: int | None = None,
) -> Iterator[None]:
    r"""Skip the MLPs of these blocks at a share of each sample's positions of a span.

    Use it to see how many image tokens need their MLPs (Shukor and Cord, 2024, Implicit Multimodal
    Alignment, arXiv 2405.16700, figure 11).

    .. math::

        h_i \leftarrow h_i + m_i \, \mathrm{MLP}(\mathrm{LN}_2 h_i),
        \quad m_i = 0 \text{ at the positions drawn, else } 1

    Attention keeps all positions. The same positions are drawn at all layers; the draw depends only
    on ``seed`` and on the sample's row in its batch, and what a smaller share draws, a larger one
    draws too. Only the prompt's positions are skipped: generated tokens have their MLPs.

    Parameters
    ----------
    vlm : VLM
        The model.
    layers : int or sequence of int
        The layers whose block's MLP is skipped, 1 to L.
    share : float
        The share of the positions to draw, 0 to 1: of the :math:`n` positions that a sample has,
        :math:`\lfloor share \cdot n + 1/2 \rfloor`. 1 (default) draws all.
    span : str, tuple of str, or mask (b, t)
        Where positions are drawn: a span such as "image" (default), "question" or "answer", several
        of them in a tuple, or a boolean mask over the prompt.
    seed : int
        The seed of the draw.
    n_tokens : int, optional
        The number of positions to draw in each sample, in place of a share.

    Returns
    -------
    context manager
        The MLPs are skipped inside ``with``.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InputError
        If the share is not in [0, 1], ``n_tokens`` is negative or given with a share, or a sample
        has fewer positions.
    SpanError
        If the span is unknown, or the model or some sample has no such positions.
    InterventionError
        If it is not known where the span is, or the mask is for another batch. If a vector is
        folded into an MLP that would be skipped.
    AnatomyError
        If a block has no single MLP, as one with experts beside a dense MLP.

    Examples
    --------
    Half of the 16 image positions of each of four samples get nothing from the MLP:

    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import skip_tokens
    >>> with skip_tokens(vlm, 12, share=0.5):
    ...     mlp = read(vlm, batch, 12, sites="mlp_out", positions="image")[12, "mlp_out"]
    >>> len(mlp), int((mlp == 0).all(dim=1).sum())
    (64, 32)
    """
    selected = checked_layers(vlm, layers)
    blocks = [vlm.blocks[layer - 1] for layer in selected]
    require_support(blocks, vlm.refused, "skip", "mlp")
    refuse_folded(vlm, selected, "skipping")
    draw = _Draw(vlm, span, share, n_tokens, seed)
    with draw.clock.ticking(), bypassing(vlm, selected), ExitStack() as stack:
        for layer in dict.fromkeys(selected):
            stack.enter_context(_drawn_at(vlm.blocks[layer - 1], draw))
        yield


def check_share(share: float, n_tokens: int | None = None) -> None:
    """Refuse a share, or a number ``n_tokens`` of positions, that cannot be drawn.

    Raises
    ------
    InputError
        If the share is not in [0, 1], or ``n_tokens`` is negative or given together with a share.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share {share!r} of the positions", "give 0 to 1")
    if n_tokens is not None and (
        isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 0 or share != 1
    ):
        raise InputError(
            f"n_tokens {n_tokens!r} with share {share!r}",
            "give a whole number from 0 on and no share, or a share alone",
        )


def check_spans(span: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of spans as a tuple, once they are checked.

    Raises
    ------
    SpanError
        If there is none, or one is unknown.
    """
    names = (span,) if isinstance(span, str) else tuple(span)
    for name in names:
        kind_of(name)
    if not names:
        raise SpanError("", "no kind named", SPANS)
    return names


class _Draw:
    """Which positions one context manager skips, drawn once for each batch."""

    def __init__(self, vlm: VLM, span: Span, share: float, n_tokens: int | None, seed: int) -> None:
        check_share(share, n_tokens)
        self.span = span if isinstance(span, Tensor) else check_spans(span)
        self.vlm = vlm
        self.share = share
        self.n_tokens = n_tokens
        self.seed = seed
        self.clock = Clock(vlm)
        # the batch, and its numbers of rows and positions, that the draw is for
        self._drawn_for: tuple[object, tuple[int, int]] | None = None
        self._skipped = self._rest = torch.empty(0)

    def skipped(self) -> Bool[Tensor, "b t"]:
        """Mark where the MLP is skipped, on the CPU."""
        self._update()
        return self._skipped

    def rest(self) -> Int[Tensor, "n"]:
        """The numbers of the other positions, on the model's device.

        They are counted through all rows of the batch, one after the other.
        """
        self._update()
        return self._rest

    def _update(self) -> None:
        batch = self.vlm.running
        shape = self.clock.shape
        if self._drawn_for is not None:
            drawn_batch, drawn_shape = self._drawn_for
            # by identity: a batch is never changed, and the next one may have pictures elsewhere
            if drawn_batch is batch and drawn_shape == shape:
                return
        skipped = fit(self._draw(self._span_mask().cpu()), shape[0], "span")
        missing = shape[1] - skipped.shape[1]
        if missing < 0:
            raise InterventionError(
                f"{shape[1]} positions of a prompt that has {skipped.shape[1]}",
                "run the whole prompt at once: no prefill in chunks, no assisted decoding",
            )
        # without a cache every step sees the whole sequence, with generated tokens after the prompt
        self._skipped = nn.functional.pad(skipped, (0, missing))
        self._rest = _numbers(~self._skipped).to(self.vlm.device)
        self._drawn_for = (batch, shape)

    def _span_mask(self) -> Bool[Tensor, "b t"]:
        if isinstance(self.span, Tensor):
            check_length(self.vlm, self.span, "span")
            return self.span
        if self.vlm.running is None:
            raise InterventionError(
                f"span {' or '.join(self.span)!r} of unknown inputs",
                "run the model by vlm.forward or vlm.generate",
            )
        return span_mask(self.vlm, self.vlm.running, self.span)

    def _draw(self, mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Draw positions of a mask, in each row by a seed of its own."""
        result = torch.zeros_like(mask)
        for row, row_mask in enumerate(mask):
            positions = row_mask.nonzero().flatten()
            count = len(positions)
            n = int(self.share * count + 0.5) if self.n_tokens is None else self.n_tokens
            if n > count:
                raise InputError(
                    f"{n} positions of row {row} of the batch, which has {count} of them",
                    "give fewer n_tokens",
                )
            order = np.random.default_rng([self.seed, row]).permutation(count)
            result[row, positions[order[:n]]] = True
        return result


# of each block, in order of entry
_DRAWS: WeakKeyDictionary[nn.Module, list[_Draw]] = WeakKeyDictionary()


@contextmanager
def _drawn_at(block: nn.Module, draw: _Draw) -> Iterator[None]:
    """Put a draw in force at a block.

    Nested ones skip what any of them draws, by one gather.
    """
    draws = _DRAWS.setdefault(block, [])
    draws.append(draw)
    try:
        # the outermost draw replaces the forwards, and they look at all draws
        forwards = _gathering(block, draws) if len(draws) == 1 else {}
        with overridden(forwards):
            yield
    finally:
        draws.remove(draw)


def _gathering(block: nn.Module, draws: list[_Draw]) -> dict[nn.Module, Callable]:
    entry, exit_ = anatomy.mlp_entry(block), anatomy.mlp(block)

    def whole_mlp(original: Callable, states: Tensor) -> Tensor | tuple:
        rest = _rest(draws, states.device)
        if rest is None:
            return original(states)
        if not len(rest):
            return nothing(exit_, states)
        output = original(_gathered(states, rest))
        computed = anatomy.states_of(output)
        return anatomy.with_states(output, _scattered(computed, rest, draws[0].clock.shape))

    def first_layer(original: Callable, states: Tensor) -> Tensor:
        rest = _rest(draws, states.device)
        return original(states if rest is None else _gathered(states, rest))

    def last_layer(original: Callable, hidden: Tensor) -> Tensor:
        rest = _rest(draws, hidden.device)
        if rest is None:
            return original(hidden)
        return _scattered(original(hidden), rest, draws[0].clock.shape)

    return {exit_: whole_mlp} if entry is exit_ else {entry: first_layer, exit_: last_layer}


def _rest(draws: list[_Draw], device: torch.device) -> Int[Tensor, "n"] | None:
    """The positions whose MLP runs, or None where all of them do."""
    if draws[0].clock.decoding:
        return None
    if len(draws) == 1:
        rest = draws[0].rest()
    else:
        skipped = torch.stack([draw.skipped() for draw in draws]).any(dim=0)
        rest = _numbers(~skipped)
    rows, length = draws[0].clock.shape
    return None if len(rest) == rows * length else rest.to(device)


def _numbers(mask: Bool[Tensor, "b t"]) -> Int[Tensor, "n"]:
    """Where a mask is True, counted through all rows."""
    return mask.flatten().nonzero().flatten()


def _gathered(
    states: Tensor, rest: Int[Tensor, "n"]
) -> Float[Tensor, "1 n d"] | Float[Tensor, "n d"]:
    """Return the states at some positions of all rows, in the form that the MLP takes."""
    rows = states.reshape(-1, states.shape[-1]).index_select(0, rest)
    return rows if states.ndim == 2 else rows[None]  # OPT's MLP gets all positions in one row


def _scattered(
    output: Tensor, rest: Int[Tensor, "n"], shape: tuple[int, int]
) -> Float[Tensor, "b t d"] | Float[Tensor, "positions d"]:
    """Put what the MLP gave back to its positions, with zeros at all others."""
    n_rows, length = shape
    width = output.shape[-1]
    rows = output.new_zeros(n_rows * length, width)
    rows.index_copy_(0, rest, output.reshape(-1, width))
    return rows if output.ndim == 2 else rows.view(n_rows, length, width)
