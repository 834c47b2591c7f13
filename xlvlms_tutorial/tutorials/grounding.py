"""Ground the concepts of a token: samples, states, judges of words, and what words name.

What the chapters on grounding need around their measurements: choosing samples and reading states,
learning a dictionary with its pictures and words, scoring lists of words against pictures and
captions, and asking the truth of the world whether a word names something.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import Sample, mentioning
from xlvlms_tutorial.loading.scorers import Scorer, TextEncoder
from xlvlms_tutorial.methods import logit_lens
from xlvlms_tutorial.methods.concepts import (
    DICTIONARIES,
    Dictionary,
    as_lists,
    concept_words,
    most_activating,
    sentence,
)
from xlvlms_tutorial.metrics import bert_scores, clip_score, difference, top_scores, word_overlap
from xlvlms_tutorial.models import VLM
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view import widgets
from xlvlms_tutorial.view.cards import Html

# Words that name nothing in the pictures of this book, for lists that are known to be wrong.
ALIEN = ("treaty", "nitrogen", "sharon", "mortgage")
_FACTS = ("subject", "item", "place", "time")
_PENALTY = 2.0  # of the codes of Semi-NMF, as the chapter on concepts chooses it
_FEW = 8  # with fewer samples of which the model says the token, all are read

Words = Mapping[int, Sequence[str]]


class Embedded(NamedTuple):
    """Hold what the judges need of some samples: embedded pictures and captions, and ids."""

    pictures: Float[Tensor, "n e"]
    captions: list[Float[Tensor, "_ f"]]
    ids: list[str]


@dataclass(frozen=True)
class Concepts:
    """Hold a dictionary of one token, with the words and samples of each of its K concepts.

    Parameters
    ----------
    dictionary : Dictionary
        The fitted dictionary.
    codes : ndarray (n, K)
        How much of each concept is in each sample.
    words : dict of int to list of str
        The words of each concept.
    rows : ndarray (K, m)
        The samples that activate each concept most, as rows of ``codes``.
    """

    dictionary: Dictionary
    codes: Float[np.ndarray, "n k"]
    words: dict[int, list[str]]
    rows: Int[np.ndarray, "k m"]


def samples_about(token: str, samples: Iterable[Sample]) -> list[Sample]:
    """Select the samples that mention a token, with a caption that has it in front.

    Use it to choose the samples of a token of interest, whose first caption is then the reference.

    Parameters
    ----------
    token : str
        The word, which counts whole and in any case.
    samples : iterable of Sample
        Samples with captions.

    Returns
    -------
    list of Sample
        Copies whose captions are sorted: those with the token come first.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> scene = Sample("scene", None, ("Somebody stands.", "A woman stands."))
    >>> grounding.samples_about("woman", [scene])[0].captions[0]
    'A woman stands.'
    """
    word = re.compile(rf"\b{re.escape(token)}\b", re.IGNORECASE)
    result = []
    for sample in mentioning(samples, token):
        captions = sorted(sample.captions, key=lambda text: not word.search(text))
        result.append(replace(sample, captions=tuple(captions)))
    return result


def read_states(
    vlm: VLM, samples: Sequence[Sample], token: str, layers: int | Sequence[int]
) -> Activations:
    """Read the states that predict a token in the first caption of each sample.

    The caption is given as the answer, up to the token, so that the same words stand before it in
    whatever way the model would begin.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples whose first caption has the token.
    token : str
        The word.
    layers : int or sequence of int
        The layers to read.

    Returns
    -------
    Activations
        One row a sample.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> words = [sample.captions[0].split()[1] for sample in samples]
    >>> grounding.read_states(vlm, samples[:1], words[0], [30])[30].shape
    torch.Size([1, 576])
    """
    word = re.compile(rf"(\b{re.escape(token)}\b)", re.IGNORECASE)

    def until(sample: Sample) -> str:
        return "".join(word.split(sample.captions[0], maxsplit=1)[:2])

    return capture(vlm, samples, layers, words=token, answers=until, batch_size=32)


def spoken_states(
    vlm: VLM, samples: Sequence[Sample], token: str, layers: Sequence[int]
) -> tuple[list[Sample], Activations]:
    """Read the states of those samples of which the model itself would say the token.

    Use it for the states that a dictionary is learnt from: a state that is about to say something
    else tells nothing about the token.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples whose first caption has the token, as of :func:`samples_about`.
    token : str
        The word.
    layers : sequence of int
        The layers to read; the last of the model is among them.

    Returns
    -------
    tuple of list of Sample and Activations
        The samples whose most probable next word is the token, and their states, a row each. All
        samples where these would be fewer than eight.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> about = grounding.samples_about("robot", load_samples("scenes", n=30))
    >>> spoken, states = grounding.spoken_states(vlm, about, "robot", [30])
    >>> len(spoken) == len(states[30])
    True
    """
    states = read_states(vlm, samples, token, layers)
    next_words = logit_lens.top_tokens(vlm, states[vlm.n_layers], 1)["word"].str.strip()
    says = (next_words == token).to_numpy()
    states = states.select(says | (says.sum() < _FEW))
    return [samples[row] for row in states.table["sample"]], states


def unseen_samples(
    token: str, samples: Iterable[Sample], learnt_from: Iterable[Sample], n: int
) -> list[Sample]:
    """Select the first samples with a token that were not learnt from.

    Parameters
    ----------
    token : str
        The word.
    samples : iterable of Sample
        What to choose from; on data that are given once these may be the same as before.
    learnt_from : iterable of Sample
        The samples that were learnt from, which are left out by their ids.
    n : int
        How many at most.

    Returns
    -------
    list of Sample
        As :func:`samples_about` returns them.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> scenes = [Sample(str(number), None, ("A key.",)) for number in range(3)]
    >>> [scene.id for scene in grounding.unseen_samples("key", scenes, scenes[:1], n=1)]
    ['1']
    """
    ids = {sample.id for sample in learnt_from}
    about = samples_about(token, samples)
    return [sample for sample in about if sample.id not in ids][:n]


def noisy(samples: Sequence[Sample]) -> list[Sample]:
    """Replace every picture by noise, and keep the captions.

    Use it as a baseline: what a model says of noise comes from its language and from the words
    before, not from a picture.

    Parameters
    ----------
    samples : sequence of Sample
        Samples with pictures.

    Returns
    -------
    list of Sample
        Copies with pictures of the same size, whose dots are drawn by the number of the sample.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> (sample,) = grounding.noisy(samples[:1])
    >>> sample.image.size == samples[0].image.size, sample.captions == samples[0].captions
    (True, True)
    """
    result = []
    for number, sample in enumerate(samples):
        size = (sample.image.height, sample.image.width, 3)
        dots = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
        result.append(replace(sample, source=Image.fromarray(dots)))
    return result


def learn_concepts(
    vlm: VLM,
    states: Float[Tensor, "n d"],
    n_components: int,
    n_words: int = 5,
    n_pictures: int = 5,
    method: str = "semi-nmf",
) -> Concepts:
    """Learn a dictionary from states, and ground its concepts in pictures and words.

    Use it for many tokens, layers or kinds of dictionary; a chapter shows the steps for one.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the words.
    states : Tensor (n, d)
        States of one layer, a row a sample.
    n_components : int
        How many concepts.
    n_words : int, default 5
        Words of a concept.
    n_pictures : int, default 5
        Most activating samples of a concept.
    method : str, default "semi-nmf"
        A name of ``DICTIONARIES``. Semi-NMF has the penalty of the chapter on concepts, or less
        where states are small.

    Returns
    -------
    Concepts
        The dictionary with codes, words and most activating samples.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> states = torch.randn(12, 576, generator=torch.Generator().manual_seed(0))
    >>> learnt = grounding.learn_concepts(vlm, states, n_components=3, method="k-means")
    >>> learnt.codes.shape, learnt.rows.shape, len(learnt.words[0])
    ((12, 3), (3, 5), 5)
    """
    settings: dict[str, float] = {}
    if method == "semi-nmf":
        penalty = min(_PENALTY, float(states.norm(dim=1).median()) / 30)
        settings = {"penalty": penalty, "max_iter": 2000, "tol": 1e-5}
    dictionary = DICTIONARIES[method](n_components=n_components, **settings)
    codes = dictionary.fit_transform(states)
    words = as_lists(concept_words(vlm, dictionary.components_, n_words))
    rows = most_activating(codes, n_pictures)["row"].to_numpy().reshape(-1, n_pictures)
    return Concepts(dictionary, codes, words, rows)


class Judges:
    """Score lists of words against pictures and against captions.

    Use it for the two scores of grounding: the picture score, which is CLIPScore by the formula, of
    a picture with "A photo is described by the words ...", and BERTScore of a caption with the
    words. What was embedded once is kept, since the same lists are scored many times.

    Parameters
    ----------
    scorer : Scorer
        Embeds pictures and texts in one space, as of :func:`~xlvlms_tutorial.loading.load_scorer`.
    encoder : TextEncoder, optional
        Embeds the tokens of texts; without it there is no BERTScore.

    Attributes
    ----------
    picture_score : str
        What the first score is called: "CLIPScore", but "pocket score" where the scorer is the
        small one of this book, which is not CLIP.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load_scorer
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> judges = grounding.Judges(load_scorer("pocket-scorer"))
    >>> embedded = judges.embed(samples)
    >>> judges.picture_score, judges.fits(embedded, [["key"], ["grass", "day"]]).shape
    ('pocket score', (4, 2))
    """

    def __init__(self, scorer: Scorer, encoder: TextEncoder | None = None) -> None:
        self.scorer = scorer
        self.encoder = encoder
        self.picture_score = "pocket score" if scorer.name == "pocket-scorer" else "CLIPScore"
        self._sentences: dict[object, Float[Tensor, "m e"]] = {}
        self._tokens: dict[object, list[Float[Tensor, "_ f"]]] = {}

    def embed(self, samples: Sequence[Sample]) -> Embedded:
        """Embed the pictures of samples for one score, their first captions for the other."""
        pictures = self.scorer.images([sample.image for sample in samples])
        captions: list[Tensor] = []
        if self.encoder is not None:
            captions = self.encoder.tokens([sample.captions[0] for sample in samples])
        return Embedded(pictures, captions, [sample.id for sample in samples])

    def fits(self, embedded: Embedded, lists: Iterable[Sequence[str]]) -> Float[np.ndarray, "n m"]:
        """Return the picture score of n samples with m lists of words."""
        key = tuple(map(tuple, lists))
        if key not in self._sentences:
            self._sentences[key] = self.scorer.texts([sentence(words) for words in key])
        return clip_score(embedded.pictures, self._sentences[key])

    def scores(
        self, embedded: Embedded, lists: Iterable[Sequence[str]]
    ) -> dict[str, Float[np.ndarray, "n m"]]:
        """Return both scores of n samples with m lists of words, by name."""
        key = tuple(map(tuple, lists))
        scores = {self.picture_score: self.fits(embedded, key)}
        if self.encoder is not None:
            if key not in self._tokens:
                self._tokens[key] = self.encoder.tokens([", ".join(words) for words in key])
            scores["BERTScore"] = bert_scores(self._tokens[key], embedded.captions).T
        return scores

    def exam(self, samples: Sequence[Sample]) -> pd.DataFrame:
        """Test the judges on lists of words of which it is known whether they are true.

        Parameters
        ----------
        samples : sequence of Sample
            Samples with known factors; those that lack a factor that most have are left out.

        Returns
        -------
        pandas.DataFrame
            A row a kind of list, from all words true to none, and a column a score: its mean.
        """
        full, kinds = _known_lists(samples)
        embedded = self.embed(full)
        rows = {}
        for name, lists in kinds:
            scores = self.scores(embedded, lists)
            rows[name] = {metric: table.diagonal().mean() for metric, table in scores.items()}
        return pd.DataFrame(rows).T

    def second_captions(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Score the second caption of each sample that has one: what a true text gets."""
        several = [sample for sample in samples if len(sample.captions) > 1]
        if not several:
            return {}
        embedded = self.embed(several)
        texts = [sample.captions[1] for sample in several]
        fit = clip_score(embedded.pictures, self.scorer.texts(texts)).diagonal()
        means = {self.picture_score: float(fit.mean())}
        if self.encoder is not None:
            fit = bert_scores(self.encoder.tokens(texts), embedded.captions).diagonal()
            means["BERTScore"] = float(fit.mean())
        return means


