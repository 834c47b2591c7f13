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
    match,
    matched,
    pairwise_consistency,
    shift_vectors,
    shifted,
    similarity,
    t_overlap,
)
from xlvlms_tutorial.metrics.dictionaries import MATCHES

__all__ = [
    "CENTRES",
    "MATCHES",
    "NULLS",
    "WordLists",
    "associations",
    "consistency",
    "curve",
    "magnitude",
    "match",
    "matched",
    "means",
    "null_shifts",
    "pairwise_consistency",
    "recovery",
    "shift_vectors",
    "shifted",
    "similarity",
    "t_overlap",
]
