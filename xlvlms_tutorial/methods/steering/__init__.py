r"""Steering without training.

Vectors added to the residual stream while a model answers, and what to compare them with.
:math:`h_l \leftarrow h_l + \alpha s`, with s the difference of the mean states of two sets
of samples (``coarse``), or of two concepts of one set (``fine``), after "Analyzing
Finetuning Representation Shift for Multimodal LLMs Steering" (arXiv 2501.03012). Vectors are
of the residual stream before the final norm, where they are added; one read behind that norm
does nothing at the last layer.
"""

from xlvlms_tutorial.methods.steering.concept_vectors import ConceptVectors, by_concept, fine
from xlvlms_tutorial.methods.steering.logit_bias import first_pieces, logit_bias, mean_logits_bias
from xlvlms_tutorial.methods.steering.selection import choose, separability
from xlvlms_tutorial.methods.steering.sweep import Run, sweep
from xlvlms_tutorial.methods.steering.vectors import (
    SteeringVectors,
    coarse,
    load_vectors,
    random_like,
    shuffled,
)

__all__ = [
    "ConceptVectors",
    "Run",
    "SteeringVectors",
    "by_concept",
    "choose",
    "coarse",
    "fine",
    "first_pieces",
    "load_vectors",
    "logit_bias",
    "mean_logits_bias",
    "random_like",
    "separability",
    "shuffled",
    "sweep",
]
