"""Leave out blocks, MLPs or attentions, or run them side by side, with caches that stay correct.

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
from xlvlms_tutorial.models.support import require
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input, on_output

PARTS = ("block", "mlp", "attention")
SCOPES = ("prefill", "decode", "both")
CACHES = ("own", "previous")
NORMS = ("first", "second")
COMBINES = ("mean", "sum")


@recorded
@contextmanager
def skip(
    vlm: VLM, layers: Layers, part: str = "block", scope: str = "both", cache: str = "own"
) -> Iterator[None]:
    """Skip blocks, or their MLPs or attentions, in the prefill, in decode steps or in both.

    Shukor and Cord, 2024, Skipping Computations. A skipped block hands on what it was given, a
    skipped MLP or attention adds nothing. Where decode steps run a block that the prefill skipped,
    they find in its cache its ``own`` keys and values, for which its attention still runs in the
    prefill (exact: only the outputs are bypassed), or those of the ``previous`` block, which costs
    nothing (as the authors' code does). A block keeps its own if there is none before it, or one
    whose keys are not of its kind: linear attention and convolutions keep a state instead, windows
    hold less than the prompt, heads may differ. Where later blocks attend to a block's keys
    (Gemma 4), its attention always runs.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If part, scope or cache has another value than those named, a model has more
        that does the part's work (experts beside an MLP), or a scope is asked for
        in a generation without a cache.
    AnatomyError
        If a block has no such part; ``vlm.supports("skip", part)`` says so before.
    FoldError
        If a vector is folded into a block or MLP that would be skipped.
    """
    _known(part=(part, PARTS), scope=(scope, SCOPES), cache=(cache, CACHES))
    chosen, clock = checked_layers(vlm, layers), Clock(vlm)
    require(vlm, "skip", part, chosen)
    if part != "attention":
        refuse_folded(vlm, chosen, "skipping")
    make = {"block": _no_block, "mlp": _no_mlp, "attention": _no_attention}[part]
    forwards: dict[nn.Module, Callable] = {}
    for layer in chosen:
        keeps = _Keeps(vlm, layer, scope, cache == "previous" and part == "block", clock)
        forwards |= {
            module: _scoped(scope, clock, function)
            for module, function in make(vlm, layer, keeps).items()
        }
    with (
        clock.ticking(),
        overridden(forwards),
        bypassing(vlm, chosen if part != "attention" else []),
    ):
        yield


@recorded
@contextmanager
def parallel(vlm: VLM, layers: Layers, norm: str = "first", scope: str = "both") -> Iterator[None]:
    r"""Run a block's MLP beside its attention instead of after it.

    The block's output is :math:`x + \mathrm{attention}(\mathrm{LN}_1 x) +
    \mathrm{MLP}(\mathrm{LN} x)`, where ``norm`` says which of the block's two norms the MLP's
    input goes through: the ``first``, shared with the attention (as the authors' code does), or
    the ``second``, its own. No work goes, only depth.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InterventionError
        If ``norm`` or ``scope`` has another value than those named, or a scope is asked for
        in a generation without a cache.
    AnatomyError
        If a block has no two norms or no single MLP;
        ``vlm.supports("parallel", norm)`` says so before.
    """
    _known(norm=(norm, NORMS), scope=(scope, SCOPES))
    chosen, clock = checked_layers(vlm, layers), Clock(vlm)
    require(vlm, "parallel", norm, chosen)
    forwards: dict[nn.Module, Callable] = {}
    with clock.ticking(), ExitStack() as stack:
        for layer in chosen:
            block, seen = vlm.blocks[layer - 1], {}
            entry = anatomy.mlp_entry(block)
            # LN1's output goes into the MLP, or LN1's input, which is the block's, into LN2
            watch = on_output if norm == "first" else on_input
            stack.enter_context(
                watch(anatomy.first_norm(block), partial(seen.__setitem__, "states"))
            )
            # by a hook: whatever replaces the MLP's forward may give it some of the positions only
            if norm == "first":
                stack.enter_context(
                    entry.register_forward_pre_hook(_giver(seen, scope, clock), prepend=True)
                )
            else:
                own = lambda original, given, seen=seen: original(
                    seen.pop("states").reshape(given.shape)
                )
                forwards[anatomy.second_norm(block)] = _scoped(scope, clock, own)
        stack.enter_context(overridden(forwards))
        yield


@recorded
@contextmanager
def parallel_pairs(
    vlm: VLM, layers: Layers, combine: str = "mean", scope: str = "both"
) -> Iterator[None]:
    r"""Run block l and block l + 1 on the same input.

    The pair's output is the ``mean`` of theirs, or (``sum``) :math:`x + f_l(x) + f_{l+1}(x)`,
    where ``f`` is what a block adds. ``layers`` names the first block of each pair. Each block
    keeps the keys and values of its own.

    Raises
    ------
    LayerError
        If a pair is out of range.
    InterventionError
        If pairs overlap, or ``combine`` or ``scope`` has another value than those named.
    FoldError
        If a vector is folded into a block of a pair.
    """
    _known(combine=(combine, COMBINES), scope=(scope, SCOPES))
    firsts, clock = checked_layers(vlm, layers), Clock(vlm)
    both = checked_layers(vlm, [layer + k for layer in firsts for k in (0, 1)])
    if len(set(both)) < len(both):
        raise InterventionError(
            f"pairs that overlap, starting at {firsts}", "give first blocks at least two apart"
        )
    refuse_folded(vlm, both, "running blocks in pairs")
    forwards: dict[nn.Module, Callable] = {}
    for layer in firsts:
        seen: dict[str, Tensor] = {}

        def leading(
            original: Callable, *args: object, seen: dict = seen, **kwargs: object
        ) -> Tensor | tuple:
            seen["states"] = anatomy.states_in(args, kwargs)
            return original(*args, **kwargs)

        def following(
            original: Callable, *args: object, seen: dict = seen, **kwargs: object
        ) -> Tensor | tuple:
            # the first was left out, as cross-attention is without a picture
            if "states" not in seen:
                return original(*args, **kwargs)
            first, start = anatomy.states_in(args, kwargs), seen.pop("states")
            output = original(
                start, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"}
            )
            second = anatomy.states_of(output)
            return anatomy.with_states(
                output, (first + second) / 2 if combine == "mean" else first + second - start
            )

        pair = {vlm.blocks[layer - 1]: leading, vlm.blocks[layer]: following}
        forwards |= {block: _scoped(scope, clock, function) for block, function in pair.items()}
    with clock.ticking(), overridden(forwards), bypassing(vlm, both):
        yield


class _Keeps:
    """Whether a skipped block's cache must hold keys and values that later steps will read.

    And how it gets them.
    """

    def __init__(self, vlm: VLM, layer: int, scope: str, previous: bool, clock: Clock) -> None:
        cross = anatomy.cross_attention_layers(vlm.model)
        self.index, self.scope, self.clock = layer - 1, scope, clock
        self.cross = layer in cross
        self.sharing = anatomy.key_sharing(vlm.blocks[layer - 1])
        self.previous = (
            previous
            and layer > 1
            and not {layer, layer - 1} & cross
            and _alike(*vlm.blocks[layer - 2 : layer])
        )

    def must_run(self, states: Tensor, kwargs: dict) -> bool:
        """Bring the cache in order; True if the attention itself has to run for that."""
        # what is lent must be made, cache or not; who borrows keeps nothing
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


def _no_block(vlm: VLM, layer: int, keeps: _Keeps) -> dict[nn.Module, Callable]:
    block = vlm.blocks[layer - 1]

    def forward(original: Callable, *args: object, **kwargs: object) -> Tensor | tuple:
        states = anatomy.states_in(args, kwargs)
        if not keeps.must_run(states, kwargs):
            return states
        with overridden(_no_mlp(vlm, layer, keeps)):
            return anatomy.with_states(original(*args, **kwargs), states)

    return {block: forward}


def _no_mlp(vlm: VLM, layer: int, keeps: _Keeps) -> dict[nn.Module, Callable]:
    def silent(part: nn.Module) -> Callable:
        return lambda original, states, *more: nothing(part, states, *more)

    return {part: silent(part) for part in anatomy.mlp_parts(vlm.blocks[layer - 1])}


# how many things a mixture of experts returns beside the states
_BESIDE: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def nothing(part: nn.Module, states: Tensor, *more: object) -> Tensor | tuple:
    """What an MLP, or a linear map that is a part of it, returns when it adds nothing.

    Some mixtures of experts return their router's scores too: each runs once, for one
    position, to see whether it does.
    """
    zeros = states.new_zeros(*states.shape[:-1], getattr(part, "out_features", states.shape[-1]))
    if anatomy.mixed(part) and part not in _BESIDE:
        one = [given[:1, :1] if isinstance(given, Tensor) else given for given in (states, *more)]
        # the class's own function: the module's may be one that counts on all positions
        with torch.no_grad():
            made = type(part).forward(part, *one)
        _BESIDE[part] = len(made) - 1 if isinstance(made, tuple) else 0
    beside = _BESIDE.get(part, 0)
    return (zeros, *[None] * beside) if beside else zeros


def _no_attention(vlm: VLM, layer: int, keeps: _Keeps) -> dict[nn.Module, Callable]:
    block = vlm.blocks[layer - 1]
    alone = anatomy.recurrent(block)  # it gives its states alone, an attention weights too

    def forward(original: Callable, *args: object, **kwargs: object) -> Tensor | tuple:
        states = anatomy.states_in(args, kwargs)
        if keeps.must_run(states, kwargs):
            original(*args, **kwargs)
        made = states.new_zeros(*states.shape[:-1], vlm.width)
        return made if alone else (made, None)

    return {anatomy.attention(block): forward}


def _alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether one block's keys can stand for the other's: made by attentions of the same shapes."""
    shapes = [
        {name: weight.shape for name, weight in anatomy.attention(block).named_parameters()}
        for block in (first, second)
    ]
    return shapes[0] == shapes[1] and not anatomy.recurrent(second)


def _known(**given: tuple[str, Sequence[str]]) -> None:
    for name, (value, allowed) in given.items():
        if value not in allowed:
            raise InterventionError(f"unknown {name} {value!r}", f"allowed: {', '.join(allowed)}")


def _outside(scope: str, clock: Clock) -> bool:
    if scope != "both" and clock.mixed:
        what = (
            f"scope {scope!r} without a cache, where each step runs the "
            "prompt and the answer together"
        )
        raise InterventionError(what, "leave use_cache=False out, or use scope='both'")
    return scope == ("prefill" if clock.decoding else "decode")


def _scoped(scope: str, clock: Clock, function: Callable) -> Callable:
    def forward(original: Callable, *args: object, **kwargs: object) -> Tensor | tuple:
        if _outside(scope, clock):
            return original(*args, **kwargs)
        return function(original, *args, **kwargs)

    return forward


def _giver(seen: dict[str, Tensor], scope: str, clock: Clock) -> Callable:
    def give(module: nn.Module, args: tuple) -> tuple:
        states = seen.pop("states")
        return args if _outside(scope, clock) else (states.reshape(args[0].shape),)

    return give


@contextmanager
def bypassing(vlm: VLM, layers: Sequence[int]) -> Iterator[None]:
    """Let nothing be folded into these layers meanwhile, whose work may not be done."""
    vlm.bypassed.update(layers)
    try:
        yield
    finally:
        vlm.bypassed.subtract(layers)
