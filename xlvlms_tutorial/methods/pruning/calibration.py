"""Measure the size of every input feature of the decoder's linear layers.

The root mean square over the positions that count. Linear layers are called linear maps.
"""

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xlvlms_tutorial.activations.hooks import span_mask
from xlvlms_tutorial.errors import InputError, incomparable
from xlvlms_tutorial.methods.pruning.masks import Key, joined
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.batching import batches
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.validation import require

_DENSE = "load the model without quantise, whole on its devices, and without an adapter"
# integers as wide as a weight, by its bytes
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Calibration:
    r"""Activation statistics of each linear map: the size of every input feature.

    Made by :func:`calibrate` or :func:`calibrate_on`, for :func:`wanda` and whatever else scores
    weights by activations. Holds :math:`\sum_t x_{tj}^2` for each input feature j, and the number
    of tokens t. ``a + b`` is the calibration on the inputs of both: calibrate on parts of the
    samples once, and any union of parts costs nothing more. Models may differ in name, as those
    with other connectors to one language model do, but not in their linear maps' weights.

    Parameters
    ----------
    model : str
        The name of the model.
    fingerprint : str
        What tells its linear maps' weights from any others: :func:`fingerprint`.
    squares : mapping of (layer, map) to Tensor
        The sum of squares for each linear map, of shape (d_in,), in float64 on the CPU. A layer is
        a number from 1 to L, a map its name within the block, such as "self_attn.q_proj".
    tokens : mapping of (layer, map) to int
        The number of tokens for each linear map; 0 where the map was never used, as
        cross-attention is without a picture.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.pruning import Calibration
    >>> key = (1, "mlp.up_proj")
    >>> squares = torch.tensor([8.0, 2.0], dtype=torch.float64)
    >>> calibration = Calibration("small", "f", {key: squares}, {key: 2})
    >>> calibration.norms(1, "mlp.up_proj").tolist()
    [2.0, 1.0]
    >>> (calibration + calibration).tokens[key]
    4
    """

    model: str
    fingerprint: str
    squares: Mapping[Key, Float[Tensor, "d_in"]]
    tokens: Mapping[Key, int]

    def __add__(self, other: "Calibration") -> "Calibration":
        if self.fingerprint != other.fingerprint:
            raise incomparable(
                "weights behind two calibrations",
                self,
                other,
                "add calibrations of one language model",
            )
        squares = {}
        tokens = {}
        for key in self.squares:
            squares[key] = self.squares[key] + other.squares[key]
            tokens[key] = self.tokens[key] + other.tokens[key]
        return Calibration(joined(self.model, other.model), self.fingerprint, squares, tokens)

    def __repr__(self) -> str:
        return (
            f"Calibration of {self.model}: {len(self.squares)} linear maps, "
            f"{max(self.tokens.values()):,} tokens"
        )

    def norms(self, layer: int, name: str) -> Float[Tensor, "d_in"]:
        r"""Give the root mean square of each input feature over the tokens.

        :math:`\sqrt{\frac{1}{T} \sum_t x_{tj}^2}`.

        Parameters
        ----------
        layer : int
            The layer, from 1 to L.
        name : str
            The name of the linear map within its block, such as "self_attn.q_proj".

        Returns
        -------
        Tensor
            Of shape (d_in,), in float64 on the CPU, in the units of the activations.

        Raises
        ------
        InputError
            If there is no such map. If the map was never used.
        """
        if (layer, name) not in self.squares:
            maps = ", ".join(f"{number} {linear}" for number, linear in self.squares)
            raise InputError(f"no linear map {name!r} in layer {layer}", f"there are: {maps}")
        n_tokens = self.tokens[layer, name]
        require(
            n_tokens,
            f"layer {layer} {name} saw no token",
            "calibrate on inputs that reach it (cross-attention: pictures)",
        )
        return (self.squares[layer, name] / n_tokens).sqrt()


