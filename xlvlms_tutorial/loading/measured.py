"""What the self-checks measure with.

Differences as shares, rounding by dtype, greedy tokens with their logits.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xlvlms_tutorial.models.sharing import greedy
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM

NEW_TOKENS = 5
# Largest difference that rounding explains, as a share of the largest value;
# half precision keeps 8 to 11 bits
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Outcome = tuple[bool, str]


def rounding(vlm: VLM) -> float:
    """Return the largest relative difference that rounding explains in a model's dtype.

    It is a share of the largest value.
    """
    return _ROUNDING.get(vlm.dtype, _ROUNDING[torch.bfloat16])


def greedy_logits(
    vlm: VLM, batch: Batch, use_cache: bool, steps: int = NEW_TOKENS
) -> tuple[Int[Tensor, "b new"], Float[Tensor, "b new vocabulary"]]:
    """Return the new tokens, and the logits that each was chosen by.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        The prompts.
    use_cache : bool
        Whether keys and values are cached.
    steps : int
        How many tokens are generated after each prompt, 5 by default.

    Returns
    -------
    tuple of Tensor and Tensor
        Integers (b, new), and logits (b, new, vocabulary) in float32.
    """
    options = {"max_new_tokens": steps, "min_new_tokens": steps}
    # no picture would fill a placeholder that the model writes itself
    options["suppress_tokens"] = sorted(vlm.placeholders.values()) or None
    options |= {
        "do_sample": False,
        "disable_compile": True,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with vlm.run(batch), greedy(vlm.model), torch.no_grad():
        output = vlm.model.generate(**batch, use_cache=use_cache, **options)
    tokens = output.sequences[:, -steps:]
    logits = torch.stack(output.logits, dim=1)
    return tokens, logits.float()


def words_of(batch: Batch) -> Bool[Tensor, "b t"]:
    """Return every position but padding, whose states mean nothing."""
    return batch.spans != SPANS.index("padding")


def apart(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> float:
    """Return the largest difference of ``a`` from ``b``, as a share of ``b``'s largest value."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
