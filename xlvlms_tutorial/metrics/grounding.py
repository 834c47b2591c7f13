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

from xlvlms_tutorial.errors import (
    ActivationsError,
    ComparisonError,
    LengthError,
    SelectionError,
    WordListError,
)
from xlvlms_tutorial.metrics.answers import with_columns
from xlvlms_tutorial.metrics.plain import plain

_LARGEST = 1e30
_BLOCK = 2**20  # cosines computed at once: bounds memory, and stays in the cache of a processor

Vectors = Tensor | np.ndarray


def clip_score(
    images: Float[Vectors, "n e"], texts: Float[Vectors, "m _"], w: float | int = 2.5
) -> Float[np.ndarray, "n m"]:
    r"""CLIPScore of each picture with each text from their embeddings.

    :math:`w \max(\cos(\mathrm{image}, \mathrm{text}), 0)`. Between 0 and w. Embeddings need no
    normalisation. "CLIPScore: A Reference-free Evaluation Metric for Image Captioning"
    (arXiv 2104.08718); which w was used belongs to every number.

    Raises
    ------
    ActivationsError
        If a side is empty, or an embedding is NaN, infinite or zero.
    ComparisonError
        If pictures and texts are embedded in spaces of different widths.
    SelectionError
        If w is not a positive number.
    """
    # above, the product would be infinite in float32
    if isinstance(w, bool) or not 0 < w <= _LARGEST:
        raise SelectionError(
            f"w={w}", f"allowed: a positive number up to {_LARGEST:.0e}; the paper's is 2.5"
        )
    pictures, words = (
        _unit(_tensor(images), "image embeddings"),
        _unit(_tensor(texts), "text embeddings"),
    )
    pictures, words = _comparable(pictures, words)
    return (pictures @ words.T).clamp_(0, 1).mul_(w).cpu().numpy()


def bert_score(
    candidates: Sequence[Vectors],
    references: Sequence[Vectors | Sequence[Vectors]],
    best: str = "max",
    baseline: float | int | None = None,
) -> pd.DataFrame:
    r"""BERTScore of candidate i with reference i from token embeddings (t, e) and (u, e).

    Columns precision, recall, f1. With the cosine :math:`s_{ab}` of candidate token a and reference
    token b: :math:`P = \frac1t \sum_a \max_b s_{ab}`, :math:`R = \frac1u \sum_b \max_a s_{ab}`,
    :math:`F = 2PR/(P + R)`; F is 0 where P or R is not positive, where a harmonic mean says
    nothing. "BERTScore: Evaluating Text Generation with BERT" (arXiv 1904.09675), without weights
    for rare words. Tokens match only tokens that are given: the authors' package lets a word match
    the special tokens ([CLS], [SEP]) of the other text too, which moves F by some thousandths; give
    these among the others to have the same. A reference may be a list of several: ``best`` "max"
    takes the largest of each column, "mean" their mean. ``baseline`` b rescales each number to
    :math:`(x - b)/(1 - b)`, 0 for what unrelated texts reach.

    Raises
    ------
    LengthError
        If there are not as many references as candidates.
    ActivationsError
        If there are no texts, a text has no tokens, or a token's
        embedding is NaN, infinite or zero.
    ComparisonError
        If embeddings differ in width.
    SelectionError
        If ``best`` is unknown, or the baseline is not below 1.
    """
    _check_options(baseline, best)
    if len(candidates) != len(references):
        raise LengthError(candidates=len(candidates), references=len(references))
    several = [[one] if isinstance(one, Vectors) else list(one) for one in references]
    if not all(several):
        raise ActivationsError(
            "a candidate has no reference", "give one or more for each candidate"
        )
    owner = np.repeat(np.arange(len(several)), [len(one) for one in several])
    ours, theirs = _comparable_texts(
        _packed(candidates, "candidate"),
        _packed([one for group in several for one in group], "reference"),
    )
    table = _harmonic(*_pairs(ours, theirs, owner), baseline)
    return table.groupby(owner).agg(best) if len(owner) > len(several) else table


