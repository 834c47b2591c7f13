"""Capture activations of the residual stream, and store them.

``capture`` reads them from many samples, ``Activations`` holds them with a description of each row,
and ``ActivationStore`` keeps them on disk.
"""

from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.activations.capture import capture, residual_stream
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.activations.store import ActivationStore, load_activations, save_activations

__all__ = [
    "ActivationStore",
    "Activations",
    "capture",
    "load_activations",
    "read",
    "residual_stream",
    "save_activations",
]
