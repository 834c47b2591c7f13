"""The pocket segmenter: its shape, a whole training of a few steps, and the weights shipped."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from xlvlms_tutorial.pocket import build, world
from xlvlms_tutorial.pocket.segmenter import UNet, build_segmenter, seen, shrunk
from xlvlms_tutorial.training import segmenter as training
from xlvlms_tutorial.training.segmenter import SegmenterRecipe, material, train_segmenter

RECIPE = SegmenterRecipe(steps=3, batch_size=4, warmup=1, n_scenes=6)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "WEIGHTS", tmp_path)
    few = partial(training.measure_segmenter, 4)
    monkeypatch.setattr(training, "measure_segmenter", few)
    return tmp_path / "segmenter"


def test_the_network_says_something_of_every_pixel_and_is_small():
    network = UNet().eval()
    assert 0.15e6 < sum(weight.numel() for weight in network.parameters()) < 0.25e6
    assert network(torch.rand(2, 3, 16, 24)).shape == (2, 3, 16, 24)
    halves = network.up[0](torch.rand(1, 72 + 48, 4, 4))
    assert halves.shape == (1, 32, 4, 4)


def test_material_is_the_pictures_beside_their_masks():
    scenes = world.scenes(3, "test", seed=1)
    pictures, truth = material(scenes)
    assert torch.equal(pictures, seen([world.render(scene) for scene in scenes]))
    assert truth.shape == (3, 3, 64, 64) and truth.any(dim=(2, 3)).all()
    # where two parts share a coarse pixel half and half it is of both
    assert (truth.sum(dim=1) > 1).float().mean() < 0.01
    assert torch.equal(truth[1, 0], shrunk(world.masks(scenes[1])["subject"]))


def test_a_training_ships_its_weights_and_a_record_and_is_the_same_again(folder):
    record = train_segmenter(RECIPE)
    state = build.connector_state("segmenter")
    assert json.loads((folder / "training.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(record)
    )
    assert record["recipe"]["steps"] == 3 and set(record["metrics"]) == {"test", "composition"}
    floats = {k for k, weight in UNet().state_dict().items() if weight.is_floating_point()}
    assert state.keys() == floats
    again = train_segmenter(RECIPE)
    assert again["loss"] == record["loss"]
    assert train_segmenter(replace(RECIPE, seed=1))["loss"] != record["loss"]


def test_shipped_weights_segment_unseen_scenes():
    file = next((build.WEIGHTS / "segmenter").glob("step-*.safetensors"))
    assert file.stat().st_size < 500_000
    pictures, truth = material(world.scenes(12, "test", seed=5))
    predicted = build_segmenter()(pictures) > 0
    both = (predicted & truth).sum(dim=(0, 2, 3))
    either = (predicted | truth).sum(dim=(0, 2, 3))
    assert (both / either > 0.85).all()
    kept = build.training_record("segmenter")["metrics"]["test"]
    assert all(share > 0.9 for share in kept.values())
