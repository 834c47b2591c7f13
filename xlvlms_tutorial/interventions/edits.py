"""Change the residual stream or the weights of a model, inside ``with``.

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

from xlvlms_tutorial.errors import AnatomyError, InterventionError, cannot_fold
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
from xlvlms_tutorial.models.support import require_support
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_output


@recorded
@contextmanager
def edit(
    vlm: VLM, change: Change, layers: Layers, positions: Positions = "all", gate: Gate = None
) -> Iterator[None]:
    """Pass the residual stream of some layers through any function of your own.

    Use it for a change that ``add``, ``patch`` and ``ablate`` do not offer.

    Parameters
    ----------
    vlm : VLM
        The model.
    change : function
        Takes the states (b, t, d) of a layer and returns states of the same shape.
    layers : int or sequence of int
        The layers to change, 0 to L: 0 is what enters the first block, l what leaves block l.
    positions : str, tuple of str, or mask (b, t)
        Where: "all" (default); a span such as "image" or "question"; "last", the prompt's last
        position and all that follow; "generated", the answer's tokens; several of these in a tuple;
        or a boolean mask over the prompt.
    gate : mask (b,) or function, optional
        Which samples of a batch: a boolean mask, or a function that takes the states (b, t, d) and
        returns one; it is decided at the prefill. By default all samples.

    Returns
    -------
    context manager
        The change is in force inside ``with``.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If the positions are unknown, or the gate is for another number of samples. If a vector is
        folded into one of these layers.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import edit
    >>> plain = read(vlm, batch, 12)[12, "resid_post"]
    >>> with edit(vlm, lambda states: 2 * states, 12):
    ...     doubled = read(vlm, batch, 12)[12, "resid_post"]
    >>> torch.allclose(doubled, 2 * plain)
    True
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
    r"""Steer the model: add a vector to the residual stream, :math:`h \leftarrow h + \alpha s`.

    Use it to steer by a direction, such as a difference of means or a concept. ``fold`` does the
    same at no cost, at all positions.

    Parameters
    ----------
    vlm : VLM
        The model.
    vector : tensor (d,) or (b, d)
        The vector :math:`s`, one for all samples or one for each.
    layers : int or sequence of int
        The layers to change, 0 to L: 0 is what enters the first block, l what leaves block l.
    strength : float
        The factor :math:`\alpha`; 1 by default. A negative one steers away.
    positions : str, tuple of str, or mask (b, t)
        Where: "all" (default); a span such as "image" or "question"; "last", the prompt's last
        position and all that follow; "generated", the answer's tokens; several of these in a tuple;
        or a boolean mask over the prompt.
    gate : mask (b,) or function, optional
        Which samples of a batch: a boolean mask, or a function that takes the states (b, t, d) and
        returns one; it is decided at the prefill. By default all samples.

    Returns
    -------
    context manager
        The change is in force inside ``with``.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If vector, positions or gate do not fit the model or the batch.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import add
    >>> plain = read(vlm, batch, 12, positions="last")[12, "resid_post"]
    >>> with add(vlm, torch.ones(vlm.width), 12, strength=2.0):
    ...     steered = read(vlm, batch, 12, positions="last")[12, "resid_post"]
    >>> torch.allclose(steered, plain + 2, atol=1e-3)
    True
    """
    shift = _vector(vlm, strength * vector, "vector")
    selected = checked_layers(vlm, layers, first=0)

    def change(states: Tensor) -> Tensor:
        return states + _broadcast(shift, states)

    with edited(vlm, selected, change, positions, gate, additive=True):
        yield


