"""Class activation maps: which places of a module's maps a score comes from.

Seven formulas over the activations of one module and the gradients of one score, written from the
papers. Segmentation changes nothing but the score: a sum over pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.validation import require, require_counts, require_one_of

Maps = Float[Tensor, "n k h w"]


def cam(
    model: nn.Module,
    module: nn.Module,
    pictures: Float[Tensor, "n c h w"],
    target: int,
    method: str = "layer",
    weights: Float[Tensor, "m h2 w2"] | None = None,
    batch_size: int = 64,
) -> Float[Tensor, "n h w"]:
    r"""Compute class activation maps of a module for one class.

    Use it to see which places of a picture a convolutional network uses. With :math:`A_k` the maps
    of the module, :math:`S` the score of the class and :math:`G_k = \partial S / \partial A_k`, a
    map is :math:`\mathrm{ReLU} \sum_k w_k A_k`, enlarged to the picture; methods differ in
    :math:`w`. The score of a classifier is its logit; that of a segmenter is the sum of the
    class's logits over all pixels, each times its weight.

    Parameters
    ----------
    model : torch.nn.Module
        A network of pictures. It returns logits (n, classes) or (n, classes, rows, columns), or an
        object that has them as ``logits``, as models of transformers do. In evaluation mode.
    module : torch.nn.Module
        The part of the model whose maps (n, k, rows, columns) are used; it runs once a forward.
    pictures : Tensor (n, channels, h, w)
        The pictures, as the model takes them.
    target : int
        The number of the class.
    method : str, default "layer"
        "grad": :math:`w_k` is the mean of :math:`G_k` (Grad-CAM, arXiv 1610.02391; with a sum of
        pixels as the score Seg-Grad-CAM, arXiv 2002.11434). "grad++": a mean of the positive
        gradients, weighted by place (arXiv 1710.11063). "xgrad": :math:`w_k = \sum G_k A_k / \sum
        A_k` (arXiv 2008.02312). "layer": positive gradients place by place, :math:`w = \max(G, 0)`
        (LayerCAM, 2021). "eigen": the first principal component of the maps, whatever the class
        (arXiv 2008.00299); its sign is free, and set so that it grows with the mean map. "score":
        the softmax over k of the scores of the picture times the enlarged :math:`A_k` (arXiv
        1910.01279). "ablation": the share of the score that is lost without :math:`A_k`
        (Ablation-CAM, 2020). The last two run the model once for each k.
    weights : Tensor (n, h2, w2), optional
        The weight of each pixel of a segmenter's output in the score, such as probability times
        mask. By default all count the same.
    batch_size : int, default 64
        How many pictures run through the model together.

    Returns
    -------
    Tensor (n, h, w)
        Maps of 0 or more, as large as the pictures.

    Raises
    ------
    InputError
        If the module gives no maps, or does not run just once. If there is no such class or method.
        If weights have another size than the model's output, or all are 0 for a picture, because
        the class is absent from it.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import cam
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Conv2d(2, 3, 1)).eval()
    >>> maps = cam(network, network[0], torch.rand(4, 1, 8, 8), target=2, method="grad")
    >>> maps.shape, bool((maps >= 0).all())
    (torch.Size([4, 8, 8]), True)
    """
    require_one_of(method, CAM_METHODS, "method")
    require_counts(batch_size=batch_size)
    require(len(pictures), "no pictures", "give one or more")
    if weights is not None:
        _check_weights(weights, len(pictures))
    parts = []
    for rows in torch.arange(len(pictures)).split(batch_size):
        of_rows = None if weights is None else weights[rows]
        scores = _Scores(model, module, pictures[rows], target, of_rows, batch_size)
        small = CAM_METHODS[method](scores).clamp(min=0)
        parts.append(_enlarged(small[:, None], pictures.shape[-2:])[:, 0])
    return torch.cat(parts)


class _Scores:
    """The score of a class for a batch of pictures, the maps of a module, and their gradients."""

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        pictures: Float[Tensor, "n c h w"],
        target: int,
        weights: Float[Tensor, "m h2 w2"] | None,
        batch_size: int,
    ) -> None:
        self.model = model
        self.module = module
        self.pictures = pictures
        self.target = target
        self.weights = weights
        self.batch_size = batch_size

    def gradients(self) -> tuple[Maps, Maps, Float[Tensor, "n"]]:
        """Maps, the gradients of the score with respect to them, and the score."""
        reached: list[Tensor] = []

        def detach(_module: nn.Module, _inputs: tuple, output: object) -> Tensor:
            """Hook ``(_module, _inputs, output)``: the maps of the output become a leaf."""
            reached.append(_maps_of(output).detach().requires_grad_())
            return reached[-1]

        with torch.enable_grad(), _hooked(self.module, detach):
            scores = self._score(self.model(self.pictures), self.weights)
            _require_once(len(reached))
            (gradients,) = torch.autograd.grad(scores.sum(), reached)
        return reached[0].detach(), gradients, scores.detach()

    @torch.no_grad()
    def maps(self) -> Maps:
        """The maps alone."""
        reached: list[Tensor] = []

        def read(_module: nn.Module, _inputs: tuple, output: object) -> None:
            """Hook ``(_module, _inputs, output)``: note the maps of the output."""
            reached.append(_maps_of(output))

        with _hooked(self.module, read):
            self._score(self.model(self.pictures), self.weights)
        _require_once(len(reached))
        return reached[0]

    @torch.no_grad()
    def of(self, pictures: Float[Tensor, "m c h w"], rows: Tensor) -> Float[Tensor, "m"]:
        """Scores of other pictures in the place of some, with the weights of these."""
        weights = None if self.weights is None else self.weights[rows]
        return self._score(self.model(pictures), weights)

    def _score(
        self, output: object, weights: Float[Tensor, "m h2 w2"] | None
    ) -> Float[Tensor, "n"]:
        logits = getattr(output, "logits", output)
        n_classes = logits.shape[1]
        require(
            0 <= self.target < n_classes,
            f"class {self.target}",
            f"allowed: 0 to {n_classes - 1}",
        )
        of_class = logits[:, self.target]
        if weights is None:
            return of_class.flatten(1).sum(dim=1) if of_class.ndim > 1 else of_class
        size = tuple(of_class.shape[1:])
        require(
            size == tuple(weights.shape[1:]),
            f"weights of {tuple(weights.shape[1:])} pixels for an output of {size}",
            "bring the mask to the size of the model's output",
        )
        return (of_class * weights).flatten(1).sum(dim=1)


def _grad(scores: _Scores) -> Tensor:
    maps, gradients, _ = scores.gradients()
    return _weighted(maps, gradients.mean(dim=(2, 3)))


def _grad_plus_plus(scores: _Scores) -> Tensor:
    """Weights of places from the second and third powers of the gradients.

    These stand for the derivatives of exp(S), whose common factor cancels.
    """
    maps, gradients, _ = scores.gradients()
    of_maps = maps.sum(dim=(2, 3), keepdim=True)
    below = 2 * gradients**2 + of_maps * gradients**3
    shares = torch.where(below != 0, gradients**2 / below, 0.0)
    return _weighted(maps, (shares * gradients.clamp(min=0)).sum(dim=(2, 3)))


def _xgrad(scores: _Scores) -> Tensor:
    maps, gradients, _ = scores.gradients()
    of_maps = maps.sum(dim=(2, 3))
    products = (gradients * maps).sum(dim=(2, 3))
    return _weighted(maps, torch.where(of_maps != 0, products / of_maps, 0.0))


def _layer(scores: _Scores) -> Tensor:
    maps, gradients, _ = scores.gradients()
    return (gradients.clamp(min=0) * maps).sum(dim=1)


def _eigen(scores: _Scores) -> Tensor:
    maps = scores.maps()
    places = maps.flatten(2).transpose(1, 2)
    centred = places - places.mean(dim=1, keepdim=True)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    heights = (centred @ components[:, 0, :, None])[..., 0]
    sign = (heights * centred.mean(dim=2)).sum(dim=1, keepdim=True).sign()
    return (torch.where(sign == 0, 1.0, sign) * heights).unflatten(1, maps.shape[2:])


def _score(scores: _Scores) -> Tensor:
    maps = scores.maps()
    enlarged = _enlarged(maps, scores.pictures.shape[-2:])
    lowest = enlarged.amin(dim=(2, 3), keepdim=True)
    span = enlarged.amax(dim=(2, 3), keepdim=True) - lowest
    masks = torch.where(span > 0, (enlarged - lowest) / span, 0.0)
    results = []
    for rows, channels in _pairs(maps, scores.batch_size):
        masked = scores.pictures[rows] * masks[rows, channels][:, None]
        results.append(scores.of(masked, rows))
    return _weighted(maps, torch.cat(results).view(maps.shape[:2]).softmax(dim=1))


def _ablation(scores: _Scores) -> Tensor:
    maps = scores.maps()
    everyone = torch.arange(len(maps))
    whole = torch.cat([scores.of(scores.pictures[r], r) for r in everyone.split(scores.batch_size)])
    results = []
    for rows, channels in _pairs(maps, scores.batch_size):

        def silence(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
            """Hook ``(_module, _inputs, output)``: one channel a row of the output is 0."""
            changed = output.clone()
            changed[torch.arange(len(changed)), channels] = 0  # noqa: B023 used within the pass
            return changed

        with _hooked(scores.module, silence):
            results.append(scores.of(scores.pictures[rows], rows))
    without = torch.cat(results).view(maps.shape[:2])
    # a negative score would turn the sign of what is lost
    size = whole.abs()[:, None]
    return _weighted(maps, torch.where(size > 0, (whole[:, None] - without) / size, 0.0))


CAM_METHODS: dict[str, Callable[[_Scores], Tensor]] = {
    "grad": _grad,
    "grad++": _grad_plus_plus,
    "xgrad": _xgrad,
    "layer": _layer,
    "eigen": _eigen,
    "score": _score,
    "ablation": _ablation,
}


def _weighted(maps: Maps, weights: Float[Tensor, "n k"]) -> Float[Tensor, "n h w"]:
    return torch.einsum("nk,nkhw->nhw", weights, maps)


def _pairs(maps: Maps, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of a picture and a channel, in batches."""
    n, k = maps.shape[:2]
    for pairs in torch.arange(n * k).split(batch_size):
        yield pairs // k, pairs % k


def _enlarged(maps: Float[Tensor, "n k h w"], size: tuple[int, int]) -> Float[Tensor, "n k h2 w2"]:
    return nn.functional.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


@contextmanager
def _hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _maps_of(output: object) -> Maps:
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise InputError(
        f"the module gives no maps (n, channels, rows, columns), but {shape}",
        "choose a convolution or a block of convolutions of the model",
    )


def _require_once(times: int) -> None:
    require(
        times == 1,
        f"the module ran {times} times in a forward",
        "choose a part of the model that runs once",
    )


def _check_weights(weights: Float[Tensor, "n h w"], n: int) -> None:
    require(
        len(weights) == n, f"weights of {len(weights)} pictures for {n}", "give one map for each"
    )
    require(weights.isfinite().all(), "a weight is NaN or infinite", "give finite weights")
    absent = (weights == 0).flatten(1).all(dim=1).nonzero().flatten().tolist()
    require(
        not absent,
        f"the class is absent from pictures {absent}: all their weights are 0",
        "leave these pictures out",
    )
