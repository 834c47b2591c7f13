"""Score the weights of the decoder and mask the lowest: Wanda, magnitude, random.

By Wanda (Sun et al., 2023, arXiv 2306.11695) a linear map's weight matters by its size and by the
size of what it is multiplied with. Which weights are kept for pictures, for texts or for a task
(activated subnetworks), and how many of them are the same, is compared after Shukor and Cord (2024,
arXiv 2405.16700). A mask is True where a weight is kept.
"""

from collections.abc import Callable, Iterable
from math import floor

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from xlvlms_tutorial.errors import incomparable
from xlvlms_tutorial.interventions.overrides import Layers, checked_layers
from xlvlms_tutorial.methods.pruning.calibration import (
    Calibration,
    fingerprint,
    linear_maps,
    turned,
)
from xlvlms_tutorial.methods.pruning.masks import Key, Masks, packed
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require

Score = Callable[[Key, nn.Module], Tensor]


def scores(
    vlm: VLM, calibration: Calibration, layer: int, name: str
) -> Float[Tensor, "rows columns"]:
    r"""Score each weight of one linear map by Wanda.

    :math:`|W_{ij}| \sqrt{\frac{1}{T} \sum_t x_{tj}^2}` (Sun et al., 2023, arXiv 2306.11695). Use it
    to look at what :func:`wanda` decides by.

    Parameters
    ----------
    vlm : VLM
        The model.
    calibration : Calibration
        Activation statistics of the same weights.
    layer : int
        The layer, from 1 to L.
    name : str
        The name of the linear map within its block, such as "self_attn.q_proj".

    Returns
    -------
    Tensor
        In the shape of the map's own weight.

    Raises
    ------
    InputError
        If there is no such map, or a linear map is quantised, adapted or offloaded. If the
        calibration is of other weights. If the linear map saw no token.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import calibrate_on, scores
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> ids = torch.tensor([[3, 4, 5, 6]])
    >>> texts = small.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    >>> calibration = calibrate_on(small, [texts])
    >>> importance = scores(small, calibration, layer=1, name="mlp.down_proj")
    >>> tuple(importance.shape), bool((importance >= 0).all())
    ((8, 12), True)
    """
    maps = linear_maps(vlm)
    _require_fitting(vlm, calibration)
    norms = calibration.norms(layer, name)
    return turned(maps[layer, name], _importance(maps[layer, name], norms))


def wanda(
    vlm: VLM, calibration: Calibration, sparsity: float, layers: Layers | None = None
) -> Masks:
    r"""Mask the weights with the lowest Wanda scores in each output row.

    Use it to find the weights that matter for some inputs, and to prune the others without
    training. :math:`\lfloor s\, d_{in} \rfloor` weights of each row are dropped; of equal scores
    the first are dropped first. All scores (:func:`scores`) are of the dense model, whereas Sun et
    al. (2023, arXiv 2306.11695) prune layer by layer and compute later activations with the pruned
    layers; so a mask says what the model as it is makes use of. Upstream divides by samples instead
    of tokens, which changes no mask. One linear map is worked on at a time.

    Parameters
    ----------
    vlm : VLM
        The model.
    calibration : Calibration
        Activation statistics of the same weights; the name of the model does not matter.
    sparsity : float
        The share s of weights to drop, from 0 to below 1.
    layers : int or sequence of int, optional
        The layers to make masks for, from 1 to L. By default all.

    Returns
    -------
    Masks
        One mask for each linear map, True where a weight is kept.

    Raises
    ------
    InputError
        If the sparsity is not in [0, 1), no layer is given, or a linear map is quantised, adapted
        or offloaded. If the calibration is of other weights. If a linear map saw no token, or a
        score is NaN or infinite.
    LayerError
        If the model has no such layer.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import calibrate_on, wanda
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> ids = torch.tensor([[3, 4, 5, 6]])
    >>> texts = small.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    >>> calibration = calibrate_on(small, [texts])
    >>> wanda(small, calibration, sparsity=0.5)
    Masks of small: 14 linear maps, 1,088 weights, 50.0% dropped
    """
    score, mark = scorer(vlm, calibration)
    return _masks(vlm, score, sparsity, mark, layers)


