"""Remember what was computed from equal inputs, except while work is measured."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_MEASURED = ContextVar("work is measured", default=False)


class Memory:
    """Hold the latest results of a function by what they were computed from.

    Use it for what is dear, depends on its input alone, and is asked for often. It is empty inside
    :func:`measuring`, and what is remembered there is forgotten.

    Parameters
    ----------
    size : int
        How many results are held; the one that was not asked for longest goes first.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.memory import Memory, fingerprint, measuring
    >>> squares = Memory(2)
    >>> squares.keep(fingerprint(torch.tensor([3.0])), torch.tensor([9.0]))
    >>> squares.recall(fingerprint(torch.tensor([3.0])))
    tensor([9.])
    >>> with measuring():
    ...     squares.recall(fingerprint(torch.tensor([3.0]))) is None
    True
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._results: OrderedDict[Hashable, Tensor] = OrderedDict()

    def recall(self, key: Hashable) -> Tensor | None:
        """Return what was kept under a key; None where there is nothing."""
        if _MEASURED.get() or key not in self._results:
            return None
        self._results.move_to_end(key)
        return self._results[key]

    def keep(self, key: Hashable, result: Tensor) -> None:
        """Keep a result under a key."""
        if _MEASURED.get():
            return
        self._results[key] = result
        while len(self._results) > self.size:
            self._results.popitem(last=False)


@contextmanager
def measuring() -> Iterator[None]:
    """Let everything be computed inside, as often as it is asked for.

    Use it where time or operations are measured.

    Returns
    -------
    context manager
        Inside it, every :class:`Memory` is empty.
    """
    token = _MEASURED.set(True)
    try:
        yield
    finally:
        _MEASURED.reset(token)


def fingerprint(tensor: Tensor) -> bytes:
    """Return a short key of what a tensor holds: equal for equal tensors, and for no others.

    Parameters
    ----------
    tensor : Tensor
        A tensor, on any device.

    Returns
    -------
    bytes
        A digest of its shape, dtype and values.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.memory import fingerprint
    >>> fingerprint(torch.ones(2)) == fingerprint(torch.ones(2)) != fingerprint(torch.ones(2, 1))
    True
    """
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()
