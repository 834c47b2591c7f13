r"""Contrastive decoding: the next token is chosen by what a disturbed input does not say as well.

A second branch reads the prompt with a distorted picture (VCD, arXiv 2311.16922) or after a
disturbing instruction (ICD, arXiv 2403.18715). With its logits :math:`l'` the token is chosen by
:math:`(1 + \alpha)\, l - \alpha\, l'`, among those that are plausible without it.
"""

from xlvlms_tutorial.methods.decoding.contrastive import (
    ICD,
    VCD,
    ContrastiveDecoding,
    contrast,
    distorted,
)

__all__ = ["ICD", "VCD", "ContrastiveDecoding", "contrast", "distorted"]
