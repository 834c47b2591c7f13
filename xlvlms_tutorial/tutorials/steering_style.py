"""Pictures, captions and scores of the chapter on the style of captions.

The chapter makes the vectors and adds them. What is here prepares captions in two ways, tries
settings on validation pictures, and scores what was written.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool

from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import DATASETS, Sample, load_samples
from xlvlms_tutorial.loading.loading import load
from xlvlms_tutorial.methods.steering import Run, SteeringVectors, best_setting
from xlvlms_tutorial.metrics import (
    STYLE_WORDS,
    Estimate,
    bleu,
    caption_attributes,
    cider,
    difference,
    forms,
    style_rate,
    style_share,
)
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.tutorials.experiments import Experiment, describe, describe_steered
from xlvlms_tutorial.validation import require_one_of

_VARIED = 0.65  # the share of different words above which a caption does not stutter
_FEW = 3  # a style needs more captions of either kind than this
_SHORT = 18  # tokens of captions by which settings are chosen
LONG = 22  # tokens of captions that are reported

# The strengths that are tried for each recipe.
STRENGTHS = {"published": (0.25, 0.5), "paired": (0.5, 1.0), "distilled": (1.0,)}

# What is asked for each style.
REQUESTS = {
    "place": "Describe the picture and the place.",
    "colour": "Describe the picture and all its colours.",
    "mood": "Describe the picture and its mood.",
    "time": "Describe the picture and the time of day.",
}

Pair = tuple[str | None, str | None]
Name = tuple[str, str]  # recipe and style


@dataclass(frozen=True)
class StyleStudy:
    """Hold a model with its pictures in three parts: for vectors, choices and numbers.

    :func:`study` makes it.

    Parameters
    ----------
    vlm : VLM
        The model.
    dataset : str
        Where the pictures are from.
    layers : list of int
        The layers at which vectors are made.
    train, validation, test : list of Sample
        The pictures that have captions.
    seed : int
        Of the pictures.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_style import StyleStudy
    >>> StyleStudy(vlm, "scenes", [20], samples, samples, samples, seed=0).layers
    [20]
    """

    vlm: VLM
    dataset: str
    layers: list[int]
    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    seed: int

    @cached_property
    def usual_validation(self) -> list[str]:
        """What the model says of the validation pictures without steering."""
        return describe(self.vlm, self.validation, _SHORT)

    @cached_property
    def usual(self) -> list[str]:
        """What the model says of the test pictures without steering."""
        return describe(self.vlm, self.test, LONG)

    @cached_property
    def _states(self) -> dict[tuple, Activations]:
        return {}

    def read(
        self,
        pictures: Sequence[Sample],
        captions: Sequence[str],
        words: Sequence[str] | None = None,
        vlm: VLM | None = None,
    ) -> Activations:
        """Read the states of captions; those of the model under study once.

        Parameters
        ----------
        pictures : sequence of Sample
            The pictures.
        captions : sequence of str
            A caption for each.
        words : sequence of str, optional
            Words of which the first in each caption gives the state that predicts it; by default
            the mean over each caption.
        vlm : VLM, optional
            Another model that reads them, such as one that was fine-tuned.

        Returns
        -------
        Activations
            The states (n, d) at each layer.
        """
        place = {"span": "answer"} if words is None else {"words": words}
        options = place | {"answers": list(captions), "batch_size": 32}
        if vlm is not None:
            return capture(vlm, pictures, self.layers, **options)
        ids = tuple(picture.id for picture in pictures)
        key = (ids, tuple(captions), tuple(words or ()))
        if key not in self._states:
            self._states[key] = capture(self.vlm, pictures, self.layers, **options)
        return self._states[key]


def study(
    model: str, dataset: str, sizes: Sequence[int], depths: Iterable[float], seed: int = 0
) -> StyleStudy:
    """Load a model and its pictures in three parts.

    Use it at the head of the chapter.

    Parameters
    ----------
    model, dataset : str
        As for ``load`` and ``load_samples``.
    sizes : sequence of three int
        How many pictures for vectors, for choices and for numbers.
    depths : iterable of float
        The layers as shares of the depth, 0 to 1.
    seed : int, default 0
        Of the pictures.

    Returns
    -------
    StyleStudy
        The model with its pictures.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.study("pocket-llava", "scenes", (4, 2, 2), [0.5])
    >>> ours.layers, len(ours.train), len(ours.test)
    ([15], 4, 2)
    """
    vlm = load(model)
    parts = []
    for split, n in zip(("train", "validation", "test"), sizes, strict=True):
        samples = load_samples(dataset, n, split, seed)
        parts.append([sample for sample in samples if sample.captions])
    layers = sorted({max(1, vlm.layer_at(share)) for share in depths})
    return StyleStudy(vlm, dataset, layers, *parts, seed)


def studies(
    ours: StyleStudy, family: str, sizes: Sequence[int], depths: Iterable[float]
) -> dict[str, StyleStudy]:
    """Name the model that each recipe is about.

    Adapters are those of one model and its scenes. What is made of them is about that model, which
    is ours in the book, and another one where readers bring theirs.

    Parameters
    ----------
    ours : StyleStudy
        The model under study and its pictures.
    family : str
        The model that the adapters belong to.
    sizes : sequence of three int
        As for :func:`study`.
    depths : iterable of float
        As for :func:`study`.

    Returns
    -------
    dict of str to StyleStudy
        The model and its pictures for each recipe.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.StyleStudy(vlm, "scenes", [15], samples, samples, samples, seed=0)
    >>> of = steering_style.studies(ours, "pocket-llava", (4, 4, 4), [0.5])
    >>> of["adapter"] is of["paired"] is ours
    True
    """
    taught = ours
    if (ours.vlm.name, ours.dataset) != (family, "scenes"):
        taught = study(family, "scenes", sizes, depths, ours.seed)
    studied = dict.fromkeys(("no steering", "published", "paired", "prompt"), ours)
    return studied | dict.fromkeys(("distilled", "adapter"), taught)


def caption_pairs(study: StyleStudy, split: str, style: str, words: Iterable[str]) -> list[Pair]:
    """Find for each picture a plain caption and one that has a style.

    Data sets with styled captions have one for each picture. Other captions are sorted: the first
    without a word of the style is the plain one, the first with such a word has the style.

    Parameters
    ----------
    study : StyleStudy
        The model and its pictures.
    split : {"train", "test"}
        Which of the pictures.
    style : str
        The name of the style, such as "mood".
    words : iterable of str
        The words of the style.

    Returns
    -------
    list of (str or None, str or None)
        The plain caption and the styled one of each picture; None where there is none.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.StyleStudy(vlm, "scenes", [15], samples, samples, samples, seed=0)
    >>> pairs = steering_style.caption_pairs(ours, "train", "time", ["day", "dusk", "night"])
    >>> len(pairs), len(pairs[0])
    (4, 2)
    """
    require_one_of(split, ("train", "test"), "split")
    samples = study.train if split == "train" else study.test
    styled_set = f"{study.dataset}-{style}"
    pairs: list[Pair] = []
    if styled_set in DATASETS:
        styled_samples = load_samples(styled_set, len(samples), split, study.seed)
        for sample, styled in zip(samples, styled_samples, strict=False):
            pairs.append((sample.captions[0], styled.captions[0]))
        return pairs
    words = list(words)
    for sample in samples:
        first: dict[bool, str] = {}
        for caption, has in zip(sample.captions, style_share(sample.captions, words), strict=True):
            first.setdefault(bool(has), caption)
        pairs.append((first.get(False), first.get(True)))
    return pairs


def with_both(
    study: StyleStudy, style: str, words: Iterable[str]
) -> tuple[list[Sample], list[str], list[str]]:
    """Take the training pictures that have a plain caption and one in a style.

    Use it to make a vector from the same pictures, described in two ways.

    Parameters
    ----------
    study : StyleStudy
        The model and its pictures.
    style : str
        The name of the style.
    words : iterable of str
        The words of the style.

    Returns
    -------
    tuple of list of Sample, list of str and list of str
        The pictures, their plain captions and their styled ones.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.StyleStudy(vlm, "scenes", [15], samples, samples, samples, seed=0)
    >>> pictures, plain, styled = steering_style.with_both(ours, "time", ["day", "dusk", "night"])
    >>> len(pictures) == len(plain) == len(styled)
    True
    """
    pictures = []
    plain_captions = []
    styled_captions = []
    pairs = caption_pairs(study, "train", style, words)
    for sample, (plain, styled) in zip(study.train, pairs, strict=True):
        if plain is not None and styled is not None:
            pictures.append(sample)
            plain_captions.append(plain)
            styled_captions.append(styled)
    return pictures, plain_captions, styled_captions


def rate_table(
    captions: Mapping[str, Sequence[str]], words: Mapping[str, Iterable[str]]
) -> pd.DataFrame:
    """Measure how much several sets of captions dwell on each style.

    Parameters
    ----------
    captions : mapping of str to sequence of str
        Captions by what wrote them; sets without any are left out.
    words : mapping of str to iterable of str
        The words of each style.

    Returns
    -------
    pandas.DataFrame
        A row for each set: its first caption, and the mean share of words of each style.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> steering_style.rate_table({"ours": ["A day."]}, {"time": ["day"]})
         first caption  time
    ours        A day.   0.5
    """
    rows = {}
    for name, texts in captions.items():
        if len(texts):
            rows[name] = {"first caption": texts[0]}
            for style, of_style in words.items():
                rows[name][style] = style_rate(texts, list(of_style)).mean()
    return pd.DataFrame.from_dict(rows, orient="index")


def usable_styles(study: StyleStudy, words: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Find the styles of which there are enough captions to make vectors.

    Parameters
    ----------
    study : StyleStudy
        The model and its pictures.
    words : mapping of str to iterable of str
        The words of each style.

    Returns
    -------
    dict of str to list of str
        The styles with enough captions of either kind ("published"), and those for which pictures
        with both are compared ("paired"): colours and the time of day where possible.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.study("pocket-llava", "scenes", (16, 2, 2), [0.5])
    >>> steering_style.usable_styles(ours, {"time": ["day", "dusk", "night"], "sea": ["ship"]})
    {'published': ['time'], 'paired': ['time']}
    """
    usable = []
    paired = []
    for style, style_words in words.items():
        n_plain = n_styled = n_paired = 0
        for plain, styled in caption_pairs(study, "train", style, style_words):
            n_plain += plain is not None
            n_styled += styled is not None
            n_paired += plain is not None and styled is not None
        if min(n_plain, n_styled) > _FEW:
            usable.append(style)
            if n_paired > _FEW:
                paired.append(style)
    preferred = [style for style in paired if style in ("colour", "time")]
    return {"published": usable, "paired": preferred or paired}


