r"""Concepts: learn a dictionary of directions from activations, and read what each concept means.

Activations A (n, d) of one token of interest are decomposed as :math:`A \approx Z D` (CoX-LMM,
Parekh et al., 2024, arXiv 2406.08074): row j of D is concept j, and :math:`Z_{ij}` is the amount of
concept j in sample i. ``DICTIONARIES`` has every class by its name.
"""

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy.typing import ArrayLike

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts.attribution import concept_heatmap, to_grid
from xlvlms_tutorial.methods.concepts.base import Dictionary, load_dictionary
from xlvlms_tutorial.methods.concepts.baselines import PCA, KMeans, Simple
from xlvlms_tutorial.methods.concepts.semi_nmf import SemiNMF
from xlvlms_tutorial.methods.concepts.sparse_autoencoder import TopKSAE
from xlvlms_tutorial.methods.concepts.words import (
    RANDOM_WORD_METHODS,
    as_lists,
    concept_words,
    random_words,
)
from xlvlms_tutorial.metrics.plain import plain
from xlvlms_tutorial.text import sentence

__all__ = [
    "DICTIONARIES",
    "PCA",
    "RANDOM_WORD_METHODS",
    "Dictionary",
    "KMeans",
    "SemiNMF",
    "Simple",
    "TopKSAE",
    "as_lists",
    "concept_heatmap",
    "concept_words",
    "load_dictionary",
    "most_activating",
    "random_words",
    "sentence",
    "to_grid",
    "top_concepts",
]

DICTIONARIES: dict[str, type[Dictionary]] = {
    "semi-nmf": SemiNMF,
    "pca": PCA,
    "k-means": KMeans,
    "simple": Simple,
    "sae": TopKSAE,
}


def top_concepts(codes: ArrayLike, n: int = 1) -> Int[np.ndarray, "m n"]:
    r"""Rank the concepts of each sample by the size of their codes.

    Use it to explain one sample: the concepts with the largest :math:`|Z_{ij}|` contribute most to
    its activation. Of equal codes the first concept is taken, also where all are 0 (no concept is
    then active).

    Parameters
    ----------
    codes : array (m, k)
        Codes of m samples in k concepts, from ``Dictionary.transform``.
    n : int, default 1
        Number of concepts for each sample, from 1 to k.

    Returns
    -------
    array of int (m, n)
        Numbers of the concepts of each sample, the largest code first.

    Raises
    ------
    InputError
        If the codes are no matrix of finite numbers. If n is not between 1 and k.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.concepts import top_concepts
    >>> top_concepts([[0.0, -3.0, 2.0], [1.0, 0.0, 0.0]], n=2)
    array([[1, 2],
           [0, 1]])
    """
    sizes = _sizes(codes)
    _within(n, sizes.shape[1], "concepts")
    return np.argsort(-sizes, axis=1, kind="stable")[:, :n]


def most_activating(codes: ArrayLike, n: int = 5) -> pd.DataFrame:
    r"""Find the samples that activate each concept most.

    Use it to illustrate a concept by examples: these are the maximally activating samples (X_MAS)
    of CoX-LMM (Parekh et al., 2024, arXiv 2406.08074). Samples are ranked by :math:`|Z_{ij}|`.

    Parameters
    ----------
    codes : array (m, k)
        Codes of m samples in k concepts, from ``Dictionary.transform``.
    n : int, default 5
        Number of samples for each concept, from 1 to m.

    Returns
    -------
    DataFrame
        n rows for each concept, with columns ``concept``, ``rank`` (from 1), ``row`` (of the
        sample in ``codes``) and ``activation`` (the code with its sign).

    Raises
    ------
    InputError
        If the codes are no matrix of finite numbers. If n is not between 1 and the number of
        samples.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.concepts import most_activating
    >>> most_activating([[0.0, 2.0], [-3.0, 1.0], [1.0, 0.0]], n=2)
       concept  rank  row  activation
    0        0     1    1        -3.0
    1        0     2    2         1.0
    2        1     1    0         2.0
    3        1     2    1         1.0
    """
    sizes = _sizes(codes)
    _within(n, len(sizes), "samples")
    rows = np.argsort(-sizes, axis=0, kind="stable")[:n].T
    concept, rank = np.divmod(np.arange(rows.size), n)
    samples = rows.ravel()
    return pd.DataFrame(
        {
            "concept": concept,
            "rank": rank + 1,
            "row": samples,
            "activation": plain(codes)[samples, concept],
        }
    )


def _sizes(codes: ArrayLike) -> np.ndarray:
    sizes = np.abs(np.asarray(plain(codes), dtype=float))
    if sizes.ndim != 2 or not sizes.size or not np.isfinite(sizes).all():
        bad = int((~np.isfinite(sizes)).sum())
        raise InputError(
            f"codes of shape {sizes.shape}, {bad} of them NaN or infinite",
            "give one row for each sample and one column for each concept, all finite",
        )
    return sizes


def _within(n: int, maximum: int, name: str) -> None:
    if not 1 <= n <= maximum:
        raise InputError(f"n is {n}", f"there are {maximum} {name}, so give 1 to {maximum}")
