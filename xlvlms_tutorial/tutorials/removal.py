"""Take concepts out of a model's states and count what its captions lose.

What the chapter "Explain one answer with concepts" needs beside the directions themselves: which
fact of the captions is taken out, its concepts, and the bookkeeping of what is left.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from xlvlms_tutorial import interventions
from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.interventions import Resumable
from xlvlms_tutorial.interventions.replay import same_up_to_rounding
from xlvlms_tutorial.methods.concepts import Dictionary
from xlvlms_tutorial.metrics import names
from xlvlms_tutorial.models import VLM
from xlvlms_tutorial.models.batching import prompts_of
from xlvlms_tutorial.models.spans import Batch, find_words
from xlvlms_tutorial.text import whole_words
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.tutorials.explain import (
    SAID_LATER,
    caption_up_to,
    factor_table,
    first_piece,
    next_words,
)
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view.cards import Html, picture_card


@dataclass(frozen=True)
class Target:
    """What is taken out of captions.

    ``factor`` is the fact, such as "action", ``values`` are its values. ``due`` says, for pictures
    with references, which value follows the word of interest there, and ``spoken`` which value each
    of the model's captions names; None where there is none.
    """

    factor: str
    values: list[str]
    due: list[str | None]
    spoken: list[str | None]

    def number(self, values: Sequence[str | None]) -> list[int]:
        """Return the numbers of some values."""
        return [self.values.index(str(value)) for value in values]


def choose_target(word: str, samples: Sequence[Sample], captions: Sequence[str]) -> Target:
    """Choose the fact to take out: the first that captions tell after a word.

    Parameters
    ----------
    word : str
        The token of interest.
    samples : sequence of Sample
        Pictures whose references say what follows the word.
    captions : sequence of str
        The model's captions of other pictures.

    Returns
    -------
    Target
        The fact, its values, and which of them references and captions have.

    Examples
    --------
    >>> from xlvlms_tutorial import Sample
    >>> from xlvlms_tutorial.tutorials.removal import choose_target
    >>> walks = Sample("a", None, ("A man is walking.",), truth={"action": "walking"})
    >>> target = choose_target("man", [walks], ["A man is walking.", "A man walks.", "A man."])
    >>> target.factor, target.due, target.spoken
    ('action', ['walking'], ['walking', 'walking', None])
    """
    candidates = []
    for factor in SAID_LATER:
        due = [_value_after(word, sample, factor) for sample in samples]
        values = sorted(set(due) - {None})
        spoken = [_first_named(caption, values) for caption in captions]
        candidates.append(Target(factor, values, due, spoken))
        if sum(value is not None for value in spoken) > 1:
            return candidates[-1]
    return max(candidates, key=lambda target: len(target.values))


def _first_named(caption: str, values: Sequence[str]) -> str | None:
    """The first of some values that a caption names; None where it names none."""
    for value in values:
        if names(caption, value):
            return value
    return None


def concepts_of_values(
    dictionary: Dictionary,
    states: Float[Tensor, "n d"],
    samples: Sequence[Sample],
    target: Target,
) -> dict[str, Float[Tensor, "v d"]]:
    """Find for each value of a fact its own concept, and another one as a baseline.

    Parameters
    ----------
    dictionary : Dictionary
        Fitted on the states.
    states : Tensor (n, d)
        A state for each picture.
    samples : sequence of Sample
        The n pictures.
    target : Target
        The fact, with its value in each picture.

    Returns
    -------
    dict of str to Tensor (values, d)
        "own", the concept matched to each value (without a match, the one most above its mean in
        pictures of the value); "another", the most active in the same pictures among those that are
        matched to other facts.

    Examples
    --------
    >>> from xlvlms_tutorial import SemiNMF, capture, load_samples
    >>> from xlvlms_tutorial.tutorials.removal import Target, concepts_of_values
    >>> pictures = load_samples("scenes", n=24)
    >>> states = capture(vlm, pictures, 30, span="question")[30]
    >>> times = [str(picture.truth["time"]) for picture in pictures]
    >>> target = Target("time", sorted(set(times)), times, [])
    >>> concepts = concepts_of_values(SemiNMF(4).fit(states), states, pictures, target)
    >>> concepts["own"].shape == concepts["another"].shape == (len(target.values), vlm.width)
    True
    """
    codes = dictionary.transform(states)
    factors = factor_table(codes, samples)
    of_factor = factors[factors["factor"] == target.factor]
    matched = of_factor.groupby("value").tail(1).set_index("value")["concept"]
    best = factors.groupby("concept").tail(1)
    of_other_facts = best.loc[best["factor"] != target.factor, "concept"]
    of_other_facts = of_other_facts[~of_other_facts.isin(matched)]
    means = pd.DataFrame(codes).groupby(pd.Series(target.due, dtype=object)).mean()
    strongest = (means / codes.mean(axis=0).clip(1e-9)).idxmax(axis=1)
    concepts = matched.reindex(target.values).fillna(strongest).astype(int)
    another = []
    for value in target.values:
        free = set(of_other_facts) - {concepts[value]} or set(means.columns) - {concepts[value]}
        free = [concept for concept in means.columns if concept in free]
        another.append(int(means.loc[value, free].idxmax()))
    directions = torch.as_tensor(dictionary.components_)
    return {"own": directions[concepts.tolist()], "another": directions[another]}


@contextmanager
def ablate_each(
    vlm: VLM, directions: Float[Tensor, "n d"], layers: int | Sequence[int]
) -> Iterator[None]:
    """Take out of each picture of a batch its own direction, while its answer is written.

    Use it where pictures lose different concepts: each picture the concept of its own action. All
    pictures have to be in one batch.

    Parameters
    ----------
    vlm : VLM
        The model.
    directions : Tensor (n, d)
        A direction for each picture of the batch.
    layers : int or sequence of int
        The layers at which it is taken out.

    Returns
    -------
    context manager
        The change is in force inside ``with``.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.tutorials.removal import ablate_each
    >>> directions = torch.eye(vlm.width)[:4]
    >>> with ablate_each(vlm, directions, 12):
    ...     states = read(vlm, batch, 12, positions="last")[12, "resid_post"]
    >>> [abs(float(states[row].flatten()[row])) < 1e-3 for row in range(4)]
    [True, True, True, True]
    """
    unique, numbers = torch.unique(directions, dim=0, return_inverse=True)
    with ExitStack() as changes:
        for number, direction in enumerate(unique):
            gate = numbers == number
            change = interventions.ablate(vlm, direction, layers, positions="last", gate=gate)
            changes.enter_context(change)
        yield


def few_of_each(target: Target, n: int) -> list[int]:
    """Return the rows of the first pictures of each value, ``n`` of each at most.

    Parameters
    ----------
    target : Target
        The fact, with its value in each picture.
    n : int
        How many pictures of each value.

    Returns
    -------
    list of int
        The rows, by value.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.removal import Target, few_of_each
    >>> few_of_each(Target("place", ["sand", "snow"], ["snow", "sand", None, "sand"], []), 1)
    [1, 0]
    """
    rows = []
    for value in target.values:
        of_value = [row for row, due in enumerate(target.due) if due == value]
        rows += of_value[:n]
    return rows


class Beginnings:
    """Captions up to a word, which run whole once, and then from the layer of a change on.

    Use it to try many changes of upper layers on the same captions. All of them are in one batch.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Pictures whose references have the words.
    words : sequence of str
        The word of each at which its caption ends.
    side : {"predicting", "token"}, default "predicting"
        Which state is read: the one that predicts the word, or the one at its last token.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.removal import Beginnings, ablate_each
    >>> subjects = [sample.truth["subject"] for sample in samples]
    >>> beginnings = Beginnings(vlm, samples, subjects)
    >>> change = ablate_each(vlm, torch.eye(vlm.width)[:4], 28)
    >>> beginnings.read(28, change).shape
    torch.Size([4, 576])
    >>> change = ablate_each(vlm, torch.eye(vlm.width)[:4], 28)
    >>> beginnings.lost(28, change).shape
    (4,)
    """

    def __init__(
        self, vlm: VLM, samples: Sequence[Sample], words: Sequence[str], side: str = "predicting"
    ) -> None:
        answers = []
        for sample, word in zip(samples, words, strict=True):
            answers.append(caption_up_to(word)(sample))
        self.vlm = vlm
        self.words = list(words)
        self._batch = vlm.batch_of(samples, prompts_of(samples, None), answers)
        self._mask = _at_words(vlm, self._batch, self.words, side)
        self._run = Resumable(vlm, self._batch)
        self._unchanged = self._run.read(vlm.n_layers, self._mask)
        self._states: dict[int, Tensor | None] = {}

    def read(self, layer: int, change: AbstractContextManager) -> Float[Tensor, "n d"]:
        """Read the last layer's state of each caption.

        Parameters
        ----------
        layer : int
            The layer from which on something is changed.
        change : context manager
            The change, such as :func:`ablate_each`.

        Returns
        -------
        Tensor (n, d)
            The states.
        """
        top = self.vlm.n_layers
        if layer not in self._states:
            states = self._run.read(layer)
            resumed = self._run.read(top, self._mask, start=layer, states=states)
            same = same_up_to_rounding(resumed, self._unchanged, self.vlm.dtype)
            self._states[layer] = states if same else None
        states = self._states[layer]
        start = 0 if states is None else layer
        return self._run.read(top, self._mask, start=start, states=states, change=change)

    def lost(self, layer: int, change: AbstractContextManager) -> np.ndarray:
        """Tell for which captions the word is no longer the model's next one.

        Parameters
        ----------
        layer : int
            The layer from which on something is changed.
        change : context manager
            The change.

        Returns
        -------
        ndarray of bool (n,)
            True where another word is predicted.
        """
        expected = [first_piece(self.vlm, word) for word in self.words]
        return next_words(self.vlm, self.read(layer, change)).to_numpy() != np.array(expected)


def still_named(captions: Sequence[str], values: Iterable[object]) -> np.ndarray:
    """Return which captions name the value of their picture.

    Parameters
    ----------
    captions : sequence of str
        The captions.
    values : iterable of str
        A value for each.

    Returns
    -------
    ndarray (n,)
        1 where the caption names it and 0 elsewhere.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.removal import still_named
    >>> still_named(["A man walks.", "A key."], ["walking", "gem"]).tolist()
    [1.0, 0.0]
    """
    pairs = zip(captions, values, strict=True)
    return np.array([names(caption, str(value)) for caption, value in pairs], float)


def unseen_pairs(
    vlm: VLM, held_out: Mapping[str, str], colours: Sequence[str], n: int = 36, seed: int = 0
) -> tuple[Activations, pd.DataFrame]:
    """Caption pictures of pairs of object and colour that training held out.

    Parameters
    ----------
    vlm : VLM
        The model; it has to be one that was trained without these pairs.
    held_out : mapping of str to str
        The colour that each object never had.
    colours : sequence of str
        The colours that captions may name.
    n : int, default 36
        How many pictures are captioned.
    seed : int, default 0
        Of the pictures.

    Returns
    -------
    tuple of Activations and pandas.DataFrame
        The last layer's states that predict the colour, and for each row "picture", the true pair,
        and "caption", the colour that was said.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.removal import unseen_pairs
    >>> states, answers = unseen_pairs(vlm, {"key": "green"}, ["green", "yellow"], n=2)
    >>> set(answers["picture"]) <= {"green key"}
    True
    """
    pictures = []
    for sample in load_samples("composition", n=400, seed=seed):
        if (sample.truth["item"], sample.truth["colour"]) in held_out.items():
            pictures.append(sample)
    states = capture(vlm, pictures[:n], vlm.n_layers, words=colours, max_new_tokens=20)
    pairs = []
    for row in states.table["sample"]:
        pairs.append("{colour} {item}".format(**pictures[row].truth))
    return states, pd.DataFrame({"picture": pairs, "caption": states.table["word"].tolist()})


def usual_pairs(
    vlm: VLM, held_out: Mapping[str, str], colours: Sequence[str], n: int = 72, seed: int = 0
) -> Activations:
    """Read the states that predict the colours of the same objects in usual pictures.

    Parameters
    ----------
    vlm : VLM
        The model.
    held_out : mapping of str to str
        The objects, as of :func:`unseen_pairs`.
    colours : sequence of str
        The colours that captions may name.
    n : int, default 72
        How many pictures are read.
    seed : int, default 0
        Of the pictures.

    Returns
    -------
    Activations
        The last layer's states that predict the colour in the reference captions.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.removal import usual_pairs
    >>> colours = ["blue", "green", "red", "yellow"]
    >>> len(usual_pairs(vlm, {"key": "green"}, colours, n=4))
    4
    """
    usual = []
    for sample in load_samples("scenes", n=1000, seed=seed):
        if sample.truth["item"] in held_out:
            usual.append(sample)
    usual = usual[:n]
    answers = [caption_up_to(sample.truth["colour"])(sample) for sample in usual]
    return capture(vlm, usual, vlm.n_layers, words=colours, answers=answers)


def check_layers(experiment: Experiment, target: Target, lost: Mapping) -> None:
    """Write down what taking concepts out at several layers does to the next word.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    target : Target
        The fact that is taken out.
    lost : mapping of (layer, name) to ndarray of bool
        What :meth:`Beginnings.lost` returned, by layer and what was taken out.
    """
    loss = pd.Series({key: values.mean() for key, values in lost.items()}).unstack()
    early = loss.iloc[0]
    deeper = loss[f"the {target.factor}'s, own part"].to_numpy()
    weak = loss[["another, own part", "random, own part"]].to_numpy()
    experiment.check(
        "early a whole concept of another fact does as much damage",
        early["another, whole"] > early[f"the {target.factor}'s, whole"] - 0.15,
    )
    experiment.check("without the mean other directions do next to nothing", weak.max() < 0.15)
    experiment.check(
        "the deeper the own part is taken out, the more is lost",
        (np.diff(deeper) >= 0).all() and deeper[-1] > deeper[0] + 0.3,
    )


def check_left(
    experiment: Experiment,
    remaining: Mapping[str, float],
    directions: Mapping[int, Mapping[str, Tensor]],
    states: Activations,
) -> None:
    """Write down how much of a concept that was taken out is there again at the last layer.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    remaining : mapping of str to float
        The shares by the layers of the removal, as "layers 20 to 26".
    directions : mapping of layer to mapping
        Of :func:`concepts_of_values`, by layer.
    states : Activations
        The states that the concepts were learnt from.
    """
    earliest = min(directions)
    early = []
    late = []
    for name, share in remaining.items():
        shares = early if name.startswith(f"layers {earliest} ") else late
        shares.append(share)
    mean = normalize(states[earliest].mean(dim=0), dim=0)
    similar = normalize(directions[earliest]["own"], dim=-1) @ mean
    experiment.check("what is taken out early arrives at the top whole", min(early) > 0.85)
    experiment.check("what is taken out later mostly stays away", max(late, default=0) < 0.6)
    experiment.check("early concepts are almost the mean state", similar.mean() > 0.9)


def check_captions(experiment: Experiment, target: Target, shares: pd.DataFrame) -> None:
    """Write down what captions lose beside the fact whose concept is taken out.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    target : Target
        The fact that is taken out.
    shares : pandas.DataFrame
        Shares of captions that name each fact, a row for what was taken out, the first "nothing".
    """
    other_facts = shares.drop(columns=target.factor)
    loss = other_facts.loc["nothing"] - other_facts
    experiment.check(
        "whole concepts of either kind take the rest of the caption along",
        loss.filter(like="whole", axis=0).mean(axis=1).min() > 0.15,
    )
    experiment.check(
        "the own part takes the action and leaves the rest",
        loss.loc[f"the {target.factor}'s, own part"].max() < 0.1
        and shares.loc[f"the {target.factor}'s, own part", target.factor] < 0.7,
    )


def check_mean(
    experiment: Experiment,
    target: Target,
    directions: Float[Tensor, "v d"],
    mean: Float[Tensor, "d"],
    values: Sequence[str],
    named: np.ndarray,
) -> None:
    """Write down whether concepts near the mean state leave their fact in the caption more often.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    target : Target
        The fact that is taken out.
    directions : Tensor (values, d)
        The concept of each value.
    mean : Tensor (d,)
        The mean state.
    values : sequence of str
        The value of each caption.
    named : ndarray (n,)
        Whether the caption still names it.
    """
    shares = pd.Series(named).groupby(np.array(values)).mean()
    cosines = normalize(directions, dim=-1) @ normalize(mean, dim=-1)
    close = pd.Series(cosines.numpy(), target.values).reindex(shares.index)
    experiment.check(
        "concepts nearer to the mean leave the action more often", close.corr(shares) > 0.3
    )


def check_colours(experiment: Experiment, push: pd.DataFrame) -> None:
    """Write down which concepts push green keys and yellow gems to the wrong colour.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    push : pandas.DataFrame
        What each concept, a column named by its words, and last the rest add to the logit of yellow
        minus that of green. The index says pair and caption on two lines: "green key" and "called
        yellow".
    """
    pair = push.index.str.split("\n").str[0]
    keys, gems = push.groupby(pair).mean().reindex(["green key", "yellow gem"]).to_numpy()
    of_keys = push[pair == "green key"].to_numpy()
    means = push.groupby(level=0).mean()
    labels = list(push.columns[:-1])
    mixed = [k for k, text in enumerate(labels) if "yellow" in text and "key" in text]
    greenest = int(push.groupby(pair).mean().mean().to_numpy()[:-1].argmin())
    experiment.check("one concept stands for yellow and for keys", len(mixed) == 1)
    for k in mixed[:1]:
        outweighed = (of_keys[:, greenest] + of_keys[:, k] > 0).all()
        experiment.check("it pushes green keys towards yellow", keys[k] > 3)
        experiment.check(
            "the concept of green is weaker in every green key",
            "green" in labels[greenest] and outweighed,
        )
    experiment.check(
        "the concept of green is as strong in yellow gems",
        gems[greenest] < 0.8 * keys[greenest] < 0,
    )
    called = [f"yellow gem\ncalled {colour}" for colour in ("yellow", "green")]
    yellow, green = means.reindex(called).to_numpy()
    experiment.check(
        "the rest decides much between gems called yellow and green",
        yellow[-1] - green[-1] > 0.3 * (yellow - green).sum(),
    )


def caption_cards(
    images: Sequence[Image.Image], captions: Mapping[str, Sequence[str]], values: Sequence[str]
) -> list[Html]:
    """Show pictures with their captions, by what was taken out of the states.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        The pictures.
    captions : mapping of str to sequence of str
        The captions of all pictures, by what was taken out.
    values : sequence of str
        The value that each picture lost; five pictures of different values are shown.

    Returns
    -------
    list of :class:`~xlvlms_tutorial.view.cards.Html`
        A card a picture.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.removal import caption_cards
    >>> images = [sample.image for sample in samples[:2]]
    >>> captions = {"nothing": ["a man", "a key"]}
    >>> len(caption_cards(images, captions, ["walking", "walking"]))
    2
    """
    cards = []
    repeats = pd.Series(values).duplicated().sort_values(kind="stable")
    for row in repeats.index[:5]:
        lines = [(f"without {name}", texts[row], "") for name, texts in captions.items()]
        cards.append(picture_card(images[row], captions["nothing"][row], lines[1:]))
    return cards


def repaired(
    vlm: VLM, dictionary: Dictionary, states: Float[Tensor, "n d"], spoken: str, true: str
) -> np.ndarray:
    """Return in which states the true word beats the spoken one without each concept.

    Parameters
    ----------
    vlm : VLM
        The model.
    dictionary : Dictionary
        Fitted on such states.
    states : Tensor (n, d)
        States of the last layer.
    spoken, true : str
        The two words.

    Returns
    -------
    ndarray of bool (n, k)
        For each state and concept, whether the true word wins once the concept's part is taken out.

    Examples
    --------
    >>> from xlvlms_tutorial import SemiNMF, capture
    >>> from xlvlms_tutorial.tutorials.removal import repaired
    >>> states = capture(vlm, samples, 30, span="question")[30]
    >>> repaired(vlm, SemiNMF(2).fit(states), states, "red", "green").shape
    (4, 2)
    """
    ids = [int(vlm.token_ids(word)[0]) for word in (spoken, true)]
    codes = torch.as_tensor(dictionary.transform(states))
    wins = []
    for concept, direction in enumerate(torch.as_tensor(dictionary.components_)):
        logits = vlm.unembed(states - codes[:, concept, None] * direction).cpu()
        wins.append(logits[:, ids[1]] > logits[:, ids[0]])
    return torch.stack(wins, dim=1).numpy()


def _value_after(word: str, sample: Sample, factor: str) -> str | None:
    """The value of a factor if the reference names it after the word."""
    value = str(sample.truth.get(factor))
    after = sample.captions[0][len(caption_up_to(word)(sample)) :]
    return value if whole_words([value]).search(after) else None


def _at_words(vlm: VLM, batch: Batch, words: Sequence[str], side: str) -> Bool[Tensor, "b t"]:
    """Mark in each answer the position that predicts its word, or that of the word's last token."""
    mask = torch.zeros_like(batch.spans, dtype=torch.bool)
    for row, word in enumerate(words):
        positions = batch.mask("answer")[row].nonzero().flatten()
        match = find_words(vlm.tokenizer, batch["input_ids"][row, positions].tolist(), (word,))
        require(match is not None, f"no {word!r} in answer {row}", "give words of the captions")
        pieces, _ = match
        position = positions[pieces.start] - 1
        if side == "token":
            position = positions[pieces.stop - 1]
        mask[row, position] = True
    return mask