def bert_scores(
    candidates: Sequence[Vectors],
    references: Sequence[Vectors],
    baseline: float | int | None = None,
) -> np.ndarray:
    """BERTScore F1 of every candidate with every reference, (n, m).

    Entry (i, j) is ``bert_score([c_i], [r_j])["f1"]``. Texts are sorted by length and compared in
    blocks, so that memory is bounded and little of the work goes into padding.

    Raises
    ------
    ActivationsError, ComparisonError, SelectionError
        As :func:`bert_score`.
    """
    _check_options(baseline)
    ours, theirs = _comparable_texts(
        _packed(candidates, "candidate"), _packed(references, "reference")
    )
    scores = torch.empty(
        len(ours.lengths), len(theirs.lengths), dtype=ours.tokens.dtype, device=ours.tokens.device
    )
    columns = [(block, *_padded(theirs, block)) for block in _blocks(theirs.lengths)]
    for rows in _blocks(ours.lengths):
        one = _padded(ours, rows)
        for block, *other in columns:
            scores[rows[:, None], block] = _f1(*_all_matches(one, other))
    return _rescaled(scores, baseline).cpu().numpy()


def overlap(words: Mapping[int, Sequence[str]] | pd.DataFrame) -> pd.Series:
    r"""Share of a concept's words :math:`T_k` that each other concept has too, on average.

    0 for words of its own, 1 for shared ones. :math:`\mathrm{Overlap}(u_k) = \frac{1}{K-1} \sum_{l
    \ne k} |T_l \cap T_k| / |T_k|` (arXiv 2406.08074) on sets: a word counts once in a list.
    ``words`` maps concepts to words, or is a table with the columns concept and word. The mean of
    the series is the overlap of the whole dictionary.

    Raises
    ------
    WordListError
        If a concept has no words, or something that is not a word.
    SelectionError
        If there are fewer than 2 concepts.
    """
    pairs = _pairs_of_words(words)
    # in how many other lists each word of each list is
    shared = pairs.groupby("word")["concept"].transform("size") - 1
    concepts = pairs["concept"].nunique()
    if concepts < 2:
        raise SelectionError(f"the overlap of {concepts} concept", "give 2 concepts or more")
    return (shared.groupby(pairs["concept"], sort=False).mean() / (concepts - 1)).rename("overlap")


def top_scores(codes: np.ndarray, scores: np.ndarray, n_concepts: int = 5) -> pd.DataFrame:
    """Scores of each sample's most activating concepts, one row for each sample.

    Columns top_1, top_3, active. ``codes`` (n, K) say how strongly a concept is active in a sample
    (largest magnitude first, the lower number on a tie), ``scores`` (n, K) how well its words fit
    that sample. ``top_1`` is the score of the most activating concept, ``top_3`` the mean over the
    three most activating ones: the protocol of arXiv 2406.08074 as its code is released. The codes
    alone choose the concepts, never the scores, so that random words gain nothing by the choice.
    (The released code takes the largest signed codes, which differ for PCA.) ``active`` counts
    those of the ``n_concepts`` most activating concepts (the paper lists 5) whose code is not 0;
    where it is smaller than ``n_concepts``, the others stand there by their number only.

    Raises
    ------
    ComparisonError
        If codes and scores differ in shape.
    ActivationsError
        If there are no samples, a number is NaN or infinite, or no
        concept is active in some sample.
    SelectionError
        If ``n_concepts`` is not between 3 and K.
    """
    strength, scores = np.abs(_numbers(codes, "codes")), _numbers(scores, "scores")
    if strength.shape != scores.shape:
        raise ComparisonError(
            "codes and scores",
            strength.shape,
            scores.shape,
            "give one of each for every sample and concept",
        )
    if not 3 <= n_concepts <= strength.shape[1]:
        raise SelectionError(
            f"n_concepts={n_concepts}", f"allowed: 3 to {strength.shape[1]}, the number of concepts"
        )
    silent = int((strength.max(axis=1) == 0).sum())
    if silent:
        raise ActivationsError(
            f"no concept is active in {silent} of {len(codes)} samples",
            "leave them out, or lower the penalty",
        )
    chosen = np.argsort(-strength, axis=1, kind="stable")[:, :n_concepts]
    found = np.take_along_axis(scores, chosen[:, :3], axis=1)
    active = (np.take_along_axis(strength, chosen, axis=1) > 0).sum(axis=1)
    return pd.DataFrame({"top_1": found[:, 0], "top_3": found.mean(axis=1), "active": active})


