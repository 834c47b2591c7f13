"""Plans, the authors' names for them, and the choice of layers.

Closed forms, models with blocks removed, double loops.
"""

from contextlib import nullcontext
from importlib import import_module
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tests.contract.reference import GENERATION, apart, case, generated, traces
from tests.support.tiny import redrawn, tiny_llava
from tests.zoo import build, padded
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InputError, InterventionError, LayerError, SpanError
from xlvlms_tutorial.interventions.edits import add
from xlvlms_tutorial.interventions.skipping import parallel, skip
from xlvlms_tutorial.interventions.token_skipping import skip_tokens
from xlvlms_tutorial.methods.skipping import (
    SkipPlan,
    block_similarity,
    every_nth_layer,
    greedy_layer_order,
    layer_importance,
    random_layers,
    rank_by_similarity,
)
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.finetune import loss_of
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.tutorials.upstream import from_upstream

# the package offers a function of this name
module = import_module("xlvlms_tutorial.methods.skipping.effects")

PROMPT = "Describe the picture ."
CAPTIONS = ("red key on the grass", "a woman", "blue key in the grass", "a red picture")
TEXTS = ["a woman on the grass", "red key", "the picture is blue"]
L = 4


@pytest.fixture(scope="module")
def vlm():
    """A tiny LLaVA of four layers that matter."""
    return redrawn(tiny_llava(layers=L), seed=1)


@pytest.fixture(scope="module")
def samples():
    pictures = [
        Image.new("RGB", (32, 32), (k * 60, 90, 200 - k * 50)) for k in range(len(CAPTIONS))
    ]
    return [
        Sample(str(k), picture, captions=(text,))
        for k, (picture, text) in enumerate(zip(pictures, CAPTIONS, strict=True))
    ]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(vlm):
    yield
    assert traces(vlm) == []


# Every so many layers


@pytest.mark.parametrize(
    ("interval", "start", "n"),
    [(1, 0, 30), (2, 0, 15), (3, 0, 10), (4, 0, 7), (2, 4, 13), (2, 8, 11), (4, 4, 6), (60, 0, 0)],
)
def test_the_papers_counts_of_32_layers(interval, start, n):
    assert len(every_nth_layer(32, interval, start)) == n


def test_every_second_of_32_in_our_numbers():
    assert every_nth_layer(32, 2) == list(range(3, 32, 2))
    assert every_nth_layer(32, [2, 60]) == list(
        range(3, 17, 2)
    )  # idx 2 to 14 of the first half, 0 to 15
    assert every_nth_layer(32, 1, 3, 6) == [5, 6]


@given(
    n=st.integers(1, 40),
    interval=st.integers(1, 45),
    start=st.integers(0, 40),
    end=st.integers(0, 40) | st.none(),
)
@settings(max_examples=60, deadline=None)
def test_every_is_the_rule_read_off_word_by_word(n, interval, start, end):
    if max(start, end or 0) > n:
        with pytest.raises(LayerError):
            every_nth_layer(n, interval, start, end)
        return
    stop = n - 1 if end is None else end
    assert every_nth_layer(n, interval, start, end) == [
        k + 1 for k in range(n) if start < k < stop and k >= 1 and k % interval == 0
    ]


@pytest.mark.parametrize("interval", [0, -2, [], [2, 0], [1] * 5])
def test_intervals_that_are_none(interval):
    with pytest.raises(InputError, match="interval"):
        every_nth_layer(4, interval)


def test_a_model_without_layers():
    with pytest.raises(InputError, match="0 layers"):
        every_nth_layer(0, 2)


# Plans


def contexts(vlm):
    """Plans with what they must be the same as."""
    return [
        (SkipPlan((2,)), skip(vlm, 2)),
        (SkipPlan((1, 3), "mlp", "decode"), skip(vlm, [1, 3], "mlp", "decode")),
        (SkipPlan((2,), "attention", "prefill"), skip(vlm, 2, "attention", "prefill")),
        (
            SkipPlan((2,), scope="prefill", cache="previous"),
            skip(vlm, 2, scope="prefill", cache="previous"),
        ),
        (SkipPlan((2,), "parallel", norm="second"), parallel(vlm, 2, "second")),
        (
            SkipPlan((1, 2), "mlp", span="image", share=0.5, seed=3),
            skip_tokens(vlm, [1, 2], 0.5, seed=3),
        ),
        (
            SkipPlan((1,), "mlp", span="question", n_tokens=2),
            skip_tokens(vlm, 1, span="question", n_tokens=2),
        ),
        (SkipPlan(()), nullcontext()),
    ]


