"""The door and the model behind it, on a tiny LLaVA; pocket LLaVA itself is in tests/pocket/test_build.py."""

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_llava
from xlvlms_tutorial.errors import ArchitectureError, HubError, ImageError, PromptError, UnknownModelError
from xlvlms_tutorial.models.vlm import load

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
QUESTION = "What colour is the key ?"


@pytest.fixture(scope="module")
def vlm():
    return tiny_llava()


def test_a_saved_folder_loads_and_answers_the_same(vlm, tmp_path):
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    again = load(str(tmp_path), device="cpu")
    texts = [QUESTION, "Describe the picture ."]
    assert again.generate([PICTURE] * 2, texts, 6) == vlm.generate([PICTURE] * 2, texts, 6)
    assert again.dtype == torch.float32 and again.n_layers == 3


def test_generation_does_not_depend_on_the_batch(vlm):
    texts = [QUESTION, "Describe the picture .", "Is there a woman ?"]
    alone = [vlm.generate([PICTURE], [text], 6)[0] for text in texts]
    assert vlm.generate([PICTURE] * 3, texts, 6, batch_size=3) == alone
    assert vlm.generate([PICTURE] * 3, texts, 6, batch_size=2) == alone


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


def test_unembedding_the_last_layer_gives_the_logits(vlm):
    from xlvlms_tutorial.states.capture import residual_stream

    inputs = vlm.batch([PICTURE], [QUESTION])
    logits = vlm.model(**inputs).logits
    assert torch.allclose(vlm.unembed(residual_stream(vlm, inputs)[-1]), logits, atol=1e-5)


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_prompt_is_refused(vlm, text):
    with pytest.raises(PromptError, match="non-empty"):
        vlm.generate([PICTURE], [text])


def test_pictures_and_texts_must_be_equally_many(vlm):
    with pytest.raises(PromptError, match="2 texts"):
        vlm.batch([PICTURE], [QUESTION, QUESTION])


def test_something_that_is_no_picture_is_refused(vlm, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    for wrong in (tmp_path / "notes.png", tmp_path / "absent.png", 7):
        with pytest.raises(ImageError, match="not a picture"):
            vlm.generate([wrong], [QUESTION])


def test_unknown_names_list_the_known():
    with pytest.raises(UnknownModelError, match="pocket-llava"):
        load("pocket-lava")


def test_an_untested_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(ArchitectureError, match="tested: llava"):
        load(str(tmp_path))


def test_an_unreachable_hub_names_the_offline_choice(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="pocket-llava"):
        load("nobody/has-this-model")
