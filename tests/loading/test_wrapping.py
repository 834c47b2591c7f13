"""Models that are handed over: what load asks for is asked for, and they stay as they are."""

from copy import deepcopy

import accelerate
import jaxtyping
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image

from tests.contract.reference import traces
from tests.support.tiny import tiny_llava
from tests.zoo import build, padded
from tests.zoo.processors import save
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import AnatomyError, InputError, LoadError
from xlvlms_tutorial.interventions.edits import add
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.loading.loading import load
from xlvlms_tutorial.loading.wrapping import from_model, require_architecture, require_finite
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.architectures import ARCHITECTURES
from xlvlms_tutorial.models.vlm import VLM

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
TEXTS = ["What colour is the key ?", "Describe the picture ."]


@pytest.fixture
def own_model():
    """A model and a processor as a caller has them: in training mode, padding on the right."""
    vlm = tiny_llava()
    vlm.processor.tokenizer.padding_side = "right"
    return vlm.model.requires_grad_(True).train(), vlm.processor


def answers(vlm):
    return vlm.generate([PICTURE] * 2, TEXTS, 6)


def test_a_loaded_model_answers_as_one_that_was_loaded_here_and_stays_as_it_is(own_model):
    model, processor = own_model
    model.config.text_config.attention_dropout = 0.9
    for block in anatomy.decoder_blocks(model):
        block.self_attn.attention_dropout = 0.9  # noise, if it ran in training mode
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    vlm = from_model(model, processor, name="mine", revision="v2")
    assert answers(vlm) == answers(tiny_llava())
    with skip(vlm, 2), add(vlm, torch.ones(vlm.width), 1):
        vlm.forward(vlm.batch([PICTURE] * 2, TEXTS))
    assert (vlm.name, vlm.revision, vlm.checks, vlm.model) == ("mine", "v2", None, model)
    assert all(part.training for part in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert processor.tokenizer.padding_side == "right"
    assert vlm.tokenizer.padding_side == "left"
    assert vlm.processor is not processor
    assert traces(vlm) == []


def test_parts_in_different_modes_go_back_each_to_its_own(own_model):
    model, processor = own_model
    model.model.vision_tower.eval()
    modes = [part.training for part in model.modules()]
    vlm = from_model(model, processor, name="mine")
    with pytest.raises(ZeroDivisionError), vlm.run(vlm.batch([PICTURE], TEXTS[:1])):
        assert not any(part.training for part in model.modules())
        raise ZeroDivisionError
    assert [part.training for part in model.modules()] == modes


def test_a_callers_tokenizer_without_padding_is_given_none(own_model):
    model, processor = own_model
    processor.tokenizer.pad_token = None
    vlm = from_model(model, processor, name="mine")
    assert vlm.tokenizer.pad_token == processor.tokenizer.eos_token
    assert processor.tokenizer.pad_token is None
    assert len(answers(vlm)) == 2


def test_a_model_without_a_processor_takes_inputs_made_elsewhere(own_model):
    vlm = from_model(own_model[0], name="mine")
    assert (
        vlm.forward(vlm.prepare({"input_ids": torch.tensor([[7, 8, 9]])})).logits.isfinite().all()
    )


# Peft, quantisation, several devices


def test_a_lora_is_unwrapped_and_keeps_its_effect(own_model):
    model, processor = own_model
    plain = answers(tiny_llava())
    torch.manual_seed(1)
    settings = LoraConfig(
        target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False, lora_dropout=0.9
    )
    wrapped = get_peft_model(model, settings)
    vlm = from_model(wrapped, processor, name="tuned")
    batch = vlm.batch([PICTURE] * 2, TEXTS)
    with torch.no_grad():
        expected = deepcopy(wrapped).eval()(**batch).logits
    torch.testing.assert_close(vlm.forward(batch).logits, expected)
    assert anatomy.connector(vlm.model) is not None and "pixel_values" in vlm.accepts
    with wrapped.disable_adapter():
        assert answers(vlm) == plain
    assert wrapped.training and vlm.model is wrapped.get_base_model()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)),
    ],
)
def test_token_types_are_asked_for_whatever_is_around_the_model(wrap):
    model, inputs = build("qwen2_5_vl")
    for vlm in (
        VLM(wrap(model), None, "q"),
        from_model(wrap(build("qwen2_5_vl")[0]), name="q"),
    ):
        vlm.model.forward = vlm.model.forward  # as accelerate puts one in its place
        batch = vlm.prepare(
            {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
        )
        with pytest.raises(InputError, match="without mm_token_type_ids"):
            vlm.forward(batch)


def test_a_learned_prompt_is_refused(own_model):
    wrapped = get_peft_model(
        own_model[0],
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=3, token_dim=32),
    )
    with pytest.raises(
        LoadError, match="'mine' has a learned prompt of peft around it; give a model without"
    ):
        from_model(wrapped, own_model[1], name="mine")


