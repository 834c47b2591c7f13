"""Skip blocks, MLPs or attentions, or run them in parallel, with caches that stay correct.

What is skipped is not computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from xlvlms_tutorial.activations.clock import Clock
from xlvlms_tutorial.errors import InterventionError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.overrides import (
    Layers,
    checked_layers,
    copy_cache,
    overridden,
    pad_cache,
    refuse_folded,
)
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.support import require_support
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input, on_output

# the allowed values of the arguments part, scope, cache, norm and combine
PARTS = ("block", "mlp", "attention")
SCOPES = ("prefill", "decode", "both")
CACHES = ("own", "previous")
NORMS = ("first", "second")
_COMBINES = ("mean", "sum")


@recorded
@contextmanager
def skip(
    vlm: VLM, layers: Layers, part: str = "block", scope: str = "both", cache: str = "own"
) -> Iterator[None]:
    """Skip blocks, or their MLPs or attentions, in the prefill, in decode steps or in both.

    Use it to see which layers a model needs, and what skipping saves: what is skipped is not
    computed. A skipped block passes on its input; a skipped MLP or attention adds nothing (Shukor
    and Cord, 2024, Skipping Computations in Multimodal LLMs, arXiv 2410.09454).

    Parameters
    ----------
    vlm : VLM
        The model.
    layers : int or sequence of int
        The layers whose block is skipped, 1 to L.
    part : "block", "mlp" or "attention"
        What is skipped of each; the whole block by default.
    scope : "prefill", "decode" or "both"
        Whether the change is in force while the prompt is processed, in decode steps, or in both
        (default).
    cache : "own" or "previous"
        Which keys and values a decode step finds where the prefill skipped its block. "own"
        (default): the block's own, for which its attention still runs in the prefill (exact: only
        the outputs are bypassed). "previous": those of the block before it, which costs nothing (as
        the authors' code does). A block keeps its own if there is none before it, or one whose keys
        are not of its kind: linear attention and convolutions keep a state instead, windows hold
        less than the prompt, heads may differ. Where later blocks attend to a block's keys (Gemma
        4), its attention always runs.

    Returns
    -------
    context manager
        The change is in force inside ``with``.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If part, scope or cache has another value than those named, a model has more that does the
        part's work (experts beside an MLP), or a scope is requested in a generation without a
        cache. If a vector is folded into a block or MLP that would be skipped.
    AnatomyError
        If a block has no such part; ``vlm.supports("skip", part)`` tells before.

    Examples
    --------
    A skipped block passes on its input, the residual stream of the layer below:

    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import skip
    >>> with skip(vlm, 12):
    ...     states = read(vlm, batch, [11, 12], positions="last")
    >>> torch.equal(states[11, "resid_post"], states[12, "resid_post"])
    True
    """
    _require_allowed(part=(part, PARTS), scope=(scope, SCOPES), cache=(cache, CACHES))
    selected = checked_layers(vlm, layers)
    clock = Clock(vlm)
    blocks = [vlm.blocks[layer - 1] for layer in selected]
    require_support(blocks, vlm.refused, "skip", part)
    bypassed = []
    if part != "attention":
        refuse_folded(vlm, selected, "skipping")
        bypassed = selected
    make = {"block": _no_block, "mlp": _no_mlp, "attention": _no_attention}[part]
    previous = cache == "previous" and part == "block"
    forwards: dict[nn.Module, Callable] = {}
    for layer in selected:
        keeper = _CacheKeeper(vlm, layer, scope, previous, clock)
        for module, function in make(vlm, layer, keeper).items():
            forwards[module] = _scoped(scope, clock, function)
    with clock.ticking(), overridden(forwards), bypassing(vlm, bypassed):
        yield


@recorded
@contextmanager
def parallel(vlm: VLM, layers: Layers, norm: str = "first", scope: str = "both") -> Iterator[None]:
    r"""Run a block's MLP beside its attention instead of after it.

    Use it to see whether the order of the two matters. The block's output is :math:`x +
    \mathrm{attention}(\mathrm{LN}_1 x) + \mathrm{MLP}(\mathrm{LN} x)`. It saves no work, only
    depth.

    Parameters
    ----------
    vlm : VLM
        The model.
    layers : int or sequence of int
        The layers whose block is changed, 1 to L.
    norm : "first" or "second"
        Which of the block's two norms the MLP's input goes through: the "first" (default), shared
        with the attention (as the authors' code does), or the "second", its own.
    scope : "prefill", "decode" or "both"
        Whether the change is in force while the prompt is processed, in decode steps, or in both
        (default).

    Returns
    -------
    context manager
        The change is in force inside ``with``.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If ``norm`` or ``scope`` has another value than those named, or a scope is requested in a
        generation without a cache.
    AnatomyError
        If a block has no two norms or no single MLP; ``vlm.supports("parallel", norm)`` tells
        before.

    Examples
    --------
    The states differ from those of the usual order:

    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import parallel
    >>> usual = read(vlm, batch, 12, positions="last")[12, "resid_post"]
    >>> with parallel(vlm, 12):
    ...     states = read(vlm, batch, 12, positions="last")[12, "resid_post"]
    >>> states.shape, torch.equal(states, usual)
    (torch.Size([4, 1, 576]), False)
    """
    _require_allowed(norm=(norm, NORMS), scope=(scope, SCOPES))
    selected = checked_layers(vlm, layers)
    clock = Clock(vlm)
    require_support([vlm.blocks[layer - 1] for layer in selected], vlm.refused, "parallel", norm)
    forwards: dict[nn.Module, Callable] = {}
    with clock.ticking(), ExitStack() as stack:
        for layer in selected:
            block = vlm.blocks[layer - 1]
            entry = anatomy.mlp_entry(block)
            buffer: dict[str, Tensor] = {}
            # LN1's output goes into the MLP, or LN1's input, which is the block's, into LN2
            watch = on_output if norm == "first" else on_input
            save = partial(buffer.__setitem__, "states")
            stack.enter_context(watch(anatomy.first_norm(block), save))
            # by a hook: whatever replaces the MLP's forward may give it some of the positions only
            if norm == "first":
                hook = _mlp_input(buffer, scope, clock)
                stack.enter_context(entry.register_forward_pre_hook(hook, prepend=True))
            else:
                second_norm = anatomy.second_norm(block)
                forwards[second_norm] = _scoped(scope, clock, partial(_norm_of_saved, buffer))
        stack.enter_context(overridden(forwards))
        yield


@recorded
@contextmanager
def parallel_pairs(
    vlm: VLM, layers: Layers, combine: str = "mean", scope: str = "both"
) -> Iterator[None]:
    r"""Run block l and block l + 1 on the same input.

    Use it to see whether two consecutive blocks need each other. The pair's output is the mean of
    theirs, or their sum :math:`x + f_l(x) + f_{l+1}(x)`, where :math:`f` is what a block adds. Each
    block keeps its own keys and values.

    Parameters
    ----------
    vlm : VLM
        The model.
    layers : int or sequence of int
        The first layer l of each pair, 1 to L - 1; pairs do not overlap.
    combine : "mean" or "sum"
        How the outputs of a pair are combined; "mean" by default.
    scope : "prefill", "decode" or "both"
        Whether the change is in force while the prompt is processed, in decode steps, or in both
        (default).

    Returns
    -------
    context manager
        The change is in force inside ``with``.

    Raises
    ------
    LayerError
        If a pair is out of range.
    InterventionError
        If pairs overlap, ``combine`` or ``scope`` has another value than those named, or a scope is
        requested in a generation without a cache. If a vector is folded into a block of a pair.

    Examples
    --------
    Layer 13 is the sum of what both blocks make of layer 11:

    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.interventions import parallel_pairs, skip
    >>> with parallel_pairs(vlm, 12, combine="sum"):
    ...     states = read(vlm, batch, [11, 12, 13], positions="last")
    >>> with skip(vlm, 12):
    ...     second = read(vlm, batch, 13, positions="last")[13, "resid_post"]
    >>> expected = states[12, "resid_post"] + second - states[11, "resid_post"]
    >>> torch.allclose(states[13, "resid_post"], expected, atol=1e-3)
    True
    """
    _require_allowed(combine=(combine, _COMBINES), scope=(scope, SCOPES))
    firsts = checked_layers(vlm, layers)
    clock = Clock(vlm)
    paired = []
    for layer in firsts:
        paired += [layer, layer + 1]
    paired = checked_layers(vlm, paired)
    if len(set(paired)) < len(paired):
        raise InterventionError(
            f"pairs that overlap, starting at {firsts}", "give first blocks at least two apart"
        )
    refuse_folded(vlm, paired, "running blocks in pairs")
    forwards: dict[nn.Module, Callable] = {}
    for layer in firsts:
        leading, following = _pair(combine)
        forwards[vlm.blocks[layer - 1]] = _scoped(scope, clock, leading)
        forwards[vlm.blocks[layer]] = _scoped(scope, clock, following)
    with clock.ticking(), overridden(forwards), bypassing(vlm, paired):
        yield


def _pair(combine: str) -> tuple[Callable, Callable]:
    """Forwards of two blocks that run on the same input."""
    buffer: dict[str, Tensor] = {}

    def leading(original: Callable, *args: object, **kwargs: object) -> Tensor | tuple:
        buffer["states"] = anatomy.states_in(args, kwargs)
        return original(*args, **kwargs)

    def following(original: Callable, *args: object, **kwargs: object) -> Tensor | tuple:
        # the first block was left out, as cross-attention is without a picture
        if "states" not in buffer:
            return original(*args, **kwargs)
        first = anatomy.states_in(args, kwargs)
        start = buffer.pop("states")
        kwargs.pop("hidden_states", None)
        output = original(start, *args[1:], **kwargs)
        second = anatomy.states_of(output)
        if combine == "mean":
            return anatomy.with_states(output, (first + second) / 2)
        return anatomy.with_states(output, first + second - start)

    return leading, following


class _CacheKeeper:
    """Fill a skipped block's cache with the keys and values that later steps will read."""

    def __init__(self, vlm: VLM, layer: int, scope: str, previous: bool, clock: Clock) -> None:
        cross = anatomy.cross_attention_layers(vlm.model)
        self.index = layer - 1
        self.scope = scope
        self.clock = clock
        self.cross = layer in cross
        self.sharing = anatomy.key_sharing(vlm.blocks[layer - 1])
        self.previous = False
        if previous and layer > 1 and not {layer, layer - 1} & cross:
            before, block = vlm.blocks[layer - 2 : layer]
            self.previous = _same_shapes(before, block)

    def must_run(self, states: Tensor, kwargs: dict) -> bool:
        """Bring the cache in order; True if the attention itself has to run for that."""
        # keys that a block lends must be computed, with or without a cache; a borrower has none
        if self.sharing is not None:
            return self.sharing == "lends"
        cache = kwargs.get("past_key_values", kwargs.get("cache_params"))
        if cache is None:
            return False
        # a cross-attention block whose cache stays empty would be left out by the model
        # for the rest of the generation
        needed = not self.clock.decoding and (self.scope == "prefill" or self.cross)
        if not needed:
            if not self.cross:
                pad_cache(cache, self.index, states)
            return False
        return not (self.previous and copy_cache(cache, self.index, states.shape[1]))


def _no_block(vlm: VLM, layer: int, keeper: _CacheKeeper) -> dict[nn.Module, Callable]:
    block = vlm.blocks[layer - 1]

    def forward(original: Callable, *args: object, **kwargs: object) -> Tensor | tuple:
        states = anatomy.states_in(args, kwargs)
        if not keeper.must_run(states, kwargs):
            return states
        with overridden(_no_mlp(vlm, layer, keeper)):
            return anatomy.with_states(original(*args, **kwargs), states)

    return {block: forward}


def _no_mlp(vlm: VLM, layer: int, keeper: _CacheKeeper) -> dict[nn.Module, Callable]:
    """Return forwards in which the MLP of a block adds nothing."""

    def silent(part: nn.Module) -> Callable:
        return lambda original, states, *arguments: nothing(part, states, *arguments)

    return {part: silent(part) for part in anatomy.mlp_parts(vlm.blocks[layer - 1])}


# how many outputs a mixture of experts has beside the states
_EXTRA_OUTPUTS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def nothing(part: nn.Module, states: Tensor, *arguments: object) -> Tensor | tuple:
    """Return what an MLP, or a linear layer that is a part of it, gives when it adds nothing.

    ``part`` is the MLP, ``states`` its input, and ``arguments`` what else it is called with. Some
    mixtures of experts return their router's scores too: each runs once, for one position, to see
    whether it does.
    """
    width = getattr(part, "out_features", states.shape[-1])
    zeros = states.new_zeros(*states.shape[:-1], width)
    if anatomy.mixed(part) and part not in _EXTRA_OUTPUTS:
        one_position = []
        for argument in (states, *arguments):
            cut = isinstance(argument, Tensor)
            one_position.append(argument[:1, :1] if cut else argument)
        # the class's own function: the module's may be one that counts on all positions
        with torch.no_grad():
            output = type(part).forward(part, *one_position)
        _EXTRA_OUTPUTS[part] = len(output) - 1 if isinstance(output, tuple) else 0
    extra = _EXTRA_OUTPUTS.get(part, 0)
    return (zeros, *[None] * extra) if extra else zeros


def _no_attention(vlm: VLM, layer: int, keeper: _CacheKeeper) -> dict[nn.Module, Callable]:
    block = vlm.blocks[layer - 1]
    recurrent = anatomy.recurrent(block)  # it returns states only, an attention its weights too

    def forward(original: Callable, *args: object, **kwargs: object) -> Tensor | tuple:
        states = anatomy.states_in(args, kwargs)
        if keeper.must_run(states, kwargs):
            original(*args, **kwargs)
        zeros = states.new_zeros(*states.shape[:-1], vlm.width)
        return zeros if recurrent else (zeros, None)

    return {anatomy.attention(block): forward}


def _same_shapes(first: nn.Module, second: nn.Module) -> bool:
    """Whether one block's keys can replace the other's: their attentions have the same shapes."""
    shapes = []
    for block in (first, second):
        weights = anatomy.attention(block).named_parameters()
        shapes.append({name: weight.shape for name, weight in weights})
    return shapes[0] == shapes[1] and not anatomy.recurrent(second)


def _require_allowed(**options: tuple[str, Sequence[str]]) -> None:
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise InterventionError(f"unknown {name} {value!r}", f"allowed: {', '.join(allowed)}")


def _outside(scope: str, clock: Clock) -> bool:
    if scope != "both" and clock.mixed:
        problem = (
            f"scope {scope!r} without a cache, where each step runs the "
            "prompt and the answer together"
        )
        raise InterventionError(problem, "leave use_cache=False out, or use scope='both'")
    return scope == ("prefill" if clock.decoding else "decode")


def _scoped(scope: str, clock: Clock, function: Callable) -> Callable:
    def forward(original: Callable, *args: object, **kwargs: object) -> Tensor | tuple:
        if _outside(scope, clock):
            return original(*args, **kwargs)
        return function(original, *args, **kwargs)

    return forward


def _mlp_input(buffer: dict[str, Tensor], scope: str, clock: Clock) -> Callable:
    """A hook that gives the saved states to the MLP."""

    def hook(module: nn.Module, args: tuple) -> tuple:
        states = buffer.pop("states")
        return args if _outside(scope, clock) else (states.reshape(args[0].shape),)

    return hook


def _norm_of_saved(buffer: dict[str, Tensor], original: Callable, states: Tensor) -> Tensor:
    """The second norm, of the saved states in place of its own input."""
    return original(buffer.pop("states").reshape(states.shape))


@contextmanager
def bypassing(vlm: VLM, layers: Sequence[int]) -> Iterator[None]:
    """Refuse, inside this block, to fold a vector into these layers, whose work may not be done.

    ``vlm`` is the model, ``layers`` the numbers of the layers.
    """
    vlm.bypassed.update(layers)
    try:
        yield
    finally:
        vlm.bypassed.subtract(layers)
