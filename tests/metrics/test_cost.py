"""Counted operations equal closed forms, on single products and on tiny models.

Skipped blocks count nothing, masked weights all.
"""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.reference import GENERATION, case
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions.edits import mask_weights
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.methods import pruning
from xlvlms_tutorial.metrics.cost import count_flops, decoder_flops
from xlvlms_tutorial.models import anatomy

L, STEPS = 4, 3


@pytest.fixture(scope="module")
def llava():
    return tiny_llava(layers=L)


@pytest.fixture(scope="module")
def batch(llava):
    return llava.batch(
        [Image.new("RGB", (32, 32), "red")] * 2,
        ["What colour is the key ?", "Describe the picture ."],
    )


def counted(vlm, batch):
    """Operations of a generation by (phase, part)."""
    run = lambda: vlm.generate_ids(batch, STEPS, min_new_tokens=STEPS)
    table = count_flops(run, anatomy.parts(vlm.model), anatomy.decoder(vlm.model))
    return table.set_index(["phase", "part"])["flops"]


@pytest.fixture(scope="module")
def dense(llava, batch):
    return counted(llava, batch)


def total(call, **options):
    table = count_flops(call, **options).set_index("part")["flops"]
    assert table["total"] == table.drop("total").sum()
    return table["total"]


def shapes(vlm, batch):
    config = vlm.model.config.text_config
    return {
        "layers": L,
        "width": config.hidden_size,
        "hidden": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "vocabulary": config.vocab_size,
        "batch": len(batch["input_ids"]),
    }


# Single products


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_a_linear_map_takes_two_operations_a_weight_and_position(b, t, n, m, bias, half):
    dtype = torch.bfloat16 if half else torch.float32
    linear, states = nn.Linear(n, m, bias=bias, dtype=dtype), torch.randn(b, t, n, dtype=dtype)
    with torch.no_grad():
        assert total(lambda: linear(states)) == 2 * b * t * n * m
    assert total(lambda: linear(states[0, 0])) == 2 * n * m
    # strides that no single product can take
    assert total(lambda: linear(states.transpose(0, 1))) == 2 * b * t * n * m
    with torch.inference_mode():
        assert total(lambda: linear(states)) == 2 * b * t * n * m


def test_products_with_vectors_are_counted():
    matrix, vector = torch.randn(5, 7), torch.randn(7)
    assert total(lambda: matrix @ vector) == 2 * 5 * 7
    assert total(lambda: vector @ vector) == 2 * 7
    assert total(lambda: torch.addmv(torch.randn(5), matrix, vector)) == 2 * 5 * 7


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution(groups):
    conv = nn.Conv2d(4, 6, 3, stride=2, groups=groups)
    with torch.no_grad():
        assert total(lambda: conv(torch.randn(2, 4, 9, 9))) == 2 * 2 * 6 * 4 * 4 * (4 // groups) * 9
    assert total(lambda: nn.Conv1d(3, 5, 2)(torch.randn(1, 3, 8))) == 2 * 5 * 7 * 3 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask_kind", ["plain", "causal", "masked"])
def test_attention_is_counted_on_a_cpu_too(dtype, grad, kv_heads, mask_kind):
    q, k, v = (
        torch.randn(2, heads, t, 8, dtype=dtype)
        for heads, t in ((4, 5), (kv_heads, 7), (kv_heads, 7))
    )
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "masked": {"attn_mask": torch.zeros(2, 1, 5, 7, dtype=dtype)},
    }[mask_kind]
    with torch.set_grad_enabled(grad):
        assert total(
            lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        ) == 2 * 2 * 4 * 5 * 7 * (8 + 8)


