"""Compare a steering vector with simpler means: constants on logits, prompts, fewer samples.

The chapter on what a steering vector is uses this, on the questions and tasks of
:mod:`~xlvlms_tutorial.tutorials.steering_answers`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from xlvlms_tutorial.activations import Activations
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.interventions import Resumable, add
from xlvlms_tutorial.methods.steering import (
    SteeringVectors,
    logit_bias,
    mean_difference,
    mean_logits_bias,
    random_control,
    shuffled_control,
)
from xlvlms_tutorial.methods.steering.sweep import Replay
from xlvlms_tutorial.metrics import Estimate, answer_kl, proportion
from xlvlms_tutorial.models.anatomy import logit_rules
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.tutorials.steering_answers import (
    Answers,
    Study,
    best_within,
    description,
    score,
    states_for,
)

_FINE = (0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5)
# The strengths that are tried for each way of changing an answer at the last layer.
_STRENGTHS = {
    "vector, last layer": _FINE,
    "random": (0.5, 1, 2, 4),
    "shuffled": (1, 4, 16),
    "constant, target": tuple(range(3, 19, 3)),
    "constant, both": (1, 2, 3, 4, 5, 6, 8, 10),
    "constant, every word": _FINE,
}


class Way(NamedTuple):
    """A way to change answers at the last layer.

    ``logits`` takes states (n, d) and a strength and returns logits (n, v); ``strengths`` are those
    that are tried.
    """

    logits: Callable[[Float[Tensor, "n d"], float], Float[Tensor, "n v"]]
    strengths: Sequence[float]


def pushed_words(
    study: Study, sides: Mapping[str, tuple[Activations, Activations]], n: int = 4
) -> pd.DataFrame:
    """Name the words whose logits differ most between the two sets of each pair.

    Parameters
    ----------
    study : Study
        The tasks.
    sides : mapping of str to (Activations, Activations)
        The states (source, target) of each task, the last layer among them.
    n : int, default 4
        How many words.

    Returns
    -------
    pandas.DataFrame
        A row a pair: the words that are raised most and lowered most, and whether the target is
        among those that are raised.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, mean_differences
    >>> from xlvlms_tutorial.tutorials.steering_limits import pushed_words
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_samples=2, n_scenes=12)
    >>> sides, _ = mean_differences(study, study.read(study.learning), 2)
    >>> list(pushed_words(study, sides))
    ['raises', 'lowers', 'target among them']
    """
    rows = {}
    for name, task in study.pairs.items():
        bias = mean_logits_bias(study.vlm, *sides[name])
        words = []
        for logits in (bias, -bias):
            ids = logits.topk(n).indices[:, None]
            words.append([text.strip() for text in study.vlm.tokenizer.batch_decode(ids)])
        raised = [word.lower() for word in words[0]]
        rows[name] = [", ".join(words[0]), ", ".join(words[1]), task.target[0] in raised]
    columns = ["raises", "lowers", "target among them"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def change_table(study: Study, changes: Mapping[str, Float[Tensor, "n v"]]) -> pd.DataFrame:
    """Tell how much of a change of logits is the same for all questions.

    Parameters
    ----------
    study : Study
        The tasks, of one word each.
    changes : mapping of str to tensor (n, v)
        The change of each word's logit for each question, by task.

    Returns
    -------
    pandas.DataFrame
        A row a task: "same for all", the squared length of the mean change over the mean squared
        length, between 0 and 1; mean and spread of the change of the source and target words.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import change_table
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> changes = {"yes to no": torch.ones(4, 49152)}
    >>> change_table(study, changes)["same for all"].tolist()
    [1.0]
    """
    rows = {}
    for name, change in changes.items():
        shared = change.mean(dim=0).square().sum() / change.square().sum(dim=1).mean()
        rows[name] = {"same for all": float(shared)}
        for role, (word,) in study.tasks[name]._asdict().items():
            of_word = change[:, study.likely_token(word)]
            rows[name][f"{role}, mean"] = float(of_word.mean())
            rows[name][f"{role}, spread"] = float(of_word.std())
    return pd.DataFrame(rows).T


def ways_at_last_layer(
    study: Study, name: str, source: Activations, target: Activations
) -> dict[str, Way]:
    """List what can change answers at the last layer: vectors, controls, constants on logits.

    Parameters
    ----------
    study : Study
        The model and the tasks.
    name : str
        A task.
    source, target : Activations
        The states that its vector is made of.

    Returns
    -------
    dict of str to Way
        The vector of the last layer; a random one as long; the vector of shuffled sets; a constant
        added to the logits of the target words; one that is taken from those of the source words
        too; and the mean difference of the logits, for every word.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, states_for
    >>> from xlvlms_tutorial.tutorials.steering_limits import ways_at_last_layer
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_samples=2, n_scenes=12)
    >>> states = study.read(study.learning, vlm.n_layers)
    >>> sides = [states_for(states, study.learning, [word], 2) for word in ("yes", "no")]
    >>> ways = ways_at_last_layer(study, "yes to no", *sides)
    >>> logits = ways["constant, target"].logits(study.validation.states, 1000.0)
    >>> set(study.say(logits))
    {'no'}
    """
    vlm, last, task = study.vlm, study.vlm.n_layers, study.tasks[name]
    vectors = mean_difference(source, target)
    up = dict.fromkeys(task.target, 1.0)
    up_and_down = up | dict.fromkeys(task.source, -1.0)
    shuffled = shuffled_control(source, target, study.seed)[last]
    plain = _Unembedded(vlm)
    every_word = mean_logits_bias(vlm, source, target)
    logits = {
        "vector, last layer": partial(_add_vector, vlm, vectors[last]),
        "random": partial(_add_vector, vlm, random_control(vectors, study.seed)[last]),
        "shuffled": partial(_add_vector, vlm, shuffled),
        "constant, target": partial(_add_constant, plain, up),
        "constant, both": partial(_add_constant, plain, up_and_down),
        "constant, every word": partial(_add_constant, plain, every_word),
    }
    return {way: Way(function, _STRENGTHS[way]) for way, function in logits.items()}


def _add_vector(vlm: VLM, vector: Tensor, states: Tensor, strength: float) -> Tensor:
    return vlm.unembed(states + strength * vector)


class _Unembedded:
    """The logits of states, computed once for the constants that are tried on them."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self._known: list[tuple[Tensor, Tensor]] = []

    def __call__(self, states: Tensor) -> Tensor:
        for earlier, logits in self._known:
            if earlier is states:
                return logits
        logits = self.vlm.unembed(states)
        self._known.append((states, logits))
        return logits


