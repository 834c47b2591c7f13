"""Compare dictionaries of concepts that are learnt from the same states.

For the chapters ``concepts`` and ``concept-dictionaries``.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from xlvlms_tutorial import concept_words
from xlvlms_tutorial.methods.concepts import (
    DICTIONARIES,
    RANDOM_WORD_METHODS,
    Dictionary,
    random_words,
    top_concepts,
)
from xlvlms_tutorial.metrics import (
    adjusted_mutual_information,
    names,
    reconstruction_error,
    sparsity,
    stability,
    word_overlap,
)
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.tutorials.concept_pages import labels

# The dictionaries whose fit has a seed, and those whose concept is a whole state.
SEEDED = ("semi-nmf", "k-means", "sae")
PROTOTYPES = ("k-means", "simple")
# Those whose words the claim is about, and what the paper has beside them.
COMPARED = ("simple", "pca", "k-means", "semi-nmf")


def fit(
    name: str, A: Float[Tensor, "n d"], n_components: int, penalty: float, seed: int = 0
) -> Dictionary:
    """Fit one of the five dictionaries with the settings of the chapters.

    Use it to compare them: all get the same states and the same number of concepts.

    Parameters
    ----------
    name : str
        A name in ``DICTIONARIES``.
    A : tensor (n, d)
        The states.
    n_components : int
        The number of concepts; n where there are fewer states.
    penalty : float
        The penalty of Semi-NMF; the other methods have none.
    seed : int, default 0
        Of the fit, where it has one.

    Returns
    -------
    Dictionary
        The fitted dictionary.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> concept_dictionaries.fit("k-means", torch.eye(4), n_components=2, penalty=2.0)
    KMeans(n_components=2)
    """
    settings: dict[str, object] = {"n_components": min(n_components, len(A))}
    if name == "semi-nmf":
        settings |= {"penalty": penalty, "max_iter": 5000}
    if name in SEEDED:
        settings["seed"] = seed
    return DICTIONARIES[name](**settings).fit(A)


def judge(
    vlm: VLM, dictionary: Dictionary, A: Float[Tensor, "n d"], values: ArrayLike
) -> dict[str, float]:
    """Judge a dictionary by what it explains, how sparse it is, its words and a known factor.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding gives the words.
    dictionary : Dictionary
        A fitted dictionary.
    A : tensor (n, d)
        States that it is applied to.
    values : array-like (n,)
        The value of a factor in each sample, of which the fit knew nothing.

    Returns
    -------
    dict of str to float
        ``explained``, the share of the variance; ``active``, the mean number of concepts of a
        sample (1 where the nearest one stands for it); ``agreement`` of the largest concept with
        the factor; ``overlap`` of the lists of ten words; ``two concepts``, the mean cosine of two
        different concepts, without its sign.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> A = torch.eye(2, 576).repeat(8, 1) + 0.01 * torch.eye(16, 576)
    >>> dictionary = concept_dictionaries.fit("k-means", A, n_components=2, penalty=0)
    >>> judged = concept_dictionaries.judge(vlm, dictionary, A, ["left", "right"] * 8)
    >>> judged["active"], round(judged["agreement"], 2)
    (1.0, 1.0)
    """
    Z, D = dictionary.transform(A), dictionary.components_
    is_prototype = isinstance(dictionary, tuple(DICTIONARIES[name] for name in PROTOTYPES))
    unit = D / np.linalg.norm(D, axis=1, keepdims=True)
    cosines = np.abs(unit @ unit.T).sum() / len(D) - 1
    return {
        "explained": reconstruction_error(A, dictionary.reconstruct(A)).explained_variance,
        "active": 1.0 if is_prototype else float(sparsity(Z).active),
        "agreement": adjusted_mutual_information(Z, np.asarray(values)).value,
        "overlap": float(word_overlap(concept_words(vlm, D, n=10)).mean()),
        "two concepts": float(cosines / (len(D) - 1)),
    }


def found_again(
    name: str, A: Float[Tensor, "n d"], n_components: int, penalty: float, seed: int = 0
) -> dict[str, float]:
    """Measure whether a dictionary finds the same concepts again.

    Use it to see whether concepts depend on the states alone or also on the fit.

    Parameters
    ----------
    name : str
        A name in ``DICTIONARIES``.
    A : tensor (n, d)
        The states.
    n_components : int
        The number of concepts.
    penalty : float
        The penalty of Semi-NMF.
    seed : int, default 0
        Of the fits and of the halves.

    Returns
    -------
    dict of str to float
        The mean cosine of concepts that are matched one to one: ``seeds``, over the seeds
        ``seed``, 1 and 2 (NaN for a fit without a seed); ``halves``, over two halves of the
        samples.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> A = torch.eye(2, 6).repeat(6, 1) + 0.001 * torch.eye(12, 6)
    >>> again = concept_dictionaries.found_again("k-means", A, n_components=2, penalty=0)
    >>> round(again["seeds"], 2), round(again["halves"], 2)
    (1.0, 1.0)
    """
    seeds = float("nan")
    if name in SEEDED:
        seeds = _alike([fit(name, A, n_components, penalty, s) for s in (seed, 1, 2)])
    fits = [fit(name, half, n_components, penalty, seed) for half in halves(A, seed)]
    # the sign of a principal component is arbitrary
    return {"seeds": seeds, "halves": _alike(fits, absolute=name == "pca")}


def _alike(dictionaries: Sequence[Dictionary], absolute: bool = False) -> float:
    runs = [dictionary.components_ for dictionary in dictionaries]
    return stability(runs, absolute=absolute).value


def halves(A: Float[Tensor, "n d"], seed: int = 0) -> tuple[Float[Tensor, "_ d"], ...]:
    """Split states into two halves at random.

    Parameters
    ----------
    A : tensor (n, d)
        The states.
    seed : int, default 0
        Of the order.

    Returns
    -------
    tuple of two tensors
        The halves; the first has one state more if n is odd.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> [len(half) for half in concept_dictionaries.halves(torch.eye(5))]
    [3, 2]
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(A)))
    return A[order[::2]], A[order[1::2]]


