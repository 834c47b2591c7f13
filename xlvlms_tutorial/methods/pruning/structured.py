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

from xlvlms_tutorial.errors import ActivationsError, AnatomyError, SelectionError
from xlvlms_tutorial.interventions.overrides import Layers, checked_layers
from xlvlms_tutorial.methods.pruning.calibration import (
    Calibration,
    fingerprint,
    linear_maps,
    turned,
)
from xlvlms_tutorial.methods.pruning.scores import scorer, without_lowest
from xlvlms_tutorial.methods.pruning.sparsify import require_own
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

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
    r"""Importance of each hidden neuron of each layer's MLP.

    The size of what it adds to the residual stream. With the activations :math:`x_{tj}` of neuron j
    and its outgoing column :math:`W_{\cdot j}` in the MLP's last linear map, :math:`s_j =
    \sqrt{\frac{1}{T} \sum_t \lVert x_{tj} W_{\cdot j} \rVert_2^2} = \lVert W_{\cdot j} \rVert_2
    \sqrt{\frac{1}{T} \sum_t x_{tj}^2}`, which is the square root of the sum of Wanda's squared
    scores over the column (Sun et al., 2023, arXiv 2306.11695). ``by`` = "magnitude" takes
    :math:`\lVert W_{\cdot j} \rVert_2` alone, and "random" draws by ``seed``.

    Raises
    ------
    AnatomyError
        If a block has no MLP with one hidden layer, as mixtures of experts have not.
    SelectionError
        If ``by`` is unknown, or a linear map is quantised, adapted or offloaded.
    ComparisonError
        If the calibration is of other weights.
    ActivationsError
        If a linear map saw no token, or a score is NaN or infinite.
    """
    score, _ = scorer(vlm, by, seed)
    found = {}
    for part in _mlps(vlm):
        weights = score((part.layer, part.exit_name), part.exit)
        found[part.layer] = (
            weights[0].clone() if by == "random" else torch.linalg.vector_norm(weights, dim=0)
        )
        if not torch.isfinite(found[part.layer]).all():
            raise ActivationsError(
                f"NaN or infinite scores of the neurons of layer {part.layer}",
                "look for damaged weights",
            )
    return found


@torch.no_grad()
def cut_neurons(
    vlm: VLM, scores: Mapping[int, Float[Tensor, "neurons"]], share: float, multiple_of: int = 1
) -> dict[int, Int[Tensor, "kept"]]:
    r"""Cut the share of the hidden neurons with the lowest scores out of every MLP, in place.

    Gives the neurons left, by layer. Rows of the first linear maps, biases, and columns of
    the last one go: of N neurons :math:`\lfloor s N \rfloor` in every block, fewer if what is
    left shall be a ``multiple_of`` a number that the hardware likes. The model computes what
    it would compute with these columns set to zero. Every block has the same number of
    neurons, as configurations allow no other. Of equal scores the first neurons go first. The
    name of the model says what is gone.

    Raises
    ------
    SelectionError
        If the share is not in [0, 1), there are not scores for each neuron of each layer,
        ``multiple_of`` is not one of 1 to N, or the MLPs are quantised, adapted, offloaded, shared
        with other parts, or of a kind that the configuration cannot describe when cut.
    AnatomyError
        If an MLP is of an unknown kind, as mixtures of experts are.
    ActivationsError
        If a score is NaN or infinite.
    InterventionError
        If an intervention is active.
    """
    parts = _mlps(vlm)
    width = parts[0].width
    dropped = _number_to_drop(share, width, multiple_of)
    left = {part.layer: _highest(scores, part, dropped) for part in parts}
    require_own(
        vlm,
        {
            f"layer {p.layer} {name}": module
            for p in parts
            for name, module in [*p.entries.items(), (p.exit_name, p.exit)]
        },
    )
    if not dropped:
        return left
    change = lambda text: _set_width(text, vlm.name, width, width - dropped)
    shapes = {name: tuple(value.shape) for name, value in vlm.model.state_dict().items()}
    _require_described(
        vlm,
        change,
        shapes
        | {
            name: shape
            for part in parts
            for name, shape in part.shapes(vlm, width - dropped).items()
        },
    )
    for part in parts:
        part.cut(left[part.layer])
    _change_configs(vlm, change)
    vlm.name += f" + {dropped} of {width} neurons cut ({fingerprint(vlm)[:8]})"
    return left


