"""Tiny random models of every supported architecture, built from config in a third of a second, with inputs made by hand."""

from tests.zoo.inputs import SUPPRESS, extended, padded, prefixed
from tests.zoo.models import MIXTURES, MODELS, build

__all__ = ["MIXTURES", "MODELS", "SUPPRESS", "build", "extended", "padded", "prefixed"]
