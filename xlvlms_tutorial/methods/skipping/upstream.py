"""The names under which the authors' code skips, translated into plans, with what differs.

arXiv 2410.09454.
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
    """What a mode of the authors' code is with us."""

    part: str
    difference: str
    more: dict[str, str] = {}


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
    """The plan that a mode of the authors' code stands for, with its interval.

    ``start`` and ``end`` are numbered as there. It computes what their LLaMA does where that is
    what the mode says, and the corrected thing where it is not, as :func:`upstream_modes` tells.
    Their ``parrallel`` is spelt as there. For "drop" the layers from ``start`` on and before
    ``end`` go, for "exit" all behind ``start``. Several intervals share the layers in proportion
    (:func:`every`); upstream's parts are floor(L / n) long, the last takes the rest, so that plans
    differ where n does not divide L. Only modes with ``random_`` draw, by ``seed``.

    Raises
    ------
    SelectionError
        If the mode is unknown (upstream then runs the dense model), or cannot be had, with the
        reason, or the interval does not fit.
    LayerError
        If ``start`` or ``end`` is none of 0 to L.
    """
    if mode in ("drop", "exit"):
        every(n_layers, 1, start, end)  # bounds that the model does not have
        first, last = (
            (start + 1, n_layers - 1 if end is None else end)
            if mode == "drop"
            else (start + 2, n_layers)
        )
        return Plan(tuple(range(first, last + 1)))
    found = _NAME.fullmatch(mode)
    name = (
        mode.removeprefix("onlycontext_").removeprefix("context_")
        if found is None
        else found[3] + (found[4] or "")
    )
    if name in _REFUSED:
        raise SelectionError(
            f"mode {mode!r} cannot be had: {_REFUSED[name]}", "upstream_modes() tells which can"
        )
    if found is None:
        names = ", ".join((*_MODES, "skip_ffn_prompt", "drop", "exit"))
        raise SelectionError(
            f"unknown mode {mode!r}",
            f"allowed: {names}, with context_ or onlycontext_ before, then fixed_ or random_",
        )
    layers = (
        _drawn(n_layers, interval, start, end, seed)
        if "random_" in found[2]
        else every(n_layers, interval, start, end)
    )
    if name == "skip_ffn_prompt":
        return Plan(tuple(layers), "mlp", "prefill", span="image")
    scope = PREFIXES[found[1] or ""]
    more = {} if name == "skip_block" and scope != "prefill" else _MODES[name].more
    return Plan(tuple(layers), _MODES[name].part, scope, **more)


def upstream_modes() -> pd.DataFrame:
    """What the names of the authors' modes mean.

    Columns upstream, ours (part and scope) and difference; for :func:`from_upstream`.
    """
    rows = [
        (prefix + name, f"{mode.part}, {scope}", mode.difference)
        for name, mode in _MODES.items()
        for prefix, scope in PREFIXES.items()
    ]
    told = (
        "upstream adds the states twice, or their norm, at image tokens, and leaves out "
        "the MLPs of generated tokens"
    )
    rows += [
        ("skip_ffn_prompt", "mlp at span image, prefill", told),
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


def _drawn(
    n_layers: int, interval: int | Sequence[int], start: int, end: int | None, seed: int
) -> list[int]:
    if not isinstance(interval, int) or interval < 2:
        raise SelectionError(
            f"random_ with interval {interval!r}",
            "give one whole number from 2 on: intervals are drawn up to it",
        )
    allowed = every(n_layers, 1, start, end)
    mean = sum(len(every(n_layers, step, start, end)) for step in range(2, interval + 1)) / (
        interval - 1
    )
    return random_layers(
        n_layers, round(mean), seed, protect=set(range(1, n_layers + 1)) - set(allowed)
    )
