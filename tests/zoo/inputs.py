"""Inputs made by hand for the tiny models: as many placeholders as the model makes features,
and what its processor would add.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

VOCABULARY = 200
PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO, AUDIO, VISION_START, VISION_END = 190, 191, 192, 193, 194
# An untrained model may emit a placeholder, and no picture then fills it; or stop at once.
SUPPRESS = [PAD, BOS, EOS, *range(IMAGE, VOCABULARY)]
WORDS_BEFORE = (31, 32, 33)
INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {}  # inputs that stand beside their models


def ids(*tokens: int) -> dict[str, Tensor]:
    row = torch.tensor([tokens])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def prompt(n: int, placeholder: int = IMAGE) -> dict[str, Tensor]:
    return ids(BOS, 11, 12, *[placeholder] * n, 21, 22, 23, 24)


def marked_prompt(n: int) -> dict[str, Tensor]:
    return ids(BOS, VISION_START, *[IMAGE] * n, VISION_END, 22, 23, 24)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def qwen_vl() -> dict[str, Tensor]:
    text = marked_prompt(4)
    types = (text["input_ids"] == IMAGE).int()
    patches = noise(16, 3 * 2 * 14 * 14)  # a grid of 4 x 4 patches, merged two by two
    return text | {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": types,
    }


def anyres() -> dict[str, Tensor]:
    # 4 tokens of the small picture, and one tile of 2 x 2 with a newline after each row: 6
    return prompt(10) | {
        "pixel_values": noise(1, 2, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 28]]),
    }


def gemma3() -> dict[str, Tensor]:
    text = marked_prompt(4)
    return text | {
        "token_type_ids": (text["input_ids"] == IMAGE).long(),
        "pixel_values": noise(1, 3, 28, 28),
    }


def gemma4() -> dict[str, Tensor]:
    text = marked_prompt(4)
    # x and y of 4 x 4 patches, pooled two by two
    positions = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)[None]
    picture = {"pixel_values": noise(1, 16, 3 * 14 * 14), "image_position_ids": positions}
    return text | picture | {"mm_token_type_ids": (text["input_ids"] == IMAGE).long()}


def kimi() -> dict[str, Tensor]:
    return marked_prompt(4) | {
        "pixel_values": noise(16, 3, 14, 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def lfm2_vl() -> dict[str, Tensor]:
    patches = {
        "pixel_values": noise(1, 16, 3 * 14 * 14),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }
    return prompt(4) | patches | {"spatial_shapes": torch.tensor([[4, 4]])}


def paligemma() -> dict[str, Tensor]:
    text = prompt(4)
    return text | {
        "token_type_ids": torch.zeros_like(text["input_ids"]),
        "pixel_values": noise(1, 3, 28, 28),
    }


def molmo2() -> dict[str, Tensor]:
    start, end, patch = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2
    text = ids(BOS, start, patch, end, 22, 23, 24)
    picture = {
        "pixel_values": noise(1, 4, 14 * 14 * 3),
        "image_token_pooling": torch.tensor([[0, 1, 2, 3]]),
    }
    picture |= {"image_grids": torch.tensor([[1, 1, 0, 0]]), "image_num_crops": torch.tensor([1])}
    return text | picture | {"mm_token_type_ids": (text["input_ids"] == patch).long()}


def blip2() -> dict[str, Tensor]:
    return ids(*[IMAGE] * 4, EOS, 21, 22, 23, 24) | {"pixel_values": noise(1, 3, 28, 28)}


def instructblip() -> dict[str, Tensor]:
    question_ids = torch.tensor([[5, 6, 7]])
    return blip2() | {
        "qformer_input_ids": question_ids,
        "qformer_attention_mask": torch.ones_like(question_ids),
    }


def mllama() -> dict[str, Tensor]:
    text = ids(BOS, VOCABULARY, 11, 12, 21, 22, 23, 24)
    tiles = {
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
    }
    # row, token, picture, tile
    cross_mask = torch.ones(1, text["input_ids"].shape[1], 1, 1, dtype=torch.long)
    return (
        text
        | {"pixel_values": noise(1, 1, 1, 3, 28, 28), "cross_attention_mask": cross_mask}
        | tiles
    )


def qwen2_audio() -> dict[str, Tensor]:
    frames = torch.ones(1, 16, dtype=torch.long)
    return prompt(4, AUDIO) | {"input_features": noise(1, 16, 16), "feature_attention_mask": frames}


def four(*shape: int) -> dict[str, Tensor]:
    return prompt(4) | {"pixel_values": noise(*shape)}


def single(name: str) -> dict[str, Tensor]:
    """Inputs of one row with one picture (clip, sound) for the tiny model of that name."""
    builders = {
        "llava": lambda: four(1, 3, 28, 28),
        "llava_next": anyres,
        "llava_onevision": anyres,
        # three frames of 2 x 2 patches, pooled to one token each
        "llava_next_video": lambda: (
            prompt(3, VIDEO) | {"pixel_values_videos": noise(1, 3, 3, 28, 28)}
        ),
        "qwen2_vl": qwen_vl,
        "qwen2_5_vl": qwen_vl,
        "qwen3_vl": qwen_vl,
        "qwen3_vl_moe": qwen_vl,
        "qwen3_5": qwen_vl,
        "qwen3_5_moe": qwen_vl,
        "glm4v": qwen_vl,
        "glm4v_moe": qwen_vl,
        "glm46v": qwen_vl,
        "glm_ocr": qwen_vl,
        "kimi_k25": kimi,
        "mistral3": lambda: four(1, 3, 56, 56) | {"image_sizes": torch.tensor([[56, 56]])},
        "idefics2": lambda: four(1, 1, 3, 28, 28),
        "idefics3": lambda: four(1, 1, 3, 56, 56),
        "smolvlm": lambda: four(1, 1, 3, 56, 56),
        "aria": lambda: four(1, 3, 28, 28),
        "lfm2_vl": lfm2_vl,
        "paligemma": paligemma,
        "internvl": lambda: four(1, 3, 56, 56),
        "gemma3": gemma3,
        "gemma4": gemma4,
        "gemma4_moe": gemma4,
        "gemma4_small": gemma4,
        "molmo2": molmo2,
        "blip2": blip2,
        "instructblip": instructblip,
        "mllama": mllama,
        "llama4": lambda: four(1, 3, 56, 56),
        "qwen2_audio": qwen2_audio,
        **INPUTS,
    }
    return builders[name]()


def _lengthened(
    inputs: dict[str, Tensor], tokens: Tensor, front: bool, kind: int = 0
) -> dict[str, Tensor]:
    """Tokens [rows, n] put before or behind, and every input that runs along the
    sequence brought to the same length.
    """
    n, longer = tokens.shape[1], dict(inputs)
    padding = (n, 0) if front else (0, n)
    longer["input_ids"] = torch.cat(
        [tokens, inputs["input_ids"]] if front else [inputs["input_ids"], tokens], 1
    )
    longer["attention_mask"] = pad(inputs["attention_mask"], padding, value=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            longer[name] = pad(inputs[name], padding, value=kind)
    # Idefics: words before the picture do not see it, those behind go on to
    if "image_attention_mask" in inputs:
        ends = (
            inputs["image_attention_mask"][:, :1] * 0
            if front
            else inputs["image_attention_mask"][:, -1:]
        )
        pieces = [ends.expand(-1, n, -1), inputs["image_attention_mask"]]
        longer["image_attention_mask"] = torch.cat(pieces if front else pieces[::-1], 1)
    if "cross_attention_mask" in inputs:
        longer["cross_attention_mask"] = pad(
            inputs["cross_attention_mask"], (0, 0, 0, 0, *padding), value=1
        )
    return longer


def prefixed(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same row after three more words, and with the negative of its picture.

    The first row of ``padded``, unpadded.
    """
    longer = _lengthened(inputs, torch.tensor([WORDS_BEFORE]), front=True)
    return {key: -value if value.is_floating_point() else value for key, value in longer.items()}


def padded(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of two rows of different length.

    ``prefixed``, and the row itself, padded on the left by three.
    """
    first = prefixed(name, inputs)
    second = _lengthened(inputs, torch.full((1, len(WORDS_BEFORE)), PAD), front=True)
    second["attention_mask"][:, : len(WORDS_BEFORE)] = 0
    if name == "molmo2":  # its pooling windows number the patches through all pictures of a batch
        second["image_token_pooling"] = (
            second["image_token_pooling"] + first["image_token_pooling"].numel()
        )
    return {key: torch.cat([first[key], second[key]]) for key in first}


def extended(name: str, inputs: dict[str, Tensor], new_ids: Tensor) -> dict[str, Tensor]:
    """The inputs of a forward over prompt and new tokens [rows, n],
    as if nothing had been cached.
    """
    # PaliGemma: kind 0 is the prompt, which sees itself in both directions;
    # kind 1 the answer, which is causal
    return _lengthened(inputs, new_ids, front=False, kind=int(name == "paligemma"))