def word_overlaps(
    vlm: VLM,
    A: Float[Tensor, "n d"],
    n_components: int,
    penalty: float,
    seed: int = 0,
    mean_off: bool = False,
) -> pd.DataFrame:
    """Measure which words concepts share, for several dictionaries of the same states.

    Use it for the claim that concepts of Semi-NMF share fewer words.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding gives the words.
    A : tensor (n, d)
        The states of one token of interest.
    n_components : int
        The number of concepts.
    penalty : float
        The penalty of Semi-NMF.
    seed : int, default 0
        Of the fits and of the random words.
    mean_off : bool, default False
        Whether the mean state is subtracted: from centres and samples before their words are looked
        up, and from the states before Semi-NMF is fitted.

    Returns
    -------
    DataFrame
        The overlap of each concept (row) with the others, by dictionary (column). Without
        ``mean_off`` two columns more have words that mean nothing.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> A = torch.rand(12, 576, generator=torch.manual_seed(0))
    >>> concept_dictionaries.word_overlaps(vlm, A, 2, 0.1, mean_off=True).columns.tolist()
    ['simple', 'k-means', 'semi-nmf']
    """
    mean = A.mean(0)
    overlaps = {}
    for name in COMPARED:
        if mean_off and name == "pca":  # it takes the mean off anyway
            continue
        is_prototype = name in PROTOTYPES
        states = A - mean if mean_off and not is_prototype else A
        dictionary = fit(name, states, n_components, penalty, seed)
        offset = mean if mean_off and is_prototype else None
        words = concept_words(vlm, dictionary.components_, n=10, mean=offset)
        overlaps[name] = word_overlap(words)
    if not mean_off:
        for method in RANDOM_WORD_METHODS:
            words = random_words(vlm, min(n_components, len(A)), 10, seed, method=method)
            overlaps[f"random {method}"] = word_overlap(words)
    return pd.DataFrame(overlaps)


