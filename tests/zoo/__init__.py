"""Tiny random models of every supported architecture, built from config in a third of a
second, with inputs made by hand.
"""

from tests.zoo import others as others
from tests.zoo.inputs import SUPPRESS, extended, padded, prefixed
from tests.zoo.models import MAKERS, MIXTURES, build

MODELS: tuple[str, ...] = tuple(MAKERS)

__all__ = ["MIXTURES", "MODELS", "SUPPRESS", "build", "extended", "padded", "prefixed"]
