"""Tiny random models, offline.

Each architecture's genuine class, three decoder blocks 32 wide, 200 words, one small picture.
"""

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor

from tests.zoo import inputs
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

WIDTH, LAYERS = 32, 3
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
# 28 pixels in patches of 14: four patches, or four tokens; 56 pixels where the
# connector merges two patches by two.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}

MAKERS: dict[str, Callable[[], hf.PreTrainedModel]] = {}


def zoo(make: Callable[[], hf.PreTrainedModel]) -> Callable[[], hf.PreTrainedModel]:
    MAKERS[make.__name__] = make
    return make


def clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**VISION, projection_dim=32)


def siglip(**extra: object) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**VISION, **extra)


@zoo
def llava() -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=clip(),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return hf.LlavaForConditionalGeneration(config)


@zoo
def llava_next() -> hf.PreTrainedModel:
    tiles = {"image_grid_pinpoints": [[28, 28]], "image_seq_length": 4}
    config = hf.LlavaNextConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, **tiles
    )
    return hf.LlavaNextForConditionalGeneration(config)


@zoo
def llava_onevision() -> hf.PreTrainedModel:
    ids = {
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[28, 28]],
    }
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=hf.Qwen2Config(**TEXT), **ids
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


@zoo
def llava_next_video() -> hf.PreTrainedModel:
    ids = {
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[28, 28]],
    }
    config = hf.LlavaNextVideoConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), **ids
    )
    return hf.LlavaNextVideoForConditionalGeneration(config)


@zoo
def mistral3() -> hf.PreTrainedModel:
    vision = hf.PixtralVisionConfig(**{**VISION, "image_size": 56}, head_dim=8)
    config = hf.Mistral3Config(
        vision_config=vision,
        text_config=hf.MistralConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
    )
    return hf.Mistral3ForConditionalGeneration(config)


@zoo
def qwen2_vl() -> hf.PreTrainedModel:
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": WIDTH}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": dict(MROPE)}, vision_config=vision, **QWEN_IDS
    )
    return hf.Qwen2VLForConditionalGeneration(config)


@zoo
def qwen2_5_vl() -> hf.PreTrainedModel:
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 64}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": dict(MROPE)}, vision_config=vision, **QWEN_IDS
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


@zoo
def qwen3_vl() -> hf.PreTrainedModel:
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 64}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    config = hf.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": dict(MROPE)},
        vision_config=vision,
        **QWEN_IDS,
    )
    return hf.Qwen3VLForConditionalGeneration(config)


@zoo
def qwen3_vl_moe() -> hf.PreTrainedModel:
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 64}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text = {
        **TEXT,
        **EXPERTS,
        "head_dim": 8,
        "mlp_only_layers": [0],
        "rope_parameters": dict(MROPE),
    }
    return hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    )


def hybrid(**extra: object) -> dict[str, dict[str, object]]:
    """Configs of Qwen3.5: one block of full attention between two of linear attention."""
    vision = {
        **QWEN_VISION,
        "hidden_size": 32,
        "out_hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_position_embeddings": 16,
    }
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    heads = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    kinds = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    return {
        "text_config": {**TEXT, **heads, **kinds, **extra, "head_dim": 8, "rope_parameters": rope},
        "vision_config": vision,
    }


@zoo
def qwen3_5() -> hf.PreTrainedModel:
    return hf.Qwen3_5ForConditionalGeneration(hf.Qwen3_5Config(**hybrid(), **QWEN_IDS))


@zoo
def qwen3_5_moe() -> hf.PreTrainedModel:
    config = hf.Qwen3_5MoeConfig(
        **hybrid(**EXPERTS, shared_expert_intermediate_size=16), **QWEN_IDS
    )
    return hf.Qwen3_5MoeForConditionalGeneration(config)


GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
}
GLM_VISION = {
    **QWEN_VISION,
    "hidden_size": 32,
    "out_hidden_size": WIDTH,
    "intermediate_size": 64,
    "image_size": 56,
}
GLM_TEXT = {**TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}


@zoo
def glm4v() -> hf.PreTrainedModel:
    return hf.Glm4vForConditionalGeneration(
        hf.Glm4vConfig(text_config=GLM_TEXT, vision_config=GLM_VISION, **GLM_IDS)
    )


@zoo
def glm4v_moe() -> hf.PreTrainedModel:
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    }
    text = {**GLM_TEXT, **experts, "head_dim": 8}
    return hf.Glm4vMoeForConditionalGeneration(
        hf.Glm4vMoeConfig(text_config=text, vision_config=GLM_VISION, **GLM_IDS)
    )


@zoo
def glm46v() -> hf.PreTrainedModel:
    parts = {
        "text_config": hf.Glm4vTextConfig(**GLM_TEXT),
        "vision_config": hf.Glm4vVisionConfig(**GLM_VISION),
    }
    return hf.Glm46VForConditionalGeneration(hf.Glm46VConfig(**parts, **GLM_IDS))