def magnitude_masks(
    vlm: VLM, sparsity: float, per: str = "row", layers: Layers | None = None
) -> Masks:
    r"""Mask the smallest weights :math:`|W_{ij}|`.

    Use it as the baseline of :func:`wanda` that looks at no inputs. Of equal weights the first are
    dropped first.

    Parameters
    ----------
    vlm : VLM
        The model.
    sparsity : float
        The share of weights to drop, from 0 to below 1.
    per : {"row", "matrix"}
        Whether this share is dropped from each output row, which is the default and what Wanda
        does, or from each whole matrix.
    layers : int or sequence of int, optional
        The layers to make masks for, from 1 to L. By default all.

    Returns
    -------
    Masks
        One mask for each linear map, True where a weight is kept.

    Raises
    ------
    InputError
        If the sparsity is not in [0, 1), ``per`` is unknown, no layer is given, or a linear map is
        quantised, adapted or offloaded.
    LayerError
        If the model has no such layer.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import magnitude_masks
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> magnitude_masks(small, sparsity=0.5, layers=1)
    Masks of small: 7 linear maps, 544 weights, 50.0% dropped
    """
    require(per in ("row", "matrix"), f"magnitude per {per!r}", "allowed: 'row', 'matrix'")
    score, mark = scorer(vlm, "magnitude")
    return _masks(vlm, score, sparsity, mark, layers, per_matrix=per == "matrix")


def random_masks(vlm: VLM, sparsity: float, seed: int) -> Masks:
    """Draw masks at random, the same on every device.

    Use them as the baseline of any other masks. They keep in each output row as many weights as
    :func:`wanda` does.

    Parameters
    ----------
    vlm : VLM
        The model.
    sparsity : float
        The share of weights to drop, from 0 to below 1.
    seed : int
        The seed of the draw: the same seed gives the same masks.

    Returns
    -------
    Masks
        One mask for each linear map, True where a weight is kept.

    Raises
    ------
    InputError
        If the sparsity is not in [0, 1), or a linear map is quantised, adapted or offloaded.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import random_masks
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> masks = random_masks(small, sparsity=0.5, seed=0)
    >>> masks == random_masks(small, sparsity=0.5, seed=0)
    True
    """
    score, mark = scorer(vlm, "random", seed)
    return _masks(vlm, score, sparsity, mark)


def scorer(vlm: VLM, by: Calibration | str, seed: int = 0) -> tuple[Score, str]:
    """Choose the function that scores the weights of a linear map.

    Parameters
    ----------
    vlm : VLM
        The model.
    by : Calibration or {"magnitude", "random"}
        Wanda's scores for a calibration, the sizes of the weights, or random numbers.
    seed : int
        The seed of "random".

    Returns
    -------
    score : function
        Takes the key and the module of a linear map, gives its scores in the shape (out, in).
    fingerprint : str
        That of the model's weights.

    Raises
    ------
    InputError
        If ``by`` is something else, or a linear map is quantised, adapted or offloaded. If the
        calibration is of other weights.
    """
    if isinstance(by, Calibration):
        weights = _require_fitting(vlm, by)
        return lambda key, module: _importance(module, by.norms(*key)), weights
    require(
        by in ("magnitude", "random"),
        f"scores by {by!r}",
        "allowed: a Calibration, 'magnitude', 'random'",
    )
    if by == "magnitude":
        return lambda key, module: _sizes(module), fingerprint(vlm)
    generator = torch.Generator().manual_seed(seed)

    def random(key: Key, module: nn.Module) -> Tensor:
        return torch.rand(turned(module, module.weight).shape, generator=generator)

    return random, fingerprint(vlm)


def chosen_maps(vlm: VLM, layers: Layers | None) -> list[Key]:
    """List the linear maps of some layers, or of all.

    Raises
    ------
    InputError
        If no layer is given, or a linear map is quantised, adapted or offloaded.
    LayerError
        If the model has no such layer.
    """
    selected = range(1, vlm.n_layers + 1) if layers is None else checked_layers(vlm, layers)
    require(selected, "no layers", "give one or more, or None for all")
    return [key for key in linear_maps(vlm) if key[0] in selected]


