"""Self-checks of single sites.

They pass on blocks of every kind that has them, and each fails on what is broken in its own way.
"""

import pytest
import torch
import transformers as hf

from tests.contract.reference import traces
from tests.support.blocks import HALF, KINDS, NORMED
from tests.zoo import build, padded
from tests.zoo.inputs import IMAGE
from tests.zoo.models import clip
from xlvlms_tutorial.activations import clock
from xlvlms_tutorial.interventions import edits, skipping
from xlvlms_tutorial.loading import site_checks
from xlvlms_tutorial.loading.self_check import CHECKS, self_check
from xlvlms_tutorial.loading.site_checks import HANGS_ON, SITE_CHECKS
from xlvlms_tutorial.models.vlm import VLM

FAILING = {
    "plain": set(),
    "parallel": {"between attention and MLP"},
    "norms after": {"between attention and MLP"},
    "norms on both sides": set(),
    "experts": set(),
    "experts that share": set(),
}


def around(kind: str) -> tuple[VLM, dict]:
    """A LLaVA around a language model whose blocks are of a kind, and a padded batch for it."""
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=clip(),
        text_config=KINDS[kind][0](),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    model = hf.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(std=1 / weight.shape[-1] ** 0.5)
    return VLM(model, None, kind), padded("llava", build("llava")[1])


@pytest.mark.parametrize("kind", FAILING)
def test_what_fails_is_what_the_blocks_do_not_have(kind):
    vlm, inputs = around(kind)
    table = self_check(vlm, vlm.prepare(inputs)).set_index("check")
    assert set(table.index[~table["passed"]]) == FAILING[kind], table["detail"].to_dict()
    lost = {site for name in FAILING[kind] for site in HANGS_ON[name]}
    assert (
        lost
        <= KINDS[kind][1]
        == {pair for pair in {*NORMED, *HALF, ("read", "attn_in")} if not vlm.supports(*pair)}
    )
    assert traces(vlm) == []


def test_every_check_of_a_site_says_what_hangs_on_it():
    assert set(SITE_CHECKS) == set(HANGS_ON) < set(CHECKS)


@pytest.fixture
def checked():
    def check(name="llava"):
        model, inputs = build(name)
        vlm = VLM(model, None, name)
        table = self_check(vlm, vlm.prepare(padded(name, inputs))).set_index("check")
        assert traces(vlm) == []
        return table

    return check


def failed(table) -> set[str]:
    return set(table.index[~table["passed"]])


def test_a_cache_that_is_left_too_short_is_found(checked, monkeypatch):
    """Masks of all blocks are read off the first one's length.

    Without padding its cache, a padded batch gets other tokens.
    """
    monkeypatch.setattr(skipping, "pad_cache", lambda *_: None)
    assert {"block skipped", "attention skipped"} <= failed(checked())


def test_an_mlp_that_goes_on_working_is_found(checked, monkeypatch):
    monkeypatch.setattr(skipping, "_no_mlp", lambda *_: {})
    assert failed(checked()) == {"MLP skipped"}


def test_a_scope_that_is_taken_for_the_other_is_found(checked, monkeypatch):
    monkeypatch.setattr(clock.Clock, "decoding", property(lambda self: self.start < self.prompt))
    assert {"block skipped", "MLP skipped", "attention skipped"} <= failed(checked())


def test_a_bias_that_is_not_what_was_asked_for_is_found(checked, monkeypatch):
    """The measurement on entry would see it; here it is blind."""
    original = edits._vector
    calls = []

    def doubled(vlm, vector, description, max_dims=2):
        calls.append(description)
        return original(vlm, vector * (2 if max_dims == 1 else 1), description, max_dims)

    monkeypatch.setattr(edits, "_vector", doubled)
    assert failed(checked()) == {"fold"} and calls


def test_a_middle_that_is_only_the_input_is_found(checked):
    vlm, inputs = around("plain")
    # as in GPT-NeoX, whose MLP has a norm of its own and reads the block's input all the same
    for block in vlm.blocks:
        keep, norm = {}, block.post_attention_layernorm
        block.register_forward_pre_hook(lambda _, args, keep=keep: keep.update(start=args[0]))
        norm.register_forward_pre_hook(lambda _, args, keep=keep: (keep["start"],))
    table = self_check(vlm, vlm.prepare(inputs)).set_index("check")
    assert table.loc["between attention and MLP", "detail"] == (
        "layer 1: it is the block's input, as where attention and MLP run side by side"
    )


def test_a_refused_fold_is_no_failure_and_is_refused_from_then_on(checked):
    table = checked("gemma3")
    assert failed(table) == set() and table.loc["fold", "detail"].startswith("refused: layer 2")


def test_layers_are_one_of_each_kind_and_the_first_two():
    vlm, _ = around("plain")
    assert site_checks._kinds(vlm, "skip", "mlp") == [1, 2]
    mixed = VLM(build("mllama")[0], None, "mllama")
    assert site_checks._kinds(mixed, "skip", "block") == [1, 2]
    sliding = VLM(build("gemma3")[0], None, "gemma3")
    sliding.model.config.text_config.layer_types = [
        "full_attention",
        "full_attention",
        "sliding_attention",
    ]
    assert site_checks._kinds(sliding, "skip", "block") == [1, 2, 3]


def test_generations_are_compared_up_to_where_they_part():
    new, second_ids = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 9, 3]])
    logits, others = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    others[0, 2] = 7
    assert site_checks._steps_apart((new, logits), (second_ids, others)) == 0
    others[0, 1, 2] = 2
    assert site_checks._steps_apart((new, logits), (second_ids, others)) == 0.5
