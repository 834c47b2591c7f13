"""The page's engine says what PyTorch says, and notices what is damaged.

The whole comparison, over a hundred captions, is ``make live-check``.
"""

import numpy as np
import pytest
import torch

from tools.live import check, node, pack
from tools.live.shards import MANIFEST
from xlvlms_tutorial import add, capture, load, load_samples, skip
from xlvlms_tutorial.io import read_json

pytestmark = pytest.mark.skipif(node.node() is None, reason="runs where node is")
DESCRIBE = "Describe the picture."
LAYER, STRENGTH = 24, 4.0
TEXTS = (
    "What's this?  Two   spaces, 12345 numbers & signs #@!",
    "Où est l'élève? naïve café — “quoted”…",
    "日本語のテキスト と 絵文字 🙂🙂",
    "line\nbreaks\n\n and\ttabs ",
    "don't we'll they've I'm he'd",
    " leading and trailing  ",
    "ALLCAPS camelCase snake_case 3.14e-10",
    "",
)


@pytest.fixture(scope="module")
def vlm():
    return load("pocket-llava")


@pytest.fixture(scope="module")
def samples():
    return load_samples("scenes", 3, "test", seed=77)


@pytest.fixture(scope="module")
def states(vlm, samples):
    """States (31, 576) of the prompt's last position, of the first two pictures."""
    activations = capture(vlm, samples[:2], "all", positions=-1, prompt=DESCRIBE)
    return torch.stack([activations[layer] for layer in range(31)], dim=1).numpy()


@pytest.fixture(scope="module")
def weights():
    folder = pack.weights_folder()
    return read_json(folder / MANIFEST), [folder]


def engine(weights, samples, asks, vectors=(), **more):
    pictures = [sample.image for sample in samples]
    return node.ask(*weights, pictures, asks, vectors, **more)


@pytest.fixture(scope="module")
def output(weights, samples, states):
    subject = samples[1].truth["subject"]
    steer = [{"layer": LAYER, "strength": STRENGTH, "vector": 0}]
    asks = [
        {"picture": 0, "question": DESCRIBE, "states": True},
        {"picture": 1, "question": f"Is there a {subject} in the picture?"},
        {"picture": 0, "question": DESCRIBE, "steer": steer, "states": True},
        {"picture": 2, "question": DESCRIBE, "skip": [20]},
    ]
    vector = states[1, LAYER] - states[0, LAYER]
    texts = [*TEXTS, *samples[0].captions]
    return engine(weights, samples, asks, [vector], texts=texts, spoil="once")


def test_plain_steered_and_skipped_answers_are_pytorchs(vlm, samples, states, output):
    vector = torch.from_numpy(states[1, LAYER] - states[0, LAYER])
    question = f"Is there a {samples[1].truth['subject']} in the picture?"
    expected = vlm.generate([s.image for s in samples[:2]], [DESCRIBE, question])
    with add(vlm, vector, LAYER, STRENGTH):
        expected += vlm.generate([samples[0].image], [DESCRIBE])
    with skip(vlm, layers=[20]):
        expected += vlm.generate([samples[2].image], [DESCRIBE])
    answers = [answer["text"] for answer in output["answers"]]
    assert answers == [text.strip() for text in expected]
    assert answers[2] != answers[0]


def test_states_of_all_layers_are_pytorchs_within_the_tolerance(states, output):
    plain, steered = (node.floats(output["answers"][n]["states"]) for n in (0, 2))
    assert check.deviations(plain, states[0]).max() < check.TOLERANCE
    change = steered - plain
    assert not change[:LAYER].any()
    vector = STRENGTH * (states[1, LAYER] - states[0, LAYER])
    assert np.abs(change[LAYER] - vector).max() < 1e-4 * np.abs(states[0, LAYER]).max()


def test_tokens_are_the_tokenizers_and_come_back_as_text(vlm, samples, output):
    texts = [*TEXTS, *samples[0].captions]
    tokens = [vlm.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert output["tokens"] == tokens
    assert output["texts"] == texts
    image = samples[0].image
    assert output["answers"][0]["prompt"] == vlm.batch([image], [DESCRIBE])["input_ids"][0].tolist()


def test_a_changed_block_is_out_of_the_tolerance(weights, samples, states):
    ask = {"picture": 0, "question": DESCRIBE, "states": True, "answer": False}
    (answer,) = engine(weights, samples, [ask], damage="20.down")["answers"]
    assert check.deviations(node.floats(answer["states"]), states[0]).max() > check.TOLERANCE


def test_a_shard_that_arrives_changed_is_fetched_again(weights, output):
    assert output["fetched"][:3] == [0, 1, 1]
    assert len(output["fetched"]) == len(weights[0]["shards"]) + 1


def test_a_shard_that_stays_changed_is_named(weights, samples):
    file = weights[0]["shards"][1]["file"]
    with pytest.raises(node.EngineError, match=rf"{file} is damaged: sha256 \w+ instead of"):
        engine(weights, samples, [], spoil="always")


def test_a_question_that_is_too_long_is_refused(weights, samples):
    ask = {"picture": 0, "question": "why " * 300}
    with pytest.raises(node.EngineError, match="the question is too long"):
        engine(weights, samples, [ask])