def _add_constant(
    plain: _Unembedded, bias: Mapping[str, float] | Tensor, states: Tensor, strength: float
) -> Tensor:
    vlm = plain.vlm
    if isinstance(bias, Tensor):
        scaled = strength * bias
    else:
        scaled = {word: strength * value for word, value in bias.items()}
    nothing = torch.zeros(1, vlm.width)
    with logit_bias(vlm, scaled):
        if logit_rules(vlm.model):  # they act on the sum
            return vlm.unembed(states)
        constant = vlm.unembed(nothing, norm=False)
    return plain(states) + constant - vlm.unembed(nothing, norm=False)


def tune(study: Study, name: str, ways: Mapping[str, Way]) -> pd.DataFrame:
    """Try all strengths of some ways at the last layer on the validation questions.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task.
    ways : mapping of str to Way
        From :func:`ways_at_last_layer`.

    Returns
    -------
    pandas.DataFrame
        Columns way, layer, strength, "to target" and "lost", as :func:`score` has them.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import Way, tune
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> nothing = Way(lambda states, strength: vlm.unembed(states), (1, 2))
    >>> tune(study, "yes to no", {"nothing": nothing})["to target"].tolist()
    [0.0, 0.0]
    """
    samples, states, before = study.validation
    rows = []
    for way_name, way in ways.items():
        for strength in way.strengths:
            answers = study.say(way.logits(states, strength))
            row = {"way": way_name, "layer": study.vlm.n_layers, "strength": strength}
            rows.append(row | score(samples, before, answers, study.tasks[name]))
    return pd.DataFrame(rows)


