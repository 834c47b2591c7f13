r"""The words of a concept, read off its direction through the unembedding.

The words of a direction :math:`u_k` are those with the largest logits
:math:`W_U \, \mathrm{norm}(u_k)`, as in "A Concept-Based Explainability Framework for Large
Multimodal Models" (Parekh et al., 2024, arXiv 2406.08074), which leaves the norm out. Only
:math:`+u_k` is read: of a signed concept, such as a component of a PCA, give the negated direction
too if its other side matters.
"""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlvlms_tutorial.errors import InputError, incomparable
from xlvlms_tutorial.methods.concepts.base import whole
from xlvlms_tutorial.methods.logit_lens import distributions
from xlvlms_tutorial.methods.logit_lens.wordlists import ENGLISH, Admissible, WordFilter, admissible
from xlvlms_tutorial.metrics.answers import with_columns
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require_one_of

RANDOM_WORD_METHODS = ("directions", "vocabulary")  # the argument ``method`` of random_words

Directions = Float[Tensor, "k d"] | Float[np.ndarray, "k d"]
Vector = Float[Tensor, "_"] | Float[np.ndarray, "_"]


def concept_words(
    vlm: VLM,
    directions: Directions,
    n: int = 10,
    norm: bool = True,
    mean: Vector | None = None,
    words: WordFilter = ENGLISH,
) -> pd.DataFrame:
    r"""Decode each direction into the n words with the largest logits.

    Use it to name concepts: directions are the rows of a dictionary's ``components_``, or any
    vectors of the residual stream. Tokens of one word (" dog", " Dog") count as one, with the
    largest of their logits. The method is that of CoX-LMM (Parekh et al., 2024, arXiv 2406.08074).

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the directions.
    directions : array or tensor (k, d)
        One direction a row, as wide as the model.
    n : int, default 10
        Number of words for each direction. There are fewer only if fewer words pass the filter.
    norm : bool, default True
        Whether the direction, scaled to the length :math:`\sqrt d` so that no epsilon matters, goes
        through the model's final norm. Without it the logits are :math:`W_U u_k`, as published.
    mean : array or tensor (d,), optional
        A vector that is subtracted from all directions first, such as the mean activation. None
        subtracts nothing.
    words : WordFilter
        The words that compete; by default common English words.

    Returns
    -------
    DataFrame
        One row for each direction and word, best first, with columns ``concept``, ``rank`` (from
        1), ``word``, ``token_id`` and ``score`` (the logit).

    Raises
    ------
    InputError
        If directions or mean are not as wide as the model. If there are no directions, or one is
        NaN, infinite or zero (a concept that is never used: leave it out). If n is below 1, or the
        model has no tokenizer. If no word of the vocabulary passes the filter.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.concepts import concept_words
    >>> table = concept_words(vlm, torch.eye(2, 576), n=3)
    >>> table.columns.tolist()
    ['concept', 'rank', 'word', 'token_id', 'score']
    >>> table["concept"].tolist(), table["rank"].tolist()
    ([0, 0, 0, 1, 1, 1], [1, 2, 3, 1, 2, 3])
    """
    return _decoded(vlm, _directions(vlm, directions, mean, norm), n, norm, words)


def random_words(
    vlm: VLM,
    k: int,
    n: int = 10,
    seed: int = 0,
    norm: bool = True,
    words: WordFilter = ENGLISH,
    method: str = "directions",
) -> pd.DataFrame:
    r"""Draw words for k concepts without meaning, as a baseline for the words of real concepts.

    Use it to see what a score of words would be by chance.

    Parameters
    ----------
    vlm : VLM
        The model whose vocabulary the words come from.
    k : int
        Number of concepts.
    n : int, default 10
        Number of words for each concept. There are fewer only if fewer words pass the filter.
    seed : int, default 0
        Seed of the random directions or words.
    norm : bool, default True
        Whether directions go through the model's final norm, as in :func:`concept_words`;
        "vocabulary" does not use it.
    words : WordFilter
        The words that compete; by default common English words.
    method : {"directions", "vocabulary"}, default "directions"
        "directions" decodes random directions from :math:`U[0, 1)^d`, which share a mean, so many
        words recur (Rnd-Words of Parekh et al., 2024, arXiv 2406.08074). "vocabulary" draws n
        different words of those that pass the filter, with equal probability.

    Returns
    -------
    DataFrame
        One row for each concept and word, with columns ``concept``, ``rank`` (from 1), ``word``,
        ``token_id`` and ``score`` (the logit, NaN for "vocabulary").

    Raises
    ------
    InputError
        If k or n is below 1, ``method`` is unknown, or the model has no tokenizer. If no word of
        the vocabulary passes the filter.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.concepts import random_words
    >>> table = random_words(vlm, k=2, n=3, method="vocabulary")
    >>> len(table), table["score"].isna().all().item()
    (6, True)
    >>> table.groupby("concept")["word"].nunique().tolist()
    [3, 3]
    """
    require_one_of(method, RANDOM_WORD_METHODS, "reference")
    whole("k", k)
    random = torch.Generator().manual_seed(seed)
    if method == "directions":
        directions = torch.rand(k, vlm.width, generator=random)
        return _decoded(vlm, _directions(vlm, directions, None, norm), n, norm, words)
    allowed = _admissible(vlm, n, words)
    n_words = len(allowed.words)
    # the largest of random numbers: different words, each with the same probability
    index = torch.rand(k, n_words, generator=random).topk(min(n, n_words)).indices
    no_score = torch.full(index.shape, torch.nan)
    return _table(allowed, index, allowed.forms[index, 0], no_score)


