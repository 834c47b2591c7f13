"""Tuning few weights: identity at the start, closed counts, nothing else moves, exact undo.

Two of the three bugs of the published code have their tests here and in tests of the chapter.
"""

import pytest
import torch
from PIL import Image
from torch import nn

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.errors import InputError, LoadError
from xlvlms_tutorial.models import tuning as module
from xlvlms_tutorial.models.finetune import loss_of
from xlvlms_tutorial.models.tuning import TUNINGS, tune
from xlvlms_tutorial.samples import Question, Sample

PICTURES = [Image.new("RGB", (32, 32), (80 * k, 10, 200 - 60 * k)) for k in range(3)]
SAMPLES = [
    Sample(f"s{k}", picture, ("a red key",), (Question("x", "?", "y"),))
    for k, picture in enumerate(PICTURES)
]
PROMPT = "Describe the picture ."
ANSWERS = ["a red key", "the woman", "yes"]
# of the tiny LLaVA: 3 blocks of width 32, MLP 64, keys and values 16; picture width 16
QUERIES_VALUES = (32 + 32) + (32 + 16)
COUNTS = {
    "prompt": 8 * 32,
    "bias": 3 * 16,
    "ia3": 3 * (16 + 16 + 64),
    "norm": 3 * 2 * 32 + 32,
    "subset": 3 * 4 * QUERIES_VALUES,
    "lora": 3 * 4 * QUERIES_VALUES,
    "adapter": 3 * ((32 * 4 + 4) + (4 * 32 + 32)),
    "connector": (16 * 32 + 32) + (32 * 32 + 32),
}
BLOCK = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
COUNTS["full"] = 3 * BLOCK + 32 + COUNTS["connector"]


def logits(vlm, prompt=PROMPT):
    with torch.no_grad():
        return vlm.forward(vlm.batch(PICTURES, [prompt] * 3)).logits


def one_step(vlm, tuning, rate=0.05):
    loss = loss_of(vlm, SAMPLES, tuning.prefix + PROMPT, ANSWERS)
    loss.backward()
    with torch.no_grad():
        for weight in tuning.parameters.values():
            weight.sub_(rate * weight.grad)
            weight.grad = None
    return loss.item()


@pytest.mark.parametrize("method", TUNINGS)
def test_as_many_numbers_are_trained_as_the_shapes_say(method):
    vlm = tiny_llava()
    total = sum(weight.numel() for weight in vlm.model.parameters())
    with tune(vlm, method) as tuning:
        assert (tuning.count, tuning.total) == (COUNTS[method], total)
        assert tuning.share == pytest.approx(COUNTS[method] / total)
        assert all(weight.requires_grad for weight in tuning.parameters.values())


