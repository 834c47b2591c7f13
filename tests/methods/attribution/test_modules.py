"""Class activation maps against closed forms on a linear network, and against their formulas in
loops; what cannot be mapped is refused.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.attribution import CAM_METHODS, cam

K, SIDE = 3, 5


class Linear(nn.Module):
    """Maps A = 1x1 convolution of the picture; logits of classes are sums of maps, weighted."""

    def __init__(self, weights, segments: bool = False) -> None:
        super().__init__()
        self.maps = nn.Conv2d(K, K, 1, bias=False)
        self.maps.weight.data = torch.eye(K)[..., None, None]
        self.weights = torch.tensor(weights, dtype=torch.float32)  # (classes, K)
        self.segments = segments

    def forward(self, pictures):
        maps = self.maps(pictures)
        logits = torch.einsum("ck,nkhw->nchw", self.weights, maps)
        return logits if self.segments else logits.sum(dim=(2, 3))


@pytest.fixture
def pictures():
    return torch.rand(2, K, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


WEIGHTS = [[1.0, -2.0, 0.5], [0.3, 0.2, 0.9]]


@pytest.mark.parametrize("method", ["grad", "xgrad"])
@pytest.mark.parametrize("target", [0, 1])
def test_on_a_linear_network_gradient_maps_are_the_classs_share_of_each_place(
    pictures, method, target
):
    # dS/dA is the class's weight everywhere, which both means return
    expected = torch.einsum("k,nkhw->nhw", torch.tensor(WEIGHTS[target]), pictures).clamp(min=0)
    model = Linear(WEIGHTS)
    torch.testing.assert_close(cam(model, model.maps, pictures, target, method), expected)


def test_layer_cam_takes_positive_weights_alone(pictures):
    model = Linear(WEIGHTS)
    positive = torch.tensor(WEIGHTS[0]).clamp(min=0)
    expected = torch.einsum("k,nkhw->nhw", positive, pictures)
    torch.testing.assert_close(cam(model, model.maps, pictures, 0, "layer"), expected)


def test_ablation_on_a_linear_network_weighs_each_map_by_its_share_of_the_score(pictures):
    model = Linear(WEIGHTS)
    weights = torch.tensor(WEIGHTS[1])
    sums = pictures.sum(dim=(2, 3)) * weights
    shares = sums / sums.sum(dim=1, keepdim=True)
    expected = torch.einsum("nk,nkhw->nhw", shares, pictures)
    torch.testing.assert_close(cam(model, model.maps, pictures, 1, "ablation"), expected)


def test_ablation_of_a_negative_score_does_not_turn_its_sign(pictures):
    model = Linear([[-1.0, -1.0, 0.5]])
    maps = cam(model, model.maps, pictures, 0, "ablation")
    sums = pictures.sum(dim=(2, 3)) * torch.tensor([-1.0, -1.0, 0.5])
    weights = sums / sums.sum(dim=1, keepdim=True).abs()
    expected = torch.einsum("nk,nkhw->nhw", weights, pictures).clamp(min=0)
    torch.testing.assert_close(maps, expected)


def test_score_cam_is_the_softmax_of_the_scores_of_masked_pictures(pictures):
    model = Linear(WEIGHTS)
    expected = torch.zeros(2, SIDE, SIDE)
    for n, picture in enumerate(pictures):
        scores = []
        for k in range(K):
            mask = (picture[k] - picture[k].min()) / (picture[k].max() - picture[k].min())
            scores.append(model((picture * mask)[None])[0, 0])
        for k, weight in enumerate(torch.stack(scores).softmax(dim=0)):
            expected[n] += weight * picture[k]
    torch.testing.assert_close(cam(model, model.maps, pictures, 0, "score"), expected)


def test_eigen_cam_is_the_projection_on_the_first_component_whatever_the_class(pictures):
    model = Linear(WEIGHTS)
    maps = cam(model, model.maps, pictures, 0, "eigen")
    for n, picture in enumerate(pictures):
        rows = picture.flatten(1).T.double()
        centred = rows - rows.mean(dim=0)
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        heights = centred @ vectors[:, -1]
        heights = heights * torch.sign((heights * centred.mean(dim=1)).sum())
        expected = heights.view(SIDE, SIDE).clamp(min=0).float()
        torch.testing.assert_close(maps[n], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cam(model, model.maps, pictures, 1, "eigen"), maps)


def test_grad_plus_plus_on_a_linear_network_has_the_weights_of_its_formula(pictures):
    model = Linear(WEIGHTS)
    expected = torch.zeros(2, SIDE, SIDE)
    for n, picture in enumerate(pictures):
        for k, gradient in enumerate(WEIGHTS[0]):
            below = 2 * gradient**2 + picture[k].sum() * gradient**3
            weight = SIDE**2 * gradient**2 / below * max(gradient, 0)
            expected[n] += weight * picture[k]
    torch.testing.assert_close(cam(model, model.maps, pictures, 0, "grad++"), expected)


class Bent(nn.Module):
    """A small network that is not linear and halves the picture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(K, 4, 3, stride=2, padding=1)
        self.head = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, pictures):
        return self.head(torch.tanh(self.first(pictures)) ** 2)


