"""Compute what real models would occupy, without their weights.

From their configurations, on torch's meta device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

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
from transformers.utils.chat_template_utils import render_jinja_template

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics import decoder_flops
from xlvlms_tutorial.models import VLM, anatomy
from xlvlms_tutorial.validation import require_one_of

FORMATS = ("float32", "bfloat16", "8bit", "4bit")  # from the largest to the smallest
# gigabytes that a card has to give
CARDS = {"T4, 16 GB": 15, "24 GB": 24, "40 GB": 40, "80 GB": 80}
# of a T4, an L4, an A100 of 40 GB and an H100: operations a second in 16 bits, bytes a second
SHEETS = {
    "T4, 16 GB": (65e12, 320e9),
    "24 GB": (121e12, 300e9),
    "40 GB": (312e12, 1555e9),
    "80 GB": (989e12, 3350e9),
}
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
        How many patches the tower computes for each visual token. In Idefics2 it depends on the
        picture, all parts of which are padded to the size of the largest: the number is that of
        640 x 480 pixels. By default 1.

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
        24,
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


_EACH = (
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
_MARKED = _EACH.replace("IMAGE", "<image>")
_END = "<end_of_utterance>\nAssistant:"
_TEMPLATES = {
    "llava": "USER: " + _EACH.replace("IMAGE", "<image>\n") + " ASSISTANT:",
    "qwen2_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    + _EACH.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "<|im_end|>\n<|im_start|>assistant{{ '\n' }}",
    "idefics2": "User:" + _MARKED + _END,
    "idefics3": "<|im_start|>User:" + _MARKED + _END,
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


def memory(model: nn.Module, tokens: int, number: str = "bfloat16", rest: float = 1.5) -> float:
    """Compute the memory that a model takes with its cache, in gigabytes.

    Use it to see whether a run fits a card.

    Parameters
    ----------
    model : Module
        A model with decoder blocks, with weights or without.
    tokens : int
        How many tokens are in the cache, of all sequences of a batch together.
    number : str, default "bfloat16"
        The number format of the weights, one of ``BYTES``. The cache has two bytes a number.
    rest : float, default 1.5
        What everything else takes, in gigabytes.

    Returns
    -------
    float
        The memory in gigabytes (billions of bytes).

    Raises
    ------
    InputError
        If the number format is unknown.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> model = real_models.empty("HuggingFaceTB/SmolVLM-256M-Instruct")
    >>> round(real_models.memory(model, tokens=8000), 1)
    2.2
    """
    return (weight_bytes(model, number) + cache_bytes(model) * tokens) / 1e9 + rest


def best_format(model: nn.Module, tokens: int, room: float) -> str:
    """Find the most exact number format in which a model fits a card.

    Parameters
    ----------
    model : Module
        A model with decoder blocks, with weights or without.
    tokens : int
        How many tokens are in the cache, of all sequences of a batch together.
    room : float
        What the card has to give, in gigabytes; ``CARDS`` has some.

    Returns
    -------
    str
        One of ``FORMATS``; "no" if it fits in none.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> model = real_models.empty("HuggingFaceTB/SmolVLM-256M-Instruct")
    >>> [real_models.best_format(model, 8000, room) for room in (15, 2.5, 0.5)]
    ['float32', 'bfloat16', 'no']
    """
    for number in FORMATS:
        if memory(model, tokens, number) <= room:
            return number
    return "no"


def prompt_flops(model: PreTrainedModel, tokens: int) -> int:
    """Compute the operations of the decoder and the unembedding that read a prompt.

    Use it where a model cannot be run and counted; the tower is not in it.

    Parameters
    ----------
    model : PreTrainedModel
        A model with decoder blocks, with weights or without.
    tokens : int
        The length of the prompt, with the tokens of the picture.

    Returns
    -------
    int
        Floating-point operations.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> model = real_models.empty("HuggingFaceTB/SmolVLM-256M-Instruct")
    >>> real_models.prompt_flops(model, 800) > 2 * real_models.prompt_flops(model, 400)
    True
    """
    text = model.config.get_text_config(decoder=True)
    blocks = anatomy.decoder_blocks(model)
    flops = decoder_flops(
        tokens,
        layers=len(blocks),
        width=text.hidden_size,
        hidden=anatomy.mlp_exit(blocks[0]).in_features,
        heads=text.num_attention_heads,
        vocabulary=text.vocab_size,
        kv_heads=getattr(text, "num_key_value_heads", None),
        head_size=getattr(text, "head_dim", None),
    )
    return int(flops["total"])


def run_sizes(vlm: VLM, image: int, text: int, sequences: int, written: int) -> dict[str, float]:
    """Compute what a run with a model takes of memory, disk and work.

    Parameters
    ----------
    vlm : VLM
        A model, with weights or without.
    image, text : int
        How many tokens of a prompt are the picture's, and how many are text.
    sequences : int
        How many sequences are in a batch.
    written : int
        How many tokens are written to each.

    Returns
    -------
    dict of str to float
        The sizes by name, each with its unit.

    Examples
    --------
    >>> from xlvlms_tutorial import VLM
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> name = "HuggingFaceTB/SmolVLM-256M-Instruct"
    >>> vlm = VLM(real_models.empty(name), None, name)
    >>> sizes = real_models.run_sizes(vlm, image=832, text=20, sequences=8, written=24)
    >>> sizes["layers"], sizes["image tokens"]
    (30, 832)
    """
    tokens = image + text
    every_state = (vlm.n_layers + 1) * tokens * vlm.width * 4
    cache = cache_bytes(vlm.model) * sequences * (tokens + written)
    return {
        "layers": vlm.n_layers,
        "layer at 80 %": vlm.layer_at(0.8),
        "width": vlm.width,
        "image tokens": image,
        "text tokens": text,
        "weights in bfloat16, GB": weight_bytes(vlm.model) / 1e9,
        f"cache of {sequences} sequences, MB": cache / 1e6,
        "states of 1000 pictures, one layer, one token, MB": vlm.width * 4 / 1e3,
        "states of 1000 pictures, all of them, GB": every_state / 1e6,
        "TFLOPs of a prompt": prompt_flops(vlm.model, tokens) / 1e12,
    }


def tower_flops(name: str, model: nn.Module, width: int, height: int) -> int:
    """Estimate the operations of a tower that reads a picture: two a parameter and patch.

    Parameters
    ----------
    name : str
        The model's name on the hub, one of ``SHAPES``.
    model : Module
        The model, as :func:`empty` gives it.
    width, height : int
        The picture's sides in pixels.

    Returns
    -------
    int
        Floating-point operations.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> name = "HuggingFaceTB/SmolVLM-256M-Instruct"
    >>> real_models.tower_flops(name, real_models.empty(name), 640, 480) > 10**12
    True
    """
    patches = image_tokens(name, width, height) * _shape_of(name).patches
    return 2 * patches * parameters(model)["tower"]


def caption_minutes(
    name: str,
    model: PreTrainedModel,
    card: str,
    picture: Sequence[int] = (640, 480),
    captions: int = 1000,
    batch_size: int = 8,
    written: int = 24,
    reached: Sequence[float] = (0.4, 0.6),
) -> str:
    """Estimate the minutes that captions take on a card, from its data sheet.

    Use it before a run, and expect it to be wrong by a factor of two.

    Parameters
    ----------
    name : str
        The model's name on the hub, one of ``SHAPES``.
    model : PreTrainedModel
        The model, as :func:`empty` gives it.
    card : str
        One of ``CARDS``.
    picture : (int, int), default (640, 480)
        Width and height of a picture in pixels.
    captions, batch_size, written : int
        How many captions, how many at a time, and how many tokens each.
    reached : (float, float), default (0.4, 0.6)
        The shares of the sheet's operations and bytes a second that are reached; a guess.

    Returns
    -------
    str
        The minutes and the number format, such as "3.1 (16 bits)"; "does not fit" if so.

    Raises
    ------
    InputError
        If the card is none of ``CARDS``.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> name = "HuggingFaceTB/SmolVLM-256M-Instruct"
    >>> real_models.caption_minutes(name, real_models.empty(name), "80 GB")[-9:]
    '(16 bits)'
    """
    require_one_of(card, CARDS, "card")
    tokens = image_tokens(name, *picture)
    number = best_format(model, batch_size * (tokens + 100), CARDS[card])
    if number == "no":
        return "does not fit"
    number = number if number in ("8bit", "4bit") else "bfloat16"
    speed, bandwidth = SHEETS[card]
    # forty tokens of text
    flops = tower_flops(name, model, *picture) + prompt_flops(model, tokens + 40)
    reading = captions * flops / (reached[0] * speed)
    steps = captions / batch_size * written
    writing = steps * weight_bytes(model, number) / (reached[1] * bandwidth)
    kind = number.replace("bfloat16", "16 bits")
    return f"{(reading + writing) / 60:.2g} ({kind})"


def prompt_of(kind: str, question: str) -> str:
    """Write a question about one picture as the chat template of a kind of model does.

    Use it to see where the picture goes. The templates are those of the hub, cut to one picture
    and one question.

    Parameters
    ----------
    kind : {"llava", "qwen2_vl", "idefics2", "idefics3"}
        The model type.
    question : str
        The question.

    Returns
    -------
    str
        The prompt.

    Raises
    ------
    InputError
        If the kind is another.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> real_models.prompt_of("llava", "What is it?").split()
    ['USER:', '<image>', 'What', 'is', 'it?', 'ASSISTANT:']
    """
    require_one_of(kind, _TEMPLATES, "kind of model")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return render_jinja_template([chat], chat_template=_TEMPLATES[kind])[0][0]


def loading(model: nn.Module, tokens: int, card: str) -> str:
    """Return the options with which ``load`` fits a model onto a card.

    Parameters
    ----------
    model : Module
        The model, as :func:`empty` gives it.
    tokens : int
        How many tokens are in the cache, of all sequences of a batch together.
    card : str
        One of ``CARDS``.

    Returns
    -------
    str
        The options; "does not fit" if none do.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> model = real_models.empty("llava-hf/llava-1.5-7b-hf")
    >>> real_models.loading(model, 8000, "T4, 16 GB")
    'dtype=float16, quantise=8bit'
    """
    require_one_of(card, CARDS, "card")
    number = best_format(model, tokens, CARDS[card])
    if number == "no":
        return "does not fit"
    half = "float16" if card.startswith("T4") else "bfloat16"
    return f"dtype={half}" + (f", quantise={number}" if number in ("8bit", "4bit") else "")


def fact_card(facts: dict[str, object]) -> str:
    """Write facts as a small table in HTML, for a widget.

    Parameters
    ----------
    facts : dict of str to object
        What is said, by its name.

    Returns
    -------
    str
        The HTML, in which long words are broken.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import real_models
    >>> "<th>tokens</th><td>576</td>" in real_models.fact_card({"tokens": 576})
    True
    """
    rows = ""
    for name, value in facts.items():
        rows += f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
    return f"<table style='overflow-wrap:anywhere'>{rows}</table>"


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
