"""Which positions of a sequence are picture, question, answer, and which are padding."""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from os.path import commonprefix

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase

from xlvlms_tutorial.errors import SpanError
from xlvlms_tutorial.text import first_few, whole_words

SPANS = (
    "template",
    "image",
    "video",
    "audio",
    "question",
    "answer",
    "system",
    "demonstration",
    "demonstration answer",
    "padding",
)
# of which a prompt may hold several, told apart by their numbers: "image 2"
NUMBERED = ("image", "demonstration", "demonstration answer")
_REPLACED = "\ufffd"  # what decoding shows in the place of bytes that are no whole character
_LONGEST = 4  # bytes of a character


class Batch(BatchFeature):
    """Model inputs that know what stands at each position.

    A batch is a dictionary of tensors, as a processor of transformers makes it, and goes into
    ``vlm.forward`` and ``vlm.generate_ids``. ``vlm.batch`` makes it from pictures and texts,
    ``vlm.prepare`` from inputs that were made elsewhere.

    Attributes
    ----------
    spans : Tensor
        Integers (b, t): the index into ``SPANS`` of what stands at each position.
    numbers : Tensor or None
        Integers (b, t): at pictures and earlier turns which one of its row it is, from 1; elsewhere
        0. None where inputs were made elsewhere.
    single : bool
        False where some row is about no picture or several, or has earlier turns.

    Examples
    --------
    >>> batch.spans.shape == batch["input_ids"].shape
    True
    >>> batch.mask("image").sum(dim=1).tolist()
    [16, 16, 16, 16]
    >>> batch.predicting.sum(dim=1).tolist()  # without answers: the last position of each prompt
    [1, 1, 1, 1]
    """

    spans: Int[Tensor, "b t"]
    numbers: Int[Tensor, "b t"] | None = None
    single: bool = True

    def mask(self, *names: str) -> Bool[Tensor, "b t"]:
        """Mark the positions of some kinds.

        Use it to select the states or logits of picture, question or answer.

        Parameters
        ----------
        *names : str
            One or more of ``SPANS``. "image 2" is the second picture of each row, "demonstration 1"
            and "demonstration answer 1" are text and answer of its first earlier turn.

        Returns
        -------
        Tensor
            Booleans (b, t), True where a position is of one of these kinds.

        Raises
        ------
        SpanError
            If a kind is unknown, or some sample has no position of any of these kinds.
        """
        pairs = [kind_of(name) for name in names]
        whole = [SPANS.index(kind) for kind, number in pairs if number is None]
        mask = torch.isin(self.spans, torch.tensor(whole, device=self.spans.device))
        for name, (kind, number) in zip(names, pairs, strict=True):
            if number is None:
                continue
            if self.numbers is None:
                raise SpanError(name, "inputs made elsewhere do not say which one it is", SPANS)
            mask |= (self.spans == SPANS.index(kind)) & (self.numbers == number)
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            present = [SPANS[k] for k in self.spans.unique().tolist()]
            rows = first_few(empty, 5)
            reason = f"{len(empty)} of {len(mask)} samples have none (in this batch: {rows})"
            raise SpanError(" or ".join(names), reason, present)
        return mask

    @property
    def predicting(self) -> Bool[Tensor, "b t"]:
        """The positions whose states predict the answer's tokens and what comes after.

        They run from the prompt's last position on; booleans (b, t).
        """
        answer = self.spans == SPANS.index("answer")
        predicting = torch.roll(answer, -1, dims=1)
        # the end predicts what comes next; with left padding it is the last column
        predicting[:, -1] = True
        return predicting | answer


def kind_of(name: str) -> tuple[str, int | None]:
    """Return the kind that a name of positions stands for, and the number in it, if it has one.

    Parameters
    ----------
    name : str
        One of ``SPANS``, or one of ``NUMBERED`` with a number from 1, such as "image 2".

    Raises
    ------
    SpanError
        If it is neither.

    Examples
    --------
    >>> from xlvlms_tutorial.models.spans import kind_of
    >>> kind_of("image"), kind_of("demonstration answer 3")
    (('image', None), ('demonstration answer', 3))
    """
    if name in SPANS:
        return name, None
    kind, _, number = name.rpartition(" ")
    if kind in NUMBERED and number.isdecimal() and int(number) > 0:
        return kind, int(number)
    raise SpanError(name, "unknown kind", SPANS)


