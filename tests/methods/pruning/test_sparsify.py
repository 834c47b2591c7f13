"""n:m masks against a loop over groups, intersections against sets, matched masks
row by row, and zeros that stay.
"""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests import zoo
from tests.support.text_models import gpt2, text_batch
from tests.support.tiny import PICTURE, tiny_llava
from xlvlms_tutorial.errors import FileError, InputError, InterventionError, LayerError
from xlvlms_tutorial.interventions.edits import add, mask_weights
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.methods.pruning import sparsify as module
from xlvlms_tutorial.methods.pruning.calibration import calibrate_on, fingerprint, linear_maps
from xlvlms_tutorial.methods.pruning.masks import Masks
from xlvlms_tutorial.methods.pruning.scores import (
    magnitude_masks,
    random_masks,
    scores,
    wanda,
    without_lowest,
)
from xlvlms_tutorial.methods.pruning.sparsify import (
    alpha_subnet,
    apply_masks,
    match_sparsity,
    n_m_masks,
)
from xlvlms_tutorial.models.vlm import VLM


@pytest.fixture(scope="module")
def three(vlm, calibration):
    return [
        wanda(vlm, calibration, 0.3),
        magnitude_masks(vlm, 0.5, "matrix"),
        random_masks(vlm, 0.4, 7),
    ]


# n:m


def groups_by_loop(rows, n, m):
    """The definition: of each group, the n with the highest score, the last of equal ones first."""
    keep = torch.zeros(len(rows), len(rows[0]), dtype=torch.bool)
    for i, row in enumerate(rows):
        for start in range(0, len(row), m):
            for j in sorted(range(start, start + m), key=lambda j: (row[j], j))[m - n :]:
                keep[i, j] = True
    return keep


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8), (5, 16), (1, 32)])
def test_nm_is_the_double_loop(vlm, calibration, n, m):
    for by in (calibration, "magnitude"):
        masks = n_m_masks(vlm, by, n, m)
        assert masks.sparsity == 1 - n / m
        for key, linear in linear_maps(vlm).items():
            importance = (
                scores(vlm, calibration, *key) if by is calibration else linear.weight.abs()
            )
            assert torch.equal(masks.unpack(*key), groups_by_loop(importance.tolist(), n, m)), key


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(2, 12), st.integers(1, 4), st.data())
def test_each_group_keeps_exactly_n_also_of_equal_scores(rows, groups, m, values, data):
    n, seed = data.draw(st.integers(1, m - 1)), data.draw(st.integers(0, 999))
    numbers = torch.randint(
        0, values, (rows, groups * m), generator=torch.Generator().manual_seed(seed)
    ).float()
    keep = module._best_of_groups(numbers, n, m)
    assert (keep.reshape(rows, groups, m).sum(dim=2) == n).all()
    assert torch.equal(keep, groups_by_loop(numbers.tolist(), n, m))


def test_nm_of_some_layers_and_by_chance(vlm):
    subset, every = n_m_masks(vlm, "magnitude", layers=[1, 3]), n_m_masks(vlm, "magnitude")
    assert {layer for layer, _ in subset} == {1, 3}
    assert all(torch.equal(subset.unpack(*key), every.unpack(*key)) for key in subset)
    assert (
        n_m_masks(vlm, "random", seed=1)
        == n_m_masks(vlm, "random", seed=1)
        != n_m_masks(vlm, "random", seed=2)
    )
    assert n_m_masks(vlm, "random").sparsity == 0.5


def test_activations_of_one_size_make_wandas_groups_those_of_magnitude(vlm, calibration):
    flat = replace(
        calibration,
        squares={key: torch.full_like(sums, 3.0) for key, sums in calibration.squares.items()},
    )
    assert n_m_masks(vlm, flat) == n_m_masks(vlm, "magnitude") != n_m_masks(vlm, calibration)


def test_groups_of_conv1d_are_of_its_inputs():
    case = gpt2()
    masks = n_m_masks(case, calibrate_on(case, [text_batch(case)]), 2, 4)
    for key, linear in linear_maps(case).items():
        keep = masks.unpack(*key)
        assert keep.shape == linear.weight.shape
        assert (keep.T.reshape(keep.shape[1], -1, 4).sum(dim=2) == 2).all()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (1, 1), (-1, 2)])
def test_patterns_that_mean_nothing_are_refused(vlm, n, m):
    with pytest.raises(InputError, match=r"n from 1 to m - 1"):
        n_m_masks(vlm, "magnitude", n, m)