@recorded
@contextmanager
def patch(
    vlm: VLM,
    states: Float[Tensor, "d"] | Float[Tensor, "b d"] | Float[Tensor, "b t d"],
    layers: Layers,
    positions: Positions = "all",
    gate: Gate = None,
) -> Iterator[None]:
    """Put other states in place of the model's own (activation patching).

    Use it to find out what a layer's states cause: patch in the states of another prompt or
    picture, or their mean.

    Parameters
    ----------
    vlm : VLM
        The model.
    states : tensor (d,), (b, d) or (b, t, d)
        The new states: one for all positions, one for each sample, or one for each position of the
        prompt. A tensor (b, t, d) leaves what is generated unchanged.
    layers : int or sequence of int
        The layers to change, 0 to L: 0 is what enters the first block, l what leaves block l.
    positions : str, tuple of str, or mask (b, t)
        Where: "all" (default); a span such as "image" or "question"; "last", the prompt's last
        position and all that follow; "generated", the answer's tokens; several of these in a tuple;
        or a boolean mask over the prompt.
    gate : mask (b,) or function, optional
        Which samples of a batch: a boolean mask, or a function that takes the states (b, t, d) and
        returns one; it is decided at the prefill. By default all samples.

    Returns
    -------
    context manager
        The change is in force inside ``with``.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If states, positions or gate do not fit the model or the batch. If a vector is folded into
        one of these layers.

    Examples
    --------
    Each sample gets the states of its neighbour in the batch:

    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import patch
    >>> patches = read(vlm, batch, 12)[12, "resid_post"].roll(1, dims=0)
    >>> with patch(vlm, patches, 12):
    ...     states = read(vlm, batch, 12)[12, "resid_post"]
    >>> torch.equal(states, patches)
    True
    """
    replacement = _vector(vlm, states, "states", 3)

    def change(current: Tensor) -> Tensor:
        if replacement.ndim < 3:
            return _broadcast(replacement, current).expand_as(current)
        check_length(vlm, replacement, "states")
        rows = fit(replacement, len(current), "states").to(current)
        if rows.shape[1] > current.shape[1]:
            return current  # a decode step: the replacement is for the prompt
        return torch.cat([rows, current[:, rows.shape[1] :]], dim=1)

    whole = replacement.ndim == 3
    with _edited(vlm, change, layers, positions, gate, "replacing states", whole_prompt=whole):
        yield


@recorded
@contextmanager
def ablate(
    vlm: VLM,
    directions: Float[Tensor, "d"] | Float[Tensor, "k d"],
    layers: Layers,
    strength: float = 1.0,
    positions: Positions = "all",
    gate: Gate = None,
) -> Iterator[None]:
    r"""Remove directions from the residual stream, :math:`h \leftarrow h - \alpha\, Q Q^\top h`.

    Use it to ablate a concept or a direction. Q is an orthonormal basis of the directions' span.

    Parameters
    ----------
    vlm : VLM
        The model.
    directions : tensor (d,) or (k, d)
        One direction or several; they are independent, and need not be orthogonal or of length 1.
    layers : int or sequence of int
        The layers to change, 0 to L: 0 is what enters the first block, l what leaves block l.
    strength : float
        The factor :math:`\alpha`: 1 (default) removes the directions, 2 reflects them.
    positions : str, tuple of str, or mask (b, t)
        Where: "all" (default); a span such as "image" or "question"; "last", the prompt's last
        position and all that follow; "generated", the answer's tokens; several of these in a tuple;
        or a boolean mask over the prompt.
    gate : mask (b,) or function, optional
        Which samples of a batch: a boolean mask, or a function that takes the states (b, t, d) and
        returns one; it is decided at the prefill. By default all samples.

    Returns
    -------
    context manager
        The change is in force inside ``with``.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If the directions are dependent, or do not fit the model. If a vector is folded into one of
        these layers.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import ablate
    >>> direction = torch.zeros(vlm.width)
    >>> direction[0] = 1.0
    >>> with ablate(vlm, direction, 12):
    ...     states = read(vlm, batch, 12)[12, "resid_post"]
    >>> float(states[..., 0].abs().max()) < 1e-3
    True
    """
    vectors = _vector(vlm, directions, "directions").cpu().double()
    matrix = torch.atleast_2d(vectors)
    _, singular, basis = torch.linalg.svd(matrix, full_matrices=False)
    independent = bool(singular[-1] > 1e-5 * singular[0])
    _require(
        len(matrix) <= vlm.width and independent,
        "directions that are zero or depend on each other",
        "give independent directions, none of them zero",
    )

    def change(states: Tensor) -> Tensor:
        # in half precision much of the direction would stay
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        q = basis.to(wide)
        removed = strength * (wide @ q.T) @ q
        return (wide - removed).to(states.dtype)

    with _edited(vlm, change, layers, positions, gate, "projecting out"):
        yield


