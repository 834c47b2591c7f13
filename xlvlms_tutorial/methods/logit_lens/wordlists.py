"""Which tokens of a vocabulary are words that may name a concept.

Filters as data, and the tokens that pass them, computed once.
"""

import re
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import wordfreq
from jaxtyping import Int
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xlvlms_tutorial.errors import SelectionError, WordListError

KEPT = 8  # filters remembered for each tokenizer
_DIGITS, _LETTERS = r"\d+(?:[.,]\d+)?", r"[^\W\d_]+(?:['’-][^\W\d_]+)*"
_NUMBER = re.compile(_DIGITS)
# the space says that a token begins a word; many tokenizers write digits apart from it
_TOKEN = re.compile(rf"\s{_LETTERS}|\s?{_DIGITS}")


@dataclass(frozen=True)
class WordFilter:
    """What counts as a word that may name a concept.

    A token is read in lower case, without the space before it. A word is one of ``words``, or
    (None) one that ``language`` uses with a Zipf frequency of at least ``min_frequency``: the
    logarithm to base 10 of its occurrences in a billion words, by the package ``wordfreq``; 0
    admits every run of letters. It has at least ``min_length`` letters and is none of ``stop``.
    ``numbers`` admits tokens of digits, at any length.

    Raises
    ------
    SelectionError
        If ``words`` or ``stop`` is a single text, which would be taken for its letters.
    """

    words: Collection[str] | None = None
    stop: Collection[str] = field(default=ENGLISH_STOP_WORDS, repr=False)
    min_length: int = 3
    min_frequency: float | int = 2.5
    numbers: bool = False
    language: str = "en"

    def __post_init__(self) -> None:
        for name in ("words", "stop"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise SelectionError(f"{name} is the text {given!r}", "give a set of words")
            if given is not None:
                object.__setattr__(self, name, frozenset(word.lower() for word in given))

    def admits(self, word: str) -> bool:
        """Whether a word passes, as it would as a token."""
        return self._admits(word.strip().lower(), _frequencies(self))

    def _admits(self, word: str, frequencies: dict[str, float]) -> bool:
        if word[:1].isdecimal():
            return self.numbers and bool(_NUMBER.fullmatch(word))
        if len(word) < self.min_length or word in self.stop:
            return False
        return (
            word in self.words
            if self.words is not None
            else frequencies.get(word, 0.0) >= self._least
        )

    @property
    def _least(self) -> float:
        """The least share of a language's words.

        Tables hold it in steps of a hundredth of the logarithm.
        """
        return 10 ** (self.min_frequency - 9) * (1 - 1e-9) if self.min_frequency > 0 else 0.0


ENGLISH = WordFilter()


class Admissible(NamedTuple):
    """The words (u,) that pass a filter, and the ids of the tokens that say each.

    Rows of ``forms`` (u, c) repeat their first id.
    """

    words: np.ndarray
    forms: Int[Tensor, "u c"]


_known: WeakKeyDictionary[PreTrainedTokenizerBase, OrderedDict] = WeakKeyDictionary()


def admissible(
    tokenizer: PreTrainedTokenizerBase, size: int, words: WordFilter = ENGLISH
) -> Admissible:
    """The words among the first ``size`` tokens of a vocabulary that pass a filter.

    The last few are remembered as long as the tokenizer. A token counts if it begins a word, which
    is seen by what it decodes to behind another one: "Ġdog" and "▁dog" become " dog", "dog" and
    "##dog" go on with the word before. Tokens that differ only in case are one word.

    Raises
    ------
    WordListError
        If no word passes, or ``wordfreq`` knows no words of the language.
    """
    known, key = _known.setdefault(tokenizer, OrderedDict()), (words, size, len(tokenizer))
    if key not in known:
        known[key] = _grouped(*_passing(tokenizer, size, words))
    known.move_to_end(key)
    while len(known) > KEPT:
        known.popitem(last=False)
    return known[key]


def _passing(
    tokenizer: PreTrainedTokenizerBase, size: int, words: WordFilter
) -> tuple[list[str], list[int]]:
    frequencies, found, ids = _frequencies(words), [], []
    for token, text in _texts(tokenizer, size):
        if _TOKEN.fullmatch(text) and words._admits(word := text.strip().lower(), frequencies):
            found.append(word)
            ids.append(token)
    if not ids:
        told = "no word of this vocabulary passes the filter"
        raise WordListError(
            told,
            "give more words, or lower min_frequency (0 admits every run of letters) or min_length",
        )
    return found, ids


def _texts(tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[tuple[int, str]]:
    """Each id with what it adds to the text of a token before it: nothing, if it is special."""
    ids = sorted({token for token in tokenizer.get_vocab().values() if token < size})
    # decodes without the loop of the other classes
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decode = tokenizer.batch_decode if backend is None else backend.decode_batch
    before = next(
        (
            token
            for token in ids
            if decode([[token]], skip_special_tokens=True)[0].strip().isalpha()
        ),
        None,
    )
    if before is None:
        return iter(())
    start = len(decode([[before]], skip_special_tokens=True)[0])
    texts = decode([[before, token] for token in ids], skip_special_tokens=True)
    return ((token, text[start:]) for token, text in zip(ids, texts, strict=True))


def _grouped(words: list[str], ids: list[int]) -> Admissible:
    unique, group, counts = np.unique(words, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    sorted_ids, first = np.asarray(ids)[order], np.cumsum(counts) - counts
    forms = np.repeat(sorted_ids[first][:, None], counts.max(), axis=1)
    forms[group[order], np.arange(len(order)) - np.repeat(first, counts)] = sorted_ids
    return Admissible(unique, torch.from_numpy(forms))


def _frequencies(words: WordFilter) -> dict[str, float]:
    """Shares of the words of the filter's language; ``wordfreq`` keeps the table."""
    if words.words is not None or words.min_frequency <= 0:
        return {}
    there = wordfreq.available_languages("best")
    if words.language not in there:  # the package would take the nearest language that it knows
        told = f"no word frequencies of language {words.language!r}"
        raise WordListError(told, f"there are those of {', '.join(sorted(there))}; or give words")
    return wordfreq.get_frequency_dict(words.language, "best")
