"""Four frozen encoders.

Shapes, statistics of their channels, and one that was never trained but is the same each time.
"""

import pytest
import torch

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.pocket import clips, world
from xlvlms_tutorial.pocket.assets import tower_state_dict
from xlvlms_tutorial.pocket.encoders import ENCODERS, statistics_file, tower_state, untrained
from xlvlms_tutorial.pocket.processor import seen
from xlvlms_tutorial.pocket.tower import Tower
from xlvlms_tutorial.training.connector_runs import pixels

EVERY_ENCODER = pytest.mark.parametrize("name", ENCODERS)
WIDTHS = {"lite0": 1440, "lite2": 1600, "random": 1440, "patches": 768}


@pytest.fixture(scope="module")
def pictures():
    """Training scenes, as the tower's input."""
    return pixels([world.render(scene) for scene in world.scenes(32)])


def tower(name: str, state: dict[str, torch.Tensor] | None = None) -> Tower:
    encoder = Tower(ENCODERS[name].config).eval().requires_grad_(False)
    if state is None:
        encoder.net.load_state_dict(ENCODERS[name].weights())
    else:
        encoder.load_state_dict(state)
    return encoder


@EVERY_ENCODER
def test_a_picture_gives_sixteen_tokens_of_the_encoders_width(name, pictures):
    encoder = tower(name)
    tokens = encoder(pictures[:1]).last_hidden_state
    assert ENCODERS[name].width == encoder.config.hidden_size == WIDTHS[name]
    assert tokens.shape == (1, 16, WIDTHS[name])
    # most channels tell places apart
    assert tokens.isfinite().all() and (tokens.std(dim=1) > 0).float().mean() > 0.9


@EVERY_ENCODER
def test_shipped_statistics_standardise_each_channel_over_training_scenes(name, pictures):
    assert statistics_file(name).is_file()
    tokens = tower(name, tower_state(name))(pictures).last_hidden_state.flatten(0, 1)
    # few pictures, and raw pixels follow the time of day
    assert tokens.mean().abs() < 0.3 and 0.8 < tokens.std() < 1.2
    assert tokens.mean(dim=0).abs().median() < 0.3 and 0.7 < tokens.std(dim=0).median() < 1.3


def test_the_untrained_encoder_is_the_same_each_time_and_leaves_torchs_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = untrained()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    again, second_seed = untrained(), untrained(seed=1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert first.keys() == tower_state_dict().keys()
    assert not torch.equal(first["_conv_stem.weight"], second_seed["_conv_stem.weight"])
    assert not torch.equal(first["_conv_stem.weight"], tower_state_dict()["_conv_stem.weight"])


def test_patches_are_the_pixels_themselves(pictures):
    """Oracle: each token holds the means of its 16 x 16 squares of 4 x
    4 pixels, whatever their order.
    """
    tokens = tower("patches")(pictures[:1]).last_hidden_state[0]
    squares = pictures[0].reshape(3, 64, 4, 64, 4).mean(dim=(2, 4))
    for row, column in ((0, 0), (1, 3), (3, 2)):
        expected = squares[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].flatten()
        torch.testing.assert_close(
            tokens[4 * row + column].sort().values, expected.sort().values, atol=1e-5, rtol=1e-5
        )


def test_patches_have_no_norms_to_fuse(pictures):
    encoder = tower("patches")
    assert encoder.fuse() is encoder
    assert torch.equal(
        encoder(pictures[:1]).last_hidden_state, tower("patches")(pictures[:1]).last_hidden_state
    )


@pytest.mark.parametrize("name", ["lite0", "patches"])
def test_a_clip_is_its_four_frames_one_after_the_other(name):
    encoder = tower(name)
    looks = torch.stack([pixels(seen(clips.render_clip(clip))) for clip in clips.clips(2, "test")])
    together = encoder(looks).last_hidden_state
    assert together.shape == (2, 64, WIDTHS[name])
    for clip, tokens in zip(looks, together, strict=True):
        alone = torch.cat([encoder(frame[None]).last_hidden_state[0] for frame in clip])
        torch.testing.assert_close(tokens, alone, atol=1e-4, rtol=1e-4)


def test_backbones_that_no_wheel_carries_are_refused():
    with pytest.raises(InputError, match="efficientnet-lite0, efficientnet-lite2"):
        tower_state_dict("efficientnet-lite9")
