r"""Mix LoRA experts on one model, exactly: :math:`\Delta W = \sum_i w_i s_i B_i A_i`.

The products :math:`B_i A_i` are summed, not the factors. peft's ``add_weighted_adapter`` with
``combination_type="linear"`` sums the factors, which adds cross terms :math:`B_i A_j`; its
``"cat"`` is exact, and ``"svd"`` is at full rank. Here all experts are active at once, each with
its share. Another mixture is another number a layer and expert, and copies nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite

from torch import Tensor, nn

from xlvlms_tutorial.errors import LoadError
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require


@contextmanager
def mixed(vlm: VLM, shares: Mapping[str, float]) -> Iterator[VLM]:
    r"""Mix LoRA experts inside a ``with`` block.

    Each adapted weight is :math:`W + \sum_i w_i s_i B_i A_i` with the shares :math:`w_i`. Use it to
    move between experts that were fine-tuned from one model, such as one for captions and
    one for questions (Shukor et al., 2023, arXiv 2307.16184). With shares that sum to one this is
    the interpolation of their weights; others are task arithmetic. Inside of the block the model's
    name says what is mixed; afterwards the model is as before.

    Parameters
    ----------
    vlm : VLM
        A model loaded with ``adapter={name: ...}``.
    shares : mapping of str to float
        The share of each expert by its name; an expert that is not named has none.

    Yields
    ------
    VLM
        The model itself.

    Raises
    ------
    LoadError
        If the model has no such expert, or an expert is a DoRA, whose change is not proportional
        to its scale.
    InputError
        If there are no shares, or one is not a finite number.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load
    >>> from xlvlms_tutorial.methods.merging import mixed
    >>> experts = {"place": "pocket-place", "mood": "pocket-mood"}
    >>> model = load("pocket-llava", adapter=experts)
    >>> with mixed(model, {"place": 0.5, "mood": 0.5}):
    ...     model.name
    'pocket-llava + 0.5 place + 0.5 mood'
    """
    require(shares, "no shares", "give the share of one expert at least")
    for expert, share in shares.items():
        require(isfinite(share), f"the share of {expert} is {share}", "give finite numbers")
    layers = _lora_layers(vlm, shares)
    before = []
    for layer in layers.values():
        before.append((layer, layer.disable_adapters, layer.active_adapters, dict(layer.scaling)))
    name = vlm.name
    try:
        for layer in layers.values():
            layer.enable_adapters(True)
            layer.set_adapter(list(shares), inference_mode=True)
            for expert, share in shares.items():
                layer.set_scale(expert, share)
        parts = [f"{share:g} {expert}" for expert, share in shares.items()]
        vlm.name = " + ".join([name.partition(" + ")[0], *parts])
        yield vlm
    finally:
        for layer, disabled, active, scaling in before:
            layer.scaling.update(scaling)
            # switched on first: switching on makes the factors trainable
            layer.enable_adapters(True)
            layer.set_adapter(active, inference_mode=True)
            if disabled:
                layer.enable_adapters(False)
        vlm.name = name


def adapter_changes(vlm: VLM, expert: str) -> dict[str, Tensor]:
    r"""Return what a LoRA expert adds to each weight: :math:`s B A`.

    Use it to compare experts in the space of weights, whatever their factors.

    Parameters
    ----------
    vlm : VLM
        A model loaded with ``adapter={name: ...}``.
    expert : str
        The name of the expert.

    Returns
    -------
    dict of str to Tensor
        The change of each adapted weight, of the weight's shape (out, in), by the module's name.

    Raises
    ------
    LoadError
        If the model has no such expert.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load
    >>> from xlvlms_tutorial.methods.merging import adapter_changes
    >>> model = load("pocket-llava", adapter={"place": "pocket-place"})
    >>> changes = adapter_changes(model, "place")
    >>> len(changes), next(iter(changes.values())).shape  # q_proj and v_proj of 30 blocks
    (60, torch.Size([576, 576]))
    """
    changes = {}
    for name, layer in _lora_layers(vlm, [expert]).items():
        if expert in layer.lora_A:
            changes[name] = layer.get_delta_weight(expert)
    return changes


def _lora_layers(vlm: VLM, experts: Iterable[str]) -> dict[str, nn.Module]:
    """Return the model's layers with LoRA factors by name, or refuse what it does not have."""
    configs = getattr(vlm.model, "peft_config", None) or {}
    for expert in experts:
        if expert not in configs:
            names = ", ".join(configs) or "none"
            raise LoadError(
                f"{vlm.name!r} has no expert {expert!r}",
                f"load it with adapter={{{expert!r}: ...}}; it has {names}",
            )
        if getattr(configs[expert], "use_dora", False):
            raise LoadError(
                f"expert {expert!r} is a DoRA, which also sets the length of each weight",
                "mix LoRA experts, or the state dicts of merged models by interpolate",
            )
    layers = {}
    for name, module in vlm.model.named_modules():
        if hasattr(module, "lora_A"):
            layers[name] = module
    return layers
