"""How interventions take effect.

Edits of the residual stream act in order of entry; forwards are replaced. Both are always undone.
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
from xlvlms_tutorial.errors import InterventionError, LayerError, cannot_fold
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import NUMBERED, SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM

_POSITIONS = ("all", "last", "generated", *SPANS[1:-1])
# a function marks positions of the prompt in the batch that is running
Positions = str | tuple[str, ...] | Bool[Tensor, "b t"] | Callable[[Batch], Bool[Tensor, "b t"]]
Layers = int | Sequence[int]
Change = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]
Gate = Bool[Tensor, "b"] | Callable[[Float[Tensor, "b t d"]], Bool[Tensor, "b"]] | None


def checked_layers(vlm: VLM, layers: Layers, first: int = 1) -> list[int]:
    """Return layers as a list, each checked to be one of ``first`` to L.

    ``layers`` is one number or several, and ``vlm`` says what L is.

    Raises
    ------
    LayerError
        If a layer is out of range.
    """
    numbers = [layers] if isinstance(layers, Integral) else list(layers)
    for layer in numbers:
        if (
            isinstance(layer, bool)
            or not isinstance(layer, Integral)
            or not first <= layer <= vlm.n_layers
        ):
            raise LayerError(layer, first, vlm.n_layers)
    return [int(layer) for layer in numbers]


def refuse_folded(vlm: VLM, layers: Sequence[int], action: str) -> None:
    """Refuse an action that would undo a vector folded into a layer's bias.

    ``vlm`` and ``layers`` say where the action takes place; ``action`` names it in the message.

    Raises
    ------
    InterventionError
        If a vector is folded into one of these layers.
    """
    for layer in layers:
        if vlm.folded[layer]:
            raise cannot_fold(
                layer,
                f"a vector is folded into its bias, which {action} would silently undo or change",
            )


class Edit:
    """A change of the residual stream at selected positions of selected samples.

    ``additive`` means that it adds the same whatever the states are, and ``whole_prompt`` that it
    has to see the whole prompt at once.
    """

    def __init__(
        self,
        vlm: VLM,
        change: Change,
        positions: Positions,
        gate: Gate,
        additive: bool = False,
        whole_prompt: bool = False,
    ) -> None:
        positions = checked_positions(positions)
        names = positions if isinstance(positions, tuple) else ()
        self.vlm = vlm
        self.change = change
        self.positions = positions
        self.gate = gate
        self.additive = additive
        self.clock = Clock(vlm)
        self._whole_prompt = whole_prompt or callable(gate)
        self._everywhere = "all" in names
        self._on_generated = on_generated(positions)
        self._decided: Tensor | None = None  # the gate as decided at the prefill

    def __call__(self, states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return the states after the change."""
        self.clock.reached = True
        if self._whole_prompt and self.clock.partial:
            problem = (
                f"{self.clock.shape[1]} positions of a prompt that has {self.clock.prompt}, for a "
                "change that needs all of it"
            )
            raise InterventionError(
                problem, "run the whole prompt at once: no prefill in chunks, no cache from before"
            )
        if self.clock.decoding and not self._on_generated:
            return states
        mask = self._mask(states)
        if self.gate is not None:
            samples = self._gate_mask(states)[:, None]
            mask = samples if mask is None else mask & samples
        if mask is None:
            return self.change(states)
        if not mask.any():
            return states
        return torch.where(mask[..., None], self.change(states), states)

    def _mask(self, states: Tensor) -> Tensor | None:
        """Return where the states that are here now are edited; None stands for everywhere."""
        if self._everywhere or self.clock.decoding:
            return None
        mask = prompt_mask(self.vlm, self.positions, states.shape[:2], states.device)
        mask = fit(mask, len(states), "positions")
        # a prefill in chunks sees a part of the prompt, and without a cache every step sees the
        # generated tokens too
        start = 0 if self.vlm.running is None else self.clock.start
        end = start + states.shape[1]
        missing = max(0, end - mask.shape[1])
        padded = nn.functional.pad(mask, (0, missing), value=self._on_generated)
        return padded[:, start:end]

    def _gate_mask(self, states: Tensor) -> Bool[Tensor, "b"]:
        """Return the samples that are edited, as the gate decides at the prompt."""
        if self._decided is None or not self.clock.decoding:
            # without a cache a step sees its own tokens too; the gate is decided on the prompt
            batch = self.vlm.running
            prompt = states if batch is None else states[:, : batch["input_ids"].shape[1]]
            self._decided = self.gate(prompt) if callable(self.gate) else self.gate
        decided = self._decided.to(states.device, torch.bool)
        return fit(decided, len(states), "gate")


