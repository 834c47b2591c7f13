"""What chapters need around their experiment, and a module for each that needs more."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.tutorials import (
        alignment,
        alignment_score,
        concept_dictionaries,
        concept_pages,
        experiments,
        explain,
        grounding,
        grounding_checks,
        grounding_depth,
        inside,
        learned_steering,
        neutral_wording,
        outside,
        pruning,
        real_models,
        removal,
        second_world,
        shift,
        skip_training,
        skipping,
        steering_answers,
        steering_limits,
        steering_style,
        subnetworks,
        tuning_ladder,
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
    "alignment",
    "alignment_score",
    "balanced_questions",
    "band_table",
    "concept_dictionaries",
    "concept_pages",
    "experiments",
    "explain",
    "glue",
    "grounding",
    "grounding_checks",
    "grounding_depth",
    "inside",
    "learned_steering",
    "neutral_wording",
    "outside",
    "pruning",
    "real_models",
    "removal",
    "second_world",
    "shift",
    "skip_training",
    "skipping",
    "steering_answers",
    "steering_limits",
    "steering_style",
    "subnetworks",
    "substitute",
    "try_exercise",
    "tuning_ladder",
    "upstream",
    "vocabulary",
]

__getattr__, __dir__ = lazy_attributes(__name__)
