"""Tokens left out of the upper blocks.

Against a mask that hides them in one forward without a cache, in float64, and naive loops.
"""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from tests.contract.dropping import hidden
from tests.contract.reference import (
    GENERATION,
    apart,
    case,
    generated,
    residual,
    traces,
    whole,
)
from tests.support.tiny import PICTURE, PROMPTS, lively, tiny_llava
from tests.zoo import SUPPRESS
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InputError, InterventionError, LayerError, SpanError
from xlvlms_tutorial.interventions import add, skip, skip_tokens
from xlvlms_tutorial.methods.dropping import drop_tokens, merge_tokens
from xlvlms_tutorial.methods.dropping.dropping import METHODS
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.watching import on_output


def tolerance(example):
    """Rounding of the model's dtype."""
    return 1e-12 if example.vlm.dtype == torch.float64 else 2e-5


def exact_norm(self, states):
    """The norm in the dtype of the model; that of transformers is in float32, whatever this is."""
    mean_square = states.square().mean(dim=-1, keepdim=True)
    return self.weight * states * torch.rsqrt(mean_square + self.variance_epsilon)


def exact_angles(self, x, position_ids):
    """Rotary angles in float64: a padded row is turned as a whole, by no more than rounding."""
    angles = position_ids[..., None].double() * self.inv_freq.double()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


# eager attention has its softmax in float32, whatever the dtype of the model is
@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llava(request):
    single = case("llava")
    single.vlm.model.set_attn_implementation(request.param)
    if request.param == "eager":
        yield single
        return
    single.vlm.model.double()
    batch = Batch(dict(single.batch)).to("cpu", torch.float64)
    batch.spans = single.batch.spans
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LlamaRMSNorm, "forward", exact_norm)
        patched.setattr(LlamaRotaryEmbedding, "forward", exact_angles)
        yield single._replace(batch=batch)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llava):
    before = llava.vlm.model.config.text_config._attn_implementation
    yield
    assert traces(llava.vlm) == []
    assert llava.vlm.model.config.text_config._attn_implementation == before


def dropped_of(example, kept):
    return example.batch.mask("image") & ~kept.mask


def test_dropping_nothing_is_the_plain_model(llava):
    plain = generated(llava)
    for by in METHODS:
        with drop_tokens(llava.vlm, 2, 4, by) as kept:
            new, logits = generated(llava)
        assert torch.equal(new, plain[0]) and apart(logits, plain[1]) < tolerance(llava)
        assert torch.equal(kept.mask, llava.batch.mask("image"))


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("by", ["attention", "norm", "random"])
def test_dropped_tokens_are_those_that_a_mask_hides_in_prefill_and_generation(
    llava, layer, keep, by
):
    with drop_tokens(llava.vlm, layer, keep, by) as kept:
        new, logits = generated(llava)
        prompt = llava.vlm.forward(llava.batch).logits
    assert kept.mask.sum(dim=1).tolist() == [keep, keep]
    dropped = dropped_of(llava, kept)
    with hidden(llava, layer, dropped):
        assert apart(logits, whole(llava, new)) < tolerance(llava)
        reference = llava.vlm.forward(llava.batch).logits
    real = llava.batch["attention_mask"].bool()
    assert apart(prompt[real & ~dropped], reference[real & ~dropped]) < tolerance(llava)
    assert apart(logits, generated(llava)[1]) > 1e-3  # the second row is padded on the left


def test_a_teacher_forced_answer_sees_what_a_generated_one_sees(llava):
    with drop_tokens(llava.vlm, 1, 2) as kept:
        new, logits = generated(llava)
        expected = kept.mask
        recorded = []
        with (
            on_output(anatomy.unembedding(llava.vlm.model), recorded.append),
            llava.vlm.run(llava.batch),
        ):
            ids = torch.cat([llava.batch["input_ids"], new], dim=1)
            mask = nn.functional.pad(llava.batch["attention_mask"], (0, new.shape[1]), value=1)
            inputs = {**llava.batch, "input_ids": ids, "attention_mask": mask}
            llava.vlm.model(**inputs, use_cache=False)
        assert torch.equal(kept.mask, expected)
    start = llava.length - 1
    assert apart(recorded[0][:, start : start + logits.shape[1]], logits) < tolerance(llava)


def test_the_observer_of_a_batch_with_answers_is_the_prompts_last_position():
    vlm = lively(tiny_llava())
    kept_masks = []
    for answers in (None, ["a red key", "yes"]):
        batch = vlm.batch([PICTURE] * 2, PROMPTS[:2], answers)
        with drop_tokens(vlm, 1, 2) as kept:
            vlm.forward(batch, logits=False)
        kept_masks.append([kept.scores[row][batch.spans[row] == 1] for row in (0, 1)])
    for plain, answered in zip(*kept_masks, strict=True):
        assert apart(plain, answered) < 1e-5


