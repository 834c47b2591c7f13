"""The measures of a scorer, on scorers whose answers are known."""

import pytest
import torch
from PIL import Image

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.loading.scorers import Scorer
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.training.scorer_metrics import WORDS, preferences

VALUES = {
    "subject": ("woman", "robot", "bee"),
    "action": ("walking", "jumping", None),
    "item": ("key", "bush"),
    "colour": ("red", "blue", None),
    "place": ("snow", "sand"),
    "time": ("day", "night"),
}
ALL = [value for values in VALUES.values() for value in values if value]


def samples_of(n: int) -> list[Sample]:
    """Samples whose picture carries their number, and whose caption says it."""
    result = []
    for k in range(n):
        truth = {
            factor: values[(k // 2**j) % len(values)]
            for j, (factor, values) in enumerate(VALUES.items())
        }
        result.append(
            Sample(f"s{k}", Image.new("RGB", (2, 2), (k, 0, 0)), (f"number{k} .",), (), truth)
        )
    return result


class Knowing:
    """Knows each picture's truth and number; a text's embedding says which words it has.

    ``sign`` -1 prefers what is false.
    """

    def __init__(self, samples: list[Sample], sign: float = 1.0) -> None:
        self.truths, self.sign = [sample.truth for sample in samples], sign
        self.numbers = [f"number{k}" for k in range(len(samples))]

    def vector(self, words: set[str]) -> torch.Tensor:
        return torch.tensor([float(word in words) for word in ALL + self.numbers])

    def image_features(self, pictures):
        shades = [picture.getpixel((0, 0))[0] for picture in pictures]
        rows = [
            self.vector({value for value in self.truths[k].values() if value} | {f"number{k}"})
            for k in shades
        ]
        return self.sign * torch.stack(rows)

    def text_features(self, texts):
        rows = [
            self.vector(set(text.replace(",", " ").replace(".", " ").split())) for text in texts
        ]
        return torch.stack(rows)


def test_a_scorer_that_knows_is_always_right_and_its_opposite_always_wrong():
    samples = samples_of(120)
    correct_table, wrong = (
        preferences(Scorer(Knowing(samples, sign), "knowing"), samples).set_index("metric")
        for sign in (1.0, -1.0)
    )
    assert list(correct_table.index) == [
        "caption/top-1 of 100",
        *(f"{kind}/{f}" for kind in ("word", "list") for f in WORDS),
        "list/other",
    ]
    assert (correct_table.drop("list/other")["value"] == 1).all() and (wrong["value"] == 0).all()
    assert correct_table.loc["list/other", "value"] > 0.7  # another sample may have the same values
    assert (
        (correct_table["low"] <= correct_table["value"])
        & (correct_table["value"] <= correct_table["high"])
    ).all()
    with_colour = sum(sample.truth["colour"] is not None for sample in samples)
    assert (
        correct_table.loc["word/colour", "n"]
        == with_colour
        < correct_table.loc["word/place", "n"]
        == 120
    )
    assert correct_table.loc["caption/top-1 of 100", "n"] == 100


def test_the_comparisons_are_drawn_by_the_seed():
    samples = samples_of(100)
    torch.manual_seed(0)
    blind = Knowing(samples)
    noise = {k: torch.randn(len(ALL) + 100) for k in range(100)}
    blind.image_features = lambda pictures: torch.stack(
        [noise[picture.getpixel((0, 0))[0]] for picture in pictures]
    )
    first, again, third = (
        preferences(Scorer(blind, "blind"), samples, seed=seed) for seed in (0, 0, 1)
    )
    assert first.equals(again) and not first.equals(third)


def test_too_few_samples_are_refused():
    with pytest.raises(InputError, match="100 or more"):
        preferences(Scorer(Knowing(samples_of(99)), "knowing"), samples_of(99))
