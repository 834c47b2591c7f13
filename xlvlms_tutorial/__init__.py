"""Explain, steer and compress vision-language models: the package behind the tutorials."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xlvlms_tutorial.data import load_samples
    from xlvlms_tutorial.models.loading import load
    from xlvlms_tutorial.models.vlm import VLM

__version__ = "0.1.0"
__all__ = ["VLM", "load", "load_samples"]
_HOME = {"VLM": "xlvlms_tutorial.models.vlm", "load": "xlvlms_tutorial.models.loading", "load_samples": "xlvlms_tutorial.data"}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: the command line's help needs no torch."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'xlvlms_tutorial' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
