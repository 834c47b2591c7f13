"""Tuning of representations against its formulas in float64, and what it may not touch."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.contract.reference import traces
from tests.support.tiny import lively, tiny_llava
from tests.zoo import build, padded
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InputError, InterventionError, LayerError, LoadError
from xlvlms_tutorial.interventions import add, fold
from xlvlms_tutorial.methods.steering import RepresentationTuning, load_tuning
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample

D = 32
METHODS = ("loreft", "direft", "constant")
SAMPLES = [Sample(f"s{k}", Image.new("RGB", (32, 32), (40 * k, 10, 90))) for k in range(4)]
PROMPTS = ["What colour is the key ?", "Describe the picture .", "Is there a key ?", "What ?"]
ANSWERS = ["red", "a woman on grass", "no", "a blue key"]


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava())


@pytest.fixture(autouse=True)
def nothing_is_left_behind(vlm):
    yield
    assert traces(vlm) == []


@pytest.fixture
def batch(vlm):
    return vlm.batch([sample.image for sample in SAMPLES], PROMPTS)


def moved(vlm, layers=(1, 2), method="loreft", seed=3, **options):
    """A tuning away from its start, with parameters of its own in each layer."""
    tuning = RepresentationTuning(vlm, layers, method, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tuning.functions.named_parameters():
            change = 0.3 * torch.randn(weight.shape, generator=generator)
            # signs stand on the diagonal of reflections, and no training moves them
            weight.add_(change.triu(1) if name.endswith("original") else change)
    return tuning


def trained(vlm, tuning, **options):
    defaults = {"prompts": PROMPTS, "steps": 12, "batch_size": 3, "learning_rate": 0.05}
    return tuning.fit(vlm, SAMPLES, ANSWERS, **(defaults | options))


def parameters(tuning):
    return {name: p.detach().clone() for name, p in tuning.functions.named_parameters()}


# What it computes


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_the_identity(vlm, batch, method, gate):
    plain = vlm.forward(batch).logits
    with RepresentationTuning(vlm, [0, 2, 3], method, first=2, last=3, gate=gate).apply(vlm):
        assert torch.equal(vlm.forward(batch).logits, plain)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_states_become_what_the_formula_says_in_float64(vlm, batch, method, gate):
    tuning = moved(vlm, 2, method, rank=3, last=4, gate=gate)
    before = read(vlm, batch, 2)[2, "resid_post"].double().numpy()
    with tuning.apply(vlm):
        after = read(vlm, batch, 2)[2, "resid_post"].double().numpy()
    named = {}
    for name, weight in tuning.functions.named_parameters():
        named[name.split(".")[-1]] = weight.detach().double().numpy()
    directions = tuning.rotation(2).double().numpy()
    mask = tuning.positions(batch).numpy()
    for row, column in np.argwhere(mask):
        h = before[row, column]
        if method == "loreft":
            low = named["source"] @ h + named["bias"] - directions @ h
        elif method == "direft":
            low = named["source"] @ h + named["bias"]
        else:
            low = named["bias"]
        change = directions.T @ low
        if gate:
            score = named["direction"] @ (h / np.sqrt((h**2).mean())) + named["offset"]
            change = change / (1 + np.exp(-score))
        np.testing.assert_allclose(after[row, column], h + change, atol=2e-5, rtol=0)
        assert np.abs(change).max() > 1e-4
    np.testing.assert_array_equal(after[~mask], before[~mask])


def test_loreft_sets_the_coordinates_in_its_subspace_and_leaves_the_others(vlm, batch):
    tuning = moved(vlm, 2, rank=4, last=2)
    mask, directions = tuning.positions(batch), tuning.rotation(2)
    before = read(vlm, batch, 2)[2, "resid_post"][mask]
    with tuning.apply(vlm):
        after = read(vlm, batch, 2)[2, "resid_post"][mask]
    function = tuning.functions["2"]
    wanted = before @ function.source.detach().T + function.bias.detach()
    torch.testing.assert_close(after @ directions.T, wanted, atol=1e-5, rtol=0)
    beside = torch.eye(D) - directions.T @ directions
    torch.testing.assert_close(after @ beside, before @ beside, atol=1e-5, rtol=0)


def test_the_constant_is_a_steering_vector(vlm, batch):
    tuning = moved(vlm, 2, "constant", rank=2, last=1)
    vector = tuning.functions["2"].bias.detach() @ tuning.rotation(2)
    with tuning.apply(vlm):
        tuned = vlm.forward(batch).logits
    with add(vlm, vector, 2, positions=tuning.positions(batch)):
        torch.testing.assert_close(vlm.forward(batch).logits, tuned, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 5, D])
@pytest.mark.parametrize("method", ["loreft", "constant"])
def test_rows_stay_orthonormal_while_they_are_trained(vlm, method, rank):
    tuning = RepresentationTuning(vlm, [1, 2], method, rank=rank, last=2)
    start = tuning.rotation(1)
    trained(vlm, tuning, steps=15, learning_rate=0.1)
    for layer in (1, 2):
        rows = tuning.rotation(layer)
        torch.testing.assert_close(rows @ rows.T, torch.eye(rank), atol=1e-5, rtol=0)
    assert not torch.allclose(tuning.rotation(1), start, atol=1e-2)


# What is trained


@pytest.mark.parametrize(("method", "each"), [("loreft", 2), ("direft", 2), ("constant", 1)])
@pytest.mark.parametrize("gate", [False, True])
def test_parameters_are_counted_exactly(vlm, method, each, gate):
    tuning = RepresentationTuning(vlm, [0, 1, 3, 3], method, rank=5, gate=gate)
    assert tuning.layers == [0, 1, 3]
    assert tuning.n_parameters == 3 * (each * 5 * D + 5 + gate * (D + 1))


def test_training_lowers_the_loss_and_moves_its_parameters_alone(vlm):
    before = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    tuning = RepresentationTuning(vlm, [1, 3], rank=4, last=3, gate=True)
    start = parameters(tuning)
    history = trained(vlm, tuning, steps=40)
    assert list(history.columns) == ["step", "loss", "seconds"]
    assert history["step"].tolist() == list(range(1, 41))
    assert history["loss"].tail(5).mean() < history["loss"].head(3).mean() - 0.3
    after = vlm.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.grad is None for weight in vlm.model.parameters())
    assert all(not torch.equal(start[name], p) for name, p in parameters(tuning).items())


def test_weights_that_could_be_trained_get_no_gradient_and_can_be_trained_after():
    vlm = tiny_llava()
    vlm.model.requires_grad_(True)
    trained(vlm, RepresentationTuning(vlm, 2), steps=2)
    assert all(p.requires_grad and p.grad is None for p in vlm.model.parameters())


def test_the_same_seeds_give_the_same_function_and_others_do_not(vlm):
    first, again, drawn, data = (
        RepresentationTuning(vlm, 2, seed=seed, last=2) for seed in (0, 0, 1, 0)
    )
    trained(vlm, first), trained(vlm, again), trained(vlm, drawn), trained(vlm, data, seed=1)
    assert all(torch.equal(parameters(again)[k], p) for k, p in parameters(first).items())
    for other in (drawn, data):
        assert not torch.equal(other.rotation(2), first.rotation(2))


def test_a_model_in_half_precision_trains_a_function_in_float32():
    vlm = tiny_llava()
    vlm.model.to(torch.bfloat16)
    tuning = RepresentationTuning(vlm, [1, 2], last=2)
    history = trained(vlm, tuning, steps=20)
    assert {weight.dtype for weight in tuning.functions.parameters()} == {torch.float32}
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    batch = vlm.batch([SAMPLES[0].image], [PROMPTS[0]])
    with tuning.apply(vlm):
        assert vlm.forward(batch).logits.dtype == torch.bfloat16


def test_by_default_it_learns_the_first_captions_as_descriptions():
    from dataclasses import replace

    samples = [replace(s, captions=(a, "key")) for s, a in zip(SAMPLES, ANSWERS, strict=True)]
    first, second = tiny_llava(), tiny_llava()
    default, explicit = RepresentationTuning(first, 2), RepresentationTuning(second, 2)
    one = default.fit(first, samples, steps=2, batch_size=4)
    two = explicit.fit(
        second, samples, lambda s: s.captions[0], prompts="Describe the image.", steps=2
    )
    assert one["loss"].tolist() == two["loss"].tolist()
    with pytest.raises(InputError, match="4 samples without a caption"):
        default.fit(first, SAMPLES, steps=1)


# Where it acts


def test_only_the_first_and_last_positions_of_each_prompt_change(vlm, batch):
    tuning = moved(vlm, [0], first=2, last=3)
    mask = tuning.positions(batch)
    for row, real in enumerate(batch["attention_mask"].bool()):
        places = real.nonzero().flatten().tolist()
        assert mask[row].nonzero().flatten().tolist() == places[:2] + places[-3:]
    before = read(vlm, batch, 0)[0, "resid_post"]
    with tuning.apply(vlm):
        after = read(vlm, batch, 0)[0, "resid_post"]
    assert torch.equal((after != before).any(dim=-1), mask)


def test_an_answer_in_the_batch_moves_no_position(vlm, batch):
    tuning = RepresentationTuning(vlm, 1, first=1, last=2)
    with_answers = vlm.batch([s.image for s in SAMPLES], PROMPTS, ANSWERS)
    for row in range(len(SAMPLES)):
        ids = batch["input_ids"][row][tuning.positions(batch)[row]]
        assert torch.equal(with_answers["input_ids"][row][tuning.positions(with_answers)[row]], ids)
    assert not (tuning.positions(with_answers) & with_answers.mask("answer")).any()


def flipped(batch: Batch) -> Batch:
    """The same rows, padded on the right."""
    order = torch.stack(
        [torch.cat([m.nonzero(), (~m).nonzero()]).flatten() for m in batch["attention_mask"].bool()]
    )
    right = Batch(dict(batch))
    for name in ("input_ids", "attention_mask"):
        right[name] = batch[name].gather(1, order)
    right.spans = batch.spans.gather(1, order)
    return right


@pytest.mark.parametrize("answers", [None, ANSWERS])
def test_padding_on_the_left_and_on_the_right_give_the_same(vlm, answers):
    left = vlm.batch([sample.image for sample in SAMPLES], PROMPTS, answers)
    right = flipped(left)
    assert (right["attention_mask"][:, -1] == 0).any()
    tuning = moved(vlm, [0, 2], first=3, last=4)
    with tuning.apply(vlm):
        outputs = [vlm.forward(inputs).logits for inputs in (left, right)]
    real = [inputs["attention_mask"].bool() for inputs in (left, right)]
    torch.testing.assert_close(outputs[0][real[0]], outputs[1][real[1]], atol=1e-4, rtol=0)
    assert not torch.allclose(outputs[0], vlm.forward(left).logits, atol=1e-2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_in_a_generation_it_acts_on_the_prompt_alone(vlm, batch, use_cache):
    tuning = moved(vlm, [1, 2], first=1, last=2)
    with tuning.apply(vlm):
        ids = vlm.generate_ids(batch, 3, min_new_tokens=3, use_cache=use_cache)
    # the same tokens from forwards over prompt and answer, with the mask put in by hand
    longer = Batch(dict(batch))
    longer["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(ids)], dim=1)
    answer = torch.full_like(ids, SPANS.index("answer"))
    longer.spans = torch.cat([batch.spans, answer], dim=1)
    assert torch.equal(tuning.positions(longer)[:, :-3], tuning.positions(batch))
    with tuning.apply(vlm):
        logits = vlm.forward(longer).logits[:, -4:-1]
    # what a model never says is suppressed in a generation
    logits[..., vlm.model.generation_config.suppress_tokens] = -torch.inf
    assert torch.equal(logits.argmax(dim=-1), ids)


def test_decoding_steps_leave_the_states_alone(vlm, batch):
    tuning, calls = moved(vlm, [2], last=1), []
    tuning.functions["2"].register_forward_hook(lambda *_: calls.append(1))
    with tuning.apply(vlm):
        vlm.generate_ids(batch, 4, min_new_tokens=4)
    assert len(calls) == 1


def test_answers_about_one_picture_are_those_of_whole_prompts(vlm):
    tuning = moved(vlm, [1], first=2, last=4)
    picture = SAMPLES[1].image
    with tuning.apply(vlm):
        together = vlm.generate([picture] * 4, PROMPTS, max_new_tokens=3)
        alone = [vlm.generate([picture], [text], max_new_tokens=3)[0] for text in PROMPTS]
    assert together == alone


@pytest.mark.parametrize("name", ["qwen2_vl", "blip2", "mllama", "paligemma"])
def test_other_architectures_are_tuned_at_the_same_positions(name):
    model, inputs = build(name)
    vlm = VLM(model, None, name)
    batch = vlm.prepare(padded(name, inputs))
    tuning = moved(vlm, [2], first=1, last=2)
    before = read(vlm, batch, 2)[2, "resid_post"]
    with tuning.apply(vlm):
        after = read(vlm, batch, 2)[2, "resid_post"]
    mask = tuning.positions(batch)
    assert torch.equal((after != before).any(dim=-1), mask)
    assert mask.sum(dim=1).tolist() == [3] * len(mask)


def test_states_captured_meanwhile_name_its_parameters(vlm):
    one, other = moved(vlm, [1]), moved(vlm, [1], seed=4)
    names = []
    for tuning in (one, other):
        with tuning.apply(vlm):
            names.append(vlm.active[-1])
    assert names[0].startswith("representation_tuning(tuning=RepresentationTuning(loreft, layers 1")
    assert names[0] != names[1]


# Files


@pytest.mark.parametrize("method", METHODS)
def test_a_file_holds_all_of_it(vlm, batch, tmp_path, method):
    tuning = moved(vlm, [1, 3], method, rank=3, first=1, last=2, gate=method == "direft", seed=7)
    path = tuning.save(tmp_path / "tuning.safetensors")
    again = load_tuning(path, vlm)
    assert repr(again) == repr(tuning) and again.n_parameters == tuning.n_parameters
    with tuning.apply(vlm):
        logits = vlm.forward(batch).logits
    with again.apply(vlm):
        assert torch.equal(vlm.forward(batch).logits, logits)


def test_another_model_and_another_width_are_refused(vlm, tmp_path):
    tuning = RepresentationTuning(vlm, 1)
    path = tuning.save(tmp_path / "tuning.safetensors")
    renamed = VLM(vlm.model, vlm.processor, "other")
    wider = tiny_llava()
    wider.model.config.text_config.hidden_size = 2 * D
    for other, match in ((renamed, "models of"), (wider, "widths of")):
        with pytest.raises(InputError, match=match):
            load_tuning(path, other)
        with pytest.raises(InputError, match=match), tuning.apply(other):
            pass
        with pytest.raises(InputError, match=match):
            tuning.fit(other, SAMPLES, ANSWERS, steps=1)


def test_files_that_are_no_tuning_are_refused(vlm, tmp_path):
    path = RepresentationTuning(vlm, 1).save(tmp_path / "tuning.safetensors")
    with pytest.raises(LoadError, match="cannot be read"):
        load_tuning(tmp_path / "absent", vlm)
    tensors, other = load_file(path), tmp_path / "other"
    save_file(tensors, other, {"format": "vectors"})
    with pytest.raises(LoadError, match="is no file of format"):
        load_tuning(other, vlm)
    from xlvlms_tutorial.io import load_tensors

    _, metadata = load_tensors(path)
    tensors.pop("1.bias")
    save_file(tensors, other, metadata)
    with pytest.raises(LoadError, match="is damaged"):
        load_tuning(other, vlm)
    save_file(load_file(path), other, metadata | {"settings": "{}"})
    with pytest.raises(LoadError, match="is damaged"):
        load_tuning(other, vlm)


# What is refused


@pytest.mark.parametrize(
    ("layers", "options", "error", "match"),
    [
        (4, {}, LayerError, "layer 4"),
        ([1, -1], {}, LayerError, "layer -1"),
        ([], {}, InputError, "no layers"),
        (1, {"rank": D + 1}, InputError, "rank is 33; give at most the width, 32"),
        (1, {"rank": 0}, InputError, "rank is 0"),
        (1, {"method": "lora"}, InputError, "'loreft', 'direft', 'constant'"),
        (1, {"first": -1}, InputError, "first is -1; give 0 or more"),
        (1, {"last": True}, InputError, "last is True"),
        (1, {"last": 0}, InputError, "no positions"),
        (1, {"seed": -1}, InputError, "seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(vlm, layers, options, error, match):
    with pytest.raises(error, match=match):
        RepresentationTuning(vlm, layers, **options)


def test_positions_beyond_the_prompt_are_refused(vlm, batch):
    shortest = int(batch["attention_mask"].sum(dim=1).min())
    RepresentationTuning(vlm, 1, first=2, last=shortest - 2).positions(batch)
    tuning = RepresentationTuning(vlm, 1, first=3, last=shortest - 2)
    with (
        pytest.raises(InterventionError, match=f"of a prompt of {shortest}; tune at most"),
        tuning.apply(vlm),
    ):
        vlm.forward(batch)
    with pytest.raises(InterventionError, match="of a prompt of"):
        trained(vlm, tuning)


@pytest.mark.parametrize(
    ("answers", "options", "match"),
    [
        (["red"], {}, "answers: 1"),
        ([*ANSWERS[:3], " "], {}, "an answer that is empty"),
        (ANSWERS, {"prompts": PROMPTS[:2]}, "prompts: 2"),
        (ANSWERS, {"steps": 0}, "steps is 0"),
        (ANSWERS, {"batch_size": 0}, "batch_size is 0"),
        (ANSWERS, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (ANSWERS, {"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_trained_is_refused(vlm, answers, options, match):
    with pytest.raises(InputError, match=match):
        RepresentationTuning(vlm, 1).fit(vlm, SAMPLES, answers, **options)
    with pytest.raises(InputError, match="no samples"):
        RepresentationTuning(vlm, 1).fit(vlm, [], [])


def test_a_loss_that_is_no_number_ends_the_training(vlm):
    tuning = RepresentationTuning(vlm, 1)
    with torch.no_grad():
        tuning.functions["1"].bias.fill_(torch.nan)
    with pytest.raises(InputError, match="the loss of step 1 is nan; train with a lower"):
        trained(vlm, tuning)


def test_inputs_whose_positions_are_unknown_are_refused(vlm, batch):
    tuning = RepresentationTuning(vlm, 1)
    with (
        pytest.raises(InterventionError, match="of unknown inputs; run the model by vlm.forward"),
        tuning.apply(vlm),
    ):
        vlm.model(**batch)


def test_a_folded_vector_is_not_tuned_away(vlm):
    with (
        fold(vlm, torch.ones(D), 2),
        pytest.raises(InterventionError, match="folded into its bias"),
        RepresentationTuning(vlm, 2).apply(vlm),
    ):
        pass


def test_a_layer_that_is_not_tuned_has_no_rotation(vlm):
    with pytest.raises(InputError, match="allowed: 1"):
        RepresentationTuning(vlm, 1).rotation(2)
