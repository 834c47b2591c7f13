"""The baseline of steering at the last layer: a constant added to the logits of every step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, States
from xlvlms_tutorial.errors import ActivationsError, ComparisonError, SelectionError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.methods.steering.vectors import require_like
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import decode
from xlvlms_tutorial.models.vlm import VLM

_ROWS = 64  # states whose logits exist at a time


@recorded
@contextmanager
def logit_bias(vlm: VLM, bias: Mapping[str, float] | Float[Tensor, "v"]) -> Iterator[None]:
    r"""Add a constant to the logits at every step.

    :math:`z \leftarrow z + b`, for words, or for the whole vocabulary (V,). A word stands for
    the first pieces of all its forms: inside a sentence and at the start of an answer, as given
    and capitalised (so all words that begin with this piece are raised too). Steering by a
    vector at the last layer does little more than this (arXiv 2501.03012), which makes it the
    baseline there. The constant is added to what the unembedding gives, before a model that
    rescales or caps its logits does so.

    Raises
    ------
    SelectionError
        If there are no words, a word gives no token, a bias is not finite, or two words are the
        same or begin with the same piece.
    ComparisonError
        If a vector has not one number for each logit.
    ActivationsError
        If it holds NaN or infinite numbers.
    """
    head = anatomy.unembedding(vlm.model)
    added = _by_token(vlm, bias, anatomy.vocabulary_size(vlm.model)).to(vlm.device)

    def hook(module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        return logits + added.to(logits.device, logits.dtype)

    handle = head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def first_pieces(vlm: VLM, word: str) -> list[int]:
    """The ids with which a word can begin.

    With and without a leading space, as given and capitalised. A piece that is only a space is
    passed over: in SentencePiece vocabularies it stands before every word.

    Raises
    ------
    SelectionError
        If the model has no tokenizer, or the word gives no token that is known.
    """
    if vlm.tokenizer is None or not isinstance(word, str):
        raise SelectionError(
            (
                f"the word {word!r} for a model "
                f"{'without' if vlm.tokenizer is None else 'with'} a tokenizer"
            ),
            "give text",
        )
    told = word.strip()
    forms = (
        [
            space + form
            for form in dict.fromkeys((told, told[:1].upper() + told[1:]))
            for space in ("", " ")
        ]
        if told
        else []
    )
    found = {}
    for ids in vlm.tokenizer(forms, add_special_tokens=False).input_ids if forms else []:
        piece = next((token for token in ids if decode(vlm.tokenizer, [token]).strip()), None)
        if piece is not None and piece not in vlm.tokenizer.all_special_ids:
            found[piece] = None
    if not found:
        raise SelectionError(
            f"the word {word!r} gives no token of this model",
            "give a word that its vocabulary can spell",
        )
    return list(found)


def mean_logits_bias(vlm: VLM, source: States, target: States) -> Float[Tensor, "v"]:
    r"""The bias that answers to a mean-difference vector.

    :math:`\bar z_{target} - \bar z_{source}`, from states of the last layer.

    Raises
    ------
    LayerError, SelectionError
        If the last layer was not captured.
    ComparisonError, ActivationsError
        As :func:`coarse`.
    """
    require_like(source, target)
    if (model := source.provenance.get("model")) != vlm.name:
        raise ComparisonError(
            "models of states and unembedding", model, vlm.name, "give states of this model"
        )
    one, other = (
        _mean_logits(vlm, states[vlm.n_layers, WHOLE_BLOCK]) for states in (source, target)
    )
    return (other - one).float()


def _mean_logits(vlm: VLM, rows: Float[Tensor, "n d"]) -> Float[Tensor, "v"]:
    return sum(
        vlm.unembed(part).sum(dim=0, dtype=torch.float64) for part in rows.split(_ROWS)
    ).cpu() / len(rows)


def _by_token(vlm: VLM, bias: Mapping[str, float] | Tensor, size: int) -> Float[Tensor, "v"]:
    if isinstance(bias, Tensor):
        if bias.shape != (size,):
            raise ComparisonError(
                "sizes of bias and vocabulary",
                tuple(bias.shape),
                (size,),
                "give one number for each logit",
            )
        if not torch.isfinite(bias).all():
            raise ActivationsError("the bias holds NaN or infinite numbers", "give finite numbers")
        return bias.detach().float()
    if not bias or not all(isfinite(value) for value in bias.values()):
        raise SelectionError(
            f"the bias {dict(bias)}", "give one word or more, each with a finite number"
        )
    pieces = {word: first_pieces(vlm, word) for word in bias}
    for one, other in combinations(pieces, 2):
        if shared := set(pieces[one]) & set(pieces[other]):
            told = decode(vlm.tokenizer, [min(shared)])
            raise SelectionError(
                f"the words {one!r} and {other!r} begin with the same piece {told!r}",
                "give words that begin differently",
            )
    found = torch.zeros(size)
    for word, value in bias.items():
        found[pieces[word]] = float(value)
    return found
