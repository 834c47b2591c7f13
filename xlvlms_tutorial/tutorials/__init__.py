"""What chapters need around their experiment, and a module for each that needs more."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.tutorials import (
        experiments,
        pruning,
        real_models,
        second_world,
        upstream,
    )
    from xlvlms_tutorial.tutorials.experiments import (
        Experiment,
        balanced_questions,
        band_table,
        glue,
        substitute,
        try_exercise,
    )

__all__ = [
    "Experiment",
    "balanced_questions",
    "band_table",
    "experiments",
    "glue",
    "pruning",
    "real_models",
    "second_world",
    "substitute",
    "try_exercise",
    "upstream",
]

__getattr__, __dir__ = lazy_attributes(__name__)
