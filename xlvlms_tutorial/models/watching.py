"""Watch modules while a model runs.

The states that enter and leave them, and the arguments of their calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from xlvlms_tutorial.models import anatomy

Callback = Callable[[Tensor], None]


def on_input(module: nn.Module, callback: Callback) -> RemovableHandle:
    """Call a function with the states that enter a module, each time it runs.

    Use it to read activations in front of a module that ``capture`` has no site for.

    Parameters
    ----------
    module : nn.Module
        A block, or a part of one: its states are its first argument, or ``hidden_states``.
    callback : callable
        Called with the states, which it leaves as they are; it returns nothing.

    Returns
    -------
    RemovableHandle
        Torch's handle: ``with`` it the function is called inside the block only.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.models.watching import on_input
    >>> linear, sums = torch.nn.Linear(2, 1), []
    >>> with on_input(linear, lambda states: sums.append(float(states.sum()))):
    ...     _ = linear(torch.ones(3, 2))
    >>> sums
    [6.0]
    """
    return module.register_forward_pre_hook(
        lambda _, args, kwargs: callback(anatomy.states_in(args, kwargs)), with_kwargs=True
    )


def on_output(module: nn.Module, callback: Callback, prepend: bool = False) -> RemovableHandle:
    """Call a function with the states that leave a module, each time it runs.

    Use it to read activations behind a module that ``capture`` has no site for.

    Parameters
    ----------
    module : nn.Module
        A block, or a part of one.
    callback : callable
        Called with the states, which it leaves as they are; it returns nothing.
    prepend : bool
        Whether it is called before all hooks that are registered already, with what none of them
        has changed. False by default.

    Returns
    -------
    RemovableHandle
        Torch's handle: ``with`` it the function is called inside the block only.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.models.watching import on_output
    >>> linear, shapes = torch.nn.Linear(2, 1), []
    >>> with on_output(linear, lambda states: shapes.append(tuple(states.shape))):
    ...     _ = linear(torch.ones(3, 2))
    >>> shapes
    [(3, 1)]
    """
    return module.register_forward_hook(
        lambda _, args, output: callback(anatomy.states_of(output)), prepend=prepend
    )


@contextmanager
def record_calls(module: nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """Record the arguments of a module's calls inside this block.

    Use it to run a part of a model again with the arguments that the model itself gave it.

    Parameters
    ----------
    module : nn.Module
        For instance ``decoder(vlm.model)``, which gets embeddings with the picture merged in.

    Returns
    -------
    context manager of a list
        One ``(args, kwargs)`` for each call; the tensors in them are the model's own.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.models.watching import record_calls
    >>> module = torch.nn.Identity()
    >>> with record_calls(module) as calls:
    ...     _ = module(1), module(input=2)
    >>> calls
    [((1,), {}), ((), {'input': 2})]
    """
    calls: list[tuple[tuple, dict]] = []
    with module.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True):
        yield calls
