"""Packing, the loss, resuming: against single rows, and against an uninterrupted run."""

import itertools

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.training.connector import (
    Mix,
    Packed,
    Recipe,
    _cosine,
    encode_pictures,
    loss_of,
    pack,
    scale_projector,
    train,
)

TEXTS = [
    ("What colour is the key ?", "red"),
    ("Is there a woman ?", "yes"),
    ("Describe the picture .", "a woman on the grass ."),
]
SMALL = Recipe(steps=6, restart=4, batch_size=2, warmup=2, save_at=(0, 3), mixes=(Mix(6, 1, 0, 0),))


@pytest.fixture
def vlm():
    return tiny_llava()


def packed_of(vlm, dialogues) -> Packed:
    return pack(dialogues, vlm.tokenizer, vlm.image_token_id, n_image=4)


def test_a_branch_sees_the_picture_and_itself_only(vlm):
    packed = packed_of(vlm, [TEXTS[:2]])
    head = (packed.input_ids[0] == vlm.image_token_id).nonzero().max().item() + 1
    starts = (packed.position_ids[0] == head).nonzero().flatten().tolist()
    assert len(starts) == 2
    second = packed.mask[0, 0, starts[1]]
    assert second[:head].all() and not second[head : starts[1]].any() and second[starts[1]]


def test_packed_loss_is_that_of_single_rows(vlm):
    tokens = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    together = packed_of(vlm, [TEXTS])
    single = [loss_of(vlm.model, tokens, packed_of(vlm, [[text]])).item() for text in TEXTS]
    assert loss_of(vlm.model, tokens, together).item() == pytest.approx(np.mean(single), abs=1e-5)


def test_attention_in_python_gives_the_same_loss(vlm):
    tokens, packed = (
        torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1)),
        packed_of(vlm, [TEXTS, TEXTS[:1]]),
    )
    fused = loss_of(vlm.model, tokens, packed).item()
    vlm.model.set_attn_implementation("eager")
    assert loss_of(vlm.model, tokens, packed).item() == pytest.approx(fused, abs=1e-5)


def test_loss_is_that_of_the_model_itself(vlm):
    """Oracle: transformers' own forward with the same picture
    through its own tower and projector.
    """
    inputs = vlm.batch([np_image()], [TEXTS[0][0]], ["red<|im_end|>"])
    tokens = vlm.model.get_image_features(inputs["pixel_values"], return_dict=True).hidden_states
    features = tokens[-2][:, 1:]  # LLaVA's default layer and its strategy without the class token
    logits = vlm.model(**inputs).logits[0, -3:-1].log_softmax(-1)
    expected = -logits.gather(1, inputs["input_ids"][0, -2:, None]).mean()
    packed = packed_of(vlm, [[TEXTS[0]]])
    if packed.input_ids.shape[1] != inputs["input_ids"].shape[1]:
        pytest.fail("packing and the processor tokenise differently")
    assert loss_of(vlm.model, features, packed).item() == pytest.approx(expected.item(), abs=1e-4)


def np_image():
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def run(folder, steps_before_kill=None):
    vlm = tiny_llava()
    projector = vlm.model.model.multi_modal_projector.requires_grad_(True)
    tokens, exported = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(2)), []

    def batch(rng, mix):
        if steps_before_kill is not None and len(calls) >= steps_before_kill:
            raise KeyboardInterrupt
        calls.append(1)
        rows = rng.choice(8, 2, replace=False)
        return tokens[rows], packed_of(vlm, [[TEXTS[k % 3]] for k in rows])

    calls = []
    result = train(
        vlm.model, dict(projector.named_parameters()), batch, SMALL, folder, exported.append
    )
    return [p.detach().clone() for p in projector.parameters()], result, exported


def test_training_lowers_the_loss_and_touches_only_the_connector(tmp_path):
    weights, result, exported = run(tmp_path)
    losses = [entry["loss"] for entry in result["history"]]
    assert losses[-1] < losses[0] and exported == ["step-0000", "step-0003", "step-0006"]
    assert all(torch.isfinite(w).all() for w in weights)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    import xlvlms_tutorial.training.connector as training

    whole, _, _ = run(tmp_path / "whole")
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", steps_before_kill=5)
    resumed, result, _ = run(tmp_path / "killed")
    assert len(result["history"]) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_scaled_projector_has_the_norm_asked_for(vlm):
    tokens = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(3))
    projector = vlm.model.model.multi_modal_projector
    scale_projector(projector, tokens, norm=3.2)
    assert projector(tokens).norm(dim=-1).mean().item() == pytest.approx(3.2, rel=1e-4)


def test_tokens_are_encoded_once(tmp_path):
    calls = []

    class Tower(torch.nn.Module):
        def forward(self, pixels):
            calls.append(len(pixels))
            return type("Out", (), {"last_hidden_state": pixels.flatten(2).transpose(1, 2)})

    batches = [torch.full((2, 3, 2, 2), float(k)) for k in range(3)]
    first = encode_pictures(Tower(), iter(batches), 6, tmp_path / "tokens.npy")
    again = encode_pictures(Tower(), iter([]), 6, tmp_path / "tokens.npy")
    assert calls == [2, 2, 2] and first.shape == (6, 4, 3) and np.array_equal(first, again)
    assert first[4].min() == 2.0


def test_the_rate_rises_again_at_each_restart_to_two_fifths_and_falls_to_nothing_before():
    recipe = Recipe(steps=30, restart=10, again=(20,), warmup=2)
    rate = [_cosine(step, recipe) for step in range(30)]
    assert rate[10] == rate[20] == pytest.approx(0.4)
    assert max(rate[9], rate[19], rate[29]) < 0.03
    assert all(
        a > b for start in (2, 10, 20) for a, b in itertools.pairwise(rate[start : start + 8])
    )
    assert rate[:20] == [
        _cosine(step, Recipe(steps=20, restart=10, warmup=2)) for step in range(20)
    ]
