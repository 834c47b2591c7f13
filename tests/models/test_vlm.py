"""A model with its processor: prompts, batches, spans, forward, generation, unembedding.

On tiny models.
"""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from tests.support.tiny import tiny_llava
from tests.support.tiny_pocket import tiny_reader
from tests.zoo import MODELS, SUPPRESS, build, padded
from tests.zoo.inputs import IMAGE, VOCABULARY
from tests.zoo.models import TEXT, clip, siglip
from tests.zoo.processors import save
from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.errors import DeviceMemoryError, InputError, ModalityError, SpanError
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, Batch, label
from xlvlms_tutorial.models.vlm import VLM

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
QUESTION = "What colour is the key ?"


@pytest.fixture(scope="module")
def vlm():
    return tiny_llava()


def zoo(name: str) -> tuple[VLM, dict]:
    model, inputs = build(name)
    return VLM(model, None, name), inputs


def names(batch: Batch, row: int = 0) -> list[str]:
    return [SPANS[k] for k in batch.spans[row].tolist()]


def last_states(vlm: VLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the last block, and the logits."""
    recorded = []
    hook = vlm.blocks[-1].register_forward_hook(
        lambda _, args, output: recorded.append(anatomy.states_of(output))
    )
    try:
        logits = vlm.forward(batch).logits
    finally:
        hook.remove()
    return recorded[0], logits


# Generation


def test_generation_does_not_depend_on_the_batch(vlm):
    texts = [QUESTION, "Describe the picture .", "Is there a woman ?"]
    alone = [vlm.generate([PICTURE], [text], 6)[0] for text in texts]
    assert vlm.generate([PICTURE] * 3, texts, 6, batch_size=3) == alone
    assert vlm.generate([PICTURE] * 3, texts, 6, batch_size=2) == alone
    assert vlm.generate(None, texts, 6, batch_size=2) == [
        vlm.generate(None, [text], 6)[0] for text in texts
    ]


@pytest.mark.parametrize("name", MODELS)
def test_new_ids_are_what_transformers_generates_after_the_prompt(name):
    vlm, inputs = zoo(name)
    batch = vlm.prepare(padded(name, inputs))
    new_ids = vlm.generate_ids(batch, 3, suppress_tokens=SUPPRESS)
    whole = vlm.model.generate(
        **padded(name, inputs),
        max_new_tokens=3,
        do_sample=False,
        suppress_tokens=SUPPRESS,
        pad_token_id=0,
    )
    assert new_ids.shape == (2, 3) and torch.equal(new_ids, whole[:, -3:])


def test_several_sequences_a_prompt_are_cut_after_their_prompt():
    vlm, inputs = zoo("llava")
    new_ids = vlm.generate_ids(
        vlm.prepare(padded("llava", inputs)),
        3,
        num_beams=2,
        num_return_sequences=2,
        suppress_tokens=SUPPRESS,
    )
    assert new_ids.shape == (4, 3) and not torch.isin(new_ids, torch.tensor(SUPPRESS)).any()


# Batches and spans


def test_spans_name_every_position(vlm):
    spans = vlm.spans([PICTURE] * 2, [QUESTION, "Is there a key ?"], ["red", "yes"])
    first = spans[spans["sample"] == 0].set_index("position")
    assert (spans["span"] == "image").sum() == 8
    assert " ".join(first.loc[first["span"] == "question", "token"]) == QUESTION
    assert first.loc[first["span"] == "answer", "token"].tolist() == ["red"]
    assert first["span"].iloc[-1] == "answer" and not first["span"].isna().any()
    second = spans[spans["sample"] == 1]
    assert (second["span"] == "padding").sum() == 1 and second["span"].iloc[0] == "padding"


def test_question_words_that_also_stand_in_the_answer(vlm):
    spans = vlm.spans([PICTURE], ["Is there a key ?"], ["Is there a key ?"])
    assert spans["span"].value_counts()[["question", "answer"]].tolist() == [5, 5]
    assert spans["span"].iloc[-5:].eq("answer").all()


def test_a_question_is_found_where_the_tokenizer_has_changed_its_spaces(vlm):
    batch = vlm.batch([PICTURE], ["What  colour is  the key ?"])
    assert names(batch).count("question") == 6


def test_words_that_stand_nowhere_in_the_prompt_leave_it_template(vlm):
    batch = vlm.batch([PICTURE], [QUESTION])
    spans = label(batch, vlm.placeholders, vlm.tokenizer, ["a blue woman"], ["grass"])
    assert {SPANS[k] for k in spans[0].tolist()} == {"template", "image"}


def test_each_row_may_have_an_answer_or_none(vlm):
    batch = vlm.batch([PICTURE] * 2, [QUESTION, QUESTION], ["red", "blue"])
    spans = label(batch, vlm.placeholders, vlm.tokenizer, [QUESTION] * 2, ["red", None])
    assert [(row == SPANS.index("answer")).sum().item() for row in spans] == [1, 0]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next_video", "qwen2_audio", "mllama"])
def test_inputs_made_elsewhere_are_labelled_by_their_placeholders(name):
    vlm, inputs = zoo(name)
    padded_inputs = padded(name, inputs)
    batch = vlm.prepare(padded_inputs)
    expected = []
    for ids, attended in zip(
        padded_inputs["input_ids"].tolist(), padded_inputs["attention_mask"].tolist(), strict=True
    ):
        kinds = [
            next((kind for kind, token in vlm.placeholders.items() if token == i), "question")
            for i in ids
        ]
        expected.append(
            [kind if attends else "padding" for kind, attends in zip(kinds, attended, strict=True)]
        )
    assert [names(batch, row) for row in (0, 1)] == expected
    assert ("image" in expected[0]) == (name in ("llava", "qwen2_vl"))
    assert padded_inputs.keys() == batch.keys()


def test_inputs_made_elsewhere_may_bring_their_spans_and_take_the_models_format():
    model, inputs = build("llava")
    vlm = VLM(model.to(torch.bfloat16), None, "llava")
    spans = torch.full_like(inputs["input_ids"], SPANS.index("template"))
    batch = vlm.prepare(inputs, spans)
    assert torch.equal(batch.spans, spans)
    assert batch["pixel_values"].dtype == torch.bfloat16 and batch["input_ids"].dtype == torch.long
    del inputs["attention_mask"]
    assert "padding" not in names(vlm.prepare(inputs))


def test_masks_are_the_positions_of_any_of_some_kinds(vlm):
    batch = vlm.batch([PICTURE] * 2, [QUESTION, "Is there a key ?"], ["red", "yes"])
    for kinds in (
        ("image",),
        ("question", "answer"),
        ("padding", "template", "image", "question", "answer"),
    ):
        assert batch.mask(*kinds).tolist() == [
            [name in kinds for name in names(batch, row)] for row in (0, 1)
        ]


def test_a_mask_of_an_unknown_kind_lists_the_known(vlm):
    batch = vlm.batch([PICTURE], [QUESTION])
    with pytest.raises(
        SpanError,
        match=(
            "no positions of kind 'picture': unknown kind; there are: template, image, video, audio"
        ),
    ):
        batch.mask("question", "picture")


def test_a_mask_that_some_samples_do_not_have_says_which(vlm):
    batch = vlm.batch([PICTURE] * 2, [QUESTION, "Is there a key ?"])
    with pytest.raises(
        SpanError,
        match=(
            r"'padding': 1 of 2 samples have none \(in this batch: 0\); there "
            r"are: template, image, question"
        ),
    ):
        batch.mask("padding")
    with pytest.raises(SpanError, match="'answer or video': 2 of 2 samples"):
        batch.mask("answer", "video")
    without = vlm.batch(None, [QUESTION])
    with pytest.raises(SpanError, match="'image': 1 of 1 samples have none"):
        without.mask("image")


def test_a_picture_that_enters_by_cross_attention_has_no_positions():
    vlm, inputs = zoo("mllama")
    with pytest.raises(SpanError, match="'image': 1 of 1 samples have none"):
        vlm.prepare(inputs).mask("image")


def test_states_that_predict_are_those_before_each_token_of_the_answer_and_the_last(vlm):
    batch = vlm.batch([PICTURE] * 2, [QUESTION, "Is there a key ?"], ["red", "a blue key"])
    for row in (0, 1):
        kinds = names(batch, row)
        expected = [kinds[t + 1 : t + 2] in ([], ["answer"]) for t in range(len(kinds))]
        assert batch.predicting[row].tolist() == expected
    assert batch.predicting.sum(dim=1).tolist() == [2, 4]
    prompt = vlm.batch([PICTURE], [QUESTION])
    assert prompt.predicting.nonzero().tolist() == [[0, prompt.spans.shape[1] - 1]]


@pytest.mark.parametrize(
    ("name", "answer"),
    [("paligemma", "red"), ("gemma3", "red"), ("qwen2_vl", "red"), ("blip2", "red")],
)
def test_answers_are_found_after_the_question_in_other_chats(name, answer, tmp_path):
    vlm = load(save(name, tmp_path), device="cpu")
    batch = vlm.batch(
        [PICTURE] * 2, ["What colour is the key ?", "Is there a woman ?"], [answer, "yes"]
    )
    for row, expected_answer in enumerate((answer, "yes")):
        kinds = names(batch, row)
        ids = batch["input_ids"][row].tolist()
        assert [
            vlm.tokenizer.decode([i])
            for i, kind in zip(ids, kinds, strict=True)
            if kind == "answer"
        ] == [expected_answer]
        assert kinds.index("answer") > max(k for k, kind in enumerate(kinds) if kind == "question")
        assert kinds.count("image") >= 4 and kinds.count("question") == 6 - row
    assert vlm.forward(batch).logits.isfinite().all()


def test_sounds_are_batched_like_pictures(tmp_path):
    vlm = load(save("qwen2_audio", tmp_path), device="cpu")
    batch = vlm.batch(None, [QUESTION, "Is there a key ?"], audio=[torch.zeros(16000).numpy()] * 2)
    assert {"audio", "question", "template", "padding"} == {*names(batch), *names(batch, 1)}
    assert len(vlm.generate_ids(batch, 2)) == 2


@pytest.fixture(scope="module")
def reader():
    return tiny_reader()


@pytest.mark.parametrize(
    ("dataset", "kind", "n"),
    [("scenes", "image", 4), ("clips", "video", 16), ("sounds", "audio", 4)],
)
def test_clips_and_sounds_in_the_place_of_a_picture_are_named_after_what_was_given(
    reader, dataset, kind, n
):
    texts = [QUESTION, "Is there a key ?"]
    samples = load_samples(dataset, n=2)
    batch = reader.batch_of(samples, texts, ["red", "yes"])
    for row in (0, 1):
        kinds = names(batch, row)
        assert kinds.count(kind) == n and {"image", "video", "audio"} & set(kinds) == {kind}
        assert (kinds.count("question"), kinds.count("answer"), kinds.count("padding")) == (
            6 - row,
            1,
            row,
        )
    mask = batch.mask(kind)
    assert (batch["input_ids"][mask] == reader.placeholders["image"]).all() and mask.sum() == 2 * n
    assert reader.forward(batch).logits.isfinite().all()


WAVES = [0.8 * np.sin(np.arange(32_000) / step) for step in (9, 40)]
WRITTEN = {np.int16: 2**15, np.int32: 2**31, np.uint8: 2**7}


@pytest.mark.parametrize("dtype", WRITTEN)
def test_sounds_as_a_file_has_them_are_those_in_floats(reader, tmp_path, dtype):
    scale = WRITTEN[dtype]
    as_written = [(wave * (scale - 1) + 128 * (dtype == np.uint8)).astype(dtype) for wave in WAVES]
    floats = [
        ((wave.astype(float) - 128 * (dtype == np.uint8)) / scale).astype(np.float32)
        for wave in as_written
    ]
    for vlm, cut in ((reader, 32_000), (load(save("qwen2_audio", tmp_path), device="cpu"), 16_000)):
        first, second = (
            vlm.batch(None, [QUESTION] * 2, audio=[wave[:cut] for wave in waves])
            for waves in (as_written, floats)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        with pytest.raises(
            InputError, match="a sound of float64 from .*; give floats from -1 to 1"
        ):
            vlm.batch(None, [QUESTION], audio=[32767 * WAVES[0][:cut]])
        with pytest.raises(InputError, match="a sound of int64"):
            vlm.generate(None, [QUESTION], 2, audio=[(32767 * WAVES[0][:cut]).astype(int)])


@pytest.mark.parametrize("dataset", ["clips", "sounds"])
def test_a_sample_is_batched_as_what_it_shows(reader, dataset):
    samples, texts = (
        load_samples(dataset, n=3),
        [QUESTION, "Is there a key ?", "Describe the picture ."],
    )
    media = {
        {"clips": "videos", "sounds": "audio"}[dataset]: [sample.content for sample in samples]
    }
    first, second = reader.batch_of(samples, texts), reader.batch(None, texts, **media)
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
    assert torch.equal(first.spans, second.spans)
    alone = [
        reader.generate(None, [text], 4, **{k: [v[i]] for k, v in media.items()})[0]
        for i, text in enumerate(texts)
    ]
    assert reader.generate(None, texts, 4, batch_size=2, **media) == alone


def test_samples_of_several_modalities_are_refused(reader):
    mixed = [load_samples(dataset, n=1)[0] for dataset in ("scenes", "sounds")]
    with pytest.raises(InputError, match="samples of modality image, audio; give samples of one"):
        reader.batch_of(mixed, [QUESTION] * 2)


def test_what_a_model_does_not_read_is_refused(vlm, reader):
    clip, sound = [PICTURE] * 2, np.zeros(32_000, np.float32)
    with pytest.raises(
        ModalityError,
        match=(
            "'tiny-llava' does not read video; it reads text and image. "
            "Next: load a model that does"
        ),
    ):
        vlm.batch(None, [QUESTION], videos=[clip])
    with pytest.raises(ModalityError, match="does not read audio"):
        vlm.generate(None, [QUESTION], audio=[sound])
    with pytest.raises(
        ModalityError,
        match="does not read image; it reads text and video, audio.*'pocket-llava' for pictures",
    ):
        tiny_reader(reads=("video", "audio")).batch([PICTURE], [QUESTION])
    with pytest.raises(InputError, match="pictures and sounds"):
        reader.batch([PICTURE], [QUESTION], audio=[sound])
    with pytest.raises(InputError, match="2 texts, 0 answers, 1 videos"):
        reader.batch(None, [QUESTION] * 2, videos=[clip])


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_prompt_is_refused(vlm, text):
    with pytest.raises(InputError, match="non-empty"):
        vlm.generate([PICTURE], [text])


def test_pictures_texts_and_answers_must_be_equally_many(vlm):
    with pytest.raises(InputError, match="2 texts, 0 answers, 1 images"):
        vlm.batch([PICTURE], [QUESTION, QUESTION])
    with pytest.raises(InputError, match="1 texts, 2 answers"):
        vlm.batch([PICTURE], [QUESTION], ["red", "blue"])
    with pytest.raises(InputError, match="0 texts, 0 answers, no pictures"):
        vlm.batch(None, [])


def test_something_that_is_no_picture_is_refused(vlm, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    for wrong in (tmp_path / "notes.png", tmp_path / "absent.png", 7):
        with pytest.raises(InputError, match="not a picture"):
            vlm.generate([wrong], [QUESTION])


# Forward


def test_without_logits_only_those_of_the_last_position_are_computed():
    vlm, inputs = zoo("llava")
    batch = vlm.prepare(padded("llava", inputs))
    whole, last = vlm.forward(batch).logits, vlm.forward(batch, logits=False).logits
    assert whole.shape[1] == batch["input_ids"].shape[1] and last.shape[1] == 1
    torch.testing.assert_close(last[:, 0], whole[:, -1])


@pytest.mark.parametrize("name", ["blip2", "qwen2_audio"])
def test_models_that_cannot_leave_logits_out_give_them_all(name):
    vlm, inputs = zoo(name)
    batch = vlm.prepare(inputs)
    assert torch.equal(vlm.forward(batch, logits=False).logits, vlm.forward(batch).logits)


def test_states_of_a_forward_can_be_trained_on(vlm):
    states, _ = last_states(vlm, vlm.batch([PICTURE], [QUESTION]))
    weight = torch.ones(states.shape[-1], requires_grad=True)
    (states @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, states.sum(dim=(0, 1)))


def test_a_full_device_says_what_to_lower_and_leaves_nothing_behind(monkeypatch):
    vlm, inputs = zoo("llava")
    batch = vlm.prepare(padded("llava", inputs))

    def full(*_, **__):
        assert vlm.running is batch
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vlm.model.model, "forward", full)
    for run in (lambda: vlm.forward(batch), lambda: vlm.generate_ids(batch, 2)):
        with pytest.raises(
            DeviceMemoryError, match=r"batch_size \(now 2\).*now torch.float32.*quantise='8bit'"
        ):
            run()
        assert vlm.running is None


def test_what_runs_inside_a_run_gives_the_outer_batch_back():
    vlm, inputs = zoo("llava")
    outer, inner = vlm.prepare(inputs), vlm.prepare(inputs)
    with vlm.run(outer):
        with pytest.raises(ValueError, match="inside"), vlm.run(inner):
            assert vlm.running is inner
            raise ValueError("inside")
        assert vlm.running is outer
    assert vlm.running is None


TYPE_IDS = {
    "qwen2_vl": "mm_token_type_ids",
    "qwen2_5_vl": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
}
TYPE_IDS |= {
    "molmo2": "mm_token_type_ids",
    "gemma3": "token_type_ids",
    "paligemma": "token_type_ids",
}


@pytest.mark.parametrize(("name", "lacking"), TYPE_IDS.items())
def test_inputs_without_their_token_types_are_refused(name, lacking):
    """Qwen2.5-VL, for one, would answer with one-dimensional positions and no word of it."""
    vlm, inputs = zoo(name)
    assert lacking in inputs
    batch = vlm.prepare({key: value for key, value in inputs.items() if key != lacking})
    for run in (lambda: vlm.forward(batch), lambda: vlm.generate_ids(batch, 2)):
        with pytest.raises(InputError, match=f"without {lacking},.*processor"):
            run()


def test_without_types_qwen_would_answer_otherwise():
    vlm, inputs = zoo("qwen2_5_vl")
    types = inputs.pop("mm_token_type_ids")
    with torch.no_grad():
        silent = vlm.model(**inputs).logits
    assert not torch.allclose(
        silent, vlm.forward(vlm.prepare(inputs | {"mm_token_type_ids": types})).logits, atol=1e-3
    )


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "molmo2"])
def test_texts_alone_need_no_token_types(name):
    vlm, inputs = zoo(name)
    text = {key: inputs[key][:, -3:] for key in ("input_ids", "attention_mask")}
    assert vlm.forward(vlm.prepare(text)).logits.isfinite().all()


# Unembedding


@pytest.mark.parametrize("name", MODELS)
def test_unembedding_what_leaves_the_last_block_gives_the_logits(name):
    vlm, inputs = zoo(name)
    states, logits = last_states(vlm, vlm.prepare(inputs))
    assert states.shape[-1] == vlm.width
    torch.testing.assert_close(vlm.unembed(states), logits, atol=1e-4, rtol=1e-4)
    norm = anatomy.final_norm(vlm.model)
    torch.testing.assert_close(
        vlm.unembed(norm(states[0, -1]), norm=False), logits[0, -1], atol=1e-4, rtol=1e-4
    )


GEMMA = hf.Gemma2Config(**TEXT, head_dim=8, final_logit_softcapping=0.2)
PALIGEMMA = hf.PaliGemmaConfig(
    text_config=GEMMA,
    vision_config=siglip(projection_dim=32, vision_use_head=False),
    projection_dim=32,
    hidden_size=32,
    vocab_size=VOCABULARY,
    image_token_index=IMAGE,
)
GRANITE = hf.GraniteConfig(**TEXT, logits_scaling=8.0)
TILES = {"image_grid_pinpoints": [[28, 28]], "image_seq_length": 4}
OTHERS = {
    "PaliGemma 2 caps its logits": ("paligemma", hf.PaliGemmaForConditionalGeneration, PALIGEMMA),
    "LLaVA caps none, whatever the language model": (
        "llava",
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig(vision_config=clip(), text_config=GEMMA, image_token_index=IMAGE),
    ),
    "LLaVA-NeXT divides none (Granite Vision)": (
        "llava_next",
        hf.LlavaNextForConditionalGeneration,
        hf.LlavaNextConfig(
            vision_config=clip(), text_config=GRANITE, image_token_index=IMAGE, **TILES
        ),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_logits_are_capped_and_scaled_as_the_model_does_it(case):
    inputs, kind, config = OTHERS[case]
    torch.manual_seed(0)
    vlm = VLM(kind(config).eval(), None, case)
    states, logits = last_states(vlm, vlm.prepare(build(inputs)[1]))
    torch.testing.assert_close(vlm.unembed(states), logits, atol=1e-5, rtol=1e-4)
    uncapped = anatomy.unembedding(vlm.model)(anatomy.final_norm(vlm.model)(states))
    assert torch.allclose(uncapped, logits, atol=1e-5) == case.startswith("LLaVA")


def test_models_that_divide_or_multiply_their_logits():
    """Granite and Cohere as language models, which do what their configs say."""
    for config in (GRANITE, hf.CohereConfig(**TEXT, logit_scale=0.25)):
        torch.manual_seed(0)
        vlm = VLM(hf.AutoModelForCausalLM.from_config(config).eval(), None, config.model_type)
        text = {
            key: value[:, -3:] for key, value in build("llava")[1].items() if key != "pixel_values"
        }
        states, logits = last_states(vlm, vlm.prepare(text))
        torch.testing.assert_close(vlm.unembed(states), logits, atol=1e-5, rtol=1e-4)


def test_words_have_the_ids_that_they_have_inside_a_sentence(vlm):
    assert vlm.token_ids("red").tolist() == [vlm.tokenizer.convert_tokens_to_ids("red")]
    assert vlm.token_ids("blue key").tolist() == vlm.tokenizer.convert_tokens_to_ids(
        ["blue", "key"]
    )
