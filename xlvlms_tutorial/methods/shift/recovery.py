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

from xlvlms_tutorial.errors import InputError, incomparable
from xlvlms_tutorial.methods.concepts.baselines import KMeans
from xlvlms_tutorial.methods.shift.vectors import (
    WordLists,
    require_equal,
    row_cosines,
    shift_magnitude,
    shift_vectors,
    shifted,
    t_overlap,
)
from xlvlms_tutorial.metrics.dictionaries import match_concepts
from xlvlms_tutorial.metrics.intervals import bootstrap
from xlvlms_tutorial.validation import require_same_length

# What shift vectors are compared with: the names of ``null_shifts``
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
    r"""Make the baselines that shift vectors are compared with, by name.

    Use it with :func:`recovery_curve`: recovery by shift vectors means something where these do
    worse.

    Parameters
    ----------
    a : array or tensor (n, d)
        Activations of the original model, a row for each sample.
    b : array or tensor (n, d)
        Activations of the fine-tuned model, of the same samples in the same order.
    labels : array or tensor of int (n,)
        The concept of each sample, 0 to k - 1.
    tuned : array or tensor (k, d)
        Concepts of the fine-tuned model.
    original : array or tensor (k, d)
        Concepts of the original model.
    seed : int
        Of what is drawn at random (by default 1). It must not be the one of ``tuned``, or "seed"
        leads to the same concepts.

    Returns
    -------
    dict of ndarray (k, d)
        "original" adds nothing. "seed" leads to the concepts of another k-means of b, matched
        one-to-one with ``tuned``: what two runs on b agree on. "global" is the mean shift of all
        samples, the same for every concept. "shuffled" are shift vectors of labels permuted over
        the samples; on average over permutations they are the global one. "random" are directions
        drawn by :math:`\mathcal N(0, 1)^d`, as long as the shift vector of their concept.

    Raises
    ------
    InputError
        If activations or concepts are missing, NaN or infinite, a concept is zero, or a concept has
        no samples. If widths or numbers of concepts differ, or a, b and labels are not equally
        many. If labels are not among 0 to k - 1.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.shift import null_shifts
    >>> original = np.array([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    >>> labels = np.arange(8) % 2
    >>> a = original[labels] + 0.1 * np.random.default_rng(0).standard_normal((8, 3))
    >>> b = a + np.array([0.0, 0.0, 2.0])
    >>> shifts = null_shifts(a, b, labels, original + np.array([0.0, 0.0, 2.0]), original)
    >>> list(shifts)
    ['original', 'seed', 'global', 'shuffled', 'random']
    >>> shifts["original"].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    >>> np.linalg.norm(shifts["random"], axis=1).round(2).tolist()
    [2.0, 2.0]
    """
    k = len(original)
    start = _as_float64(original)
    random = np.random.default_rng(seed)
    shifts = shift_vectors(a, b, labels, k)
    to_tuned = _partners(start, tuned)
    device = str(getattr(b, "device", "cpu"))
    second = KMeans(k, seed=seed, device=device).fit(b).components_
    mean_shift = shift_vectors(a, b, np.zeros(len(a), dtype=int), 1)
    permuted = labels[random.permutation(len(a))]
    directions = random.standard_normal(shifts.shape)
    to_second = _partners(tuned, second)[to_tuned]
    scale = shift_magnitude(shifts) / shift_magnitude(directions)
    nulls = {"original": np.zeros_like(shifts)}
    nulls["seed"] = second[to_second] - start
    nulls["global"] = np.repeat(mean_shift, k, axis=0)
    nulls["shuffled"] = shift_vectors(a, b, permuted, k)
    nulls["random"] = directions * scale[:, None]
    return nulls


