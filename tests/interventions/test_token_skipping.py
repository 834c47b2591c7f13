"""MLPs left out at some positions.

Equal to zeroing their output there by hand, computed for the others alone, drawn by seed.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.reference import apart, case, changed, experts_beside, generated, traces, whole
from tests.zoo import MODELS, SUPPRESS
from xlvlms_tutorial.errors import (
    AnatomyError,
    InputError,
    InterventionError,
    LayerError,
    SpanError,
)
from xlvlms_tutorial.interventions.edits import fold
from xlvlms_tutorial.interventions.skipping import parallel, skip
from xlvlms_tutorial.interventions.token_skipping import skip_tokens
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS


@pytest.fixture(scope="module")
def llava():
    return case("llava")


@pytest.fixture(scope="module")
def opt():
    return case("blip2")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llava, opt):
    yield
    assert traces(llava.vlm) == traces(opt.vlm) == []


def positions_of(example, *names):
    return torch.isin(example.batch.spans, torch.tensor([SPANS.index(name) for name in names]))


def zeroed(example, layer, mask):
    """The MLP's output set to zero at these positions of the prompt."""
    change = lambda x, y, p: torch.where(
        nn.functional.pad(mask, (0, y.shape[1] - mask.shape[1]))[..., None], 0, y
    )
    return changed(anatomy.mlp(example.vlm.blocks[layer - 1]), change)


def drawn_mask(example, **options):
    """Where a context skips, seen by what comes out of the MLP of layer 2 (a first linear map
    without bias gives 0 for no state).
    """
    outputs = []
    hook = anatomy.mlp(example.vlm.blocks[1]).register_forward_hook(
        lambda module, args, output: outputs.append(output.clone())
    )
    try:
        with skip_tokens(example.vlm, 2, **options):
            example.vlm.forward(example.batch)
    finally:
        hook.remove()
    return (outputs[0] == 0).all(dim=-1)


