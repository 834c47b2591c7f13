"""Parts of models by name, against where each class of transformers keeps them."""

import pytest
import torch
import transformers as hf
from torch import nn

from tests.contract.reference import experts_beside, experts_inside
from tests.zoo import MODELS, build
from xlvlms_tutorial.errors import AnatomyError, InputError
from xlvlms_tutorial.models import anatomy, support

# decoder, its list of blocks, final norm, tower, connector, as paths from the model
PATHS = {
    "llava": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "llava_next": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "qwen2_vl": ("model.language_model", "layers", "norm", "model.visual", "model.visual.merger"),
    "qwen3_vl": ("model.language_model", "layers", "norm", "model.visual", "model.visual.merger"),
    "idefics2": ("model.text_model", "layers", "norm", "model.vision_model", "model.connector"),
    "smolvlm": ("model.text_model", "layers", "norm", "model.vision_model", "model.connector"),
    "gemma3": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "mllama": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_model",
        "model.multi_modal_projector",
    ),
    "mistral3": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "qwen3_5": ("model.language_model", "layers", "norm", "model.visual", "model.visual.merger"),
    "glm4v": ("model.language_model", "layers", "norm", "model.visual", "model.visual.merger"),
    "kimi_k25": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.mm_projector",
    ),
    "lfm2_vl": (
        "model.language_model",
        "layers",
        "embedding_norm",
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "aria": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "gemma4": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.embed_vision",
    ),
    "llama4": ("language_model.model", "layers", "norm", "vision_model", "multi_modal_projector"),
    "blip2": (
        "language_model.model.decoder",
        "layers",
        "final_layer_norm",
        "vision_model",
        "language_projection",
    ),
    "instructblip": (
        "language_model.model",
        "layers",
        "norm",
        "vision_model",
        "language_projection",
    ),
    "llava_aimv2": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "vipllava": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "video_llava": (
        "model.language_model",
        "layers",
        "norm",
        "model.image_tower",
        "model.multi_modal_projector",
    ),
    "janus": ("model.language_model", "layers", "norm", "model.vision_model", "model.aligner"),
    "deepseek_vl": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_model",
        "model.aligner",
    ),
    "deepseek_vl_hybrid": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_model",
        "model.aligner",
    ),
    "got_ocr2": (
        "model.language_model",
        "layers",
        "norm",
        "model.vision_tower",
        "model.multi_modal_projector",
    ),
    "paddleocr_vl": ("model.language_model", "layers", "norm", "model.visual", "model.projector"),
    "qwen2_5_omni": (
        "model.language_model",
        "layers",
        "norm",
        "model.visual",
        "model.visual.merger",
    ),
    "idefics": ("model", "layers", "norm", "model.vision_model", "model.perceiver_resampler"),
}


@pytest.fixture(scope="module")
def models():
    return {name: build(name)[0] for name in MODELS}


@pytest.mark.parametrize("name", PATHS)
def test_parts_are_where_the_class_keeps_them(models, name):
    model, (decoder, blocks, norm, tower, connector) = models[name], PATHS[name]
    assert anatomy.decoder(model) is model.get_submodule(decoder)
    assert anatomy.decoder_blocks(model) is model.get_submodule(f"{decoder}.{blocks}")
    assert anatomy.final_norm(model) is model.get_submodule(f"{decoder}.{norm}")
    assert anatomy.tower(model) is model.get_submodule(tower)
    assert anatomy.connector(model) is model.get_submodule(connector)
    assert anatomy.unembedding(model) is model.get_output_embeddings()


def test_the_tower_of_a_model_that_hears(models):
    model = models["qwen2_audio"]
    assert anatomy.tower(model, "audio") is model.get_submodule("model.audio_tower")
    assert anatomy.tower(model, "image") is None
    assert anatomy.connector(model) is model.get_submodule("model.multi_modal_projector")


@pytest.mark.parametrize("name", MODELS)
def test_every_block_has_every_site(models, name):
    blocks = anatomy.decoder_blocks(models[name])
    assert len(blocks) == 3
    for block in blocks:
        inside = set(block.modules())
        absent = []
        if experts_beside(block):
            absent = ["mlp_in", "mlp_hidden"]
        elif experts_inside(block):
            absent = ["mlp_hidden"]
        for site in anatomy.SITES:
            if site in absent:
                with pytest.raises(AnatomyError, match="[Ee]xpert"):
                    anatomy.site(block, site)
            else:
                read_at = anatomy.site(block, site)
                assert read_at.module in inside and read_at.side in ("input", "output")


