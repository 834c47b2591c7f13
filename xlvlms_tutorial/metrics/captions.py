"""Which known facts a caption names: whole words, in the forms that English gives them."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import pandas as pd

from xlvlms_tutorial.errors import LengthError
from xlvlms_tutorial.metrics.styles import STYLE_WORDS, forms, style_rate

__all__ = ["CAPTION_FACTORS", "SOUND_FACTORS", "STYLE_WORDS", "caption_attributes", "names", "style_rate"]

CAPTION_FACTORS = ("subject", "action", "item", "colour", "place")
SOUND_FACTORS = ("sound", "loudness", "background")


def names(caption: str, word: str) -> bool:
    """Whether a caption names a word: whole, in any case, also in the plural or, for "walking", as "walk" and "walks"."""
    return _pattern(word).search(caption) is not None


def caption_attributes(
    captions: Sequence[str], truths: Sequence[Mapping[str, object]], factors: Sequence[str] = CAPTION_FACTORS
) -> pd.DataFrame:
    """Which factors of its truth each caption names: one row a caption, one boolean column a factor, NA where there is no truth.

    A colour counts only right before the item it belongs to ("red keys"), or anywhere where the truth has no item.

    Raises
    ------
    LengthError
        If there are not as many truths as captions.
    """
    if len(captions) != len(truths):
        raise LengthError(captions=len(captions), truths=len(truths))
    rows = [[_named(caption, truth, factor) for factor in factors] for caption, truth in zip(captions, truths, strict=True)]
    return pd.DataFrame(rows, columns=list(factors), dtype="boolean")


def _named(caption: str, truth: Mapping[str, object], factor: str) -> bool | None:
    word = truth.get(factor)
    if pd.isna(word):  # None, or NaN where the truth comes from a DataFrame
        return None
    item = truth.get("item")
    before = str(item) if factor == "colour" and not pd.isna(item) else None
    return _pattern(str(word), before).search(caption) is not None


@lru_cache(maxsize=4096)
def _pattern(word: str, before: str | None = None) -> re.Pattern[str]:
    told = [_spaced(form) for form in forms(word)] if before is None else [f"{_spaced(word)}\\s+{_spaced(form)}" for form in forms(before)]
    return re.compile(rf"\b(?:{'|'.join(told)})\b", re.IGNORECASE)


def _spaced(form: str) -> str:
    """A regular expression of a form, any white space between its words."""
    return r"\s+".join(map(re.escape, form.split()))
