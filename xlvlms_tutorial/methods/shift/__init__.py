"""Fine-tuning shift: how concepts move, and whether they arrive where the fine-tuned ones are.

After "Analyzing Finetuning Representation Shift for Multimodal LLMs Steering" (arXiv 2501.03012).
"""

from xlvlms_tutorial.methods.shift.recovery import (
    mean_recovery,
    null_shifts,
    recovery,
    recovery_curve,
)
from xlvlms_tutorial.methods.shift.vectors import (
    assign_concepts,
    common_samples,
    consistency,
    pairwise_consistency,
    shift_magnitude,
    shift_vectors,
    shifted,
    t_overlap,
)

__all__ = [
    "assign_concepts",
    "common_samples",
    "consistency",
    "mean_recovery",
    "null_shifts",
    "pairwise_consistency",
    "recovery",
    "recovery_curve",
    "shift_magnitude",
    "shift_vectors",
    "shifted",
    "t_overlap",
]
