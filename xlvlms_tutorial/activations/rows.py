"""The rows that one batch gives to a capture.

They are the states at the selected positions, with a description of each row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xlvlms_tutorial.activations.activations import Key, require_format
from xlvlms_tutorial.activations.hooks import (
    REDUCTIONS,
    Layers,
    Sites,
    computed,
    first_of_each,
    read,
    reading,
    span_mask,
)
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.memory import fingerprint
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.sharing import beginnings, common_beginning, continued, shareable
from xlvlms_tutorial.models.spans import SPANS, Batch, decode, find_words
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require_one_of

# integers, of numpy too, or "all"
Positions = SupportsIndex | str | Sequence[SupportsIndex] | None
# of a word: the position before it, which predicts it, and that of its last piece
SIDES = ("predicting", "token")
ANSWER, PADDING = SPANS.index("answer"), SPANS.index("padding")


class Rows(NamedTuple):
    """States (n, d) for each layer and site, and columns of n values.

    The column ``row`` is the number of the sample within the batch.
    """

    columns: dict[str, list]
    tensors: dict[Key, Tensor]
    texts: list[str]


@dataclass(frozen=True)
class Selection:
    """What a capture reads.

    It holds layers, sites, positions in one of three forms, the reduction (one row a sample, or
    one a position) and the dtype.
    """

    layers: Layers
    sites: Sites
    spans: tuple[str, ...] | None
    positions: tuple[int, ...] | str | None
    words: tuple[str, ...] | None
    reduce: str | None
    dtype: torch.dtype
    side: str = "predicting"

    @staticmethod
    def of(
        layers: Layers,
        sites: Sites,
        span: str | Sequence[str] | None,
        positions: Positions,
        words: str | Sequence[str] | None,
        reduce: str | None,
        dtype: torch.dtype,
        side: str = "predicting",
    ) -> "Selection":
        """Check the arguments of a capture and bring them to one form.

        The parameters are those of ``capture``: ``layers``, ``sites``, exactly one of ``span``,
        ``positions`` and ``words``, then ``reduce``, ``dtype`` and ``side``.

        Raises
        ------
        InputError
            If not exactly one of span, positions and words is given, or it is empty, or reduction,
            dtype or ``side`` is unknown.
        """
        arguments = {"span": span, "positions": positions, "words": words}
        named = [name for name, value in arguments.items() if value is not None]
        if len(named) != 1:
            listed = " and ".join(named) or "no positions"
            raise InputError(f"{listed} given", f"give exactly one of {', '.join(arguments)}")
        require_one_of(reduce, REDUCTIONS, "reduction")
        require_format(dtype)
        if isinstance(positions, str) and positions != "all":
            raise InputError(
                f"unknown positions {positions!r}",
                'give numbers, or "all"; kinds of positions go into span',
            )
        if side not in SIDES or (side != SIDES[0] and words is None):
            suffix = " without words" if side in SIDES else ""
            sides = ", ".join(map(repr, SIDES))
            raise InputError(f"side={side!r}{suffix}", f"allowed: {sides}, with words")
        numbers = positions if isinstance(positions, str) else _tuple(positions)
        if numbers is not None and not isinstance(numbers, str):
            if not all(isinstance(number, Integral) for number in numbers):
                raise InputError(f"positions {positions!r}", 'give whole numbers, or "all"')
            numbers = tuple(map(int, numbers))  # JSON has no form for integers of numpy
        if not isinstance(layers, str):
            layers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
        if words is not None:
            reduce = None
        spans = _tuple(span)
        phrases = _tuple(words)
        for value in (spans, numbers, phrases):
            if value is not None and not len(value):
                raise InputError(f"{named[0]} is empty", "name at least one")
        for word in phrases or ():
            if not isinstance(word, str) or not word.strip():
                raise InputError(f"words {words!r}", "give words or phrases, none of them empty")
        return Selection(layers, _tuple(sites), spans, numbers, phrases, reduce, dtype, side)

    @property
    def described(self) -> dict[str, object]:
        """What was selected, as it goes into the provenance."""
        fields = {"span": self.spans, "positions": self.positions, "words": self.words}
        fields["side"] = None if self.side == SIDES[0] else self.side
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def at_end(self) -> bool:
        """Whether each sample gives one row, the state at its last position."""
        return self.positions == (-1,) and self.reduce is not None

    def mask(self, vlm: VLM, batch: Batch) -> Bool[Tensor, "b t"]:
        """Mark where a batch has the positions of a span, or positions of these numbers.

        Numbers count from each sample's own first or last position.

        Raises
        ------
        SpanError
            If this model, or some sample, has no position of the span.
        InputError
            If a sample is shorter than a number requires.
        """
        if self.spans is not None:
            return span_mask(vlm, batch, self.spans)
        tokens = batch.spans != PADDING
        if isinstance(self.positions, str):
            return tokens
        length = tokens.shape[1]
        first = tokens.int().argmax(dim=1, keepdim=True)  # left padding goes before it
        mask = torch.zeros_like(tokens)
        for number in self.positions:
            origin = first if number >= 0 else torch.full_like(first, length)
            columns = origin + number
            if (columns < first).any() or (columns >= length).any():
                shortest = length - int(first.max())
                raise InputError(
                    f"position {number} in a sample of {shortest}",
                    f"give {-shortest} to {shortest - 1}",
                )
            mask.scatter_(1, columns, True)
        return mask


def of_forward(vlm: VLM, batch: Batch, answers: list[str] | None, selection: Selection) -> Rows:
    """Collect the rows of one forward of ``vlm`` over a batch of prompts.

    ``batch`` holds the prompts and ``answers`` the texts that follow them, if there are any;
    ``selection`` says what is read.

    Raises
    ------
    SpanError, InputError
        If the positions are absent, or an answer is not found in its prompt.
    """
    layers, sites, dtype = selection.layers, selection.sites, selection.dtype
    if selection.at_end and not answers:
        tensors = _after_pictures(vlm, batch, selection)
        if tensors is not None:
            return Rows({"row": list(range(len(batch.spans)))}, tensors, [])
    if selection.words is None:
        mask = selection.mask(vlm, batch)
        tensors = read(vlm, batch, layers, sites, mask, selection.reduce, dtype)
        columns = _prompt_columns(vlm, batch, mask, selection.reduce)
        return Rows(columns, tensors, answers or [])
    answer_positions = []
    ids = []
    for row, in_answer in zip(batch["input_ids"], batch.mask("answer"), strict=True):
        answer_positions.append(in_answer.nonzero().flatten())
        ids.append(row[in_answer].tolist())
    columns = _word_positions(vlm.tokenizer, ids, selection, batch.spans.shape[1])
    mask = torch.zeros_like(batch.spans, dtype=torch.bool)
    offset = int(selection.side == SIDES[0])  # the position before a token predicts it
    for row, token in zip(columns["row"], columns["token_index"], strict=True):
        position = answer_positions[row][token]
        mask[row, position - offset] = True
    tensors = read(vlm, batch, layers, sites, mask, dtype=dtype)
    return Rows(columns, tensors, answers)


@torch.no_grad()
def _after_pictures(vlm: VLM, batch: Batch, selection: Selection) -> dict[Key, Tensor] | None:
    """The states at the last positions, where several prompts are about one picture.

    The prompts of a LLaVA begin alike up to the end of the picture: this beginning runs once a
    picture. It gives None where that cannot be.
    """
    if not batch.single or not shareable(vlm.model, vlm.active) or "pixel_values" not in batch:
        return None
    first_of: dict[bytes, int] = {}
    numbers = []
    for row, picture in enumerate(batch["pixel_values"]):
        key = fingerprint(picture)
        first_of.setdefault(key, row)
        numbers.append(list(first_of).index(key))
    start = common_beginning(batch)
    n = len(start)
    if len(first_of) == len(numbers) or not n:
        return None
    first = vlm.prepare(beginnings(batch, start, list(first_of.values())))
    cache = vlm.forward(first, logits=False, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor(numbers, device=vlm.device))
    rest = continued(batch, start)
    ids, mask = rest["input_ids"], rest["attention_mask"]
    tail = vlm.prepare({"input_ids": ids[:, n:], "attention_mask": mask[:, n:]})
    places = (mask.cumsum(dim=1) - 1)[:, n:]
    inputs = {
        "input_ids": tail["input_ids"],
        "attention_mask": mask.to(vlm.device),
        "position_ids": places.to(vlm.device),
        "past_key_values": cache,
    }
    with (
        reading(vlm, selection.layers, selection.sites, "last", dtype=selection.dtype) as collected,
        vlm.run(tail),
    ):
        anatomy.decoder(vlm.model)(**inputs, use_cache=True)
    return {key: states[:, 0] for key, states in first_of_each(collected).items()}


def of_generation(vlm: VLM, batch: Batch, max_new_tokens: int, selection: Selection) -> Rows:
    """Collect the rows of greedy answers of ``vlm`` to a batch of prompts.

    ``batch`` holds the prompts, ``max_new_tokens`` is the largest number of tokens to generate, and
    ``selection`` says what is read.

    Raises
    ------
    SpanError, InputError
        If the positions are absent.
    """
    if selection.words is not None:
        return _word_rows(vlm, batch, max_new_tokens, selection)
    if selection.spans is not None and "answer" in selection.spans:
        return _answer_rows(vlm, batch, max_new_tokens, selection)
    mask = selection.mask(vlm, batch)
    with reading(
        vlm,
        selection.layers,
        selection.sites,
        mask,
        selection.reduce,
        selection.dtype,
        steps=False,
    ) as collected:
        ids, _ = _generate(vlm, batch, max_new_tokens)
    columns = _prompt_columns(vlm, batch, mask, selection.reduce)
    return Rows(columns, first_of_each(collected), _texts(vlm, ids))


def _word_rows(vlm: VLM, batch: Batch, max_new_tokens: int, selection: Selection) -> Rows:
    """Collect the rows at words of interest of generated answers."""
    with reading(
        vlm, selection.layers, selection.sites, "last", dtype=selection.dtype
    ) as collected:
        ids, longest = _generate(vlm, batch, max_new_tokens)
    offset = int(selection.side == SIDES[1])
    # the prompt's last position predicts token 0, the step that is fed token k - 1 predicts token
    # k, and the last one is never fed
    columns = _word_positions(vlm.tokenizer, ids, selection, longest - offset)
    tensors = {}
    for key, steps in computed(collected).items():
        states = [steps[0][:0, 0]]  # so that width and dtype are right without any hit
        for row, token in zip(columns["row"], columns["token_index"], strict=True):
            states.append(steps[token + offset][row])
        tensors[key] = torch.cat(states)
    return Rows(columns, tensors, _texts(vlm, ids))


def _answer_rows(vlm: VLM, batch: Batch, max_new_tokens: int, selection: Selection) -> Rows:
    """Rows at generated tokens, and at the prompt's positions if other spans are selected too."""
    prompt_spans = tuple(name for name in selection.spans if name != "answer")
    mask = torch.zeros_like(batch.spans, dtype=torch.bool)
    if prompt_spans:
        mask = span_mask(vlm, batch, prompt_spans)
    with reading(vlm, selection.layers, selection.sites, mask) as collected:
        ids, longest = _generate(vlm, batch, max_new_tokens)
    lengths = (batch.spans != PADDING).sum(dim=1).tolist()
    columns = _position_columns(vlm, batch, mask)
    fed_rows: list[int] = []
    fed_steps: list[int] = []
    fed_ids: list[int] = []
    for row, length in enumerate(lengths):
        fed = ids[row][: longest - 1]  # the last token of the longest answer is never fed
        n_fed = len(fed)
        fed_rows += [row] * n_fed
        fed_steps += range(n_fed)
        columns["position"] += range(length, length + n_fed)
        fed_ids += fed
    columns["row"] += fed_rows
    columns["token"] += _token_texts(vlm.tokenizer, fed_ids)
    columns["span"] += ["answer"] * len(fed_rows)
    # stable: by sample, then by position
    order = sorted(range(len(columns["row"])), key=columns["row"].__getitem__)
    for name, values in columns.items():
        columns[name] = [values[k] for k in order]
    rows = torch.tensor(fed_rows, dtype=torch.long)
    tokens = torch.tensor(fed_steps, dtype=torch.long)
    tensors = {}
    for key, (prompt, *steps) in computed(collected).items():
        answer = torch.cat(steps, dim=1)[rows, tokens] if fed_rows else prompt[:0]
        states = torch.cat([prompt, answer])[order]
        reduced = _reduced(states, columns["row"], selection.reduce)
        tensors[key] = reduced.to(selection.dtype)
    if selection.reduce:
        columns = {"row": list(dict.fromkeys(columns["row"]))}
    return Rows(columns, tensors, _texts(vlm, ids))


