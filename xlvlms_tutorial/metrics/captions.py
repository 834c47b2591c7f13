"""Which known facts a caption names: whole words, in the forms that English gives them."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import pandas as pd

from xlvlms_tutorial.errors import LengthError

CAPTION_FACTORS = ("subject", "action", "item", "colour", "place")
SOUND_FACTORS = ("sound", "loudness", "background")

_IRREGULAR = {"man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice"}
_VERB = re.compile(r"(\w*[aeiouy]\w*)ing")  # walking, not king or string


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
    forms = _forms(word.lower()) if before is None else [f"{re.escape(word.lower())}\\s+{form}" for form in _forms(before.lower())]
    return re.compile(rf"\b(?:{'|'.join(forms)})\b", re.IGNORECASE)


def _forms(word: str) -> list[str]:
    """Regular expressions of a word and its plural or present; English spelling decides between -s, -es and -ies."""
    stem = _VERB.fullmatch(word)
    forms = [word, _IRREGULAR[word]] if word in _IRREGULAR else [word, *_third_person(word)]
    if stem:
        roots = [stem[1], f"{stem[1]}e"] + ([stem[1][:-1]] if stem[1][-1:] == stem[1][-2:-1] else [])  # walk, ride, run
        forms += [form for root in roots for form in (root, *_third_person(root))]
    return [r"\s+".join(re.escape(part) for part in form.split()) for form in forms]


def _third_person(word: str) -> list[str]:
    if re.search(r"(s|x|z|ch|sh|o)$", word):
        return [f"{word}es", f"{word}s"] if word.endswith("o") else [f"{word}es"]
    return [f"{word}s", f"{word[:-1]}ies"] if re.search(r"[^aeiou]y$", word) else [f"{word}s"]
