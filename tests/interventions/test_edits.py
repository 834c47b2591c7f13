"""Steering, replacing, projecting out, folding and masking.

Closed forms on a tiny LLaVA, and everything undone afterwards.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tests.contract.reference import case, generated, traces
from tests.support.tiny import redrawn, tiny_llava
from tests.zoo import SUPPRESS, build, padded
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InterventionError, LayerError, SpanError
from xlvlms_tutorial.interventions.edits import ablate, add, edit, fold, mask_weights, patch
from xlvlms_tutorial.interventions.skipping import parallel, parallel_pairs, skip
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

PICTURES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
TEXTS = ["What colour is the key ?", "Describe the picture ."]
ANSWERS = ["red key on the grass", "a woman in the grass"]
L = 3


@pytest.fixture(scope="module")
def vlm():
    """A tiny LLaVA whose layers matter."""
    return redrawn(tiny_llava(), seed=1)


@pytest.fixture
def batch(vlm):
    return vlm.batch(PICTURES, TEXTS)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(vlm):
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    yield
    assert traces(vlm) == []
    after = vlm.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def noise(vlm, *shape, seed=0):
    return torch.randn(*shape, vlm.width, generator=torch.Generator().manual_seed(seed))


def states(vlm, batch, layer):
    return read(vlm, batch, layer)[layer, "resid_post"]


def last_logits(vlm, batch):
    return vlm.forward(batch).logits[:, -1]


# Add


def test_a_vector_at_the_last_layer_moves_logits_as_the_unembedding_says(vlm, batch):
    vector, plain = noise(vlm), states(vlm, batch, L)
    with add(vlm, vector, L, strength=2.5):
        logits = vlm.forward(batch).logits
    torch.testing.assert_close(logits, vlm.unembed(plain + 2.5 * vector), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", range(L + 1))
@pytest.mark.parametrize(
    "positions",
    ["all", "image", "question", "last", "answer", "generated", ("image", "question"), "mask"],
)
def test_a_vector_moves_its_positions_and_no_others(vlm, layer, positions):
    batch = vlm.batch(PICTURES, TEXTS, ANSWERS)
    random_mask = torch.rand(batch.spans.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    masks = {
        "all": torch.ones_like(random_mask),
        "last": batch.predicting,
        "generated": batch.mask("answer"),
        "mask": random_mask,
    }
    names = (positions,) if isinstance(positions, str) else positions
    expected = masks[positions] if positions in masks else batch.mask(*names)
    before, vector = states(vlm, batch, layer), noise(vlm)
    with add(vlm, vector, layer, -3.0, positions=random_mask if positions == "mask" else positions):
        moved = states(vlm, batch, layer) - before
    torch.testing.assert_close(moved, expected[..., None] * (-3.0 * vector), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", range(L + 1))
@pytest.mark.parametrize(
    "positions", ["all", "last", "generated", ("image", "generated"), ("last", "question")]
)
def test_answers_that_are_given_and_answers_that_are_generated_are_steered_alike(
    vlm, batch, layer, positions
):
    steps = []
    hook = anatomy.unembedding(vlm.model).register_forward_hook(
        lambda module, args, output: steps.append(output[:, -1].clone())
    )
    suppress = vlm.tokenizer.all_special_ids + [vlm.image_token_id]
    try:
        with add(vlm, noise(vlm) * 2, layer, positions=positions):
            new = vlm.generate_ids(batch, 4, min_new_tokens=4, suppress_tokens=suppress)
    finally:
        hook.remove()
    answers = vlm.tokenizer.batch_decode(new)
    answered = vlm.batch(PICTURES, TEXTS, answers)
    assert torch.equal(answered["input_ids"][:, -4:], new)
    with add(vlm, noise(vlm) * 2, layer, positions=positions):
        logits = vlm.forward(answered).logits[:, -5:-1]
    torch.testing.assert_close(logits, torch.stack(steps, 1), atol=1e-4, rtol=1e-4)


def test_one_vector_a_sample_and_a_gate_on_samples(vlm, batch):
    rows, before = noise(vlm, 2), states(vlm, batch, 2)
    with add(vlm, rows, 2, gate=torch.tensor([False, True])):
        moved = states(vlm, batch, 2) - before
    assert moved[0].abs().max() == 0
    torch.testing.assert_close(moved[1], rows[1].expand_as(moved[1]), atol=1e-5, rtol=1e-5)


def test_a_gate_is_decided_at_the_prefill_and_kept(vlm, batch):
    shapes = []

    def gate(states):
        shapes.append(states.shape)
        return torch.tensor([True, False])

    clean = vlm.generate_ids(batch, 5, min_new_tokens=5)
    with add(vlm, noise(vlm) * 4, 2):
        steered = vlm.generate_ids(batch, 5, min_new_tokens=5)
    with add(vlm, noise(vlm) * 4, 2, gate=gate):
        gated = vlm.generate_ids(batch, 5, min_new_tokens=5)
        assert shapes == [(2, batch["input_ids"].shape[1], vlm.width)]
        vlm.forward(batch)
        assert len(shapes) == 2  # the next prompt is decided anew
    assert not torch.equal(clean[0], steered[0])
    assert torch.equal(gated, torch.stack([steered[0], clean[1]]))


def test_without_a_cache_a_gate_is_decided_on_the_prompt_all_the_same(vlm, batch):
    norms = []
    suppress = [*vlm.tokenizer.all_special_ids, vlm.image_token_id]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": suppress}

    def gate(states):
        norms.append(states[:, -1].norm(dim=-1))
        return norms[-1] > norms[0].mean()

    with add(vlm, noise(vlm) * 4, 1, gate=gate):
        cached = vlm.generate_ids(batch, **options)
        uncached = vlm.generate_ids(batch, **options, use_cache=False)
    assert len(norms) == 1 + 4 and torch.equal(cached, uncached)
    for later in norms:
        torch.testing.assert_close(later, norms[0])


def test_a_gate_that_reads_the_states_is_asked_at_each_layer(vlm, batch):
    norms = []
    with edit(
        vlm,
        lambda states: states * 0,
        [1, 3],
        gate=lambda states: norms.append(states) or torch.tensor([True, True]),
    ):
        vlm.forward(batch)
    assert len(norms) == 2 and not torch.equal(norms[0], norms[1])


def test_a_gate_of_two_samples_serves_a_batch_of_two_only(vlm):
    three = vlm.batch([*PICTURES, PICTURES[0]], [*TEXTS, TEXTS[0]])
    gated = add(vlm, noise(vlm), 1, gate=torch.tensor([True, False]))
    with gated, pytest.raises(InterventionError, match="gate for 2 samples in a batch of 3"):
        vlm.forward(three)


def test_several_layers_at_once_are_one_after_the_other(vlm, batch):
    with add(vlm, noise(vlm), [1, 2]):
        together = last_logits(vlm, batch)
    with add(vlm, noise(vlm), 2), add(vlm, noise(vlm), 1):
        assert torch.equal(last_logits(vlm, batch), together)


# Order and nesting


def test_edits_of_a_layer_act_in_the_order_of_entry(vlm, batch):
    h, vector, direction = states(vlm, batch, 2), noise(vlm), noise(vlm, seed=5)
    unit = direction / direction.norm()
    without = lambda x: x - (x @ unit)[..., None] * unit
    with add(vlm, vector, 2), ablate(vlm, direction, 2):
        torch.testing.assert_close(states(vlm, batch, 2), without(h + vector), atol=1e-5, rtol=1e-5)
    with ablate(vlm, direction, 2), add(vlm, vector, 2):
        torch.testing.assert_close(states(vlm, batch, 2), without(h) + vector, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without(h + vector), without(h) + vector)


def test_the_outer_edit_outlives_the_inner_one(vlm, batch):
    with add(vlm, noise(vlm), 2):
        outer = last_logits(vlm, batch)
        with patch(vlm, noise(vlm, seed=3), 2):
            assert not torch.equal(last_logits(vlm, batch), outer)
        assert torch.equal(last_logits(vlm, batch), outer)


def test_an_edit_of_a_skipped_block_changes_what_it_hands_on(vlm, batch):
    with skip(vlm, 2), add(vlm, noise(vlm), 2):
        torch.testing.assert_close(
            states(vlm, batch, 2), states(vlm, batch, 1) + noise(vlm), atol=1e-5, rtol=1e-5
        )


# Replace


@pytest.mark.parametrize("layer", range(L + 1))
def test_patching_in_another_samples_states_gives_its_logits(vlm, layer):
    batch = vlm.batch(PICTURES, [TEXTS[0]] * 2)
    clean, flipped = last_logits(vlm, batch), states(vlm, batch, layer).flip(0)
    assert not torch.allclose(clean[0], clean[1], atol=1e-2)
    with patch(vlm, flipped, layer):
        torch.testing.assert_close(last_logits(vlm, batch), clean.flip(0), atol=1e-5, rtol=1e-5)
    with patch(vlm, flipped, layer, gate=torch.tensor([True, False])):
        torch.testing.assert_close(last_logits(vlm, batch), clean[[1, 1]], atol=1e-5, rtol=1e-5)


def test_patching_the_picture_at_the_first_layer_shows_the_other_picture(vlm):
    batch = vlm.batch(PICTURES, [TEXTS[0]] * 2)
    clean = vlm.generate_ids(batch, 4, min_new_tokens=4)
    with patch(vlm, states(vlm, batch, 0).flip(0), 0, positions="image"):
        assert torch.equal(vlm.generate_ids(batch, 4, min_new_tokens=4), clean.flip(0))


def test_states_of_other_inputs_are_not_patched_in(vlm, batch):
    for length in (batch.spans.shape[1] - 1, batch.spans.shape[1] + 1):
        with (
            patch(vlm, noise(vlm, 2, length), 1),
            pytest.raises(InterventionError, match=f"rows of {length} tokens"),
        ):
            vlm.forward(batch)
        mask = torch.ones(2, length, dtype=torch.bool)
        with (
            add(vlm, noise(vlm), 1, positions=mask),
            pytest.raises(InterventionError, match=f"rows of {length} tokens"),
        ):
            vlm.forward(batch)


# Project out


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 4), scale=st.floats(1e-3, 1e3))
def test_no_component_is_left_and_twice_is_once(vlm, seed, k, scale):
    directions = noise(vlm, k, seed=seed)
    batch = vlm.batch(PICTURES, TEXTS)
    h = states(vlm, batch, 2).double()
    q = torch.linalg.qr(directions.double().T).Q
    with ablate(vlm, directions * scale, 2):
        once = states(vlm, batch, 2)
        with ablate(vlm, directions, 2):
            twice = states(vlm, batch, 2)
    torch.testing.assert_close(once, (h - h @ q @ q.T).float(), atol=1e-4, rtol=1e-4)
    assert (once.double() @ directions.double().T).abs().max() < 1e-4
    torch.testing.assert_close(twice, once, atol=1e-4, rtol=1e-4)


def test_half_the_strength_leaves_half_the_component(vlm, batch):
    direction = noise(vlm)
    before = states(vlm, batch, 1) @ direction
    with ablate(vlm, direction, 1, strength=0.5):
        torch.testing.assert_close(
            states(vlm, batch, 1) @ direction, before / 2, atol=1e-3, rtol=1e-3
        )


def test_a_model_in_double_precision_stays_exact():
    model, inputs = build("llava")
    double = VLM(model.double(), None, "llava")
    batch = double.prepare(padded("llava", inputs))
    direction = noise(double).double()
    with ablate(double, direction, 2):
        assert (states(double, batch, 2) @ direction).abs().max() < 1e-10


def test_dependent_directions_are_refused(vlm):
    v = noise(vlm)
    for directions in (torch.zeros(vlm.width), torch.stack([v, 2 * v]), noise(vlm, vlm.width + 1)):
        with pytest.raises(InterventionError, match="independent"), ablate(vlm, directions, 1):
            pass


# Fold


@pytest.mark.parametrize("layers", [1, 2, [1, 2, 3]])
def test_a_folded_vector_is_an_added_one(vlm, batch, layers):
    with add(vlm, noise(vlm), layers, 0.7):
        logits, ids = vlm.forward(batch).logits, vlm.generate_ids(batch, 4)
    hooks = sum(len(module._forward_hooks) for module in vlm.model.modules())
    with fold(vlm, noise(vlm), layers, 0.7):
        assert sum(len(module._forward_hooks) for module in vlm.model.modules()) == hooks
        torch.testing.assert_close(vlm.forward(batch).logits, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(vlm.generate_ids(batch, 4), ids)


def test_folded_twice_is_their_sum_and_adding_goes_with_it(vlm, batch):
    a, b, c = (noise(vlm, seed=k) for k in range(3))
    with add(vlm, a + b + c, 2):
        expected = last_logits(vlm, batch)
    with fold(vlm, a, 2), fold(vlm, b, 2), add(vlm, c, 2):
        torch.testing.assert_close(last_logits(vlm, batch), expected, atol=1e-4, rtol=1e-4)
    with add(vlm, c, 2), fold(vlm, a, 2):  # entered the other way round
        with fold(vlm, b, 2):
            torch.testing.assert_close(last_logits(vlm, batch), expected, atol=1e-4, rtol=1e-4)
        assert vlm.folded[2] == 1


def test_folding_goes_with_edits_of_other_layers_made_for_other_inputs(vlm, batch):
    mask = torch.zeros(batch.spans.shape, dtype=torch.bool)
    with (
        add(vlm, noise(vlm, 2), 1, positions="image", gate=torch.tensor([True, False])),
        add(vlm, noise(vlm), 1, positions=mask),
    ):
        with add(vlm, noise(vlm, seed=4), 2):
            expected = last_logits(vlm, batch)
        with fold(vlm, noise(vlm, seed=4), 2):
            torch.testing.assert_close(last_logits(vlm, batch), expected, atol=1e-4, rtol=1e-4)


UNDOING = {
    "edit": lambda vlm, layer: edit(vlm, lambda states: states * 2, layer),
    "replace": lambda vlm, layer: patch(vlm, torch.ones(vlm.width), layer),
    "project_out": lambda vlm, layer: ablate(vlm, torch.ones(vlm.width), layer),
    "skip block": skip,
    "skip mlp": lambda vlm, layer: skip(vlm, layer, "mlp", "decode"),
    "first of a pair": parallel_pairs,
    "second of a pair": lambda vlm, layer: parallel_pairs(vlm, layer - 1),
}


@pytest.mark.parametrize("name", UNDOING)
def test_what_would_undo_a_folded_vector_is_refused(vlm, batch, name):
    with fold(vlm, noise(vlm), 2):
        before = last_logits(vlm, batch)
        with (
            pytest.raises(InterventionError, match=r"layer 2: .*interventions\.add"),
            UNDOING[name](vlm, 2),
        ):
            pass
        assert torch.equal(last_logits(vlm, batch), before)


@pytest.mark.parametrize("name", UNDOING)
def test_a_vector_is_not_folded_into_what_is_already_changed(vlm, batch, name):
    with UNDOING[name](vlm, 2):
        before = last_logits(vlm, batch)
        with (
            pytest.raises(InterventionError, match=r"layer 2: .*interventions\.add"),
            fold(vlm, noise(vlm), 2),
        ):
            pass
        assert torch.equal(last_logits(vlm, batch), before)


HARMLESS = {
    "skip attention": lambda vlm: skip(vlm, 2, "attention"),
    "parallel": lambda vlm: parallel(vlm, 2),
    "skip before": lambda vlm: skip(vlm, 1),
    "replace after": lambda vlm: patch(vlm, torch.ones(vlm.width), 3, "image"),
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("folded_first", [True, False])
def test_what_leaves_the_mlp_alone_goes_with_folding(vlm, batch, name, folded_first):
    with HARMLESS[name](vlm), add(vlm, noise(vlm), 2):
        expected = vlm.forward(batch).logits
    first, second = (lambda: fold(vlm, noise(vlm), 2)), (lambda: HARMLESS[name](vlm))
    first, second = (first, second) if folded_first else (second, first)
    with first(), second():
        torch.testing.assert_close(vlm.forward(batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_block_that_norms_its_mlps_output_refuses_the_fold():
    example = case("gemma3")
    with (
        pytest.raises(InterventionError, match="layer 2: its block does not simply add"),
        fold(example.vlm, torch.ones(example.vlm.width), [2]),
    ):
        pass
    assert traces(example.vlm) == []
    assert all(anatomy.mlp_exit(block).bias is None for block in example.vlm.blocks)


def test_layers_folded_before_a_refusal_are_unfolded():
    example = case("mllama")
    with (
        pytest.raises(InterventionError, match="layer 2"),
        fold(example.vlm, torch.ones(example.vlm.width), [1, 2]),
    ):
        pass
    assert traces(example.vlm) == [] and anatomy.mlp_exit(example.vlm.blocks[0]).bias is None


# Mask weights


def test_masked_weights_are_zero_inside_and_return_to_the_bit_even_after_an_error(vlm, batch):
    name = next(n for n, m in vlm.model.named_modules() if m is anatomy.mlp_exit(vlm.blocks[1]))
    weight = vlm.model.get_submodule(name).weight
    before, keep = (
        weight.clone(),
        torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5,
    )
    with pytest.raises(RuntimeError, match="stop"), mask_weights(vlm, {name: keep}):
        assert torch.equal(weight, before * keep)
        with mask_weights(vlm, {name: ~keep}):
            assert weight.abs().max() == 0
        assert torch.equal(weight, before * keep)
        raise RuntimeError("stop")
    assert torch.equal(weight, before)


def test_a_mask_that_keeps_nothing_of_an_mlp_skips_it(vlm, batch):
    names = {module: name for name, module in vlm.model.named_modules()}
    exit_ = anatomy.mlp_exit(vlm.blocks[1])
    with skip(vlm, 2, "mlp"):
        expected = vlm.forward(batch).logits
    with mask_weights(vlm, {names[exit_]: torch.zeros(exit_.weight.shape, dtype=torch.bool)}):
        assert torch.equal(vlm.forward(batch).logits, expected)


def test_masks_that_do_not_fit_are_refused_and_none_is_applied(vlm):
    names = {module: name for name, module in vlm.model.named_modules()}
    name = names[anatomy.mlp_exit(vlm.blocks[0])]
    good = {name: torch.zeros(32, 64, dtype=torch.bool)}
    head, whole = (
        vlm.model.lm_head.weight,
        torch.ones_like(vlm.model.lm_head.weight, dtype=torch.bool),
    )
    wrong = {
        "no linear map": {"model.language_model.layers.9.mlp": good[name]},
        r"shape \(32, 64\)": {
            names[anatomy.mlp_exit(vlm.blocks[1])]: torch.ones(64, 32, dtype=torch.bool)
        },
        "no linear map of": {
            names[anatomy.final_norm(vlm.model)]: torch.ones(32, 1, dtype=torch.bool)
        },
    }
    for message, masks in wrong.items():
        with pytest.raises(InterventionError, match=message), mask_weights(vlm, good | masks):
            pass
    try:
        vlm.model.lm_head.weight = vlm.model.get_input_embeddings().weight
        with (
            pytest.raises(InterventionError, match="shares its weights"),
            mask_weights(vlm, {"lm_head": whole}),
        ):
            pass
    finally:
        vlm.model.lm_head.weight = head


def test_quantised_weights_are_refused():
    example = case("llava")
    linear = anatomy.mlp_exit(example.vlm.blocks[0])
    name = next(n for n, m in example.vlm.model.named_modules() if m is linear)
    packed = torch.zeros(linear.weight.shape, dtype=torch.uint8)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    with (
        pytest.raises(InterventionError, match="quantised"),
        mask_weights(example.vlm, {name: torch.ones(packed.shape, dtype=torch.bool)}),
    ):
        pass


# Undone after errors

ALL = {
    **UNDOING,
    "add": lambda vlm, layer: add(vlm, torch.ones(vlm.width), [0, layer]),
    "fold": lambda vlm, layer: fold(vlm, torch.ones(vlm.width), layer),
    "parallel": lambda vlm, layer: parallel(vlm, layer, "second"),
    "skip attention": lambda vlm, layer: skip(vlm, layer, "attention", "prefill"),
}


@pytest.mark.parametrize("name", ALL)
def test_everything_is_undone_after_an_error(vlm, batch, name):
    clean = last_logits(vlm, batch)
    with pytest.raises(ZeroDivisionError), ALL[name](vlm, 2):
        vlm.generate_ids(batch, 2)
        raise ZeroDivisionError
    assert traces(vlm) == [] and torch.equal(last_logits(vlm, batch), clean)

    def broken(module, args):
        raise ZeroDivisionError

    hook = vlm.blocks[2].register_forward_pre_hook(broken)
    try:
        with pytest.raises(ZeroDivisionError), ALL[name](vlm, 2):
            vlm.generate_ids(batch, 2)
    finally:
        hook.remove()
    assert traces(vlm) == [] and torch.equal(last_logits(vlm, batch), clean)


def test_an_error_on_entry_leaves_nothing(vlm):
    for enter in (
        lambda: add(vlm, torch.ones(vlm.width), [1, 9]),
        lambda: parallel(vlm, [1, 9]),
        lambda: parallel_pairs(vlm, 3),
    ):
        with pytest.raises(LayerError), enter():
            pass
        assert traces(vlm) == []


# Bad input


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_layers_out_of_range(vlm, layer):
    vector = torch.ones(vlm.width)
    for enter in (add, patch, ablate):
        with (
            pytest.raises(LayerError, match=f"layer {layer} is not one of 0 to 3"),
            enter(vlm, vector, layer),
        ):
            pass
    for enter in (
        lambda: fold(vlm, vector, layer),
        lambda: skip(vlm, layer),
        lambda: parallel(vlm, layer),
    ):
        with pytest.raises(LayerError, match=f"layer {layer} is not one of 1 to 3"), enter():
            pass


def test_layer_0_has_no_block(vlm):
    for enter in (
        skip,
        parallel,
        parallel_pairs,
        lambda vlm, layer: fold(vlm, torch.ones(vlm.width), layer),
    ):
        with pytest.raises(LayerError, match="one of 1 to 3"), enter(vlm, 0):
            pass


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(vlm, value):
    vector = torch.ones(vlm.width)
    vector[3] = value
    for enter in (add, patch, ablate, fold):
        with pytest.raises(InterventionError, match="NaN or infinite"), enter(vlm, vector, 1):
            pass
    for enter in (add, fold):
        with (
            pytest.raises(InterventionError, match="NaN or infinite"),
            enter(vlm, torch.ones(vlm.width), 1, strength=value),
        ):
            pass


def test_vectors_of_another_width_or_for_another_batch(vlm, batch):
    for enter in (add, patch, ablate, fold):
        with (
            pytest.raises(InterventionError, match=r"shape \(31,\).*width 32"),
            enter(vlm, torch.ones(31), 1),
        ):
            pass
    with (
        add(vlm, noise(vlm, 3), 1),
        pytest.raises(InterventionError, match="vectors for 3 samples in a batch of 2"),
    ):
        vlm.forward(batch)
    patched = patch(vlm, noise(vlm, 3, batch.spans.shape[1]), 1)
    with patched, pytest.raises(InterventionError, match="states for 3 samples in a batch of 2"):
        vlm.forward(batch)


@pytest.mark.parametrize("positions", ["images", "template", "padding", (), ("image", "rest")])
def test_unknown_positions_are_named_with_the_known_ones(vlm, positions):
    with pytest.raises(  # noqa: SIM117
        InterventionError,
        match="unknown positions .*allowed: all, last, generated, image, .*or a mask",
    ):
        with add(vlm, torch.ones(vlm.width), 1, positions=positions):
            pass


def test_positions_that_no_sample_has(vlm, batch):
    with (
        add(vlm, torch.ones(vlm.width), 1, positions="video"),
        pytest.raises(SpanError, match="'video'.*there are"),
    ):
        vlm.forward(batch)
    with (
        add(vlm, torch.ones(vlm.width), 1, positions="image"),
        pytest.raises(SpanError, match="2 of 2 samples have none"),
    ):
        vlm.forward(vlm.batch(None, TEXTS))


def test_spans_need_inputs_that_the_model_knows(vlm, batch):
    with (
        add(vlm, torch.ones(vlm.width), 1, positions="image"),
        pytest.raises(InterventionError, match="vlm.forward"),
        torch.no_grad(),
    ):
        vlm.model(**batch)


# Silent traps


def mllama_text():
    model, inputs = build("mllama")
    vlm = VLM(model, None, "mllama")
    words = {key: inputs[key][:, 2:] for key in ("input_ids", "attention_mask")}
    return vlm, vlm.prepare(words)


def test_without_a_picture_mllama_leaves_out_a_layer_and_changing_it_is_an_error():
    vlm, text = mllama_text()
    vector = noise(vlm) * 3
    clean = vlm.forward(text).logits
    for layer in (0, 1, 3):
        with add(vlm, vector, layer):
            assert not torch.allclose(vlm.forward(text).logits, clean, atol=1e-2)
    with (
        add(vlm, vector, 2),
        pytest.raises(InterventionError, match="layer 2 is left out.*give a picture"),
    ):
        vlm.forward(text)
    with add(vlm, vector, 2), pytest.raises(InterventionError, match="layer 2 is left out"):
        vlm.generate_ids(text, 4)
    assert traces(vlm) == [] and torch.equal(vlm.forward(text).logits, clean)


def test_without_a_picture_mllama_skips_and_pairs_its_other_blocks():
    vlm, text = mllama_text()
    clean = vlm.forward(text).logits
    with skip(vlm, 2):
        assert torch.equal(vlm.forward(text).logits, clean)
    for layer in (1, 2):
        with parallel_pairs(vlm, layer):
            assert torch.equal(vlm.forward(text).logits, clean)
    with skip(vlm, 1):
        cached = vlm.generate_ids(text, 4, min_new_tokens=4, suppress_tokens=SUPPRESS)
        assert torch.equal(
            cached,
            vlm.generate_ids(text, 4, min_new_tokens=4, suppress_tokens=SUPPRESS, use_cache=False),
        )


def test_generation_is_never_compiled(vlm, batch, monkeypatch):
    message = {}

    def spy(**options):
        message.update(options)
        return options["input_ids"]

    monkeypatch.setattr(vlm.model, "generate", spy)
    vlm.generate_ids(batch)
    assert message["disable_compile"] is True and message["do_sample"] is False


def test_a_finished_row_goes_on_and_disturbs_no_other(vlm):
    example = case("llava")
    new = generated(example)[0]
    stop = int(new[0, 0])  # the first row ends at once
    options = {
        "max_new_tokens": 4,
        "suppress_tokens": SUPPRESS,
        "eos_token_id": stop,
        "pad_token_id": 0,
    }
    with add(example.vlm, torch.zeros(example.vlm.width), 1, positions="last"):
        ended = example.vlm.generate_ids(example.batch, **options)
    assert ended[0].tolist() == [stop, 0, 0, 0] and torch.equal(ended[1], new[1])


@pytest.mark.parametrize(
    ("name", "adapted"), [("llava", ["down_proj", "q_proj"]), ("blip2", ["fc2", "q_proj"])]
)
def test_interventions_work_under_lora(name, adapted):
    import peft

    model, inputs = build(name)
    settings = peft.LoraConfig(target_modules=adapted, r=2, init_lora_weights=False)
    vlm = VLM(peft.get_peft_model(model, settings).eval(), None, name)
    batch, vector = vlm.prepare(padded(name, inputs)), noise(vlm)
    before = states(vlm, batch, 2)
    for enter in (add, fold):
        with enter(vlm, vector, 2):
            torch.testing.assert_close(states(vlm, batch, 2), before + vector, atol=1e-4, rtol=1e-4)
    with skip(vlm, 2):
        assert torch.equal(states(vlm, batch, 2), states(vlm, batch, 1))
    assert traces(vlm) == []
