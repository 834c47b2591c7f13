"""Capture activations of the residual stream, and store them.

``capture`` reads them from many samples, ``Activations`` holds them with a description of each row,
and ``ActivationStore`` keeps them on disk.
"""

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Activations
from xlvlms_tutorial.activations.capture import capture, residual_stream
from xlvlms_tutorial.activations.hooks import REDUCTIONS, read, reading, span_mask
from xlvlms_tutorial.activations.store import (
    ActivationStore,
    load_activations,
    save_activations,
    shard_plan,
)

__all__ = [
    "REDUCTIONS",
    "WHOLE_BLOCK",
    "ActivationStore",
    "Activations",
    "capture",
    "load_activations",
    "read",
    "reading",
    "residual_stream",
    "save_activations",
    "shard_plan",
    "span_mask",
]