def _is_known(name: str) -> bool:
    """Whether positions have this name; pictures and earlier turns may be numbered."""
    return name in _POSITIONS or name.rpartition(" ")[0] in NUMBERED and name[-1].isdecimal()


def checked_positions(positions: Positions) -> Positions:
    """Return names of positions as a tuple, once they are checked; a mask or function as it is.

    Raises
    ------
    InterventionError
        If there is no name, or one is unknown.
    """
    if isinstance(positions, Tensor) or callable(positions):
        return positions
    names = (positions,) if isinstance(positions, str) else tuple(positions)
    if not names or not all(map(_is_known, names)):
        raise InterventionError(
            f"unknown positions {names!r}", f"allowed: {', '.join(_POSITIONS)}, or a mask (b, t)"
        )
    return names


def on_generated(positions: Positions) -> bool:
    """Tell whether checked positions go on over the tokens that are generated after the prompt."""
    names = positions if isinstance(positions, tuple) else ()
    return bool({"all", "last", "generated", "answer"} & set(names))


def prompt_mask(
    vlm: VLM, positions: Positions, shape: tuple[int, int], device: torch.device
) -> Bool[Tensor, "b t"]:
    """Mark checked positions in the prompts of the running batch.

    The batch is the one that ``vlm`` runs now, and ``positions`` names spans or is a mask.
    ``shape`` is that of the states (b, t, ...) at hand, for inputs of an unknown batch, and
    ``device`` where the mask is wanted.

    Raises
    ------
    InterventionError
        If a mask is for inputs of another length, or it is not known what stands where.
    SpanError
        If some sample has no such positions.
    """
    if isinstance(positions, Tensor):
        check_length(vlm, positions, "positions")
        return positions.to(device)
    batch = vlm.running
    if callable(positions):
        if batch is None:
            raise _unknown_inputs("chosen in the prompt")
        return positions(batch).to(device)
    mask = torch.zeros(shape if batch is None else batch.spans.shape, dtype=torch.bool)
    mask = mask.to(device)
    for name in positions:
        if name == "all":
            mask[:] = True
        elif name == "last" and batch is None:
            mask[:, -1] = True
        elif name == "last":
            mask |= batch.predicting.to(device)
        elif name in ("generated", "answer") and batch is None:
            continue  # inputs of an unknown batch are taken for a prompt
        elif name in ("generated", "answer"):
            mask |= (batch.spans == SPANS.index("answer")).to(device)
        elif batch is None:
            raise _unknown_inputs(repr(name))
        else:
            mask |= batch.mask(name).to(device)
    return mask


def _unknown_inputs(positions: str) -> InterventionError:
    return InterventionError(
        f"positions {positions} of unknown inputs", "run the model by vlm.forward or vlm.generate"
    )


@contextmanager
def edited(
    vlm: VLM,
    layers: Sequence[int],
    change: Change,
    positions: Positions,
    gate: Gate,
    additive: bool = False,
    whole_prompt: bool = False,
) -> Iterator[None]:
    """Apply a change to these layers; several nested ones act in order of entry.

    The parameters are those of :class:`Edit`: ``vlm``, ``layers``, ``change``, ``positions``,
    ``gate``, ``additive`` and ``whole_prompt``.
    """
    with ExitStack() as undo:
        for layer in layers:
            edit = Edit(vlm, change, positions, gate, additive, whole_prompt)
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
    """Suspend all edits inside this block."""
    suspended = {layer: list(queue) for layer, queue in vlm.edits.items()}
    for queue in vlm.edits.values():
        queue.clear()
    try:
        yield
    finally:
        for layer, queue in suspended.items():
            vlm.edits[layer][:] = queue  # in place: the hooks hold these lists


