"""Which positions of a sequence are picture, question, answer, and which are padding."""

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
from xlvlms_tutorial.text import whole_words

SPANS = ("template", "image", "video", "audio", "question", "answer", "padding")
_REPLACED = "\ufffd"  # what decoding shows in the place of bytes that are no whole character
_LONGEST = 4  # bytes of a character


class Batch(BatchFeature):
    """Model inputs that know what stands at each position.

    ``spans`` (b, t) holds the index into ``SPANS``.
    """

    spans: Int[Tensor, "b t"]

    def mask(self, *names: str) -> Bool[Tensor, "b t"]:
        """Where positions of these kinds are.

        Raises
        ------
        SpanError
            If a kind is unknown, or some sample has no position of any of these kinds.
        """
        for name in names:
            if name not in SPANS:
                raise SpanError(name, "unknown kind", SPANS)
        mask = torch.isin(
            self.spans,
            torch.tensor([SPANS.index(name) for name in names], device=self.spans.device),
        )
        without = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if without:
            found = [SPANS[k] for k in self.spans.unique().tolist()]
            which = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
            reason = f"{len(without)} of {len(mask)} samples have none (in this batch: {which})"
            raise SpanError(" or ".join(names), reason, found)
        return mask

    @property
    def predicting(self) -> Bool[Tensor, "b t"]:
        """The positions whose states predict the answer's tokens and what comes after.

        From the prompt's last position on.
        """
        answer = self.spans == SPANS.index("answer")
        before = torch.roll(answer, -1, dims=1)
        # the end predicts what comes next; with left padding it is the last column
        before[:, -1] = True
        return before | answer


def label(
    inputs: Mapping,
    placeholders: Mapping[str, int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    questions: Sequence[str] | None = None,
    answers: Sequence[str | None] | None = None,
) -> Int[Tensor, "b t"]:
    """The index into ``SPANS`` of every position.

    Pictures, videos and sounds are where their placeholder ids stand. Questions and answers are
    looked up in the decoded prompt; without ``questions`` every word counts as question.
    """
    ids = inputs["input_ids"]
    spans = torch.full_like(ids, SPANS.index("template" if questions is not None else "question"))
    for name, token in reversed(placeholders.items()):
        spans[ids == token] = SPANS.index(name)
    mask = inputs.get("attention_mask")
    if mask is not None:
        spans[mask == 0] = SPANS.index("padding")
    for row, question in enumerate(questions or ()):
        words = (spans[row] == SPANS.index("template")).nonzero().flatten()
        answer = (answers or ())[row] if answers is not None else None
        for name, part in _parts(tokenizer, ids[row, words].tolist(), question, answer).items():
            spans[row, words[part]] = SPANS.index(name)
    return spans


def _parts(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], question: str, answer: str | None
) -> dict[str, slice]:
    text, parts = decode(tokenizer, ids), {}
    end = len(text)
    for name, wanted in (("answer", answer), ("question", question)):
        if wanted is None or not wanted.strip():
            continue
        # a tokenizer may normalise: then the text stands in the prompt as its own tokens decode
        forms = (
            wanted.strip(),
            decode(tokenizer, tokenizer(wanted, add_special_tokens=False).input_ids).strip(),
        )
        for form in forms:
            # the last occurrence: a system prompt may hold the same words, and stands before
            if (start := text.rfind(form, 0, end)) >= 0:
                parts[name] = token_slice(tokenizer, ids, start, start + len(form))
                end = start
                break
    return parts


def positions(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """What stands at each position of a batch.

    Columns sample, position, token_id, token, span (one of ``SPANS``).
    """
    kinds = [SPANS[k] for k in batch.spans.flatten().tolist()]
    table = pd.DataFrame({"token_id": batch["input_ids"].flatten().tolist(), "span": kinds})
    length = batch.spans.shape[1]
    names = {token: decode(tokenizer, [token]) for token in table["token_id"].unique().tolist()}
    table.insert(0, "sample", table.index // length)
    table.insert(1, "position", table.index % length)
    table.insert(3, "token", table["token_id"].map(names))
    return table


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids as they are, special tokens included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_slice(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int
) -> slice:
    """The tokens that hold the characters ``start`` to ``end`` of the decoded text.

    A token holds a character if it has any of its bytes. By bisection over decoded beginnings, so a
    sequence of t tokens is decoded some 4 log t times.
    """
    text = decode(tokenizer, ids)

    @cache
    # how many characters the first n tokens make, and whether some are part of the next one
    def made(n: int) -> tuple[int, bool]:
        for whole in range(n, max(n - _LONGEST, -1), -1):
            if (length := _length(tokenizer, ids, whole, text)) is not None:
                return length, whole < n
        return len(commonprefix([decode(tokenizer, ids[:n]), text])), True

    numbers = range(len(ids) + 1)
    first = bisect_left(numbers, True, key=lambda n: made(n) > (start, False))
    return slice(first - 1, bisect_left(numbers, True, key=lambda n: made(n)[0] >= end))


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
    more = decode(tokenizer, ids[: n + 1])
    return len(beginning) if len(more) > len(beginning) and text.startswith(more) else None


def find_words(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], words: Sequence[str]
) -> tuple[slice, str] | None:
    """The tokens of the first of these words (or phrases) in the text of ids, and which word it is.

    None where there is none. Whole words only, in any case, whatever pieces they are cut into:
    looking for the id of a first piece instead finds every word that begins with it, and in
    SentencePiece vocabularies every bare space.
    """
    text = decode(tokenizer, ids)
    # of those that begin at one place the longest
    ordered = sorted(words, key=lambda word: (-len(" ".join(word.split())), word))
    match = whole_words(*([word] for word in ordered)).search(text)
    if match is None:
        return None
    return token_slice(tokenizer, ids, *match.span()), ordered[match.lastindex - 1]
