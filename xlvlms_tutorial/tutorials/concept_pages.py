"""Prepare the states of one word, and judge dictionaries of concepts that are learnt from them.

For the chapters ``concepts`` and ``concept-dictionaries``. The methods themselves are in
:mod:`xlvlms_tutorial.methods.concepts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from xlvlms_tutorial import capture, concept_words, logit_lens, mentioning
from xlvlms_tutorial.evaluation import Generator
from xlvlms_tutorial.methods.concepts import (
    Dictionary,
    as_lists,
    most_activating,
    top_concepts,
)
from xlvlms_tutorial.metrics import (
    Estimate,
    adjusted_mutual_information,
    factor_information,
    names,
    varying_factors,
)
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample
from xlvlms_tutorial.text import whole_words
from xlvlms_tutorial.view import plots
from xlvlms_tutorial.view.cards import Html, concept_card, thumbnails

# The median norm of the states for which the penalty of the chapters was set.
USUAL_NORM = 609.0
# A word is looked at if so many of its samples can be read.
MIN_SAMPLES = 12


def captions_with(
    vlm: Generator,
    samples: Sequence[Sample],
    word: str,
    max_new_tokens: int = 12,
    batch_size: int = 32,
) -> tuple[list[Sample], list[str]]:
    """Let the model caption pictures, and keep the captions that say a word, up to that word.

    Use it before :func:`~xlvlms_tutorial.capture`, which reads the states of the word in such
    captions. A state does not see what comes after it, so that the rest need not be read. Where the
    model says the word of fewer than half of the pictures, references are taken instead.

    Parameters
    ----------
    vlm : VLM or Generator
        The model.
    samples : sequence of Sample
        Pictures with captions, such as those of :func:`~xlvlms_tutorial.mentioning`.
    word : str
        The token of interest.
    max_new_tokens : int, default 12
        How many tokens of each caption are generated.
    batch_size : int, default 32
        How many pictures go through the model at once.

    Returns
    -------
    tuple of list of Sample and list of str
        The samples whose caption has the word, and these captions.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> word = samples[0].truth["subject"]
    >>> _, captions = concept_pages.captions_with(vlm, samples[:1], word, 4)
    >>> captions[0].split()[-1] == word
    True
    """
    pictures = [sample.image for sample in samples]
    prompts = [PROMPTS["image"]] * len(samples)
    generated = vlm.generate(
        pictures, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=False
    )
    selected, captions = _up_to(word, samples, generated)
    if len(selected) < len(samples) / 2:
        references = ["\n".join(sample.captions) for sample in samples]
        selected, captions = _up_to(word, samples, references)
    return selected, captions


def _up_to(
    word: str, samples: Sequence[Sample], texts: Sequence[str]
) -> tuple[list[Sample], list[str]]:
    pattern = whole_words([word])
    selected, captions = [], []
    for sample, text in zip(samples, texts, strict=True):
        match = pattern.search(text)
        if match:
            selected.append(sample)
            captions.append(text[: match.end()].rpartition("\n")[2])
    return selected, captions


def states_of_words(
    vlm: VLM, samples: Sequence[Sample], words: Sequence[str], layer: int, n: int
) -> dict[str, tuple[Float[Tensor, "m d"], pd.DataFrame]]:
    """Read the states that predict each of several words in reference captions.

    Use it for more tokens of interest than one: the captions are read and not generated. A sample
    is kept where the word is the model's own choice, too; of a word that the model would choose
    fewer than twelve times all samples are kept. Words with fewer samples than that are left out.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Pictures with reference captions and known factors.
    words : sequence of str
        The words.
    layer : int
        The layer to read.
    n : int
        How many samples of each word are read at most.

    Returns
    -------
    dict of str to tuple of tensor (m, d) and DataFrame
        For each word its m states in double precision, and the factors of their pictures.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> some = load_samples("scenes", n=120)
    >>> states = concept_pages.states_of_words(vlm, some, ["woman"], 30, 12)
    >>> A, truth = states["woman"]
    >>> A.shape, truth["subject"].unique().tolist()
    (torch.Size([12, 576]), ['woman'])
    """
    first = [replace(sample, captions=sample.captions[:1]) for sample in samples]
    states = {}
    for word in words:
        selection = mentioning(first, word, n)
        selection, captions = _up_to(word, selection, [sample.captions[0] for sample in selection])
        read = capture(vlm, selection, [layer], words=word, answers=captions)
        top = logit_lens.top_tokens(vlm, read[layer], 1)["word"]
        own_choice = (top.str.strip() == word).to_numpy()
        if own_choice.sum() >= MIN_SAMPLES:
            read = read.select(own_choice)
        if len(read[layer]) >= MIN_SAMPLES:
            truth = pd.DataFrame([selection[k].truth for k in read.table["sample"]])
            states[word] = read[layer].double(), truth
    return states


def scaled_penalty(penalty: float, A: Float[Tensor, "n d"]) -> float:
    """Scale a penalty of Semi-NMF with the norm of the states that it is used on.

    Use it to carry a penalty over to another model or layer: it is in units of the states.

    Parameters
    ----------
    penalty : float
        The penalty for states of the usual norm here, which is 609.
    A : tensor (n, d)
        The states.

    Returns
    -------
    float
        The penalty times the ratio of the norms, rounded to two digits.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> concept_pages.scaled_penalty(2.0, 60.9 * torch.eye(3))
    0.2
    """
    ratio = float(A.norm(dim=1).median()) / USUAL_NORM
    return penalty * float(f"{ratio:.2g}")


def concept_table(
    vlm: VLM, dictionary: Dictionary, A: Float[Tensor, "n d"], n_words: int = 5
) -> pd.DataFrame:
    """Describe each concept in a line: its words, how often it is active, where it points.

    Use it for a first look at a dictionary.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding gives the words.
    dictionary : Dictionary
        A fitted dictionary.
    A : tensor (n, d)
        States that it is applied to.
    n_words : int, default 5
        How many words of each concept are listed.

    Returns
    -------
    DataFrame
        One row a concept, by its number: ``words``; ``top in``, the number of samples whose largest
        code it has; ``active``, the share of samples whose code is not 0; ``cosine with mean``, of
        the concept and the mean state. Concepts that are on top most often come first.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.concepts import SemiNMF
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> A = torch.rand(12, 576, generator=torch.manual_seed(0))
    >>> dictionary = SemiNMF(3, penalty=0.1).fit(A)
    >>> concept_pages.concept_table(vlm, dictionary, A)["top in"].sum()
    np.int64(12)
    """
    D, Z = dictionary.components_, dictionary.transform(A)
    mean = A.mean(0).numpy()
    norms = np.linalg.norm(D, axis=1) * np.linalg.norm(mean)
    columns = {
        "words": labels(vlm, D, n_words),
        "top in": np.bincount(top_concepts(Z)[:, 0], minlength=len(D)),
        "active": (Z > 0).mean(0),
        "cosine with mean": D @ mean / norms,
    }
    table = pd.DataFrame(columns).rename_axis("concept")
    return table.sort_values("top in", ascending=False, kind="stable")


def labels(
    vlm: VLM,
    D: Float[np.ndarray, "k d"],
    n_words: int = 3,
    mean: Float[Tensor, "d"] | None = None,
) -> list[str]:
    """Write the words of each concept in a line, to tell concepts apart.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding gives the words.
    D : array (k, d)
        The concepts.
    n_words : int, default 3
        How many words of each.
    mean : tensor (d,), optional
        A state that is subtracted from each concept first, such as the mean state.

    Returns
    -------
    list of str
        The words of each concept, separated by commas.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> [label.count(",") for label in concept_pages.labels(vlm, np.eye(2, 576))]
    [2, 2]
    """
    lists = as_lists(concept_words(vlm, D, n=n_words, mean=mean)).values()
    return [", ".join(words) for words in lists]


def concept_figure(
    images: Sequence[Image.Image],
    codes: Float[np.ndarray, "n k"],
    names_of: Mapping[int, str],
    n: int = 4,
) -> Figure:
    """Draw the pictures with the largest codes of some concepts, a row for each.

    Use it to see what a concept stands for: its words may not say it.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        The n pictures.
    codes : array (n, k)
        How active each concept is in each of them.
    names_of : mapping of int to str
        The concepts to draw, and what stands above the pictures of each.
    n : int, default 4
        How many pictures a row has.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> from xlvlms_tutorial.view import plots
    >>> images = [sample.image for sample in samples]
    >>> figure = concept_pages.concept_figure(images, np.eye(4), {2: "a name"}, n=1)
    >>> figure.subfigs[0].get_suptitle()
    'a name'
    >>> plots.png(figure)[1:4]  # also closes the figure
    b'PNG'
    """
    plots.theme()
    columns = min(n, len(images))
    strongest = most_activating(codes, columns).set_index("concept")["row"]
    height = 6.8 / columns * 1.2 * len(names_of)
    figure = plt.figure(figsize=(6.8, height), layout="constrained")
    # a name is longer than a picture is wide: it is the title of a row
    parts = figure.subfigures(len(names_of), 1, squeeze=False)[:, 0]
    for part, (concept, name) in zip(parts, names_of.items(), strict=True):
        part.suptitle(plots.literal(name), x=0.01, ha="left", fontsize="medium")
        axes = part.subplots(1, columns, squeeze=False)[0]
        for ax, picture in zip(axes, strongest.loc[[concept]], strict=True):
            ax.imshow(images[picture])
            ax.set_axis_off()
    return figure


def concept_frames(
    vlm: VLM,
    images: Sequence[Image.Image],
    dictionary: Dictionary,
    A: Float[Tensor, "n d"],
    values: ArrayLike,
    n: int = 6,
) -> tuple[dict[tuple[int], Html], Html]:
    """Make a card of each concept: words, pictures, and what these pictures have in common.

    Use it for :func:`~xlvlms_tutorial.view.widgets.explorer`.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding gives the words.
    images : sequence of PIL.Image.Image
        The n pictures.
    dictionary : Dictionary
        A fitted dictionary.
    A : tensor (n, d)
        The states of these pictures.
    values : array-like (n,)
        The value of a factor in each picture.
    n : int, default 6
        How many pictures each card shows.

    Returns
    -------
    tuple of dict and Html
        A card for each concept, the one that is on top most often first, by ``(number,)``; and the
        style that they need.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.concepts import SemiNMF
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> A = torch.rand(4, 576, generator=torch.manual_seed(0))
    >>> dictionary = SemiNMF(2, penalty=0.1).fit(A)
    >>> images = [sample.image for sample in samples]
    >>> frames, _ = concept_pages.concept_frames(vlm, images, dictionary, A, list("aabb"))
    >>> sorted(frames)
    [(0,), (1,)]
    """
    style, tags = thumbnails(images)
    values = pd.Series(list(values), dtype=object)
    table = concept_table(vlm, dictionary, A, n_words=8)
    strongest = most_activating(dictionary.transform(A), min(n, len(images))).set_index("concept")
    frames = {}
    for number, row in table.iterrows():
        pictures = strongest.loc[[number], "row"]
        shares = values.iloc[pictures].value_counts(normalize=True)
        facts = {str(value): float(share) for value, share in shares.items()}
        frames[int(number),] = concept_card(
            f"concept {number}",
            row["words"].split(", "),
            [tags[picture] for picture in pictures],
            facts,
            f"on top in {row['top in']} of {len(A)} samples",
        )
    return frames, style


def agreements(
    codes: Float[np.ndarray, "n k"], truth: pd.DataFrame, seed: int = 0
) -> dict[str, Estimate]:
    """Estimate how far the largest concept of a sample follows each known factor.

    Parameters
    ----------
    codes : array (n, k)
        How active each concept is in each sample.
    truth : DataFrame
        The factors of these samples.
    seed : int, default 0
        Of the intervals.

    Returns
    -------
    dict of str to Estimate
        The adjusted mutual information for each factor that varies: 0 by chance, 1 where either
        gives the other.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> truth = pd.DataFrame({"side": ["left", "right"] * 20, "sky": ["blue"] * 40})
    >>> agreed = concept_pages.agreements(np.tile(np.eye(2), (20, 1)), truth)
    >>> {factor: str(estimate) for factor, estimate in agreed.items()}
    {'side': '1.00 [1.00, 1.00]'}
    """
    agreed = {}
    for factor, values in varying_factors(truth).items():
        agreed[str(factor)] = adjusted_mutual_information(codes, values.to_numpy(), seed=seed)
    return agreed


def tracked(
    vlm: VLM, dictionary: Dictionary, A: Float[Tensor, "n d"], truth: pd.DataFrame, seed: int = 0
) -> pd.DataFrame:
    """List how much each concept tells about each factor, the strongest first.

    Use it to look at each concept, where :func:`agreements` looks at the largest one alone.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding gives the words.
    dictionary : Dictionary
        A fitted dictionary.
    A : tensor (n, d)
        The states.
    truth : DataFrame
        The factors of their pictures.
    seed : int, default 0
        Of the permutations.

    Returns
    -------
    DataFrame
        The rows of :func:`~xlvlms_tutorial.metrics.factor_information` with the first words of each
        concept. Rows that remain after correction for the number of questions (``p_adjusted`` below
        0.05) come first, those with the largest share on top.

    Examples
    --------
    >>> import torch
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.concepts import KMeans
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> A = torch.eye(2, 576).repeat(20, 1) + 0.01 * torch.eye(40, 576)
    >>> dictionary = KMeans(2).fit(A)
    >>> truth = pd.DataFrame({"side": ["left", "right"] * 20})
    >>> concept_pages.tracked(vlm, dictionary, A, truth)["factor"].tolist()
    ['side', 'side']
    """
    table = factor_information(dictionary.transform(A), varying_factors(truth), seed=seed)
    words = pd.Series(labels(vlm, dictionary.components_))
    table = table.assign(words=table["concept"].map(words))
    order = np.lexsort((-table["share"], table["p_adjusted"] >= 0.05))
    return table.iloc[order].reset_index(drop=True)


def truth_map(table: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """Arrange what concepts tell about factors as a map, grouped by the factor they tell most.

    Parameters
    ----------
    table : DataFrame
        Rows of :func:`tracked`, such as those that are significant.
    factors : sequence of str
        The factors in the order of the columns.

    Returns
    -------
    DataFrame
        The share of each factor (column) that each concept (row, by its words) tells; NaN where
        there is no such row.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> rows = {"concept": [0, 1], "words": ["snow", "walk"], "factor": ["place", "action"]}
    >>> table = pd.DataFrame(rows | {"share": [0.3, 0.2]})
    >>> concept_pages.truth_map(table, ["action", "place"]).index.tolist()
    ['walk', 'snow']
    """
    shares = table.pivot_table(values="share", index=["concept", "words"], columns="factor")
    shares = shares.droplevel("concept")
    shares = shares[[factor for factor in factors if factor in shares]]
    if len(shares):
        top = shares.columns.get_indexer(shares.idxmax(axis=1))
        shares = shares.iloc[np.lexsort((-shares.max(axis=1), top))]
    return shares.rename_axis(index=None, columns=None)


def purity(codes: Float[np.ndarray, "n k"], values: ArrayLike, n: int) -> Float[np.ndarray, "k"]:
    """Compute how far the pictures of each concept agree on a factor.

    Parameters
    ----------
    codes : array (m, k)
        How active each concept is in each of m samples.
    values : array-like (m,)
        The value of a factor in each sample.
    n : int
        How many samples with the largest codes are looked at.

    Returns
    -------
    array (k,)
        The share of these samples that have their most frequent value.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> codes = np.array([[3.0, 0.0], [2.0, 1.0], [0.0, 2.0]])
    >>> concept_pages.purity(codes, ["walks", "walks", "falls"], n=2).tolist()
    [1.0, 0.5]
    """
    values = np.asarray(values, dtype=object)
    strongest = most_activating(codes, min(n, len(codes)))
    shares = []
    for _, rows in strongest.groupby("concept")["row"]:
        shares.append(pd.Series(values[rows]).value_counts(normalize=True).iloc[0])
    return np.array(shares, dtype=float)


def naming(texts: Sequence[str], values: Sequence[object]) -> float:
    """Compute the share of texts that name one of some values.

    Use it to say whether lists of words are about a factor.

    Parameters
    ----------
    texts : sequence of str
        The texts, such as lists of words in a line.
    values : sequence
        The values: any of them counts, in any form ("walks" names "walking").

    Returns
    -------
    float
        The share, from 0 to 1.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import concept_pages
    >>> concept_pages.naming(["walks, woman", "lady, man"], ["walking", "falling"])
    0.5
    """
    named = [any(names(text, str(value)) for value in values) for text in texts]
    return float(np.mean(named))