def cluster_table(
    vlm: VLM, centres: Dictionary, A: Float[Tensor, "n d"], values: ArrayLike
) -> pd.DataFrame:
    """Describe the clusters of k-means: what their samples are, and what their centres say.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding gives the words.
    centres : Dictionary
        A fitted k-means.
    A : tensor (n, d)
        The states.
    values : array-like (n,)
        The value of a factor in each sample.

    Returns
    -------
    DataFrame
        One row a cluster, the largest first: ``samples``; ``usual``, their most frequent value, and
        its ``share``; the ``words`` of the centre, and its ``words, mean taken off``.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> A = torch.eye(2, 576).repeat(8, 1) + 0.01 * torch.eye(16, 576)
    >>> centres = concept_dictionaries.fit("k-means", A, n_components=2, penalty=0)
    >>> concept_dictionaries.cluster_table(vlm, centres, A, ["left", "right"] * 8)["share"].tolist()
    [1.0, 1.0]
    """
    cluster = top_concepts(centres.transform(A))[:, 0]
    values = pd.Series(list(values), dtype=object)
    shares = values.groupby(cluster).value_counts(normalize=True).rename("share")
    usual = shares.groupby(level=0).head(1).reset_index(level=1)
    table = pd.DataFrame({"samples": values.groupby(cluster).size()})
    table["usual"] = usual.iloc[:, 0].astype(str)
    table["share"] = usual["share"]
    of_centres = pd.Series(labels(vlm, centres.components_, 4))
    table["words"] = of_centres.reindex(table.index)
    without = pd.Series(labels(vlm, centres.components_, 4, A.mean(0)))
    table["words, mean taken off"] = without.reindex(table.index)
    return table.sort_values("samples", ascending=False, kind="stable").rename_axis("cluster")


def named(clusters: pd.DataFrame, column: str) -> float:
    """Compute the share of clusters whose words name the usual value of their samples.

    Parameters
    ----------
    clusters : DataFrame
        A table of :func:`cluster_table`.
    column : str
        The column of words to read.

    Returns
    -------
    float
        The share, from 0 to 1.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> columns = {"usual": ["walking", "falling"], "words": ["walks, woman", "woman, lady"]}
    >>> concept_dictionaries.named(pd.DataFrame(columns), "words")
    0.5
    """
    pairs = zip(clusters["usual"], clusters[column], strict=True)
    return float(np.mean([names(words, value) for value, words in pairs]))


def semi_nmf_row(
    vlm: VLM,
    A: Float[Tensor, "n d"],
    values: ArrayLike,
    n_components: int,
    penalty: float,
    seed: int = 0,
) -> tuple[Dictionary, dict[str, float]]:
    """Fit Semi-NMF with one setting, and judge it.

    Use it for curves over the number of concepts or the penalty.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding gives the words.
    A : tensor (n, d)
        The states.
    values : array-like (n,)
        The value of a factor in each sample.
    n_components : int
        The number of concepts.
    penalty : float
        The penalty.
    seed : int, default 0
        Of the fit and of the halves.

    Returns
    -------
    tuple of Dictionary and dict of str to float
        The dictionary; what :func:`judge` says of it, its stability over ``halves`` of the
        samples, and ``active share``, the share of its concepts that a sample uses.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> A = torch.rand(12, 576, generator=torch.manual_seed(0))
    >>> _, row = concept_dictionaries.semi_nmf_row(vlm, A, list("ab") * 6, 2, 0.1)
    >>> row["active share"] == row["active"] / 2
    True
    """
    dictionary = fit("semi-nmf", A, n_components, penalty, seed)
    row = judge(vlm, dictionary, A, values)
    row["halves"] = _alike(
        [fit("semi-nmf", half, n_components, penalty, seed) for half in halves(A, seed)]
    )
    row["active share"] = row["active"] / n_components
    return dictionary, row


