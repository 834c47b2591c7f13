"""Defects of the released code of arXiv 2410.09454 and 2405.16700 that skipping
and pruning here must not have.

Where each defect is tested (files under tests; without a file: here).

1. Unknown skip modes run the dense model: tutorials/test_upstream.py::
   test_unknown_names_are_refused_with_the_known_ones; unknown pruning methods too: here each is a
   function, and names of scores are tried in methods/pruning/test_sparsify.py::
   test_masks_of_another_model_cannot_be_matched.
2. Skipping OPT's attention loses the residual stream: methods/skipping/test_skipping.py::
   test_without_attention_the_residual_stream_stays_and_the_mlp_reads_the_first_norm.
3. Modes for the prompt's tokens double their states:
   methods/skipping/test_skipping.py::test_image_tokens_are_not_doubled_when_their_mlp_goes.
4. A skipped block has the previous block's keys and values, in all modes:
   test_later_steps_look_at_the_blocks_own_prompt.
5. The number of layers is 32: test_the_rule_ends_with_the_model.
6. Zeros in dense matrices are called savings: test_zeros_save_nothing_and_say_so_in_numbers.
7. Units are stripped from counted operations, and zeros counted as work saved: the same test.
8. Times are taken once, with hooks on, without waiting: metrics/test_timing.py.
9. All masks are held at once, a byte a weight:
   methods/pruning/test_sparsify.py::test_masks_come_from_files_one_at_a_time_and_stay_as_they_are.
10. Mask algebra knows OPT's names alone:
    methods/pruning/test_sparsify.py::test_matched_masks_keep_as_many_in_every_row, on other
    architectures.
11. Answers are cut to the length of the longest true one: test_a_long_wrong_answer_stays_wrong.
12. Pairs of blocks lose the block after the start, and run the last
    one twice: test_pairs_run_each_block_once.
13. Segments of several intervals are floor(L / n) long:
    test_segments_are_in_proportion_where_theirs_are_cut_off.
14. Magnitude by matrix drops one weight too many, Wanda one too few:
    test_as_many_weights_go_as_were_asked_for.
"""

import pytest
import torch

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.interventions.edits import mask_weights
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.methods.pruning.scores import kept, magnitude_masks, random_masks
from xlvlms_tutorial.methods.skipping import every_nth_layer
from xlvlms_tutorial.metrics.answers import answer_table
from xlvlms_tutorial.metrics.cost import count_flops
from xlvlms_tutorial.metrics.timing import memory_of
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.tutorials.upstream import from_upstream


def test_later_steps_look_at_the_blocks_own_prompt():
    vlm = tiny_llava()
    batch = vlm.batch(None, ["Describe the picture ."])
    dense = vlm.forward(batch, use_cache=True).past_key_values
    with skip(vlm, [2], scope="prefill"):
        own_cache = vlm.forward(batch, use_cache=True).past_key_values
    with skip(vlm, [2], scope="prefill", cache="previous"):
        previous = vlm.forward(batch, use_cache=True).past_key_values
    # its input is that of the dense model
    torch.testing.assert_close(own_cache.layers[1].keys, dense.layers[1].keys)
    assert torch.equal(previous.layers[1].keys, previous.layers[0].keys)
    assert not torch.allclose(own_cache.layers[1].keys, own_cache.layers[0].keys)


def test_the_rule_ends_with_the_model():
    for n_layers in (6, 30, 32, 40):
        layers = from_upstream("context_skip_block", n_layers, interval=1).layers
        assert layers == tuple(range(2, n_layers))


def test_zeros_save_nothing_and_say_so_in_numbers():
    vlm = tiny_llava()
    batch = vlm.batch(None, ["Describe the picture ."])
    counted = lambda: (
        count_flops(lambda: vlm.forward(batch)).set_index("part").loc["total", "flops"]
    )
    dense, bytes_ = counted(), memory_of(vlm.model)
    with mask_weights(vlm, random_masks(vlm, 0.7, seed=0).tensors(vlm)):
        assert (counted(), memory_of(vlm.model)) == (dense, bytes_)
    with skip(vlm, [2]):
        assert counted() < dense
    assert isinstance(int(dense), int) and dense > 1000


def test_a_long_wrong_answer_stays_wrong():
    table = answer_table(
        ["red or blue, who knows", "red"],
        [Question("colour", "What colour is the key ?", "red")] * 2,
    )
    assert table["correct"].tolist() == [False, True]


def test_pairs_run_each_block_once():
    vlm = tiny_llava(layers=8)
    batch, ran = vlm.batch(None, ["Describe the picture ."]), []
    hooks = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(vlm.blocks, 1)
    ]
    with from_upstream("context_parrallel_block", 8, 2).apply(vlm):
        vlm.forward(batch)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(1, 9))  # theirs: 1, not 2, then 3 to 8, then 8 again


def upstream_segments(n_layers, intervals):
    """The layers that the released rule acts on, numbered as here."""
    part = n_layers // len(intervals)
    steps = [intervals[min(idx // part, len(intervals) - 1)] for idx in range(n_layers)]
    return [idx + 1 for idx in range(1, n_layers - 1) if idx % steps[idx] == 0]


@pytest.mark.parametrize(
    ("n_layers", "intervals", "theirs", "ours"),
    [
        (30, [1, 2, 3, 4], set(), {8, 15, 22}),
        (32, [4, 3, 2], {21}, {22}),
        (32, [1, 2, 3, 4], set(), set()),
        (40, [2, 4], set(), set()),
    ],
)
def test_segments_are_in_proportion_where_theirs_are_cut_off(n_layers, intervals, theirs, ours):
    upstream_layers, every_layers = (
        set(upstream_segments(n_layers, intervals)),
        set(every_nth_layer(n_layers, intervals)),
    )
    assert (upstream_layers - every_layers, every_layers - upstream_layers) == (theirs, ours)


@pytest.mark.parametrize("sparsity", [0.29, 0.3, 0.5, 0.57])
def test_as_many_weights_go_as_were_asked_for(sparsity):
    # with ties
    scores = torch.rand(3, 100, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    assert (~kept(scores, sparsity)).sum(dim=1).tolist() == [round(100 * sparsity)] * 3
    vlm = tiny_llava()
    masks = magnitude_masks(vlm, sparsity, "matrix")
    for layer, name in masks:
        mask = masks.unpack(layer, name)
        assert int((~mask).sum()) == int(sparsity * mask.numel() + 1e-9)