def contrast(
    study: StyleStudy, style: str, words: Iterable[str], recipe: str
) -> tuple[Activations, Activations]:
    """Read plain captions and captions that have a style, by one of two recipes.

    Use it to make a vector for each of several styles; ``mean_difference`` takes what it returns.

    Parameters
    ----------
    study : StyleStudy
        The model and its pictures.
    style : str
        The name of the style.
    words : iterable of str
        The words of the style.
    recipe : {"published", "paired"}
        "published" takes the mean over plain captions, and the state that predicts the first word
        of the style in styled ones. "paired" takes the means over both captions of the same
        pictures.

    Returns
    -------
    tuple of two Activations
        The states (n, d) of plain captions and those (m, d) of styled ones, at each layer.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.study("pocket-llava", "scenes", (8, 2, 2), [0.1])
    >>> plain, styled = steering_style.contrast(ours, "time", ["day", "dusk", "night"], "paired")
    >>> len(plain) == len(styled)
    True
    """
    require_one_of(recipe, ("published", "paired"), "recipe")
    words = list(words)
    if recipe == "paired":
        pictures, plain, styled = with_both(study, style, words)
        return study.read(pictures, plain), study.read(pictures, styled)
    pairs = caption_pairs(study, "train", style, words)
    plain: tuple[list[Sample], list[str]] = ([], [])
    styled: tuple[list[Sample], list[str]] = ([], [])
    for sample, captions in zip(study.train, pairs, strict=True):
        for (pictures, texts), caption in zip((plain, styled), captions, strict=True):
            if caption is not None:
                pictures.append(sample)
                texts.append(caption)
    spelt = sorted({form for word in words for form in forms(word)})
    return study.read(*plain), study.read(*styled, spelt)