def own_and_others(scores: Float[np.ndarray, "n k"], rows: Int[np.ndarray, "k m"]) -> pd.DataFrame:
    """Compare how each concept's pictures fit its own words and those of the other concepts.

    Parameters
    ----------
    scores : ndarray (n, K)
        The scores of n samples with the words of K concepts.
    rows : ndarray (K, m)
        The pictures of each concept, as rows of ``scores``.

    Returns
    -------
    pandas.DataFrame
        A row a concept; columns own and others, the mean score of its pictures with its words, and
        the mean over the other concepts' words.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> grounding.own_and_others(np.array([[1.0, 0.2], [0.4, 0.8]]), np.array([[0], [1]]))
       own  others
    0  1.0     0.2
    1  0.8     0.4
    """
    means = scores[rows].mean(axis=1)
    diagonal = means.diagonal()
    rest = (means.sum(axis=1) - diagonal) / max(len(means) - 1, 1)
    return pd.DataFrame({"own": diagonal, "others": rest})


def score_concepts(
    judges: Judges,
    embedded: Embedded,
    concepts: Concepts,
    baselines: Mapping[str, Words],
    noise: Concepts | None = None,
) -> pd.DataFrame:
    """Score each concept's pictures with its words and with the words of each baseline.

    Parameters
    ----------
    judges : Judges
        What scores.
    embedded : Embedded
        The samples that the concepts were learnt from.
    concepts : Concepts
        The concepts of one token.
    baselines : mapping of str to lists of words
        K lists a baseline, in the place of the concepts' words.
    noise : Concepts, optional
        Concepts learnt from the first of these samples with noise as pictures. They come with words
        and samples of their own.

    Returns
    -------
    pandas.DataFrame
        A row a concept; columns (score, "own"), (score, "others") for the words of the other
        concepts, and (score, name) a baseline.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.loading import load_scorer
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> judges = grounding.Judges(load_scorer("pocket-scorer"))
    >>> states = torch.eye(4, 576)
    >>> learnt = grounding.learn_concepts(vlm, states, 2, n_pictures=2, method="k-means")
    >>> baselines = {"random words": {0: ["treaty"], 1: ["mortgage"]}}
    >>> table = grounding.score_concepts(judges, judges.embed(samples), learnt, baselines)
    >>> table.columns.get_level_values(1).tolist()
    ['own', 'others', 'random words']
    """
    columns = {}
    for metric, scores in judges.scores(embedded, concepts.words.values()).items():
        compared = own_and_others(scores, concepts.rows)
        columns[metric, "own"] = compared["own"]
        columns[metric, "others"] = compared["others"]
    for name, lists in baselines.items():
        for metric, scores in judges.scores(embedded, lists.values()).items():
            columns[metric, name] = own_and_others(scores, concepts.rows)["own"]
    if noise is not None:
        for metric, scores in judges.scores(embedded, noise.words.values()).items():
            columns[metric, "noise images"] = own_and_others(scores, noise.rows)["own"]
    return pd.DataFrame(columns)


