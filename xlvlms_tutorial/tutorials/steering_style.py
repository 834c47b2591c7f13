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
import torch
from jaxtyping import Bool

from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import DATASETS, Sample, load_samples
from xlvlms_tutorial.interventions import add
from xlvlms_tutorial.loading.loading import load
from xlvlms_tutorial.methods.steering import SteeringVectors, best_setting
from xlvlms_tutorial.metrics import (
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
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.validation import require_one_of

_BATCH = 64  # captions generated at once
_VARIED = 0.65  # the share of different words above which a caption does not stutter
_FEW = 3  # a style needs more captions of either kind than this
_SHORT = 18  # tokens of captions by which settings are chosen
_LONG = 22  # tokens of captions that are reported

# The strengths that are tried for each recipe.
STRENGTHS = {"published": (0.25, 0.5), "paired": (0.5, 1.0), "distilled": (1.0,)}

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
        return describe(self.vlm, self.validation, max_new_tokens=_SHORT)

    @cached_property
    def usual(self) -> list[str]:
        """What the model says of the test pictures without steering."""
        return describe(self.vlm, self.test)


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
    of = dict.fromkeys(("no steering", "published", "paired", "prompt"), ours)
    return of | dict.fromkeys(("distilled", "adapter"), taught)


def describe(
    vlm: VLM,
    samples: Sequence[Sample],
    prompt: str = PROMPTS["image"],
    max_new_tokens: int = _LONG,
) -> list[str]:
    """Let a model describe pictures.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        The pictures.
    prompt : str, default "Describe the picture."
        What it is asked, of each picture.
    max_new_tokens : int, default 22
        How many tokens it may write.

    Returns
    -------
    list of str
        A caption for each picture.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import steering_style
    >>> len(steering_style.describe(vlm, samples[:2], max_new_tokens=2))
    2
    """
    images = [sample.image for sample in samples]
    return vlm.generate(images, [prompt] * len(samples), max_new_tokens, batch_size=_BATCH)


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
        others = load_samples(styled_set, len(samples), split, study.seed)
        for sample, other in zip(samples, others, strict=False):
            pairs.append((sample.captions[0], other.captions[0]))
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
    plain = []
    styled = []
    pairs = caption_pairs(study, "train", style, words)
    for sample, (one, other) in zip(study.train, pairs, strict=True):
        if one is not None and other is not None:
            pictures.append(sample)
            plain.append(one)
            styled.append(other)
    return pictures, plain, styled


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
    both = []
    for style, style_words in words.items():
        pairs = caption_pairs(study, "train", style, style_words)
        plain = sum(pair[0] is not None for pair in pairs)
        styled = sum(pair[1] is not None for pair in pairs)
        if min(plain, styled) > _FEW:
            usable.append(style)
            if sum(None not in pair for pair in pairs) > _FEW:
                both.append(style)
    preferred = [style for style in both if style in ("colour", "time")]
    return {"published": usable, "paired": preferred or both}


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
        return (
            _read(study.vlm, study.layers, pictures, plain),
            _read(study.vlm, study.layers, pictures, styled),
        )
    pairs = caption_pairs(study, "train", style, words)
    sides = []
    for side in (0, 1):
        there = [number for number, pair in enumerate(pairs) if pair[side] is not None]
        pictures = [study.train[number] for number in there]
        sides.append((pictures, [str(pairs[number][side]) for number in there]))
    spelt = sorted({form for word in words for form in forms(word)})
    plain_states = _read(study.vlm, study.layers, *sides[0])
    return plain_states, _read(study.vlm, study.layers, *sides[1], spelt)


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
    before = _read(study.vlm, study.layers, pictures, captions)
    after = _read(tuned, study.layers, pictures, captions)
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
    max_new_tokens: int = _LONG,
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
    vector = vectors.checked(vlm, layer)
    n = len(samples)
    rows = [(strength * vector).expand(n, -1) for strength in strengths]
    with add(vlm, torch.cat(rows), layer, positions=positions):
        captions = describe(vlm, list(samples) * len(strengths), max_new_tokens=max_new_tokens)
    by_strength = {}
    for number, strength in enumerate(strengths):
        by_strength[strength] = captions[number * n : number * n + n]
    return by_strength


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
    for (recipe, style), one in vectors.items():
        study = studies[recipe]
        samples = study.validation
        before = style_rate(study.usual_validation, words[style]).mean()
        ends = study.layers[0], study.layers[-1]
        layers = ends if recipe == "distilled" else study.layers[-2:]
        for layer in sorted(set(layers)):
            written = steer(study.vlm, one, layer, STRENGTHS[recipe], samples, _SHORT)
            for strength, captions in written.items():
                rate = style_rate(captions, words[style]).mean()
                broken = 1 - intact(captions, samples).mean()
                row = {"recipe": recipe, "style": style, "layer": layer, "strength": strength}
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
    right = named_facts(captions, samples)[["subject", "item"]].all(axis=1).to_numpy(bool)
    varied = []
    for caption in captions:
        words = caption.lower().split()
        varied.append(len(set(words)) > _VARIED * len(words))
    return right & np.array(varied, dtype=bool)


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
        own = []
        for caption, pair in zip(
            captions, caption_pairs(study, "test", style, words[style]), strict=False
        ):
            if pair[1]:
                own.append((caption, [pair[1]]))
        rows[style, recipe] = {
            "rate": style_rate(captions, words[style]).mean(),
            "intact": intact(captions, samples).mean(),
            "CIDEr": cider(captions, references)[1],
            "BLEU": bleu(captions, references),
            "CIDEr, styled": cider(*zip(*own, strict=True))[1] if len(own) > 1 else np.nan,
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
        right = []
        tells = style_share(captions, times)
        for caption, sample, told in zip(captions, samples, tells, strict=True):
            if told and sample.truth.get("time"):
                right.append(sample.truth["time"] in caption.lower())
        facts = named_facts(captions, samples).astype(float).mean()
        told_right = pd.Series(right, dtype=float).mean()
        rows[name] = facts.to_dict() | {"all facts": facts.mean(), "time, where told": told_right}
    return pd.DataFrame.from_dict(rows, orient="index")


def _read(
    vlm: VLM,
    layers: list[int],
    pictures: Sequence[Sample],
    captions: Sequence[str],
    words: Sequence[str] | None = None,
) -> Activations:
    """States of captions: their mean, or that which predicts the first of some words."""
    place = {"span": "answer"} if words is None else {"words": words}
    return capture(vlm, pictures, layers, answers=list(captions), batch_size=32, **place)
