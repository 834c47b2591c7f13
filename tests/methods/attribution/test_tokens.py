"""Maps over image tokens of a tiny random model, against one sample at a time and plain hooks."""

import pytest
import torch

from tests.support.mentions import ANSWERS, FIRST, PROMPT, WORDS, pictures
from tests.support.tiny import lively, tiny_llava
from xlvlms_tutorial.activations.capture import residual_stream
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.attribution import (
    TOKEN_METHODS,
    WordScores,
    attention_rollout,
    token_maps,
)


@pytest.fixture
def vlm():
    return lively(tiny_llava())


@pytest.fixture
def scores(vlm):
    return WordScores(vlm, pictures(5), WORDS, ANSWERS, PROMPT, batch_size=2)


def prepared(vlm, samples):
    """Each sample's batch, the places of its image tokens, where its word is predicted, its id."""
    rows = []
    for sample, answer, first in zip(samples, ANSWERS, FIRST, strict=True):
        batch = vlm.batch([sample.image], [PROMPT], [answer])
        places = batch.mask("image")[0].nonzero().flatten()
        word = int(batch.mask("answer")[0].nonzero()[first, 0])
        rows.append((batch, places, word - 1, int(batch["input_ids"][0, word])))
    return rows


def one_by_one(vlm, kept):
    """The word's log-probability with token j set to its mean over samples by a plain hook."""
    rows = prepared(vlm, pictures(5))
    entering = [residual_stream(vlm, batch)[0, 0, places] for batch, places, *_ in rows]
    means = torch.stack(entering).mean(dim=0)
    results = []
    for (batch, places, position, word), mask in zip(rows, kept.flatten(1), strict=True):

        def change(module, args, kwargs, places=places, mask=mask):
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            states[:, places[~mask]] = means[~mask]
            if args:
                return (states, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": states}

        handle = vlm.blocks[0].register_forward_pre_hook(change, with_kwargs=True, prepend=True)
        try:
            logits = vlm.forward(batch).logits[0, position].float()
        finally:
            handle.remove()
        results.append(logits.log_softmax(dim=-1)[word])
    return torch.stack(results)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_scores_are_those_of_whole_forwards_with_a_plain_hook(vlm, scores, seed):
    kept = torch.ones(5, 2, 2, dtype=torch.bool)
    if seed is not None:
        kept = torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(seed)) < 0.5
    torch.testing.assert_close(scores(kept), one_by_one(vlm, kept), rtol=1e-4, atol=1e-5)


def test_occlusion_is_the_drop_without_each_token(vlm, scores):
    maps = token_maps(scores, "occlusion")
    whole = one_by_one(vlm, torch.ones(5, 2, 2, dtype=torch.bool))
    kept = torch.ones(5, 2, 2, dtype=torch.bool)
    kept[:, 1, 0] = False
    torch.testing.assert_close(maps[:, 1, 0], whole - one_by_one(vlm, kept), rtol=1e-3, atol=1e-5)
    assert maps.abs().max() > 1e-3


def test_gradient_maps_are_the_slope_of_the_score_when_a_token_grows(vlm, scores):
    maps = token_maps(scores, "gradient")
    rows = prepared(vlm, pictures(5))
    for number, (batch, places, position, word) in enumerate(rows):
        for place, expected in zip(places, maps[number].flatten(), strict=True):
            results = []
            for factor in (1 - 1e-2, 1 + 1e-2):

                def grow(module, args, kwargs, place=place, factor=factor):
                    states = (args[0] if args else kwargs["hidden_states"]).clone()
                    states[:, place] *= factor
                    if args:
                        return (states, *args[1:]), kwargs
                    return args, kwargs | {"hidden_states": states}

                handle = vlm.blocks[0].register_forward_pre_hook(grow, with_kwargs=True)
                try:
                    logits = vlm.forward(batch).logits[0, position].double()
                finally:
                    handle.remove()
                results.append(logits.log_softmax(dim=-1)[word])
            slope = (results[1] - results[0]) / 2e-2
            assert slope.item() == pytest.approx(expected.item(), rel=0.05, abs=2e-3)


def test_rollout_and_attention_are_those_of_eager_attention(vlm, scores):
    rollout, attention = token_maps(scores, "rollout"), token_maps(scores, "attention")
    assert vlm.model.config._attn_implementation != "eager"
    eager = lively(tiny_llava())
    eager.model.set_attn_implementation("eager")
    for number, (batch, places, position, _) in enumerate(prepared(eager, pictures(5))):
        weights = eager.forward(batch, output_attentions=True).attentions
        product = torch.eye(weights[0].shape[-1])
        for block in weights:
            mixed = 0.5 * block[0].mean(dim=0) + 0.5 * torch.eye(len(product))
            product = mixed @ product
        torch.testing.assert_close(rollout[number].flatten(), product[position, places])
        mean = torch.stack([block[0, :, position].mean(dim=0) for block in weights]).mean(dim=0)
        torch.testing.assert_close(attention[number].flatten(), mean[places])


def test_rows_of_a_rollout_sum_to_one_and_no_attention_is_the_identity():
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.rand(2, 3, 4, 4, generator=generator).softmax(dim=-1) for _ in range(3)]
    torch.testing.assert_close(attention_rollout(blocks).sum(dim=-1), torch.ones(2, 4))
    alone = [torch.eye(4).expand(2, 3, 4, 4)] * 2
    torch.testing.assert_close(attention_rollout(alone), torch.eye(4).expand(2, 4, 4))
    with pytest.raises(InputError, match="no attention"):
        attention_rollout([])


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_batches_do_not_matter(vlm, scores, method):
    together = WordScores(vlm, pictures(5), WORDS, ANSWERS, PROMPT)
    torch.testing.assert_close(
        token_maps(scores, method), token_maps(together, method), rtol=1e-4, atol=1e-5
    )


def test_bad_input_is_refused(vlm, scores):
    with pytest.raises(InputError, match=r"a mask of \(5, 3, 3\) for image tokens of \(5, 2, 2\)"):
        scores(torch.ones(5, 3, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="'saliency'; allowed: 'gradient', 'occlusion'"):
        token_maps(scores, "saliency")
    with pytest.raises(InputError, match="give two or more"):
        WordScores(vlm, pictures(1), WORDS, ANSWERS[:1], PROMPT)
    with pytest.raises(InputError, match="leave out samples without these words"):
        WordScores(vlm, pictures(5), "blue", ANSWERS, PROMPT)
