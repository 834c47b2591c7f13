"""How close captions are to reference captions: CIDEr-D and BLEU.

CIDEr-D is written here: of the packages that have it, aac-metrics brings audio models and older
versions of transformers and numpy along, and pycocoevalcap 100 MB of Java archives. BLEU is
sacrebleu's. Captions are split into words by :func:`text.words`, not by the Java tokeniser of the
COCO evaluation, so scores can differ a little from those of its table. Captions in scripts without
spaces (Chinese, Japanese, Thai) are split into characters.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Float64
from scipy.sparse import csr_array

from xlvlms_tutorial.metrics.plain import require_estimate, require_lists
from xlvlms_tutorial.text import words
from xlvlms_tutorial.validation import require_same_length

ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0  # of the penalty on a difference in length, in words
_SCALE = 10.0


def cider(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Float64[np.ndarray, "n"], float]:
    r"""Compute CIDEr-D of each caption against its references, and the mean, the corpus value.

    Use it to compare captions with what several people wrote. With g_n(c) the counts of the n-grams
    of caption c, each weighted by log N - log(df) where df is the number of images, of N, whose
    references have the n-gram, and l the length in words, the score of candidate c with references
    r_1 ... r_m is

    .. math::

        \frac{10}{4} \sum_{n=1}^{4} \frac{1}{m} \sum_j e^{-(l(c) - l(r_j))^2 / (2 \cdot 6^2)} \,
        \frac{\min(g_n(c), g_n(r_j)) \cdot g_n(r_j)}{\lVert g_n(c) \rVert \, \lVert g_n(r_j) \rVert}

    Captions shorter than n words have no n-grams and contribute 0 there, and the value depends on
    the set that is scored, since df counts the references given here. From "CIDEr: Consensus-based
    Image Description Evaluation" (Vedantam et al. 2015, arXiv 1411.5726, section 6).

    Parameters
    ----------
    candidates : sequence of str
        The captions to score, two or more.
    references : sequence of sequence of str
        The reference captions of each candidate, one or more.

    Returns
    -------
    scores : ndarray (n,)
        The score of each candidate, 0 to 10.
    mean : float
        Their mean.

    Raises
    ------
    InputError
        If there are fewer than two candidates (no n-gram would have a weight), no references of
        one, or a reference has no words. If there are not as many lists of references as
        candidates.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import cider
    >>> candidates = ["a woman holds keys", "nobody is on stage"]
    >>> scores, mean = cider(candidates, [["a woman holds keys"], ["two dogs run fast"]])
    >>> scores.round(2).tolist(), round(mean, 2)
    ([10.0, 0.0], 5.0)
    """
    captions, reference_words, owner = _split(candidates, references, min_candidates=2)
    texts = captions + reference_words
    counts, order = _ngrams(texts)
    n = len(captions)
    n_references = len(owner)
    lengths = np.array(list(map(len, texts)), dtype=np.float64)
    # (images, references)
    places = (owner, np.arange(n_references))
    grouped = csr_array((np.ones(n_references), places), shape=(n, n_references))
    frequency = ((grouped @ counts[n:]) > 0).sum(axis=0)
    rarity = np.log(n) - np.log(np.maximum(frequency, 1))
    weighted = (counts * rarity).tocsc()
    total = np.zeros(n_references)
    for size in ORDERS:
        part = weighted[:, order == size].tocsr()
        norms = np.sqrt((part * part).sum(axis=1))
        scale = norms[owner] * norms[n:]
        theirs = part[n:]
        clipped = part[owner].minimum(theirs)
        products = (clipped * theirs).sum(axis=1)
        total += np.divide(products, scale, out=np.zeros(n_references), where=scale > 0)
    longer = lengths[owner] - lengths[n:]
    total *= np.exp(-(longer**2) / (2 * _SIGMA**2))
    scores = _SCALE / len(ORDERS) * (grouped @ total) / grouped.sum(axis=1)
    return scores, float(scores.mean())


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Compute BLEU-4 of a set of captions against their references.

    Geometric mean of the clipped n-gram precisions times a brevity penalty (Papineni et
    al. 2002). Counts are summed over the set, unsmoothed: one number for all captions,
    which is not the mean of theirs.

    Parameters
    ----------
    candidates : sequence of str
        The captions to score.
    references : sequence of sequence of str
        The reference captions of each candidate, one or more.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    InputError
        If there are no candidates, no references of one, or a reference has no words. If there are
        not as many lists of references as candidates.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import bleu
    >>> round(bleu(["a woman holds keys"], [["a woman holds keys", "keys"]]), 2)
    1.0
    """
    from sacrebleu.metrics import BLEU  # here, so that CIDEr does not wait for it

    captions, reference_words, owner = _split(candidates, references, min_candidates=1)
    # sacrebleu takes the k-th references of all captions as a list, None where there is none
    starts = np.searchsorted(owner, np.arange(len(captions) + 1))
    n_columns = int(np.diff(starts).max())
    columns = [[None] * len(captions) for _ in range(n_columns)]
    for number, text in enumerate(map(" ".join, reference_words)):
        caption = owner[number]
        columns[number - starts[caption]][caption] = text
    metric = BLEU(tokenize="none", smooth_method="none")
    texts = list(map(" ".join, captions))
    score = metric.corpus_score(texts, columns).score
    return min(score / 100, 1.0)  # rounding can exceed 1


def _split(
    candidates: Sequence[str], references: Sequence[Sequence[str]], min_candidates: int
) -> tuple[list[list[str]], list[list[str]], np.ndarray]:
    """Split the candidates and all references into words, and say whose each reference is."""
    score = "a score against references"
    require_same_length(candidates=candidates, references=references)
    require_estimate(
        len(candidates) >= min_candidates,
        score,
        f"{len(candidates)} candidates",
        f"{min_candidates} or more",
    )
    require_lists(references, score, "a list of one caption or more for each candidate")
    candidate_words = list(map(words, candidates))
    reference_words = list(map(words, chain.from_iterable(references)))
    require_estimate(
        all(reference_words), score, "a reference without words", "captions of one word or more"
    )
    n_references = list(map(len, references))
    owner = np.repeat(np.arange(len(candidates)), n_references)
    return candidate_words, reference_words, owner


def _ngrams(texts: list[list[str]]) -> tuple[csr_array, np.ndarray]:
    """Count the n-grams of each text ``(texts, grams)``, and give the order n of each column."""
    numbers: dict[tuple[str, ...], int] = {}
    columns = []
    ends = [0]
    for text in texts:
        for gram in _grams(text):
            columns.append(numbers.setdefault(gram, len(numbers)))
        ends.append(len(columns))
    ones = np.ones(len(columns))
    counts = csr_array(
        (ones, np.array(columns, dtype=np.int64), ends), shape=(len(texts), len(numbers))
    )
    counts.sum_duplicates()
    return counts, np.array(list(map(len, numbers)), dtype=np.int64)


def _grams(text: list[str]) -> list[tuple[str, ...]]:
    grams = []
    for n in ORDERS:
        grams += [tuple(text[k : k + n]) for k in range(len(text) - n + 1)]
    return grams