def test_attention_received_is_that_of_transformers():
    # in float32: eager attention in float64 gives NaN where rows are padded
    example = case("llava")
    for kind in ("sdpa", "eager"):
        example.vlm.model.set_attn_implementation(kind)
        with drop_tokens(example.vlm, 2, 1) as kept:
            example.vlm.forward(example.batch)
        example.vlm.model.set_attn_implementation("eager")
        weights = example.vlm.forward(example.batch, output_attentions=True).attentions[1]
        assert apart(kept.scores, weights[:, :, -1].mean(dim=1)) < 1e-5


def test_norms_and_the_draw_are_what_they_say(llava):
    vlm, batch = llava.vlm, llava.batch
    norms = read(vlm, batch, 2)[2, "resid_post"].norm(dim=-1)
    masks = {}
    for keep in (1, 2, 3):
        with drop_tokens(vlm, 2, keep, "norm") as kept:
            vlm.forward(batch)
        for row in (0, 1):
            places = batch.mask("image")[row].nonzero().flatten()
            longest = places[norms[row, places].argsort(descending=True)[:keep]]
            assert set(kept.mask[row].nonzero().flatten().tolist()) == set(longest.tolist())
        with drop_tokens(vlm, 2, keep, "random", seed=3) as kept:
            vlm.forward(batch)
        masks[keep] = kept.mask
    assert (masks[3] | ~masks[2]).all() and (masks[2] | ~masks[1]).all()
    with drop_tokens(vlm, 2, 2, "random", seed=4) as kept:
        vlm.forward(batch)
    assert not torch.equal(kept.mask, masks[2])


def test_given_scores_choose_the_highest(llava):
    scores = torch.arange(llava.length).float().expand(2, -1)
    with drop_tokens(llava.vlm, 1, 2, scores) as kept:
        llava.vlm.forward(llava.batch)
    places = [row.nonzero().flatten().tolist() for row in llava.batch.mask("image")]
    assert [row.nonzero().flatten().tolist() for row in kept.mask] == [p[-2:] for p in places]
    with (
        drop_tokens(llava.vlm, 1, 2, scores[:, 1:]),
        pytest.raises(InterventionError, match="make them for this batch"),
    ):
        llava.vlm.forward(llava.batch)


def test_merged_tokens_are_means_in_the_place_of_their_parts(llava):
    layer = 1
    states = read(llava.vlm, llava.batch, layer, dtype=llava.vlm.dtype)[layer, "resid_post"]
    with drop_tokens(llava.vlm, layer, 2, "merge") as kept:
        new, logits = generated(llava)
    patched = states.clone()
    for row in (0, 1):
        places = llava.batch.mask("image")[row].nonzero().flatten()
        positions, means = merge_tokens(states[row, places], 2)
        patched[row, places[positions]] = means
        assert kept.mask[row].nonzero().flatten().tolist() == places[positions].tolist()
    late = lambda h: torch.cat([patched, h[:, llava.length :]], dim=1)
    with residual(llava, layer, late), hidden(llava, layer, dropped_of(llava, kept)):
        assert apart(logits, whole(llava, new)) < tolerance(llava)


def test_rows_that_lose_different_numbers_of_tokens(llava):
    batch = Batch(dict(llava.batch))
    batch.spans = llava.batch.spans.clone()
    places = batch.mask("image")[0].nonzero().flatten()
    batch.spans[0, places[1]] = SPANS.index("template")  # the first row has three left to lose
    uneven = llava._replace(batch=batch)
    for by in ("attention", "merge"):
        with drop_tokens(llava.vlm, 1, 1, by) as kept:
            new, logits = generated(uneven)
            states = read(llava.vlm, batch, 1, dtype=llava.vlm.dtype)[1, "resid_post"]
        dropped = dropped_of(uneven, kept)
        assert dropped.sum(dim=1).tolist() == [2, 3]
        if by == "merge":
            plain = states.clone()
            for row in (0, 1):
                places = batch.mask("image")[row].nonzero().flatten()
                positions, means = merge_tokens(plain[row, places], 1)
                states[row, places[positions]] = means
        late = lambda h, states=states: torch.cat([states, h[:, llava.length :]], dim=1)
        with residual(llava, 1, late), hidden(uneven, 1, dropped):
            assert apart(logits, whole(uneven, new)) < tolerance(llava)


def test_states_and_caches_are_really_shorter(llava):
    vlm, lengths, layer = llava.vlm, [], 1
    hooks = [on_output(block.mlp, lambda y: lengths.append(y.shape[1])) for block in vlm.blocks]
    try:
        with drop_tokens(vlm, layer, 1):
            cache = vlm.forward(llava.batch, use_cache=True).past_key_values
    finally:
        for hook in hooks:
            hook.remove()
    assert lengths == [llava.length, llava.length - 3, llava.length - 3]
    assert [cache.get_seq_length(k) for k in range(3)] == lengths


