"""The logit lens: distributions over the vocabulary read off the residual stream at any layer.

Top words, entropy and divergence of these distributions, and the tokens that count as words.
"""

from xlvlms_tutorial.methods.logit_lens.measures import (
    KINDS,
    consecutive_divergence,
    contrast,
    divergence,
    divergence_profile,
    entropy,
    entropy_profile,
    histogram,
    mean_distribution,
    relative_entropy,
    top_words,
)
from xlvlms_tutorial.methods.logit_lens.wordlists import ENGLISH, WordFilter

__all__ = [
    "ENGLISH",
    "KINDS",
    "WordFilter",
    "consecutive_divergence",
    "contrast",
    "divergence",
    "divergence_profile",
    "entropy",
    "entropy_profile",
    "histogram",
    "mean_distribution",
    "relative_entropy",
    "top_words",
]