@pytest.mark.parametrize("method", [name for name in TUNINGS if name != "prompt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_what_it_was_at_the_start(method, dtype):
    vlm = tiny_llava()
    vlm.model.to(dtype)
    before = logits(vlm)
    with tune(vlm, method):
        assert torch.equal(logits(vlm), before)


def test_an_adapter_that_is_drawn_throughout_is_not_the_model_at_the_start(monkeypatch):
    """The first bug of the published code: the second map of its adapters is drawn too."""
    vlm = tiny_llava()
    before = logits(vlm)
    monkeypatch.setattr(nn.init, "zeros_", lambda weight: weight)
    with tune(vlm, "adapter"):
        assert (logits(vlm) - before).abs().max() > 1e-4


@pytest.mark.parametrize("method", TUNINGS)
def test_only_what_is_trained_changes_and_the_way_back_is_exact(method):
    vlm = tiny_llava()
    weights = dict(vlm.model.named_parameters())
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    before, modules = logits(vlm), [name for name, _ in vlm.model.named_modules()]
    with tune(vlm, method) as tuning:
        start = tuning.state()
        first = one_step(vlm, tuning)
        if method in ("lora", "adapter"):  # the first factor gets a gradient once the second moved
            one_step(vlm, tuning)
        for name, weight in tuning.parameters.items():
            assert not torch.equal(weight, start[name]), name
        second = loss_of(vlm, SAMPLES, tuning.prefix + PROMPT, ANSWERS).item()
        assert second < first
        assert all(torch.equal(weight, copies[name]) for name, weight in weights.items())
        assert vlm.name == f"tiny-llava + {method}"
    assert torch.equal(logits(vlm), before)
    assert dict(vlm.model.named_parameters()).keys() == weights.keys()
    for name, weight in vlm.model.named_parameters():
        assert weight is weights[name]
        assert not weight.requires_grad
    assert [name for name, _ in vlm.model.named_modules()] == modules
    assert vlm.name == "tiny-llava"
    assert not getattr(vlm.model, "peft_config", None)


def test_a_parallel_adapter_adds_its_formula_to_the_mlp():
    vlm = tiny_llava()
    mlp = vlm.blocks[1].mlp
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    plain = mlp(states)
    with tune(vlm, "adapter", rank=3) as tuning, torch.no_grad():
        for weight in tuning.parameters.values():
            weight.normal_()
        down, up = (tuning.parameters[f"1.{name}.weight"] for name in ("down", "up"))
        shifts = [tuning.parameters[f"1.{name}.bias"] for name in ("down", "up")]
        hidden = (states @ down.T + shifts[0]).clamp_min(0)
        expected = plain + 0.1 * (hidden @ up.T + shifts[1])
        assert torch.allclose(mlp(states), expected, atol=1e-5)


def test_a_subset_changes_the_drawn_weights_and_no_others():
    vlm = tiny_llava()
    linear = vlm.blocks[0].self_attn.q_proj
    before = linear.weight.detach().clone()
    with tune(vlm, "subset", rank=1) as tuning, torch.no_grad():
        tuning.parameters["0.self_attn.q_proj"].fill_(1.0)
        change = linear.weight - before
        assert int((change != 0).sum()) == 64
        assert torch.allclose(change[change != 0], torch.ones(64), atol=1e-6)


def test_learned_tokens_stand_in_the_places_of_the_prefix_alone():
    vlm = tiny_llava()
    before = logits(vlm)
    with tune(vlm, "prompt", n_tokens=3) as tuning:
        assert torch.equal(logits(vlm), before)  # no place in the question, no change
        ids = vlm.tokenizer(tuning.prefix + PROMPT, return_tensors="pt").input_ids
        # two questions in one row: each has all tokens
        states = vlm.model.get_input_embeddings()(torch.cat([ids, ids], dim=1))[0]
        (learned,) = tuning.parameters.values()
        length = ids.shape[1]
        assert torch.equal(states[:3], learned)
        assert torch.equal(states[length : length + 3], learned)
    words = vlm.model.get_input_embeddings()(ids)[0]
    assert torch.equal(words[3:], states[3:length])


def test_what_was_trained_moves_to_a_copy_of_the_model():
    pupil, judge = tiny_llava(), tiny_llava()
    with tune(pupil, "lora", seed=1) as trained:
        one_step(pupil, trained)
        one_step(pupil, trained)
        expected, state = logits(pupil), trained.state()
    with tune(judge, "lora", seed=2) as tuning:
        tuning.load(state, base="tiny-llava")
        assert torch.equal(logits(judge), expected)


def test_the_same_seed_draws_the_same():
    vlm = tiny_llava()
    states = []
    for seed in (0, 0, 1):
        with tune(vlm, "lora", seed=seed) as tuning:
            states.append(tuning.state())
    name = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("method", TUNINGS)
def test_pages_show_no_warnings_of_libraries(method, recwarn):
    with tune(tiny_llava(), method):
        pass
    assert not [str(warning.message) for warning in recwarn]


def test_learned_tokens_take_a_special_token_that_nothing_uses():
    vlm = tiny_llava()
    vlm.tokenizer.unk_token = None
    vlm.tokenizer.add_special_tokens({"additional_special_tokens": ["<spare>"]})
    token = vlm.tokenizer.convert_tokens_to_ids("<spare>")
    words = vlm.model.get_input_embeddings()
    vlm.model.resize_token_embeddings(max(words.num_embeddings, token + 1))
    with tune(vlm, "prompt", n_tokens=2) as tuning:
        assert tuning.prefix == "<spare><spare>"
    vlm.processor.chat_template = "<spare>" + vlm.processor.chat_template
    with tune(vlm, "prompt", n_tokens=2) as tuning:
        assert "<spare>" not in tuning.prefix


def test_bad_input_is_refused_with_what_is_allowed():
    vlm = tiny_llava()
    with pytest.raises(InputError, match="'bitfit'; allowed: 'prompt', 'bias', 'ia3'"):
        tune(vlm, "bitfit")
    with pytest.raises(InputError, match="rank"):
        tune(vlm, "lora", rank=0)
    with pytest.raises(InputError, match="seed is -1"):
        tune(vlm, "lora", seed=-1)
    with pytest.raises(InputError, match="'nothing' is no token"):
        tune(vlm, "prompt", placeholder="nothing")
    before = logits(vlm)
    with tune(vlm, "norm"), pytest.raises(LoadError, match="has an adapter already"):
        tune(vlm, "lora")
    assert torch.equal(logits(vlm), before)


def test_adapters_of_another_base_method_or_rank_are_refused():
    vlm = tiny_llava()
    with tune(vlm, "lora", rank=2) as tuning:
        state = tuning.state()
        with pytest.raises(InputError, match="models differ: other and tiny-llava"):
            tuning.load(state, base="other")
    with tune(vlm, "lora", rank=1) as tuning, pytest.raises(InputError, match="has shape"):
        tuning.load(state)
    with tune(vlm, "norm") as tuning, pytest.raises(InputError, match="None there"):
        tuning.load(state)


def test_what_fails_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    vlm = tiny_llava()
    before = logits(vlm)

    def fail(vlm, options, back):
        module._norm(vlm, options, back)
        raise InputError("no such layer", "give another")

    monkeypatch.setitem(TUNINGS, "norm", fail)
    with pytest.raises(InputError, match="no such layer"):
        tune(vlm, "norm")
    monkeypatch.undo()
    assert not hasattr(vlm.model.model.language_model.norm, "parametrizations")
    with tune(vlm, "bias"):
        assert torch.equal(logits(vlm), before)