def as_lists(table: pd.DataFrame) -> dict[int, list[str]]:
    """List the words of each concept in the order of their rank.

    Use it to go from the table of :func:`concept_words` to lists, as the metrics of grounding take
    them.

    Parameters
    ----------
    table : DataFrame
        A table with columns ``concept``, ``rank`` and ``word``, from :func:`concept_words` or
        :func:`random_words`.

    Returns
    -------
    dict of int to list of str
        The words of each concept, concepts in ascending order.

    Raises
    ------
    InputError
        If the table lacks one of these columns.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.concepts import as_lists
    >>> table = pd.DataFrame(
    ...     {"concept": [0, 0, 1], "rank": [2, 1, 1], "word": ["lady", "woman", "key"]}
    ... )
    >>> as_lists(table)
    {0: ['woman', 'lady'], 1: ['key']}
    """
    checked = with_columns(table, ("concept", "rank", "word"), "a table of words")
    ordered = checked.sort_values(["concept", "rank"])
    lists = {}
    for concept, part in ordered.groupby("concept")["word"]:
        lists[int(concept)] = part.tolist()
    return lists


def _decoded(
    vlm: VLM, directions: Float[Tensor, "k d"], n: int, norm: bool, words: WordFilter
) -> pd.DataFrame:
    allowed = _admissible(vlm, n, words)
    scores, indices, tokens = [], [], []
    for logits in distributions.chunks(vlm, directions, norm):
        score, index, token = _best(logits, allowed, n)
        scores.append(score)
        indices.append(index)
        tokens.append(token)
    score = torch.cat(scores)
    distributions.check_logits(score)
    return _table(allowed, torch.cat(indices), torch.cat(tokens), score)


def _best(
    logits: Float[Tensor, "c v"], allowed: Admissible, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, words and tokens (c, n) of the best words of each row.

    The score of a word is that of its best token.
    """
    forms = allowed.forms.to(logits.device)
    score = logits[:, forms[:, 0]]
    form = torch.zeros_like(forms[:, 0]).expand(len(logits), -1)
    for column in range(1, forms.shape[1]):  # a word has a handful of forms
        form_score = logits[:, forms[:, column]]
        form = torch.where(form_score > score, column, form)
        score = torch.maximum(score, form_score)
    values, indices = score.topk(min(n, len(forms)))
    token = forms[indices, form.gather(1, indices)]
    return values.cpu(), indices.cpu(), token.cpu()


def _table(
    allowed: Admissible,
    index: Int[Tensor, "k n"],
    token: Int[Tensor, "k n"],
    score: Float[Tensor, "k n"],
) -> pd.DataFrame:
    """Arrange the words of each concept, the best first."""
    concept, rank = np.divmod(np.arange(index.numel()), index.shape[1])
    words = allowed.words[index.flatten().numpy()]
    table = pd.DataFrame({"concept": concept, "rank": rank + 1})
    table["word"] = words.astype(object)
    table["token_id"] = token.flatten().numpy()
    table["score"] = score.flatten().numpy()
    return table


def _admissible(vlm: VLM, n: int, words: WordFilter) -> Admissible:
    whole("n", n)
    distributions.require_tokenizer(vlm)
    return admissible(vlm.tokenizer, distributions.size(vlm), words)


def _directions(
    vlm: VLM, directions: Directions, mean: Vector | None, norm: bool
) -> Float[Tensor, "k d"]:
    """The directions as they enter the final norm, or (``norm`` False) the unembedding."""
    # the square of a length must not overflow
    directions = torch.as_tensor(directions).detach().double()
    distributions.check(vlm, directions)
    if mean is not None:
        offset = torch.as_tensor(mean).detach().to(directions)
        if offset.shape != directions.shape[1:]:
            raise incomparable(
                "widths",
                f"a mean of {tuple(offset.shape)}",
                f"directions of {directions.shape[1]}",
                "give their own mean",
            )
        if not torch.isfinite(offset).all():
            raise InputError(
                "the mean holds NaN or infinite values", "check the states that it is taken of"
            )
        directions = directions - offset
    length = directions.norm(dim=1, keepdim=True)
    zero = (length == 0).flatten().nonzero().flatten().tolist()
    if zero:
        raise InputError(
            f"directions {', '.join(map(str, zero))} are zero and say nothing",
            "leave out concepts that are never used",
        )
    if norm:
        directions = directions * (vlm.width**0.5 / length)
    return directions.float()
