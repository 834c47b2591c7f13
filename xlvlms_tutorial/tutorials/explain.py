"""What the chapter "Explain one answer with concepts" needs: pictures, matches, cards, maps.

Its experiment on removing concepts has a module of its own, ``removal``.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import ArrayLike
from PIL import Image, ImageOps
from torch import Tensor

from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import PROMPTS, Sample
from xlvlms_tutorial.methods.concepts import (
    SemiNMF,
    as_lists,
    concept_words,
    most_activating,
    top_concepts,
)
from xlvlms_tutorial.methods.logit_lens import ENGLISH, top_tokens
from xlvlms_tutorial.metrics import Estimate, bootstrap, difference, factor_information
from xlvlms_tutorial.models import VLM
from xlvlms_tutorial.text import whole_words
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.view.cards import Html, concept_card, picture_card, thumbnails

FACTORS = ("subject", "action", "item", "colour", "count", "place", "side", "time")
# what a caption may say after its subject, in the order in which it is looked at
SAID_LATER = ("action", "item", "place", "colour", "time", "side", "count")
_SIDES = {"left": 1, "right": -1}
_FEW = 12  # concepts of a small dictionary
_RARE = 16  # references that a word must be in


@dataclass(frozen=True)
class WordPictures:
    """The pictures of one word, divided.

    ``word`` is the token of interest. ``samples`` are the pictures of the dictionary and ``states``
    their states, a row each; ``new`` are pictures to explain and ``rest`` are others. ``common``
    are the words that references and model have, the most frequent first.
    """

    word: str
    samples: list[Sample]
    states: Activations
    new: list[Sample]
    rest: list[Sample]
    common: list[str]


def caption_up_to(word: object) -> Callable[[Sample], str]:
    """Make a function that cuts a sample's first caption after a word.

    Use it as the ``answers`` of a capture: what follows the word is then not read. A caption
    without the word is left whole.

    Parameters
    ----------
    word : str
        The word; it counts whole, in any case.

    Returns
    -------
    function of Sample
        Returns the beginning of the caption.

    Examples
    --------
    >>> from xlvlms_tutorial import Sample
    >>> from xlvlms_tutorial.tutorials.explain import caption_up_to
    >>> caption_up_to("woman")(Sample("a", None, ("A woman is walking.",)))
    'A woman'
    """
    pattern = whole_words([str(word)])

    def beginning(sample: Sample) -> str:
        caption = sample.captions[0]
        match = pattern.search(caption)
        return caption[: match.end()] if match else caption

    return beginning


def word_pictures(
    vlm: VLM, world: Sequence[Sample], word: str, layers: Sequence[int], n_samples: int, n_new: int
) -> WordPictures:
    """Divide the pictures of a word, and read the states that predict it.

    Use it before learning the concepts of a word. A picture takes part in the dictionary only if
    the model's own next word is the word. If the model does not say the word, another is taken that
    references and captions often have, a subject if there is one.

    Parameters
    ----------
    vlm : VLM
        The model.
    world : sequence of Sample
        Pictures with reference captions, some thousands.
    word : str
        The token of interest.
    layers : sequence of int
        The layers to read; the last one decides what the next word is.
    n_samples, n_new : int
        How many pictures of the dictionary, and how many new ones, at most.

    Returns
    -------
    WordPictures
        The word, and its pictures in three disjoint parts.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials.explain import word_pictures
    >>> world = load_samples("scenes", n=120)
    >>> word_pictures(vlm, world, "stone", [30], 8, 4).states[30].shape[1] == vlm.width
    True
    """
    common = _common_words(vlm, world, word)
    for candidate in common:
        pool = _mentioning(world, candidate)
        size = min(n_samples, len(pool) * 2 // 5)
        states = _states_of(vlm, candidate, pool[:size], layers)
        if len(states) >= min(8, n_samples // 2):
            break
    samples = [pool[row] for row in states.table["sample"]]
    n_new = min(n_new, len(pool) // 3)
    new, rest = pool[size:][:n_new], pool[size + n_new :]
    return WordPictures(candidate, samples, states, new, rest, common)


def known_facts(samples: Iterable[Sample]) -> pd.DataFrame:
    """Lay the known facts of pictures out as a table.

    Parameters
    ----------
    samples : iterable of Sample
        The pictures.

    Returns
    -------
    pandas.DataFrame
        A row a picture and a column a factor, with None where a fact is not known.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials.explain import known_facts
    >>> known_facts(load_samples("scenes", n=3)).shape
    (3, 8)
    """
    facts = pd.DataFrame([dict(sample.truth) for sample in samples])
    return facts.reindex(columns=list(FACTORS)).astype(object)


def factor_table(codes: ArrayLike, samples: Sequence[Sample]) -> pd.DataFrame:
    """Measure what each concept says about each known factor, the strongest rows last.

    Values that occur once are left out: they cannot be over-represented.

    Parameters
    ----------
    codes : array_like of shape (n, k)
        How active each concept is in each picture.
    samples : sequence of Sample
        The n pictures.

    Returns
    -------
    pandas.DataFrame
        As of :func:`~xlvlms_tutorial.metrics.factor_information`, sorted by "share".

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials.explain import factor_table
    >>> pictures = load_samples("scenes", n=40)
    >>> night = [[float(picture.truth["time"] == "night"), 1.0] for picture in pictures]
    >>> factor_table(night, pictures)["factor"].iloc[-1]
    'time'
    """
    facts = _repeated(known_facts(samples))
    return factor_information(codes, facts, n_permutations=200).sort_values("share")


def match_concepts(codes: ArrayLike, samples: Sequence[Sample]) -> pd.DataFrame:
    """Match each concept to the fact of the world that it says most about.

    Use it to give concepts names that can be checked in a world whose truth is known.

    Parameters
    ----------
    codes : array_like of shape (n, k)
        How active each concept is in each picture.
    samples : sequence of Sample
        The n pictures.

    Returns
    -------
    pandas.DataFrame
        A row a concept: the factor, the value that is over-represented among its most active
        pictures, its purity there, and other columns of :func:`factor_table`.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials.explain import match_concepts
    >>> pictures = load_samples("scenes", n=40)
    >>> night = [[float(picture.truth["time"] == "night"), 1.0] for picture in pictures]
    >>> match_concepts(night, pictures).loc[0, "value"]
    'night'
    """
    best = factor_table(codes, samples).groupby("concept").tail(1)
    return best.set_index("concept").sort_index()


def is_true(match: pd.DataFrame, concepts: Iterable[int], samples: Sequence[Sample]) -> np.ndarray:
    """Return whether what each concept is matched to is true of its picture.

    Parameters
    ----------
    match : pandas.DataFrame
        Of :func:`match_concepts`.
    concepts : iterable of int
        A concept for each picture.
    samples : sequence of Sample
        The pictures.

    Returns
    -------
    ndarray (n,)
        1 where it is true and 0 elsewhere.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial import Sample
    >>> from xlvlms_tutorial.tutorials.explain import is_true
    >>> match = pd.DataFrame({"factor": ["place", "time"], "value": ["sand", "night"]})
    >>> picture = Sample("a", None, ("A key.",), truth={"place": "sand", "time": "day"})
    >>> is_true(match, [0, 1], [picture, picture]).tolist()
    [1.0, 0.0]
    """
    fits = []
    for concept, sample in zip(concepts, samples, strict=True):
        factor, value = match.loc[concept, ["factor", "value"]]
        fits.append(sample.truth.get(factor) == value)
    return np.array(fits, dtype=float)


def is_true_elsewhere(
    match: pd.DataFrame, concepts: Iterable[int], samples: Sequence[Sample]
) -> np.ndarray:
    """Return how often what each concept is matched to is true of other pictures.

    Use it as the baseline of :func:`is_true`: the same concepts, with the pictures turned by one to
    eight places.

    Parameters
    ----------
    match : pandas.DataFrame
        Of :func:`match_concepts`.
    concepts : iterable of int
        A concept for each picture.
    samples : sequence of Sample
        The pictures.

    Returns
    -------
    ndarray (n,)
        For each concept the share of the other pictures of which it is true.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial import Sample
    >>> from xlvlms_tutorial.tutorials.explain import is_true_elsewhere
    >>> match = pd.DataFrame({"factor": ["place", "place"], "value": ["sand", "snow"]})
    >>> places = ("sand", "sand", "snow")
    >>> pictures = [Sample(place, None, ("A key.",), truth={"place": place}) for place in places]
    >>> is_true_elsewhere(match, [0, 0, 1], pictures).tolist()
    [0.5, 0.5, 0.0]
    """
    concepts = list(concepts)
    samples = list(samples)
    turned = []
    for turn in range(1, min(9, len(samples))):
        turned.append(is_true(match, concepts, samples[-turn:] + samples[:-turn]))
    return np.mean(turned, axis=0)


def map_panels(
    maps: Float[Tensor, "n k rows columns"],
    match: pd.DataFrame,
    factors: Sequence[str],
    samples: Sequence[Sample],
    n: int = 4,
) -> tuple[list[Image.Image], list[Tensor], list[str]]:
    """Choose maps to draw: for each factor some pictures with the concept of their value.

    Use it before :func:`~xlvlms_tutorial.view.plots.heatmaps`. Each map is scaled by its largest
    magnitude.

    Parameters
    ----------
    maps : Tensor (pictures, concepts, rows, columns)
        How much each image token adds to each concept.
    match : pandas.DataFrame
        Of :func:`match_concepts`.
    factors : sequence of str
        The factors, a row of panels each.
    samples : sequence of Sample
        The pictures.
    n : int, default 4
        How many pictures a factor.

    Returns
    -------
    tuple of list
        The pictures, their maps, and the values that the concepts are matched to.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.explain import map_panels
    >>> time = samples[0].truth["time"]
    >>> match = pd.DataFrame({"factor": ["time"], "value": [time], "share": [0.9]})
    >>> images, heat, values = map_panels(torch.ones(1, 1, 4, 4), match, ["time"], samples[:1])
    >>> values == [time]
    True
    """
    images: list[Image.Image] = []
    scaled: list[Tensor] = []
    values: list[str] = []
    for factor in factors:
        for number, concept, value in with_concept(match, factor, samples)[:n]:
            heat = maps[number, concept]
            images.append(samples[number].image)
            scaled.append(heat / heat.abs().max().clamp(min=1e-9))
            values.append(value)
    return images, scaled, values


def explanations(
    samples: Sequence[Sample],
    new: Sequence[Sample],
    captions: Sequence[str],
    new_codes: np.ndarray,
    codes: np.ndarray,
    words: Mapping[int, Sequence[str]],
    n: int = 3,
) -> tuple[dict[tuple[int], Html], Html]:
    """Show some new pictures with the concepts that hold most of their states.

    Use its result as frames and style of :func:`~xlvlms_tutorial.view.widgets.explorer`.

    Parameters
    ----------
    samples, new : sequence of Sample
        The pictures of the dictionary, and the new ones.
    captions : sequence of str
        What the model says of the new ones.
    new_codes, codes : ndarray (pictures, concepts)
        The codes of the new pictures and those of the dictionary's.
    words : mapping of int to sequence of str
        The words of each concept.
    n : int, default 3
        How many concepts a picture.

    Returns
    -------
    tuple of dict and Html
        A frame for each of five pictures, of different actions if there are as many, and the style
        with the small pictures.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.explain import explanations
    >>> words = {concept: ["word"] for concept in range(4)}
    >>> frames, style = explanations(samples, samples, ["a key"] * 4, np.eye(4), np.eye(4), words)
    >>> sorted(frames)
    [(1,), (2,), (3,), (4,)]
    """
    top = most_activating(codes, min(5, len(codes))).groupby("concept")["row"].agg(list)
    style, tags = _small(samples, top, size=64, quality=70)
    repeats = known_facts(new)["action"].duplicated()
    frames = {}
    for row in repeats.sort_values(kind="stable").index[:5]:
        parts = [picture_card(new[row].image, captions[row], [])]
        for concept in top_concepts(new_codes, min(n, new_codes.shape[1]))[row]:
            part = round(float(new_codes[row, concept] / new_codes[row].sum()), 2)
            thumbs = [tags[example] for example in top[concept]]
            facts = {"part of the activation": part}
            parts.append(concept_card(f"concept {concept}", words[concept], thumbs, facts))
        frames[(len(frames) + 1,)] = Html("".join(parts))
    return frames, style


def with_concept(
    match: pd.DataFrame, factor: str, samples: Sequence[Sample]
) -> list[tuple[int, int, str]]:
    """List the pictures whose value of a factor has a concept, each with that concept.

    Parameters
    ----------
    match : pandas.DataFrame
        Of :func:`match_concepts`. Of two concepts of one value the one with more share counts.
    factor : str
        The factor, such as "action".
    samples : sequence of Sample
        The pictures.

    Returns
    -------
    list of tuple
        Number of the picture, number of the concept, and the value.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial import Sample
    >>> from xlvlms_tutorial.tutorials.explain import with_concept
    >>> columns = {"factor": ["place"], "value": ["sand"], "share": [0.9]}
    >>> match = pd.DataFrame(columns, index=pd.Index([4], name="concept"))
    >>> pictures = [Sample(p, None, ("A key.",), truth={"place": p}) for p in ("snow", "sand")]
    >>> with_concept(match, "place", pictures)
    [(1, 4, 'sand')]
    """
    of_factor = match[match["factor"] == factor].sort_values("share")
    concepts = {value: concept for concept, value in of_factor["value"].items()}
    rows = []
    for number, sample in enumerate(samples):
        value = sample.truth.get(factor)
        if value in concepts:
            rows.append((number, int(concepts[value]), str(value)))
    return rows


def pictures_to_map(
    match: pd.DataFrame, samples: Sequence[Sample], n: int = 24
) -> tuple[list[Sample], list[str]]:
    """Choose pictures, cut to squares, whose facts have concepts, and the factors to map.

    Use it before maps of image tokens: pictures of one shape have their tokens on one grid.

    Parameters
    ----------
    match : pandas.DataFrame
        Of :func:`match_concepts`.
    samples : sequence of Sample
        Pictures that had no part in the dictionary.
    n : int, default 24
        How many pictures at most.

    Returns
    -------
    tuple of list of Sample and list of str
        The pictures, and up to two factors that have concepts in them.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.explain import pictures_to_map
    >>> match = pd.DataFrame({"factor": ["time"], "value": ["night"], "share": [0.9]})
    >>> pictures, factors = pictures_to_map(match, samples, n=2)
    >>> len(pictures), pictures[0].image.size == pictures[1].image.size
    (2, True)
    """
    counts: Counter[int] = Counter()
    factors = []
    for factor in SAID_LATER:
        rows = with_concept(match, factor, samples)
        if rows and len(factors) < 2:
            factors.append(factor)
            counts.update(number for number, *_ in rows)
    order = sorted(range(len(samples)), key=lambda number: -counts[number])[:n]
    pictures = [samples[number] for number in order]
    side = min(min(sample.image.size) for sample in pictures)
    squares = []
    for sample in pictures:
        squares.append(replace(sample, source=ImageOps.fit(sample.image, (side, side))))
    return squares, factors


def side_balance(
    maps: Float[Tensor, "n k rows columns"],
    match: pd.DataFrame,
    factor: str,
    samples: Sequence[Sample],
) -> pd.Series:
    """Measure on which half of each picture the positive heat of a factor's concepts lies.

    Parameters
    ----------
    maps : Tensor (pictures, concepts, rows, columns)
        How much each image token adds to each concept.
    match : pandas.DataFrame
        Of :func:`match_concepts`.
    factor : str
        The factor whose concepts are looked at.
    samples : sequence of Sample
        The pictures; their "side" says where the objects are.

    Returns
    -------
    pandas.Series
        By number of the picture: 1 if all positive heat is on the objects' half, -1 if all is on
        the other, 0 if both have as much.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Sample
    >>> from xlvlms_tutorial.tutorials.explain import side_balance
    >>> match = pd.DataFrame({"factor": ["item"], "value": ["key"], "share": [0.9]})
    >>> picture = Sample("a", None, ("A key.",), truth={"item": "key", "side": "left"})
    >>> heat = torch.tensor([[[[3.0, 1.0], [0.0, -2.0]]]])  # one picture, one concept
    >>> side_balance(heat, match, "item", [picture]).tolist()
    [0.5]
    """
    balance = {}
    for number, concept, _ in with_concept(match, factor, samples):
        sign = _SIDES.get(str(samples[number].truth.get("side")))
        if sign is None:
            continue
        heat = maps[number, concept].clamp(min=0)
        half = heat.shape[-1] // 2
        left_heat = float(heat[:, :half].sum())
        right_heat = float(heat[:, -half:].sum())
        total = max(left_heat + right_heat, 1e-6)
        balance[number] = sign * (left_heat - right_heat) / total
    return pd.Series(balance, dtype=float)


@dataclass(frozen=True)
class WordConcepts:
    """The concepts of a word: states and pictures, and a small dictionary for each layer."""

    states: Activations
    samples: list[Sample]
    dictionaries: dict[int, SemiNMF]


def concept_library(
    vlm: VLM,
    world: Sequence[Sample],
    pictures: WordPictures,
    others: Sequence[str],
    layers: Sequence[int],
    seed: int = 0,
) -> dict[str, WordConcepts]:
    """Learn up to twelve concepts of several words at several layers.

    Use it for an explorer of concepts. Words that model or references lack are replaced by the next
    common ones.

    Parameters
    ----------
    vlm : VLM
        The model.
    world : sequence of Sample
        Pictures with reference captions.
    pictures : WordPictures
        Those of the first word, already read.
    others : sequence of str
        Other words.
    layers : sequence of int
        The layers; the last one decides what the next word is.
    seed : int, default 0
        Of the dictionaries.

    Returns
    -------
    dict of str to WordConcepts
        By word.

    Examples
    --------
    >>> from xlvlms_tutorial import capture, load_samples
    >>> from xlvlms_tutorial.tutorials.explain import WordPictures, concept_library
    >>> world = load_samples("scenes", n=8)
    >>> states = capture(vlm, world, 30, span="question")
    >>> pictures = WordPictures("key", world, states, [], [], [])
    >>> library = concept_library(vlm, world, pictures, [], [30])
    >>> library["key"].dictionaries[30].components_.shape
    (4, 576)
    """

    def learnt(states: Activations, samples: list[Sample]) -> WordConcepts:
        size = min(_FEW, len(states) // 2)
        dictionaries = {}
        for layer in layers:
            dictionaries[layer] = SemiNMF(size, tol=1e-5, seed=seed).fit(states[layer])
        return WordConcepts(states, samples, dictionaries)

    library = {pictures.word: learnt(pictures.states, pictures.samples)}
    for word in dict.fromkeys([*others, *pictures.common]):
        if len(library) > len(others):
            break
        pool = _mentioning(world, word)
        if word in library or len(pool) < _RARE:
            continue
        states = _states_of(vlm, word, pool[:48], layers)
        if len(states) >= min(8, len(pictures.samples) // 2):
            library[word] = learnt(states, [pool[row] for row in states.table["sample"]])
    return library


def library_cards(
    vlm: VLM, library: Mapping[str, WordConcepts]
) -> tuple[dict[tuple[Hashable, ...], Html], str]:
    """Show each concept of a library by its words, its pictures and what it is matched to.

    Use its result as frames and style of :func:`~xlvlms_tutorial.view.widgets.explorer`, whose
    levels are token, layer and concept.

    Parameters
    ----------
    vlm : VLM
        The model that reads the words.
    library : mapping of str to WordConcepts
        Of :func:`concept_library`.

    Returns
    -------
    tuple of dict and str
        Frames by (word, layer, concept), and the style with the small pictures.

    Examples
    --------
    >>> from xlvlms_tutorial import SemiNMF, capture, load_samples
    >>> from xlvlms_tutorial.tutorials.explain import WordConcepts, library_cards
    >>> pictures = load_samples("scenes", n=24)
    >>> states = capture(vlm, pictures, 30, span="question")
    >>> dictionary = SemiNMF(2).fit(states[30])
    >>> library = {"key": WordConcepts(states, pictures, {30: dictionary})}
    >>> frames, style = library_cards(vlm, library)
    >>> list(frames)
    [('key', 30, 0), ('key', 30, 1)]
    """
    frames: dict[tuple[Hashable, ...], Html] = {}
    styles = ""
    for word, learnt in library.items():
        codes = {}
        examples = {}
        for layer, dictionary in learnt.dictionaries.items():
            codes[layer] = dictionary.transform(learnt.states[layer])
            top = most_activating(codes[layer], min(4, len(codes[layer])))
            examples[layer] = top.groupby("concept")["row"].agg(list)
        every = [rows for of_layer in examples.values() for rows in of_layer]
        style, tags = _small(learnt.samples, every, size=56, quality=60)
        styles += style
        for layer, dictionary in learnt.dictionaries.items():
            match = match_concepts(codes[layer], learnt.samples)
            words = as_lists(concept_words(vlm, dictionary.components_, 6))
            largest = np.bincount(top_concepts(codes[layer])[:, 0], minlength=len(words))
            for concept, row in match.iterrows():
                facts = {
                    "largest in": f"{largest[concept]} of {largest.sum()} pictures",
                    "matched to": f"{row['factor']}: {row['value']}",
                    "purity": round(float(row["purity"]), 2),
                }
                thumbs = [tags[example] for example in examples[layer][concept]]
                card = concept_card(f"concept {concept}", words[concept], thumbs, facts)
                frames[word, layer, concept] = card
    return frames, styles


def false_sentences(vlm: VLM, library: Mapping[str, WordConcepts], layer: int) -> pd.DataFrame:
    """Read words after a false colour, and see whose colour the state holds.

    Use it to tell a concept of the picture from one that was read off the sentence. Colours are
    exchanged in captions such as "... two red keys", up to the word after the colour.

    Parameters
    ----------
    vlm : VLM
        The model.
    library : mapping of str to WordConcepts
        Of :func:`concept_library`; words whose captions name colours take part.
    layer : int
        The layer of the states.

    Returns
    -------
    pandas.DataFrame
        A column for each word and kind of sentence: the share of pictures whose strongest concept
        of a colour is that of the picture, and that of the sentence.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.explain import false_sentences
    >>> false_sentences(vlm, {}, 30).empty  # no word, no share
    True
    """
    shares = {}
    for word, learnt in library.items():
        rows = _coloured(word, learnt.samples)
        counts = Counter(learnt.samples[row].truth["colour"] for row in rows)
        if sum(n > 1 for n in counts.values()) < 2:
            continue
        dictionary = learnt.dictionaries[layer]
        usual = dictionary.transform(learnt.states[layer])
        scale = usual.mean(axis=0).clip(1e-9)
        colours = _repeated(known_facts(learnt.samples)[["colour"]])
        of_colours = factor_information(usual, colours, n_permutations=200)
        best = of_colours.sort_values("share").groupby("value").tail(1)
        concepts = best.set_index("value")["concept"]
        false = dict(zip(concepts.index, np.roll(concepts.index, 1), strict=True))
        rows = [row for row in rows if learnt.samples[row].truth["colour"] in false]
        samples = [learnt.samples[row] for row in rows]
        real = np.array([sample.truth["colour"] for sample in samples])
        exchanged = np.array([false[colour] for colour in real])
        lies = []
        for sample, colour in zip(samples, exchanged, strict=True):
            caption = sample.captions[0].replace(sample.truth["colour"], colour)
            lies.append(caption_up_to(word)(replace(sample, captions=(caption,))))
        false_states = capture(vlm, samples, layer, words=word, answers=lies)[layer]
        states = {"true": learnt.states[layer][rows], "false": false_states}
        sentences = {"true": real, "false": exchanged}
        for kind, of_kind in states.items():
            codes = dictionary.transform(of_kind) / scale
            strongest = concepts.index[codes[:, concepts].argmax(axis=1)].to_numpy()
            shares[f"{word}, {kind} sentence"] = {
                "colour of the picture": (strongest == real).mean(),
                "colour of the sentence": (strongest == sentences[kind]).mean(),
            }
    return pd.DataFrame(shares, index=["colour of the picture", "colour of the sentence"])


def first_piece(vlm: VLM, word: str) -> str:
    """Return the first token of a word, as text.

    Parameters
    ----------
    vlm : VLM
        The model whose tokenizer cuts the word.
    word : str
        The word.

    Returns
    -------
    str
        The text of the token, without space.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.explain import first_piece
    >>> first_piece(vlm, "woman")
    'woman'
    """
    return vlm.tokenizer.decode(vlm.token_ids(word)[:1]).strip()


def next_words(vlm: VLM, states: Float[Tensor, "n d"]) -> pd.Series:
    """Return the word that each state of the last layer predicts.

    Parameters
    ----------
    vlm : VLM
        The model.
    states : Tensor (n, d)
        States of the last layer.

    Returns
    -------
    pandas.Series
        The most probable token of each, without space.

    Examples
    --------
    >>> from xlvlms_tutorial import capture
    >>> from xlvlms_tutorial.tutorials.explain import next_words
    >>> states = capture(vlm, samples, 30, span="question")
    >>> len(next_words(vlm, states[30]))
    4
    """
    return top_tokens(vlm, states, 1)["word"].str.strip()


def check_explanations(experiment: Experiment, match: pd.DataFrame, new_codes: np.ndarray) -> None:
    """Write down whether explanations hold what follows the word in the sentence.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    match : pandas.DataFrame
        Of :func:`match_concepts`.
    new_codes : ndarray (pictures, concepts)
        The codes of the new pictures, of which the three largest are the explanation.
    """
    action = []
    scenery = []
    for concepts in top_concepts(new_codes, min(3, new_codes.shape[1])):
        factors = set(match["factor"].reindex(concepts))
        action.append("action" in factors)
        scenery.append(bool(factors & {"item", "colour", "place", "side"}))
    experiment.check("most explanations hold the action", np.mean(action) > 0.6)
    experiment.check("many explanations hold the object or where it is", np.mean(scenery) > 0.4)


def check_maps(experiment: Experiment, balance: Mapping[tuple[str, str], pd.Series]) -> None:
    """Write down from which half of the picture the concepts of actions and objects come.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    balance : mapping of (factor, way) to pandas.Series
        Of :func:`side_balance`; nothing is written down unless two pictures
        have both an action and an object.
    """
    of_action = balance.get(("action", "occlusion"))
    of_item = balance.get(("item", "occlusion"))
    if of_action is None or of_item is None:
        return
    if len(of_action.index.intersection(of_item.index)) < 2:
        return
    cheap = balance["item", "activation"]
    action = bootstrap(of_action)
    item = bootstrap(of_item)
    by_factor = _paired(of_item, of_action)
    by_way = _paired(of_item, cheap)
    experiment.check(
        "by occlusion actions come from the half of the one who acts", action.high < -0.2
    )
    experiment.check("by occlusion objects come from neither half surely", item.low < 0 < item.high)
    experiment.check(
        "in the same pictures objects lie nearer to their half than actions", by_factor.low > 0.2
    )
    experiment.check(
        "by activation objects lie nearer to the other half than by occlusion", by_way.low > 0
    )


def check_false_sentences(experiment: Experiment, shares: pd.DataFrame) -> None:
    """Write down whether the picture's colour or the false sentence's wins.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    shares : pandas.DataFrame
        Of :func:`false_sentences`; nothing is written down if it is empty.
    """
    false = shares.filter(like="false")
    if not false.size:
        return
    picture = false.loc["colour of the picture"]
    sentence = false.loc["colour of the sentence"]
    experiment.check(
        "against a false word the picture's colour wins more often",
        (picture > sentence + 0.1).all(),
    )
    experiment.check("a false word has its part", (sentence > 0.05).any())


def _paired(first: pd.Series, second: pd.Series) -> Estimate:
    """How much higher the first is, in the pictures that both have."""
    pairs = pd.concat([first, second], axis=1, keys=["first", "second"]).dropna()
    return difference(pairs["first"], pairs["second"], paired=True)


def _common_words(vlm: VLM, world: Sequence[Sample], word: str) -> list[str]:
    """The words that references and a few captions of the model have; the wanted one first."""
    looked_at = [*_mentioning(world, word)[:8], *world[:8]]
    images = [sample.image for sample in looked_at]
    captions = vlm.generate(images, [PROMPTS["image"]] * len(images), 12)
    written = _word_counts(sample.captions[0] for sample in world)
    spoken = _word_counts(captions)
    subjects = {sample.truth.get("subject") for sample in world}
    common = [text for text in spoken if spoken[text] > 2 and written[text] >= _RARE]

    def rank(text: str) -> tuple[bool, bool, int, str]:
        return text != word, text not in subjects, -written[text], text

    return sorted(common, key=rank)


def _word_counts(texts: Iterable[str]) -> Counter[str]:
    """In how many texts each common English word is."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(re.findall("[a-z]+", text.lower())))
    return Counter({word: n for word, n in counts.items() if ENGLISH.admits(word)})


