"""Fine-tuning shift: how concepts move, and whether they arrive where the fine-tuned ones are.

After "Analyzing Finetuning Representation Shift for Multimodal LLMs Steering" (arXiv 2501.03012).
"""

from xlvlms_tutorial.methods.shift.recovery import NULLS, curve, means, null_shifts, recovery
from xlvlms_tutorial.methods.shift.vectors import (
    CENTRES,
    WordLists,
    associations,
    consistency,
    magnitude,
    matched,
    pairwise_consistency,
    shift_vectors,
    shifted,
    t_overlap,
)

__all__ = [
    "CENTRES",
    "NULLS",
    "WordLists",
    "associations",
    "consistency",
    "curve",
    "magnitude",
    "matched",
    "means",
    "null_shifts",
    "pairwise_consistency",
    "recovery",
    "shift_vectors",
    "shifted",
    "t_overlap",
]
