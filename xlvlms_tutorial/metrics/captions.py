"""Which known facts a caption names: whole words, in the forms that English gives them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import pandas as pd

from xlvlms_tutorial.errors import LengthError, WordListError
from xlvlms_tutorial.text import composed, forms, unspaced, whole_words

CAPTION_FACTORS = ("subject", "action", "item", "colour", "place")
SOUND_FACTORS = ("sound", "loudness", "background")


def names(caption: str, word: str) -> bool:
    """Whether a caption names a word.

    Whole, in any case, also in the plural or, for "walking", as "walk" and "walks".

    Raises
    ------
    WordListError
        If the word is part of a caption without spaces, in Chinese for one,
        where words cannot be told apart.
    """
    return _found(_pattern(word), word, caption)


def caption_attributes(
    captions: Sequence[str],
    truths: Sequence[Mapping[str, object]],
    factors: Sequence[str] = CAPTION_FACTORS,
) -> pd.DataFrame:
    """Which factors of its truth each caption names.

    One row a caption, one boolean column a factor, NA where there is no truth. A colour counts only
    right before the item it belongs to ("red keys"), or anywhere where the truth has no item.

    Raises
    ------
    LengthError
        If there are not as many truths as captions.
    WordListError
        As :func:`names`.
    """
    if len(captions) != len(truths):
        raise LengthError(captions=len(captions), truths=len(truths))
    rows = [
        [_named(caption, truth, factor) for factor in factors]
        for caption, truth in zip(captions, truths, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(factors), dtype="boolean")


def _named(caption: str, truth: Mapping[str, object], factor: str) -> bool | None:
    word = truth.get(factor)
    if pd.isna(word):  # None, or NaN where the truth comes from a DataFrame
        return None
    item = truth.get("item")
    before = str(item) if factor == "colour" and not pd.isna(item) else None
    return _found(_pattern(str(word), before), str(word), caption)


def _found(pattern: re.Pattern[str], word: str, caption: str) -> bool:
    caption = composed(caption)
    separate(caption, [word])
    return pattern.search(caption) is not None


def separate(caption: str, words: Iterable[str]) -> None:
    """Refuse a caption without spaces that holds one of these words.

    As part of a longer one or beside others.

    Raises
    ------
    WordListError
        If it does.
    """
    if unspaced(caption) and (
        inside := [
            word
            for word in words
            if composed(word) in caption and composed(word) != caption.strip()
        ]
    ):
        told = f"{inside[0]!r} is part of the caption {caption!r}, which has no spaces"
        raise WordListError(
            told, "put spaces between the words of captions, with a word segmenter of the language"
        )


@lru_cache(maxsize=4096)
def _pattern(word: str, before: str | None = None) -> re.Pattern[str]:
    return whole_words(
        forms(word) if before is None else [f"{composed(word)} {form}" for form in forms(before)]
    )
