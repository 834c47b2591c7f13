"""The processor of the pocket models.

What of a clip or a sound becomes pixels, and how many positions it takes.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny_pocket import EVERYTHING, tiny_processor
from xlvlms_tutorial.data import PROMPTS
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.pocket import build, clips, sounds
from xlvlms_tutorial.pocket.assets import language_model_folder
from xlvlms_tutorial.pocket.processor import seen
from xlvlms_tutorial.training.connector import pack
from xlvlms_tutorial.training.connector_runs import pixels

CLIP = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in range(8)]
WAVE = np.zeros(sounds.SAMPLES, np.float32)


@pytest.fixture(scope="module")
def processor():
    """The genuine one, which needs no connector."""
    return build.pocket_processor(language_model_folder(), reads=EVERYTHING)


def prompt_for(kind: str) -> str:
    chat = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": PROMPTS[kind]}]}]
    return tiny_processor().apply_chat_template(chat, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(8, [0, 2, 5, 7]), (4, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (1, [0] * 4), (64, [0, 21, 42, 63])],
)
def test_four_frames_are_seen_evenly_from_the_first_to_the_last(n, expected):
    frames = [Image.new("RGB", (2, 2), (k, 0, 0)) for k in range(n)]
    assert [frame.getpixel((0, 0))[0] for frame in seen(frames)] == expected


@pytest.mark.parametrize("wrong", [[], [np.zeros(4)], [None, CLIP[0]]])
def test_a_clip_without_frames_or_with_something_else_is_refused(wrong):
    with pytest.raises(InputError, match="not a picture"):
        seen(wrong)
    with pytest.raises(InputError):
        tiny_processor()(videos=[wrong], text=[prompt_for("video")], return_tensors="pt")


def test_processor_and_training_see_the_same_pixels_and_tokens_of_clips(processor):
    moving = [clips.render_clip(clip) for clip in clips.clips(2, "test")]
    chat = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": PROMPTS["video"]}]}
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True) + "A frog.<|im_end|>"
    inputs = processor(videos=moving, text=[prompt] * 2, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 4, 3, 256, 256)
    expected = torch.stack([pixels([frames[k] for k in (0, 2, 5, 7)]) for frames in moving])
    assert torch.allclose(inputs["pixel_values"], expected, atol=1e-5)
    image = processor.tokenizer.convert_tokens_to_ids(build.PLACEHOLDER)
    packed = pack([[(PROMPTS["video"], "A frog.")]], processor.tokenizer, image, 64)
    assert inputs["input_ids"][1].tolist() == packed.input_ids[0].tolist()


def test_processor_and_training_see_the_same_pixels_and_tokens_of_sounds(processor):
    heard = [sounds.waveform(sound) for sound in sounds.sounds(2, "test")]
    chat = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": PROMPTS["audio"]}]}
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True) + "A laser.<|im_end|>"
    inputs = processor(audio=heard, text=[prompt] * 2, return_tensors="pt")
    assert torch.allclose(
        inputs["pixel_values"], pixels([sounds.log_mel(wave) for wave in heard]), atol=1e-5
    )
    image = processor.tokenizer.convert_tokens_to_ids(build.PLACEHOLDER)
    packed = pack([[(PROMPTS["audio"], "A laser.")]], processor.tokenizer, image, 16)
    assert inputs["input_ids"][1].tolist() == packed.input_ids[0].tolist()


def test_texts_about_several_kinds_of_things_are_refused():
    media = {"images": [[CLIP[0]]], "videos": [CLIP], "audio": [WAVE]}
    for first, second in (("images", "audio"), ("images", "videos"), ("videos", "audio")):
        with pytest.raises(
            InputError,
            match=(
                f"{'pictures' if first == 'images' else first} and "
                f"{'sounds' if second == 'audio' else second}"
            ),
        ):
            tiny_processor()(
                **{first: media[first], second: media[second]},
                text=[prompt_for("image")],
                return_tensors="pt",
            )


@pytest.mark.parametrize("wrong", [WAVE[:-1], np.full(sounds.SAMPLES, np.nan)])
def test_a_sound_of_another_length_or_that_is_not_finite_is_refused(wrong):
    with pytest.raises(InputError, match="32000 finite samples"):
        tiny_processor()(audio=[wrong], text=[prompt_for("audio")], return_tensors="pt")


def test_texts_without_anything_to_see_or_hear_are_taken():
    inputs = tiny_processor()(text=["What colour ?"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
