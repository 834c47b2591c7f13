"""Self-checks of what can be done at single sites of a block.

What fails is refused there, and the model loads with less.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from xlvlms_tutorial.errors import InterventionError
from xlvlms_tutorial.interventions import add, fold, skip  # what is checked is what users call
from xlvlms_tutorial.loading.measured import Outcome, apart, greedy_logits, rounding, words_of
from xlvlms_tutorial.models import anatomy, support
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input

STEPS = 3  # of a check of skipping: the prefill's token, and two decode steps


def middle_between(vlm: VLM, batch: Batch) -> Outcome:
    """What enters the norm before the MLP is the block's input with what the attention adds.

    Without the attention, the input alone.
    """
    layers = _kinds(vlm, "read", "resid_mid")
    if not layers:
        return False, "no block has a norm before its MLP"
    for layer in layers:
        start, middle = _between(vlm, batch, layer, attention=True)
        start_without, middle_without = _between(vlm, batch, layer, attention=False)
        words = words_of(batch)
        if not apart(middle[words], start[words]) > 0:
            return False, (
                f"layer {layer}: it is the block's input, as where attention "
                "and MLP run side by side"
            )
        share = apart(middle_without[words], start_without[words])
        if not share <= rounding(vlm):
            return False, (
                f"layer {layer}: without the attention it differs from the "
                f"block's input by {share:.1e}"
            )
    return True, f"in layers {', '.join(map(str, layers))}"


def _skipped(part: str) -> Callable[[VLM, Batch], Outcome]:
    def check(vlm: VLM, batch: Batch) -> Outcome:
        layers = _kinds(vlm, "skip", part)
        if not layers:
            return False, str(support.refusal(vlm.blocks[0], "skip", part))
        worst = 0.0
        # each layer once in the prefill and once in decode steps, beside
        # another one that does the opposite
        for pattern in (("prefill", "decode"), ("decode", "prefill")):
            scopes = dict(zip(layers, cycle(pattern), strict=False))
            with ExitStack() as stack:
                for layer, scope in scopes.items():
                    stack.enter_context(skip(vlm, layer, part, scope))
                ours = greedy_logits(vlm, batch, use_cache=True, steps=STEPS)
            with _without(vlm, part, scopes, batch["input_ids"].shape):
                theirs = greedy_logits(vlm, batch, use_cache=False, steps=STEPS)
            worst = max(worst, _steps_apart(ours, theirs))
        detail = (
            f"layers {', '.join(map(str, layers))} in prefill and decode: "
            f"largest difference {worst:.1e}"
        )
        return worst <= rounding(vlm), detail

    check.__doc__ = (
        f"The {part} skipped with a cache, in the prefill and in decode steps, is the {part} "
        "that adds nothing without one."
    )
    return check


def fold_adds(vlm: VLM, batch: Batch) -> Outcome:
    """A vector folded into the bias of an MLP is added to its output, or folding is refused."""
    layer = min(2, vlm.n_layers)
    vector = torch.linspace(-1, 1, vlm.width)
    try:
        with fold(vlm, vector, layer):
            folded = vlm.forward(batch).logits
    except InterventionError as refused:
        vlm.refused["fold", "mlp"] = str(refused)
        return True, f"refused: {refused}"
    with add(vlm, vector, layer):
        added = vlm.forward(batch).logits
    share = apart(folded[words_of(batch)], added[words_of(batch)])
    return share <= rounding(vlm), f"largest difference {share:.1e}"


SITE_CHECKS: dict[str, Callable[[VLM, Batch], Outcome]] = {
    "between attention and MLP": middle_between,
    "block skipped": _skipped("block"),
    "MLP skipped": _skipped("mlp"),
    "attention skipped": _skipped("attention"),
    "fold": fold_adds,
}
# What is refused where one of these fails: what is done, and at which site
HANGS_ON: dict[str, tuple[tuple[str, str], ...]] = {
    "between attention and MLP": (
        ("read", "resid_mid"),
        ("read", "mlp_in"),
        ("parallel", "first"),
        ("parallel", "second"),
    ),
    "block skipped": (("skip", "block"),),
    "MLP skipped": (("skip", "mlp"),),
    "attention skipped": (("skip", "attention"),),
    "fold": (("fold", "mlp"),),
}


def _kinds(vlm: VLM, action: str, site: str) -> list[int]:
    """Return a layer of each kind of block that allows something at a site.

    The first two such layers are always among them: masks are read off the first.
    """
    config = vlm.model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or [None] * vlm.n_layers
    layers = range(1, vlm.n_layers + 1)
    allowed = [layer for layer in layers if vlm.supports(action, site, layer)]
    first: dict[object, int] = {}
    for layer in allowed:
        block = vlm.blocks[layer - 1]
        parts = [anatomy.attention(block), *anatomy.mlp_parts(block)]
        layer_type = kinds[layer - 1] if layer <= len(kinds) else None
        kind = (*map(type, parts), layer_type)
        first.setdefault(kind, layer)
    return sorted({*allowed[:2], *first.values()})


def _between(vlm: VLM, batch: Batch, layer: int, attention: bool) -> tuple[Tensor, Tensor]:
    """Return what enters a block, and what enters its second norm.

    Without ``attention`` its attention adds nothing.
    """
    block = vlm.blocks[layer - 1]
    modules = {"start": block, "middle": anatomy.second_norm(block)}
    scopes = {} if attention else {layer: "both"}
    states = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(on_input(module, partial(states.__setitem__, name)))
        stack.enter_context(_without(vlm, "attention", scopes, batch["input_ids"].shape))
        vlm.forward(batch, logits=False, use_cache=False)
    # OPT puts all rows in one
    return states["start"], states["middle"].reshape(states["start"].shape)


@contextmanager
def _without(
    vlm: VLM, part: str, scopes: Mapping[int, str], prompts: tuple[int, int]
) -> Iterator[None]:
    """Let parts of some layers add nothing inside this block, by plain hooks.

    They add nothing at positions of the prompt or after it, as the scope says. Every cache stays as
    it is.
    """
    rows, length = prompts
    start = [0]

    def _enter(_: nn.Module, args: tuple, named: dict) -> None:
        cache = named.get("past_key_values")  # BLIP-2 has one even where none is asked for
        start[0] = 0 if cache is None else int(cache.get_seq_length())

    def hook(scope: str) -> Callable:
        def _leave(
            _: nn.Module, args: tuple, named: dict, output: Tensor | tuple
        ) -> Tensor | tuple:
            states = anatomy.states_of(output)
            by_row = states.reshape(rows, -1, states.shape[-1])
            if part == "block":
                replacement = anatomy.states_in(args, named).reshape(by_row.shape)
            else:
                replacement = torch.zeros_like(by_row)
            numbers = torch.arange(by_row.shape[1], device=states.device)
            in_prompt = start[0] + numbers < length
            if scope == "prefill":
                mask = in_prompt
            elif scope == "decode":
                mask = ~in_prompt
            else:
                mask = torch.ones_like(in_prompt)
            changed = torch.where(mask[None, :, None], replacement, by_row)
            return anatomy.with_states(output, changed.reshape(states.shape))

        return _leave

    find = {
        "block": lambda block: [block],
        "mlp": anatomy.mlp_parts,
        "attention": lambda block: [anatomy.attention(block)],
    }[part]
    decoder = anatomy.decoder(vlm.model)
    with ExitStack() as stack:
        handle = decoder.register_forward_pre_hook(_enter, with_kwargs=True)
        stack.callback(handle.remove)
        for layer, scope in scopes.items():
            for module in find(vlm.blocks[layer - 1]):
                handle = module.register_forward_hook(hook(scope), with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
        yield


def _steps_apart(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Return the largest difference between the logits of two generations.

    Steps count up to the first token in which a row differs.
    """
    tokens, logits = ours
    expected_tokens, expected = theirs
    agreed = (tokens == expected_tokens).long().cumprod(dim=1)
    first = torch.ones_like(agreed[:, :1])  # its logits are those of the same prompt
    comparable = torch.cat([first, agreed[:, :-1]], dim=1).bool()
    return apart(logits[comparable], expected[comparable])
