"""The logit lens: distributions over the vocabulary read off the residual stream at any layer.

Top words, entropy and divergence of these distributions, and the tokens that count as words.
"""

from xlvlms_tutorial.methods.logit_lens.measures import (
    consecutive_divergence,
    divergence_profile,
    entropy,
    entropy_profile,
    histogram,
    kl_divergence,
    mean_distribution,
    modality_divergence,
    relative_entropy,
    top_tokens,
)
from xlvlms_tutorial.methods.logit_lens.wordlists import ENGLISH, WordFilter

__all__ = [
    "ENGLISH",
    "WordFilter",
    "consecutive_divergence",
    "divergence_profile",
    "entropy",
    "entropy_profile",
    "histogram",
    "kl_divergence",
    "mean_distribution",
    "modality_divergence",
    "relative_entropy",
    "top_tokens",
]
