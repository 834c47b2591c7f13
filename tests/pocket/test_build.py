"""Pocket LLaVA itself: genuine class, right tower, the same tokens in training and in use."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial import load
from xlvlms_tutorial.data import PROMPTS, load_samples
from xlvlms_tutorial.errors import LoadError, ModalityError
from xlvlms_tutorial.models.anatomy import decoder_blocks
from xlvlms_tutorial.models.spans import SPANS
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.pocket import build, language, world
from xlvlms_tutorial.pocket.variants import Variant
from xlvlms_tutorial.training.connector import Mix, pack
from xlvlms_tutorial.training.connector_runs import calibrated_tower, dialogue, pixels

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
    """ImageNet classes of scikit-image's sample photographs.

    A tabby or Egyptian cat, an espresso or cup, a space suit or bars.
    """
    from PIL import Image
    from skimage import data

    tower = calibrated_tower()
    expected = {
        "cat": {281, 282, 285},
        "coffee": {967, 968, 504},
        "rocket": {657, 744, 833, 404, 812},
    }
    for name, classes in expected.items():
        picture = Image.fromarray(getattr(data, name)()[..., :3]).resize((224, 224))
        with torch.no_grad():
            best = tower.net(pixels([picture]))[0].topk(5).indices.tolist()
        assert classes & set(best), f"{name}: {best}"


def test_processor_and_training_see_the_same_pixels_and_tokens(vlm):
    images = [world.render(scene) for scene in SCENES[:2]]
    texts = ["What colour is the key?", PROMPTS["image"]]
    inputs = vlm.batch(images, texts)
    assert torch.allclose(inputs["pixel_values"], pixels(images), atol=1e-5)
    packed = pack([[(texts[1], "A frog.")]], vlm.tokenizer, vlm.image_token_id, 16)
    whole = vlm.batch(images[:1], texts[1:], ["A frog.<|im_end|>"])
    assert packed.input_ids[0].tolist() == whole["input_ids"][0].tolist()


@pytest.fixture(scope="module")
def untaught():
    """A model of all modalities whose connector is as it was initialised."""
    parts = build.build(variant=Variant("none", reads=tuple(PROMPTS)), dtype=torch.bfloat16)
    return VLM(*parts, "untaught")


def test_a_variant_is_built_without_its_connector(vlm, untaught):
    frozen, projector = (
        (m.model.model.language_model.norm.weight for m in (vlm, untaught)),
        "linear_2.weight",
    )
    assert torch.equal(*(weight.bfloat16() for weight in frozen))
    own_values, shipped = (
        m.model.model.multi_modal_projector.state_dict()[projector].bfloat16()
        for m in (untaught, vlm)
    )
    assert own_values.isfinite().all() and not torch.equal(own_values, shipped)


@pytest.mark.parametrize(
    ("dataset", "kind", "n"),
    [("scenes", "image", 16), ("clips", "video", 64), ("sounds", "audio", 16)],
)
def test_a_clip_takes_64_positions_and_a_sound_16_and_both_are_called_what_they_are(
    untaught, dataset, kind, n
):
    samples = load_samples(dataset, n=2)
    batch = untaught.batch_of(samples, [PROMPTS[kind]] * 2)
    assert (batch.spans == SPANS.index(kind)).sum(dim=1).tolist() == [n, n]
    assert (batch["input_ids"] == untaught.image_token_id).sum().item() == 2 * n
    logits = untaught.forward(batch, logits=False).logits
    assert logits.isfinite().all() and not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(("dataset", "kind"), [("clips", "video"), ("sounds", "audio")])
def test_the_model_of_pictures_names_what_to_load_for_clips_and_sounds(vlm, dataset, kind):
    message = (
        f"'pocket-llava' does not read {kind}; it reads text and "
        f"image.*'pocket-llava-{kind}' for {dataset}"
    )
    with pytest.raises(ModalityError, match=message):
        vlm.batch_of(load_samples(dataset, n=1), [PROMPTS[kind]])


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
        tokens = tower(
            pixels([world.render(s) for s in world.scenes(64)])
        ).last_hidden_state.flatten(0, 1)
    assert tokens.mean().abs() < 0.1 and 0.8 < tokens.std() < 1.2


def test_a_dialogue_is_one_caption_then_questions():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        pairs = dialogue(scene, rng, Mix(1, 1, 4, 2))
        assert pairs[0][0] == PROMPTS["image"] and pairs[0][1] in language.captions(scene)
        assert sum(answer in ("yes", "no") for _, answer in pairs[1:]) == 4 and len(pairs) == 7
        assert all(answer in ("yes", "no") for _, answer in dialogue(scene, rng, Mix(1, 0, 5, 0)))


def test_shipped_steps_load_and_others_are_refused():
    steps = build.revisions()
    assert len(steps) >= 6 and steps[0] == "step-0000"
    first, last = build.connector_state(revision=steps[0]), build.connector_state()
    assert first.keys() == last.keys()
    assert not torch.equal(first["linear_1.weight"], last["linear_1.weight"])
    with pytest.raises(LoadError, match=steps[-1]):
        load("pocket-llava", revision="step-9999")


def test_the_record_says_how_the_weights_were_made():
    record = build.training_record()
    assert f"step-{record['recipe']['steps']:04d}" == build.revisions()[-1]
    assert record["recipe"]["seed"] == 0 and record["loss"][0] > record["loss"][-1] > 0
    assert {"metrics", "seconds_per_step", "versions", "data"} <= set(record)


def test_it_describes_and_answers(vlm):
    images = [world.render(scene) for scene in SCENES]
    captions = vlm.generate(images, [PROMPTS["image"]] * len(images))
    assert sum(scene.subject in text for scene, text in zip(SCENES, captions, strict=True)) >= 7
    asked_questions = [
        (image, q)
        for image, scene in zip(images, SCENES, strict=True)
        for q in language.questions(scene)
    ]
    answers = vlm.generate(
        [image for image, _ in asked_questions],
        [q.text for _, q in asked_questions],
        max_new_tokens=5,
    )
    assert (
        np.mean(
            [q.answer == answer for (_, q), answer in zip(asked_questions, answers, strict=True)]
        )
        > 0.8
    )


def test_a_saved_pocket_model_loads_again_in_a_process_that_knows_nothing_of_it(tmp_path):
    reader = tiny_reader(reads=("video", "audio"))
    reader.model.save_pretrained(tmp_path / "model")
    reader.processor.save_pretrained(tmp_path / "model")
    script = (
        "import sys; from xlvlms_tutorial import load; assert "
        "'xlvlms_tutorial.pocket.tower' not in sys.modules;vlm = load(sys.argv[1]); "
        "print(vlm.processor.reads, type(vlm.processor).__name__, vlm.processor.patch_size)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip().endswith("('video', 'audio') PocketProcessor 16")
    again, clip = (
        load(tmp_path / "model", device="cpu"),
        [Image.new("RGB", (32, 32), (40 * k, 9, 9)) for k in range(4)],
    )
    batch = reader.batch(None, ["Describe the clip ."], videos=[clip])
    torch.testing.assert_close(again.forward(batch).logits, reader.forward(batch).logits)
