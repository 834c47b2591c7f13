"""Language models whose blocks differ in kind, and what they do not allow."""

import transformers as hf

from tests.zoo.models import TEXT

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}
HALF = {
    ("read", "mlp_hidden"),
    ("read", "mlp_out"),
    ("skip", "mlp"),
    ("parallel", "first"),
    ("parallel", "second"),
    ("fold", "mlp"),
}
NORMED = {("read", "resid_mid"), ("read", "mlp_in"), ("parallel", "first"), ("parallel", "second")}

KINDS = {
    "plain": (lambda: hf.LlamaConfig(**TEXT), set()),
    "parallel": (lambda: hf.CohereConfig(**TEXT), NORMED),
    "norms after": (
        lambda: hf.Olmo2Config(**TEXT),
        NORMED | {("read", "attn_in"), ("fold", "mlp")},
    ),
    "norms on both sides": (lambda: hf.Gemma2Config(**TEXT, head_dim=8), {("fold", "mlp")}),
    "experts": (
        lambda: hf.Qwen3MoeConfig(**TEXT, **MOE, head_dim=8),
        {("read", "mlp_hidden"), ("fold", "mlp")},
    ),
    "experts that share": (
        lambda: hf.GraniteMoeSharedConfig(**TEXT, **SHARED),
        HALF - {("skip", "mlp")} | {("read", "mlp_in")},
    ),
    "OPT with norms after": (
        lambda: hf.OPTConfig(
            vocab_size=200,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            do_layer_norm_before=False,
        ),
        NORMED | {("read", "attn_in"), ("fold", "mlp")},
    ),
}
