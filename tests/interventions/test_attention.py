"""Attention that is cut.

Equal to attention by explicit loops in float64, and refused where a row would be left empty.
"""

import math

import pytest
import torch
from torch import nn

from tests.contract.reference import agree, case, differ, generated, traces
from tests.support.tiny import tiny_llava
from tests.zoo import SUPPRESS
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InterventionError, LayerError, SpanError
from xlvlms_tutorial.interventions.attention import knock_out
from xlvlms_tutorial.interventions.replay import Resumable
from xlvlms_tutorial.models import anatomy

LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def llava():
    return case("llava")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llava):
    yield
    assert traces(llava.vlm) == []


def watched(module, calls):
    """Record what an attention is called with and what it gives."""
    return module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append(
            (anatomy.states_in(args, kwargs), kwargs, output[0])
        ),
        with_kwargs=True,
    )


def by_loops(module, states, rotary, padding, queries, keys):
    """Grouped-query attention with rotary positions, score by score.

    A query i sees key j if j <= i, j is no padding, and not both i in ``queries`` and j in
    ``keys``. Rows of padding are left at 0.
    """
    rows, length, _ = states.shape
    width, groups = module.head_dim, module.num_key_value_groups
    heads = {}
    for name, linear in (("q", module.q_proj), ("k", module.k_proj), ("v", module.v_proj)):
        heads[name] = (states @ linear.weight.T).view(rows, length, -1, width)
    cos, sin = (part.expand(rows, -1, -1)[:, :, None] for part in rotary)
    for name in "qk":
        one, two = heads[name].chunk(2, dim=-1)
        heads[name] = heads[name] * cos + torch.cat([-two, one], dim=-1) * sin
    mixed = torch.zeros_like(heads["q"])
    for b in range(rows):
        for i in range(length):
            visible = []
            for j in range(i + 1):
                if not padding[b, j] and not (queries[b, i] and keys[b, j]):
                    visible.append(j)
            for h in range(heads["q"].shape[2] if visible else 0):
                scores = [
                    float(heads["q"][b, i, h] @ heads["k"][b, j, h // groups]) / math.sqrt(width)
                    for j in visible
                ]
                total = sum(map(math.exp, scores))
                for j, score in zip(visible, scores, strict=True):
                    weight = math.exp(score) / total
                    mixed[b, i, h] += weight * heads["v"][b, j, h // groups]
    return mixed.reshape(rows, length, -1) @ module.o_proj.weight.T


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("spans", [("last", "image"), ("question", "image"), ("random", "random")])
def test_a_cut_attention_is_that_of_explicit_loops_in_float64(kind, spans):
    vlm = tiny_llava()
    vlm.model.set_attn_implementation(kind)
    if kind == "sdpa":  # eager attention computes its softmax in float32 whatever it gets
        vlm.model.double()
    tolerance = 1e-9 if kind == "sdpa" else 1e-5
    picture = torch.rand(3, 32, 32).numpy()
    batch = vlm.batch([picture] * 2, ["what is it", "is there a red key on the left"])
    padding = batch["attention_mask"] == 0
    masks = {"last": batch.predicting, "image": batch.mask("image")}
    masks["question"] = batch.mask("question")
    drawn = torch.rand(batch.spans.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    masks["random"] = drawn
    queries, keys = masks[spans[0]], masks[spans[1]]
    if spans[0] == "random":
        keys = ~drawn  # each position keeps itself
    calls = []
    module = anatomy.attention(vlm.blocks[1])
    with watched(module, calls), knock_out(vlm, queries, keys, 2):
        vlm.forward(batch)
    ((states, kwargs, output),) = calls
    module.double()
    states, output = states.double(), output.double()
    expected = by_loops(module, states, kwargs["position_embeddings"], padding, queries, keys)
    torch.testing.assert_close(output[~padding], expected[~padding], rtol=tolerance, atol=tolerance)
    plain = by_loops(module, states, kwargs["position_embeddings"], padding, queries & False, keys)
    assert (plain - expected)[queries & ~padding].abs().max() > 1e-3


def test_names_are_the_masks_that_they_stand_for(llava):
    by_name, batch = {}, llava.batch
    for name, mask in (("last", batch.predicting), ("image", batch.mask("image"))):
        by_name[name] = mask
    with knock_out(llava.vlm, "last", "image", LAYERS):
        named = llava.vlm.forward(batch).logits
    with knock_out(llava.vlm, by_name["last"], by_name["image"], LAYERS):
        masked = llava.vlm.forward(batch).logits
    with knock_out(llava.vlm, lambda b: b.predicting, lambda b: b.mask("image"), LAYERS):
        computed = llava.vlm.forward(batch).logits
    assert torch.equal(named, masked) and torch.equal(named, computed)
    differ(named, llava.vlm.forward(batch).logits, "the picture")


def test_generated_tokens_are_cut_where_the_name_says_so(llava):
    plain = generated(llava)[1]
    with knock_out(llava.vlm, "generated", "image", LAYERS):
        later = generated(llava)[1]
    assert torch.equal(later[:, 0], plain[:, 0])
    differ(later[:, 1:], plain[:, 1:], "generated")
    with knock_out(llava.vlm, llava.batch.predicting, "image", LAYERS):
        first = generated(llava)[1]
    with knock_out(llava.vlm, "last", "image", LAYERS):
        always = generated(llava)[1]
    assert torch.equal(first[:, 0], always[:, 0])
    differ(first[:, 1:], always[:, 1:], "a mask ends with the prompt")


def test_what_is_not_cut_stays_to_the_bit_and_blocks_below_too(llava):
    plain = read(llava.vlm, llava.batch, "all")
    with knock_out(llava.vlm, "last", "image", 2):
        cut = read(llava.vlm, llava.batch, "all")
    assert torch.equal(cut[1, "resid_post"], plain[1, "resid_post"])
    assert torch.equal(cut[3, "resid_post"][:, :-1], plain[3, "resid_post"][:, :-1])
    differ(cut[2, "resid_post"][:, -1], plain[2, "resid_post"][:, -1], "the last position")


def test_nested_cuts_add_up(llava):
    half = llava.batch.mask("image") & (torch.arange(llava.length) % 2 == 0)
    rest = llava.batch.mask("image") & ~half
    with knock_out(llava.vlm, "last", half, [2, 3]), knock_out(llava.vlm, "last", rest, [2, 3]):
        nested = generated(llava)[1]
    with knock_out(llava.vlm, "last", "image", [2, 3]):
        together = generated(llava)[1]
    agree(nested, together, "nested")


def test_beams_follow_their_sample(llava):
    search = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": SUPPRESS}
    mask = llava.batch.predicting.clone()
    mask[0] = False
    clean = llava.vlm.generate_ids(llava.batch, **search)
    with knock_out(llava.vlm, mask, "image", LAYERS):
        second = llava.vlm.generate_ids(llava.batch, **search)
    assert torch.equal(second[0], clean[0])
    with knock_out(llava.vlm, "last", "image", LAYERS):
        cached = llava.vlm.generate_ids(llava.batch, **search)
        assert torch.equal(cached, llava.vlm.generate_ids(llava.batch, use_cache=False, **search))


def test_a_resumed_pass_is_cut_like_a_whole_one(llava):
    run = Resumable(llava.vlm, llava.batch)
    states = run.read(1)
    with knock_out(llava.vlm, "last", "image", [2, 3]):
        expected = read(llava.vlm, llava.batch, 3, positions="last")[3, "resid_post"]
    cut = knock_out(llava.vlm, "last", "image", [2, 3])
    result = run.read(3, "last", start=1, states=states, change=cut)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_an_unpadded_prompt_without_a_mask_is_cut_too():
    vlm = tiny_llava()
    batch = vlm.batch([torch.rand(3, 32, 32).numpy()], ["what is it"])
    results = []
    for kind in ("eager", "sdpa"):
        vlm.model.set_attn_implementation(kind)
        with knock_out(vlm, "last", "image", LAYERS):
            results.append(vlm.forward(batch).logits)
        with knock_out(vlm, "last", "image", LAYERS), knock_out(vlm, "question", "image", 1):
            results.append(vlm.forward(batch).logits)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1], results[3], rtol=1e-4, atol=1e-5)
    differ(results[0], results[1], "the question")


def test_it_is_listed_while_in_force_and_stops_shared_prefixes(llava):
    with knock_out(llava.vlm, "last", "image", [1, 2]):
        (name,) = llava.vlm.active
    assert name == "knock_out(from_span='last', to_span='image', layers=[1, 2])"


def attempt(tiny, *arguments):
    """Run a forward under ``knock_out`` of these arguments."""
    with knock_out(tiny.vlm, *arguments):
        tiny.vlm.forward(tiny.batch)


@pytest.mark.parametrize("layers", [0, 4, [1, 9], True])
def test_layers_out_of_range_are_refused(llava, layers):
    with pytest.raises(LayerError, match="1 to 3"):
        attempt(llava, "last", "image", layers)


def test_positions_that_are_absent_or_unknown_are_refused(llava):
    with pytest.raises(InterventionError, match="unknown positions"):
        attempt(llava, "last", "picture", 1)
    with pytest.raises(SpanError, match="video"):
        attempt(llava, "last", "video", 1)
    other = torch.zeros(2, llava.length + 1, dtype=torch.bool)
    with pytest.raises(InterventionError, match="make them for this batch"):
        attempt(llava, "last", other, 1)
    with (
        pytest.raises(InterventionError, match="unknown inputs"),
        knock_out(llava.vlm, "last", "image", 1),
        torch.no_grad(),
    ):
        llava.vlm.model(**llava.batch)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_row_that_would_have_nothing_left_is_refused(llava, kind):
    llava.vlm.model.set_attn_implementation(kind)
    try:
        with pytest.raises(InterventionError, match="position 0 of row 0 would have nothing left"):
            attempt(llava, "all", "all", 1)
        with pytest.raises(InterventionError, match=f"position {llava.length - 1} of row 0"):
            attempt(llava, "last", ("image", "question"), 1)
        # two that leave something alone, and nothing together
        with (
            pytest.raises(InterventionError, match="nothing left"),
            knock_out(llava.vlm, "last", "image", 1),
        ):
            attempt(llava, "last", "question", 1)
    finally:
        llava.vlm.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("lfm2_vl", 1, "Lfm2ShortConv of layer 1 .* keeps a state"),
        ("qwen3_5", 1, "GatedDeltaNet of layer 1 .* keeps a state"),
        ("mllama", 2, "attends to the picture"),
    ],
)
def test_blocks_without_an_attention_to_the_sequence_are_refused_by_name(name, layer, reason):
    tiny = case(name)
    with pytest.raises(InterventionError, match=reason):
        attempt(tiny, "last", "question", layer)
    assert traces(tiny.vlm) == []


def test_another_attention_is_refused(llava, monkeypatch):
    config = anatomy.decoder(llava.vlm.model).config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(InterventionError, match="'flex_attention'.*eager, sdpa"):
        attempt(llava, "last", "image", 1)


def test_a_block_with_a_mixer_beside_its_attention_is_refused():
    tiny = case("llava")
    tiny.vlm.blocks[1].mamba = nn.Linear(4, 4)
    with pytest.raises(InterventionError, match="mamba beside it"):
        attempt(tiny, "last", "image", 2)
