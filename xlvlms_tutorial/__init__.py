"""Explain, steer and compress vision-language models: the package behind the tutorials."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial import claims, errors, interventions
    from xlvlms_tutorial.activations import Activations, ActivationStore, capture
    from xlvlms_tutorial.data import PROMPTS, Sample, load_samples, mentioning
    from xlvlms_tutorial.evaluation import evaluate
    from xlvlms_tutorial.interventions import (
        ablate,
        add,
        edit,
        fold,
        mask_weights,
        parallel,
        patch,
        skip,
        skip_tokens,
    )
    from xlvlms_tutorial.loading import load
    from xlvlms_tutorial.methods import logit_lens
    from xlvlms_tutorial.methods.alignment import alignment_profile, cones, linear_probe
    from xlvlms_tutorial.methods.concepts import (
        PCA,
        KMeans,
        SemiNMF,
        TopKSAE,
        concept_heatmap,
        concept_words,
    )
    from xlvlms_tutorial.methods.pruning import apply_masks, calibrate, wanda
    from xlvlms_tutorial.methods.shift import recovery, shift_vectors
    from xlvlms_tutorial.methods.skipping import SkipPlan, layer_importance
    from xlvlms_tutorial.methods.steering import SteeringVectors, mean_difference
    from xlvlms_tutorial.metrics import Estimate, bootstrap, proportion
    from xlvlms_tutorial.models import VLM
    from xlvlms_tutorial.view import dial, plots, tradeoff, widgets

__version__ = "0.1.0"
__all__ = [
    "PCA",
    "PROMPTS",
    "VLM",
    "ActivationStore",
    "Activations",
    "Estimate",
    "KMeans",
    "Sample",
    "SemiNMF",
    "SkipPlan",
    "SteeringVectors",
    "TopKSAE",
    "ablate",
    "add",
    "alignment_profile",
    "apply_masks",
    "bootstrap",
    "calibrate",
    "capture",
    "claims",
    "concept_heatmap",
    "concept_words",
    "cones",
    "dial",
    "edit",
    "errors",
    "evaluate",
    "fold",
    "interventions",
    "layer_importance",
    "linear_probe",
    "load",
    "load_samples",
    "logit_lens",
    "mask_weights",
    "mean_difference",
    "mentioning",
    "parallel",
    "patch",
    "plots",
    "proportion",
    "recovery",
    "shift_vectors",
    "skip",
    "skip_tokens",
    "tradeoff",
    "wanda",
    "widgets",
]

# the command line's help needs no torch
__getattr__, __dir__ = lazy_attributes(__name__)