def mlp_flops(example, **options):
    example.vlm.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, skip_tokens(example.vlm, [1, 2], **options):
        example.vlm.forward(example.batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_all_of_a_span_is_zeroing_the_mlps_there_by_hand(name):
    example = case(name)
    span = example.modality or "question"
    if any(map(experts_beside, example.vlm.blocks)):  # no single module gets all of the positions
        with (
            pytest.raises(AnatomyError, match="single MLP"),
            skip_tokens(example.vlm, [1, 3], span=span),
        ):
            pass
        return
    with skip_tokens(example.vlm, [1, 3], span=span):
        new, logits = generated(example)
    with (
        zeroed(example, 1, positions_of(example, span)),
        zeroed(example, 3, positions_of(example, span)),
    ):
        assert apart(logits, whole(example, new)) < 1e-4
    assert apart(logits, generated(example)[1]) > 1e-3 and traces(example.vlm) == []


@pytest.mark.parametrize("name", ["llava", "opt"])
def test_all_positions_are_the_mlp_skipped_in_the_prefill(request, name):
    example = request.getfixturevalue(name)
    with skip_tokens(
        example.vlm, [1, 2], span=torch.ones_like(example.batch.spans, dtype=torch.bool)
    ):
        new, logits = generated(example)
    with skip(example.vlm, [1, 2], "mlp", "prefill"):
        same, others = generated(example)
    assert torch.equal(new, same) and torch.equal(logits, others)


@pytest.mark.parametrize("name", ["llava", "opt"])
@pytest.mark.parametrize("options", [{"share": 0.0}, {"n_tokens": 0}, {"share": 0.1}])
def test_no_position_is_no_change_to_the_bit(request, name, options):
    example = request.getfixturevalue(name)
    dense = generated(example)[1]
    with skip_tokens(example.vlm, [1, 2, 3], **options):  # a tenth of four positions is none
        assert torch.equal(generated(example)[1], dense)


@pytest.mark.parametrize("name", ["llava", "opt"])
def test_only_the_other_positions_are_computed(request, name):
    example = request.getfixturevalue(name)
    maps = [module for layer in (1, 2) for module in _mlp_maps(example.vlm.blocks[layer - 1])]
    per_token = sum(2 * linear.in_features * linear.out_features for linear in maps)
    n = int(positions_of(example, "image").sum())
    full = mlp_flops(example, share=0.0)
    assert full - mlp_flops(example) == per_token * n
    assert full - mlp_flops(example, share=0.5) == per_token * (n // 2)
    assert full - mlp_flops(example, n_tokens=1) == per_token * 2  # one in each of two rows


def _mlp_maps(block):
    if anatomy.mlp_entry(block) is not anatomy.mlp(block):
        return [block.fc1, block.fc2]
    return [module for module in anatomy.mlp(block).modules() if isinstance(module, nn.Linear)]


def test_generated_tokens_have_their_mlps(llava):
    calls = []
    hook = llava.vlm.blocks[0].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: calls.append(args[0].shape[1])
    )
    try:
        with skip_tokens(llava.vlm, 1):
            llava.vlm.generate_ids(llava.batch, 3, min_new_tokens=3, suppress_tokens=SUPPRESS)
    finally:
        hook.remove()
    assert calls == [int((~positions_of(llava, "image")).sum()), 1, 1]


def test_without_a_cache_and_with_beams_the_same_is_skipped(llava):
    with skip_tokens(llava.vlm, [1, 3], 0.5):
        cached, logits = generated(llava)
        anew, others = generated(llava, use_cache=False)
        beams = generated(llava, num_beams=2, num_return_sequences=1)[0]
        best = generated(llava, num_beams=2, num_return_sequences=1, use_cache=False)[0]
    assert torch.equal(cached, anew) and apart(others, logits) < 1e-5
    assert torch.equal(beams, best)


@given(share=st.floats(0, 1), seed=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_a_share_of_each_sample_is_drawn_and_a_smaller_one_within_it(llava, share, seed):
    image = positions_of(llava, "image")
    mask = drawn_mask(llava, share=share, seed=seed)
    assert not (mask & ~image).any()
    assert mask.sum(dim=1).tolist() == [int(share * n + 0.5) for n in image.sum(dim=1).tolist()]
    assert not (drawn_mask(llava, share=share / 2, seed=seed) & ~mask).any()
    assert torch.equal(mask, drawn_mask(llava, share=share, seed=seed))


def test_seeds_and_rows_draw_differently_and_layers_the_same(llava):
    both = {"span": ("image", "question"), "n_tokens": 3}
    draws = {tuple(drawn_mask(llava, seed=seed, **both).flatten().tolist()) for seed in range(6)}
    assert len(draws) > 3
    with skip_tokens(llava.vlm, [1, 2], seed=3, **both):
        together = llava.vlm.forward(llava.batch).logits
    with (
        skip_tokens(llava.vlm, 1, seed=3, **both),
        skip_tokens(llava.vlm, 2, seed=3, **both),
    ):
        assert torch.equal(llava.vlm.forward(llava.batch).logits, together)


@pytest.mark.parametrize("name", ["llava", "opt"])
def test_nested_ones_skip_what_any_of_them_does(request, name):
    example = request.getfixturevalue(name)
    with skip_tokens(example.vlm, [1, 2], span=("image", "question")):
        expected = example.vlm.forward(example.batch).logits
    with (
        skip_tokens(example.vlm, 1, span="question"),
        skip_tokens(example.vlm, 2, span=("image", "question")),
    ):
        with skip_tokens(example.vlm, 1):
            assert torch.equal(example.vlm.forward(example.batch).logits, expected)
        assert apart(example.vlm.forward(example.batch).logits, expected) > 1e-3


@pytest.mark.parametrize("name", ["llava", "opt"])
@pytest.mark.parametrize("norm", ["first", "second"])
def test_it_nests_with_parallel_and_skip_in_any_order(request, name, norm):
    example = request.getfixturevalue(name)
    with parallel(example.vlm, 2, norm), zeroed(example, 2, positions_of(example, "image")):
        by_hand = example.vlm.forward(example.batch).logits
    with parallel(example.vlm, 2, norm), skip_tokens(example.vlm, 2):
        first = example.vlm.forward(example.batch).logits
    with skip_tokens(example.vlm, 2), parallel(example.vlm, 2, norm):
        second = example.vlm.forward(example.batch).logits
    assert torch.equal(first, second) and apart(first, by_hand) < 1e-5
    for part in ("mlp", "block"):
        with skip(example.vlm, 2, part):
            expected = example.vlm.forward(example.batch).logits
        with (
            skip(example.vlm, 2, part),
            skip_tokens(example.vlm, 2),
            skip(example.vlm, 2, part),
        ):
            assert torch.equal(example.vlm.forward(example.batch).logits, expected)


def test_each_batch_has_its_own_draw(llava):
    vlm, batch = llava.vlm, llava.batch
    second_batch = vlm.prepare(
        {name: value[1:] if name != "pixel_values" else value[:1] for name, value in batch.items()}
    )
    with skip_tokens(vlm, 1):
        vlm.forward(batch)
        logits = vlm.forward(second_batch).logits
    with skip_tokens(vlm, 1):
        assert torch.equal(vlm.forward(second_batch).logits, logits)


def test_gradients_pass_through_the_others(llava):
    vlm = llava.vlm
    weight = vlm.blocks[1].mlp.down_proj.weight
    weight.requires_grad_(True)
    try:
        with skip_tokens(vlm, 2), vlm.run(llava.batch):
            ours = torch.autograd.grad(vlm.model(**llava.batch).logits.square().sum(), weight)[0]
        with zeroed(llava, 2, positions_of(llava, "image")):
            by_hand = torch.autograd.grad(vlm.model(**llava.batch).logits.square().sum(), weight)[0]
    finally:
        weight.requires_grad_(False)
    assert apart(ours, by_hand) < 1e-4


def test_it_is_recorded(llava):
    with skip_tokens(llava.vlm, [1, 2], 0.5, seed=7):
        assert llava.vlm.active == [
            "skip_tokens(layers=[1, 2], share=0.5, span='image', seed=7, n_tokens=None)"
        ]


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"share": -0.1}, InputError, "share -0.1 of the positions.*0 to 1"),
        ({"share": 1.5}, InputError, "share 1.5"),
        ({"share": float("nan")}, InputError, "share nan"),
        ({"n_tokens": -1}, InputError, "n_tokens -1"),
        ({"n_tokens": 2, "share": 0.5}, InputError, "n_tokens 2 with share 0.5"),
        ({"span": "picture"}, SpanError, "picture.*image"),
        ({"span": ()}, SpanError, "no kind named"),
        ({"layers": 4}, LayerError, "layer 4 is not one of 1 to 3"),
        ({"layers": 0}, LayerError, "layer 0"),
    ],
)
def test_wrong_arguments_are_told_on_entry(llava, options, error, message):
    with pytest.raises(error, match=message), skip_tokens(llava.vlm, **{"layers": 1} | options):
        pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"span": "audio"}, SpanError, "this model takes none"),
        ({"span": "answer"}, SpanError, "2 of 2 samples have none"),
        ({"n_tokens": 99}, InputError, "99 positions of row 0.*which has"),
        ({"span": torch.ones(2, 3, dtype=torch.bool)}, InterventionError, "rows of 3 tokens"),
        ({"span": torch.ones(3, 13, dtype=torch.bool)}, InterventionError, "span for"),
    ],
)
def test_what_the_batch_does_not_have_is_told_when_it_runs(llava, options, error, message):
    if isinstance(options.get("span"), torch.Tensor) and len(options["span"]) == 3:
        options = {"span": torch.ones(3, llava.length, dtype=torch.bool)}
    with pytest.raises(error, match=message), skip_tokens(llava.vlm, 1, **options):
        llava.vlm.forward(llava.batch)


