"""Noise for pictures, and answers in which some words are named, for tests of attribution."""

import numpy as np
from PIL import Image

from xlvlms_tutorial.samples import Sample

PROMPT = "Describe the picture ."
ANSWERS = [
    "a woman in the grass",
    "red",
    "the grass is blue",
    "there is a woman",
    "a red key on the grass",
]
WORDS = ("woman", "red", "grass")
FIRST = [1, 0, 1, 3, 1]  # the first of these words in each answer


def pictures(n, size=(32, 32)):
    noise = np.random.default_rng(1).integers(0, 255, (n, *size, 3), dtype=np.uint8)
    return [Sample(f"s{k}", Image.fromarray(picture)) for k, picture in enumerate(noise)]
