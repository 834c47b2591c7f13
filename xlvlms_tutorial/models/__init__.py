"""Vision-language models: loaded by name, with their parts, positions and checks.

Adapters, and models that judge captions.
"""

from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.anatomy import PLACES, decoder, final_norm
from xlvlms_tutorial.models.architectures import ARCHITECTURES, Architecture, architectures
from xlvlms_tutorial.models.batching import batches
from xlvlms_tutorial.models.finetune import fine_tune, loss_of, save_adapter
from xlvlms_tutorial.models.loading import EMBEDDED, load
from xlvlms_tutorial.models.scorers import Scorer, TextEncoder, load_scorer, load_text_encoder
from xlvlms_tutorial.models.self_check import CHECKS, self_check
from xlvlms_tutorial.models.spans import SPANS, Batch, decode, find_words, label, positions
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input, on_output, record_calls

__all__ = [
    "ARCHITECTURES",
    "CHECKS",
    "EMBEDDED",
    "PLACES",
    "SPANS",
    "VLM",
    "Architecture",
    "Batch",
    "Scorer",
    "TextEncoder",
    "anatomy",
    "architectures",
    "batches",
    "decode",
    "decoder",
    "final_norm",
    "find_words",
    "fine_tune",
    "label",
    "load",
    "load_scorer",
    "load_text_encoder",
    "loss_of",
    "on_input",
    "on_output",
    "positions",
    "record_calls",
    "save_adapter",
    "self_check",
]
