"""The architectures that pass the contract tests."""

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Architecture:
    """An architecture that passes the contract tests.

    Parameters
    ----------
    name : str
        What its authors call it.
    modalities : tuple of str
        What it takes beside text: "image" (the default), "video", "audio".
    note : str
        What to know about it; empty by default.

    Examples
    --------
    >>> from xlvlms_tutorial.models import ARCHITECTURES
    >>> ARCHITECTURES["llava"].name, ARCHITECTURES["llava"].modalities
    ('LLaVA-1.5', ('image',))
    """

    name: str
    modalities: tuple[str, ...] = ("image",)
    note: str = ""


_BOTH = ("image", "video")
_BETWEEN = (
    "pictures enter by cross-attention between the blocks: no image positions in the sequence"
)
_TYPES = "needs token type ids, which its processor makes"
_EXPERTS = (
    "MLPs with experts have no last linear map: mlp_hidden, fold and "
    "pruning of neurons are refused there"
)
_STATES = "blocks of linear attention keep a state instead of keys and values"

# By the model_type that a model's config.json names
ARCHITECTURES: dict[str, Architecture] = {
    "llava": Architecture(
        "LLaVA-1.5",
        note="a tower without a class token, such as AIMv2's, needs the select strategy 'full'",
    ),
    "llava_next": Architecture(
        "LLaVA-NeXT", note="the newlines after rows of a tile count as image positions"
    ),
    "llava_onevision": Architecture(
        "LLaVA-OneVision", _BOTH, "the newlines after rows of a tile count as image positions"
    ),
    "llava_next_video": Architecture("LLaVA-NeXT-Video", _BOTH),
    "mistral3": Architecture(
        "Mistral 3",
        note="Mistral Small 3.1 and later; with Pixtral's tower, whose processor needs torchvision",
    ),
    "qwen2_vl": Architecture("Qwen2-VL", _BOTH, _TYPES),
    "qwen2_5_vl": Architecture("Qwen2.5-VL", _BOTH, _TYPES),
    "qwen3_vl": Architecture(
        "Qwen3-VL",
        _BOTH,
        f"{_TYPES}; visual features are added again after each of the first blocks",
    ),
    "qwen3_vl_moe": Architecture("Qwen3-VL-MoE", _BOTH, f"{_TYPES}; {_EXPERTS}"),
    "qwen3_5": Architecture("Qwen3.5", _BOTH, f"{_TYPES}; {_STATES}"),
    "qwen3_5_moe": Architecture("Qwen3.5-MoE", _BOTH, f"{_TYPES}; {_STATES}; {_EXPERTS}"),
    "glm4v": Architecture(
        "GLM-4.1V", _BOTH, f"{_TYPES}; norms after attention and MLP, so that fold is refused"
    ),
    "glm4v_moe": Architecture("GLM-4.5V", _BOTH, f"{_TYPES}; {_EXPERTS}"),
    "glm46v": Architecture(
        "GLM-4.6V", _BOTH, f"{_TYPES}; norms after attention and MLP, so that fold is refused"
    ),
    "glm_ocr": Architecture(
        "GLM-OCR", _BOTH, f"{_TYPES}; norms after attention and MLP, so that fold is refused"
    ),
    "kimi_k25": Architecture("Kimi-K2.5", _BOTH, f"latent attention; {_EXPERTS}"),
    "aria": Architecture("Aria", note=_EXPERTS),
    "lfm2_vl": Architecture(
        "LFM2-VL", note="blocks of short convolutions keep a state instead of keys and values"
    ),
    "idefics2": Architecture("Idefics2"),
    "idefics3": Architecture("Idefics3"),
    "smolvlm": Architecture("SmolVLM", _BOTH),
    "paligemma": Architecture(
        "PaliGemma", note=f"{_TYPES}; the prompt sees itself in both directions"
    ),
    "internvl": Architecture("InternVL", _BOTH),
    "gemma3": Architecture(
        "Gemma 3", note=f"{_TYPES}; a picture's tokens see each other in both directions"
    ),
    "gemma4": Architecture(
        "Gemma 4",
        _BOTH,
        f"{_TYPES}; experts beside an MLP are skipped with it; small models share keys; no fold",
    ),
    "llama4": Architecture(
        "Llama 4", note=f"no beam search with pictures in transformers; {_EXPERTS}"
    ),
    "molmo2": Architecture(
        "Molmo2", _BOTH, f"{_TYPES}; visual features are added to the placeholders' embeddings"
    ),
    "blip-2": Architecture(
        "BLIP-2", note="with OPT; T5 has an encoder of its own and is not supported"
    ),
    "instructblip": Architecture(
        "InstructBLIP", note="with Vicuna; T5 has an encoder of its own and is not supported"
    ),
    "mllama": Architecture(
        "Llama 3.2 Vision",
        note="pictures enter by cross-attention: no image positions in the sequence",
    ),
    "qwen2_audio": Architecture("Qwen2-Audio", ("audio",)),
    "vipllava": Architecture("ViP-LLaVA"),
    "video_llava": Architecture(
        "Video-LLaVA", _BOTH, "a tower for pictures and another for videos"
    ),
    "janus": Architecture("Janus"),
    "deepseek_vl": Architecture("DeepSeek-VL"),
    "deepseek_vl_hybrid": Architecture("DeepSeek-VL with two towers"),
    "got_ocr2": Architecture("GOT-OCR2"),
    "paddleocr_vl": Architecture("PaddleOCR-VL", note=_TYPES),
    "voxtral": Architecture("Voxtral", ("audio",)),
    "qwen2_5_omni_thinker": Architecture("Qwen2.5-Omni, its thinker", (*_BOTH, "audio")),
    "idefics": Architecture("Idefics", note=_BETWEEN),
}


def architectures() -> pd.DataFrame:
    """Return a table of the architectures that pass the contract tests.

    ``load`` takes these without ``allow_untested``.

    Returns
    -------
    DataFrame
        A row for each architecture: model_type (as ``config.json`` names it), name, takes (what it
        takes beside text) and note.

    Examples
    --------
    >>> from xlvlms_tutorial.models import architectures
    >>> table = architectures().set_index("model_type")
    >>> table.loc["qwen2_vl", "name"], table.loc["qwen2_vl", "takes"]
    ('Qwen2-VL', 'image, video')
    """
    rows = [
        (kind, architecture.name, ", ".join(architecture.modalities), architecture.note)
        for kind, architecture in ARCHITECTURES.items()
    ]
    return pd.DataFrame(rows, columns=["model_type", "name", "takes", "note"])