def test_dropped_tokens_keep_the_state_with_which_they_left(llava):
    vlm, batch = llava.vlm, llava.batch
    with drop_tokens(vlm, 1, 2) as kept:
        states = read(vlm, batch, [1, 3])
    dropped = dropped_of(llava, kept)
    first, last = states[1, "resid_post"], states[3, "resid_post"]
    assert torch.equal(first[dropped], last[dropped])
    assert not torch.isclose(first[kept.mask], last[kept.mask]).all()


def test_other_interventions_find_every_token_in_its_place(llava):
    vector = torch.linspace(-1, 1, llava.vlm.width).to(llava.vlm.dtype)
    for context in (
        lambda: add(llava.vlm, vector, 2, positions="question"),
        lambda: skip(llava.vlm, 3),
        lambda: skip(llava.vlm, 3, "attention"),
        lambda: skip(llava.vlm, 1, "mlp"),
    ):
        with drop_tokens(llava.vlm, 1, 2, "random") as kept, context():
            new, logits = generated(llava)
        with context(), drop_tokens(llava.vlm, 1, 2, "random"):
            assert torch.equal(generated(llava)[1], logits)
        with hidden(llava, 1, dropped_of(llava, kept)), llava.vlm.run(llava.batch), context():
            assert apart(logits, whole(llava, new)) < tolerance(llava)


def test_beams_of_a_sample_share_its_tokens(llava):
    search = GENERATION | {"num_beams": 2, "suppress_tokens": SUPPRESS}
    for by in ("attention", "random"):
        with drop_tokens(llava.vlm, 1, 2, by):
            cached = llava.vlm.generate_ids(llava.batch, **search)
            assert torch.equal(
                cached, llava.vlm.generate_ids(llava.batch, use_cache=False, **search)
            )


def test_what_cannot_be_is_refused(llava):
    vlm, batch = llava.vlm, llava.batch
    for layer in (0, 3, 4, -1):
        with pytest.raises(LayerError), drop_tokens(vlm, layer, 2):
            pass
    for keep in (0, -1):
        with pytest.raises(InputError, match="give at least 1"), drop_tokens(vlm, 1, keep):
            pass
    with (
        drop_tokens(vlm, 1, 5),
        pytest.raises(InputError, match=r"5 of the 4 image tokens of row 0 .* give 1 to 4"),
    ):
        vlm.forward(batch)
    with pytest.raises(InputError, match="unknown by 'size'"), drop_tokens(vlm, 1, 2, "size"):
        pass
    with pytest.raises(InputError, match="unknown span"), drop_tokens(vlm, 1, 2, span="answer"):
        pass
    with drop_tokens(vlm, 1, 2, span="video"), pytest.raises(SpanError):
        vlm.forward(batch)
    with drop_tokens(vlm, 1, 2), pytest.raises(InterventionError, match="unknown inputs"):
        vlm.model(**batch)


def test_what_counts_positions_inside_a_block_is_refused_beside_it(llava):
    vlm, batch = llava.vlm, llava.batch
    with (
        skip_tokens(vlm, 2),
        pytest.raises(InterventionError, match="skip_tokens"),
        drop_tokens(vlm, 1, 2),
    ):
        pass
    with (
        drop_tokens(vlm, 1, 2),
        skip_tokens(vlm, 2),
        pytest.raises(InterventionError, match="skip_tokens"),
    ):
        vlm.forward(batch)
    with (
        drop_tokens(vlm, 1, 2),
        pytest.raises(InterventionError, match="drop_tokens"),
        drop_tokens(vlm, 1, 2),
    ):
        pass
    with (
        skip(vlm, 2, scope="prefill", cache="previous"),
        pytest.raises(InterventionError, match="previous"),
        drop_tokens(vlm, 1, 2),
    ):
        pass
    with drop_tokens(vlm, 1, 2), pytest.raises(InputError, match="resid_post"):
        read(vlm, batch, 3, sites="mlp_out")
    with (
        drop_tokens(vlm, 1, 2),
        skip(vlm, 1, "attention"),
        pytest.raises(InterventionError, match="attention of block 1"),
    ):
        vlm.forward(batch)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mllama", "cross-attention"),
        ("gemma3", "window"),
        ("lfm2_vl", "state"),
    ],
)
def test_architectures_that_cannot_be_shortened_are_refused_by_name(name, reason):
    vlm = case(name).vlm
    with (
        pytest.raises(InterventionError, match=f"tokens of {name} .*{reason}"),
        drop_tokens(vlm, 1, 1),
    ):
        pass
