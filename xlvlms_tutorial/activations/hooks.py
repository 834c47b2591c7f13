"""Read activations while the model runs.

Hooks keep only the layers, sites and positions that were requested, and move them to the CPU.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from numbers import Integral

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import GenerationMixin

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Key
from xlvlms_tutorial.activations.clock import Clock
from xlvlms_tutorial.errors import InputError, LayerError, SpanError
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, Batch, kind_of
from xlvlms_tutorial.models.support import require_hookable, require_support
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require_one_of

Layers = int | str | Iterable[int]
Sites = str | Sequence[str]
Positions = str | tuple[str, ...] | Bool[Tensor, "b t"]
REDUCTIONS = ("mean", "last", None)


@contextmanager
def reading(
    vlm: VLM,
    layers: Layers,
    sites: Sites = (WHOLE_BLOCK,),
    positions: Positions = "all",
    reduce: str | None = None,
    dtype: torch.dtype | None = None,
    steps: bool = True,
    stop: bool = False,
) -> Iterator[dict[Key, list[Tensor]]]:
    """Collect activations while the model runs inside this ``with`` block.

    Use it around a generation, or any call of the model that you make yourself; for one forward
    over a batch, ``read`` is shorter. It sees the effect of interventions that are in force. The
    activations are copies on the CPU.

    Parameters
    ----------
    vlm : VLM
        The model.
    layers : int, iterable of int, or "all"
        The layers to read: 0 is what enters the first block, l what leaves block l, up to L. "all"
        means every layer where the site exists. Parts of a block have no layer 0.
    sites : str or sequence of str
        The sites in a layer: "resid_post" (default: the residual stream that leaves it), or one of
        its parts, such as "attn_out" or "mlp_out".
    positions : str, tuple of str, or mask (b, t)
        The positions of the prompt: "all" (default), "last", a span such as "image" or "question",
        several spans in a tuple, or a boolean mask.
    reduce : "mean", "last" or None
        None (default) keeps every position. "mean" averages over the positions of each sample, on
        the device in float32, and "last" keeps the last of them; padding is left out.
    dtype : torch.dtype, optional
        The dtype of the copies; by default the model's.
    steps : bool
        Whether decode steps are read too (default), or the prompt only.
    stop : bool
        True ends the forward, and this block, after the last layer that is needed. This saves the
        blocks above it; it cannot be used while generating.

    Returns
    -------
    context manager of a dict
        For each ``(layer, site)`` a list of tensors, filled while the model runs: first the
        prompt's, then one for each decode step. The prompt's is (b, t, d) for "all", (b, 1, d) for
        "last", (n, d) row by row for spans and masks, and (b, d) with ``reduce``. A decode step's
        is (b, 1, d), the state of the token that was fed.

    Raises
    ------
    LayerError
        If a layer is out of range: 0 to L, and 1 to L for the parts of a block.
    InputError
        If there are no layers, a site is unknown, positions do not fit, or ``stop`` is used while
        generating.
    SpanError
        If this model, or some sample, has no positions of these kinds.
    AnatomyError
        If a block has no such part; ``vlm.supports("read", site)`` tells before.
    InterventionError
        If a part is not the only one of its kind in the block, as an MLP with experts beside it.

    Examples
    --------
    >>> from xlvlms_tutorial.activations.hooks import reading
    >>> with reading(vlm, [12, 24], positions="last") as activations:
    ...     _ = vlm.forward(batch)
    >>> activations[12, "resid_post"][0].shape
    torch.Size([4, 1, 576])

    While generating, the list holds the prompt, then every token that was fed:

    >>> with reading(vlm, 12, positions="last") as activations:
    ...     _ = vlm.generate_ids(batch, max_new_tokens=2)
    >>> [tuple(states.shape) for states in activations[12, "resid_post"]]
    [(4, 1, 576), (4, 1, 576)]
    """
    reader = _Reader(vlm, wanted(vlm, layers, sites), positions, reduce, dtype, steps, stop)
    with ExitStack() as hooks:
        for hook in reader.hooks():
            hooks.callback(hook.remove)
        try:
            yield reader.collected
        except _AllRead as signal:
            if signal.reader is not reader:  # of a reading around this one
                raise


def read(
    vlm: VLM,
    batch: Batch,
    layers: Layers,
    sites: Sites = (WHOLE_BLOCK,),
    positions: Positions = "all",
    reduce: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[Key, Tensor]:
    """Run one forward over a batch and return its activations.

    Use it for a batch that you made yourself; ``capture`` does the same for many samples. The
    forward ends after the last layer that is needed.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        The inputs, as ``vlm.batch`` makes them.
    layers : int, iterable of int, or "all"
        The layers to read, 0 to L; "all" means every layer where the site exists.
    sites : str or sequence of str
        The sites in a layer: "resid_post" (default: the residual stream that leaves it), or one of
        its parts, such as "attn_out" or "mlp_out".
    positions : str, tuple of str, or mask (b, t)
        "all" (default), "last", a span such as "image" or "question", several spans in a tuple, or
        a boolean mask.
    reduce : "mean", "last" or None
        None (default) keeps every position; "mean" averages over the positions of each sample, and
        "last" keeps the last of them.
    dtype : torch.dtype, optional
        The dtype of the result; by default the model's.

    Returns
    -------
    dict of (layer, site) to tensor
        On the CPU: (b, t, d) for "all", (b, 1, d) for "last", (n, d) row by row for spans and
        masks, and (b, d) with ``reduce``.

    Raises
    ------
    LayerError, SpanError
        If the model has no such layer, or the model or some sample has no such positions.
    InputError
        If a site is unknown, positions do not fit, or a part was never computed because its block
        is skipped.

    Examples
    --------
    >>> from xlvlms_tutorial.activations import read
    >>> activations = read(vlm, batch, [12, 24], positions="image", reduce="mean")
    >>> activations[24, "resid_post"].shape
    torch.Size([4, 576])
    """
    with reading(vlm, layers, sites, positions, reduce, dtype, stop=True) as collected:
        vlm.forward(batch, logits=False, use_cache=False)
    return first_of_each(collected)


def first_of_each(collected: Mapping[Key, list[Tensor]]) -> dict[Key, Tensor]:
    """Return the states that the first forward gave, by layer and site."""
    return {key: parts[0] for key, parts in computed(collected).items()}


def computed(collected: dict[Key, list[Tensor]]) -> dict[Key, list[Tensor]]:
    """Return what was read, once it is certain that every part was computed.

    Raises
    ------
    InputError
        If a part was never computed, because its block is skipped.
    """
    for (layer, site), parts in collected.items():
        if not parts:
            allowed = "read it without the intervention that skips it"
            raise InputError(f"the {site} of layer {layer} was never computed", allowed)
    return collected


def wanted(vlm: VLM, layers: Layers, sites: Sites = (WHOLE_BLOCK,)) -> list[Key]:
    """List the ``(layer, site)`` pairs to read, ordered by layer.

    ``layers`` is one number, several, or "all" (every layer where the site exists); ``sites`` one
    site or several. ``vlm`` says how many layers there are.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InputError
        If there are no layers or no sites.
    """
    sites = list(dict.fromkeys([sites] if isinstance(sites, str) else sites))
    if isinstance(layers, str) and layers != "all":
        raise InputError(f"layers {layers!r}", 'give numbers, or "all"')
    if isinstance(layers, str):
        keys = []
        for layer, site in product(range(vlm.n_layers + 1), sites):
            if layer or site == WHOLE_BLOCK:
                keys.append((layer, site))
        return keys
    numbers = [layers] if isinstance(layers, int) else list(layers)
    if not numbers or not sites:
        raise InputError(
            "no layers or no sites are asked for",
            f"give at least one layer of 0 to {vlm.n_layers}, and one site",
        )
    first = 0 if sites == [WHOLE_BLOCK] else 1
    for layer in numbers:
        whole = isinstance(layer, Integral) and not isinstance(layer, bool)
        if not whole or not first <= layer <= vlm.n_layers:
            raise LayerError(layer, first, vlm.n_layers)
    ordered = sorted(set(map(int, numbers)))
    return list(product(ordered, sites))


def span_mask(vlm: VLM, batch: Batch, spans: tuple[str, ...]) -> Bool[Tensor, "b t"]:
    """Mark where a batch has positions of these spans.

    Use it to select image, question or answer positions from activations of shape (b, t, d).

    Parameters
    ----------
    vlm : VLM
        The model; it knows which modalities it reads.
    batch : Batch
        The inputs, as ``vlm.batch`` makes them.
    spans : tuple of str
        The spans to mark, such as ``("image",)`` or ``("question", "answer")``.

    Returns
    -------
    mask (b, t)
        True at the positions of any of these spans.

    Raises
    ------
    SpanError
        If this model has no such positions at all, or some sample has none of any of these spans.

    Examples
    --------
    The pocket model turns each picture into 16 visual tokens:

    >>> from xlvlms_tutorial.activations.hooks import span_mask
    >>> span_mask(vlm, batch, ("image",)).sum(dim=1).tolist()
    [16, 16, 16, 16]
    """
    absent = set(anatomy.MODALITIES) - set(vlm.placeholders)
    for name in spans:
        kind, _ = kind_of(name)
        # a model may take clips or sounds in the place of pictures, and only the batch knows that
        if kind in absent and not (batch.spans == SPANS.index(kind)).any():
            reason = "this model takes none"
            if kind == "image" and anatomy.crossing(vlm.model):
                reason = "pictures enter this model by cross-attention and have no positions"
            allowed = [kind for kind in SPANS if kind not in absent]
            raise SpanError(name, reason, allowed)
    return batch.mask(*spans)


class _AllRead(Exception):
    """Everything that was requested has been read.

    It ends a forward, and is caught by the reading that raised it.
    """

    def __init__(self, reader: "_Reader") -> None:
        super().__init__("everything has been read")
        self.reader = reader


class _Reader:
    """What the hooks of one reading share.

    It knows which rows and positions the model computes, and holds the activations so far.
    """

    def __init__(
        self,
        vlm: VLM,
        keys: list[Key],
        positions: Positions,
        reduce: str | None,
        dtype: torch.dtype | None,
        steps: bool,
        stop: bool,
    ) -> None:
        require_one_of(reduce, REDUCTIONS, "reduction")
        self._vlm = vlm
        self._positions = positions
        self._reduce = reduce
        self._dtype = dtype
        self._steps = steps
        self._stop = stop
        require_hookable(vlm.model)
        for layer, site in keys:
            in_block = site in anatomy.SITES and layer
            require_support([vlm.blocks[layer - 1]] if in_block else [], vlm.refused, "read", site)
        self._sites = []
        for layer, site in keys:
            block = vlm.blocks[max(layer, 1) - 1]
            self._sites.append(((layer, site), anatomy.site(block, site)))
        self.collected: dict[Key, list[Tensor]] = {key: [] for key in keys}
        self._pending = set(keys)
        self._batch: Batch | None = None
        self._clock = Clock(vlm)
        self._rows = 0
        self._length = 0
        self._decoding = False
        self._selected: slice | list[slice | Tensor] = slice(None)

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register the hooks one by one; interventions register theirs in front of these."""
        yield anatomy.decoder(self._vlm.model).register_forward_pre_hook(
            self._begin, with_kwargs=True
        )
        if self._stop:
            model = self._vlm.model
            if hasattr(model, "get_base_model"):
                model = model.get_base_model()
            # BLIP-2 leaves generating to the language model inside
            for generator in (model, *model.children()):
                if isinstance(generator, GenerationMixin):
                    yield generator.register_forward_pre_hook(_refuse_generation, with_kwargs=True)
        for key, site in self._sites:
            if site.side == "input" or key[0] == 0:
                yield site.module.register_forward_pre_hook(
                    partial(self._entering, key), with_kwargs=True
                )
            else:
                yield site.module.register_forward_hook(partial(self._leaving, key))

    def _entering(self, key: Key, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._collect(key, anatomy.states_in(args, kwargs))

    def _leaving(self, key: Key, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        self._collect(key, anatomy.states_of(output))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """As the decoder starts, note whether this is a prompt and which positions to read."""
        self._clock.tick(module, args, kwargs)
        self._rows, length = self._clock.shape
        self._decoding = self._length > 0 and (
            self._clock.mixed or (self._clock.decoding and length == 1)
        )
        if not self._decoding:
            batch = self._vlm.running
            prompt_length = length if batch is None else batch["input_ids"].shape[1]
            if length < prompt_length:
                problem = (
                    f"{length} positions of a prompt that has {prompt_length}, or of "
                    "several new tokens at once"
                )
                raise InputError(
                    problem,
                    (
                        "run the whole prompt at once: no prefill in chunks, no cache "
                        "from before, no assistant"
                    ),
                )
            self._batch = batch
            self._length = length
            self._selected = self._select_positions()

    def _collect(self, key: Key, states: Tensor) -> None:
        states = states.detach()
        if states.ndim == 2:  # OPT's MLP puts all positions in one row
            states = states.reshape(self._rows, -1, states.shape[-1])
        if not self._decoding:
            if states.shape[1] != self._clock.shape[1]:
                raise InputError(
                    f"{states.shape[1]} states inside a block that is given "
                    f"{self._clock.shape[1]}: some tokens are left out there",
                    "read what leaves the block (resid_post)",
                )
            self.collected[key].append(self._prompt_states(states))
        elif self._steps:
            self.collected[key].append(states[:, -1:].to("cpu", self._dtype, copy=True))
        self._pending.discard(key)
        if self._stop and not self._pending:
            raise _AllRead(self)

    def _prompt_states(self, states: Float[Tensor, "b t d"]) -> Tensor:
        """Copy the selected positions of the prompt into memory of their own.

        A view would keep all of them in memory, and later blocks may write into it.
        """
        dtype = self._dtype or states.dtype
        if isinstance(self._selected, slice):
            return states[:, self._selected].to("cpu", dtype, copy=True)
        if self._reduce == "mean":
            # sample by sample: this copies less, and a NaN at other positions cannot enter the
            # mean, as it would by weights of 0 (0 * NaN is NaN)
            wide = torch.promote_types(states.dtype, torch.float32)
            means = []
            for row, positions in zip(states, self._selected, strict=True):
                means.append(row[positions].mean(0, dtype=wide))
            return torch.stack(means).to("cpu", dtype)
        counts = list(map(_count, self._selected))
        result = torch.empty((sum(counts), states.shape[-1]), dtype=dtype)
        targets = result.split(counts)
        for row, positions, target in zip(states, self._selected, targets, strict=True):
            target.copy_(row[positions])
        return result

    def _select_positions(self) -> slice | list[slice | Tensor]:
        """Select positions of the prompt: one slice for all rows, or one entry for each row."""
        if self._reduce is None and isinstance(self._positions, str):
            if self._positions == "all":
                return slice(None)
            if self._positions == "last":
                return slice(-1, None)
        mask = self._mask().cpu()
        if mask.shape[1] != self._length or self._rows % len(mask):
            raise InputError(
                f"a mask {tuple(mask.shape)} for {self._rows} rows of {self._length}",
                "give one value a position",
            )
        beams = self._rows // len(mask)  # beams repeat each row
        selected: list[slice | Tensor] = []
        for number, row in enumerate(mask):
            positions = row.nonzero().flatten()
            if self._reduce is not None and not len(positions):
                raise InputError(
                    f"row {number} of the mask is empty",
                    f"give at least one position a row for reduce={self._reduce!r}",
                )
            if self._reduce == "last":
                positions = positions[-1:]
            selected += [_as_slice(positions)] * beams
        return selected

    def _mask(self) -> Bool[Tensor, "b t"]:
        batch = self._batch
        positions = self._positions
        if isinstance(positions, Tensor):
            return positions
        if positions == "last":
            return (torch.arange(self._length) == self._length - 1)[None].expand(self._rows, -1)
        if positions == "all" and (batch is None or "attention_mask" not in batch):
            return torch.ones(self._rows, self._length, dtype=torch.bool)
        if batch is None:
            allowed = "run the model by vlm.forward or vlm.generate_ids"
            raise InputError(f"where {positions!r} is, is known only of a batch", allowed)
        if positions == "all":
            return batch["attention_mask"].bool()
        spans = (positions,) if isinstance(positions, str) else positions
        return span_mask(self._vlm, batch, spans)


def _as_slice(positions: Tensor) -> slice | Tensor:
    """A slice where the positions are consecutive: indexing by it copies nothing."""
    if not len(positions):
        return slice(0, 0)
    start, stop = int(positions[0]), int(positions[-1]) + 1
    return slice(start, stop) if stop - start == len(positions) else positions


def _count(positions: slice | Tensor) -> int:
    return positions.stop - positions.start if isinstance(positions, slice) else len(positions)


def _refuse_generation(module: nn.Module, args: tuple, kwargs: dict) -> None:
    # a cache, which generate() makes and passes to every forward
    if kwargs.get("past_key_values") is not None:
        raise InputError(
            "stop=True while generating",
            "use stop=False, or a forward: a generation has no last wanted layer",
        )
