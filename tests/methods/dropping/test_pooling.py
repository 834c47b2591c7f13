"""Pooled tokens are means of the connector's, in a prompt that is as much shorter."""

import pytest
import torch

from tests.contract.reference import case, traces
from tests.support.tiny import PICTURE, PROMPTS, lively, tiny_llava
from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial.errors import InputError, InterventionError
from xlvlms_tutorial.methods.dropping import pool_tokens
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.watching import record_calls


@pytest.fixture
def vlm():
    vlm = lively(tiny_llava())
    yield vlm
    assert traces(vlm) == [] and "replace_image_token" not in vars(vlm.processor)


def embeddings(vlm):
    picture = PICTURE.copy()
    picture.paste((200, 0, 30), (0, 0, 10, 25))  # four tokens that differ
    batch = vlm.batch([picture], PROMPTS[:1])
    with record_calls(anatomy.decoder(vlm.model)) as calls:
        vlm.forward(batch)
    return batch, calls[0][1]["inputs_embeds"][0]


def test_the_prompt_holds_means_of_rectangles_and_is_numbered_anew(vlm):
    batch, plain = embeddings(vlm)
    tokens = plain[batch.mask("image")[0]]
    for size, expected in (
        (1, tokens),
        (2, tokens.mean(dim=0, keepdim=True)),
        ((1, 2), torch.stack([tokens[:2].mean(0), tokens[2:].mean(0)])),
        ((2, 1), torch.stack([tokens[::2].mean(0), tokens[1::2].mean(0)])),
    ):
        with pool_tokens(vlm, size):
            pooled, states = embeddings(vlm)
        mask = pooled.mask("image")[0]
        torch.testing.assert_close(states[mask], expected)
        torch.testing.assert_close(states[~mask], plain[~batch.mask("image")[0]])


def test_texts_about_one_picture_still_share_its_pass(vlm):
    with pool_tokens(vlm, 2):
        shared = vlm.generate([PICTURE] * 4, PROMPTS, 4)
        alone = [vlm.generate([PICTURE.copy()], [prompt], 4)[0] for prompt in PROMPTS]
    assert shared == alone


def test_each_frame_of_a_clip_is_pooled_by_itself():
    vlm = tiny_reader()
    frames = [PICTURE.point(lambda value, k=k: value // (k + 1)) for k in range(4)]
    with pool_tokens(vlm, 2), record_calls(anatomy.decoder(vlm.model)) as calls:
        batch = vlm.batch(None, PROMPTS[:1], videos=[frames])
        vlm.forward(batch)
        clip = calls[0][1]["inputs_embeds"][batch.mask("video")]
        for frame, token in zip(frames, clip, strict=True):
            one = vlm.batch([frame], PROMPTS[:1])
            vlm.forward(one)
            alone = calls[-1][1]["inputs_embeds"][one.mask("image")]
            torch.testing.assert_close(token[None], alone)


def test_grids_that_do_not_divide_and_other_models_are_refused(vlm):
    for size in (3, 0, (1, 4)):
        with pytest.raises(InputError, match="divide 2 by each"), pool_tokens(vlm, size):
            pass
    for other in (case("qwen2_vl").vlm, case("llava").vlm):
        with (
            pytest.raises(InterventionError, match=other.model.config.model_type),
            pool_tokens(other),
        ):
            pass
