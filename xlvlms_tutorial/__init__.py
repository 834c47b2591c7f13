"""Explain, steer and compress vision-language models: the package behind the tutorials."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.data import load_samples
    from xlvlms_tutorial.models.loading import load
    from xlvlms_tutorial.models.vlm import VLM

__version__ = "0.1.0"
__all__ = ["VLM", "load", "load_samples"]

# the command line's help needs no torch
__getattr__ = lazy_attributes(__name__)
