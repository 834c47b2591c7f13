"""Prune weights: n:m patterns, shared subnetworks, masks at matched sparsity, zeros for good.

A shared subnetwork is the one that all of several tasks use. A mask is True where a weight is
kept. A dense matrix full of zeros takes the same time and memory as before: what really gets
smaller is in :mod:`~xlvlms_tutorial.methods.pruning.structured`.
"""

from collections import Counter
from collections.abc import Iterable
from os import PathLike

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xlvlms_tutorial.errors import ComparisonError, InterventionError, SelectionError
from xlvlms_tutorial.interventions.overrides import Layers
from xlvlms_tutorial.methods.pruning.calibration import (
    Calibration,
    fingerprint,
    linear_maps,
    turned,
)
from xlvlms_tutorial.methods.pruning.masks import Key, Masks, joined
from xlvlms_tutorial.methods.pruning.scores import (
    chosen_maps,
    magnitude,
    masks_of,
    random_masks,
    scorer,
    wanda,
    without_lowest,
)
from xlvlms_tutorial.models.vlm import VLM

METHODS = ("wanda", "magnitude", "random", "given")


def nm(
    vlm: VLM,
    by: Calibration | str,
    n: int = 2,
    m: int = 4,
    layers: Layers | None = None,
    seed: int = 0,
) -> Masks:
    r"""Masks that keep the n highest-scored of every m consecutive inputs of an output row.

    The sparsity is :math:`1 - n / m` everywhere. Scores are Wanda's where ``by`` is a calibration
    (Sun et al., 2023, arXiv 2306.11695), else "magnitude" or "random". Of equal scores the first
    are dropped first. 2:4 is what GPUs of compute capability 8.0 or more can multiply faster, in
    PyTorch after ``torch.sparse.to_sparse_semi_structured``; masked alone, nothing is saved.

    Raises
    ------
    SelectionError
        If n is not one of 1 to m - 1, m does not divide the inputs of a linear map, ``by`` is
        unknown, no layer is given, or a linear map is quantised, adapted or offloaded.
    LayerError
        If the model has no such layer.
    ComparisonError
        If the calibration is of other weights.
    ActivationsError
        If a linear map saw no token, or a score is NaN or infinite.
    """
    if not 1 <= n < m:
        raise SelectionError(f"{n}:{m}", "keep n of m consecutive weights, n from 1 to m - 1")
    keys, maps = chosen_maps(vlm, layers), linear_maps(vlm)
    for layer, name in keys:
        if (width := turned(maps[layer, name], maps[layer, name].weight).shape[1]) % m:
            raise SelectionError(
                f"{n}:{m} in layer {layer} {name}, which has {width} inputs",
                "choose an m that divides them",
            )
    score, mark = scorer(vlm, by, seed)
    return masks_of(vlm, keys, score, lambda key, found: _best_of_groups(found, n, m), mark)


def alpha_subnet(masks: Iterable[Masks | str | PathLike]) -> Masks:
    r"""The weights that every one of the masks keeps.

    The subnetwork that all tasks and modalities activate (alpha-SubNet). :math:`K = \bigcap_i K_i`
    (Shukor and Cord, 2024, arXiv 2405.16700), whose sparsity is never below that of any mask. Masks
    may be given as paths of files, which are read one at a time, so that two are in memory however
    many there are, one bit a weight. With which masks to compare it: :func:`matched`.

    Raises
    ------
    SelectionError
        If there are no masks.
    ComparisonError
        If they are of other weights, or of other linear maps.
    RecordError
        If a file is no file of masks, or is damaged.
    """
    merged: Masks | None = None
    for given in masks:
        found = given if isinstance(given, Masks) else Masks.load(given)
        if merged is None:
            bits = {
                key: packed.copy() if found is given else packed
                for key, packed in found.packed.items()
            }
            merged = Masks(bits, found.shapes, found.model, found.fingerprint)
        elif (found.fingerprint, found.shapes) != (merged.fingerprint, merged.shapes):
            raise ComparisonError(
                "weights, or linear maps, behind two masks",
                merged,
                found,
                "merge masks of the same weights",
            )
        for key, packed in found.packed.items():
            np.bitwise_and(merged.packed[key], packed, out=merged.packed[key])
        merged.model = joined(merged.model, found.model)
        del found, given  # before the next is read
    if merged is None:
        raise SelectionError(
            "no masks", "give one or more, or paths of files that Masks.save wrote"
        )
    return merged


def matched(vlm: VLM, masks: Masks, by: Calibration | str, seed: int = 0) -> Masks:
    """Masks that keep as many weights as ``masks`` does in every row, chosen by other scores.

    Exactly as many in every output row. What to compare an intersection with, whose rows differ in
    sparsity: ``by`` is "magnitude", "random", or a calibration (Wanda). Of equal scores the first
    are dropped first. One linear map is worked on at a time.

    Raises
    ------
    ComparisonError
        If the masks, or the calibration, are of other weights.
    SelectionError
        If ``by`` is unknown, or a linear map is quantised, adapted or offloaded.
    ActivationsError
        If a linear map saw no token, or a score is NaN or infinite.
    """
    maps = _maps_of(vlm, masks)
    score, mark = scorer(vlm, by, seed)

    def choose(key: Key, found: Tensor) -> Tensor:
        counts = turned(maps[key], masks.unpack(*key)).count_nonzero(dim=1)
        return without_lowest(found, (found.shape[1] - counts).to(found.device))

    return masks_of(vlm, masks, score, choose, mark)


