"""A tiny random LLaVA with its processor, built from config in a tenth of a second.

Stands in for hub models.
"""

import sys

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tests.support.tokenizers import pieces_tokenizer
from xlvlms_tutorial.models.vlm import VLM

WORDS = [
    "user",
    "assistant",
    "Describe",
    "the",
    "picture",
    ".",
    "What",
    "colour",
    "is",
    "key",
    "?",
    "a",
    "red",
    "blue",
]
WORDS += ["yes", "no", "woman", "on", "grass", "Is", "there", "in"]
PICTURE = Image.new("RGB", (32, 32), (10, 90, 200))
PROMPTS = [
    "What colour ?",
    "Describe the picture .",
    "Is there a red key in the picture ?",
    "Is there a woman on the grass ?",
]
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "\n"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% "
    "endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: k for k, word in enumerate(SPECIAL + WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    special = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "eos_token": "<|im_end|>",
        "additional_special_tokens": SPECIAL[2:],
    }
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **special)


def tiny_llava(seed: int = 0, layers: int = 3) -> VLM:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=placeholder, image_seq_length=4
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    # an untrained model may emit it, and no picture then fills it
    model.generation_config.suppress_tokens = [placeholder]
    pictures = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return VLM(model.requires_grad_(False), processor, "tiny-llava")


def spelling(monkeypatch):
    """Give the tiny LLaVA a tokenizer that cuts words as LLaMA's does.

    The marks of the chat are among its specials.
    """

    def tokenizer():
        pieces = pieces_tokenizer("always")
        pieces.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
        pieces.padding_side = "left"
        return pieces

    monkeypatch.setattr(sys.modules[__name__], "tiny_tokenizer", tokenizer)


def redrawn(vlm, seed):
    """Matrices drawn anew, so wide (the default is 0.02) that every layer matters."""
    random = torch.Generator().manual_seed(seed)
    for parameter in vlm.model.parameters():
        if parameter.ndim >= 2:
            scale = 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=random) * scale)
    return vlm


def lively(vlm, seed=4):
    """Pictures and questions change the answer, which is text to its last token."""
    redrawn(vlm, seed)
    vlm.model.generation_config.suppress_tokens = sorted(vlm.tokenizer.all_special_ids)
    return vlm
