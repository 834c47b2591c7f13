"""The rows that one batch gives to a capture.

States at the positions that were chosen, and what each row is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xlvlms_tutorial.activations.activations import FORMATS, Key
from xlvlms_tutorial.activations.hooks import (
    REDUCTIONS,
    Layers,
    Places,
    computed,
    read,
    reading,
    span_mask,
)
from xlvlms_tutorial.errors import SelectionError
from xlvlms_tutorial.models.spans import SPANS, Batch, decode, find_words
from xlvlms_tutorial.models.vlm import VLM

# whole numbers, of numpy too, or "all"
Positions = SupportsIndex | str | Sequence[SupportsIndex] | None
# of a word: the position before it, which predicts it, and that of its last piece
SIDES = ("predicting", "token")
ANSWER, PADDING = SPANS.index("answer"), SPANS.index("padding")


class Rows(NamedTuple):
    """States (n, d) by layer and place, and columns of n values.

    ``row`` is the number of the sample within the batch.
    """

    columns: dict[str, list]
    tensors: dict[Key, Tensor]
    texts: list[str]


@dataclass(frozen=True)
class Selection:
    """What a capture keeps.

    Layers, places, positions said in one of three ways, one row a sample
    or all, and the number format.
    """

    layers: Layers
    places: Places
    spans: tuple[str, ...] | None
    positions: tuple[int, ...] | str | None
    words: tuple[str, ...] | None
    reduce: str | None
    dtype: torch.dtype
    at: str = "predicting"

    @staticmethod
    def of(
        layers: Layers,
        places: Places,
        span: str | Sequence[str] | None,
        positions: Positions,
        words: str | Sequence[str] | None,
        reduce: str | None,
        dtype: torch.dtype,
        at: str = "predicting",
    ) -> "Selection":
        """The selection in one form.

        Raises
        ------
        SelectionError
            If not exactly one of span, positions and words is given, or it is empty, or reduction,
            number format or ``at`` is unknown.
        """
        given = {"span": span, "positions": positions, "words": words}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise SelectionError(
                f"{' and '.join(named) or 'no positions'} given",
                f"give exactly one of {', '.join(given)}",
            )
        if reduce not in REDUCTIONS:
            raise SelectionError(
                f"unknown reduction {reduce!r}", f"allowed: {', '.join(map(repr, REDUCTIONS))}"
            )
        if dtype not in FORMATS:
            raise SelectionError(
                f"states cannot be kept as {dtype}", f"allowed: {', '.join(map(str, FORMATS))}"
            )
        if isinstance(positions, str) and positions != "all":
            raise SelectionError(
                f"unknown positions {positions!r}",
                'give numbers, or "all"; kinds of positions go into span',
            )
        if at not in SIDES or (at != SIDES[0] and words is None):
            why = " without words" if at in SIDES else ""
            raise SelectionError(
                f"at={at!r}{why}", f"allowed: {', '.join(map(repr, SIDES))}, with words"
            )
        where = positions if isinstance(positions, str) else _tuple(positions)
        if where is not None and not isinstance(where, str):
            if not all(isinstance(number, Integral) for number in where):
                raise SelectionError(f"positions {positions!r}", 'give whole numbers, or "all"')
            where = tuple(map(int, where))  # those of numpy are no JSON
        layers = (
            layers
            if isinstance(layers, str)
            else tuple(layers if isinstance(layers, Iterable) else [layers])
        )
        reduce = None if words is not None else reduce
        found = Selection(
            layers, _tuple(places), _tuple(span), where, _tuple(words), reduce, dtype, at
        )
        if any(
            value is not None and not len(value)
            for value in (found.spans, found.positions, found.words)
        ):
            raise SelectionError(f"{named[0]} is empty", "name at least one")
        if not all(isinstance(word, str) and word.strip() for word in found.words or ()):
            raise SelectionError(f"words {words!r}", "give words or phrases, none of them empty")
        return found

    @property
    def described(self) -> dict[str, object]:
        """What was selected, for the provenance."""
        given = {"span": self.spans, "positions": self.positions, "words": self.words}
        given["at"] = None if self.at == SIDES[0] else self.at
        return {name: value for name, value in given.items() if value is not None}

    def mask(self, vlm: VLM, batch: Batch) -> Bool[Tensor, "b t"]:
        """Where a batch has the positions of a span, or these numbers.

        Counted from each sample's own first or last one.

        Raises
        ------
        SpanError
            If this model, or some sample, has no position of the span.
        SelectionError
            If a sample is shorter than a number says.
        """
        if self.spans is not None:
            return span_mask(vlm, batch, self.spans)
        words = batch.spans != PADDING
        if isinstance(self.positions, str):
            return words
        length, first = words.shape[1], words.int().argmax(dim=1, keepdim=True)
        mask = torch.zeros_like(words)
        for number in self.positions:
            at = (first if number >= 0 else torch.full_like(first, length)) + number
            if (at < first).any() or (at >= length).any():
                shortest = length - int(first.max())
                raise SelectionError(
                    f"position {number} in a sample of {shortest}",
                    f"give {-shortest} to {shortest - 1}",
                )
            mask.scatter_(1, at, True)
        return mask


def of_forward(vlm: VLM, batch: Batch, answers: list[str] | None, asked: Selection) -> Rows:
    """The rows of one forward over prompts, with their answers if there are any.

    Raises
    ------
    SpanError, SelectionError
        As ``Selection.mask`` says, or if an answer is not found in its prompt.
    """
    if asked.words is None:
        mask = asked.mask(vlm, batch)
        kept = read(vlm, batch, asked.layers, asked.places, mask, asked.reduce, asked.dtype)
        columns = {"row": list(range(len(mask)))} if asked.reduce else _positions(vlm, batch, mask)
        return Rows(columns, kept, answers or [])
    parts = [row.nonzero().flatten() for row in batch.mask("answer")]
    ids = [row[at].tolist() for row, at in zip(batch["input_ids"], parts, strict=True)]
    columns = _hits(vlm.tokenizer, ids, asked, batch.spans.shape[1])
    mask = torch.zeros_like(batch.spans, dtype=torch.bool)
    before = int(asked.at == SIDES[0])  # the position before a token predicts it
    for row, token in zip(columns["row"], columns["token_index"], strict=True):
        mask[row, parts[row][token] - before] = True
    return Rows(
        columns, read(vlm, batch, asked.layers, asked.places, mask, dtype=asked.dtype), answers
    )


def of_generation(vlm: VLM, batch: Batch, max_new_tokens: int, asked: Selection) -> Rows:
    """The rows of greedy answers to prompts.

    Raises
    ------
    SpanError, SelectionError
        As ``Selection.mask`` says.
    """
    if asked.words is not None:
        return _of_words(vlm, batch, max_new_tokens, asked)
    if asked.spans is not None and "answer" in asked.spans:
        return _of_answers(vlm, batch, max_new_tokens, asked)
    mask = asked.mask(vlm, batch)
    with reading(
        vlm, asked.layers, asked.places, mask, asked.reduce, asked.dtype, steps=False
    ) as found:
        texts = _texts(vlm, _generated(vlm, batch, max_new_tokens)[0])
    columns = {"row": list(range(len(mask)))} if asked.reduce else _positions(vlm, batch, mask)
    return Rows(columns, {key: parts[0] for key, parts in computed(found).items()}, texts)


def _of_words(vlm: VLM, batch: Batch, max_new_tokens: int, asked: Selection) -> Rows:
    with reading(vlm, asked.layers, asked.places, "last", dtype=asked.dtype) as found:
        ids, longest = _generated(vlm, batch, max_new_tokens)
    after = int(asked.at == SIDES[1])
    # the prompt's last position predicts token 0, the step that is fed token k - 1 predicts token
    # k, and the last one is never fed
    columns = _hits(vlm.tokenizer, ids, asked, longest - after)
    at = [
        (row, token + after)
        for row, token in zip(columns["row"], columns["token_index"], strict=True)
    ]
    tensors = {
        key: torch.cat([steps[0][:0, 0], *(steps[step][row] for row, step in at)])
        for key, steps in computed(found).items()
    }
    return Rows(columns, tensors, _texts(vlm, ids))


def _of_answers(vlm: VLM, batch: Batch, max_new_tokens: int, asked: Selection) -> Rows:
    """Rows at generated tokens, and at the prompt's positions of other kinds if asked for."""
    others = tuple(name for name in asked.spans if name != "answer")
    mask = (
        span_mask(vlm, batch, others) if others else torch.zeros_like(batch.spans, dtype=torch.bool)
    )
    with reading(vlm, asked.layers, asked.places, mask) as found:
        ids, longest = _generated(vlm, batch, max_new_tokens)
    # the last is never fed
    fed = [
        (row, token)
        for row, tokens in enumerate(ids)
        for token in range(min(len(tokens), longest - 1))
    ]
    lengths = (batch.spans != PADDING).sum(dim=1).tolist()
    columns = _positions(vlm, batch, mask)
    columns["row"] += [row for row, _ in fed]
    columns["position"] += [lengths[row] + token for row, token in fed]
    columns["token"] += _names(vlm.tokenizer, [ids[row][token] for row, token in fed])
    columns["span"] += ["answer"] * len(fed)
    # stable: by sample, then by position
    order = sorted(range(len(columns["row"])), key=lambda k: columns["row"][k])
    columns = {name: [values[k] for k in order] for name, values in columns.items()}
    rows, tokens = (torch.tensor([pair[side] for pair in fed], dtype=torch.long) for side in (0, 1))
    tensors = {}
    for key, (prompt, *steps) in computed(found).items():
        answer = torch.cat(steps, dim=1)[rows, tokens] if fed else prompt[:0]
        tensors[key] = _reduced(
            torch.cat([prompt, answer])[order], columns["row"], asked.reduce
        ).to(asked.dtype)
    return Rows(
        {"row": list(dict.fromkeys(columns["row"]))} if asked.reduce else columns,
        tensors,
        _texts(vlm, ids),
    )


