r"""Whether shifted concepts find those of the fine-tuned model.

And whether anything else would have done as well. Shifted concepts
:math:`u_k^s = u_k^a + \alpha \Delta_k` are compared with the concepts :math:`u_{m(k)}^b` of the
fine-tuned model that the original ones match one-to-one ("Analyzing Finetuning Representation Shift
for Multimodal LLMs Steering", arXiv 2501.03012). With k-means concepts, :math:`\alpha = 1` gives
the mean of b over the samples of concept k, so some recovery is there by construction: compare with
the five shifts of :func:`null_shifts`. Words come from a callable, for instance ``lambda
directions: concepts.as_lists(concepts.words(vlm, directions, 15))``.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from xlvlms_tutorial.errors import ComparisonError, LengthError, SelectionError
from xlvlms_tutorial.methods.concepts.baselines import KMeans
from xlvlms_tutorial.methods.shift.vectors import (
    WordLists,
    magnitude,
    match,
    shift_vectors,
    shifted,
    similarity,
    t_overlap,
)
from xlvlms_tutorial.metrics.intervals import bootstrap

NULLS = ("original", "seed", "global", "shuffled", "random")

Array = Tensor | np.ndarray
Words = Callable[[np.ndarray], WordLists]


def null_shifts(
    a: Float[Array, "n d"],
    b: Float[Array, "m _"],
    labels: Int[Array, "l"],
    tuned: Float[Array, "j _"],
    original: Float[Array, "k _"],
    *,
    seed: int = 1,
) -> dict[str, Float[np.ndarray, "k _"]]:
    r"""What else could be added to the original concepts (k, d), under the names ``NULLS``.

    To compare shift vectors with. "original" adds nothing. "seed" leads to the concepts of another
    k-means of b, matched one-to-one with ``tuned``: what two runs on b agree on. "global" is the
    mean shift of all samples, the same for every concept. "shuffled" are shift vectors of labels
    permuted over the samples; on average over permutations they are the global one. "random" are
    directions drawn by :math:`\mathcal N(0, 1)^d`, as long as the shift vector of their concept.
    ``seed`` must not be the one of ``tuned``.

    Raises
    ------
    ActivationsError, ComparisonError, LengthError, SelectionError
        As ``shift.shift_vectors``, ``shift.match`` and ``KMeans.fit``.
    """
    k, start, random = len(original), _array(original), np.random.default_rng(seed)
    own = shift_vectors(a, b, labels, k)
    to_tuned = match(start, tuned)
    second = KMeans(k, seed=seed, device=str(getattr(b, "device", "cpu"))).fit(b).components_
    everywhere = shift_vectors(a, b, np.zeros(len(a), dtype=int), 1)
    permuted = labels[random.permutation(len(a))]
    drawn = random.standard_normal(own.shape)
    return {
        "original": np.zeros_like(own),
        "seed": second[match(tuned, second)[to_tuned]] - start,
        "global": np.repeat(everywhere, k, axis=0),
        "shuffled": shift_vectors(a, b, permuted, k),
        "random": drawn * (magnitude(own) / magnitude(drawn))[:, None],
    }


def recovery(
    candidates: Float[Array, "k d"],
    tuned: Float[Array, "m _"],
    original: Float[Array, "j _"],
    words: Words | tuple[WordLists, WordLists, WordLists] | None = None,
) -> pd.DataFrame:
    r"""How near each candidate comes to the fine-tuned concept its original concept matches.

    Candidates (k, d), row by row. Columns: concept; match, m(k) one-to-one from original to
    tuned; cosine_before :math:`\cos(u_k^a, u_{m(k)}^b)`; cosine_after
    :math:`\cos(u_k^s, u_{m(k)}^b)`; improvement, (after - before) / before, missing (NaN) where
    before is not positive. With ``words`` (a callable, or lists of candidates, tuned and
    original) also t_overlap_before and t_overlap_after, in per cent.

    Raises
    ------
    ActivationsError
        If concepts are missing, NaN, infinite or zero.
    ComparisonError
        If the three are not equally wide, or not equally many.
    LengthError
        If there are not as many candidates, or lists of words, as concepts.
    WordListError
        If a concept has no words.
    """
    if len(candidates) != len(original):
        raise LengthError(candidates=len(candidates), original=len(original))
    concept, partner = np.arange(len(original)), match(original, tuned)
    before, after = (similarity(side, tuned)[concept, partner] for side in (original, candidates))
    ratio = np.divide(after - before, before, out=np.full(len(before), np.nan), where=before > 0)
    found = {
        "concept": concept,
        "match": partner,
        "cosine_before": before,
        "cosine_after": after,
        "improvement": ratio,
    }
    if words is not None:
        said, of_tuned, of_original = (
            [words(_array(D)) for D in (candidates, tuned, original)] if callable(words) else words
        )
        theirs = _in_order(of_tuned, partner)
        found |= {"t_overlap_before": t_overlap(_in_order(of_original, concept), theirs)}
        found |= {"t_overlap_after": t_overlap(_in_order(said, concept), theirs)}
    return pd.DataFrame(found)


def means(
    tables: Mapping[Hashable, pd.DataFrame],
    by: str = "candidate",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Means of several tables of :func:`recovery` over their concepts.

    Columns ``by``, measure, value, low, high, n. Measures are cosine_before, cosine_after,
    cosine_gain (after - before, concept by concept) and, where there are words, t_overlap
    in the same three. Intervals resample the concepts. Keys may be numbers of concepts,
    layers, training steps or names.

    Raises
    ------
    SelectionError
        If there are no tables.
    EstimateError
        If a table has fewer than two concepts.
    """
    if not tables:
        raise SelectionError("there are no tables", "give at least one of recovery")
    rows = []
    for key, table in tables.items():
        for kind in ("cosine", "t_overlap"):
            if f"{kind}_after" in table:
                before, after = table[f"{kind}_before"], table[f"{kind}_after"]
                for of, values in (("before", before), ("after", after), ("gain", after - before)):
                    estimate = bootstrap(values, level=level, seed=seed)
                    rows.append({by: key, "measure": f"{kind}_{of}"} | estimate.asdict())
    return pd.DataFrame(rows)


