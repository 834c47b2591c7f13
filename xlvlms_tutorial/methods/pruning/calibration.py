"""What inputs are like to each linear map of the decoder.

The size of every input feature, over the positions that count.
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
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from xlvlms_tutorial.activations.hooks import span_mask
from xlvlms_tutorial.errors import ActivationsError, ComparisonError, LengthError, SelectionError
from xlvlms_tutorial.methods.pruning.masks import Key, joined
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample

_DENSE = "load the model without quantise, whole on its devices, and without an adapter"
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a weight


@dataclass(frozen=True, eq=False)
class Calibration:
    r"""What some inputs are like to each linear map.

    Per input feature :math:`\sum_t x_{tj}^2`, and the number of tokens t. ``a + b`` is the
    calibration on the inputs of both: take parts of the samples once, and any union of parts costs
    nothing more. Models may differ in name, as those with other connectors to one language model
    do, but not in their linear maps' weights.

    Parameters
    ----------
    model
        The name of the model.
    fingerprint
        What tells its linear maps' weights from any others: :func:`fingerprint`.
    squares
        For each ``(layer, map)`` the sum (d_in,) in float64 on the CPU.
    tokens
        For each ``(layer, map)`` the number of tokens; 0 where the map was never used, as
        cross-attention is without a picture.
    """

    model: str
    fingerprint: str
    squares: Mapping[Key, Float[Tensor, "d_in"]]
    tokens: Mapping[Key, int]

    def __add__(self, other: "Calibration") -> "Calibration":
        if self.fingerprint != other.fingerprint:
            raise ComparisonError(
                "weights behind two calibrations",
                self,
                other,
                "add calibrations of one language model",
            )
        squares = {key: sums + other.squares[key] for key, sums in self.squares.items()}
        tokens = {key: n + other.tokens[key] for key, n in self.tokens.items()}
        return Calibration(joined(self.model, other.model), self.fingerprint, squares, tokens)

    def __repr__(self) -> str:
        return (
            f"Calibration of {self.model}: {len(self.squares)} linear maps, "
            f"{max(self.tokens.values()):,} tokens"
        )

    def norms(self, layer: int, name: str) -> Float[Tensor, "d_in"]:
        r"""Root mean square of each input feature, :math:`\sqrt{\frac{1}{T} \sum_t x_{tj}^2}`.

        Raises
        ------
        SelectionError
            If there is no such map.
        ActivationsError
            If the map was never used.
        """
        if (layer, name) not in self.squares:
            raise SelectionError(
                f"no linear map {name!r} in layer {layer}",
                f"there are: {', '.join(f'{k} {n}' for k, n in self.squares)}",
            )
        if not self.tokens[layer, name]:
            raise ActivationsError(
                f"layer {layer} {name} saw no token",
                "calibrate on inputs that reach it (cross-attention: pictures)",
            )
        return (self.squares[layer, name] / self.tokens[layer, name]).sqrt()


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

    The model is asked to describe them unless ``prompt`` says otherwise. ``span``
    ("image", "question", "answer", ... or several) counts only those positions; by
    default all but the padding count.

    Raises
    ------
    SelectionError
        If there are no samples, or the batch size is below 1.
    LengthError
        If samples and answers are not equally many.
    SpanError, ActivationsError
        As :func:`calibrate_on`.
    """
    samples = list(samples)
    if not samples or batch_size < 1:
        raise SelectionError(
            f"{len(samples)} samples in batches of {batch_size}", "give at least one of each"
        )
    texts = [_text(prompt, sample) for sample in samples]
    told = [answers(sample) for sample in samples] if callable(answers) else answers
    if told is not None and len(told) != len(samples):
        raise LengthError(samples=len(samples), answers=len(told))
    starts = range(0, len(samples), batch_size)

    def batches() -> Iterator[Batch]:
        for start in tqdm(
            starts, desc="calibrate", unit="batch", leave=False, disable=not progress
        ):
            cut = slice(start, start + batch_size)
            yield vlm.batch_of(samples[cut], texts[cut], None if told is None else list(told[cut]))

    return calibrate_on(vlm, batches(), span)


def calibrate_on(
    vlm: VLM, batches: Iterable[Batch], span: str | Sequence[str] | None = None
) -> Calibration:
    """Calibrate on batches made elsewhere, one forward each.

    With texts only, ``[vlm.batch(None, texts)]``. Nothing is kept but the sums. Padding never
    counts. Keys and values of cross-attention look at the picture, not at the sequence: they count
    the tiles that it has, whatever the span.

    Raises
    ------
    SelectionError
        If there are no batches, a linear map is quantised, adapted or offloaded, or sees other
        positions than those of the sequence.
    SpanError
        If this model, or some sample, has no positions of the span.
    ActivationsError
        If an activation that counts is NaN or infinite, with its layer and map.
    """
    names = (span,) if isinstance(span, str) else span if span is None else tuple(span)
    if names == ():
        raise SelectionError(
            "span is empty", "name at least one kind of positions, or none for all"
        )
    meter = _Meter(vlm)
    with ExitStack() as hooks:
        for hook in meter.hooks():
            hooks.callback(hook.remove)
        for batch in batches:
            meter.take(
                batch,
                batch.spans != SPANS.index("padding")
                if names is None
                else span_mask(vlm, batch, names),
            )
    if not any(meter.tokens.values()):
        raise SelectionError("no batches", "give at least one")
    return Calibration(vlm.name, fingerprint(vlm), meter.squares, meter.tokens)


