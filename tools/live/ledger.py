"""Measure a claim of the ledger again with the page's engine: ``python -m tools.live.ledger``.

STEER-1, "sand to snow, against random vector", with the questions, the vector, the settings and the
controls of the chapter "Steering answers". PyTorch makes the vector and chooses layer and strength
on validation questions; the engine answers the test questions, with and without the vectors. The
exit status is 1 where an answer or the verdict differs from PyTorch's.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tools.live import node
from tools.live.pack import weights_folder
from tools.live.shards import MANIFEST
from xlvlms_tutorial import Sample, load
from xlvlms_tutorial.claims import read_register, verdict
from xlvlms_tutorial.io import read_json
from xlvlms_tutorial.methods.steering import random_control, shuffled_control
from xlvlms_tutorial.tutorials import steering_answers, steering_limits

CLAIM, NAME = "STEER-1", "sand to snow"
# the settings of the chapter
PAIRS = (("yes", "no"), ("red", "blue"), ("one", "three"), ("sand", "snow"))
TYPES = ("colour", "place")
CANDIDATES, STRENGTHS, LIMIT, N = (0.83, 1.0), (0.5, 0.75, 1.0, 1.5), 0.05, 16

Ask = Callable[[Sequence[Sample], Sequence["Change"]], list[list[str]]]


@dataclass(frozen=True)
class Change:
    """A vector of the width of the model, and where and how strongly it is added."""

    name: str
    vector: np.ndarray
    layer: int
    strength: float


def changes(study: steering_answers.Study, name: str) -> tuple[list[Change], dict[str, np.ndarray]]:
    """The task's vector and its controls at their settings, and PyTorch's answers to all of them.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        A task of the study.

    Returns
    -------
    list of Change, dict of array
        The vector, "random, same layer", "random" and "shuffled"; the answers to all test
        questions by the same names.
    """
    states = study.read(study.learning, "all")
    sides, vectors = steering_answers.mean_differences(study, states, N)
    one = {name: vectors[name]}
    tried = steering_answers.try_settings(study, one, study.layers(CANDIDATES), STRENGTHS)
    best = steering_answers.best_settings(tried, LIMIT)
    layer, strength = best[name]
    random = random_control(vectors[name], study.seed)
    last = study.vlm.n_layers
    result = [
        Change("vector", vectors[name][layer].numpy(), layer, strength),
        Change("random, same layer", random[layer].numpy(), layer, strength),
    ]
    answers = {
        "vector": steering_answers.steer_test(study, one, best)[name],
        "random, same layer": steering_answers.steer_test(study, {name: random}, best, True)[name],
    }
    ways = steering_limits.ways_at_last_layer(study, name, *sides[name])
    controls = {
        "random": random[last],
        "shuffled": shuffled_control(*sides[name], study.seed)[last],
    }
    ways = {control: ways[control] for control in controls}
    rows = steering_limits.tune(study, name, ways)
    answers |= steering_limits.at_best(study, ways, rows, LIMIT)
    for control, vector in controls.items():
        _, best_strength = steering_answers.best_within(rows[rows["way"] == control], LIMIT)
        result.append(Change(control, vector.numpy(), last, best_strength))
    return result, answers


def compare(
    study: steering_answers.Study,
    name: str,
    all_changes: Sequence[Change],
    expected: Mapping[str, np.ndarray],
    ask: Ask,
) -> tuple[list[str], list[str]]:
    """Let the engine answer, and compare answers, effect and verdict.

    Parameters
    ----------
    study : Study
        The questions.
    name : str
        The task.
    all_changes : sequence of Change
        From :func:`changes`.
    expected : mapping of str to array
        PyTorch's answers to all test questions.
    ask : callable
        Questions and changes -> for each change, the answers to these questions.

    Returns
    -------
    list of str, list of str
        Lines that tell the outcome, and lines that tell what differs.
    """
    rows = np.flatnonzero(np.isin(study.test.answers, study.tasks[name].source))
    questions = [study.test.samples[row] for row in rows]
    answers, lines, differing = {}, [], []
    for change, texts in zip(all_changes, ask(questions, all_changes), strict=True):
        answers[change.name] = study.test.answers.copy()
        answers[change.name][rows] = texts
        theirs = np.asarray(expected[change.name])[rows]
        equal = sum(text == word for text, word in zip(texts, theirs, strict=True))
        lines.append(f"{change.name:20}{equal:4} of {len(rows)} answers equal")
        for sample, text, word in zip(questions, texts, theirs, strict=True):
            if text != word:
                differing.append(f"{change.name}, {sample.id}: page {text!r}, PyTorch {word!r}")
    claim = read_register()[CLAIM]
    outcomes = {}
    for side, by_change in {"page": answers, "PyTorch": dict(expected)}.items():
        controls = {key: words for key, words in by_change.items() if key != "vector"}
        effect = steering_answers.gain(study, name, by_change["vector"], controls)
        outcomes[side] = verdict(claim, effect)
        lines.append(f"{CLAIM}, {name}, against random vector, {side}: {effect}, {outcomes[side]}")
    if outcomes["page"] != outcomes["PyTorch"]:
        differing.append(f"{CLAIM} is {outcomes['page']} by the page")
    return lines, differing


def engine(study: steering_answers.Study) -> Ask:
    """The page's engine as :func:`compare` takes it: first words, as the study reads them."""

    def ask(questions: Sequence[Sample], all_changes: Sequence[Change]) -> list[list[str]]:
        folder = weights_folder()
        asks = []
        for number, change in enumerate(all_changes):
            step = {"layer": change.layer, "strength": change.strength, "vector": number}
            for picture, sample in enumerate(questions):
                question = study.prompt(sample)
                asks.append({"picture": picture, "question": question, "steer": [step]})
        vectors = [change.vector for change in all_changes]
        pictures = [sample.image for sample in questions]
        output = node.ask(read_json(folder / MANIFEST), [folder], pictures, asks, vectors)
        words = []
        for answer in output["answers"]:
            token = answer["ids"][0]
            words.append(study.first_tokens.get(token, study.vlm.tokenizer.decode([token]).strip()))
        n = len(questions)
        return [words[start : start + n] for start in range(0, len(words), n)]

    return ask


def main() -> int:
    """Measure again and print."""
    if node.node() is None:
        print("node is missing: install it to run the page's engine outside of a browser")
        return 1
    vlm = load("pocket-llava")
    study = steering_answers.Study(vlm, "scenes", PAIRS, TYPES, N, steered_at=CANDIDATES)
    lines, differing = compare(study, NAME, *changes(study, NAME), engine(study))
    print("\n".join([*lines, *differing]))
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
