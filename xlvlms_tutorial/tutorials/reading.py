"""Ask what each image token says, by several read-outs, and whether that is what its cell holds.

For the chapter ``reading``. The read-outs are those of :mod:`xlvlms_tutorial.methods.logit_lens`.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from PIL import Image

from xlvlms_tutorial.activations import Activations
from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.logit_lens import ContextualNeighbours, Reader
from xlvlms_tutorial.metrics import Estimate, difference
from xlvlms_tutorial.text import forms, whole_words, words
from xlvlms_tutorial.tutorials.vocabulary import word_frame
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view.cards import Html

# Sentences that have nothing to do with the world, so that other words can be neighbours too.
GENERAL = (
    "The cat sleeps on a warm chair by the window.",
    "A dog runs after the ball in the park.",
    "My sister reads a long book about ships.",
    "The train leaves the station at nine in the morning.",
    "We eat bread and cheese under an old tree.",
    "Dark clouds hide the sun, and the rain begins.",
    "The moon and the stars light up the night sky.",
    "A tall ladder leans against the wall of the house.",
    "The teacher writes a number on the board.",
    "They sell apples, milk and fresh fish at the market.",
    "A small boat crosses the lake in the evening.",
    "The doctor washes her hands before she eats.",
    "Our car stops in front of the yellow door.",
    "He plays the piano while the children sing.",
    "The river is wide and the water is cold.",
    "An orange square hangs above a black circle.",
    "The king wears a heavy crown of gold.",
    "She opens the letter and laughs out loud.",
    "Two birds build a nest on the roof.",
    "The bridge was closed because of the wind.",
    "A white horse jumps over a wooden fence.",
    "The phone rings, but nobody answers it.",
    "In winter the street is quiet and empty.",
    "The soldier carries a sword and a shield.",
    "This machine cuts paper into thin strips.",
    "The blue sky is reflected in the glass.",
    "A flower grows between the stones of the path.",
    "He paints the floor of the kitchen grey.",
    "The pattern on the carpet is made of lines.",
    "An edge of the table is broken.",
    "The fire in the corner gives a soft light.",
    "Nothing is left on the plate.",
)
# The two words of a token of text that a read-out may name.
WORDS = ("its word", "the next word")


class Truth(NamedTuple):
    """Hold what is right for each of n tokens: words, with the token's picture and cell.

    Parameters
    ----------
    right : array of bool (n, words)
        Which words name what the token stands for.
    pictures, cells : array of int (n,)
        The picture of each token, and its place in it.
    """

    right: Bool[np.ndarray, "n words"]
    pictures: Int[np.ndarray, "n"]
    cells: Int[np.ndarray, "n"]


def sentences(dataset: str, n: int, seed: int = 0) -> list[str]:
    """Collect sentences that have a dataset's words in context, and general ones.

    Parameters
    ----------
    dataset : str
        The dataset; captions of its training split are taken, one a picture.
    n : int
        How many captions.
    seed : int, default 0
        Which pictures' captions.

    Returns
    -------
    list of str
        The captions, then the sentences of ``GENERAL``.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import reading
    >>> len(reading.sentences("scenes", 3)) - len(reading.GENERAL)
    3
    """
    captions = []
    for number, sample in enumerate(load_samples(dataset, n=n, split="train", seed=seed)):
        if sample.captions:  # other wordings in turn
            captions.append(sample.captions[number % len(sample.captions)])
    return [*captions, *GENERAL]


def candidate_words(
    readers: Mapping[str, Reader], samples: Sequence[Sample], n_words: int = 40
) -> dict[str, list[str]]:
    """Choose the words that all read-outs choose from: those for what is known to be somewhere.

    Parameters
    ----------
    readers : mapping of str to Reader
        The read-outs; each has to be able to read each word.
    samples : sequence of Sample
        The pictures. Where no region of theirs can be read, words of their captions are taken.
    n_words : int, default 40
        How many words at most, the most frequent.

    Returns
    -------
    dict of str to list of str
        The forms of each word ("key", "keys") that stand in the index of contextual neighbours, in
        alphabetical order of the words.

    Examples
    --------
    >>> from xlvlms_tutorial import logit_lens
    >>> from xlvlms_tutorial.tutorials import reading
    >>> readers = logit_lens.readers(vlm, samples[0].captions, [0])
    >>> sorted(reading.candidate_words(readers, samples[:1])) == sorted(samples[0].regions())
    True
    """
    counts: Counter[str] = Counter()
    for sample in samples:
        counts.update(list(sample.regions()) if sample.regions else [])
    result = _readable(readers, counts, n_words)
    if len(result) < 2:
        counts = Counter()
        for sample in samples:
            counts.update({word for caption in sample.captions for word in words(caption)})
        result = _readable(readers, counts, n_words)
    require(len(result) > 1, "no two words can be read", "give sentences with the world's words")
    return dict(sorted(result.items()))


def _readable(
    readers: Mapping[str, Reader], counts: Counter[str], n_words: int
) -> dict[str, list[str]]:
    index = [reader for reader in readers.values() if isinstance(reader, ContextualNeighbours)]
    result: dict[str, list[str]] = {}
    for word, _ in counts.most_common():
        present = []
        for form in forms(word):
            if all(reader.has(form) for reader in index) and _spelt(readers, form):
                present.append(form)
        if present and len(result) < n_words:
            result[word] = present
    return result


def _spelt(readers: Mapping[str, Reader], form: str) -> bool:
    try:
        for reader in readers.values():
            reader.pieces(form)
    except InputError:
        return False
    return True


def cell_truth(
    samples: Sequence[Sample], candidates: Iterable[str], n_cells: int, min_share: float = 0.1
) -> Bool[np.ndarray, "n cells words"]:
    """Tell what lies in each cell of each picture.

    Parameters
    ----------
    samples : sequence of Sample
        The n pictures.
    candidates : iterable of str
        The words.
    n_cells : int
        The number of image tokens. Cells are those of the squarest grid, row by row.
    min_share : float, default 0.1
        The share of a cell's pixels that something has to cover to lie in it.

    Returns
    -------
    array of bool (n, cells, words)
        Whether the cell holds what the word names. Where nothing says where things are, each cell
        holds whatever a caption names.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import reading
    >>> place = samples[0].truth["place"]
    >>> reading.cell_truth(samples[:1], [place], 16)[0, :, 0].reshape(4, 4).any(axis=1).tolist()
    [False, False, False, True]
    """
    candidates = list(candidates)
    rows = max(size for size in range(1, int(n_cells**0.5) + 1) if n_cells % size == 0)
    truth = np.zeros((len(samples), n_cells, len(candidates)), dtype=bool)
    for number, sample in enumerate(samples):
        masks = sample.regions() if sample.regions else {}
        present = [word for word in candidates if word in masks]
        for word in present:
            shares = _cell_shares(masks[word], rows, n_cells // rows)
            truth[number, :, candidates.index(word)] = shares >= min_share
        if not present:
            text = " ".join(sample.captions)
            for column, word in enumerate(candidates):
                truth[number, :, column] = bool(whole_words(forms(word)).search(text))
    return truth


def token_truth(
    states: Activations,
    samples: Sequence[Sample],
    candidates: Iterable[str],
    min_share: float = 0.1,
) -> Truth:
    """Tell what lies in the cell of each image token.

    Parameters
    ----------
    states : Activations
        Image tokens of all pictures (``reduce=None``), row by row of each picture.
    samples : sequence of Sample
        The pictures.
    candidates : iterable of str
        The words.
    min_share : float, default 0.1
        Of :func:`cell_truth`.

    Returns
    -------
    Truth
        What is right for each token.

    Examples
    --------
    >>> from xlvlms_tutorial import capture
    >>> from xlvlms_tutorial.tutorials import reading
    >>> states = capture(vlm, samples[:2], 0, span="image", reduce=None)
    >>> truth = reading.token_truth(states, samples[:2], [samples[0].truth["place"]])
    >>> truth.right.shape, truth.pictures[[0, -1]].tolist(), truth.cells.max()
    ((32, 1), [0, 1], np.int64(15))
    """
    candidates = list(candidates)
    groups = states.table.groupby("sample")
    parts = []
    for number, rows in groups:
        parts.append(cell_truth([samples[number]], candidates, len(rows), min_share)[0])
    pictures = states.table["sample"].to_numpy()
    return Truth(np.concatenate(parts), pictures, groups.cumcount().to_numpy())


def _cell_shares(
    mask: Bool[np.ndarray, "height width"], rows: int, columns: int
) -> Float[np.ndarray, "cells"]:
    """The share of each cell that a mask covers."""
    shares = []
    for strip in np.array_split(mask, rows, axis=0):
        for cell in np.array_split(strip, columns, axis=1):
            shares.append(cell.mean() if cell.size else 0.0)
    return np.array(shares)


def scores_of(
    readers: Mapping[str, Reader], states: Activations, candidates: Mapping[str, Sequence[str]]
) -> dict[tuple[str, int], Float[np.ndarray, "n words"]]:
    """Score the candidate words for each state, by each read-out, at each layer.

    Parameters
    ----------
    readers : mapping of str to Reader
        The read-outs by name.
    states : Activations
        States (n, d) at several layers.
    candidates : mapping of str to sequence of str
        The words with their forms.

    Returns
    -------
    dict of (str, int) to array (n, words)
        Scores by read-out and layer.

    Examples
    --------
    >>> from xlvlms_tutorial import capture, logit_lens
    >>> from xlvlms_tutorial.tutorials import reading
    >>> states = capture(vlm, samples[:1], [0, 16], span="image", reduce=None)
    >>> lens = {"embedding lens": logit_lens.EmbeddingLens(vlm)}
    >>> scores = reading.scores_of(lens, states, {"frog": ["frog"], "sand": ["sand"]})
    >>> scores["embedding lens", 16].shape
    (16, 2)
    """
    result = {}
    for name, reader in readers.items():
        for layer in states.layers:
            result[name, layer] = reader.read(states[layer], layer, candidates).numpy()
    return result


def standardised(
    scores: Mapping[Hashable, Float[np.ndarray, "n words"]],
    reference: Mapping[Hashable, Float[np.ndarray, "m words"]],
) -> dict[Hashable, Float[np.ndarray, "n words"]]:
    """Remove from each word what it scores on other pictures anyway.

    Use it to see whether a read-out is blind, or only prefers some words.

    Parameters
    ----------
    scores : mapping to array (n, words)
        Scores, as of :func:`scores_of`.
    reference : mapping to array (m, words)
        Scores of the same words on other pictures.

    Returns
    -------
    dict to array (n, words)
        Scores minus the word's mean, over its deviation.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import reading
    >>> reference = {"lens": np.array([[1.0, 5.0], [3.0, 5.5]])}
    >>> reading.standardised({"lens": np.array([[4.0, 5.0]])}, reference)["lens"].round(1).tolist()
    [[2.0, -1.0]]
    """
    result = {}
    for key, values in scores.items():
        spread = reference[key].std(axis=0) + 1e-6
        result[key] = (values - reference[key].mean(axis=0)) / spread
    return result


def judged(
    scores: Mapping[tuple[str, int], Float[np.ndarray, "n words"]],
    truth: Truth,
) -> pd.DataFrame:
    """Compare the first word of each token with what its cell holds, and with what others hold.

    Parameters
    ----------
    scores : mapping of (str, int) to array (n, words)
        Scores of the candidate words by read-out and layer.
    truth : Truth
        What is right for each token. Tokens for which nothing is right are left out.

    Returns
    -------
    DataFrame
        One row for each read-out, layer and token: ``reader``, ``layer``, ``token``, ``picture``,
        the number of the first ``word``, whether it is ``right``, the share of other pictures for
        which it would be right in the same cell (``shuffled``), the share of other cells of the
        picture for which it would be (``elsewhere``), and the share of the right words among the
        first three (``recalled``).

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import reading
    >>> right = np.array([[True, False], [False, True], [True, False]])
    >>> truth = reading.Truth(right, np.arange(3), np.zeros(3, dtype=int))
    >>> scores = {("lens", 0): np.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])}
    >>> table = reading.judged(scores, truth)
    >>> table["right"].tolist(), table["shuffled"].tolist()
    ([1.0, 0.0, 1.0], [0.5, 1.0, 0.5])
    """
    readable = np.flatnonzero(truth.right.any(axis=1))
    require(len(readable), "no token has a right word", "give candidates that name what is there")
    right_words, rows = truth.right[readable], np.arange(len(readable))
    shuffled = _others(right_words, truth.cells[readable])
    elsewhere = _others(right_words, truth.pictures[readable])
    parts = []
    for (reader, layer), values in scores.items():
        order = np.argsort(-values[readable], axis=1, kind="stable")
        first = order[:, 0]
        among = np.take_along_axis(right_words, order[:, :3], axis=1).sum(axis=1)
        parts.append(
            pd.DataFrame(
                {
                    "reader": reader,
                    "layer": layer,
                    "token": readable,
                    "picture": truth.pictures[readable],
                    "word": first,
                    "right": right_words[rows, first].astype(float),
                    "shuffled": shuffled[rows, first],
                    "elsewhere": elsewhere[rows, first],
                    "recalled": among / right_words.sum(axis=1),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _others(
    truth: Bool[np.ndarray, "n words"], groups: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n words"]:
    """For each row, the share of the other rows of its group for which a word is right."""
    _, codes = np.unique(groups, return_inverse=True)
    sums = np.zeros((codes.max() + 1, truth.shape[1]))
    np.add.at(sums, codes, truth)
    others = np.bincount(codes)[codes] - 1
    return (sums[codes] - truth) / np.maximum(others, 1)[:, None]


def excess(
    table: pd.DataFrame, baseline: str = "shuffled", n_resamples: int = 500, seed: int = 0
) -> dict[tuple[str, int], Estimate]:
    """Estimate how much more often first words are right than a baseline, with intervals.

    Parameters
    ----------
    table : DataFrame
        Of :func:`judged`.
    baseline : {"shuffled", "elsewhere"}, default "shuffled"
        Shuffled cells, or other cells of the same picture.
    n_resamples : int, default 500
        How often pictures are drawn again.
    seed : int, default 0
        Of the draws.

    Returns
    -------
    dict of (str, int) to Estimate
        The difference of the two shares by read-out and layer, with an interval over pictures.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import reading
    >>> columns = {"reader": "lens", "layer": 0, "picture": [0, 1], "right": 1.0, "shuffled": 0.5}
    >>> round(reading.excess(pd.DataFrame(columns))["lens", 0].value, 2)
    0.5
    """
    result = {}
    for key, part in table.groupby(["reader", "layer"], sort=False):
        result[key] = difference(
            part["right"],
            part[baseline],
            groups_a=part["picture"].to_numpy(),
            paired=True,
            n_resamples=n_resamples,
            seed=seed,
        )
    return result


def best_layers(table: pd.DataFrame) -> dict[str, int]:
    """Choose for each read-out the layer at which it exceeds shuffled cells most.

    Parameters
    ----------
    table : DataFrame
        Of :func:`judged`, of validation pictures.

    Returns
    -------
    dict of str to int
        The layer by read-out.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import reading
    >>> columns = {"reader": "lens", "layer": [0, 8], "right": [0.1, 0.4], "shuffled": 0.1}
    >>> reading.best_layers(pd.DataFrame(columns))
    {'lens': 8}
    """
    gain = (table["right"] - table["shuffled"]).groupby([table["reader"], table["layer"]]).mean()
    return {reader: int(part.idxmax()[1]) for reader, part in gain.groupby(level=0, sort=False)}


def at_layers(table: pd.DataFrame, layers: Mapping[str, int]) -> pd.DataFrame:
    """Take the rows of each read-out at its layer.

    Parameters
    ----------
    table : DataFrame
        Of :func:`judged`.
    layers : mapping of str to int
        The layer by read-out, as of :func:`best_layers`.

    Returns
    -------
    DataFrame
        The rows, those of each read-out in the same order of tokens.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import reading
    >>> table = pd.DataFrame({"reader": "lens", "layer": [0, 8], "right": [0.0, 1.0]})
    >>> reading.at_layers(table, {"lens": 8})["right"].tolist()
    [1.0]
    """
    parts = []
    for reader, layer in layers.items():
        parts.append(table[(table["reader"] == reader) & (table["layer"] == layer)])
    return pd.concat(parts, ignore_index=True)


def more_than(table: pd.DataFrame, first: str, second: str, seed: int = 0) -> Estimate:
    """Estimate how much more a read-out exceeds shuffled cells than a second one does.

    Parameters
    ----------
    table : DataFrame
        Of :func:`at_layers`: both read-outs with the same tokens.
    first, second : str
        The two read-outs.
    seed : int, default 0
        Of the draws.

    Returns
    -------
    Estimate
        The difference of the two excesses, with an interval over pictures.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import reading
    >>> columns = {"reader": ["a", "a", "b", "b"], "picture": [0, 1, 0, 1], "shuffled": 0.25}
    >>> table = pd.DataFrame(columns).assign(right=[1.0, 1.0, 0.5, 0.5])
    >>> reading.more_than(table, "a", "b").value
    0.5
    """
    gains = {}
    for reader in (first, second):
        part = table[table["reader"] == reader]
        gains[reader] = (part["right"] - part["shuffled"]).to_numpy()
        pictures = part["picture"].to_numpy()
    return difference(gains[first], gains[second], groups_a=pictures, paired=True, seed=seed)


def by_factor(
    table: pd.DataFrame,
    candidates: Iterable[str],
    samples: Sequence[Sample],
    factors: Sequence[str] = ("subject", "item", "colour", "place"),
) -> pd.DataFrame:
    """Tell of which kind the first words are, and how often they are right.

    Parameters
    ----------
    table : DataFrame
        Of :func:`judged`, of one read-out at one layer.
    candidates : iterable of str
        The words in the order of the scores.
    samples : sequence of Sample
        Samples whose truth says which words are of which factor.
    factors : sequence of str, optional
        The factors.

    Returns
    -------
    DataFrame
        By factor the share of tokens whose first word is of it ("said"), the share of these that
        are right, and the share in shuffled cells.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import reading
    >>> table = pd.DataFrame({"word": [0, 0, 1], "right": [1.0, 0.0, 1.0], "shuffled": 0.2})
    >>> words = [samples[0].truth["place"], samples[0].truth["subject"]]
    >>> reading.by_factor(table, words, samples[:1])["right"].to_dict()
    {'subject': 1.0, 'place': 0.5}
    """
    candidates = list(candidates)
    names = np.array(candidates)[table["word"]]
    rows = {}
    for factor in factors:
        values = {str(sample.truth.get(factor)) for sample in samples}
        part = table[np.isin(names, list(values))]
        if len(part):
            share = len(part) / len(table)
            rows[factor] = {"said": share} | part[["right", "shuffled"]].mean().to_dict()
    return pd.DataFrame(rows, index=["said", "right", "shuffled"]).T


def caption_words(states: Activations, candidates: Mapping[str, Sequence[str]]) -> dict[str, Truth]:
    """Tell which candidate word a token of a caption is, and which one comes next.

    Use it for a positive control: text tokens, whose words are known.

    Parameters
    ----------
    states : Activations
        All tokens of captions (``reduce=None``), n of them.
    candidates : mapping of str to sequence of str
        The words with their forms. Words of several pieces are left out.

    Returns
    -------
    dict of str to Truth
        "its word" and "the next word": nothing is right where that is no candidate. All tokens
        count as one cell, so that shuffled cells are other tokens.

    Examples
    --------
    >>> from xlvlms_tutorial import capture
    >>> from xlvlms_tutorial.tutorials import reading
    >>> states = capture(vlm, samples[:1], 0, span="answer", reduce=None, answers=["On the sand."])
    >>> matches = reading.caption_words(states, {"sand": ["sand"]})
    >>> matches["its word"].right.ravel().tolist()[:4]
    [False, False, True, False]
    >>> matches["the next word"].right.ravel().tolist()[:4]
    [False, True, False, False]
    """
    tokens = [str(token).strip().lower() for token in states.table["token"]]
    samples = states.table["sample"].to_numpy()
    present = np.zeros((len(tokens), len(candidates)), dtype=bool)
    for column, word in enumerate(candidates):
        present[:, column] = np.isin(tokens, list(candidates[word]))
    following = np.zeros_like(present)
    same = samples[1:] == samples[:-1]
    following[:-1] = present[1:] & same[:, None]
    cells = np.zeros(len(tokens), dtype=int)
    return {
        name: Truth(matches, samples, cells)
        for name, matches in zip(WORDS, (present, following), strict=True)
    }


def maps(
    picture: Image.Image,
    words_of: Mapping[str, Sequence[str]],
    correct: Mapping[str, Sequence[bool]],
) -> Html:
    """Write on a picture what its tokens say, once for each read-out.

    Parameters
    ----------
    picture : PIL.Image.Image
        The picture.
    words_of : mapping of str to sequence of str
        The first word of each token in order, by read-out.
    correct : mapping of str to sequence of bool
        Whether each is what the cell holds; these are ticked.

    Returns
    -------
    :class:`~xlvlms_tutorial.view.cards.Html`
        The pictures side by side, where there is room.

    Examples
    --------
    >>> from PIL import Image
    >>> from xlvlms_tutorial.tutorials import reading
    >>> html = reading.maps(Image.new("RGB", (8, 8)), {"lens": ["frog"]}, {"lens": [True]})
    >>> "✓ frog" in html
    True
    """
    figures = ""
    for name, first in words_of.items():
        marked = []
        for word, ticked in zip(first, correct[name], strict=True):
            marked.append(f"✓ {word}" if ticked else word)
        top = pd.DataFrame({"word": marked, "probability": np.array(correct[name], dtype=float)})
        title = f"<figcaption>{escape(name)}: {int(sum(correct[name]))} right</figcaption>"
        figures += f'<figure style="margin:0">{title}{word_frame(picture, top)}</figure>'
    columns = "repeat(auto-fit,minmax(min(100%,18rem),1fr))"
    return Html(
        f'<div style="display:grid;gap:.6rem;grid-template-columns:{columns}">{figures}</div>'
    )