@zoo
def glm_ocr() -> hf.PreTrainedModel:
    return hf.GlmOcrForConditionalGeneration(
        hf.GlmOcrConfig(text_config=GLM_TEXT, vision_config=GLM_VISION, **GLM_IDS)
    )


@zoo
def kimi_k25() -> hf.PreTrainedModel:
    # what is cached as keys is wider than what is cached as values; the first block is
    # dense, the others have experts
    widths = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
    }
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    }
    experts |= {"n_group": 1, "topk_group": 1}
    text = hf.DeepseekV3Config(**{**TEXT, "num_key_value_heads": 4}, **widths, **experts)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 14,
    }
    vision |= {"pos_emb_height": 4, "pos_emb_width": 4}
    config = hf.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=32, **QWEN_IDS
    )
    return hf.Kimi_K25ForConditionalGeneration(config)


@zoo
def idefics2() -> hf.PreTrainedModel:
    resampler = {
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
    }
    resampler |= {"hidden_size": WIDTH, "num_key_value_heads": 2}
    text = hf.MistralConfig(**TEXT)
    config = hf.Idefics2Config(
        text_config=text,
        vision_config=dict(VISION),
        perceiver_config=resampler,
        image_token_id=IMAGE,
    )
    return hf.Idefics2ForConditionalGeneration(config)


@zoo
def idefics3() -> hf.PreTrainedModel:
    vision = {**VISION, "image_size": 56}
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=vision,
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return hf.Idefics3ForConditionalGeneration(config)


@zoo
def smolvlm() -> hf.PreTrainedModel:
    vision = {**VISION, "image_size": 56}
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=vision,
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return hf.SmolVLMForConditionalGeneration(config)


@zoo
def aria() -> hf.PreTrainedModel:
    text = hf.AriaTextConfig(
        **{**TEXT, "intermediate_size": 16}, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
    )
    vision = {**VISION, "model_type": "idefics3_vision"}
    config = hf.AriaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_patch_to_query_dict={4: 4},
    )
    return hf.AriaForConditionalGeneration(config)


@zoo
def lfm2_vl() -> hf.PreTrainedModel:
    # one block of attention between two of short convolutions
    text = hf.Lfm2Config(
        **TEXT, layer_types=["conv", "full_attention", "conv"], block_multiple_of=16
    )
    vision = {k: v for k, v in VISION.items() if k != "image_size"} | {
        "model_type": "siglip2_vision_model",
        "num_patches": 16,
    }
    config = hf.Lfm2VlConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, projector_hidden_size=32
    )
    return hf.Lfm2VlForConditionalGeneration(config)


@zoo
def paligemma() -> hf.PreTrainedModel:
    widths = {
        "projection_dim": WIDTH,
        "hidden_size": WIDTH,
        "vocab_size": VOCABULARY,
        "image_token_index": IMAGE,
    }
    vision = siglip(projection_dim=WIDTH, vision_use_head=False)
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT, head_dim=8), vision_config=vision, **widths
    )
    return hf.PaliGemmaForConditionalGeneration(config)


@zoo
def internvl() -> hf.PreTrainedModel:
    vision = {**VISION, "image_size": (56, 56), "patch_size": (14, 14)}
    sizes = {"image_token_id": IMAGE, "image_seq_length": 4, "downsample_ratio": 0.5}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(text_config=hf.Qwen2Config(**TEXT), vision_config=vision, **sizes)
    )


