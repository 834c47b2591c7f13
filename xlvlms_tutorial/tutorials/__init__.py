"""What chapters need around their experiment, and a module for each that needs more."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.tutorials import (
        alignment,
        alignment_score,
        experiments,
        real_models,
        second_world,
        subnetworks,
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
    "alignment",
    "alignment_score",
    "balanced_questions",
    "band_table",
    "experiments",
    "glue",
    "real_models",
    "second_world",
    "subnetworks",
    "substitute",
    "try_exercise",
    "upstream",
]

__getattr__, __dir__ = lazy_attributes(__name__)
