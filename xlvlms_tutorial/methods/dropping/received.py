"""Read how much attention one position gives to all others, with any attention of transformers."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xlvlms_tutorial.interventions.overrides import overridden

_NAME = "xlvlms_received"
# who wants to know, by the attention that is watched
_WATCHED: WeakKeyDictionary[nn.Module, "Received"] = WeakKeyDictionary()


class Received:
    """What each position receives of the attention of one position, while an attention runs.

    ``attention`` is the module. ``observer`` gives, at each of its calls, the number of the looking
    position in each row, (b,), or None where this call is not of interest. After a call ``weights``
    holds the share that each position receives (b, t), the mean over heads.
    """

    def __init__(
        self, attention: nn.Module, observer: Callable[[], Int[Tensor, "b"] | None]
    ) -> None:
        self.attention = attention
        self.observer = observer
        self.weights: Float[Tensor, "b t"] | None = None
        self.implementation = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the attention inside this block."""
        with overridden({self.attention: self._forward}):
            yield

    def _forward(self, original: Callable, *args: object, **kwargs: object) -> object:
        if self.observer() is None:
            return original(*args, **kwargs)
        # the blocks' attentions share their config: it says ours while this one runs
        config = self.attention.config
        self.implementation = config._attn_implementation
        _WATCHED[self.attention] = self
        config._attn_implementation = _NAME
        try:
            return original(*args, **kwargs)
        finally:
            config._attn_implementation = self.implementation
            del _WATCHED[self.attention]

    def read(
        self,
        query: Float[Tensor, "b heads t e"],
        key: Float[Tensor, "b kv_heads s e"],
        mask: Tensor | None,
        scaling: float | None,
    ) -> None:
        """Compute the weights of the observer alone: a row of each head, not a matrix.

        ``query`` and ``key`` are those of all heads, ``mask`` is the model's, for all queries or
        None where attention is causal, and ``scaling`` multiplies the products.
        """
        observer = self.observer().to(query.device)
        rows = torch.arange(len(query), device=query.device)
        looking = query[rows, :, observer]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.einsum("bhe,bhse->bhs", looking, key) * scale
        if mask is None:
            later = torch.arange(key.shape[2], device=key.device)[None] > observer[:, None]
            scores = scores.masked_fill(later[:, None], -torch.inf)
        else:
            allowed = mask.expand(len(query), -1, -1, -1)[rows, :, observer]
            if allowed.dtype == torch.bool:
                scores = scores.masked_fill(~allowed, -torch.inf)
            else:
                scores = scores + allowed
        self.weights = scores.softmax(dim=-1).mean(dim=1)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **options: object
) -> object:
    received = _WATCHED[module]
    received.read(query, key, mask, options.get("scaling"))
    if received.implementation == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[received.implementation]
    return function(module, query, key, value, mask, **options)


AttentionInterface.register(_NAME, _attention)
