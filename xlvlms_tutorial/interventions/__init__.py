"""Change what a model computes, inside ``with``.

Interventions edit the residual stream, skip blocks or the MLPs of some tokens, run blocks in
parallel, or mask weights.
"""

from xlvlms_tutorial.interventions.edits import ablate, add, edit, fold, mask_weights, patch
from xlvlms_tutorial.interventions.replay import Resumable
from xlvlms_tutorial.interventions.skipping import parallel, parallel_pairs, skip
from xlvlms_tutorial.interventions.token_skipping import skip_tokens

__all__ = [
    "Resumable",
    "ablate",
    "add",
    "edit",
    "fold",
    "mask_weights",
    "parallel",
    "parallel_pairs",
    "patch",
    "skip",
    "skip_tokens",
]