@pytest.mark.parametrize("name", MODELS)
def test_parts_by_the_work_they_do(models, name):
    parts = anatomy.parts(models[name])
    assert list(parts) == ["tower", "connector", "attention", "mlp", "unembedding"]
    blocks = anatomy.decoder_blocks(models[name])
    for part in ("attention", "mlp"):
        owners = [
            {k for k, block in enumerate(blocks) if module in set(block.modules())}
            for module in parts[part]
        ]
        assert all(len(owner) == 1 for owner in owners) and set.union(*owners) == {0, 1, 2}
    maps = {
        module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)
    }
    # no attention, no MLP
    maps -= {
        module
        for block in blocks
        if hasattr(block, "per_layer_projection")
        for module in block.children()
    }
    named = set()
    for top in parts["attention"] + parts["mlp"]:
        named |= set(top.modules())
    assert maps <= named  # all products of the blocks have a part
    assert parts["unembedding"] == [models[name].get_output_embeddings()]


def test_parts_of_opt_and_of_a_model_that_hears(models):
    block = anatomy.decoder_blocks(models["blip2"])[0]
    assert anatomy.parts(models["blip2"])["mlp"][:2] == [block.fc1, block.fc2]
    audio = models["qwen2_audio"]
    assert anatomy.parts(audio)["tower"] == [audio.get_submodule("model.audio_tower")]


def attribute(block: nn.Module, *names: str) -> list[nn.Module]:
    return [getattr(block, name) for name in names]


def test_sites_of_a_llama_block(models):
    block = anatomy.decoder_blocks(models["llava"])[0]
    first, attention, second, mlp = attribute(
        block, "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"
    )
    sites = {site: anatomy.site(block, site) for site in anatomy.SITES}
    assert sites == {
        "attn_in": anatomy.Site(first, "output"),
        "attn_out": anatomy.Site(attention, "output"),
        "resid_mid": anatomy.Site(second, "input"),
        "mlp_in": anatomy.Site(second, "output"),
        "mlp_hidden": anatomy.Site(mlp.down_proj, "input"),
        "mlp_out": anatomy.Site(mlp, "output"),
        "resid_post": anatomy.Site(block, "output"),
    }
    assert anatomy.mlp_entry(block) is mlp


def test_gemma_norms_the_attentions_output_under_the_name_of_the_second_norm(models):
    block = anatomy.decoder_blocks(models["gemma3"])[0]
    assert (
        anatomy.second_norm(block)
        is block.pre_feedforward_layernorm
        is not block.post_attention_layernorm
    )


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_what_attention_and_mlp_add_leads_from_layer_to_layer(models, name):
    block = anatomy.decoder_blocks(models[name])[0]
    read, hooks = {}, []
    for where in ("attn_out", "resid_mid", "mlp_out"):
        site = anatomy.site(block, where)

        def keep(module, args, output, where=where, side=site.side):
            read[where] = output if side == "output" else args[0]

        hooks.append(site.module.register_forward_hook(keep))
    hooks.append(
        block.register_forward_hook(lambda _, args, out: read.update(start=args[0], end=out))
    )
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        models[name](input_ids=ids)
    for hook in hooks:
        hook.remove()
    first = {where: part[0] if isinstance(part, tuple) else part for where, part in read.items()}
    torch.testing.assert_close(first["start"] + first["attn_out"], first["resid_mid"])
    torch.testing.assert_close(first["resid_mid"] + first["mlp_out"], first["end"])


def test_an_opt_block_keeps_its_mlp_in_two_maps(models):
    block = anatomy.decoder_blocks(models["blip2"])[0]
    assert (anatomy.mlp(block), anatomy.mlp_entry(block), anatomy.mlp_exit(block)) == (
        block.fc2,
        block.fc1,
        block.fc2,
    )
    assert anatomy.second_norm(block) is block.final_layer_norm


def test_mllamas_second_block_looks_at_the_picture(models):
    model = models["mllama"]
    blocks = anatomy.decoder_blocks(model)
    assert anatomy.cross_attention_layers(model) == {2}
    assert [anatomy.attention(block) is getattr(block, "cross_attn", None) for block in blocks] == [
        False,
        True,
        False,
    ]
    assert anatomy.placeholders(model) == {}


def test_pictures_that_enter_by_cross_attention_have_no_positions_wherever_it_is(models):
    assert {name for name, model in models.items() if anatomy.crossing(model)} == {
        "mllama",
        "idefics",
    }
    assert anatomy.placeholders(models["idefics"]) == {}
    assert anatomy.cross_attention_layers(models["idefics"]) == frozenset()


def test_ids_of_a_second_table_of_embeddings_are_embedded(models):
    assert anatomy.embedded(models["idefics"]) == 202 and anatomy.embedded(models["llava"]) == 200


