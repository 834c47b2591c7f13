"""Vision-language models: their parts, positions, prompts and batches, and fine-tuning.

They are loaded and checked one floor up, in ``loading``, whose names are offered here too.
"""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.anatomy import SITES, decoder, final_norm
from xlvlms_tutorial.models.architectures import ARCHITECTURES, Architecture, architectures
from xlvlms_tutorial.models.batching import batches
from xlvlms_tutorial.models.finetune import fine_tune, loss_of, save_adapter
from xlvlms_tutorial.models.spans import SPANS, Batch, decode, find_words, label, positions
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input, on_output, record_calls

if TYPE_CHECKING:
    from xlvlms_tutorial.loading import (
        CHECKS,
        EMBEDDED,
        Scorer,
        TextEncoder,
        load,
        load_scorer,
        load_text_encoder,
        self_check,
    )

__all__ = [
    "ARCHITECTURES",
    "CHECKS",
    "EMBEDDED",
    "SITES",
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

__getattr__, __dir__ = lazy_attributes(__name__)