def distil(study: StyleStudy, tuned: VLM, style: str, words: Iterable[str]) -> SteeringVectors:
    """Make one vector of what fine-tuning on a style did to the states of captions.

    Use it as a control: it is what a single vector can hold of the training.

    Parameters
    ----------
    study : StyleStudy
        The base model and its pictures.
    tuned : VLM
        The same model after fine-tuning.
    style : str
        The name of the style.
    words : iterable of str
        The words of the style.

    Returns
    -------
    SteeringVectors
        The mean shift from base to tuned model at each layer, both of which read the styled
        captions.

    Examples
    --------
    >>> from xlvlms_tutorial import load
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.StyleStudy(vlm, "scenes", [2], samples, samples, samples, seed=0)
    >>> tuned = load("pocket-llava", adapter="pocket-mood")
    >>> steering_style.distil(ours, tuned, "mood", ["cheerful"]).layers
    [2]
    """
    pictures = []
    captions = []
    pairs = caption_pairs(study, "train", style, words)
    for sample, (_, styled) in zip(study.train, pairs, strict=True):
        if styled is not None:
            pictures.append(sample)
            captions.append(styled)
    before = study.read(pictures, captions)
    after = study.read(pictures, captions, vlm=tuned)
    shifts = {}
    for layer in study.layers:
        shifts[layer] = (after[layer] - before[layer]).mean(0)
    return SteeringVectors(shifts, before.provenance)


