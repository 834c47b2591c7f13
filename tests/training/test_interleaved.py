"""Episodes that only their demonstrations answer, and a few steps of training on them."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.data import Question, Sample
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.models import anatomy, loss_of
from xlvlms_tutorial.models.batching import with_eos
from xlvlms_tutorial.models.finetune import loss_of_batch
from xlvlms_tutorial.training.interleaved import (
    InterleavedRecipe,
    naming_accuracy,
    naming_episodes,
    train_interleaved,
)

NAMES = ("red", "blue", "yes", "no")
QUESTION = "What is the key ?"


def made(n: int = 12, values: int = 4) -> list[Sample]:
    samples = []
    for k in range(n):
        picture = Image.new("RGB", (32, 32), (60 * (k % values), 90, 200 - 10 * k))
        asked = (Question("colour", "What colour is the key ?", NAMES[k % 2]),)
        truth = {"subject": f"kind {k % values}"}
        samples.append(Sample(f"s{k}", picture, ("a red key",), asked, truth))
    return samples


@pytest.mark.parametrize("shots", [1, 2, 4])
def test_the_name_of_the_query_is_that_of_the_demonstration_with_its_subject(shots):
    samples = made()
    subject_of = {sample.id: sample.truth["subject"] for sample in samples}
    episodes = naming_episodes(samples, 200, shots, names=NAMES)
    positions = Counter()
    for episode in episodes:
        subjects = [subject_of[example.id] for example in episode.demonstrations]
        answers = [example.answer for example in episode.demonstrations]
        assert len(set(subjects)) == len(set(answers)) == shots
        position = subjects.index(subject_of[episode.query.id])
        assert answers[position] == episode.query.answer
        assert episode.query.id not in {example.id for example in episode.demonstrations}
        positions[position] += 1
    # at any position, under any name: no rule without the demonstrations answers
    assert len(positions) == shots and min(positions.values()) > 200 / shots / 2
    assert len({episode.query.answer for episode in episodes}) == 4
    assert episodes == naming_episodes(samples, 200, shots, names=NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 5}, "5 shots with 4 values of 'subject' and 4 names"),
        ({"shots": 1, "factor": "mood"}, "1 shots with 0 values of 'mood'"),
        ({"shots": 0}, "shots is 0"),
        ({"shots": 3, "names": NAMES[:2]}, "and 2 names"),
    ],
)
def test_too_few_values_or_names_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        naming_episodes(made(), 2, **{"names": NAMES} | options)


def test_the_loss_of_a_batch_is_that_of_its_samples():
    vlm, samples = tiny_llava(), made(4)
    answers = [NAMES[k] for k in range(4)]
    batch = vlm.batch_of(samples, [QUESTION] * 4, with_eos(vlm, answers))
    expected = loss_of(vlm, samples, QUESTION, answers)
    assert torch.equal(loss_of_batch(vlm, batch), expected)


def test_a_run_teaches_the_connector_alone_and_goes_on_where_it_was_killed(tmp_path):
    recipe = InterleavedRecipe(steps=30, episodes=3, singles=2, shots=(2,), learning_rate=3e-2)
    vlm = tiny_llava()
    before = {name: weight.clone() for name, weight in vlm.model.named_parameters()}
    options = {"names": NAMES, "question": QUESTION}
    history = train_interleaved(vlm, made(), recipe, folder=tmp_path, **options)
    assert history["step"].tolist() == list(range(30))
    still = train_interleaved(tiny_llava(), made(), replace(recipe, learning_rate=0.0), **options)
    assert still["loss"][0] == history["loss"][0]
    assert (history["loss"] < still["loss"])[-10:].mean() > 0.5  # of the same draws
    assert history["loss"][-10:].mean() < still["loss"][-10:].mean() - 0.01
    learnt = {id(weight) for weight in anatomy.connector(vlm.model).parameters()}
    for name, weight in vlm.model.named_parameters():
        assert torch.equal(weight, before[name]) == (id(weight) not in learnt), name
        assert not weight.requires_grad or id(weight) not in learnt
    state = load_file(tmp_path / "connector.safetensors")
    for name, weight in anatomy.connector(vlm.model).named_parameters():
        torch.testing.assert_close(state[name].float(), weight, rtol=1e-3, atol=1e-4)
    again = tiny_llava()
    resumed = train_interleaved(again, made(), recipe, folder=tmp_path, **options)
    assert resumed["loss"].tolist() == history["loss"].tolist()
    assert again.name == vlm.name == "tiny-llava + 30 steps on episodes, seed 0"


def test_accuracy_counts_the_names_that_are_said(monkeypatch):
    vlm = tiny_llava()
    episodes = naming_episodes(made(), 8, 2, names=NAMES)
    outputs = [episode.query.answer for episode in episodes[:6]] + ["key", ""]
    monkeypatch.setattr(vlm, "generate", lambda **options: outputs)
    assert naming_accuracy(vlm, episodes).value == 0.75