def test_plans_are_what_they_name():
    example = case("llava")
    for plan, context in contexts(example.vlm):
        with plan.apply(example.vlm):
            plain = generated(example)[1]
        with context:
            assert torch.equal(generated(example)[1], plain), plan
    assert traces(example.vlm) == []


def test_plans_by_scope_hold_in_that_phase_alone():
    example = case("llava")
    dense_ids, dense = generated(example)
    for part in ("block", "mlp", "attention", "parallel", "pairs"):
        with SkipPlan((2,), part, "decode").apply(example.vlm):
            ids, logits = generated(example)
        assert torch.equal(logits[:, 0], dense[:, 0]), part
        assert not torch.equal(logits[:, 1], dense[:, 1]), part
        with SkipPlan((2,), part, "prefill").apply(example.vlm):
            first = generated(example)[1][:, 0]
        with SkipPlan((2,), part).apply(example.vlm):
            both = generated(example)[1][:, 0]
        assert torch.equal(first, both) and apart(first, dense[:, 0]) > 1e-3, part


def test_plans_tell_what_they_are():
    texts = {
        SkipPlan((3, 5, 7, 9, 11)): "no block in layers 3, 5, ..., 11, in prefill and decode steps",
        SkipPlan(
            (2, 3), "mlp", span=("image", "question"), share=0.25
        ): "no MLP at 25% of image and question in layers 2, 3, in the prefill",
        SkipPlan(
            (2,), "attention", "decode", norm="first"
        ): "no attention in layers 2, in decode steps, MLP through the first norm",
        SkipPlan(
            (2,), scope="prefill", cache="previous"
        ): "no block in layers 2, in the prefill, cache of the previous block",
        SkipPlan((), "mlp"): "nothing left out",
    }
    assert {plan: str(plan) for plan in texts} == texts


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"part": "blocks"},
            InputError,
            "unknown part 'blocks'; allowed: block, mlp, attention, parallel, pairs",
        ),
        ({"scope": "prompt"}, InputError, "unknown scope 'prompt'"),
        ({"cache": "prev"}, InputError, "unknown cache"),
        ({"norm": "third"}, InputError, "unknown norm"),
        ({"norm": "first"}, InputError, "norm 'first' for part 'block'"),
        ({"part": "mlp", "cache": "previous"}, InputError, "cache 'previous' for part 'mlp'"),
        ({"layers": (0,)}, InputError, "layer 0 of a plan"),
        ({"layers": (True,)}, InputError, "layer True"),
        ({"layers": (2, 2)}, InputError, "repeat"),
        ({"layers": (1, 2), "part": "pairs"}, InputError, "overlap"),
        ({"span": "image"}, InputError, "only MLPs"),
        ({"part": "mlp", "span": "image", "scope": "decode"}, InputError, "only MLPs"),
        ({"part": "mlp", "span": "picture"}, SpanError, "picture"),
        ({"part": "mlp", "span": "image", "share": 2}, InputError, "share 2"),
        ({"share": 0.5}, InputError, "share of no span"),
    ],
)
def test_plans_that_make_no_sense(values, error, message):
    with pytest.raises(error, match=message):
        SkipPlan(**{"layers": (1,)} | values)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (SkipPlan(tuple(range(1, L + 1))), InputError, "all 4 blocks skipped leaves no model"),
        (SkipPlan((5,)), LayerError, "layer 5 is not one of 1 to 4"),
        (SkipPlan((4,), "pairs"), LayerError, "layer 5"),
    ],
)
def test_plans_for_another_model(vlm, plan, error, message):
    for use in (plan.check, lambda vlm: plan.apply(vlm).__enter__()):
        with pytest.raises(error, match=message):
            use(vlm)


def test_all_mlps_may_go(vlm):
    SkipPlan(tuple(range(1, L + 1)), "mlp").check(vlm)


# What a skipped block is