def linear_maps(vlm: VLM) -> dict[Key, nn.Module]:
    """The linear maps inside the decoder blocks by ``(layer, name within the block)``.

    nn.Linear, and Conv1D as in GPT-2. Mixtures of experts that hold the matrices of all experts in
    one tensor have no linear map there, and it is not masked.

    Raises
    ------
    SelectionError
        If there are none, or one is quantised, adapted or offloaded, so that its weights are
        not what the model computes with.
    """
    found: dict[Key, nn.Module] = {}
    for layer, block in enumerate(vlm.blocks, 1):
        for name, module in block.named_modules():
            if hasattr(module, "base_layer"):
                raise SelectionError(f"layer {layer} {name} has an adapter", _DENSE)
            if isinstance(module, (nn.Linear, Conv1D)):
                _require_dense(module.weight, f"layer {layer} {name}")
                found[layer, name] = module
    if not found:
        raise SelectionError(
            f"the decoder blocks of {vlm.name!r} have no linear maps",
            "give a model whose blocks are made of nn.Linear",
        )
    return found


def fingerprint(vlm: VLM) -> str:
    """What tells the weights of the decoder's linear maps from any others.

    32 hexadecimal digits, whatever the model is called. SHA-256 over each map's name, number
    format and shape, and over the sums of its rows and of its columns, their bits taken as
    whole numbers: exact, the same on every device, and another as soon as one weight is.
    Connectors and embeddings do not count.

    Raises
    ------
    SelectionError
        As :func:`linear_maps`.
    """
    digest = hashlib.sha256()
    for (layer, name), module in linear_maps(vlm).items():
        weight = module.weight.detach()
        digest.update(f"{layer} {name} {weight.dtype} {tuple(weight.shape)}".encode())
        bits = weight.view(_WHOLE[weight.element_size()])
        for sums in (bits.sum(dim=0), bits.sum(dim=1)):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def turned(module: nn.Module, matrix: Tensor) -> Tensor:
    """From the weight's own shape to (out, in) or back: Conv1D keeps its weight as (in, out)."""
    return matrix.T if isinstance(module, Conv1D) else matrix


class _Meter:
    """What the hooks of one calibration share: where the batch is, and the sums so far."""

    def __init__(self, vlm: VLM) -> None:
        self._vlm, self._maps = vlm, linear_maps(vlm)
        widths = {key: turned(module, module.weight).shape[1] for key, module in self._maps.items()}
        self.squares = {
            key: torch.zeros(width, dtype=torch.float64) for key, width in widths.items()
        }
        self.tokens = dict.fromkeys(widths, 0)
        crossing = anatomy.cross_attention_layers(vlm.model)
        self._pictured = {
            key for key in widths if key[0] in crossing and key[1].endswith((".k_proj", ".v_proj"))
        }
        self._batch: Batch | None = None
        self._last: tuple[Callable[[], Tensor | None], tuple[Tensor, int]] | None = None
        self._found: dict[Key, tuple[Tensor, int]] = {}

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register them one by one."""
        for key, module in self._maps.items():
            yield module.register_forward_pre_hook(partial(self._enter, key), with_kwargs=True)

    def take(self, batch: Batch, mask: Bool[Tensor, "b t"]) -> None:
        """One forward over a batch, whose sums over the positions of the mask are added."""
        self._batch, self._mask, self._last, self._found = batch, mask.flatten(), None, {}
        self._at = None if mask.all() else self._mask.nonzero().flatten()
        self._vlm.forward(batch, logits=False, use_cache=False)
        for (layer, name), (sums, n) in self._found.items():
            wide = sums.cpu().double()
            if not torch.isfinite(wide).all():
                advice = (
                    "look for a number format that is too narrow (load in bfloat16 or "
                    "float32), or for damaged weights"
                )
                raise ActivationsError(
                    f"NaN or infinite activations enter layer {layer} {name}", advice
                )
            self.squares[layer, name] += wide
            self.tokens[layer, name] += n

    def _enter(self, key: Key, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs["input"]
        # queries, keys and values share an input: it is summed once
        if self._last is None or self._last[0]() is not given:
            self._last = (weakref.ref(given), self._sums(key, given))
        self._found[key] = self._last[1]

    def _sums(self, key: Key, given: Tensor) -> tuple[Float[Tensor, "d_in"], int]:
        rows = given.detach().reshape(-1, given.shape[-1])  # OPT's MLP has all positions in one row
        at = self._tiles(len(rows)) if key in self._pictured else self._at
        if key not in self._pictured and len(rows) != len(self._mask):
            found = f"layer {key[0]} {key[1]} sees {len(rows)} rows for {len(self._mask)} positions"
            raise SelectionError(
                found, "give a model whose linear maps see every position (no routing to experts)"
            )
        # rows are picked and not multiplied by 0: what stands in the padding may be NaN
        rows = rows if at is None else rows.index_select(0, at.to(rows.device))
        return rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(0), len(rows)

    def _tiles(self, n: int) -> Tensor | None:
        """Which rows of the picture's states belong to tiles that a text looks at.

        The others are padding.
        """
        seen = self._batch.get("cross_attention_mask")  # (b, t, pictures, tiles)
        if seen is None:
            return None
        tiles = seen.bool().any(dim=1).flatten()
        return tiles.repeat_interleave(n // len(tiles)).nonzero().flatten()


def _require_dense(weight: Tensor, where: str) -> None:
    if weight.is_meta:
        raise SelectionError(f"{where} is offloaded", _DENSE)
    if not weight.is_floating_point() or type(weight) is not nn.Parameter:
        raise SelectionError(f"{where} is quantised ({weight.dtype})", _DENSE)


def _text(prompt: str | Callable[[Sample], str] | None, sample: Sample) -> str:
    if callable(prompt):
        return prompt(sample)
    # samples of an unknown modality are refused where they are batched
    return PROMPTS.get(sample.modality, PROMPTS["image"]) if prompt is None else prompt
