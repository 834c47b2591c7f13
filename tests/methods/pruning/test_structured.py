"""Cut neurons against zeroed columns, removed blocks against skipped ones, on every architecture.

What is left saves and loads.
"""

import math
from dataclasses import replace

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests import zoo
from tests.contract.reference import Case, apart, case, generated
from tests.support.text_models import gpt2, text_batch
from tests.support.tiny import PICTURE, tiny_llava
from tests.zoo.models import TEXT
from xlvlms_tutorial.errors import AnatomyError, InputError, InterventionError, LayerError
from xlvlms_tutorial.interventions.edits import add, mask_weights
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.methods.pruning import structured as module
from xlvlms_tutorial.methods.pruning.calibration import calibrate_on, fingerprint, linear_maps
from xlvlms_tutorial.methods.pruning.scores import scores as wanda_scores
from xlvlms_tutorial.methods.pruning.structured import neuron_scores, prune_blocks, prune_neurons
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

# their MLPs are of two widths, or of another one than the configuration says
UNEVEN = ("gemma4_small", "lfm2_vl")
CUTTABLE = tuple(
    name for name in zoo.MODELS if name not in ("idefics2", "idefics", *zoo.MIXTURES, *UNEVEN)
)
# the configuration says by number which blocks have experts or wider heads, or blocks share keys
NUMBERED = (
    "qwen3_vl_moe",
    "glm4v_moe",
    "kimi_k25",
    "llama4",
    "gemma4",
    "gemma4_moe",
    "gemma4_small",
)
REMOVABLE = tuple(
    name for name in zoo.MODELS if name not in ("mllama", "qwen3_vl", "idefics", *NUMBERED)
)