def steer(
    vlm: VLM,
    vectors: SteeringVectors,
    layer: int,
    strengths: Sequence[float],
    samples: Sequence[Sample],
    max_new_tokens: int = LONG,
    positions: str = "all",
) -> dict[float, list[str]]:
    """Let a model describe pictures while a vector is added, at several strengths in one batch.

    Use it where several strengths are tried: generation is what costs, and ``add`` takes one vector
    for each sample.

    Parameters
    ----------
    vlm : VLM
        The model.
    vectors : SteeringVectors
        Vectors that were made for it.
    layer : int
        Where the vector is added.
    strengths : sequence of float
        The factors of the vector.
    samples : sequence of Sample
        The pictures.
    max_new_tokens : int, default 22
        How many tokens it may write.
    positions : str, default "all"
        Where the vector is added, as for :meth:`SteeringVectors.apply`.

    Returns
    -------
    dict of float to list of str
        The captions at each strength.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import SteeringVectors
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> vectors = SteeringVectors({15: torch.ones(vlm.width)}, {"model": "pocket-llava"})
    >>> sorted(steering_style.steer(vlm, vectors, 15, (0.5, 1.0), samples[:1], 2))
    [0.5, 1.0]
    """
    runs = [Run(None, vectors, layer, strength) for strength in strengths]
    captions = describe_steered(vlm, runs, samples, max_new_tokens, positions=positions)
    return dict(zip(strengths, captions, strict=True))


def steer_test(
    studies: Mapping[str, StyleStudy],
    vectors: Mapping[Name, SteeringVectors],
    settings: Mapping[Name, tuple[int, float]],
) -> dict[Name, list[str]]:
    """Let models describe the test pictures with every vector, at its layer and strength.

    Parameters
    ----------
    studies : mapping of str to StyleStudy
        The model and its pictures for each recipe.
    vectors : mapping of (str, str) to SteeringVectors
        The vectors, by recipe and style.
    settings : mapping of (str, str) to (int, float)
        Layer and strength of each.

    Returns
    -------
    dict of (str, str) to list of str
        A caption of each test picture, by recipe and style.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import SteeringVectors
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.StyleStudy(vlm, "scenes", [15], samples, samples, samples[:1], seed=0)
    >>> vectors = SteeringVectors({15: torch.ones(vlm.width)}, {"model": vlm.name})
    >>> name = ("paired", "time")
    >>> texts = steering_style.steer_test({"paired": ours}, {name: vectors}, {name: (15, 0.1)})
    >>> len(texts[name])
    1
    """
    answers = {}
    for study, names in _by_study(studies, settings):
        runs = [Run(name, vectors[name], *settings[name]) for name in names]
        texts = describe_steered(study.vlm, runs, study.test, LONG)
        answers.update(zip(names, texts, strict=True))
    return answers


def _by_study(
    studies: Mapping[str, StyleStudy], names: Iterable[Name]
) -> list[tuple[StyleStudy, list[Name]]]:
    """The recipes and styles about each model."""
    parts: dict[int, tuple[StyleStudy, list[Name]]] = {}
    for name in names:
        study = studies[name[0]]
        parts.setdefault(id(study), (study, []))[1].append(name)
    return list(parts.values())