@recorded
@contextmanager
def fold(
    vlm: VLM, vector: Float[Tensor, "d"], layers: Layers, strength: float = 1.0
) -> Iterator[None]:
    r"""Steer at no cost: fold a vector into a bias of each layer's block.

    Use it instead of ``add`` where all positions are steered at all times, as in a long generation.
    It adds :math:`\alpha s` to the bias of the last linear layer of the block's MLP. On entry it is
    measured that the block's output moves by just this vector.

    Parameters
    ----------
    vlm : VLM
        The model.
    vector : tensor (d,)
        The vector :math:`s`.
    layers : int or sequence of int
        The layers to steer, 1 to L; layer 0 has no block to fold into.
    strength : float
        The factor :math:`\alpha`; 1 by default.

    Returns
    -------
    context manager
        The vector is folded in inside ``with``.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If the vector does not fit the model. If the block does more to its MLP's output than add it
        (a norm after it, a gate, experts), or is bypassed. ``vlm.supports("fold", "mlp")`` tells
        before.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import add, fold
    >>> vector = torch.ones(vlm.width)
    >>> with fold(vlm, vector, 12):
    ...     folded = read(vlm, batch, 12, positions="last")[12, "resid_post"]
    >>> with add(vlm, vector, 12):
    ...     added = read(vlm, batch, 12, positions="last")[12, "resid_post"]
    >>> torch.allclose(folded, added, atol=1e-3)
    True
    """
    shift = _vector(vlm, strength * vector, "vector", 1)
    with _entered(_folded(vlm, shift, layer) for layer in checked_layers(vlm, layers)):
        yield


@recorded
@contextmanager
def mask_weights(vlm: VLM, masks: Mapping[str, Bool[Tensor, "out in"]]) -> Iterator[None]:
    """Set the weights that a mask excludes to zero.

    Use it to see what pruning does to the answers. It removes no work, so the model is not faster;
    on the way out the weights are restored exactly.

    Parameters
    ----------
    vlm : VLM
        The model.
    masks : dict of str to mask (out, in)
        For each linear layer, by its name in ``vlm.model.named_modules()``, a boolean mask of its
        weight's shape, True where a weight stays.

    Returns
    -------
    context manager
        The weights are masked inside ``with``.

    Raises
    ------
    InterventionError
        If a name is not a linear layer of the model, a shape differs, or the weight is quantised or
        shared with the embeddings.

    Examples
    --------
    >>> from xlvlms_tutorial.interventions import mask_weights
    >>> linear = vlm.blocks[0].mlp.down_proj
    >>> names = {module: name for name, module in vlm.model.named_modules()}
    >>> with mask_weights(vlm, {names[linear]: linear.weight > 0}):
    ...     print(bool((linear.weight < 0).any()))
    False
    >>> bool((linear.weight < 0).any())
    True
    """
    modules = dict(vlm.model.named_modules())
    pairs = [(_maskable(vlm, modules, name, mask), mask) for name, mask in masks.items()]
    saved = []
    try:
        with torch.no_grad():
            for weight, mask in pairs:
                # a copy is faster than gathering the masked weights, and needs no more memory
                saved.append((weight, weight.clone()))
                weight.masked_fill_(~mask.to(weight.device), 0)
        yield
    finally:
        with torch.no_grad():
            for weight, original in reversed(saved):
                weight.copy_(original)


@contextmanager
def _edited(
    vlm: VLM,
    change: Change,
    layers: Layers,
    positions: Positions,
    gate: Gate,
    action: str,
    whole_prompt: bool = False,
) -> Iterator[None]:
    selected = checked_layers(vlm, layers, first=0)
    refuse_folded(vlm, selected, action)
    with edited(vlm, selected, change, positions, gate, whole_prompt=whole_prompt):
        yield


