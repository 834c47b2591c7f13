"""Greedy answers, whatever a folder's settings are.

What several texts about one picture have in common runs through the model once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.models.spans import SPANS, Batch

# Interventions that treat all positions alike, so that a prompt may run in two parts
_ALIKE = ("skip", "parallel", "parallel_pairs", "mask_weights", "pool_tokens")

# What a model's settings say of its tokens; all else in them (beams, penalties, sampling,
# lengths, outputs) is a way to search
_OF_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)


@contextmanager
def greedy(model: nn.Module) -> Iterator[None]:
    """Let ``generate`` take the most probable token at each step, unless its options differ.

    Tokens that the model suppresses are never taken. transformers would search as the
    ``generation_config.json`` of the model's folder says, also with ``do_sample=False``.
    """
    configs = []
    for part in model.modules():
        if getattr(part, "generation_config", None) is not None:
            configs.append((part, part.generation_config))
    for part, config in configs:
        tokens = {name: getattr(config, name, None) for name in _OF_TOKENS}
        part.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        for part, config in configs:
            part.generation_config = config


class Finite(LogitsProcessor):
    """Sees the logits of each step as they are, and records whether all were numbers.

    The largest of a row with NaN is NaN.
    """

    def __init__(self) -> None:
        self.all: Tensor | bool = True

    def __call__(
        self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]
    ) -> Float[Tensor, "b v"]:
        """Return the logits of the next token unchanged."""
        # read only at the end: a GPU need not wait
        self.all = self.all & torch.isfinite(scores.amax(dim=-1)).all()
        return scores

    def require(self) -> None:
        """Refuse what was generated from logits that are no numbers.

        Raises
        ------
        InputError
            If they were NaN or infinite.
        """
        if not self.all:
            advice = (
                "load the model in float32 or bfloat16, and check its weights: they may be damaged"
            )
            raise InputError(
                (
                    "the logits of the next token are NaN or infinite, so that no "
                    "token is the most probable"
                ),
                advice,
            )


def padding(model: nn.Module, tokenizer: object | None) -> int | None:
    """Return the id that fills the rows which have ended."""
    config = model.generation_config
    if config.pad_token_id is not None:
        return config.pad_token_id
    token = getattr(tokenizer, "pad_token_id", None)
    if token is not None:
        return token
    end = config.eos_token_id
    return end[0] if isinstance(end, list) else end


def shareable(model: nn.Module, active: Sequence[str]) -> bool:
    """Tell whether prompts of this model may run in two parts now.

    The model has to be a LLaVA, with nothing in force that depends on positions; ``active`` are the
    interventions that hold.
    """
    if model.config.model_type != "llava":
        return False
    if active:
        return all(name.partition("(")[0] in _ALIKE for name in active)
    # a user's hooks may count calls or positions; transformers' own, by
    # which it collects outputs, do not
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not getattr(hook, "__module__", "").startswith("transformers."):
                return False
    return True


def taken(values: Sequence[object] | None, rows: Sequence[int]) -> list | None:
    """Return the values of these rows; None where there are none."""
    return None if values is None else [values[row] for row in rows]


def after_prompts(ids: Int[Tensor, "b t"], prompts: Int[Tensor, "p n"]) -> Int[Tensor, "b new"]:
    """Return what ``generate`` made without ``prompts``, with which most models begin ``ids``."""
    repeated = prompts.repeat_interleave(len(ids) // len(prompts), dim=0)
    length = repeated.shape[1]
    echoed = ids.shape[1] >= length and torch.equal(ids[:, :length], repeated)
    return ids[:, length:] if echoed else ids


def by_picture(images: Sequence[object], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of the texts in batches, those about one picture together."""
    rows_of: dict[int, list[int]] = {}
    for number, image in enumerate(images):
        rows_of.setdefault(id(image), []).append(number)
    order = list(chain.from_iterable(rows_of.values()))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def common_beginning(batch: Batch) -> Int[Tensor, "length"]:
    """Return the ids with which all prompts of a batch begin, without padding.

    They hold at least the picture, and not a full prompt; there are none where that cannot be.
    """
    prompts = [_without_padding(batch, row).tolist() for row in range(len(batch["input_ids"]))]
    shortest = min(map(len, prompts)) - 1
    common = 0
    while common < shortest and len({prompt[common] for prompt in prompts}) == 1:
        common += 1
    first = _without_padding(batch, 0)
    kinds = batch.spans[0][batch["attention_mask"][0] == 1]
    pictures = (kinds == SPANS.index("image")).nonzero().flatten().tolist()
    if not pictures or common <= pictures[-1]:
        return first[:0]
    return first[:common]


def beginnings(
    batch: Batch, start: Int[Tensor, "length"], rows: Sequence[int]
) -> dict[str, Tensor]:
    """Return the model inputs of the common beginning, once for the picture of each of ``rows``.

    ``batch`` holds the pictures, ``start`` the ids of the beginning.
    """
    n = len(rows)
    inputs = {"input_ids": start.expand(n, -1)}
    inputs["attention_mask"] = torch.ones(n, len(start), dtype=torch.long)
    inputs["pixel_values"] = batch["pixel_values"][list(rows)]
    return inputs


def continued(batch: Batch, start: Int[Tensor, "length"]) -> dict[str, Tensor]:
    """Return the same prompts with their padding after the common beginning.

    Their keys and values lie like this in the cache.
    """
    rows, columns = batch["input_ids"].shape
    n = len(start)
    ids = torch.zeros(rows, columns, dtype=torch.long)
    mask = torch.zeros(rows, columns, dtype=torch.long)
    ids[:, :n] = start.cpu()
    mask[:, :n] = 1
    for row in range(rows):
        rest = _without_padding(batch, row)[n:]
        first = columns - len(rest)
        ids[row, first:] = rest.cpu()
        mask[row, first:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _without_padding(batch: Batch, row: int) -> Int[Tensor, "t"]:
    return batch["input_ids"][row][batch["attention_mask"][row] == 1]
