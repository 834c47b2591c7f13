"""Plans: which work of a language model's blocks is left out.

Checked when they are made and again against a model.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

from xlvlms_tutorial.errors import LayerError, SelectionError
from xlvlms_tutorial.interventions.overrides import checked_layers
from xlvlms_tutorial.interventions.skipping import (
    CACHES,
    NORMS,
    SCOPES,
    parallel,
    parallel_pairs,
    skip,
)
from xlvlms_tutorial.interventions.token_skipping import check_share, check_spans, skip_mlp_tokens
from xlvlms_tutorial.models.vlm import VLM

PARTS = ("block", "mlp", "attention", "parallel", "pairs")
_TOLD = {
    "block": "no block",
    "mlp": "no MLP",
    "attention": "no attention",
    "parallel": "MLP beside attention",
    "pairs": "pairs of blocks",
}
_WHEN = {
    "prefill": "in the prefill",
    "decode": "in decode steps",
    "both": "in prefill and decode steps",
}


def every(
    n_layers: int, interval: int | Sequence[int], start: int = 0, end: int | None = None
) -> list[int]:
    r"""The layers that the papers' rule acts on.

    Every ``interval``-th, neither the first nor the last.

    .. math::

        \{\, idx + 1 : start < idx < end,\; idx \ge 1,\; idx \bmod interval = 0 \,\},
        \qquad end = L - 1 \text{ by default}

    Of 32 layers, interval 2 takes 3, 5, ..., 31. An interval beyond the last layer
    takes none. Several intervals hold for as many equal segments of the layers, from
    the first on (arXiv 2410.09454).

    Raises
    ------
    SelectionError
        If there is no layer, an interval is below 1, or there are more of them than layers.
    LayerError
        If ``start`` or ``end`` is none of 0 to L.
    """
    if n_layers < 1:
        raise SelectionError(f"{n_layers} layers", "give at least 1")
    steps = list(interval) if isinstance(interval, Sequence) else [interval]
    if not 1 <= len(steps) <= n_layers or not all(
        isinstance(step, Integral) and step >= 1 for step in steps
    ):
        raise SelectionError(
            f"interval {interval!r}",
            f"give a whole number from 1 on, or 1 to {n_layers} of them, one a segment",
        )
    end = n_layers - 1 if end is None else end
    for bound in (start, end):
        if not 0 <= bound <= n_layers:
            raise LayerError(bound, 0, n_layers)
    inside = range(max(start + 1, 1), min(end, n_layers))
    return [idx + 1 for idx in inside if idx % steps[idx * len(steps) // n_layers] == 0]


@dataclass(frozen=True)
class Plan:
    """One way to leave out work: which layers, which part, when, and what stands in its place.

    ``part`` is "block", "mlp", "attention" (nothing in its place), "parallel" (the MLP beside
    the attention) or "pairs" (blocks l and l + 1 on the same input, their mean; ``layers`` are
    the first of each). ``scope`` and ``cache`` are those of :func:`skip`, ``norm`` that of
    :func:`parallel`; with it, a block without attention feeds its MLP through this norm, as
    the authors' LLaMA does by the "first". With ``span``, MLPs are left out at a ``share`` of
    its positions alone, or at ``n_tokens`` of them, drawn by ``seed``, as
    :func:`skip_mlp_tokens` does it.

    Raises
    ------
    SelectionError
        If a value is unknown, a layer is below 1, layers repeat, pairs overlap, or norm, cache or
        span are for a part that has none.
    SpanError
        If the span is unknown.
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
        object.__setattr__(
            self,
            "layers",
            (self.layers,) if isinstance(self.layers, Integral) else tuple(self.layers),
        )
        for name, value, allowed in (
            ("part", self.part, PARTS),
            ("scope", self.scope, SCOPES),
            ("cache", self.cache, CACHES),
            ("norm", self.norm, (None, *NORMS)),
        ):
            if value not in allowed:
                raise SelectionError(
                    f"unknown {name} {value!r}", f"allowed: {', '.join(map(str, allowed))}"
                )
        self._check_layers()
        if self.norm is not None and self.part not in ("attention", "parallel"):
            raise SelectionError(
                f"norm {self.norm!r} for part {self.part!r}", "give it for attention or parallel"
            )
        if self.cache != "own" and self.part != "block":
            raise SelectionError(
                f"cache {self.cache!r} for part {self.part!r}", "give it for blocks"
            )
        self._check_span()

    def __str__(self) -> str:
        if not self.layers:
            return "nothing left out"
        where = (
            ""
            if self.span is None
            else (
                f" at {self._many()} of "
                f"{self.span if isinstance(self.span, str) else ' and '.join(self.span)}"
            )
        )
        through = "" if self.norm is None else f", MLP through the {self.norm} norm"
        cached = f", cache of the {self.cache} block" if self.cache != "own" else ""
        when = _WHEN["prefill" if self.span is not None else self.scope]
        return (
            f"{_TOLD[self.part]}{where} in layers {_listed(self.layers)}, {when}{through}{cached}"
        )

    @contextmanager
    def apply(self, vlm: VLM) -> Iterator[None]:
        """Leave the work out inside this block.

        Raises
        ------
        SelectionError, LayerError
            As :meth:`check`.
        SpanError, FoldError
            As :func:`skip` and :func:`skip_mlp_tokens`.
        """
        self.check(vlm)
        layers = list(self.layers)
        with ExitStack() as stack:
            if self.span is not None:
                stack.enter_context(
                    skip_mlp_tokens(vlm, layers, self.share, self.span, self.seed, self.n_tokens)
                )
            elif self.part == "pairs":
                stack.enter_context(parallel_pairs(vlm, layers, scope=self.scope))
            elif self.part != "parallel":
                stack.enter_context(skip(vlm, layers, self.part, self.scope, self.cache))
            if self.part == "parallel" or self.norm is not None:
                stack.enter_context(parallel(vlm, layers, self.norm or "first", self.scope))
            yield

    def check(self, vlm: VLM) -> None:
        """Stop a plan that does not fit a model.

        Raises
        ------
        LayerError
            If the model has no such layer, or no block after the last one of the pairs' first.
        SelectionError
            If all blocks would be skipped.
        """
        checked_layers(vlm, self.layers)
        if self.part == "pairs":
            checked_layers(vlm, [layer + 1 for layer in self.layers])
        if self.part == "block" and len(self.layers) == vlm.n_layers:
            raise SelectionError(
                f"all {vlm.n_layers} blocks skipped leaves no model", "leave at least one of them"
            )

    def _check_layers(self) -> None:
        for layer in self.layers:
            if isinstance(layer, bool) or not isinstance(layer, Integral) or layer < 1:
                raise SelectionError(
                    f"layer {layer!r} of a plan", "layers are whole numbers from 1 on"
                )
        if len(set(self.layers)) < len(self.layers):
            raise SelectionError(f"layers {self.layers} repeat", "name each once")
        if self.part == "pairs" and any(
            second - first < 2 for first, second in pairwise(sorted(self.layers))
        ):
            raise SelectionError(
                f"pairs that overlap, starting at {self.layers}",
                "give first blocks at least two apart",
            )

    def _check_span(self) -> None:
        check_share(self.share, self.n_tokens)
        if self.span is None:
            if self.share != 1 or self.n_tokens is not None:
                raise SelectionError("a share of no span", "name the span, such as 'image'")
            return
        check_spans(self.span)
        if self.part != "mlp" or self.scope == "decode":
            what = f"part {self.part!r} in scope {self.scope!r} at span {self.span!r}"
            raise SelectionError(
                what, "only MLPs can be left out at a span, which is in the prefill"
            )

    def _many(self) -> str:
        return f"{self.share:.0%}" if self.n_tokens is None else str(self.n_tokens)


def _listed(layers: Sequence[int]) -> str:
    steps = {second - first for first, second in pairwise(layers)}
    if len(layers) > 4 and len(steps) == 1:
        return f"{layers[0]}, {layers[1]}, ..., {layers[-1]}"
    return ", ".join(map(str, layers))
