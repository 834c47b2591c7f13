"""Scenes are drawn in the page as in Python, to the pixel, and judged by the same words."""

import base64

import numpy as np
import pytest

from tools.live import node, stage
from xlvlms_tutorial.pocket import world

N = 20


def test_sprites_lie_in_the_atlas_without_overlap():
    picture, places = stage.atlas()
    taken = np.zeros((picture.height, stage.WIDTH), int)
    for x, y, width, height in places.values():
        taken[y : y + height, x : x + width] += 1
    assert taken.max() == 1
    assert max(x + width for x, _, width, _ in places.values()) <= stage.WIDTH


def test_each_thing_of_a_scene_has_a_sprite_that_shows_what_is_true():
    kinds = {sprite.name: dict(sprite.shows) for sprite in stage.sprites()}
    for scene in world.scenes(N, "test", 77):
        shown = {}
        for thing in stage.things(scene):
            shown |= kinds[thing["sprite"]]
        for factor in ("subject", "action", "item", "colour"):
            assert shown.get(factor) == getattr(scene, factor)


@pytest.mark.skipif(node.node() is None, reason="runs where node is")
def test_scenes_are_the_worlds_to_the_pixel(tmp_path):
    picture, places = stage.atlas()
    file = tmp_path / "atlas"
    file.write_bytes(np.asarray(picture.convert("RGBA")).tobytes())
    atlas = {"file": str(file), "width": picture.width, "sprites": places, "tint": world._TINT}
    drawn = node.run({"scenes": stage.scenes(N), "atlas": atlas})["scenes"]
    for text, scene in zip(drawn, world.scenes(N, "test", 77), strict=True):
        pixels = np.frombuffer(base64.b64decode(text), np.uint8)
        rgb = pixels.reshape(world.SIZE, world.SIZE, 4)[..., :3]
        assert np.array_equal(rgb, np.asarray(world.render(scene))), scene