def _mentioning(world: Iterable[Sample], word: str) -> list[Sample]:
    pattern = whole_words([word])
    return [sample for sample in world if pattern.search(sample.captions[0])]


def _states_of(
    vlm: VLM, word: str, samples: Sequence[Sample], layers: Sequence[int]
) -> Activations:
    """The states that predict a word, where it is also the model's own next word."""
    states = capture(vlm, samples, layers, words=word, answers=caption_up_to(word))
    predicted = next_words(vlm, states[max(layers)]) == first_piece(vlm, word)
    return states.select(predicted.to_numpy())


def _repeated(facts: pd.DataFrame) -> pd.DataFrame:
    counts = facts.apply(lambda column: column.map(column.value_counts()))
    return facts.where(counts > 1, None)


def _coloured(word: str, samples: Sequence[Sample]) -> list[int]:
    """The pictures whose caption names their colour before the word."""
    rows = []
    for row, sample in enumerate(samples):
        colour = str(sample.truth.get("colour"))
        if whole_words([colour]).search(caption_up_to(word)(sample)):
            rows.append(row)
    return rows


def _small(
    samples: Sequence[Sample], groups: Iterable[Sequence[int]], size: int, quality: int
) -> tuple[Html, dict[Hashable, Html]]:
    """Small pictures of all rows in some groups, by row."""
    rows = sorted({row for group in groups for row in group})
    alt = [samples[row].captions[0] for row in rows]
    images = {row: samples[row].image for row in rows}
    return thumbnails(images, size=size, quality=quality, alt=alt)
