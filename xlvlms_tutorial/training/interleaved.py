"""Let a connector see several pictures in one prompt: names that only demonstrations reveal.

``python -m xlvlms_tutorial.training.interleaved STEPS FOLDER`` is a pilot, from the image
connector. Each episode gives made-up names to what its pictures show, so that the query can only be
answered from the demonstration that shows the same. Captions and questions about single pictures
are mixed in, so that they are not forgotten. No shipped weights were made by it.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.io import save_tensors
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.methods.in_context import Episode, Example, as_prompts, examples
from xlvlms_tutorial.metrics import Estimate, proportion
from xlvlms_tutorial.metrics.answers import exact_match
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.batching import with_eos
from xlvlms_tutorial.models.finetune import loss_of_batch
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.validation import require, require_counts

NAMES = ("dax", "wug", "blick", "toma", "fep", "zorb", "kiki", "lorp")
QUESTION = "What is this called?"
KINDS = ("caption", "presence", "colour", "place")  # of what is asked about single pictures
SAVE_EVERY = 50


@dataclass(frozen=True)
class InterleavedRecipe:
    """How a run is made; everything that its weights depend on besides the data.

    Parameters
    ----------
    steps : int
        Steps of the run.
    episodes : int
        Episodes of a step.
    singles : int
        Texts about single pictures of a step.
    shots : tuple of int
        Numbers of demonstrations; each step draws one.
    learning_rate : float
        The largest, after the warm-up.
    seed : int
        Of everything that is drawn.
    """

    steps: int = 400
    episodes: int = 6
    singles: int = 6
    shots: tuple[int, ...] = (2, 3, 4)
    learning_rate: float = 5e-4
    seed: int = 0


def naming_episodes(
    samples: Sequence[Sample],
    n: int,
    shots: int,
    *,
    factor: str = "subject",
    names: Sequence[str] = NAMES,
    question: str = QUESTION,
    seed: int = 0,
) -> list[Episode]:
    """Make episodes that give made-up names to what pictures show.

    The demonstrations show different values of a factor, each with a name drawn for this episode;
    the query shows another picture with the value of one of them, at a random position.

    Parameters
    ----------
    samples : sequence of Sample
        Pictures whose truth has the factor.
    n : int
        How many episodes.
    shots : int
        Demonstrations of each, at most as many as there are names, and values with two pictures.
    factor : str
        What is named; "subject" by default.
    names : sequence of str
        The made-up names.
    question : str
        What is asked about each picture.
    seed : int
        Of all draws.

    Returns
    -------
    list of Episode
        The episodes; the query's answer is its name.

    Raises
    ------
    InputError
        If a number is below 1, or there are too few names or values for so many shots.
    """
    require_counts(n=n, shots=shots)
    by_value: dict[object, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.truth.get(factor) is not None:
            by_value[sample.truth[factor]].append(sample)
    values = [value for value, members in by_value.items() if len(members) > 1]
    require(
        shots <= min(len(values), len(names)),
        f"{shots} shots with {len(values)} values of {factor!r} and {len(names)} names",
        "give more samples or names, or ask for fewer shots",
    )
    generator = np.random.default_rng(seed)
    episodes = []
    for _ in range(n):
        rows = generator.permutation(len(values))[:shots]
        words = generator.permutation(len(names))[:shots]
        target = int(generator.integers(shots))
        demonstrations = []
        for position, (value, word) in enumerate(zip(rows, words, strict=True)):
            members = by_value[values[value]]
            first, second = generator.permutation(len(members))[:2]
            example = members[first]
            demonstrations.append(Example(example.id, example.source, question, names[word]))
            if position == target:
                sibling = members[second]
                query = Example(sibling.id, sibling.source, question, names[word])
        episodes.append(Episode(query, tuple(demonstrations)))
    return episodes


def train_interleaved(
    vlm: VLM,
    samples: Sequence[Sample],
    recipe: InterleavedRecipe,
    *,
    names: Sequence[str] = NAMES,
    question: str = QUESTION,
    folder: Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Train the connector of a model on episodes and on single pictures, in place.

    Parameters
    ----------
    vlm : VLM
        The model, in float32; all of it but the connector stays frozen.
    samples : sequence of Sample
        Pictures with captions, questions and truth.
    recipe : InterleavedRecipe
        How the run is made.
    names, question : sequence of str, str
        As for :func:`naming_episodes`.
    folder : pathlib.Path, optional
        Where the run is kept, resumes from, and writes its connector, as
        ``connector.safetensors``; by default nothing is written.
    progress : bool
        Whether a progress bar is shown; not by default.

    Returns
    -------
    DataFrame
        A row for each step: step (from 0), loss (nats a token) and seconds.

    Raises
    ------
    InputError
        If the samples have no captions or questions, or too few values for the shots.
    """
    singles = examples(samples, KINDS)
    parameters = {}
    for name, weight in anatomy.connector(vlm.model).named_parameters():
        weight.requires_grad_(True)
        parameters[name] = weight

    def loss(step: int) -> Float[Tensor, ""]:
        generator = np.random.default_rng([recipe.seed, step])
        shots = int(generator.choice(recipe.shots))
        episodes = naming_episodes(
            samples,
            recipe.episodes,
            shots,
            names=names,
            question=question,
            seed=int(generator.integers(2**31)),
        )
        rows = generator.integers(len(singles), size=recipe.singles)
        episodes += [Episode(singles[row], ()) for row in rows]
        answers = with_eos(vlm, [episode.query.answer for episode in episodes])
        return loss_of_batch(vlm, vlm.batch(**as_prompts(episodes), answers=answers))

    rate = lambda step: recipe.learning_rate * warmup_cosine(step, recipe.steps, warmup=10)
    history = optimise(
        parameters,
        loss,
        recipe.steps,
        rate,
        folder=folder,
        keep_at={*range(SAVE_EVERY, recipe.steps, SAVE_EVERY), recipe.steps},
        desc="interleaved",
        disable=not progress,
    )
    for weight in parameters.values():
        weight.requires_grad_(False)
    if folder is not None:
        state = {name: weight.detach().half() for name, weight in parameters.items()}
        save_tensors(folder / "connector.safetensors", state, {"format": "pt"})
    vlm.name += f" + {recipe.steps} steps on episodes, seed {recipe.seed}"
    return pd.DataFrame(history)