def curve(
    shifts: Mapping[str, Float[Array, "k d"]],
    tuned: Float[Array, "m _"],
    original: Float[Array, "j _"],
    alphas: Iterable[float | int] = (1.0,),
    words: Words | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Recovery by :math:`u_k^a + \alpha \Delta_k` for several shifts (k, d) and strengths.

    Columns shift, alpha, those of :func:`means`.
    ``{"shifted": shift_vectors(...)} | null_shifts(...)`` compares the shift vectors with their
    rivals. Words of tuned and original are asked for once.

    Raises
    ------
    SelectionError
        If there are no shifts or alphas, or an alpha is not a finite number.
    ActivationsError, ComparisonError, WordListError, EstimateError
        As :func:`recovery` and :func:`means`.
    """
    strengths = list(alphas)
    if not shifts or not strengths:
        raise SelectionError(
            f"{len(shifts)} shifts and {len(strengths)} alphas", "give at least one of each"
        )
    known = None if words is None else (words(_array(tuned)), words(_array(original)))
    parts = []
    for name, shift in shifts.items():
        tables = {}
        for alpha in strengths:
            there = shifted(original, shift, alpha)
            tables[float(alpha)] = recovery(
                there, tuned, original, None if known is None else (words(there), *known)
            )
        parts.append(means(tables, "alpha", level, seed).assign(shift=name))
    found = pd.concat(parts, ignore_index=True)
    return found[["shift", *found.columns.drop("shift")]]


def _in_order(words: WordLists, order: Int[np.ndarray, "k"]) -> list:
    """The lists of words of some concepts, by number."""
    if len(words) != len(order):
        raise LengthError(words=len(words), concepts=len(order))
    if isinstance(words, Mapping) and (strange := set(words) - set(range(len(order)))):
        raise ComparisonError(
            "concepts",
            sorted(strange, key=str),
            f"0 to {len(order) - 1}",
            "number the lists as the concepts are",
        )
    return [words[int(concept)] for concept in order]


def _array(concepts: Array) -> Float[np.ndarray, "k d"]:
    return (
        concepts.detach().double().cpu().numpy() if isinstance(concepts, Tensor) else concepts
    ).astype(np.float64, copy=False)
