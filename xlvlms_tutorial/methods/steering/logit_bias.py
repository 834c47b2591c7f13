"""The baseline of steering at the last layer: a constant added to the logits of every step."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from math import isfinite

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Activations
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.methods.steering.vectors import require_like
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import decode
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require, require_equal, require_same_length

_ROWS = 64  # activations whose logits exist at a time, to bound memory


@recorded
@contextmanager
def logit_bias(vlm: VLM, bias: Mapping[str, float] | Float[Tensor, "v"]) -> Iterator[None]:
    r"""Add a constant to the logits at every step inside a ``with`` block.

    Use it as the baseline of steering at the last layer: a vector there does little more than
    :math:`z \leftarrow z + b` (arXiv 2501.03012). The constant is added to what the unembedding
    gives, before a model that rescales or caps its logits does so.

    Parameters
    ----------
    vlm : VLM
        The model whose answers are changed.
    bias : mapping of str to float, or tensor (V,)
        What is added: a number for each word, or for each token of the vocabulary. A word stands
        for the first pieces of all its forms (:func:`first_pieces`), so all words that begin with
        such a piece are raised too.

    Raises
    ------
    InputError
        If there are no words, a word gives no token, a bias is not finite, or two words are the
        same or begin with the same piece. If a vector has not one number for each logit. If it
        holds NaN or infinite numbers.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.steering import first_pieces, logit_bias
    >>> with logit_bias(vlm, {"red": 1000.0}):
    ...     tokens = vlm.forward(batch).logits[:, -1].argmax(dim=-1).tolist()
    >>> set(tokens) <= set(first_pieces(vlm, "red"))
    True
    """
    head = anatomy.unembedding(vlm.model)
    added = _bias_of_tokens(vlm, bias, anatomy.vocabulary_size(vlm.model)).to(vlm.device)

    def _add_bias(module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        return logits + added.to(logits.device, logits.dtype)

    handle = head.register_forward_hook(_add_bias)
    try:
        yield
    finally:
        handle.remove()


def first_pieces(vlm: VLM, word: str) -> list[int]:
    """Find the token ids with which a word can begin.

    Use it to read the logit of a word, or to see whether two words begin alike. The word is tried
    with and without a leading space, as given and capitalised. A piece that is only a space is
    passed over: in SentencePiece vocabularies it stands before every word.

    Parameters
    ----------
    vlm : VLM
        The model whose tokenizer is used.
    word : str
        A word or phrase; spaces around it do not count.

    Returns
    -------
    list of int
        The ids, each once, in the order of these forms.

    Raises
    ------
    InputError
        If the model has no tokenizer, or the word gives no token that is known.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.steering import first_pieces
    >>> pieces = first_pieces(vlm, "red")
    >>> vlm.tokenizer("red", add_special_tokens=False).input_ids[0] in pieces
    True
    >>> first_pieces(vlm, " red ") == pieces
    True
    """
    if vlm.tokenizer is None or not isinstance(word, str):
        preposition = "without" if vlm.tokenizer is None else "with"
        raise InputError(f"the word {word!r} for a model {preposition} a tokenizer", "give text")
    pieces = {}  # in order, each once
    forms = _forms(word.strip())
    if forms:
        for ids in vlm.tokenizer(forms, add_special_tokens=False).input_ids:
            piece = _first_visible(vlm, ids)
            if piece is not None and piece not in vlm.tokenizer.all_special_ids:
                pieces[piece] = None
    require(
        pieces,
        f"the word {word!r} gives no token of this model",
        "give a word that its vocabulary can spell",
    )
    return list(pieces)


def mean_logits_bias(vlm: VLM, source: Activations, target: Activations) -> Float[Tensor, "v"]:
    r"""Compute the logit bias that corresponds to a mean-difference vector.

    Use it with :func:`logit_bias`, to see whether steering at the last layer by
    :func:`mean_difference` does more than this. It is :math:`\bar z_{target} - \bar z_{source}`,
    the difference of the mean logits, from activations of the last layer.

    Parameters
    ----------
    vlm : VLM
        The model that the activations are of; its unembedding gives the logits.
    source : Activations
        Activations (n, d) that hold the last layer, of samples that show what to steer away from.
    target : Activations
        Activations (m, d) of samples that show what to steer to, captured in the same way.

    Returns
    -------
    tensor (V,)
        A number for each token of the vocabulary, in float32 on the CPU.

    Raises
    ------
    LayerError
        If the last layer was not captured.
    InputError
        If the last layer was not captured. If the two sets were not captured alike, or are of
        another model. If a set is empty, not finite or not (n, d).

    Examples
    --------
    >>> from xlvlms_tutorial import capture
    >>> from xlvlms_tutorial.methods.steering import mean_logits_bias
    >>> prompt = "What colour is the sky?"
    >>> states = capture(vlm, samples, vlm.n_layers, positions=-1, prompt=prompt)
    >>> first = states.table["sample"] < 2
    >>> bias = mean_logits_bias(vlm, states.select(first), states.select(~first))
    >>> len(bias) == vlm.unembed(states[vlm.n_layers]).shape[-1]
    True
    """
    require_like(source, target)
    model = source.provenance.get("model")
    require_equal("models of states and unembedding", model, vlm.name, "give states of this model")
    source_logits = _mean_logits(vlm, source[vlm.n_layers, WHOLE_BLOCK])
    target_logits = _mean_logits(vlm, target[vlm.n_layers, WHOLE_BLOCK])
    return (target_logits - source_logits).float()


def balanced_threshold(gaps: Float[Tensor, "n"], labels: Sequence[bool]) -> float:
    """Choose the threshold of a yes/no logit gap that gives the most right answers.

    Use it as the cheapest rival of steering yes/no answers: it moves the read-out alone. Say yes
    where the gap of the logits, yes minus no, is above it.

    Parameters
    ----------
    gaps : tensor (n,)
        The logit of yes minus that of no.
    labels : sequence of bool
        Whether yes is right.

    Returns
    -------
    float
        The threshold; in the middle between two gaps, the first of equals.

    Raises
    ------
    InputError
        If lengths differ, there are none, or a gap is NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import balanced_threshold
    >>> balanced_threshold(torch.tensor([1.0, 2.0, 4.0, 5.0]), [False, False, True, True])
    3.0
    """
    require_same_length(gaps=gaps, labels=labels)
    values = np.asarray(gaps, dtype=float)
    require(
        len(values) and np.isfinite(values).all(),
        f"{len(values)} gaps, or one that is not finite",
        "give finite numbers",
    )
    ordered = np.unique(values)
    middles = (ordered[1:] + ordered[:-1]) / 2
    tried = np.concatenate([[ordered[0] - 1], middles, [ordered[-1] + 1]])
    correct = (values[:, None] > tried) == np.asarray(labels, dtype=bool)[:, None]
    return float(tried[correct.mean(axis=0).argmax()])


def _forms(word: str) -> list[str]:
    """A word as it is and capitalised, each with and without a leading space."""
    if not word:
        return []
    forms = []
    for form in dict.fromkeys((word, word[:1].upper() + word[1:])):
        forms += [form, " " + form]
    return forms


def _first_visible(vlm: VLM, ids: Sequence[int]) -> int | None:
    """The first of some token ids that is not only a space."""
    for token in ids:
        if decode(vlm.tokenizer, [token]).strip():
            return token
    return None


def _mean_logits(vlm: VLM, rows: Float[Tensor, "n d"]) -> Float[Tensor, "v"]:
    total = 0
    for part in rows.split(_ROWS):
        total += vlm.unembed(part).sum(dim=0, dtype=torch.float64)
    return total.cpu() / len(rows)


def _bias_of_tokens(vlm: VLM, bias: Mapping[str, float] | Tensor, size: int) -> Float[Tensor, "v"]:
    """The number added to each logit."""
    if isinstance(bias, Tensor):
        require_equal(
            "sizes of bias and vocabulary",
            tuple(bias.shape),
            (size,),
            "give one number for each logit",
        )
        require(
            torch.isfinite(bias).all(),
            "the bias holds NaN or infinite numbers",
            "give finite numbers",
        )
        return bias.detach().float()
    require(
        bias and all(map(isfinite, bias.values())),
        f"the bias {dict(bias)}",
        "give one word or more, each with a finite number",
    )
    pieces = {word: first_pieces(vlm, word) for word in bias}
    for word, second_word in combinations(pieces, 2):
        shared = set(pieces[word]) & set(pieces[second_word])
        if shared:
            piece = decode(vlm.tokenizer, [min(shared)])
            raise InputError(
                f"the words {word!r} and {second_word!r} begin with the same piece {piece!r}",
                "give words that begin differently",
            )
    added = torch.zeros(size)
    for word, value in bias.items():
        added[pieces[word]] = float(value)
    return added
