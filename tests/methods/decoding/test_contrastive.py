"""Contrastive decoding against the formula in float64, and against whole forwards without a
cache.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.contract.reference import case
from tests.support.tiny import PROMPTS, lively, tiny_llava
from tests.zoo import SUPPRESS, extended
from xlvlms_tutorial import interventions
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.decoding import ICD, VCD, ContrastiveDecoding, contrast, distorted
from xlvlms_tutorial.models import anatomy

PICTURES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green", "white")]
STEPS = 5


@pytest.fixture
def vlm():
    return lively(tiny_llava())


def by_hand(vlm, first, second, alpha, beta, steps=STEPS):
    """Ids of a generation whose every step is two forwards over everything, without a cache."""
    end = vlm.tokenizer.eos_token_id
    suppressed = vlm.model.generation_config.suppress_tokens
    new = torch.zeros(len(first["input_ids"]), 0, dtype=torch.long)
    for _ in range(steps):
        rows = []
        for batch in (first, second):
            inputs = dict(batch)
            inputs["input_ids"] = torch.cat([batch["input_ids"], new], dim=1)
            more = torch.ones_like(new)
            inputs["attention_mask"] = torch.cat([batch["attention_mask"], more], dim=1)
            mask = inputs["attention_mask"]
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
            with torch.no_grad():
                rows.append(vlm.model(**inputs, use_cache=False).logits[:, -1].double())
        logits, disturbed = rows
        logits[:, suppressed] = -math.inf
        probabilities = logits.softmax(dim=-1)
        scores = (1 + alpha) * logits - alpha * disturbed
        plausible = probabilities >= beta * probabilities.amax(dim=-1, keepdim=True)
        scores[~plausible] = -math.inf
        new = torch.cat([new, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert end in suppressed  # so no row ends early
    return new


def test_the_formula_on_made_up_logits_in_float64():
    random = np.random.default_rng(0)
    logits, disturbed = random.normal(0, 3, (2, 7, 50))
    for alpha, beta in [(0.0, 0.0), (0.5, 0.1), (1.0, 0.01), (3.0, 0.5), (1.0, 1.0)]:
        result = contrast(torch.tensor(logits), torch.tensor(disturbed), alpha, beta).numpy()
        for row in range(7):
            p = np.exp(logits[row]) / np.exp(logits[row]).sum()
            for token in range(50):
                expected = logits[row, token] + alpha * (logits[row, token] - disturbed[row, token])
                if p[token] < beta * p.max():
                    expected = -math.inf
                assert result[row, token] == pytest.approx(expected, abs=1e-12)


def test_the_cut_leaves_what_is_plausible_without_the_second_branch():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    disturbed = torch.tensor([[100.0, 50.0, 0.0, -200.0]], dtype=torch.float64)
    kept = [
        contrast(probabilities.log(), disturbed, 1.0, beta).isfinite().sum().item()
        for beta in (0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 1.0)
    ]
    assert kept == [4, 4, 3, 3, 2, 2, 1, 1]
    assert contrast(probabilities.log(), disturbed, 1.0, 0.2).argmax() == 2


def test_a_suppressed_token_stays_suppressed():
    logits = torch.tensor([1.0, -math.inf, 0.0])
    disturbed = torch.tensor([5.0, -math.inf, -5.0])
    assert contrast(logits, disturbed, 1.0, 0.0).tolist() == [-3.0, -math.inf, 5.0]


@pytest.mark.parametrize("decoding", [VCD(alpha=0), ICD(alpha=0, beta=0), VCD(3, beta=1)])
def test_without_strength_or_with_the_whole_cut_it_is_greedy(vlm, decoding):
    expected = vlm.generate(PICTURES, PROMPTS, STEPS)
    assert vlm.generate(PICTURES, PROMPTS, STEPS, decoding=decoding) == expected


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_every_step_of_vcd_is_that_of_two_whole_forwards(vlm, beta):
    batch = vlm.batch(PICTURES, PROMPTS)
    second = distorted(batch, 0.9)
    ids = by_hand(vlm, batch, second, 2.0, beta)
    assert not torch.equal(ids, by_hand(vlm, batch, second, 0.0, beta))
    expected = [text.strip() for text in vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    decoding = VCD(2.0, beta, noise=0.9)
    assert vlm.generate(PICTURES, PROMPTS, STEPS, decoding=decoding) == expected
    assert vlm.generate(PICTURES, PROMPTS, STEPS, batch_size=3, decoding=decoding) == expected


def test_every_step_of_icd_is_that_of_two_whole_forwards(vlm):
    instruction = "a blue woman is in the key ."
    batch = vlm.batch(PICTURES, PROMPTS)
    second = vlm.batch(PICTURES, [f"{instruction} {text}" for text in PROMPTS])
    ids = by_hand(vlm, batch, second, 2.0, 0.01)
    assert not torch.equal(ids, by_hand(vlm, batch, second, 0.0, 0.01))
    expected = [text.strip() for text in vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    decoding = ICD(2.0, 0.01, instruction)
    assert vlm.generate(PICTURES, PROMPTS, STEPS, decoding=decoding) == expected
    assert vlm.generate(PICTURES, PROMPTS, STEPS, batch_size=1, decoding=decoding) == expected


def test_prompts_that_share_a_picture_answer_as_alone(vlm):
    pictures = [PICTURES[0], PICTURES[1], PICTURES[0], PICTURES[0]]
    alone = [picture.copy() for picture in pictures]
    for decoding in (VCD(2.0, 0.01, 0.9), ICD(2.0, 0.01, "a blue key")):
        expected = vlm.generate(alone, PROMPTS, STEPS, decoding=decoding)
        assert vlm.generate(pictures, PROMPTS, STEPS, decoding=decoding) == expected


def test_a_step_costs_one_token_of_the_second_branch(vlm):
    lengths = []
    decoder = anatomy.decoder(vlm.model)

    def counted(module, args, kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])

    decoder.register_forward_pre_hook(counted, with_kwargs=True)
    batch = vlm.batch(PICTURES[:2], PROMPTS[:2])
    second = vlm.batch(PICTURES[:2], ["a blue key " + text for text in PROMPTS[:2]])
    processor = ContrastiveDecoding(vlm, second)
    vlm.generate_ids(batch, 3, logits_processor=[processor])
    n = batch["input_ids"].shape[1]
    assert lengths == [n, n + 3, 1, 1, 1, 1]


def test_a_processor_serves_a_second_generation(vlm):
    batch = vlm.batch(PICTURES, PROMPTS)
    processor = ContrastiveDecoding(vlm, distorted(batch, 0.9), 2.0, 0.0)
    first = vlm.generate_ids(batch, 4, logits_processor=[processor])
    assert torch.equal(vlm.generate_ids(batch, 4, logits_processor=[processor]), first)
    assert vlm.running is None


def test_it_is_a_processor_of_transformers(vlm):
    batch = vlm.batch(PICTURES, PROMPTS)
    second = distorted(batch, 0.9)
    ids = vlm.model.generate(
        **batch,
        max_new_tokens=STEPS,
        logits_processor=[ContrastiveDecoding(vlm, second, 2.0, 0.0)],
    )
    new = ids[:, batch["input_ids"].shape[1] :]
    assert torch.equal(new, by_hand(vlm, batch, second, 2.0, 0.0))


def test_an_intervention_acts_on_both_branches_at_their_own_positions(vlm):
    batch = vlm.batch(PICTURES, PROMPTS)
    second = vlm.batch(PICTURES, ["a blue key " + text for text in PROMPTS])
    vector = torch.linspace(-3, 3, vlm.width)

    def logits_of(batch):
        with interventions.add(vlm, vector, 2, positions="question"):
            return vlm.forward(batch).logits[:, -1]

    expected = contrast(logits_of(batch), logits_of(second), 1.5, 0.0)
    processor = ContrastiveDecoding(vlm, second, 1.5, 0.0)
    with interventions.add(vlm, vector, 2, positions="question"), vlm.run(batch):
        result = processor(batch["input_ids"], vlm.model(**batch).logits[:, -1])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "mllama", "gemma3", "idefics3"])
def test_the_second_cache_is_right_in_other_architectures(name):
    tiny = case(name)
    first = tiny.batch
    second = distorted(first, 0.9)
    processor = ContrastiveDecoding(tiny.vlm, second, 1.0, 0.0)
    seen = []
    original = processor._next_logits

    def recorded(ids):
        seen.append(original(ids))
        return seen[-1]

    processor._next_logits = recorded
    options = {"min_new_tokens": 4, "suppress_tokens": SUPPRESS}
    new = tiny.vlm.generate_ids(first, 4, logits_processor=[processor], **options)
    with torch.no_grad():
        inputs = extended(name, dict(second), new[:, :-1])
        whole = tiny.vlm.model(**inputs, use_cache=False).logits[:, tiny.length - 1 :]
    torch.testing.assert_close(torch.stack(seen, dim=1), whole, rtol=1e-3, atol=1e-4)


def test_noise_is_that_of_the_formula_and_belongs_to_the_picture(vlm):
    batch = vlm.batch(PICTURES, PROMPTS)
    pixels = batch["pixel_values"]
    noisy = {n: distorted(batch, n)["pixel_values"] for n in (0.0, 0.36, 1.0)}
    assert torch.equal(noisy[0.0], pixels)
    torch.testing.assert_close(noisy[0.36], 0.8 * pixels + 0.6 * noisy[1.0])
    assert abs(noisy[1.0].std() - 1) < 0.02
    assert abs(noisy[1.0].mean()) < 0.02
    swapped = distorted(vlm.batch(PICTURES[2:0:-1], PROMPTS[:2]), 1.0)["pixel_values"]
    assert torch.equal(swapped, noisy[1.0][[2, 1]])
    assert not torch.equal(noisy[1.0][0], noisy[1.0][1])
    assert not torch.equal(distorted(batch, 1.0, seed=1)["pixel_values"], noisy[1.0])
    assert torch.equal(batch["pixel_values"], pixels)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: VCD(alpha=-0.1), "alpha is -0.1; give a finite"),
        (lambda: VCD(alpha=math.nan), "alpha is nan"),
        (lambda: ICD(alpha=math.inf), "alpha is inf"),
        (lambda: ICD(beta=1.1), "beta is 1.1; give a share from 0"),
        (lambda: VCD(beta=-0.1), "beta is -0.1"),
        (lambda: VCD(beta=math.nan), "beta is nan"),
        (lambda: VCD(noise=2), "noise is 2"),
        (lambda: ICD(instruction=" "), "the instruction is ' '"),
        (lambda: contrast(torch.zeros(2), torch.zeros(2), alpha=-1), "alpha is -1"),
        (lambda: contrast(torch.zeros(2), torch.zeros(2), beta=2), "beta is 2"),
    ],
)
def test_numbers_outside_their_range_are_refused(make, problem):
    with pytest.raises(InputError, match=problem):
        make()


def test_there_has_to_be_a_picture_to_distort(vlm):
    batch = vlm.tokenizer(["the key is", "red"], return_tensors="pt", padding=True)
    with pytest.raises(InputError, match="no picture to distort; give a picture"):
        distorted(vlm.prepare(batch), 0.5)
    with pytest.raises(InputError, match="no picture to distort"):
        vlm.generate(None, ["the key is"], 2, decoding=VCD())


def test_other_rows_than_those_of_the_second_branch_are_refused(vlm):
    batch = vlm.batch(PICTURES, PROMPTS)
    processor = ContrastiveDecoding(vlm, distorted(batch))
    with pytest.raises(InputError, match=r"8 continuations for 4 prompts .*num_beams=1"):
        vlm.generate_ids(batch, 2, num_beams=2, logits_processor=[processor])


@pytest.mark.parametrize("name", ["blip2", "janus"])
def test_a_model_that_generates_by_its_own_rules_is_refused(name):
    tiny = case(name)
    with pytest.raises(InputError, match="which generates by rules of its own; choose a model"):
        ContrastiveDecoding(tiny.vlm, tiny.batch)
