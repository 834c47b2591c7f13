"""How the shipped weights were made.

Connectors, the scorer, adapters in a style, and models trained after some of them was taken away.
"""

from xlvlms_tutorial.training.adapters import (
    LoraRecipe,
    StyleAdapter,
    in_style,
    lessons,
    style_adapters,
)
from xlvlms_tutorial.training.compressed import (
    COMPRESSED,
    REMOVED,
    SKIPPED,
    shared_mask,
    task_calibrations,
    through,
)
from xlvlms_tutorial.training.connector_runs import RUNS, train_connector
from xlvlms_tutorial.training.scorer import ScorerRecipe, train_scorer

__all__ = [
    "COMPRESSED",
    "REMOVED",
    "RUNS",
    "SKIPPED",
    "LoraRecipe",
    "ScorerRecipe",
    "StyleAdapter",
    "in_style",
    "lessons",
    "shared_mask",
    "style_adapters",
    "task_calibrations",
    "through",
    "train_connector",
    "train_scorer",
]
