"""Vision-language models: their parts, positions, prompts and batches, and fine-tuning.

They are loaded and checked one floor up, in ``loading``.
"""

from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.anatomy import SITES, decoder, final_norm
from xlvlms_tutorial.models.architectures import ARCHITECTURES, architectures
from xlvlms_tutorial.models.batching import batches
from xlvlms_tutorial.models.finetune import fine_tune, loss_of, save_adapter
from xlvlms_tutorial.models.spans import SPANS, Batch, label
from xlvlms_tutorial.models.tuning import TUNINGS, Tuning, tune
from xlvlms_tutorial.models.turns import Turn
from xlvlms_tutorial.models.vlm import VLM

__all__ = [
    "ARCHITECTURES",
    "SITES",
    "SPANS",
    "TUNINGS",
    "VLM",
    "Batch",
    "Tuning",
    "Turn",
    "anatomy",
    "architectures",
    "batches",
    "decoder",
    "final_norm",
    "fine_tune",
    "label",
    "loss_of",
    "save_adapter",
    "tune",
]
