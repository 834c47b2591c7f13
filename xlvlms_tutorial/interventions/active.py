"""Record which interventions change a model at this moment, in words and digests.

States that are captured meanwhile name them in their provenance, and are not mixed with others.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from inspect import signature

import torch
from torch import Tensor

from xlvlms_tutorial.models.support import require_hookable


def recorded(
    context: Callable[..., AbstractContextManager],
) -> Callable[..., AbstractContextManager]:
    """Make a context manager list itself in ``vlm.active``, with its arguments, while in force.

    ``context`` is the context manager; its first argument is a VLM.
    """

    @wraps(context)
    @contextmanager
    def wrapper(*args: object, **kwargs: object) -> Iterator[object]:
        bound = signature(context).bind(*args, **kwargs)
        bound.apply_defaults()
        (_, vlm), *arguments = bound.arguments.items()
        require_hookable(vlm.model)
        described = ", ".join(f"{name}={_describe(value)}" for name, value in arguments)
        vlm.active.append(f"{context.__name__}({described})")
        place = len(vlm.active) - 1
        try:
            with context(*args, **kwargs) as value:
                yield value
        finally:
            del vlm.active[place]

    return wrapper


def _describe(value: object) -> str:
    """Return a short text of a value: of a tensor its dtype, shape and digest."""
    if isinstance(value, Tensor):
        values = value.detach().to("cpu").contiguous()
        content = values.view(-1).view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(content).hexdigest()
        return f"{value.dtype} {list(value.shape)} {digest[:12]}"
    if isinstance(value, Mapping):
        parts = [f"{name}: {_describe(part)}" for name, part in value.items()]
        return "{" + ", ".join(parts) + "}"
    return getattr(value, "__qualname__", None) or repr(value)