def record_own(experiment: Experiment, by_concept: pd.DataFrame, seed: int = 0) -> None:
    """Record for COX-1 and COX-2 by how much concepts' own words score above baselines.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    by_concept : pandas.DataFrame
        The tables of :func:`score_concepts` by token, one below the other: the first level of
        columns is the score, that of pictures for COX-1 before that of texts for COX-2.
    seed : int, default 0
        The seed of the intervals, which are over words where there are several.
    """
    against = {
        "random words": "random words",
        "random directions": "words of random directions",
        "others": "words of other concepts",
        "noise images": "noise pictures",
    }
    groups = by_concept.index.get_level_values("token")
    several = groups.nunique() > 1
    metrics = by_concept.columns.get_level_values(0).unique()
    for claim, metric in zip(("COX-1", "COX-2"), metrics, strict=False):
        scores = by_concept[metric]
        for name, baseline in against.items():
            effect = difference(
                scores["own"],
                scores[name],
                paired=True,
                seed=seed,
                groups_a=groups if several else None,
            )
            experiment.record(
                claim,
                effect,
                baseline,
                f"against {name}",
                interval_over="words" if several else "concepts",
            )


def score_unseen(
    judges: Judges,
    embedded: Embedded,
    columns: Mapping[str, tuple[Float[np.ndarray, "n k"], Words]],
) -> pd.DataFrame:
    """Score the most activating concepts of unseen samples, for dictionaries and baselines.

    Use it for the test of the paper, whose table has a column a dictionary or baseline.

    Parameters
    ----------
    judges : Judges
        What scores.
    embedded : Embedded
        The n unseen samples.
    columns : mapping of str to (codes, words)
        The codes (n, K) of the samples, which choose the concepts, and the words of the concepts.

    Returns
    -------
    pandas.DataFrame
        A row for each column, score and sample: top_1, top_3 and active, as of
        :func:`~xlvlms_tutorial.metrics.top_scores`, with column, metric and id.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.loading import load_scorer
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> judges = grounding.Judges(load_scorer("pocket-scorer"))
    >>> columns = {"random": (np.ones((4, 3)), {0: ["treaty"], 1: ["key"], 2: ["grass"]})}
    >>> grounding.score_unseen(judges, judges.embed(samples), columns)["column"].tolist()
    ['random', 'random', 'random', 'random']
    """
    parts = []
    for name, (codes, words) in columns.items():
        for metric, scores in judges.scores(embedded, words.values()).items():
            best = top_scores(codes, scores, min(5, codes.shape[1]))
            parts.append(best.assign(column=name, metric=metric, id=embedded.ids))
    return pd.concat(parts)


