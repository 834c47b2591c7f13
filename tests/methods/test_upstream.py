"""Defects of the released code of arXiv 2405.16700 (commit 8933b07) that ours must not have.

Here what other tests do not cover. Where each defect is tested (files under tests; without a file:
here). Book page: "What the released code does".

1. Text tokens of captions are BOS alone: test_textual_tokens_are_those_of_the_caption.
2. The layer of P sticks at the first: methods/alignment/test_scores.py::
   test_the_layer_of_the_perceptual_tokens_follows_upstream_stuck_at_the_first,
   methods/logit_lens/test_measures.py::test_the_entropy_profile_follows_the_layer,
   methods/logit_lens/test_measures.py::
   test_the_divergence_profile_has_three_rows_a_layer_and_follows_it,
   methods/logit_lens/test_measures.py:: test_consecutive_means_layer_l_against_l_plus_step.
3. Consecutive layers over other examples: methods/alignment/test_drift.py::
   test_consecutive_similarity_is_of_the_same_token_of_the_same_example.
4. Arbitrary pairs in the divergence: methods/logit_lens/test_measures.py::
   test_no_arbitrary_pairing_decides_the_contrast. 0 log 0: methods/logit_lens/test_measures.py::
   test_a_uniform_distribution_has_the_entropy_log_v_and_a_sure_one_0_and_not_nan,
   methods/logit_lens/test_measures.py::test_relative_entropy_of_vectors,
   test_words_too_rare_for_half_precision_are_not_lost.
5. Frobenius norm as "mean": methods/alignment/test_drift.py::
   test_norms_are_of_tokens_upstreams_mean_was_the_norm_of_the_matrix.
6. Padding in the calibration: methods/pruning/test_calibration.py::test_padding_adds_nothing,
   methods/pruning/test_calibration.py:: test_texts_without_a_picture_and_sequences_beyond_128,
   test_padding_changes_no_mask.
7. Places inside a block of OPT: activations/test_hooks.py::
   test_opt_puts_its_mlp_in_one_row_and_is_read_by_position.
8. Unknown modes run the dense model: interventions/test_skipping.py::
   test_unknown_values_are_named_with_the_known_ones, methods/alignment/test_similarity.py::
   test_unknown_choices_name_the_allowed_ones.
9. Layer names of OPT in the algebra of masks:
   methods/pruning/test_scores.py::test_every_architecture_is_masked_and_runs,
   test_masks_of_every_decoder_are_intersected. True is kept: methods/pruning/test_masks.py::
   test_what_all_tasks_keep_is_at_least_as_sparse_as_each.
10. 32 layers written into the code: test_profiles_reach_the_last_layer_of_any_depth, and that layer
    is before the final norm: activations/test_hooks.py::
    test_layers_are_those_of_transformers_and_the_last_is_before_the_final_norm.
11. Answers cut to the length of the true one: not of these methods (metrics/test_answers.py).
Beside F.3, only the first of the k words is drawn:
methods/logit_lens/test_measures.py::test_the_histogram_counts_all_k_words_of_each_state.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import zoo
from tests.support.tiny import PICTURE, tiny_llava
from xlvlms_tutorial.activations.capture import capture, residual_stream
from xlvlms_tutorial.methods.alignment.drift import consecutive_profile, norms
from xlvlms_tutorial.methods.alignment.scores import alignment_profile, cones
from xlvlms_tutorial.methods.alignment.similarity import examples
from xlvlms_tutorial.methods.logit_lens.measures import (
    divergence_profile,
    entropy,
    entropy_profile,
    kl_divergence,
)
from xlvlms_tutorial.methods.pruning.calibration import Calibration, calibrate_on, linear_maps
from xlvlms_tutorial.methods.pruning.masks import mask_overlap
from xlvlms_tutorial.methods.pruning.scores import wanda
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

CAPTIONS = ["a woman on the grass", "red", "a red key", "there is a blue key on the grass"]
QUESTIONS = ["What colour ?", "Is there a red key in the picture ?", "Describe the picture ."]


def captured(vlm, samples):
    """P and T of four samples at all layers."""
    both = capture(vlm, samples(4), "all", span=("image", "answer"), reduce=None, answers=CAPTIONS)
    return (both.select(f"span == {span!r}") for span in ("image", "answer"))


def test_the_table_above_names_tests_that_exist():
    named = re.findall(r"(?:((?:\w+/)+\w+\.py)::\s*)?(test_\w+)\b(?!\.py)", __doc__)
    assert len(named) > 15
    for file, name in named:
        path = Path(__file__).parents[1] / file if file else Path(__file__)
        assert f"def {name}(" in path.read_text(), f"{file or 'here'}: no {name}"


def test_textual_tokens_are_those_of_the_caption(samples):
    _, textual = captured(tiny_llava(), samples)
    read = textual.table.groupby("sample")["token"].agg(lambda words: " ".join(words).split())
    assert read.tolist() == [caption.split() for caption in CAPTIONS]
    within = cones({"T": examples(textual, 0)})["value"][0]
    assert within < 0.99  # one token that is the same for every sample has 1


def test_words_too_rare_for_half_precision_are_not_lost():
    vlm = tiny_llava()
    half = VLM(tiny_llava().model.half(), vlm.processor, "half")
    words = anatomy.unembedding(vlm.model).weight[:6]
    # a logit of 60 for a word of its own each
    rows = 60 * words / words.square().sum(dim=1, keepdim=True)
    shuffled = rows.flip(0)
    p, q = (half.unembed(side, norm=False).half().softmax(dim=-1) for side in (rows, shuffled))
    terms = p * (p / q).log()
    assert (-(p * p.log()).sum(dim=-1)).isnan().any()  # the released formula
    dropped = terms.masked_fill((p == 0) | (q == 0), 0).sum(dim=-1)
    exact = kl_divergence(vlm, rows, shuffled, norm=False)
    # the released guard takes the words that differ most out of the sum
    assert (dropped < exact - 1).all()
    torch.testing.assert_close(
        kl_divergence(half, rows, shuffled, norm=False), exact, rtol=0.01, atol=0.05
    )
    torch.testing.assert_close(
        entropy(half, rows, norm=False), entropy(vlm, rows, norm=False), rtol=0.05, atol=1e-3
    )


def padded_with_zeros(vlm, batch, length=64) -> Calibration:
    """As the released code calibrates.

    Rows of zeros up to a fixed length, which are attended and counted.
    """
    entering, real = residual_stream(vlm, batch)[0], batch["attention_mask"].bool()
    rows, mask = (
        torch.zeros(len(real), length, vlm.width),
        torch.zeros(len(real), 1, length, length),
    )
    for k, n in enumerate(real.sum(dim=1).tolist()):
        rows[k, :n] = entering[k][real[k]]
        mask[k, 0, :n, :n] = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
    squares = {}
    add = lambda key, module, args: squares.update(
        {key: args[0].double().square().flatten(0, -2).sum(0)}
    )
    hooks = [
        module.register_forward_pre_hook(partial(add, key))
        for key, module in linear_maps(vlm).items()
    ]
    anatomy.decoder(vlm.model)(inputs_embeds=rows, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return replace(
        calibrate_on(vlm, [batch]),
        squares=squares,
        tokens=dict.fromkeys(squares, length * len(rows)),
    )


def test_padding_changes_no_mask():
    vlm = tiny_llava()
    batch = vlm.batch([PICTURE] * 3, QUESTIONS)
    alone = [calibrate_on(vlm, [vlm.batch([PICTURE], [question])]) for question in QUESTIONS]
    ours = wanda(vlm, calibrate_on(vlm, [batch]), 0.5)
    theirs = wanda(vlm, padded_with_zeros(vlm, batch), 0.5)
    same = mask_overlap(
        {
            "together": ours,
            "alone": wanda(vlm, alone[0] + alone[1] + alone[2], 0.5),
            "padded": theirs,
        }
    )
    assert same.loc["together", "alone"] > 0.999  # float32 may order two neighbours otherwise
    assert same.loc["together", "padded"] < 0.99


@pytest.mark.parametrize("name", ["blip2", "llava"])
def test_masks_of_every_decoder_are_intersected(name):
    model, inputs = zoo.build(next(key for key in zoo.MODELS if key.startswith(name)))
    vlm = VLM(model, None, name)
    calibration = calibrate_on(vlm, [vlm.prepare(inputs)])
    first, second = wanda(vlm, calibration, 0.5), wanda(vlm, calibration, 0.3)
    assert list(first & second) == list(linear_maps(vlm))
    assert (first & second) == first  # of one order of scores, the sparser is inside the denser
    assert (first | second) == second
    assert (first - second).n_kept == 0


@pytest.mark.parametrize("depth", [2, 5])
def test_profiles_reach_the_last_layer_of_any_depth(samples, depth):
    vlm = tiny_llava(layers=depth)
    p, t = captured(vlm, samples)
    every = list(range(depth + 1))
    for table in (
        alignment_profile(p, t, n_resamples=100),
        norms(p, n_resamples=100),
        entropy_profile(vlm, p),
    ):
        assert table["layer"].tolist() == every
    assert divergence_profile(vlm, p, t)["layer"].unique().tolist() == every
    steps = consecutive_profile(p, n_resamples=100).set_index("layer")
    assert steps["to"].tolist() == every[1:]
    last, after = p[depth - 1], anatomy.final_norm(vlm.model)(p[depth])
    cosine = lambda x, y: torch.cosine_similarity(x, y, dim=-1).mean().item()
    assert steps["value"][depth - 1] == pytest.approx(cosine(last, p[depth]), abs=1e-6)
    assert norms(p, "mean")["value"][depth] == pytest.approx(
        np.mean(p[depth].norm(dim=-1).tolist()), rel=1e-5
    )
    # after the final norm: another number
    assert abs(norms(p, "mean")["value"][depth] - after.norm(dim=-1).mean().item()) > 0.1
