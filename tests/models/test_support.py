"""What a model allows, site by site.

Parallel and post-norm blocks, experts alone and beside an MLP; hooks that a model would ignore.
"""

import pytest
import torch
import transformers as hf
from torch import nn

from tests.contract.reference import SUPPRESS, case, traces
from tests.support.blocks import HALF, KINDS
from tests.zoo import MODELS, build, padded
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import (
    AnatomyError,
    InputError,
    InterventionError,
    LoadError,
    XlvlmsError,
)
from xlvlms_tutorial.interventions.edits import add, fold, mask_weights, patch
from xlvlms_tutorial.interventions.skipping import parallel, parallel_pairs, skip
from xlvlms_tutorial.interventions.token_skipping import skip_tokens
from xlvlms_tutorial.loading import from_model
from xlvlms_tutorial.models import anatomy, support
from xlvlms_tutorial.models.vlm import VLM

EVERYTHING = set(support._NEEDS)


def build_vlm(name: str) -> VLM:
    torch.manual_seed(0)
    return VLM(hf.AutoModelForCausalLM.from_config(KINDS[name][0]()).eval(), None, name)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_block_allows_what_it_has(name):
    vlm = build_vlm(name)
    assert {pair for pair in EVERYTHING if not vlm.supports(*pair)} == KINDS[name][1]
    batch = vlm.prepare({"input_ids": torch.arange(20, 30)[None]})
    ways = {
        "read": lambda site: read(vlm, batch, 2, site),
        "skip": lambda site: forward(vlm, batch, skip(vlm, 2, site)),
        "parallel": lambda site: forward(vlm, batch, parallel(vlm, 2, site)),
        "fold": lambda site: forward(vlm, batch, fold(vlm, torch.ones(32), 2)),
    }
    for operation, site in EVERYTHING:
        if vlm.supports(operation, site):
            assert ways[operation](site) is not None
            continue
        with pytest.raises(XlvlmsError) as error:
            ways[operation](site)
        assert isinstance(error.value, (AnatomyError, InterventionError)), error.value
    assert traces(vlm) == []


def forward(vlm, batch, context):
    with context:
        return vlm.forward(batch).logits


@pytest.mark.parametrize(
    "name", [name for name in MODELS if not anatomy.cross_attention_layers(build(name)[0])]
)
def test_tested_architectures_of_dense_blocks_allow_everything(name):
    vlm = VLM(build(name)[0], None, name)
    lacking = {pair for pair in EVERYTHING - {("fold", "mlp")} if not vlm.supports(*pair)}
    moe = any("expert" in part for part, _ in vlm.model.named_modules())
    assert (
        lacking == set() or moe or getattr(vlm.model.config.get_text_config(), "layer_types", None)
    )


class WithExperts(nn.Module):
    """A block to which experts are added beside its MLP, under a
    name and in a form of their own.
    """

    def __init__(self, block: nn.Module, name: str, form: str) -> None:
        super().__init__()
        for child, module in block.named_children():
            self.add_module(child, module)
        self.inner, self.name = [block], name
        if form == "parameter":
            self.register_parameter(name, nn.Parameter(torch.randn(2, 32, 32)))
        else:
            self.add_module(
                name, nn.ModuleList([nn.Linear(32, 32)]) if form == "list" else nn.Linear(32, 32)
            )

    def forward(self, hidden_states, **kwargs):
        extra = getattr(self, self.name)
        extra = (
            hidden_states @ extra[0]
            if isinstance(extra, nn.Parameter)
            else (extra[0] if isinstance(extra, nn.ModuleList) else extra)(hidden_states)
        )
        return self.inner[0](hidden_states, **kwargs) + extra


