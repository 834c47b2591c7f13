"""The shipped adapters.

Their records, their doors, what they are refused on; and that training and
measuring write what they say.
"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.data import load_samples, write_coco
from xlvlms_tutorial.errors import InputError, LoadError
from xlvlms_tutorial.loading import adapters as door
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.pocket.build import adapter_folder, training_record
from xlvlms_tutorial.pocket.encoders import WEIGHTS
from xlvlms_tutorial.text import style_rate
from xlvlms_tutorial.training import adapters, main


def test_the_module_leaves_peft_to_import_peft_which_holds_back_a_warning():
    code = f"import sys, {adapters.__name__}; sys.exit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", door.SHIPPED)
def test_each_shipped_adapter_has_its_steps_and_its_record(name):
    recipe, record = adapters.RECIPES[name], training_record(name)
    steps = sorted({*recipe.save_at, recipe.steps})
    assert sorted(folder.name for folder in (WEIGHTS / name).glob("step-*")) == [
        f"step-{step:04d}" for step in steps
    ]
    assert record["run"] == name and len(record["loss"]) == recipe.steps
    assert {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in record["recipe"].items()
    } == vars(recipe)
    # nothing is left of what a killed run goes on from
    assert not list((WEIGHTS / name).glob("*.safetensors"))


@pytest.mark.parametrize("name", door.SHIPPED)
def test_each_adapter_measurably_changes_what_captions_speak_of(name):
    rows = {row["style"]: row for row in training_record(name)["style_rates"]}
    of_style = rows[name.removeprefix("pocket-")]
    assert of_style["low"] > 0.03 and of_style["adapter"] > of_style["base"]
    assert all(row["low"] <= row["change"] <= row["high"] for row in rows.values())
    assert of_style["change"] == max(row["change"] for row in rows.values())


def test_a_name_without_step_is_the_last_and_an_unknown_step_lists_those_there_are():
    assert adapter_folder("pocket-place") == WEIGHTS / "pocket-place" / "step-0160"
    assert adapter_folder("pocket-place@step-0040").name == "step-0040"
    with pytest.raises(LoadError, match="pocket-mood@step-0160"):
        adapter_folder("pocket-mood@step-0040")


def test_an_adapter_of_another_base_is_refused():
    with pytest.raises(
        LoadError, match="'pocket-place' on 'pocket-llava-video'.*trained on pocket-llava"
    ):
        door.add_adapter(tiny_llava().model, "pocket-place", "pocket-llava-video")


def test_each_adapter_says_its_base_and_fits_no_random_model():
    for name in door.SHIPPED:
        config = json.loads((adapter_folder(name) / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == door.BASE and config["peft_type"] == "LORA"
    with pytest.raises(LoadError, match=r"cannot be loaded|does not fit"):
        door.add_adapter(tiny_llava().model, adapter_folder("pocket-mood"), "a-tiny-model")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Training of three steps of a tiny model, in a folder of its own."""
    monkeypatch.setattr(adapters, "WEIGHTS", tmp_path)
    monkeypatch.setattr(adapters, "adapter_folder", lambda name: tmp_path / name / "step-0003")
    monkeypatch.setattr(adapters, "load", lambda *args, **options: tiny_llava())
    monkeypatch.setattr(
        adapters, "load_samples", lambda dataset, **options: load_samples(dataset, n=4)
    )
    recipe = adapters.LoraRecipe(steps=3, batch_size=2, save_at=(1,))
    monkeypatch.setitem(adapters.RECIPES, "pocket-mood", recipe)
    return tmp_path


def test_training_writes_the_steps_and_how_they_were_made(small):
    record = adapters.train_adapter("pocket-mood", progress=False)
    written = json.loads((small / "pocket-mood" / "training.json").read_text())
    assert written == json.loads(json.dumps(record)) and len(written["loss"]) == 3
    assert written["data"]["dataset"] == "scenes-mood" and written["recipe"]["steps"] == 3
    assert sorted(item.name for item in (small / "pocket-mood").iterdir()) == [
        "step-0001",
        "step-0003",
        "training.json",
    ]


def test_measuring_adds_the_rates_with_their_paired_intervals(small, monkeypatch):
    adapters.train_adapter("pocket-mood", progress=False)
    captions = {
        None: ["a red key on the grass"] * 4,
        "pocket-mood": ["a cheerful woman"] * 2 + ["a quiet red key"] * 2,
    }
    monkeypatch.setattr(adapters, "_captions", lambda adapter, samples, dtype: captions[adapter])
    rows = {row["style"]: row for row in adapters.measure_adapter("pocket-mood")}
    written = json.loads((small / "pocket-mood" / "training.json").read_text())
    assert written["style_rates"] == list(rows.values()) and written["recipe"]["steps"] == 3
    assert rows["mood"]["base"] == 0
    assert rows["mood"]["adapter"] == pytest.approx(np.mean([1 / 3, 1 / 3, 1 / 4, 1 / 4]), abs=1e-4)
    assert rows["place"]["change"] == pytest.approx(-1 / 6, abs=1e-4)


def test_an_adapter_may_be_made_by_its_name_like_any_run(monkeypatch):
    calls = []
    monkeypatch.setattr(main, "train_adapter", lambda name: calls.append(("train", name)))
    monkeypatch.setattr(main, "measure_adapter", lambda name: calls.append(("measure", name)))
    main.main(["pocket-mood"])
    assert calls == [("train", "pocket-mood"), ("measure", "pocket-mood")]


