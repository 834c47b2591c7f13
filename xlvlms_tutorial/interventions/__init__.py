"""Change what a model computes, inside ``with``.

Interventions edit the residual stream, cut attention, skip blocks or the MLPs of some tokens, run
blocks in parallel, or mask weights. Activation patching compares two inputs.
"""

from xlvlms_tutorial.interventions.attention import knock_out
from xlvlms_tutorial.interventions.edits import ablate, add, edit, fold, mask_weights, patch
from xlvlms_tutorial.interventions.patching import PatchingGrid, patch_positions, patch_spans
from xlvlms_tutorial.interventions.replay import Resumable
from xlvlms_tutorial.interventions.skipping import parallel, parallel_pairs, skip
from xlvlms_tutorial.interventions.token_skipping import skip_tokens

__all__ = [
    "PatchingGrid",
    "Resumable",
    "ablate",
    "add",
    "edit",
    "fold",
    "knock_out",
    "mask_weights",
    "parallel",
    "parallel_pairs",
    "patch",
    "patch_positions",
    "patch_spans",
    "skip",
    "skip_tokens",
]
