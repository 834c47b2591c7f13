"""From a state of the residual stream to logits, as the model itself does it."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xlvlms_tutorial.models import anatomy


def unembedded(
    model: nn.Module,
    states: Float[Tensor, "*n d"],
    rules: Mapping[str, float],
    norm: bool,
    ids: Sequence[int] | None = None,
) -> Float[Tensor, "*n vocabulary"]:
    """Return the logits of the next token read off states, through the final norm or not.

    Parameters
    ----------
    model : nn.Module
        The model of transformers.
    states : Tensor
        States (..., d) of the residual stream.
    rules : Mapping of str to float
        What the model does to its logits, as :func:`anatomy.logit_rules` returns it.
    norm : bool
        Whether the final norm comes before the unembedding.
    ids : sequence of int, optional
        The tokens whose logits are wanted, which takes less time; by default all.

    Returns
    -------
    Tensor
        Logits (..., vocabulary) in float32, or (..., ids).
    """
    decoder = anatomy.decoder(model)
    head = anatomy.unembedding(model)
    device = next(head.parameters()).device
    # modules are called and their weights never read: those of an
    # offloaded model are nowhere until then
    states = states.to("cpu" if device.type == "meta" else device)
    final = anatomy.final_norm(model)
    if norm and final is not None:
        states = final(states)
    project = getattr(decoder, "project_out", None)
    if project is not None:
        states = project(states)
    logits = _projected(head, states, ids).float()
    if (cap := rules.get("final_logit_softcapping")) is not None:
        logits = torch.tanh(logits / cap) * cap
    scale = rules.get("logit_scale", 1) / rules.get("logits_scaling", 1)
    return logits if scale == 1 else logits * scale  # a product with 1 would copy all of them


def _projected(
    head: nn.Module, states: Float[Tensor, "*n d"], ids: Sequence[int] | None
) -> Float[Tensor, "*n vocabulary"]:
    if ids is None:
        return head(states)
    # adapted, quantised and offloaded heads are called whole
    plain = type(head) is nn.Linear and head.weight.is_floating_point() and not head.weight.is_meta
    if not plain:
        return head(states)[..., list(ids)]
    bias = None if head.bias is None else head.bias[list(ids)]
    return nn.functional.linear(states, head.weight[list(ids)], bias)