def distinctness(judges: Judges, embedded: Embedded, concepts: Concepts) -> dict[str, float]:
    """Measure how much of a dictionary's picture score belongs to single concepts.

    Use it to compare dictionaries: lists that all say the same score high if that is true.

    Parameters
    ----------
    judges : Judges
        What scores; only pictures are used.
    embedded : Embedded
        The samples that the concepts were learnt from.
    concepts : Concepts
        The concepts of one token.

    Returns
    -------
    dict of str to float
        Means over concepts: "own words", the score with them; "word by word", the same where each
        word is scored alone; "own minus others", what is left without the score of the other
        concepts' words, and "own share", that as a share; "overlap" of the lists.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.loading import load_scorer
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> judges = grounding.Judges(load_scorer("pocket-scorer"))
    >>> states = torch.eye(4, 576)
    >>> learnt = grounding.learn_concepts(vlm, states, 2, n_pictures=2, method="k-means")
    >>> measured = grounding.distinctness(judges, judges.embed(samples), learnt)
    >>> 0 <= measured["overlap"] <= 1
    True
    """
    lists = list(concepts.words.values())
    compared = own_and_others(judges.fits(embedded, lists), concepts.rows)
    single = [[word] for words in lists for word in words]
    alone = judges.fits(embedded, single).reshape(len(embedded.ids), len(lists), -1).mean(axis=2)
    score = float(compared["own"].mean())
    gain = float((compared["own"] - compared["others"]).mean())
    return {
        "own words": score,
        "word by word": float(own_and_others(alone, concepts.rows)["own"].mean()),
        "own minus others": gain,
        "own share": gain / score if score else np.nan,
        "overlap": float(word_overlap(concepts.words).mean()),
    }