def _reduced(states: Tensor, rows: list[int], reduce: str | None) -> Tensor:
    if reduce is None or not rows:
        return states
    counts = torch.tensor(rows).unique_consecutive(return_counts=True)[1].tolist()
    wide = torch.promote_types(states.dtype, torch.float32)
    parts = states.split(counts)
    if reduce == "last":
        return torch.stack([part[-1] for part in parts])
    return torch.stack([part.mean(0, dtype=wide) for part in parts])


def _generate(vlm: VLM, batch: Batch, max_new_tokens: int) -> tuple[list[list[int]], int]:
    """Generate greedy answers.

    It returns the ids of each answer, without the end-of-sequence token and what follows it, and
    the number of tokens of the longest answer.
    """
    ids = vlm.generate_ids(batch, max_new_tokens)
    ends = vlm.model.generation_config.eos_token_id
    if ends is None:
        ends = getattr(vlm.tokenizer, "eos_token_id", None)
    if not isinstance(ends, list):
        ends = [] if ends is None else [ends]
    # a row that has ended continues with padding
    is_end = torch.isin(ids, torch.tensor(ends, device=ids.device))
    ended = is_end.cumsum(dim=1) > 0
    lengths = (~ended).sum(dim=1).tolist()
    answers = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    return answers, ids.shape[1]


