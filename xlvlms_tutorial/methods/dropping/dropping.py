"""Leave image tokens out of the upper blocks: shorter states, and shorter caches."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from xlvlms_tutorial.activations.clock import Clock
from xlvlms_tutorial.activations.hooks import span_mask
from xlvlms_tutorial.errors import InputError, InterventionError, LayerError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.overrides import check_length, checked_layers, fit, overridden
from xlvlms_tutorial.methods.dropping.merging import merge_tokens
from xlvlms_tutorial.methods.dropping.received import Received
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require_counts, require_one_of

METHODS = ("attention", "norm", "random", "merge")
# interventions that see whole states only, or take them as they are
_AGREE = ("drop_tokens", "pool_tokens", "add", "patch", "ablate", "edit", "skip", "mask_weights")
# what a block is given that has nothing to do with the length of the prompt
_WITHOUT_LENGTH = ("past_key_values", "use_cache", "output_attentions")


class Kept:
    """What :func:`drop_tokens` left in the latest prompt.

    Attributes
    ----------
    mask : Tensor or None
        Booleans (b, t), True at the tokens of the span that stayed; None before the first prompt.
    scores : Tensor or None
        The scores by which they were chosen (b, t), None where there are none.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.dropping import drop_tokens
    >>> with drop_tokens(vlm, 2, keep=4) as kept:
    ...     output = vlm.forward(batch, logits=False)
    >>> kept.mask.sum(dim=1).tolist()
    [4, 4, 4, 4]
    """

    def __init__(self) -> None:
        self.mask: Bool[Tensor, "b t"] | None = None
        self.scores: Float[Tensor, "b t"] | None = None


@recorded
@contextmanager
def drop_tokens(
    vlm: VLM,
    layer: int,
    keep: int,
    by: str | Float[Tensor, "b t"] = "attention",
    span: str = "image",
    seed: int = 0,
) -> Iterator[Kept]:
    r"""Leave out tokens of a span behind a layer: the blocks above it neither see nor compute them.

    Use it to see how many image tokens a model needs, and what leaving them out saves. Blocks 1 to
    ``layer`` run as ever. Blocks above it get shorter states, and write shorter caches. Tokens that
    stay keep the positions (rotary angles) which they had, generated tokens go on where the prompt
    ended. In what leaves a block, dropped tokens keep the state with which they left, so captures
    and edits of the residual stream find every token in its place.

    Parameters
    ----------
    vlm : VLM
        The model.
    layer : int
        The layer behind which tokens are left out, 1 to L - 1.
    keep : int
        How many tokens of the span stay in each sample, 1 or more.
    by : str or tensor (b, t)
        How they are chosen. "attention" (default): those that receive most attention in block
        ``layer`` from the prompt's last position, the mean over heads (Chen et al., 2024, FastV,
        arXiv 2403.06764). "norm": those whose state at this layer is longest. "random": drawn by
        ``seed`` and the sample's row in its batch; what is drawn for a smaller number, a larger one
        draws too. "merge": similar tokens become one, their mean (:func:`merge_tokens`). A tensor
        gives the scores of one batch's positions themselves; the highest stay.
    span : str
        What is left out: "image" (default), "video" or "audio".
    seed : int
        The seed of "random".

    Returns
    -------
    context manager of a Kept
        Tokens are left out inside ``with``, in forwards and in generation. What it gives says which
        tokens of the latest prompt stayed.

    Raises
    ------
    LayerError
        If the layer is out of range.
    InputError
        If ``keep`` is below 1 or above a sample's number of tokens, or ``by`` is unknown.
    SpanError
        If the model or a sample has no positions of the span, as with cross-attention.
    InterventionError
        If the architecture's caches cannot be shortened (windows, recurrences, shared keys), inputs
        are unknown or come in parts, or another intervention that counts positions inside a block
        is in force.

    Examples
    --------
    With a quarter of the image tokens behind block 2, the cache of the last block is shorter:

    >>> from xlvlms_tutorial.methods.dropping import drop_tokens
    >>> with drop_tokens(vlm, 2, keep=4):
    ...     cache = vlm.forward(batch, logits=False, use_cache=True).past_key_values
    >>> cache.get_seq_length(0) - cache.get_seq_length(vlm.n_layers - 1)
    12
    """
    (layer,) = checked_layers(vlm, layer)
    if layer == vlm.n_layers:
        raise LayerError(layer, 1, vlm.n_layers - 1)
    require_counts(keep=keep)
    if not isinstance(by, Tensor):
        require_one_of(by, METHODS, "by")
    require_one_of(span, anatomy.MODALITIES, "span")
    require_droppable(vlm)
    _refuse_others(vlm)
    shortening = _Shortening(vlm, layer, keep, by, span, seed)
    with ExitStack() as stack:
        stack.enter_context(shortening.clock.ticking())
        decoder = anatomy.decoder(vlm.model)
        stack.enter_context(decoder.register_forward_pre_hook(shortening.begin))
        if shortening.received is not None:
            stack.enter_context(shortening.received.watching())
        blocks = vlm.blocks[layer:]
        stack.enter_context(overridden(dict.fromkeys(blocks, shortening.forward)))
        yield shortening.kept


def require_droppable(vlm: VLM) -> None:
    """Refuse an architecture whose tokens cannot be left out of some blocks only.

    ``vlm`` is the model.

    Raises
    ------
    InterventionError
        With the architecture and the reason.
    """
    reason = _refusal(vlm)
    if reason:
        kind = vlm.model.config.model_type
        raise InterventionError(
            f"tokens of {kind} cannot be left out: {reason}",
            "take a model with full attention in all blocks, such as LLaVA or Qwen2-VL, or leave "
            "out work by skip_tokens",
        )


def _refusal(vlm: VLM) -> str:
    if not vlm.placeholders:
        return "pictures enter by cross-attention and have no positions in the decoder"
    config = vlm.model.config.get_text_config(decoder=True)
    if any(anatomy.recurrent(block) for block in vlm.blocks):
        return "some blocks keep a state instead of keys and values"
    if any(anatomy.key_sharing(block) for block in vlm.blocks):
        return "some blocks attend to the keys of others"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None
    if kinds != {"full_attention"} or windowed:
        return "some blocks attend to a window or to chunks of the sequence"
    if config._attn_implementation not in ("eager", "sdpa"):
        return f"attention {config._attn_implementation!r} has masks of its own (use 'sdpa')"
    return ""


def _refuse_others(vlm: VLM) -> None:
    names = [description.partition("(")[0] for description in vlm.active]
    others = [name for name in names if name not in _AGREE]
    if names.count("drop_tokens") > 1:
        others.append("drop_tokens")
    others += [text for text in vlm.active if text.startswith("skip(") and "previous" in text]
    if others:
        raise InterventionError(
            f"drop_tokens together with {others[0]}, which counts on whole blocks",
            f"allowed beside it: {', '.join(_AGREE[1:])}",
        )


class _Shortening:
    """The forwards of the blocks above a layer, for one context manager."""

    def __init__(
        self, vlm: VLM, layer: int, keep: int, by: str | Tensor, span: str, seed: int
    ) -> None:
        self.vlm = vlm
        self.layer = layer
        self.keep = keep
        self.by = by
        self.span = span
        self.seed = seed
        self.clock = Clock(vlm)
        self.kept = Kept()
        self.received: Received | None = None
        if isinstance(by, str) and by == "attention":
            attention = anatomy.attention(vlm.blocks[layer - 1])
            self.received = Received(attention, self._observer)
        # the positions that stay (b, n), and which of them only fill up a row, hidden from others
        self._index: Int[Tensor, "b n"] | None = None
        self._hidden: Bool[Tensor, "b n"] | None = None
        self._whole = True  # whether nothing is left out
        # what was shortened in this call of the decoder: all blocks are given the same
        self._shortened: dict[int, tuple[object, object]] = {}

    def begin(self, module: nn.Module, args: tuple) -> None:
        """As the decoder starts, forget the choice of the last prompt: a hook of ``module``."""
        self._shortened.clear()
        if self.clock.decoding:
            return
        self._index = self._hidden = None
        if self.received is not None:
            self.received.weights = None

    def forward(self, original: Callable, *args: object, **kwargs: object) -> Tensor | tuple:
        """Run a block at the tokens that stay, and put what it gives in their places."""
        states = anatomy.states_in(args, kwargs)
        if self.clock.decoding:
            if not self._whole:
                kwargs["attention_mask"] = self._once(kwargs["attention_mask"], self._decoded_mask)
            return original(*args, **kwargs)
        if self._index is None:
            states = self._choose(states)
        if self._whole:
            return original(*args, **kwargs)
        index = self._index[..., None].expand(-1, -1, states.shape[-1])
        short = states.gather(1, index)
        if args:
            args = (short, *args[1:])
        else:
            kwargs["hidden_states"] = short
        output = original(*args, **self._short_arguments(kwargs, states.shape[1]))
        return anatomy.with_states(output, states.scatter(1, index, anatomy.states_of(output)))

    def _observer(self) -> Int[Tensor, "b"] | None:
        """The prompt's last position in each row, before an answer that follows it."""
        if self.clock.decoding:
            return None
        predicting = self._batch().predicting.int().argmax(dim=1)
        return fit(predicting, self.clock.shape[0], "observer")

    def _batch(self) -> object:
        if self.vlm.running is None:
            raise InterventionError(
                f"span {self.span!r} of unknown inputs",
                "run the model by vlm.forward or vlm.generate",
            )
        return self.vlm.running

    def _choose(self, states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Choose what stays; the result is the states with means in the place of merged tokens."""
        batch = self._batch()
        _refuse_others(self.vlm)
        if self.clock.partial:
            raise InterventionError(
                f"{self.clock.shape[1]} positions of a prompt that has {self.clock.prompt}",
                "run the whole prompt at once: no prefill in chunks, no assisted decoding",
            )
        mask = span_mask(self.vlm, batch, (self.span,)).to(states.device)
        counts = mask.sum(dim=1)
        if (counts < self.keep).any():
            row = int((counts < self.keep).nonzero()[0])
            raise InputError(
                f"{self.keep} of the {int(counts[row])} {self.span} tokens of row {row} to keep",
                f"give 1 to {int(counts.min())}",
            )
        mask = fit(mask, len(states), "span")
        states, stays = self._stay(states, mask)
        self.kept.mask = stays.cpu()
        # without a cache every step sees generated tokens after the prompt, and they all stay
        dropped = nn.functional.pad(mask & ~stays, (0, states.shape[1] - mask.shape[1]))
        self._whole = not dropped.any()
        self._index, self._hidden = _order(dropped)
        return states

    def _stay(
        self, states: Float[Tensor, "b t d"], mask: Bool[Tensor, "b prompt"]
    ) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b prompt"]]:
        """Mark which tokens of the span stay, and merge the others into them where they merge."""
        stays = torch.zeros_like(mask)
        if isinstance(self.by, str) and self.by == "merge":
            states = states.clone()
            for row, row_mask in enumerate(mask):
                places = row_mask.nonzero().flatten()
                representatives, means = merge_tokens(states[row, places], self.keep)
                states[row, places[representatives]] = means
                stays[row, places[representatives]] = True
            self.kept.scores = None
            return states, stays
        scores = self._scores(states[:, : mask.shape[1]], mask)
        self.kept.scores = scores.cpu()
        highest = scores.masked_fill(~mask, -torch.inf).topk(self.keep, dim=1).indices
        return states, stays.scatter(1, highest, True)

    def _scores(
        self, states: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b t"]:
        if isinstance(self.by, Tensor):
            check_length(self.vlm, self.by, "scores")
            return fit(self.by, len(states), "scores").to(states.device, torch.float64)
        if self.by == "norm":
            return states.norm(dim=-1)
        if self.by == "attention":
            if self.received.weights is None:
                raise InterventionError(
                    f"the attention of block {self.layer} is not computed",
                    "choose another layer, or tokens by 'norm'",
                )
            return self.received.weights[:, : mask.shape[1]]
        rows = len(self._batch()["input_ids"])
        scores = torch.zeros(rows, mask.shape[1])
        beams = len(mask) // rows
        for row, row_mask in enumerate(mask[::beams].cpu()):
            places = row_mask.nonzero().flatten()
            order = np.random.default_rng([self.seed, row]).permutation(len(places))
            scores[row, places[order]] = -torch.arange(len(order)).float()
        return fit(scores, len(mask), "scores").to(states.device)

    def _short_arguments(self, kwargs: dict[str, object], length: int) -> dict[str, object]:
        short = dict(kwargs)
        for name, value in kwargs.items():
            if name == "attention_mask":
                short[name] = self._once(value, self._short_mask)
            elif name == "position_embeddings":
                short[name] = self._once(value, self._short_angles)
            elif name == "position_ids" and value is not None:
                short[name] = self._once(value, self._short_positions)
            elif name not in (*_WITHOUT_LENGTH, "hidden_states"):
                self._refuse_long(name, value, length)
        return short

    def _refuse_long(self, name: str, value: object, length: int) -> None:
        if isinstance(value, Tensor) and length in value.shape:
            raise InterventionError(
                f"tokens of {self.vlm.model.config.model_type} cannot be left out: its blocks are "
                f"given {name} for all positions",
                "take another model",
            )

    def _once(self, value: object, shorten: Callable[[object], object]) -> object:
        """What a value that all blocks are given becomes; computed for the first of them."""
        if id(value) not in self._shortened:
            # the value itself is kept too, lest another one gets its id
            self._shortened[id(value)] = (value, shorten(value))
        return self._shortened[id(value)][1]

    def _short_positions(self, positions: Int[Tensor, "*grid #b t"]) -> Int[Tensor, "*grid b n"]:
        # M-RoPE numbers each token by time, row and column, and all of them stay with it
        grid = positions.shape[:-2]
        positions = positions.expand(*grid, len(self._index), -1)
        return positions.gather(-1, self._index.expand(*grid, -1, -1))

    def _short_angles(self, angles: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        short = []
        for part in angles:
            grid, width = part.shape[:-3], part.shape[-1]
            index = self._index[..., None].expand(*grid, -1, -1, width)
            short.append(part.expand(*grid, len(self._index), -1, -1).gather(-2, index))
        return tuple(short)

    def _short_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask among the tokens that stay: rows and columns of the model's own."""
        rows, n = self._index.shape
        if mask is None:
            if not self._hidden.any():
                return None  # causal, and the tokens that stay are in order
            mask = torch.ones(n, n, dtype=torch.bool, device=self._index.device).tril()
            return self._hide(mask.expand(rows, 1, n, n), self._hidden)
        mask = mask.expand(rows, -1, -1, -1)
        heads, columns = mask.shape[1], mask.shape[3]
        mask = mask.gather(2, self._index[:, None, :, None].expand(-1, heads, -1, columns))
        mask = mask.gather(3, self._index[:, None, None].expand(-1, heads, n, -1))
        return self._hide(mask, self._hidden)

    def _decoded_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask of a decode step: the columns of what the short caches hold."""
        rows = len(self._index)
        steps, new = self.clock.shape[1], self.clock.start - self.clock.prompt
        if mask is None:
            if not self._hidden.any():
                return None
            columns = self._index.shape[1] + new + steps
            mask = torch.ones(steps, columns, dtype=torch.bool, device=self._index.device)
            mask = mask.tril(columns - steps).expand(rows, 1, -1, -1)
        else:
            later = torch.arange(self.clock.prompt, mask.shape[-1], device=mask.device)
            index = torch.cat([self._index, later.expand(rows, -1)], dim=1)
            mask = mask.expand(rows, -1, -1, -1)
            index = index[:, None, None].expand(-1, *mask.shape[1:3], -1)
            mask = mask.gather(3, index)
        hidden = nn.functional.pad(self._hidden, (0, mask.shape[-1] - self._hidden.shape[1]))
        return self._hide(mask, hidden, square=False)

    def _hide(self, mask: Tensor, hidden: Bool[Tensor, "b n"], square: bool = True) -> Tensor:
        """Hide what only fills up rows from all but itself: a row without any key is no row."""
        if not hidden.any():
            return mask
        hide = hidden[:, None, None, :].expand(-1, 1, mask.shape[2], -1)
        if square:
            hide = hide & ~torch.eye(mask.shape[2], dtype=torch.bool, device=mask.device)
        value = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask.masked_fill(hide, value)


def _order(
    dropped: Bool[Tensor, "b t"],
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """The positions that stay, equally many in each row, and which of them are hidden.

    Rows may lose different numbers of tokens. A row that loses more goes on computing some of them,
    which no other position sees.
    """
    counts = dropped.sum(dim=1, keepdim=True)
    fills = dropped & (dropped.cumsum(dim=1) <= counts - counts.min())
    index = (~dropped | fills).nonzero()[:, 1].view(len(dropped), -1)
    return index, fills.gather(1, index)
