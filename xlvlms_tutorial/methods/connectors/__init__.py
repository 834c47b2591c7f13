"""Connectors: what turns the features of an encoder into tokens of a language model.

Learned queries, as in DePALM (arXiv 2403.13499) and in the models of *Implicit Multimodal
Alignment* (arXiv 2405.16700), whose released weights can be read.
"""

from xlvlms_tutorial.methods.connectors.queries import QueryConnector
from xlvlms_tutorial.methods.connectors.released import (
    ReleasedConnector,
    load_released,
    released_checkpoints,
)

__all__ = ["QueryConnector", "ReleasedConnector", "load_released", "released_checkpoints"]