def test_groups_that_do_not_divide_the_inputs_are_refused(vlm, calibration):
    with pytest.raises(
        InputError,
        match=(
            r"2:3 in layer 1 self_attn\.q_proj, which has 32 inputs; choose an m that divides them"
        ),
    ):
        n_m_masks(vlm, "magnitude", 2, 3)
    with pytest.raises(InputError, match="2:64 in layer 1"):
        n_m_masks(vlm, calibration, 2, 64)
    with pytest.raises(
        InputError, match="scores by 'taylor'; allowed: a Calibration, 'magnitude', 'random'"
    ):
        n_m_masks(vlm, "taylor")
    with pytest.raises(LayerError):
        n_m_masks(vlm, "magnitude", layers=[4])
    with pytest.raises(InputError, match="no layers"):
        n_m_masks(vlm, "magnitude", layers=[])
    with pytest.raises(InputError, match="calibrate on the weights that are scored"):
        n_m_masks(tiny_llava(layers=2), calibration)


# Intersections


def test_the_alpha_subnetwork_is_what_all_keep(three):
    merged = alpha_subnet(three)
    for key in merged:
        flat = [masks.unpack(*key).flatten().tolist() for masks in three]
        expected = [all(bits) for bits in zip(*flat, strict=True)]
        assert merged.unpack(*key).flatten().tolist() == expected
    assert merged == three[0] & three[1] & three[2]
    assert merged.sparsity >= max(masks.sparsity for masks in three)
    assert (merged.model, merged.fingerprint) == (three[0].model, three[0].fingerprint)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 99)), min_size=1, max_size=6))
def test_no_mask_is_sparser_than_the_intersection(draws):
    masks = []
    for share, seed in draws:
        keep = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)) >= share
        masks.append(Masks.pack({(1, "map"): keep}, "m", "f"))
    merged = alpha_subnet(masks)
    assert merged.sparsity >= max(mask.sparsity for mask in masks)
    assert all((merged - mask).n_kept == 0 for mask in masks)
    assert alpha_subnet([merged, *masks]) == merged


def test_masks_come_from_files_one_at_a_time_and_stay_as_they_are(three, tmp_path, monkeypatch):
    paths = [masks.save(tmp_path / f"{k}.masks") for k, masks in enumerate(three)]
    assert (
        alpha_subnet(paths)
        == alpha_subnet(iter(three))
        == alpha_subnet([three[0], *map(str, paths[1:])])
    )
    assert [Masks.load(path) for path in paths] == three
    before = [{key: bits.copy() for key, bits in masks.packed.items()} for masks in three]
    alpha_subnet(three)
    assert all(
        (masks.packed[key] == bits).all()
        for masks, old in zip(three, before, strict=True)
        for key, bits in old.items()
    )
    read, load = [], Masks.load

    def loading(path):
        assert not any(ref() for ref in read), "the file before is still in memory"
        loaded = load(path)
        read.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(module.Masks, "load", staticmethod(loading))
    alpha_subnet(path for path in paths)
    assert len(read) == 3


def test_masks_that_do_not_belong_together_are_refused_with_their_names(vlm, three, tmp_path):
    second_vlm = tiny_llava(seed=1)
    second_vlm.name = "another-llava"
    with pytest.raises(
        InputError,
        match="Masks of tiny-llava.*Masks of another-llava.*merge masks of the same weights",
    ):
        alpha_subnet([three[0], magnitude_masks(second_vlm, 0.5)])
    with pytest.raises(InputError, match="linear maps"):
        alpha_subnet([three[0], magnitude_masks(vlm, 0.5, layers=1)])
    with pytest.raises(InputError, match="no masks"):
        alpha_subnet([])
    (tmp_path / "no.masks").write_bytes(b"damaged")
    for nothing in ("no.masks", "absent", "."):
        with pytest.raises(FileError):
            alpha_subnet([tmp_path / nothing])


# Matched sparsity


@pytest.mark.parametrize("name", ["llava", "gpt2"])
def test_matched_masks_keep_as_many_in_every_row(name):
    case = gpt2() if name == "gpt2" else VLM(zoo.build(name)[0], None, name)
    sums = calibrate_on(case, [text_batch(case)])
    merged = alpha_subnet(
        [wanda(case, sums, 0.5), magnitude_masks(case, 0.5, "matrix"), random_masks(case, 0.3, 0)]
    )
    for by in (sums, "magnitude", "random"):
        matched_masks = match_sparsity(case, merged, by)
        assert (
            matched_masks.n_kept == merged.n_kept
            and list(matched_masks) == list(merged)
            and matched_masks != merged
        )
        for key, linear in linear_maps(case).items():
            inputs = 0 if name == "gpt2" else 1
            assert torch.equal(
                matched_masks.unpack(*key).sum(dim=inputs), merged.unpack(*key).sum(dim=inputs)
            ), (by, key)
            if by == "magnitude":
                size, keep = linear.weight.abs(), matched_masks.unpack(*key)
                lowest = size.masked_fill(~keep, math.inf).amin(dim=inputs)
                highest = size.masked_fill(keep, -math.inf).amax(dim=inputs)
                assert (lowest >= highest).all()