def at_best(
    study: Study, ways: Mapping[str, Way], tried: pd.DataFrame, limit: float
) -> dict[str, np.ndarray]:
    """Answer the test questions by each way at the strength that is best on validation.

    Parameters
    ----------
    study : Study
        The questions.
    ways : mapping of str to Way
        From :func:`ways_at_last_layer`.
    tried : pandas.DataFrame
        From :func:`tune`.
    limit : float
        As for :func:`best_within`.

    Returns
    -------
    dict of str to array (n,)
        The answers to all test questions, by way.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import Way, at_best, tune
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> ways = {"nothing": Way(lambda states, strength: vlm.unembed(states), (1,))}
    >>> answers = at_best(study, ways, tune(study, "yes to no", ways), 0.05)
    >>> (answers["nothing"] == study.test.answers).all().item()
    True
    """
    answers = {}
    for name, rows in tried.groupby("way", sort=False):
        _, strength = best_within(rows, limit)
        answers[name] = study.say(ways[name].logits(study.test.states, strength))
    return answers


def random_at_best(
    study: Study, name: str, source: Activations, target: Activations, limit: float
) -> dict[str, np.ndarray]:
    """Answer the test questions by vectors that know nothing of the task, each at its best.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task.
    source, target : Activations
        The states that its vector is made of.
    limit : float
        As for :func:`~xlvlms_tutorial.tutorials.steering_answers.best_within`.

    Returns
    -------
    dict of str to array (n,)
        The answers by a random vector and by one of shuffled sets, added at the last layer.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, states_for
    >>> from xlvlms_tutorial.tutorials.steering_limits import random_at_best
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_samples=2, n_scenes=12)
    >>> states = study.read(study.learning, vlm.n_layers)
    >>> sides = [states_for(states, study.learning, [word], 2) for word in ("yes", "no")]
    >>> list(random_at_best(study, "yes to no", *sides, limit=0.05))
    ['random', 'shuffled']
    """
    ways = ways_at_last_layer(study, name, source, target)
    controls = {way: ways[way] for way in ("random", "shuffled")}
    return at_best(study, controls, tune(study, name, controls), limit)


def prompted(study: Study, name: str) -> np.ndarray:
    """Ask for the target in the prompt, by the better of two wordings, on the test questions.

    The wording is chosen on some validation questions, with no regard for what it does to others.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task.

    Returns
    -------
    array (n,)
        The answers to all test questions; where the model gives no source answer without it, the
        prompt is left as it is.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import prompted
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> len(prompted(study, "yes to no")) == len(study.test.samples)
    True
    """
    source, target = study.tasks[name]
    few = [word for task in study.pairs.values() for part in task for word in part]
    few = list(dict.fromkeys(word for word in few if word in target)) or list(target)
    texts = [f"Answer {target[0]}.", f"The answer is {target[0]}."]
    if name in study.types:
        kind = study.kinds[target[0]]
        texts = [f"Answer with a {kind}.", f"The answer is {' or '.join(few[:2])}."]
    trial = study.asking(name)[:4]
    shares = {}
    for text in texts:
        shares[text] = np.isin(study.quiz(trial, text).answers, target).mean()
    best = max(shares, key=lambda text: shares[text])
    rows = np.flatnonzero(np.isin(study.test.answers, source))
    answers = study.test.answers.copy()
    answers[rows] = study.quiz([study.test.samples[row] for row in rows], best).answers
    return answers


