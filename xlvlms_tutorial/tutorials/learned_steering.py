"""Prepare the experiments on learned steering: two behaviours, and how answers are scored.

In the first behaviour the right direction is one of two: say yes or no. In the second it changes
with the picture: above sand the answer stands in capitals, above snow the model says that it is not
sure, and elsewhere nothing changes. Train, validation and test are of different pictures.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from xlvlms_tutorial.data import PROMPTS, Sample, load_samples
from xlvlms_tutorial.interventions import add
from xlvlms_tutorial.loading.loading import EMBEDDED, load
from xlvlms_tutorial.methods.steering import (
    LearnedSteering,
    ProbeSteering,
    balanced_threshold,
    first_pieces,
    mean_shift,
    random_shifts,
)
from xlvlms_tutorial.metrics import answer_kl, yes_or_no
from xlvlms_tutorial.metrics.answers import exact_match
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.text import normalise
from xlvlms_tutorial.tutorials.experiments import substitute
from xlvlms_tutorial.tutorials.steering_answers import description
from xlvlms_tutorial.validation import require, require_one_of

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
    n_train: int = 160,
    n_validation: int = 80,
    n_test: int = 120,
    seed: int = 0,
    dataset: str = "scenes",
) -> dict[str, list[Item]]:
    """Make the first behaviour: the true answer to questions about presence.

    As many questions have the answer yes as no, one a picture, of the strata of POPE by turns.

    Parameters
    ----------
    n_train, n_validation, n_test : int
        How many questions of each split.
    seed : int, default 0
        Of the pictures.
    dataset : str, default "scenes"
        Pictures with questions whose answers are yes and no. There may be fewer than wanted.

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
        for number, sample in enumerate(load_samples(dataset, 4 * n + 20, split, seed)):
            questions = [q for q in sample.questions if q.answer in of_answer]
            if questions:
                question = questions[number % len(questions)]
                item = _item(sample, question, question.answer)
                of_answer[question.answer].append(item)
        parts[split] = _by_turns(of_answer, n)
    return parts