def prompted(study: StyleStudy, styles: Sequence[str], n: int, focus: str) -> dict[Name, list[str]]:
    """Ask for each style in the prompt, by a sentence of ``REQUESTS``.

    Parameters
    ----------
    study : StyleStudy
        The model and its pictures.
    styles : sequence of str
        The styles.
    n : int
        How many test pictures are described.
    focus : str
        The style for which all of them are.

    Returns
    -------
    dict of (str, str) to list of str
        The captions, by "prompt" and the style.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.StyleStudy(vlm, "scenes", [15], samples, samples, samples, seed=0)
    >>> texts = steering_style.prompted(ours, ["time"], 1, "place")
    >>> len(texts["prompt", "time"])
    1
    """
    samples = []
    prompts = []
    names = []
    for style in styles:
        pictures = study.test if style == focus else study.test[:n]
        samples += pictures
        prompts += [REQUESTS[style]] * len(pictures)
        names += [("prompt", style)] * len(pictures)
    answers: dict[Name, list[str]] = {}
    for name, caption in zip(names, describe(study.vlm, samples, LONG, prompts), strict=True):
        answers.setdefault(name, []).append(caption)
    return answers


def sweep(
    studies: Mapping[str, StyleStudy],
    vectors: Mapping[Name, SteeringVectors],
    words: Mapping[str, Iterable[str]],
) -> pd.DataFrame:
    """Try layers and strengths of vectors on the validation pictures.

    Published vectors, which are long, are tried at a quarter and a half of their length; paired
    ones at a half and in full; distilled ones in full.

    Parameters
    ----------
    studies : mapping of str to StyleStudy
        The model and its pictures for each recipe.
    vectors : mapping of (str, str) to SteeringVectors
        The vectors, by recipe and style.
    words : mapping of str to iterable of str
        The words of each style.

    Returns
    -------
    pandas.DataFrame
        A row for each setting: recipe, style, layer, strength, rate (of style words), gain (the
        rate minus that without steering) and broken (the share of captions that are not
        :func:`intact`).

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import SteeringVectors
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.StyleStudy(vlm, "scenes", [15], samples, samples[:1], samples, seed=0)
    >>> vectors = SteeringVectors({15: torch.ones(vlm.width)}, {"model": "pocket-llava"})
    >>> table = steering_style.sweep(
    ...     {"paired": ours}, {("paired", "time"): vectors}, {"time": ["day"]}
    ... )
    >>> table["strength"].tolist()
    [0.5, 1.0]
    """
    rows = []
    for study, names in _by_study(studies, vectors):
        samples = study.validation
        runs = []
        for name in names:
            ends = study.layers[0], study.layers[-1]
            layers = ends if name[0] == "distilled" else study.layers[-2:]
            for layer in sorted(set(layers)):
                for strength in STRENGTHS[name[0]]:
                    runs.append(Run(name, vectors[name], layer, strength))
        written = describe_steered(study.vlm, runs, samples, _SHORT)
        for run, captions in zip(runs, written, strict=True):
            recipe, style = run.name
            rate = style_rate(captions, words[style]).mean()
            before = style_rate(study.usual_validation, words[style]).mean()
            broken = 1 - intact(captions, samples).mean()
            row = {"recipe": recipe, "style": style, "layer": run.layer, "strength": run.strength}
            rows.append(row | {"rate": rate, "gain": rate - before, "broken": broken})
    return pd.DataFrame(rows)


def best_within(table: pd.DataFrame, by: str, side_effect: str, limit: float) -> tuple[int, float]:
    """Choose the best setting among those with a small side effect.

    Where every setting has a larger one, the smallest counts as small.

    Parameters
    ----------
    table : pandas.DataFrame
        A row for each setting, with layer, strength, and the columns named here.
    by : str
        The column that is to be as large as possible.
    side_effect : str
        The column of the side effect.
    limit : float
        How large it may be.

    Returns
    -------
    tuple of int and float
        Layer and strength.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> table = pd.DataFrame({"layer": [15, 20], "strength": [1.0, 1.0]})
    >>> table = table.assign(rate=[0.1, 0.3], broken=[0.2, 0.9])
    >>> steering_style.best_within(table, "rate", "broken", 0.25)
    (15, 1.0)
    """
    allowed = max(limit, table[side_effect].min())
    return best_setting(table, by, (side_effect, allowed))


def best_settings(table: pd.DataFrame, limit: float) -> dict[Name, tuple[int, float]]:
    """Choose layer and strength for each recipe and style, as :func:`best_within` does for one.

    Parameters
    ----------
    table : pandas.DataFrame
        From :func:`sweep`.
    limit : float
        The share of captions that may be broken.

    Returns
    -------
    dict of (str, str) to (int, float)
        Layer and strength by recipe and style.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> row = {"recipe": "paired", "style": "time", "layer": 15, "strength": 1.0}
    >>> steering_style.best_settings(pd.DataFrame([row | {"rate": 0.1, "broken": 0.0}]), 0.25)
    {('paired', 'time'): (15, 1.0)}
    """
    settings = {}
    for name, rows in table.groupby(["recipe", "style"]):
        settings[name] = best_within(rows, "rate", "broken", limit)
    return settings


