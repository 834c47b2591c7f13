"""Which known facts a caption names: whole words, in the forms that English gives them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import pandas as pd

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.text import composed, forms, unspaced, whole_words
from xlvlms_tutorial.validation import require_same_length

CAPTION_FACTORS = ("subject", "action", "item", "colour", "place")
SOUND_FACTORS = ("sound", "loudness", "background")


def names(caption: str, word: str) -> bool:
    """Return whether a caption names a word.

    The word counts whole, in any case, also in the plural or, for "walking", as "walk" and "walks".

    Parameters
    ----------
    caption : str
        The caption of a picture, clip or sound.
    word : str
        The word to look for.

    Returns
    -------
    bool
        True if the caption has the word or one of its forms.

    Raises
    ------
    InputError
        If the word is part of a caption without spaces, in Chinese for one,
        where words cannot be told apart.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import names
    >>> names("Two red keys.", "key"), names("a monkey", "key")
    (True, False)
    """
    return _has(_pattern(word), word, caption)


def caption_attributes(
    captions: Sequence[str],
    truths: Sequence[Mapping[str, object]],
    factors: Sequence[str] = CAPTION_FACTORS,
) -> pd.DataFrame:
    """Find which known factors of its picture each caption names.

    The mean of a column is the share of captions that name that factor. A colour counts only right
    before the item it belongs to ("red keys"), or anywhere where the truth has no item.

    Parameters
    ----------
    captions : sequence of str
        One caption a sample.
    truths : sequence of mapping
        The truth of each sample, as ``sample.truth``: the value of each factor by its name.
    factors : sequence of str, default CAPTION_FACTORS
        The factors to look for; sounds have ``SOUND_FACTORS``.

    Returns
    -------
    pandas.DataFrame
        One row a caption, one boolean column a factor, NA where the truth does not have it.

    Raises
    ------
    InputError
        If there are not as many truths as captions. If a value is part of a caption without spaces.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import caption_attributes
    >>> truth = {"subject": "woman", "item": "key", "colour": "red"}
    >>> factors = ("subject", "colour", "place")
    >>> table = caption_attributes(["a woman with red keys"], [truth], factors)
    >>> bool(table["colour"].all()), table.notna().sum().to_dict()
    (True, {'subject': 1, 'colour': 1, 'place': 0})
    """
    require_same_length(captions=captions, truths=truths)
    rows = []
    for caption, truth in zip(captions, truths, strict=True):
        rows.append([_named(caption, truth, factor) for factor in factors])
    return pd.DataFrame(rows, columns=list(factors), dtype="boolean")


def _named(caption: str, truth: Mapping[str, object], factor: str) -> bool | None:
    word = truth.get(factor)
    if pd.isna(word):  # None, or NaN where the truth comes from a DataFrame
        return None
    item = truth.get("item")
    noun = str(item) if factor == "colour" and not pd.isna(item) else None
    return _has(_pattern(str(word), noun), str(word), caption)


def _has(pattern: re.Pattern[str], word: str, caption: str) -> bool:
    caption = composed(caption)
    separate(caption, [word])
    return pattern.search(caption) is not None


def separate(caption: str, words: Iterable[str]) -> None:
    """Refuse a caption without spaces that holds one of these words among others.

    Raises
    ------
    InputError
        If the words of the caption cannot be told apart.
    """
    if not unspaced(caption):
        return
    for word in words:
        if composed(word) in caption and composed(word) != caption.strip():
            raise InputError(
                f"{word!r} is part of the caption {caption!r}, which has no spaces",
                "put spaces between the words of captions, with a word segmenter of the language",
            )


@lru_cache(maxsize=4096)
def _pattern(word: str, noun: str | None = None) -> re.Pattern[str]:
    """Return what finds a word: in any of its forms, or right before a noun where one is given."""
    if noun is None:
        return whole_words(forms(word))
    return whole_words([f"{composed(word)} {form}" for form in forms(noun)])
