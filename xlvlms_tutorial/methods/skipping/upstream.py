"""Translate the names under which the authors' code skips into plans, and say what differs.

The code is that of Shukor and Cord, 2024 (arXiv 2410.09454).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from xlvlms_tutorial.errors import SelectionError
from xlvlms_tutorial.methods.skipping.importance import random_layers
from xlvlms_tutorial.methods.skipping.plans import Plan, every

PREFIXES = {"": "decode", "context_": "both", "onlycontext_": "prefill"}


class _Mode(NamedTuple):
    """What a mode of the authors' code is in this package."""

    part: str
    difference: str
    options: dict[str, str] = {}


_MODES = {
    "skip_block": _Mode(
        "block",
        (
            "a block that the prefill skips gets the previous block's keys and values, as "
            "there: cache='previous'; a block that is skipped in decode steps too needs none, "
            "there it keeps a whole copy"
        ),
        {"cache": "previous"},
    ),
    "skip_ffn": _Mode("mlp", "none"),
    "skip_attn": _Mode(
        "attention",
        (
            "the MLP reads the first norm, as in its LLaMA: norm='first' (None is the "
            "block's own second norm); its OPT loses the residual stream, and its "
            "cache holds unprojected states"
        ),
        {"norm": "first"},
    ),
    "parrallel_attn": _Mode(
        "parallel",
        "the MLP reads the first norm, as there; its OPT puts both norms in a row",
        {"norm": "first"},
    ),
    "parrallel_block": _Mode(
        "pairs",
        (
            "each block runs once, in its pair; there the block after start is dropped, and the "
            "last one runs again where a pair begins before it, so that results differ; each block "
            "keeps keys and values of its own, there both get the mean; needs interval 2 or more"
        ),
    ),
}
_REFUSED = {
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
_TOKENS = {
    "fixed_": "does nothing there and here",
    "random_": (
        "an interval drawn at every call for each layer there; here as many layers as this skips "
        "on average, drawn once by seed"
    ),
}
_ONLY_OPT = "; its LLaMA ignores the mode and runs the dense model"
_NAME = re.compile(rf"(onlycontext_|context_)?((?:fixed_|random_)*)({'|'.join(_MODES)})(_prompt)?")


def from_upstream(
    mode: str,
    n_layers: int,
    interval: int | Sequence[int] = 60,
    start: int = 0,
    end: int | None = None,
    seed: int = 0,
) -> Plan:
    """Translate a mode of the authors' code, with its interval, into a :class:`Plan`.

    Use it to repeat a run of the authors' code (Shukor and Cord, 2024, arXiv 2410.09454). The plan
    computes what their LLaMA does where that is what the mode says, and the corrected thing where
    it is not: :func:`upstream_modes` lists the differences. Upstream's parts of several intervals
    are floor(L / n) long and the last takes the rest, so that plans differ where n does not
    divide L.

    Parameters
    ----------
    mode : str
        The authors' name, "parrallel" spelt as there: "skip_block", "skip_ffn", "skip_attn",
        "parrallel_attn" or "parrallel_block", with "context_" (prefill and decode steps) or
        "onlycontext_" (prefill alone) before it, then "fixed_" or "random_"; "skip_ffn_prompt";
        "drop", for the layers from ``start`` on and before ``end``; or "exit", for all behind
        ``start``.
    n_layers : int
        The number L of layers.
    interval : int or sequence of int
        The distance of the layers that are changed. Several intervals share the layers in
        proportion, as in :func:`every`. By default 60, which is beyond most models and changes
        nothing. For "random_", the largest interval. Without a meaning for "drop" and "exit".
    start : int
        The authors' number of a block, counted from 0, behind which layers are changed.
    end : int, optional
        The authors' number of the block before which this ends. By default the last block's.
    seed : int
        The seed of the layers that modes with "random_" draw; the others draw nothing.

    Returns
    -------
    Plan
        The plan, with layers counted from 1.

    Raises
    ------
    SelectionError
        If the mode is unknown (upstream then runs the dense model), or cannot be had, with the
        reason, or the interval does not fit.
    LayerError
        If ``start`` or ``end`` is none of 0 to L.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.skipping import from_upstream
    >>> print(from_upstream("context_skip_block", n_layers=32, interval=2))
    no block in layers 3, 5, ..., 31, in prefill and decode steps
    >>> print(from_upstream("skip_ffn", n_layers=32, interval=8))
    no MLP in layers 9, 17, 25, in decode steps
    """
    if mode in ("drop", "exit"):
        every(n_layers, 1, start, end)  # raises at bounds that the model does not have
    if mode == "exit":
        return Plan(tuple(range(start + 2, n_layers + 1)))
    if mode == "drop":
        last = n_layers - 1 if end is None else end
        return Plan(tuple(range(start + 1, last + 1)))
    match = _NAME.fullmatch(mode)
    if match is None:
        name = mode.removeprefix("onlycontext_").removeprefix("context_")
    else:
        name = match[3] + (match[4] or "")
    if name in _REFUSED:
        raise SelectionError(
            f"mode {mode!r} cannot be had: {_REFUSED[name]}", "upstream_modes() tells which can"
        )
    if match is None:
        names = ", ".join((*_MODES, "skip_ffn_prompt", "drop", "exit"))
        raise SelectionError(
            f"unknown mode {mode!r}",
            f"allowed: {names}, with context_ or onlycontext_ before, then fixed_ or random_",
        )
    if "random_" in match[2]:
        layers = _random_layers(n_layers, interval, start, end, seed)
    else:
        layers = every(n_layers, interval, start, end)
    if name == "skip_ffn_prompt":
        return Plan(tuple(layers), "mlp", "prefill", span="image")
    scope = PREFIXES[match[1] or ""]
    # a block that is skipped in decode steps too keeps a whole cache
    options = {} if name == "skip_block" and scope != "prefill" else _MODES[name].options
    return Plan(tuple(layers), _MODES[name].part, scope, **options)


def upstream_modes() -> pd.DataFrame:
    """List the modes of the authors' code, what each is as a plan, and what differs.

    Use it to look up a name of the authors' code before :func:`from_upstream`.

    Returns
    -------
    DataFrame
        One row for each name. Columns ``upstream``, the authors' name; ``ours``, the part and the
        scope of the :class:`Plan`, or "refused"; ``difference``, what upstream does otherwise, or
        the reason.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.skipping import upstream_modes
    >>> table = upstream_modes().set_index("upstream")
    >>> table.loc["context_skip_ffn", "ours"]
    'mlp, both'
    """
    rows = []
    for name, mode in _MODES.items():
        for prefix, scope in PREFIXES.items():
            rows.append((prefix + name, f"{mode.part}, {scope}", mode.difference))
    prompt_difference = (
        "upstream adds the states twice, or their norm, at image tokens, and leaves out "
        "the MLPs of generated tokens"
    )
    rows += [
        ("skip_ffn_prompt", "mlp at span image, prefill", prompt_difference),
        (
            "drop",
            "block, both",
            (
                "layers from start on and before end; upstream (OPT) gives them the "
                f"previous block's cache{_ONLY_OPT}"
            ),
        ),
        (
            "exit",
            "block, both",
            (
                "all layers behind start, for every position; upstream (OPT) runs them for the "
                f"last position alone, and stops at the first step with a cache{_ONLY_OPT}"
            ),
        ),
    ]
    rows += [(name, "refused", reason) for name, reason in _REFUSED.items()]
    rows += [(token, "before any name", meaning) for token, meaning in _TOKENS.items()]
    rows.append(("any other name", "refused", "upstream runs the dense model without a word"))
    return pd.DataFrame(rows, columns=["upstream", "ours", "difference"])


def _random_layers(
    n_layers: int, interval: int | Sequence[int], start: int, end: int | None, seed: int
) -> list[int]:
    """As many layers as intervals from 2 to ``interval`` take on average, drawn at random."""
    if not isinstance(interval, int) or interval < 2:
        raise SelectionError(
            f"random_ with interval {interval!r}",
            "give one whole number from 2 on: intervals are drawn up to it",
        )
    allowed = every(n_layers, 1, start, end)
    total = sum(len(every(n_layers, step, start, end)) for step in range(2, interval + 1))
    protected = set(range(1, n_layers + 1)) - set(allowed)
    return random_layers(n_layers, round(total / (interval - 1)), seed, protected)