def concept_cards(
    samples: Sequence[Sample], concepts: Concepts, title: str
) -> tuple[dict[tuple[int], Html], Html]:
    """Make a card with words and small pictures for each concept.

    Use it with :func:`~xlvlms_tutorial.view.widgets.explorer`.

    Parameters
    ----------
    samples : sequence of Sample
        The samples that the concepts were learnt from.
    concepts : Concepts
        The concepts.
    title : str
        What they are concepts of.

    Returns
    -------
    tuple of dict of (int,) to Html, and Html
        The card of each concept, and the style that holds the pictures.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.concepts import KMeans
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> rows = np.array([[0, 1]])
    >>> learnt = grounding.Concepts(KMeans(1), np.ones((4, 1)), {0: ["key"]}, rows)
    >>> cards, style = grounding.concept_cards(samples, learnt, "a token")
    >>> list(cards)
    [(0,)]
    """
    pictured = {row: samples[row] for row in sorted(set(concepts.rows.ravel().tolist()))}
    images = {row: sample.image for row, sample in pictured.items()}
    alt = [sample.captions[0] for sample in pictured.values()]
    style, tags = widgets.thumbnails(images, size=112, alt=alt)
    cards = {}
    for concept, words in concepts.words.items():
        pictures = [tags[row] for row in concepts.rows[concept]]
        cards[(concept,)] = widgets.concept_card(f"concept {concept} of {title}", words, pictures)
    return cards, style


