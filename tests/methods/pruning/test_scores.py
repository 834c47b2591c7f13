"""Wanda, magnitude and random masks against a double loop over rows and
weights, and on every architecture.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests import zoo
from tests.support.text_models import gpt2, text_batch
from tests.support.tiny import PICTURE, tiny_llava
from xlvlms_tutorial.errors import InputError, LayerError
from xlvlms_tutorial.interventions.edits import mask_weights
from xlvlms_tutorial.methods.pruning.calibration import calibrate_on, fingerprint, linear_maps
from xlvlms_tutorial.methods.pruning.masks import independent_iou, mask_overlap
from xlvlms_tutorial.methods.pruning.scores import (
    _smallest,
    kept,
    magnitude_masks,
    random_masks,
    scores,
    wanda,
)
from xlvlms_tutorial.models.vlm import VLM


def drop_by_loop(rows, sparsity):
    """The definition: sort a row's weights by score, the first of equal
    ones first, and drop the lowest.
    """
    keep = torch.ones(len(rows), len(rows[0]), dtype=torch.bool)
    for i, row in enumerate(rows):
        order = sorted(range(len(row)), key=lambda j: (row[j], j))
        for j in order[: math.floor(sparsity * len(row) + 1e-9)]:
            keep[i, j] = False
    return keep


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_wanda_is_the_double_loop(vlm, calibration, sparsity):
    masks = wanda(vlm, calibration, sparsity)
    for key, linear in linear_maps(vlm).items():
        norms = [math.sqrt(x / calibration.tokens[key]) for x in calibration.squares[key].tolist()]
        expected = [
            [abs(w) * a for w, a in zip(row, norms, strict=True)] for row in linear.weight.tolist()
        ]
        torch.testing.assert_close(
            scores(vlm, calibration, *key).double(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-6,
            atol=0,
        )
        assert torch.equal(masks.unpack(*key), drop_by_loop(expected, sparsity))


def test_another_connector_to_the_same_weights_is_no_other_model(vlm, calibration):
    renamed = VLM(vlm.model, vlm.processor, "video")
    assert wanda(renamed, calibration, 0.5) == wanda(vlm, calibration, 0.5)
    assert torch.equal(
        scores(renamed, calibration, 1, "mlp.up_proj"), scores(vlm, calibration, 1, "mlp.up_proj")
    )
    assert wanda(renamed, calibration, 0.5).model == "video"


@pytest.mark.parametrize("layers", [2, [1, 3]])
def test_some_layers_have_the_masks_that_all_have(vlm, calibration, layers):
    expected_layers = [layers] if isinstance(layers, int) else layers
    for make in (
        lambda **options: wanda(vlm, calibration, 0.5, **options),
        lambda **options: magnitude_masks(vlm, 0.5, **options),
    ):
        subset, every = make(layers=layers), make()
        assert list(subset) == [key for key in linear_maps(vlm) if key[0] in expected_layers]
        assert all(torch.equal(subset.unpack(*key), every.unpack(*key)) for key in subset)


@pytest.mark.parametrize("sparsity", [0.29, 0.3, 0.5, 0.7])
def test_each_row_keeps_exactly_as_many(vlm, calibration, sparsity):
    for masks in (
        wanda(vlm, calibration, sparsity),
        magnitude_masks(vlm, sparsity),
        random_masks(vlm, sparsity, 0),
    ):
        for layer, name in masks:
            keep = masks.unpack(layer, name)
            width = keep.shape[1]
            assert (keep.sum(dim=1) == width - math.floor(sparsity * width)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(1, 4),
    st.floats(0, 0.99),
    st.integers(0, 999),
)
def test_equal_scores_are_dropped_from_the_first(rows, columns, values, sparsity, seed):
    numbers = torch.randint(
        0, values, (rows, columns), generator=torch.Generator().manual_seed(seed)
    ).float()
    assert torch.equal(kept(numbers, sparsity), drop_by_loop(numbers.tolist(), sparsity))


def test_a_share_that_is_a_whole_number_is_not_rounded_down():
    assert 0.29 * 100 < 29
    assert int(kept(torch.arange(100.0)[None], 0.29).sum()) == 71


def test_the_smallest_are_found_as_on_a_gpu(monkeypatch):
    numbers = torch.rand(9, 33, generator=torch.Generator().manual_seed(0)).mul(10).floor()
    ours = _smallest(numbers, 12)
    assert torch.equal(ours, torch.kthvalue(numbers, 12, dim=1, keepdim=True).values)
    assert torch.equal(ours, torch.from_numpy(np.sort(numbers.numpy(), axis=1)[:, 11:12]))


def test_activations_of_one_size_make_wanda_magnitude(vlm, calibration):
    flat = replace(
        calibration,
        squares={key: torch.full_like(sums, 3.0) for key, sums in calibration.squares.items()},
    )
    assert wanda(vlm, flat, 0.5) == magnitude_masks(vlm, 0.5)
    assert wanda(vlm, calibration, 0.5) != magnitude_masks(vlm, 0.5)


def test_twice_the_same_inputs_change_no_mask(vlm, calibration):
    assert wanda(vlm, calibration + calibration, 0.4) == wanda(vlm, calibration, 0.4)


def test_magnitude_over_a_whole_matrix(vlm):
    masks = magnitude_masks(vlm, 0.37, per="matrix")
    for key, linear in linear_maps(vlm).items():
        keep, size = masks.unpack(*key), linear.weight.abs()
        assert int((~keep).sum()) == math.floor(0.37 * keep.numel())
        assert size[keep].min() >= size[~keep].max()


def test_random_masks_follow_their_seed_and_overlap_by_chance(vlm):
    assert random_masks(vlm, 0.5, 1) == random_masks(vlm, 0.5, 1)
    for sparsity in (0.3, 0.5, 0.7):
        masks = {str(seed): random_masks(vlm, sparsity, seed) for seed in (1, 2)}
        density = masks["1"].density
        assert mask_overlap(masks).loc["1", "2"] == pytest.approx(
            independent_iou(density), abs=0.02
        )


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_architecture_is_masked_and_runs(name):
    model, inputs = zoo.build(name)
    case = VLM(model, None, name)
    batch = case.prepare(inputs)
    masks = wanda(case, calibrate_on(case, [batch]), 0.5)
    assert list(masks) == list(linear_maps(case))
    assert masks.sparsity == 0.5
    plain = case.forward(batch).logits
    with mask_weights(case, masks.tensors(case)):
        assert not torch.allclose(case.forward(batch).logits, plain)
    with mask_weights(case, wanda(case, calibrate_on(case, [batch]), 0).tensors(case)):
        assert torch.equal(case.forward(batch).logits, plain)


def test_rows_of_conv1d_are_its_outputs():
    case = gpt2()
    result = calibrate_on(case, [text_batch(case)])
    masks = wanda(case, result, 0.5)
    for key, linear in linear_maps(case).items():
        keep = masks.unpack(*key)
        assert keep.shape == linear.weight.shape == scores(case, result, *key).shape
        norms = result.norms(*key)
        expected = drop_by_loop((linear.weight.T.double().abs() * norms).float().tolist(), 0.5)
        assert (keep.T.sum(dim=1) == keep.shape[0] // 2).all()
        # float32 may order two neighbours otherwise
        assert (expected == keep.T).float().mean() > 0.999
    batch = text_batch(case)
    with mask_weights(case, masks.tensors(case)):
        assert torch.isfinite(case.forward(batch).logits).all()


def test_half_precision_is_scored_in_float32(calibration):
    half = tiny_llava()
    half.model.bfloat16()
    result = calibrate_on(half, [half.batch([PICTURE], ["What colour ?"])])
    assert scores(half, result, 1, "mlp.up_proj").dtype == torch.float32
    assert wanda(half, result, 0.5).sparsity == 0.5


def test_weights_stay_as_they_are(vlm, calibration):
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    (
        wanda(vlm, calibration, 0.5),
        magnitude_masks(vlm, 0.5),
        magnitude_masks(vlm, 0.5, "matrix"),
        scores(vlm, calibration, 1, "mlp.up_proj"),
    )
    assert all(torch.equal(value, before[name]) for name, value in vlm.model.state_dict().items())


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(vlm, calibration, sparsity):
    for make in (
        lambda: wanda(vlm, calibration, sparsity),
        lambda: magnitude_masks(vlm, sparsity),
        lambda: random_masks(vlm, sparsity, 0),
    ):
        with pytest.raises(InputError, match="share of weights to drop"):
            make()


def test_what_does_not_belong_together_is_refused(vlm, calibration):
    with pytest.raises(InputError, match="allowed: 'row', 'matrix'"):
        magnitude_masks(vlm, 0.5, per="layer")
    smaller = tiny_llava(layers=2)
    for make in (
        lambda: wanda(smaller, calibration, 0.5),
        lambda: scores(smaller, calibration, 1, "mlp.up_proj"),
    ):
        with pytest.raises(InputError, match="calibrate on the weights that are scored"):
            make()
    with pytest.raises(InputError, match="no layers"):
        wanda(vlm, calibration, 0.5, layers=[])
    with pytest.raises(LayerError, match="4"):
        magnitude_masks(vlm, 0.5, layers=4)
    with pytest.raises(InputError, match="no linear map 'up' in layer 1"):
        scores(vlm, calibration, 1, "up")


def test_maps_that_saw_no_token_and_damaged_weights_give_no_mask(calibration):
    case = VLM(zoo.build("mllama")[0], None, "mllama")
    with pytest.raises(InputError, match=r"layer 2 cross_attn\.q_proj saw no token"):
        wanda(case, calibrate_on(case, [text_batch(case)]), 0.5)
    case = tiny_llava()
    case.blocks[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    damaged = replace(calibration, fingerprint=fingerprint(case))
    for make in (lambda: wanda(case, damaged, 0.5), lambda: magnitude_masks(case, 0.5)):
        with pytest.raises(InputError, match=r"scores in layer 2 mlp\.up_proj"):
            make()
    case.blocks[1].mlp.up_proj.weight = nn.Parameter(
        torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(InputError, match="is quantised"):
        random_masks(case, 0.5, 0)
