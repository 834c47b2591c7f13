"""Skipped work is not done, what runs in parallel follows its formula, and caches stay right.

On tiny models.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager

import accelerate
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.reference import GENERATION, apart, case, generated, traces
from tests.zoo import MIXTURES, SUPPRESS, build, padded
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InterventionError, LayerError
from xlvlms_tutorial.interventions.edits import add, fold, mask_weights
from xlvlms_tutorial.interventions.skipping import PARTS, parallel, parallel_pairs, skip
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

L = 3


def eager(name):
    example = case(name)
    example.vlm.model.set_attn_implementation("eager")  # whose products are counted
    return example


@pytest.fixture(scope="module")
def llava():
    return eager("llava")


@pytest.fixture(scope="module")
def opt():
    return eager("blip2")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llava, opt):
    yield
    assert traces(llava.vlm) == traces(opt.vlm) == []


@contextmanager
def counted(modules: dict[str, nn.Module]):
    """How often each module is called."""
    calls = Counter(dict.fromkeys(modules, 0))
    hooks = [
        m.register_forward_pre_hook(lambda module, args, name=name: calls.update([name]))
        for name, m in modules.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def inside(vlm, layer):
    block = vlm.blocks[layer - 1]
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def flops(example, new_tokens):
    with FlopCounterMode(display=False) as counter:
        example.vlm.generate_ids(
            example.batch, new_tokens, min_new_tokens=new_tokens, suppress_tokens=SUPPRESS
        )
    return counter.get_total_flops()


def phases(example):
    """FLOPs of the prefill, and of three decode steps."""
    prefill = flops(example, 1)
    return prefill, flops(example, 4) - prefill


# What is skipped is not computed


@pytest.mark.parametrize("layers", [[1], [3], [1, 3], [1, 2, 3]])
def test_skipping_k_of_l_blocks_leaves_their_share_of_the_blocks_flops(llava, layers):
    full = phases(llava)
    with skip(llava.vlm, [1, 2, 3]):
        none = phases(llava)
    with skip(llava.vlm, layers):
        partial = phases(llava)
    for dense, empty, remaining in zip(full, none, partial, strict=True):
        assert 0 < empty < dense and (remaining - empty) * L == (dense - empty) * (L - len(layers))


def test_without_blocks_only_tower_connector_and_unembedding_are_left(llava):
    vlm, picture = llava.vlm, llava.batch["pixel_values"]
    with FlopCounterMode(display=False) as rest, torch.no_grad():
        vlm.model.get_image_features(picture)
        vlm.unembed(torch.zeros(2, vlm.width))
        vlm.model.model.language_model.rotary_emb(
            torch.zeros(2, 1, 1), torch.arange(llava.length)[None].expand(2, -1)
        )
    with skip(vlm, [1, 2, 3]):
        assert flops(llava, 1) == rest.get_total_flops()


@pytest.mark.parametrize(
    ("scope", "cache", "prefill", "decode"),
    [
        ("both", "own", {}, {}),
        ("decode", "own", "all", {}),
        ("prefill", "previous", {}, "all"),
        ("prefill", "own", "attention", "all"),
    ],
)
def test_a_skipped_block_runs_none_of_its_maps(llava, scope, cache, prefill, decode):
    names = inside(llava.vlm, 2)
    attention = {name for name in names if name.startswith("self_attn")}
    due = {"all": set(names), "attention": attention}
    with skip(llava.vlm, 2, scope=scope, cache=cache), counted(names) as calls:
        llava.vlm.generate_ids(llava.batch, 1, suppress_tokens=SUPPRESS)
        first = dict(calls)
        llava.vlm.generate_ids(llava.batch, **GENERATION)
    steps = {name: calls[name] - 2 * first[name] for name in names}
    assert {name for name, n in first.items() if n} == due.get(
        prefill if isinstance(prefill, str) else "", set()
    )
    assert set(steps.values()) <= {0, 3}
    assert {name for name, n in steps.items() if n} == due.get(
        decode if isinstance(decode, str) else "", set()
    )


@pytest.mark.parametrize("name", ["llava", "blip2"])
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_a_skipped_part_saves_all_its_products(request, name, part):
    example = request.getfixturevalue("llava" if name == "llava" else "opt")
    block = example.vlm.blocks[0]
    attention_modules = {id(module) for module in anatomy.attention(block).modules()}
    maps = [
        linear
        for linear in inside(example.vlm, 1).values()
        if (id(linear) in attention_modules) == (part == "attention")
    ]
    full = phases(example)
    with skip(example.vlm, 1, part):
        less = phases(example)
    for dense, remaining, tokens in zip(full, less, (2 * example.length, 2 * 3), strict=True):
        gone = sum(2 * tokens * linear.in_features * linear.out_features for linear in maps)
        # with the products of queries, keys and values
        assert dense - remaining == gone if part == "mlp" else dense - remaining > gone


def made_of(block):
    """What makes up a block's MLP, experts included, by what it is made of.

    Neither attention nor a choice of experts.
    """
    attention = set(anatomy.attention(block).modules())
    modules = [
        (name, module)
        for name, module in block.named_modules()
        if any(weight.ndim > 1 for weight in module._parameters.values())
    ]
    return [
        module
        for name, module in modules
        if module not in attention and not {"router", "gate"} & set(name.split("."))
    ]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_skipped_mixture_runs_no_expert_and_nothing_beside_them(name):
    example = case(name)
    modules = {
        f"{k} {n}": module
        for k, block in enumerate(example.vlm.blocks)
        for n, module in enumerate(made_of(block))
    }
    assert any("Experts" in type(module).__name__ for module in modules.values())
    with counted(modules) as plain:
        generated(example)
    assert all(plain.values())
    with skip(example.vlm, [1, 2, 3], "mlp"):
        generated(example)  # a mixture is asked once, by one position, what it returns
        # the others do not do their work
        inner = {name: module for name, module in modules.items() if "forward" not in vars(module)}
        with counted(inner) as calls:
            generated(example)
    assert not any(calls.values())


def test_a_block_that_lends_its_keys_still_makes_them_and_nothing_else():
    example = case("gemma4_small")
    block = example.vlm.blocks[1]
    modules = {
        "keys": block.self_attn.k_proj,
        "mlp": block.mlp.up_proj,
        "borrower": example.vlm.blocks[2].self_attn.q_proj,
    }
    for scope in ("both", "prefill", "decode"):
        with counted(modules) as calls, skip(example.vlm, 2, scope=scope):
            generated(example)
        steps = {"both": 0, "prefill": 3, "decode": 1}[scope]
        assert calls == {"keys": 4, "mlp": steps, "borrower": 4}
    with skip(example.vlm, 2):  # without a cache too
        assert (
            apart(
                example.vlm.forward(example.batch, use_cache=False).logits,
                example.vlm.forward(example.batch).logits,
            )
            < 1e-5
        )


def test_no_layers_is_no_change_to_the_bit(llava):
    new, logits = generated(llava)
    for part in PARTS:
        with skip(llava.vlm, list(range(4, L + 1, 4)), part):  # every fourth of three blocks
            same, bits = generated(llava)
        assert torch.equal(same, new) and torch.equal(bits, logits)


@pytest.mark.parametrize("layers", [[1], [2], [1, 2], [2, 3]])
def test_a_skipped_block_is_a_block_that_is_not_there(layers):
    model, inputs = build("llava")
    vlm = VLM(model, None, "llava")
    batch = vlm.prepare(padded("llava", inputs))
    with skip(vlm, layers):
        skipped = vlm.forward(batch).logits
    stack = anatomy.decoder(model)
    stack.layers = nn.ModuleList(
        block for k, block in enumerate(stack.layers, 1) if k not in layers
    )
    stack.config.num_hidden_layers = len(stack.layers)
    with torch.no_grad():
        assert torch.equal(skipped, model(**batch, use_cache=False).logits)


# Caches


def test_skipping_in_the_prefill_and_in_decode_steps_is_skipping_in_both(llava):
    for part in PARTS:
        for layer in (1, 2):
            with skip(llava.vlm, layer, part):
                new, logits = generated(llava)
            with skip(llava.vlm, layer, part, "prefill"), skip(llava.vlm, layer, part, "decode"):
                same, others = generated(llava)
            assert torch.equal(new, same) and apart(others, logits) < 1e-5, (part, layer)


def test_block_1_has_no_previous_one_and_keeps_its_own(llava):
    with skip(llava.vlm, 1, scope="prefill"):
        plain = generated(llava)[1]
    with skip(llava.vlm, 1, scope="prefill", cache="previous"):
        assert torch.equal(generated(llava)[1], plain)


def test_caches_have_one_length_over_all_blocks(llava):
    vlm = llava.vlm
    ways = (
        ([1], "block", "both", "own"),
        ([1, 2], "attention", "decode", "own"),
        ([2], "block", "prefill", "previous"),
    )
    for way in ways:
        with skip(vlm, *way), vlm.run(llava.batch), torch.no_grad():
            output = vlm.model.generate(
                **llava.batch, **GENERATION, return_dict_in_generate=True, do_sample=False
            )
        lengths = {layer.keys.shape[-2] for layer in output.past_key_values.layers}
        assert lengths == {llava.length + 3}


def test_a_static_cache_serves_as_well(llava):
    for part in PARTS:
        for layer in (1, 3):
            with skip(llava.vlm, layer, part):
                assert torch.equal(
                    generated(llava)[0], generated(llava, cache_implementation="static")[0]
                ), (part, layer)


# Nesting


def test_skips_nest_as_one(llava):
    with skip(llava.vlm, [1, 3]):
        expected = generated(llava)[1]
    with skip(llava.vlm, 3), skip(llava.vlm, 1):
        assert torch.equal(generated(llava)[1], expected)
    for part in PARTS:  # whatever else is skipped of a skipped block, it hands on what it is given
        with skip(llava.vlm, 1, part), skip(llava.vlm, [1, 3]), skip(llava.vlm, 3, part):
            assert torch.equal(generated(llava)[1], expected), part
    with skip(llava.vlm, 2):
        outer = generated(llava)[1]
        with skip(llava.vlm, 1, "mlp"):
            assert apart(generated(llava)[1], outer) > 1e-2
        assert torch.equal(generated(llava)[1], outer)


def test_both_parts_skipped_are_the_block_skipped(llava):
    with skip(llava.vlm, 2):
        new, logits = generated(llava)
    with skip(llava.vlm, 2, "mlp"), skip(llava.vlm, 2, "attention"):
        same, others = generated(llava)
    assert torch.equal(new, same) and apart(others, logits) < 1e-6


# Formulas


def block_inputs(vlm, batch, layer):
    """What a block gets: its states, and all else."""
    recorded = []

    def keep(module, args, kwargs):
        recorded.append(
            (
                args[0] if args else kwargs["hidden_states"],
                {k: v for k, v in kwargs.items() if k != "hidden_states"},
            )
        )

    hook = vlm.blocks[layer - 1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        vlm.forward(batch, use_cache=False)
    finally:
        hook.remove()
    return recorded[0]


@torch.no_grad()
def test_parallel_in_a_llama_block(llava):
    vlm, block = llava.vlm, llava.vlm.blocks[1]
    x, options = block_inputs(vlm, llava.batch, 2)
    normed = block.input_layernorm(x)
    attention = block.self_attn(hidden_states=normed, **options)[0]
    mlp = lambda states: block.mlp.down_proj(
        nn.functional.silu(block.mlp.gate_proj(states)) * block.mlp.up_proj(states)
    )
    for norm, states in (("first", normed), ("second", block.post_attention_layernorm(x))):
        by_hand = x + attention + mlp(states)
        with parallel(vlm, 2, norm):
            torch.testing.assert_close(read(vlm, llava.batch, 2)[2, "resid_post"], by_hand)


@torch.no_grad()
def test_parallel_in_an_opt_block(opt):
    vlm, block = opt.vlm, opt.vlm.blocks[1]
    x, options = block_inputs(vlm, opt.batch, 2)
    normed = block.self_attn_layer_norm(x)
    attention = block.self_attn(hidden_states=normed, **options)[0]
    mlp = lambda states: block.fc2(torch.relu(block.fc1(states)))
    second = block.final_layer_norm(x)
    for norm, states in (("first", normed), ("second", second)):
        by_hand = x + attention + mlp(states)
        with parallel(vlm, 2, norm):
            torch.testing.assert_close(read(vlm, opt.batch, 2)[2, "resid_post"], by_hand)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "opt"])
def test_pairs_of_blocks(request, name):
    example = request.getfixturevalue(name)
    vlm, (x, options) = example.vlm, block_inputs(example.vlm, example.batch, 2)
    first, second = (anatomy.states_of(vlm.blocks[k](x, **options)) for k in (1, 2))
    for combine, by_hand in (("mean", (first + second) / 2), ("sum", first + second - x)):
        with parallel_pairs(vlm, 2, combine):
            torch.testing.assert_close(read(vlm, example.batch, 3)[3, "resid_post"], by_hand)


def test_parallel_leaves_no_work_out_and_keeps_no_states(llava):
    names = {
        f"{layer}.{name}": module
        for layer in (1, 2)
        for name, module in inside(llava.vlm, layer).items()
    }
    full = phases(llava)
    for enter in (parallel, parallel_pairs):
        with enter(llava.vlm, 1), counted(names) as calls:
            llava.vlm.forward(llava.batch)
            assert set(calls.values()) == {1}
            assert phases(llava) == full


def test_parallel_and_skips_nest(llava):
    with parallel(llava.vlm, 2), skip(llava.vlm, 2):
        both = generated(llava)[1]
    with skip(llava.vlm, 2):
        assert torch.equal(generated(llava)[1], both)
    with parallel(llava.vlm, 2), skip(llava.vlm, 2, "mlp"):
        without = generated(llava)[1]
    with skip(llava.vlm, 2, "mlp"):
        assert torch.equal(generated(llava)[1], without)


# Bad input


@pytest.mark.parametrize(
    ("enter", "message"),
    [
        (
            lambda vlm: skip(vlm, 1, "blocks"),
            "unknown part 'blocks'; allowed: block, mlp, attention",
        ),
        (
            lambda vlm: skip(vlm, 1, scope="prompt"),
            "unknown scope 'prompt'; allowed: prefill, decode, both",
        ),
        (lambda vlm: skip(vlm, 1, cache="prev"), "unknown cache 'prev'; allowed: own, previous"),
        (lambda vlm: parallel(vlm, 1, "third"), "unknown norm 'third'; allowed: first, second"),
        (
            lambda vlm: parallel_pairs(vlm, 1, "median"),
            "unknown combine 'median'; allowed: mean, sum",
        ),
        (lambda vlm: parallel_pairs(vlm, [1, 2]), "pairs that overlap.*two apart"),
    ],
)
def test_unknown_values_are_named_with_the_known_ones(llava, enter, message):
    with pytest.raises(InterventionError, match=message), enter(llava.vlm):
        pass


def test_a_pair_that_begins_with_the_last_block(llava):
    with (
        pytest.raises(LayerError, match="layer 4 is not one of 1 to 3"),
        parallel_pairs(llava.vlm, 3),
    ):
        pass


# Models whose weights are elsewhere


def test_an_offloaded_model_is_skipped_steered_and_read_as_the_plain_one(llava):
    model, inputs = build("llava")
    accelerate.cpu_offload(model, torch.device("cpu"))
    vlm = VLM(model, None, "llava")
    away = llava._replace(vlm=vlm, batch=vlm.prepare(padded("llava", inputs)))
    assert vlm.model.device.type == "meta" and vlm.device == torch.device("cpu")
    before = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    makers = [lambda v, part=part: skip(v, [1, 3], part) for part in PARTS]
    makers += [
        lambda v: skip(v, 2, scope="prefill", cache="previous"),
        lambda v: parallel(v, 2),
        lambda v: parallel_pairs(v, 1),
    ]
    makers += [lambda v: add(v, torch.ones(v.width), 2, positions="last")]
    for make in makers:
        with make(llava.vlm), make(vlm):
            assert apart(generated(away)[1], generated(llava)[1]) < 1e-5
    # accelerate's own are back
    assert {
        name for name, module in model.named_modules() if "forward" in module.__dict__
    } == before
    assert apart(generated(away)[1], generated(llava)[1]) < 1e-5
    with pytest.raises(InterventionError, match="offloaded"), fold(vlm, torch.ones(vlm.width), 1):
        pass
    masks = {"model.language_model.layers.0.mlp.down_proj": torch.ones(32, 64, dtype=torch.bool)}
    with pytest.raises(InterventionError, match="offloaded"), mask_weights(vlm, masks):
        pass


def test_many_contexts_in_one_stack_are_all_undone(llava):
    with ExitStack() as stack:
        for layer in (1, 2, 3):
            for part in PARTS:
                stack.enter_context(skip(llava.vlm, layer, part))
        assert traces(llava.vlm) != []
    assert traces(llava.vlm) == []
