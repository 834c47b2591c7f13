"""Change the residual stream or leave out work, inside ``with``.

Every change nests, and is undone on the way out, even by an error. Layers are numbered as
everywhere: 0 is what enters the first block, l what leaves block l. ``positions`` is ``"all"``,
a span (``"image"``, ``"question"``, ...), ``"last"`` (the predicting positions: the prompt's
last and all that follow), ``"generated"`` (the answer's tokens), several of these in a tuple, or
a mask (b, t) over the prompt.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xlvlms_tutorial.errors import AnatomyError, FoldError, InterventionError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.overrides import (
    Change,
    Gate,
    Layers,
    Positions,
    check_length,
    checked_layers,
    edited,
    fit,
    refuse_folded,
    unedited,
)
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.failures import reason
from xlvlms_tutorial.models.support import require
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_output


@recorded
@contextmanager
def edit(
    vlm: VLM, change: Change, layers: Layers, positions: Positions = "all", gate: Gate = None
) -> Iterator[None]:
    """Pass the residual stream (b, t, d) of these layers through any function of your own.

    At these positions of the samples let in. ``gate`` is a mask over the samples of a batch, or a
    function of the states that gives one, decided at the prefill.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If the positions are unknown, or the gate is for another number of samples.
    FoldError
        If a vector is folded into one of these layers.
    """
    with _edited(vlm, change, layers, positions, gate, "an edit"):
        yield


@recorded
@contextmanager
def add(
    vlm: VLM,
    vector: Float[Tensor, "d"] | Float[Tensor, "b d"],
    layers: Layers,
    strength: float = 1.0,
    positions: Positions = "all",
    gate: Gate = None,
) -> Iterator[None]:
    r"""Steer: :math:`h \leftarrow h + \alpha s`.

    The vector is ``s`` (one for all, or one a sample), the strength :math:`\alpha`.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If vector, positions or gate do not fit the model or the batch.
    """
    shift = _vector(vlm, strength * vector, "vector")
    chosen = checked_layers(vlm, layers, first=0)
    with edited(
        vlm, chosen, lambda states: states + _rows(shift, states), positions, gate, adds=True
    ):
        yield


@recorded
@contextmanager
def replace(
    vlm: VLM,
    states: Float[Tensor, "d"] | Float[Tensor, "b d"] | Float[Tensor, "b t d"],
    layers: Layers,
    positions: Positions = "all",
    gate: Gate = None,
) -> Iterator[None]:
    """Put other states in place of the model's own.

    One for all, one a sample, or (activation patching) one a position of the prompt.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If states, positions or gate do not fit the model or the batch.
    FoldError
        If a vector is folded into one of these layers.
    """
    given = _vector(vlm, states, "states", most=3)

    def change(own: Tensor) -> Tensor:
        if given.ndim < 3:
            return _rows(given, own).expand_as(own)
        check_length(vlm, given, "states")
        rows = fit(given, len(own), "states").to(own)
        if rows.shape[1] > own.shape[1]:
            return own  # a decode step: the states given are the prompt's
        return torch.cat([rows, own[:, rows.shape[1] :]], dim=1)

    with _edited(vlm, change, layers, positions, gate, "replacing states", whole=given.ndim == 3):
        yield


@recorded
@contextmanager
def project_out(
    vlm: VLM,
    directions: Float[Tensor, "d"] | Float[Tensor, "k d"],
    layers: Layers,
    strength: float = 1.0,
    positions: Positions = "all",
    gate: Gate = None,
) -> Iterator[None]:
    r"""Remove directions: :math:`h \leftarrow h - \alpha\, Q Q^\top h`.

    Q is an orthonormal basis of their span.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If the directions are dependent, or do not fit the model.
    FoldError
        If a vector is folded into one of these layers.
    """
    given = torch.atleast_2d(_vector(vlm, directions, "directions").cpu().double())
    _, singular, basis = torch.linalg.svd(given, full_matrices=False)
    if len(given) > vlm.width or singular[-1] <= 1e-5 * singular[0] or singular[0] == 0:
        raise InterventionError(
            "directions that are zero or depend on each other",
            "give independent directions, none of them zero",
        )

    def change(states: Tensor) -> Tensor:
        # in half precision much of the direction would stay
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        q = basis.to(wide)
        return (wide - strength * (wide @ q.T) @ q).to(states.dtype)

    with _edited(vlm, change, layers, positions, gate, "projecting out"):
        yield


@recorded
@contextmanager
def fold(
    vlm: VLM, vector: Float[Tensor, "d"], layers: Layers, strength: float = 1.0
) -> Iterator[None]:
    r"""Steer at no cost, at all positions at all times.

    Adds :math:`\alpha s` to the bias of the last linear map of a block's MLP. That the block's
    output moves by just this vector is measured on entry.

    Raises
    ------
    LayerError
        If a layer is out of range; layer 0 has no block to fold into.
    InterventionError
        If the vector does not fit the model.
    FoldError
        If the block does more to its MLP's output than add it (a norm after it, a
        gate, experts), or is bypassed.
    """
    shift = _vector(vlm, strength * vector, "vector", most=1)
    with _each(_folded(vlm, shift, layer) for layer in checked_layers(vlm, layers)):
        yield


@recorded
@contextmanager
def mask_weights(vlm: VLM, masks: Mapping[str, Bool[Tensor, "out in"]]) -> Iterator[None]:
    """Set the weights that a mask does not keep to zero, by module name.

    A mask is True where a weight is kept. They return exactly. This removes no work: it shows what
    pruning does to the answers, not to the clock.

    Raises
    ------
    InterventionError
        If a name is no linear map of the model, a shape differs, or the weight is quantised
        or shared with the embeddings.
    """
    modules = dict(vlm.model.named_modules())
    pairs = [(_maskable(vlm, modules, name, mask), mask) for name, mask in masks.items()]
    saved = []
    try:
        with torch.no_grad():
            for weight, mask in pairs:
                # a copy is faster than gathering what goes, and takes no more with its mask
                saved.append((weight, weight.clone()))
                weight.masked_fill_(~mask.to(weight.device), 0)
        yield
    finally:
        with torch.no_grad():
            for weight, before in reversed(saved):
                weight.copy_(before)


@contextmanager
def _edited(
    vlm: VLM,
    change: Change,
    layers: Layers,
    positions: Positions,
    gate: Gate,
    what: str,
    whole: bool = False,
) -> Iterator[None]:
    chosen = checked_layers(vlm, layers, first=0)
    refuse_folded(vlm, chosen, what)
    with edited(vlm, chosen, change, positions, gate, whole=whole):
        yield


@contextmanager
def _folded(vlm: VLM, shift: Tensor, layer: int) -> Iterator[None]:
    block = vlm.blocks[layer - 1]
    if vlm.bypassed[layer]:
        raise FoldError(
            layer,
            "its block or MLP is skipped or run in parallel here, so a bias of it may do nothing",
        )
    if not all(edit.adds for edit in vlm.edits.get(layer, ())):
        raise FoldError(
            layer,
            "a change of its states was entered before, and would now act after, on the vector too",
        )
    try:
        require(vlm, "fold", "mlp", [layer])
    except AnatomyError as cause:
        raise FoldError(layer, "its MLP has no single last linear map") from cause
    except InterventionError as cause:
        raise FoldError(layer, str(cause).rstrip(".")) from cause
    linear = anatomy.mlp_exit(block)
    # under LoRA the bias belongs to the layer that is adapted
    linear = getattr(linear, "base_layer", linear)
    if linear.weight.is_meta:
        raise FoldError(layer, "its weights are offloaded and fetched anew for each step")
    before = linear.bias
    try:
        plain = _probe(vlm, block)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as cause:
        # Idefics needs its picture, Gemma 4 ids
        raise FoldError(
            layer, f"what it does cannot be measured by embeddings alone ({reason(cause)})"
        ) from cause
    bias = shift.to(linear.weight.device, vlm.dtype)
    vlm.folded[layer] += 1
    try:
        linear.bias = nn.Parameter(bias if before is None else before + bias, requires_grad=False)
        moved = _probe(vlm, block)
        if plain is None or not torch.allclose(
            moved - plain, bias.float().expand_as(plain), rtol=0, atol=_tolerance(vlm, plain, bias)
        ):
            raise FoldError(
                layer, "its block does not simply add its MLP's output to the residual stream"
            )
        yield
    finally:
        linear.bias = before
        vlm.folded[layer] -= 1


@torch.no_grad()
def _probe(vlm: VLM, block: nn.Module) -> Tensor | None:
    """The block's output for two fixed embeddings, or None if the decoder leaves it out.

    It leaves out cross-attention without a picture.
    """
    seen: list[Tensor] = []
    embeddings = torch.linspace(-1, 1, 2 * vlm.width, device=vlm.device, dtype=vlm.dtype).reshape(
        1, 2, -1
    )
    # without edits, which may be for other inputs than these two embeddings
    with on_output(block, lambda states: seen.append(states.float()), prepend=True), unedited(vlm):
        anatomy.decoder(vlm.model)(inputs_embeds=embeddings, use_cache=False)
    return seen[0] if seen else None


def _tolerance(vlm: VLM, states: Tensor, shift: Tensor) -> float:
    # the sums are rounded in the model's number format, at the size of what is summed
    return 8 * torch.finfo(vlm.dtype).eps * float(states.abs().max() + shift.abs().max())


@contextmanager
def _each(contexts: Iterator) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _vector(vlm: VLM, given: Tensor, what: str, most: int = 2) -> Tensor:
    if not 1 <= given.ndim <= most or given.shape[-1] != vlm.width:
        raise InterventionError(
            f"{what} of shape {tuple(given.shape)}", f"the residual stream has width {vlm.width}"
        )
    if not torch.isfinite(given).all():
        raise InterventionError(f"{what} with NaN or infinite values", "give finite values")
    return given.detach()


def _rows(vectors: Tensor, states: Tensor) -> Tensor:
    """Vectors (d,) or (b, d) so that they broadcast over states (b, t, d)."""
    moved = vectors.to(states.device, states.dtype, non_blocking=True)
    return moved if moved.ndim == 1 else fit(moved, len(states), "vectors")[:, None]


def _maskable(vlm: VLM, modules: dict[str, nn.Module], name: str, mask: Tensor) -> Tensor:
    weight = getattr(modules.get(name), "weight", None)
    if weight is None or weight.ndim != 2:
        raise InterventionError(
            f"{name!r} is no linear map of the model", "give names as in vlm.model.named_modules()"
        )
    if weight.is_meta:
        raise InterventionError(
            f"{name!r} is offloaded, its weights cannot be masked in place",
            "load the whole model onto one device",
        )
    if not weight.is_floating_point() or type(weight) is not nn.Parameter:
        raise InterventionError(
            f"{name!r} is quantised, its weights cannot be masked in place",
            "load the model without quantise",
        )
    if weight.data_ptr() == vlm.model.get_input_embeddings().weight.data_ptr():
        raise InterventionError(
            f"{name!r} shares its weights with the embeddings", "mask the decoder's own linear maps"
        )
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise InterventionError(
            f"mask of {name!r} is {mask.dtype} {tuple(mask.shape)}",
            f"give booleans of shape {tuple(weight.shape)}",
        )
    return weight