def without(name, gone):
    """The model with blocks taken out and the others numbered anew."""
    model, inputs = build(name)
    stack = anatomy.decoder(model)
    stack.layers = nn.ModuleList(block for k, block in enumerate(stack.layers, 1) if k not in gone)
    for k, block in enumerate(stack.layers):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = k
    stack.config.num_hidden_layers = model.config.get_text_config(
        decoder=True
    ).num_hidden_layers = len(stack.layers)
    vlm = VLM(model, None, name)
    batch = vlm.prepare(padded(name, inputs))
    return case(name)._replace(vlm=vlm, batch=batch)


@pytest.mark.parametrize("name", ["llava", "blip2", "idefics3", "paligemma", "internvl"])
def test_skipped_blocks_are_blocks_that_are_not_there_in_prefill_and_decode_steps(name):
    example = case(name)
    for gone in ([1], [1, 3]):
        with SkipPlan(tuple(gone)).apply(example.vlm):
            ids, logits = generated(example)
        expected, theirs = generated(without(name, gone))
        assert torch.equal(ids, expected) and apart(logits, theirs) < 1e-5, gone


@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_a_skipped_mlp_is_one_whose_last_weights_are_zero(name):
    example, without_weights = case(name), case(name)
    with torch.no_grad():
        for weight in anatomy.mlp_exit(without_weights.vlm.blocks[1]).parameters():
            weight.zero_()
    with SkipPlan((2,), "mlp").apply(example.vlm):
        assert torch.equal(generated(example)[1], generated(without_weights)[1])


def test_an_interval_beyond_the_model_is_the_dense_model_to_the_bit():
    example = case("llava")
    dense = generated(example)[1]
    for mode in (
        "context_skip_block",
        "skip_ffn",
        "onlycontext_skip_attn",
        "context_parrallel_attn",
        "skip_ffn_prompt",
    ):
        with from_upstream(mode, example.vlm.n_layers).apply(example.vlm):
            assert torch.equal(generated(example)[1], dense), mode


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_without_attention_the_residual_stream_stays_and_the_mlp_reads_the_first_norm(name):
    """In the authors' OPT the residual stream is lost.

    In their LLaMA the MLP reads the first norm.
    """
    example = case(name)
    block = example.vlm.blocks[1]
    x = read(example.vlm, example.batch, 1)[1, "resid_post"]
    norm, second = anatomy.first_norm(block), anatomy.second_norm(block)
    mlp = (
        block.mlp
        if name == "llava"
        else lambda states: block.fc2(block.activation_fn(block.fc1(states)))
    )
    for plan, states in (
        (from_upstream("context_skip_attn", 3, 1), norm(x)),
        (SkipPlan((2,), "attention"), second(x)),
    ):
        assert plan.layers == (2,)
        expected = x + mlp(states)
        with plan.apply(example.vlm):
            torch.testing.assert_close(
                read(example.vlm, example.batch, 2)[2, "resid_post"], expected
            )


def test_image_tokens_are_not_doubled_when_their_mlp_goes():
    """In the authors' OPT they leave the block as 2 h, in their LLaMA as h + LN(h)."""
    example = case("llava")
    image = example.batch.mask("image")
    with from_upstream("skip_ffn_prompt", 3, 1).apply(example.vlm):
        middle, after = (
            read(example.vlm, example.batch, 2, site, image)[2, site]
            for site in ("resid_mid", "resid_post")
        )
        later = generated(example)[1]
    torch.testing.assert_close(after, middle)
    with skip(example.vlm, 2, "mlp", "decode"):  # generated tokens keep their MLPs
        assert apart(later[:, 1:], generated(example)[1][:, 1:]) > 1e-3


# Layers at random


