"""How the shipped weights were made.

Connectors, the scorer, adapters in a style, and models trained after some of them was taken away.
"""

from xlvlms_tutorial.training.adapters import LoraRecipe, in_style, lessons, style_adapters
from xlvlms_tutorial.training.compressed import (
    COMPRESSED,
    REMOVED,
    SKIPPED,
    shared_mask,
    task_calibrations,
    through,
)
from xlvlms_tutorial.training.experts import expert

__all__ = [
    "COMPRESSED",
    "REMOVED",
    "SKIPPED",
    "LoraRecipe",
    "expert",
    "in_style",
    "lessons",
    "shared_mask",
    "style_adapters",
    "task_calibrations",
    "through",
]