@pytest.mark.parametrize("place", ["cpu_offload", "disk", "dispatched"])
def test_offloaded_and_dispatched_models_are_those_in_memory(own_model, place, tmp_path):
    model, processor = own_model
    plain = tiny_llava()
    if place == "cpu_offload":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        offloaded = (
            {"": "cpu"}
            if place == "dispatched"
            else {
                "model.vision_tower": "cpu",
                "model.multi_modal_projector": "cpu",
                "model.language_model": "disk",
                "lm_head": "cpu",
            }
        )
        model = accelerate.dispatch_model(
            model, offloaded, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )
    vlm = from_model(model, processor, name="mine")
    batch, vector = vlm.batch([PICTURE] * 2, TEXTS), torch.ones(32)
    for enter in (
        lambda vlm: add(vlm, vector, 1),
        lambda vlm: skip(vlm, 2, "mlp"),
        lambda vlm: skip(vlm, 1),
    ):
        with enter(vlm), enter(plain):
            torch.testing.assert_close(vlm.forward(batch).logits, plain.forward(batch).logits)
            assert answers(vlm) == answers(plain)
    torch.testing.assert_close(
        read(vlm, batch, "all")[3, "resid_post"], read(plain, batch, "all")[3, "resid_post"]
    )


# What is refused


