"""Measure a scorer of pictures against texts on samples of known truth.

Which of two texts it prefers, which of many captions.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from xlvlms_tutorial.errors import no_estimate
from xlvlms_tutorial.loading import Scorer
from xlvlms_tutorial.metrics.intervals import proportion
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.text import sentence

# the factors whose values are words
WORDS = ("subject", "action", "item", "colour", "place", "time")
AMONG = 100  # captions to choose from


def preferences(scorer: Scorer, samples: Sequence[Sample], seed: int = 0) -> pd.DataFrame:
    """Measure which texts a scorer prefers for a picture, as accuracies with 95 % intervals.

    "caption/top-1 of 100": a sample's caption is nearer to its picture than those of 99 other
    samples. "word/FACTOR": the sentence with the true value of a factor is nearer than the one with
    another value, drawn from those that occur. "list/FACTOR": the same where the sentence holds all
    other true values too. "list/other": the list of all true values against that of another sample.

    Parameters
    ----------
    scorer : Scorer
        The scorer.
    samples : sequence of Sample
        100 or more, with captions and truth.
    seed : int, default 0
        Seed of the false values.

    Returns
    -------
    pandas.DataFrame
        Columns metric, value, low, high (Wilson's interval) and n.

    Raises
    ------
    InputError
        If there are fewer than 100 samples.
    """
    if len(samples) < AMONG:
        raise no_estimate("samples", len(samples), f"{AMONG} or more")
    rng = np.random.default_rng(seed)
    images = scorer.images([sample.image for sample in samples]).numpy()
    width = images.shape[1]
    full = len(samples) // AMONG * AMONG  # every caption has the same number of rivals
    texts = []
    for k, sample in enumerate(samples[:full]):
        texts.append(sample.captions[k % len(sample.captions)])
    captions = scorer.texts(texts).numpy().reshape(-1, AMONG, width)
    pictures = images[:full].reshape(-1, AMONG, width)
    cosines = np.einsum("gie,gje->gij", pictures, captions)
    is_first = cosines.argmax(axis=2) == np.arange(AMONG)
    correct = {f"caption/top-1 of {AMONG}": is_first.ravel()}
    truths = [sample.truth for sample in samples]
    for name, rows in _pairs(truths, rng).items():
        row, true, false = zip(*rows, strict=True)
        difference = scorer.texts(true).numpy() - scorer.texts(false).numpy()
        advantage = (images[list(row)] * difference).sum(axis=1)
        correct[name] = advantage > 0
    accuracies = []
    for name, hits in correct.items():
        accuracies.append({"metric": name, **proportion(hits).asdict()})
    return pd.DataFrame(accuracies)


def _pairs(truths: list, rng: np.random.Generator) -> dict[str, list[tuple[int, str, str]]]:
    """Row, true sentence and false sentence of each comparison."""
    values = {}
    for factor in WORDS:
        values[factor] = sorted({truth[factor] for truth in truths} - {None})
    kinds = [f"{kind}/{factor}" for kind in ("word", "list") for factor in WORDS]
    pairs: dict[str, list] = {name: [] for name in (*kinds, "list/other")}
    for row, truth in enumerate(truths):
        present = {factor: truth[factor] for factor in WORDS if truth[factor] is not None}
        everything = sentence(present.values())
        for factor, value in present.items():
            alternatives = [alternative for alternative in values[factor] if alternative != value]
            alternative = alternatives[rng.integers(len(alternatives))]
            pairs[f"word/{factor}"].append((row, sentence([value]), sentence([alternative])))
            changed = sentence((present | {factor: alternative}).values())
            pairs[f"list/{factor}"].append((row, everything, changed))
        n = len(truths)
        number = (row + 1 + rng.integers(n - 1)) % n  # of another sample
        another = truths[number]
        values_there = [another[factor] for factor in WORDS if another[factor]]
        pairs["list/other"].append((row, everything, sentence(values_there)))
    return pairs