def forms(
    n_train: int = 60,
    n_validation: int = 20,
    n_test: int = 40,
    seed: int = 0,
    dataset: str = "scenes",
) -> dict[str, list[Item]]:
    """Make the second behaviour: the form of the answer changes with the place in the picture.

    Questions ask for numbers, sides, colours and actions, never for the place itself.

    Parameters
    ----------
    n_train, n_validation, n_test : int
        How many questions of each class and split.
    seed : int, default 0
        Of the pictures.
    dataset : str, default "scenes"
        Pictures with captions and questions. Where no caption names sand or snow, the most frequent
        words stand for them. There may be fewer questions than wanted.

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
        samples = load_samples(dataset, 10 * n + 40, split, seed)
        form_of_word = _form_of_word(samples)
        for number, sample in enumerate(samples):
            of_kind = {q.type: q for q in sample.questions if q.answer not in ("yes", "no")}
            kinds = [kind for kind in _KINDS if kind in of_kind] or list(of_kind)
            if kinds:
                question = of_kind[kinds[number % len(kinds)]]
                words = _caption_words(sample)
                group = next((form_of_word[w] for w in form_of_word if w in words), "plain")
                of_group[group].append(_item(sample, question, group))
        parts[split] = _by_turns(of_group, n * len(of_group))
    return parts


def _item(sample: Sample, question: Question, group: str) -> Item:
    answer = question.answer
    targets = {"capitals": answer.upper(), "unsure": UNSURE}
    opposites = {"yes": "no", "no": "yes"}
    only = replace(sample, questions=(question,))
    return Item(only, group, targets.get(group, answer), opposites.get(group, answer))


def _caption_words(sample: Sample) -> set[str]:
    """The words of captions, or of the right answers where there are none."""
    texts = sample.captions or [question.answer for question in sample.questions]
    return set(" ".join(texts).lower().replace(".", " ").replace(",", " ").split())


def _form_of_word(samples: Sequence[Sample]) -> dict[str, str]:
    """The forms by the words of captions that ask for them."""
    counts = Counter()
    for sample in samples:
        counts.update(word for word in _caption_words(sample) if len(word) > 3)
    # words of nearly all pictures tell none apart
    counts = {word: n for word, n in counts.items() if n < len(samples) / 2}
    words = substitute(list(FORMS), counts)
    return dict(zip(words, FORMS.values(), strict=False))


def _by_turns(of_group: Mapping[str, list[Item]], n: int) -> list[Item]:
    """The first ``n`` items, one of each group by turns."""
    turns = zip(*of_group.values(), strict=False)
    items = [item for turn in turns for item in turn]
    require(
        items,
        f"no questions of one of the classes {', '.join(of_group)}",
        "give a data set with questions of each",
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
        The two revisions. With None as the earlier one, and where the model is not one of ours, it
        is loaded as it is.
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
    if earlier is None or model not in EMBEDDED:
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
    others = [form for _, form in counts if form not in groups]
    rows = {}
    for group in groups:
        columns = dict.fromkeys([*groups, *others], 0.0)
        for form in columns:
            columns[form] = counts[group, form] / totals[group]
        rows[group] = columns
    return pd.DataFrame(rows).T


class Rung(NamedTuple):
    """A way to steer: a vector for each state.

    ``vectors`` takes states (n, d) and returns vectors (n, d); ``n_parameters`` counts its numbers
    and ``seconds`` is what its fit took.
    """

    vectors: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]
    n_parameters: int
    seconds: float


class Primed:
    """Questions whose prompts have run once, so that each way to steer costs a token a step.

    Steering acts at the prompt's last token and at all that follow. What the tokens before it left
    in the cache is the same for every vector, strength and layer, and is computed once.

    Parameters
    ----------
    vlm : VLM
        The model.
    items : sequence of Item
        The questions.
    layers : sequence of int
        The layers whose states are read, below the last.
    batch_size : int, default 40
        Questions that run together.

    Attributes
    ----------
    items : list of Item
        The questions, n of them.
    states : dict of int to tensor (n, d)
        The states at the prompt's last token, by layer.
    logits : tensor (n, v)
        The logits of the first token, without steering.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import Primed, presence
    >>> primed = Primed(vlm, presence(2, 2, 2)["test"], [12])
    >>> primed.states[12].shape
    torch.Size([2, 576])
    >>> primed.answers(n_tokens=1)
    ['yes', 'no']
    """

    def __init__(
        self, vlm: VLM, items: Sequence[Item], layers: Sequence[int], batch_size: int = 40
    ) -> None:
        self.vlm = vlm
        self.items = list(items)
        self.layers = list(layers)
        self._parts = []
        self._shifts: dict[str, dict[int, Tensor]] = {}
        states = {layer: [] for layer in self.layers}
        logits = []
        for start in range(0, len(self.items), batch_size):
            part = _Part(vlm, self.items[start : start + batch_size])
            self._parts.append(part)
            output = part.run()
            for layer in self.layers:
                states[layer].append(output.states[layer][:, 0].float().cpu())
            logits.append(output.logits[:, 0].cpu())
        self.states = {layer: torch.cat(rows) for layer, rows in states.items()}
        self.logits = torch.cat(logits)

    def shifts(self, layer: int, read: str = "last") -> Float[Tensor, "n d"]:
        """Compute the shifts of P2S, as ``contrast_shifts`` does, from what has run already.

        Parameters
        ----------
        layer : int
            One of the layers that are read.
        read : {"last", "mean"}, default "last"
            Whether the completion's last token is read, or the mean over all.

        Returns
        -------
        tensor (n, d)
            Zero where an item wants what it would leave.
        """
        require_one_of(layer, self.layers, "layer")
        if read not in self._shifts:
            targets = self._completed([item.target for item in self.items], read)
            opposites = self._completed([item.opposite for item in self.items], read)
            self._shifts[read] = {layer: targets[layer] - opposites[layer] for layer in targets}
        return self._shifts[read][layer]

    def _completed(self, texts: Sequence[str], read: str) -> dict[int, Float[Tensor, "n d"]]:
        """The states of each layer at the completions, all from one pass."""
        rows: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        for start, part in self._numbered():
            output = part.run(texts[start : start + len(part.items)])
            mask = output.mask[:, 1:].cpu()
            weights = mask.float() / mask.sum(dim=1, keepdim=True)
            if read == "last":
                weights = nn.functional.one_hot(mask.sum(dim=1) - 1, mask.shape[1]).float()
            for layer, of_layer in rows.items():
                states = output.states[layer][:, 1:].float().cpu()
                of_layer.append((states * weights[..., None]).sum(dim=1))
        return {layer: torch.cat(of_layer) for layer, of_layer in rows.items()}

    def answers(
        self,
        layer: int = 0,
        vectors: Float[Tensor, "n d"] | Float[Tensor, "d"] | None = None,
        strength: float = 1.0,
        n_tokens: int = 5,
    ) -> list[str]:
        """Answer the questions, with a vector for each added at a layer.

        Parameters
        ----------
        layer : int
            Where it is added.
        vectors : tensor (n, d) or (d,), optional
            What is added; by default nothing.
        strength : float, default 1.0
            The factor.
        n_tokens : int, default 5
            How many tokens are generated at most.

        Returns
        -------
        list of str
            The answers in the order of the items.
        """
        texts = []
        for start, part in self._numbered():
            with self._added(part, start, layer, vectors, strength):
                ids = part.generate(n_tokens)
            texts += self.vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def divergence(
        self, layer: int, vectors: Float[Tensor, "n d"] | Float[Tensor, "d"], strength: float
    ) -> float:
        """Measure how far steering moves the model's words where nothing should change.

        Parameters
        ----------
        layer : int
            Where vectors are added.
        vectors : tensor (n, d) or (d,)
            What is added.
        strength : float
            The factor.

        Returns
        -------
        float
            The KL divergence from the unsteered model to the steered one, in nats a token, over the
            targets of the items read as answers.
        """
        texts = [item.target for item in self.items]
        total, n = 0.0, 0
        for start, part in self._numbered():
            captions = texts[start : start + len(part.items)]
            plain = part.run(captions)
            with self._added(part, start, layer, vectors, strength):
                steered = part.run(captions)
            mask = plain.mask[:, 1:].bool()  # a token predicts the next one
            before, after = plain.logits[:, :-1][mask], steered.logits[:, :-1][mask]
            total += float(answer_kl(before, after).sum())
            n += int(mask.sum())
        return total / n

    def _numbered(self) -> Iterator[tuple[int, "_Part"]]:
        start = 0
        for part in self._parts:
            yield start, part
            start += len(part.items)

    def _added(
        self,
        part: "_Part",
        start: int,
        layer: int,
        vectors: Tensor | None,
        strength: float,
    ) -> AbstractContextManager:
        """Add vectors to all that runs; what runs begins at the prompt's last token."""
        if vectors is None:
            return nullcontext()
        rows = vectors if vectors.ndim == 1 else vectors[start : start + len(part.items)]
        return add(self.vlm, rows, layer, strength, part.positions)


