"""More tiny random models, each with its inputs.

Those whose decoder is a plain language model, and Idefics.
"""

import transformers as hf
from torch import Tensor

from tests.zoo.inputs import (
    AUDIO,
    BOS,
    IMAGE,
    INPUTS,
    VIDEO,
    VOCABULARY,
    ids,
    noise,
    prompt,
    qwen_vl,
)
from tests.zoo.models import (
    LAYERS,
    MROPE,
    QWEN_IDS,
    QWEN_VISION,
    TEXT,
    VISION,
    WIDTH,
    clip,
    siglip,
    zoo,
)

SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
    "output_channels": 8,
    "mlp_dim": 64,
}
SAM |= {"window_size": 2, "global_attn_indexes": [1], "image_size": 112, "patch_size": 14}
SOUNDS = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "d_model": 32,
}


@zoo
def llava_aimv2() -> hf.PreTrainedModel:
    """LLaVA with AIMv2's tower: no class token, so the processor must say "full"."""
    config = hf.LlavaConfig(
        vision_config=hf.Aimv2VisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaForConditionalGeneration(config)


@zoo
def vipllava() -> hf.PreTrainedModel:
    layers = {"vision_feature_layer": [-2, -1], "image_seq_length": 4}
    config = hf.VipLlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, **layers
    )
    return hf.VipLlavaForConditionalGeneration(config)


@zoo
def video_llava() -> hf.PreTrainedModel:
    ids = {
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_seq_length": 4,
        "video_seq_length": 10,
    }
    config = hf.VideoLlavaConfig(vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), **ids)
    return hf.VideoLlavaForConditionalGeneration(config)


@zoo
def janus() -> hf.PreTrainedModel:
    vision = hf.JanusVisionConfig(
        **{k: v for k, v in VISION.items() if k != "intermediate_size"},
        projection_dim=WIDTH,
        num_image_tokens=4,
    )
    drawing = {
        "embed_dim": 4,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
    }
    drawing |= {"num_res_blocks": 1, "projection_dim": WIDTH, "image_token_embed_dim": WIDTH}
    config = hf.JanusConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=vision,
        vq_config=drawing,
        image_token_id=IMAGE,
    )
    return hf.JanusForConditionalGeneration(config)


@zoo
def deepseek_vl() -> hf.PreTrainedModel:
    config = hf.DeepseekVLConfig(
        vision_config=siglip(), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE
    )
    return hf.DeepseekVLForConditionalGeneration(config)


@zoo
def deepseek_vl_hybrid() -> hf.PreTrainedModel:
    parts = {
        "vision_config": siglip(),
        "high_res_vision_config": hf.SamVisionConfig(**SAM),
        "text_config": hf.LlamaConfig(**TEXT),
    }
    return hf.DeepseekVLHybridForConditionalGeneration(
        hf.DeepseekVLHybridConfig(**parts, image_token_id=IMAGE)
    )


@zoo
def got_ocr2() -> hf.PreTrainedModel:
    vision = hf.GotOcr2VisionConfig(**SAM)
    config = hf.GotOcr2Config(
        vision_config=vision,
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return hf.GotOcr2ForConditionalGeneration(config)


@zoo
def paddleocr_vl() -> hf.PreTrainedModel:
    text = {**TEXT, "head_dim": 8, "rope_parameters": dict(MROPE)}
    vision = {**VISION, "image_size": 56, "spatial_merge_size": 2}
    return hf.PaddleOCRVLForConditionalGeneration(
        hf.PaddleOCRVLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    )


@zoo
def voxtral() -> hf.PreTrainedModel:
    audio = hf.VoxtralEncoderConfig(**SOUNDS, max_source_positions=8)
    config = hf.VoxtralConfig(
        audio_config=audio, text_config=hf.LlamaConfig(**TEXT), audio_token_id=AUDIO
    )
    return hf.VoxtralForConditionalGeneration(config)


@zoo
def qwen2_5_omni() -> hf.PreTrainedModel:
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 64}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    audio = {**SOUNDS, "max_source_positions": 8, "n_window": 4, "output_dim": WIDTH}
    ids = QWEN_IDS | {
        "audio_token_id": AUDIO,
        "audio_start_token_id": 196,
        "audio_end_token_id": 197,
    }
    parts = {
        "text_config": {**TEXT, "rope_parameters": dict(MROPE)},
        "vision_config": vision,
        "audio_config": audio,
    }
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(
        hf.Qwen2_5OmniThinkerConfig(**parts, **ids)
    )


@zoo
def idefics() -> hf.PreTrainedModel:
    sizes = {
        "vocab_size": VOCABULARY,
        "additional_vocab_size": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
    }
    sizes |= {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "alpha_initializer": "ones",
    }
    resampler = {
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
    }
    vision = {("embed_dim" if k == "hidden_size" else k): v for k, v in VISION.items()}
    config = hf.IdeficsConfig(
        **sizes, use_resampler=True, perceiver_config=resampler, vision_config=vision
    )
    return hf.IdeficsForVisionText2Text(config)


def pictures(n: int, *shape: int, **extra: Tensor) -> dict[str, Tensor]:
    return prompt(n) | {"pixel_values": noise(*shape), **extra}


def clip_of_two_frames() -> dict[str, Tensor]:
    # the class tokens of the frames count too
    return prompt(10, VIDEO) | {"pixel_values_videos": noise(1, 2, 3, 28, 28)}


def omni_picture() -> dict[str, Tensor]:
    # it reads the kinds off the ids
    return {name: value for name, value in qwen_vl().items() if name != "mm_token_type_ids"}


def idefics_picture() -> dict[str, Tensor]:
    fake, picture = VOCABULARY, VOCABULARY + 1
    text = ids(BOS, fake, picture, fake, 21, 22, 23, 24)
    # row, token, picture: from the picture on
    visible = (text["input_ids"] == picture).long().cumsum(1)[..., None]
    return text | {"pixel_values": noise(1, 1, 3, 28, 28), "image_attention_mask": visible}


INPUTS |= {
    "llava_aimv2": lambda: pictures(4, 1, 3, 28, 28),
    "vipllava": lambda: pictures(4, 1, 3, 28, 28),
    "video_llava": clip_of_two_frames,
    "janus": lambda: pictures(4, 1, 3, 28, 28),
    "deepseek_vl": lambda: pictures(4, 1, 3, 28, 28),
    "deepseek_vl_hybrid": lambda: pictures(
        4, 1, 3, 28, 28, high_res_pixel_values=noise(1, 3, 112, 112)
    ),
    "got_ocr2": lambda: pictures(4, 1, 3, 112, 112),
    "paddleocr_vl": lambda: qwen_vl() | {"pixel_values": noise(16, 3, 14, 14)},
    "voxtral": lambda: prompt(4, AUDIO) | {"input_features": noise(1, 16, 16)},
    "qwen2_5_omni": omni_picture,
    "idefics": idefics_picture,
}
