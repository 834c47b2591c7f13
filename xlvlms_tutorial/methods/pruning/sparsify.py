"""Prune weights by n:m patterns, shared subnetworks and masks at matched sparsity.

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

from xlvlms_tutorial.errors import InterventionError, incomparable
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
    masks_of,
    scorer,
    without_lowest,
)
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require


def n_m_masks(
    vlm: VLM,
    by: Calibration | str,
    n: int = 2,
    m: int = 4,
    layers: Layers | None = None,
    seed: int = 0,
) -> Masks:
    r"""Mask all but the n highest-scored of every m consecutive weights of an output row.

    Use 2:4 for what GPUs of compute capability 8.0 or more can multiply faster, in PyTorch after
    ``torch.sparse.to_sparse_semi_structured``; masked alone, nothing is saved. The sparsity is
    :math:`1 - n / m` everywhere. Of equal scores the first are dropped first.

    Parameters
    ----------
    vlm : VLM
        The model.
    by : Calibration or {"magnitude", "random"}
        The scores: Wanda's for a calibration (Sun et al., 2023, arXiv 2306.11695), the sizes of
        the weights, or random numbers.
    n : int
        How many weights of each group are kept, from 1 to m - 1.
    m : int
        The size of a group, which has to divide the number of inputs of every linear map.
    layers : int or sequence of int, optional
        The layers to make masks for, from 1 to L. By default all.
    seed : int
        The seed of "random".

    Returns
    -------
    Masks
        One mask for each linear map, True where a weight is kept.

    Raises
    ------
    InputError
        If n is not one of 1 to m - 1, m does not divide the inputs of a linear map, ``by`` is
        unknown, no layer is given, or a linear map is quantised, adapted or offloaded. If the
        calibration is of other weights. If a linear map saw no token, or a score is NaN or
        infinite.
    LayerError
        If the model has no such layer.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import n_m_masks
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> masks = n_m_masks(small, "magnitude", n=2, m=4)
    >>> mask = masks.unpack(1, "mlp.up_proj")
    >>> mask.reshape(-1, 4).sum(dim=1).unique().tolist()
    [2]
    """
    require(1 <= n < m, f"{n}:{m}", "keep n of m consecutive weights, n from 1 to m - 1")
    keys = chosen_maps(vlm, layers)
    maps = linear_maps(vlm)
    for layer, name in keys:
        module = maps[layer, name]
        width = turned(module, module.weight).shape[1]
        require(
            width % m == 0,
            f"{n}:{m} in layer {layer} {name}, which has {width} inputs",
            "choose an m that divides them",
        )
    score, mark = scorer(vlm, by, seed)

    def choose(key: Key, values: Tensor) -> Tensor:
        return _best_of_groups(values, n, m)

    return masks_of(vlm, keys, score, choose, mark)


def alpha_subnet(masks: Iterable[Masks | str | PathLike]) -> Masks:
    r"""Intersect masks: keep the weights that every one of them keeps.

    Use it to find the subnetwork that all tasks and modalities activate, the alpha-SubNet of Shukor
    and Cord, 2024 (arXiv 2405.16700). :math:`K = \bigcap_i K_i`, whose sparsity is never below that
    of any mask. Compare it with :func:`match_sparsity` masks.

    Parameters
    ----------
    masks : iterable of Masks, str or path
        Masks of the same weights and maps, or files that ``Masks.save`` wrote. Files are read one
        at a time, so that two masks are in memory however many there are, one bit a weight.

    Returns
    -------
    Masks
        The intersection. Its ``model`` joins the names of the masks' models.

    Raises
    ------
    InputError
        If there are no masks. If they are of other weights, or of other linear maps.
    FileError
        If a file is no file of masks, or is damaged.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.pruning import Masks, alpha_subnet
    >>> key = (1, "mlp.up_proj")
    >>> captions = Masks.pack({key: torch.tensor([[True, True, False]])}, "small", "f")
    >>> answers = Masks.pack({key: torch.tensor([[True, False, True]])}, "small", "f")
    >>> alpha_subnet([captions, answers]).unpack(1, "mlp.up_proj").tolist()
    [[True, False, False]]
    """
    merged: Masks | None = None
    for source in masks:
        loaded = source if isinstance(source, Masks) else Masks.load(source)
        if merged is None:
            bits = dict(loaded.packed)
            # what the caller has stays as it is
            if loaded is source:
                bits = {key: packed.copy() for key, packed in bits.items()}
            merged = Masks(bits, loaded.shapes, loaded.model, loaded.fingerprint)
        elif (loaded.fingerprint, loaded.shapes) != (merged.fingerprint, merged.shapes):
            raise incomparable(
                "weights, or linear maps, behind two masks",
                merged,
                loaded,
                "merge masks of the same weights",
            )
        for key, packed in loaded.packed.items():
            np.bitwise_and(merged.packed[key], packed, out=merged.packed[key])
        merged.model = joined(merged.model, loaded.model)
        del loaded, source  # before the next is read
    require(
        merged is not None, "no masks", "give one or more, or paths of files that Masks.save wrote"
    )
    return merged


def match_sparsity(vlm: VLM, masks: Masks, by: Calibration | str, seed: int = 0) -> Masks:
    """Make masks that keep the same number of weights in every output row, by other scores.

    Use them to compare with an intersection of masks, whose rows differ in sparsity. Of equal
    scores the first are dropped first. One linear map is worked on at a time.

    Parameters
    ----------
    vlm : VLM
        The model.
    masks : Masks
        The masks that say how many weights each row keeps.
    by : Calibration or {"magnitude", "random"}
        The scores: Wanda's for a calibration, the sizes of the weights, or random numbers.
    seed : int
        The seed of "random".

    Returns
    -------
    Masks
        One mask for each linear map in ``masks``.

    Raises
    ------
    InputError
        If the masks, or the calibration, are of other weights. If ``by`` is unknown, or a linear
        map is quantised, adapted or offloaded. If a linear map saw no token, or a score is NaN or
        infinite.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import alpha_subnet, match_sparsity, random_masks
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> shared = alpha_subnet(random_masks(small, 0.5, seed) for seed in (0, 1))
    >>> baseline = match_sparsity(small, shared, "magnitude")
    >>> baseline.n_kept == shared.n_kept, baseline == shared
    (True, False)
    """
    maps = _maps_of(vlm, masks)
    score, mark = scorer(vlm, by, seed)

    def choose(key: Key, values: Tensor) -> Tensor:
        counts = turned(maps[key], masks.unpack(*key)).count_nonzero(dim=1)
        return without_lowest(values, (values.shape[1] - counts).to(values.device))

    return masks_of(vlm, masks, score, choose, mark)


@torch.no_grad()
def apply_masks(vlm: VLM, masks: Masks) -> None:
    """Set the weights that the masks drop to zero, in place and for good.

    Use it to save a pruned model: ``vlm.model.save_pretrained(folder)``. It saves no time and no
    memory: zeros are multiplied and stored like other numbers. The name of the model says that it
    is masked, so that what is captured is not taken for the dense model's. For a mask that goes
    again use ``interventions.mask_weights``.

    Parameters
    ----------
    vlm : VLM
        The model, which is changed.
    masks : Masks
        Masks of its weights, True where a weight is kept.

    Raises
    ------
    InputError
        If the masks are of other weights. If a linear map is quantised, adapted or offloaded, or
        shares its weights with another part of the model.
    InterventionError
        If an intervention is active.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import apply_masks, magnitude_masks
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> apply_masks(small, magnitude_masks(small, sparsity=0.5))
    >>> int((small.blocks[0].mlp.up_proj.weight == 0).sum())
    48
    >>> small.name.startswith("small + masked 50.0%")
    True
    """
    maps = _maps_of(vlm, masks)
    modules = {}
    for layer, name in masks:
        modules[f"layer {layer} {name}"] = maps[layer, name]
    require_own(vlm, modules)
    for key in masks:
        weight = maps[key].weight
        weight.masked_fill_(~masks.unpack(*key).to(weight.device), 0)
    vlm.name += f" + masked {masks.sparsity:.1%} ({fingerprint(vlm)[:8]})"


def require_own(vlm: VLM, modules: dict[str, nn.Module]) -> None:
    """Refuse to change weights for good that other parts use, or that an intervention holds.

    Parameters
    ----------
    vlm : VLM
        The model.
    modules : dict of str to Module
        The modules whose weights would change, by the name that the error says.

    Raises
    ------
    InterventionError
        If an intervention is active.
    InputError
        If the weights of a module are another module's too.
    """
    if vlm.active:
        raise InterventionError(
            f"weights changed for good inside {vlm.active[-1]}", "leave the intervention first"
        )
    users = Counter()
    for _, parameter in vlm.model.named_parameters(remove_duplicate=False):
        users[parameter.data_ptr()] += 1
    for name, module in modules.items():
        require(
            users[module.weight.data_ptr()] <= 1,
            f"the weights of {name} are shared with another part of the model",
            "leave this part as it is",
        )


def _maps_of(vlm: VLM, masks: Masks) -> dict[Key, nn.Module]:
    """The linear maps of the model that the masks are of."""
    maps = linear_maps(vlm)
    shapes = {key: tuple(module.weight.shape) for key, module in maps.items()}
    fit = masks.shapes.items() <= shapes.items()
    if masks.fingerprint != fingerprint(vlm) or not fit:
        raise incomparable(
            "the weights of masks and model",
            masks,
            vlm.name,
            "use masks that were made for these weights",
        )
    return maps


def _best_of_groups(
    values: Float[Tensor, "rows columns"], n: int, m: int
) -> Bool[Tensor, "rows columns"]:
    """Where a score is among the n highest of its group of m neighbours.

    Of equal ones the last are kept.
    """
    groups = values.reshape(-1, m)
    if m > 8:
        return without_lowest(groups, m - n).reshape(values.shape)
    # each weight's rank by comparing it with its few neighbours, twice as fast as a
    # selection in millions of groups of four
    columns = groups.T.contiguous()
    ranks = torch.zeros(columns.shape, dtype=torch.uint8, device=values.device)
    for i in range(m):
        for j in range(i):
            higher = (columns[i] >= columns[j]).view(torch.uint8)
            ranks[i] += higher
            ranks[j] += 1 - higher
    return (m - n <= ranks.T).reshape(values.shape)