class _Part:
    """Some questions, with the cache of their prompts but for the last token.

    Models other than a LLaVA run each prompt whole, since not all of them go on from a cache that
    begins with a picture in the same way.
    """

    def __init__(self, vlm: VLM, items: Sequence[Item]) -> None:
        self.vlm = vlm
        self.items = items
        self.positions = "all"
        self._asked = [item.image for item in items], [item.prompt for item in items]
        batch = vlm.batch(*self._asked)
        self.ids = batch["input_ids"]
        self.mask = batch["attention_mask"]
        self.length = self.ids.shape[1] - 1
        self.cache = None
        if vlm.model.config.model_type != "llava":
            self.positions = "last"
            return
        beginning = {}
        for name, value in batch.items():
            by_token = value.shape[:2] == self.ids.shape
            beginning[name] = value[:, :-1] if by_token else value
        first = vlm.prepare(beginning)
        # as generate numbers them: padding does not count
        self.places = (self.mask.cumsum(dim=1) - 1).clamp_min(0)
        options = {"use_cache": True, "position_ids": self.places[:, :-1]}
        self.cache = vlm.forward(first, logits=False, **options).past_key_values

    def run(self, texts: Sequence[str] | None = None) -> "_Read":
        """Run the last token of the prompts, and these texts behind it."""
        if self.cache is None:
            return self._run_whole(texts)
        ids = self.ids[:, self.length :]
        mask = torch.ones_like(ids)
        if texts is not None:
            added, added_mask = _completions(self.vlm, texts)
            ids = torch.cat([ids, added.to(ids.device)], dim=1)
            mask = torch.cat([mask, added_mask.to(mask.device)], dim=1)
        whole_mask = torch.cat([self.mask[:, : self.length], torch.ones_like(ids)], dim=1)
        places = self.places[:, -1:] + torch.arange(ids.shape[1], device=ids.device)
        rest = self.vlm.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        try:
            with torch.no_grad(), self.vlm.run(rest):
                output = self.vlm.model(
                    input_ids=ids,
                    attention_mask=whole_mask,
                    position_ids=places,
                    past_key_values=self.cache,
                    use_cache=True,
                    output_hidden_states=True,
                )
        finally:
            self._rewind()
        return _Read(output.hidden_states, output.logits.float(), mask)

    def _run_whole(self, texts: Sequence[str] | None) -> "_Read":
        batch = self.vlm.batch(*self._asked, texts)
        output = self.vlm.forward(batch, output_hidden_states=True)
        answers = batch.spans == SPANS.index("answer")
        counts = answers.sum(dim=1)
        starts = torch.where(counts > 0, answers.int().argmax(dim=1), answers.shape[1]) - 1
        steps = torch.arange(int(counts.max()) + 1, device=counts.device)
        mask = (steps <= counts[:, None]).long()
        places = (starts[:, None] + steps).clamp_max(answers.shape[1] - 1)
        rows = torch.arange(len(places), device=places.device)[:, None]
        states = [states[rows, places] for states in output.hidden_states]
        return _Read(states, output.logits[rows, places].float(), mask)

    def _rewind(self) -> None:
        """Take what ran behind the beginning out of the cache."""
        added = self.cache.get_seq_length() - self.length
        if added:
            self.cache.crop(-added)

    def generate(self, n_tokens: int) -> Int[Tensor, "b new"]:
        """Generate after the prompts."""
        if self.cache is None:
            return self.vlm.generate_ids(self.vlm.batch(*self._asked), n_tokens)
        whole = self.vlm.prepare({"input_ids": self.ids, "attention_mask": self.mask})
        try:
            return self.vlm.generate_ids(whole, n_tokens, past_key_values=self.cache)
        finally:
            self._rewind()


