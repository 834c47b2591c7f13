"""Processors load from folders as hub models look, with or without torchvision, and the
traps of their inputs are known.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.models.smolvlm import processing_smolvlm

from tests.support.tiny import tiny_llava
from tests.support.tiny_pocket import tiny_processor
from tests.zoo import MODELS, SUPPRESS, build
from tests.zoo.processors import APART, PROCESSORS, save, save_processor, tokenizer
from xlvlms_tutorial.errors import LoadError, ModalityError
from xlvlms_tutorial.loading.self_check import self_check
from xlvlms_tutorial.models import anatomy, processors
from xlvlms_tutorial.models.processors import NoVideoProcessor, load_processor, padding_first, reads
from xlvlms_tutorial.models.vlm import VLM

GLM = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
GEMMA4 = ("gemma4", "gemma4_moe", "gemma4_small")
WITH_VIDEO = (
    "llava_next_video",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "internvl",
)
WITH_VIDEO += ("qwen3_vl_moe", *GLM, *GEMMA4, "video_llava", "qwen2_5_omni")
WITH_SOUND = (*GEMMA4, "qwen2_5_omni")
# their image processors, or processors, exist only for torchvision, and Voxtral's
# tokenizer only in mistral-common
WITHOUT = {"molmo2", "mistral3", "lfm2_vl", "llama4", "kimi_k25", "voxtral"}
# Qwen3.5's is Qwen3-VL's, with a tokenizer whose class makes byte pairs of any file; Aria's
# makes 4900 patches of a picture
WITHOUT |= {"qwen3_5", "qwen3_5_moe", "aria"}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
QUESTIONS = ("What colour is the key on the grass?", "Describe the picture.")
SIZES = ((40, 60), (90, 50))


@pytest.fixture(autouse=True)
def without_torchvision(monkeypatch):
    """Where it is installed, it is not looked at; and the package that
    SmolVLM needs for videos is there.
    """
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: False)
    monkeypatch.setattr(processing_smolvlm, "num2words", str)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny model, written once."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


def picture(row: int) -> Image.Image:
    pixels = np.random.default_rng(row).integers(0, 255, (*SIZES[row], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def inputs(processor, name: str, rows=(0, 1)) -> hf.BatchFeature:
    kind = "audio" if name == "qwen2_audio" else "image"
    texts = ["<image>" * (name == "paligemma") + QUESTIONS[row] for row in rows]
    if processor.chat_template is not None:
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": kind}, {"type": "text", "text": QUESTIONS[row]}],
                }
            ]
            for row in rows
        ]
        texts = [
            processor.apply_chat_template(turns, add_generation_prompt=True) for turns in chats
        ]
    if kind == "audio":
        clips = [np.random.default_rng(row).standard_normal(16000 - 4000 * row) for row in rows]
        return processor(
            text=texts, audio=clips, sampling_rate=16000, return_tensors="pt", padding=True
        )
    settings = {"return_tensors": "pt", "padding": True}
    # a chat that opens by itself is not opened twice
    if texts[0].startswith(start := processor.tokenizer.bos_token or " "):
        settings["add_special_tokens"] = not all(text.startswith(start) for text in texts)
    return processor(text=texts, images=[[picture(row)] for row in rows], **settings)


def first_logits(model, batch) -> torch.Tensor:
    settings = {"max_new_tokens": 1, "do_sample": False, "suppress_tokens": SUPPRESS}
    return model.generate(
        **batch, **settings, output_logits=True, return_dict_in_generate=True
    ).logits[0]


def features(model, batch) -> int:
    """Rows that the model makes of all pictures."""
    takes = (
        "pixel_values",
        "image_sizes",
        "image_position_ids",
        "image_grid_thw",
        "pixel_attention_mask",
    )
    takes += (
        "qformer_input_ids",
        "qformer_attention_mask",
        "pixel_values_images",
        "high_res_pixel_values",
    )
    with torch.no_grad():
        inner = model if hasattr(model, "get_image_features") else model.model
        built = inner.get_image_features(
            **{key: batch[key] for key in takes if key in batch}
        ).pooler_output
    built = built if isinstance(built, (list, tuple)) else [built]
    return sum(part.flatten(0, -2).shape[0] for part in built)


def test_all_models_but_some_have_a_processor_here():
    assert set(MODELS) - set(PROCESSORS) == WITHOUT | set(APART)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_processor_with_videos_loads_as_its_own_class(saved, name):
    processor = load_processor(saved(name))
    assert isinstance(
        processor,
        getattr(
            hf, json.loads((saved(name) / "processor_config.json").read_text())["processor_class"]
        ),
    )
    assert isinstance(processor.video_processor, NoVideoProcessor)


@pytest.mark.parametrize(
    "name", [name for name in PROCESSORS if name not in ("mllama", "qwen2_audio")]
)
def test_there_are_as_many_placeholders_as_features(saved, name):
    model, _ = build(name)
    batch = inputs(load_processor(saved(name)), name)
    placeholders = batch["input_ids"] == model.config.image_token_id
    assert int(placeholders.sum()) == features(model, batch) > 0
    assert placeholders.any(1).all()


def test_mllama_has_one_placeholder_for_each_picture_and_a_mask_for_the_cross_attention(saved):
    model, _ = build("mllama")
    batch = inputs(load_processor(saved("mllama")), "mllama")
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [1, 1]
    visible = batch["cross_attention_mask"][:, :, 0, 0].bool()
    after = (batch["input_ids"] == model.config.image_token_id).cumsum(1).bool()
    assert torch.equal(visible, after)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_row_of_a_batch_equals_the_row_alone(saved, name):
    model, _ = build(name)
    processor = load_processor(saved(name))
    together = padding_first(inputs(processor, name))
    for row in range(2):
        alone = inputs(processor, name, (row,))
        with torch.no_grad():
            forward = model(**alone).logits[0, -1], model(**together).logits[row, -1]
        torch.testing.assert_close(*forward, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            first_logits(model, alone)[0], first_logits(model, together)[row], atol=1e-3, rtol=1e-3
        )


def test_instructblip_counts_the_padding_between_picture_and_words(saved):
    model, _ = build("instructblip")
    batch = inputs(load_processor(saved("instructblip")), "instructblip")
    # the trap that padding_first is for
    assert batch["attention_mask"][1].tolist() == [1] * 4 + [0] * 5 + [1] * 5
    moved = padding_first(batch)
    assert moved["attention_mask"][1].tolist() == [0] * 5 + [1] * 9
    assert (
        moved["input_ids"][1].tolist()[5:]
        == batch["input_ids"][1][batch["attention_mask"][1] == 1].tolist()
    )
    with torch.no_grad():
        difference = model(**batch).logits[1, -1] - model(**moved).logits[1, -1]
    assert difference.abs().max() > 0.1


def test_the_q_former_reads_its_question_from_the_left(saved):
    processor = load_processor(saved("instructblip"))
    processor.tokenizer.padding_side = "left"  # for generation
    assert (
        inputs(processor, "instructblip")["qformer_attention_mask"][1].tolist() == [1] * 4 + [0] * 5
    )
    genuine = inputs(hf.AutoProcessor.from_pretrained(saved("instructblip")), "instructblip")
    # what transformers makes of these files
    assert genuine["qformer_attention_mask"][1].tolist() == [0] * 5 + [1] * 4


@pytest.mark.parametrize("name", QWEN)
def test_qwen_inputs_tell_pictures_from_text(saved, name):
    model, _ = build(name)
    batch = inputs(load_processor(saved(name)), name)
    assert torch.equal(
        batch["mm_token_type_ids"] == 1, batch["input_ids"] == model.config.image_token_id
    )


@pytest.mark.parametrize("name", QWEN)
def test_generation_without_token_types_silently_gives_other_logits(saved, name):
    model, _ = build(name)
    batch = inputs(load_processor(saved(name)), name)
    expected = first_logits(model, batch)
    del batch["mm_token_type_ids"]
    assert (first_logits(model, batch) - expected).abs().max() > 0.01


def test_qwen2_5_forward_without_token_types_silently_gives_other_logits_where_its_kin_raise(saved):
    for name in QWEN:
        model, _ = build(name)
        batch = inputs(load_processor(saved(name)), name)
        with torch.no_grad():
            expected = model(**batch).logits
            del batch["mm_token_type_ids"]
            if name == "qwen2_5_vl":
                assert (model(**batch).logits - expected)[:, -1].abs().max() > 0.01
            else:
                with pytest.raises(ValueError, match="mm_token_type_ids"):
                    model(**batch)


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_a_processor_reads_is_what_it_has_a_part_for(saved, name):
    expected = ("image",)
    if name == "qwen2_audio":
        expected = ("audio",)
    elif name in WITH_VIDEO:
        expected = ("image", "video")
    expected += ("audio",) * (name in WITH_SOUND)
    assert reads(load_processor(saved(name))) == expected


def test_a_processor_that_takes_sounds_only_in_a_chat_says_so():
    processor = hf.VoxtralProcessor.__new__(hf.VoxtralProcessor)  # a whole one needs mistral-common
    processor.feature_extractor = hf.WhisperFeatureExtractor(feature_size=16)
    processor.tokenizer, processor.chat_template = tokenizer({}), None
    assert reads(processor) == ()
    vlm = VLM(build("voxtral")[0], processor, "voxtral")
    with pytest.raises(
        ModalityError,
        match=r"'voxtral' does not read audio; .*processor's own apply_chat_template.*vlm\.prepare",
    ):
        vlm.batch(None, QUESTIONS[:1], audio=[np.zeros(16000)])


@pytest.mark.parametrize("name", APART)
def test_pictures_go_flat_to_processors_that_take_them_so(saved, name):
    vlm = VLM(build(name)[0], load_processor(saved(name)), name)
    vlm.processor.num_image_tokens = 4  # of GOT-OCR2, whose class says 256
    pictures = [picture(0), picture(1)]
    batch = vlm.batch(pictures, QUESTIONS)
    together = vlm.forward(batch).logits
    for row in range(2):
        alone = vlm.forward(vlm.batch(pictures[row : row + 1], QUESTIONS[row : row + 1])).logits
        torch.testing.assert_close(together[row, -1], alone[0, -1], atol=1e-3, rtol=1e-3)
    reversed_logits = vlm.forward(vlm.batch(pictures[::-1], QUESTIONS)).logits
    assert ((reversed_logits - together)[:, -1].abs().amax(-1) > 1e-2).all()
    assert self_check(vlm, batch)["passed"].all()


def test_idefics_takes_each_text_without_a_picture_for_a_sample(saved):
    vlm = VLM(build("idefics")[0], load_processor(saved("idefics")), "idefics")
    batch = vlm.batch(None, QUESTIONS)
    assert len(batch["input_ids"]) == 2 and not batch["image_attention_mask"].any()
    assert [
        vlm.tokenizer.decode(row[row != vlm.tokenizer.pad_token_id][1:])
        for row in batch["input_ids"]
    ] == [
        vlm.tokenizer.decode(vlm.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in QUESTIONS
    ]


def test_a_thinker_hears_as_well_as_it_sees(saved):
    vlm = VLM(build("qwen2_5_omni")[0], load_processor(saved("qwen2_5_omni")), "qwen2_5_omni")
    waves = [np.random.default_rng(row).standard_normal(16000 - 4000 * row) for row in range(2)]
    batch = vlm.batch(None, QUESTIONS, audio=waves)
    assert batch.mask("audio").any(dim=1).all()
    assert self_check(vlm, batch)["passed"].all()
    assert anatomy.parts(vlm.model)["tower"] == [
        anatomy.tower(vlm.model),
        anatomy.tower(vlm.model, "audio"),
    ]


def test_a_processor_may_say_itself_what_it_reads():
    assert reads(tiny_llava().processor) == ("image",)
    assert reads(tiny_processor(("video", "audio"))) == ("video", "audio")
    assert reads(object()) == ()


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_is_refused(saved, name):
    processor = load_processor(saved(name))
    clip = np.zeros((4, 56, 56, 3), dtype=np.uint8)
    with pytest.raises(LoadError, match="torchvision"):
        processor(text=[f"{processor.video_token} Describe"], videos=[clip], return_tensors="pt")


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_in_a_chat_is_refused(saved, name):
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "video", "path": "clip.mp4"},
                {"type": "text", "text": "Describe"},
            ],
        }
    ]
    with pytest.raises(LoadError, match="torchvision"):
        load_processor(saved(name)).apply_chat_template(chat, tokenize=True, return_dict=True)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_chat_with_a_picture_is_tokenised_in_one_step_as_in_two(saved, name):
    processor = load_processor(saved(name))
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture(0)},
                {"type": "text", "text": QUESTIONS[0]},
            ],
        }
    ]
    settings = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    single = processor.apply_chat_template(chat, **settings)
    two = inputs(processor, name, (0,))
    assert single["input_ids"].tolist() == two["input_ids"].tolist()
    pixels = [key for key in two if "pixel_values" in key]
    assert pixels and all(torch.equal(single[key], two[key]) for key in pixels)


def test_where_torchvision_is_installed_the_auto_class_decides(saved, monkeypatch):
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: True)
    assert type(load_processor(saved("llava"))) is hf.LlavaProcessor


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_saving_and_loading_again_changes_nothing(saved, name, tmp_path):
    processor = load_processor(saved(name))
    build(name)[0].config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    first, second = inputs(processor, name), inputs(again, name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_video_settings_of_the_model_survive(tmp_path):
    config = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "merge_size": 2,
        "temporal_patch_size": 2,
        "fps": 2,
    }
    save_processor("qwen2_vl", tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(config))
    processor = load_processor(tmp_path)
    assert (processor.video_processor.merge_size, processor.video_processor.fps) == (2, 2)
    processor.save_pretrained(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "processor_config.json").read_text())["video_processor"]
        == config
    )


def test_the_class_is_found_by_the_model_where_no_file_names_it(tmp_path):
    save_processor("qwen2_5_vl", tmp_path)
    (tmp_path / "processor_config.json").unlink()
    build("qwen2_5_vl")[0].config.save_pretrained(tmp_path)
    assert isinstance(load_processor(tmp_path), hf.Qwen2_5_VLProcessor)


def test_a_missing_package_is_named_with_the_next_step(saved, monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(LoadError, match="pip install num2words and load again"):
        load_processor(saved("smolvlm"))


@pytest.mark.skipif(
    hf.utils.is_torchvision_available(),
    reason="runs without torchvision",
)
def test_a_processor_that_needs_torchvision_for_pictures_is_refused(tmp_path):
    tokenizer({}).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Molmo2ImageProcessor"})
    )
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"processor_class": "Molmo2Processor"})
    )
    build("molmo2")[0].config.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="pip install torchvision"):
        load_processor(tmp_path)


def test_a_model_of_text_alone_has_no_processor(tmp_path):
    hf.LlamaConfig().save_pretrained(tmp_path)
    tokenizer({}).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="holds no processor"):
        load_processor(tmp_path)


def test_a_damaged_file_is_not_taken_for_a_missing_package(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing we know"}')
    with pytest.raises(ValueError, match="nothing we know") as caught:
        load_processor(tmp_path)
    assert not isinstance(caught.value, LoadError)


def test_offline_an_absent_model_is_not_looked_for():
    with pytest.raises(OSError, match="cached"):
        load_processor("nobody/has-this", local_files_only=True)


def test_the_revision_and_the_permission_reach_transformers(monkeypatch):
    requests = []
    monkeypatch.setattr(processors, "_load", lambda name, options: requests.append((name, options)))
    with pytest.raises(LoadError):
        load_processor("a/b", revision="v2", trust_remote_code=True)
    assert requests == [
        ("a/b", {"local_files_only": False, "trust_remote_code": True, "revision": "v2"})
    ]
