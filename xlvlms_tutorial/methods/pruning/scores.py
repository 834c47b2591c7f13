"""Activated subnetworks.

The weights of the decoder that matter for some inputs, by Wanda (Sun et al., 2023, arXiv
2306.11695). A linear map's weight matters by its size and by the size of what it is
multiplied with. Which weights are kept for pictures, for texts or for a task, and how
many of them are the same, is compared after Shukor and Cord (2024, arXiv 2405.16700). A
mask is True where a weight is kept.
"""

from collections.abc import Callable, Iterable
from math import floor

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from xlvlms_tutorial.errors import ActivationsError, ComparisonError, SelectionError
from xlvlms_tutorial.interventions.overrides import Layers, checked_layers
from xlvlms_tutorial.methods.pruning.calibration import (
    Calibration,
    fingerprint,
    linear_maps,
    turned,
)
from xlvlms_tutorial.methods.pruning.masks import Key, Masks, packed
from xlvlms_tutorial.models.vlm import VLM

Score = Callable[[Key, nn.Module], Tensor]


def scores(
    vlm: VLM, calibration: Calibration, layer: int, name: str
) -> Float[Tensor, "rows columns"]:
    r"""Wanda's importance of each weight of a linear map, in the weight's own shape.

    :math:`|W_{ij}| \sqrt{\frac{1}{T} \sum_t x_{tj}^2}`.

    Raises
    ------
    SelectionError, ActivationsError, ComparisonError
        As :func:`wanda`.
    """
    maps = linear_maps(vlm)
    _require_fitting(vlm, calibration)
    norms = calibration.norms(layer, name)
    return turned(maps[layer, name], _importance(maps[layer, name], norms))


def wanda(
    vlm: VLM, calibration: Calibration, sparsity: float, layers: Layers | None = None
) -> Masks:
    r"""Masks that drop the weights with the lowest :func:`scores` in each output row.

    :math:`\lfloor s\, d_{in} \rfloor` of them. Of equal scores the first are dropped first. All
    scores are of the dense model, whereas Sun et al. (2023) prune layer by layer and compute later
    activations with the pruned layers; so a mask says what the model as it is makes use of.
    Upstream divides by samples instead of tokens, which changes no mask. One linear map is worked
    on at a time; ``layers`` makes masks for some layers alone.

    Raises
    ------
    SelectionError
        If the sparsity is not in [0, 1), no layer is given, or a linear map is
        quantised, adapted or offloaded.
    LayerError
        If the model has no such layer.
    ComparisonError
        If the calibration is of other weights; the name of the model does not matter.
    ActivationsError
        If a linear map saw no token, or a score is NaN or infinite.
    """
    score, mark = scorer(vlm, calibration)
    return _masks(vlm, score, sparsity, mark, layers)


def magnitude(vlm: VLM, sparsity: float, per: str = "row", layers: Layers | None = None) -> Masks:
    r"""Masks that drop the smallest weights :math:`|W_{ij}|`.

    The share ``sparsity`` of each output row or of each whole matrix.

    Raises
    ------
    SelectionError
        If the sparsity is not in [0, 1), ``per`` is unknown, no layer is given, or a linear map is
        quantised, adapted or offloaded.
    LayerError
        If the model has no such layer.
    """
    if per not in ("row", "matrix"):
        raise SelectionError(f"magnitude per {per!r}", "allowed: 'row', 'matrix'")
    score, mark = scorer(vlm, "magnitude")
    return _masks(vlm, score, sparsity, mark, layers, whole=per == "matrix")


def random_masks(vlm: VLM, sparsity: float, seed: int) -> Masks:
    """Masks drawn by chance, the same on every device.

    They keep in each output row as many weights as :func:`wanda` does.

    Raises
    ------
    SelectionError
        If the sparsity is not in [0, 1), or a linear map is quantised, adapted or offloaded.
    """
    score, mark = scorer(vlm, "random", seed)
    return _masks(vlm, score, sparsity, mark)


def scorer(vlm: VLM, by: Calibration | str, seed: int = 0) -> tuple[Score, str]:
    """What gives the scores (out, in) of a linear map.

    Wanda's where ``by`` is a calibration, "magnitude" or "random"; and the fingerprint.

    Raises
    ------
    SelectionError
        If ``by`` is something else, or a linear map is quantised, adapted or offloaded.
    ComparisonError
        If the calibration is of other weights.
    """
    if isinstance(by, Calibration):
        mark = _require_fitting(vlm, by)
        return lambda key, module: _importance(module, by.norms(*key)), mark
    if by not in ("magnitude", "random"):
        raise SelectionError(f"scores by {by!r}", "allowed: a Calibration, 'magnitude', 'random'")
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda key, module: torch.rand(turned(module, module.weight).shape, generator=generator)
    return drawn if by == "random" else lambda key, module: _rows(module), fingerprint(vlm)


