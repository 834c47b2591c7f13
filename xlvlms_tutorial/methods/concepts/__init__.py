r"""Concepts: every way of learning a dictionary, and what the codes say.

The ways under one name each; the codes about concepts and samples. Activations A (n, d) of one
token of interest are written as :math:`A \approx Z D` (CoX-LMM, arXiv 2406.08074): row j of D is
concept j, :math:`Z_{ij}` how much of it is in sample i.
"""

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy.typing import ArrayLike

from xlvlms_tutorial.errors import ActivationsError, SelectionError
from xlvlms_tutorial.methods.concepts.attribution import WAYS, grid, heat
from xlvlms_tutorial.methods.concepts.base import Dictionary, load_dictionary
from xlvlms_tutorial.methods.concepts.baselines import PCA, KMeans, Simple
from xlvlms_tutorial.methods.concepts.semi_nmf import SemiNMF
from xlvlms_tutorial.methods.concepts.sparse_autoencoder import TopKSAE
from xlvlms_tutorial.methods.concepts.words import REFERENCES, as_lists, random_words, words
from xlvlms_tutorial.metrics.plain import plain
from xlvlms_tutorial.text import sentence

__all__ = [
    "DICTIONARIES",
    "PCA",
    "REFERENCES",
    "WAYS",
    "Dictionary",
    "KMeans",
    "SemiNMF",
    "Simple",
    "TopKSAE",
    "as_lists",
    "grid",
    "heat",
    "load_dictionary",
    "most_activating",
    "random_words",
    "sentence",
    "top_concepts",
    "words",
]

DICTIONARIES: dict[str, type[Dictionary]] = {
    "semi-nmf": SemiNMF,
    "pca": PCA,
    "k-means": KMeans,
    "simple": Simple,
    "sae": TopKSAE,
}


def top_concepts(codes: ArrayLike, n: int = 1) -> Int[np.ndarray, "m n"]:
    r"""The n most activating concepts of each sample (m, n), from codes (m, k).

    Those of largest :math:`|Z_{ij}|`, largest first. Of equal codes the first concept is taken,
    also where all are 0 (no concept is then active).

    Raises
    ------
    ActivationsError
        If the codes are no matrix of finite numbers.
    SelectionError
        If n is not between 1 and k.
    """
    sizes = _sizes(codes)
    _within(n, sizes.shape[1], "concepts")
    return np.argsort(-sizes, axis=1, kind="stable")[:, :n]


def most_activating(codes: ArrayLike, n: int = 5) -> pd.DataFrame:
    r"""The n samples that activate each concept most, from codes (m, k).

    Columns concept, rank (from 1), row, activation. Samples are ranked by :math:`|Z_{ij}|` (X_MAS
    of the paper); ``activation`` is the code with its sign.

    Raises
    ------
    ActivationsError
        If the codes are no matrix of finite numbers.
    SelectionError
        If n is not between 1 and the number of samples.
    """
    sizes = _sizes(codes)
    _within(n, len(sizes), "samples")
    rows = np.argsort(-sizes, axis=0, kind="stable")[:n].T
    concept, rank = np.divmod(np.arange(rows.size), n)
    found = pd.DataFrame({"concept": concept, "rank": rank + 1, "row": rows.ravel()})
    return found.assign(activation=plain(codes)[rows.ravel(), concept])


def _sizes(codes: ArrayLike) -> np.ndarray:
    sizes = np.abs(np.asarray(plain(codes), dtype=float))
    if sizes.ndim != 2 or not sizes.size or not np.isfinite(sizes).all():
        told = (
            f"codes of shape {sizes.shape}, "
            f"{int((~np.isfinite(sizes)).sum())} of them NaN or infinite"
        )
        raise ActivationsError(
            told, "give one row for each sample and one column for each concept, all finite"
        )
    return sizes


def _within(n: int, most: int, what: str) -> None:
    if not 1 <= n <= most:
        raise SelectionError(f"n is {n}", f"there are {most} {what}, so give 1 to {most}")
