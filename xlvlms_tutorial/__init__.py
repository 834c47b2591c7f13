"""Explain, steer and compress vision-language models: the package behind the tutorials."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial import claims, errors, interventions
    from xlvlms_tutorial.activations import States, Store, capture
    from xlvlms_tutorial.data import PROMPTS, Sample, load_samples, mentioning
    from xlvlms_tutorial.evaluation import evaluate
    from xlvlms_tutorial.interventions import (
        add,
        edit,
        fold,
        mask_weights,
        parallel,
        project_out,
        replace,
        skip,
        skip_mlp_tokens,
    )
    from xlvlms_tutorial.loading import load
    from xlvlms_tutorial.methods import logit_lens
    from xlvlms_tutorial.methods.alignment import alignment_profile, cones, linear_probe
    from xlvlms_tutorial.methods.concepts import PCA, KMeans, SemiNMF, TopKSAE, heat, words
    from xlvlms_tutorial.methods.pruning import apply_masks, calibrate, wanda
    from xlvlms_tutorial.methods.shift import recovery, shift_vectors
    from xlvlms_tutorial.methods.skipping import Plan, effects
    from xlvlms_tutorial.methods.steering import SteeringVectors, coarse
    from xlvlms_tutorial.metrics import Estimate, bootstrap, proportion
    from xlvlms_tutorial.models import VLM
    from xlvlms_tutorial.view import dial, plots, tradeoff, widgets

__version__ = "0.1.0"
__all__ = [
    "PCA",
    "PROMPTS",
    "VLM",
    "Estimate",
    "KMeans",
    "Plan",
    "Sample",
    "SemiNMF",
    "States",
    "SteeringVectors",
    "Store",
    "TopKSAE",
    "add",
    "alignment_profile",
    "apply_masks",
    "bootstrap",
    "calibrate",
    "capture",
    "claims",
    "coarse",
    "cones",
    "dial",
    "edit",
    "effects",
    "errors",
    "evaluate",
    "fold",
    "heat",
    "interventions",
    "linear_probe",
    "load",
    "load_samples",
    "logit_lens",
    "mask_weights",
    "mentioning",
    "parallel",
    "plots",
    "project_out",
    "proportion",
    "recovery",
    "replace",
    "shift_vectors",
    "skip",
    "skip_mlp_tokens",
    "tradeoff",
    "wanda",
    "widgets",
    "words",
]

# the command line's help needs no torch
__getattr__, __dir__ = lazy_attributes(__name__)
