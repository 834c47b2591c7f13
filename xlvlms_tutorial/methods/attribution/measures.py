"""Judge maps: the published entropy, confidence, insertion and deletion, and the truth of pixels.

And the maps that know nothing, which a metric has to tell from those that do.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xlvlms_tutorial.validation import require, require_counts, require_one_of

CONTROLS = ("random", "centre", "empty", "full")

Planes = Float[Tensor, "n h w"]
Masks = Bool[Tensor, "n h w"]
Truth = Bool[Tensor, "n2 h2 w2"]  # of another size it is refused


def scaled(maps: Planes) -> Planes:
    """Stretch each map so that its smallest value is 0 and its largest 1.

    Use it before a threshold; the publication's is 0.4.

    Parameters
    ----------
    maps : Tensor (n, h, w)
        Maps, none of them constant.

    Returns
    -------
    Tensor (n, h, w)
        The stretched maps.

    Raises
    ------
    InputError
        If a map is constant, NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import scaled
    >>> scaled(torch.tensor([[[2.0, 4.0, 3.0]]])).tolist()
    [[[0.0, 1.0, 0.5]]]
    """
    lowest, highest = _range(maps)
    return (maps - lowest) / (highest - lowest)


def control_maps(n: int, height: int, width: int, name: str, seed: int = 0) -> Planes:
    """Make maps that know nothing of what is in a picture.

    Use them beside every metric: what a metric says of them it says of knowing nothing.

    Parameters
    ----------
    n : int
        How many maps.
    height, width : int
        Their rows and columns.
    name : {"random", "centre", "empty", "full"}
        "random" draws each value between 0 and 1, "centre" falls from 1 in the middle to 0 at the
        corners, "empty" is 0 and "full" is 1 everywhere.
    seed : int, default 0
        Of the random maps.

    Returns
    -------
    Tensor (n, height, width)
        The maps.

    Raises
    ------
    InputError
        If the name is unknown, or a number is below 1.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.attribution import control_maps
    >>> control_maps(1, 3, 3, "centre")[0].argmax().item()  # of 9 places that in the middle
    4
    """
    require_one_of(name, CONTROLS, "control")
    require_counts(n=n, height=height, width=width)
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(n, height, width, generator=generator)
    if name == "centre":
        rows = torch.linspace(-1, 1, height) if height > 1 else torch.zeros(1)
        columns = torch.linspace(-1, 1, width) if width > 1 else torch.zeros(1)
        distance = (rows[:, None] ** 2 + columns**2).sqrt()
        return (1 - distance / math.sqrt(2)).clamp(min=0).expand(n, -1, -1).contiguous()
    return torch.full((n, height, width), float(name == "full"))


def confidence(probabilities: Planes, truth: Truth) -> Float[Tensor, "n"]:
    """Compute the mean probability of a class over the pixels that show it.

    Parameters
    ----------
    probabilities : Tensor (n, h, w)
        The probability of the class at each pixel, 0 to 1.
    truth : Tensor of bool (n, h, w)
        Where the class is.

    Returns
    -------
    Tensor (n,)
        The means, 0 to 1; higher is better.

    Raises
    ------
    InputError
        If sizes differ, a value is no probability, or the class is absent from a picture.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import confidence
    >>> confidence(torch.tensor([[[0.9, 0.7, 0.1]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.8000])
    """
    _check_probabilities(probabilities, truth)
    return _mean_over(probabilities, truth)


def published_entropy(
    probabilities: Planes, truth: Truth, n_classes: int = 3
) -> Float[Tensor, "n"]:
    r"""Compute the entropy metric as it was published, with its normalisation.

    .. math:: \frac{1}{h w} \sum_{ij} \frac{-p_{ij} \log_2 p_{ij}}{\log_2 C} \, M_{ij}

    Only the class's own channel enters. It is 0 where the model is sure that the class is there,
    and also where it is sure that it is not: use :func:`binary_entropy` and :func:`confidence`
    together to tell one from the other.

    Parameters
    ----------
    probabilities : Tensor (n, h, w)
        The probability :math:`p` of the class at each pixel, 0 to 1.
    truth : Tensor of bool (n, h, w)
        Where the class is, :math:`M`.
    n_classes : int, default 3
        :math:`C`, 2 or more.

    Returns
    -------
    Tensor (n,)
        The entropies; lower was meant to be better (arXiv 2310.01837).

    Raises
    ------
    InputError
        As :func:`confidence` does, or if there are fewer than 2 classes.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import published_entropy
    >>> there = torch.ones(1, 1, 2, dtype=torch.bool)
    >>> [published_entropy(torch.full((1, 1, 2), p), there, 2).item() for p in (0.0, 0.5, 1.0)]
    [0.0, 0.5, 0.0]
    """
    _check_probabilities(probabilities, truth)
    require(n_classes >= 2, f"n_classes is {n_classes}", "give 2 or more")
    terms = -_times_log(probabilities) / math.log2(n_classes)
    return (terms * truth).mean(dim=(1, 2))


def binary_entropy(probabilities: Planes, truth: Truth) -> Float[Tensor, "n"]:
    r"""Compute the mean entropy of "is it there?" over the pixels that show a class.

    .. math:: -p \log_2 p - (1 - p) \log_2 (1 - p)

    Parameters
    ----------
    probabilities : Tensor (n, h, w)
        The probability :math:`p` of the class at each pixel, 0 to 1.
    truth : Tensor of bool (n, h, w)
        Where the class is.

    Returns
    -------
    Tensor (n,)
        The entropies in bits: 1 at a half, 0 where the model is sure, of whatever it is sure.

    Raises
    ------
    InputError
        As :func:`confidence` does.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import binary_entropy
    >>> there = torch.ones(1, 1, 1, dtype=torch.bool)
    >>> [binary_entropy(torch.full((1, 1, 1), p), there).item() for p in (0.0, 0.5, 1.0)]
    [0.0, 1.0, 0.0]
    """
    _check_probabilities(probabilities, truth)
    terms = -_times_log(probabilities) - _times_log(1 - probabilities)
    return _mean_over(terms, truth)


def overlap(regions: Masks, truth: Truth) -> Float[Tensor, "n"]:
    """Compute the intersection over union of regions with the truth.

    Parameters
    ----------
    regions : Tensor of bool (n, h, w)
        What is said to be the class, such as a map above a threshold. An empty region has 0.
    truth : Tensor of bool (n, h, w)
        Where the class is.

    Returns
    -------
    Tensor (n,)
        0 to 1.

    Raises
    ------
    InputError
        If sizes differ, or the class is absent from a picture.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import overlap
    >>> truth = torch.tensor([[[True, True, False, False]]])
    >>> [round(overlap(truth.roll(shift, 2), truth).item(), 2) for shift in (0, 1, 2)]
    [1.0, 0.33, 0.0]
    """
    _check_truth(regions, truth)
    both = (regions & truth).sum(dim=(1, 2))
    return both / (regions | truth).sum(dim=(1, 2))


def mass_share(maps: Planes, truth: Float[Tensor, "n2 h2 w2"] | Truth) -> Float[Tensor, "n"]:
    """Compute the share of a map that lies on the pixels of a class.

    Parameters
    ----------
    maps : Tensor (n, h, w)
        Maps; values below 0 count as 0.
    truth : Tensor (n, h, w)
        Where the class is: a mask, or for cells the share of each that shows the class.

    Returns
    -------
    Tensor (n,)
        0 to 1. A full map has the share of the picture that the class takes.

    Raises
    ------
    InputError
        If sizes differ, the class is absent from a picture, or a map has no mass.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import mass_share
    >>> mass_share(torch.tensor([[[3.0, 1.0, 0.0]]]), torch.tensor([[[True, False, False]]]))
    tensor([0.7500])
    """
    _check_truth(maps, truth)
    _check_finite(maps)
    mass = maps.clamp(min=0)
    total = mass.sum(dim=(1, 2))
    empty = (total == 0).nonzero().flatten().tolist()
    require(not empty, f"maps {empty} have no mass", "leave them out, and count them")
    return (mass * truth).sum(dim=(1, 2)) / total


def pointing_game(maps: Planes, truth: Float[Tensor, "n2 h2 w2"] | Truth) -> Float[Tensor, "n"]:
    """Check whether the highest place of a map lies on a class (Zhang et al., arXiv 1608.00507).

    Parameters
    ----------
    maps : Tensor (n, h, w)
        The maps. Where several places are highest, each counts the same: a constant map has the
        share of the picture that the class takes.
    truth : Tensor (n, h, w)
        Where the class is: a mask, or for cells the share of each that shows the class.

    Returns
    -------
    Tensor (n,)
        1 for a hit and 0 for a miss; between them where several places are highest.

    Raises
    ------
    InputError
        If sizes differ, the class is absent from a picture, or a value is NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import pointing_game
    >>> truth = torch.tensor([[[True, False]]])
    >>> [pointing_game(torch.tensor([[row]]), truth).item() for row in ([2.0, 1.0], [1.0, 1.0])]
    [1.0, 0.5]
    """
    _check_truth(maps, truth)
    _check_finite(maps)
    highest = maps == maps.amax(dim=(1, 2), keepdim=True)
    return (highest * truth).sum(dim=(1, 2)) / highest.sum(dim=(1, 2))


def top_share(maps: Planes, share: float) -> Masks:
    """Take the highest places of each map, the same number of each.

    Use it to compare maps at equal area, where a threshold would favour those that keep much.

    Parameters
    ----------
    maps : Tensor (n, h, w)
        Maps, none of them constant. Of equal values those that come first row by row are taken.
    share : float
        Which share of the places, 0 to 1, rounded to whole places.

    Returns
    -------
    Tensor of bool (n, h, w)
        True at the places that are taken.

    Raises
    ------
    InputError
        If a map is constant and so ranks nothing, or the share is not between 0 and 1.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import top_share
    >>> top_share(torch.tensor([[[0.1, 0.7, 0.2, 0.0]]]), 0.5).tolist()
    [[[False, True, True, False]]]
    """
    require(0 <= share <= 1, f"share is {share}", "give 0 to 1")
    _range(maps)
    flat = maps.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    strongest = torch.zeros_like(flat, dtype=torch.bool)
    strongest.scatter_(1, order[:, : round(share * flat.shape[1])], True)
    return strongest.view(maps.shape)


def perturbation_curves(
    score: Callable[[Masks], Float[Tensor, "n"]],
    maps: Planes,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.5, 0.7),
) -> tuple[Float[Tensor, "n s"], Float[Tensor, "n s"]]:
    """Keep the highest places of maps, and remove them, at equal areas, and score what remains.

    Use it to ask the model itself whether a map shows what it uses (Petsiuk et al., 2018, arXiv
    1806.07421). The area under a curve is its mean over the shares.

    Parameters
    ----------
    score : function
        Takes which places are kept, bool (n, h, w), and returns the model's score of each picture
        with only these, (n,). It fills what is not kept.
    maps : Tensor (n, h, w)
        Maps, none of them constant.
    shares : sequence of float
        The shares of the places that are kept, or removed.

    Returns
    -------
    insertion : Tensor (n, shares)
        Scores where only the highest places are kept: high is good.
    deletion : Tensor (n, shares)
        Scores where the highest places are removed: low is good.

    Raises
    ------
    InputError
        If a map is constant and so ranks nothing, or a share is not between 0 and 1.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import perturbation_curves
    >>> picture = torch.tensor([[[3.0, 1.0, 0.0, 0.0]]])
    >>> total = lambda mask: (picture * mask).sum(dim=(1, 2))
    >>> kept, removed = perturbation_curves(total, picture, shares=[0.25, 0.5])
    >>> kept.tolist(), removed.tolist()
    ([[3.0, 4.0]], [[1.0, 0.0]])
    """
    require(len(shares), "no shares", "give one or more between 0 and 1")
    insertion, deletion = [], []
    for share in shares:
        highest = top_share(maps, share)
        insertion.append(score(highest))
        deletion.append(score(~highest))
    return torch.stack(insertion, dim=1), torch.stack(deletion, dim=1)


def _times_log(p: Tensor) -> Tensor:
    """Compute p log2 p, which is 0 at 0."""
    return torch.xlogy(p, p) / math.log(2)


def _mean_over(values: Planes, truth: Truth) -> Float[Tensor, "n"]:
    return (values * truth).sum(dim=(1, 2)) / truth.sum(dim=(1, 2))


def _range(maps: Planes) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each map, which differ."""
    _check_finite(maps)
    lowest = maps.amin(dim=(1, 2), keepdim=True)
    highest = maps.amax(dim=(1, 2), keepdim=True)
    constant = (lowest == highest).flatten().nonzero().flatten().tolist()
    require(
        not constant,
        f"maps {constant} are constant and rank nothing",
        "leave them out, and count them as maps that know nothing",
    )
    return lowest, highest


def _check_finite(maps: Planes) -> None:
    require(
        maps.isfinite().all(), "a map has values that are NaN or infinite", "check its gradients"
    )


def _check_probabilities(probabilities: Planes, truth: Truth) -> None:
    _check_truth(probabilities, truth)
    require(
        ((probabilities >= 0) & (probabilities <= 1)).all(),
        "a probability is not between 0 and 1",
        "take the sigmoid or softmax of the logits",
    )


def _check_truth(maps: Tensor, truth: Tensor) -> None:
    require(
        maps.shape == truth.shape,
        f"maps of {tuple(maps.shape)} and masks of {tuple(truth.shape)}",
        "bring both to one size",
    )
    absent = (truth == 0).flatten(1).all(dim=1).nonzero().flatten().tolist()
    require(not absent, f"the class is absent from pictures {absent}", "leave these pictures out")
