"""Prepare the experiments on learned steering: two behaviours, and how answers are scored.

In the first behaviour the right direction is one of two: say yes or no. In the second it changes
with the picture: above sand the answer stands in capitals, above snow the model says that it is not
sure, and elsewhere nothing changes. Train, validation and test are of different pictures.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from PIL import Image

from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.metrics import yes_or_no
from xlvlms_tutorial.metrics.answers import exact_match
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.text import normalise
from xlvlms_tutorial.validation import require

SPLITS = ("train", "validation", "test")
UNSURE = "I am not sure"
FORMS = {"sand": "capitals", "snow": "unsure"}  # what is wanted by place; "plain" elsewhere
_KINDS = ("count", "side", "colour", "action")  # what the second behaviour asks for


@dataclass(frozen=True)
class Item:
    """One question with what the model is to say, and what it is to leave.

    Parameters
    ----------
    sample : Sample
        A picture with this question alone.
    group : str
        The class of the item: "yes" or "no", or the form that is wanted, "capitals", "unsure" or
        "plain".
    target : str
        The completion that is wanted.
    opposite : str
        The completion that is not wanted; that of "plain" is the answer itself.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import forms
    >>> item = forms(2)["train"][0]
    >>> item.group, item.target.isupper(), item.opposite.islower()
    ('capitals', True, True)
    """

    sample: Sample
    group: str
    target: str
    opposite: str

    @property
    def question(self) -> Question:
        """The question with its right answer."""
        return self.sample.questions[0]

    @property
    def prompt(self) -> str:
        """The text of the question, as the model is asked it."""
        return self.question.text

    @property
    def image(self) -> Image.Image:
        """The picture."""
        return self.sample.image


def presence(
    n_train: int = 160, n_validation: int = 80, n_test: int = 120, seed: int = 0
) -> dict[str, list[Item]]:
    """Make the first behaviour: the true answer to questions about presence.

    As many questions have the answer yes as no, one a picture, of the strata of POPE by turns.

    Parameters
    ----------
    n_train, n_validation, n_test : int
        How many questions of each split.
    seed : int, default 0
        Of the pictures.

    Returns
    -------
    dict of str to list of Item
        By split, yes and no by turns.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import presence
    >>> parts = presence(4, 2, 2)
    >>> [item.group for item in parts["train"]]
    ['yes', 'no', 'yes', 'no']
    """
    parts = {}
    for split, n in zip(SPLITS, (n_train, n_validation, n_test), strict=True):
        of_answer: dict[str, list[Item]] = {"yes": [], "no": []}
        for number, sample in enumerate(load_samples("scenes", 4 * n + 20, split, seed)):
            questions = [q for q in sample.questions if q.type == "presence"]
            question = questions[number % len(questions)]
            item = _item(sample, question, question.answer)
            of_answer[question.answer].append(item)
        parts[split] = _by_turns(of_answer, n)
    return parts


def forms(
    n_train: int = 60, n_validation: int = 20, n_test: int = 40, seed: int = 0
) -> dict[str, list[Item]]:
    """Make the second behaviour: the form of the answer changes with the place in the picture.

    Questions ask for numbers, sides, colours and actions, never for the place itself.

    Parameters
    ----------
    n_train, n_validation, n_test : int
        How many questions of each class and split.
    seed : int, default 0
        Of the pictures.

    Returns
    -------
    dict of str to list of Item
        By split, the classes "capitals" (sand), "unsure" (snow) and "plain" (other places) by
        turns.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import forms
    >>> parts = forms(2, 1, 1)
    >>> [item.group for item in parts["train"]]
    ['capitals', 'unsure', 'plain', 'capitals', 'unsure', 'plain']
    >>> parts["test"][1].target
    'I am not sure'
    """
    parts = {}
    for split, n in zip(SPLITS, (n_train, n_validation, n_test), strict=True):
        of_group: dict[str, list[Item]] = {"capitals": [], "unsure": [], "plain": []}
        for number, sample in enumerate(load_samples("scenes", 10 * n + 40, split, seed)):
            of_kind = {question.type: question for question in sample.questions}
            kinds = [kind for kind in _KINDS if kind in of_kind]
            question = of_kind[kinds[number % len(kinds)]]
            group = FORMS.get(str(sample.truth["place"]), "plain")
            of_group[group].append(_item(sample, question, group))
        parts[split] = _by_turns(of_group, n * len(of_group))
    return parts


def _item(sample: Sample, question: Question, group: str) -> Item:
    answer = question.answer
    targets = {"capitals": answer.upper(), "unsure": UNSURE}
    opposites = {"yes": "no", "no": "yes"}
    only = replace(sample, questions=(question,))
    return Item(only, group, targets.get(group, answer), opposites.get(group, answer))


def _by_turns(of_group: Mapping[str, list[Item]], n: int) -> list[Item]:
    """The first ``n`` items, one of each group by turns."""
    turns = zip(*of_group.values(), strict=False)
    items = [item for turn in turns for item in turn]
    require(
        len(items) >= n,
        f"{len(items)} questions where {n} are wanted",
        "ask for fewer, so that every class has enough pictures",
    )
    return items[:n]


def partly_trained(
    model: str = "pocket-llava",
    earlier: str | None = "step-0450",
    later: str = "step-0800",
    share: float = 0.4,
) -> VLM:
    """Load a model whose connector lies on the straight line between two steps of its training.

    Of the recorded steps of pocket LLaVA none answers some of the questions about presence: at 450
    it guesses, at 800 it makes no mistakes. On the way between them it answers three of four.

    Parameters
    ----------
    model : str
        As ``load`` takes it.
    earlier, later : str
        The two revisions; with None as the earlier one the model is loaded as it is.
    share : float, default 0.4
        How far along the line: 0 is the earlier step, 1 the later one.

    Returns
    -------
    VLM
        The model; its name says what was mixed.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import partly_trained
    >>> partly_trained(share=0.0).name
    'pocket-llava, 0 of the way from step-0450 to step-0800'
    """
    if earlier is None:
        return load(model)
    early, vlm = load(model, revision=earlier), load(model, revision=later)
    weights = anatomy.connector(early.model).state_dict()
    with torch.no_grad():
        for name, weight in anatomy.connector(vlm.model).state_dict().items():
            weight.lerp_(weights[name], 1 - share)
    vlm.name = f"{model}, {share:g} of the way from {earlier} to {later}"
    return vlm


def form_of(answer: str) -> str:
    """Tell in which form an answer stands.

    Parameters
    ----------
    answer : str
        What a model said.

    Returns
    -------
    str
        "unsure" if it begins with "I am not sure", "capitals" if it has capitals and no small
        letter, else "plain".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import form_of
    >>> form_of("TWO"), form_of("I am not sure."), form_of("snow"), form_of("I am red")
    ('capitals', 'unsure', 'plain', 'plain')
    """
    if normalise(answer).startswith(normalise(UNSURE)):
        return "unsure"
    return "capitals" if answer.isupper() else "plain"


def said_group(item: Item, answer: str) -> str:
    """Tell which class an answer belongs to, whatever the class of its item is.

    Parameters
    ----------
    item : Item
        The question.
    answer : str
        What a model said.

    Returns
    -------
    str
        "yes" or "no" by the first word alone ("snow" is no "no"), or the form; "other" for what is
        neither.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import presence, said_group
    >>> item = presence(2, 2, 2)["test"][0]
    >>> said_group(item, "No, there is not."), said_group(item, "snow")
    ('no', 'other')
    """
    if item.group in ("yes", "no"):
        return yes_or_no(answer) or "other"
    return form_of(answer)


def succeeded(item: Item, answer: str) -> bool:
    """Tell whether an answer is what the behaviour wants of its item.

    Parameters
    ----------
    item : Item
        The question.
    answer : str
        What a model said.

    Returns
    -------
    bool
        Whether the class is that of the item; of an answer in capitals or as it was, the word has
        to be right too.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import forms, succeeded
    >>> item = forms(1, 1, 1)["test"][0]
    >>> succeeded(item, item.target), succeeded(item, item.opposite), succeeded(item, "XYZ")
    (True, False, False)
    """
    if said_group(item, answer) != item.group:
        return False
    return item.group == "unsure" or exact_match(answer, item.question.answer)


def successes(items: Sequence[Item], answers: Sequence[str]) -> np.ndarray:
    """Return where answers are what the behaviour wants, 0 or 1 for each item, (n,).

    Parameters
    ----------
    items : sequence of Item
        The questions.
    answers : sequence of str
        What a model said to them.

    Returns
    -------
    array of float
        As :func:`succeeded` tells for each.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import presence, successes
    >>> successes(presence(2, 2, 2)["test"], ["Yes.", "yes"]).tolist()
    [1.0, 0.0]
    """
    pairs = zip(items, answers, strict=True)
    return np.array([succeeded(item, answer) for item, answer in pairs], dtype=float)


def leakage(items: Sequence[Item], answers: Sequence[str]) -> pd.DataFrame:
    """Return which class answers belong to, by the class of their item.

    Parameters
    ----------
    items : sequence of Item
        The questions.
    answers : sequence of str
        What a model said to them.

    Returns
    -------
    pandas.DataFrame
        Shares, rows the class that was wanted, columns the class that was said. What is off the
        diagonal leaks from one class into another.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import leakage, presence
    >>> leakage(presence(2, 2, 2)["test"], ["Yes.", "yes"]).loc["no", "yes"].item()
    1.0
    """
    groups = list(dict.fromkeys(item.group for item in items))
    counts = Counter()
    totals = Counter(item.group for item in items)
    for item, answer in zip(items, answers, strict=True):
        counts[item.group, said_group(item, answer)] += 1
    others = [said for _, said in counts if said not in groups]
    rows = {}
    for group in groups:
        columns = dict.fromkeys([*groups, *others], 0.0)
        for said in columns:
            columns[said] = counts[group, said] / totals[group]
        rows[group] = columns
    return pd.DataFrame(rows).T
