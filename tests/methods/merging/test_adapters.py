"""LoRA experts mixed on a model: exact in the space of weights, as peft's "cat", not "linear"."""

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.errors import InputError, LoadError
from xlvlms_tutorial.methods.merging import adapter_changes, mixed

PICTURE = Image.new("RGB", (32, 32), (200, 30, 30))
RANKS = {"captions": 2, "questions": 3}


def with_experts(**options):
    """A tiny LLaVA with two LoRA experts of different ranks, switched off."""
    vlm = tiny_llava()
    torch.manual_seed(0)
    for name, rank in RANKS.items():
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], **options
        )
        vlm.model.add_adapter(config, adapter_name=name)
    for name, weight in vlm.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.2)
    vlm.model.disable_adapters()
    vlm.model.requires_grad_(False)
    return vlm


@pytest.fixture(scope="module")
def vlm():
    return with_experts()


def logits(vlm):
    with torch.no_grad():
        return vlm.forward(vlm.batch([PICTURE], ["a red key"])).logits


def with_dense_change(shares):
    """The logits of a model whose weights were changed by hand."""
    vlm = with_experts()
    total = {}
    for expert, share in shares.items():
        for name, change in adapter_changes(vlm, expert).items():
            total[name] = total.get(name, 0) + share * change
    modules = dict(vlm.model.named_modules())
    for name, change in total.items():
        modules[name].base_layer.weight.data += change
    return logits(vlm)


def test_a_change_is_the_scaled_product_of_the_factors(vlm):
    changes = adapter_changes(vlm, "questions")
    modules = dict(vlm.model.named_modules())
    assert changes
    for name, change in changes.items():
        a = modules[name].lora_A["questions"].weight.double()
        b = modules[name].lora_B["questions"].weight.double()
        torch.testing.assert_close(change.double(), 2 * b @ a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "shares",
    [
        {"captions": 1.0},
        {"captions": 0.3, "questions": 0.7},
        {"questions": -0.5},
        {"captions": 1.0, "questions": 1.0},
    ],
)
def test_a_mixture_is_that_of_the_weights(vlm, shares):
    with mixed(vlm, shares):
        mixture = logits(vlm)
    torch.testing.assert_close(mixture, with_dense_change(shares), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixture, logits(vlm), atol=1e-3)


def test_peft_cat_is_the_same_and_peft_linear_is_not():
    # upstream: "linear" sums the factors, which adds the products of one's B and the other's A
    vlm = tiny_llava()
    from peft import get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(vlm.model, config, adapter_name="captions")
    model.add_adapter("questions", config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.2)
    shares = [0.5, 0.5]
    distances = {}
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(["captions", "questions"], shares, kind, combination_type=kind)
        distance, length = 0.0, 0.0
        for module in model.modules():
            if not hasattr(module, "lora_A") or kind not in module.lora_A:
                continue
            exact = sum(0.5 * module.get_delta_weight(name) for name in ("captions", "questions"))
            distance += (module.get_delta_weight(kind) - exact).square().sum().item()
            length += exact.square().sum().item()
        distances[kind] = (distance / length) ** 0.5
    assert distances["cat"] < 1e-5
    assert distances["linear"] > 0.3


def test_the_model_is_as_before_also_after_an_error(vlm):
    before, name = logits(vlm), vlm.name
    with pytest.raises(ZeroDivisionError), mixed(vlm, {"captions": 1.0}):
        assert vlm.name.endswith("+ 1 captions")
        1 / 0  # noqa: B018
    assert torch.equal(logits(vlm), before) and vlm.name == name
    assert not any(weight.requires_grad for weight in vlm.model.parameters())


def test_a_mixture_inside_a_mixture_replaces_it_and_gives_it_back(vlm):
    with mixed(vlm, {"captions": 0.5}):
        outer = logits(vlm)
        with mixed(vlm, {"questions": 1.0}):
            assert not torch.allclose(logits(vlm), outer, atol=1e-3)
        assert torch.equal(logits(vlm), outer)


@pytest.mark.parametrize(
    ("shares", "message"),
    [({}, "no shares"), ({"captions": float("nan")}, "nan"), ({"captions": float("inf")}, "inf")],
)
def test_shares_that_are_no_numbers_are_refused(vlm, shares, message):
    with pytest.raises(InputError, match=message), mixed(vlm, shares):
        pass


def test_an_expert_that_is_not_there_is_refused(vlm):
    with pytest.raises(LoadError, match="no expert 'style'.*captions, questions"):
        adapter_changes(vlm, "style")
    with pytest.raises(LoadError, match="it has none"), mixed(tiny_llava(), {"captions": 1.0}):
        pass


def test_a_dora_is_refused():
    vlm = with_experts(use_dora=True)
    with pytest.raises(LoadError, match="is a DoRA"), mixed(vlm, {"captions": 1.0}):
        pass
