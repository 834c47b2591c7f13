"""Calibrations against activations that are kept and squared one by one.

Padding, spans, parts, every architecture, what is refused.
"""

import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import zoo
from tests.support.text_models import gpt2, text_batch
from tests.support.tiny import PICTURE, tiny_llava
from xlvlms_tutorial.errors import InputError, SpanError
from xlvlms_tutorial.methods.pruning.calibration import (
    calibrate,
    calibrate_on,
    fingerprint,
    linear_maps,
)
from xlvlms_tutorial.models.vlm import VLM

QUESTIONS = ["What colour ?", "Is there a red key in the picture ?", "Describe the picture ."]


def kept_inputs(vlm, batch):
    """Every input of every linear map of one forward, flattened to rows, each
    map read by a hook of its own.
    """
    recorded, hooks = {}, []
    for key, module in linear_maps(vlm).items():
        keep = lambda module, args, key=key: recorded.update(
            {key: args[0].detach().reshape(-1, args[0].shape[-1]).double()}
        )
        hooks.append(module.register_forward_pre_hook(keep))
    vlm.forward(batch)
    for hook in hooks:
        hook.remove()
    return recorded


def near(first, second):
    assert first.tokens == second.tokens
    for key, sums in first.squares.items():
        torch.testing.assert_close(sums, second.squares[key], rtol=1e-5, atol=1e-9)


def loop(rows):
    """The definition, in Python's own numbers."""
    return torch.tensor(
        [sum(float(x) ** 2 for x in column) for column in rows.T.tolist()], dtype=torch.float64
    )


@pytest.mark.parametrize("span", [None, "image", "question", ("image", "answer")])
def test_sums_are_those_of_a_double_loop_over_the_positions_that_count(vlm, span):
    batch = vlm.batch([PICTURE] * 3, QUESTIONS, ["red", "yes", "a woman on the grass"])
    names = (span,) if isinstance(span, str) else span
    mask = (batch["attention_mask"].bool() if span is None else batch.mask(*names)).flatten()
    result = calibrate_on(vlm, [batch], span)
    for key, rows in kept_inputs(vlm, batch).items():
        assert result.tokens[key] == int(mask.sum())
        torch.testing.assert_close(result.squares[key], loop(rows[mask]), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            result.norms(*key), (loop(rows[mask]) / int(mask.sum())).sqrt(), rtol=1e-6, atol=0
        )
    assert result.squares[1, "mlp.down_proj"].dtype == torch.float64


@pytest.mark.parametrize("span", [None, "question"])
def test_padding_adds_nothing(vlm, span):
    together = calibrate_on(vlm, [vlm.batch([PICTURE] * 3, QUESTIONS)], span)
    alone = [calibrate_on(vlm, [vlm.batch([PICTURE], [question])], span) for question in QUESTIONS]
    near(together, alone[0] + alone[1] + alone[2])


def test_what_stands_in_the_padding_may_be_nan(vlm):
    batch = vlm.batch([PICTURE] * 2, QUESTIONS[:2])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    before = calibrate_on(vlm, [batch])
    spoil = lambda module, args: (args[0].masked_fill(padding[..., None], float("nan")),)
    hook = vlm.blocks[2].mlp.down_proj.register_forward_pre_hook(spoil)
    try:
        near(calibrate_on(vlm, [batch]), before)
    finally:
        hook.remove()


def test_texts_without_a_picture_and_sequences_beyond_128(vlm):
    long = " ".join(["Is there a red key in the picture ?"] * 20)
    batch = vlm.batch(None, [long, "What colour ?"])
    assert batch["input_ids"].shape[1] > 150
    result = calibrate_on(vlm, [batch])
    mask = batch["attention_mask"].flatten().bool()
    for key, rows in kept_inputs(vlm, batch).items():
        torch.testing.assert_close(
            result.squares[key], rows[mask].square().sum(0), rtol=1e-5, atol=0
        )
    with pytest.raises(SpanError, match="image"):
        calibrate_on(vlm, [batch], "image")


def test_samples_are_taken_in_batches_of_any_size(vlm, samples):
    six = samples(6)
    ask = lambda sample: QUESTIONS[int(sample.id[1:]) % 3]
    whole = calibrate_on(
        vlm,
        [vlm.batch([s.image for s in six], [ask(s) for s in six], ["red"] * 6)],
        ("question", "answer"),
    )
    for size, answers in ((4, ["red"] * 6), (1, lambda sample: "red"), (16, ("red",) * 6)):
        near(
            calibrate(
                vlm,
                iter(six),
                span=("question", "answer"),
                prompt=ask,
                answers=answers,
                batch_size=size,
            ),
            whole,
        )
    near(calibrate(vlm, six), calibrate(vlm, six, prompt="Describe the picture."))