def test_masks_matched_to_their_own_kind_are_themselves(vlm, calibration):
    assert match_sparsity(vlm, wanda(vlm, calibration, 0.5), calibration) == wanda(
        vlm, calibration, 0.5
    )
    assert match_sparsity(vlm, magnitude_masks(vlm, 0.37), "magnitude") == magnitude_masks(
        vlm, 0.37
    )
    assert match_sparsity(vlm, random_masks(vlm, 0.5, 3), "random", seed=3) == random_masks(
        vlm, 0.5, 3
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 4), st.integers(0, 999))
def test_rows_that_drop_different_numbers_drop_their_lowest(rows, columns, values, seed):
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, values, (rows, columns), generator=random).float()
    dropped = torch.randint(0, columns + 1, (rows,), generator=random)
    keep = without_lowest(numbers, dropped)
    for i, row in enumerate(numbers.tolist()):
        order = sorted(range(columns), key=lambda j: (row[j], j))
        assert keep[i].nonzero().flatten().tolist() == sorted(order[int(dropped[i]) :])


def test_masks_of_another_model_cannot_be_matched(vlm, calibration):
    second_masks = magnitude_masks(tiny_llava(seed=1), 0.5)
    for use in (
        lambda: match_sparsity(vlm, second_masks, "magnitude"),
        lambda: apply_masks(vlm, second_masks),
    ):
        with pytest.raises(InputError, match="use masks that were made for these weights"):
            use()
    with pytest.raises(InputError, match="scores by 'wanda'"):
        match_sparsity(vlm, magnitude_masks(vlm, 0.5), "wanda")
    foreign = Masks.pack(
        {(9, "mlp.up_proj"): torch.ones(2, 2, dtype=torch.bool)}, "tiny-llava", fingerprint(vlm)
    )
    with pytest.raises(InputError):
        apply_masks(vlm, foreign)


# Zeros for good


def test_zeros_are_written_for_good_and_saved(vlm, calibration, tmp_path):
    case, masks = tiny_llava(), wanda(vlm, calibration, 0.5)
    batch = case.batch([PICTURE], ["What colour ?"])
    with mask_weights(case, masks.tensors(case)):
        expected = case.forward(batch).logits
    dense, mark = (
        {key: linear.weight.clone() for key, linear in linear_maps(case).items()},
        fingerprint(case),
    )
    apply_masks(case, masks)
    assert torch.equal(case.forward(batch).logits, expected)
    assert fingerprint(case) != mark
    assert case.name == f"tiny-llava + masked 50.0% ({fingerprint(case)[:8]})"
    for key, linear in linear_maps(case).items():
        assert torch.equal(
            linear.weight, torch.where(masks.unpack(*key), dense[key], torch.zeros(()))
        )
    case.model.save_pretrained(tmp_path)
    case.processor.save_pretrained(tmp_path)
    again = load(tmp_path, device="cpu", dtype="float32")
    assert fingerprint(again) == fingerprint(case)
    torch.testing.assert_close(again.forward(batch).logits, expected)
    # the weights are not those that the masks were made for any more
    with pytest.raises(InputError):
        apply_masks(case, masks)


def test_weights_that_cannot_be_zeroed_for_good_stay_as_they_are(three):
    case = tiny_llava()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    with (
        add(case, torch.ones(case.width), 1),
        pytest.raises(InterventionError, match=r"inside add\(.*leave the intervention first"),
    ):
        apply_masks(case, three[0])
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    case.blocks[1].mlp.up_proj.weight = case.blocks[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"layer 1 mlp\.up_proj are shared"):
        apply_masks(case, magnitude_masks(case, 0.5))
    case.blocks[1].mlp.up_proj.weight = nn.Parameter(
        torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(InputError, match="is quantised"):
        apply_masks(case, three[0])
    assert case.name == "tiny-llava"


def test_damaged_weights_and_empty_calibrations_give_no_masks(vlm, calibration):
    case = tiny_llava()
    case.blocks[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"scores in layer 2 mlp\.up_proj"):
        n_m_masks(case, "magnitude")
    with pytest.raises(InputError, match="no batches"):
        calibrate_on(vlm, [])
    empty = replace(calibration, tokens=dict.fromkeys(calibration.tokens, 0))
    with pytest.raises(InputError, match="saw no token"):
        n_m_masks(vlm, empty)