@torch.no_grad()
def remove_blocks(vlm: VLM, layers: Layers) -> None:
    """Remove decoder blocks for good, in place.

    The model computes what it computes under ``interventions.skip(vlm, layers)``. The blocks after
    a removed one move up: layers are counted anew from 1, in ``vlm.blocks`` and in the cache. The
    name of the model says what is gone.

    Raises
    ------
    LayerError
        If a layer is none of the model's.
    SelectionError
        If no layer or all layers are given, the model attends to its picture by cross-attention,
        adds visual features again after a block that would go or move, is quantised, adapted or
        offloaded, or has a configuration that cannot describe what is left.
    InterventionError
        If an intervention is active.
    """
    gone = set(checked_layers(vlm, layers))
    left = [layer for layer in range(1, vlm.n_layers + 1) if layer not in gone]
    if not gone or not left:
        raise SelectionError(
            f"{len(gone)} of {vlm.n_layers} blocks to remove",
            "remove at least one and leave at least one",
        )
    _require_removable(vlm, gone)
    require_own(
        vlm, {f"layer {layer} {name}": module for (layer, name), module in linear_maps(vlm).items()}
    )
    change = lambda text: _set_layers(text, [layer - 1 for layer in left])
    _require_described(vlm, change, _renumbered(vlm, left))
    decoder = anatomy.decoder(vlm.model)
    for name, value in vars(decoder).items():
        # Molmo2 has the kind of positions of each block there
        if isinstance(value, list) and len(value) == vlm.n_layers:
            setattr(decoder, name, [value[layer - 1] for layer in left])
    for layer in sorted(gone, reverse=True):
        del vlm.blocks[layer - 1]
    for index, block in enumerate(vlm.blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # where in the cache its keys and values are
                module.layer_idx = index
    _change_configs(vlm, change)
    vlm.name += f" + without blocks {', '.join(map(str, sorted(gone)))}"


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
        """The shapes of the parameters by their names in the model, for so many neurons."""
        names = {module: name for name, module in vlm.model.named_modules()}
        found = {}
        for module in self.entries.values():
            rows = width * (_rows(module) // self.width)
            found[f"{names[module]}.weight"] = tuple(
                turned(module, torch.empty(rows, vlm.width, device="meta")).shape
            )
            if module.bias is not None:
                found[f"{names[module]}.bias"] = (rows,)
        return found | {
            f"{names[self.exit]}.weight": tuple(
                turned(self.exit, torch.empty(vlm.width, width, device="meta")).shape
            )
        }

    def cut(self, left: Int[Tensor, "kept"]) -> None:
        """Leave these neurons alone."""
        width = self.width
        for module in self.entries.values():
            rows = torch.cat([left + start for start in range(0, _rows(module), width)]).to(
                module.weight.device
            )
            _replace(module, 0, rows)
        _replace(self.exit, 1, left.to(self.exit.weight.device))
        if hasattr(self.inside, "intermediate_size"):
            self.inside.intermediate_size = len(left)


def _mlps(vlm: VLM) -> list[_MLP]:
    """The MLPs of all blocks, all equally wide.

    Each with all of its parameters in linear maps around one hidden layer.
    """
    names = {module: name for (_, name), module in linear_maps(vlm).items()}
    found = []
    for layer, block in enumerate(vlm.blocks, 1):
        exit_ = anatomy.mlp_exit(block)
        # OPT's two maps lie in the block itself
        inside = anatomy.mlp(block) if anatomy.mlp(block) is not exit_ else block
        entries = {
            names[m]: m for name in _ENTRIES if (m := anatomy.child(inside, (name,))) in names
        }
        found.append(_MLP(layer, inside, entries, names.get(exit_, ""), exit_))
        others = (
            []
            if inside is block
            else [m for m in inside.modules() if m not in (*entries.values(), exit_)]
        )
        if not entries or exit_ not in names or any(m._parameters for m in others):
            raise AnatomyError(
                "MLP of linear maps around one hidden layer", type(inside).__name__, _ENTRIES
            )
        part = found[-1]
        if (
            any(
                _rows(m) != part.width * (1 + name.endswith("gate_up_proj"))
                for name, m in entries.items()
            )
            or part.width != found[0].width
        ):
            told = (
                f"layer {layer} has an MLP of {part.width} neurons beside maps, or "
                "other MLPs, of another number"
            )
            raise SelectionError(told, "give a model whose MLPs are all equally wide")
    return found


def _rows(module: nn.Module) -> int:
    return turned(module, module.weight).shape[0]


def _number_to_drop(share: float, width: int, multiple_of: int) -> int:
    if not 0 <= share < 1:
        raise SelectionError(
            f"a share of neurons of {share}", "give the share to cut: 0 or more, and below 1"
        )
    if not 1 <= multiple_of <= width:
        raise SelectionError(
            f"multiple_of={multiple_of}", f"the MLPs have {width} neurons: give 1 to {width}"
        )
    left = width - floor(share * width + 1e-9)
    return width - min(width, -(-left // multiple_of) * multiple_of)


def _highest(scores: Mapping[int, Tensor], part: _MLP, dropped: int) -> Int[Tensor, "kept"]:
    found = scores.get(part.layer)
    if found is None or tuple(found.shape) != (part.width,):
        told = "none" if found is None else tuple(found.shape)
        raise SelectionError(
            f"scores of layer {part.layer} are {told}",
            f"give one for each of {part.width} neurons, as neuron_scores does",
        )
    if not torch.isfinite(found).all():
        raise ActivationsError(
            f"NaN or infinite scores of the neurons of layer {part.layer}", "give finite scores"
        )
    return without_lowest(found[None].float(), dropped)[0].nonzero().flatten()


def _replace(module: nn.Module, dim: int, index: Int[Tensor, "kept"]) -> None:
    """Keep some outputs (``dim`` 0) or inputs (1) of a linear map, in memory of their own."""
    turn = isinstance(module, Conv1D)
    weight = module.weight
    module.weight = nn.Parameter(
        weight.index_select(1 - dim if turn else dim, index), requires_grad=weight.requires_grad
    )
    if dim == 0 and module.bias is not None:
        module.bias = nn.Parameter(module.bias[index], requires_grad=module.bias.requires_grad)
    names = {"nf": 0, "nx": 1} if turn else {"out_features": 0, "in_features": 1}
    for name, of in names.items():
        if of == dim:
            setattr(module, name, len(index))


def _set_width(text: PreTrainedConfig, model: str, old: int, new: int) -> None:
    known = [name for name in _WIDTHS if hasattr(text, name)]
    # None means four times the width, in GPT-2
    if not known or getattr(text, known[0]) not in (old, None):
        raise SelectionError(
            f"the configuration of {model!r} does not say that its MLPs have {old} neurons",
            "remove blocks instead",
        )
    setattr(text, known[0], new)


def _set_layers(text: PreTrainedConfig, left: list[int]) -> None:
    """Describe in a configuration that only these blocks, counted from 0, are there."""
    before = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if name in _BY_LAYER and value:
            setattr(text, name, [value[index] for index in left])
        elif name in _LAYER_NUMBERS and value:
            setattr(text, name, [left.index(index) for index in value if index in left])
        elif (
            isinstance(value, list | tuple) and value and ("layer" in name or len(value) == before)
        ):
            raise SelectionError(
                f"the configuration lists {name}={value}",
                "it cannot be said how to cut it: skip the blocks instead",
            )
    text.num_hidden_layers = len(left)


def _require_removable(vlm: VLM, gone: set[int]) -> None:
    text = vlm.model.config.get_text_config(decoder=True)
    if anatomy.crossing(vlm.model):
        raise SelectionError(
            f"{vlm.name!r} attends to its picture by cross-attention",
            "skip its blocks instead (interventions.skip)",
        )
    if getattr(text, "num_kv_shared_layers", None):
        raise SelectionError(
            f"the last blocks of {vlm.name!r} share keys and values",
            "skip its blocks instead (interventions.skip)",
        )
    if getattr(text, "_heterogeneity_spec", None) is not None:
        raise SelectionError(
            f"the blocks of {vlm.name!r} differ by their number",
            "skip its blocks instead (interventions.skip)",
        )
    deep = len(
        getattr(getattr(vlm.model.config, "vision_config", None), "deepstack_visual_indexes", None)
        or ()
    )
    if min(gone) <= deep:
        raise SelectionError(
            f"layer {min(gone)} of {vlm.name!r} gets visual features",
            f"remove blocks behind layer {deep}, or skip it",
        )


def _renumbered(vlm: VLM, left: list[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors without the blocks that go."""
    prefix = next(name for name, module in vlm.model.named_modules() if module is vlm.blocks) + "."
    places = {str(layer - 1): str(k) for k, layer in enumerate(left)}
    found = {}
    for name, value in vlm.model.state_dict().items():
        index, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            found[name] = tuple(value.shape)
        elif index in places:
            found[f"{prefix}{places[index]}.{rest}"] = tuple(value.shape)
    return found


def _require_described(
    vlm: VLM, change: Callable[[PreTrainedConfig], None], planned: Mapping[str, tuple[int, ...]]
) -> None:
    """Stop, before anything is changed, where a smaller model could not be built again.

    Where a model made from the changed configuration would not have the tensors that are left.
    """
    config = deepcopy(vlm.model.config)
    change(config.get_text_config(decoder=True))
    with torch.device("meta"):
        made = type(vlm.model)._from_config(config)
    described = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    if wrong := sorted(
        name for name in {**described, **planned} if described.get(name) != planned.get(name)
    ):
        told = (
            f"{vlm.name!r} would be described wrongly by its configuration, first "
            f"{wrong[0]}: {described.get(wrong[0])}"
        )
        raise SelectionError(
            told,
            (
                f"it would be {planned.get(wrong[0])}; give a model whose blocks "
                "are alike, without an adapter"
            ),
        )


def _change_configs(vlm: VLM, change: Callable[[PreTrainedConfig], None]) -> None:
    configs = (vlm.model.config.get_text_config(decoder=True), anatomy.decoder(vlm.model).config)
    for config in {id(config): config for config in configs}.values():
        change(config)
