"""The ladder of tunings: what each rung trains, what it leaves alone, and what its records say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.contract.reference import traces
from tests.support.tiny import lively, tiny_llava
from xlvlms_tutorial.claims import claims
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.steering.representation_tuning import frozen
from xlvlms_tutorial.models import loss_of
from xlvlms_tutorial.samples import Question, Sample
from xlvlms_tutorial.tutorials import Experiment, tuning_ladder
from xlvlms_tutorial.tutorials.learned_steering import Item
from xlvlms_tutorial.tutorials.tuning_ladder import (
    BASELINES,
    LAST,
    REFERENCE,
    RUNGS,
    PromptCache,
    Rung,
    attached,
    draw,
    encoded_once,
    forced_success,
    ladder,
    load_ladder,
    margins,
    record_margins,
    train,
)
from xlvlms_tutorial.view import plots

D, D_KEYS, D_MLP = 32, 16, 64
COUNTS = {
    "loreft": 2 * (2 * 4 * D + 4),  # of the shares of three blocks two layers remain
    "direft": 2 * (2 * 4 * D + 4),
    "constant": 2 * (4 * D + 4),
    "lora": 3 * 4 * (2 * D + D + D_KEYS),
    "ia3": 3 * (2 * D_KEYS + D_MLP),
    "prompt": 8 * D,
}
KINDS = [Rung(kind, kind, (0.05,), 4) for kind in COUNTS]


def item(number: int, target: str) -> Item:
    image = Image.new("RGB", (32, 32), (60 * number, 10, 200))
    question = Question("colour", "What colour is the key ?", "red")
    return Item(Sample(f"s{number}", image, questions=(question,)), "plain", target, "yes")


PROMPTS = ("What colour is the key ?", "What is it ?", "Where is the red key ?", "Is it blue ?")


def replace_prompt(one: Item, text: str) -> Item:
    question = Question("colour", text, "red")
    return replace(one, sample=replace(one.sample, questions=(question,)))


ITEMS = [item(0, "red"), item(1, "a woman"), item(2, "no"), item(3, "a blue key")]


@pytest.fixture
def vlm(monkeypatch):
    monkeypatch.setattr(tuning_ladder, "VIRTUAL", "<unk>")
    monkeypatch.setattr(tuning_ladder, "LAYERS", (0.4, 0.5, 0.6))
    return lively(tiny_llava())


@pytest.mark.parametrize("rung", KINDS, ids=lambda rung: rung.kind)
def test_a_rung_trains_its_parameters_alone_and_leaves_nothing(vlm, rung):
    before = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    with attached(rung, vlm) as parameters:
        assert sum(weight.numel() for weight in parameters.values()) == COUNTS[rung.kind]
        start = forced_success(rung, vlm, ITEMS)[1]
        assert train(rung, vlm, parameters, ITEMS, 0.05, steps=25) > 0
        assert forced_success(rung, vlm, ITEMS)[1] < start - 0.05
    after = vlm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert traces(vlm) == []
    assert type(vlm.blocks[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize("rung", KINDS[:5], ids=lambda rung: rung.kind)
def test_a_rung_begins_where_the_model_is(vlm, rung):
    batch = vlm.batch([ITEMS[0].image], [ITEMS[0].prompt])
    plain = vlm.forward(batch).logits
    with attached(rung, vlm):
        torch.testing.assert_close(vlm.forward(batch).logits, plain, atol=1e-5, rtol=0)


def test_the_same_seed_draws_the_same_parameters(vlm):
    for rung in KINDS[:4]:
        drawn = []
        for seed in (0, 0, 1):
            with attached(rung, vlm, seed) as parameters:
                drawn.append(
                    torch.cat([weight.detach().flatten() for weight in parameters.values()])
                )
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_learned_tokens_stand_where_their_places_are(vlm):
    rung = KINDS[-1]
    batch = vlm.batch([ITEMS[0].image], [rung.prefix + ITEMS[0].prompt])
    assert int((batch["input_ids"] == vlm.tokenizer.unk_token_id).sum()) == 8
    states = []
    hook = vlm.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.append((args or [kwargs["hidden_states"]])[0]),
        with_kwargs=True,
    )
    with attached(rung, vlm) as parameters:
        (table,) = parameters.values()
        vlm.forward(batch)
        answers = vlm.generate([ITEMS[0].image], [rung.prefix + ITEMS[0].prompt], 3)
    hook.remove()
    places = (batch["input_ids"] == vlm.tokenizer.unk_token_id)[0]
    assert torch.equal(states[0][0][places], table.detach())
    embedded = vlm.model.get_input_embeddings().weight[batch["input_ids"][0]]
    words = ~places & (batch["input_ids"][0] != vlm.image_token_id)
    assert torch.equal(states[0][0][words], embedded[words])
    assert len(answers) == 1


def test_forced_success_is_that_of_greedy_answers(vlm):
    answers = vlm.generate([i.image for i in ITEMS], [i.prompt for i in ITEMS], 3)
    one = len(vlm.tokenizer(answers[0], add_special_tokens=False).input_ids)
    assert one == 3  # not ended by itself: the target's end is not what the model would say
    share, loss = forced_success(KINDS[0], vlm, [item(0, answers[0])])
    log_probs = []
    batch = vlm.batch([ITEMS[0].image], [ITEMS[0].prompt], [answers[0] + "<|im_end|>"])
    logits = vlm.forward(batch).logits[0].double().log_softmax(-1)
    for place in batch.mask("answer")[0].nonzero().flatten().tolist():
        log_probs.append(logits[place - 1, batch["input_ids"][0, place]].item())
    assert loss == pytest.approx(-np.mean(log_probs), abs=1e-4) and len(log_probs) == 4
    ends = log_probs[-1] == logits[-1 - (batch["input_ids"].shape[1] - 1 - place)].max().item()
    assert share in (0.0, 1.0) and (share == 0.0 or ends)


def test_each_picture_is_encoded_once(vlm):
    batch = vlm.batch([i.image for i in ITEMS], [i.prompt for i in ITEMS])
    plain, calls = vlm.forward(batch).logits, []
    hook = vlm.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with encoded_once(vlm):
        for _ in range(3):
            torch.testing.assert_close(vlm.forward(batch).logits, plain, atol=1e-5, rtol=0)
    hook.remove()
    assert len(calls) == len(ITEMS)
    assert "get_image_features" not in vars(vlm.model.model)


@pytest.mark.parametrize("rung", KINDS[:3], ids=lambda rung: rung.kind)
def test_training_from_the_cache_is_training_on_whole_prompts(vlm, rung):
    """Prompts and targets differ in length, so that the cache is cut and padded."""
    items = [replace_prompt(one, text) for one, text in zip(ITEMS, PROMPTS, strict=True)]
    cache = PromptCache(vlm, items, last=LAST)
    rows = [2, 0, 3]
    with frozen(vlm.model), attached(rung, vlm, seed=1) as parameters:
        for weight in parameters.values():
            if weight.ndim == 1 or not weight.any():  # the start is the identity
                torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
        batch = [items[row] for row in rows]
        targets = [one.target for one in batch]
        whole = loss_of(vlm, [i.sample for i in batch], [i.prompt for i in batch], targets)
        expected = torch.autograd.grad(whole, list(parameters.values()))
        fast = cache.loss(rows)
        gradients = torch.autograd.grad(fast, list(parameters.values()))
    torch.testing.assert_close(fast, whole, atol=1e-5, rtol=0)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-3)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3


def test_prompts_before_the_tuned_positions_run_once(vlm):
    cache, lengths = PromptCache(vlm, ITEMS), []
    hook = vlm.blocks[0].register_forward_hook(lambda m, a, out: lengths.append(a[0].shape[1]))
    with torch.no_grad():
        cache.loss([0, 1])
    hook.remove()
    longest = max(len(vlm.tokenizer(ITEMS[row].target).input_ids) for row in (0, 1)) + 1
    assert lengths == [LAST + longest]


def run(name: str, seed: int, digits: str, parameters: int = 10) -> dict:
    value = np.mean([int(digit) for digit in digits])
    table = {
        "capitals": {"capitals": 0.75, "plain": 0.25},
        "plain": {"capitals": 0.0, "plain": 1.0},
    }
    return {
        "rung": name,
        "seed": seed,
        "parameters": parameters,
        "rate": 0.01,
        "seconds": 1.0 + seed,
        "successes": digits,
        "success": value,
        "by_class": {"capitals": value, "plain": 1.0},
        "leakage": table,
        "kl": 0.5 * seed,
        "other": 1.0,
    }


def made(loreft: str = "11110111", lora: str = "11010101") -> dict:
    base = run("", 0, "00000001")
    for key in ("rung", "seed", "parameters", "rate", "seconds"):
        base.pop(key)
    runs = [run(BASELINES["LoRA at full size"], seed, lora, 1000) for seed in (0, 1)]
    runs += [run(REFERENCE, seed, loreft) for seed in (0, 1)]
    return {"settings": {"labels": 180}, "base": base, "runs": runs}


def test_the_table_has_means_over_seeds_from_few_parameters_to_many():
    table = ladder(made())
    assert table.index.tolist() == ["no tuning", REFERENCE, BASELINES["LoRA at full size"]]
    assert table["parameters"].tolist() == [0, 10, 1000]
    assert table["labels"].tolist() == [0, 180, 180] and table["seeds"].tolist() == [1, 2, 2]
    assert table["success"].tolist() == [1 / 8, 7 / 8, 5 / 8]
    assert table.loc[REFERENCE, "seconds"] == 1.5 and table.loc[REFERENCE, "kl"] == 0.25
    assert table["leakage"].tolist() == [0.125] * 3
    assert (table["low"] <= table["success"]).all() and (table["success"] <= table["high"]).all()


def test_margins_are_paired_by_question():
    margin = margins(made())["LoRA at full size"]
    assert margin.value == 2 / 8 and margin.low < margin.value < margin.high
    equal = margins(made("10101010", "10101010"))["LoRA at full size"]
    assert (equal.value, equal.low, equal.high) == (0, 0, 0)
    assert set(margins(made())) == {"LoRA at full size"}


def test_where_seeds_differ_the_interval_is_wider():
    narrow, wide = made("11110000", "10000000"), made("11110000", "10000000")
    wide["runs"][2]["successes"], wide["runs"][3]["successes"] = "11111111", "00000000"
    estimates = [margins(records)["LoRA at full size"] for records in (narrow, wide)]
    assert estimates[0].value == estimates[1].value
    assert estimates[1].high - estimates[1].low > 1.3 * (estimates[0].high - estimates[0].low)


def test_without_the_reference_there_are_no_margins():
    records = made()
    records["runs"] = records["runs"][:2]
    with pytest.raises(InputError, match="LoReFT, r = 4"):
        margins(records)


def test_margins_are_recorded_for_the_model_of_the_records_alone(monkeypatch, tmp_path):
    monkeypatch.setenv(claims.FOLDER_VARIABLE, str(tmp_path))
    records = made()
    records["settings"]["model"] = "pocket-llava"
    here = Experiment("learned-steering", "pocket-llava", "scenes")
    assert set(record_margins(here, records)) == {"LoRA at full size"}
    assert here.verdict("LEARN-4", "LoReFT against LoRA at full size") == "confirmed"
    assert [record["against"] for record in here.records] == [BASELINES["LoRA at full size"]]
    for model, dataset in (("other", "scenes"), ("pocket-llava", "other")):
        elsewhere = Experiment("learned-steering", model, dataset)
        assert record_margins(elsewhere, records) == {} and elsewhere.records == []


def test_each_rung_is_drawn_at_its_parameters_and_success():
    figure, (ax,) = plots.panels(1)
    draw(ax, ladder(made()))
    labels = ax.get_legend_handles_labels()[1]
    assert labels == [REFERENCE, BASELINES["LoRA at full size"]]
    points = [line.get_xydata()[0].tolist() for line in ax.containers[0].lines[:1]]
    assert points == [[10, 7 / 8]] and ax.get_xscale() == "log"
    figure.clear()


def test_shipped_records_are_of_these_rungs_and_say_what_their_digits_say():
    records = load_ladder()
    rungs = {rung.name: rung for rung in RUNGS}
    assert {REFERENCE, *list(BASELINES.values())[:2]} <= {run["rung"] for run in records["runs"]}
    for one in records["runs"]:
        digits = [int(digit) for digit in one["successes"]]
        assert one["success"] == pytest.approx(np.mean(digits), abs=1e-4)
        rates = {str(rate) for rate in rungs[one["rung"]].rates}
        assert one["trials"].keys() == (rates if one["seed"] == 0 else set())
        if one["trials"]:
            assert one["rate"] == float(min(one["trials"], key=one["trials"].get))
