"""What single chapters need beyond the package, a module a chapter."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.tutorials import real_models, second_world, upstream

__all__ = ["real_models", "second_world", "upstream"]

__getattr__, __dir__ = lazy_attributes(__name__)
