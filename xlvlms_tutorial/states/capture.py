"""Read the residual stream of a vision-language model."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import BatchFeature

from xlvlms_tutorial.errors import StateError
from xlvlms_tutorial.models.vlm import VLM


@torch.no_grad()
def residual_stream(vlm: VLM, inputs: BatchFeature) -> Float[Tensor, "layers b t d"]:
    """The residual stream at every layer, on the CPU in the model's number format: 0 is what enters the first block, l what leaves block l.

    The last layer is taken before the final norm (transformers' last ``hidden_states`` is after it).

    Raises
    ------
    StateError
        If a layer holds NaN or infinite values, with the first such layer.
    """
    kept: list[Tensor] = []
    hooks = [vlm.blocks[0].register_forward_pre_hook(lambda m, a, k: _keep(kept, a[0] if a else k["hidden_states"]), with_kwargs=True)]
    hooks += [block.register_forward_hook(lambda m, a, output: _keep(kept, output)) for block in vlm.blocks]
    try:
        vlm.model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, states in enumerate(kept):
        if not torch.isfinite(states).all():
            raise StateError(layer)
    return torch.stack(kept)


def _keep(kept: list[Tensor], output: Tensor | tuple) -> None:
    states = output[0] if isinstance(output, tuple) else output
    kept.append(states.detach().to("cpu", copy=True))  # a copy: later blocks may write into the same memory