class _Texts(NamedTuple):
    """Token embeddings of all texts under one another, unit length.

    Text i has ``lengths[i]`` of them from ``starts[i]``.
    """

    tokens: Float[Tensor, "T e"]
    starts: Int[Tensor, "n"]
    lengths: Int[Tensor, "n"]


def _packed(texts: Sequence[Vectors], what: str) -> _Texts:
    if not len(texts):
        raise ActivationsError(
            f"no {what}s", "give the token embeddings (t, e) of one text or more"
        )
    parts = list(map(_tensor, texts))
    for number, part in enumerate(parts):
        if part.ndim != 2 or not part.numel():
            raise ActivationsError(
                f"{what} {number} has shape {tuple(part.shape)}",
                "give (tokens, width), one token or more",
            )
        if part.shape[1] != parts[0].shape[1]:
            raise ComparisonError(
                f"widths of {what}s",
                parts[0].shape[1],
                part.shape[1],
                "embed all texts with one model",
            )
    tokens = _unit(torch.cat(parts), f"token embeddings of {what}s")
    lengths = torch.tensor([len(part) for part in parts], device=tokens.device)
    return _Texts(tokens, lengths.cumsum(0) - lengths, lengths)


def _padded(
    texts: _Texts, rows: Int[Tensor, "b"]
) -> tuple[Float[Tensor, "t b e"], Float[Tensor, "t b"]]:
    """Tokens of some texts, and their weights in the mean.

    A short text repeats its last token, with weight 0, which changes no maximum.
    """
    lengths = texts.lengths[rows]
    place = torch.arange(int(lengths.max()), device=rows.device)[:, None]
    weights = (place < lengths).to(texts.tokens.dtype) / lengths
    return texts.tokens[texts.starts[rows] + torch.minimum(place, lengths - 1)], weights


