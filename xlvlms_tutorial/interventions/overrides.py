"""How interventions take hold.

Edits of the residual stream in order of entry, and replaced forwards, both always undone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from xlvlms_tutorial.activations.clock import Clock as Clock
from xlvlms_tutorial.errors import FoldError, InterventionError, LayerError
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS
from xlvlms_tutorial.models.vlm import VLM

POSITIONS = ("all", "last", "generated", *SPANS[1:-1])
Positions = str | tuple[str, ...] | Bool[Tensor, "b t"]
Layers = int | Sequence[int]
Change = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]
Gate = Bool[Tensor, "b"] | Callable[[Float[Tensor, "b t d"]], Bool[Tensor, "b"]] | None


def checked_layers(vlm: VLM, layers: Layers, first: int = 1) -> list[int]:
    """Layers as a list, each checked to be one of ``first`` to L.

    Raises
    ------
    LayerError
        If a layer is none of the model's.
    """
    found = [layers] if isinstance(layers, Integral) else list(layers)
    for layer in found:
        if (
            isinstance(layer, bool)
            or not isinstance(layer, Integral)
            or not first <= layer <= vlm.n_layers
        ):
            raise LayerError(layer, first, vlm.n_layers)
    return [int(layer) for layer in found]


def refuse_folded(vlm: VLM, layers: Sequence[int], what: str) -> None:
    """Stop what would undo a vector that is folded into a layer's bias.

    Raises
    ------
    FoldError
        If a vector is folded into one of these layers.
    """
    for layer in layers:
        if vlm.folded[layer]:
            raise FoldError(
                layer,
                f"a vector is folded into its bias, which {what} would silently undo or change",
            )


class Edit:
    """A change of the residual stream at chosen positions of chosen samples.

    ``adds`` says that it adds the same whatever is there, and ``whole`` that it has
    to see the whole prompt at once.
    """

    def __init__(
        self,
        vlm: VLM,
        change: Change,
        positions: Positions,
        gate: Gate,
        adds: bool = False,
        whole: bool = False,
    ) -> None:
        if not isinstance(positions, Tensor):
            positions = (positions,) if isinstance(positions, str) else tuple(positions)
            if not positions or set(positions) - set(POSITIONS):
                raise InterventionError(
                    f"unknown positions {positions!r}",
                    f"allowed: {', '.join(POSITIONS)}, or a mask (b, t)",
                )
        self.vlm, self.change, self.positions, self.gate, self.adds = (
            vlm,
            change,
            positions,
            gate,
            adds,
        )
        self.clock, self._whole = Clock(vlm), whole or callable(gate)
        named = () if isinstance(positions, Tensor) else positions
        self._everywhere = "all" in named
        # whether it holds for what is generated too
        self._goes_on = bool({"all", "last", "generated", "answer"} & set(named))
        self._open: Tensor | None = None  # the gate as decided at the prefill

    def __call__(self, states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The states after the change."""
        self.clock.reached = True
        if self._whole and self.clock.partial:
            what = (
                f"{self.clock.shape[1]} positions of a prompt that has {self.clock.prompt}, for a "
                "change that needs all of it"
            )
            raise InterventionError(
                what, "run the whole prompt at once: no prefill in chunks, no cache from before"
            )
        if self.clock.decoding and not self._goes_on:
            return states
        where = self._where(states)
        if self.gate is not None:
            opened = self._opened(states)[:, None]
            where = opened if where is None else where & opened
        if where is None:
            return self.change(states)
        if not where.any():
            return states
        return torch.where(where[..., None], self.change(states), states)

    def _where(self, states: Tensor) -> Tensor | None:
        if self._everywhere or self.clock.decoding:
            return None
        mask = fit(self._prompt_mask(states), len(states), "positions")
        # a prefill in chunks sees a part of the prompt, and without a cache every step sees what
        # has been generated after it too
        start = 0 if self.vlm.running is None else self.clock.start
        end = start + states.shape[1]
        return nn.functional.pad(mask, (0, max(0, end - mask.shape[1])), value=self._goes_on)[
            :, start:end
        ]

    def _prompt_mask(self, states: Tensor) -> Bool[Tensor, "b t"]:
        if isinstance(self.positions, Tensor):
            check_length(self.vlm, self.positions, "positions")
            return self.positions.to(states.device)
        batch = self.vlm.running
        empty = torch.zeros(
            states.shape[:2] if batch is None else batch.spans.shape,
            dtype=torch.bool,
            device=states.device,
        )
        mask = empty.clone()
        for name in self.positions:
            if name == "last":
                mask |= _last(empty) if batch is None else batch.predicting.to(states.device)
            elif name in ("generated", "answer"):
                mask |= (
                    empty
                    if batch is None
                    else (batch.spans == SPANS.index("answer")).to(states.device)
                )
            elif batch is None:
                raise InterventionError(
                    f"positions {name!r} of unknown inputs",
                    "run the model by vlm.forward or vlm.generate",
                )
            else:
                mask |= batch.mask(name).to(states.device)
        return mask

    def _opened(self, states: Tensor) -> Bool[Tensor, "b"]:
        if self._open is None or not self.clock.decoding:
            # without a cache a step sees its own tokens too, and the gate is
            # decided on the prompt all the same
            prompt = (
                states
                if self.vlm.running is None
                else states[:, : self.vlm.running["input_ids"].shape[1]]
            )
            self._open = self.gate(prompt) if callable(self.gate) else self.gate
        return fit(self._open.to(states.device, torch.bool), len(states), "gate")


