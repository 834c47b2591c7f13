"""Cut attention from some positions to others in some layers (attention knock-out)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import NamedTuple

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from xlvlms_tutorial.activations.clock import Clock
from xlvlms_tutorial.errors import InterventionError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.overrides import (
    Layers,
    Positions,
    checked_layers,
    checked_positions,
    fit,
    on_generated,
    prompt_mask,
)
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.support import beside
from xlvlms_tutorial.models.vlm import VLM

# which attentions of transformers get a mask with a column for each key
IMPLEMENTATIONS = ("eager", "sdpa")
_MASK = "attention_mask"


@recorded
@contextmanager
def knock_out(vlm: VLM, from_span: Positions, to_span: Positions, layers: Layers) -> Iterator[None]:
    r"""Cut the attention of some positions to others, in the blocks of some layers.

    Use it to find out where in depth one part of the prompt reads another: what changes when the
    predicting position cannot look at the picture in a window of layers (Geva et al., 2023,
    Dissecting Recall of Factual Associations, arXiv 2304.14767). The other weights of a cut row
    are scaled up to a sum of 1, since its scores go through the softmax without those cut:

    .. math::

        a_{ij} = \operatorname{softmax}_j (q_i \cdot k_j / \sqrt{d} + m_{ij}),
        \quad m_{ij} = -\infty \text{ for } i \text{ in } from, j \text{ in } to

    It holds in the prefill and in decode steps, for eager attention and sdpa. Several nest: what
    any of them cuts is cut.

    Parameters
    ----------
    vlm : VLM
        The model.
    from_span : str, tuple of str, mask (b, t), or function
        The positions that look (queries): a span such as "question"; "last", the prompt's last
        position and all that follow; "generated"; "all"; several of these in a tuple; a boolean
        mask over the prompt, or a function that takes the batch and returns one.
    to_span : str, tuple of str, mask (b, t), or function
        The positions that they no longer see (keys), given in the same ways.
    layers : int or sequence of int
        The layers whose block's attention is cut, 1 to L.

    Returns
    -------
    context manager
        The attention is cut inside ``with``.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If positions are unknown or for another batch. If some position would have nothing left to
        attend to. If a block has no attention to the sequence (a recurrence, a short convolution, a
        cross-attention to the picture), or the model runs another attention than eager or sdpa.
    SpanError
        If the model or some sample has no such positions.

    Examples
    --------
    The state of the predicting position changes from the first cut block on, not before:

    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import knock_out
    >>> plain = read(vlm, batch, [11, 12], positions="last")
    >>> with knock_out(vlm, "last", "image", [12, 13]):
    ...     cut = read(vlm, batch, [11, 12], positions="last")
    >>> [torch.equal(cut[layer, "resid_post"], plain[layer, "resid_post"]) for layer in (11, 12)]
    [True, False]
    """
    selected = dict.fromkeys(checked_layers(vlm, layers))
    for layer in selected:
        _require_keys(vlm, layer)
    cut = _Cut(vlm, checked_positions(from_span), checked_positions(to_span))
    with cut.clock.ticking(), ExitStack() as stack:
        stack.enter_context(anatomy.decoder(vlm.model).register_forward_pre_hook(cut.forget))
        for layer in selected:
            module = anatomy.attention(vlm.blocks[layer - 1])
            stack.enter_context(module.register_forward_pre_hook(cut, with_kwargs=True))
        yield


class _Made(NamedTuple):
    """A mask that one call of the decoder has made, and what it was made of."""

    source: Tensor | None
    n_keys: int
    mask: Tensor | None


class _Cut:
    """What one context manager cuts: a forward pre-hook of attentions that edits their mask."""

    def __init__(self, vlm: VLM, from_span: Positions, to_span: Positions) -> None:
        self.vlm = vlm
        self.from_span = from_span
        self.to_span = to_span
        self.clock = Clock(vlm)
        self._made: list[_Made] = []  # blocks of one kind get one mask, made once a call

    def forget(self, module: nn.Module, args: tuple) -> None:
        """Drop the masks of the last call: a hook of the decoder."""
        self._made.clear()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give an attention its mask without the columns that are cut."""
        place = -1
        if _MASK not in kwargs:
            place = list(signature(type(module).forward).parameters).index(_MASK) - 1
        positional = 0 <= place < len(args)
        source = args[place] if positional else kwargs.get(_MASK)
        if source is not None and (not isinstance(source, Tensor) or source.ndim != 4):
            raise InterventionError(
                f"{type(module).__name__} got a mask that has no column for each key",
                f"load the model with one of these attentions: {', '.join(IMPLEMENTATIONS)}",
            )
        states = anatomy.states_in(args, kwargs)
        n_keys = _n_keys(module, kwargs, states.shape[1]) if source is None else source.shape[-1]
        mask = self._mask(source, n_keys, states, module)
        if positional:
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, _MASK: mask}

    def _mask(
        self, source: Tensor | None, n_keys: int, states: Tensor, module: nn.Module
    ) -> Tensor | None:
        for entry in self._made:
            if entry.source is source and entry.n_keys == n_keys:
                return entry.mask
        mask = self._cut(source, n_keys, states, module)
        self._made.append(_Made(source, n_keys, mask))
        return mask

    def _cut(
        self, source: Tensor | None, n_keys: int, states: Tensor, module: nn.Module
    ) -> Tensor | None:
        rows, n_queries = states.shape[:2]
        first, end = self.clock.start, self.clock.start + n_queries
        queries = self._columns(self.from_span, states, first, end)
        if not queries.any():
            return source
        # a sliding window holds the newest keys only, a static cache has room after them
        offset = max(0, end - n_keys)
        keys = self._columns(self.to_span, states, offset, offset + n_keys)
        cut = queries[:, None, :, None] & keys[:, None, None, :]
        if source is None:
            source = _seen(rows, first - offset, n_queries, n_keys, module, states)
        boolean = source.dtype == torch.bool
        visible = source if boolean else source > torch.finfo(source.dtype).min
        remaining = visible & ~cut
        self._require_left(visible, remaining, first)
        return remaining if boolean else source.masked_fill(cut, torch.finfo(source.dtype).min)

    def _columns(
        self, positions: Positions, states: Tensor, start: int, end: int
    ) -> Bool[Tensor, "rows n"]:
        """Mark the positions from ``start`` to ``end`` of the sequence so far, in each row."""
        if self.clock.decoding and self.vlm.running is None:
            raise InterventionError(
                "a decode step after a prompt of which nothing is known",
                "run the model by vlm.forward or vlm.generate",
            )
        shape = (len(states), self.clock.prompt)
        mask = prompt_mask(self.vlm, positions, shape, states.device)
        mask = fit(mask, len(states), "positions")
        missing = max(0, end - mask.shape[1])
        padded = nn.functional.pad(mask, (0, missing), value=on_generated(positions))
        return padded[:, start:end]

    def _require_left(self, visible: Tensor, remaining: Tensor, first: int) -> None:
        """Refuse to leave a position that saw something without anything to attend to."""
        emptied = (visible.any(dim=-1) & ~remaining.any(dim=-1)).any(dim=1)
        if emptied.any():
            row, query = emptied.nonzero()[0].tolist()
            raise InterventionError(
                f"position {first + query} of row {row} would have nothing left to attend to",
                "cut off fewer positions, and leave each at least itself",
            )