def named_facts(captions: Sequence[str], samples: Sequence[Sample]) -> pd.DataFrame:
    """Find which facts of its picture each caption names.

    Parameters
    ----------
    captions : sequence of str
        One caption for each picture.
    samples : sequence of Sample
        The pictures.

    Returns
    -------
    pandas.DataFrame
        A row for each caption: subject, action, item, colour and place, true or false, NA where the
        picture has no such fact.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> captions = [sample.captions[0] for sample in samples]
    >>> bool(steering_style.named_facts(captions, samples)["subject"].all())
    True
    """
    return caption_attributes(captions, [sample.truth for sample in samples])


def intact(captions: Sequence[str], samples: Sequence[Sample]) -> Bool[np.ndarray, "n"]:
    """Return whether each caption names subject and object of its picture, and does not stutter.

    Use it beside the rate of style words, which a stutter can drive up.

    Parameters
    ----------
    captions : sequence of str
        One caption for each picture.
    samples : sequence of Sample
        The pictures.

    Returns
    -------
    array of bool (n,)
        True where subject and object are named and most words are different.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> caption = samples[0].captions[0]
    >>> steering_style.intact([caption, caption * 3], [samples[0]] * 2).tolist()
    [True, False]
    """
    named = named_facts(captions, samples)[["subject", "item"]].all(axis=1).to_numpy(bool)
    varied = []
    for caption in captions:
        words = caption.lower().split()
        varied.append(len(set(words)) > _VARIED * len(words))
    return named & np.array(varied, dtype=bool)


def score_table(
    answers: Mapping[Name, Sequence[str]],
    studies: Mapping[str, StyleStudy],
    words: Mapping[str, Iterable[str]],
) -> pd.DataFrame:
    """Score captions against the facts, the plain references and those of a style.

    Parameters
    ----------
    answers : mapping of (str, str) to sequence of str
        Captions of the first test pictures, by recipe and style.
    studies : mapping of str to StyleStudy
        The model and its pictures for each recipe.
    words : mapping of str to iterable of str
        The words of each style.

    Returns
    -------
    pandas.DataFrame
        A row for each style and recipe: rate (of style words), intact, CIDEr and BLEU with the
        plain references, and "CIDEr, styled" with those of the style (NaN where fewer than two
        pictures have one).

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.StyleStudy(vlm, "scenes", [15], samples, samples, samples, seed=0)
    >>> captions = [sample.captions[0] for sample in samples]
    >>> table = steering_style.score_table(
    ...     {("prompt", "time"): captions}, {"prompt": ours}, {"time": ["day", "dusk", "night"]}
    ... )
    >>> table["intact"].tolist()
    [1.0]
    """
    rows = {}
    for (recipe, style), captions in answers.items():
        study = studies[recipe]
        samples = study.test[: len(captions)]
        references = [list(sample.captions) for sample in samples]
        of_style = []
        pairs = caption_pairs(study, "test", style, words[style])
        for caption, (_, styled) in zip(captions, pairs, strict=False):
            if styled:
                of_style.append((caption, [styled]))
        styled_cider = np.nan
        if len(of_style) > 1:
            styled_cider = cider(*zip(*of_style, strict=True))[1]
        rows[style, recipe] = {
            "rate": style_rate(captions, words[style]).mean(),
            "intact": intact(captions, samples).mean(),
            "CIDEr": cider(captions, references)[1],
            "BLEU": bleu(captions, references),
            "CIDEr, styled": styled_cider,
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["style", "captions"])
    return table.sort_index(level=0, sort_remaining=False, kind="stable")


def gain(study: StyleStudy, captions: Sequence[str], words: Iterable[str]) -> Estimate:
    """Measure how much more of a style captions have than those without steering.

    Parameters
    ----------
    study : StyleStudy
        The model and its pictures.
    captions : sequence of str
        Captions of the first test pictures.
    words : iterable of str
        The words of the style.

    Returns
    -------
    Estimate
        The rate of style words minus that of the usual captions, over pictures.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> ours = steering_style.StyleStudy(vlm, "scenes", [15], samples, samples, samples[:2], seed=0)
    >>> steering_style.gain(ours, ours.usual, ["day"]).value
    0.0
    """
    words = list(words)
    before = style_rate(study.usual[: len(captions)], words)
    return difference(style_rate(captions, words), before, paired=True, seed=study.seed)


