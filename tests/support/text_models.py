"""A language model without a picture, and a batch of text for it."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from xlvlms_tutorial.models.vlm import VLM


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=200, bos_token_id=1, eos_token_id=2
    )
    return VLM(GPT2LMHeadModel(config).eval().requires_grad_(False), None, "gpt2")


def text_batch(vlm, n=12):
    ids = torch.randint(3, 180, (1, n), generator=torch.Generator().manual_seed(0))
    return vlm.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
