"""The embedded worlds, whose truth is known, and what pocket LLaVA is made of."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.pocket.build import training_record
    from xlvlms_tutorial.pocket.counting import describe_worlds
    from xlvlms_tutorial.pocket.variants import VARIANTS, Variant
    from xlvlms_tutorial.pocket.world import Scene, counterfactuals, masks, render, scenes

__all__ = [
    "VARIANTS",
    "Scene",
    "Variant",
    "counterfactuals",
    "describe_worlds",
    "masks",
    "render",
    "scenes",
    "training_record",
]

__getattr__, __dir__ = lazy_attributes(__name__)