@torch.no_grad()
def naming_accuracy(vlm: VLM, episodes: Sequence[Episode], max_new_tokens: int = 4) -> Estimate:
    """Measure how often a model answers queries with the name that a demonstration revealed.

    Parameters
    ----------
    vlm : VLM
        The model.
    episodes : sequence of Episode
        As :func:`naming_episodes` makes them. Copying any one demonstration gives 1 / shots.
    max_new_tokens : int
        Tokens of an answer.

    Returns
    -------
    Estimate
        The share of right names.
    """
    outputs = vlm.generate(**as_prompts(episodes), max_new_tokens=max_new_tokens)
    correct = []
    for output, episode in zip(outputs, episodes, strict=True):
        correct.append(exact_match(output, episode.query.answer))
    return proportion(correct)


def main(arguments: Sequence[str]) -> None:
    """Run the pilot: accuracy on unseen episodes before and after so many steps."""
    steps = int(arguments[0]) if arguments else InterleavedRecipe.steps
    folder = Path(arguments[1] if len(arguments) > 1 else "_build/interleaved")
    vlm = load("pocket-llava", dtype="float32")
    unseen = naming_episodes(load_samples("scenes", n=200), 100, 3)
    before = naming_accuracy(vlm, unseen)
    samples = load_samples("scenes", n=2000, split="train")
    history = train_interleaved(
        vlm, samples, InterleavedRecipe(steps=steps), folder=folder, progress=True
    )
    after = naming_accuracy(vlm, unseen)
    history.to_json(folder / "history.json", orient="records")
    sys.stdout.write(f"names of 3 shots (copying one: 0.33): {before}, then {after}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
