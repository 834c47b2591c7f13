r"""Shifts of the state between two completions of one input, and their means.

What learned steering imitates and what it has to beat, after "Learning to Steer: Input-dependent
Steering for Multimodal LLMs" (arXiv 2508.12815).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.validation import require, require_one_of, require_same_length

Rows = Float[Tensor, "n d"]


def contrast_shifts(
    vlm: VLM,
    samples: Sequence[Sample],
    wanted: Sequence[str],
    unwanted: Sequence[str],
    layer: int,
    *,
    prompt: str | Callable[[Sample], str],
    read: str = "last",
    batch_size: int = 16,
) -> Rows:
    r"""Compute the shifts of P2S: how the state differs between two completions of each input.

    Use it for what :class:`LearnedSteering` learns, or as an oracle: it has read the answer. With
    :math:`X^\pm` the prompt followed by either completion it is :math:`z_X = h_l(X^+) - h_l(X^-)`.
    It is read where the completion *stands*, and is to be added where one must be *produced*: try
    both signs of the strength on validation samples first.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        The inputs, n of them.
    wanted, unwanted : sequence of str
        For each of them a completion to steer to, and one to steer away from.
    layer : int
        The layer that is read.
    prompt : str or function of a Sample
        What the model is asked.
    read : {"last", "mean"}, default "last"
        The state at the completion's last token, as in the paper's text, or the mean over all of
        them, as in its code.
    batch_size : int, default 16
        Samples that go through the model together.

    Returns
    -------
    tensor (n, d)
        The shifts in float32; zero where the two completions are the same.

    Raises
    ------
    InputError
        If there are not as many completions as samples, or ``read`` is unknown.
    LayerError
        If the layer is out of range.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.steering import contrast_shifts
    >>> shifts = contrast_shifts(
    ...     vlm, samples[:2], ["yes", "no"], ["no", "no"], 24, prompt="Is there a frog?"
    ... )
    >>> (shifts.norm(dim=1) > 0).tolist()
    [True, False]
    """
    require_one_of(read, ("last", "mean"), "read")
    samples = list(samples)
    require_same_length(samples=samples, wanted=wanted, unwanted=unwanted)
    sides = []
    for completions in (wanted, unwanted):
        states = capture(
            vlm,
            samples,
            layer,
            span="answer",
            reduce=read,
            prompt=prompt,
            answers=list(completions),
            batch_size=batch_size,
        )
        sides.append(states[layer])
    same = torch.tensor([a == b for a, b in zip(wanted, unwanted, strict=True)])
    return (sides[0] - sides[1]).masked_fill(same[:, None], 0.0)


def mean_shift(shifts: Rows) -> Float[Tensor, "d"]:
    r"""Average shifts into one vector for every input (Mean-S), :math:`v = \mathrm{E}_X[z_X]`.

    Use it as the baseline of :class:`LearnedSteering`. Where shifts point both ways equally often,
    as those of balanced yes/no questions, nothing is left of them: compare :func:`remaining`.

    Parameters
    ----------
    shifts : tensor (n, d)
        From :func:`contrast_shifts`.

    Returns
    -------
    tensor (d,)
        The mean, with the sum in float64.

    Raises
    ------
    InputError
        If there are no shifts, or they are not (n, d), NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import mean_shift
    >>> mean_shift(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).tolist()
    [2.0, 2.0]
    """
    return rows_of(shifts, "shifts").double().mean(dim=0).float()


def mean_shifts_by_class(
    shifts: Rows, labels: Sequence[Hashable], classes: Sequence[Hashable] | None = None
) -> dict[Hashable, Float[Tensor, "d"]]:
    """Average shifts class by class (Mean-S by class): one vector for each.

    Use it where the class of an input is known, or told by a classifier of its state: it is what a
    learned function has to beat where directions change with the class alone.

    Parameters
    ----------
    shifts : tensor (n, d)
        From :func:`contrast_shifts`.
    labels : sequence
        The class of each, n of them.
    classes : sequence, optional
        The classes that need a vector; by default those that there are.

    Returns
    -------
    dict of tensor (d,)
        The mean by class.

    Raises
    ------
    InputError
        If labels and shifts differ in length, a class has no samples, or shifts are unusable.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import mean_shifts_by_class
    >>> means = mean_shifts_by_class(torch.tensor([[1.0], [3.0], [8.0]]), ["a", "a", "b"])
    >>> {name: mean.item() for name, mean in means.items()}
    {'a': 2.0, 'b': 8.0}
    """
    rows = rows_of(shifts, "shifts")
    require_same_length(shifts=rows, labels=labels)
    means = {}
    for name in dict.fromkeys(labels if classes is None else classes):
        mask = torch.tensor([label == name for label in labels])
        require(mask.any(), f"class {name!r} has no samples", "give at least one of each class")
        means[name] = mean_shift(rows[mask])
    return means


def by_class(vectors: Mapping[Hashable, Float[Tensor, "d"]], labels: Sequence[Hashable]) -> Rows:
    """Return the vector of each sample's class, from :func:`mean_shifts_by_class`.

    Use it to steer a batch by the means of classes, with ``interventions.add``.

    Parameters
    ----------
    vectors : mapping of tensor (d,)
        The vectors by class.
    labels : sequence
        The class of each sample, n of them.

    Returns
    -------
    tensor (n, d)
        One vector a sample.

    Raises
    ------
    InputError
        If a class has no vector.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering.shifts import by_class
    >>> by_class({"a": torch.zeros(1), "b": torch.ones(1)}, ["b", "a"]).tolist()
    [[1.0], [0.0]]
    """
    for label in labels:
        require_one_of(label, vectors, "label")
    return torch.stack([vectors[label] for label in labels])


def remaining(shifts: Rows) -> float:
    r"""Tell what part of shifts is left in their mean, :math:`|\mathrm{E} z| / \mathrm{E} |z|`.

    Use it before steering by a mean: at 1 all shifts agree, at 0 they cancel.

    Parameters
    ----------
    shifts : tensor (n, d)
        From :func:`contrast_shifts`.

    Returns
    -------
    float
        Between 0 and 1; 0 where all shifts are zero.

    Raises
    ------
    InputError
        If there are no shifts, or they are not (n, d), NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import remaining
    >>> remaining(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), remaining(torch.ones(2, 2))
    (0.0, 1.0)
    """
    rows = rows_of(shifts, "shifts").double()
    length = rows.norm(dim=1).mean()
    return float(rows.mean(dim=0).norm() / length) if length else 0.0


def random_shifts(shifts: Rows, seed: int = 0) -> Rows:
    """Draw a random vector as long as each shift (Norm-Rnd).

    Use it as the control of every vector that is added: how much does the length alone do?

    Parameters
    ----------
    shifts : tensor (n, d)
        What is to be matched in length.
    seed : int, default 0
        Of the directions.

    Returns
    -------
    tensor (n, d)
        One direction, the same for all, at each shift's length.

    Raises
    ------
    InputError
        If there are no shifts, or they are not (n, d), NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import random_shifts
    >>> random_shifts(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).norm(dim=1).tolist()
    [5.0, 1.0]
    """
    rows = rows_of(shifts, "shifts")
    direction = np.random.default_rng(seed).standard_normal(rows.shape[1])
    direction = torch.as_tensor(direction / np.linalg.norm(direction))
    return (rows.double().norm(dim=1, keepdim=True) * direction).float()


def svd_decoder(shifts: Rows, n_hidden: int) -> Float[Tensor, "d r"]:
    """Return the first right singular vectors of centred shifts, with which the decoder starts.

    Use it to see how few directions shifts need: what lies outside of them is the squared length
    of the remaining singular values.

    Parameters
    ----------
    shifts : tensor (n, d)
        From :func:`contrast_shifts`.
    n_hidden : int
        How many vectors, r.

    Returns
    -------
    tensor (d, r)
        Orthonormal columns; zero where there are fewer shifts than columns.

    Raises
    ------
    InputError
        If the shifts are unusable.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering.shifts import svd_decoder
    >>> shifts = torch.tensor([[0.0, 2.0], [0.0, -2.0], [1.0, 0.0], [-1.0, 0.0]])
    >>> svd_decoder(shifts, 1).abs().tolist()
    [[0.0], [1.0]]
    """
    rows = rows_of(shifts, "shifts")
    _, _, directions = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    decoder = torch.zeros(rows.shape[1], n_hidden)
    first = directions[:n_hidden]
    decoder[:, : len(first)] = first.T
    return decoder


def rows_of(values: Tensor, name: str) -> Rows:
    """Return rows (n, d) in float32 on the CPU, or refuse them.

    ``name`` says in the message what ``values`` are.

    Raises
    ------
    InputError
        If there are no rows, they are not (n, d), or hold NaN or infinite numbers.
    """
    shape = tuple(getattr(values, "shape", ()))
    require(
        isinstance(values, Tensor) and values.ndim == 2 and len(values) > 0,
        f"{name} of shape {shape}",
        "give a tensor (n, d) with at least one row",
    )
    rows = values.detach().float().cpu()
    require(
        torch.isfinite(rows).all(), f"{name} with NaN or infinite numbers", "give finite numbers"
    )
    return rows
