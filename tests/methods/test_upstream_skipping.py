"""Defects of the released code of arXiv 2410.09454 and 2405.16700 that skipping and pruning here must not have.

Where each defect is tested (files under tests; without a file: here).

1. Unknown skip modes run the dense model: methods/test_skipping.py::test_unknown_names_are_refused_with_the_known_ones; unknown pruning
   methods too: methods/test_pruning.py::test_unknown_methods_and_what_they_lack_are_refused.
2. Skipping OPT's attention loses the residual stream:
   methods/test_skipping.py::test_without_attention_the_residual_stream_stays_and_the_mlp_reads_the_first_norm.
3. Modes for the prompt's tokens double their states: methods/test_skipping.py::test_image_tokens_are_not_doubled_when_their_mlp_goes.
4. A skipped block has the previous block's keys and values, in all modes: test_later_steps_look_at_the_blocks_own_prompt.
5. The number of layers is 32: test_the_rule_ends_with_the_model.
6. Zeros in dense matrices are called savings: test_zeros_save_nothing_and_say_so_in_numbers.
7. Units are stripped from counted operations, and zeros counted as work saved: the same test.
8. Times are taken once, with hooks on, without waiting: metrics/test_timing.py.
9. All masks are held at once, a byte a weight:
   methods/test_pruning.py::test_masks_come_from_files_one_at_a_time_and_stay_as_they_are.
10. Mask algebra knows OPT's names alone: methods/test_pruning.py::test_matched_masks_keep_as_many_in_every_row, on other architectures.
11. Answers are cut to the length of the longest true one: test_a_long_wrong_answer_stays_wrong.
"""

import torch

from tests.tiny import tiny_llava
from xlvlms_tutorial.data.samples import Question
from xlvlms_tutorial.methods.skipping import from_upstream
from xlvlms_tutorial.methods.subnetworks import random_masks
from xlvlms_tutorial.metrics.answers import answer_table
from xlvlms_tutorial.metrics.cost import count_flops, memory_of
from xlvlms_tutorial.states.intervene import mask_weights, skip


def test_later_steps_look_at_the_blocks_own_prompt():
    vlm = tiny_llava()
    batch = vlm.batch(None, ["Describe the picture ."])
    dense = vlm.forward(batch, use_cache=True).past_key_values
    with skip(vlm, [2], scope="prefill"):
        own = vlm.forward(batch, use_cache=True).past_key_values
    with skip(vlm, [2], scope="prefill", cache="previous"):
        previous = vlm.forward(batch, use_cache=True).past_key_values
    torch.testing.assert_close(own.layers[1].keys, dense.layers[1].keys)  # its input is that of the dense model
    assert torch.equal(previous.layers[1].keys, previous.layers[0].keys)
    assert not torch.allclose(own.layers[1].keys, own.layers[0].keys)


def test_the_rule_ends_with_the_model():
    for n_layers in (6, 30, 32, 40):
        layers = from_upstream("context_skip_block", n_layers, interval=1).layers
        assert layers == tuple(range(2, n_layers))


def test_zeros_save_nothing_and_say_so_in_numbers():
    vlm = tiny_llava()
    batch = vlm.batch(None, ["Describe the picture ."])
    counted = lambda: count_flops(lambda: vlm.forward(batch)).set_index("part").loc["total", "flops"]
    dense, bytes_ = counted(), memory_of(vlm.model)
    with mask_weights(vlm, random_masks(vlm, 0.7, seed=0).tensors(vlm)):
        assert (counted(), memory_of(vlm.model)) == (dense, bytes_)
    with skip(vlm, [2]):
        assert counted() < dense
    assert isinstance(int(dense), int) and dense > 1000


def test_a_long_wrong_answer_stays_wrong():
    table = answer_table(["red or blue, who knows", "red"], [Question("colour", "What colour is the key ?", "red")] * 2)
    assert table["correct"].tolist() == [False, True]
