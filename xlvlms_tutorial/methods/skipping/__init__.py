"""Leave out work of a language model's blocks, and choose the blocks.

The ways are named as in the papers. After Shukor and Cord, "Skipping Computations in Multimodal
LLMs" (arXiv 2410.09454) and, for MLPs of image tokens, "Implicit Multimodal Alignment"
(arXiv 2405.16700). Layers are numbered from 1 to L; ``idx`` is the authors' number, from 0 to
L - 1.
"""

from xlvlms_tutorial.methods.skipping.effects import greedy_layer_order, layer_importance
from xlvlms_tutorial.methods.skipping.importance import (
    block_similarity,
    random_layers,
    rank_by_similarity,
)
from xlvlms_tutorial.methods.skipping.plans import SkipPlan, every_nth_layer
from xlvlms_tutorial.methods.skipping.redundancy import layer_redundancy

__all__ = [
    "SkipPlan",
    "block_similarity",
    "every_nth_layer",
    "greedy_layer_order",
    "layer_importance",
    "layer_redundancy",
    "random_layers",
    "rank_by_similarity",
]
