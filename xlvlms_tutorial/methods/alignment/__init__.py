"""Alignment of perceptual and textual tokens.

Similarity, narrow cones, alignment scores, and how tokens change over layers. After Shukor
and Cord, "Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to
Multimodal Inputs" (2024, arXiv 2405.16700).
"""

from xlvlms_tutorial.methods.alignment.drift import (
    consecutive_profile,
    linear_probe,
    norms,
    persistence,
)
from xlvlms_tutorial.methods.alignment.scores import (
    READINGS,
    Alignment,
    alignment,
    alignment_profile,
    cones,
    narrowness,
    shuffle_labels,
)
from xlvlms_tutorial.methods.alignment.similarity import examples, similarity

__all__ = [
    "READINGS",
    "Alignment",
    "alignment",
    "alignment_profile",
    "cones",
    "consecutive_profile",
    "examples",
    "linear_probe",
    "narrowness",
    "norms",
    "persistence",
    "shuffle_labels",
    "similarity",
]
