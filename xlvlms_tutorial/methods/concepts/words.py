r"""What a concept is: its words, and where in a picture it comes from.

The words are those that its direction says through the unembedding. The words of a direction
:math:`u_k` are those with the largest logits :math:`W_U \, \mathrm{norm}(u_k)`, as in "A
Concept-Based Explainability Framework for Large Multimodal Models" (arXiv 2406.08074), which leaves
the norm out. Only :math:`+u_k` is read: of a signed concept, as those of a PCA, give the negated
direction too if its other side matters.
"""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlvlms_tutorial.errors import ActivationsError, ComparisonError, SelectionError
from xlvlms_tutorial.methods.concepts.base import whole
from xlvlms_tutorial.methods.logit_lens import distributions
from xlvlms_tutorial.methods.logit_lens.wordlists import ENGLISH, Admissible, WordFilter, admissible
from xlvlms_tutorial.metrics.answers import with_columns
from xlvlms_tutorial.models.vlm import VLM

REFERENCES = ("directions", "vocabulary")

Directions = Float[Tensor, "k d"] | Float[np.ndarray, "k d"]
Vector = Float[Tensor, "_"] | Float[np.ndarray, "_"]


def words(
    vlm: VLM,
    directions: Directions,
    n: int = 10,
    norm: bool = True,
    mean: Vector | None = None,
    words: WordFilter = ENGLISH,
) -> pd.DataFrame:
    r"""The n words that each direction (k, d) says most.

    Columns concept, rank (from 1), word, token_id, score (the logit), best first. Only words that
    pass the filter ``words`` compete, so a concept has fewer than n only if fewer pass. Tokens of
    one word (" dog", " Dog") are one, with the best of their logits. ``mean`` (d,) is taken off the
    directions first. With ``norm`` the direction goes through the model's final norm, after it is
    given the length :math:`\sqrt d`, so that no epsilon matters; without, the logits are
    :math:`W_U u_k`, as published.

    Raises
    ------
    ComparisonError
        If directions or mean are not as wide as the model.
    ActivationsError
        If there are no directions, or one is NaN, infinite or zero (a concept
        that is never used: leave it out).
    SelectionError
        If n is below 1, or the model came without a tokenizer.
    WordListError
        If no word of the vocabulary passes the filter.
    """
    return _said(vlm, _directions(vlm, directions, mean, norm), n, norm, words)


def random_words(
    vlm: VLM,
    k: int,
    n: int = 10,
    seed: int = 0,
    norm: bool = True,
    words: WordFilter = ENGLISH,
    how: str = "directions",
) -> pd.DataFrame:
    r"""Words of k concepts that mean nothing, to compare with: columns as those of :func:`words`.

    ``how`` "directions" (Rnd-Words of arXiv 2406.08074) takes the words of directions from
    :math:`U[0, 1)^d`, which share a mean, so many words recur. "vocabulary" draws n different words
    of those that pass the filter, all as likely; their score is missing (NaN).

    Raises
    ------
    SelectionError
        If k or n is below 1, ``how`` is unknown, or the model came without a tokenizer.
    WordListError
        If no word of the vocabulary passes the filter.
    """
    if how not in REFERENCES:
        raise SelectionError(
            f"unknown reference {how!r}", f"allowed: {', '.join(map(repr, REFERENCES))}"
        )
    whole("k", k)
    drawn = torch.Generator().manual_seed(seed)
    if how == "directions":
        return _said(
            vlm,
            _directions(vlm, torch.rand(k, vlm.width, generator=drawn), None, norm),
            n,
            norm,
            words,
        )
    known = _admissible(vlm, n, words)
    chosen = torch.rand(k, len(known.words), generator=drawn).topk(min(n, len(known.words))).indices
    return _table(known, chosen, known.forms[chosen, 0], torch.full(chosen.shape, torch.nan))


def as_lists(table: pd.DataFrame) -> dict[int, list[str]]:
    """The words of each concept in order of rank, from a table of :func:`words`.

    Concepts in their order.

    Raises
    ------
    EstimateError
        If it is no such table.
    """
    ordered = with_columns(table, ("concept", "rank", "word"), "a table of words").sort_values(
        ["concept", "rank"]
    )
    return {int(concept): part.tolist() for concept, part in ordered.groupby("concept")["word"]}


def _said(
    vlm: VLM, directions: Float[Tensor, "k d"], n: int, norm: bool, words: WordFilter
) -> pd.DataFrame:
    known = _admissible(vlm, n, words)
    best, chosen, token = zip(
        *(_best(logits, known, n) for logits in distributions.chunks(vlm, directions, norm)),
        strict=True,
    )
    score = torch.cat(best)
    if not torch.isfinite(score).all():
        raise ActivationsError(
            "the logits hold NaN or infinite values", "load the model in float32 or bfloat16"
        )
    return _table(known, torch.cat(chosen), torch.cat(token), score)


def _best(logits: Float[Tensor, "c v"], known: Admissible, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, words and tokens (c, n) of the best words of each row.

    Of each word its best token, and of those the largest.
    """
    forms = known.forms.to(logits.device)
    score, form = logits[:, forms[:, 0]], torch.zeros_like(forms[:, 0]).expand(len(logits), -1)
    for column in range(1, forms.shape[1]):  # a word has a handful of forms
        other = logits[:, forms[:, column]]
        form = torch.where(other > score, column, form)
        score = torch.maximum(score, other)
    top = score.topk(min(n, len(forms)))
    token = forms[top.indices, form.gather(1, top.indices)]
    return top.values.cpu(), top.indices.cpu(), token.cpu()


def _table(
    known: Admissible,
    chosen: Int[Tensor, "k n"],
    token: Int[Tensor, "k n"],
    score: Float[Tensor, "k n"],
) -> pd.DataFrame:
    concept, rank = np.divmod(np.arange(chosen.numel()), chosen.shape[1])
    found = {
        "concept": concept,
        "rank": rank + 1,
        "word": known.words[chosen.flatten().numpy()].astype(object),
    }
    return pd.DataFrame(
        found | {"token_id": token.flatten().numpy(), "score": score.flatten().numpy()}
    )


def _admissible(vlm: VLM, n: int, words: WordFilter) -> Admissible:
    whole("n", n)
    if vlm.tokenizer is None:
        raise SelectionError(
            "this model came without a tokenizer, so its words have no names",
            "load it with its processor",
        )
    return admissible(vlm.tokenizer, distributions.size(vlm), words)


def _directions(
    vlm: VLM, given: Directions, mean: Vector | None, norm: bool
) -> Float[Tensor, "k d"]:
    """The directions as they go to the final norm, or (``norm`` False) to the unembedding."""
    # the square of a length must not overflow
    directions = torch.as_tensor(given).detach().double()
    distributions.check(vlm, directions)
    if mean is not None:
        away = torch.as_tensor(mean).detach().to(directions)
        if away.shape != directions.shape[1:]:
            raise ComparisonError(
                "widths",
                f"a mean of {tuple(away.shape)}",
                f"directions of {directions.shape[1]}",
                "give their own mean",
            )
        if not torch.isfinite(away).all():
            raise ActivationsError(
                "the mean holds NaN or infinite values", "check the states that it is taken of"
            )
        directions = directions - away
    length = directions.norm(dim=1, keepdim=True)
    if (length == 0).any():
        zero = (length == 0).flatten().nonzero().flatten().tolist()
        raise ActivationsError(
            f"directions {', '.join(map(str, zero))} are zero and say nothing",
            "leave out concepts that are never used",
        )
    return (directions * (vlm.width**0.5 / length) if norm else directions).float()
