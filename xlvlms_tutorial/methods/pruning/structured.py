"""Make a language model smaller for good: neurons of its MLPs cut out, or whole blocks.

What is left saves and loads as any model. Save it with ``vlm.model.save_pretrained(folder)`` and
``vlm.processor.save_pretrained(folder)``, load it with ``load(folder)``.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import floor

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from xlvlms_tutorial.errors import AnatomyError, InputError
from xlvlms_tutorial.interventions.overrides import Layers, checked_layers
from xlvlms_tutorial.methods.pruning.calibration import (
    Calibration,
    fingerprint,
    linear_maps,
    turned,
)
from xlvlms_tutorial.methods.pruning.masks import module_names
from xlvlms_tutorial.methods.pruning.scores import scorer, without_lowest
from xlvlms_tutorial.methods.pruning.sparsify import require_own
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require

# gate_up_proj holds the rows of both, one after the other
_ENTRIES = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc")
# what configurations call the number of neurons
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
# lists of a configuration with one entry a layer
_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
_LAYER_NUMBERS = ("rope_scaling_layers",)  # lists of layers, counted from 0


def neuron_scores(
    vlm: VLM, by: Calibration | str = "magnitude", seed: int = 0
) -> dict[int, Float[Tensor, "neurons"]]:
    r"""Score each hidden neuron of each layer's MLP by the size of what it adds.

    Use it to choose the neurons that :func:`prune_neurons` cuts. With the activations
    :math:`x_{tj}` of neuron j and its outgoing column :math:`W_{\cdot j}` in the MLP's last linear
    map, the size of what it adds to the residual stream is :math:`s_j = \sqrt{\frac{1}{T} \sum_t
    \lVert x_{tj} W_{\cdot j} \rVert_2^2} = \lVert W_{\cdot j} \rVert_2 \sqrt{\frac{1}{T} \sum_t
    x_{tj}^2}`, which is the square root of the sum of Wanda's squared scores over the column (Sun
    et al., 2023, arXiv 2306.11695).

    Parameters
    ----------
    vlm : VLM
        The model.
    by : Calibration or {"magnitude", "random"}
        Where the activations come from. The default, "magnitude", takes
        :math:`\lVert W_{\cdot j} \rVert_2` alone, and "random" draws the scores.
    seed : int
        The seed of "random".

    Returns
    -------
    dict of int to Tensor
        For each layer, from 1 to L, the scores (neurons,) of its MLP, 0 or more.

    Raises
    ------
    AnatomyError
        If a block has no MLP with one hidden layer, as mixtures of experts have not.
    InputError
        If ``by`` is unknown, or a linear map is quantised, adapted or offloaded. If the calibration
        is of other weights. If a linear map saw no token, or a score is NaN or infinite.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import neuron_scores
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=3,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> importance = neuron_scores(small)
    >>> list(importance), tuple(importance[1].shape)
    ([1, 2, 3], (12,))
    """
    score, _ = scorer(vlm, by, seed)
    by_layer = {}
    for part in _mlps(vlm):
        weights = score((part.layer, part.exit_name), part.exit)
        if by == "random":
            importance = weights[0].clone()
        else:
            importance = torch.linalg.vector_norm(weights, dim=0)
        require(
            torch.isfinite(importance).all(),
            f"NaN or infinite scores of the neurons of layer {part.layer}",
            "look for damaged weights",
        )
        by_layer[part.layer] = importance
    return by_layer


@torch.no_grad()
def prune_neurons(
    vlm: VLM, scores: Mapping[int, Float[Tensor, "neurons"]], share: float, multiple_of: int = 1
) -> dict[int, Int[Tensor, "kept"]]:
    r"""Cut the hidden neurons with the lowest scores out of every MLP, in place and for good.

    Use it for a model that is really smaller, unlike a masked one. Rows of the first linear maps,
    biases, and columns of the last one go: of N neurons :math:`\lfloor s N \rfloor` in every block.
    The model computes what it would compute with these columns set to zero. Every block has the
    same number of neurons, as configurations allow no other. Of equal scores the first neurons go
    first. The name of the model says what is gone.

    Parameters
    ----------
    vlm : VLM
        The model, which is changed.
    scores : mapping of int to Tensor
        For each layer, from 1 to L, a score (neurons,) for each neuron, as :func:`neuron_scores`
        gives them.
    share : float
        The share s of neurons to cut, from 0 to below 1.
    multiple_of : int
        A number, liked by the hardware, of which the number of neurons that remain shall be a
        multiple: fewer neurons are cut then. By default 1, any number.

    Returns
    -------
    dict of int to Tensor
        For each layer the numbers, counted from 0, of the neurons that remain, in order.

    Raises
    ------
    InputError
        If the share is not in [0, 1), there are not scores for each neuron of each layer,
        ``multiple_of`` is not one of 1 to N, or the MLPs are quantised, adapted, offloaded, shared
        with other parts, or of a kind that the configuration cannot describe when cut. If a score
        is NaN or infinite.
    AnatomyError
        If an MLP is of an unknown kind, as mixtures of experts are.
    InterventionError
        If an intervention is active.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import prune_neurons, neuron_scores
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=3,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> remaining = prune_neurons(small, neuron_scores(small), share=0.5)
    >>> {layer: len(neurons) for layer, neurons in remaining.items()}
    {1: 6, 2: 6, 3: 6}
    >>> small.blocks[0].mlp.down_proj.in_features
    6
    """
    parts = _mlps(vlm)
    width = parts[0].width
    dropped = _number_to_drop(share, width, multiple_of)
    remaining = {part.layer: _highest(scores, part, dropped) for part in parts}
    modules = {}
    for part in parts:
        for name, module in part.entries.items():
            modules[f"layer {part.layer} {name}"] = module
        modules[f"layer {part.layer} {part.exit_name}"] = part.exit
    require_own(vlm, modules)
    if not dropped:
        return remaining

    def change(text: PreTrainedConfig) -> None:
        _set_width(text, vlm.name, width, width - dropped)

    shapes = _tensor_shapes(vlm.model)
    for part in parts:
        shapes |= part.shapes(vlm, width - dropped)
    _require_described(vlm, change, shapes)
    for part in parts:
        part.cut(remaining[part.layer])
    _change_configs(vlm, change)
    vlm.name += f" + {dropped} of {width} neurons cut ({fingerprint(vlm)[:8]})"
    return remaining


@torch.no_grad()
def prune_blocks(vlm: VLM, layers: Layers) -> None:
    """Remove decoder blocks, in place and for good.

    Use it for a model that is really smaller, after ``interventions.skip`` has shown which blocks
    can go: the model computes what it computes under ``interventions.skip(vlm, layers)``. The
    blocks after a removed one move up: layers are counted anew from 1, in ``vlm.blocks`` and in the
    cache. The name of the model says what is gone.

    Parameters
    ----------
    vlm : VLM
        The model, which is changed.
    layers : int or sequence of int
        The layers that go, from 1 to L.

    Raises
    ------
    LayerError
        If a layer is none of the model's.
    InputError
        If no layer or all layers are given, the model attends to its picture by cross-attention,
        adds visual features again after a block that would go or move, is quantised, adapted or
        offloaded, or has a configuration that cannot describe what is left.
    InterventionError
        If an intervention is active.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.methods.pruning import prune_blocks
    >>> config = LlamaConfig(
    ...     vocab_size=8,
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_hidden_layers=3,
    ...     num_attention_heads=2,
    ... )
    >>> small = VLM(LlamaForCausalLM(config), None, "small")
    >>> prune_blocks(small, layers=[2])
    >>> small.n_layers, small.name
    (2, 'small + without blocks 2')
    """
    removed = set(checked_layers(vlm, layers))
    remaining = sorted(set(range(1, vlm.n_layers + 1)) - removed)
    require(
        removed and remaining,
        f"{len(removed)} of {vlm.n_layers} blocks to remove",
        "remove at least one and leave at least one",
    )
    _require_removable(vlm, removed)
    modules = {}
    for (layer, name), module in linear_maps(vlm).items():
        modules[f"layer {layer} {name}"] = module
    require_own(vlm, modules)
    indices = [layer - 1 for layer in remaining]

    def change(text: PreTrainedConfig) -> None:
        _set_layers(text, indices)

    _require_described(vlm, change, _renumbered(vlm, remaining))
    decoder = anatomy.decoder(vlm.model)
    for name, value in vars(decoder).items():
        # Molmo2 has the kind of positions of each block there
        if isinstance(value, list) and len(value) == vlm.n_layers:
            setattr(decoder, name, [value[index] for index in indices])
    for layer in sorted(removed, reverse=True):
        del vlm.blocks[layer - 1]
    for index, block in enumerate(vlm.blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # where in the cache its keys and values are
                module.layer_idx = index
    _change_configs(vlm, change)
    vlm.name += f" + without blocks {', '.join(map(str, sorted(removed)))}"


@dataclass(frozen=True)
class _MLP:
    """The linear maps around the hidden layer of one block's MLP."""

    layer: int
    inside: nn.Module
    entries: dict[str, nn.Module]
    exit_name: str
    exit: nn.Module

    @property
    def width(self) -> int:
        """The number of neurons."""
        return turned(self.exit, self.exit.weight).shape[1]

    def shapes(self, vlm: VLM, width: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by their names in the model, for ``width`` neurons."""
        names = module_names(vlm)
        shapes = {}
        for module in self.entries.values():
            rows = width * (_rows(module) // self.width)
            shapes[f"{names[module]}.weight"] = _weight_shape(module, rows, vlm.width)
            if module.bias is not None:
                shapes[f"{names[module]}.bias"] = (rows,)
        shapes[f"{names[self.exit]}.weight"] = _weight_shape(self.exit, vlm.width, width)
        return shapes

    def cut(self, remaining: Int[Tensor, "kept"]) -> None:
        """Cut all neurons but these."""
        width = self.width
        for module in self.entries.values():
            starts = range(0, _rows(module), width)
            rows = torch.cat([remaining + start for start in starts])
            _replace(module, 0, rows.to(module.weight.device))
        _replace(self.exit, 1, remaining.to(self.exit.weight.device))
        if hasattr(self.inside, "intermediate_size"):
            self.inside.intermediate_size = len(remaining)


def _weight_shape(module: nn.Module, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of a linear map's weight for so many outputs and inputs."""
    return tuple(turned(module, torch.empty(rows, columns, device="meta")).shape)


def _mlps(vlm: VLM) -> list[_MLP]:
    """The MLPs of all blocks, all of the same width.

    Each with all of its parameters in linear maps around one hidden layer.
    """
    names = {module: name for (_, name), module in linear_maps(vlm).items()}
    parts: list[_MLP] = []
    for layer, block in enumerate(vlm.blocks, 1):
        part = _mlp_of(layer, block, names)
        parts.append(part)
        require(
            _widths_agree(part) and part.width == parts[0].width,
            f"layer {layer} has an MLP of {part.width} neurons beside maps, or "
            "other MLPs, of another number",
            "give a model whose MLPs are all equally wide",
        )
    return parts


def _mlp_of(layer: int, block: nn.Module, names: Mapping[nn.Module, str]) -> _MLP:
    exit_ = anatomy.mlp_exit(block)
    inside = anatomy.mlp(block)
    # OPT's two maps lie in the block itself
    if inside is exit_:
        inside = block
    entries = {}
    for name in _ENTRIES:
        module = anatomy.child(inside, (name,))
        if module in names:
            entries[names[module]] = module
    beside = set()
    if inside is not block:
        beside = set(inside.modules()).difference(entries.values(), [exit_])
    has_others = any(module._parameters for module in beside)
    if not entries or exit_ not in names or has_others:
        raise AnatomyError(
            "MLP of linear maps around one hidden layer", type(inside).__name__, _ENTRIES
        )
    return _MLP(layer, inside, entries, names[exit_], exit_)


def _widths_agree(part: _MLP) -> bool:
    for name, module in part.entries.items():
        rows = part.width * (2 if name.endswith("gate_up_proj") else 1)
        if _rows(module) != rows:
            return False
    return True


def _rows(module: nn.Module) -> int:
    return turned(module, module.weight).shape[0]


def _number_to_drop(share: float, width: int, multiple_of: int) -> int:
    """Return how many neurons go so that the remaining ones come in multiples."""
    require(
        0 <= share < 1,
        f"a share of neurons of {share}",
        "give the share to cut: 0 or more, and below 1",
    )
    require(
        1 <= multiple_of <= width,
        f"multiple_of={multiple_of}",
        f"the MLPs have {width} neurons: give 1 to {width}",
    )
    remaining = width - floor(share * width + 1e-9)
    rounded_up = -(-remaining // multiple_of) * multiple_of
    return width - min(width, rounded_up)


def _highest(scores: Mapping[int, Tensor], part: _MLP, dropped: int) -> Int[Tensor, "kept"]:
    """The numbers of the neurons that remain when those with the lowest scores are dropped."""
    values = scores.get(part.layer)
    shape = "none" if values is None else tuple(values.shape)
    require(
        shape == (part.width,),
        f"scores of layer {part.layer} are {shape}",
        f"give one for each of {part.width} neurons, as neuron_scores does",
    )
    require(
        torch.isfinite(values).all(),
        f"NaN or infinite scores of the neurons of layer {part.layer}",
        "give finite scores",
    )
    keep = without_lowest(values[None].float(), dropped)[0]
    return keep.nonzero().flatten()


def _replace(module: nn.Module, dim: int, index: Int[Tensor, "kept"]) -> None:
    """Keep some outputs (``dim`` 0) or inputs (1) of a linear map, in memory of their own."""
    transposed = isinstance(module, Conv1D)
    old, bias = module.weight, module.bias
    weight = old.index_select(1 - dim if transposed else dim, index)
    module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    if dim == 0 and bias is not None:
        module.bias = nn.Parameter(bias[index], requires_grad=bias.requires_grad)
    # the attributes that hold the number of outputs, and that of inputs
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    setattr(module, names[dim], len(index))


def _set_width(text: PreTrainedConfig, model: str, old: int, new: int) -> None:
    """Describe in a configuration that its MLPs have the new number of neurons."""
    names = [name for name in _WIDTHS if hasattr(text, name)]
    # None means four times the width, in GPT-2
    require(
        names and getattr(text, names[0]) in (old, None),
        f"the configuration of {model!r} does not say that its MLPs have {old} neurons",
        "remove blocks instead",
    )
    setattr(text, names[0], new)


def _set_layers(text: PreTrainedConfig, remaining: list[int]) -> None:
    """Describe in a configuration that only these blocks, counted from 0, are there."""
    before = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if not value:
            continue
        if name in _BY_LAYER:
            setattr(text, name, [value[index] for index in remaining])
        elif name in _LAYER_NUMBERS:
            numbers = []
            for index in value:
                if index in remaining:
                    numbers.append(remaining.index(index))
            setattr(text, name, numbers)
        elif isinstance(value, list | tuple) and ("layer" in name or len(value) == before):
            raise InputError(
                f"the configuration lists {name}={value}",
                "it cannot be said how to cut it: skip the blocks instead",
            )
    text.num_hidden_layers = len(remaining)


def _require_removable(vlm: VLM, removed: set[int]) -> None:
    """Refuse a model whose blocks depend on their numbers, or on blocks that go."""
    text = vlm.model.config.get_text_config(decoder=True)
    require(
        not anatomy.crossing(vlm.model),
        f"{vlm.name!r} attends to its picture by cross-attention",
        "skip its blocks instead (interventions.skip)",
    )
    require(
        not getattr(text, "num_kv_shared_layers", None),
        f"the last blocks of {vlm.name!r} share keys and values",
        "skip its blocks instead (interventions.skip)",
    )
    require(
        getattr(text, "_heterogeneity_spec", None) is None,
        f"the blocks of {vlm.name!r} differ by their number",
        "skip its blocks instead (interventions.skip)",
    )
    vision = getattr(vlm.model.config, "vision_config", None)
    # the blocks after which visual features are added again
    n_visual = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    first = min(removed)
    require(
        first > n_visual,
        f"layer {first} of {vlm.name!r} gets visual features",
        f"remove blocks behind layer {n_visual}, or skip it",
    )


def _renumbered(vlm: VLM, remaining: list[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors without the blocks that go."""
    prefix = f"{module_names(vlm)[vlm.blocks]}."
    numbers = {str(layer - 1): str(k) for k, layer in enumerate(remaining)}
    shapes = {}
    for name, value in vlm.model.state_dict().items():
        index, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            shapes[name] = tuple(value.shape)
        elif index in numbers:
            shapes[f"{prefix}{numbers[index]}.{rest}"] = tuple(value.shape)
    return shapes


def _require_described(
    vlm: VLM, change: Callable[[PreTrainedConfig], None], planned: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse, before anything is changed, a smaller model that could not be built again.

    A model made from the changed configuration has to have the tensors that are planned.
    """
    config = deepcopy(vlm.model.config)
    change(config.get_text_config(decoder=True))
    with torch.device("meta"):
        model = type(vlm.model)._from_config(config)
    described = _tensor_shapes(model)
    for name in sorted({**described, **planned}):
        shape = described.get(name)
        planned_shape = planned.get(name)
        require(
            shape == planned_shape,
            f"{vlm.name!r} would be described wrongly by its configuration, first {name}: {shape}",
            f"it would be {planned_shape}; give a model whose blocks are alike, without an adapter",
        )


def _tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _change_configs(vlm: VLM, change: Callable[[PreTrainedConfig], None]) -> None:
    text = vlm.model.config.get_text_config(decoder=True)
    change(text)
    # the decoder may hold a configuration of its own
    config = anatomy.decoder(vlm.model).config
    if config is not text:
        change(config)
