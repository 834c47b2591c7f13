r"""Mix state dicts of one architecture: interpolation, averages, task arithmetic.

Experts of one start differ by how far each moved from it. A mixture of weights costs no more at
inference than a single expert (Shukor et al., 2023, arXiv 2307.16184; Ilharco et al., 2023, arXiv
2212.04089). Sums are taken in float32, or in float64 where the weights are; each result has the
dtype of the weight that it stands for. What is not a floating-point number, such as a counter of
batches, cannot be mixed: it is taken from the first state.
"""

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from xlvlms_tutorial.validation import require, require_same_length

State = Mapping[str, Tensor]


def interpolate(
    first: State, second: State, weight: float, *, extrapolate: bool = False
) -> dict[str, Tensor]:
    r"""Interpolate two experts: :math:`(1 - \lambda) W_1 + \lambda W_2`.

    Use it to trade the skills of two experts of one start against each other without training. For
    several values of :math:`\lambda`, load the result into one model, so that what does not change,
    such as the encoded pictures, is computed once.

    Parameters
    ----------
    first, second : mapping of str to Tensor
        State dicts with the same names, shapes and dtypes.
    weight : float
        :math:`\lambda`, the share of the second expert: 0 gives the first, 1 the second.
    extrapolate : bool, default False
        Whether weights outside [0, 1] are allowed, which step beyond an expert.

    Returns
    -------
    dict of str to Tensor
        A new state dict; neither of the two is changed.

    Raises
    ------
    InputError
        If the states differ in names, shapes or dtypes, or the weight is outside of what is
        allowed.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.merging import interpolate
    >>> captions = {"proj.weight": torch.tensor([0.0, 4.0])}
    >>> questions = {"proj.weight": torch.tensor([2.0, 0.0])}
    >>> interpolate(captions, questions, 0.25)["proj.weight"].tolist()
    [0.5, 3.0]
    """
    require(isfinite(weight), f"weight is {weight}", "give a number from 0 to 1")
    require(
        extrapolate or 0 <= weight <= 1,
        f"weight is {weight}",
        "give 0 to 1, or extrapolate=True to step beyond an expert",
    )
    return _combine([first, second], [1 - weight, weight])


def average(states: Sequence[State]) -> dict[str, Tensor]:
    r"""Average experts with equal shares: :math:`\frac{1}{N} \sum_i W_i`.

    Use it to get one model out of several experts of one start, or out of several runs of one
    recipe. Two recipes are built of it: *ratatouille* fine-tunes experts of other tasks on the
    target and averages the results, *fusing* averages the experts and fine-tunes the average.

    Parameters
    ----------
    states : sequence of mapping of str to Tensor
        State dicts with the same names, shapes and dtypes, at least one.

    Returns
    -------
    dict of str to Tensor
        A new state dict.

    Raises
    ------
    InputError
        If there is none, or they differ in names, shapes or dtypes.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.merging import average
    >>> average([{"b": torch.tensor([1.0])}, {"b": torch.tensor([4.0])}])["b"].item()
    2.5
    """
    states = list(states)
    require(states, "no states to average", "give one state dict for each expert")
    return _combine(states, [1 / len(states)] * len(states))


def add_tasks(
    base: State, experts: Sequence[State], strengths: Sequence[float]
) -> dict[str, Tensor]:
    r"""Add what experts learned to their start: :math:`W_0 + \sum_i s_i (W_i - W_0)`.

    Use it where the shares need not sum to one: a negative strength takes a skill away (task
    arithmetic, Ilharco et al., 2023, arXiv 2212.04089).

    Parameters
    ----------
    base : mapping of str to Tensor
        The state dict that all experts started from.
    experts : sequence of mapping of str to Tensor
        Their state dicts, with the names, shapes and dtypes of the base; at least one.
    strengths : sequence of float
        One for each expert; 1 adds all that it learned.

    Returns
    -------
    dict of str to Tensor
        A new state dict.

    Raises
    ------
    InputError
        If there are no experts, the strengths are not as many or not finite, or the states differ
        in names, shapes or dtypes.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.merging import add_tasks
    >>> base, expert = {"b": torch.tensor([1.0])}, {"b": torch.tensor([3.0])}
    >>> add_tasks(base, [expert], [-0.5])["b"].item()
    0.0
    """
    experts, strengths = list(experts), list(strengths)
    require(experts, "no experts to add", "give one state dict for each expert")
    require_same_length(experts=experts, strengths=strengths)
    for strength in strengths:
        require(isfinite(strength), f"a strength is {strength}", "give finite numbers")
    return _combine([base, *experts], [1 - sum(strengths), *strengths])


def _combine(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted sum of states, name by name.

    Tied weights are one tensor under two names. They stay one, so that a change of the embedding
    is a change of the unembedding.
    """
    first = states[0]
    for position, state in enumerate(states[1:], start=2):
        _require_alike(first, state, position)
    combined = {}
    of_tensor = {}
    for name in first:
        tied = tuple(_identity(state[name]) for state in states)
        if tied not in of_tensor:
            of_tensor[tied] = _weighted_sum([state[name] for state in states], weights)
        combined[name] = of_tensor[tied]
    return combined


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    wide = torch.promote_types(first.dtype, torch.float32)
    total = torch.zeros_like(first, dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:  # what has no share may hold anything, and adds nothing
            total.add_(tensor.to(wide), alpha=weight)
    return total.to(first.dtype)


def _identity(tensor: Tensor) -> tuple:
    """What two names of one tensor have in common."""
    return tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _require_alike(first: State, state: State, position: int) -> None:
    """Refuse a state whose names, shapes or dtypes are not those of the first."""
    advice = "give experts of one architecture and one start"
    if different := sorted(first.keys() ^ state.keys()):
        problem = (
            f"states 1 and {position} differ in {len(different)} names, such as {different[0]}"
        )
        require(False, problem, advice)
    for name, tensor in first.items():
        mate = state[name]
        require(
            tensor.shape == mate.shape,
            f"{name} is {tuple(tensor.shape)} in state 1 and {tuple(mate.shape)} in {position}",
            advice,
        )
        require(
            tensor.dtype == mate.dtype,
            f"{name} is {tensor.dtype} in state 1 and {mate.dtype} in {position}",
            "give experts of one dtype",
        )
