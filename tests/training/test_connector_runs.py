"""The training runs: what a connector is shown and told of each modality, and a whole run
of a few steps on a tiny model.
"""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial.data import PROMPTS
from xlvlms_tutorial.errors import LoadError
from xlvlms_tutorial.pocket import build, encoders, sounds
from xlvlms_tutorial.pocket.tower import PATCHES, Tower, TowerConfig
from xlvlms_tutorial.pocket.variants import Variant
from xlvlms_tutorial.training import connector_runs
from xlvlms_tutorial.training.connector import Mix, Recipe
from xlvlms_tutorial.training.connector_runs import (
    EXPERTS,
    MATERIAL,
    RUNS,
    Run,
    calibrated_tower,
    dialogue,
    pixels,
    train_connector,
)

KINDS = pytest.mark.parametrize("kind", MATERIAL)
LOOKS = {"image": 1, "video": 4, "audio": 1}


class Small(Tower):
    """The tiny model's tower, which shrinks pictures of any size before it looks."""

    def forward(self, pixel_values, **kwargs):
        small = torch.nn.functional.adaptive_avg_pool2d(pixel_values.flatten(0, -4), 32)
        return super().forward(small.reshape(*pixel_values.shape[:-2], 32, 32))


@pytest.fixture
def ships(tmp_path, monkeypatch):
    """Tiny runs in the place of the table, which ship into a folder of their own.

    "first", and others that start from it unchanged.
    """
    recipe = Recipe(
        steps=3,
        restart=3,
        batch_size=2,
        warmup=1,
        n_scenes=4,
        mixes=(Mix(3, 1, 1, 1),),
        save_at=(0,),
    )
    still = Recipe(**{**recipe.__dict__, "learning_rate": 0.0, "save_at": ()})
    tiny = {"first": Run(recipe, Variant("first"))}
    tiny |= {
        kind: Run(still, Variant(kind, reads=(kind,)), start=("first", None))
        for kind in ("video", "audio")
    }
    tiny["joint"] = Run(still, Variant("joint", reads=tuple(MATERIAL)), start=("first", None))
    vlm = tiny_reader()
    monkeypatch.setattr(connector_runs, "RUNS", tiny)
    monkeypatch.setattr(connector_runs, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(
        connector_runs, "calibrated_tower", lambda encoder: Small(vlm.model.config.vision_config)
    )
    monkeypatch.setattr(build, "build", lambda **_: (tiny_reader(seed=3).model, vlm.processor))
    monkeypatch.setattr(build, "WEIGHTS", tmp_path / "weights")
    return tmp_path


def test_a_run_ships_its_steps_and_a_record(ships):
    record = train_connector("first")
    assert build.revisions("first") == ["step-0000", "step-0003"]
    start, end = build.connector_state("first", "step-0000"), build.connector_state("first")
    assert start.keys() == end.keys()
    assert not torch.equal(start["linear_2.weight"], end["linear_2.weight"])
    message = build.training_record("first")
    assert (
        json.loads(json.dumps(record))
        == message
        == json.loads((ships / "weights" / "first" / "training.json").read_text())
    )
    assert (message["run"], message["start"], message["encoder"], message["data"]["reads"]) == (
        "first",
        None,
        "lite0",
        ["image"],
    )
    assert message["recipe"]["steps"] == 3
    assert len(message["loss"]) == 4
    assert all(loss > 0 for loss in message["loss"])


def test_runs_of_all_modalities_start_from_the_connector_of_another(ships):
    train_connector("first")
    begun = build.connector_state("first")
    for name in ("video", "audio", "joint"):
        record = train_connector(name)
        assert tuple(record["start"]) == ("first", None) and build.revisions(name) == ["step-0003"]
        # the rate is 0
        assert all(
            torch.equal(weight, begun[key]) for key, weight in build.connector_state(name).items()
        )
    shapes = {
        file.stem: np.load(file).shape
        for file in (ships / "cache" / "training" / "tokens").iterdir()
    }
    assert shapes == {f"lite0-{kind}-4": (4, 4 * LOOKS[kind], 48) for kind in MATERIAL}


def test_a_compact_run_keeps_its_change_in_eight_bits_and_is_trained_through_what_is_given(
    ships, monkeypatch
):
    train_connector("first")
    begun, saved, plain = build.connector_state("first"), [], build.save_change
    monkeypatch.setitem(
        connector_runs.RUNS,
        "small",
        Run(
            connector_runs.RUNS["first"].recipe,
            Variant("small"),
            start=("first", None),
            compact=True,
        ),
    )
    monkeypatch.setattr(
        build,
        "save_change",
        lambda state, start, file: saved.append(state) or plain(state, start, file),
    )

    @contextmanager
    def through(model, processor):
        saved.append(model.config._attn_implementation)
        yield

    train_connector("small", through)
    assert saved[0] == "eager" and build.revisions("small") == ["step-0000", "step-0003"]
    written, file = (
        build.connector_state("small"),
        ships / "weights" / "small" / "step-0003.safetensors",
    )
    assert load_file(file)["linear_1.weight"].dtype == torch.int8
    for name, weight in saved[-1].items():
        change, error = (weight - begun[name]).abs(), (written[name] - weight).abs()
        assert change.max() > 0 and error.max() <= change.max() / 200
    assert (
        file.stat().st_size
        < 0.6 * (ships / "weights" / "first" / "step-0003.safetensors").stat().st_size + 500
    )


def test_a_change_is_read_on_the_step_that_it_began_with(ships):
    train_connector("first")
    begun = build.connector_state("first", "step-0000")
    moved = {name: weight + 0.5 for name, weight in begun.items()}
    file = ships / "weights" / "later" / "step-0001.safetensors"
    build.save_change(moved, ("first", "step-0000"), file)
    written = build.connector_state("later")
    for name, weight in moved.items():
        assert torch.allclose(written[name], weight, atol=5e-3)
    assert not torch.allclose(
        build.connector_state("first")["linear_2.weight"], begun["linear_2.weight"]
    )


@KINDS
def test_a_record_is_shown_as_the_processor_shows_it(kind):
    records = MATERIAL[kind].draw(2)
    looks = [MATERIAL[kind].look(record) for record in records]
    assert [len(look) for look in looks] == [LOOKS[kind]] * 2
    assert pixels(looks[0]).shape == (LOOKS[kind], 3, 256, 256)


@KINDS
def test_a_dialogue_is_as_many_captions_and_questions_as_the_mix_says(kind):
    rng, material = np.random.default_rng(0), MATERIAL[kind]
    for record in material.draw(6):
        pairs = dialogue(record, rng, Mix(1, 2, 3, 1), kind)
        assert [prompt for prompt, _ in pairs[:2]] == [PROMPTS[kind]] * 2
        captions = {answer for _, answer in pairs[:2]}
        assert len(captions) == 2 and captions <= set(material.tell(record))
        assert [answer in ("yes", "no") for _, answer in pairs[2:]] == [True] * 3 + [False]


def test_a_sounds_other_questions_are_answered_by_its_record():
    rng = np.random.default_rng(1)
    for record in sounds.sounds(6):
        (_, answer), *_ = dialogue(record, rng, Mix(1, 0, 0, 3), "audio")
        assert answer in (record.name, record.loudness, record.background)


def test_statistics_are_made_once_and_written(tmp_path, monkeypatch):
    sizes, plain = [], Tower.calibrate
    monkeypatch.setattr(
        connector_runs, "statistics_file", lambda name: tmp_path / "towers" / f"{name}.safetensors"
    )
    monkeypatch.setattr(encoders, "statistics_file", connector_runs.statistics_file)
    monkeypatch.setattr(connector_runs, "CALIBRATION", 5)
    monkeypatch.setattr(
        Tower, "calibrate", lambda self, values: sizes.append(len(values)) or plain(self, values)
    )
    first, again = calibrated_tower("patches"), calibrated_tower("patches")
    assert sizes == [5] and (tmp_path / "towers" / "patches.safetensors").is_file()
    assert torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)
    pictures = pixels(
        [look for scene in MATERIAL["image"].draw(5) for look in MATERIAL["image"].look(scene)]
    )
    tokens = again(pictures).last_hidden_state.flatten(0, 1)
    assert tokens.mean(dim=0).abs().max() < 1e-3 and (tokens.std(dim=0) - 1).abs().max() < 0.1


def test_a_tower_of_patches_has_the_shape_that_its_config_says():
    tower = Tower(TowerConfig(backbone=PATCHES, blocks=(), image_size=32, grid=2, hidden_size=48))
    assert tower(torch.zeros(3, 4, 3, 32, 32)).last_hidden_state.shape == (3, 16, 48)


def test_runs_start_only_from_runs_before_them_and_train_each_step_on_something():
    names = list(RUNS)
    for name, run in RUNS.items():
        assert run.start is None or names.index(run.start[0]) < names.index(name)
        # other seeds of the image connector are the beginning of that longer run
        whole = RUNS["image"].recipe if name in ("image-1", "image-2") else run.recipe
        assert run.recipe.steps <= whole.steps
        assert run.recipe.mixes[-1].until == whole.steps
        # experts stop before their rate is 0
        assert run.recipe.restart <= whole.steps or name in EXPERTS
        assert run.recipe.batch_size <= run.recipe.n_scenes and run.variant.run == name


def test_a_run_that_ships_nothing_yet_says_so(ships):
    with pytest.raises(LoadError, match="none"):
        train_connector("video")  # its start is not there
