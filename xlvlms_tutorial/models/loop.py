"""The training loop of connectors, adapters and the scorer.

AdamW, warm-up and cosine, clipped gradients, and resuming after a kill.
"""

import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from xlvlms_tutorial.checkpoint import keep, resumed


def warmup_cosine(step: int, steps: int, warmup: int = 1) -> float:
    r"""Share of the learning rate at a step: a linear rise, times a cosine that falls from 1 to 0.

    .. math:: \min\!\left(1, \frac{t + 1}{w}\right) \cdot \frac{1 + \cos(\pi t / T)}{2}

    Parameters
    ----------
    step
        The step :math:`t`, from 0.
    steps
        After how many steps :math:`T` the cosine is 0.
    warmup
        At the end of how many steps :math:`w` the rise is over; 1 for none.

    Returns
    -------
    float
        Between 0 and 1.

    Examples
    --------
    >>> [round(warmup_cosine(step, 8, warmup=2), 2) for step in (0, 1, 4, 8)]
    [0.5, 0.96, 0.5, 0.0]
    """
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimise(
    parameters: dict[str, nn.Parameter],
    loss: Callable[[int], Float[Tensor, ""]],
    steps: int,
    rate: Callable[[int], float],
    *,
    weight_decay: float = 0.0,
    factors: Mapping[str, float] | None = None,
    at_step: Callable[[int], object] = lambda done: None,
    folder: Path | None = None,
    keep_at: Container[int] = (),
    **bar: object,
) -> list[dict]:
    """Train parameters in place with AdamW, the norm of all gradients clipped at 1.

    Parameters
    ----------
    parameters
        What is trained, by name; everything else stays as it is.
    loss
        Gives the loss of a step, from 0. Nothing but the step may decide what it draws: a run that
        goes on then ends as if it had not been killed.
    steps
        How many steps the whole run has.
    rate
        Gives the learning rate of a step, from 0.
    weight_decay
        AdamW's decay of the weights.
    factors
        How many times the rate some parameters get, by name; 1 for all others.
    at_step
        Called with the number of steps done: with 0, or where a killed run goes on, and after each
        step. Its time is not counted.
    folder
        Where the run is kept and from where it goes on; None keeps nothing.
    keep_at
        After which numbers of steps the run is kept.
    **bar
        Options of the progress bar, such as ``desc`` and ``disable``.

    Returns
    -------
    list of dict
        A row for each step, those before a kill included: ``step`` (from 0), ``loss``, ``seconds``.

    Examples
    --------
    >>> weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> loss = lambda step: weight.square().sum()
    >>> rows = optimise({"weight": weight}, loss, 200, lambda step: 0.05, disable=True)
    >>> len(rows), rows[0]["loss"], bool(weight.abs().max() < 0.01)
    (200, 5.0, True)
    """
    groups = {}
    for name, parameter in parameters.items():
        groups.setdefault((factors or {}).get(name, 1.0), []).append(parameter)
    optimiser = torch.optim.AdamW(
        [{"params": group} for group in groups.values()], weight_decay=weight_decay
    )
    history = [] if folder is None else resumed(folder, parameters, optimiser)
    done = len(history)
    progress = tqdm(range(done, steps), initial=done, total=steps, unit="step", **bar)
    for step in progress:
        at_step(step)
        start = perf_counter()
        for factor, group in zip(groups, optimiser.param_groups, strict=True):
            group["lr"] = factor * rate(step)
        current = loss(step)
        optimiser.zero_grad()
        current.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        value = current.item()
        history.append({"step": step, "loss": value, "seconds": perf_counter() - start})
        progress.set_postfix(loss=f"{value:.3f}", refresh=False)
        if folder is not None and step + 1 in keep_at:
            keep(folder, parameters, optimiser, history)
    at_step(steps)
    return history
