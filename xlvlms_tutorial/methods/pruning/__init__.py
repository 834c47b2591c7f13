"""Prune a decoder: calibrate, score weights, mask them, or cut neurons and blocks out.

A mask is True where a weight is kept.
"""

from xlvlms_tutorial.methods.pruning.calibration import (
    Calibration,
    calibrate,
    calibrate_on,
    linear_maps,
)
from xlvlms_tutorial.methods.pruning.masks import Masks, independent_iou, mask_overlap
from xlvlms_tutorial.methods.pruning.scores import magnitude_masks, random_masks, scores, wanda
from xlvlms_tutorial.methods.pruning.sparsify import (
    alpha_subnet,
    apply_masks,
    match_sparsity,
    n_m_masks,
)
from xlvlms_tutorial.methods.pruning.structured import neuron_scores, prune_blocks, prune_neurons

__all__ = [
    "Calibration",
    "Masks",
    "alpha_subnet",
    "apply_masks",
    "calibrate",
    "calibrate_on",
    "independent_iou",
    "linear_maps",
    "magnitude_masks",
    "mask_overlap",
    "match_sparsity",
    "n_m_masks",
    "neuron_scores",
    "prune_blocks",
    "prune_neurons",
    "random_masks",
    "scores",
    "wanda",
]
