"""Figures, cards and widgets of the book."""

from xlvlms_tutorial.view import cards, plots, widgets
from xlvlms_tutorial.view.dial import dial, tradeoff
from xlvlms_tutorial.view.tables import table

__all__ = [
    "cards",
    "dial",
    "plots",
    "table",
    "tradeoff",
    "widgets",
]