def test_parts_add_up_to_the_whole(vlm, samples):
    six = samples(6)
    near(calibrate(vlm, six[:2]) + calibrate(vlm, six[2:]), calibrate(vlm, six))
    shallow = tiny_llava(layers=2)
    with pytest.raises(
        InputError,
        match="weights behind two calibrations differ.*add calibrations of one language model",
    ):
        calibrate(vlm, six) + calibrate(shallow, six)


def test_calibrations_of_one_language_model_add_up_whatever_its_name(vlm, samples):
    first = calibrate(vlm, samples(2))
    second = calibrate(VLM(vlm.model, vlm.processor, "other"), samples(2))
    near(first + second, first + first)
    assert (first.model, (first + second).model) == (vlm.name, f"{vlm.name} + other")


def test_one_changed_weight_changes_the_fingerprint_and_nothing_outside_the_blocks_does():
    case = tiny_llava()
    before = fingerprint(case)
    assert before == fingerprint(tiny_llava())
    assert before == fingerprint(VLM(case.model, None, "other"))
    case.model.get_input_embeddings().weight.data.add_(1)
    assert before == fingerprint(case)
    weight = case.blocks[2].mlp.down_proj.weight.data
    weight[3, 5].nextafter_(torch.tensor(9.0))
    changed = fingerprint(case)
    weight[3, [6, 7]] = weight[3, [7, 6]]  # the sums of the rows do not see this
    assert len({before, changed, fingerprint(case)}) == 3
    case.model.bfloat16()
    half = fingerprint(case)
    case.model.half()
    assert len({before, half, fingerprint(case)}) == 3


def test_an_input_that_several_maps_share_is_summed_once(vlm, monkeypatch):
    calls, square = [], torch.Tensor.square
    monkeypatch.setattr(
        torch.Tensor, "square", lambda self: calls.append(self.shape) or square(self)
    )
    calibrate_on(vlm, [vlm.batch([PICTURE], QUESTIONS[:1])])
    width = [shape[-1] for shape in calls if len(shape) == 2]
    assert width.count(64) == 3  # the MLP's hidden layer, in each of three blocks
    # what enters queries, keys and values; the attention's output map; gate and up
    assert width.count(32) == 3 * 3


def test_nothing_is_left_on_the_model(vlm, samples):
    calibrate(vlm, samples(2))
    with pytest.raises(SpanError):
        calibrate(vlm, samples(2), span="video")
    assert not any(module._forward_pre_hooks for module in vlm.model.modules())


def test_progress_is_counted_in_batches(vlm, samples, capsys):
    calibrate(vlm, samples(3), batch_size=2)
    assert "calibrate" not in capsys.readouterr().err
    calibrate(vlm, samples(3), batch_size=2, progress=True)
    assert "/2" in capsys.readouterr().err


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_architecture_alone_and_padded(name):
    model, inputs = zoo.build(name)
    case = VLM(model, None, name)
    assert {key[0] for key in linear_maps(case)} == {1, 2, 3}
    rows = [case.prepare(zoo.prefixed(name, inputs)), case.prepare(inputs)]
    alone = [calibrate_on(case, [row]) for row in rows]
    for row, result in zip(rows, alone, strict=True):
        for key, kept_rows in kept_inputs(case, row).items():
            assert result.tokens[key] == len(kept_rows) > 0
            torch.testing.assert_close(
                result.squares[key], kept_rows.square().sum(0), rtol=1e-5, atol=1e-9
            )
    together, apart = (
        calibrate_on(case, [case.prepare(zoo.padded(name, inputs))]),
        alone[0] + alone[1],
    )
    assert together.tokens == apart.tokens
    for key, sums in together.squares.items():
        torch.testing.assert_close(
            sums, apart.squares[key], rtol=1e-3, atol=1e-4 * float(sums.max())
        )