def names_value(word: str, value: str) -> bool:
    """Tell whether a word names the value of a factor.

    It does in the forms that the value has ("climbs" for climbing), or as a piece of four letters
    or more that the value begins with ("zomb" for zombie).

    Parameters
    ----------
    word : str
        A word of a concept.
    value : str
        The value, such as "climbing" or "snow".

    Returns
    -------
    bool
        Whether it does.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> [grounding.names_value(word, "climbing") for word in ("climbs", "climb", "climate")]
    [True, True, False]
    """
    stem = value.removesuffix("ing")
    piece = len(word) > 3 and stem.startswith(word)
    return piece or word in {stem + end for end in ("", "s", "es", "ing")}


def true_share(values: Sequence[str], concepts: Concepts) -> tuple[float, float]:
    """Compute the share of words that are true of a concept's pictures, and of other pictures.

    Parameters
    ----------
    values : sequence of str
        The value of a factor in each sample.
    concepts : Concepts
        The concepts of these samples.

    Returns
    -------
    tuple of float
        The mean share of a concept's words that name the value in its own pictures, and in the
        pictures of the other concepts.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.concepts import KMeans
    >>> from xlvlms_tutorial.tutorials import grounding
    >>> words, rows = {0: ["snow", "key"], 1: ["rock", "sand"]}, np.array([[0], [1]])
    >>> learnt = grounding.Concepts(KMeans(2), np.eye(2), words, rows)
    >>> grounding.true_share(["snow", "sand"], learnt)
    (0.5, 0.0)
    """
    shares = {}
    for value in set(values):
        named = []
        for words in concepts.words.values():
            named.append(np.mean([names_value(word, value) for word in words]))
        shares[value] = named
    compared = own_and_others(np.array([shares[value] for value in values]), concepts.rows)
    return float(compared["own"].mean()), float(compared["others"].mean())


def _known_lists(
    samples: Sequence[Sample],
) -> tuple[list[Sample], list[tuple[str, list[list[str]]]]]:
    """Samples with all facts that most samples have, and lists of known truth for each."""
    facts = []
    for fact in _FACTS:
        n_known = sum(sample.truth.get(fact) is not None for sample in samples)
        if n_known >= 0.8 * len(samples):
            facts.append(fact)
    require(
        len(facts) > 0,
        f"samples of which most lack {', '.join(_FACTS)}",
        "give samples whose truth is known",
    )
    full, true = [], []
    for sample in samples:
        values = [sample.truth.get(fact) for fact in facts]
        if None not in values:
            full.append(sample)
            true.append(list(map(str, values)))
    n = len(facts)
    half, alien = n // 2, list(ALIEN[:n])
    following = true[1:] + true[:1]
    kinds = [
        (f"{n} true words", true),
        (f"{n - 1} true, 1 alien", [words[: n - 1] + alien[:1] for words in true]),
        (f"{half} true, {n - half} alien", [words[:half] + alien[: n - half] for words in true]),
        ("1 true word", [words[:1] for words in true]),
        (f"true {facts[half]}", [words[half : half + 1] for words in true]),
        (f"{facts[half]} of the next picture", [words[half : half + 1] for words in following]),
        ("words of the next picture", following),
        (f"{n} alien words", [alien for _ in true]),
    ]
    return full, kinds
