"""The tiny models are what the contract tests take them for."""

import pytest
import torch

from tests.zoo import MODELS, SUPPRESS, build, extended, padded, prefixed


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_left_padded_batch_gives_each_row_what_it_gives_alone(name):
    model, inputs = build(name)
    first, second = logits(model, padded(name, inputs))
    torch.testing.assert_close(
        first, logits(model, prefixed(name, inputs))[0], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(second[3:], logits(model, inputs)[0], atol=1e-4, rtol=1e-4)
    assert first.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_the_picture_reaches_the_last_position(name):
    model, inputs = build(name)
    negative = {
        key: -value if value.is_floating_point() else value for key, value in inputs.items()
    }
    difference = (logits(model, negative) - logits(model, inputs))[0, -1].abs().max()
    assert difference > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_generating_with_a_cache_equals_forwards_over_the_whole_sequence(name):
    model, inputs = build(name)
    batch = padded(name, inputs)
    length = batch["input_ids"].shape[1]
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": SUPPRESS,
        "disable_compile": True,
    }
    new = model.generate(**batch, **settings)[:, length:]
    by_hand = torch.zeros(2, 0, dtype=torch.long)
    for _ in range(4):
        scores = logits(model, extended(name, batch, by_hand))[:, -1]
        scores[:, SUPPRESS] = -torch.inf
        by_hand = torch.cat([by_hand, scores.argmax(-1, keepdim=True)], 1)
    assert new.tolist() == by_hand.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_gives_one_model(name):
    first, second = (build(name)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(parameter.requires_grad for parameter in build(name, seed=1)[0].parameters())
