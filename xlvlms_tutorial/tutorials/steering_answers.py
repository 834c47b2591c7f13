"""Prepare the experiments on steering answers: questions, tasks, settings, baselines.

The chapters on steering answers and on what a steering vector is share this. Vectors are made on
one part of the pictures, layer and strength are chosen on a second, and numbers are of a third.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.interventions import patch, skip
from xlvlms_tutorial.methods.steering import (
    Recorded,
    SteeringVectors,
    best_setting,
    first_pieces,
    mean_difference,
    sweep,
)
from xlvlms_tutorial.methods.steering.sweep import Replay
from xlvlms_tutorial.metrics import Estimate, answer_table, bootstrap, difference
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.tutorials.experiments import balanced_questions
from xlvlms_tutorial.validation import require

Answers = Sequence[str] | np.ndarray  # what a model says to questions, in their order

_BATCH = 32
_KNOWN = 8  # how often an answer must be right in training pictures to be used


class Task(NamedTuple):
    """What a vector is to do: turn the answers of the source into those of the target."""

    source: tuple[str, ...]
    target: tuple[str, ...]


class Quiz(NamedTuple):
    """Questions, one a sample, and what the model answers to them without steering.

    ``states`` are those of the last layer at the prompt's last position, (n, d); ``answers`` are
    words, (n,).
    """

    samples: list[Sample]
    states: Float[Tensor, "n d"]
    answers: np.ndarray


class Study:
    """The questions, tasks and answers that the chapters on steering answers start from.

    Pairs of answers that cannot be used are replaced by answers to the questions of another type,
    the most frequent first: a pair is of use if the model gives its first answer, and if there are
    questions enough for both.

    Parameters
    ----------
    vlm : VLM
        The model.
    dataset : str
        A data set whose pictures come with questions.
    pairs : sequence of (str, str)
        Answers (source, target), a task each.
    types : sequence of str
        Two types of questions: a last task turns any answer of the first type into one of the
        second.
    n_samples : int, default 16
        How many questions there are for each answer of the pairs, to make vectors of.
    n_many : int, default 0
        The same for the two answers of the first pair, where it is more.
    n_scenes : int, default 500
        From how many pictures of each part questions are taken.
    instruction : str, default ""
        What stands after each question.
    seed : int, default 0
        Of the pictures, of random vectors and of the bootstrap.
    steered_at : sequence of float
        Shares of the depth at which validation and test questions will be steered: their states
        there are held from the first pass on. Others are read when they are needed.

    Attributes
    ----------
    pairs, types, tasks : dict of Task
        The tasks that turn one answer into another, those for types, and both, by name.
    learning : list of Sample
        The questions that vectors are made of.
    validation, test : Quiz
        The questions that settings are chosen on, and those that are reported.
    distinct : bool
        Whether the first token tells all answers apart; where answers begin alike, it stands for
        the most frequent of them.

    Raises
    ------
    InputError
        If no pair of answers can be used.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> study.pairs["yes to no"]
    Task(source=('yes',), target=('no',))
    """

    def __init__(
        self,
        vlm: VLM,
        dataset: str,
        pairs: Sequence[Sequence[str]],
        types: Sequence[str],
        n_samples: int = 16,
        n_many: int = 0,
        n_scenes: int = 500,
        instruction: str = "",
        seed: int = 0,
        steered_at: Sequence[float] = (),
    ) -> None:
        self.vlm = vlm
        self._held = self.layers(steered_at)
        self._recorded: list[Recorded] = []
        self.instruction = instruction
        self.seed = seed
        scenes = {}
        for split in ("train", "validation", "test"):
            samples = load_samples(dataset, n_scenes, split, seed)
            scenes[split] = [sample for sample in samples if sample.questions]
        self.scenes = scenes["test"]
        counts: Counter[str] = Counter()
        self.kinds: dict[str, str] = {}
        for sample in scenes["train"]:
            for question in sample.questions:
                counts[question.answer] += 1
                self.kinds[question.answer] = question.type
        self.first_tokens = _first_tokens(vlm, [word for word, _ in counts.most_common()])
        self.distinct = set(counts) == set(self.first_tokens.values())
        self._words = {}
        for token, word in self.first_tokens.items():
            self._words[vlm.tokenizer.decode([token]).strip()] = word
        frequent = [source for source, _ in pairs] + [pairs[0][1]]
        questions = balanced_questions(scenes["validation"], 2, more=dict.fromkeys(frequent, 10))
        self.validation = self.recorded_quiz(questions)
        begun = set(self.first_tokens.values())
        common = [word for word, n in counts.most_common() if n >= _KNOWN]
        self.usable_words = [word for word in common if word in begun]
        self._choose_tasks(pairs, types, scenes["test"])
        self.learning = self._learning(scenes["train"], n_samples, n_many)

    def layers(self, shares: Sequence[float]) -> list[int]:
        """Return the layers at some shares of the depth, in order, none of them 0."""
        return sorted({max(1, self.vlm.layer_at(share)) for share in shares})

    def prompt(self, sample: Sample) -> str:
        """Return the question of a sample as the model is asked it."""
        return f"{sample.questions[0].text} {self.instruction}".strip()

    def read(
        self, samples: Sequence[Sample], layers: object = "all", span: str | None = None
    ) -> Activations:
        """Read the states at the prompt's last position, or the mean over a span.

        Parameters
        ----------
        samples : sequence of Sample
            One question each.
        layers : int, sequence of int or "all"
            The layers that are read.
        span : str, optional
            A span such as "image"; by default the last position.

        Returns
        -------
        Activations
            States (n, d) by layer.
        """
        place = {"positions": -1} if span is None else {"span": span}
        # questions about one picture together: what they have in common runs once
        order = sorted(range(len(samples)), key=lambda number: samples[number].id)
        ordered = [samples[number] for number in order]
        states = capture(self.vlm, ordered, layers, prompt=self.prompt, batch_size=_BATCH, **place)
        back = np.argsort(order)
        tensors = {key: rows[back] for key, rows in states.tensors.items()}
        table = states.table.iloc[back].assign(sample=range(len(order))).reset_index(drop=True)
        return Activations(tensors, table, states.provenance)

    def say(self, logits: Float[Tensor, "n v"]) -> np.ndarray:
        """Return the answers that begin with the likeliest first tokens, (n,)."""
        likeliest = logits.argmax(dim=-1)[:, None]
        return self._whole(self.vlm.tokenizer.batch_decode(likeliest))

    def quiz(self, samples: list[Sample], text: str = "") -> Quiz:
        """Ask questions without steering.

        Parameters
        ----------
        samples : list of Sample
            One question each.
        text : str, default ""
            What is put after each prompt.

        Returns
        -------
        Quiz
            The questions with states and answers.
        """
        last = self.vlm.n_layers
        prompt = (lambda sample: f"{self.prompt(sample)} {text}") if text else self.prompt
        states = capture(self.vlm, samples, last, positions=-1, prompt=prompt, batch_size=_BATCH)[
            last
        ]
        return Quiz(samples, states, self.say(self.vlm.unembed(states)))

    def recorded_quiz(self, samples: list[Sample]) -> Quiz:
        """Ask questions without steering, and record them to be steered.

        Parameters
        ----------
        samples : list of Sample
            One question each.

        Returns
        -------
        Quiz
            The questions with states and answers, as :meth:`quiz` gives them.
        """
        prompts = [self.prompt(sample) for sample in samples]
        recorded = Recorded(self.vlm, samples, prompts, self._held, _BATCH)
        self._recorded.append(recorded)
        states = recorded.last_states.float()
        return Quiz(samples, states, self.say(self.vlm.unembed(states)))

    def steer(
        self,
        samples: Sequence[Sample],
        vectors: SteeringVectors | Mapping[Hashable, SteeringVectors],
        layers: Sequence[int] | None = None,
        strengths: Sequence[float] = (1.0,),
        **options: object,
    ) -> pd.DataFrame:
        """Steer at each layer and strength, as ``sweep`` does, and return whole answers.

        Parameters
        ----------
        samples : sequence of Sample
            One question each.
        vectors : SteeringVectors, or mapping of them
            The vectors, or several by name.
        layers : sequence of int, optional
            Where they are added; by default wherever there is a vector.
        strengths : sequence of float
            The factors that are tried.
        **options
            Further arguments of :func:`~xlvlms_tutorial.methods.steering.sweep`.

        Returns
        -------
        pandas.DataFrame
            The table of the sweep; its column answers holds arrays (n,).
        """
        recorded = None if "max_new_tokens" in options else self.recorded(samples)
        if recorded is None:
            prompts = [self.prompt(sample) for sample in samples]
            options = options | {"batch_size": _BATCH}
        else:
            samples, prompts = recorded, None
        rows = sweep(
            self.vlm, vectors, samples, prompts, layers, strengths, answers=True, **options
        )
        return rows.assign(answers=rows["answers"].map(self._whole))

    def examples(self, words: Sequence[str], n: int) -> list[Sample]:
        """Return the first ``n`` questions to learn from whose right answer is one of ``words``."""
        return [s for s in self.learning if s.questions[0].answer in words][:n]

    def asking(self, name: str) -> list[Sample]:
        """Return the validation questions whose right answer is a source answer of the task."""
        source = self.tasks[name].source
        return [s for s in self.validation.samples if s.questions[0].answer in source]

    def hits(self, name: str, answers: Answers) -> np.ndarray:
        """Tell which source answers became the target on the test questions.

        Parameters
        ----------
        name : str
            A task.
        answers : sequence of str
            The answers to all test questions.

        Returns
        -------
        array of float
            0 or 1 for each test question that the model answers with a source answer.
        """
        source, target = self.tasks[name]
        rows = np.isin(self.test.answers, source)
        return np.isin(np.asarray(answers)[rows], target).astype(float)

    def rates(self, answers: Mapping[str, Mapping[str, Answers]]) -> pd.DataFrame:
        """Return the shares of source answers that became the target on the test questions.

        Parameters
        ----------
        answers : mapping of str to mapping of str to sequence of str
            By task, the answers to all test questions by what changed them.

        Returns
        -------
        pandas.DataFrame
            A row for what changed them, a column a task.
        """
        table = {}
        for name, ways in answers.items():
            table[name] = {way: self.hits(name, changed).mean() for way, changed in ways.items()}
        return pd.DataFrame(table)

    def likely_token(self, word: str) -> int:
        """Return the likeliest of the tokens that begin a word, over the validation questions."""
        logits = self.vlm.unembed(self.validation.states).mean(dim=0)
        return max(first_pieces(self.vlm, word), key=lambda token: float(logits[token]))

    def recorded(self, samples: Sequence[Sample]) -> Recorded | None:
        """Return some of the validation or test questions as they were recorded.

        Parameters
        ----------
        samples : sequence of Sample
            Questions of one of the two, in their order there.

        Returns
        -------
        Recorded or None
            What their first pass left; None for other questions.
        """
        for recorded in self._recorded:
            numbers = {id(sample): number for number, sample in enumerate(recorded.samples)}
            rows = [numbers.get(id(sample), -1) for sample in samples]
            if rows == list(range(len(recorded.samples))):
                return recorded
            if rows and rows == sorted(set(rows)) and rows[0] >= 0:
                return recorded.only(rows)
        return None

    def _whole(self, texts: Sequence[str]) -> np.ndarray:
        stripped = [text.strip() for text in texts]
        return np.array([self._words.get(text, text) for text in stripped], dtype=object)

    def _choose_tasks(
        self, pairs: Sequence[Sequence[str]], types: Sequence[str], scenes: Sequence[Sample]
    ) -> None:
        """Fill pairs, types, tasks and the test questions."""
        n_right = Counter(s.questions[0].answer for s in self.validation.samples)
        selected = _usable_pairs(
            pairs, self.usable_words, self.kinds, self.validation.answers, n_right
        )
        self.of_type = {}
        for kind in dict.fromkeys([*types, *self.kinds.values()]):
            self.of_type[kind] = sorted([w for w in self.usable_words if self.kinds[w] == kind][:8])
        n_each = dict.fromkeys([source for source, _ in selected], 16)
        self.test = self.recorded_quiz(balanced_questions(scenes, 4, more=n_each))
        tasks = {f"{a} to {b}": Task((a,), (b,)) for a, b in selected}
        self.pairs = {name: task for name, task in tasks.items() if self._is_tried(task)}
        require(
            self.pairs,
            f"no pair of {[list(pair) for pair in pairs]} can be steered",
            "name answers that this model gives to questions of this data set",
        )
        two = [kind for kind, words in self.of_type.items() if words][:2]
        self.types = {}
        if len(two) == 2:
            task = Task(*(tuple(self.of_type[kind]) for kind in two))
            if self._is_tried(task):
                self.types[" to ".join(two)] = task
        self.tasks = self.pairs | self.types

    def _is_tried(self, task: Task) -> bool:
        n_test = np.isin(self.test.answers, task.source).sum()
        return bool(n_test > 1 and np.isin(self.validation.answers, task.source).any())

    def _learning(self, scenes: Sequence[Sample], n_samples: int, n_many: int) -> list[Sample]:
        words = [word for task in self.pairs.values() for part in task for word in part]
        n_each = dict.fromkeys(words, n_samples)
        n_each |= dict.fromkeys(words[:2], max(n_samples, n_many))
        used = {word for task in self.tasks.values() for part in task for word in part}
        samples = balanced_questions(scenes, 6, per_sample=7, more=n_each)
        return [sample for sample in samples if sample.questions[0].answer in used]


def _first_tokens(vlm: VLM, words: Sequence[str]) -> dict[int, str]:
    """The answer that begins with each token; the first of those that begin alike."""
    tokens: dict[int, str] = {}
    for word in words:
        pieces = first_pieces(vlm, word)
        if not tokens.keys() & set(pieces):
            tokens |= dict.fromkeys(pieces, word)
    return tokens


def _usable_pairs(
    pairs: Sequence[Sequence[str]],
    frequent: Sequence[str],
    kinds: Mapping[str, str],
    answers: Answers,
    n_right: Mapping[str, int],
) -> list[tuple[str, str]]:
    """The pairs that can be used, then those of other types of questions that replace some.

    A pair is of use if the model gives its first answer (``answers``) and both are among the
    frequent ones. ``n_right`` counts the questions to which an answer is right.
    """

    def usable(source: str, target: str) -> bool:
        differ = source != target and {source, target} <= set(frequent)
        return differ and source in answers and n_right.get(source, 0) > 1

    selected = [(source, target) for source, target in pairs if usable(source, target)]
    for kind in dict.fromkeys(kinds[word] for word in frequent):
        if kind in {kinds[source] for source, _ in selected}:
            continue
        words = [word for word in frequent if kinds[word] == kind]
        for source, target in product(words, words):
            if usable(source, target):
                selected.append((source, target))
                break
    return selected[: len(pairs)]


def states_for(
    states: Activations, samples: Sequence[Sample], words: Sequence[str], n: int
) -> Activations:
    """Select the states of the first ``n`` questions to each of some answers.

    Parameters
    ----------
    states : Activations
        The states of ``samples``, one row each.
    samples : sequence of Sample
        One question each.
    words : sequence of str
        Right answers.
    n : int
        How many questions for each.

    Returns
    -------
    Activations
        The rows selected.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.tutorials import balanced_questions
    >>> from xlvlms_tutorial.tutorials.steering_answers import states_for
    >>> questions = balanced_questions(samples, 2)
    >>> n = len(questions)
    >>> table = pd.DataFrame({"sample": range(n), "id": [sample.id for sample in questions]})
    >>> states = Activations({(24, "resid_post"): torch.eye(n)}, table, {})
    >>> len(states_for(states, questions, ["yes", "no"], n=2))
    4
    """
    answers = np.array([sample.questions[0].answer for sample in samples])
    selected = np.zeros(len(samples), dtype=bool)
    for word in words:
        selected[np.flatnonzero(answers == word)[:n]] = True
    return states.select(selected)


def mean_differences(
    study: Study, states: Activations, n: int
) -> tuple[dict[str, tuple[Activations, Activations]], dict[str, SteeringVectors]]:
    """Make the vectors of all tasks.

    Parameters
    ----------
    study : Study
        The tasks and the questions to learn from.
    states : Activations
        The states of these questions, by :meth:`Study.read`.
    n : int
        How many questions for each answer.

    Returns
    -------
    tuple of dict and dict
        The states (source, target) of each task, and its vectors.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, mean_differences
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_samples=2, n_scenes=12)
    >>> states = study.read(study.learning, vlm.n_layers)
    >>> sides, vectors = mean_differences(study, states, 2)
    >>> vectors["yes to no"]
    SteeringVectors(mean difference, layers 30, 2 source, 2 target)
    """
    sides, vectors = {}, {}
    for name, (source, target) in study.tasks.items():
        sides[name] = (
            states_for(states, study.learning, source, n),
            states_for(states, study.learning, target, n),
        )
        vectors[name] = mean_difference(*sides[name])
    return sides, vectors


def at_setting(vectors: SteeringVectors, layer: int, strength: float = 1.0) -> SteeringVectors:
    """Keep the vector of one layer, at one strength.

    Parameters
    ----------
    vectors : SteeringVectors
        Vectors of several layers.
    layer : int
        The layer that is kept.
    strength : float, default 1.0
        The factor of its vector.

    Returns
    -------
    SteeringVectors
        One vector.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial import SteeringVectors
    >>> from xlvlms_tutorial.tutorials.steering_answers import at_setting
    >>> vectors = SteeringVectors({24: torch.ones(2), 25: torch.ones(2)}, {"how": "by hand"})
    >>> at_setting(vectors, 25, 0.5)[25].tolist()
    [0.5, 0.5]
    """
    return SteeringVectors({layer: strength * vectors[layer]}, vectors.provenance)


def changed_by_layer(
    study: Study,
    name: str,
    vectors: SteeringVectors,
    layers: Sequence[int],
    **options: object,
) -> pd.DataFrame:
    """Steer the validation questions of a task at each layer.

    Use it to see at which layers a vector works.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task.
    vectors : SteeringVectors
        Its vectors.
    layers : sequence of int
        Where they are added, one at a time.
    **options
        Further arguments of :meth:`Study.steer`, such as ``positions="image"``.

    Returns
    -------
    pandas.DataFrame
        A row for each question whose right answer is the source, a column for each layer: whether
        the answer became the target.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial import SteeringVectors
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, changed_by_layer
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> vectors = SteeringVectors({29: torch.ones(vlm.width)}, {"model": vlm.name})
    >>> list(changed_by_layer(study, "yes to no", vectors, [29]))
    [29]
    """
    rows = study.steer(study.asking(name), vectors, layers, **options)
    target = study.tasks[name].target
    columns = {}
    for layer, answers in zip(rows["layer"], rows["answers"], strict=True):
        columns[layer] = np.isin(answers, target)
    return pd.DataFrame(columns)


def slope(changed: pd.DataFrame, seed: int = 0) -> Estimate:
    """Estimate how much more of the answers change with each layer.

    Parameters
    ----------
    changed : pandas.DataFrame
        From :func:`changed_by_layer`.
    seed : int, default 0
        Of the bootstrap over questions.

    Returns
    -------
    Estimate
        The least-squares slope over layers, the mean over questions.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.steering_answers import slope
    >>> round(slope(pd.DataFrame({10: [0, 0, 0], 20: [1, 1, 1]})).value, 3)
    0.1
    """
    layers = np.array(changed.columns, float)
    centred = layers - layers.mean()
    return bootstrap(changed.to_numpy(float) @ centred / (centred @ centred), seed=seed)


def knock_out(study: Study, first: int) -> pd.DataFrame:
    """Take something away from one block at a time, and count which answers stay.

    "attention": the last position does without the attention of this block, all else as it was.
    "picture": from this block on all image tokens have their mean over the questions.

    Parameters
    ----------
    study : Study
        Its validation questions that the model answers with a source answer of a pair are asked.
    first : int
        The first block that is tried, at least 2; the others are those after it.

    Returns
    -------
    pandas.DataFrame
        A row a block; columns (what is taken away, answer): the share of answers that stay.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, knock_out
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> table = knock_out(study, first=30)
    >>> list(table.columns), table.index.tolist()
    ([('attention', 'yes'), ('picture', 'yes')], [30])
    """
    vlm = study.vlm
    sources = [word for task in study.pairs.values() for word in task.source]
    numbers = np.flatnonzero(np.isin(study.validation.answers, sources))
    samples = [study.validation.samples[number] for number in numbers]
    parts = study.recorded(samples)
    table: dict[int, dict[tuple[str, str], float]] = {}
    first = max(2, first)  # a pass cannot resume from what enters block 1
    for run in parts.replays:
        run.hold(range(first - 1, vlm.n_layers + 1))
    for block in range(first, vlm.n_layers + 1):
        table[block] = {}
        attention, picture = [], []
        for run in parts.replays:
            attention.append(_without_attention(run, block))
            if "image" in vlm.placeholders:
                picture.append(_without_picture(run, block))
        for label, logits in (("attention", attention), ("picture", picture)):
            if logits:
                answers = study.say(torch.cat(logits))
                table[block] |= _staying(label, answers, study.say(parts.base))
    return pd.DataFrame(table).T.rename_axis("block")


def _without_attention(run: Replay, block: int) -> Float[Tensor, "b v"]:
    """The logits where the last position does without the attention of a block."""
    vlm = run.vlm
    below = run.states[block - 1]
    deaf = skip(vlm, block, "attention")
    last = run.read(block, "last", start=block - 1, states=below, change=deaf)[:, 0]
    return run.logits(block, patch(vlm, last, block, "last"))


def _without_picture(run: Replay, block: int) -> Float[Tensor, "b v"]:
    """The logits where all image tokens have their mean from a block on."""
    blank = run.states[block - 1][run.batch.mask("image").cpu()].mean(dim=0)
    return run.logits(block - 1, patch(run.vlm, blank, block - 1, "image"))


def _staying(label: str, answers: Answers, before: Answers) -> dict[tuple[str, str], float]:
    """The share of each answer that stays, with what was taken away."""
    shares = pd.Series(answers == before).groupby(before).mean()
    return {(label, word): share for word, share in shares.items()}


def score(
    samples: Sequence[Sample], before: Answers, after: Answers, task: Task
) -> dict[str, float]:
    """Score changed answers: how many became the target, and what other types of questions lost.

    Parameters
    ----------
    samples : sequence of Sample
        One question each.
    before, after : sequence of str
        The answers without and with the change.
    task : Task
        What was to change.

    Returns
    -------
    dict of str to float
        "to target", the share of the source answers that became the target; "lost", the accuracy
        before minus that after, on the questions of other types.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import balanced_questions
    >>> from xlvlms_tutorial.tutorials.steering_answers import Task, score
    >>> questions = balanced_questions(samples, 2)
    >>> right = [sample.questions[0].answer for sample in questions]
    >>> score(questions, right, right, Task(("yes",), ("no",)))
    {'to target': 0.0, 'lost': 0.0}
    """
    questions = [sample.questions[0] for sample in samples]
    correct_before = answer_table(list(before), questions)["correct"].to_numpy(float)
    correct_after = answer_table(list(after), questions)["correct"].to_numpy(float)
    not_steered = _other_types(samples, before, task)
    rows = np.isin(before, task.source)
    return {
        "to target": float(np.isin(np.asarray(after)[rows], task.target).mean()),
        "lost": float((correct_before - correct_after)[not_steered].mean()),
    }


def _other_types(samples: Sequence[Sample], before: Answers, task: Task) -> np.ndarray:
    """Which questions are of types that a task does not steer; without any, of other answers."""
    steered = set()
    for sample in samples:
        if sample.questions[0].answer in task.source:
            steered.add(sample.questions[0].type)
    not_steered = np.array([sample.questions[0].type not in steered for sample in samples])
    return not_steered if not_steered.any() else ~np.isin(before, task.source)


def stretched(
    study: Study,
    name: str,
    vectors: SteeringVectors,
    layers: Sequence[int],
    like: int,
    parts: Sequence[float] = (0.25, 0.5),
) -> pd.DataFrame:
    """Steer by early vectors that are as long as a late one, or a part of it.

    Use it to tell whether an early vector fails only because it is short.

    Parameters
    ----------
    study : Study
        The questions: those of the task, and a quarter of the other validation questions.
    name : str
        A task.
    vectors : SteeringVectors
        Its vectors.
    layers : sequence of int
        The early layers.
    like : int
        The layer whose length is given to them.
    parts : sequence of float
        Parts of that length.

    Returns
    -------
    pandas.DataFrame
        By layer and part: "to target" and "lost", as :func:`score` has them.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial import SteeringVectors
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, stretched
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> tensors = {28: torch.ones(vlm.width), 29: 2 * torch.ones(vlm.width)}
    >>> vectors = SteeringVectors(tensors, {"model": vlm.name})
    >>> len(stretched(study, "yes to no", vectors, [28], like=29))
    2
    """
    sources = [word for task in study.pairs.values() for word in task.source]
    unsteered = [s for s in study.validation.samples if s.questions[0].answer not in sources]
    ids = {sample.id for sample in study.asking(name) + unsteered[::4]}
    samples = [sample for sample in study.validation.samples if sample.id in ids]
    expected = np.array([sample.questions[0].answer for sample in samples], dtype=object)
    norms = vectors.norms
    longer = {}
    for layer in layers:
        if norms[layer]:
            longer[layer] = at_setting(vectors, layer, norms[like] / norms[layer])
    rows = study.steer(samples, longer, None, parts)
    scores = [score(samples, expected, answers, study.tasks[name]) for answers in rows["answers"]]
    return pd.DataFrame(scores, [rows["layer"], rows["strength"]])


def try_settings(
    study: Study,
    vectors: Mapping[str, SteeringVectors],
    layers: Sequence[int],
    strengths: Sequence[float],
) -> pd.DataFrame:
    """Steer the validation questions by each task's vector, at each layer and strength.

    Parameters
    ----------
    study : Study
        The questions.
    vectors : mapping of str to SteeringVectors
        The vectors by task.
    layers : sequence of int
        Where they are added.
    strengths : sequence of float
        How strongly.

    Returns
    -------
    pandas.DataFrame
        Columns vector, layer, strength, "to target" and "lost", as :func:`score` has them.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial import SteeringVectors
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, try_settings
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> vectors = SteeringVectors({30: torch.ones(vlm.width)}, {"model": vlm.name})
    >>> list(try_settings(study, {"yes to no": vectors}, [30], [1.0]))
    ['vector', 'layer', 'strength', 'to target', 'lost']
    """
    samples, _, before = study.validation
    expected = [sample.questions[0].answer for sample in samples]
    parts = []
    for name, task_vectors in vectors.items():
        task = study.tasks[name]
        # other questions of the steered type count neither way
        counted = _other_types(samples, before, task) | np.isin(before, task.source)
        counted |= np.isin(expected, task.source)
        questions = [samples[row] for row in np.flatnonzero(counted)]
        rows = study.steer(questions, task_vectors, layers, strengths)
        scores = [score(questions, before[counted], answers, task) for answers in rows["answers"]]
        parts.append(rows[["layer", "strength"]].join(pd.DataFrame(scores)))
    return pd.concat(parts, keys=vectors, names=["vector"]).reset_index("vector")


def best_settings(tried: pd.DataFrame, limit: float) -> dict[str, tuple[int, float]]:
    """Choose layer and strength for each task, as :func:`best_within` does for one.

    Parameters
    ----------
    tried : pandas.DataFrame
        From :func:`try_settings`.
    limit : float
        The largest loss that is allowed.

    Returns
    -------
    dict of str to (int, float)
        Layer and strength by task.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.steering_answers import best_settings
    >>> tried = pd.DataFrame({"vector": ["yes to no"], "layer": [30], "strength": [1.0]})
    >>> best_settings(tried.assign(**{"to target": [1.0], "lost": [0.0]}), 0.05)
    {'yes to no': (30, 1.0)}
    """
    rows = tried.groupby("vector", sort=False)
    return {name: best_within(part, limit) for name, part in rows}


def best_within(rows: pd.DataFrame, limit: float) -> tuple[int, float]:
    """Choose the layer and strength that change most answers at a small loss of others.

    Parameters
    ----------
    rows : pandas.DataFrame
        Columns layer, strength, "to target" and "lost".
    limit : float
        The largest loss that is allowed; where all rows lose more, the smallest loss that there is.

    Returns
    -------
    tuple of int and float
        Layer and strength; of equals the weaker, then the earlier.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.steering_answers import best_within
    >>> rows = pd.DataFrame({"layer": [25, 30], "strength": [1.0, 0.5]})
    >>> best_within(rows.assign(**{"to target": [1.0, 0.5], "lost": [0.2, 0.0]}), 0.05)
    (30, 0.5)
    """
    return best_setting(rows, "to target", ("lost", max(limit, rows["lost"].min())))


def steer_test(
    study: Study,
    vectors: Mapping[str, SteeringVectors],
    settings: Mapping[str, tuple[int, float]],
    sources_only: bool = False,
) -> dict[str, np.ndarray]:
    """Answer the test questions with each task's vector, at its layer and strength.

    Parameters
    ----------
    study : Study
        The questions.
    vectors : mapping of str to SteeringVectors
        The vectors by name.
    settings : mapping of str to (int, float)
        Layer and strength by the same names, such as from :func:`best_settings`.
    sources_only : bool, default False
        Whether only the questions are asked that the model answers with a source answer of the
        task, enough for :func:`gain`; the other answers are those without steering.

    Returns
    -------
    dict of str to array (n,)
        The answers to all test questions, by name.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial import SteeringVectors
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, steer_test
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> vectors = {"ones": SteeringVectors({30: torch.ones(vlm.width)}, {"model": vlm.name})}
    >>> len(steer_test(study, vectors, {"ones": (30, 1.0)})["ones"]) == len(study.test.samples)
    True
    """
    answers = {}
    for name, setting in settings.items():
        rows = np.arange(len(study.test.samples))
        if sources_only:
            rows = np.flatnonzero(np.isin(study.test.answers, study.tasks[name].source))
        samples = [study.test.samples[row] for row in rows]
        answers[name] = study.test.answers.copy()
        answers[name][rows] = study.steer(samples, at_setting(vectors[name], *setting))["answers"][
            0
        ]
    return answers


def accuracy_change(study: Study, name: str, answers: Answers) -> Estimate:
    """Estimate what steering does to the accuracy on other types of test questions.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        The task that was steered.
    answers : sequence of str
        The steered answers to all test questions.

    Returns
    -------
    Estimate
        Accuracy with steering minus that without, with an interval over pictures.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, accuracy_change
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> accuracy_change(study, "yes to no", study.test.answers).value
    0.0
    """
    samples, _, before = study.test
    not_steered = _other_types(samples, before, study.tasks[name])
    questions = [sample.questions[0] for sample in samples]
    scenes = np.array([sample.id.rpartition("/")[0] for sample in samples])
    sides = []
    for words in (answers, before):
        sides.append(answer_table(list(words), questions)["correct"].to_numpy(float)[not_steered])
    return difference(*sides, scenes[not_steered], paired=True, seed=study.seed)


def illustrations(study: Study, names: Sequence[str]) -> list[Sample]:
    """Choose two test questions a task to look at: one to be changed, one to be left alone.

    Parameters
    ----------
    study : Study
        The questions.
    names : sequence of str
        Tasks.

    Returns
    -------
    list of Sample
        For each task a question that the model answers with the source, and one of the same type
        that it answers otherwise; those that it answers correctly come first, where there are any.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, illustrations
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> [sample.questions[0].type for sample in illustrations(study, ["yes to no"])]
    ['presence', 'presence']
    """
    illustrating = []
    for name in names:
        source, target = study.tasks[name]
        same_type = study.of_type[study.kinds[source[0]]]
        otherwise = [word for word in same_type if word not in (*source, *target)] or target
        for words in (source, otherwise):
            fitting = []
            for sample, answer in zip(study.test.samples, study.test.answers, strict=True):
                if answer in words:
                    fitting.append((answer != sample.questions[0].answer, sample))
            fitting.sort(key=lambda pair: pair[0])
            illustrating += [sample for _, sample in fitting[:1]]
    return illustrating


def gain(study: Study, name: str, answers: Answers, baselines: Mapping[str, Answers]) -> Estimate:
    """Estimate how many more test answers a vector changes than the best of some baselines.

    The best is the one that does best on these very questions, which is in its favour.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task.
    answers : sequence of str
        The answers steered by the vector.
    baselines : mapping of str to sequence of str
        The answers by each baseline.

    Returns
    -------
    Estimate
        The difference of the shares that became the target, with an interval over questions.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, gain
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> answers = ["no"] * len(study.test.samples)
    >>> gain(study, "yes to no", answers, {"nothing": study.test.answers}).value
    1.0
    """
    best = max(baselines.values(), key=lambda changed: study.hits(name, changed).mean())
    sides = study.hits(name, answers), study.hits(name, best)
    return difference(*sides, paired=True, seed=study.seed)


def description(sample: Sample) -> str:
    """Return the first caption of a picture, or its last question where it has none.

    Parameters
    ----------
    sample : Sample
        A picture with captions or questions.

    Returns
    -------
    str
        The text.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import description
    >>> description(samples[0]) == samples[0].captions[0]
    True
    """
    return sample.captions[0] if sample.captions else sample.questions[-1].text
