"""The genuine processors for the tiny models of the zoo, with a word-level tokenizer, written into
a folder as a hub model looks.

Tokenizers open a text by the token by which the real ones do, whether the chat template
has written it already or not.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from tests.zoo import build
from tests.zoo.inputs import (
    AUDIO,
    BOS,
    EOS,
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
)

WORDS = [
    "user",
    "assistant",
    "model",
    "User",
    "Assistant",
    "USER",
    "ASSISTANT",
    "Describe",
    "the",
    "picture",
    ".",
    ",",
    ":",
    "?",
]
WORDS += [
    "What",
    "colour",
    "is",
    "key",
    "a",
    "red",
    "blue",
    "yes",
    "no",
    "woman",
    "on",
    "grass",
    "Is",
    "there",
    "in",
    "Audio",
    "1",
]
FIRST_WORD, UNKNOWN = 10, 3
SQUARE, LARGE = {"height": 28, "width": 28}, {"height": 56, "width": 56}


def template(before: str, picture: str, after: str, answer: str) -> str:
    """A chat template: what opens a turn, stands for a picture (a clip),
    closes a turn and opens the answer.
    """
    video = (
        picture.replace("<image>", "<video>")
        .replace("<|image_pad|>", "<|video_pad|>")
        .replace("<IMG_CONTEXT>", "<video>")
    )
    video = video.replace("<|image|>", "<|video|>")
    kinds = (
        f"p['type'] in ('image', 'audio') %}}{picture}",
        f"p['type'] == 'video' %}}{video}",
        "p['type'] == 'text' %}{{ p['text'] }}",
    )
    part = f"{{% if {'{% elif '.join(kinds)}{{% endif %}}"
    parts = f"{{% for p in m['content'] %}}{part}{{% endfor %}}"
    content = (
        f"{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}{parts}{{% endif %}}"
    )
    return (
        f"{{% for m in messages %}}{before}{content}{after}{{% endfor %}}{{% if "
        f"add_generation_prompt %}}{answer}{{% endif %}}"
    )


def turns(opening: str, picture: str, closing: str, answerer: str = "assistant") -> str:
    return template(
        f"{opening}{{{{ m['role'] }}}}\n", picture, f"{closing}\n", f"{opening}{answerer}\n"
    )


# Idefics and SmolVLM write the roles as words
SPOKEN = "{{ 'User' if m['role'] == 'user' else 'Assistant' }}:"
CAPITALS = "{{ 'USER' if m['role'] == 'user' else 'ASSISTANT' }}: "  # LLaVA in the manner of Vicuna


@dataclass(frozen=True)
class Recipe:
    """Which class, its image processor or feature extractor, special tokens by id, names of
    tokens, arguments, chat template.

    ``opens`` is the token that the tokenizer puts before every text, if it does.
    """

    processor: str
    senses: Callable[[], hf.ProcessorMixin | object]
    tokens: dict[int, str]
    names: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, object] = field(default_factory=dict)
    chat_template: str | None = None
    opens: str | None = None


def clip() -> object:
    return hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE)


def tiled() -> object:
    return hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=[[28, 28]]
    )


def qwen_pictures() -> object:
    limits = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    return hf.Qwen2VLImageProcessorPil(
        size=limits, patch_size=14, merge_size=2, temporal_patch_size=2
    )


def glm_pictures() -> object:
    # times the two frames of a still picture
    limits = {"shortest_edge": 56 * 56 * 2, "longest_edge": 112 * 112 * 2}
    return hf.Glm4vImageProcessorPil(
        size=limits, patch_size=14, merge_size=2, temporal_patch_size=2
    )


def glm46_pictures() -> object:
    limits = {"shortest_edge": 56 * 56 * 2, "longest_edge": 112 * 112 * 2}
    return hf.Glm46VImageProcessorPil(
        size=limits, patch_size=14, merge_size=2, temporal_patch_size=2
    )


def paligemma_pictures() -> object:
    pictures = hf.SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 4
    return pictures


LLAVA_TOKENS = {IMAGE: "<image>", VIDEO: "<video>"}
LLAVA_CHAT = template(CAPITALS, "<image>\n", " ", "ASSISTANT:")
LLAVA = {
    "patch_size": 14,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}
QWEN_TOKENS = {4: "<|im_start|>", EOS: "<|im_end|>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
QWEN_TOKENS |= {VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>"}
QWEN_CHAT = turns("<|im_start|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>")
GLM_TOKENS = {
    4: "<|user|>",
    5: "<|assistant|>",
    6: "[gMASK]",
    7: "<sop>",
    EOS: "<|endoftext|>",
    IMAGE: "<|image|>",
    VIDEO: "<|video|>",
}
GLM_TOKENS |= {
    VISION_START: "<|begin_of_image|>",
    VISION_END: "<|end_of_image|>",
    195: "<|begin_of_video|>",
    196: "<|end_of_video|>",
}
GLM_PICTURE = "<|begin_of_image|><|image|><|end_of_image|>"
GLM_CHAT = "[gMASK]<sop>" + template("<|{{ m['role'] }}|>\n", GLM_PICTURE, "", "<|assistant|>\n")
IDEFICS_TOKENS = {EOS: "<end_of_utterance>", IMAGE: "<image>", 195: "<fake_token_around_image>"}
SPLIT_TOKENS = IDEFICS_TOKENS | {196: "<global-img>", 197: "<row_1_col_1>"}
IDEFICS_CHAT = template(SPOKEN, "<image>", "<end_of_utterance>\n", "Assistant:")
INTERN_TOKENS = {4: "<|im_start|>", EOS: "<|im_end|>", IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>"}
INTERN_TOKENS |= {VISION_START: "<img>", VISION_END: "</img>"}
INTERN_NAMES = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
GEMMA_TOKENS = {4: "<start_of_turn>", 5: "<end_of_turn>", IMAGE: "<image_soft_token>"}
GEMMA_TOKENS |= {VISION_START: "<start_of_image>", VISION_END: "<end_of_image>"}
GEMMA_NAMES = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
GEMMA4_TOKENS = {
    4: "<|turn>",
    5: "<turn|>",
    IMAGE: "<|image|>",
    VIDEO: "<|video|>",
    AUDIO: "<|audio|>",
}
GEMMA4_TOKENS |= {
    VISION_START: "<|image>",
    VISION_END: "<image|>",
    195: "<|audio>",
    196: "<audio|>",
}
GEMMA4_NAMES = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
GEMMA4_NAMES |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
GEMMA4 = Recipe(
    "Gemma4Processor",
    lambda: hf.Gemma4ImageProcessorPil(patch_size=14, max_soft_tokens=70, pooling_kernel_size=2),
    GEMMA4_TOKENS,
    GEMMA4_NAMES,
    {
        "image_seq_length": 70,
        "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    },
    "<s>" + turns("<|turn>", "<|image|>", "<turn|>", "model"),
    "<s>",
)
MLLAMA_TOKENS = {
    BOS: "<|begin_of_text|>",
    EOS: "<|eot_id|>",
    4: "<|start_header_id|>",
    5: "<|end_header_id|>",
}
MLLAMA_TOKENS |= {6: "<|python_tag|>", VOCABULARY: "<|image|>"}
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
AUDIO_TOKENS = {
    4: "<|im_start|>",
    EOS: "<|im_end|>",
    AUDIO: "<|AUDIO|>",
    VISION_START: "<|audio_bos|>",
    VISION_END: "<|audio_eos|>",
}

RECIPES = {
    "llava": Recipe(
        "LlavaProcessor", clip, LLAVA_TOKENS, {"image_token": "<image>"}, LLAVA, LLAVA_CHAT, "<s>"
    ),
    "llava_next": Recipe(
        "LlavaNextProcessor",
        tiled,
        LLAVA_TOKENS,
        {"image_token": "<image>"},
        LLAVA,
        LLAVA_CHAT,
        "<s>",
    ),
    "llava_next_video": Recipe(
        "LlavaNextVideoProcessor", tiled, LLAVA_TOKENS, {}, LLAVA, LLAVA_CHAT, "<s>"
    ),
    "llava_onevision": Recipe(
        "LlavaOnevisionProcessor",
        lambda: hf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=[[28, 28]]),
        LLAVA_TOKENS | QWEN_TOKENS | LLAVA_TOKENS,
        {},
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        turns("<|im_start|>", "<image>\n", "<|im_end|>"),
    ),
    "qwen2_vl": Recipe("Qwen2VLProcessor", qwen_pictures, QWEN_TOKENS, chat_template=QWEN_CHAT),
    "qwen2_5_vl": Recipe(
        "Qwen2_5_VLProcessor", qwen_pictures, QWEN_TOKENS, chat_template=QWEN_CHAT
    ),
    "qwen3_vl": Recipe("Qwen3VLProcessor", qwen_pictures, QWEN_TOKENS, chat_template=QWEN_CHAT),
    "qwen3_vl_moe": Recipe("Qwen3VLProcessor", qwen_pictures, QWEN_TOKENS, chat_template=QWEN_CHAT),
    "glm4v": Recipe("Glm4vProcessor", glm_pictures, GLM_TOKENS, chat_template=GLM_CHAT),
    "glm4v_moe": Recipe("Glm4vProcessor", glm_pictures, GLM_TOKENS, chat_template=GLM_CHAT),
    "glm46v": Recipe("Glm46VProcessor", glm46_pictures, GLM_TOKENS, chat_template=GLM_CHAT),
    "glm_ocr": Recipe("Glm46VProcessor", glm46_pictures, GLM_TOKENS, chat_template=GLM_CHAT),
    "idefics2": Recipe(
        "Idefics2Processor",
        lambda: hf.Idefics2ImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 28}),
        IDEFICS_TOKENS,
        {},
        {"image_seq_len": 4},
        IDEFICS_CHAT,
        "<s>",
    ),
    "idefics3": Recipe(
        "Idefics3Processor",
        lambda: hf.Idefics3ImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 56}
        ),
        SPLIT_TOKENS,
        {},
        {"image_seq_len": 4},
        "<s>" + IDEFICS_CHAT,
        "<s>",
    ),
    "smolvlm": Recipe(
        "SmolVLMProcessor",
        lambda: hf.SmolVLMImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 56}
        ),
        SPLIT_TOKENS,
        {},
        {"image_seq_len": 4},
        "<s>" + IDEFICS_CHAT,
    ),
    "paligemma": Recipe(
        "PaliGemmaProcessor", paligemma_pictures, {IMAGE: "<image>"}, {"image_token": "<image>"}
    ),
    "internvl": Recipe(
        "InternVLProcessor",
        lambda: hf.GotOcr2ImageProcessorPil(size=LARGE, crop_to_patches=True, max_patches=2),
        INTERN_TOKENS,
        INTERN_NAMES,
        {"image_seq_length": 4},
        turns("<|im_start|>", "<IMG_CONTEXT>\n", "<|im_end|>"),
    ),
    "gemma3": Recipe(
        "Gemma3Processor",
        lambda: hf.Gemma3ImageProcessorPil(size=SQUARE),
        GEMMA_TOKENS,
        GEMMA_NAMES,
        {"image_seq_length": 4},
        "<s>" + turns("<start_of_turn>", "<start_of_image>", "<end_of_turn>", "model"),
        "<s>",
    ),
    "gemma4": GEMMA4,
    "gemma4_moe": GEMMA4,
    "gemma4_small": GEMMA4,
    "blip2": Recipe(
        "Blip2Processor",
        lambda: hf.BlipImageProcessorPil(size=SQUARE),
        {IMAGE: "<image>"},
        {},
        {"num_query_tokens": 4},
        opens="</s>",
    ),
    "instructblip": Recipe(
        "InstructBlipProcessor",
        lambda: hf.BlipImageProcessorPil(size=SQUARE),
        {IMAGE: "<image>"},
        {},
        {"num_query_tokens": 4},
        opens="<s>",
    ),
    "mllama": Recipe(
        "MllamaProcessor",
        lambda: hf.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=1),
        MLLAMA_TOKENS,
        {},
        {},
        "<|begin_of_text|>"
        + template(
            HEADER.format("{{ m['role'] }}"), "<|image|>", "<|eot_id|>", HEADER.format("assistant")
        ),
        "<|begin_of_text|>",
    ),
    "qwen2_audio": Recipe(
        "Qwen2AudioProcessor",
        lambda: hf.WhisperFeatureExtractor(feature_size=16, hop_length=1000, chunk_length=1),
        AUDIO_TOKENS,
        {},
        {},
        turns("<|im_start|>", "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n", "<|im_end|>"),
    ),
}


def omni_senses() -> hf.ProcessorMixin | object:
    """Settings for pictures and for sounds, which lie in one file."""
    sounds = hf.WhisperFeatureExtractor(feature_size=16, hop_length=1000, chunk_length=1)
    return SimpleNamespace(to_dict=lambda: qwen_pictures().to_dict() | sounds.to_dict())


OMNI_TOKENS = QWEN_TOKENS | {AUDIO: "<|AUDIO|>", 196: "<|audio_bos|>", 197: "<|audio_eos|>"}
OMNI_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|AUDIO|>",
}
OMNI_NAMES |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
OMNI_NAMES |= {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
JANUS_TOKENS = {
    IMAGE: "<image_placeholder>",
    VISION_START: "<begin_of_image>",
    VISION_END: "<end_of_image>",
}
JANUS_NAMES = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
SPEAKERS = template(
    "{{ 'User' if m['role'] == 'user' else 'Assistant' }}: ",
    "<image_placeholder>\n",
    "\n\n",
    "Assistant:",
)
PADDLE_TOKENS = {
    4: "<|begin_of_sentence|>",
    IMAGE: "<|IMAGE_PLACEHOLDER|>",
    VISION_START: "<|IMAGE_START|>",
    VISION_END: "<|IMAGE_END|>",
}
GOT_TOKENS = {
    4: "<|im_start|>",
    EOS: "<|im_end|>",
    IMAGE: "<imgpad>",
    VISION_START: "<img>",
    VISION_END: "</img>",
}
RECIPES |= {
    "llava_aimv2": Recipe(
        "LlavaProcessor",
        clip,
        LLAVA_TOKENS,
        {"image_token": "<image>"},
        # a tower without a class token
        LLAVA | {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"},
        LLAVA_CHAT,
        "<s>",
    ),
    "vipllava": RECIPES["llava"],
    "video_llava": Recipe(
        "VideoLlavaProcessor",
        lambda: hf.VideoLlavaImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE),
        LLAVA_TOKENS,
        {},
        LLAVA,
        LLAVA_CHAT,
        "<s>",
    ),
    "janus": Recipe(
        "JanusProcessor",
        lambda: hf.JanusImageProcessorPil(size=SQUARE),
        JANUS_TOKENS,
        JANUS_NAMES,
        {"num_image_tokens": 4},
        SPEAKERS,
        "<s>",
    ),
    "deepseek_vl": Recipe(
        "DeepseekVLProcessor",
        lambda: hf.DeepseekVLImageProcessorPil(size=SQUARE),
        JANUS_TOKENS,
        JANUS_NAMES,
        {"num_image_tokens": 4},
        SPEAKERS,
        "<s>",
    ),
    "deepseek_vl_hybrid": Recipe(
        "DeepseekVLHybridProcessor",
        lambda: hf.DeepseekVLHybridImageProcessorPil(
            size=SQUARE, high_res_size={"height": 112, "width": 112}
        ),
        JANUS_TOKENS,
        JANUS_NAMES,
        {"num_image_tokens": 4},
        SPEAKERS,
        "<s>",
    ),
    "paddleocr_vl": Recipe(
        "PaddleOCRVLProcessor",
        lambda: hf.PaddleOCRVLImageProcessorPil(
            size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, patch_size=14, merge_size=2
        ),
        PADDLE_TOKENS,
        {"image_token": "<|IMAGE_PLACEHOLDER|>"},
        {},
        "<|begin_of_sentence|>"
        + template(SPOKEN, "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "\n", "Assistant:"),
    ),
    "qwen2_5_omni": Recipe(
        "Qwen2_5OmniProcessor",
        omni_senses,
        OMNI_TOKENS,
        OMNI_NAMES,
        {},
        QWEN_CHAT.replace(
            "{% if p['type'] in ('image', 'audio') %}",
            (
                "{% if p['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% "
                "elif p['type'] == 'image' %}"
            ),
        ),
    ),
    "got_ocr2": Recipe(
        "GotOcr2Processor",
        lambda: hf.GotOcr2ImageProcessorPil(size={"height": 112, "width": 112}),
        GOT_TOKENS,
        {},
        {},
        turns("<|im_start|>", "<img><imgpad></img>\n", "<|im_end|>"),
    ),
    "idefics": Recipe(
        "IdeficsProcessor",
        lambda: hf.IdeficsImageProcessorPil(image_size=28),
        {VOCABULARY: "<fake_token_around_image>", VOCABULARY + 1: "<image>"},
        {},
        {"image_size": 28},
    ),
}
APART = ("got_ocr2", "idefics")  # take pictures in another form than the others
PROCESSORS: tuple[str, ...] = tuple(name for name in RECIPES if name not in APART)


def tokenizer(
    tokens: dict[int, str],
    names: dict[str, str] | None = None,
    side: str = "left",
    opens: str | None = None,
) -> hf.PreTrainedTokenizerFast:
    """Words and marks of ``WORDS`` from id 10, special tokens at the ids given, and words
    that nobody says at all other ids.
    """
    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", UNKNOWN: "<unk>"} | tokens
    by_id = (
        {k: f"word{k}" for k in range(VOCABULARY)} | dict(enumerate(WORDS, FIRST_WORD)) | special
    )
    raw = Tokenizer(models.WordLevel({token: k for k, token in by_id.items()}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if opens is not None:
        first = next(k for k, token in by_id.items() if token == opens)
        raw.post_processor = TemplateProcessing(
            single=f"{opens} $A", pair=f"{opens} $A {opens} $B", special_tokens=[(opens, first)]
        )
    roles = {
        "pad_token": "<pad>",
        "bos_token": special[BOS],
        "eos_token": special[EOS],
        "unk_token": "<unk>",
    }
    built = hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, padding_side=side, extra_special_tokens=names or {}, **roles
    )
    built.add_special_tokens(
        {"additional_special_tokens": list(tokens.values())}, replace_extra_special_tokens=False
    )
    return built


def save_processor(name: str, folder: Path) -> None:
    """Write the processor's files as hub models have them.

    Torchvision and num2words are not needed for writing.
    """
    recipe = RECIPES[name]
    tokenizer(recipe.tokens, recipe.names, opens=recipe.opens).save_pretrained(folder)
    if name == "instructblip":
        tokenizer({}, side="right").save_pretrained(folder / "qformer_tokenizer")
    senses = recipe.senses().to_dict()
    # the hub names the class, not the library that turns the pixels
    if "image_processor_type" in senses:
        senses["image_processor_type"] = senses["image_processor_type"].removesuffix("Pil")
    files = {
        "preprocessor_config.json": senses,
        "processor_config.json": {"processor_class": recipe.processor, **recipe.arguments},
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    if recipe.chat_template is not None:
        (folder / "chat_template.jinja").write_text(recipe.chat_template)


def save(name: str, folder: Path) -> Path:
    """Write the tiny model of the zoo and its processor into a
    folder, as a hub model would look.
    """
    model, _ = build(name)
    model.save_pretrained(folder)
    save_processor(name, folder)
    return folder