def _texts(vlm: VLM, ids: list[list[int]]) -> list[str]:
    decoded = vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in decoded]


def _word_positions(
    tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], selection: Selection, end: int
) -> dict[str, list]:
    """Find the words in the answers, before token ``end``.

    It returns the columns row, word, token_index (of the word's first piece, or of its last).
    """
    columns: dict[str, list] = {"row": [], "word": [], "token_index": []}
    for row, tokens in enumerate(ids):
        hit = find_words(tokenizer, tokens, selection.words)
        if hit is None:
            continue
        pieces, word = hit
        token = pieces.start if selection.side == SIDES[0] else pieces.stop - 1
        if token >= end:
            continue  # its state was never computed
        columns["row"].append(row)
        columns["word"].append(word)
        columns["token_index"].append(token)
    return columns


def _prompt_columns(
    vlm: VLM, batch: Batch, mask: Bool[Tensor, "b t"], reduce: str | None
) -> dict[str, list]:
    """Describe each row of a batch, or each position of the mask where nothing is reduced."""
    if reduce:
        return {"row": list(range(len(mask)))}
    return _position_columns(vlm, batch, mask)


def _position_columns(vlm: VLM, batch: Batch, mask: Bool[Tensor, "b t"]) -> dict[str, list]:
    """Describe each position of a mask.

    It returns the columns row, position (0 is the sample's first token), token, span.
    """
    rows, positions = mask.nonzero(as_tuple=True)
    first: Int[Tensor, "b"] = (batch.spans != PADDING).int().argmax(dim=1)
    columns = {"row": rows.tolist()}
    columns["position"] = (positions - first[rows]).tolist()
    columns["token"] = _token_texts(vlm.tokenizer, batch["input_ids"][mask].tolist())
    columns["span"] = [SPANS[k] for k in batch.spans[mask].tolist()]
    return columns


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    decoded = {token: decode(tokenizer, [token]) for token in dict.fromkeys(ids)}
    return [decoded[token] for token in ids]


def _tuple(values: object) -> tuple | None:
    if values is None:
        return None
    return (values,) if isinstance(values, (str, Integral)) else tuple(values)
