"""Figures, cards and widgets of the book."""

from xlvlms_tutorial.view import cards, plots, widgets
from xlvlms_tutorial.view.dial import dial
from xlvlms_tutorial.view.tradeoff import tradeoff

__all__ = [
    "cards",
    "dial",
    "plots",
    "tradeoff",
    "widgets",
]