def by_loops(model, pictures, target, method, weights):
    """Grad-CAM, XGrad-CAM and LayerCAM by finite differences of the score, in float64."""
    model = model.double()
    results = []
    for picture, weight in zip(pictures.double(), weights.double(), strict=True):
        maps = model.first(picture[None])

        def score(states, weight=weight):
            logits = model.head(torch.tanh(states) ** 2)[0, target]
            return (logits * weight).sum()

        gradients = torch.zeros_like(maps)
        for place in range(maps.numel()):
            step = torch.zeros(maps.numel()).double()
            step[place] = 1e-5
            step = step.view(maps.shape)
            gradients.view(-1)[place] = (score(maps + step) - score(maps - step)) / 2e-5
        if method == "grad":
            small = (gradients.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1)
        elif method == "xgrad":
            share = (gradients * maps).sum(dim=(2, 3)) / maps.sum(dim=(2, 3))
            small = (share[..., None, None] * maps).sum(dim=1)
        else:
            small = (gradients.clamp(min=0) * maps).sum(dim=1)
        enlarged = nn.functional.interpolate(
            small[:, None].clamp(min=0), picture.shape[1:], mode="bilinear"
        )
        results.append(enlarged[0, 0])
    return torch.stack(results).float()


@pytest.mark.parametrize("method", ["grad", "xgrad", "layer"])
def test_gradients_of_a_weighted_sum_of_pixels_are_those_of_finite_differences(method):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(2, K, 6, 6, generator=generator)
    weights = torch.rand(2, 3, 3, generator=generator)
    model = Bent()
    maps = cam(model, model.first, pictures, 1, method, weights)
    expected = by_loops(Bent(), pictures, 1, method, weights)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", CAM_METHODS)
def test_batches_do_not_matter_and_the_model_is_left_as_it_was(pictures, method):
    model = Linear(WEIGHTS, segments=True).requires_grad_(False)
    weights = torch.rand(2, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    whole = cam(model, model.maps, pictures, 1, method, weights)
    single = cam(model, model.maps, pictures, 1, method, weights, batch_size=1)
    torch.testing.assert_close(whole, single)
    assert whole.shape == (2, SIDE, SIDE) and (whole >= 0).all()
    assert not model.maps._forward_hooks


def test_weights_of_pixels_choose_what_is_explained(pictures):
    model = Linear(WEIGHTS, segments=True)
    weights = torch.zeros(2, SIDE, SIDE)
    weights[:, 0, 0] = 1
    maps = cam(model, model.maps, pictures, 1, "layer", weights)
    assert (maps[:, 0, 0] > 0).all() and (maps > 0).sum() == 2


def test_outputs_with_logits_are_taken(pictures):
    model = Linear(WEIGHTS)
    plain = cam(model, model.maps, pictures, 0)

    class Wrapped(nn.Module):
        def forward(self, inputs):
            return SimpleNamespace(logits=model(inputs))

    torch.testing.assert_close(cam(Wrapped(), model.maps, pictures, 0), plain)


@pytest.mark.parametrize("method", ["layer", "eigen"])
def test_a_module_without_maps_is_refused(pictures, method):
    model = nn.Sequential(nn.Conv2d(K, 2, 3), nn.Flatten(), nn.Linear(18, 2))
    with pytest.raises(InputError, match=r"no maps .*\(2, 18\).*choose a convolution"):
        cam(model, model[1], pictures, 0, method)
    other = nn.Conv2d(K, 1, 1)
    with pytest.raises(InputError, match="ran 0 times"):
        cam(model, other, pictures, 0, method)


def test_an_absent_class_another_size_and_unknown_names_are_refused(pictures):
    model = Linear(WEIGHTS, segments=True)
    weights = torch.ones(2, SIDE, SIDE)
    weights[1] = 0
    with pytest.raises(InputError, match=r"absent from pictures \[1\].*leave these"):
        cam(model, model.maps, pictures, 0, weights=weights)
    with pytest.raises(InputError, match=r"weights of \(4, 4\) pixels for an output of \(5, 5\)"):
        cam(model, model.maps, pictures, 0, weights=torch.ones(2, 4, 4))
    with pytest.raises(InputError, match="weights of 3 pictures for 2"):
        cam(model, model.maps, pictures, 0, weights=torch.ones(3, SIDE, SIDE))
    with pytest.raises(InputError, match="class 2; allowed: 0 to 1"):
        cam(model, model.maps, pictures, 2)
    with pytest.raises(InputError, match="'cam'; allowed: 'grad', 'grad\\+\\+', 'xgrad'"):
        cam(model, model.maps, pictures, 0, "cam")
    with pytest.raises(InputError, match="NaN or infinite"):
        cam(model, model.maps, pictures, 0, weights=torch.full((2, SIDE, SIDE), torch.nan))