class _Read(NamedTuple):
    """States by layer and logits, (b, t, ...), from the prompt's last token on, and which count."""

    states: Sequence[Tensor]
    logits: Tensor
    mask: Tensor


def _completions(vlm: VLM, texts: Sequence[str]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """The tokens of texts that follow a prompt, padded on the right, and which are no padding."""
    rows = vlm.tokenizer(list(texts), add_special_tokens=False).input_ids
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def forms_by_answer(items: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    """Return the share of successes of each class, and "all", the mean over the classes.

    Parameters
    ----------
    items : sequence of Item
        The questions.
    answers : sequence of str
        What a model said to them.

    Returns
    -------
    dict of str to float
        The shares.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import forms_by_answer, presence
    >>> forms_by_answer(presence(2, 2, 2)["test"], ["yes", "yes"])
    {'yes': 1.0, 'no': 0.0, 'all': 0.5}
    """
    groups = pd.Series([item.group for item in items])
    shares = pd.Series(successes(items, answers)).groupby(groups, sort=False).mean()
    return {**shares.to_dict(), "all": float(shares.mean())}


def oracle_curve(
    primed: Primed,
    layers: Sequence[int],
    strengths: Sequence[float],
    read: str = "last",
    n_tokens: int = 5,
) -> pd.DataFrame:
    """Add each question its own shift, which has read the answer, at both signs.

    Use it before anything is compared: where the oracle fails, what imitates it cannot do better.

    Parameters
    ----------
    primed : Primed
        The questions.
    layers : sequence of int
        Where shifts are read and added.
    strengths : sequence of float
        The factors, negative ones among them.
    read : {"last", "mean"}, default "last"
        As for :meth:`Primed.shifts`.
    n_tokens : int, default 5
        How many tokens are generated at most.

    Returns
    -------
    pandas.DataFrame
        Columns layer, strength, the classes and "all".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import Primed, oracle_curve, presence
    >>> primed = Primed(vlm, presence(2, 2, 2)["test"], [12])
    >>> oracle_curve(primed, [12], [-1.0, 1.0], n_tokens=1)["strength"].tolist()
    [-1.0, 1.0]
    """
    rows = []
    for layer in layers:
        shifts = primed.shifts(layer, read)
        for strength in strengths:
            answers = primed.answers(layer, shifts, strength, n_tokens)
            rows.append({"layer": layer, "strength": strength})
            rows[-1] |= forms_by_answer(primed.items, answers)
    return pd.DataFrame(rows)


def ladder(
    train: Primed, layer: int, read: str = "last", n_hidden: int = 64, seed: int = 0
) -> dict[str, Rung]:
    """Fit all that is compared, from one constant to a learned function, on the same questions.

    Parameters
    ----------
    train : Primed
        The questions to learn from.
    layer : int
        Where states and shifts are read.
    read : {"last", "mean"}, default "last"
        As for :meth:`Primed.shifts`.
    n_hidden : int, default 64
        The rank of the learned functions.
    seed : int, default 0
        Of all that is drawn.

    Returns
    -------
    dict of str to Rung
        "random", "mean", "probe" (the mean of the class that a probe reads), "L2S", "L2S, their
        loss" and "L2S, shuffled", which learned the shifts of other questions.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import Primed, ladder, presence
    >>> rungs = ladder(Primed(vlm, presence(8, 2, 2)["train"], [12]), 12, n_hidden=4)
    >>> rungs["mean"].n_parameters, rungs["L2S"].n_parameters
    (576, 4612)
    """
    states, shifts = train.states[layer], train.shifts(layer, read)
    labels = [item.group for item in train.items]
    width = states.shape[1]
    mean = mean_shift(shifts)
    length = shifts.norm(dim=1).mean()
    random = random_shifts(torch.ones(1, width), seed)[0]
    constants = {"random": random / random.norm() * length, "mean": mean}
    rungs = {}
    for name, vector in constants.items():
        rungs[name] = Rung(partial(_same_for_all, vector), width, 0.0)
    start = perf_counter()
    probe = ProbeSteering(0.1).fit(states, shifts, labels)
    rungs["probe"] = Rung(probe.predict, probe.n_parameters, perf_counter() - start)
    order = torch.randperm(len(shifts), generator=torch.Generator().manual_seed(seed))
    variants = {
        "L2S": ("mse", shifts),
        "L2S, their loss": ("mse+l1-cos", shifts),
        "L2S, shuffled": ("mse", shifts[order]),
    }
    for name, (loss, targets) in variants.items():
        start = perf_counter()
        learned = LearnedSteering(n_hidden, loss, seed=seed).fit(states, targets, train.vlm.name)
        seconds = perf_counter() - start
        rungs[name] = Rung(learned.predict, learned.n_parameters, seconds)
    return rungs


def _same_for_all(vector: Float[Tensor, "d"], states: Float[Tensor, "n d"]) -> Tensor:
    return vector.expand(len(states), -1)


def tried(
    primed: Primed,
    rungs: Mapping[str, Rung],
    layer: int,
    strengths: Sequence[float],
    n_tokens: int = 5,
) -> pd.DataFrame:
    """Steer by each rung at each strength.

    Parameters
    ----------
    primed : Primed
        The questions, those of validation where a strength is to be chosen.
    rungs : mapping of str to Rung
        From :func:`ladder`.
    layer : int
        Where vectors are added.
    strengths : sequence of float
        The factors.
    n_tokens : int, default 5
        How many tokens are generated at most.

    Returns
    -------
    pandas.DataFrame
        Columns rung, strength, the classes, "all" and answers.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import learned_steering
    >>> primed = learned_steering.Primed(vlm, learned_steering.presence(8, 2, 2)["train"], [12])
    >>> rungs = learned_steering.ladder(primed, 12, n_hidden=4)
    >>> len(learned_steering.tried(primed, {"mean": rungs["mean"]}, 12, [1.0, 2.0], 1))
    2
    """
    rows = []
    for name, rung in rungs.items():
        vectors = rung.vectors(primed.states[layer])
        for strength in strengths:
            answers = primed.answers(layer, vectors, strength, n_tokens)
            row = {"rung": name, "strength": strength, "answers": answers}
            rows.append(row | forms_by_answer(primed.items, answers))
    return pd.DataFrame(rows)


def best_strengths(rows: pd.DataFrame) -> dict[str, float]:
    """Choose the strength of each rung that succeeds most; of equals the weakest.

    Parameters
    ----------
    rows : pandas.DataFrame
        From :func:`tried`, on validation.

    Returns
    -------
    dict of str to float
        The strength by rung.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.learned_steering import best_strengths
    >>> rows = pd.DataFrame({"rung": ["a"] * 3, "strength": [1, 2, -4], "all": [0.5, 0.9, 0.9]})
    >>> best_strengths(rows)
    {'a': 2.0}
    """
    strengths = {}
    for name, part in rows.groupby("rung", sort=False):
        weakest_first = part.assign(size=part["strength"].abs()).sort_values("size", kind="stable")
        strengths[name] = float(weakest_first.loc[weakest_first["all"].idxmax(), "strength"])
    return strengths


def by_threshold(validation: Primed, test: Primed) -> list[str]:
    """Answer yes/no questions by a threshold of the logit gap that is chosen on validation.

    Parameters
    ----------
    validation, test : Primed
        The questions that the threshold is chosen on, and those that are answered.

    Returns
    -------
    list of str
        "yes" where the logit of yes minus that of no is above the threshold, else "no".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import Primed, by_threshold, presence
    >>> parts = presence(2, 4, 2)
    >>> by_threshold(Primed(vlm, parts["validation"], [12]), Primed(vlm, parts["test"], [12]))
    ['yes', 'no']
    """
    yes = [item.group == "yes" for item in validation.items]
    threshold = balanced_threshold(_gaps(validation), yes)
    return ["yes" if gap > threshold else "no" for gap in _gaps(test)]


def _gaps(primed: Primed) -> Float[Tensor, "n"]:
    """By how much the likeliest beginning of yes lies above that of no."""
    best = []
    for word in ("yes", "no"):
        best.append(primed.logits[:, first_pieces(primed.vlm, word)].amax(dim=1))
    return best[0] - best[1]


def other_questions(per_type: int = 8, seed: int = 0, dataset: str = "scenes") -> list[Item]:
    """Take test questions of every type but yes/no: what steering should leave as it is.

    Parameters
    ----------
    per_type : int, default 8
        How many of each type.
    seed : int, default 0
        Of the pictures.
    dataset : str, default "scenes"
        Pictures with questions.

    Returns
    -------
    list of Item
        The group is the type of the question, which is the factor that it asks for.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import other_questions
    >>> sorted(item.group for item in other_questions(1))
    ['action', 'colour', 'count', 'place', 'side']
    """
    of_type: dict[str, list[Item]] = {}
    for number, sample in enumerate(load_samples(dataset, 10 * per_type + 20, "test", seed + 1)):
        questions = [q for q in sample.questions if q.answer not in ("yes", "no")]
        if questions:
            question = questions[number % len(questions)]
            only = replace(sample, questions=(question,))
            item = Item(only, question.type, question.answer, question.answer)
            of_type.setdefault(question.type, []).append(item)
    return [item for items in of_type.values() for item in items[:per_type]]


def neutral_prompts(n: int = 8, seed: int = 0, dataset: str = "scenes") -> list[Item]:
    """Take test pictures to be described, with a caption each.

    Parameters
    ----------
    n : int, default 8
        How many.
    seed : int, default 0
        Of the pictures.
    dataset : str, default "scenes"
        Pictures with captions.

    Returns
    -------
    list of Item
        The target is the caption.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import neutral_prompts
    >>> neutral_prompts(1)[0].prompt
    'Describe the picture.'
    """
    items = []
    for sample in load_samples(dataset, n, "test", seed + 1):
        caption = description(sample)
        question = Question("caption", PROMPTS["image"], caption)
        items.append(Item(replace(sample, questions=(question,)), "caption", caption, caption))
    return items


def side_effects(
    others: Primed,
    neutral: Primed,
    rungs: Mapping[str, Rung],
    layer: int,
    strengths: Mapping[str, float],
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Measure what steering does where nothing should change.

    Parameters
    ----------
    others : Primed
        From :func:`other_questions`.
    neutral : Primed
        From :func:`neutral_prompts`.
    rungs : mapping of str to Rung
        From :func:`ladder`.
    layer : int
        Where vectors are added.
    strengths : mapping of str to float
        The strength of each rung.

    Returns
    -------
    pandas.DataFrame
        A row a rung, "none" before them: nats a token of captions, accuracy by type of question,
        and "others", that on all of them.
    dict of str to array (n,)
        Where the other questions were answered correctly, by rung.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import learned_steering as learned
    >>> others = learned.Primed(vlm, learned.other_questions(1), [12])
    >>> neutral = learned.Primed(vlm, learned.neutral_prompts(1), [12])
    >>> table, correct = learned.side_effects(others, neutral, {}, 12, {})
    >>> table.index.tolist(), len(correct["none"])
    (['none'], 5)
    """
    groups = pd.Series([item.group for item in others.items])
    rows, correct = {}, {}
    for name in ("none", *rungs):
        if name == "none":
            answers, nats = others.answers(), 0.0
        else:
            vectors = rungs[name].vectors(others.states[layer])
            answers = others.answers(layer, vectors, strengths[name])
            vectors = rungs[name].vectors(neutral.states[layer])
            nats = neutral.divergence(layer, vectors, strengths[name])
        pairs = zip(answers, others.items, strict=True)
        hits = [exact_match(answer, item.question.answer) for answer, item in pairs]
        correct[name] = np.array(hits, dtype=float)
        by_type = pd.Series(correct[name]).groupby(groups).mean().to_dict()
        rows[name] = {"nats": nats, "others": correct[name].mean(), **by_type}
    return pd.DataFrame.from_dict(rows, orient="index"), correct