@pytest.mark.parametrize("form", ["linear", "list", "parameter"])
@pytest.mark.parametrize(
    "name", ["moe", "block_sparse_moe", "shared_expert", "expert_bank", "ffn2", "feedforward_moe"]
)
def test_no_half_of_an_mlp_is_skipped_or_read(name, form):
    example = case("llava")
    example.vlm.blocks[1] = WithExperts(example.vlm.blocks[1], name, form)
    vlm = VLM(example.vlm.model, None, "llava")
    assert not any(vlm.supports(*pair) or vlm.supports(*pair, layer=2) for pair in HALF)
    assert all(vlm.supports(*pair, layer=1) for pair in HALF)
    assert all(vlm.supports(*pair) for pair in EVERYTHING - HALF)
    ways = [
        lambda: skip(vlm, 2, "mlp"),
        lambda: skip(vlm, [1, 2], "mlp"),
        lambda: skip_tokens(vlm, 2),
        lambda: parallel(vlm, 2),
    ]
    for enter in ways:
        with (
            pytest.raises(
                InterventionError,
                match=(
                    f"has {name} beside its mlp, which would go on working; choose the whole block"
                ),
            ),
            enter(),
        ):
            pytest.fail("entered")
    with (
        pytest.raises(InterventionError, match=f"has {name} beside its mlp"),
        fold(vlm, torch.ones(32), 2),
    ):
        pytest.fail("entered")
    with pytest.raises(InterventionError, match=f"read mlp_out: WithExperts has {name}"):
        read(vlm, example.batch, 2, "mlp_out")
    for part in ("block", "attention"):  # these are whole
        with skip(vlm, 2, part):
            assert vlm.forward(example.batch).logits.isfinite().all()
    assert traces(vlm) == []


@pytest.mark.parametrize("name", ["mamba", "cross_attn", "encoder_attn", "short_conv"])
def test_no_half_of_an_attention_is_skipped_or_read(name):
    example = case("llava")
    example.vlm.blocks[1] = WithExperts(example.vlm.blocks[1], name, "linear")
    vlm = VLM(example.vlm.model, None, "llava")
    assert {pair for pair in EVERYTHING if not vlm.supports(*pair)} == {
        ("read", "attn_out"),
        ("skip", "attention"),
    }
    with (
        pytest.raises(InterventionError, match=f"has {name} beside its attention"),
        skip(vlm, 2, "attention"),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("name", ["laurel", "adapter", "x"])
def test_what_nobody_knows_counts_as_both(name):
    example = case("llava")
    example.vlm.blocks[1] = WithExperts(example.vlm.blocks[1], name, "linear")
    vlm = VLM(example.vlm.model, None, "llava")
    assert {pair for pair in EVERYTHING if not vlm.supports(*pair)} == HALF | {
        ("read", "attn_out"),
        ("skip", "attention"),
    }


@pytest.mark.parametrize("name", ["per_layer_input_gate", "per_layer_projection"])
def test_embeddings_of_each_layer_are_no_half_of_anything(name):
    example = case("llava")
    example.vlm.blocks[1] = WithExperts(example.vlm.blocks[1], name, "linear")
    assert all(VLM(example.vlm.model, None, "llava").supports(*pair) for pair in EVERYTHING)


def test_what_a_self_check_refused_is_refused():
    vlm = build_vlm("plain")
    vlm.refused["skip", "attention"] = "largest difference 0.3"
    assert not vlm.supports("skip", "attention") and vlm.supports("skip", "mlp")
    message = (
        r"skip attention, which fails this model's self-check \(largest difference 0.3\); choose "
        r"another site; see vlm.checks"
    )
    with pytest.raises(InterventionError, match=message), skip(vlm, 1, "attention"):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("operation", "site", "message"),
    [
        ("skip", "norm", "allowed: block, mlp, attention"),
        ("read", "first", "allowed: attn_in, attn_out, resid_mid"),
        ("write", "mlp", "allowed: read, skip, parallel, fold"),
        ("fold", "block", "allowed: mlp"),
    ],
)
def test_questions_that_have_no_answer(operation, site, message):
    with pytest.raises(InputError, match=f"unknown support '{operation}', '{site}'; {message}"):
        build_vlm("plain").supports(operation, site)


# Compiled models


def compiled(kind: str, model: nn.Module) -> nn.Module:
    """A model compiled in one of the ways that there are.

    The backend "eager" compiles nothing and has all the guards.
    """
    inside = {
        "whole": model,
        "decoder": anatomy.decoder(model),
        "block": anatomy.decoder_blocks(model)[1],
        "tower": anatomy.tower(model),
    }
    way, _, part = kind.partition(" of ")
    module = inside[part]
    if way == "compile()":
        module.compile(backend="eager")
    elif way == "forward":
        module.forward = torch.compile(module.forward, backend="eager")
    elif part == "whole":
        return torch.compile(model, backend="eager")
    else:
        owner, _, name = next(
            path for path, submodule in model.named_modules() if submodule is module
        ).rpartition(".")
        setattr(model.get_submodule(owner), name, torch.compile(module, backend="eager"))
    return model


