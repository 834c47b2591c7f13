"""In-context learning: demonstrations before a question, chosen, ablated and compared with copying.

After "What Makes Multimodal In-Context Learning Work?" (Baldassini et al., 2024, arXiv 2404.15736):
whether demonstrations' pictures, questions or answers matter, whether retrieved demonstrations do
more than a vote among their answers, and whether the answer copies the last one.
"""

from xlvlms_tutorial.methods.in_context.copying import copy_rate, majority_vote
from xlvlms_tutorial.methods.in_context.episodes import (
    Episode,
    Example,
    ablate,
    as_prompts,
    episodes,
    examples,
)

__all__ = [
    "Episode",
    "Example",
    "ablate",
    "as_prompts",
    "copy_rate",
    "episodes",
    "examples",
    "majority_vote",
]