def chosen_maps(vlm: VLM, layers: Layers | None) -> list[Key]:
    """The linear maps of some layers, or of all.

    Raises
    ------
    SelectionError, LayerError
        If no layer is given, or one is none of the model's; or as
        :func:`~xlvlms_tutorial.methods.pruning.calibration.linear_maps`.
    """
    chosen = range(1, vlm.n_layers + 1) if layers is None else checked_layers(vlm, layers)
    if not chosen:
        raise SelectionError("no layers", "give one or more, or None for all")
    return [key for key in linear_maps(vlm) if key[0] in chosen]


def masks_of(
    vlm: VLM, keys: Iterable[Key], score: Score, choose: Callable[[Key, Tensor], Tensor], mark: str
) -> Masks:
    """Masks by what ``choose`` keeps of the scores (out, in) of each linear map, one map at a time.

    Raises
    ------
    ActivationsError
        If a score is NaN or infinite.
    """
    maps, bits, shapes = linear_maps(vlm), {}, {}
    for key in keys:
        found = score(key, maps[key])
        if not torch.isfinite(found).all():
            raise ActivationsError(
                f"NaN or infinite scores in layer {key[0]} {key[1]}", "look for damaged weights"
            )
        bits[key], shapes[key] = (
            packed(turned(maps[key], choose(key, found))),
            tuple(maps[key].weight.shape),
        )
    return Masks(bits, shapes, vlm.name, mark)


def _masks(
    vlm: VLM,
    score: Score,
    sparsity: float,
    mark: str,
    layers: Layers | None = None,
    whole: bool = False,
) -> Masks:
    """Masks that drop the same share of each row, or (``whole``) of each matrix."""
    if not 0 <= sparsity < 1:
        raise SelectionError(
            f"sparsity {sparsity}", "give the share of weights to drop: 0 or more, and below 1"
        )
    choose = lambda key, found: kept(found.reshape(1, -1) if whole else found, sparsity).reshape(
        found.shape
    )
    return masks_of(vlm, chosen_maps(vlm, layers), score, choose, mark)


def kept(found: Float[Tensor, "rows columns"], sparsity: float) -> Bool[Tensor, "rows columns"]:
    r"""Where a row's scores are not among its :math:`\lfloor s \cdot columns \rfloor` lowest.

    Of equal ones the first are dropped.
    """
    return without_lowest(found, floor(sparsity * found.shape[1] + 1e-9))  # 0.29 * 100 is 28.999...


def without_lowest(
    found: Float[Tensor, "rows columns"], n: int | Int[Tensor, "rows"]
) -> Bool[Tensor, "rows columns"]:
    """Where a row's scores are not among its n lowest, with one n for all rows or one a row.

    Of equal ones the first are dropped.
    """
    if isinstance(n, int) and not n:
        return torch.ones_like(found, dtype=torch.bool)
    limit = _smallest(found, n)
    keep = found > limit
    tied = (keep.count_nonzero(dim=1) != found.shape[1] - n).nonzero().flatten()
    if len(tied):
        some, edge = found[tied], limit[tied]
        equal, below = some == edge, (some < edge).count_nonzero(dim=1)
        due = (n if isinstance(n, int) else n[tied]) - below
        keep[tied] |= equal & (equal.cumsum(dim=1) > due[:, None])
    return keep


def _smallest(
    found: Float[Tensor, "rows columns"], n: int | Int[Tensor, "rows"]
) -> Float[Tensor, "rows 1"]:
    """The n-th smallest score of each row; below all of them where n is 0."""
    on_cpu = found.device.type == "cpu"  # where NumPy is several times faster
    if isinstance(n, int):
        if on_cpu:
            return torch.from_numpy(np.partition(found.numpy(), n - 1, axis=1)[:, n - 1 : n].copy())
        return torch.kthvalue(found, n, dim=1, keepdim=True).values
    ordered = (
        torch.from_numpy(np.sort(found.numpy(), axis=1)) if on_cpu else found.sort(dim=1).values
    )
    limit = ordered.gather(1, (n - 1).clamp(min=0)[:, None])
    return limit.masked_fill((n == 0)[:, None], -torch.inf)


def _importance(module: nn.Module, norms: Float[Tensor, "d_in"]) -> Float[Tensor, "out d_in"]:
    rows = _rows(module)
    return rows.mul_(norms.to(dtype=rows.dtype).to(rows.device))


def _rows(module: nn.Module) -> Float[Tensor, "out d_in"]:
    """The sizes of the weights, one row for each output, in memory of their own."""
    weight = turned(module, module.weight.detach())
    return weight.abs().to(torch.promote_types(weight.dtype, torch.float32)).contiguous()


def _require_fitting(vlm: VLM, calibration: Calibration) -> str:
    """The fingerprint of the model's weights, where the calibration is of the same."""
    own = fingerprint(vlm)
    if calibration.fingerprint != own:
        raise ComparisonError(
            "the weights of calibration and model",
            calibration,
            vlm.name,
            "calibrate on the weights that are scored",
        )
    return own