@contextmanager
def _folded(vlm: VLM, shift: Tensor, layer: int) -> Iterator[None]:
    block = vlm.blocks[layer - 1]
    if vlm.bypassed[layer]:
        raise cannot_fold(
            layer,
            "its block or MLP is skipped or run in parallel here, so a bias of it may do nothing",
        )
    if not all(edit.additive for edit in vlm.edits.get(layer, ())):
        raise cannot_fold(
            layer,
            "a change of its states was entered before, and would now act after, on the vector too",
        )
    try:
        require_support([block], vlm.refused, "fold", "mlp")
    except AnatomyError as cause:
        raise cannot_fold(layer, "its MLP has no single last linear map") from cause
    except InterventionError as cause:
        raise cannot_fold(layer, str(cause).rstrip(".")) from cause
    linear = anatomy.mlp_exit(block)
    # under LoRA the bias belongs to the layer that is adapted
    linear = getattr(linear, "base_layer", linear)
    if linear.weight.is_meta:
        raise cannot_fold(layer, "its weights are offloaded and fetched anew for each step")
    own_bias = linear.bias
    try:
        baseline = _probe(vlm, block)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as cause:
        # Idefics needs its picture, Gemma 4 needs ids
        raise cannot_fold(
            layer, f"what it does cannot be measured by embeddings alone ({reason(cause)})"
        ) from cause
    bias = shift.to(linear.weight.device, vlm.dtype)
    vlm.folded[layer] += 1
    try:
        linear.bias = nn.Parameter(
            bias if own_bias is None else own_bias + bias, requires_grad=False
        )
        shifted = _probe(vlm, block)
        if baseline is None or not torch.allclose(
            shifted - baseline,
            bias.float().expand_as(baseline),
            rtol=0,
            atol=_tolerance(vlm, baseline, bias),
        ):
            raise cannot_fold(
                layer, "its block does not simply add its MLP's output to the residual stream"
            )
        yield
    finally:
        linear.bias = own_bias
        vlm.folded[layer] -= 1


@torch.no_grad()
def _probe(vlm: VLM, block: nn.Module) -> Tensor | None:
    """The block's output for two fixed embeddings, or None if the decoder leaves the block out.

    It leaves out cross-attention blocks without a picture.
    """
    outputs: list[Tensor] = []
    numbers = torch.linspace(-1, 1, 2 * vlm.width, device=vlm.device, dtype=vlm.dtype)
    embeddings = numbers.reshape(1, 2, -1)

    def keep(states: Tensor) -> None:
        outputs.append(states.float())

    # without edits, which may be for other inputs than these two embeddings
    with on_output(block, keep, prepend=True), unedited(vlm):
        anatomy.decoder(vlm.model)(inputs_embeds=embeddings, use_cache=False)
    return outputs[0] if outputs else None


def _tolerance(vlm: VLM, states: Tensor, shift: Tensor) -> float:
    # the sums are rounded in the model's dtype, at the size of their terms
    return 8 * torch.finfo(vlm.dtype).eps * float(states.abs().max() + shift.abs().max())


@contextmanager
def _entered(contexts: Iterator) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _vector(vlm: VLM, vector: Tensor, name: str, max_ndim: int = 2) -> Tensor:
    """Return finite vectors of the width of the residual stream, or refuse them."""
    _require(
        1 <= vector.ndim <= max_ndim and vector.shape[-1] == vlm.width,
        f"{name} of shape {tuple(vector.shape)}",
        f"the residual stream has width {vlm.width}",
    )
    finite = bool(torch.isfinite(vector).all())
    _require(finite, f"{name} with NaN or infinite values", "give finite values")
    return vector.detach()


def _broadcast(vectors: Tensor, states: Tensor) -> Tensor:
    """Bring vectors (d,) or (b, d) to a shape that broadcasts over states (b, t, d)."""
    rows = vectors.to(states.device, states.dtype, non_blocking=True)
    return rows if rows.ndim == 1 else fit(rows, len(states), "vectors")[:, None]


def _maskable(vlm: VLM, modules: dict[str, nn.Module], name: str, mask: Tensor) -> Tensor:
    """Return the weights of a linear map that a mask can be for, or refuse it."""
    weight = getattr(modules.get(name), "weight", None)
    _require(
        weight is not None and weight.ndim == 2,
        f"{name!r} is no linear map of the model",
        "give names as in vlm.model.named_modules()",
    )
    _require(
        not weight.is_meta,
        f"{name!r} is offloaded, its weights cannot be masked in place",
        "load the whole model onto one device",
    )
    _require(
        weight.is_floating_point() and type(weight) is nn.Parameter,
        f"{name!r} is quantised, its weights cannot be masked in place",
        "load the model without quantise",
    )
    embeddings = vlm.model.get_input_embeddings().weight
    _require(
        weight.data_ptr() != embeddings.data_ptr(),
        f"{name!r} shares its weights with the embeddings",
        "mask the decoder's own linear maps",
    )
    shape = tuple(weight.shape)
    _require(
        mask.dtype == torch.bool and tuple(mask.shape) == shape,
        f"mask of {name!r} is {mask.dtype} {tuple(mask.shape)}",
        f"give booleans of shape {shape}",
    )
    return weight


def _require(condition: bool, problem: str, advice: str) -> None:
    if not condition:
        raise InterventionError(problem, advice)