def masks_by(
    method: str,
    vlm: VLM,
    sparsity: float | None = None,
    calibration: Calibration | None = None,
    seed: int = 0,
    masks: Masks | str | PathLike | None = None,
) -> Masks:
    """Masks by the name of a method, one of ``METHODS``.

    "wanda" needs a calibration, "given" masks or their file, and no sparsity.

    Raises
    ------
    SelectionError
        If the method is unknown, what it needs is not given, or as the method itself.
    ComparisonError
        If the calibration, or the masks given, are of other weights.
    ActivationsError, RecordError
        As :func:`wanda` and :func:`alpha_subnet`.
    """
    if method not in METHODS:
        raise SelectionError(f"unknown method {method!r}", f"allowed: {', '.join(METHODS)}")
    needs = {"wanda": {"sparsity": sparsity, "calibration": calibration}, "given": {"masks": masks}}
    for name, value in needs.get(method, {"sparsity": sparsity}).items():
        if value is None:
            raise SelectionError(f"method {method!r} without {name}", f"give {name}=...")
    if method == "wanda":
        return wanda(vlm, calibration, sparsity)
    if method == "magnitude":
        return magnitude(vlm, sparsity)
    if method == "random":
        return random_masks(vlm, sparsity, seed)
    given = masks if isinstance(masks, Masks) else Masks.load(masks)
    _maps_of(vlm, given)
    return given


@torch.no_grad()
def apply_masks(vlm: VLM, masks: Masks) -> None:
    """Write zeros where the masks keep nothing, in place and for good.

    ``vlm.model.save_pretrained`` then saves the pruned model. Saves no time and no memory:
    zeros are multiplied and stored like other numbers. The name of the model says that it
    is masked, so that what is captured is not taken for the dense model's. For a mask that
    goes again: ``interventions.mask_weights``.

    Raises
    ------
    ComparisonError
        If the masks are of other weights.
    SelectionError
        If a linear map is quantised, adapted or offloaded, or shares its weights
        with another part of the model.
    InterventionError
        If an intervention is active.
    """
    maps = _maps_of(vlm, masks)
    require_own(vlm, {f"layer {layer} {name}": maps[layer, name] for layer, name in masks})
    for key in masks:
        weight = maps[key].weight
        weight.masked_fill_(~masks.unpack(*key).to(weight.device), 0)
    vlm.name += f" + masked {masks.sparsity:.1%} ({fingerprint(vlm)[:8]})"


def require_own(vlm: VLM, modules: dict[str, nn.Module]) -> None:
    """Stop a change for good of weights that other parts use too.

    Or that an active intervention would undo or change.

    Raises
    ------
    InterventionError
        If an intervention is active.
    SelectionError
        If the weights of a module are another module's too.
    """
    if vlm.active:
        raise InterventionError(
            f"weights changed for good inside {vlm.active[-1]}", "leave the intervention first"
        )
    users = Counter(
        parameter.data_ptr() for _, parameter in vlm.model.named_parameters(remove_duplicate=False)
    )
    for name, module in modules.items():
        if users[module.weight.data_ptr()] > 1:
            raise SelectionError(
                f"the weights of {name} are shared with another part of the model",
                "leave this part as it is",
            )


def _maps_of(vlm: VLM, masks: Masks) -> dict[Key, nn.Module]:
    """The linear maps of the model that the masks are of."""
    maps = linear_maps(vlm)
    fit = all(
        key in maps and tuple(maps[key].weight.shape) == shape
        for key, shape in masks.shapes.items()
    )
    if masks.fingerprint != fingerprint(vlm) or not fit:
        raise ComparisonError(
            "the weights of masks and model",
            masks,
            vlm.name,
            "use masks that were made for these weights",
        )
    return maps


def _best_of_groups(
    found: Float[Tensor, "rows columns"], n: int, m: int
) -> Bool[Tensor, "rows columns"]:
    """Where a score is among the n highest of its group of m neighbours.

    Of equal ones the last are kept.
    """
    groups = found.reshape(-1, m)
    if m > 8:
        return without_lowest(groups, m - n).reshape(found.shape)
    # each weight's rank by comparing it with its few neighbours, twice as fast as a
    # selection in millions of groups of four
    columns = groups.T.contiguous()
    ranks = [
        torch.zeros(columns.shape[1], dtype=torch.uint8, device=found.device) for _ in range(m)
    ]
    for i in range(m):
        for j in range(i):
            higher = (columns[i] >= columns[j]).view(torch.uint8)
            ranks[i] += higher
            ranks[j] += 1 - higher
    return (torch.stack(ranks, dim=1) >= m - n).reshape(found.shape)