def replace_phrases(caption: str, phrases: Mapping[str, str]) -> str:
    """Put other phrases in the place of some, and leave the rest of a caption alone.

    Parameters
    ----------
    caption : str
        The caption.
    phrases : mapping of str to str
        What takes the place of what; of phrases that begin alike, the longer first.

    Returns
    -------
    str
        The new caption.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> steering_style.replace_phrases("A frog by day.", {"by day": "in a quiet mood"})
    'A frog in a quiet mood.'
    """
    pattern = rf"\b(?:{'|'.join(phrases)})\b"
    return re.sub(pattern, lambda match: phrases[match[0]], caption)


def facts_table(
    answers: Mapping[str, Sequence[str]], samples: Sequence[Sample], times: Iterable[str]
) -> pd.DataFrame:
    """Measure which facts of their pictures captions name, and whether they tell the right time.

    Parameters
    ----------
    answers : mapping of str to sequence of str
        A caption for each picture, by what made them.
    samples : sequence of Sample
        The pictures.
    times : iterable of str
        The words for times of day.

    Returns
    -------
    pandas.DataFrame
        A row for each: the shares of captions that name subject, action, item, colour and place,
        the mean of these shares ("all facts"), and of the captions that tell a time the share in
        which it is right (NaN where none does).

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> captions = [f"A frog by {sample.truth['time']}." for sample in samples]
    >>> times = ["day", "dusk", "night"]
    >>> table = steering_style.facts_table({"told": captions}, samples, times)
    >>> table["time, where told"].tolist()
    [1.0]
    """
    times = list(times)
    rows = {}
    for name, captions in answers.items():
        agrees = []
        for caption, sample, tells in zip(
            captions, samples, style_share(captions, times), strict=True
        ):
            if tells and sample.truth.get("time"):
                agrees.append(sample.truth["time"] in caption.lower())
        facts = named_facts(captions, samples).astype(float).mean()
        right_time = pd.Series(agrees, dtype=float).mean()
        rows[name] = facts.to_dict() | {"all facts": facts.mean(), "time, where told": right_time}
    return pd.DataFrame.from_dict(rows, orient="index")


def record_gains(
    experiment: Experiment,
    studies: Mapping[str, StyleStudy],
    answers: Mapping[Name, Sequence[str]],
    words: Mapping[str, Iterable[str]],
    focus: str,
    seed: int = 0,
) -> dict[Name, Estimate]:
    """Record STEER-4: what each recipe brings, and what the paired vector has over a prompt.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    studies : mapping of str to StyleStudy
        From :func:`studies`, by recipe.
    answers : mapping of (str, str) to sequence of str
        The captions by recipe and style.
    words : mapping of str to iterable of str
        The words of each style.
    focus : str
        The style that the paired vector and the prompt are compared for.
    seed : int, default 0
        Of the intervals.

    Returns
    -------
    dict of (str, str) to Estimate
        The gain by style and recipe.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment
    >>> from xlvlms_tutorial.tutorials.steering_style import StyleStudy, record_gains
    >>> study = StyleStudy(vlm, "scenes", [20], samples, samples, samples, seed=0)
    >>> answers = dict.fromkeys([("paired", "time"), ("prompt", "time")], study.usual)
    >>> recipes, words = {"paired": study, "prompt": study}, {"time": ["night"]}
    >>> experiment = Experiment("steering-style", "tiny", "scenes")
    >>> gains = record_gains(experiment, recipes, answers, words, "time")
    >>> gains["time", "paired"].value, len(experiment.records)
    (0.0, 2)
    """
    gains = {}
    for (recipe, style), captions in answers.items():
        gains[style, recipe] = gain(studies[recipe], captions, words[style])
        if recipe in ("published", "paired"):
            variant = f"style={style}, {recipe}"
            effect = gains[style, recipe]
            experiment.record("STEER-4", effect, "no steering", variant, choice="validation")
    steered, prompted = (
        style_rate(answers[recipe, focus], words[focus]) for recipe in ("paired", "prompt")
    )
    lead = difference(steered, prompted, paired=True, seed=seed)
    variant = f"style={focus}, paired, minus the prompt"
    experiment.record("STEER-4", lead, "prompt", variant, choice="validation")
    return gains


