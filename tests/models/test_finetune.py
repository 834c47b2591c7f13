"""LoRA training: the loss is the answers' cross-entropy, only the adapter moves, runs
repeat and resume, files load again.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.errors import InputError, LoadError
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.loading.adapters import add_adapter
from xlvlms_tutorial.models import finetune
from xlvlms_tutorial.models.finetune import fine_tune, loss_of, save_adapter
from xlvlms_tutorial.samples import Question, Sample

COLOURS = ("red", "blue", "yellow")
SAMPLES = [
    Sample(
        f"s{k}",
        Image.new("RGB", (32, 32), (40 * k, 10, 200 - 20 * k)),
        (f"a {COLOURS[k % 2]} key", "the woman"),
        (Question("x", "?", "y"),),
    )
    for k in range(6)
]
PROMPT = "Describe the picture ."


def weights(vlm):
    return {name: weight.detach().clone() for name, weight in vlm.model.named_parameters()}


def logits(vlm):
    with torch.no_grad():
        return vlm.forward(vlm.batch([SAMPLES[0].image], [PROMPT])).logits


def tuned(vlm, **options):
    return fine_tune(
        vlm,
        SAMPLES,
        **({"prompt": PROMPT, "steps": 12, "batch_size": 3, "learning_rate": 1e-2} | options),
    )


def test_the_loss_is_the_mean_cross_entropy_of_the_answers_tokens_and_their_ends():
    vlm, answers = tiny_llava(), ["a red key", "yes"]
    samples = [SAMPLES[0], SAMPLES[1]]
    loss = loss_of(vlm, samples, PROMPT, answers)
    nats = []
    # one by one, without padding, position by position
    for sample, answer in zip(samples, answers, strict=True):
        batch = vlm.batch([sample.image], [PROMPT], [f"{answer}<|im_end|>"])
        ids, log_probs = (
            batch["input_ids"][0],
            vlm.forward(batch).logits[0].double().log_softmax(-1),
        )
        last = len(vlm.tokenizer(answer, add_special_tokens=False).input_ids) + 1
        nats += [-log_probs[t - 1, ids[t]].item() for t in range(len(ids) - last, len(ids))]
    assert len(nats) == 3 + 1 + 1 + 1
    assert loss.item() == pytest.approx(np.mean(nats), abs=1e-5)


def test_each_sample_may_have_a_prompt_of_its_own():
    vlm, answers, prompts = tiny_llava(), ["a red key", "yes"], [PROMPT, "What is the key ?"]
    together = loss_of(vlm, SAMPLES[:2], prompts, answers).item()
    alone = [
        loss_of(vlm, [sample], prompt, [answer]).item()
        for sample, prompt, answer in zip(SAMPLES, prompts, answers, strict=False)
    ]
    # four tokens and two, their ends included
    assert together == pytest.approx((4 * alone[0] + 2 * alone[1]) / 6, abs=1e-5)
    assert alone[1] != pytest.approx(loss_of(vlm, SAMPLES[1:2], PROMPT, ["yes"]).item(), abs=1e-4)


def test_training_lowers_the_loss_and_moves_the_adapter_alone():
    vlm = tiny_llava()
    before = weights(vlm)
    history = tuned(vlm, steps=30)
    assert list(history.columns) == ["step", "loss", "seconds"]
    assert history["step"].tolist() == list(range(1, 31))
    assert history["loss"].tail(5).mean() < history["loss"].head(3).mean() - 0.15
    after = weights(vlm)
    new = {name: weight for name, weight in after.items() if "lora_" in name}
    assert len(new) == 2 * 2 * 3  # two factors, two maps, three blocks
    assert all(
        torch.equal(before[name.replace(".base_layer", "")], after[name])
        for name in after.keys() - new.keys()
    )
    # the tower has maps of the same name
    assert all(name.split(".layers.")[0].endswith("language_model") for name in new)
    assert not any(weight.requires_grad for weight in vlm.model.parameters())
    assert not vlm.model.training


def test_without_the_adapter_the_model_is_as_it_was():
    vlm = tiny_llava()
    plain = logits(vlm)
    tuned(vlm)
    assert not torch.allclose(logits(vlm), plain, atol=1e-3)
    vlm.model.disable_adapters()
    torch.testing.assert_close(logits(vlm), plain, atol=1e-6, rtol=0)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another():
    first, again, second = tiny_llava(), tiny_llava(), tiny_llava()
    tuned(first), tuned(again), tuned(second, seed=1)
    assert torch.equal(logits(first), logits(again))
    assert not torch.allclose(logits(first), logits(second), atol=1e-4)
    assert first.name == "tiny-llava + LoRA of 12 steps, seed 0" != second.name


def test_steps_on_the_way_are_kept_and_load_again(tmp_path):
    vlm = tiny_llava()
    tuned(vlm, folder=tmp_path, save_at=(5,))
    assert sorted(folder.name for folder in tmp_path.glob("step-*")) == ["step-0005", "step-0012"]
    state = load_file(tmp_path / "step-0012" / "adapter_model.safetensors")
    assert {weight.dtype for weight in state.values()} == {torch.float16}
    loaded, early = tiny_llava(), tiny_llava()
    add_adapter(loaded.model, tmp_path / "step-0012")
    add_adapter(early.model, tmp_path / "step-0005")
    # as far as float16 goes
    torch.testing.assert_close(logits(loaded), logits(vlm), atol=2e-3, rtol=0)
    assert not torch.allclose(logits(early), logits(vlm), atol=1e-2)


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "RESUME_EVERY", 4)
    whole = tiny_llava()
    tuned(whole)
    real, calls = finetune.loss_of, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(finetune, "loss_of", killed)
    with pytest.raises(KeyboardInterrupt):
        tuned(tiny_llava(), folder=tmp_path)
    monkeypatch.setattr(finetune, "loss_of", real)
    resumed = tiny_llava()
    history = tuned(resumed, folder=tmp_path)
    assert history["step"].tolist() == list(range(1, 13))
    torch.testing.assert_close(logits(resumed), logits(whole), atol=1e-6, rtol=0)


def test_the_configuration_names_the_base_and_says_only_the_blocks(tmp_path):
    vlm = tiny_llava()
    tuned(vlm, steps=1, rank=2, targets=("o_proj",))
    config = json.loads((save_adapter(vlm, tmp_path) / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (
        "tiny-llava",
        2,
        4,
    )
    assert "language_model" in config["target_modules"] and "o_proj" in config["target_modules"]


def test_answers_may_be_given_one_by_one_or_by_a_function():
    answers = [f"a {COLOURS[2]}"] * len(SAMPLES)
    first, second = tiny_llava(), tiny_llava()
    fine_tune(first, SAMPLES, answers, prompt=PROMPT, steps=2, batch_size=2)
    fine_tune(
        second, SAMPLES, lambda sample: f"a {COLOURS[2]}", prompt=PROMPT, steps=2, batch_size=2
    )
    assert torch.equal(logits(first), logits(second))


def test_the_connector_is_trained_through_what_is_left_out_and_loads_again(tmp_path):
    vlm = tiny_llava()
    before = logits(vlm)
    with skip(vlm, [1]):
        history = tuned(vlm, targets="connector", rank=8, folder=tmp_path)
        expected = logits(vlm)
    assert history["loss"].iloc[-3:].mean() < history["loss"].iloc[:3].mean()
    moved = [
        name
        for name, weight in vlm.model.named_parameters()
        if "lora_B" in name and weight.abs().sum() > 0
    ]
    assert moved and all("multi_modal_projector" in name for name in moved)
    assert not any("lora" in name for name, _ in vlm.blocks.named_parameters())
    again = tiny_llava()
    assert torch.equal(logits(again), before)
    add_adapter(again.model, tmp_path / "step-0012")
    with skip(again, [1]):
        assert torch.allclose(logits(again), expected, atol=0.02)  # kept in half precision


def test_a_model_without_linear_maps_before_its_blocks_has_no_connector_to_train():
    vlm = tiny_llava()
    vlm.model.model.multi_modal_projector = torch.nn.Identity()
    with pytest.raises(InputError, match="no linear maps between tower and blocks"):
        tuned(vlm, targets="connector")


def test_half_precision_models_learn_in_float32():
    vlm = tiny_llava()
    vlm.model.to(torch.bfloat16)
    tuned(vlm, steps=2)
    assert {weight.dtype for name, weight in vlm.model.named_parameters() if "lora_" in name} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("samples", "answers", "options", "match"),
    [
        ([], None, {}, "no samples"),
        (SAMPLES, ["yes"], {}, "1 answers for 6 samples"),
        (SAMPLES, ["yes"] * 5 + [" "], {}, "none of them empty"),
        (
            [Sample("bare", SAMPLES[0].source)],
            None,
            {},
            "1 samples without a caption, such as 'bare'",
        ),
        (SAMPLES, None, {"steps": 0}, "steps is 0"),
        (SAMPLES, None, {"rank": 0}, "rank is 0"),
        (SAMPLES, None, {"batch_size": 0}, "batch_size is 0"),
        (SAMPLES, None, {"seed": -1}, "seed is -1; give 0 or more"),
        (SAMPLES, None, {"targets": ("w_q",)}, "linear maps down_proj, gate_proj, k_proj"),
    ],
)
def test_what_cannot_be_trained_is_refused(samples, answers, options, match):
    with pytest.raises(InputError, match=match):
        fine_tune(tiny_llava(), samples, answers, **options)


def test_a_second_adapter_and_a_missing_one_are_refused(tmp_path):
    vlm = tiny_llava()
    with pytest.raises(LoadError, match="a model without adapter"):
        save_adapter(vlm, tmp_path)
    tuned(vlm, steps=1)
    with pytest.raises(LoadError, match="has an adapter already"):
        tuned(vlm, steps=1)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(finetune, "is_peft_available", lambda: False)
    with pytest.raises(LoadError, match="pip install peft"):
        tuned(tiny_llava())


def test_the_class_of_the_model_stays():
    vlm = tiny_llava()
    tuned(vlm, steps=1)
    assert type(vlm.model) in AutoModelForImageTextToText._model_mapping.values()
