"""What a call costs in floating-point operations, counted as they run."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral

import pandas as pd
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from xlvlms_tutorial.memory import measuring
from xlvlms_tutorial.metrics.plain import require_estimate
from xlvlms_tutorial.validation import require

Parts = Mapping[str, nn.Module | Iterable[nn.Module]]

# names of operators that multiply matrices, whatever library brings them
_PRODUCTS = re.compile(
    r"(^|_)(\w*mm|\w*matmul|mv|addmv|gemv|dot|vdot|linear|conv(olution)?(\dd)?|"
    r"attention|attn|rnn|lstm|gru)(_|$)"
)


def count_flops(
    call: Callable[[], object], parts: Parts | None = None, decoder: nn.Module | None = None
) -> pd.DataFrame:
    """Count the floating-point operations that a call really executes, by phase and part.

    Use it to see what a skipped block or a pruned layer saves. Counted are products of matrices,
    convolutions and attention, two operations for each multiply-add, by torch's own counter with
    the formulas that it lacks on CPUs. A skipped block counts nothing. A masked weight counts as
    any other, and so do the scores above the diagonal of causal attention: zeros that are
    multiplied are work. :func:`decoder_flops` computes the same numbers from shapes.

    Parameters
    ----------
    call : callable
        Called once without arguments, such as ``lambda: vlm.generate(images, texts)``.
    parts : mapping of str to Module or iterable of Module, optional
        Modules by the name of their part. Work goes to the innermost of them that is running, or to
        "rest". By default all work is rest.
    decoder : Module, optional
        The decoder (``anatomy.decoder(vlm.model)``), by whose calls the phases "prefill" and
        "decode" are told apart: a decode step gives the decoder one position and a cache that is
        not empty. Without it the phase is "both".

    Returns
    -------
    pandas.DataFrame
        Columns phase, part, flops. In each phase the parts, then "rest", then "total", their sum.
        What a backward pass executes outside the modules counts as rest.

    Raises
    ------
    InputError
        If a part has no modules, a module belongs to two parts, or a part is called ``rest`` or
        ``total``. If the call executes nothing that is counted, an operator without a formula, or
        never the decoder.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.metrics import count_flops
    >>> layer, tokens = torch.nn.Linear(4, 3), torch.ones(2, 4)
    >>> count_flops(lambda: layer(tokens), {"layer": layer}).to_numpy().tolist()
    [['both', 'layer', 48], ['both', 'rest', 0], ['both', 'total', 48]]
    """
    owners = _owners(parts or {})
    tally = _Tally(decoder)
    missed = _Missed()
    with ExitStack() as stack:
        for module, part in owners.items():
            stack.enter_context(
                _hooked(module, lambda *_, part=part: tally.enter(part), lambda *_: tally.leave())
            )
        # after the parts, so that its hooks are the outer ones where a part is the decoder itself
        if decoder is not None:
            stack.enter_context(_hooked(decoder, tally.begin, tally.end))
        stack.enter_context(measuring())
        stack.enter_context(missed)
        stack.enter_context(tally.counter)
        call()
        tally.finish()
    _check(tally, missed.names, decoder)
    phases = ("both",) if decoder is None else ("prefill", "decode")
    return _table(tally.flops, list(parts or {}), phases)


def decoder_flops(
    tokens: int,
    *,
    layers: int,
    width: int,
    hidden: int,
    heads: int,
    kv_heads: int | None = None,
    head_size: int | None = None,
    vocabulary: int = 0,
    logits: int = 1,
    cached: int = 0,
    batch: int = 1,
    gated: bool = True,
) -> dict[str, int]:
    r"""Compute the floating-point operations of a standard decoder from its shapes, by part.

    Use it for models that are too large to run; :func:`count_flops` counts what a call executes.
    For t ``tokens`` that enter after c ``cached`` ones, width d, MLPs of ``hidden`` size m, h
    ``heads`` and k ``kv_heads`` of size e, each of the L ``layers`` takes, two operations for each
    multiply-add,

    .. math:: 4\,t\,d\,e\,(h + k) + 4\,t\,(t + c)\,h\,e + 2\,g\,t\,d\,m

    for the attention's projections, its scores and weighted values (above the diagonal too), and
    the MLP, where g is 3 in a ``gated`` MLP and 2 in others. The unembedding takes
    :math:`2\,p\,d\,v` for p positions with ``logits``.

    Parameters
    ----------
    tokens : int
        Positions that enter the decoder.
    layers : int
        The number of blocks.
    width : int
        The width of the residual stream.
    hidden : int
        The width inside the MLP.
    heads : int
        The number of query heads.
    kv_heads : int, optional
        The number of key and value heads; by default as many as query heads.
    head_size : int, optional
        The width of a head; by default ``width / heads``.
    vocabulary : int, default 0
        The number of tokens in the vocabulary; with 0 the unembedding costs nothing.
    logits : int, default 1
        The positions for which logits are computed.
    cached : int, default 0
        The positions that are in the cache already.
    batch : int, default 1
        The number of sequences, by which all is multiplied.
    gated : bool, default True
        Whether the MLP has three linear layers (Llama's kind) or two.

    Returns
    -------
    dict of str to int
        The keys attention_projections, attention_scores, mlp, unembedding and total.

    Raises
    ------
    InputError
        If a size is not a whole number of 1 or more (``cached``, ``vocabulary``, ``logits``: 0 or
        more), or heads do not divide.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import decoder_flops
    >>> flops = decoder_flops(2, layers=1, width=4, hidden=8, heads=2)
    >>> flops["attention_scores"], flops["mlp"], flops["total"]
    (64, 384, 704)
    """
    k = heads if kv_heads is None else kv_heads
    _check_integers(1, tokens=tokens, layers=layers, width=width, hidden=hidden)
    _check_integers(1, heads=heads, kv_heads=k, batch=batch)
    _check_integers(0, vocabulary=vocabulary, logits=logits, cached=cached)
    require(
        heads % k == 0 and (head_size is not None or width % heads == 0),
        f"{heads} heads, {k} kv_heads and width {width}",
        "allowed: kv_heads divides heads, heads divides width",
    )
    e = width // heads if head_size is None else head_size
    _check_integers(1, head_size=e)
    n_maps = 3 if gated else 2
    n_keys = tokens + cached
    flops = {}
    flops["attention_projections"] = layers * 4 * tokens * width * e * (heads + k)
    flops["attention_scores"] = layers * 4 * tokens * n_keys * heads * e
    flops["mlp"] = layers * 2 * n_maps * tokens * width * hidden
    flops["unembedding"] = 2 * logits * width * vocabulary
    flops["total"] = sum(flops.values())
    return {part: batch * count for part, count in flops.items()}


class _Tally:
    """Book what is counted between one begin or end of a part or decoder and the next."""

    def __init__(self, decoder: nn.Module | None) -> None:
        self.counter = FlopCounterMode(display=False, custom_mapping=_formulas())
        self.flops: Counter[tuple[str, str]] = Counter()
        self.calls = 0  # of the decoder
        self._phase = "both" if decoder is None else "prefill"
        self._open = ["rest"]  # the parts that are running, the innermost last
        self._booked = 0
        # by part, since the decoder was left
        self._outside: Counter[str] | None = None if decoder is None else Counter()
        self._first: set[str] = set()  # parts that worked before the decoder's first call

    def enter(self, part: str) -> None:
        self._book()
        self._open.append(part)

    def leave(self) -> None:
        self._book()
        self._open.pop()

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Begin a call of the decoder, the ``module``: ``args`` and ``kwargs`` tell its phase."""
        self._book()
        decoding = _decoding(args, kwargs)
        if self.calls == 0:
            self._first = set(self._outside)
        self._settle(self._first if self.calls == 0 or not decoding else set())
        self._phase = "decode" if decoding else "prefill"
        self._outside = None
        self.calls += 1

    def end(self, *_: object) -> None:
        self._book()
        self._outside = Counter()

    def finish(self) -> None:
        self._book()
        self._settle(set())

    def _book(self) -> None:
        total = self.counter.get_total_flops()
        new = total - self._booked
        self._booked = total
        if new and self._outside is not None:
            self._outside[self._open[-1]] += new
        elif new:
            self.flops[self._phase, self._open[-1]] += new

    def _settle(self, prepare: set[str]) -> None:
        """Give what ran between two calls of the decoder to the last one.

        And the work of parts that ``prepare`` to the prefill to come.
        """
        for part, new in (self._outside or {}).items():
            self.flops["prefill" if part in prepare else self._phase, part] += new


class _Missed(TorchDispatchMode):
    """Collect the operators that multiply matrices and have no formula.

    Leaving them out in silence would give a wrong number.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._known = set(FlopCounterMode(display=False, custom_mapping=_formulas()).flop_registry)

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self._known and _PRODUCTS.search(getattr(packet, "__name__", "")):
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


def _formulas() -> dict[object, Callable[..., int]]:
    """Return formulas, from shapes, of operators that torch's counter does not know.

    Those of this torch and of what is imported.
    """
    aten = {
        "mv": lambda matrix, vector, **_: 2 * matrix[0] * matrix[1],
        "addmv": lambda added, matrix, vector, **_: 2 * matrix[0] * matrix[1],
        "dot": lambda first, second, **_: 2 * first[0],
        "_grouped_mm": _grouped,
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_attention_math_for_mps": _attention,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    }
    available = {}
    for name, formula in aten.items():
        if hasattr(torch.ops.aten, name):
            available[getattr(torch.ops.aten, name)] = formula
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if onednn is not None:
        available[onednn] = _linear
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if fallback is not None:
        available[fallback] = _grouped
    return available


def _linear(inputs: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
    """Count a linear map; as elsewhere, its bias is not counted."""
    return 2 * math.prod(inputs) * weight[0]


def _attention(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object
) -> int:
    """Count scores and weighted values; grouped keys and values are used once a query head."""
    batch, heads, n_queries, width = q
    return 2 * batch * heads * n_queries * k[2] * (width + v[3])


def _attention_backward(
    gradient: Sequence[int],
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *_: object,
    **__: object,
) -> int:
    """Count scores again, then the gradients of values, weights, queries and keys."""
    batch, heads, n_queries, width = q
    return 2 * batch * heads * n_queries * k[2] * (3 * width + 2 * v[3])


def _grouped(a: Sequence[int], b: Sequence[int], *_: object, **__: object) -> int:
    """Count the products of matrices that belong to groups of rows, as experts have them."""
    # the groups share out one dimension of the two-dimensional factors, so each row (or
    # column, or product) is computed once
    depth = a[2] if len(a) == 3 and len(b) == 3 else 1
    return 2 * a[0] * a[1] * depth * b[-1]


def _owners(parts: Parts) -> dict[nn.Module, str]:
    """Give the part of each module that is counted; no module is in two."""
    owners: dict[nn.Module, str] = {}
    for part, members in parts.items():
        modules = [members] if isinstance(members, nn.Module) else list(members)
        require(
            modules and part not in ("rest", "total"),
            f"part {part!r} with {len(modules)} modules",
            "give 1 or more, under another name than rest and total",
        )
        for module in modules:
            owner = owners.setdefault(module, part)
            require(
                owner == part,
                f"one {type(module).__name__} is in {owner!r} and in {part!r}",
                "a module has one part",
            )
    return owners


@contextmanager
def _hooked(module: nn.Module, before: Callable, after: Callable) -> Iterator[None]:
    """Attach hooks that stay where an intervention replaces the module's forward.

    They lie around all others, so that the work of these is inside.
    """
    enter = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    # also where a capture stops the model by an exception
    leave = module.register_forward_hook(after, always_call=True)
    with enter, leave:
        yield


def _decoding(args: tuple, kwargs: dict) -> bool:
    """Return whether a call of the decoder is a decode step: one position and a filled cache."""
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
    cache = kwargs.get("past_key_values")
    if tokens is None or tokens.shape[1] != 1 or cache is None:
        return False
    return int(cache.get_seq_length()) > 0


def _check(tally: _Tally, missed: set[str], decoder: nn.Module | None) -> None:
    require_estimate(
        not missed,
        "operators that multiply and have no formula",
        ", ".join(sorted(missed)),
        "operators of torch itself; run the model unquantised and with "
        "attn_implementation 'sdpa' or 'eager'",
    )
    require_estimate(
        tally.flops,
        "floating-point operations of the call",
        0,
        "a call that multiplies matrices or convolves",
    )
    require_estimate(
        decoder is None or tally.calls,
        "calls of the decoder",
        0,
        "the decoder of the model that the call runs, or none",
    )


def _table(
    flops: Counter[tuple[str, str]], parts: list[str], phases: tuple[str, ...]
) -> pd.DataFrame:
    """Arrange the counts of all phases, a row for each part and the total."""
    rows = []
    for phase in phases:
        counts = {part: flops[phase, part] for part in (*parts, "rest")}
        counts["total"] = sum(counts.values())
        for part, count in counts.items():
            rows.append((phase, part, count))
    return pd.DataFrame(rows, columns=["phase", "part", "flops"])


def _check_integers(minimum: int, **sizes: object) -> None:
    """Refuse sizes that are not integers of this minimum or more."""
    for name, size in sizes.items():
        valid = isinstance(size, Integral) and not isinstance(size, bool) and size >= minimum
        require(valid, f"{name}={size!r}", f"allowed: whole numbers of {minimum} or more")
