"""Pocket LLaVA itself: genuine class, right tower, the same tokens in training and in use."""

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from xlvlms_tutorial import load
from xlvlms_tutorial.errors import RevisionError
from xlvlms_tutorial.models.anatomy import decoder_blocks
from xlvlms_tutorial.pocket import build, language, world
from xlvlms_tutorial.pocket.runs import calibrated_tower, dialogue, pixels
from xlvlms_tutorial.pocket.training import Mix, pack

SCENES = world.scenes(8, "test")


@pytest.fixture(scope="module")
def vlm():
    return load("pocket-llava", device="cpu")


def test_it_is_the_genuine_class_with_frozen_parts(vlm):
    assert type(vlm.model) is LlavaForConditionalGeneration
    assert vlm.n_layers == len(decoder_blocks(vlm.model)) == 30
    assert not any(p.requires_grad for p in vlm.model.parameters())
    assert vlm.model.lm_head.weight.data_ptr() == vlm.model.get_input_embeddings().weight.data_ptr()


def test_the_tower_names_the_obvious_in_photographs():
    """ImageNet classes of scikit-image's sample photographs: a tabby or Egyptian cat, an espresso or cup, a space suit or bars."""
    from PIL import Image
    from skimage import data

    tower = calibrated_tower()
    expected = {"cat": {281, 282, 285}, "coffee": {967, 968, 504}, "rocket": {657, 744, 833, 404, 812}}
    for name, classes in expected.items():
        picture = Image.fromarray(getattr(data, name)()[..., :3]).resize((224, 224))
        with torch.no_grad():
            best = tower.net(pixels([picture]))[0].topk(5).indices.tolist()
        assert classes & set(best), f"{name}: {best}"


def test_processor_and_training_see_the_same_pixels_and_tokens(vlm):
    images = [world.render(scene) for scene in SCENES[:2]]
    texts = ["What colour is the key?", language.CAPTION_PROMPT]
    inputs = vlm.batch(images, texts)
    assert torch.allclose(inputs["pixel_values"], pixels(images), atol=1e-5)
    packed = pack([[(texts[1], "A frog.")]], vlm.tokenizer, vlm.image_token_id, 16)
    whole = vlm.batch(images[:1], texts[1:], ["A frog.<|im_end|>"])
    assert packed.input_ids[0].tolist() == whole["input_ids"][0].tolist()


def test_fused_tower_gives_the_same_tokens():
    plain, fused = calibrated_tower(), calibrated_tower().fuse()
    images = pixels([world.render(scene) for scene in SCENES[:2]])
    with torch.no_grad():
        a, b = plain(images).last_hidden_state, fused(images).last_hidden_state
    assert a.shape == (2, 16, 1440) and torch.allclose(a, b, atol=2e-2)


def test_tokens_stand_where_their_part_of_the_picture_is():
    """Changing the right half of the ground changes the tokens of the right columns most."""
    tower, picture = calibrated_tower(), np.asarray(world.render(SCENES[0])).copy()
    changed = picture.copy()
    changed[128:, 192:] = 0
    with torch.no_grad():
        a, b = tower(pixels([picture, changed])).last_hidden_state
    moved = (a - b).norm(dim=-1).view(4, 4)
    assert moved.argmax().item() in (11, 15) and moved[:, 0].max() < moved[3, 3] / 2


def test_channels_are_standardised_over_training_scenes():
    tower = calibrated_tower()
    with torch.no_grad():
        tokens = tower(pixels([world.render(s) for s in world.scenes(64)])).last_hidden_state.flatten(0, 1)
    assert tokens.mean().abs() < 0.1 and 0.8 < tokens.std() < 1.2


def test_a_dialogue_is_one_caption_then_questions():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        told = dialogue(scene, rng, Mix(1, 1, 4, 2))
        assert told[0][0] == language.CAPTION_PROMPT and told[0][1] in language.captions(scene)
        assert sum(answer in ("yes", "no") for _, answer in told[1:]) == 4 and len(told) == 7
        assert all(answer in ("yes", "no") for _, answer in dialogue(scene, rng, Mix(1, 0, 5, 0)))


def test_shipped_steps_load_and_others_are_refused():
    steps = build.revisions()
    assert len(steps) >= 6 and steps[0] == "step-0000"
    first, last = build.connector_state(revision=steps[0]), build.connector_state()
    assert first.keys() == last.keys() and not torch.equal(first["linear_1.weight"], last["linear_1.weight"])
    with pytest.raises(RevisionError, match=steps[-1]):
        load("pocket-llava", revision="step-9999")


def test_the_record_says_how_the_weights_were_made():
    record = build.training_record()
    assert f"step-{record['recipe']['steps']:04d}" == build.revisions()[-1]
    assert record["recipe"]["seed"] == 0 and record["loss"][0] > record["loss"][-1] > 0
    assert {"metrics", "seconds_per_step", "versions", "data"} <= set(record)


def test_it_describes_and_answers(vlm):
    images = [world.render(scene) for scene in SCENES]
    captions = vlm.generate(images, [language.CAPTION_PROMPT] * len(images))
    assert sum(scene.subject in text for scene, text in zip(SCENES, captions, strict=True)) >= 7
    asked = [(image, q) for image, scene in zip(images, SCENES, strict=True) for q in language.questions(scene)]
    answers = vlm.generate([image for image, _ in asked], [q.text for _, q in asked], max_new_tokens=5)
    assert np.mean([q.answer == answer for (_, q), answer in zip(asked, answers, strict=True)]) > 0.8
