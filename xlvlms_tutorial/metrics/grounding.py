r"""How well words fit pictures and captions, and how much the words of concepts overlap.

The scores of "A Concept-based Explainability Framework for Large Multimodal Models"
(arXiv 2406.08074): CLIPScore between pictures and words, BERTScore between captions and words,
the overlap of word lists, and the protocol that scores unseen pictures. All functions take
embeddings, whichever model made them; arithmetic runs on the device of the tensors given, results
come back as numpy arrays and tables.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.answers import with_columns
from xlvlms_tutorial.metrics.plain import plain
from xlvlms_tutorial.validation import require, require_equal

_LARGEST = 1e30
_BLOCK = 2**20  # cosines computed at once: bounds memory, and stays in the cache of a processor

Vectors = Tensor | np.ndarray


def clip_score(
    images: Float[Vectors, "n e"], texts: Float[Vectors, "m _"], w: float | int = 2.5
) -> Float[np.ndarray, "n m"]:
    r"""Compute CLIPScore of each picture with each text from their embeddings.

    The score is :math:`w \max(\cos(\mathrm{image}, \mathrm{text}), 0)`. Use it to see how well
    captions, or the words of concepts, fit pictures. From "CLIPScore: A Reference-free Evaluation
    Metric for Image Captioning" (Hessel et al. 2021, arXiv 2104.08718).

    Parameters
    ----------
    images : Tensor or ndarray (n, e)
        Embeddings of pictures, which need no normalisation.
    texts : Tensor or ndarray (m, e)
        Embeddings of texts by the same model.
    w : float, default 2.5
        The factor of the cosines, by default the paper's; which w was used belongs to every number.

    Returns
    -------
    ndarray (n, m)
        Scores between 0 and w.

    Raises
    ------
    InputError
        If a side is empty, or an embedding is NaN, infinite or zero. If pictures and texts are
        embedded in spaces of different widths. If w is not a positive number.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.metrics import clip_score
    >>> clip_score(np.array([[3.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[2.5, 0.0]]
    """
    # above, the product would be infinite in float32
    require(
        not isinstance(w, bool) and 0 < w <= _LARGEST,
        f"w={w}",
        f"allowed: a positive number up to {_LARGEST:.0e}; the paper's is 2.5",
    )
    pictures = _unit(_tensor(images), "image embeddings")
    sentences = _unit(_tensor(texts), "text embeddings")
    pictures, sentences = _comparable(pictures, sentences)
    return (pictures @ sentences.T).clamp_(0, 1).mul_(w).cpu().numpy()


def bert_scores(
    candidates: Sequence[Vectors],
    references: Sequence[Vectors],
    baseline: float | int | None = None,
) -> np.ndarray:
    r"""Compute the BERTScore F1 of every candidate with every reference.

    Use it to compare texts by meaning instead of by words. With the cosine :math:`s_{ab}` of
    candidate token a and reference token b: :math:`P = \frac1t \sum_a \max_b s_{ab}`, :math:`R =
    \frac1u \sum_b \max_a s_{ab}`, :math:`F = 2PR/(P + R)`; F is 0 where P or R is not positive,
    where a harmonic mean says nothing. From "BERTScore: Evaluating Text Generation with BERT"
    (Zhang et al. 2020, arXiv 1904.09675), without weights for rare words.

    Tokens match only tokens that are given: the authors' package lets a word match the special
    tokens ([CLS], [SEP]) of the other text too, which moves F by some thousandths; give these among
    the others to have the same. Texts are sorted by length and compared in blocks, so that memory
    is bounded and little of the work goes into padding.

    Parameters
    ----------
    candidates : sequence of Tensor or ndarray (t, e)
        The token embeddings of each candidate.
    references : sequence of Tensor or ndarray (u, e)
        The token embeddings of each reference.
    baseline : float, optional
        The score b that unrelated texts reach: each number becomes :math:`(x - b)/(1 - b)`. By
        default scores are not rescaled.

    Returns
    -------
    ndarray (n, m)
        The F1 of each of n candidates with each of m references.

    Raises
    ------
    InputError
        If there are no texts, a text has no tokens, or a token's embedding is NaN, infinite or
        zero. If embeddings differ in width. If the baseline is not below 1.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.metrics import bert_scores
    >>> bert_scores([np.eye(2)], [np.eye(2)[:1], np.eye(2)]).round(2).tolist()
    [[0.67, 1.0]]
    """
    require(
        baseline is None or -1 <= baseline < 1,
        f"baseline={baseline}",
        "allowed: None, or a number from -1 to below 1",
    )
    ours = _packed(candidates, "candidate")
    theirs = _packed(references, "reference")
    ours, theirs = _comparable_texts(ours, theirs)
    scores = ours.tokens.new_empty((len(ours.lengths), len(theirs.lengths)))
    columns = [(block, _padded(theirs, block)) for block in _blocks(theirs.lengths)]
    for rows in _blocks(ours.lengths):
        padded_rows = _padded(ours, rows)
        for block, padded_block in columns:
            precision, recall = _all_matches(padded_rows, padded_block)
            scores[rows[:, None], block] = _f1(precision, recall)
    if baseline is not None:
        scores = (scores - baseline) / (1 - baseline)
    return scores.cpu().numpy()


def word_overlap(words: Mapping[int, Sequence[str]] | pd.DataFrame) -> pd.Series:
    r"""Compute the share of each concept's words that each other concept has too, on average.

    Use it to see whether concepts are distinct: 0 for words of its own, 1 for shared ones. With the
    words :math:`T_k` of concept k,
    :math:`\mathrm{Overlap}(u_k) = \frac{1}{K-1} \sum_{l \ne k} |T_l \cap T_k| / |T_k|`
    (Parekh et al. 2024, arXiv 2406.08074) on sets: a word counts once in a list.

    Parameters
    ----------
    words : mapping of int to sequence of str, or pandas.DataFrame
        The words of each concept, or a table with the columns concept and word.

    Returns
    -------
    pandas.Series
        The overlap of each concept, by concept. Its mean is the overlap of the whole dictionary.

    Raises
    ------
    InputError
        If a concept has no words, or something that is not a word. If there are fewer than 2
        concepts.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import word_overlap
    >>> word_overlap({0: ["key", "dog"], 1: ["key", "cat"]}).to_dict()
    {0: 0.5, 1: 0.5}
    """
    pairs = _pairs_of_words(words)
    # in how many other lists each word of each list is
    shared = pairs.groupby("word")["concept"].transform("size") - 1
    concepts = pairs["concept"].nunique()
    require(concepts >= 2, f"the overlap of {concepts} concept", "give 2 concepts or more")
    means = shared.groupby(pairs["concept"], sort=False).mean()
    return (means / (concepts - 1)).rename("overlap")


def top_scores(codes: np.ndarray, scores: np.ndarray, n_concepts: int = 5) -> pd.DataFrame:
    """Select the scores of each sample's most activating concepts.

    Use it to measure how well the words of concepts fit unseen pictures. The codes alone choose the
    concepts, never the scores, so that random words gain nothing by the choice. It is the protocol
    of "A Concept-based Explainability Framework for Large Multimodal Models" (Parekh et al. 2024,
    arXiv 2406.08074) as its code is released. (The released code takes the largest signed codes,
    which differ for PCA.)

    Parameters
    ----------
    codes : ndarray (n, K)
        How strongly each concept is active in each sample (largest magnitude first, the lower
        number on a tie).
    scores : ndarray (n, K)
        How well the words of each concept fit each sample, as of :func:`clip_score`.
    n_concepts : int, default 5
        How many of the most activating concepts ``active`` looks at, from 3 to K; the paper lists
        5.

    Returns
    -------
    pandas.DataFrame
        One row a sample. Columns top_1, the score of the most activating concept; top_3, the mean
        over the three most activating ones; active, how many of the ``n_concepts`` most activating
        concepts have a code that is not 0. Where active is smaller than ``n_concepts``, the others
        stand there by their number only.

    Raises
    ------
    InputError
        If codes and scores differ in shape. If there are no samples, a number is NaN or infinite,
        or no concept is active in some sample. If ``n_concepts`` is not between 3 and K.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.metrics import top_scores
    >>> codes, scores = np.array([[3.0, 2.0, 0.0]]), np.array([[0.9, 0.6, 0.3]])
    >>> top_scores(codes, scores, n_concepts=3).round(2).to_numpy().tolist()
    [[0.9, 0.6, 2.0]]
    """
    strength = np.abs(_numbers(codes, "codes"))
    scores = _numbers(scores, "scores")
    require_equal(
        "codes and scores",
        strength.shape,
        scores.shape,
        "give one of each for every sample and concept",
    )
    require(
        3 <= n_concepts <= strength.shape[1],
        f"n_concepts={n_concepts}",
        f"allowed: 3 to {strength.shape[1]}, the number of concepts",
    )
    silent = int((strength.max(axis=1) == 0).sum())
    require(
        silent == 0,
        f"no concept is active in {silent} of {len(codes)} samples",
        "leave them out, or lower the penalty",
    )
    concepts = np.argsort(-strength, axis=1, kind="stable")[:, :n_concepts]
    top = np.take_along_axis(scores, concepts[:, :3], axis=1)
    top_strength = np.take_along_axis(strength, concepts, axis=1)
    table = pd.DataFrame({"top_1": top[:, 0]})
    table["top_3"] = top.mean(axis=1)
    table["active"] = (top_strength > 0).sum(axis=1)
    return table


class _Texts(NamedTuple):
    """Token embeddings of all texts under one another, unit length.

    Text i has ``lengths[i]`` of them from ``starts[i]``.
    """

    tokens: Float[Tensor, "T e"]
    starts: Int[Tensor, "n"]
    lengths: Int[Tensor, "n"]


def _packed(texts: Sequence[Vectors], kind: str) -> _Texts:
    """Join the token embeddings of texts, each of length 1, and say where each text starts."""
    require(len(texts) > 0, f"no {kind}s", "give the token embeddings (t, e) of one text or more")
    parts = list(map(_tensor, texts))
    for number, part in enumerate(parts):
        require(
            part.ndim == 2 and part.numel() > 0,
            f"{kind} {number} has shape {tuple(part.shape)}",
            "give (tokens, width), one token or more",
        )
        require_equal(
            f"widths of {kind}s",
            parts[0].shape[1],
            part.shape[1],
            "embed all texts with one model",
        )
    tokens = _unit(torch.cat(parts), f"token embeddings of {kind}s")
    lengths = torch.tensor(list(map(len, parts)), device=tokens.device)
    starts = lengths.cumsum(0) - lengths
    return _Texts(tokens, starts, lengths)


def _padded(
    texts: _Texts, rows: Int[Tensor, "b"]
) -> tuple[Float[Tensor, "t b e"], Float[Tensor, "t b"]]:
    """Return the tokens of some texts, and their weights in the mean.

    A short text repeats its last token, with weight 0, which changes no maximum.
    """
    lengths = texts.lengths[rows]
    place = torch.arange(int(lengths.max()), device=rows.device)[:, None]
    weights = (place < lengths).to(texts.tokens.dtype) / lengths
    within = torch.minimum(place, lengths - 1)
    return texts.tokens[texts.starts[rows] + within], weights


def _blocks(lengths: Int[Tensor, "n"]) -> tuple[Int[Tensor, "_"], ...]:
    """Group texts of similar length, as many as make a square block of cosines affordable."""
    order = lengths.argsort()
    return order.split(max(1, int(_BLOCK**0.5) // int(lengths.max())))


def _all_matches(
    rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Compute precision and recall of b texts (t, b, e) with c texts (u, c, e).

    Tokens lead, so that maxima run over contiguous rows.
    """
    x, weights_x = rows
    y, weights_y = columns
    cosines = x.flatten(0, 1) @ y.flatten(0, 1).T
    cosines = cosines.view(*x.shape[:2], *y.shape[:2])
    precision = torch.einsum("tbc,tb->bc", cosines.amax(dim=2), weights_x)
    recall = torch.einsum("buc,uc->bc", cosines.amax(dim=0), weights_y)
    return precision, recall


def _f1(precision: Tensor, recall: Tensor) -> Tensor:
    positive = (precision > 0) & (recall > 0)
    return torch.where(
        positive, 2 * precision * recall / torch.where(positive, precision + recall, 1), 0
    )


def _tensor(values: Vectors) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.as_tensor(plain(values))


def _unit(vectors: Tensor, kind: str) -> Tensor:
    """Return vectors of length 1, in float32 or float64, or refuse them."""
    require(
        vectors.ndim == 2 and vectors.numel() and not vectors.is_complex(),
        f"no {kind}: {vectors.dtype} of shape {tuple(vectors.shape)}",
        "give one row of real numbers or more",
    )
    if vectors.dtype != torch.float64:
        vectors = vectors.float()
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    bad = (lengths == 0) | ~lengths.isfinite()
    n_bad = int(bad.sum())
    require(
        n_bad == 0,
        f"{kind}: {n_bad} of {len(vectors)} are zero, NaN or infinite",
        "a cosine needs a direction; check the inputs",
    )
    return vectors / lengths


def _comparable(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Bring embeddings of one width to one dtype and device."""
    require_equal(
        "widths of embeddings",
        first.shape[1],
        second.shape[1],
        "embed both sides with one model",
    )
    wide = torch.promote_types(first.dtype, second.dtype)
    return first.to(wide), second.to(first.device, wide)


def _comparable_texts(ours: _Texts, theirs: _Texts) -> tuple[_Texts, _Texts]:
    """Bring the tokens of two sets of texts to one dtype and device."""
    tokens, their_tokens = _comparable(ours.tokens, theirs.tokens)
    starts = theirs.starts.to(tokens.device)
    lengths = theirs.lengths.to(tokens.device)
    return ours._replace(tokens=tokens), _Texts(their_tokens, starts, lengths)


def _numbers(values: np.ndarray, name: str) -> np.ndarray:
    """Return values as a matrix of finite numbers, or refuse them."""
    values = plain(values)
    require(
        values.ndim == 2 and values.size > 0,
        f"{name} of shape {values.shape}",
        "give (samples, concepts), one of each or more",
    )
    n_bad = int((~np.isfinite(values)).sum())
    require(
        n_bad == 0, f"{name}: {n_bad} of {values.size} are NaN or infinite", "give finite numbers"
    )
    return values


def _pairs_of_words(words: Mapping[int, Sequence[str]] | pd.DataFrame) -> pd.DataFrame:
    """List each word of each concept once, in the order of concepts."""
    if isinstance(words, pd.DataFrame):
        pairs = with_columns(
            words, ("concept", "word"), "a table of words, as concepts.words makes it"
        )
    else:
        rows = []
        empty = []
        for concept, listed in words.items():
            if isinstance(listed, str) or not len(listed):
                empty.append(concept)
            else:
                for word in listed:
                    rows.append((concept, word))
        if empty:
            raise InputError(
                f"no list of words for concept(s) {', '.join(map(str, empty))}",
                "give each concept one word or more",
            )
        pairs = pd.DataFrame(rows, columns=["concept", "word"])
    for word in pairs["word"]:
        if not isinstance(word, str) or not word:
            raise InputError(f"{word!r} is not a word", "give non-empty strings")
    return pairs.drop_duplicates()
