"""Questions with known answers, and a study of steering that was put together by hand."""

import numpy as np
import torch
from PIL import Image

from xlvlms_tutorial.samples import Question, Sample
from xlvlms_tutorial.tutorials.steering_answers import Quiz, Study, Task

PICTURE = Image.new("RGB", (32, 32), (10, 90, 200))
YES_TO_NO = Task(("yes",), ("no",))
KINDS = {"yes": "presence", "no": "presence", "red": "colour", "blue": "colour"}


def ask(answers, scenes=None):
    """One sample for each right answer, in a scene of its own where none is named."""
    samples = []
    for number, answer in enumerate(answers):
        scene = scenes[number] if scenes else f"scene{number}"
        question = Question(KINDS[answer], "Is there a key ?", answer)
        samples.append(Sample(f"{scene}/{number}", PICTURE, (), (question,), {}))
    return samples


def quiz(answers, says=None, scenes=None):
    """Questions with these right answers, and what the model says to them."""
    says = np.array(says or answers, dtype=object)
    return Quiz(ask(answers, scenes), torch.zeros(len(answers), 4), says)


def bare_study():
    """A study that was put together by hand."""
    made = Study.__new__(Study)
    made.seed = 0
    made.kinds = dict(KINDS)
    made.of_type = {"presence": ["no", "yes"], "colour": ["blue", "red"]}
    made.pairs = {"yes to no": YES_TO_NO, "red to blue": Task(("red",), ("blue",))}
    made.types = {}
    made.tasks = made.pairs
    made.instruction = ""
    made._words = {}
    made._recorded = []
    made._held = []
    return made
