"""Prune a decoder: calibrate, score weights, mask them, or cut neurons and blocks out.

A mask is True where a weight is kept.
"""

from xlvlms_tutorial.methods.pruning.calibration import (
    Calibration,
    calibrate,
    calibrate_on,
    fingerprint,
    linear_maps,
)
from xlvlms_tutorial.methods.pruning.masks import Masks, independent_iou, overlap
from xlvlms_tutorial.methods.pruning.scores import magnitude, random_masks, scores, wanda
from xlvlms_tutorial.methods.pruning.sparsify import (
    alpha_subnet,
    apply_masks,
    matched,
    nm,
)
from xlvlms_tutorial.methods.pruning.structured import cut_neurons, neuron_scores, remove_blocks

__all__ = [
    "Calibration",
    "Masks",
    "alpha_subnet",
    "apply_masks",
    "calibrate",
    "calibrate_on",
    "cut_neurons",
    "fingerprint",
    "independent_iou",
    "linear_maps",
    "magnitude",
    "matched",
    "neuron_scores",
    "nm",
    "overlap",
    "random_masks",
    "remove_blocks",
    "scores",
    "wanda",
]
