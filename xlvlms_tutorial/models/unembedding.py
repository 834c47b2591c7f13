"""From a state of the residual stream to logits, as the model itself does it."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xlvlms_tutorial.models import anatomy


def unembedded(
    model: nn.Module, states: Float[Tensor, "*n d"], rules: Mapping[str, float], norm: bool
) -> Float[Tensor, "*n vocabulary"]:
    """Logits of the next token read off states, through the final norm or not.

    With the rules of :func:`anatomy.logit_rules`.
    """
    decoder, head = anatomy.decoder(model), anatomy.unembedding(model)
    there = next(head.parameters()).device
    # modules are called and their weights never read: those of an
    # offloaded model are nowhere until then
    states = states.to("cpu" if there.type == "meta" else there)
    final = anatomy.final_norm(model)
    states = final(states) if norm and final is not None else states
    project = getattr(decoder, "project_out", None)
    logits = head(project(states) if project is not None else states).float()
    if (cap := rules.get("final_logit_softcapping")) is not None:
        logits = torch.tanh(logits / cap) * cap
    scale = rules.get("logit_scale", 1) / rules.get("logits_scaling", 1)
    return logits if scale == 1 else logits * scale  # a product with 1 would copy all of them