def test_conv1d_is_a_linear_map():
    case = gpt2()
    maps = linear_maps(case)
    assert [name for layer, name in maps if layer == 1] == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    assert all(isinstance(module, Conv1D) for module in maps.values())
    batch = text_batch(case)
    result = calibrate_on(case, [batch])
    assert {key: len(sums) for key, sums in result.squares.items() if key[0] == 1} == {
        (1, "attn.c_attn"): 32,
        (1, "attn.c_proj"): 32,
        (1, "mlp.c_fc"): 32,
        (1, "mlp.c_proj"): 128,
    }
    for key, rows in kept_inputs(case, batch).items():
        torch.testing.assert_close(result.squares[key], rows.square().sum(0), rtol=1e-5, atol=0)


def test_cross_attention_counts_the_tiles_that_a_text_looks_at():
    model, inputs = zoo.build("mllama")
    case = VLM(model, None, "mllama")
    plain = calibrate_on(case, [case.prepare(inputs)])
    longer = dict(inputs)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        longer[name] = torch.cat([inputs[name], inputs[name]], dim=1)
    cross_mask = inputs["cross_attention_mask"]
    longer["cross_attention_mask"] = torch.cat([cross_mask, torch.zeros_like(cross_mask)], dim=2)
    with_padding = calibrate_on(case, [case.prepare(longer)])
    assert with_padding.tokens == plain.tokens
    key = (2, "cross_attn.k_proj")
    torch.testing.assert_close(with_padding.squares[key], plain.squares[key], rtol=1e-4, atol=1e-6)
    del longer["cross_attention_mask"]
    assert calibrate_on(case, [case.prepare(longer)]).tokens[key] == 2 * plain.tokens[key]


def test_without_a_picture_cross_attention_sees_no_token():
    model, _ = zoo.build("mllama")
    case = VLM(model, None, "mllama")
    text = calibrate_on(case, [text_batch(case)])
    assert text.tokens[1, "self_attn.q_proj"] == 12 and text.tokens[2, "cross_attn.q_proj"] == 0
    with pytest.raises(InputError, match=r"layer 2 cross_attn\.q_proj saw no token"):
        text.norms(2, "cross_attn.q_proj")
    with pytest.raises(InputError, match="no linear map 'q_proj' in layer 1"):
        text.norms(1, "q_proj")


def test_nan_is_named_by_layer_and_map():
    spoiled = tiny_llava()
    spoiled.blocks[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"enter layer 3 self_attn\.q_proj"):
        calibrate_on(spoiled, [spoiled.batch([PICTURE], QUESTIONS[:1])])
    spoiled = tiny_llava()
    spoiled.blocks[0].mlp.up_proj.weight.data.fill_(float("inf"))
    with pytest.raises(InputError, match=r"enter layer 1 mlp\.down_proj"):
        calibrate_on(spoiled, [spoiled.batch([PICTURE], QUESTIONS[:1])])


def test_weights_that_the_model_does_not_compute_with_are_refused():
    case = tiny_llava()
    case.blocks[1].mlp.up_proj.weight = nn.Parameter(
        torch.zeros(64, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(InputError, match=r"layer 2 mlp\.up_proj is quantised \(torch\.int8\)"):
        linear_maps(case)
    case = tiny_llava()
    case.blocks[0].mlp.gate_proj.to("meta")
    with pytest.raises(InputError, match=r"layer 1 mlp\.gate_proj is offloaded"):
        linear_maps(case)
    case = tiny_llava()
    case.blocks[2].mlp.up_proj.base_layer = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"layer 3 mlp\.up_proj has an adapter"):
        calibrate_on(case, [])


def test_a_map_that_sees_some_of_the_positions_only_is_refused():
    case = tiny_llava()
    plain = case.blocks[1].mlp.forward
    case.blocks[1].mlp.forward = lambda states: torch.cat(
        [plain(states[:, :4]), plain(states[:, 4:])], dim=1
    )
    with pytest.raises(InputError, match=r"layer 2 mlp\.gate_proj sees 4 rows for \d+ positions"):
        calibrate_on(case, [case.batch([PICTURE], QUESTIONS[:1])])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": []}, InputError, "0 samples"),
        ({"batch_size": 0}, InputError, "batches of 0"),
        ({"answers": ["red"]}, InputError, "samples: 2, answers: 1"),
        ({"span": ()}, InputError, "span is empty"),
        ({"span": "answer"}, SpanError, "answer"),
        ({"span": "picture"}, SpanError, "unknown kind"),
        ({"span": "audio"}, SpanError, "this model takes none"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused(vlm, samples, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        calibrate(vlm, **{"samples": samples(2), **options})


def test_no_batches_give_no_calibration(vlm):
    with pytest.raises(InputError, match="no batches"):
        calibrate_on(vlm, [])