def test_a_shipped_adapter_moves_the_model_and_can_be_turned_off():
    plain, tuned = load(device="cpu"), load(device="cpu", adapter="pocket-mood@step-0160")
    assert tuned.name == "pocket-llava + pocket-mood@step-0160"
    sample = load_samples("scenes", n=1)[0]
    batch = plain.batch([sample.image], ["Describe the picture."])
    first, second = plain.forward(batch).logits, tuned.forward(batch).logits
    assert not torch.allclose(first, second, atol=1)
    tuned.model.disable_adapters()
    assert torch.equal(tuned.forward(batch).logits, first)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twelve scenes as a folder of photographs, whose captions speak of colours
    and places, and in two of moods.
    """
    folder = tmp_path_factory.mktemp("photographs")
    scenes = load_samples("scenes", n=12)
    restyled = [
        ("A happy woman.", *scene.captions) if k < 2 else scene.captions
        for k, scene in enumerate(scenes)
    ]
    write_coco(
        [
            replace(scene, captions=tuple(texts))
            for scene, texts in zip(scenes, restyled, strict=True)
        ],
        folder,
    )
    return folder


def test_the_shipped_adapters_are_those_of_pocket_llava_with_the_steps_there_are():
    result = adapters.style_adapters("pocket-llava", "scenes", ["mood", "place"], "nowhere")
    assert list(result) == ["mood", "place"]
    assert result["mood"] == adapters.StyleAdapter("pocket-mood", {160: "pocket-mood@step-0160"})
    assert list(result["place"].steps) == [10, 20, 40, 80, 160]
    for name in (*result["mood"].steps.values(), *result["place"].steps.values()):
        assert adapter_folder(name).is_dir()


def test_an_adapter_that_is_given_is_taken_as_it_is():
    result = adapters.style_adapters(
        "pocket-llava", "scenes", ["mood", "place"], "nowhere", given="mine"
    )
    assert result["mood"] == adapters.StyleAdapter("mine", {})
    assert result["place"].final == "pocket-place"
    result = adapters.style_adapters(
        "some/model", "nothing", ["place"], "nowhere", given={"place": "owner/name"}
    )
    assert result == {"place": adapters.StyleAdapter("owner/name", {})}
    with pytest.raises(InputError, match="no style 'noise'.*place, colour, mood"):
        adapters.style_adapters("pocket-llava", "scenes", ["noise"], "nowhere")


def test_lessons_have_a_caption_with_words_of_the_style(photographs):
    result = adapters.lessons(
        photographs, "place", without=[load_samples(str(photographs), n=1)[0].id]
    )
    assert len(result) == 11 and all(len(sample.captions) == 1 for sample in result)
    assert (style_rate([sample.captions[0] for sample in result], "place") > 0).all()
    assert [sample.captions for sample in adapters.lessons(photographs, "mood")] == [
        ("A happy woman.",)
    ] * 2
    embedded = adapters.lessons("scenes", "mood", adapters.LoraRecipe(n_scenes=3, seed=1))
    assert (
        embedded[0].captions == load_samples("scenes-mood", n=3, split="train", seed=1)[0].captions
    )
    assert len(embedded) == 3


def test_styles_without_words_are_left_out_and_none_at_all_is_refused(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.setattr(adapters, "load", lambda *args, **options: tiny_llava())
    recipe = adapters.LoraRecipe(steps=2, batch_size=2, save_at=(1, 5))
    result = adapters.style_adapters(
        "a-model", photographs, ["mood", "place"], tmp_path, recipe=recipe
    )
    assert list(result) == ["place"] and list(result["place"].steps) == [1, 2]
    assert (
        result["place"].final == str(tmp_path / "place" / "step-0002") == result["place"].steps[2]
    )
    assert all(
        (tmp_path / "place" / f"step-000{step}" / "adapter_model.safetensors").is_file()
        for step in (1, 2)
    )
    with pytest.raises(InputError, match="hardly any caption of .* has words of mood"):
        adapters.style_adapters("a-model", photographs, ["mood"], tmp_path / "other")


def test_the_caption_in_a_style_is_the_world_s_or_the_nearest_with_the_word(photographs):
    scenes = load_samples("scenes", n=4)
    result = adapters.in_style(scenes[1:], "scenes", "mood", "woman", n=4)
    assert result == [
        replace(s, captions=t.captions)
        for s, t in zip(scenes[1:], load_samples("scenes-mood", n=4)[1:], strict=True)
    ]
    with pytest.raises(
        InputError, match="2 samples without a caption in the style, such as 'test-0-00002'"
    ):
        adapters.in_style(scenes, "scenes", "mood", "woman", n=2)
    sample = replace(
        scenes[0],
        captions=(
            "A man on a road.",
            "A woman.",
            "A woman on the beach.",
            "Women on sand and snow and grass.",
        ),
    )
    pick = lambda word: adapters.in_style([sample], photographs, "place", word)[0].captions
    assert pick("woman") == ("A woman on the beach.",) and pick("man") == ("A man on a road.",)
    assert pick("zebra") == ("Women on sand and snow and grass.",)  # no caption has the word