def masks_of(
    vlm: VLM, keys: Iterable[Key], score: Score, choose: Callable[[Key, Tensor], Tensor], mark: str
) -> Masks:
    """Make masks from scores, one linear map at a time.

    Parameters
    ----------
    vlm : VLM
        The model.
    keys : iterable of (layer, map)
        The linear maps that are masked.
    score : function
        Gives the scores (out, in) of a linear map: the first result of :func:`scorer`.
    choose : function
        Takes the key and the scores of a linear map, and is True where a weight is kept.
    mark : str
        The fingerprint of the weights: the second result of :func:`scorer`.

    Returns
    -------
    Masks
        One mask for each linear map.

    Raises
    ------
    InputError
        If a score is NaN or infinite.
    """
    maps = linear_maps(vlm)
    bits = {}
    shapes = {}
    for key in keys:
        module = maps[key]
        values = score(key, module)
        extremes = torch.stack(
            values.aminmax()
        )  # of NaN, NaN; four times as fast as to look at each
        require(
            torch.isfinite(extremes).all(),
            f"NaN or infinite scores in layer {key[0]} {key[1]}",
            "look for damaged weights",
        )
        mask = choose(key, values)
        bits[key] = packed(turned(module, mask))
        shapes[key] = tuple(module.weight.shape)
    return Masks(bits, shapes, vlm.name, mark)


def _masks(
    vlm: VLM,
    score: Score,
    sparsity: float,
    mark: str,
    layers: Layers | None = None,
    per_matrix: bool = False,
) -> Masks:
    """Masks that drop the same share of each row, or of each matrix."""
    require(
        0 <= sparsity < 1,
        f"sparsity {sparsity}",
        "give the share of weights to drop: 0 or more, and below 1",
    )

    def choose(key: Key, values: Tensor) -> Tensor:
        rows = values.reshape(1, -1) if per_matrix else values
        return kept(rows, sparsity).reshape(values.shape)

    return masks_of(vlm, chosen_maps(vlm, layers), score, choose, mark)


def kept(values: Float[Tensor, "rows columns"], sparsity: float) -> Bool[Tensor, "rows columns"]:
    r"""Mark the scores that are not among the lowest :math:`\lfloor s \cdot columns \rfloor`.

    In each row; of equal ones the first are dropped.
    """
    n = floor(sparsity * values.shape[1] + 1e-9)  # 0.29 * 100 is 28.999...
    return without_lowest(values, n)


def without_lowest(
    values: Float[Tensor, "rows columns"], n: int | Int[Tensor, "rows"]
) -> Bool[Tensor, "rows columns"]:
    """Mark the scores that are not among their row's n lowest, with one n for all rows or one each.

    Of equal ones the first are dropped.
    """
    if isinstance(n, int) and not n:
        return torch.ones_like(values, dtype=torch.bool)
    limit = _smallest(values, n)
    keep = values > limit
    tied = (keep.count_nonzero(dim=1) != values.shape[1] - n).nonzero().flatten()
    if len(tied):
        tied_values = values[tied]
        edge = limit[tied]
        equal = tied_values == edge
        below = (tied_values < edge).count_nonzero(dim=1)
        due = (n if isinstance(n, int) else n[tied]) - below
        keep[tied] |= equal & (equal.cumsum(dim=1) > due[:, None])
    return keep


def _smallest(
    values: Float[Tensor, "rows columns"], n: int | Int[Tensor, "rows"]
) -> Float[Tensor, "rows 1"]:
    """The n-th smallest score of each row; below all of them where n is 0."""
    on_cpu = values.device.type == "cpu"  # where NumPy is several times faster
    if isinstance(n, int) and on_cpu:
        ordered = np.partition(values.numpy(), n - 1, axis=1)
        return torch.from_numpy(ordered[:, n - 1 : n].copy())
    if isinstance(n, int):
        return torch.kthvalue(values, n, dim=1, keepdim=True).values
    if on_cpu:
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=1))
    else:
        ordered = values.sort(dim=1).values
    position = (n - 1).clamp(min=0)[:, None]
    none = (n == 0)[:, None]
    return ordered.gather(1, position).masked_fill(none, -torch.inf)


def _importance(module: nn.Module, norms: Float[Tensor, "d_in"]) -> Float[Tensor, "out d_in"]:
    sizes = _sizes(module)
    return sizes.mul_(norms.to(dtype=sizes.dtype).to(sizes.device))


def _sizes(module: nn.Module) -> Float[Tensor, "out d_in"]:
    """The sizes of the weights, one row for each output, in memory of their own."""
    weight = turned(module, module.weight.detach())
    return weight.abs().to(torch.promote_types(weight.dtype, torch.float32)).contiguous()


def _require_fitting(vlm: VLM, calibration: Calibration) -> str:
    """The fingerprint of the model's weights, where the calibration is of the same."""
    weights = fingerprint(vlm)
    if calibration.fingerprint != weights:
        raise incomparable(
            "the weights of calibration and model",
            calibration,
            vlm.name,
            "calibrate on the weights that are scored",
        )
    return weights
