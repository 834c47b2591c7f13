"""States of words in sentences: what read-outs of other states are fitted on, and compared with."""

import hashlib
import re
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xlvlms_tutorial.activations.hooks import Layers, read, wanted
from xlvlms_tutorial.methods.logit_lens.distributions import require_tokenizer
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require, require_counts

# bits of a weight are summed as integers of its size, which is exact on every device
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TextStates:
    """Hold states of words in context, at several layers; :func:`text_states` makes them.

    Parameters
    ----------
    states : dict of int to tensor (n, d)
        Rows of the residual stream by layer: the state at the last piece of each word.
    words : tuple of str
        The word of each row, in lower case.
    places : array of int (n,)
        The number of the sentence that each word stands in.
    sentences : tuple of str
        The sentences.
    model : str
        The name of the model.
    fingerprint : str
        What tells its weights from any others, by :func:`decoder_fingerprint`.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.logit_lens import text_states
    >>> text = text_states(vlm, ["A red key."], [0])
    >>> text.words, text.places.tolist(), text.layers
    (('red', 'key'), [0, 0], [0])
    """

    states: dict[int, Float[Tensor, "n d"]]
    words: tuple[str, ...]
    places: Int[np.ndarray, "n"]
    sentences: tuple[str, ...]
    model: str
    fingerprint: str

    @property
    def layers(self) -> list[int]:
        """The layers that were read."""
        return list(self.states)


def text_states(
    vlm: VLM, sentences: Iterable[str], layers: Layers, batch_size: int = 32
) -> TextStates:
    """Run a model on sentences, without any picture, and keep the state of each word.

    Use it before :class:`TunedLens` and :class:`ContextualNeighbours`. Sentences are read as they
    are, outside the chat format. The state of a word is that at its last piece, which has read the
    whole word. Marks are left out, and so is what stands at the very first position: many models
    use it as a sink of attention, and its state says nothing of the word.

    Parameters
    ----------
    vlm : VLM
        The model, with a fast tokenizer.
    sentences : iterable of str
        Sentences of two words or more.
    layers : int, iterable of int, or "all"
        The layers to read, 0 to L.
    batch_size : int, default 32
        How many sentences go through the model at once; short ones with short ones.

    Returns
    -------
    TextStates
        The states, one row a word, by sentence.

    Raises
    ------
    InputError
        If there are no sentences, one is blank, or none has a second word. If the model has no
        tokenizer, or none that knows where words end.
    LayerError
        If the model has no such layer.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.logit_lens import text_states
    >>> text = text_states(vlm, ["A frog sits on the sand."], [0, 16])
    >>> text.words, text.states[16].shape
    (('frog', 'sits', 'on', 'the', 'sand'), torch.Size([5, 576]))
    """
    require_tokenizer(vlm)
    require(
        vlm.tokenizer.is_fast, "the tokenizer does not say where words end", "load a fast tokenizer"
    )
    require(not isinstance(sentences, str), "one text", "give a list of sentences")
    sentences = tuple(sentences)
    written = all(isinstance(sentence, str) and sentence.strip() for sentence in sentences)
    require(
        sentences and written, "no sentences, or a blank one", "give sentences of several words"
    )
    require_counts(batch_size=batch_size)
    keys = wanted(vlm, layers)
    order = np.argsort([len(sentence) for sentence in sentences], kind="stable")
    words: list[str] = []
    places: list[int] = []
    parts: dict[int, list[Tensor]] = {layer: [] for layer, _ in keys}
    for numbers in np.split(order, range(batch_size, len(order), batch_size)):
        inputs, ends, texts = _word_ends(vlm.tokenizer, [sentences[number] for number in numbers])
        if not ends.any():
            continue
        for number, words_of_row in zip(numbers, texts, strict=True):
            words += words_of_row
            places += [int(number)] * len(words_of_row)
        states = read(vlm, vlm.prepare(inputs), list(parts), positions=ends, dtype=torch.float32)
        for (layer, _), rows in states.items():
            parts[layer].append(rows)
    require(words, "no sentence has a word behind its first", "give sentences of several words")
    by_sentence = np.argsort(places, kind="stable")
    result = {layer: torch.cat(rows)[by_sentence] for layer, rows in parts.items()}
    return TextStates(
        result,
        tuple(words[row] for row in by_sentence),
        np.asarray(places)[by_sentence],
        sentences,
        vlm.name,
        decoder_fingerprint(vlm),
    )


def _word_ends(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]
) -> tuple[dict[str, Tensor], Bool[Tensor, "b t"], list[list[str]]]:
    """The inputs of sentences, where their words end, and the words in this order."""
    encoded = tokenizer(
        list(sentences), padding=True, return_tensors="pt", return_offsets_mapping=True
    )
    offsets = encoded.pop("offset_mapping").tolist()
    ends = torch.zeros(encoded["input_ids"].shape, dtype=torch.bool)
    texts = []
    for row, sentence in enumerate(sentences):
        first = int(encoded["attention_mask"][row].argmax())
        starts = [run.start() for run in re.finditer(r"\w+", sentence)]
        spans: dict[tuple[int, int], tuple[int, int]] = {}
        for position, number in enumerate(encoded.word_ids(row)):
            start, end = offsets[row][position]
            # some tokenizers count marks as pieces of the word before them, and some (Gemma's) the
            # whole sentence as one word: what the sentence itself separates is two words
            letter = re.search(r"[^\W_]", sentence[start:end])
            if number is not None and letter:
                word = number, bisect(starts, start + letter.start())
                spans[word] = spans.get(word, (position,))[0], position
        words = []
        for begin, position in spans.values():
            if begin != first:
                ends[row, position] = True
                word = sentence[offsets[row][begin][0] : offsets[row][position][1]]
                words.append(word.strip().lower())
        texts.append(words)
    return dict(encoded), ends, texts


def decoder_fingerprint(vlm: VLM) -> str:
    """Compute a fingerprint that tells the weights of a language model from any others.

    Use it to check that states of text belong to a model, whatever the model is called. The tower
    and the connector do not count: text does not go through them.

    Parameters
    ----------
    vlm : VLM
        The model.

    Returns
    -------
    str
        32 hexadecimal digits: SHA-256 over the name, dtype and shape of each parameter of the
        decoder, and over sums of its bits taken as integers.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.logit_lens import decoder_fingerprint
    >>> len(decoder_fingerprint(vlm)), decoder_fingerprint(vlm) == decoder_fingerprint(vlm)
    (32, True)
    """
    digest = hashlib.sha256()
    for name, parameter in anatomy.decoder(vlm.model).named_parameters():
        weight = parameter.detach()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if not weight.is_meta:  # offloaded weights are nowhere to be summed
            bits = weight.contiguous().view(_INTEGERS[weight.element_size()])
            digest.update(bits.sum(dim=0).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