def _reduced(states: Tensor, rows: list[int], reduce: str | None) -> Tensor:
    if reduce is None or not rows:
        return states
    counts = torch.tensor(rows).unique_consecutive(return_counts=True)[1].tolist()
    wide = torch.promote_types(states.dtype, torch.float32)
    return torch.stack(
        [
            part[-1] if reduce == "last" else part.mean(0, dtype=wide)
            for part in states.split(counts)
        ]
    )


def _generated(vlm: VLM, batch: Batch, max_new_tokens: int) -> tuple[list[list[int]], int]:
    """The ids of each greedy answer, without the end mark and what follows it.

    And how many tokens the longest has.
    """
    ids = vlm.generate_ids(batch, max_new_tokens)
    ends = vlm.model.generation_config.eos_token_id
    ends = getattr(vlm.tokenizer, "eos_token_id", None) if ends is None else ends
    ends = torch.tensor(
        ends if isinstance(ends, list) else [] if ends is None else [ends], device=ids.device
    )
    # a row that has ended goes on with padding
    before = (torch.isin(ids, ends).cumsum(dim=1) == 0).sum(dim=1).tolist()
    return [row[:n] for row, n in zip(ids.tolist(), before, strict=True)], ids.shape[1]


def _texts(vlm: VLM, ids: list[list[int]]) -> list[str]:
    return [text.strip() for text in vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _hits(
    tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], asked: Selection, end: int
) -> dict[str, list]:
    """Where the words stand in the answers, before token ``end``.

    Columns row, word, token_index (first piece, or last).
    """
    hits = [(row, find_words(tokenizer, tokens, asked.words)) for row, tokens in enumerate(ids)]
    found = [
        (row, hit[1], hit[0].start if asked.at == SIDES[0] else hit[0].stop - 1)
        for row, hit in hits
        if hit
    ]
    return {
        name: [hit[k] for hit in found if hit[2] < end]
        for k, name in enumerate(("row", "word", "token_index"))
    }


def _positions(vlm: VLM, batch: Batch, mask: Bool[Tensor, "b t"]) -> dict[str, list]:
    """What stands at each position of a mask.

    Columns row, position (0 is the sample's first token), token, span.
    """
    rows, at = mask.nonzero(as_tuple=True)
    first: Int[Tensor, "b"] = (batch.spans != PADDING).int().argmax(dim=1)
    names = _names(vlm.tokenizer, batch["input_ids"][mask].tolist())
    kinds = [SPANS[k] for k in batch.spans[mask].tolist()]
    return {
        "row": rows.tolist(),
        "position": (at - first[rows]).tolist(),
        "token": names,
        "span": kinds,
    }


def _names(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    known = {token: decode(tokenizer, [token]) for token in dict.fromkeys(ids)}
    return [known[token] for token in ids]


def _tuple(values: object) -> tuple | None:
    if values is None:
        return None
    return (values,) if isinstance(values, (str, Integral)) else tuple(values)