def recovery(
    candidates: Float[Array, "k d"],
    tuned: Float[Array, "m _"],
    original: Float[Array, "j _"],
    words: Words | tuple[WordLists, WordLists, WordLists] | None = None,
) -> pd.DataFrame:
    r"""Measure how near each candidate comes to the fine-tuned concept its original one matches.

    Use it to see whether :func:`shifted` concepts :math:`u_k^s` predict those of the fine-tuned
    model, :math:`u_{m(k)}^b`, concept by concept; :func:`mean_recovery` averages its tables
    (arXiv 2501.03012).

    Parameters
    ----------
    candidates : array or tensor (k, d)
        Where the original concepts are moved to, row by row.
    tuned : array or tensor (k, d)
        Concepts of the fine-tuned model, in any order.
    original : array or tensor (k, d)
        Concepts of the original model, which :func:`~xlvlms_tutorial.metrics.match_concepts` pairs
        one-to-one with ``tuned``.
    words : callable, or tuple of three word lists, optional
        What concepts say: a function of concepts (k, d) that returns their lists of words, or the
        lists of candidates, tuned and original. None (the default) leaves T-Overlap out.

    Returns
    -------
    pd.DataFrame
        One row a concept. Columns concept; match, m(k); cosine_before
        :math:`\cos(u_k^a, u_{m(k)}^b)`; cosine_after :math:`\cos(u_k^s, u_{m(k)}^b)`; improvement,
        (after - before) / before, missing (NaN) where before is not positive. With ``words`` also
        t_overlap_before and t_overlap_after, in per cent.

    Raises
    ------
    InputError
        If concepts are missing, NaN, infinite or zero. If the three are not equally wide, or not
        equally many. If there are not as many candidates, or lists of words, as concepts. If a
        concept has no words.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.shift import recovery
    >>> original = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> tuned = np.array([[0.0, 1.0], [1.0, 1.0]])
    >>> candidates = np.array([[1.0, 1.0], [0.0, 1.0]])
    >>> table = recovery(candidates, tuned, original)
    >>> table["match"].tolist()
    [1, 0]
    >>> table["cosine_before"].round(2).tolist()
    [0.71, 1.0]
    >>> table["cosine_after"].round(2).tolist()
    [1.0, 1.0]
    """
    require_same_length(candidates=candidates, original=original)
    concept = np.arange(len(original))
    partner = _partners(original, tuned)
    before = row_cosines(original, tuned[partner])
    after = row_cosines(candidates, tuned[partner])
    undefined = np.full(len(before), np.nan)
    ratio = np.divide(after - before, before, out=undefined, where=before > 0)
    columns = {
        "concept": concept,
        "match": partner,
        "cosine_before": before,
        "cosine_after": after,
        "improvement": ratio,
    }
    if words is not None:
        if callable(words):
            of_candidates = words(_as_float64(candidates))
            of_tuned = words(_as_float64(tuned))
            of_original = words(_as_float64(original))
        else:
            of_candidates, of_tuned, of_original = words
        partner_words = _words_in_order(of_tuned, partner)
        original_words = _words_in_order(of_original, concept)
        columns["t_overlap_before"] = t_overlap(original_words, partner_words)
        candidate_words = _words_in_order(of_candidates, concept)
        columns["t_overlap_after"] = t_overlap(candidate_words, partner_words)
    return pd.DataFrame(columns)


