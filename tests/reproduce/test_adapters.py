"""The shipped adapters: their records, their doors, what they are refused on; and that training and measuring write what they say."""

import json

import numpy as np
import pytest
import torch

from tests.tiny import tiny_llava
from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.errors import LoadError, RevisionError
from xlvlms_tutorial.models import adapters as door
from xlvlms_tutorial.models.loading import load
from xlvlms_tutorial.pocket.build import WEIGHTS, adapter_folder, training_record
from xlvlms_tutorial.reproduce import adapters, train


@pytest.mark.parametrize("name", door.SHIPPED)
def test_each_shipped_adapter_has_its_steps_and_its_record(name):
    recipe, record = adapters.RECIPES[name], training_record(name)
    steps = sorted({*recipe.save_at, recipe.steps})
    assert sorted(folder.name for folder in (WEIGHTS / name).glob("step-*")) == [f"step-{step:04d}" for step in steps]
    assert record["run"] == name and len(record["loss"]) == recipe.steps
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in record["recipe"].items()} == vars(recipe)
    assert not list((WEIGHTS / name).glob("*.safetensors"))  # nothing is left of what a killed run goes on from


@pytest.mark.parametrize("name", door.SHIPPED)
def test_each_adapter_measurably_changes_what_captions_speak_of(name):
    rows = {row["style"]: row for row in training_record(name)["style_rates"]}
    own = rows[name.removeprefix("pocket-")]
    assert own["low"] > 0.03 and own["adapter"] > own["base"]
    assert all(row["low"] <= row["change"] <= row["high"] for row in rows.values())
    assert own["change"] == max(row["change"] for row in rows.values())


def test_a_name_without_step_is_the_last_and_an_unknown_step_lists_those_there_are():
    assert adapter_folder("pocket-place") == WEIGHTS / "pocket-place" / "step-0160"
    assert adapter_folder("pocket-place@step-0040").name == "step-0040"
    with pytest.raises(RevisionError, match="pocket-mood@step-0160"):
        adapter_folder("pocket-mood@step-0040")


def test_an_adapter_of_another_base_is_refused():
    with pytest.raises(LoadError, match="'pocket-place' on 'pocket-llava-video'.*trained on pocket-llava"):
        door.add_adapter(tiny_llava().model, "pocket-place", "pocket-llava-video")


def test_each_adapter_says_its_base_and_fits_no_random_model():
    for name in door.SHIPPED:
        told = json.loads((adapter_folder(name) / "adapter_config.json").read_text())
        assert told["base_model_name_or_path"] == door.BASE and told["peft_type"] == "LORA"
    with pytest.raises(LoadError, match=r"cannot be loaded|does not fit"):
        door.add_adapter(tiny_llava().model, adapter_folder("pocket-mood"), "a-tiny-model")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Training of three steps of a tiny model, in a folder of its own."""
    monkeypatch.setattr(adapters, "WEIGHTS", tmp_path)
    monkeypatch.setattr(adapters, "adapter_folder", lambda name: tmp_path / name / "step-0003")
    monkeypatch.setattr(adapters, "load", lambda *args, **options: tiny_llava())
    monkeypatch.setattr(adapters, "load_samples", lambda dataset, **options: load_samples(dataset, n=4))
    recipe = adapters.LoraRecipe(steps=3, batch_size=2, save_at=(1,))
    monkeypatch.setitem(adapters.RECIPES, "pocket-mood", recipe)
    return tmp_path


def test_training_writes_the_steps_and_how_they_were_made(small):
    record = adapters.train_adapter("pocket-mood", progress=False)
    written = json.loads((small / "pocket-mood" / "training.json").read_text())
    assert written == json.loads(json.dumps(record)) and len(written["loss"]) == 3
    assert written["data"]["dataset"] == "scenes-mood" and written["recipe"]["steps"] == 3
    assert sorted(item.name for item in (small / "pocket-mood").iterdir()) == ["step-0001", "step-0003", "training.json"]


def test_measuring_adds_the_rates_with_their_paired_intervals(small, monkeypatch):
    adapters.train_adapter("pocket-mood", progress=False)
    told = {None: ["a red key on the grass"] * 4, "pocket-mood": ["a cheerful woman"] * 2 + ["a quiet red key"] * 2}
    monkeypatch.setattr(adapters, "_captions", lambda adapter, samples, dtype: told[adapter])
    rows = {row["style"]: row for row in adapters.measure_adapter("pocket-mood")}
    written = json.loads((small / "pocket-mood" / "training.json").read_text())
    assert written["style_rates"] == list(rows.values()) and written["recipe"]["steps"] == 3
    assert rows["mood"]["base"] == 0 and rows["mood"]["adapter"] == pytest.approx(np.mean([1 / 3, 1 / 3, 1 / 4, 1 / 4]), abs=1e-4)
    assert rows["place"]["change"] == pytest.approx(-1 / 6, abs=1e-4)


def test_an_adapter_may_be_made_by_its_name_like_any_run(monkeypatch):
    made = []
    monkeypatch.setattr(train, "train_adapter", lambda name: made.append(("train", name)))
    monkeypatch.setattr(train, "measure_adapter", lambda name: made.append(("measure", name)))
    train.main(["pocket-mood"])
    assert made == [("train", "pocket-mood"), ("measure", "pocket-mood")]


def test_a_shipped_adapter_moves_the_model_and_can_be_turned_off():
    plain, tuned = load(device="cpu"), load(device="cpu", adapter="pocket-mood@step-0160")
    assert tuned.name == "pocket-llava + pocket-mood@step-0160"
    sample = load_samples("scenes", n=1)[0]
    batch = plain.batch([sample.image], ["Describe the picture."])
    one, other = plain.forward(batch).logits, tuned.forward(batch).logits
    assert not torch.allclose(one, other, atol=1)
    tuned.model.disable_adapters()
    assert torch.equal(tuned.forward(batch).logits, one)
