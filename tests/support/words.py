"""Texts about the worlds with their factors taken out, to compare templates."""

import re


def masked(text: str) -> str:
    """A text about a walking woman beside two red flags, without its factors."""
    slots = {"woman": "S", "walking|walks": "A", "flags?": "I", "red": "C", "two|three": "N"}
    slots |= {"left|right": "D", "sand": "P", "day": "T"}
    for word, slot in slots.items():
        text = re.sub(rf"\b({word})\b", slot, text.lower())
    return text
