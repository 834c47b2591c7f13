"""Greedy answers, whatever a folder's settings are.

What several texts about one picture have in common runs through the model once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.models.spans import SPANS, Batch

if TYPE_CHECKING:
    from xlvlms_tutorial.models.vlm import VLM

# Interventions that treat all positions alike, so that a prompt may run in two parts
_ALIKE = ("skip", "parallel", "parallel_pairs", "mask_weights")

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


def padding(vlm: "VLM") -> int | None:
    """Return the id that fills the rows which have ended."""
    config = vlm.model.generation_config
    if config.pad_token_id is not None:
        return config.pad_token_id
    token = getattr(vlm.tokenizer, "pad_token_id", None)
    if token is not None:
        return token
    end = config.eos_token_id
    return end[0] if isinstance(end, list) else end


def shareable(vlm: "VLM") -> bool:
    """Tell whether prompts of this model may run in two parts now.

    The model has to be a LLaVA, with nothing in force that depends on positions.
    """
    if vlm.model.config.model_type != "llava":
        return False
    if vlm.active:
        return all(name.partition("(")[0] in _ALIKE for name in vlm.active)
    # a user's hooks may count calls or positions; transformers' own, by
    # which it collects outputs, do not
    for module in vlm.model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not getattr(hook, "__module__", "").startswith("transformers."):
                return False
    return True


def answers_to(
    vlm: "VLM",
    contents: Mapping[str, Sequence[object] | None],
    texts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
) -> list[str]:
    """Return greedy answers to texts, one for each, stripped of special tokens.

    Parameters
    ----------
    vlm : VLM
        The model.
    contents : Mapping of str to sequence or None
        What the texts are about, by the names images, videos and audio.
    texts : sequence of str
        The questions or instructions.
    max_new_tokens : int
        At most so many tokens an answer.
    batch_size : int
        Texts that run through the model together.
    progress : bool
        Whether a progress bar is contents.
    """
    images = contents["images"]
    pictures = images if images is not None and shareable(vlm) else [None] * len(texts)
    parts = list(by_picture(pictures, batch_size))
    answers = [""] * len(texts)
    for rows in tqdm(parts, desc="generate", unit="batch", leave=False) if progress else parts:
        media = {}
        for kind, many in contents.items():
            media[kind] = None if many is None else _take(many, rows)
        batch = vlm.batch(**media, texts=_take(texts, rows), names=rows)
        ids = generate_shared(vlm, batch, _take(pictures, rows), max_new_tokens)
        decoded = vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for row, text in zip(rows, decoded, strict=True):
            answers[row] = text.strip()
    return answers


def _take(values: Sequence[object], rows: Sequence[int]) -> list:
    return [values[row] for row in rows]


def after_prompts(ids: Int[Tensor, "b t"], prompts: Int[Tensor, "p n"]) -> Int[Tensor, "b new"]:
    """Return what ``generate`` made without ``prompts``, with which most models begin ``ids``."""
    repeated = prompts.repeat_interleave(len(ids) // len(prompts), dim=0)
    length = repeated.shape[1]
    echoed = ids.shape[1] >= length and torch.equal(ids[:, :length], repeated)
    return ids[:, length:] if echoed else ids


def by_picture(images: Sequence[object], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of the texts in batches, those about one picture together."""
    first: dict[int, int] = {}
    for number, image in enumerate(images):
        first.setdefault(id(image), number)
    order = sorted(range(len(images)), key=lambda number: (first[id(images[number])], number))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def generate_shared(
    vlm: "VLM", batch: Batch, images: Sequence[object], max_new_tokens: int
) -> Int[Tensor, "b new"]:
    """Return the ids that ``vlm.generate_ids`` gives for a batch, computed once for equal pictures.

    The prompts of a LLaVA begin alike up to the end of the picture. This beginning runs once a
    picture, and its keys and values serve every text about it. The numbers agree with those of
    whole prompts up to rounding.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        The prompts.
    images : sequence
        The picture of each row; equal pictures are the same object. ``None`` in it says that
        nothing is to be shared.
    max_new_tokens : int
        At most so many tokens a row.
    """
    pictures = {id(image): row for row, image in enumerate(images)}  # a row that shows each picture
    if any(image is None for image in images) or len(pictures) == len(images):
        return vlm.generate_ids(batch, max_new_tokens)
    length = _common(batch)
    if not length:
        return vlm.generate_ids(batch, max_new_tokens)
    numbers = {picture: number for number, picture in enumerate(pictures)}
    of_row = torch.tensor([numbers[id(image)] for image in images], device=vlm.device)
    start = _without_padding(batch, 0)[:length]
    beginning = vlm.prepare(
        {
            "input_ids": start.expand(len(pictures), -1),
            "attention_mask": torch.ones(len(pictures), length, dtype=torch.long),
            "pixel_values": batch["pixel_values"][list(pictures.values())],
        }
    )
    cache = vlm.forward(beginning, logits=False, use_cache=True).past_key_values
    cache.batch_select_indices(of_row)
    return vlm.generate_ids(_continued(vlm, batch, start), max_new_tokens, past_key_values=cache)


def _continued(vlm: "VLM", batch: Batch, start: Int[Tensor, "length"]) -> Batch:
    """Return the same prompts with their padding after the common beginning.

    Their keys and values lie like this in the cache.
    """
    rows, columns = batch["input_ids"].shape
    ids = torch.zeros(rows, columns, dtype=torch.long)
    mask = torch.zeros(rows, columns, dtype=torch.long)
    ids[:, : len(start)] = start.cpu()
    mask[:, : len(start)] = 1
    for row in range(rows):
        rest = _without_padding(batch, row)[len(start) :]
        ids[row, columns - len(rest) :] = rest.cpu()
        mask[row, columns - len(rest) :] = 1
    return vlm.prepare({"input_ids": ids, "attention_mask": mask})


def _common(batch: Batch) -> int:
    """Return how many ids all prompts share from their beginning.

    They hold at least the picture, and not a full prompt; 0 where there are no such ids.
    """
    prompts = [_without_padding(batch, row).tolist() for row in range(len(batch["input_ids"]))]
    shortest = min(map(len, prompts)) - 1
    common = 0
    while common < shortest and len({prompt[common] for prompt in prompts}) == 1:
        common += 1
    kinds = batch.spans[0][batch["attention_mask"][0] == 1]
    pictures = (kinds == SPANS.index("image")).nonzero().flatten().tolist()
    return common if pictures and common > pictures[-1] else 0


def _without_padding(batch: Batch, row: int) -> Int[Tensor, "t"]:
    return batch["input_ids"][row][batch["attention_mask"][row] == 1]
