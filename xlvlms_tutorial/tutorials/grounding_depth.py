"""Ask at which depth a factor is known, separated and readable.

What the chapter on grounding by depth needs around its figures: the values of a factor, a probe
that has 0 by chance, blocks with random matrices as its control, how readable a value is in the
words of concepts, and readings of concepts with and without the final norm.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.methods.concepts import as_lists, concept_words
from xlvlms_tutorial.metrics import adjusted_mutual_information
from xlvlms_tutorial.models import VLM, final_norm
from xlvlms_tutorial.tutorials.grounding import Concepts, Words, names_value
from xlvlms_tutorial.view import widgets
from xlvlms_tutorial.view.cards import Html


def repeated_values(samples: Sequence[Sample], factor: str) -> pd.Series:
    """Return the value of a factor in each sample, where two samples or more have it.

    Parameters
    ----------
    samples : sequence of Sample
        The samples.
    factor : str
        The factor, such as "action".

    Returns
    -------
    pandas.Series
        The values, by the number of the sample. Samples without one, and values of one sample only,
        are left out.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.tutorials import grounding_depth
    >>> actions = ["walking", "falling", "walking", None]
    >>> scenes = [Sample("scene", None, (), truth={"action": action}) for action in actions]
    >>> grounding_depth.repeated_values(scenes, "action").to_dict()
    {0: 'walking', 2: 'walking'}
    """
    values = pd.Series([sample.truth.get(factor) for sample in samples], dtype=object)
    return values[values.map(values.value_counts()) > 1]


def probe_above_chance(states: Float[np.ndarray, "n d"], labels: ArrayLike) -> float:
    """Fit a linear probe, and return its accuracy on held-out samples above that of a guess.

    Use it to see whether states hold a label at all, in whatever direction.

    Parameters
    ----------
    states : ndarray (n, d)
        A state a sample; each dimension is standardised.
    labels : array-like (n,)
        What the probe tells; each label occurs twice or more.

    Returns
    -------
    float
        0 for the accuracy of always guessing the most frequent label, 1 for no error; below 0 where
        a guess does better. The mean over four folds, or fewer where a label is rarer.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import grounding_depth
    >>> labels = ["left", "right"] * 8
    >>> states = np.array([[float(label == "left"), 1.0] for label in labels])
    >>> grounding_depth.probe_above_chance(states, labels)
    1.0
    """
    labels = np.asarray(labels)
    sizes = np.unique(labels, return_counts=True)[1]
    guess, folds = sizes.max() / len(labels), min(4, sizes.min())
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    hits = cross_val_score(probe, states, labels, cv=folds)
    return float((hits.mean() - guess) / (1 - guess))


@contextmanager
def random_blocks(vlm: VLM, seed: int = 0) -> Iterator[None]:
    """Draw the matrices of all blocks at random while the context lasts.

    Use it as the control of a probe: it shows what a network holds that has learnt nothing.
    Each matrix has the spread that it has in the model. Norms and biases stay.

    Parameters
    ----------
    vlm : VLM
        The model, whose weights are as before afterwards.
    seed : int, default 0
        Of the matrices.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import grounding_depth
    >>> weight = next(iter(vlm.blocks.parameters()))
    >>> before = weight.clone()
    >>> with grounding_depth.random_blocks(vlm):
    ...     print(weight.equal(before))
    False
    >>> weight.equal(before)
    True
    """
    learnt = {name: weight.cpu().clone() for name, weight in vlm.blocks.state_dict().items()}
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            for weight in vlm.blocks.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, weight.std().item())
        yield
    finally:
        vlm.blocks.load_state_dict(learnt)


def readable_share(values: ArrayLike, largest: Int[np.ndarray, "n"], words: Words) -> float:
    """Compute the share of samples whose largest concept has a word for their value.

    Use it to see whether a factor can be read off the words of concepts.

    Parameters
    ----------
    values : array-like (n,)
        The value of the factor in each sample.
    largest : ndarray (n,)
        The concept with the largest code in each sample.
    words : mapping of int to sequence of str
        The words of each concept.

    Returns
    -------
    float
        The share minus that with the concepts of other samples: 0 by chance, 1 at best.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import grounding_depth
    >>> values, words = ["falling", "walking"], {0: ["fall"], 1: ["walks"]}
    >>> grounding_depth.readable_share(values, np.array([0, 1]), words)
    1.0
    """
    values = np.asarray(values).tolist()
    named = {}
    for value in set(values):
        for concept in {int(k) for k in largest}:
            named[value, concept] = any(names_value(word, value) for word in words[concept])
    share = np.mean([named[pair] for pair in zip(values, map(int, largest), strict=True)])
    chance = np.mean([named[value, int(concept)] for value in values for concept in largest])
    return float((share - chance) / (1 - chance))


def depths_of_factor(
    values: pd.Series,
    states: Float[np.ndarray, "n d"],
    untaught: Float[np.ndarray, "n d"],
    concepts: Concepts,
    seed: int = 0,
) -> dict[str, float]:
    """Measure what the states of one layer say about a factor, in the ways that a figure compares.

    Parameters
    ----------
    values : pandas.Series
        The value of the factor in some of n samples, by their numbers.
    states, untaught : ndarray (n, d)
        States of the samples, in the model and with random blocks.
    concepts : Concepts
        The concepts of the layer, with a code a sample.
    seed : int, default 0
        Of the shuffles.

    Returns
    -------
    dict of str to float
        "known", the score of a probe; the same of its controls, "known, random blocks" and "known,
        shuffled labels" (mean of three shuffles); "separated", the adjusted mutual information of
        codes and factor; "readable", the share of samples with a word for it. Each is 0 by chance
        and 1 at best.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.concepts import KMeans
    >>> from xlvlms_tutorial.tutorials import grounding, grounding_depth
    >>> states, values = np.eye(2)[[0, 1] * 8], pd.Series(["falling", "walking"] * 8)
    >>> words = {0: ["fall"], 1: ["walks"]}
    >>> learnt = grounding.Concepts(KMeans(2), states, words, np.array([[0], [1]]))
    >>> measured = grounding_depth.depths_of_factor(values, states, 0 * states, learnt)
    >>> measured["known"], measured["readable"]
    (1.0, 1.0)
    """
    rows, labels = values.index.to_numpy(), values.to_numpy()
    deal = np.random.default_rng(seed)
    shuffled = [probe_above_chance(states[rows], deal.permutation(labels)) for _ in range(3)]
    codes = concepts.codes[rows]
    agreement = adjusted_mutual_information(codes, labels, n_resamples=100)
    return {
        "known": probe_above_chance(states[rows], labels),
        "known, random blocks": probe_above_chance(untaught[rows], labels),
        "known, shuffled labels": float(np.mean(shuffled)),
        "separated": agreement.value,
        "readable": readable_share(labels, codes.argmax(axis=1), concepts.words),
    }


def three_readings(
    vlm: VLM, components: Float[np.ndarray, "k d"], concept: int, n_words: int = 5
) -> tuple[dict[str, list[str]], int]:
    """Read the words of a concept with and without the final norm and the largest dimensions.

    Use it to see what the final norm does to the words of a direction.

    Parameters
    ----------
    vlm : VLM
        The model whose norm and unembedding read the direction.
    components : ndarray (K, d)
        All concepts of a dictionary; their mean says which dimensions are largest.
    concept : int
        The concept to read, a row of them.
    n_words : int, default 5
        How many words.

    Returns
    -------
    tuple of dict of str to list of str, and int
        The words "with the norm", "without" and "without, 3 dimensions off", where the three
        dimensions that are largest in the mean are set to zero; and the largest dimension.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import grounding_depth
    >>> components = np.ones((2, 576))
    >>> components[:, 17] = 9
    >>> words, loudest = grounding_depth.three_readings(vlm, components, 0)
    >>> list(words), loudest
    (['with the norm', 'without', 'without, 3 dimensions off'], 17)
    """
    loud = np.abs(components).mean(axis=0).argsort()[-3:]
    quiet = components.copy()
    quiet[:, loud] = 0
    ways = {
        "with the norm": (components, True),
        "without": (components, False),
        "without, 3 dimensions off": (quiet, False),
    }
    words = {}
    for name, (directions, norm) in ways.items():
        direction = directions[concept : concept + 1]
        words[name] = as_lists(concept_words(vlm, direction, n_words, norm=norm))[0]
    return words, int(loud[-1])


def norm_weights(vlm: VLM) -> Float[Tensor, "d"]:
    """Return the learnt weights of the final norm, one a dimension of the stream.

    Use it to see which dimensions are read with the opposite sign: those below 0.

    Parameters
    ----------
    vlm : VLM
        The model.

    Returns
    -------
    Tensor (d,)
        The weights, in float32.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import grounding_depth
    >>> grounding_depth.norm_weights(vlm).shape
    torch.Size([576])
    """
    return final_norm(vlm.model).weight.detach().float()


def follow_value(
    samples: Sequence[Sample], concepts: Mapping[int, Concepts], factor: str, value: str
) -> tuple[pd.DataFrame, dict[tuple[int], Html], Html]:
    """Follow one value of a factor through the layers: its concept, with pictures and words.

    Use it to see at which layer pictures and words of a concept tell a value.

    Parameters
    ----------
    samples : sequence of Sample
        The samples that all concepts were learnt from.
    concepts : mapping of int to Concepts
        The concepts of each layer.
    factor, value : str
        Such as "action" and "climbing".

    Returns
    -------
    tuple of pandas.DataFrame, dict of (int,) to Html, and Html
        A row a layer: concept, the one whose code is most correlated with the value; pictures, the
        share of its most activating samples that have the value; word, whether one of its words
        names it. Then a card for each layer, and the style that holds the cards' pictures.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.concepts import KMeans
    >>> from xlvlms_tutorial.tutorials import grounding, grounding_depth
    >>> codes, rows = np.eye(2)[[0, 1, 1, 1]], np.array([[0], [1]])
    >>> learnt = grounding.Concepts(KMeans(2), codes, {0: ["key"], 1: ["rock"]}, rows)
    >>> action = samples[1].truth["action"]
    >>> table, cards, style = grounding_depth.follow_value(samples, {5: learnt}, "action", action)
    >>> table.columns.tolist()
    ['concept', 'pictures', 'word']
    """
    holds = np.array([sample.truth.get(factor) == value for sample in samples])
    rows: list[dict] = []
    pictured: set[int] = set()
    for layer, learnt in concepts.items():
        concept = _following(learnt.codes, holds)
        best = learnt.rows[concept]
        named = any(names_value(word, value) for word in learnt.words[concept])
        share = float(holds[best].mean())
        rows.append({"layer": layer, "concept": concept, "pictures": share, "word": named})
        pictured |= set(best.tolist())
    numbers = sorted(pictured)
    images = {number: samples[number].image for number in numbers}
    alt = [samples[number].captions[0] for number in numbers]
    style, tags = widgets.thumbnails(images, size=112, alt=alt)
    cards = {}
    for row in rows:
        learnt = concepts[row["layer"]]
        pictures = [tags[number] for number in learnt.rows[row["concept"]]]
        title = f"layer {row['layer']}, concept {row['concept']}"
        facts = {f"{factor}: {value}": row["pictures"]}
        words = learnt.words[row["concept"]]
        cards[(row["layer"],)] = widgets.concept_card(title, words, pictures, facts)
    return pd.DataFrame(rows).set_index("layer"), cards, style


def _following(codes: Float[np.ndarray, "n k"], holds: ArrayLike) -> int:
    """The concept whose code is most correlated with what some samples have."""
    holds = np.asarray(holds, dtype=float)
    centred = codes - codes.mean(axis=0)
    sizes = np.linalg.norm(centred, axis=0) + 1e-9
    return int(((holds - holds.mean()) @ centred / sizes).argmax())
