"""A tiny random model of the pocket's own kind.

It takes pictures, clips and sounds through a tower that gives 4 tokens a picture.
"""

import torch
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.support.tiny import TEMPLATE, tiny_tokenizer
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.pocket.processor import PocketProcessor
from xlvlms_tutorial.pocket.tower import PATCHES, TowerConfig

EVERYTHING = ("image", "video", "audio")


def tiny_processor(reads: tuple[str, ...] = EVERYTHING) -> PocketProcessor:
    """A processor of pictures of 32 x 32 pixels and of the tiny tokenizer's words."""
    pictures = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    processor = PocketProcessor(
        image_processor=pictures,
        tokenizer=tiny_tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template=TEMPLATE.replace("p['type'] == 'image'", f"p['type'] in {EVERYTHING}"),
        reads=reads,
    )
    return processor


def tiny_reader(reads: tuple[str, ...] = EVERYTHING, seed: int = 0) -> VLM:
    """A LLaVA of three blocks behind a tower of raw pixels."""
    torch.manual_seed(seed)
    processor = tiny_processor(reads)
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=TowerConfig(
            backbone=PATCHES, blocks=(), image_size=32, grid=2, hidden_size=48
        ),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    model.generation_config.suppress_tokens = [config.image_token_id]
    return VLM(model.requires_grad_(False), processor, "tiny-reader")
