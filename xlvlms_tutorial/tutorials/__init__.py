"""What chapters need around their experiment, and a module for each that needs more."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.tutorials import (
        concept_dictionaries,
        concept_pages,
        experiments,
        real_models,
        second_world,
        upstream,
        vocabulary,
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
    "concept_dictionaries",
    "concept_pages",
    "experiments",
    "glue",
    "real_models",
    "second_world",
    "substitute",
    "try_exercise",
    "upstream",
    "vocabulary",
]

__getattr__, __dir__ = lazy_attributes(__name__)
