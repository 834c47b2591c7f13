"""Conversations with made-up names, their loss, and the shipped adapter's record."""

from dataclasses import asdict

import numpy as np
import torch
from PIL import Image

from xlvlms_tutorial.pocket.build import adapter_folder, training_record
from xlvlms_tutorial.pocket.encoders import WEIGHTS
from xlvlms_tutorial.samples import Question, Sample
from xlvlms_tutorial.training import names
from xlvlms_tutorial.training.interleaved import NAMES


def test_queries_show_other_pictures_of_what_a_demonstration_names():
    groups = [[0, 1], [2, 3, 4], [5, 6]]
    subject_of = {row: k for k, group in enumerate(groups) for row in group}
    generator = np.random.default_rng(0)
    words = set()
    for _ in range(200):
        turns = names.naming_turns(groups, 2, 2, generator)
        shown = {subject_of[turn.row]: turn for turn in turns[:2]}
        assert len(shown) == 2 and not any(turn.learned for turn in turns[:2])
        for turn in turns[2:]:
            demonstration = shown[subject_of[turn.row]]
            assert turn.learned and turn.answer == demonstration.answer
            assert turn.row != demonstration.row
        words |= {turn.answer for turn in turns}
    # no name of tests and pages is ever trained on, and there are many others
    assert not words & set(NAMES) and len(words) > 200


def test_other_conversations_are_of_captions_or_one_type_of_question():
    asked = (Question("place", "Where?", "sea"), Question("colour", "Which colour?", "red"))
    asked += (Question("presence", "Is there a key?", "yes"),)
    sample = Sample("s", Image.new("RGB", (32, 32)), ("a red key", "a key"), asked)
    generator = np.random.default_rng(0)
    lengths = set()
    for _ in range(60):
        turns = names.other_turns([sample, sample], generator)
        lengths.add(len(turns))
        assert all(turn.learned for turn in turns)
        assert len({turn.question for turn in turns}) == 1
    assert lengths == {1, 2, 3, 4}


def test_the_shipped_adapter_has_its_record():
    record = training_record(names.RUN)
    steps = record["recipe"]["stop"]
    assert adapter_folder(names.RUN).name == f"step-{steps:04d}"
    assert record["run"] == names.RUN and len(record["loss"]) == steps
    assert record["recipe"] == {**asdict(names.NamesRecipe(stop=steps)), "shots": [2, 3, 4]}
    assert np.mean(record["loss"][-20:]) < np.mean(record["loss"][:20])
    size = sum(file.stat().st_size for file in (WEIGHTS / names.RUN).rglob("*.safetensors"))
    assert size < 2_000_000
    assert torch.isfinite(torch.tensor(record["loss"])).all()
