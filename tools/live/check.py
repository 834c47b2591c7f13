"""Compare the page's engine with PyTorch: ``python -m tools.live.check [--captions N]``.

Captions of unseen scenes, questions of all types, steered answers and answers without some blocks
must be equal to the letter; the states of all layers must lie within a tolerance. The exit status
is 1 where anything differs.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tools.live import node
from tools.live.pack import BLOCKS, means_folder, pack
from tools.live.shards import read_tensor
from xlvlms_tutorial import VLM, Sample, add, capture, load, load_samples, skip

DESCRIBE = "Describe the picture."
SEED = 77
TOLERANCE = 1e-3  # of a layer's largest value
STATES = 5  # pictures whose states are compared
STRENGTHS = (0.5, 1.0, 2.0)
PLACE_LAYER = 24
ANSWER_LAYERS = (18, 24, 27)
SKIPPED = ((20,), (20, 25), (5,))


@dataclass(frozen=True)
class Case:
    """A question about a picture, with what is done to the model meanwhile."""

    name: str
    picture: int
    question: str = DESCRIBE
    vector: int | None = None
    layer: int = 0
    strength: float = 1.0
    skipped: tuple[int, ...] = ()

    def ask(self) -> dict[str, object]:
        """The case as ``live/check.js`` takes it."""
        job = {"picture": self.picture, "question": self.question, "skip": self.skipped}
        if self.vector is not None:
            step = {"layer": self.layer, "strength": self.strength, "vector": self.vector}
            job["steer"] = [step]
        return job


def deviations(states: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest difference at each layer, as a share of the layer's largest value.

    Parameters
    ----------
    states, expected : array (layers, width)
        States of one position.
    """
    return np.abs(states - expected).max(1) / np.abs(expected).max(1)


def cases(samples: Sequence[Sample]) -> Iterator[Case]:
    """Every comparison: captions, a question of each type, interventions."""
    for number in range(len(samples)):
        yield Case("caption", number)
    for number, sample in enumerate(samples[:4]):
        for question in sample.questions:
            yield Case(f"question, {question.type}", number, question.text)
    sand = [n for n, sample in enumerate(samples) if sample.truth["place"] == "sand"][:4]
    for strength in STRENGTHS:
        for number in sand:
            name = f"sand to snow, {strength}"
            yield Case(name, number, vector=0, layer=PLACE_LAYER, strength=strength)
    for layer in ANSWER_LAYERS:
        for number, sample in enumerate(samples[:6]):
            question = f"Is there a {sample.truth['subject']} in the picture?"
            yield Case(f"yes to no, layer {layer}", number, question, vector=1, layer=layer)
    for skipped in SKIPPED:
        for number in sand[:2]:
            yield Case(f"without {' and '.join(map(str, skipped))}", number, skipped=skipped)


def expected_answers(
    vlm: VLM, samples: Sequence[Sample], all_cases: Sequence[Case], vectors: Sequence[np.ndarray]
) -> list[str]:
    """What PyTorch answers in each case, through the package's own interventions."""
    answers = {}
    groups = {}
    for case in all_cases:
        key = (case.vector, case.layer, case.strength, case.skipped)
        groups.setdefault(key, []).append(case)
    for (vector, layer, strength, skipped), group in groups.items():
        images = [samples[case.picture].image for case in group]
        questions = [case.question for case in group]
        with contextlib.ExitStack() as changes:
            if vector is not None:
                tensor = torch.from_numpy(vectors[vector][layer].copy())
                changes.enter_context(add(vlm, tensor, layer, strength))
            if skipped:
                changes.enter_context(skip(vlm, layers=list(skipped)))
            texts = vlm.generate(images, questions)
        answers |= dict(zip(map(id, group), texts, strict=True))
    return [answers[id(case)].strip() for case in all_cases]


def compare(n_captions: int) -> list[str]:
    """Run every case in both; lines that say how many agree, and what does not."""
    samples = load_samples("scenes", n_captions, "test", seed=SEED)
    manifest, files = pack()
    folders = sorted({file.parent for file in files})
    means = {}
    for name in ("place.sand", "place.snow", "answer.yes", "answer.no"):
        means[name] = read_tensor(means_folder(), f"mean.{name}")
    vectors = [means["place.snow"] - means["place.sand"], means["answer.no"] - means["answer.yes"]]
    all_cases = list(cases(samples))
    asks = [case.ask() for case in all_cases]
    flat = []
    for ask in asks:
        ask["states"] = ask["picture"] < STATES and ask["question"] == DESCRIBE
        for step in ask.get("steer", ()):
            flat.append(vectors[step["vector"]][step["layer"]])
            step["vector"] = len(flat) - 1
    pictures = [sample.image for sample in samples]
    answers = node.ask(manifest, folders, pictures, asks, flat)["answers"]
    vlm = load("pocket-llava")
    expected = expected_answers(vlm, samples, all_cases, vectors)
    lines, differing, counts = [], [], {}
    for case, answer, text in zip(all_cases, answers, expected, strict=True):
        kind = case.name.partition(",")[0]
        equal, total = counts.get(kind, (0, 0))
        counts[kind] = (equal + (answer["text"] == text), total + 1)
        if answer["text"] != text:
            differing.append(f"{case}: page {answer['text']!r}, PyTorch {text!r}")
    for kind, (equal, total) in counts.items():
        lines.append(f"{kind:24}{equal:5} of {total} equal")
    states = capture(vlm, samples[:STATES], "all", positions=-1, prompt=DESCRIBE)
    worst = np.zeros(BLOCKS + 1)
    for number in range(STATES):
        theirs = torch.stack([states[layer][number] for layer in range(BLOCKS + 1)])
        ours = node.floats(answers[number]["states"])
        worst = np.maximum(worst, deviations(ours, theirs.numpy()))
    lines.append(f"states: within {worst.max():.1e} of a layer's largest value at every layer")
    if worst.max() > TOLERANCE:
        differing.append(f"states differ by more than {TOLERANCE:g}: {worst.round(5).tolist()}")
    print("\n".join(lines))
    return differing


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=100, help="how many; 100 by default")
    n_captions = parser.parse_args(arguments).captions
    if node.node() is None:
        print("node is missing: install it to run the page's engine outside of a browser")
        return 1
    differing = compare(n_captions)
    print("\n".join(differing))
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