def read_captions(study: Study, layers: Sequence[int] = (), n: int = 8) -> Replay:
    """Let the model read captions of test pictures, once.

    Use it to see what changes do to text that they should leave alone: :func:`caption_states` reads
    the last layer with and without a change. Pictures without captions have a question in their
    place.

    Parameters
    ----------
    study : Study
        The pictures.
    layers : sequence of int
        Where changes will be made: the states there are held. Others are read when needed.
    n : int, default 8
        How many pictures.

    Returns
    -------
    Replay
        The captions as one batch.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import read_captions
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> bool(read_captions(study, n=1).batch.mask("answer").any())
    True
    """
    scenes = study.scenes[:n]
    prompts = [PROMPTS["image"]] * len(scenes)
    batch = study.vlm.batch_of(scenes, prompts, list(map(description, scenes)))
    return Replay(study.vlm, batch, {*layers, study.vlm.n_layers})


def caption_states(
    captions: Replay, layer: int = 0, change: AbstractContextManager | None = None
) -> Float[Tensor, "m d"]:
    """Read the last layer at the tokens of captions.

    Parameters
    ----------
    captions : Replay
        From :func:`read_captions`.
    layer : int, default 0
        The layer at which something is changed: what is below is not computed again.
    change : context manager, optional
        The change; by default there is none, and nothing is computed.

    Returns
    -------
    tensor (m, d)
        A state for each token of the captions.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import caption_states, read_captions
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> caption_states(read_captions(study, n=1)).shape[1] == vlm.width
    True
    """
    last, answers = captions.vlm.n_layers, captions.batch.mask("answer").cpu()
    if change is None:
        return captions.states[last][answers].float()
    captions.hold([layer])
    return captions.read(
        last, answers, start=layer, states=captions.states[layer], change=change
    ).float()


def weakest_as_good(
    study: Study, name: str, ways: Mapping[str, Way], answers: Answers
) -> dict[str, float]:
    """Find the smallest strength of each way that changes as many test answers as a vector does.

    Use it to compare side effects at equal change. It looks at the test questions.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task.
    ways : mapping of str to Way
        The ways that are matched; those that never change as many are left out.
    answers : sequence of str
        The answers steered by the vector.

    Returns
    -------
    dict of str to float
        The strengths by way.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import Way, weakest_as_good
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> ways = {"nothing": Way(lambda states, strength: vlm.unembed(states), (1, 2))}
    >>> weakest_as_good(study, "yes to no", ways, study.test.answers)
    {'nothing': 1}
    """
    needed = study.hits(name, answers).mean()
    strengths = {}
    for way_name, way in ways.items():
        for strength in way.strengths:
            changed = study.say(way.logits(study.test.states, strength))
            if study.hits(name, changed).mean() >= needed:
                strengths[way_name] = strength
                break
    return strengths


def caption_shift(
    study: Study,
    captions: Replay,
    name: str,
    vectors: SteeringVectors,
    setting: tuple[int, float],
    answers: Answers,
    ways: Mapping[str, Way],
) -> dict[str, float]:
    """Measure what a vector and constants do to captions, at equal change of the answers.

    Each way has the smallest strength that changes at least as many test answers as the vector
    does; ways that never change as many are left out.

    Parameters
    ----------
    study : Study
        The questions.
    captions : Replay
        From :func:`read_captions`.
    name : str
        A task.
    vectors : SteeringVectors
        Its vectors.
    setting : tuple of int and float
        The layer and strength of the vector.
    answers : sequence of str
        The answers to all test questions, steered by it.
    ways : mapping of str to Way
        What it is compared with, from :func:`ways_at_last_layer`.

    Returns
    -------
    dict of str to float
        How far the distribution over the next word moves while captions are read, in nats, the
        mean over their tokens: of the "vector" and of each way.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, mean_differences
    >>> from xlvlms_tutorial.tutorials.steering_limits import caption_shift, read_captions
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_samples=2, n_scenes=12)
    >>> _, vectors = mean_differences(study, study.read(study.learning), 2)
    >>> setting, answers = (30, 1.0), study.test.answers
    >>> captions, vector = read_captions(study, n=1), vectors["yes to no"]
    >>> list(caption_shift(study, captions, "yes to no", vector, setting, answers, {}))
    ['vector']
    """
    vlm = study.vlm
    layer, _ = setting
    neutral = caption_states(captions)
    plain = vlm.unembed(neutral)
    moved = caption_states(captions, layer, vectors.apply(vlm, *setting))
    shifts = {"vector": float(answer_kl(plain, vlm.unembed(moved)).mean())}
    for way, strength in weakest_as_good(study, name, ways, answers).items():
        logits = ways[way].logits(neutral, strength)
        shifts[way] = float(answer_kl(plain, logits).mean())
    return shifts


