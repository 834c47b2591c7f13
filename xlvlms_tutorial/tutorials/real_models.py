"""Compute what real models would occupy, without their weights.

From their configurations, on torch's meta device.
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

from xlvlms_tutorial.errors import InputError
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

    Use ``SHAPES`` for those that are known here, by their names on the hub.

    Parameters
    ----------
    kind : str
        The model type by which transformers knows its configuration, such as "llava".
    config : dict
        The arguments of that configuration.
    tokens : function
        Takes the width and height of a picture in pixels, gives its number of visual tokens.
    patches : int
        How many patches the tower sees for each visual token (Idefics2: about, for pictures of
        640 x 480). By default 1.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> shape = real_models.SHAPES["llava-hf/llava-1.5-7b-hf"]
    >>> shape.kind, shape.tokens(640, 480), shape.patches
    ('llava', 576, 1)
    """

    kind: str
    config: dict[str, object]
    tokens: Callable[[int, int], int]
    patches: int = 1


def _text(
    width: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    **options: object,
) -> dict[str, object]:
    """The arguments of a language model's configuration, by the names that most of them have."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "pad_token_id": 0,
    }
    return sizes | options


def _dynamic(width: int, height: int) -> int:
    # as the hub's processor
    tall, wide = smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=12845056)
    return (tall // 28) * (wide // 28)


def _tiled(side: int, n_tiles: int, tile_tokens: int) -> Callable[[int, int], int]:
    """Count the tokens of the tiles of a picture, and of the whole picture once more.

    The longer side is made ``n_tiles`` tiles of ``side`` pixels; each has ``tile_tokens`` tokens.
    """

    def tokens(width: int, height: int) -> int:
        scale = n_tiles * side / max(width, height)
        # the shorter side is rounded to whole pixels, made even, and then up to whole tiles
        short = int(min(width, height) * scale)
        n_short = -(-(short + short % 2) // side)
        return tile_tokens * (n_tiles * n_short + 1)

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
    """Build a model of ``SHAPES`` without weights, in its genuine class.

    Use it to count what a model of this shape would occupy, on a machine that cannot hold it. All
    parameters lie on the meta device, with their shapes and no numbers in them.

    Parameters
    ----------
    name : str
        The model's name on the hub, one of ``SHAPES``.

    Returns
    -------
    PreTrainedModel
        The model in evaluation mode.

    Raises
    ------
    InputError
        If the model is not in ``SHAPES``.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> model = real_models.empty("HuggingFaceTB/SmolVLM-256M-Instruct")
    >>> type(model).__name__, model.device.type
    ('Idefics3ForConditionalGeneration', 'meta')
    """
    shape = _shape_of(name)
    options = {"tie_word_embeddings": False} | shape.config
    config = CONFIG_MAPPING[shape.kind](**options)
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def image_tokens(name: str, width: int, height: int) -> int:
    """Count the visual tokens that a picture becomes in a model of ``SHAPES``.

    Use it to see how long a prompt with a picture is. Marks around tiles are not counted.

    Parameters
    ----------
    name : str
        The model's name on the hub, one of ``SHAPES``.
    width : int
        The picture's width in pixels.
    height : int
        The picture's height in pixels.

    Returns
    -------
    int
        The number of visual tokens.

    Raises
    ------
    InputError
        If the model is not in ``SHAPES``, or a side is below 1.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> real_models.image_tokens("Qwen/Qwen2-VL-2B-Instruct", 640, 480)
    391
    """
    if min(width, height) < 1:
        raise InputError(f"a picture of {width} x {height} pixels", "give sides of 1 pixel or more")
    return _shape_of(name).tokens(width, height)


def parameters(model: nn.Module) -> dict[str, int]:
    """Count the parameters of a model by part.

    Use it on any model, with weights or without. Tied weights count once: an unembedding that is
    the embedding matrix, as in small models, counts 0.

    Parameters
    ----------
    model : Module
        A model with decoder blocks, such as ``vlm.model`` or what :func:`empty` gives.

    Returns
    -------
    dict of str to int
        The number of parameters of the ``tower``, ``connector``, ``embeddings``, ``blocks``,
        ``unembedding`` and ``rest``, and the ``total``.

    Raises
    ------
    AnatomyError
        If no decoder blocks are found, or the model has no unembedding.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> model = real_models.empty("HuggingFaceTB/SmolVLM-256M-Instruct")
    >>> real_models.parameters(model)["total"]
    256484928
    """
    # the connector comes before the tower, inside which it may lie
    parts = {
        "connector": [anatomy.connector(model)],
        "tower": [anatomy.tower(model), anatomy.tower(model, "audio")],
        "embeddings": [model.get_input_embeddings()],
        "blocks": [anatomy.decoder_blocks(model)],
        "unembedding": [anatomy.unembedding(model)],
        "rest": [model],
    }
    counted: set[int] = set()
    names = ("tower", "connector", "embeddings", "blocks", "unembedding", "rest")
    counts = dict.fromkeys(names, 0)
    for part, modules in parts.items():
        for module in modules:
            if module is not None:
                counts[part] += _count(module, counted)
    counts["total"] = sum(counts.values())
    return counts


def weight_bytes(model: nn.Module, number: str = "bfloat16") -> int:
    """Compute the bytes that a model's parameters take in a dtype.

    Use it to see whether a model fits a graphics card, before it is loaded. "8bit" and "4bit" are
    those of ``load(..., quantise=...)``: the linear maps except the unembedding, with a scale in
    float32 for each row (8bit), or for every 64 weights a scale of one byte, and a float32 for
    every 256 of these (4bit); the rest stays in two bytes.

    Parameters
    ----------
    model : Module
        A model with weights or without.
    number : str
        The dtype, one of ``BYTES``: "float32", "bfloat16" (the default), "float16", "8bit" or
        "4bit".

    Returns
    -------
    int
        The number of bytes.

    Raises
    ------
    InputError
        If the dtype is unknown.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> model = real_models.empty("HuggingFaceTB/SmolVLM-256M-Instruct")
    >>> real_models.weight_bytes(model, "float32") == 4 * real_models.parameters(model)["total"]
    True
    """
    if number not in BYTES:
        raise InputError(f"number format {number!r}", f"allowed: {', '.join(BYTES)}")
    total = sum(weight.numel() for weight in model.parameters())
    if number not in ("8bit", "4bit"):
        return int(total * BYTES[number])
    unembedding = model.get_output_embeddings()
    quantised = 0
    scales = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module is unembedding:
            continue
        n = module.weight.numel()
        quantised += n
        scales += 4 * module.weight.shape[0] if number == "8bit" else _scales(n)
    return int(2 * (total - quantised) + BYTES[number] * quantised + scales)


def cache_bytes(model: nn.Module, number: str = "bfloat16") -> int:
    """Compute the bytes of keys and values that a model caches for each token, in all layers.

    Use it to see how much memory long prompts or large batches take. Blocks that keep a state of
    fixed size instead, or use an earlier block's keys, add nothing.

    Parameters
    ----------
    model : Module
        A model with decoder blocks, with weights or without.
    number : {"bfloat16", "float16", "float32"}
        The dtype of the cache.

    Returns
    -------
    int
        The number of bytes a token.

    Raises
    ------
    InputError
        If the dtype is none of float32, bfloat16, float16.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> model = real_models.empty("HuggingFaceTB/SmolVLM-256M-Instruct")
    >>> real_models.cache_bytes(model)  # 30 layers, 3 heads of 64 for keys and for values, 2 bytes
    23040
    """
    if number not in ("float32", "bfloat16", "float16"):
        raise InputError(
            f"number format {number!r} of a cache", "allowed: float32, bfloat16, float16"
        )
    text = model.config.get_text_config(decoder=True)
    blocks = anatomy.decoder_blocks(model)
    numbers = sum(_cached_numbers(block, text) for block in blocks)
    return int(numbers * BYTES[number])


def _cached_numbers(block: nn.Module, text: PreTrainedConfig) -> int:
    """The numbers that a block caches for each token."""
    if anatomy.recurrent(block) or anatomy.key_sharing(block) == "borrows":
        return 0
    # latent attention keeps what keys and values are made of
    if getattr(text, "kv_lora_rank", None):
        return text.kv_lora_rank + text.qk_rope_head_dim
    # its width may differ from block to block
    keys = anatomy.child(anatomy.attention(block), ("k_proj",))
    if keys is not None:
        return 2 * keys.out_features
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * heads * width


def _shape_of(name: str) -> Shape:
    if name not in SHAPES:
        raise InputError(f"no shape of {name!r}", f"allowed: {', '.join(SHAPES)}")
    return SHAPES[name]


def _count(module: nn.Module, counted: set[int]) -> int:
    """Parameters of a module that were not counted before."""
    total = 0
    for weight in module.parameters():
        if id(weight) not in counted:
            counted.add(id(weight))
            total += weight.numel()
    return total


def _scales(n: int) -> int:
    """The bytes of the scales of n weights in 4 bits."""
    blocks = -(-n // 64)
    return blocks + 4 * -(-blocks // 256)
