"""Prompts as processors take them.

One opening token, places for pictures, padding; and what is refused before or when they are made.
"""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import tiny_llava, tiny_tokenizer
from tests.zoo.processors import PROCESSORS, RECIPES, save
from xlvlms_tutorial.errors import InputError, LoadError
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.models import anatomy, prompts
from xlvlms_tutorial.models.processors import reads, require_embedded, require_padding
from xlvlms_tutorial.samples import Sample


def png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
TEXTS = ["Describe the picture .", "What colour is the key on the grass ?"]
# a sound; needs num2words
NAMES = [name for name in PROCESSORS if name not in ("qwen2_audio", "smolvlm")]
CHATS = [name for name in NAMES if RECIPES[name].chat_template is not None]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tiny model of the zoo, saved and loaded once, with the
    chat template that its files have.
    """
    folders: dict[str, Path] = {}

    def model(name: str):
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name))
        return load(folders[name], device="cpu")

    return model


@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_transformers_own_chat(loaded, name):
    vlm = loaded(name)
    batch = vlm.batch([PICTURE] * 2, TEXTS)
    parts = [
        [{"type": "image", "image": PICTURE}, {"type": "text", "text": text}] for text in TEXTS
    ]
    settings = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    for row, content in enumerate(parts):
        theirs = vlm.processor.apply_chat_template(
            [{"role": "user", "content": content}], **settings
        )["input_ids"][0]
        ours = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        assert ours.tolist() == theirs.tolist()
    opens = RECIPES[name].opens or (
        "<s>" if RECIPES[name].chat_template.startswith("<s>") else None
    )
    if opens is not None:
        assert (batch["input_ids"] == vlm.tokenizer.convert_tokens_to_ids(opens)).sum(
            dim=1
        ).tolist() == [1, 1]


def test_the_zoo_has_templates_and_tokenizers_that_both_open_a_prompt():
    both = [
        name
        for name in CHATS
        if (opens := RECIPES[name].opens) and RECIPES[name].chat_template.startswith(opens)
    ]
    assert {"gemma3", "mllama", "idefics3"} <= set(both)


def test_texts_without_a_chat_template_open_once_too(loaded):
    vlm = loaded("llava")
    vlm.processor.chat_template = None
    begun = vlm.batch(None, [f"<s> {text}" for text in TEXTS])
    assert torch.equal(begun["input_ids"], vlm.batch(None, TEXTS)["input_ids"])


def test_the_first_tokens_state_does_not_change_with_the_template(loaded):
    """One opening token more would move every position."""
    vlm = loaded("gemma3")
    batch = vlm.batch([PICTURE], TEXTS[:1])
    twice = vlm.processor(images=[[PICTURE]], text=[vlm.prompt(TEXTS[0])], return_tensors="pt")
    assert twice["input_ids"].shape[1] == batch["input_ids"].shape[1] + 1
    assert (
        vlm.forward(vlm.prepare(twice)).logits[0, -1] - vlm.forward(batch).logits[0, -1]
    ).abs().max() > 0.01


# Marks of pictures in texts


@pytest.mark.parametrize("name", [name for name in NAMES if name != "paligemma"])
def test_a_text_with_the_mark_of_a_picture_is_refused_with_its_sample(loaded, name):
    vlm = loaded(name)
    read = [token for kind, token in vlm.placeholders.items() if kind in reads(vlm.processor)]
    placeholders = {*vlm.tokenizer.convert_ids_to_tokens(read), *prompts.marks(vlm.processor)}
    assert placeholders
    for mark in placeholders:
        texts = [TEXTS[0], f"What does {mark} mean ?"]
        for images in ([PICTURE] * 2, None):
            with pytest.raises(
                InputError, match=r"mean \? \(sample 1\)'; .*marks the place of a picture"
            ):
                vlm.generate(images, texts, 2)
        with pytest.raises(InputError, match=r"\(sample 's9'\)"):
            vlm.batch_of([Sample("s8", PICTURE), Sample("s9", PICTURE)], texts)
        with pytest.raises(InputError, match="marks the place"):
            vlm.batch([PICTURE] * 2, TEXTS, ["red", f"a {mark}"])


@pytest.mark.parametrize("name", [name for name in CHATS if name != "qwen2_audio"])
def test_without_a_chat_template_the_text_says_where_the_picture_goes(loaded, name):
    vlm = loaded(name)
    vlm.processor.chat_template = None
    with pytest.raises(
        InputError,
        match=(
            r"\(sample 0\)'; there is no chat template .*save one beside the processor.*or write '"
        ),
    ):
        vlm.generate([PICTURE], TEXTS[:1], 2)
    mark = prompts.marks(vlm.processor)[-1 if name == "gemma3" else 0]
    batch = vlm.batch([PICTURE] * 2, [f"{mark} {text}" for text in TEXTS])
    assert vlm.forward(batch).logits.isfinite().all()
    if "image" in vlm.placeholders:
        assert batch.mask("image").any(dim=1).all()
    assert vlm.generate(None, TEXTS, 2) is not None  # texts alone need no place


def test_a_chat_template_that_leaves_the_picture_out_is_told():
    vlm = tiny_llava()
    vlm.processor.chat_template = "{% for m in messages %}{{ m['content'][1]['text'] }}{% endfor %}"
    with pytest.raises(InputError, match="the chat template has no place for what is shown"):
        vlm.batch([PICTURE], TEXTS[:1])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.foo.bar }}", "UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_a_chat_template_that_fails_is_told_with_its_model(template, message):
    vlm = tiny_llava()
    vlm.processor.chat_template = template
    with pytest.raises(
        LoadError,
        match=f"chat template of 'tiny-llava' fails .*{message}.*; correct it and load again",
    ):
        vlm.generate([PICTURE], TEXTS[:1], 2)


# What the processor does not take


@pytest.mark.parametrize("size", [(7000, 20), (20, 7000)])
def test_a_picture_that_the_processor_does_not_take_is_named_by_sample_and_size(loaded, size):
    vlm, thin = loaded("qwen2_vl"), Image.new("RGB", size)
    with pytest.raises(
        InputError,
        match=(
            f"picture of sample 1 of {size[0]} x {size[1]} pixels is not taken "
            ".*aspect ratio.*crop or resize"
        ),
    ):
        vlm.generate([PICTURE, thin], TEXTS, 2)
    samples = [Sample("s8", PICTURE), Sample("s9", thin)]
    with pytest.raises(InputError, match="picture of sample 's9'"):
        vlm.batch_of(samples, TEXTS)
    with pytest.raises(InputError, match="picture of sample 2 "):
        vlm.generate([PICTURE, PICTURE, thin], [*TEXTS, TEXTS[0]], 2, batch_size=2)


@pytest.mark.parametrize(
    "form",
    [
        np.asarray,
        lambda picture: np.asarray(picture) / 255,
        png,
        lambda picture: torch.tensor(np.asarray(picture)),
    ],
)
def test_pictures_in_any_form_are_those_of_pillow(form):
    vlm = tiny_llava()
    expected = vlm.batch([PICTURE], TEXTS[:1])
    assert torch.equal(
        vlm.batch([form(PICTURE)], TEXTS[:1])["pixel_values"], expected["pixel_values"]
    )
    assert vlm.generate([form(PICTURE)] * 2, TEXTS, 2) == vlm.generate([PICTURE] * 2, TEXTS, 2)


def test_what_a_processor_raises_at_texts_is_told_in_this_packages_words(monkeypatch):
    vlm = tiny_llava()

    def odd(*_, text, **__):
        if any("key" in prompt for prompt in text):
            raise IndexError("list index out of range")

    monkeypatch.setattr(type(vlm.processor), "__call__", lambda self, **options: odd(**options))
    with pytest.raises(InputError, match=r"\(sample 1\): IndexError: list index out of range"):
        vlm.batch(None, TEXTS)


@pytest.mark.parametrize(
    "wrong", [[PICTURE, 3], [[PICTURE]], "https://example.org/a.png", {"bytes": b""}, 3]
)
def test_what_is_no_single_picture_is_refused_before_the_model_runs(wrong):
    vlm = tiny_llava()
    with pytest.raises(
        InputError,
        match="is not a picture that can be read; give a PIL image|is an address on the network",
    ):
        vlm.generate([PICTURE, wrong], TEXTS, 2)


def test_texts_alone_go_where_the_processor_takes_them(loaded):
    assert len(loaded("llava").generate(None, TEXTS, 2)) == 2
    with pytest.raises(InputError, match=r"\(sample 0\): ValueError: `?images"):
        loaded("paligemma").generate(None, TEXTS, 2)
    with pytest.raises(InputError, match="without pixel_values, .* cannot run; give a picture"):
        loaded("blip2").generate(None, TEXTS, 2)


# Padding and embeddings


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_without_padding_pads_with_its_end_mark(loaded, name):
    texts = [f"<image> {text}" for text in TEXTS] if name == "paligemma" else TEXTS
    vlm = loaded(name)
    expected = vlm.generate([PICTURE] * 2, texts, 3)
    vlm.tokenizer.pad_token = None
    batch = vlm.batch([PICTURE] * 2, texts)
    assert vlm.tokenizer.pad_token == vlm.tokenizer.eos_token and not batch["attention_mask"].all()
    assert vlm.generate([PICTURE] * 2, texts, 3) == expected


def test_a_saved_tokenizer_without_padding_loads(tmp_path):
    save("llava", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(
        json.dumps({name: value for name, value in settings.items() if name != "pad_token"})
    )
    vlm = load(tmp_path, device="cpu")
    assert vlm.tokenizer.pad_token == "</s>" and len(vlm.generate([PICTURE] * 2, TEXTS, 2)) == 2


def test_a_tokenizer_with_neither_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(LoadError, match="neither a padding token nor an end mark; set pad_token"):
        require_padding(tokenizer, 100)


def test_padding_that_the_model_does_not_embed_is_refused_at_load(tmp_path):
    vlm = tiny_llava()
    rows = anatomy.embedded(vlm.model)
    vlm.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert vlm.tokenizer.pad_token_id == rows
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    with pytest.raises(
        LoadError,
        match=(
            rf"pads with '\[PAD\]', token {rows}, and the model embeds {rows} tokens; name another"
        ),
    ):
        load(tmp_path, device="cpu")


def test_a_token_that_the_model_does_not_embed_is_named():
    vlm = tiny_llava()
    vlm.tokenizer.add_tokens(["zebra"])
    with pytest.raises(
        LoadError, match=f"'zebra' token {anatomy.embedded(vlm.model)}, and the model embeds"
    ):
        vlm.generate([PICTURE], ["What is a zebra ?"], 2)
    # a placeholder needs no embedding
    require_embedded(vlm.tokenizer, torch.tensor([[3, 500]]), 100, [500])
    require_embedded(vlm.tokenizer, torch.tensor([[500]]), None, [])


# Lists


@pytest.mark.parametrize(
    "inputs",
    [{"image": PICTURE}, {"texts": "What ?"}, {"answers": "red"}, {"image": "a.png"}, {"image": 7}],
)
def test_one_thing_where_a_list_belongs_is_refused(inputs):
    with pytest.raises(InputError, match="give a list, with one for each sample"):
        prompts.counted(**{"texts": ["What ?"]} | inputs)


@pytest.mark.parametrize("wrong", [2, None, b"red", ["red"]])
def test_answers_and_texts_are_texts(wrong):
    vlm = tiny_llava()
    if wrong is not None:  # a sample without an answer
        with pytest.raises(InputError, match="cannot make a prompt from"):
            prompts.require_texts(vlm.processor, list(TEXTS), ["red", *[wrong]])
    with pytest.raises(InputError, match="cannot make a prompt from"):
        prompts.require_texts(vlm.processor, ["What ?", *[wrong]])


@pytest.mark.parametrize(
    ("option", "number"), [("max_new_tokens", 0), ("batch_size", 0), ("batch_size", -3)]
)
def test_numbers_below_one_are_refused(option, number):
    with pytest.raises(InputError, match=f"{option} is {number}; give at least 1"):
        tiny_llava().generate([PICTURE], TEXTS[:1], **{option: number})


def test_no_texts_give_no_answers():
    assert tiny_llava().generate([], []) == []