def check_usual(
    experiment: Experiment, captions: Sequence[str], words: Mapping[str, Iterable[str]]
) -> None:
    """Write down which sentences hold about captions of the model as it is.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    captions : sequence of str
        The captions.
    words : mapping of str to iterable of str
        The words of place, mood and time.
    """
    share = {style: style_share(captions, of_style).mean() for style, of_style in words.items()}
    experiment.check("the model always names the place", share["place"] == 1)
    experiment.check("the model has no mood", share["mood"] == 0)
    experiment.check("some captions tell the time of day and others do not", 0 < share["time"] < 1)


def check_sweep(experiment: Experiment, table: pd.DataFrame, limit: float) -> None:
    """Write down which sentences hold about the settings tried on validation pictures.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    table : pandas.DataFrame
        From :func:`sweep`.
    limit : float
        The share of broken captions that is allowed.
    """
    of_time = table["style"] == "time"
    experiment.check(
        "places, colours and moods gain a few hundredths at most",
        table.loc[~of_time, "gain"].max() < 0.05,
    )
    unbroken = table[of_time & (table["broken"] <= limit)]
    experiment.check(
        "the time of day gains with most captions unbroken", (unbroken["gain"] > 0.02).any()
    )


def check_gains(experiment: Experiment, bands: pd.DataFrame) -> None:
    """Write down which sentences hold about the gains in the paper's styles.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    bands : pandas.DataFrame
        The gains of :func:`record_gains`, with the columns "style", "recipe" and "value".
    """
    value = bands[bands["style"].isin(STYLE_WORDS)].groupby("recipe")["value"]
    lowest, highest = value.min(), value.max()
    vectors = [highest.get(recipe, 0) for recipe in ("published", "paired")]
    experiment.check(
        "no vector brings more than a few hundredths of the paper's styles", max(vectors) < 0.05
    )
    rest = [highest.get(recipe, 0) for recipe in ("prompt", "distilled")]
    experiment.check("neither a prompt nor the distilled shift does more", max(rest) < 0.05)
    experiment.check("each adapter brings much of its style", lowest.get("adapter", 0) > 0.06)


def check_moods(
    experiment: Experiment,
    study: StyleStudy,
    captions: Sequence[str],
    words: Mapping[str, Iterable[str]],
    focus: str,
) -> None:
    """Write down whether a vector made of moods brings the style in focus in their place.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    study : StyleStudy
        The model and its pictures.
    captions : sequence of str
        What it says of the test pictures with that vector.
    words : mapping of str to iterable of str
        The words of "mood" and of the style in focus.
    focus : str
        That style.
    """
    experiment.check(
        "a vector of moods brings the time of day and no mood",
        gain(study, captions, words[focus]).value > 0.02
        and not style_share(captions, words["mood"]).any(),
    )


def check_facts(experiment: Experiment, facts: pd.DataFrame, focus: str) -> None:
    """Write down which sentences hold about the facts that steered captions keep.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    facts : pandas.DataFrame
        From :func:`facts_table`, with the rows "as it is" and "vector of times" (of the style in
        focus), and "paired, colour" where there is one.
    focus : str
        The style in focus.
    """
    vector = f"vector of {focus}s"
    loss = facts.loc["as it is", "all facts"] - facts["all facts"]
    experiment.check(
        "the time of day is right in nearly all cases",
        facts.loc[vector, "time, where told"] > 0.85,
    )
    experiment.check("the vector of times costs few facts, and not none", 0 < loss[vector] < 0.1)
    experiment.check(
        "the paired vector for colours costs far more", loss.get("paired, colour", 0) > 0.1
    )


def check_strengths(
    experiment: Experiment,
    captions: Mapping[float, Sequence[str]],
    samples: Sequence[Sample],
    words: Iterable[str],
) -> None:
    """Write down which sentences hold about captions at several strengths.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    captions : mapping of float to sequence of str
        The captions at the strengths 0, 1 and 3.
    samples : sequence of Sample
        Their pictures.
    words : iterable of str
        The words of the time of day.
    """
    words = list(words)
    before, after = (style_rate(captions[strength], words).mean() for strength in (0.0, 1.0))
    experiment.check("at 1 the time of day appears", after > before)
    experiment.check("at 3 captions fall apart", intact(captions[3.0], samples).mean() < 0.5)
