"""Figures, cards and widgets of the book."""

from xlvlms_tutorial.view import cards, plots, widgets
from xlvlms_tutorial.view.dial import dial, tradeoff

__all__ = [
    "cards",
    "dial",
    "plots",
    "tradeoff",
    "widgets",
]
