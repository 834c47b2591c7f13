"""The names of the authors' code as plans, and the table of them on the page on released code."""

import re
from pathlib import Path

import numpy as np
import pytest

from xlvlms_tutorial.errors import InputError, LayerError
from xlvlms_tutorial.methods.skipping import SkipPlan, every_nth_layer
from xlvlms_tutorial.methods.skipping.plans import PARTS
from xlvlms_tutorial.tutorials import upstream
from xlvlms_tutorial.tutorials.upstream import from_upstream


def test_every_name_of_the_authors_is_a_plan_or_refused_with_a_reason():
    for name, (part, _) in upstream.MODES.items():
        for prefix, scope in upstream.PREFIXES.items():
            plan = from_upstream(prefix + name, 32, 2)
            assert (plan.part, plan.scope, plan.span) == (part, scope, None)
            assert plan.layers == tuple(every_nth_layer(32, 2))
    assert {part for part, _ in upstream.MODES.values()} == set(PARTS)
    for name, reason in upstream.REFUSED.items():
        with pytest.raises(InputError, match=f"cannot be had: {re.escape(reason)};"):
            from_upstream(name, 32, 2)


def test_the_page_lists_every_name():
    page = Path(__file__).parents[2] / "book/reference/upstream.md"
    table = [line for line in page.read_text("utf-8").splitlines() if line.startswith("| `")]
    names = [*upstream.MODES, *upstream.REFUSED, "skip_ffn_prompt", "drop", "exit"]
    for name in (*names, "fixed_", "random_"):
        assert sum(f"`{name}`" in line for line in table) == 1, name
    for reason in upstream.REFUSED.values():
        assert sum(f"| refused | {reason} |" in line for line in table) == 1, reason


@pytest.mark.parametrize(
    ("mode", "plan"),
    [
        ("context_fixed_skip_block", SkipPlan((3, 5, 7))),
        ("onlycontext_skip_block", SkipPlan((3, 5, 7), scope="prefill", cache="previous")),
        ("skip_ffn", SkipPlan((3, 5, 7), "mlp", "decode")),
        ("context_skip_attn", SkipPlan((3, 5, 7), "attention", norm="first")),
        ("onlycontext_parrallel_attn", SkipPlan((3, 5, 7), "parallel", "prefill", norm="first")),
        ("context_parrallel_block", SkipPlan((3, 5, 7), "pairs")),
        ("context_skip_ffn_prompt", SkipPlan((3, 5, 7), "mlp", "prefill", span="image")),
        ("drop", SkipPlan((1, 2, 3, 4, 5, 6, 7))),
        ("exit", SkipPlan((2, 3, 4, 5, 6, 7, 8))),
    ],
)
def test_names_of_the_authors(mode, plan):
    assert from_upstream(mode, 8, 2) == plan


def test_drop_and_exit_go_from_where_they_are_told():
    assert from_upstream("drop", 32, start=4, end=7).layers == (5, 6, 7)  # idx 4, 5, 6
    assert from_upstream("exit", 32, start=29).layers == (31, 32)  # idx 30 and 31
    for mode in ("drop", "exit"):
        with pytest.raises(LayerError, match="layer 33"):
            from_upstream(mode, 32, start=33)


@pytest.mark.parametrize(
    "mode",
    [
        "parallel_attn",
        "baseline",
        "",
        "skip",
        "skip_block_",
        "context_",
        "SKIP_BLOCK",
        "fixed_drop",
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(mode):
    with pytest.raises(
        InputError,
        match="unknown mode.*skip_block, skip_ffn, skip_attn, parrallel_attn, parrallel_block",
    ):
        from_upstream(mode, 32, 2)


@pytest.mark.parametrize(
    "mode", ["random_skip_attn_prompt", "context_fixed_skip_block_prompt", "context_exit_prompt"]
)
def test_refused_names_are_refused_with_any_prefix(mode):
    with pytest.raises(InputError, match="cannot be had"):
        from_upstream(mode, 32, 2)


def test_random_intervals_skip_as_many_layers_as_theirs_on_average():
    counts = [sum(k % step == 0 for k in range(1, 31)) for step in range(2, 5)]  # 15, 10, 7
    plans = [from_upstream("context_random_skip_block", 32, 4, seed=seed) for seed in range(4)]
    assert {len(plan.layers) for plan in plans} == {round(np.mean(counts))}
    assert len({plan.layers for plan in plans}) == 4
    assert all(min(plan.layers) > 1 and max(plan.layers) < 32 for plan in plans)
    assert plans[1] == from_upstream("context_random_skip_block", 32, 4, seed=1)
    for interval in (1, [2, 3]):
        with pytest.raises(InputError, match="random_ with interval"):
            from_upstream("random_skip_block", 32, interval)


def test_pairs_need_an_interval_of_two_or_more():
    with pytest.raises(InputError, match="overlap"):
        from_upstream("context_parrallel_block", 32, 1)