def mean_recovery(
    tables: Mapping[Hashable, pd.DataFrame],
    by: str = "candidate",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Average several tables of :func:`recovery` over their concepts, with intervals.

    Use it to compare candidates, layers, training steps or numbers of concepts in one table.
    Intervals are those of the bootstrap, which resamples the concepts.

    Parameters
    ----------
    tables : mapping of DataFrame
        Tables of :func:`recovery`, by a number or name of your own.
    by : str
        The name of the column that holds these numbers or names; by default "candidate".
    level : float
        The level of the intervals, between 0 and 1; by default 0.95.
    seed : int
        Of the resamples.

    Returns
    -------
    pd.DataFrame
        One row a table and measure. Columns ``by``, measure, value, low, high, n (concepts).
        Measures are cosine_before, cosine_after, cosine_gain (after - before, concept by concept)
        and, where there are words, t_overlap in the same three.

    Raises
    ------
    InputError
        If there are no tables. If a table has fewer than two concepts.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.shift import mean_recovery
    >>> table = pd.DataFrame({"cosine_before": [0.5, 0.7, 0.6], "cosine_after": [0.9, 0.8, 1.0]})
    >>> averages = mean_recovery({24: table}, by="layer")
    >>> list(averages)
    ['layer', 'measure', 'value', 'low', 'high', 'n']
    >>> averages["measure"].tolist()
    ['cosine_before', 'cosine_after', 'cosine_gain']
    >>> averages["value"].round(2).tolist()
    [0.6, 0.9, 0.3]
    """
    if not tables:
        raise InputError("there are no tables", "give at least one of recovery")
    rows = []
    for key, table in tables.items():
        for kind in ("cosine", "t_overlap"):
            if f"{kind}_after" not in table:
                continue
            before = table[f"{kind}_before"]
            after = table[f"{kind}_after"]
            measures = {"before": before, "after": after, "gain": after - before}
            for measure, values in measures.items():
                estimate = bootstrap(values, level=level, seed=seed)
                rows.append({by: key, "measure": f"{kind}_{measure}"} | estimate.asdict())
    return pd.DataFrame(rows)


def recovery_curve(
    shifts: Mapping[str, Float[Array, "k d"]],
    tuned: Float[Array, "m _"],
    original: Float[Array, "j _"],
    alphas: Iterable[float | int] = (1.0,),
    words: Words | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Measure recovery by :math:`u_k^a + \alpha \Delta_k` for several shifts and strengths.

    Use it to compare the shift vectors with their baselines:
    ``{"shifted": shift_vectors(...)} | null_shifts(...)``.

    Parameters
    ----------
    shifts : mapping of array or tensor (k, d)
        Shifts of the concepts, by name.
    tuned : array or tensor (k, d)
        Concepts of the fine-tuned model.
    original : array or tensor (k, d)
        Concepts of the original model, which are moved.
    alphas : iterable of float
        The strengths :math:`\alpha`; by default 1 alone, the paper's.
    words : callable, optional
        A function of concepts (k, d) that returns their lists of words, called once for ``tuned``
        and ``original``. None (the default) leaves T-Overlap out.
    level : float
        The level of the intervals, between 0 and 1; by default 0.95.
    seed : int
        Of the resamples.

    Returns
    -------
    pd.DataFrame
        One row a shift, strength and measure. Columns shift, alpha, measure, value, low, high, n,
        as in :func:`mean_recovery`.

    Raises
    ------
    InputError
        If there are no shifts or alphas, or an alpha is not a finite number. If concepts or shifts
        are not finite, or differ in width or number. If a concept has no words. If there are fewer
        than two concepts.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.shift import recovery_curve
    >>> original = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> tuned = np.array([[1.0, 1.0], [0.0, 1.0]])
    >>> table = recovery_curve({"shifted": tuned - original}, tuned, original, alphas=(0.0, 1.0))
    >>> after = table[table["measure"] == "cosine_after"]
    >>> after["alpha"].tolist()
    [0.0, 1.0]
    >>> after["value"].round(2).tolist()
    [0.85, 1.0]
    """
    strengths = list(alphas)
    if not shifts or not strengths:
        raise InputError(
            f"{len(shifts)} shifts and {len(strengths)} alphas", "give at least one of each"
        )
    if words is not None:
        of_tuned = words(_as_float64(tuned))
        of_original = words(_as_float64(original))
    parts = []
    for name, shift in shifts.items():
        tables = {}
        for alpha in strengths:
            candidates = shifted(original, shift, alpha)
            lists = None
            if words is not None:
                lists = (words(candidates), of_tuned, of_original)
            tables[float(alpha)] = recovery(candidates, tuned, original, lists)
        means = mean_recovery(tables, "alpha", level, seed)
        parts.append(means.assign(shift=name))
    table = pd.concat(parts, ignore_index=True)
    return table[["shift", *table.columns.drop("shift")]]


def _partners(concepts: Float[Array, "k d"], others: Float[Array, "m _"]) -> Int[np.ndarray, "_"]:
    """The row of others that goes with each concept, one to one."""
    advice = "fit equally many, or match with method='argmax'"
    require_equal("numbers of concepts", len(concepts), len(others), advice)
    return np.array(match_concepts(concepts, others)["b"])


def _words_in_order(words: WordLists, order: Int[np.ndarray, "k"]) -> list:
    """The lists of words of some concepts, by number."""
    require_same_length(words=words, concepts=order)
    unknown = set()
    if isinstance(words, Mapping):
        unknown = set(words) - set(range(len(order)))
    if unknown:
        raise incomparable(
            "concepts",
            sorted(unknown, key=str),
            f"0 to {len(order) - 1}",
            "number the lists as the concepts are",
        )
    return [words[int(concept)] for concept in order]


def _as_float64(concepts: Array) -> Float[np.ndarray, "k d"]:
    if isinstance(concepts, Tensor):
        return concepts.detach().double().cpu().numpy()
    return concepts.astype(np.float64, copy=False)