@contextmanager
def edited(
    vlm: VLM,
    layers: Sequence[int],
    change: Change,
    positions: Positions,
    gate: Gate,
    adds: bool = False,
    whole: bool = False,
) -> Iterator[None]:
    """Apply a change to these layers.

    Several nested ones act in the order in which they were entered.
    """
    with ExitStack() as undo:
        for layer in layers:
            edit = Edit(vlm, change, positions, gate, adds, whole)
            undo.enter_context(edit.clock.ticking())
            queue = vlm.edits.setdefault(layer, [])
            queue.append(edit)
            undo.callback(queue.remove, edit)
            if len(queue) == 1:
                undo.callback(_install(vlm, layer, queue).remove)
            undo.callback(_expect(vlm, layer, edit).remove)
        yield


@contextmanager
def unedited(vlm: VLM) -> Iterator[None]:
    """Inside this block no edit acts."""
    waiting = {layer: list(queue) for layer, queue in vlm.edits.items()}
    for queue in vlm.edits.values():
        queue.clear()
    try:
        yield
    finally:
        for layer, queue in waiting.items():
            vlm.edits[layer][:] = queue  # in place: the hooks hold these lists


def _expect(vlm: VLM, layer: int, edit: Edit) -> torch.utils.hooks.RemovableHandle:
    """Stop the decoder if it ends without having come to this edit.

    Mllama leaves out its cross-attention blocks without a picture.
    """

    def ended(module: nn.Module, args: tuple, output: object) -> None:
        if edit in vlm.edits[layer] and not edit.clock.reached:
            what = (
                f"layer {layer} is left out by the model for these inputs, so "
                "nothing can be changed there"
            )
            raise InterventionError(
                what, "give a picture, or choose a layer that is computed without one"
            )

    return anatomy.decoder(vlm.model).register_forward_hook(ended)


def _install(vlm: VLM, layer: int, queue: list[Edit]) -> torch.utils.hooks.RemovableHandle:
    def run(states: Tensor) -> Tensor:
        for edit in queue:
            states = edit(states)
        return states

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if args:
            return (run(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": run(kwargs["hidden_states"])}

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return anatomy.with_states(output, run(anatomy.states_of(output)))

    # first of all hooks: transformers' recorder of hidden states and our captures
    # then see what the next block sees
    if layer == 0:
        return vlm.blocks[0].register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    return vlm.blocks[layer - 1].register_forward_hook(after, prepend=True)


@contextmanager
def overridden(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Replace modules' ``forward`` by ``f(original, *args, **kwargs)``.

    Names, weights, hooks and recorders stay, only the work goes.
    """
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, function in forwards.items():
        module.forward = _bound(function, module.forward)
    try:
        yield
    finally:
        for module, old in before.items():
            del module.forward
            if old is not None:  # someone else's override, accelerate's for instance
                module.forward = old


def _bound(function: Callable, original: Callable) -> Callable:
    return lambda *args, **kwargs: function(original, *args, **kwargs)


def pad_cache(cache: Cache | None, index: int, states: Tensor) -> None:
    """Lengthen a skipped block's cache by what it would have written.

    Masks and positions of all blocks are read off one block's length.
    """
    if cache is None:
        return
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is not None and not isinstance(layer, CacheLayerMixin):
        return  # linear attention and convolutions keep a state, which has no length
    batch, length = states.shape[:2]
    # an entry of width zero would count as length zero, so the narrowest that
    # counts is one head of width one
    held = (
        (layer.keys, layer.values)
        if layer is not None and layer.is_initialized
        else (states.new_empty(1, 1, 1, 1),) * 2
    )
    # values may be narrower than keys
    cache.update(
        *(states.new_zeros(batch, entry.shape[1], length, entry.shape[-1]) for entry in held), index
    )


def copy_cache(cache: Cache | None, index: int, length: int) -> bool:
    """Give a skipped block the previous block's keys and values, as the released code does.

    False where that block has none to give.
    """
    if cache is None or index == 0:
        return False
    source = cache.layers[index - 1]
    if not isinstance(source, CacheLayerMixin) or not source.is_initialized:
        return False
    # a static cache has room for more, a sliding window holds less
    end = min(int(source.get_seq_length()), source.keys.shape[-2])
    if end < length:
        return False
    cache.update(
        source.keys[..., end - length : end, :], source.values[..., end - length : end, :], index
    )
    return True


def check_length(vlm: VLM, values: Tensor, what: str) -> None:
    """Stop what was made for inputs of another length, which would silently fall on other tokens.

    Raises
    ------
    InterventionError
        If the length is not that of what runs now.
    """
    if vlm.running is not None and values.shape[1] != (length := vlm.running["input_ids"].shape[1]):
        raise InterventionError(
            f"{what} for rows of {values.shape[1]} tokens in a batch of {length}",
            "make them for this batch",
        )


def fit(values: Tensor, batch: int, what: str) -> Tensor:
    """Repeat rows for beams.

    Raises
    ------
    InterventionError
        If the batch is no multiple of the rows.
    """
    if len(values) == 0 or batch % len(values):
        raise InterventionError(
            f"{what} for {len(values)} samples in a batch of {batch}",
            "give one row a sample, or run one batch",
        )
    return values.repeat_interleave(batch // len(values), dim=0) if len(values) < batch else values


def _last(empty: Tensor) -> Tensor:
    last = empty.clone()
    last[:, -1] = True
    return last