def label(
    inputs: Mapping,
    placeholders: Mapping[str, int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    questions: Sequence[str] | None = None,
    answers: Sequence[str | None] | None = None,
) -> Int[Tensor, "b t"]:
    """Return the index into ``SPANS`` of every position.

    Use it for inputs that were made without this package; ``vlm.batch`` labels its own. Pictures,
    videos and sounds are where their placeholder ids stand. Questions and answers are looked up in
    the decoded prompt.

    Parameters
    ----------
    inputs : Mapping
        Model inputs: ``input_ids`` (b, t) and, where rows are padded, ``attention_mask`` (b, t).
    placeholders : Mapping of str to int
        The id that stands for one token of each modality, as in ``vlm.placeholders``.
    tokenizer : PreTrainedTokenizerBase, optional
        Decodes the prompts; needed with ``questions``.
    questions : sequence of str, optional
        The question of each row. By default every position that is no placeholder and no padding
        counts as question.
    answers : sequence of str or None, optional
        The answer of each row, None for a row without one; by default no row has one.

    Returns
    -------
    Tensor
        Integers (b, t).

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.models import SPANS, label
    >>> inputs = {"input_ids": torch.tensor([[1, 9, 9, 5]])}
    >>> [SPANS[kind] for kind in label(inputs, {"image": 9})[0].tolist()]
    ['question', 'image', 'image', 'question']
    """
    ids = inputs["input_ids"]
    text = "question" if questions is None else "template"
    spans = torch.full_like(ids, SPANS.index(text))
    for name, token in reversed(placeholders.items()):
        spans[ids == token] = SPANS.index(name)
    mask = inputs.get("attention_mask")
    if mask is not None:
        spans[mask == 0] = SPANS.index("padding")
    for row, question in enumerate(questions or ()):
        words = (spans[row] == SPANS.index("template")).nonzero().flatten()
        answer = None if answers is None else answers[row]
        texts = [("question", 0, question), ("answer", 0, answer)]
        for name, _, part in _parts(tokenizer, ids[row, words].tolist(), texts):
            spans[row, words[part]] = SPANS.index(name)
    return spans


def label_turns(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[tuple[str, int, str]]],
    pictures: Sequence[Sequence[int]],
) -> None:
    """Label the earlier turns of a batch, and number its pictures and turns.

    Parameters
    ----------
    batch : Batch
        With the spans of the last turns; gets those of the others, and ``numbers``.
    tokenizer : PreTrainedTokenizerBase
        Decodes the prompts.
    texts : sequence of sequences of (str, int, str)
        For each row the kind, number and text of what stands before its last turn, in its order.
    pictures : sequence of sequences of int
        For each row how many positions each picture has.
    """
    spans, ids = batch.spans, batch["input_ids"]
    numbers = torch.zeros_like(spans)
    for row, (earlier, sizes) in enumerate(zip(texts, pictures, strict=True)):
        image = (spans[row] == SPANS.index("image")).nonzero().flatten()
        order = torch.arange(1, len(sizes) + 1).repeat_interleave(torch.tensor(sizes).long())
        # how many positions a picture has is not known everywhere
        if len(order) == len(image):
            numbers[row, image] = order.to(numbers)
        if not earlier:
            continue
        words = (spans[row] == SPANS.index("template")).nonzero().flatten()
        # what stands before the question of the last turn
        question = (spans[row] == SPANS.index("question")).nonzero().flatten()
        if len(question):
            words = words[words < question[0]]
        for name, number, part in _parts(tokenizer, ids[row, words].tolist(), earlier, whole=True):
            spans[row, words[part]] = SPANS.index(name)
            numbers[row, words[part]] = number
    batch.numbers = numbers


def run_lengths(ids: Int[Tensor, "t"], placeholder: int) -> list[int]:
    """Return how many of a placeholder follow each other, for each such run in a row of ids.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.models.spans import run_lengths
    >>> run_lengths(torch.tensor([1, 9, 9, 5, 9]), 9)
    [2, 1]
    """
    values, counts = (ids == placeholder).unique_consecutive(return_counts=True)
    return counts[values].tolist()


def _parts(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    texts: Sequence[tuple[str, int, str | None]],
    whole: bool = False,
) -> list[tuple[str, int, slice]]:
    """Find texts in the ids of a prompt, where they stand in this order, from the last on.

    With ``whole`` a text that begins and ends a word is preferred: short answers are letters of
    other words too, and of the template's.
    """
    text, parts = decode(tokenizer, ids), []
    end = len(text)
    for name, number, part in reversed(texts):
        if part is None or not part.strip():
            continue
        # a tokenizer may normalise: then the text stands in the prompt as its own tokens decode
        forms = (
            part.strip(),
            decode(tokenizer, tokenizer(part, add_special_tokens=False).input_ids).strip(),
        )
        for form in forms:
            # the last occurrence: a system prompt may hold the same words, and stands before
            if (start := _last(text, form, end, whole)) >= 0:
                tokens = token_slice(tokenizer, ids, start, start + len(form))
                parts.append((name, number, tokens))
                end = start
                break
    return parts


def _last(text: str, part: str, end: int, whole: bool) -> int:
    """Where a part stands last in a text before ``end``; -1 if it does not."""
    if whole:
        words = rf"(?<!\w){re.escape(part)}(?!\w)"
        starts = [match.start() for match in re.finditer(words, text[:end])]
        if starts:
            return starts[-1]
    return text.rfind(part, 0, end)


