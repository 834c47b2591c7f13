"""Metrics of maps against hand-made cases and loops; bad maps are refused."""

import math

import pytest
import torch

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.attribution import (
    CONTROLS,
    binary_entropy,
    confidence,
    control_maps,
    mass_share,
    overlap,
    perturbation_curves,
    pointing_game,
    published_entropy,
    scaled,
    top_share,
)

N, H, W = 3, 4, 5


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(N, H, W, generator=generator)
    truth = torch.rand(N, H, W, generator=generator) < 0.4
    return probabilities, truth


def test_probability_metrics_are_those_of_loops():
    probabilities, truth = draws()
    for n in range(N):
        published, binary, sure = 0.0, [], []
        for row in range(H):
            for column in range(W):
                p = probabilities[n, row, column].item()
                if truth[n, row, column]:
                    published -= p * math.log2(p) / math.log2(3)
                    binary.append(-p * math.log2(p) - (1 - p) * math.log2(1 - p))
                    sure.append(p)
        got = published_entropy(probabilities, truth)[n].item()
        assert got == pytest.approx(published / (H * W), rel=1e-5)
        assert binary_entropy(probabilities, truth)[n].item() == pytest.approx(
            sum(binary) / len(binary), rel=1e-5
        )
        assert confidence(probabilities, truth)[n].item() == pytest.approx(
            sum(sure) / len(sure), rel=1e-5
        )


def test_entropies_are_lowest_where_the_thing_is_gone_and_confidence_tells():
    truth = torch.ones(1, 2, 2, dtype=torch.bool)
    gone, there = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    for entropy in (published_entropy, binary_entropy):
        assert entropy(gone, truth).item() == entropy(there, truth).item() == 0
        assert entropy(torch.full((1, 2, 2), 0.4), truth).item() > 0.2
    assert confidence(gone, truth).item() == 0 and confidence(there, truth).item() == 1


def test_overlap_mass_and_pointing_by_hand():
    truth = torch.tensor([[[True, True, False, False]]])
    region = torch.tensor([[[False, True, True, True]]])
    assert overlap(region, truth).item() == 0.25
    assert overlap(torch.zeros_like(truth), truth).item() == 0
    maps = torch.tensor([[[-5.0, 1.0, 3.0, 0.0]]])
    assert mass_share(maps, truth).item() == 0.25  # what is below 0 counts as 0
    assert pointing_game(maps, truth).item() == 0
    assert pointing_game(maps.flip(2), truth).item() == 1
    cells = torch.tensor([[[0.5, 0.25, 0.0, 0.0]]])
    assert mass_share(torch.ones(1, 1, 4), cells).item() == pytest.approx(0.75 / 4)


def test_what_knows_nothing_has_the_share_of_the_picture():
    _, truth = draws()
    share = truth.float().mean(dim=(1, 2))
    full = control_maps(N, H, W, "full")
    torch.testing.assert_close(mass_share(full, truth), share)
    for name in ("full", "empty"):
        torch.testing.assert_close(pointing_game(control_maps(N, H, W, name), truth), share)
    torch.testing.assert_close(overlap(full > 0.4, truth), share)


def test_controls():
    assert set(CONTROLS) == {"random", "centre", "empty", "full"}
    for name in CONTROLS:
        maps = control_maps(2, 5, 7, name, seed=1)
        assert maps.shape == (2, 5, 7) and (maps >= 0).all() and (maps <= 1).all()
    first, second = (control_maps(2, 5, 7, "random", seed) for seed in (1, 2))
    assert torch.equal(first, control_maps(2, 5, 7, "random", 1)) and not torch.equal(first, second)
    centre = control_maps(1, 5, 7, "centre")[0]
    assert centre.argmax() == 5 * 7 // 2
    assert torch.equal(centre, centre.flip(0)) and torch.equal(centre, centre.flip(1))
    with pytest.raises(InputError, match="'corner'; allowed: 'random', 'centre'"):
        control_maps(1, 2, 2, "corner")


def test_regions_at_equal_area_hold_the_highest_places():
    maps, _ = draws(3)
    for share, places in ((0, 0), (0.25, 5), (0.5, 10), (1, 20)):
        region = top_share(maps, share)
        assert region.sum(dim=(1, 2)).tolist() == [places] * N
        for n in range(N):
            if 0 < places < H * W:
                assert maps[n][region[n]].min() >= maps[n][~region[n]].max()
    ties = torch.tensor([[[1.0, 0.0, 1.0, 1.0]]])
    assert top_share(ties, 0.5)[0, 0].tolist() == [True, False, True, False]


def test_curves_of_a_sum_are_partial_sums():
    maps, _ = draws(4)
    kept, removed = perturbation_curves(
        lambda mask: (maps * mask).sum(dim=(1, 2)), maps, [0.1, 0.5]
    )
    ordered = maps.flatten(1).sort(dim=1, descending=True).values
    torch.testing.assert_close(kept[:, 0], ordered[:, :2].sum(dim=1))
    torch.testing.assert_close(kept[:, 1], ordered[:, :10].sum(dim=1))
    torch.testing.assert_close(kept + removed, ordered.sum(dim=1)[:, None].expand(-1, 2))


def test_stretching():
    maps, _ = draws(5)
    stretched = scaled(3 * maps - 1)
    torch.testing.assert_close(stretched, scaled(maps))
    assert stretched.amin(dim=(1, 2)).tolist() == [0] * N
    assert stretched.amax(dim=(1, 2)).tolist() == [1] * N


@pytest.mark.parametrize(
    "use",
    [
        scaled,
        lambda maps: top_share(maps, 0.5),
        lambda maps: perturbation_curves(lambda mask: mask.sum(dim=(1, 2)), maps),
    ],
)
def test_constant_maps_rank_nothing(use):
    maps, _ = draws()
    maps[1] = 0.3
    with pytest.raises(InputError, match=r"maps \[1\] are constant and rank nothing; leave them"):
        use(maps)
    maps[1, 0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        use(maps)


def test_masks_of_another_size_absent_classes_and_no_probabilities_are_refused():
    probabilities, truth = draws()
    for measure in (published_entropy, binary_entropy, confidence, mass_share, pointing_game):
        with pytest.raises(InputError, match=r"\(3, 4, 5\) and masks of \(3, 4, 4\).*one size"):
            measure(probabilities, truth[:, :, 1:])
        with pytest.raises(InputError, match=r"absent from pictures \[0, 2\]"):
            measure(probabilities, truth & torch.tensor([False, True, False])[:, None, None])
    with pytest.raises(InputError, match=r"masks of \(3, 4, 4\)"):
        overlap(truth, truth[:, :, 1:])
    with pytest.raises(InputError, match="not between 0 and 1; take the sigmoid"):
        confidence(probabilities - 1, truth)
    with pytest.raises(InputError, match=r"maps \[0, 1, 2\] have no mass"):
        mass_share(-probabilities, truth)
    with pytest.raises(InputError, match="share is 2; give 0 to 1"):
        top_share(probabilities, 2)
    with pytest.raises(InputError, match="n_classes is 1"):
        published_entropy(probabilities, truth, 1)