@zoo
def gemma3() -> hf.PreTrainedModel:
    # a window of 6 is shorter than the prompt, so that the sliding layers forget
    sliding = {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    text = hf.Gemma3TextConfig(**TEXT, head_dim=8, **sliding)
    ids = {
        "image_token_index": IMAGE,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    }
    config = hf.Gemma3Config(
        text_config=text, vision_config=siglip(vision_use_head=False), mm_tokens_per_image=4, **ids
    )
    return hf.Gemma3ForConditionalGeneration(config)


def gemma4_text(**extra: object) -> hf.Gemma4TextConfig:
    # a window of 6 is shorter than the prompt; the blocks of full attention have wider heads
    kinds = {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    sizes = {
        "head_dim": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    }
    return hf.Gemma4TextConfig(**{**TEXT, **sizes, **kinds, **extra})


def gemma4_of(text: hf.Gemma4TextConfig) -> hf.PreTrainedModel:
    heads = {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    vision = hf.Gemma4VisionConfig(
        **{k: v for k, v in VISION.items() if k != "image_size"}, **heads
    )
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO}
    ids |= {"boi_token_id": VISION_START, "eoi_token_id": VISION_END}
    model = hf.Gemma4ForConditionalGeneration(
        hf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **ids)
    )
    for block in model.model.language_model.layers:
        block.layer_scalar.fill_(0.75)  # real blocks scale what they give
    return model


@zoo
def gemma4() -> hf.PreTrainedModel:
    shared = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    return gemma4_of(gemma4_text(use_bidirectional_attention="vision", **shared))


@zoo
def gemma4_moe() -> hf.PreTrainedModel:
    # experts beside the dense MLP of each block
    experts = {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }
    kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    return gemma4_of(gemma4_text(use_bidirectional_attention="vision", **experts, **kinds))


@zoo
def gemma4_small() -> hf.PreTrainedModel:
    # an embedding for each layer; the third block attends to keys and values of the second
    return gemma4_of(
        gemma4_text(hidden_size_per_layer_input=8, num_kv_shared_layers=1, use_double_wide_mlp=True)
    )


@zoo
def molmo2() -> hf.PreTrainedModel:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    vision = {**VISION, **heads, "image_size": [28, 28], "image_default_input_size": [28, 28]}
    vision |= {"num_position_embeddings": 4, "image_patch_size": 14, "image_num_pos": 4}
    adapter = {
        **heads,
        "vision_feature_layer": [0, 1],
        "hidden_size": 32,
        "intermediate_size": 64,
        "text_hidden_size": WIDTH,
    }
    names = (
        "image_start_token_id",
        "image_end_token_id",
        "image_patch_id",
        "low_res_image_start_token_id",
    )
    names += ("frame_start_token_id", "frame_end_token_id")
    # the six lie behind the vocabulary, in the additional one
    ids = {name: VOCABULARY + k for k, name in enumerate(names)}
    text = {**TEXT, "head_dim": 8, "additional_vocab_size": 8}
    return hf.Molmo2ForConditionalGeneration(
        hf.Molmo2Config(text_config=text, vision_config=vision, adapter_config=adapter, **ids)
    )


def q_former() -> dict[str, object]:
    q_former = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    return {
        "vision_config": {**VISION, "initializer_range": 0.02},
        "qformer_config": {**q_former, "encoder_hidden_size": 32},
        "num_query_tokens": 4,
        "image_token_index": IMAGE,
    }


@zoo
def blip2() -> hf.PreTrainedModel:
    sizes = {
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    ids = {
        "vocab_size": VOCABULARY,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "max_position_embeddings": 128,
    }
    return hf.Blip2ForConditionalGeneration(
        hf.Blip2Config(text_config=hf.OPTConfig(**sizes, **ids), **q_former())
    )


@zoo
def instructblip() -> hf.PreTrainedModel:
    config = hf.InstructBlipConfig(text_config=hf.LlamaConfig(**TEXT), **q_former())
    return hf.InstructBlipForConditionalGeneration(config)


@zoo
def mllama() -> hf.PreTrainedModel:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
    }
    vision |= {
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
    }
    vision |= {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    text = {
        **TEXT,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    # the placeholder lies behind the vocabulary: the embedding has eight
    # rows more, the unembedding has not
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY)
    model = hf.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            # the gates start closed: the picture would not reach the text
            torch.nn.init.constant_(parameter, 0.5)
    return model


@zoo
def llama4() -> hf.PreTrainedModel:
    # the second block has experts; chunks of 8 are shorter than the prompt
    kinds = {
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
    }
    experts = {
        "moe_layers": [1],
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
    }
    text = {
        **TEXT,
        **kinds,
        **experts,
        "intermediate_size": 32,
        "head_dim": 8,
        "attention_chunk_size": 8,
    }
    vision = {
        **VISION,
        "image_size": 56,
        "intermediate_size": 128,
        "vision_output_dim": 32,
        "num_channels": 3,
    }
    vision |= {
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = hf.Llama4Config(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return hf.Llama4ForConditionalGeneration(config)


@zoo
def qwen2_audio() -> hf.PreTrainedModel:
    audio = {
        "num_mel_bins": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "d_model": 32,
    }
    audio |= {"max_source_positions": 8}
    config = hf.Qwen2AudioConfig(
        audio_config=audio, text_config=hf.Qwen2Config(**TEXT), audio_token_index=AUDIO
    )
    return hf.Qwen2AudioForConditionalGeneration(config)


# with experts in some block: inside its MLP, and in Gemma 4 beside it
MIXTURES = ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "kimi_k25", "aria", "gemma4_moe", "llama4")


def build(name: str, seed: int = 0) -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    """The tiny model of that name, in evaluation mode without gradients, and inputs of one row
    with one picture (clip, sound).

    The default initialisation (0.02 at a width of 32) gives models that say the same whatever they
    are shown. Matrices are drawn anew with a standard deviation of 1.5 / sqrt(columns), so that
    every layer changes the answer.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = MAKERS[name]().eval().requires_grad_(False)
        random = torch.Generator().manual_seed(seed + 1)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=random)
                    * (1.5 / parameter.shape[-1] ** 0.5)
                )
    return model, inputs.single(name)