def comparison(judged: pd.DataFrame) -> dict[str, bool]:
    """Say which of the statements about the five dictionaries hold.

    Parameters
    ----------
    judged : DataFrame
        One row a dictionary, by its name, with the columns of :func:`judge` and
        :func:`found_again`.

    Returns
    -------
    dict of str to bool
        Whether each statement holds.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> names = ["semi-nmf", "pca", "k-means", "simple", "sae"]
    >>> columns = ["explained", "agreement", "overlap", "two concepts", "seeds", "halves"]
    >>> equal = pd.DataFrame(0.5, index=names, columns=columns)
    >>> any(concept_dictionaries.comparison(equal).values())
    False
    """
    nmf, pca, sae = (judged.loc[name] for name in ("semi-nmf", "pca", "sae"))
    kmeans, best = judged.loc["k-means"], judged["agreement"].max()
    prototypes = judged.loc[list(PROTOTYPES)]
    parts = judged.loc[["semi-nmf", "pca"]]
    # the four others explain no more than PCA can
    explained = judged["explained"].drop("pca").max()
    return {
        "PCA explains most, Semi-NMF is near it": bool(
            pca["explained"] > explained and nmf["explained"] > pca["explained"] - 0.1
        ),
        "the autoencoder explains less and its seeds disagree": bool(
            sae["explained"] < nmf["explained"] - 0.02 and sae["seeds"] < nmf["seeds"] - 0.15
        ),
        "prototypes are all alike, those of simple explain little": bool(
            prototypes["two concepts"].min() > 0.7 and judged.loc["simple", "explained"] < 0.2
        ),
        "prototypes are the most stable over halves": bool(
            prototypes["halves"].min() > parts["halves"].max()
        ),
        "Semi-NMF and PCA are far more stable than two of their concepts": bool(
            (parts["halves"] - parts["two concepts"]).min() > 0.3
        ),
        "agreement with the action does not follow the overlap": bool(
            kmeans["overlap"] > 0.4
            and pca["overlap"] < 0.1
            and kmeans["agreement"] > best - 0.2
            and pca["agreement"] < best - 0.3
        ),
    }


def trade_off(
    sizes: pd.DataFrame, strengths: pd.DataFrame, prototype_overlap: float
) -> dict[str, bool]:
    """Say which of the statements about the number of concepts and the penalty hold.

    Parameters
    ----------
    sizes : DataFrame
        One row of :func:`semi_nmf_row` for each number of concepts, in ascending order.
    strengths : DataFrame
        One row for each penalty, in ascending order. The last is beyond what anybody would use.
    prototype_overlap : float
        The overlap of the words of k-means.

    Returns
    -------
    dict of str to bool
        Whether each statement holds.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import concept_dictionaries
    >>> columns = ["explained", "halves", "agreement", "active", "overlap"]
    >>> rows = pd.DataFrame([[0.5] * 5, [0.4] * 5, [-0.2] * 5], columns=columns)
    >>> statements = concept_dictionaries.trade_off(rows, rows, prototype_overlap=0.6)
    >>> statements["at the last penalty less than nothing is explained"]
    True
    """
    first, last = sizes.iloc[0], sizes.iloc[-1]
    weak, strong = strengths.iloc[0], strengths.iloc[-2]
    return {
        "more concepts explain more and are less stable": bool(
            sizes["explained"].is_monotonic_increasing and last["halves"] < first["halves"] - 0.05
        ),
        "more concepts do not tell more of the action": bool(
            last["agreement"] < sizes["agreement"].max() + 0.05
            and last["agreement"] < first["agreement"] + 0.1
        ),
        "a larger penalty: fewer active concepts, less explained": bool(
            strong["active"] < weak["active"] and strong["explained"] < weak["explained"]
        ),
        "with a larger penalty the overlap comes near that of k-means": bool(
            strong["overlap"] > prototype_overlap - 0.1
        ),
        "at the last penalty less than nothing is explained": bool(
            strengths["explained"].iloc[-1] < 0
        ),
    }
