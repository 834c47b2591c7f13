"""Read states where they arise.

Hooks that keep only what is asked for, and move it to the CPU at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Integral

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import GenerationMixin

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Key
from xlvlms_tutorial.activations.clock import Clock
from xlvlms_tutorial.errors import LayerError, SelectionError, SpanError
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.support import require, require_hookable
from xlvlms_tutorial.models.vlm import VLM

Layers = int | str | Iterable[int]
Places = str | Sequence[str]
Positions = str | tuple[str, ...] | Bool[Tensor, "b t"]
REDUCTIONS = ("mean", "last", None)


@contextmanager
def reading(
    vlm: VLM,
    layers: Layers,
    places: Places = (WHOLE_BLOCK,),
    positions: Positions = "all",
    reduce: str | None = None,
    dtype: torch.dtype | None = None,
    steps: bool = True,
    stop: bool = False,
) -> Iterator[dict[Key, list[Tensor]]]:
    """Read states while the model runs inside this block.

    For each ``(layer, place)`` first those of the prompt, then of each decode step. Of the prompt,
    ``positions`` "all" gives (b, t, d), "last" (b, 1, d), and a mask (b, t), a span or a tuple of
    spans (n, d), row by row; with ``reduce`` "mean" or "last" it is (b, d), the padding left out. A
    decode step gives (b, 1, d), the state of the token it was fed; ``steps=False`` leaves these
    out. All are copies on the CPU, in ``dtype`` or in the model's number format; a mean is taken on
    the device in float32. A reading sees what interventions did. ``stop`` ends a forward, and this
    block, after the last state that is wanted.

    Raises
    ------
    LayerError
        If a layer is out of range: 0 to L, and 1 to L for the parts of a block.
    SelectionError
        If there are no layers, a place is unknown, positions do not fit, or ``stop``
        is asked for while generating.
    SpanError
        If this model, or some sample, has no positions of these kinds.
    AnatomyError
        If a block has no such part; ``vlm.supports("read", place)`` says so before.
    InterventionError
        If a part is not all of its kind in the block, as an MLP with experts beside it.
    """
    reader = _Reader(vlm, wanted(vlm, layers, places), positions, reduce, dtype, steps, stop)
    with ExitStack() as hooks:
        for hook in reader.hooks():
            hooks.callback(hook.remove)
        try:
            yield reader.kept
        except _Enough as enough:
            if enough.reader is not reader:
                raise


def read(
    vlm: VLM,
    batch: Batch,
    layers: Layers,
    places: Places = (WHOLE_BLOCK,),
    positions: Positions = "all",
    reduce: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[Key, Tensor]:
    """The states of one forward over a batch, which ends after the last state that is wanted.

    Shapes and errors as in ``reading``.

    Raises
    ------
    SelectionError
        If a part was never computed, because its block is skipped.
    """
    with reading(vlm, layers, places, positions, reduce, dtype, stop=True) as found:
        vlm.forward(batch, logits=False, use_cache=False)
    return {key: parts[0] for key, parts in computed(found).items()}


def computed(found: dict[Key, list[Tensor]]) -> dict[Key, list[Tensor]]:
    """What was read, all of it.

    Raises
    ------
    SelectionError
        If a part was never computed, because its block is skipped.
    """
    for (layer, place), parts in found.items():
        if not parts:
            allowed = "read it without the intervention that skips it"
            raise SelectionError(f"the {place} of layer {layer} was never computed", allowed)
    return found


def wanted(vlm: VLM, layers: Layers, places: Places = (WHOLE_BLOCK,)) -> list[Key]:
    """The ``(layer, place)`` pairs that are asked for, by layer.

    "all" means every layer where the place exists.

    Raises
    ------
    LayerError
        If a layer is out of range.
    SelectionError
        If there are no layers or no places.
    """
    places = list(dict.fromkeys([places] if isinstance(places, str) else places))
    if isinstance(layers, str) and layers != "all":
        raise SelectionError(f"layers {layers!r}", 'give numbers, or "all"')
    if isinstance(layers, str):
        return [
            (layer, place)
            for layer in range(vlm.n_layers + 1)
            for place in places
            if layer or place == WHOLE_BLOCK
        ]
    numbers = [layers] if isinstance(layers, int) else list(layers)
    if not numbers or not places:
        raise SelectionError(
            "no layers or no places are asked for",
            f"give at least one layer of 0 to {vlm.n_layers}, and one place",
        )
    first = 0 if places == [WHOLE_BLOCK] else 1
    for layer in numbers:
        if (
            isinstance(layer, bool)
            or not isinstance(layer, Integral)
            or not first <= layer <= vlm.n_layers
        ):
            raise LayerError(layer, first, vlm.n_layers)
    return [(layer, place) for layer in sorted(set(map(int, numbers))) for place in places]


def span_mask(vlm: VLM, batch: Batch, spans: tuple[str, ...]) -> Bool[Tensor, "b t"]:
    """Where a batch has positions of these kinds.

    Raises
    ------
    SpanError
        If this model has no such positions at all, or some sample has none of any of these kinds.
    """
    absent = set(anatomy.MODALITIES) - set(vlm.placeholders)
    for name in spans:
        # a model may take clips or sounds in the place of a picture,
        # where the batch alone knows of them
        if name in absent and not (batch.spans == SPANS.index(name)).any():
            crossing = name == "image" and anatomy.crossing(vlm.model)
            reason = (
                "pictures enter this model by cross-attention and have no positions"
                if crossing
                else "this model takes none"
            )
            raise SpanError(name, reason, [kind for kind in SPANS if kind not in absent])
    return batch.mask(*spans)


class _Enough(Exception):
    """All that is wanted has been read.

    Ends a forward, and is caught by the reading that raised it.
    """

    def __init__(self, reader: "_Reader") -> None:
        super().__init__("everything has been read")
        self.reader = reader


class _Reader:
    """What the hooks of one reading share.

    Which rows and positions the model is at, and what has been kept.
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
        if reduce not in REDUCTIONS:
            raise SelectionError(
                f"unknown reduction {reduce!r}", f"allowed: {', '.join(map(repr, REDUCTIONS))}"
            )
        self._vlm, self._positions, self._reduce, self._dtype = vlm, positions, reduce, dtype
        self._steps, self._stop = steps, stop
        require_hookable(vlm.model)
        for layer, place in keys:
            require(vlm, "read", place, [layer] if place in anatomy.PLACES and layer else [])
        self._sites = [(key, anatomy.site(vlm.blocks[max(key[0], 1) - 1], key[1])) for key in keys]
        self.kept: dict[Key, list[Tensor]] = {key: [] for key in keys}
        self._waiting = set(keys)
        self._batch: Batch | None = None
        self._clock, self._rows, self._length, self._decoding = Clock(vlm), 0, 0, False
        self._picked: slice | list[slice | Tensor] = slice(None)

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register them one by one; interventions register theirs in front of these."""
        yield anatomy.decoder(self._vlm.model).register_forward_pre_hook(
            self._begin, with_kwargs=True
        )
        if self._stop:
            model = self._vlm.model
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            # BLIP-2 leaves generating to the language model inside
            for generator in (model, *model.children()):
                if isinstance(generator, GenerationMixin):
                    yield generator.register_forward_pre_hook(_refuse_generation, with_kwargs=True)
        for key, (module, side) in ((key, (site.module, site.side)) for key, site in self._sites):
            if side == "input" or key[0] == 0:
                yield module.register_forward_pre_hook(
                    partial(self._entering, key), with_kwargs=True
                )
            else:
                yield module.register_forward_hook(partial(self._leaving, key))

    def _entering(self, key: Key, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._keep(key, anatomy.states_in(args, kwargs))

    def _leaving(self, key: Key, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        self._keep(key, anatomy.states_of(output))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The decoder starts: is it a prompt, and which of its positions are wanted."""
        self._clock.tick(module, args, kwargs)
        self._rows, length = self._clock.shape
        self._decoding = self._length > 0 and (
            self._clock.mixed or (self._clock.decoding and length == 1)
        )
        if not self._decoding:
            whole = length if self._vlm.running is None else self._vlm.running["input_ids"].shape[1]
            if length < whole:
                what = (
                    f"{length} positions of a prompt that has {whole}, or of "
                    "several new tokens at once"
                )
                raise SelectionError(
                    what,
                    (
                        "run the whole prompt at once: no prefill in chunks, no cache "
                        "from before, no assistant"
                    ),
                )
            self._batch, self._length = self._vlm.running, length
            self._picked = self._pick()

    def _keep(self, key: Key, states: Tensor) -> None:
        states = states.detach()
        if states.ndim == 2:  # OPT's MLP puts all positions in one row
            states = states.reshape(self._rows, -1, states.shape[-1])
        if not self._decoding:
            self.kept[key].append(self._taken(states))
        elif self._steps:
            self.kept[key].append(states[:, -1:].to("cpu", self._dtype, copy=True))
        self._waiting.discard(key)
        if self._stop and not self._waiting:
            raise _Enough(self)

    def _taken(self, states: Float[Tensor, "b t d"]) -> Tensor:
        """What is wanted of the prompt, in memory of its own.

        A view would keep all, and later blocks may write into it.
        """
        dtype = self._dtype or states.dtype
        if isinstance(self._picked, slice):
            return states[:, self._picked].to("cpu", dtype, copy=True)
        if self._reduce == "mean":
            # sample by sample: no copy of all, and what stands elsewhere
            # (0 * NaN is NaN) cannot enter
            wide = torch.promote_types(states.dtype, torch.float32)
            return torch.stack(
                [row[at].mean(0, dtype=wide) for row, at in zip(states, self._picked, strict=True)]
            ).to("cpu", dtype)
        counts = [at.stop - at.start if isinstance(at, slice) else len(at) for at in self._picked]
        kept = torch.empty((sum(counts), states.shape[-1]), dtype=dtype)
        for row, at, place in zip(states, self._picked, kept.split(counts), strict=True):
            place.copy_(row[at])
        return kept

    def _pick(self) -> slice | list[slice | Tensor]:
        """Which positions of the prompt are wanted.

        The same of all rows, or of each row its own.
        """
        if (
            self._reduce is None
            and isinstance(self._positions, str)
            and self._positions in ("all", "last")
        ):
            return slice(None) if self._positions == "all" else slice(-1, None)
        mask = self._mask().cpu()
        if mask.shape[1] != self._length or self._rows % len(mask):
            raise SelectionError(
                f"a mask {tuple(mask.shape)} for {self._rows} rows of {self._length}",
                "give one value a position",
            )
        chosen = [row.nonzero().flatten() for row in mask]
        if self._reduce is not None and not all(map(len, chosen)):
            empty = next(k for k, at in enumerate(chosen) if not len(at))
            raise SelectionError(
                f"row {empty} of the mask is empty",
                f"give at least one position a row for reduce={self._reduce!r}",
            )
        chosen = [at[-1:] for at in chosen] if self._reduce == "last" else chosen
        parts = [
            slice(*_ends(at)) if _ends(at)[1] - _ends(at)[0] == len(at) else at for at in chosen
        ]
        beams = self._rows // len(mask)  # beams repeat each row
        return [part for part in parts for _ in range(beams)]

    def _mask(self) -> Bool[Tensor, "b t"]:
        batch, positions = self._batch, self._positions
        if isinstance(positions, Tensor):
            return positions
        if positions == "last":
            return (torch.arange(self._length) == self._length - 1)[None].expand(self._rows, -1)
        if positions == "all" and (batch is None or "attention_mask" not in batch):
            return torch.ones(self._rows, self._length, dtype=torch.bool)
        if batch is None:
            allowed = "run the model by vlm.forward or vlm.generate_ids"
            raise SelectionError(f"where {positions!r} is, is known only of a batch", allowed)
        if positions == "all":
            return batch["attention_mask"].bool()
        return span_mask(
            self._vlm, batch, (positions,) if isinstance(positions, str) else positions
        )


def _ends(at: Tensor) -> tuple[int, int]:
    return (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)


def _refuse_generation(module: nn.Module, args: tuple, kwargs: dict) -> None:
    # which generate() makes, and hands to every forward
    if kwargs.get("past_key_values") is not None:
        raise SelectionError(
            "stop=True while generating",
            "use stop=False, or a forward: a generation has no last wanted layer",
        )
