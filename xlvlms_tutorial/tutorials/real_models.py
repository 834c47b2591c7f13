"""The shapes of real models, without their weights.

What they would occupy, computed from configurations on torch's meta device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from xlvlms_tutorial.errors import SelectionError
from xlvlms_tutorial.models import anatomy

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_QWEN = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "patch_size": 14}
_PERCEIVER = {
    "hidden_size": 4096,
    "resampler_n_latents": 64,
    "resampler_depth": 3,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Shape:
    """A model of the hub as its ``config.json`` describes it.

    And how many visual tokens a picture of (width, height) becomes. ``patches`` is how many patches
    its tower sees for each token (Idefics2: about, for pictures of 640 x 480).
    """

    kind: str
    config: dict[str, object]
    tokens: Callable[[int, int], int]
    patches: int = 1


def _text(
    width: int, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: object
) -> dict[str, object]:
    names = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return (
        names
        | {"num_key_value_heads": kv_heads, "vocab_size": vocabulary, "pad_token_id": 0}
        | more
    )


def _dynamic(width: int, height: int) -> int:
    # as the hub's processor
    tall, wide = smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=12845056)
    return (tall // 28) * (wide // 28)


def _tiled(side: int, most: int, each: int) -> Callable[[int, int], int]:
    """Tiles of a picture whose longer side is made ``most`` tiles, and the whole picture once more.

    ``each`` tokens a tile.
    """

    def tokens(width: int, height: int) -> int:
        scale = most * side / max(width, height)
        # the shorter side is rounded to whole pixels, made even, and then up to whole tiles
        short = int(min(width, height) * scale)
        return each * (most * -(-(short + short % 2) // side) + 1)

    return tokens


SHAPES: dict[str, Shape] = {
    "llava-hf/llava-1.5-7b-hf": Shape(
        "llava",
        {
            "text_config": _text(
                4096,
                11008,
                32,
                32,
                32,
                32064,
                model_type="llama",
                max_position_embeddings=4096,
                rms_norm_eps=1e-5,
            ),
            "vision_config": _CLIP,
        },
        lambda *_: 576,
    ),
    "llava-hf/llava-1.5-13b-hf": Shape(
        "llava",
        {
            "text_config": _text(5120, 13824, 40, 40, 40, 32064, model_type="llama"),
            "vision_config": _CLIP,
        },
        lambda *_: 576,
    ),
    "Qwen/Qwen2-VL-2B-Instruct": Shape(
        "qwen2_vl",
        {
            "text_config": _text(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True),
            "vision_config": _QWEN | {"hidden_size": 1536},
            "tie_word_embeddings": True,
        },
        _dynamic,
        4,
    ),
    "Qwen/Qwen2-VL-7B-Instruct": Shape(
        "qwen2_vl",
        {
            "text_config": _text(
                3584, 18944, 28, 28, 4, 152064, max_position_embeddings=32768, rms_norm_eps=1e-6
            ),
            "vision_config": _QWEN | {"hidden_size": 3584},
        },
        _dynamic,
        4,
    ),
    "HuggingFaceM4/idefics2-8b": Shape(
        "idefics2",
        {
            "text_config": _text(4096, 14336, 32, 32, 8, 32003, model_type="mistral"),
            # four crops and the whole
            "vision_config": _SIGLIP | {"image_size": 980},
            "perceiver_config": _PERCEIVER,
        },
        lambda *_: 5 * 64,
        10,
    ),
    "HuggingFaceTB/SmolVLM-Instruct": Shape(
        "idefics3",
        {
            "text_config": _text(2048, 8192, 24, 32, 32, 49155, model_type="llama"),
            "vision_config": _SIGLIP | {"image_size": 384},
            "scale_factor": 3,
        },
        _tiled(384, 4, 81),
        9,
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": Shape(
        "idefics3",
        {
            "text_config": _text(576, 1536, 30, 9, 3, 49280, model_type="llama"),
            "vision_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
            "scale_factor": 4,
        },
        _tiled(512, 4, 64),
        16,
    ),
}


def empty(name: str) -> PreTrainedModel:
    """The genuine class of a model in ``SHAPES``, on the meta device.

    All parameters with their shapes, and no numbers in them.

    Raises
    ------
    SelectionError
        If the model is not in ``SHAPES``.
    """
    shape = _known(name)
    config = CONFIG_MAPPING[shape.kind](**{"tie_word_embeddings": False} | shape.config)
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def image_tokens(name: str, width: int, height: int) -> int:
    """How many visual tokens a picture of so many pixels becomes in a model of ``SHAPES``.

    Marks around tiles are not counted.

    Raises
    ------
    SelectionError
        If the model is not in ``SHAPES``, or a side is below 1.
    """
    if min(width, height) < 1:
        raise SelectionError(
            f"a picture of {width} x {height} pixels", "give sides of 1 pixel or more"
        )
    return _known(name).tokens(width, height)


def parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters by part.

    Tower, connector, embeddings, blocks, unembedding, rest, and total; tied weights count once.
    An unembedding that is the embedding matrix, as in small models, counts 0. Works on any
    model, with weights or without.

    Raises
    ------
    AnatomyError
        If no decoder blocks are found, or the model has no unembedding.
    """
    counted: set[int] = set()
    places = {
        "connector": [anatomy.connector(model)],  # before the tower, inside which it may lie
        "tower": [anatomy.tower(model), anatomy.tower(model, "audio")],
        "embeddings": [model.get_input_embeddings()],
        "blocks": [anatomy.decoder_blocks(model)],
        "unembedding": [anatomy.unembedding(model)],
        "rest": [model],
    }
    found = {
        part: sum(_count(module, counted) for module in modules if module is not None)
        for part, modules in places.items()
    }
    ordered = {
        part: found[part]
        for part in ("tower", "connector", "embeddings", "blocks", "unembedding", "rest")
    }
    return ordered | {"total": sum(ordered.values())}


