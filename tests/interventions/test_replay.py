"""Forwards resumed at a layer.

Against whole forwards, what is not computed again, and what is left behind.
"""

import pytest
import torch

from tests.contract.reference import case, traces
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions.edits import add
from xlvlms_tutorial.interventions.replay import Resumable, same_up_to_rounding
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.watching import on_input

LAYERS = range(4)


def counted(vlm, call):
    """How often the tower and each block run in a call."""
    counts = dict.fromkeys(["tower", *range(1, vlm.n_layers + 1)], 0)

    def count(name):
        return lambda *_: counts.__setitem__(name, counts[name] + 1)

    handles = [anatomy.tower(vlm.model).register_forward_pre_hook(count("tower"))]
    handles += [
        on_input(anatomy.mlp(block), count(layer)) for layer, block in enumerate(vlm.blocks, 1)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return counts


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "mllama", "blip2"])
@pytest.mark.parametrize("start", LAYERS)
def test_a_pass_from_a_layer_gives_the_states_of_a_whole_one(name, start):
    tiny = case(name)
    whole, run = read(tiny.vlm, tiny.batch, LAYERS), Resumable(tiny.vlm, tiny.batch)
    first = run.read(start)
    assert torch.equal(first, whole[start, "resid_post"]) and len(run.calls) == 1
    for layer in range(start, tiny.vlm.n_layers + 1):
        result = run.read(layer, start=start, states=first if start else None)
        torch.testing.assert_close(result, whole[layer, "resid_post"], rtol=1e-5, atol=1e-5)
    assert traces(tiny.vlm) == []


def test_a_change_acts_on_the_states_at_the_start_and_above(example):
    run, vector = Resumable(example.vlm, example.batch), torch.linspace(-3, 3, example.vlm.width)
    states = run.read(1)
    for change in (
        lambda: add(example.vlm, vector, 1),
        lambda: skip(example.vlm, 3),
        lambda: add(example.vlm, vector, 2, positions="last"),
    ):
        with change():
            expected = read(example.vlm, example.batch, 3)[3, "resid_post"]
        result = run.read(3, start=1, states=states, change=change())
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(result, run.read(3), atol=1e-3)
    assert example.vlm.active == [] and traces(example.vlm) == []


def test_other_states_take_the_place_of_the_models_own(example):
    run = Resumable(example.vlm, example.batch)
    states = run.read(2)
    assert torch.equal(run.read(2, start=2, states=states.flip(0)), states.flip(0))


def test_positions_and_number_format_are_those_of_a_reading(example):
    run, mask = Resumable(example.vlm, example.batch), example.batch.mask("question")
    whole = run.read(2)
    torch.testing.assert_close(run.read(2, "last"), whole[:, -1:])
    torch.testing.assert_close(run.read(2, mask), whole[mask])
    assert run.read(2, mask, dtype=torch.float64).dtype == torch.float64 and not whole.requires_grad


def test_only_what_lies_between_is_computed_again(example):
    run = Resumable(example.vlm, example.batch)
    states = [None]
    # ends after the layer
    assert counted(example.vlm, lambda: states.append(run.read(1))) == {
        "tower": 1,
        1: 1,
        2: 0,
        3: 0,
    }
    assert counted(example.vlm, lambda: run.read(2, start=1, states=states[1])) == {
        "tower": 0,
        1: 0,
        2: 1,
        3: 0,
    }
    assert counted(example.vlm, lambda: run.read(3)) == {"tower": 0, 1: 1, 2: 1, 3: 1}


def test_where_nothing_may_be_resumed_each_pass_is_whole_and_no_call_is_kept(example):
    run = Resumable(example.vlm, example.batch, resumes=False)
    for _ in range(2):
        assert counted(example.vlm, lambda: run.read(2)) == {"tower": 1, 1: 1, 2: 1, 3: 0}
    run.forward()
    assert run.calls == []


def test_the_forward_gives_the_logits_of_the_last_position(example):
    run = Resumable(example.vlm, example.batch)
    torch.testing.assert_close(
        run.forward(), example.vlm.forward(example.batch).logits[:, -1].float()
    )
    assert len(run.calls) == 1 and "past_key_values" in run.calls[0][1]
    assert run.calls[0][1]["past_key_values"] is None


def test_a_layer_that_is_never_computed_cannot_be_read():
    mllama = case("mllama")  # without a picture its blocks of cross-attention are left out
    words = {name: mllama.batch[name] for name in ("input_ids", "attention_mask")}
    layer = min(anatomy.cross_attention_layers(mllama.vlm.model))
    with pytest.raises(InputError, match=f"layer {layer} was never computed"):
        Resumable(mllama.vlm, mllama.vlm.prepare(words)).read(layer)


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2 * 2**-7), (torch.float16, 2 * 2**-10)],
)
def test_two_roundings_of_the_largest_value_are_the_same(dtype, share):
    expected = torch.tensor([[-64.0, 1.0], [0.0, 2.0]])
    for factor, same in ((0.0, True), (0.9, True), (1.1, False)):
        moved = expected.clone()
        moved[1, 0] += factor * share * 64
        assert same_up_to_rounding(moved, expected, dtype) == same
    assert not same_up_to_rounding(expected * torch.nan, expected, dtype)