def test_a_model_without_weights_is_refused(own_model):
    with pytest.raises(LoadError, match="holds no weights.*'meta'"):
        from_model(own_model[0].to("meta"), own_model[1], name="mine")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "part",
    [
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.layers.1",
        "lm_head",
    ],
)
def test_weights_that_are_no_numbers_are_said_at_the_door(own_model, part, value, tmp_path):
    model, processor = own_model
    parameter, weight = next(iter(model.get_submodule(part).named_parameters()))
    weight.data.view(-1)[3] = value
    with pytest.raises(
        LoadError,
        match=(
            "'mine' has weights that are NaN or infinite, first in "
            f"{part}.{parameter}; download or train"
        ),
    ):
        from_model(model, processor, name="mine")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=f"NaN or infinite, first in {part}"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_large_weights_are_numbers(dtype):
    model = torch.nn.Linear(300, 300).to(dtype)
    model.weight.data[:] = torch.finfo(dtype).max
    model.register_parameter(
        "packed", torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    )
    model.register_parameter("none", torch.nn.Parameter(torch.ones(0)))
    require_finite("mine", model)


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_model_has_a_name_by_which_records_know_it(own_model, name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it refuses some already
    with pytest.raises(
        LoadError, match="give a text by which records tell these weights from others"
    ):
        from_model(*own_model, name=name)


TEXT = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
OTHERS = {
    "no model": (
        lambda: torch.nn.Linear(2, 2),
        LoadError,
        "is a Linear, which is no model of transformers",
    ),
    "a name": (
        lambda: "llava-hf/llava-1.5-7b-hf",
        LoadError,
        "is a str, which is no model of transformers",
    ),
    "a language model": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
        LoadError,
        "'llama'",
    ),
    "an encoder": (
        lambda: hf.SiglipVisionModel(
            hf.SiglipVisionConfig(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            )
        ),
        LoadError,
        "'siglip_vision_model'",
    ),
    "no unembedding": (
        lambda: tiny_llava().model.model,
        AnatomyError,
        "no unembedding found in LlavaModel",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_vision_language_model_is_refused(case, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it refuses some already
    make, error, message = OTHERS[case]
    with pytest.raises(error, match=message):
        from_model(make(), None, name="mine")
    if case in ("a language model", "an encoder"):  # of an architecture outside the table
        with pytest.raises(
            LoadError, match="answers no questions about pictures; give a vision-language model"
        ):
            from_model(make(), None, name="mine", allow_untested=True)


ENCODING = [hf.Blip2Config(text_config=hf.T5Config()), hf.Florence2Config(), hf.BartConfig()]


@pytest.mark.parametrize("config", ENCODING, ids=lambda config: config.model_type)
def test_an_encoder_decoder_is_refused_before_its_weights_are_read(config, tmp_path, monkeypatch):
    with pytest.raises(LoadError):
        require_architecture("mine", config, False)
    with pytest.raises(
        LoadError, match="has an encoder and a decoder, .*one stack of decoder blocks"
    ):
        require_architecture("mine", config, True)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(
        hf.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(LoadError, match="has an encoder and a decoder"):
        load(tmp_path, allow_untested=True)


def test_an_untested_architecture_is_refused_or_checked(own_model, monkeypatch):
    monkeypatch.delitem(ARCHITECTURES, "llava")
    with pytest.raises(LoadError, match="'llava'.*allow_untested"):
        from_model(*own_model, name="mine")
    with pytest.raises(
        LoadError, match="without a processor cannot be checked; give its processor"
    ):
        from_model(own_model[0], name="mine", allow_untested=True)
    vlm = from_model(*own_model, name="mine", allow_untested=True)
    assert vlm.checks["passed"].all() and vlm.refused == {} and own_model[0].training
    monkeypatch.setattr("xlvlms_tutorial.models.anatomy.final_norm", lambda model: None)
    with pytest.raises(LoadError, match="'llava' failed .*states: layer 3 differs"):
        from_model(*own_model, name="mine", allow_untested=True)


# A processor of another model


@pytest.mark.parametrize(
    ("name", "second_name"),
    [("llava", "qwen2_vl"), ("qwen2_vl", "llava"), ("llava", "llava_next"), ("gemma3", "llava")],
)
def test_a_processor_of_another_model_is_refused(name, second_name, tmp_path):
    """Some of the zoo's share their vocabulary, as models of one family do: then the
    shapes of what is made do not fit.
    """
    processor = load(save(second_name, tmp_path), device="cpu").processor
    with pytest.raises(LoadError, match="give the processor that was saved with the model"):
        from_model(build(name)[0], processor, name="mine")


def test_a_tokenizer_to_which_the_placeholder_is_a_word_is_refused(own_model, tmp_path):
    model, processor = own_model
    model.config.image_token_id = 12
    with pytest.raises(
        LoadError,
        match=(
            "token 12, which stands for image in the model, is '.*' to the "
            "tokenizer .*saved with the model"
        ),
    ):
        from_model(model, processor, name="mine")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="token 12, which stands for image"):
        load(tmp_path, device="cpu")


def test_what_is_no_processor_is_refused(own_model):
    with pytest.raises(
        LoadError,
        match="the processor of 'mine' is a CLIPImageProcessorPil; give what AutoProcessor",
    ):
        from_model(own_model[0], own_model[1].image_processor, name="mine")


def test_without_a_chat_template_a_model_is_taken(own_model):
    model, processor = own_model
    processor.chat_template = None
    vlm = from_model(model, processor, name="base")
    assert len(vlm.generate([PICTURE], ["<image> a picture"], 2)) == 1


def test_logits_that_are_no_numbers_are_said(own_model):
    model, processor = own_model
    model.lm_head.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(LoadError, match="'mine' gives logits that are NaN or infinite"):
        from_model(model, processor, name="mine")


@pytest.mark.parametrize(
    "name",
    ["llava", "qwen2_vl", "mllama", "blip2", "instructblip", "qwen2_audio", "paligemma", "gemma3"],
)
def test_tested_architectures_are_taken_with_their_processors(name, tmp_path):
    reloaded = load(save(name, tmp_path), device="cpu")
    model, inputs = build(name)
    vlm = from_model(model, reloaded.processor, name=name)
    assert torch.equal(
        vlm.forward(vlm.prepare(padded(name, inputs))).logits,
        reloaded.forward(reloaded.prepare(padded(name, inputs))).logits,
    )