def weight_bytes(model: nn.Module, number: str = "bfloat16") -> int:
    """Bytes that a model's parameters take in a number format, one of ``BYTES``.

    "8bit" and "4bit" are those of ``load(..., quantise=...)``: the linear maps except the
    unembedding, with a scale in float32 for each row (8bit), or for every 64 weights a scale of one
    byte, and a float32 for every 256 of these (4bit); the rest stays in two bytes.

    Raises
    ------
    SelectionError
        If the number format is unknown.
    """
    if number not in BYTES:
        raise SelectionError(f"number format {number!r}", f"allowed: {', '.join(BYTES)}")
    total = sum(weight.numel() for weight in model.parameters())
    if number not in ("8bit", "4bit"):
        return int(total * BYTES[number])
    last = model.get_output_embeddings()
    maps = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not last
    ]
    quantised = sum(weight.numel() for weight in maps)
    scales = sum(
        4 * weight.shape[0] if number == "8bit" else _scales(weight.numel()) for weight in maps
    )
    return int(2 * (total - quantised) + BYTES[number] * quantised + scales)


def cache_bytes(model: nn.Module, number: str = "bfloat16") -> int:
    """Bytes of keys and values that a model keeps for each token of a sequence, in all layers.

    Blocks that keep a state of fixed size instead, or use an earlier block's keys, add nothing.

    Raises
    ------
    SelectionError
        If the number format is none of float32, bfloat16, float16.
    """
    if number not in ("float32", "bfloat16", "float16"):
        raise SelectionError(
            f"number format {number!r} of a cache", "allowed: float32, bfloat16, float16"
        )
    text = model.config.get_text_config(decoder=True)
    return int(sum(_kept(block, text) for block in anatomy.decoder_blocks(model)) * BYTES[number])


def _kept(block: nn.Module, text: PreTrainedConfig) -> int:
    """How many numbers a block keeps of each token."""
    if anatomy.recurrent(block) or anatomy.key_sharing(block) == "borrows":
        return 0
    # latent attention keeps what keys and values are made of
    if getattr(text, "kv_lora_rank", None):
        return text.kv_lora_rank + text.qk_rope_head_dim
    # its width may differ from block to block
    if (keys := anatomy.child(anatomy.attention(block), ("k_proj",))) is not None:
        return 2 * keys.out_features
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return (
        2
        * heads
        * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    )


def _known(name: str) -> Shape:
    if name not in SHAPES:
        raise SelectionError(f"no shape of {name!r}", f"allowed: {', '.join(SHAPES)}")
    return SHAPES[name]


def _count(module: nn.Module, counted: set[int]) -> int:
    """Parameters of a module that were not counted before."""
    new = [weight for weight in module.parameters() if id(weight) not in counted]
    counted.update(map(id, new))
    return sum(weight.numel() for weight in new)


def _scales(weights: int) -> int:
    blocks = -(-weights // 64)
    return blocks + 4 * -(-blocks // 256)
