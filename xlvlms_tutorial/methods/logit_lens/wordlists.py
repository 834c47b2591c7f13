"""Which tokens of a vocabulary are words that may name a concept.

Filters are data; the tokens that pass one are computed once.
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

from xlvlms_tutorial.errors import InputError

KEPT = 8  # number of filters that are cached for each tokenizer
_DIGITS, _LETTERS = r"\d+(?:[.,]\d+)?", r"[^\W\d_]+(?:['’-][^\W\d_]+)*"
_NUMBER = re.compile(_DIGITS)
# the space says that a token begins a word; many tokenizers write digits apart from it
_TOKEN = re.compile(rf"\s{_LETTERS}|\s?{_DIGITS}")


@dataclass(frozen=True)
class WordFilter:
    """Define which tokens count as words that may name a concept.

    Use it to restrict the words of a direction to a list, to a language, or to more or rarer words
    than the default. A token is read in lower case, without the space before it.

    Parameters
    ----------
    words : collection of str, optional
        The words that pass. None means the words that ``language`` uses often enough.
    stop : collection of str
        Words that never pass; by default scikit-learn's English stop words.
    min_length : int, default 3
        Smallest number of letters of a word.
    min_frequency : float, default 2.5
        Smallest Zipf frequency of a word, where ``words`` is None: the logarithm to base 10 of its
        occurrences in a billion words, by the package ``wordfreq``. 0 admits every run of letters.
    numbers : bool, default False
        Whether tokens of digits pass, at any length.
    language : str, default "en"
        Code of the language whose word frequencies are used.

    Raises
    ------
    InputError
        If ``words`` or ``stop`` is a single text, which would be read as a list of letters.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.logit_lens import WordFilter
    >>> animals = WordFilter(words={"Dog", "cat"}, numbers=True)
    >>> animals.admits(" dog"), animals.admits("tree"), animals.admits("12")
    (True, False, True)
    """

    words: Collection[str] | None = None
    stop: Collection[str] = field(default=ENGLISH_STOP_WORDS, repr=False)
    min_length: int = 3
    min_frequency: float | int = 2.5
    numbers: bool = False
    language: str = "en"

    def __post_init__(self) -> None:
        for name in ("words", "stop"):
            words = getattr(self, name)
            if isinstance(words, str):
                raise InputError(f"{name} is the text {words!r}", "give a set of words")
            if words is not None:
                object.__setattr__(self, name, frozenset(word.lower() for word in words))

    def admits(self, word: str) -> bool:
        """Tell whether a word passes the filter, as it would as a token.

        Parameters
        ----------
        word : str
            The word, in any case, with or without a space before it.

        Returns
        -------
        bool
            Whether it passes.
        """
        return self._admits(word.strip().lower(), _frequencies(self))

    def _admits(self, word: str, frequencies: dict[str, float]) -> bool:
        if word[:1].isdecimal():
            return self.numbers and bool(_NUMBER.fullmatch(word))
        if len(word) < self.min_length or word in self.stop:
            return False
        if self.words is not None:
            return word in self.words
        return frequencies.get(word, 0.0) >= self._min_share

    @property
    def _min_share(self) -> float:
        """The smallest share of a language's words, with a margin for rounding.

        Tables hold it in steps of a hundredth of the logarithm.
        """
        return 10 ** (self.min_frequency - 9) * (1 - 1e-9) if self.min_frequency > 0 else 0.0


ENGLISH = WordFilter()


class Admissible(NamedTuple):
    """The words (u,) that pass a filter, and the ids of the tokens of each.

    Rows of ``forms`` (u, c) are filled up with their first id.
    """

    words: np.ndarray
    forms: Int[Tensor, "u c"]


_known: WeakKeyDictionary[PreTrainedTokenizerBase, OrderedDict] = WeakKeyDictionary()


def admissible(
    tokenizer: PreTrainedTokenizerBase, size: int, words: WordFilter = ENGLISH
) -> Admissible:
    """Find the words of a vocabulary that pass a filter.

    The results of the last few filters are cached as long as the tokenizer exists. A token counts
    if it begins a word, which is read off its text after another token: "Ġdog" and "▁dog" become
    " dog", while "dog" and "##dog" continue the word before. Tokens that differ only in case are
    one word.

    Parameters
    ----------
    tokenizer
        Has the vocabulary.
    size
        Number of tokens, from the first one, that are considered.
    words
        The filter.

    Raises
    ------
    InputError
        If no word passes, or ``wordfreq`` knows no words of the language.
    """
    cache = _known.setdefault(tokenizer, OrderedDict())
    key = (words, size, len(tokenizer))
    if key not in cache:
        cache[key] = _grouped(*_passing(tokenizer, size, words))
    cache.move_to_end(key)
    while len(cache) > KEPT:
        cache.popitem(last=False)
    return cache[key]


def _passing(
    tokenizer: PreTrainedTokenizerBase, size: int, words: WordFilter
) -> tuple[list[str], list[int]]:
    """The words of all tokens that pass, and the ids of these tokens."""
    frequencies = _frequencies(words)
    passing = []
    ids = []
    for token, text in _texts(tokenizer, size):
        word = text.strip().lower()
        if _TOKEN.fullmatch(text) and words._admits(word, frequencies):
            passing.append(word)
            ids.append(token)
    if not ids:
        raise InputError(
            "no word of this vocabulary passes the filter",
            "give more words, or lower min_frequency (0 admits every run of letters) or min_length",
        )
    return passing, ids


def _texts(tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[tuple[int, str]]:
    """Each id with the text that it adds after another token; nothing for a special token."""
    ids = sorted({token for token in tokenizer.get_vocab().values() if token < size})
    # of fast tokenizers: it decodes a batch without a loop in Python
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decode = tokenizer.batch_decode if backend is None else backend.decode_batch
    for first in ids:
        first_text = decode([[first]], skip_special_tokens=True)[0]
        if first_text.strip().isalpha():
            break
    else:
        return
    texts = decode([[first, token] for token in ids], skip_special_tokens=True)
    for token, text in zip(ids, texts, strict=True):
        yield token, text[len(first_text) :]


def _grouped(words: list[str], ids: list[int]) -> Admissible:
    """Each word once, with the ids of all its tokens."""
    unique, group, counts = np.unique(words, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    sorted_ids = np.asarray(ids)[order]
    first = np.cumsum(counts) - counts
    forms = np.repeat(sorted_ids[first][:, None], counts.max(), axis=1)
    column = np.arange(len(order)) - np.repeat(first, counts)
    forms[group[order], column] = sorted_ids
    return Admissible(unique, torch.from_numpy(forms))


def _frequencies(words: WordFilter) -> dict[str, float]:
    """Shares of the words of the filter's language; ``wordfreq`` keeps the table."""
    if words.words is not None or words.min_frequency <= 0:
        return {}
    languages = wordfreq.available_languages("best")
    if words.language not in languages:  # the package would take the nearest language it knows
        raise InputError(
            f"no word frequencies of language {words.language!r}",
            f"there are those of {', '.join(sorted(languages))}; or give words",
        )
    return wordfreq.get_frequency_dict(words.language, "best")
