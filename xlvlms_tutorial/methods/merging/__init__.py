"""Merge experts: interpolate weights, add tasks, mix adapters, and measure the front between them.

After "UnIVAL: Unified Model for Image, Video, Audio and Language Tasks" (Shukor et al., 2023, arXiv
2307.16184), which interpolates experts that were fine-tuned from one start.
"""

from xlvlms_tutorial.methods.merging.adapters import adapter_changes, mixed
from xlvlms_tutorial.methods.merging.fronts import above_chord, loss_barrier
from xlvlms_tutorial.methods.merging.weights import add_tasks, average, interpolate

__all__ = [
    "above_chord",
    "adapter_changes",
    "add_tasks",
    "average",
    "interpolate",
    "loss_barrier",
    "mixed",
]