def _require_keys(vlm: VLM, layer: int) -> None:
    """Refuse a layer whose block has no attention that a mask could cut."""
    block = vlm.blocks[layer - 1]
    module = anatomy.attention(block)
    problem = None
    if anatomy.recurrent(block):
        problem = "keeps a state of all positions in place of their keys"
    elif layer in anatomy.cross_attention_layers(vlm.model):
        problem = "attends to the picture, which has no positions in the sequence"
    elif _MASK not in signature(type(module).forward).parameters:
        problem = f"takes no {_MASK}"
    elif names := beside(block, "attention"):
        problem = f"has {' and '.join(names)} beside it, which would go on working"
    if problem is not None:
        name = f"{type(module).__name__} of layer {layer} of {type(vlm.model).__name__}"
        raise InterventionError(f"{name} {problem}", "choose layers with an attention of their own")
    kind = anatomy.decoder(vlm.model).config._attn_implementation
    if kind not in IMPLEMENTATIONS:
        raise InterventionError(
            f"attention {kind!r}, in which nothing can be cut",
            f"vlm.model.set_attn_implementation takes these: {', '.join(IMPLEMENTATIONS)}",
        )


def _n_keys(module: nn.Module, kwargs: dict, n_queries: int) -> int:
    """How many keys an attention without a mask sees, those of its cache included."""
    if getattr(module, "is_kv_shared_layer", False):  # Gemma 4 borrows an earlier block's
        return kwargs["shared_kv_states"][module.layer_type][0].shape[-2]
    cache = kwargs.get("past_key_values")
    if cache is None:
        return n_queries
    return cache.get_mask_sizes(n_queries, module.layer_idx)[0]


def _seen(
    rows: int, first: int, n_queries: int, n_keys: int, module: nn.Module, states: Tensor
) -> Shaped[Tensor, "b 1 q k"]:
    """Return the mask that an attention without one stands for, in the form that it takes.

    ``first`` is the column of the first query's own key.
    """
    visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=states.device)
    if n_queries > 1 and getattr(module, "is_causal", True):
        visible = visible.tril(diagonal=first)
    visible = visible.expand(rows, 1, n_queries, n_keys)
    if module.config._attn_implementation == "sdpa":
        return visible
    hidden = torch.finfo(states.dtype).min
    return torch.zeros(visible.shape, dtype=states.dtype, device=states.device).masked_fill(
        ~visible, hidden
    )