def true_answers(study: Study, kind: str) -> np.ndarray:
    """Return the right answer to a type of question about the picture of each test question.

    Parameters
    ----------
    study : Study
        The questions.
    kind : str
        A type of question.

    Returns
    -------
    array (n,)
        The answers, "" where the picture comes without such a question.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import true_answers
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> set(true_answers(study, "age"))
    {''}
    """
    answer_of_scene = {}
    for scene in study.scenes:
        for question in scene.questions:
            if question.type == kind:
                answer_of_scene[scene.id] = question.answer
    scenes = [sample.id.rpartition("/")[0] for sample in study.test.samples]
    return np.array([answer_of_scene.get(scene, "") for scene in scenes], dtype=object)


def effect_from(
    study: Study, name: str, layer: int, n: int | None = None
) -> Callable[[Float[Tensor, "d"]], float]:
    """Prepare to measure what a vector at one layer does to the logits of source and target.

    Parameters
    ----------
    study : Study
        The test questions that the model answers with the source.
    name : str
        A task of one word each.
    layer : int
        Where vectors are added: at all positions, or at the last layer to the last position, which
        is the same there.
    n : int, optional
        How many questions; by default all.

    Returns
    -------
    function
        Takes a vector (d,) and returns by how much the logit of the target lies above that of the
        source, the mean over the questions.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import effect_from
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> gap = effect_from(study, "yes to no", vlm.n_layers)
    >>> gap(torch.zeros(vlm.width)) < 0
    True
    """
    vlm = study.vlm
    (source,), (target,) = study.tasks[name]
    pair = [study.likely_token(source), study.likely_token(target)]
    rows = np.flatnonzero(study.test.answers == source)[:n]
    states = study.test.states[rows]
    if layer < vlm.n_layers:
        samples = [study.test.samples[row] for row in rows]
        run = Resumable(vlm, vlm.batch_of(samples, [study.prompt(sample) for sample in samples]))
        below = run.read(layer)

    def gap(vector: Float[Tensor, "d"]) -> float:
        last = states + vector
        if layer < vlm.n_layers:
            change = add(vlm, vector, layer)
            last = run.read(vlm.n_layers, "last", start=layer, states=below, change=change)[:, 0]
        logits = vlm.unembed(last)[:, pair]
        return float((logits[:, 1] - logits[:, 0]).mean())

    return gap


