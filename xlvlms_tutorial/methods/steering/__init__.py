r"""Steering without training.

Vectors added to the residual stream while a model answers, and what to compare them with.
:math:`h_l \leftarrow h_l + \alpha s`, with s the difference of the mean states of two sets of
samples (``mean_difference``), or of two concepts of one set (``concept_vectors``), after "Analyzing
Finetuning Representation Shift for Multimodal LLMs Steering" (arXiv 2501.03012). Vectors are of the
residual stream before the final norm, where they are added; one read behind that norm does nothing
at the last layer.
"""

from xlvlms_tutorial.methods.steering.concept_vectors import (
    ConceptVectors,
    concept_vectors,
    steer_by_concept,
)
from xlvlms_tutorial.methods.steering.learned import (
    LearnedSteering,
    ProbeSteering,
    load_steering,
    steer_by,
)
from xlvlms_tutorial.methods.steering.logit_bias import (
    balanced_threshold,
    first_pieces,
    logit_bias,
    mean_logits_bias,
)
from xlvlms_tutorial.methods.steering.representation_tuning import (
    RepresentationTuning,
    load_tuning,
)
from xlvlms_tutorial.methods.steering.selection import best_setting, separability
from xlvlms_tutorial.methods.steering.shifts import (
    by_class,
    contrast_shifts,
    mean_shift,
    mean_shifts_by_class,
    random_shifts,
    remaining,
)
from xlvlms_tutorial.methods.steering.sweep import Recorded, Run, sweep
from xlvlms_tutorial.methods.steering.vectors import (
    SteeringVectors,
    load_vectors,
    mean_difference,
    random_control,
    shuffled_control,
)

__all__ = [
    "ConceptVectors",
    "LearnedSteering",
    "ProbeSteering",
    "Recorded",
    "Run",
    "RepresentationTuning",
    "SteeringVectors",
    "balanced_threshold",
    "best_setting",
    "by_class",
    "concept_vectors",
    "contrast_shifts",
    "first_pieces",
    "load_steering",
    "load_tuning",
    "load_vectors",
    "logit_bias",
    "mean_difference",
    "mean_logits_bias",
    "mean_shift",
    "mean_shifts_by_class",
    "random_control",
    "random_shifts",
    "remaining",
    "separability",
    "shuffled_control",
    "steer_by",
    "steer_by_concept",
    "sweep",
]