WAYS = [
    f"{way} of {part}"
    for way in ("compile()", "forward", "torch.compile")
    for part in ("whole", "decoder", "block", "tower")
]


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_refused_and_not_silently_ignored(way):
    model = compiled(way, build("llava")[0])
    for wrap in (lambda: VLM(model, None, "llava"), lambda: from_model(model, name="llava")):
        with pytest.raises(
            LoadError,
            match=(
                "is compiled, and would ignore what is changed or read from now "
                "on; give the model as it was"
            ),
        ):
            wrap()


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_compiled_later_is_refused_where_hooks_would_be_ignored(way):
    example = case("llava")
    if way == "torch.compile of whole":
        example.vlm.model = compiled(way, example.vlm.model)
    else:
        compiled(way, example.vlm.model)
    vector = torch.ones(example.vlm.width)
    name = "model.language_model.layers.0.mlp.up_proj"
    masks = {name: torch.ones(64, 32, dtype=torch.bool)}
    for enter in (
        lambda: add(example.vlm, vector, 1),
        lambda: patch(example.vlm, vector, 1),
        lambda: skip(example.vlm, 1),
        lambda: parallel(example.vlm, 1),
        lambda: parallel_pairs(example.vlm, 1),
        lambda: fold(example.vlm, vector, 1),
        lambda: mask_weights(example.vlm, masks),
    ):
        with pytest.raises(LoadError, match="is compiled"), enter():
            pytest.fail("entered")
    with pytest.raises(LoadError, match="is compiled"):
        read(example.vlm, example.batch, 1)
    assert example.vlm.active == []


def test_a_scripted_part_is_refused():
    model = build("llava")[0]
    model.model.multi_modal_projector.linear_1 = torch.jit.script(nn.Linear(32, 32))
    with pytest.raises(LoadError, match="'model.multi_modal_projector.linear_1' is compiled"):
        VLM(model, None, "llava")


# Inputs


@pytest.mark.parametrize("rows", [(0,), (1,), (0, 1)])
def test_rows_that_end_with_padding_are_refused(rows):
    vlm = VLM(build("llava")[0], None, "llava")
    ids, mask = torch.arange(20, 36).reshape(2, 8), torch.ones(2, 8, dtype=torch.long)
    for row in rows:
        mask[row, 6:] = 0
    with pytest.raises(
        InputError,
        match=(
            f"row {rows[0]} ends with padding, .*make them with "
            "padding_side='left', or by vlm.batch"
        ),
    ):
        vlm.prepare({"input_ids": ids, "attention_mask": mask})
    left_padded = vlm.prepare({"input_ids": ids.flip(1), "attention_mask": mask.flip(1)})
    assert vlm.generate_ids(left_padded, 2, suppress_tokens=SUPPRESS).shape == (2, 2)


@pytest.mark.parametrize("name", ["mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"])
def test_token_types_are_asked_for_where_a_picture_is_shown(name):
    inputs = {"input_ids": torch.tensor([[5, 190, 6]])}
    with pytest.raises(InputError, match=f"inputs without {name}"):
        support.require_types(inputs, frozenset({name}), {"image": 190})
    support.require_types(inputs | {name: 0}, frozenset({name}), {"image": 190})
    support.require_types(inputs, frozenset({name}), {"image": 191})
    support.require_types(inputs, frozenset(), {"image": 190})


def test_padded_batches_of_the_zoo_are_prepared():
    for name in ("llava", "mllama"):
        model, inputs = build(name)
        assert VLM(model, None, name).prepare(padded(name, inputs)).spans.shape[0] == 2


@pytest.mark.parametrize("name", ["blip2", "instructblip"])
def test_models_that_cannot_do_without_a_picture_say_so(name):
    model, inputs = build(name)
    vlm = VLM(model, None, name)
    text = vlm.prepare({key: inputs[key][:, -3:] for key in ("input_ids", "attention_mask")})
    for run in (lambda: vlm.forward(text), lambda: vlm.generate_ids(text, 2)):
        with pytest.raises(
            InputError,
            match="inputs without pixel_values.*, without which .* cannot run; give a picture",
        ):
            run()