def _blocks(lengths: Int[Tensor, "n"]) -> tuple[Int[Tensor, "_"], ...]:
    """Texts of similar length, as many together as make a square block of cosines affordable."""
    order = lengths.argsort()
    return order.split(max(1, int(_BLOCK**0.5) // int(lengths.max())))


def _all_matches(
    one: Sequence[Tensor], other: Sequence[Tensor]
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Precision and recall of b texts (t, b, e) with c texts (u, c, e).

    Tokens lead, so that maxima run over contiguous rows.
    """
    (x, weights_x), (y, weights_y) = one, other
    cosines = (x.flatten(0, 1) @ y.flatten(0, 1).T).view(*x.shape[:2], *y.shape[:2])
    precision = torch.einsum("tbc,tb->bc", cosines.amax(dim=2), weights_x)
    return precision, torch.einsum("buc,uc->bc", cosines.amax(dim=0), weights_y)


def _pairs(
    ours: _Texts, theirs: _Texts, owner: np.ndarray
) -> tuple[Float[Tensor, "p"], Float[Tensor, "p"]]:
    """Precision and recall of reference j with candidate ``owner[j]``."""
    partner = torch.as_tensor(owner, device=ours.tokens.device)
    area = ours.lengths[partner] * theirs.lengths
    precision, recall = ours.tokens.new_empty(2, len(owner))
    for rows in area.argsort().split(
        max(1, _BLOCK // int(ours.lengths.max() * theirs.lengths.max()))
    ):
        (x, weights_x), (y, weights_y) = _padded(ours, partner[rows]), _padded(theirs, rows)
        cosines = x.transpose(0, 1) @ y.permute(1, 2, 0)
        precision[rows] = (cosines.amax(dim=2) * weights_x.T).sum(dim=1)
        recall[rows] = (cosines.amax(dim=1) * weights_y.T).sum(dim=1)
    return precision, recall


def _f1(precision: Tensor, recall: Tensor) -> Tensor:
    positive = (precision > 0) & (recall > 0)
    return torch.where(
        positive, 2 * precision * recall / torch.where(positive, precision + recall, 1), 0
    )


def _harmonic(precision: Tensor, recall: Tensor, baseline: float | int | None) -> pd.DataFrame:
    columns = {"precision": precision, "recall": recall, "f1": _f1(precision, recall)}
    return pd.DataFrame(
        {name: _rescaled(values, baseline).cpu().numpy() for name, values in columns.items()}
    )


def _rescaled(values: Tensor, baseline: float | int | None) -> Tensor:
    return values if baseline is None else (values - baseline) / (1 - baseline)


def _check_options(baseline: float | int | None, best: str = "max") -> None:
    if baseline is not None and not -1 <= baseline < 1:
        raise SelectionError(
            f"baseline={baseline}", "allowed: None, or a number from -1 to below 1"
        )
    if best not in ("max", "mean"):
        raise SelectionError(f"best={best!r}", "allowed: 'max', 'mean'")


def _tensor(values: Vectors) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.as_tensor(plain(values))


def _unit(vectors: Tensor, what: str) -> Tensor:
    if vectors.ndim != 2 or not vectors.numel() or vectors.is_complex():
        raise ActivationsError(
            f"no {what}: {vectors.dtype} of shape {tuple(vectors.shape)}",
            "give one row of real numbers or more",
        )
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    bad = int(((lengths == 0) | ~lengths.isfinite()).sum())
    if bad:
        raise ActivationsError(
            f"{what}: {bad} of {len(vectors)} are zero, NaN or infinite",
            "a cosine needs a direction; check the inputs",
        )
    return vectors / lengths


def _comparable(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if one.shape[1] != other.shape[1]:
        raise ComparisonError(
            "widths of embeddings", one.shape[1], other.shape[1], "embed both sides with one model"
        )
    wide = torch.promote_types(one.dtype, other.dtype)
    return one.to(wide), other.to(one.device, wide)


def _comparable_texts(one: _Texts, other: _Texts) -> tuple[_Texts, _Texts]:
    ours, theirs = _comparable(one.tokens, other.tokens)
    return one._replace(tokens=ours), _Texts(
        theirs, other.starts.to(ours.device), other.lengths.to(ours.device)
    )


def _numbers(values: np.ndarray, what: str) -> np.ndarray:
    values = plain(values)
    if values.ndim != 2 or not values.size:
        raise ActivationsError(
            f"{what} of shape {values.shape}", "give (samples, concepts), one of each or more"
        )
    if not np.isfinite(values).all():
        raise ActivationsError(
            f"{what}: {int((~np.isfinite(values)).sum())} of {values.size} are NaN or infinite",
            "give finite numbers",
        )
    return values


def _pairs_of_words(words: Mapping[int, Sequence[str]] | pd.DataFrame) -> pd.DataFrame:
    """Each word of each concept once, in the order of concepts."""
    if isinstance(words, pd.DataFrame):
        pairs = with_columns(
            words, ("concept", "word"), "a table of words, as concepts.words makes it"
        )
    else:
        empty = [
            concept for concept, found in words.items() if isinstance(found, str) or not len(found)
        ]
        if empty:
            raise WordListError(
                f"no list of words for concept(s) {', '.join(map(str, empty))}",
                "give each concept one word or more",
            )
        pairs = pd.DataFrame(
            [(concept, word) for concept, found in words.items() for word in found],
            columns=["concept", "word"],
        )
    strange = [word for word in pairs["word"] if not isinstance(word, str) or not word]
    if strange:
        raise WordListError(f"{strange[0]!r} is not a word", "give non-empty strings")
    return pairs.drop_duplicates()
