"""The workings under interventions: layers, clocks, rows of beams, replaced forwards, caches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from tests.contract.reference import SUPPRESS, case, traces
from xlvlms_tutorial.errors import InterventionError, LayerError
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.states.intervene import add
from xlvlms_tutorial.states.override import Clock, check_length, checked_layers, copy_cache, fit, overridden, pad_cache, unedited


@pytest.fixture(scope="module")
def at():
    return case("llava")


# Layers


def test_one_layer_or_several(at):
    assert checked_layers(at.vlm, 3) == [3]
    assert checked_layers(at.vlm, [3, 1]) == [3, 1] and checked_layers(at.vlm, range(4), first=0) == [0, 1, 2, 3]
    found = checked_layers(at.vlm, [int(layer) for layer in np.arange(1, 3)])
    assert found == [1, 2] and all(type(layer) is int for layer in found)


@pytest.mark.parametrize("layer", [0, -1, 4, True])
def test_layers_that_are_none(at, layer):
    with pytest.raises(LayerError, match="one of 1 to 3"):
        checked_layers(at.vlm, [1, layer])


# Rows


@given(rows=st.integers(1, 5), beams=st.integers(1, 4))
def test_rows_are_repeated_for_beams_side_by_side(rows, beams):
    values = torch.arange(rows)
    assert fit(values, rows * beams, "rows").tolist() == [row for row in range(rows) for _ in range(beams)]


@pytest.mark.parametrize(("rows", "batch"), [(2, 3), (3, 2), (0, 2), (4, 2)])
def test_rows_that_belong_to_another_batch(rows, batch):
    with pytest.raises(InterventionError, match=f"gate for {rows} samples in a batch of {batch}"):
        fit(torch.zeros(rows), batch, "gate")


def test_a_length_is_checked_against_what_runs_now(at):
    check_length(at.vlm, torch.zeros(2, 3), "mask")  # nothing runs, nothing is known
    with at.vlm.run(at.batch):
        check_length(at.vlm, torch.zeros(2, at.length), "mask")
        with pytest.raises(InterventionError, match=f"mask for rows of 3 tokens in a batch of {at.length}"):
            check_length(at.vlm, torch.zeros(2, 3), "mask")


# Clocks


def times(at, run):
    """Whether the clock says decoding, each time the decoder is called."""
    clock, found = Clock(at.vlm), []
    with clock.ticking():
        hook = anatomy.decoder(at.vlm.model).register_forward_hook(lambda module, args, output: found.append(clock.decoding))
        try:
            run()
        finally:
            hook.remove()
    assert traces(at.vlm) == []
    return found


def test_a_clock_tells_the_prefill_from_decode_steps(at):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": SUPPRESS}
    assert times(at, lambda: at.vlm.generate_ids(at.batch, **options)) == [False, True, True, True]
    assert times(at, lambda: at.vlm.generate_ids(at.batch, **options, num_beams=2))[:2] == [False, True]
    assert times(at, lambda: at.vlm.generate_ids(at.batch, **options, cache_implementation="static")) == [False, True, True, True]
    assert times(at, lambda: at.vlm.generate_ids(at.batch, **options, use_cache=False)) == [False] * 4
    assert times(at, lambda: at.vlm.forward(at.batch)) == [False]


def test_a_prompt_of_one_token_is_a_prefill(at):
    one = at.vlm.prepare({"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)})
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "suppress_tokens": SUPPRESS}
    assert times(at, lambda: at.vlm.generate_ids(one, **options)) == [False, True, True]


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
    own = module.forward = lambda x: 100 * x
    with pytest.raises(ZeroDivisionError), overridden({module: plus_one}):
        assert module(1) == 101
        raise ZeroDivisionError
    assert module.forward is own


# Edits


def test_no_edit_acts_inside_unedited_and_all_do_after(at):
    vector = torch.ones(at.vlm.width)
    clean = at.vlm.forward(at.batch).logits
    with add(at.vlm, vector, [1, 2]), add(at.vlm, vector, 1, positions="image"):
        steered, queues = at.vlm.forward(at.batch).logits, {layer: list(queue) for layer, queue in at.vlm.edits.items()}
        assert not torch.equal(steered, clean)
        with pytest.raises(ZeroDivisionError), unedited(at.vlm):
            assert torch.equal(at.vlm.forward(at.batch).logits, clean)
            raise ZeroDivisionError
        assert at.vlm.edits == queues and torch.equal(at.vlm.forward(at.batch).logits, steered)
    assert traces(at.vlm) == []


# Caches


def filled(*lengths):
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
    assert torch.equal(cache.layers[0].keys[:, :, :5], before) and cache.layers[0].keys[:, :, 5].abs().max() == 0
    pad_cache(None, 0, torch.ones(2, 1, 32))  # without a cache there is nothing to do


def test_the_previous_blocks_keys_are_copied_where_there_are_any():
    cache = filled(5)
    assert copy_cache(cache, 1, 5) and torch.equal(cache.layers[1].keys, cache.layers[0].keys)
    assert torch.equal(cache.layers[1].values, cache.layers[0].values)
    assert not copy_cache(None, 1, 5) and not copy_cache(cache, 0, 5)
    assert not copy_cache(filled(3), 1, 5)  # a window shorter than the prompt