def shares_of_draws(
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "m d"],
    effect: Callable[[Float[Tensor, "d"]], float],
    sizes: Sequence[int],
    generator: np.random.Generator,
    n_draws: int = 20,
) -> dict[int, Estimate]:
    """Compare vectors made of few samples with the one made of all.

    Parameters
    ----------
    source, target : tensor (n, d)
        The states that vectors are made of.
    effect : function
        Takes a vector (d,) and returns what it does, such as from :func:`effect_from`.
    sizes : sequence of int
        How many samples vectors are made of, half of them from each set.
    generator : numpy.random.Generator
        Draws the samples.
    n_draws : int, default 20
        How many vectors of each size.

    Returns
    -------
    dict of int to Estimate
        The effect over that of the vector from all samples, by size: the mean, with the range of 95
        % of the draws. Sizes that are not smaller than all are left out; nothing where the vector
        from all has no effect.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.steering_limits import shares_of_draws
    >>> source, target = torch.zeros(8, 2), torch.ones(8, 2)
    >>> effect = lambda vector: float(vector.sum())
    >>> shares = shares_of_draws(source, target, effect, [4, 16], np.random.default_rng(0))
    >>> {size: share.value for size, share in shares.items()}
    {4: 1.0}
    """
    half = min(len(source), len(target))

    def drawn(n: int) -> Tensor:
        means = []
        for pool in (source, target):
            order = generator.permutation(len(pool))[:n]
            means.append(pool[order].mean(0))
        return means[1] - means[0]

    whole = drawn(half)
    plain = effect(torch.zeros_like(whole))
    full = effect(whole) - plain
    shares = {}
    for size in sizes:
        if size < 2 * half and full:
            values = [(effect(drawn(size // 2)) - plain) / full for _ in range(n_draws)]
            low, high = np.quantile(values, [0.025, 0.975])
            shares[size] = Estimate(float(np.mean(values)), float(low), float(high), n_draws)
    return shares


def true_answer_rates(study: Study, name: str, answers: Mapping[str, Answers]) -> pd.DataFrame:
    """Tell how often an answer of another type, brought out by steering, is true of the picture.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task of a type of answers, such as "colour to place".
    answers : mapping of str to sequence of str
        The answers to all test questions, by what brought them out.

    Returns
    -------
    pandas.DataFrame
        A row for each: "says one", the share that is an answer of the target's type; "says the true
        one" with its interval; "chance", that of two pictures drawn at random; NaN where there is
        no such question.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study, Task
    >>> from xlvlms_tutorial.tutorials.steering_limits import true_answer_rates
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> study.tasks["any"] = Task(("yes", "no"), ("yes", "no"))
    >>> float(true_answer_rates(study, "any", {"none": study.test.answers})["says one"].iloc[0])
    1.0
    """
    source, target = study.tasks[name]
    true = true_answers(study, study.kinds[target[0]])
    asks = np.isin(study.test.answers, source) & (true != "")
    chance = pd.Series(true[asks]).value_counts(normalize=True).pow(2).sum()
    columns = ["says one", "says the true one", "low", "high", "chance", "questions"]
    if not asks.any():
        return pd.DataFrame(np.nan, list(answers), columns)
    rows = {}
    for way, words in answers.items():
        steered = np.asarray(words)[asks]
        says_true = proportion(steered == true[asks])
        share = float(np.isin(steered, target).mean())
        rows[way] = [share, says_true.value, says_true.low, says_true.high, chance, says_true.n]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def changes_by_right_answer(study: Study, name: str, answers: Answers) -> pd.DataFrame:
    """Tell which test questions a vector changes, by their right answer.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task of one word each.
    answers : sequence of str
        The steered answers to all test questions.

    Returns
    -------
    pandas.DataFrame
        Rows: questions whose right answer is the source, the target, another of the same type, or
        of another type. Columns: how many there are, the shares that say the target, and that
        changed to something else.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import changes_by_right_answer
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> rows = changes_by_right_answer(study, "yes to no", study.test.answers)
    >>> float(rows["other change"].max())
    0.0
    """
    (source,), (target,) = study.tasks[name]
    now, before = np.asarray(answers), study.test.answers
    expected = np.array([sample.questions[0].answer for sample in study.test.samples])
    types = np.array([sample.questions[0].type for sample in study.test.samples])
    same_type = types == study.kinds[source]
    parts = {
        f"{source} is right": expected == source,
        f"{target} is right": expected == target,
        "another answer of the type": same_type & ~np.isin(expected, [source, target]),
        "another type": ~same_type,
    }
    rows = {}
    for part, mask in parts.items():
        if mask.any():
            rows[part] = {
                "questions": float(mask.sum()),
                f"says {target}": (now == target)[mask].mean(),
                "other change": ((now != before) & (now != target))[mask].mean(),
            }
    return pd.DataFrame(rows).T


def scenes_with(study: Study, words: Sequence[str], n: int = 6) -> list[Sample]:
    """Return the first test pictures that one of some answers is right for.

    Parameters
    ----------
    study : Study
        The pictures.
    words : sequence of str
        Answers, such as colours.
    n : int, default 6
        How many pictures at most.

    Returns
    -------
    list of Sample
        The pictures with all their questions.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import scenes_with
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_scenes=12)
    >>> len(scenes_with(study, ["yes"], 2))
    2
    """
    scenes = []
    for scene in study.scenes:
        if {question.answer for question in scene.questions} & set(words):
            scenes.append(scene)
    return scenes[:n]


def named_colours(
    captions: Mapping[float, Sequence[str]], n: int, source: str, target: str, rest: Sequence[str]
) -> pd.DataFrame:
    """Count what colours captions name, by the strength of steering.

    Parameters
    ----------
    captions : mapping of float to sequence of str
        The captions by strength.
    n : int
        The first ``n`` are of pictures that show the source.
    source, target : str
        The colour steered from, and the one steered to.
    rest : sequence of str
        The colours that the other pictures show.

    Returns
    -------
    pandas.DataFrame
        By strength: the shares of the first captions that name the source, and the target; the
        share of the other captions that name one of their colours.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.steering_limits import named_colours
    >>> captions = {0.0: ["a red key", "a green gem"], 1.0: ["a blue key", "a green gem"]}
    >>> named_colours(captions, 1, "red", "blue", ["green"]).loc[1.0].tolist()
    [0.0, 1.0, 1.0]
    """
    rows = {}
    for strength, texts in captions.items():
        rows[strength] = {
            f"{source}, of {source}": _mentions(texts[:n], [source]),
            f"{target}, of {source}": _mentions(texts[:n], [target]),
            "own, of others": _mentions(texts[n:], rest),
        }
    return pd.DataFrame(rows).T.rename_axis("strength")


def _mentions(texts: Sequence[str], words: Sequence[str]) -> float:
    hits = [bool(set(words) & set(text.split())) for text in texts]
    return float(np.mean(hits)) if hits else float("nan")


def first_layer(changed: pd.DataFrame, at_least: float = 0.5) -> int:
    """Return the first layer at which a vector changes enough of the answers.

    Parameters
    ----------
    changed : pandas.DataFrame
        From :func:`~xlvlms_tutorial.tutorials.steering_answers.changed_by_layer`.
    at_least : float, default 0.5
        The share of the answers.

    Returns
    -------
    int
        The layer; the first that was tried where none changes enough.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.steering_limits import first_layer
    >>> first_layer(pd.DataFrame({15: [0, 0], 18: [1, 0], 20: [1, 1]}))
    18
    """
    shares = changed.mean()
    return int(min(shares.index[shares >= at_least], default=shares.index[0]))


def few_samples(
    study: Study,
    name: str,
    states: Activations,
    n_all: int,
    layer: int,
    sizes: Sequence[int],
    generator: np.random.Generator,
) -> dict[int, Estimate]:
    """Compare vectors of few questions with that of all, at one layer, on the test questions.

    Below the last layer only eight questions are asked, since each vector costs a forward.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task of one word each.
    states : Activations
        The states of ``study.learning``.
    n_all : int
        How many questions there are of each answer.
    layer : int
        The layer of the vectors.
    sizes : sequence of int
        How many questions vectors are made of.
    generator : numpy.random.Generator
        Draws the questions.

    Returns
    -------
    dict of int to Estimate
        As :func:`shares_of_draws` gives them.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.steering_answers import Study
    >>> from xlvlms_tutorial.tutorials.steering_limits import few_samples
    >>> study = Study(vlm, "scenes", [["yes", "no"]], ["colour", "place"], n_samples=4, n_scenes=12)
    >>> states = study.read(study.learning, vlm.n_layers)
    >>> generator = np.random.default_rng(0)
    >>> list(few_samples(study, "yes to no", states, 4, vlm.n_layers, [2], generator))
    [2]
    """
    pools = [states_for(states, study.learning, words, n_all) for words in study.tasks[name]]
    effect = effect_from(study, name, layer, None if layer == study.vlm.n_layers else 8)
    return shares_of_draws(pools[0][layer], pools[1][layer], effect, sizes, generator)