def test_gradients_through_attention_take_five_products():
    q, k, v = (torch.randn(1, 2, t, 8, requires_grad=True) for t in (3, 5, 5))
    forward = total(lambda: F.scaled_dot_product_attention(q, k, v))
    assert (
        total(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
        == forward + 5 * 2 * 2 * 3 * 5 * 8
    )


def test_products_of_experts_count_each_row_once():
    rows, weights = (
        torch.randn(6, 8, dtype=torch.bfloat16),
        torch.randn(2, 8, 16, dtype=torch.bfloat16),
    )
    offsets = torch.tensor([2, 6], dtype=torch.int32)
    assert total(lambda: F.grouped_mm(rows, weights, offs=offsets)) == 2 * 6 * 8 * 16
    import transformers.integrations.moe  # noqa: F401  registers the operator

    fallback = torch.ops.transformers.grouped_mm_fallback
    assert total(lambda: fallback(rows.float(), weights.float(), offsets)) == 2 * 6 * 8 * 16


def test_an_operator_without_a_formula_is_refused_by_name():
    a = torch.randint(-5, 5, (32, 32), dtype=torch.int8)
    with pytest.raises(InputError, match=r"aten\._int_mm"):
        count_flops(lambda: torch._int_mm(a, a))


# Parts and phases


def test_work_goes_to_the_innermost_part_that_runs():
    inner, outer = nn.Linear(2, 3), nn.Sequential(nn.Linear(5, 2))
    outer.append(inner)
    alone = nn.Linear(3, 7)
    table = count_flops(
        lambda: alone(outer(torch.randn(1, 5))),
        {"inner": inner, "outer": outer, "idle": [nn.Linear(1, 1)]},
    )
    assert table.columns.tolist() == ["phase", "part", "flops"]
    assert set(table["phase"]) == {"both"}
    counts = {"inner": 2 * 2 * 3, "outer": 2 * 5 * 2, "idle": 0, "rest": 2 * 3 * 7}
    assert table.set_index("part")["flops"].to_dict() == counts | {"total": sum(counts.values())}


def test_generation_of_tiny_llava_equals_the_closed_form(llava, batch, dense):
    counts, prompt = dense, batch["input_ids"].shape[1]
    prefill = decoder_flops(prompt, **shapes(llava, batch))
    steps = [decoder_flops(1, cached=prompt + k, **shapes(llava, batch)) for k in range(STEPS - 1)]
    decode = {part: sum(step[part] for step in steps) for part in prefill}
    for phase, due in (("prefill", prefill), ("decode", decode)):
        assert counts[phase, "attention"] == due["attention_projections"] + due["attention_scores"]
        assert (counts[phase, "mlp"], counts[phase, "unembedding"]) == (
            due["mlp"],
            due["unembedding"],
        )
        assert counts[phase, "rest"] == 0
    assert counts["decode", "total"] == decode["total"]
    assert counts["decode", "tower"] == counts["decode", "connector"] == 0
    assert (
        counts["prefill", "total"]
        == prefill["total"] + counts["prefill", "tower"] + counts["prefill", "connector"]
    )
    vision = llava.model.config.vision_config
    assert counts["prefill", "connector"] == 2 * 2 * 4 * (
        vision.hidden_size * llava.width + llava.width**2
    )


def test_eager_attention_and_torchs_own_counter_agree(llava, batch, dense):
    llava.model.set_attn_implementation("eager")
    try:
        eager = counted(llava, batch)
        with FlopCounterMode(display=False) as counter:
            llava.generate_ids(batch, STEPS, min_new_tokens=STEPS)
    finally:
        llava.model.set_attn_implementation("sdpa")
    assert dense.equals(eager)
    assert dense["prefill", "total"] + dense["decode", "total"] == counter.get_total_flops()


@pytest.mark.parametrize("name", ["llava", "blip2", "mllama"])
def test_the_phases_of_a_generation_are_those_of_one_and_of_more_steps(name):
    example = case(name)
    parts, decoder = anatomy.parts(example.vlm.model), anatomy.decoder(example.vlm.model)

    def run(steps):
        example.vlm.generate_ids(
            example.batch, **GENERATION | {"max_new_tokens": steps, "min_new_tokens": steps}
        )

    first = count_flops(lambda: run(1), parts).set_index("part")["flops"]
    whole = count_flops(lambda: run(3), parts).set_index("part")["flops"]
    apart = count_flops(lambda: run(3), parts, decoder).pivot(
        index="part", columns="phase", values="flops"
    )
    assert (apart["prefill"] == first[apart.index]).all()
    assert (apart["decode"] == (whole - first)[apart.index]).all()
    # the tower of a second generation belongs to its prefill, the unembedding
    # before it to the first one's decode
    twice = count_flops(lambda: (run(3), run(3)), parts, decoder).pivot(
        index="part", columns="phase", values="flops"
    )
    assert (twice == 2 * apart).all(axis=None)
    if name == "llava":
        assert (
            count_flops(lambda: run(1), parts, decoder)
            .query("phase == 'decode'")["flops"]
            .eq(0)
            .all()
        )


def test_a_model_that_a_capture_stops_leaves_the_parts_in_order(llava, batch):
    parts = anatomy.parts(llava.model)
    table = count_flops(
        lambda: (read(llava, batch, layers=[1]), nn.Linear(3, 5)(torch.randn(1, 3))), parts
    )
    assert table.set_index("part")["flops"]["rest"] == 2 * 3 * 5

    def stopped():
        with suppress(ZeroDivisionError):
            nn.Sequential(nn.Linear(3, 5), broken)(torch.randn(1, 3))
        nn.Linear(3, 5)(torch.randn(1, 3))

    broken = nn.Linear(5, 5)
    broken.register_forward_hook(lambda *_: 1 // 0)
    counts = count_flops(stopped, {"broken": broken}).set_index("part")["flops"].to_dict()
    assert counts == {"broken": 50, "rest": 60, "total": 110}
    assert len(broken._forward_hooks) == 1
    assert not broken._forward_pre_hooks


# What saves, and what does not


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_half_of_the_blocks_count_half(llava, batch, dense, phase):
    with skip(llava, [2, 4]):
        half = counted(llava, batch)
    for part in ("attention", "mlp"):
        assert half[phase, part] * 2 == dense[phase, part] > 0
    for part in ("tower", "connector", "unembedding", "rest"):
        assert half[phase, part] == dense[phase, part]


def test_skipping_mlps_or_one_phase_takes_only_that(llava, batch, dense):
    with skip(llava, [1, 3], "mlp"):
        counts = counted(llava, batch)
    assert counts["prefill", "mlp"] * 2 == dense["prefill", "mlp"]
    assert counts["prefill", "attention"] == dense["prefill", "attention"]
    with skip(llava, [1, 2], scope="decode"):
        counts = counted(llava, batch)
    assert counts["prefill", "total"] == dense["prefill", "total"]
    assert counts["decode", "mlp"] * 2 == dense["decode", "mlp"]


def test_masks_take_nothing_off(llava, batch, dense):
    masks = pruning.random_masks(llava, 0.75, seed=0)
    with mask_weights(llava, masks.tensors(llava)):
        assert counted(llava, batch).equals(dense)


# The closed form


def test_closed_form_of_llama_of_seven_billions():
    """Twice the weights that multiply, a token.

    6.6 of the 6.7 billion parameters, without scores.
    """
    counts = decoder_flops(1, layers=32, width=4096, hidden=11008, heads=32, vocabulary=32000)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert counts["total"] - counts["attention_scores"] == 2 * weights == 2 * 6_607_077_376
    assert counts["attention_scores"] == 32 * 4 * 4096


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_closed_form_is_additive(tokens, cached, batch, layers, gated):
    same = {
        "width": 8,
        "hidden": 12,
        "heads": 4,
        "kv_heads": 2,
        "vocabulary": 10,
        "logits": 0,
        "gated": gated,
    }
    whole = decoder_flops(tokens + 1, cached=cached, layers=layers, batch=batch, **same)
    assert sum(whole.values()) == 2 * whole["total"]
    single = decoder_flops(tokens + 1, cached=cached, layers=1, **same)
    assert whole == {part: batch * layers * flops for part, flops in single.items()}
    # prefill in two pieces: the first piece does not look at the second
    parts = [
        decoder_flops(n, cached=c, layers=1, **same)
        for n, c in ((tokens, cached), (1, cached + tokens))
    ]
    gone = {part: single[part] - sum(piece[part] for piece in parts) for part in single}
    assert gone["attention_scores"] == 4 * tokens * 1 * 8 == gone["total"]


def test_head_size_may_differ_from_width_over_heads():
    counts = decoder_flops(3, layers=1, width=10, hidden=4, heads=3, head_size=8, gated=False)
    due = {
        "attention_projections": 3 * 2 * 10 * 8 * 12,
        "attention_scores": 2 * 2 * 3 * 3 * 24,
        "mlp": 3 * 2 * 2 * 40,
        "unembedding": 0,
    }
    assert counts == due | {"total": sum(due.values())}


# Bad input


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"batch": 0}, "batch=0"),
        ({"cached": -1}, "cached=-1"),
        ({"heads": True}, "heads=True"),
        ({"heads": 3}, "3 heads"),
        ({"kv_heads": 3}, "3 kv_heads"),
        ({"head_size": 0}, "head_size=0"),
        ({"logits": -1}, "logits=-1"),
    ],
)
def test_sizes_that_are_none_are_refused(size, problem):
    with pytest.raises(InputError, match=problem):
        decoder_flops(**{"tokens": 1, "layers": 1, "width": 8, "hidden": 4, "heads": 4} | size)


def test_what_cannot_be_counted_is_refused(llava, batch):
    linear = nn.Linear(2, 2)
    parts, states = {"a": linear}, torch.ones(1, 2)
    with pytest.raises(InputError, match="found 0"):
        count_flops(lambda: states + 1)
    with pytest.raises(InputError, match="calls of the decoder"):
        count_flops(lambda: linear(states), parts, decoder=anatomy.decoder(llava.model))
    with pytest.raises(InputError, match="'a' and in 'b'"):
        count_flops(lambda: linear(states), parts | {"b": [linear]})
    for part, modules in (("rest", linear), ("total", linear), ("none", [])):
        with pytest.raises(InputError, match=part):
            count_flops(lambda: linear(states), {part: modules})


def test_nothing_is_left_behind_when_the_call_fails(llava):
    with pytest.raises(ZeroDivisionError):
        count_flops(lambda: 1 / 0, anatomy.parts(llava.model), anatomy.decoder(llava.model))
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in llava.model.model.language_model.modules()
    )