def positions(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Return a table of what stands at each position of a batch.

    Use it to look at a prompt token by token; ``vlm.spans`` makes batch and table in one call.

    Parameters
    ----------
    batch : Batch
        The inputs.
    tokenizer : PreTrainedTokenizerBase
        Decodes each id alone, as ``vlm.tokenizer``.

    Returns
    -------
    DataFrame
        A row for each position, row after row: sample and position (from 0), token_id, token (its
        text) and span (one of ``SPANS``). Where there are several pictures or earlier turns,
        ``number`` says which one it is.

    Examples
    --------
    >>> from xlvlms_tutorial.models.spans import positions
    >>> table = positions(batch, vlm.tokenizer)
    >>> table.columns.tolist()
    ['sample', 'position', 'token_id', 'token', 'span']
    >>> len(table) == batch["input_ids"].numel()
    True
    """
    kinds = [SPANS[k] for k in batch.spans.flatten().tolist()]
    table = pd.DataFrame({"token_id": batch["input_ids"].flatten().tolist(), "span": kinds})
    length = batch.spans.shape[1]
    names = {token: decode(tokenizer, [token]) for token in table["token_id"].unique().tolist()}
    table.insert(0, "sample", table.index // length)
    table.insert(1, "position", table.index % length)
    table.insert(3, "token", table["token_id"].map(names))
    if batch.numbers is not None and not batch.single:
        table["number"] = batch.numbers.flatten().tolist()
    return table


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of ids as they are, special tokens included.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer, as ``vlm.tokenizer``.
    ids : sequence of int
        The ids of one sequence.

    Returns
    -------
    str
        The text; its spaces are not cleaned up.

    Examples
    --------
    >>> from xlvlms_tutorial.models.spans import decode
    >>> decode(vlm.tokenizer, vlm.tokenizer("A red key.").input_ids)
    'A red key.'
    """
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_slice(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int
) -> slice:
    """Return the tokens that hold the characters from ``start`` to ``end`` of the decoded text.

    A token holds a character if it has any of its bytes. The slice is found by bisection over
    decoded beginnings, so a sequence of t tokens is decoded some 4 log t times.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer, as ``vlm.tokenizer``.
    ids : sequence of int
        The ids of one sequence.
    start : int
        The first character.
    end : int
        The character after the last.

    Returns
    -------
    slice
        Of ``ids``.

    Examples
    --------
    >>> from xlvlms_tutorial.models.spans import decode
    >>> ids = vlm.tokenizer("A red key.").input_ids
    >>> decode(vlm.tokenizer, ids[token_slice(vlm.tokenizer, ids, 2, 5)])
    ' red'
    """
    text = decode(tokenizer, ids)

    @cache
    # how many characters the first n tokens make, and whether some are part of the next one
    def characters(n: int) -> tuple[int, bool]:
        for complete in range(n, max(n - _LONGEST, -1), -1):
            if (length := _length(tokenizer, ids, complete, text)) is not None:
                return length, complete < n
        return len(commonprefix([decode(tokenizer, ids[:n]), text])), True

    numbers = range(len(ids) + 1)
    first = bisect_left(numbers, True, key=lambda n: characters(n) > (start, False))
    stop = bisect_left(numbers, True, key=lambda n: characters(n)[0] >= end)
    return slice(first - 1, stop)


def _length(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], n: int, text: str
) -> int | None:
    """How many characters the first n tokens make.

    None where they end inside one, which is decoded as marks of replacement.
    """
    beginning = decode(tokenizer, ids[:n])
    if not text.startswith(beginning):
        return None
    if not beginning.endswith(_REPLACED) or n == len(ids):
        return len(beginning)
    # where the text itself shows such a mark, its bytes may go on
    longer = decode(tokenizer, ids[: n + 1])
    return len(beginning) if len(longer) > len(beginning) and text.startswith(longer) else None


def find_words(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], words: Sequence[str]
) -> tuple[slice, str] | None:
    """Find the first of some words (or phrases) in the text of ids.

    Use it to read states where a word of interest was generated. Whole words only, in any case,
    whatever pieces they are cut into: looking for the id of a first piece instead finds every
    word that begins with it, and in SentencePiece vocabularies every bare space.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer, as ``vlm.tokenizer``.
    ids : sequence of int
        The ids of one sequence.
    words : sequence of str
        What to look for. Where several begin at one place, the longest counts.

    Returns
    -------
    tuple of slice and str, or None
        The tokens of the word, and the word as it stands in ``words``. None where there is none.

    Examples
    --------
    >>> from xlvlms_tutorial.models.spans import decode, find_words
    >>> ids = vlm.tokenizer("A frog eats a hot dog.").input_ids
    >>> tokens, word = find_words(vlm.tokenizer, ids, ["dog", "hot dog"])
    >>> word, decode(vlm.tokenizer, ids[tokens])
    ('hot dog', ' hot dog')
    >>> find_words(vlm.tokenizer, ids, ["cat"]) is None
    True
    """
    text = decode(tokenizer, ids)
    # of those that begin at one place the longest
    ordered = sorted(words, key=lambda word: (-len(" ".join(word.split())), word))
    match = whole_words(*([word] for word in ordered)).search(text)
    if match is None:
        return None
    start, end = match.span()
    word = ordered[match.lastindex - 1]
    return token_slice(tokenizer, ids, start, end), word
