"""What changes a model at this moment, in words and digests.

States captured meanwhile say so and are not mixed with others.
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
    """Let a context manager be found in ``vlm.active`` while it lasts, with its arguments.

    Its first argument is a VLM.
    """

    @wraps(context)
    @contextmanager
    def wrapper(*args: object, **kwargs: object) -> Iterator[None]:
        bound = signature(context).bind(*args, **kwargs)
        bound.apply_defaults()
        vlm, *rest = bound.arguments.items()
        require_hookable(vlm[1].model)
        vlm[1].active.append(
            f"{context.__name__}({', '.join(f'{name}={_told(value)}' for name, value in rest)})"
        )
        place = len(vlm[1].active) - 1
        try:
            with context(*args, **kwargs):
                yield
        finally:
            del vlm[1].active[place]

    return wrapper


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        plain = value.detach().to("cpu").contiguous()
        digest = hashlib.sha256(plain.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return f"{value.dtype} {list(value.shape)} {digest[:12]}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_told(part)}" for name, part in value.items()) + "}"
    return getattr(value, "__qualname__", None) or repr(value)
