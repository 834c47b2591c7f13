"""Vision-language models: their parts, positions, prompts and batches, and fine-tuning.

They are loaded and checked one floor up, in ``loading``.
"""

from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.anatomy import SITES, decoder, final_norm
from xlvlms_tutorial.models.architectures import ARCHITECTURES, Architecture, architectures
from xlvlms_tutorial.models.batching import batches
from xlvlms_tutorial.models.finetune import fine_tune, loss_of, save_adapter
from xlvlms_tutorial.models.spans import SPANS, Batch, decode, find_words, label, positions
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input, on_output, record_calls

__all__ = [
    "ARCHITECTURES",
    "SITES",
    "SPANS",
    "VLM",
    "Architecture",
    "Batch",
    "anatomy",
    "architectures",
    "batches",
    "decode",
    "decoder",
    "final_norm",
    "find_words",
    "fine_tune",
    "label",
    "loss_of",
    "on_input",
    "on_output",
    "positions",
    "record_calls",
    "save_adapter",
]