def calibrate(
    vlm: VLM,
    samples: Iterable[Sample],
    *,
    span: str | Sequence[str] | None = None,
    prompt: str | Callable[[Sample], str] | None = None,
    answers: Sequence[str] | Callable[[Sample], str] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Calibration:
    """Calibrate on samples, their prompts and, if given, answers.

    Use it before :func:`wanda`, with samples like those that the pruned model is for. Several
    calibrations add up: calibrate on parts of the samples to compare them.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : iterable of Sample
        Samples with what they show.
    span : str or sequence of str, optional
        The kinds of positions that count, such as "image", "question" or "answer". By default all
        but the padding.
    prompt : str, or function of a sample, optional
        What the model is asked. By default a description of what the sample shows.
    answers : sequence of str, or function of a sample, optional
        The text that follows each sample's prompt. By default none.
    batch_size : int
        How many samples go through the model together.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Calibration
        Sums of squares and numbers of tokens for each linear map.

    Raises
    ------
    InputError
        If there are no samples, the batch size is below 1, or a linear map is quantised, adapted or
        offloaded, or sees other positions than those of the sequence. If the numbers of samples and
        answers differ. If an activation that counts is NaN or infinite, with its layer and map.
    SpanError
        If this model, or some sample, has no positions of the span.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.pruning import calibrate
    >>> calibration = calibrate(vlm, samples[:1], span="image")
    >>> tuple(calibration.norms(1, "mlp.down_proj").shape)
    (1536,)
    """
    inputs = batches(
        vlm, samples, prompt, answers, batch_size=batch_size, progress=progress, desc="calibrate"
    )
    return calibrate_on(vlm, inputs, span)


def calibrate_on(
    vlm: VLM, batches: Iterable[Batch], span: str | Sequence[str] | None = None
) -> Calibration:
    """Calibrate on batches that are made already, one forward each.

    Use it for inputs that are not samples, such as plain texts: ``[vlm.batch(None, texts)]``.
    Nothing but the sums is kept. Padding never counts. Keys and values of cross-attention look at
    the picture, not at the sequence: they count the tiles that it has, whatever the span.

    Parameters
    ----------
    vlm : VLM
        The model.
    batches : iterable of Batch
        What ``vlm.batch`` or ``vlm.prepare`` gives. A generator is read one batch at a time.
    span : str or sequence of str, optional
        The kinds of positions that count, such as "image", "question" or "answer". By default all
        but the padding.

    Returns
    -------
    Calibration
        Sums of squares and numbers of tokens for each linear map.

    Raises
    ------
    InputError
        If there are no batches, a linear map is quantised, adapted or offloaded, or sees other
        positions than those of the sequence. If an activation that counts is NaN or infinite, with
        its layer and map.
    SpanError
        If this model, or some sample, has no positions of the span.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.pruning import calibrate_on
    >>> texts = vlm.batch(None, ["A red ball lies on the grass."])
    >>> calibration = calibrate_on(vlm, [texts])
    >>> calibration.tokens[1, "mlp.up_proj"] == texts["input_ids"].shape[1]
    True
    """
    names = (span,) if isinstance(span, str) else tuple(span or ())
    require(
        span is None or names,
        "span is empty",
        "name at least one kind of positions, or none for all",
    )
    meter = _Meter(vlm)
    with ExitStack() as hooks:
        for hook in meter.hooks():
            hooks.callback(hook.remove)
        for batch in batches:
            words = batch.spans != SPANS.index("padding")
            meter.add(batch, span_mask(vlm, batch, names) if names else words)
    require(any(meter.tokens.values()), "no batches", "give at least one")
    return Calibration(vlm.name, fingerprint(vlm), meter.squares, meter.tokens)


def linear_maps(vlm: VLM) -> dict[Key, nn.Module]:
    """Collect the linear maps of the decoder blocks: what can be masked.

    Use it to look up the names that masks and calibrations go by. Linear maps are nn.Linear, and
    Conv1D as in GPT-2. Mixtures of experts that hold the matrices of all experts in one tensor have
    no linear map there, and it is not masked.

    Parameters
    ----------
    vlm : VLM
        The model.

    Returns
    -------
    dict of (layer, map) to Module
        By the layer, from 1 to L, and the name of the linear map within its block.

    Raises
    ------
    InputError
        If there are none, or one is quantised, adapted or offloaded, so that its weights are
        not what the model computes with.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.pruning import linear_maps
    >>> maps = linear_maps(vlm)
    >>> len(maps), tuple(maps[1, "mlp.up_proj"].weight.shape)
    (210, (1536, 576))
    """
    maps: dict[Key, nn.Module] = {}
    for layer, block in enumerate(vlm.blocks, 1):
        for name, module in block.named_modules():
            require(
                not hasattr(module, "base_layer"), f"layer {layer} {name} has an adapter", _DENSE
            )
            if isinstance(module, (nn.Linear, Conv1D)):
                _require_dense(module.weight, f"layer {layer} {name}")
                maps[layer, name] = module
    require(
        maps,
        f"the decoder blocks of {vlm.name!r} have no linear maps",
        "give a model whose blocks are made of nn.Linear",
    )
    return maps


def fingerprint(vlm: VLM) -> str:
    """Compute a fingerprint that tells the decoder's linear maps from any others.

    Use it to check that masks or calibrations belong to a model, whatever the model is called. It
    is SHA-256 over each map's name, dtype and shape, and over the sums of its rows and of its
    columns, their bits taken as integers: exact, the same on every device, and another as soon as
    one weight is. Connectors and embeddings do not count.

    Parameters
    ----------
    vlm : VLM
        The model.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    InputError
        If the model has no linear maps, or one is quantised, adapted or offloaded.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning.calibration import fingerprint
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> before = fingerprint(small)
    >>> with torch.no_grad():
    ...     small.blocks[0].mlp.up_proj.weight[0, 0] = 1
    >>> len(before), fingerprint(small) == before
    (32, False)
    """
    digest = hashlib.sha256()
    for (layer, name), module in linear_maps(vlm).items():
        weight = module.weight.detach()
        digest.update(f"{layer} {name} {weight.dtype} {tuple(weight.shape)}".encode())
        bits = weight.view(_INTEGERS[weight.element_size()])
        for sums in (bits.sum(dim=0), bits.sum(dim=1)):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def turned(module: nn.Module, matrix: Tensor) -> Tensor:
    """Turn a matrix from the weight's own shape to (out, in), or back.

    Conv1D keeps its weight as (in, out).
    """
    return matrix.T if isinstance(module, Conv1D) else matrix


class _Meter:
    """The state that the hooks of one calibration share: the current batch, and the sums so far."""

    def __init__(self, vlm: VLM) -> None:
        self._vlm = vlm
        self._maps = linear_maps(vlm)
        self.squares: dict[Key, Float[Tensor, "d_in"]] = {}
        for key, module in self._maps.items():
            width = turned(module, module.weight).shape[1]
            self.squares[key] = torch.zeros(width, dtype=torch.float64)
        self.tokens = dict.fromkeys(self._maps, 0)
        # their inputs are the picture's states
        self._pictured: set[Key] = set()
        crossing = anatomy.cross_attention_layers(vlm.model)
        for layer, name in self._maps:
            if layer in crossing and name.endswith((".k_proj", ".v_proj")):
                self._pictured.add((layer, name))
        self._batch: Batch | None = None
        self._last: tuple[Callable[[], Tensor | None], tuple[Tensor, int]] | None = None
        self._batch_sums: dict[Key, tuple[Tensor, int]] = {}

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register them one by one."""
        for key, module in self._maps.items():
            yield module.register_forward_pre_hook(partial(self._enter, key), with_kwargs=True)

    def add(self, batch: Batch, mask: Bool[Tensor, "b t"]) -> None:
        """Run a forward over a batch and add the sums over the positions of the mask."""
        self._batch = batch
        self._mask = mask.flatten()
        self._last = None
        self._batch_sums = {}
        self._positions = None if mask.all() else self._mask.nonzero().flatten()
        self._vlm.forward(batch, logits=False, use_cache=False)
        for (layer, name), (sums, n) in self._batch_sums.items():
            wide = sums.cpu().double()
            if not torch.isfinite(wide).all():
                advice = (
                    "look for a number format that is too narrow (load in bfloat16 or "
                    "float32), or for damaged weights"
                )
                raise InputError(f"NaN or infinite activations enter layer {layer} {name}", advice)
            self.squares[layer, name] += wide
            self.tokens[layer, name] += n

    def _enter(self, key: Key, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Add what enters a linear map to the sums of this batch."""
        states = args[0] if args else kwargs["input"]
        # queries, keys and values share an input: it is summed once
        if self._last is None or self._last[0]() is not states:
            self._last = (weakref.ref(states), self._sums(key, states))
        self._batch_sums[key] = self._last[1]

    def _sums(self, key: Key, states: Tensor) -> tuple[Float[Tensor, "d_in"], int]:
        """Return the sum of squares of each input feature, and the number of rows that count."""
        # OPT's MLP has all positions in one row
        rows = states.detach().reshape(-1, states.shape[-1])
        if key in self._pictured:
            selected = self._tiles(len(rows))
        elif len(rows) == len(self._mask):
            selected = self._positions
        else:
            raise InputError(
                f"layer {key[0]} {key[1]} sees {len(rows)} rows for {len(self._mask)} positions",
                "give a model whose linear maps see every position (no routing to experts)",
            )
        # rows are picked and not multiplied by 0: what stands in the padding may be NaN
        if selected is not None:
            rows = rows.index_select(0, selected.to(rows.device))
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return wide.square().sum(0), len(rows)

    def _tiles(self, n: int) -> Tensor | None:
        """The rows of the picture's states that belong to tiles which a text looks at.

        The others are padding.
        """
        mask = self._batch.get("cross_attention_mask")  # (b, t, pictures, tiles)
        if mask is None:
            return None
        tiles = mask.bool().any(dim=1).flatten()
        return tiles.repeat_interleave(n // len(tiles)).nonzero().flatten()


def _require_dense(weight: Tensor, name: str) -> None:
    require(not weight.is_meta, f"{name} is offloaded", _DENSE)
    require(
        weight.is_floating_point() and type(weight) is nn.Parameter,
        f"{name} is quantised ({weight.dtype})",
        _DENSE,
    )
