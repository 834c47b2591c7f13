"""Attribution: which pixels, or which image tokens, a decision comes from, and how to judge maps.

Class activation maps of any module that outputs maps, maps over the image tokens of a
vision-language model, and metrics with the control maps that a metric has to beat.
"""

from xlvlms_tutorial.methods.attribution.measures import (
    CONTROLS,
    binary_entropy,
    confidence,
    control_maps,
    mass_share,
    overlap,
    perturbation_curves,
    pointing_game,
    published_entropy,
    scaled,
    top_share,
)
from xlvlms_tutorial.methods.attribution.modules import CAM_METHODS, cam
from xlvlms_tutorial.methods.attribution.tokens import (
    TOKEN_METHODS,
    WordScores,
    attention_rollout,
    token_maps,
)

__all__ = [
    "CAM_METHODS",
    "CONTROLS",
    "TOKEN_METHODS",
    "WordScores",
    "attention_rollout",
    "binary_entropy",
    "cam",
    "confidence",
    "control_maps",
    "mass_share",
    "overlap",
    "perturbation_curves",
    "pointing_game",
    "published_entropy",
    "scaled",
    "token_maps",
    "top_share",
]
