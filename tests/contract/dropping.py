"""Contract check of tokens that are left out: shorter caches, against a mask that hides them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tests.contract.intervening import each_attention
from tests.contract.reference import Case, agree, differ, generated, whole
from xlvlms_tutorial.errors import InterventionError
from xlvlms_tutorial.methods.dropping import drop_tokens

# words of the refusal, and what the table says
REFUSED = {"cross-attention": "cross-attention", "window": "windows"}
REFUSED |= {"keep a state": "recurrent blocks", "keys of others": "shared keys"}


@each_attention
def dropping(case: Case) -> str | None:
    """Tokens left out behind a layer are tokens that no block above it sees."""
    span = case.modality or "image"
    try:
        with drop_tokens(case.vlm, 1, 1, span=span):
            pass
    except InterventionError as error:
        assert case.vlm.model.config.model_type in str(error)
        (reason,) = [word for text, word in REFUSED.items() if text in str(error)]
        return f"refused: {reason}"
    n = int(case.batch.mask(span).sum(dim=1).min())
    clean = generated(case)[1]
    with drop_tokens(case.vlm, 1, n, span=span):
        agree(generated(case)[1], clean, "nothing dropped")
    for layer in (1, 2):
        for by in ("attention", "norm", "random"):
            with drop_tokens(case.vlm, layer, max(1, n // 2), by, span=span) as kept:
                new, logits = generated(case)
            dropped = case.batch.mask(span) & ~kept.mask
            with hidden(case, layer, dropped):
                agree(logits, whole(case, new), (by, layer))
    if n > 1:
        differ(logits[:, 1:], clean[:, 1:], "half of the tokens dropped")
    return None


@contextmanager
def hidden(case: Case, layer: int, dropped: Tensor) -> Iterator[None]:
    """In the blocks above a layer nothing but themselves attends to these positions (b, t)."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        states = args[0] if args else kwargs["hidden_states"]
        rows, length = states.shape[:2]
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        columns = nn.functional.pad(dropped, (0, length - dropped.shape[1]))
        hide = columns[:, None, None] & ~torch.eye(length, dtype=torch.bool)
        value = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.expand(rows, -1, length, length).masked_fill(hide, value)
        return args, {**kwargs, "attention_mask": mask}

    blocks = case.vlm.blocks[layer:]
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