def test_a_picture_by_cross_attention_has_no_positions():
    example = case("mllama")
    with pytest.raises(SpanError, match="cross-attention"), skip_tokens(example.vlm, 1):
        example.vlm.forward(example.batch)


def test_inputs_whose_spans_are_not_known(llava):
    with (
        pytest.raises(InterventionError, match="unknown inputs.*vlm.forward"),
        skip_tokens(llava.vlm, 1),
    ):
        llava.vlm.model(**llava.batch)


def test_a_prompt_in_chunks_is_refused(llava):
    with (
        pytest.raises(InterventionError, match="whole prompt at once"),
        skip_tokens(llava.vlm, 1),
        llava.vlm.run(llava.batch),
    ):
        anatomy.decoder(llava.vlm.model)(inputs_embeds=torch.zeros(2, 3, llava.vlm.width))


def test_a_folded_layer_is_refused_and_none_is_folded_meanwhile(llava):
    vector = torch.ones(llava.vlm.width)
    with (
        fold(llava.vlm, vector, 1),
        pytest.raises(InterventionError, match="folded"),
        skip_tokens(llava.vlm, 1),
    ):
        pass
    with skip_tokens(llava.vlm, 1), pytest.raises(InterventionError), fold(llava.vlm, vector, 1):
        pass