def text_model(config: hf.PreTrainedConfig) -> Case:
    """A language model alone, whose answers depend on all its layers."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.copy_(torch.randn_like(weight) * 1.5 / weight.shape[-1] ** 0.5)
    vlm = VLM(model, None, config.model_type)
    return Case(config.model_type, vlm, text_batch(vlm), 12)


def phi3() -> Case:
    return text_model(hf.Phi3Config(**TEXT))


def phi() -> Case:
    return text_model(hf.PhiConfig(**TEXT))


def gpt() -> Case:
    example = gpt2()
    return Case("gpt2", example, text_batch(example), 12)


def tiny() -> Case:
    example = tiny_llava()
    return Case(
        "tiny",
        example,
        example.batch([PICTURE] * 2, ["What colour ?", "Is there a red key in the picture ?"]),
        0,
    )


OTHERS = {"phi3": phi3, "phi": phi, "gpt2": gpt}


def build_case(name: str) -> Case:
    return OTHERS[name]() if name in OTHERS else case(name)


def logits(example: Case) -> torch.Tensor:
    return example.vlm.forward(example.batch).logits


def zeroed(example: Case, scores: dict, dropped: int) -> dict:
    """Masks that zero the columns of the neurons with the lowest scores, by a sort of Python."""
    names, masks = {m: name for name, m in example.vlm.model.named_modules()}, {}
    for layer, layer_scores in scores.items():
        linear = anatomy.mlp_exit(example.vlm.blocks[layer - 1])
        gone = sorted(range(len(layer_scores)), key=lambda j: (float(layer_scores[j]), j))[:dropped]
        keep = torch.ones_like(linear.weight, dtype=torch.bool)
        keep[(gone, slice(None)) if example.name == "gpt2" else (slice(None), gone)] = False
        masks[names[linear]] = keep
    return masks


# Scores


def test_a_neurons_score_is_the_size_of_what_it_adds():
    example = tiny()
    calibration, inputs = calibrate_on(example.vlm, [example.batch]), {}
    linear = example.vlm.blocks[1].mlp.down_proj
    hook = linear.register_forward_pre_hook(lambda module, args: inputs.update(x=args[0].double()))
    logits(example)
    hook.remove()
    x = inputs["x"][example.batch["attention_mask"].bool()]
    scores = neuron_scores(example.vlm, calibration)
    assert list(scores) == [1, 2, 3]
    for j in range(0, 64, 9):  # all that neuron j adds, token by token
        # what the neuron adds to the output at each token, squared
        added = []
        for t in range(len(x)):
            added.append(float(sum((x[t, j] * w) ** 2 for w in linear.weight[:, j].double())))
        assert float(scores[2][j]) == pytest.approx(math.sqrt(sum(added) / len(x)), rel=1e-5)
    squares = wanda_scores(example.vlm, calibration, 2, "mlp.down_proj").double().square()
    torch.testing.assert_close(scores[2].double(), squares.sum(dim=0).sqrt(), rtol=1e-5, atol=0)


def test_activations_of_one_size_leave_the_columns_alone():
    example = tiny()
    calibration = calibrate_on(example.vlm, [example.batch])
    flat = replace(
        calibration,
        squares={
            key: torch.full_like(s, 1.0) * calibration.tokens[key]
            for key, s in calibration.squares.items()
        },
    )
    plain = neuron_scores(example.vlm)
    for layer, layer_scores in neuron_scores(example.vlm, flat).items():
        torch.testing.assert_close(layer_scores, plain[layer])
        torch.testing.assert_close(
            plain[layer], example.vlm.blocks[layer - 1].mlp.down_proj.weight.norm(dim=0)
        )


def test_scores_by_chance_follow_their_seed():
    vlm = tiny_llava()
    first, same, second = (neuron_scores(vlm, "random", seed) for seed in (1, 1, 2))
    assert all(
        torch.equal(first[layer], same[layer]) and not torch.equal(first[layer], second[layer])
        for layer in first
    )
    assert not torch.equal(first[1], first[2])


# Neurons


@pytest.mark.parametrize("name", [*CUTTABLE, *OTHERS])
def test_a_model_without_neurons_computes_what_it_does_with_their_columns_zeroed(name):
    example = build_case(name)
    scores = neuron_scores(example.vlm, calibrate_on(example.vlm, [example.batch]))
    width = len(scores[1])
    dense, before = logits(example), example.vlm.model.num_parameters()
    with mask_weights(example.vlm, zeroed(example, scores, width // 2)):
        expected = logits(example)
    remaining = prune_neurons(example.vlm, scores, 0.5)
    torch.testing.assert_close(logits(example), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, dense, atol=1e-3)
    assert {len(rows) for rows in remaining.values()} == {width // 2}
    assert all((rows.diff() > 0).all() for rows in remaining.values())
    blocks = example.vlm.blocks
    # two maps and a bias, or three maps
    per_neuron = 65 if name in ("phi", "gpt2", "blip2") else 96
    assert before - example.vlm.model.num_parameters() == len(blocks) * (width // 2) * per_neuron
    assert not any(weight.requires_grad for weight in example.vlm.model.parameters())
    assert (
        example.vlm.name
        == f"{example.name} + {width // 2} of {width} neurons cut ({fingerprint(example.vlm)[:8]})"
    )
    for block in blocks:
        linear = anatomy.mlp_exit(block)
        assert getattr(linear, "in_features", None) or linear.nx == width // 2
        # no view of the whole
        assert linear.weight.untyped_storage().nbytes() == linear.weight.numel() * 4


@pytest.mark.parametrize("name", OTHERS)
def test_language_models_that_are_cut_load_again(name, tmp_path):
    example = OTHERS[name]()
    prune_neurons(example.vlm, neuron_scores(example.vlm), 0.3)
    example.vlm.model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert apart(again(**example.batch).logits, logits(example)) < 1e-5


@pytest.mark.parametrize(
    "name", ["llava", "qwen2_vl", "gemma3", "blip2", "mllama", "molmo2", "qwen3_vl"]
)
def test_models_that_are_cut_load_again(name, tmp_path):
    example = case(name)
    prune_neurons(example.vlm, neuron_scores(example.vlm, "random"), 0.3, multiple_of=8)
    if name != "mllama":
        prune_blocks(example.vlm, 3)
    example.vlm.model.save_pretrained(tmp_path)
    again = type(example.vlm.model).from_pretrained(tmp_path).eval()
    reloaded = example._replace(vlm=VLM(again, None, name))
    new, expected = generated(example)
    same, result = generated(reloaded)
    assert torch.equal(new, same) and apart(result, expected) < 1e-5
    text = again.config.get_text_config(decoder=True)
    assert (getattr(text, "intermediate_size", None) or text.ffn_dim) == 48
    assert text.num_hidden_layers == reloaded.vlm.n_layers == 3 - (name != "mllama")


def test_a_smaller_llava_is_loaded_through_the_door(tmp_path):
    example = tiny()
    prune_neurons(
        example.vlm, neuron_scores(example.vlm, calibrate_on(example.vlm, [example.batch])), 0.5
    )
    prune_blocks(example.vlm, [2])
    example.vlm.model.save_pretrained(tmp_path)
    example.vlm.processor.save_pretrained(tmp_path)
    again = load(tmp_path, device="cpu", dtype="float32")
    assert fingerprint(again) == fingerprint(example.vlm) and again.n_layers == 2
    assert apart(again.forward(example.batch).logits, logits(example)) < 1e-5
    assert again.generate([PICTURE], ["What colour ?"], 4) == example.vlm.generate(
        [PICTURE], ["What colour ?"], 4
    )


def test_the_work_of_the_neurons_goes():
    example = tiny()

    def flops():
        with FlopCounterMode(display=False) as counter:
            logits(example)
        return counter.get_total_flops()

    dense, tokens = flops(), example.batch["input_ids"].numel()
    prune_neurons(example.vlm, neuron_scores(example.vlm), 0.5)
    # three blocks, three maps from or to 32 neurons
    assert dense - flops() == 3 * (2 * tokens * 32 * 32 * 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.floats(0, 0.999), st.data())
def test_as_many_neurons_go_as_asked_or_fewer_for_a_round_number(width, share, data):
    multiple = data.draw(st.integers(1, width))
    dropped = module._number_to_drop(share, width, multiple)
    requested = math.floor(share * width + 1e-9)
    assert 0 <= dropped <= requested < width
    assert (width - dropped) % multiple == 0 or dropped == 0
    assert requested - dropped < multiple or dropped == 0
    assert module._number_to_drop(share, width, 1) == requested


def test_no_share_changes_nothing():
    example = tiny()
    expected = logits(example)
    remaining = prune_neurons(example.vlm, neuron_scores(example.vlm), 0)
    assert torch.equal(logits(example), expected) and example.vlm.name == "tiny-llava"
    assert all(torch.equal(rows, torch.arange(64)) for rows in remaining.values())


def test_of_equal_scores_the_first_neurons_go():
    example = tiny()
    remaining = prune_neurons(example.vlm, {layer: torch.ones(64) for layer in (1, 2, 3)}, 0.25)
    assert all(rows.tolist() == list(range(16, 64)) for rows in remaining.values())


@pytest.mark.parametrize("name", [*zoo.MIXTURES, *UNEVEN])
def test_mlps_that_are_no_single_hidden_layer_or_not_alike_are_not_cut(name):
    example = build_case(name)
    before = logits(example)
    with pytest.raises((AnatomyError, InputError)):
        prune_neurons(example.vlm, {layer: torch.ones(64) for layer in (1, 2, 3)}, 0.5)
    assert torch.equal(logits(example), before)


# Blocks


@pytest.mark.parametrize("name", NUMBERED)
def test_blocks_that_a_configuration_counts_are_not_removed(name):
    example = build_case(name)
    before = logits(example)
    with pytest.raises(InputError):
        prune_blocks(example.vlm, [1])
    assert torch.equal(logits(example), before) and example.vlm.n_layers == 3


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((name, layers) for name in (*REMOVABLE, "phi3") for layers in ([1], [1, 3])),
        ("qwen3_vl", [3]),
        ("gpt2", [1]),
    ],
)
def test_a_model_without_blocks_computes_what_it_does_when_they_are_skipped(name, layers):
    example = build_case(name)
    remaining = [block for k, block in enumerate(example.vlm.blocks, 1) if k not in layers]
    with skip(example.vlm, layers):
        new, expected = generated(example)
        whole = logits(example)
    prune_blocks(example.vlm, layers)
    assert torch.equal(logits(example), whole)
    same, result = generated(example)
    assert torch.equal(new, same) and torch.equal(result, expected)
    assert list(example.vlm.blocks) == remaining == list(anatomy.decoder_blocks(example.vlm.model))
    assert (
        example.vlm.n_layers
        == len(remaining)
        == example.vlm.model.config.get_text_config(decoder=True).num_hidden_layers
    )
    assert example.vlm.name == f"{example.name} + without blocks {', '.join(map(str, layers))}"
    places = [
        {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")}
        for block in example.vlm.blocks
    ]
    assert places == [{k} for k in range(len(remaining))]


def test_lists_of_the_configuration_follow_their_blocks():
    example = case("gemma3")
    prune_blocks(example.vlm, 1)
    assert example.vlm.model.config.get_text_config(decoder=True).layer_types == [
        "full_attention",
        "sliding_attention",
    ]
    example = case("molmo2")
    text = example.vlm.model.config.get_text_config(decoder=True)
    text.rope_scaling_layers = [0, 2]
    prune_blocks(example.vlm, 2)
    assert (
        text.rope_scaling_layers == [0, 1]
        and len(anatomy.decoder(example.vlm.model).rope_types) == 2
    )


# What cannot be cut


def unchanged(vlm, call, error, message):
    """The call is refused, and the model is as it was."""
    before, name, config = (
        {k: v.clone() for k, v in vlm.model.state_dict().items()},
        vlm.name,
        vlm.model.config.to_dict(),
    )
    with pytest.raises(error, match=message):
        call()
    after = vlm.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert (vlm.name, vlm.model.config.to_dict()) == (name, config)


@pytest.mark.parametrize("share", [1, 1.5, -0.1, float("nan")])
def test_shares_that_leave_nothing_are_refused(share):
    vlm = tiny_llava()
    unchanged(
        vlm,
        lambda: prune_neurons(vlm, neuron_scores(vlm), share),
        InputError,
        "share of neurons .* below 1",
    )


def test_scores_of_other_models_or_none_are_refused():
    vlm = tiny_llava()
    scores = neuron_scores(vlm)
    for wrong, message in (
        (
            {1: scores[1], 2: scores[2]},
            "scores of layer 3 are none; give one for each of 64 neurons",
        ),
        ({**scores, 2: scores[2][:5]}, r"scores of layer 2 are \(5,\)"),
    ):
        unchanged(vlm, lambda wrong=wrong: prune_neurons(vlm, wrong, 0.5), InputError, message)
    damaged = {**scores, 2: scores[2].clone().index_fill(0, torch.tensor([3]), float("nan"))}
    unchanged(vlm, lambda: prune_neurons(vlm, damaged, 0.5), InputError, "neurons of layer 2")
    for multiple in (0, 65):
        unchanged(
            vlm,
            lambda m=multiple: prune_neurons(vlm, scores, 0.5, m),
            InputError,
            "give 1 to 64",
        )
    with pytest.raises(InputError, match="allowed: a Calibration, 'magnitude', 'random'"):
        neuron_scores(vlm, "taylor")
    second_vlm = tiny_llava(seed=1)
    calibration = calibrate_on(second_vlm, [second_vlm.batch([PICTURE], ["What colour ?"])])
    with pytest.raises(InputError):
        neuron_scores(vlm, calibration)
    vlm.blocks[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="neurons of layer 2"):
        neuron_scores(vlm)


@pytest.mark.parametrize("name, part", [("idefics2", "connector"), ("idefics", "gated_cross_attn")])
def test_a_width_that_another_part_has_too_cannot_be_cut(name, part):
    vlm = case(name).vlm  # which has another MLP as wide as the decoder's
    unchanged(
        vlm,
        lambda: prune_neurons(vlm, neuron_scores(vlm), 0.5),
        InputError,
        f"described wrongly by its configuration, first .*{part}",
    )


def test_shared_adapted_and_quantised_parts_are_refused():
    vlm = tiny_llava()
    scores = neuron_scores(vlm)
    vlm.blocks[1].mlp.down_proj.weight = vlm.blocks[0].mlp.down_proj.weight
    for call in (lambda: prune_neurons(vlm, scores, 0.5), lambda: prune_blocks(vlm, 3)):
        unchanged(vlm, call, InputError, r"layer 1 mlp\.down_proj are shared")
    vlm = tiny_llava()
    vlm.blocks[1].mlp.up_proj.weight = nn.Parameter(
        torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False
    )
    for call in (
        lambda: prune_neurons(vlm, scores, 0.5),
        lambda: prune_blocks(vlm, 3),
        lambda: neuron_scores(vlm),
    ):
        unchanged(vlm, call, InputError, "is quantised")
    vlm = tiny_llava()
    vlm.blocks[1].mlp.up_proj.base_layer = nn.Linear(2, 2)
    unchanged(vlm, lambda: prune_neurons(vlm, scores, 0.5), InputError, "has an adapter")
    vlm = tiny_llava()
    for call in (lambda: prune_neurons(vlm, scores, 0.5), lambda: prune_blocks(vlm, 3)):
        with add(vlm, torch.ones(vlm.width), 1):
            unchanged(vlm, call, InterventionError, "leave the intervention first")


def test_mlps_of_other_kinds_are_refused():
    sparse = text_model(hf.MixtralConfig(**TEXT, num_local_experts=2)).vlm
    unchanged(sparse, lambda: neuron_scores(sparse), AnatomyError, "last linear map of the MLP")
    vlm = tiny_llava()
    vlm.blocks[1].mlp.norm = nn.LayerNorm(64)  # as some models norm their hidden layer
    unchanged(vlm, lambda: neuron_scores(vlm), AnatomyError, "one hidden layer")
    vlm = tiny_llava()
    del vlm.blocks[0].mlp.gate_proj, vlm.blocks[0].mlp.up_proj
    with pytest.raises(AnatomyError, match="looked for gate_proj, up_proj"):
        neuron_scores(vlm)
    vlm = tiny_llava()
    vlm.blocks[1].mlp.down_proj = nn.Linear(32, 32).requires_grad_(False)
    unchanged(vlm, lambda: neuron_scores(vlm), InputError, "layer 2 has an MLP of 32 neurons")


def test_blocks_that_cannot_go_are_refused():
    vlm = tiny_llava()
    for layers in ([1, 2, 3], []):
        unchanged(
            vlm,
            lambda layers=layers: prune_blocks(vlm, layers),
            InputError,
            "at least one and leave at least one",
        )
    unchanged(vlm, lambda: prune_blocks(vlm, 4), LayerError, "layer 4 is not one of 1 to 3")
    unchanged(vlm, lambda: prune_blocks(vlm, [0]), LayerError, "layer 0")
    for name in ("mllama", "idefics"):
        crossing = case(name).vlm
        unchanged(
            crossing,
            lambda vlm=crossing: prune_blocks(vlm, 3),
            InputError,
            "cross-attention; skip its blocks instead",
        )
    deep = case("qwen3_vl").vlm
    for layer in (1, 2):
        unchanged(
            deep,
            lambda layer=layer: prune_blocks(deep, [layer, 3]),
            InputError,
            "gets visual features; remove blocks behind layer 2",
        )
    vlm.model.config.text_config.layers_of_some_kind = [0, 2]
    unchanged(
        vlm,
        lambda: prune_blocks(vlm, 3),
        InputError,
        r"the configuration lists layers_of_some_kind=\[0, 2\]",
    )
    del vlm.model.config.text_config.layers_of_some_kind
    vlm.model.config.text_config.num_kv_shared_layers = 1
    unchanged(vlm, lambda: prune_blocks(vlm, 3), InputError, "share keys and values")


def test_calibrations_and_masks_of_the_whole_model_do_not_fit_the_smaller_one():
    example = tiny()
    calibration = calibrate_on(example.vlm, [example.batch])
    prune_blocks(example.vlm, 2)
    assert max(layer for layer, _ in linear_maps(example.vlm)) == 2
    with pytest.raises(InputError, match="calibrate on the weights that are scored"):
        neuron_scores(example.vlm, calibration)
