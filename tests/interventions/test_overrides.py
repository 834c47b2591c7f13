"""The workings under interventions: layers, clocks, rows of beams, replaced forwards, caches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache

from tests.contract.reference import SUPPRESS, traces
from xlvlms_tutorial.activations.clock import Clock
from xlvlms_tutorial.activations.hooks import reading
from xlvlms_tutorial.errors import InputError, InterventionError, LayerError
from xlvlms_tutorial.interventions.edits import add, patch
from xlvlms_tutorial.interventions.overrides import (
    check_length,
    checked_layers,
    copy_cache,
    fit,
    overridden,
    pad_cache,
    unedited,
)
from xlvlms_tutorial.interventions.skipping import parallel, parallel_pairs, skip
from xlvlms_tutorial.models import anatomy

# Layers


def test_one_layer_or_several(example):
    assert checked_layers(example.vlm, 3) == [3]
    assert checked_layers(example.vlm, [3, 1]) == [3, 1]
    assert checked_layers(example.vlm, range(4), first=0) == [0, 1, 2, 3]
    layers = checked_layers(example.vlm, [int(layer) for layer in np.arange(1, 3)])
    assert layers == [1, 2] and all(type(layer) is int for layer in layers)


@pytest.mark.parametrize("layer", [0, -1, 4, True])
def test_layers_that_are_none(example, layer):
    with pytest.raises(LayerError, match="one of 1 to 3"):
        checked_layers(example.vlm, [1, layer])


# Rows


@given(rows=st.integers(1, 5), beams=st.integers(1, 4))
def test_rows_are_repeated_for_beams_side_by_side(rows, beams):
    values = torch.arange(rows)
    assert fit(values, rows * beams, "rows").tolist() == [
        row for row in range(rows) for _ in range(beams)
    ]


@pytest.mark.parametrize(("rows", "batch"), [(2, 3), (3, 2), (0, 2), (4, 2)])
def test_rows_that_belong_to_another_batch(rows, batch):
    with pytest.raises(InterventionError, match=f"gate for {rows} samples in a batch of {batch}"):
        fit(torch.zeros(rows), batch, "gate")


def test_a_length_is_checked_against_what_runs_now(example):
    check_length(example.vlm, torch.zeros(2, 3), "mask")  # nothing runs, nothing is known
    with example.vlm.run(example.batch):
        check_length(example.vlm, torch.zeros(2, example.length), "mask")
        with pytest.raises(
            InterventionError, match=f"mask for rows of 3 tokens in a batch of {example.length}"
        ):
            check_length(example.vlm, torch.zeros(2, 3), "mask")


# Clocks


def times(example, run):
    """Whether the clock says decoding, each time the decoder is called."""
    clock, phases = Clock(example.vlm), []
    with clock.ticking():
        hook = anatomy.decoder(example.vlm.model).register_forward_hook(
            lambda module, args, output: phases.append(clock.decoding)
        )
        try:
            run()
        finally:
            hook.remove()
    assert traces(example.vlm) == []
    return phases


def test_a_clock_tells_the_prefill_from_decode_steps(example):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": SUPPRESS}
    assert times(example, lambda: example.vlm.generate_ids(example.batch, **options)) == [
        False,
        True,
        True,
        True,
    ]
    assert times(example, lambda: example.vlm.generate_ids(example.batch, **options, num_beams=2))[
        :2
    ] == [
        False,
        True,
    ]
    assert times(
        example,
        lambda: example.vlm.generate_ids(example.batch, **options, cache_implementation="static"),
    ) == [False, True, True, True]
    assert (
        times(example, lambda: example.vlm.generate_ids(example.batch, **options, use_cache=False))
        == [False] * 4
    )
    assert times(example, lambda: example.vlm.forward(example.batch)) == [False]


def test_a_prompt_of_one_token_is_a_prefill(example):
    prompt_batch = example.vlm.prepare(
        {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    )
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "suppress_tokens": SUPPRESS}
    assert times(example, lambda: example.vlm.generate_ids(prompt_batch, **options)) == [
        False,
        True,
        True,
    ]


# Prompts in parts, steps of several tokens, steps without a cache

STEPS = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": SUPPRESS}
MASK = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) < 0.5
VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))
POSITIONS = {
    "last": "last",
    "question": "question",
    "generated": "generated",
    "both": ("question", "generated"),
    "a mask": MASK,
}
BY_POSITION = {
    **{
        name: lambda vlm, positions=positions: add(vlm, VECTOR, 2, positions=positions)
        for name, positions in POSITIONS.items()
    },
    "one state": lambda vlm: patch(vlm, VECTOR, 2, positions="last"),
}
BY_SCOPE = {
    f"{part} {scope}": lambda vlm, part=part, scope=scope: skip(vlm, 2, part, scope)
    for part in ("block", "mlp", "attention")
    for scope in ("prefill", "decode")
} | {
    "previous": lambda vlm: skip(vlm, 2, scope="prefill", cache="previous"),
    "parallel": lambda vlm: parallel(vlm, [1, 2], scope="prefill"),
    "pairs": lambda vlm: parallel_pairs(vlm, 1, scope="decode"),
}
ALL_AT_ONCE = {
    "states of a prompt": lambda vlm: patch(vlm, VECTOR.expand(2, 10, 32), 2),
    "a gate that looks": lambda vlm: add(
        vlm, VECTOR, 2, gate=lambda states: states.sum(dim=(1, 2)) > 0
    ),
}


@pytest.fixture(scope="module")
def text(example):
    """Two prompts of ten tokens without a picture, the second padded on the left by three."""
    ids = torch.arange(20, 40).reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return example.vlm.prepare({"input_ids": ids, "attention_mask": mask})


def logits_of(example, batch, enter, **options):
    """The new tokens and the logits that each was chosen by."""
    recorded = []
    hook = anatomy.unembedding(example.vlm.model).register_forward_hook(
        lambda module, args, output: recorded.append(output[:, -1])
    )
    try:
        with enter(example.vlm):
            new = example.vlm.generate_ids(batch, **STEPS | options)
    finally:
        hook.remove()
    return new, torch.stack(recorded[-4:], 1)


@pytest.mark.parametrize("chunk", [9, 4])
@pytest.mark.parametrize("name", [*BY_POSITION, *BY_SCOPE])
def test_a_prefill_in_chunks_is_changed_as_a_whole_one(example, text, name, chunk):
    enter = (BY_POSITION | BY_SCOPE)[name]
    new, logits = logits_of(example, text, enter)
    others, theirs = logits_of(example, text, enter, prefill_chunk_size=chunk)
    torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(new, others) and traces(example.vlm) == []


@pytest.mark.parametrize("name", [*BY_POSITION, *BY_SCOPE, *ALL_AT_ONCE])
def test_a_static_cache_is_changed_as_a_growing_one(example, text, name):
    enter = (BY_POSITION | BY_SCOPE | ALL_AT_ONCE)[name]
    new, logits = logits_of(example, text, enter)
    others, theirs = logits_of(example, text, enter, cache_implementation="static")
    torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(new, others)


@pytest.mark.parametrize("name", [*BY_POSITION, *BY_SCOPE])
def test_a_prompt_that_goes_on_from_a_cache_is_changed_as_a_whole_one(example, text, name):
    enter = (BY_POSITION | BY_SCOPE)[name]
    prompt = example.vlm.prepare(
        {"input_ids": text["input_ids"], "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    )
    new, logits = logits_of(example, prompt, enter)
    with enter(example.vlm), example.vlm.run(prompt), torch.no_grad():
        cache = example.vlm.model(
            input_ids=prompt["input_ids"][:, :6], use_cache=True
        ).past_key_values
    others, theirs = logits_of(example, prompt, enter, past_key_values=cache)
    torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(new, others)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 9}])
@pytest.mark.parametrize("name", ALL_AT_ONCE)
def test_what_needs_the_whole_prompt_refuses_a_part_of_it(example, text, name, options):
    with pytest.raises(
        InterventionError, match="of a prompt that has 10, .*run the whole prompt at once"
    ):
        logits_of(example, text, ALL_AT_ONCE[name], **options)
    with pytest.raises(InputError, match="of a prompt that has 10, .*run the whole prompt at once"):
        logits_of(example, text, lambda vlm: reading(vlm, 1), **options)
    assert traces(example.vlm) == [] and example.vlm.running is None


@pytest.mark.parametrize("name", [*BY_POSITION, *BY_SCOPE])
def test_guessed_tokens_that_are_verified_together_are_tokens_of_the_answer(example, name):
    ids = torch.tensor([[20, 21, 22, 20, 21, 22, 20, 21, 22, 20]])
    batch = example.vlm.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    enter = (
        (BY_POSITION | BY_SCOPE)[name]
        if name != "a mask"
        else lambda vlm: add(vlm, VECTOR, 2, positions=MASK[:1])
    )
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    with enter(example.vlm):
        expected = example.vlm.generate_ids(batch, **STEPS | options)
        try:
            new_ids = example.vlm.generate_ids(batch, **STEPS | options, prompt_lookup_num_tokens=3)
        except InterventionError as error:  # guesses that came with the prompt
            assert name in BY_SCOPE and "runs the prompt and the answer together" in str(error)
        else:
            assert torch.equal(new_ids, expected)


@pytest.mark.parametrize("name", BY_SCOPE)
def test_without_a_cache_a_scope_is_refused_rather_than_stretched(example, text, name):
    with pytest.raises(
        InterventionError,
        match="scope '.*' without a cache.*leave use_cache=False out, or use scope='both'",
    ):
        logits_of(example, text, BY_SCOPE[name], use_cache=False)
    with pytest.raises(InterventionError, match="without a cache"), BY_SCOPE[name](example.vlm):
        example.vlm.model.generate(**text, **STEPS, use_cache=False, do_sample=False)
    with BY_SCOPE[name](example.vlm):  # one forward is all prompt
        assert example.vlm.forward(text, use_cache=False).logits.isfinite().all()
    assert traces(example.vlm) == []


@pytest.mark.parametrize("name", BY_POSITION)
def test_without_a_cache_positions_are_those_of_the_prompt(example, text, name):
    new, logits = logits_of(example, text, BY_POSITION[name])
    others, theirs = logits_of(example, text, BY_POSITION[name], use_cache=False)
    torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(new, others)


# Replaced forwards


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def plus_one(original, x):
    return original(x) + 1


def test_a_forward_is_replaced_and_comes_back():
    module, hooked = Doubling(), []
    module.register_forward_hook(lambda *parts: hooked.append(parts[2]))
    with overridden({module: plus_one}):
        assert module(3) == 7
        with overridden({module: lambda original, x: original(x) * 10}):
            assert module(3) == 70
        assert module(3) == 7
    assert module(3) == 6 and "forward" not in module.__dict__ and hooked == [7, 70, 7, 6]


def test_another_override_is_found_again():
    module = Doubling()
    forward = module.forward = lambda x: 100 * x
    with pytest.raises(ZeroDivisionError), overridden({module: plus_one}):
        assert module(1) == 101
        raise ZeroDivisionError
    assert module.forward is forward


# Edits


def test_no_edit_acts_inside_unedited_and_all_do_after(example):
    vector = torch.ones(example.vlm.width)
    clean = example.vlm.forward(example.batch).logits
    with add(example.vlm, vector, [1, 2]), add(example.vlm, vector, 1, positions="image"):
        steered, queues = (
            example.vlm.forward(example.batch).logits,
            {layer: list(queue) for layer, queue in example.vlm.edits.items()},
        )
        assert not torch.equal(steered, clean)
        with pytest.raises(ZeroDivisionError), unedited(example.vlm):
            assert torch.equal(example.vlm.forward(example.batch).logits, clean)
            raise ZeroDivisionError
        assert example.vlm.edits == queues and torch.equal(
            example.vlm.forward(example.batch).logits, steered
        )
    assert traces(example.vlm) == []


# Caches


def filled(*lengths):
    """A cache of so many tokens in each layer."""
    cache = DynamicCache()
    for index, length in enumerate(lengths):
        if length:
            keys = torch.randn(2, 4, length, 8, generator=torch.Generator().manual_seed(index))
            cache.update(keys, keys + 1, index)
    return cache


def test_an_empty_cache_grows_by_the_narrowest_entry_that_counts():
    cache = filled()
    pad_cache(cache, 0, torch.ones(2, 5, 32))
    assert cache.get_seq_length() == 5 and cache.layers[0].keys.shape == (2, 1, 5, 1)
    pad_cache(cache, 0, torch.ones(2, 1, 32))
    assert cache.get_seq_length() == 6 and cache.layers[0].keys.abs().max() == 0


def test_a_filled_cache_grows_by_zeros_behind_what_it_holds():
    cache = filled(5)
    before = cache.layers[0].keys.clone()
    pad_cache(cache, 0, torch.ones(2, 1, 32))
    assert torch.equal(cache.layers[0].keys[:, :, :5], before)
    assert cache.layers[0].keys[:, :, 5].abs().max() == 0
    pad_cache(None, 0, torch.ones(2, 1, 32))  # without a cache there is nothing to do


def test_the_previous_blocks_keys_are_copied_where_there_are_any():
    cache = filled(5)
    assert copy_cache(cache, 1, 5) and torch.equal(cache.layers[1].keys, cache.layers[0].keys)
    assert torch.equal(cache.layers[1].values, cache.layers[0].values)
    assert not copy_cache(None, 1, 5) and not copy_cache(cache, 0, 5)
    assert not copy_cache(filled(3), 1, 5)  # a window shorter than the prompt


@pytest.mark.parametrize("room", [5, 6, 40])
def test_of_a_cache_with_room_for_more_what_it_holds_is_copied(room):
    text = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
    cache, keys = StaticCache(config=text, max_cache_len=room), filled(5).layers[0].keys
    cache.update(keys, keys + 1, 0)
    assert copy_cache(cache, 1, 5) and cache.layers[1].get_seq_length() == 5
    assert torch.equal(cache.layers[1].keys[:, :, :5], keys)
    assert torch.equal(cache.layers[1].values[:, :, :5], keys + 1)
    assert not copy_cache(cache, 1, 6)
