"""How the shipped weights were made.

Connectors, the scorer, adapters in a style, models trained after some of them was taken away,
and small encoders.
"""

from xlvlms_tutorial.training.adapters import LoraRecipe, in_style, lessons, style_adapters
from xlvlms_tutorial.training.aim import (
    AimRecipe,
    prefix_mask,
    probe_scores,
    to_patches,
    train_encoder,
)
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
    "AimRecipe",
    "LoraRecipe",
    "expert",
    "in_style",
    "lessons",
    "prefix_mask",
    "probe_scores",
    "shared_mask",
    "style_adapters",
    "task_calibrations",
    "through",
    "to_patches",
    "train_encoder",
]
