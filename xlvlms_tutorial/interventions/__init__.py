"""Change what a model computes, inside ``with``.

Interventions edit the residual stream, skip blocks or the MLPs of some tokens, run blocks in
parallel, or mask weights.
"""

from xlvlms_tutorial.interventions.edits import ablate, add, edit, fold, mask_weights, patch
from xlvlms_tutorial.interventions.overrides import POSITIONS
from xlvlms_tutorial.interventions.replay import Resumable, same_up_to_rounding
from xlvlms_tutorial.interventions.skipping import (
    CACHES,
    COMBINES,
    NORMS,
    PARTS,
    SCOPES,
    parallel,
    parallel_pairs,
    skip,
)
from xlvlms_tutorial.interventions.token_skipping import skip_tokens

__all__ = [
    "CACHES",
    "COMBINES",
    "NORMS",
    "PARTS",
    "POSITIONS",
    "SCOPES",
    "Resumable",
    "ablate",
    "add",
    "edit",
    "fold",
    "mask_weights",
    "parallel",
    "parallel_pairs",
    "patch",
    "same_up_to_rounding",
    "skip",
    "skip_tokens",
]
