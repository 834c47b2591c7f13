"""The methods of the papers, a package a subject."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.methods import (
        alignment,
        attribution,
        concepts,
        connectors,
        decoding,
        dropping,
        in_context,
        logit_lens,
        merging,
        pruning,
        shift,
        skipping,
        steering,
    )

__all__ = [
    "alignment",
    "attribution",
    "concepts",
    "connectors",
    "decoding",
    "dropping",
    "in_context",
    "logit_lens",
    "merging",
    "pruning",
    "shift",
    "skipping",
    "steering",
]

__getattr__, __dir__ = lazy_attributes(__name__)
