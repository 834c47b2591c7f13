"""Load models by name, and check what they are and can do.

Adapters, and models that judge captions.
"""

from xlvlms_tutorial.loading.loading import load
from xlvlms_tutorial.loading.scorers import Scorer, TextEncoder, load_scorer, load_text_encoder
from xlvlms_tutorial.loading.segmenter import Segmenter, load_segmenter
from xlvlms_tutorial.loading.self_check import CHECKS, self_check
from xlvlms_tutorial.loading.wrapping import from_model

__all__ = [
    "CHECKS",
    "Scorer",
    "Segmenter",
    "TextEncoder",
    "from_model",
    "load",
    "load_scorer",
    "load_segmenter",
    "load_text_encoder",
    "self_check",
]
