"""The logit lens: distributions over the vocabulary read off the residual stream at any layer.

Top words, entropy and divergence of these distributions, and the tokens that count as words. Beside
it stand other read-outs of a state: tuned lens, embedding lens, contextual neighbours.
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
from xlvlms_tutorial.methods.logit_lens.readouts import (
    ContextualNeighbours,
    EmbeddingLens,
    LogitLens,
    Reader,
    TunedLens,
    as_forms,
    readers,
)
from xlvlms_tutorial.methods.logit_lens.text_states import (
    TextStates,
    decoder_fingerprint,
    text_states,
)
from xlvlms_tutorial.methods.logit_lens.wordlists import ENGLISH, WordFilter

__all__ = [
    "ENGLISH",
    "ContextualNeighbours",
    "EmbeddingLens",
    "LogitLens",
    "Reader",
    "TextStates",
    "TunedLens",
    "WordFilter",
    "as_forms",
    "consecutive_divergence",
    "decoder_fingerprint",
    "divergence_profile",
    "entropy",
    "entropy_profile",
    "histogram",
    "kl_divergence",
    "mean_distribution",
    "modality_divergence",
    "readers",
    "relative_entropy",
    "text_states",
    "top_tokens",
]