def _expect(vlm: VLM, layer: int, edit: Edit) -> torch.utils.hooks.RemovableHandle:
    """Stop the decoder if it ends without having reached this edit.

    Mllama leaves out its cross-attention blocks without a picture.
    """

    def ended(module: nn.Module, args: tuple, output: object) -> None:
        """Check, as a hook on ``module``, that its ``args`` and ``output`` passed this edit."""
        if edit in vlm.edits[layer] and not edit.clock.reached:
            problem = (
                f"layer {layer} is left out by the model for these inputs, so "
                "nothing can be changed there"
            )
            raise InterventionError(
                problem, "give a picture, or choose a layer that is computed without one"
            )

    return anatomy.decoder(vlm.model).register_forward_hook(ended)


def _install(vlm: VLM, layer: int, queue: list[Edit]) -> torch.utils.hooks.RemovableHandle:
    def run(states: Tensor) -> Tensor:
        for edit in queue:
            states = edit(states)
        return states

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """Edit what enters ``module``: the states among its ``args`` or ``kwargs``."""
        if args:
            return (run(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": run(kwargs["hidden_states"])}

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        """Edit the ``output`` of ``module``; its ``args`` are not used."""
        return anatomy.with_states(output, run(anatomy.states_of(output)))

    # first of all hooks: transformers' recorder of hidden states and our captures
    # then see what the next block sees
    if layer == 0:
        return vlm.blocks[0].register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    return vlm.blocks[layer - 1].register_forward_hook(after, prepend=True)


@contextmanager
def overridden(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Replace modules' ``forward`` by ``f(original, *args, **kwargs)``.

    Names, weights, hooks and recorders stay; only the computation is replaced.
    """
    instance_forwards = {module: module.__dict__.get("forward") for module in forwards}
    for module, function in forwards.items():
        module.forward = _bound(function, module.forward)
    try:
        yield
    finally:
        for module, forward in instance_forwards.items():
            del module.forward
            if forward is not None:  # someone else's override, accelerate's for instance
                module.forward = forward


def _bound(function: Callable, original: Callable) -> Callable:
    return lambda *args, **kwargs: function(original, *args, **kwargs)


def pad_cache(cache: Cache | None, index: int, states: Tensor) -> None:
    """Lengthen a skipped block's cache by what the block would have written.

    ``index`` is the block's number in ``cache``, and ``states`` what enters it. Masks and positions
    of all blocks are read off one block's length.
    """
    if cache is None:
        return
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is not None and not isinstance(layer, CacheLayerMixin):
        return  # linear attention and convolutions keep a state, which has no length
    batch, length = states.shape[:2]
    # an entry of width zero would count as length zero: the narrowest that counts is one head of
    # width one
    keys = values = states.new_empty(1, 1, 1, 1)
    if layer is not None and layer.is_initialized:
        keys, values = layer.keys, layer.values  # values may be narrower than keys
    no_keys = states.new_zeros(batch, keys.shape[1], length, keys.shape[-1])
    no_values = states.new_zeros(batch, values.shape[1], length, values.shape[-1])
    cache.update(no_keys, no_values, index)


def copy_cache(cache: Cache | None, index: int, length: int) -> bool:
    """Give a skipped block the previous block's keys and values, as the released code does.

    ``index`` is the block's number in ``cache``, and ``length`` the number of positions to copy.
    The result is False where the previous block has none to give.
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


def check_length(vlm: VLM, values: Tensor, name: str) -> None:
    """Refuse values that were made for inputs of another length.

    They would silently fall on other tokens. ``vlm`` knows the running batch, ``values`` is (b, t,
    ...), and ``name`` names them in the message.

    Raises
    ------
    InterventionError
        If the length is not that of the running batch.
    """
    if vlm.running is not None and values.shape[1] != (length := vlm.running["input_ids"].shape[1]):
        raise InterventionError(
            f"{name} for rows of {values.shape[1]} tokens in a batch of {length}",
            "make them for this batch",
        )


def fit(values: Tensor, batch: int, name: str) -> Tensor:
    """Repeat rows for beams, up to ``batch`` rows.

    ``values`` has one row for each sample, and ``name`` names it in the message.

    Raises
    ------
    InterventionError
        If the batch is no multiple of the rows.
    """
    if len(values) == 0 or batch % len(values):
        raise InterventionError(
            f"{name} for {len(values)} samples in a batch of {batch}",
            "give one row a sample, or run one batch",
        )
    return values.repeat_interleave(batch // len(values), dim=0) if len(values) < batch else values
