"""Translate the names under which the authors' code skips into plans.

The code is that of Shukor and Cord, 2024 (arXiv 2410.09454). What it does otherwise is in the table
of the page on released code.
"""

import re
from collections.abc import Sequence

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.skipping.importance import random_layers
from xlvlms_tutorial.methods.skipping.plans import SkipPlan, every_nth_layer
from xlvlms_tutorial.validation import require

# when a mode acts
PREFIXES = {"": "decode", "context_": "both", "onlycontext_": "prefill"}
# what a mode leaves out, and the options with which a plan computes what their LLaMA does
MODES = {
    "skip_block": ("block", {"cache": "previous"}),
    "skip_ffn": ("mlp", {}),
    "skip_attn": ("attention", {"norm": "first"}),
    "parrallel_attn": ("parallel", {"norm": "first"}),
    "parrallel_block": ("pairs", {}),
}
# names that have no plan, and why
REFUSED = {
    "skip_block_prompt": (
        "a block cannot be skipped for some positions alone, whose keys and "
        "values the others still read"
    ),
    "skip_attn_prompt": "upstream ran the dense model under this name",
    "parrallel_attn_prompt": "upstream ran the dense model under this name",
    "parrallel_block_prompt": "upstream ran the dense model under this name",
    "exit_prompt": (
        "positions cannot be taken out of the sequence half way; upstream's "
        "caches then had unequal lengths"
    ),
    "ent_thresh": (
        "it depends on each token's entropy, read off every layer: nothing "
        "is saved; upstream had it off"
    ),
    "token_index": "it is for one sample at a time, and no share of the work; upstream had it off",
}
_NAME = re.compile(rf"(onlycontext_|context_)?((?:fixed_|random_)*)({'|'.join(MODES)})(_prompt)?")


def from_upstream(
    mode: str,
    n_layers: int,
    interval: int | Sequence[int] = 60,
    start: int = 0,
    end: int | None = None,
    seed: int = 0,
) -> SkipPlan:
    """Translate a mode of the authors' code, with its interval, into a plan.

    Use it to repeat a run of the authors' code (Shukor and Cord, 2024, arXiv 2410.09454). The plan
    computes what their LLaMA does where that is what the mode says, and the corrected thing where
    it is not. Upstream's parts of several intervals are floor(L / n) long and the last takes the
    rest, so that plans differ where n does not divide L.

    Parameters
    ----------
    mode : str
        The authors' name, "parrallel" spelt as there: "skip_block", "skip_ffn", "skip_attn",
        "parrallel_attn" or "parrallel_block", with ``context_`` (prefill and decode steps) or
        ``onlycontext_`` (prefill alone) before it, then ``fixed_`` or ``random_``;
        "skip_ffn_prompt"; "drop", for the layers from ``start`` on and before ``end``; or "exit",
        for all behind ``start``.
    n_layers : int
        The number L of layers.
    interval : int or sequence of int
        The distance of the layers that are changed. Several intervals share the layers in
        proportion, as in :func:`~xlvlms_tutorial.methods.skipping.every_nth_layer`. By default 60,
        which is beyond most models and changes nothing. For ``random_``, the largest interval.
        Without a meaning for "drop" and "exit".
    start : int
        The authors' number of a block, counted from 0, behind which layers are changed.
    end : int, optional
        The authors' number of the block before which this ends. By default the last block's.
    seed : int
        The seed of the layers that modes with ``random_`` draw; the others draw nothing.

    Returns
    -------
    Plan
        The plan, with layers counted from 1.

    Raises
    ------
    InputError
        If the mode is unknown (upstream then runs the dense model), or cannot be had, with the
        reason, or the interval does not fit.
    LayerError
        If ``start`` or ``end`` is none of 0 to L.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.upstream import from_upstream
    >>> print(from_upstream("context_skip_block", n_layers=32, interval=2))
    no block in layers 3, 5, ..., 31, in prefill and decode steps
    >>> print(from_upstream("skip_ffn", n_layers=32, interval=8))
    no MLP in layers 9, 17, 25, in decode steps
    """
    if mode in ("drop", "exit"):
        every_nth_layer(n_layers, 1, start, end)  # raises at bounds that the model does not have
    if mode == "exit":
        return SkipPlan(tuple(range(start + 2, n_layers + 1)))
    if mode == "drop":
        last = n_layers - 1 if end is None else end
        return SkipPlan(tuple(range(start + 1, last + 1)))
    match = _NAME.fullmatch(mode)
    if match is None:
        name = mode.removeprefix("onlycontext_").removeprefix("context_")
    else:
        name = match[3] + (match[4] or "")
    if name in REFUSED:
        raise InputError(
            f"mode {mode!r} cannot be had: {REFUSED[name]}",
            "the page on released code lists them all",
        )
    if match is None:
        names = ", ".join((*MODES, "skip_ffn_prompt", "drop", "exit"))
        raise InputError(
            f"unknown mode {mode!r}",
            f"allowed: {names}, with context_ or onlycontext_ before, then fixed_ or random_",
        )
    if "random_" in match[2]:
        layers = _random_layers(n_layers, interval, start, end, seed)
    else:
        layers = every_nth_layer(n_layers, interval, start, end)
    if name == "skip_ffn_prompt":
        return SkipPlan(tuple(layers), "mlp", "prefill", span="image")
    part, options = MODES[name]
    scope = PREFIXES[match[1] or ""]
    if part == "block" and scope != "prefill":
        options = {}  # a block that is skipped in decode steps too keeps a whole cache
    return SkipPlan(tuple(layers), part, scope, **options)


def _random_layers(
    n_layers: int, interval: int | Sequence[int], start: int, end: int | None, seed: int
) -> list[int]:
    """As many layers as intervals from 2 to ``interval`` take on average, drawn at random."""
    require(
        isinstance(interval, int) and interval >= 2,
        f"random_ with interval {interval!r}",
        "give one whole number from 2 on: intervals are drawn up to it",
    )
    total = 0
    for step in range(2, interval + 1):
        total += len(every_nth_layer(n_layers, step, start, end))
    count = round(total / (interval - 1))
    protected = set(range(1, n_layers + 1)) - set(every_nth_layer(n_layers, 1, start, end))
    return random_layers(n_layers, count, seed, protected)
