"""Hooks that read: against transformers' own hidden states, the formulas of a block, and double
loops; lean, and always removed.
"""

import pytest
import torch
from PIL import Image

from tests.support.tiny import tiny_llava
from tests.zoo import SUPPRESS, build, padded
from xlvlms_tutorial.activations.hooks import computed, read, reading, span_mask, wanted
from xlvlms_tutorial.errors import (
    AnatomyError,
    DeviceMemoryError,
    InputError,
    LayerError,
    SpanError,
)
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

PICTURES = [
    Image.new("RGB", (32, 32), colour) for colour in ((10, 90, 200), (200, 30, 30), (0, 0, 0))
]
TEXTS = ["What colour ?", "Describe the picture .", "Is there a red key in the picture ?"]


@pytest.fixture(scope="module")
def vlm():
    return tiny_llava()


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.batch(PICTURES, TEXTS)


def hooks_left(vlm):
    """Of ours: transformers leaves some of its own once it was asked for hidden states."""
    hooks = [
        hook
        for m in vlm.model.modules()
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    return [hook for hook in hooks if "activations.hooks" in getattr(hook, "func", hook).__module__]


def test_hooks_of_a_reading_are_there_inside_it_only(vlm):
    with reading(vlm, "all", anatomy.SITES, stop=True):
        # the decoder, the model, layer 0, each site of each block
        assert len(hooks_left(vlm)) == 1 + 1 + 1 + 3 * 7
    assert not hooks_left(vlm)


def hidden_states(vlm, batch):
    return vlm.model(**batch, output_hidden_states=True).hidden_states


def test_layers_are_those_of_transformers_and_the_last_is_before_the_final_norm(vlm, batch):
    recorded, theirs = read(vlm, batch, "all"), hidden_states(vlm, batch)
    assert list(recorded) == [(layer, "resid_post") for layer in range(4)]
    for layer in range(3):
        assert torch.equal(recorded[layer, "resid_post"], theirs[layer])
    assert torch.equal(anatomy.final_norm(vlm.model)(recorded[3, "resid_post"]), theirs[3])


def test_a_padded_batch_gives_what_each_sample_gives_alone(vlm, batch):
    together = read(vlm, batch, "all")
    for row, (picture, text) in enumerate(zip(PICTURES, TEXTS, strict=True)):
        alone = read(vlm, vlm.batch([picture], [text]), "all")
        for key, states in alone.items():
            assert torch.allclose(together[key][row, -states.shape[1] :], states[0], atol=1e-5)


def test_the_sites_of_a_block_add_up_as_its_formula_says(vlm, batch):
    recorded = read(vlm, batch, "all", anatomy.SITES)
    for layer in (1, 2, 3):
        x, block = recorded[layer - 1, "resid_post"], vlm.blocks[layer - 1]
        outputs = {site: recorded[layer, site] for site in anatomy.SITES}
        assert torch.allclose(outputs["attn_in"], block.input_layernorm(x), atol=1e-6)
        assert torch.allclose(outputs["resid_mid"], x + outputs["attn_out"], atol=1e-6)
        assert torch.allclose(
            outputs["mlp_in"], block.post_attention_layernorm(outputs["resid_mid"]), atol=1e-6
        )
        hidden = torch.nn.functional.silu(
            block.mlp.gate_proj(outputs["mlp_in"])
        ) * block.mlp.up_proj(outputs["mlp_in"])
        assert torch.allclose(outputs["mlp_hidden"], hidden, atol=1e-6)
        assert torch.allclose(outputs["mlp_out"], block.mlp.down_proj(hidden), atol=1e-6)
        assert torch.allclose(
            outputs["resid_post"], x + outputs["attn_out"] + outputs["mlp_out"], atol=1e-6
        )


def test_opt_puts_its_mlp_in_one_row_and_is_read_by_position():
    model, inputs = build("blip2")
    vlm = VLM(model, None, "blip2")
    batch = vlm.prepare(padded("blip2", inputs))
    recorded = read(vlm, batch, "all", anatomy.SITES)
    middle, out = recorded[2, "resid_mid"], recorded[2, "resid_post"]
    assert middle.shape == out.shape == recorded[2, "mlp_out"].shape == (2, 12, 32)
    assert recorded[2, "mlp_hidden"].shape == (2, 12, 64)
    assert torch.allclose(middle + recorded[2, "mlp_out"], out, atol=1e-6)
    with reading(vlm, 2, ("mlp_out", "mlp_hidden")) as beams:
        vlm.generate_ids(batch, 3, num_beams=2, suppress_tokens=SUPPRESS)
    assert [states.shape for states in beams[2, "mlp_hidden"]] == [
        (4, 12, 64),
        (4, 1, 64),
        (4, 1, 64),
    ]
    words = batch["attention_mask"].bool()  # what stands at padding depends on the kernel
    assert torch.allclose(
        beams[2, "mlp_out"][0][::2][words], recorded[2, "mlp_out"][words], atol=1e-4
    )


def loops(states, mask, reduce):
    """Mean or last of the states where the mask is true, a sample at a time."""
    rows = []
    for sample, sample_mask in zip(states.double(), mask, strict=True):
        selected = [sample[k] for k in range(len(sample_mask)) if sample_mask[k]]
        rows.append(sum(selected) / len(selected) if reduce == "mean" else selected[-1])
    return torch.stack(rows)


@pytest.mark.parametrize("reduce", ["mean", "last"])
@pytest.mark.parametrize("span", ["all", "image", ("image", "question"), "last"])
def test_reductions_are_double_loops_over_the_positions(vlm, batch, span, reduce):
    mask = (
        batch["attention_mask"].bool()
        if span == "all"
        else torch.zeros_like(batch["attention_mask"]).bool()
    )
    if span == "last":
        mask[:, -1] = True
    elif span != "all":
        mask = batch.mask(*([span] if isinstance(span, str) else span))
    recorded, theirs = (
        read(vlm, batch, (0, 2), positions=span, reduce=reduce),
        read(vlm, batch, (0, 2)),
    )
    for key, states in recorded.items():
        assert states.shape == (3, 32)
        assert torch.allclose(states.double(), loops(theirs[key], mask, reduce), atol=1e-6)


def test_a_mask_with_gaps_is_read_row_by_row(vlm, batch):
    mask = torch.rand(batch.spans.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[1] = False
    mask[0, :2] = True
    whole = read(vlm, batch, 2)[2, "resid_post"]
    assert torch.equal(read(vlm, batch, 2, positions=mask)[2, "resid_post"], whole[mask])
    mask[1, [0, 5]] = True
    for reduce in ("mean", "last"):
        reduced = read(vlm, batch, 2, positions=mask, reduce=reduce)[2, "resid_post"]
        assert torch.allclose(reduced.double(), loops(whole, mask, reduce), atol=1e-6)


def test_last_is_the_last_column(vlm, batch):
    assert torch.equal(
        read(vlm, batch, 1, positions="last")[1, "resid_post"],
        read(vlm, batch, 1)[1, "resid_post"][:, -1:],
    )


def test_nan_outside_the_positions_does_not_reach_a_mean(vlm, batch):
    clean = read(vlm, batch, 2, positions="image", reduce="mean")[2, "resid_post"]

    def spoil(module, args, output):
        output = output.clone()
        output[batch.spans != 1] = float("nan")
        return output

    hook = vlm.blocks[1].register_forward_hook(spoil, prepend=True)
    try:
        reduced = read(vlm, batch, 2, positions="image", reduce="mean")[2, "resid_post"]
    finally:
        hook.remove()
    assert batch.mask("image").tolist() == (batch.spans == 1).tolist()
    assert torch.equal(reduced, clean)


def test_a_mean_of_low_precision_states_is_taken_in_float32(batch):
    low = tiny_llava()
    low.model.to(torch.bfloat16)
    inputs = low.batch(PICTURES, TEXTS)
    whole = read(low, inputs, 2)[2, "resid_post"]
    reduced = read(low, inputs, 2, positions="image", reduce="mean", dtype=torch.float32)[
        2, "resid_post"
    ]
    assert whole.dtype == torch.bfloat16
    assert torch.allclose(reduced.double(), loops(whole, inputs.mask("image"), "mean"), atol=1e-6)
    assert (
        read(low, inputs, 2, positions="image", reduce="mean")[2, "resid_post"].dtype
        == torch.bfloat16
    )


def test_a_generation_is_read_step_by_step_as_transformers_does(vlm, batch):
    with reading(vlm, "all") as recorded:
        ids = vlm.generate_ids(batch, 5, eos_token_id=None)
    options = {
        "output_hidden_states": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
        "do_sample": False,
    }
    theirs = vlm.model.generate(**batch, max_new_tokens=5, **options).hidden_states
    assert ids.shape[1] == len(theirs) == 5
    for layer in range(3):
        steps = recorded[layer, "resid_post"]
        assert len(steps) == 5
        for step in range(5):
            assert torch.equal(steps[step], theirs[step][layer])
    final = torch.cat(recorded[3, "resid_post"][1:], dim=1)
    assert torch.equal(
        anatomy.final_norm(vlm.model)(final), torch.cat([step[3] for step in theirs[1:]], dim=1)
    )


def test_without_a_cache_the_steps_are_the_same(vlm, batch):
    with reading(vlm, 2) as recorded:
        ids = vlm.generate_ids(batch, 4, eos_token_id=None)
    with reading(vlm, 2) as slow:
        again = vlm.generate_ids(batch, 4, eos_token_id=None, use_cache=False)
    assert torch.equal(ids, again)
    assert [step.shape for step in slow[2, "resid_post"]] == [
        step.shape for step in recorded[2, "resid_post"]
    ]
    for first, second in zip(recorded[2, "resid_post"], slow[2, "resid_post"], strict=True):
        assert torch.allclose(first, second, atol=1e-5)


def test_beams_repeat_the_mask_of_each_row(vlm, batch):
    with reading(vlm, 2, positions="question", reduce="mean") as recorded:
        vlm.generate_ids(batch, 3, num_beams=2)
    prompt, *steps = recorded[2, "resid_post"]
    alone = read(vlm, batch, 2, positions="question", reduce="mean")[2, "resid_post"]
    assert torch.allclose(prompt, alone.repeat_interleave(2, dim=0), atol=1e-5)
    assert all(step.shape == (6, 1, 32) for step in steps)


def test_steps_can_be_left_out(vlm, batch):
    with reading(vlm, 2, positions="last", steps=False) as recorded:
        vlm.generate_ids(batch, 4)
    assert len(recorded[2, "resid_post"]) == 1


def test_each_forward_inside_one_reading_is_a_prompt(vlm, batch):
    second_batch = vlm.batch(PICTURES[:1], TEXTS[2:])
    with reading(vlm, 2) as recorded:
        vlm.forward(batch)
        vlm.forward(batch)
        vlm.forward(second_batch)
    first, again, last = recorded[2, "resid_post"]
    assert torch.equal(first, again)
    assert torch.equal(last, read(vlm, second_batch, 2)[2, "resid_post"])


def test_a_reading_of_the_bare_model_needs_no_batch(vlm, batch):
    with reading(vlm, 2) as recorded, torch.no_grad():
        vlm.model(**batch)
    assert torch.equal(recorded[2, "resid_post"][0], read(vlm, batch, 2)[2, "resid_post"])
    with (
        pytest.raises(InputError, match="vlm.forward"),
        reading(vlm, 2, positions="image"),
        torch.no_grad(),
    ):
        vlm.model(**batch)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_forward_stops_after_the_last_wanted_layer(vlm, batch, layer):
    ran = []
    counters = [
        block.register_forward_pre_hook(lambda m, a, k=k: ran.append(k))
        for k, block in enumerate(vlm.blocks, 1)
    ]
    counters.append(
        anatomy.unembedding(vlm.model).register_forward_pre_hook(
            lambda m, a: ran.append("unembedding")
        )
    )
    try:
        stopped = read(vlm, batch, layer)[layer, "resid_post"]
        assert ran == list(range(1, max(layer, 1) + 1))
        with reading(vlm, layer) as recorded:
            vlm.forward(batch)
    finally:
        for counter in counters:
            counter.remove()
    assert torch.equal(recorded[layer, "resid_post"][0], stopped)
    assert not hooks_left(vlm)
    assert torch.equal(hidden_states(vlm, batch)[layer], stopped)  # and the model is as it was


def test_parts_of_a_block_stop_inside_it(vlm, batch):
    ran = []
    counter = vlm.blocks[1].mlp.register_forward_pre_hook(lambda m, a: ran.append(1))
    try:
        read(vlm, batch, 2, ("attn_out", "attn_in"))
    finally:
        counter.remove()
    assert ran == []


def test_stopping_ends_the_inner_reading_only(vlm, batch):
    with reading(vlm, 3) as outer, reading(vlm, 1, stop=True) as inner:
        vlm.forward(batch)
    assert len(inner[1, "resid_post"]) == 1
    assert outer[3, "resid_post"] == []
    with pytest.raises(InputError, match="resid_post of layer 3 was never computed"):
        computed(outer)


def test_a_stop_ends_the_block_of_the_reading_that_asked_for_it(vlm, batch):
    after = []
    with reading(vlm, 1, stop=True) as outer:
        with reading(vlm, 3):
            vlm.forward(batch)
        after.append("inner")
    assert after == []
    assert len(outer[1, "resid_post"]) == 1


def test_a_prompt_after_another_is_no_step_of_it_also_where_no_batch_is_named(vlm):
    prompts = [vlm.batch([PICTURES[0]], [TEXTS[k]]) for k in (0, 2, 0)]
    with torch.no_grad(), reading(vlm, 1) as recorded:
        for prompt in prompts:
            vlm.model(**prompt)
    assert [len(states[0]) for states in recorded[1, "resid_post"]] == [
        prompt.spans.shape[1] for prompt in prompts
    ]


@pytest.mark.parametrize("name", ["llava", "blip2", "instructblip", "idefics2"])
def test_stopping_a_generation_is_refused(name):
    model, inputs = build(name)
    vlm = VLM(model, None, name)
    with pytest.raises(InputError, match="while generating"), reading(vlm, 1, stop=True):
        vlm.generate_ids(vlm.prepare(inputs), 2)
    assert not hooks_left(vlm)


@pytest.mark.parametrize("positions", ["all", "last", "image"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_kept_is_a_copy_of_its_own_size(vlm, batch, positions, dtype):
    for parts in read(
        vlm, batch, "all", ("resid_post", "mlp_hidden"), positions, dtype=dtype
    ).values():
        assert parts.untyped_storage().nbytes() == parts.numel() * parts.element_size()
        assert not parts.requires_grad and parts.device.type == "cpu"
        assert parts.dtype == (dtype or torch.float32)


def test_kept_states_do_not_change_when_the_model_writes_into_its_own(vlm, batch):
    outputs = []

    def spoil(module, args, output):
        outputs.append(output)

    hook = vlm.blocks[0].register_forward_hook(spoil)
    try:
        with reading(vlm, 1) as recorded:
            vlm.forward(batch)
    finally:
        hook.remove()
    before = recorded[1, "resid_post"][0].clone()
    with torch.no_grad():
        outputs[0].zero_()
    assert torch.equal(recorded[1, "resid_post"][0], before)


def test_a_reading_sees_what_hooks_in_front_of_it_did(vlm, batch):
    plain = read(vlm, batch, (0, 1))
    with reading(vlm, (0, 1)) as recorded:
        hooks = [vlm.blocks[0].register_forward_hook(lambda m, a, output: output + 1, prepend=True)]
        try:
            vlm.forward(batch)
        finally:
            hooks[0].remove()
    assert torch.equal(recorded[1, "resid_post"][0], plain[1, "resid_post"] + 1)
    assert torch.equal(recorded[0, "resid_post"][0], plain[0, "resid_post"])


def test_hooks_are_gone_after_an_error_in_the_model(vlm, batch, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(vlm.blocks[2].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="planted"):
        read(vlm, batch, "all", anatomy.SITES)
    assert not hooks_left(vlm)


def test_hooks_are_gone_after_an_unknown_site(vlm, batch):
    with pytest.raises(InputError, match="unknown site 'lunch'"):
        read(vlm, batch, 1, ("resid_post", "lunch"))
    assert not hooks_left(vlm)


def test_a_part_that_a_block_lacks_is_named(batch):
    vlm = tiny_llava()
    del vlm.blocks[1].mlp
    with pytest.raises(AnatomyError, match="MLP"):
        read(vlm, batch, (1, 2), "mlp_out")
    assert not hooks_left(vlm)


def test_a_full_device_says_what_to_lower(vlm, batch, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(vlm.blocks[1].mlp, "forward", full)
    with pytest.raises(DeviceMemoryError, match=r"lower batch_size \(now 3\)"):
        read(vlm, batch, "all")


def test_layers_and_sites_in_any_form(vlm):
    assert wanted(vlm, 2) == wanted(vlm, [2, 2]) == wanted(vlm, iter((2,))) == [(2, "resid_post")]
    assert wanted(vlm, (3, 1), ("mlp_out", "resid_post")) == [
        (1, "mlp_out"),
        (1, "resid_post"),
        (3, "mlp_out"),
        (3, "resid_post"),
    ]
    assert wanted(vlm, "all", ("resid_post", "mlp_out")) == [
        (0, "resid_post"),
        *((k, p) for k in (1, 2, 3) for p in ("resid_post", "mlp_out")),
    ]
    assert wanted(vlm, range(4)) == [(k, "resid_post") for k in range(4)]


@pytest.mark.parametrize(
    ("layers", "sites"),
    [
        (4, "resid_post"),
        (-1, "resid_post"),
        ((0, 9), "resid_post"),
        (0, "mlp_out"),
        ((0, 1), ("resid_post", "mlp_out")),
    ],
)
def test_a_layer_out_of_range_names_the_range(vlm, layers, sites):
    first = 0 if sites == "resid_post" else 1
    with pytest.raises(LayerError, match=f"not one of {first} to 3"):
        wanted(vlm, layers, sites)


@pytest.mark.parametrize(("layers", "sites"), [([], "resid_post"), ("some", "resid_post"), (1, [])])
def test_no_layers_or_sites_are_refused(vlm, layers, sites):
    with pytest.raises(InputError, match=r"layers"):
        wanted(vlm, layers, sites)


def test_masks_and_reductions_that_do_not_fit_are_refused(vlm, batch):
    with pytest.raises(InputError, match="give one value a position"):
        read(vlm, batch, 1, positions=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="give one value a position"):
        read(vlm, batch, 1, positions=batch.spans[:2] >= 0)
    with pytest.raises(InputError, match="row 0 of the mask is empty"):
        read(vlm, batch, 1, positions=batch.spans < 0, reduce="mean")
    with pytest.raises(InputError, match="unknown reduction 'sum'"):
        read(vlm, batch, 1, reduce="sum")
    assert not hooks_left(vlm)


def test_a_span_that_the_samples_lack_is_named(vlm, batch):
    with pytest.raises(SpanError, match="3 of 3 samples have none"):
        read(vlm, batch, 1, positions="answer")
    assert not hooks_left(vlm)


@pytest.mark.parametrize("name", ["mllama", "idefics"])
def test_a_model_with_cross_attention_has_no_image_positions_and_says_why(name):
    model, inputs = build(name)
    vlm = VLM(model, None, name)
    with pytest.raises(SpanError, match="enter this model by cross-attention") as caught:
        read(vlm, vlm.prepare(inputs), 1, positions="image")
    assert "image" not in str(caught.value).split("there are:")[1]
    assert span_mask(vlm, vlm.prepare(inputs), ("question",)).all()


def test_a_model_of_pictures_has_no_audio(vlm, batch):
    with pytest.raises(SpanError, match="this model takes none"):
        span_mask(vlm, batch, ("audio",))