@given(n=st.integers(1, 40), k=st.integers(0, 40), seed=st.integers(0, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_random_layers_are_k_others_than_the_protected(n, k, seed, data):
    protect = data.draw(st.sets(st.integers(1, n)))
    if k > n - len(protect):
        with pytest.raises(InputError, match=f"give 0 to {n - len(protect)}"):
            random_layers(n, k, seed, protect)
        return
    layers = random_layers(n, k, seed, protect)
    assert len(layers) == k
    assert all(a < b for a, b in pairwise(layers))
    assert not set(layers) & protect
    assert set(layers) <= set(range(1, n + 1))
    assert layers == random_layers(n, k, seed, protect)


def test_all_layers_are_as_likely():
    counts = np.bincount(
        np.concatenate([random_layers(6, 2, seed) for seed in range(600)]), minlength=7
    )[1:]
    assert counts.sum() == 1200 and abs(counts - 200).max() < 60  # five standard deviations


def test_protected_layers_that_are_none():
    with pytest.raises(LayerError, match="layer 9"):
        random_layers(6, 2, 0, protect=[9])


# Layers by similarity


def test_similarity_of_blocks_is_the_double_loop(vlm, samples):
    answers = [sample.captions[0] for sample in samples]
    table = block_similarity(
        vlm, samples, ("image", "question", "answer"), answers, PROMPT, batch_size=3
    )
    assert table.columns.tolist() == ["layer", "span", "similarity", "n"] and len(table) == 3 * L
    batch = vlm.batch_of(samples, [PROMPT] * 4, answers)
    stream = [states.double() for states in read(vlm, batch, "all").values()]
    for row in table.itertuples():
        sites = batch.mask(row.span).nonzero().tolist()
        pairs = [(stream[row.layer - 1][i, j], stream[row.layer][i, j]) for i, j in sites]
        by_hand = sum(float(x @ y / (x.norm() * y.norm())) for x, y in pairs) / len(pairs)
        assert abs(row.similarity - by_hand) < 1e-5 and row.n == len(sites)


def test_a_block_that_is_skipped_is_most_like_its_input(vlm, samples):
    with skip(vlm, 3):
        table = block_similarity(vlm, samples, prompt=PROMPT)
    assert np.allclose(table.loc[table["layer"] == 3, "similarity"], 1)
    assert rank_by_similarity(table, 1) == [3]


def test_similarity_of_plain_texts(vlm):
    table = block_similarity(vlm, TEXTS, "question")
    assert table["n"].tolist() == [sum(len(text.split()) for text in TEXTS)] * L


def test_order_by_similarity():
    table = pd.DataFrame(
        {"layer": [1, 2, 3, 1, 2, 3], "similarity": [0.5, 0.9, 0.7, 0.7, 0.1, 0.5]}
    )
    assert rank_by_similarity(table) == [1, 3, 2]  # means 0.6, 0.5, 0.6: ties by number
    assert rank_by_similarity(table, 1) == [1] and rank_by_similarity(table, 0) == []
    for k in (4, -1):
        with pytest.raises(InputError, match="of 3 layers"):
            rank_by_similarity(table, k)
    with pytest.raises(InputError, match="without similarity"):
        rank_by_similarity(table[["layer"]])
    with pytest.raises(InputError, match="NaN"):
        rank_by_similarity(table.assign(similarity=float("nan")))


def test_similarity_where_there_is_none(vlm, samples):
    with pytest.raises(SpanError, match="answer"):
        block_similarity(vlm, samples, "answer", prompt=PROMPT)
    with pytest.raises(SpanError, match="picture"):
        block_similarity(vlm, samples, "picture", prompt=PROMPT)
    with (
        add(vlm, torch.full((vlm.width,), float("1e38")), 2),
        pytest.raises(InputError, match="block"),
    ):
        block_similarity(vlm, samples, prompt=PROMPT)


# Layers by what their absence costs


@torch.no_grad()
def by_hand(vlm, samples, gone, part="block"):
    """The loss by which models are trained, of all samples in one batch."""
    with skip(vlm, gone, part):
        return float(loss_of(vlm, samples, PROMPT, [sample.captions[0] for sample in samples]))


@pytest.mark.parametrize("part", ["block", "mlp", "attention"])
def test_effects_are_the_losses_without_each_layer(vlm, samples, part):
    table = layer_importance(vlm, samples, part=part, prompt=PROMPT, batch_size=3)
    assert table["layer"].tolist() == list(range(1, L + 1))
    assert abs(table.attrs["dense"] - by_hand(vlm, samples, [])) < 1e-4
    expected = [by_hand(vlm, samples, [layer], part) for layer in range(1, L + 1)]
    assert np.allclose(table["loss"], expected, atol=1e-4)
    assert np.allclose(table["increase"], table["loss"] - table.attrs["dense"])


def test_passes_that_start_at_a_layer_are_those_from_the_beginning(vlm, samples, monkeypatch):
    fast = [
        layer_importance(vlm, inputs, prompt=PROMPT, batch_size=3) for inputs in (samples, TEXTS)
    ]
    monkeypatch.setattr(module, "resumable", lambda vlm, batch: False)
    for table, inputs in zip(fast, (samples, TEXTS), strict=True):
        assert np.allclose(
            table["loss"],
            layer_importance(vlm, inputs, prompt=PROMPT, batch_size=3)["loss"],
            atol=1e-6,
        )


def test_blocks_below_a_layer_run_once_for_each_batch(vlm, samples):
    module._AGREE.discard(vlm)  # what other tests have tried on this model
    calls = [0] * L
    hooks = [
        block.mlp.register_forward_pre_hook(lambda m, a, k=k: calls.__setitem__(k, calls[k] + 1))
        for k, block in enumerate(vlm.blocks)
    ]
    tower = []
    hooks.append(anatomy.tower(vlm.model).register_forward_pre_hook(lambda m, a: tower.append(1)))
    try:
        layer_importance(vlm, samples, prompt=PROMPT, batch_size=4)
        all_layers, pictures = list(calls), len(tower)
        calls[:] = [0] * L
        layer_importance(vlm, samples, layers=[L], prompt=PROMPT, batch_size=4)
    finally:
        for hook in hooks:
            hook.remove()
    once = [int(k < L - 1) for k in range(L)]  # no pass starts behind the last layer
    # two samples to try it on: the whole, and on to each layer; then the dense model, and passes
    # that start behind block k
    assert all_layers == [2 + 1 + once[k] + k for k in range(L)]
    assert calls == [1 + once[k] for k in range(L)]  # tried once a model
    assert pictures == 3


def test_a_memo_gives_the_same_losses_and_nothing_is_measured_twice(vlm, samples):
    memo = {}
    table = layer_importance(vlm, samples, prompt=PROMPT, batch_size=3, memo=memo)
    n_batches = -(-len(samples) // 3)
    assert len(memo) == (L + 1) * n_batches
    calls = []
    hook = vlm.blocks[L - 1].register_forward_pre_hook(lambda *_: calls.append(1))
    with hook:
        again = layer_importance(vlm, samples, prompt=PROMPT, batch_size=3, memo=memo)
        assert not calls
        order = greedy_layer_order(vlm, samples, 2, prompt=PROMPT, batch_size=3, memo=memo)
    assert again.equals(table)
    assert order == greedy_layer_order(vlm, samples, 2, prompt=PROMPT, batch_size=3)
    assert len(memo) == (L + 1 + L - 1) * n_batches


def test_a_memo_tells_samples_prompts_parts_and_changes_apart(vlm, samples):
    memo = {}
    layer_importance(vlm, samples[:2], layers=[2], prompt=PROMPT, memo=memo)
    for inputs, prompt, part in (
        (samples[2:4], PROMPT, "block"),
        (samples[:2], "What colour is the key ?", "block"),
        (samples[:2], PROMPT, "mlp"),
    ):
        fresh = layer_importance(vlm, inputs, None, [2], part, prompt)
        assert fresh.equals(layer_importance(vlm, inputs, None, [2], part, prompt, memo=memo))
    with add(vlm, torch.ones(vlm.width), 1):
        fresh = layer_importance(vlm, samples[:2], layers=[2], prompt=PROMPT)
        memoised = layer_importance(vlm, samples[:2], layers=[2], prompt=PROMPT, memo=memo)
    assert fresh.equals(memoised)


def test_effects_of_plain_texts_are_transformers_own_losses(vlm):
    tokens = vlm.tokenizer(TEXTS, return_tensors="pt", padding=True)
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    # what comes after padding is not predicted
    labels[torch.arange(3), tokens["attention_mask"].argmax(dim=1)] = -100
    with torch.no_grad():
        expected = [float(vlm.model(**tokens, labels=labels).loss)]
        for layer in range(1, L + 1):
            with skip(vlm, layer):
                expected.append(float(vlm.model(**tokens, labels=labels).loss))
    table = layer_importance(vlm, TEXTS, batch_size=3)
    assert np.allclose([table.attrs["dense"], *table["loss"]], expected, atol=1e-5)


def test_effects_of_questions_with_a_prompt_for_each_sample(vlm, samples):
    ask = lambda sample: "What colour is the key ?" if sample.id == "0" else PROMPT
    per_sample = layer_importance(vlm, samples[:2], ["red", "blue key"], [2], prompt=ask)
    alone = [
        layer_importance(vlm, [sample], [answer], [2], prompt=ask)
        for sample, answer in zip(samples[:2], ["red", "blue key"], strict=True)
    ]
    assert (
        abs(per_sample["loss"][0] - (2 * alone[0]["loss"][0] + 3 * alone[1]["loss"][0]) / 5) < 1e-5
    )


def test_effects_within_other_changes(vlm, samples):
    with add(vlm, torch.ones(vlm.width), 1):
        table = layer_importance(vlm, samples, layers=[2], prompt=PROMPT)
        assert abs(table["loss"][0] - by_hand(vlm, samples, [2])) < 1e-4


def test_greedy_takes_the_least_loss_each_time(vlm, samples):
    for part in ("block", "mlp"):
        gone = []
        for _ in range(3):
            remaining = [layer for layer in range(1, L + 1) if layer not in gone]
            gone.append(
                min(remaining, key=lambda layer: by_hand(vlm, samples, [*gone, layer], part))
            )
        assert greedy_layer_order(vlm, samples, 3, part=part, prompt=PROMPT, batch_size=3) == gone
    assert (
        greedy_layer_order(vlm, samples, 2, prompt=PROMPT)
        == greedy_layer_order(vlm, samples, 3, prompt=PROMPT)[:2]
    )
    assert set(greedy_layer_order(vlm, TEXTS, 2, candidates=[4, 2])) == {2, 4}


def test_effects_where_blocks_share_more_than_the_stream():
    example = case("mllama")  # its blocks of cross-attention are left out without a picture
    assert not module.resumable(example.vlm, example.batch)


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_only_if_asked_for(vlm, samples, progress, capsys):
    greedy_layer_order(vlm, samples, 1, prompt=PROMPT, progress=progress)
    assert ("greedy" in capsys.readouterr().err) == progress


@pytest.mark.parametrize(
    "run",
    [
        layer_importance,
        lambda *arguments, **options: greedy_layer_order(
            *arguments[:2], 1, *arguments[2:], **options
        ),
    ],
)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": []}, InputError, "0 samples"),
        ({"batch_size": 0}, InputError, "batches of 0"),
        ({"answers": ["one"]}, InputError, "4"),
        ({"answers": ["", "a", "a", "a"]}, InputError, "empty"),
        ({"samples": ["a text", " "]}, InputError, "texts"),
        ({"samples": ["a text"], "answers": ["a"]}, InputError, "texts"),
        (
            {"part": "blocks"},
            InterventionError,
            "unknown part 'blocks'; allowed: block, mlp, attention",
        ),
    ],
)
def test_bad_input_for_effects_and_greedy(vlm, samples, run, change, error, message):
    options = {"answers": None, "prompt": PROMPT} | change
    with pytest.raises(error, match=message):
        run(vlm, options.pop("samples", samples), **options)


def test_samples_without_a_caption_and_layers_that_are_none(vlm, samples):
    with pytest.raises(InputError, match="without a caption, such as 'bare'"):
        layer_importance(vlm, [Sample("bare", samples[0].source)], prompt=PROMPT)
    with pytest.raises(LayerError, match="layer 5"):
        layer_importance(vlm, samples, layers=[5], prompt=PROMPT)
    with pytest.raises(InputError, match="no layers"):
        layer_importance(vlm, samples, layers=[], prompt=PROMPT)
    for k, maximum in ((0, 3), (4, 3)):
        with pytest.raises(InputError, match=f"give 1 to {maximum}"):
            greedy_layer_order(vlm, samples, k, prompt=PROMPT)
    with pytest.raises(InputError, match="3 of 2 candidates; give 1 to 2"):
        greedy_layer_order(vlm, samples, 3, candidates=[1, 2], prompt=PROMPT)


def test_a_loss_that_is_no_number(vlm, samples):
    weight = vlm.blocks[L - 1].mlp.down_proj.weight
    before = float(weight[0, 0])
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with pytest.raises(InputError, match="loss is NaN"):
            layer_importance(vlm, samples, layers=[1], prompt=PROMPT)
    finally:
        with torch.no_grad():
            weight[0, 0] = before


def test_settings_of_the_reference():
    assert GENERATION["max_new_tokens"] > 2  # decode steps are in what is compared above