def test_placeholders_come_from_the_config(models):
    assert anatomy.placeholders(models["llava"]) == {"image": 190}
    assert anatomy.placeholders(models["qwen2_vl"]) == {"image": 190, "video": 191}
    assert anatomy.placeholders(models["qwen2_audio"]) == {"audio": 192}
    assert all(
        anatomy.cross_attention_layers(model) == frozenset()
        for name, model in models.items()
        if name != "mllama"
    )


def test_a_decoder_whose_blocks_end_with_a_norm_has_no_final_one():
    config = hf.OPTConfig(
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
        do_layer_norm_before=False,
    )
    assert anatomy.final_norm(hf.OPTForCausalLM(config)) is None


class Nothing(nn.Module):
    """A model, or a block, without any part."""

    def get_decoder(self) -> nn.Module:
        return self


def test_a_model_without_decoder_blocks_names_what_was_looked_for():
    with pytest.raises(
        AnatomyError,
        match="no decoder blocks found in Nothing; looked for layers, block, h, blocks",
    ):
        anatomy.decoder_blocks(Nothing())
    lost = Nothing()
    lost.get_decoder = lambda: None
    with pytest.raises(AnatomyError, match="decoder blocks"):
        anatomy.decoder(lost)


@pytest.mark.parametrize("site", [site for site in anatomy.SITES if site != "resid_post"])
def test_a_block_without_a_part_names_what_was_looked_for(site):
    with pytest.raises(AnatomyError, match="found in Nothing; looked for"):
        anatomy.site(Nothing(), site)


def test_a_mixture_of_experts_has_no_single_last_map():
    block = Nothing()
    block.mlp = Nothing()
    with pytest.raises(AnatomyError, match="last linear map of the MLP"):
        anatomy.mlp_exit(block)


def test_experts_beside_an_mlp_are_skipped_and_read_together_and_never_by_half(models):
    block = anatomy.decoder_blocks(models["gemma4_moe"])[0]
    assert anatomy.mlp_parts(block) == [block.mlp, block.experts]
    assert anatomy.site(block, "mlp_out") == anatomy.Site(
        block.post_feedforward_layernorm, "output"
    )
    assert {block.mlp, block.experts, block.router} <= set(
        anatomy.parts(models["gemma4_moe"])["mlp"]
    )
    for find in (anatomy.mlp, anatomy.mlp_entry, anatomy.mlp_exit):
        with pytest.raises(
            AnatomyError,
            match=(
                "no single MLP found in Gemma4TextDecoderLayer.*has "
                "Gemma4TextExperts beside it: skip both"
            ),
        ):
            find(block)


def test_what_stands_beside_known_parts_is_named(models):
    blocks = [block for model in models.values() for block in anatomy.decoder_blocks(model)]
    assert all(
        support.beside(block, part) == [] for block in blocks for part in ("attention", "mlp")
    )
    config = hf.FalconH1Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
        num_key_value_heads=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
    )
    block = anatomy.decoder_blocks(hf.FalconH1ForCausalLM(config))[0]
    assert support.beside(block, "attention") == ["mamba"] and support.beside(block, "mlp") == []
    shared = hf.GraniteMoeSharedConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=16,
    )
    block = anatomy.decoder_blocks(hf.GraniteMoeSharedForCausalLM(shared))[0]
    assert anatomy.mlp_parts(block) == [block.block_sparse_moe, block.shared_mlp]
    assert support.beside(block, "mlp") == []


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "lfm2_vl"])
def test_blocks_that_keep_a_state_instead_of_keys(models, name):
    assert [anatomy.recurrent(block) for block in anatomy.decoder_blocks(models[name])] == [
        True,
        False,
        True,
    ]
    assert all(
        anatomy.attention(block) in set(block.children())
        for block in anatomy.decoder_blocks(models[name])
    )


def test_blocks_that_lend_and_borrow_keys(models):
    sharing = {
        name: [anatomy.key_sharing(block) for block in anatomy.decoder_blocks(model)]
        for name, model in models.items()
    }
    # the first two are the last of their kinds that make their own
    assert sharing.pop("gemma4_small") == ["lends", "lends", "borrows"]
    assert all(sources == [None] * 3 for sources in sharing.values())


def test_an_unknown_site_lists_the_known(models):
    with pytest.raises(
        InputError,
        match="unknown site 'heart' in a block; allowed: attn_in, attn_out, resid_mid",
    ):
        anatomy.site(anatomy.decoder_blocks(models["llava"])[0], "heart")


def test_states_are_taken_from_and_put_back_into_what_modules_return():
    states, new_states, weights = torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.eye(2)
    assert anatomy.states_of(states) is states and anatomy.states_of((states, weights)) is states
    assert anatomy.with_states(states, new_states) is new_states
    assert anatomy.with_states((states, weights), new_states) == (new_states, weights)
