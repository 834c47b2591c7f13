"""Plans of which work of a language model's blocks is left out.

A plan is checked when it is made, and again against a model.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from xlvlms_tutorial.errors import LayerError
from xlvlms_tutorial.interventions.overrides import checked_layers
from xlvlms_tutorial.interventions.skipping import (
    CACHES,
    NORMS,
    SCOPES,
    parallel,
    parallel_pairs,
    skip,
)
from xlvlms_tutorial.interventions.token_skipping import check_share, check_spans, skip_tokens
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require

PARTS = ("block", "mlp", "attention", "parallel", "pairs")
_ALLOWED = {"part": PARTS, "scope": SCOPES, "cache": CACHES, "norm": (None, *NORMS)}
_PART_TEXTS = {
    "block": "no block",
    "mlp": "no MLP",
    "attention": "no attention",
    "parallel": "MLP beside attention",
    "pairs": "pairs of blocks",
}
_SCOPE_TEXTS = {
    "prefill": "in the prefill",
    "decode": "in decode steps",
    "both": "in prefill and decode steps",
}


def every_nth_layer(
    n_layers: int, interval: int | Sequence[int], start: int = 0, end: int | None = None
) -> list[int]:
    r"""Choose every ``interval``-th layer, as the papers do.

    Use it to name the layers of a :class:`SkipPlan` that follows the rule of Shukor and Cord, 2024
    (arXiv 2410.09454). Neither the first nor the last layer is chosen:

    .. math::

        \{\, idx + 1 : start < idx < end,\; idx \ge 1,\; idx \bmod interval = 0 \,\},
        \qquad end = L - 1 \text{ by default}

    Of 32 layers, interval 2 takes 3, 5, ..., 31. An interval beyond the last layer takes none.

    Parameters
    ----------
    n_layers : int
        The number L of layers.
    interval : int or sequence of int
        The distance of chosen layers. Several intervals hold for as many equal segments of the
        layers, from the first on.
    start : int
        The authors' number of a block, counted from 0, behind which the rule begins. By default
        behind the first block.
    end : int, optional
        The authors' number of the block before which the rule ends. By default the last block's.

    Returns
    -------
    list of int
        The chosen layers, counted from 1, in order.

    Raises
    ------
    InputError
        If there is no layer, an interval is below 1, or there are more of them than layers.
    LayerError
        If ``start`` or ``end`` is none of 0 to L.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.skipping import every_nth_layer
    >>> every_nth_layer(8, 2)
    [3, 5, 7]
    >>> every_nth_layer(8, [1, 2])
    [2, 3, 4, 5, 7]
    """
    require(n_layers >= 1, f"{n_layers} layers", "give at least 1")
    steps = list(interval) if isinstance(interval, Sequence) else [interval]
    valid = all(isinstance(step, Integral) and step >= 1 for step in steps)
    require(
        valid and 1 <= len(steps) <= n_layers,
        f"interval {interval!r}",
        f"give a whole number from 1 on, or 1 to {n_layers} of them, one a segment",
    )
    if end is None:
        end = n_layers - 1
    for bound in (start, end):
        if not 0 <= bound <= n_layers:
            raise LayerError(bound, 0, n_layers)
    layers = []
    for idx in range(max(start + 1, 1), min(end, n_layers)):
        step = steps[idx * len(steps) // n_layers]
        if idx % step == 0:
            layers.append(idx + 1)
    return layers


@dataclass(frozen=True)
class SkipPlan:
    """A way to leave out work: which layers, which part, when, and what stands in its place.

    Use it where a choice of skipped work is kept, compared or shown: a plan can be printed, serves
    as a key of a dict, and holds for any model with these layers. The ways are those of Shukor and
    Cord, 2024, "Skipping Computations in Multimodal LLMs" (arXiv 2410.09454) and, for MLPs at some
    positions, "Implicit Multimodal Alignment" (arXiv 2405.16700).

    Parameters
    ----------
    layers : tuple of int, or int
        The layers, counted from 1; for "pairs" the first layer of each pair. None may repeat.
    part : {"block", "mlp", "attention", "parallel", "pairs"}
        What is changed. A "block" (the default), "mlp" or "attention" is left out with nothing in
        its place. "parallel" runs the MLP beside the attention. "pairs" runs blocks l and l + 1 on
        the same input and takes their mean.
    scope : {"both", "prefill", "decode"}
        Whether this holds in the prefill, in decode steps or in both, which is the default.
    cache : {"own", "previous"}
        For blocks, which keys and values decode steps find where the prefill skipped a block: its
        own (the default), or those of the block before it, as
        :func:`~xlvlms_tutorial.interventions.skipping.skip` says.
    norm : {"first", "second"}, optional
        For "parallel", the norm of the block that the MLP's input goes through, by default the
        first, as :func:`~xlvlms_tutorial.interventions.skipping.parallel` says. For "attention",
        the same norm in a block without attention, as the authors' LLaMA does with the "first";
        by default the block's own second norm.
    span : str or tuple of str, optional
        For "mlp", the kind of positions at which MLPs are left out, such as "image". By default
        all positions. With a span the plan holds in the prefill alone.
    share : float
        The share of the span's positions, from 0 to 1, that are drawn. By default all, as
        :func:`~xlvlms_tutorial.interventions.token_skipping.skip_tokens` says.
    n_tokens : int, optional
        How many of the span's positions are drawn, instead of a share.
    seed : int
        The seed of the drawn positions.

    Raises
    ------
    InputError
        If a value is unknown, a layer is below 1, layers repeat, pairs overlap, or norm, cache or
        span are for a part that has none.
    SpanError
        If the span is unknown.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.skipping import SkipPlan
    >>> plan = SkipPlan((2, 4, 6, 8, 10), part="mlp")
    >>> print(plan)
    no MLP in layers 2, 4, ..., 10, in prefill and decode steps
    >>> plan.check(vlm)
    >>> texts = vlm.batch(None, ["A red ball lies on the grass."])
    >>> dense = vlm.forward(texts).logits
    >>> with plan.apply(vlm):
    ...     skipped = vlm.forward(texts).logits
    >>> skipped.shape == dense.shape, bool((skipped == dense).all())
    (True, False)
    """

    layers: tuple[int, ...]
    part: str = "block"
    scope: str = "both"
    cache: str = "own"
    norm: str | None = None
    span: str | tuple[str, ...] | None = None
    share: float = 1.0
    n_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, Integral) else tuple(self.layers)
        object.__setattr__(self, "layers", layers)
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            options = ", ".join(map(str, allowed))
            require(value in allowed, f"unknown {name} {value!r}", f"allowed: {options}")
        self._check_layers()
        require(
            self.norm is None or self.part in ("attention", "parallel"),
            f"norm {self.norm!r} for part {self.part!r}",
            "give it for attention or parallel",
        )
        require(
            self.cache == "own" or self.part == "block",
            f"cache {self.cache!r} for part {self.part!r}",
            "give it for blocks",
        )
        self._check_span()

    def __str__(self) -> str:
        if not self.layers:
            return "nothing left out"
        text = _PART_TEXTS[self.part]
        if self.span is not None:
            spans = self.span if isinstance(self.span, str) else " and ".join(self.span)
            text += f" at {self._amount()} of {spans}"
        scope = self.scope if self.span is None else "prefill"
        text += f" in layers {_listed(self.layers)}, {_SCOPE_TEXTS[scope]}"
        if self.norm is not None:
            text += f", MLP through the {self.norm} norm"
        if self.cache != "own":
            text += f", cache of the {self.cache} block"
        return text

    @contextmanager
    def apply(self, vlm: VLM) -> Iterator[None]:
        """Leave the work out of a model inside a ``with`` statement.

        Parameters
        ----------
        vlm : VLM
            The model. It is as before when the statement ends.

        Raises
        ------
        LayerError
            If the model has no such layer, or none after the last one of the pairs' first.
        InputError
            If all blocks would be skipped.
        SpanError
            When the model runs, if it, or some sample, has no positions of the span.
        InterventionError
            If a vector is folded into a block or MLP that would be skipped.
        """
        self.check(vlm)
        layers = list(self.layers)
        with ExitStack() as stack:
            if self.span is not None:
                stack.enter_context(
                    skip_tokens(vlm, layers, self.share, self.span, self.seed, self.n_tokens)
                )
            elif self.part == "pairs":
                stack.enter_context(parallel_pairs(vlm, layers, scope=self.scope))
            elif self.part != "parallel":
                stack.enter_context(skip(vlm, layers, self.part, self.scope, self.cache))
            if self.part == "parallel" or self.norm is not None:
                stack.enter_context(parallel(vlm, layers, self.norm or "first", self.scope))
            yield

    def check(self, vlm: VLM) -> None:
        """Raise an error if the plan does not fit a model.

        Parameters
        ----------
        vlm : VLM
            The model, of which only the number of layers counts.

        Raises
        ------
        LayerError
            If the model has no such layer, or no block after the last one of the pairs' first.
        InputError
            If all blocks would be skipped.
        """
        checked_layers(vlm, self.layers)
        if self.part == "pairs":
            checked_layers(vlm, [layer + 1 for layer in self.layers])
        require(
            self.part != "block" or len(self.layers) < vlm.n_layers,
            f"all {vlm.n_layers} blocks skipped leaves no model",
            "leave at least one of them",
        )

    def _check_layers(self) -> None:
        """Refuse layers that are no numbers, repeat, or are pairs that overlap."""
        for layer in self.layers:
            require(
                not isinstance(layer, bool) and isinstance(layer, Integral) and layer >= 1,
                f"layer {layer!r} of a plan",
                "layers are whole numbers from 1 on",
            )
        require(
            len(set(self.layers)) == len(self.layers),
            f"layers {self.layers} repeat",
            "name each once",
        )
        if self.part != "pairs":
            return
        distances = np.diff(sorted(self.layers)).tolist()
        require(
            min(distances, default=2) >= 2,
            f"pairs that overlap, starting at {self.layers}",
            "give first blocks at least two apart",
        )

    def _check_span(self) -> None:
        check_share(self.share, self.n_tokens)
        if self.span is None:
            require(
                self.share == 1 and self.n_tokens is None,
                "a share of no span",
                "name the span, such as 'image'",
            )
            return
        check_spans(self.span)
        require(
            self.part == "mlp" and self.scope != "decode",
            f"part {self.part!r} in scope {self.scope!r} at span {self.span!r}",
            "only MLPs can be left out at a span, which is in the prefill",
        )

    def _amount(self) -> str:
        return f"{self.share:.0%}" if self.n_tokens is None else str(self.n_tokens)


def _listed(layers: Sequence[int]) -> str:
    steps = set(np.diff(layers).tolist())
    if len(layers) > 4 and len(steps) == 1:
        return f"{layers[0]}, {layers[1]}, ..., {layers[-1]}"
    return ", ".join(map(str, layers))
