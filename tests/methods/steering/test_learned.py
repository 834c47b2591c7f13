"""Learned steering against closed forms, loops of its own, and a model made by hand."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.contract.reference import traces
from tests.support.steering import PICTURES, TEXTS, noise
from tests.support.tiny import PICTURE, lively, tiny_llava
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InputError, InterventionError, LayerError, LoadError
from xlvlms_tutorial.interventions import add
from xlvlms_tutorial.methods.steering import (
    LearnedSteering,
    ProbeSteering,
    balanced_threshold,
    by_class,
    contrast_shifts,
    load_steering,
    mean_shift,
    mean_shifts_by_class,
    random_shifts,
    remaining,
    steer_by,
)
from xlvlms_tutorial.methods.steering.shifts import svd_decoder
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.samples import Sample

L = 3
QUESTION = "Is there a key in the picture ?"


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava())


@pytest.fixture(autouse=True)
def nothing_is_left_behind(vlm):
    yield
    assert traces(vlm) == []


@pytest.fixture
def batch(vlm):
    return vlm.batch(PICTURES, TEXTS)


def samples_of(n):
    return [Sample(str(k), PICTURE) for k in range(n)]


def fitted(vlm, n=20, **options):
    states, shifts = noise(n, vlm.width), noise(n, vlm.width, seed=1)
    options = {"n_hidden": 4, "epochs": 3} | options
    return LearnedSteering(**options).fit(states, shifts, vlm.name)


# The facts of the pilot, on a model whose numbers are written by hand


@pytest.fixture(scope="module")
def unrepeating():
    """A model whose blocks do nothing, and that says anything but the word it has just read.

    The state of a token is its embedding. After "?" yes and no are about equally likely.
    """
    vlm = tiny_llava()
    token = vlm.tokenizer.convert_tokens_to_ids
    embeddings = vlm.model.get_input_embeddings().weight
    head = anatomy.unembedding(vlm.model).weight
    with torch.no_grad():
        for block in vlm.blocks:
            anatomy.mlp_exit(block).weight.zero_()
            anatomy.attention(block).o_proj.weight.zero_()
        embeddings.copy_(torch.eye(len(embeddings), vlm.width))
        head.zero_()
        for word in ("yes", "no"):
            head[token(word), token(word)] = -1.0
        # what the prompt ends with
        head[[token("yes"), token("no")], token("\n")] = 0.5
    return vlm


def says_yes(vlm, shift, strength):
    """Whether yes is likelier than no for each row of shifts added to the prompts' last states."""
    batch = vlm.batch([PICTURE] * len(shift), [QUESTION] * len(shift))
    with add(vlm, shift, 1, strength, "last"):
        logits = vlm.forward(batch).logits[:, -1]
    yes, no = vlm.tokenizer.convert_tokens_to_ids(["yes", "no"])
    return (logits[:, yes] > logits[:, no]).tolist()


def test_the_oracle_with_its_documented_sign_inverts_the_answers(unrepeating):
    # it is read where the answer stands, and added where it must be produced
    shifts = contrast_shifts(
        unrepeating, samples_of(2), ["yes", "no"], ["no", "yes"], 1, prompt=QUESTION
    )
    assert says_yes(unrepeating, shifts, 1.0) == [False, True]
    assert says_yes(unrepeating, shifts, -1.0) == [True, False]


def test_the_mean_shift_of_balanced_answers_is_nothing(unrepeating):
    answers = ["yes", "no"] * 3
    shifts = contrast_shifts(
        unrepeating, samples_of(6), answers, answers[1:] + answers[:1], 1, prompt=QUESTION
    )
    assert shifts.norm(dim=1).min() > 1
    assert mean_shift(shifts).norm() < 1e-6
    assert remaining(shifts) < 1e-6
    assert remaining(shifts[::2]) == pytest.approx(1)


def test_averaged_targets_are_too_weak(unrepeating):
    wanted, unwanted = ["yes the picture"], ["no the picture"]
    arguments = unrepeating, samples_of(1), wanted, unwanted, 1
    averaged = contrast_shifts(*arguments, prompt=QUESTION, read="mean")
    single = contrast_shifts(
        unrepeating, samples_of(1), ["yes"], ["no"], 1, prompt=QUESTION, read="last"
    )
    assert torch.allclose(averaged, single / 3, atol=1e-6)
    # against a lean to yes that the whole shift overcomes, a third of it does not
    lean = 0.5 * single
    assert says_yes(unrepeating, -lean + single, 1.0) == [False]
    assert says_yes(unrepeating, -lean + averaged, 1.0) == [True]
    # the last of three words is the same in both, and so is its state here
    last = contrast_shifts(*arguments, prompt=QUESTION, read="last")
    assert not last.any()


# Shifts


def test_shifts_are_differences_of_states_at_the_completions(vlm):
    samples = samples_of(2)
    wanted, unwanted = ["a red key", "no"], ["a blue key", "no"]
    shifts = contrast_shifts(vlm, samples, wanted, unwanted, 2, prompt=QUESTION, read="mean")
    sides = []
    for text in ("a red key", "a blue key"):
        batch = vlm.batch([PICTURE], [QUESTION], [text])
        states = read(vlm, batch, 2)[2, "resid_post"]
        sides.append(states[batch.mask("answer").cpu()].mean(dim=0))
    assert torch.allclose(shifts[0], sides[0] - sides[1], atol=1e-5)
    assert not shifts[1].any()


def test_means_by_class_are_the_means_of_their_rows():
    shifts = noise(7, 3)
    labels = list("abacbac")
    means = mean_shifts_by_class(shifts, labels)
    for name in "abc":
        rows = [shifts[k] for k in range(7) if labels[k] == name]
        assert torch.allclose(means[name], torch.stack(rows).mean(0), atol=1e-6)
    assert torch.equal(by_class(means, ["c", "a"]), torch.stack([means["c"], means["a"]]))
    with pytest.raises(InputError, match="class 'd' has no samples"):
        mean_shifts_by_class(shifts, labels, list("abcd"))
    with pytest.raises(InputError, match="allowed"):
        by_class(means, ["d"])


def test_a_random_shift_is_as_long_and_points_one_way():
    shifts = noise(5, 8)
    drawn = random_shifts(shifts, seed=3)
    assert torch.allclose(drawn.norm(dim=1), shifts.norm(dim=1))
    cosines = torch.nn.functional.cosine_similarity(drawn, drawn[:1].expand_as(drawn))
    assert torch.allclose(cosines, torch.ones(5))
    assert not torch.allclose(drawn, random_shifts(shifts, seed=4))


def test_the_threshold_is_the_best_there_is():
    gaps, labels = noise(40)[:, None].flatten(), (noise(40, seed=2) > 0).tolist()
    chosen = balanced_threshold(gaps, labels)
    right = np.array(labels)
    of = lambda threshold: ((gaps.numpy() > threshold) == right).mean()
    assert of(chosen) == max(of(threshold) for threshold in np.linspace(-4, 4, 4001))
    with pytest.raises(InputError, match="finite"):
        balanced_threshold(torch.tensor([float("nan")]), [True])


# The function


def test_a_linear_map_is_recovered():
    states = noise(400, 6)
    shifts = 0.2 * states @ noise(6, 6, seed=1)
    # tanh is nearly linear where its input is small, which a small target invites
    steering = LearnedSteering(6, epochs=400, learning_rate=1e-2).fit(states[:300], shifts[:300])
    error = (steering.predict(states[300:]) - shifts[300:]).square().mean()
    assert error < 0.03 * shifts[300:].square().mean()


def test_the_decoder_starts_with_the_directions_that_leave_least():
    shifts = noise(30, 8) + 5
    decoder = svd_decoder(shifts, 3)
    assert torch.allclose(decoder.T @ decoder, torch.eye(3), atol=1e-5)
    centred = (shifts - shifts.mean(0)).double()
    left = (centred - centred @ decoder.double() @ decoder.T.double()).square().sum()
    singular = torch.linalg.svdvals(centred)
    assert float(left) == pytest.approx(float(singular[3:].square().sum()), rel=1e-4)
    assert svd_decoder(shifts[:2], 5).shape == (8, 5)


def test_the_scales_of_states_and_shifts_do_not_matter():
    states, shifts = noise(50, 5), noise(50, 5, seed=1)
    first = LearnedSteering(3, epochs=5).fit(states, shifts)
    second = LearnedSteering(3, epochs=5).fit(1000 * states + 7, 30 * shifts)
    expected = 30 * first.predict(states)
    assert torch.allclose(second.predict(1000 * states + 7), expected, atol=0.02)


def test_the_function_is_linear_tanh_linear(vlm):
    steering = fitted(vlm)
    state = noise(1, vlm.width, seed=5)
    hidden = torch.tanh(steering.encoder @ state[0] + steering.bias)
    assert torch.allclose(steering.predict(state)[0], steering.decoder @ hidden, atol=1e-5)
    assert steering.n_parameters == 2 * 4 * vlm.width + 4
    assert "260 parameters" in repr(steering)


@pytest.mark.parametrize("loss", ["mse", "mse+l1-cos"])
def test_losses_go_down_and_are_those_of_the_formula(loss):
    states = noise(64, 6)
    shifts = torch.tanh(states @ noise(6, 6, seed=1))
    steering = LearnedSteering(6, loss, epochs=60, learning_rate=1e-2).fit(states, shifts)
    assert steering.history[-1] < 0.7 * steering.history[0]
    predicted = steering.predict(states)
    expected = (predicted - shifts).square().mean()
    if loss != "mse":
        cosine = torch.nn.functional.cosine_similarity(predicted, shifts).mean()
        expected = expected + (predicted - shifts).abs().mean() - 0.1 * 0.5 * cosine
    assert torch.allclose(steering._loss(predicted, shifts, 0.5), expected)


def test_the_same_seed_gives_the_same_function(vlm):
    assert fitted(vlm).digest == fitted(vlm).digest
    assert fitted(vlm).digest != fitted(vlm, seed=1).digest


def test_a_probe_adds_one_of_two_vectors():
    states, shifts = noise(60, 4), noise(60, 4, seed=1)
    labels = ["yes" if row[0] > 0 else "no" for row in states]
    steering = ProbeSteering(100.0).fit(states, shifts, labels)
    means = mean_shifts_by_class(shifts, labels)
    assert steering.labels(states) == labels
    assert torch.allclose(steering.predict(states), by_class(means, labels))
    assert steering.n_parameters == 4 + 1 + 8
    labels = [label if row[1] > 0 else "perhaps" for label, row in zip(labels, states, strict=True)]
    steering = ProbeSteering(100.0).fit(states, shifts, labels)
    assert np.mean(np.array(steering.labels(states)) == labels) > 0.9
    assert steering.n_parameters == 3 * (4 + 1) + 3 * 4
    with pytest.raises(InputError, match="two classes"):
        ProbeSteering().fit(states, shifts, ["yes"] * 60)


# Its application


@pytest.mark.parametrize("positions", ["all", "last", "image"])
@pytest.mark.parametrize("source", [1, 2])
def test_the_vector_of_the_prompts_last_token_is_added(vlm, batch, positions, source):
    steering = fitted(vlm)
    plain = read(vlm, batch, [source, 2])
    expected = steering.predict(plain[source, "resid_post"][:, -1])
    with steering.apply(vlm, 2, -0.5, positions, read_layer=source):
        steered = read(vlm, batch, 2)[2, "resid_post"]
    moved = steered - plain[2, "resid_post"]
    mask = torch.ones_like(batch.spans, dtype=torch.bool)
    if positions == "last":
        mask[:, :-1] = False
    elif positions == "image":
        mask = batch.mask("image")
    for row in range(len(moved)):
        for place in range(moved.shape[1]):
            wanted = -0.5 * expected[row] if mask[row, place] else torch.zeros(vlm.width)
            assert torch.allclose(moved[row, place], wanted, atol=1e-4)


def test_an_answer_that_is_given_does_not_move_the_reading(vlm):
    steering = fitted(vlm)
    answered = vlm.batch(PICTURES, TEXTS, ["a red key", "a"])
    plain = capture(vlm, samples_of(2), 2, positions=-1, prompt="What ?")
    assert len(plain[2]) == 2
    first = answered.mask("answer").int().argmax(dim=1) - 1
    states = read(vlm, answered, 2)[2, "resid_post"]
    expected = steering.predict(states[torch.arange(2), first.cpu()])
    with steering.apply(vlm, 2):
        moved = read(vlm, answered, 2)[2, "resid_post"] - states
    assert torch.allclose(moved[:, -1], expected, atol=1e-4)


def test_the_function_is_evaluated_once_a_sample(vlm, batch):
    evaluated = []

    def function(states):
        evaluated.append(len(states))
        return torch.ones_like(states)

    for cache in (True, False):
        evaluated.clear()
        with steer_by(vlm, function, 2, read_layer=1):
            vlm.generate_ids(batch, 4, min_new_tokens=4, use_cache=cache)
        if cache:
            assert evaluated == [2]
    evaluated.clear()
    with steer_by(vlm, function, 2):
        vlm.generate_ids(batch, 4, min_new_tokens=4)
    assert evaluated == [2]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_a_generation_adds_the_same_vector_in_every_step(vlm, batch, options):
    steering = fitted(vlm)
    vectors = steering.predict(read(vlm, batch, 1)[1, "resid_post"][:, -1])
    with add(vlm, vectors, 2, 3.0, "last"):
        expected = vlm.generate_ids(batch, 4, min_new_tokens=4, **options)
    with steering.apply(vlm, 2, 3.0, "last", read_layer=1):
        ids = vlm.generate_ids(batch, 4, min_new_tokens=4, **options)
    assert torch.equal(ids, expected)


def test_what_changes_the_model_is_recorded(vlm):
    steering = fitted(vlm)
    with steering.apply(vlm, 2, 2.0, "last"):
        assert any(steering.digest in name for name in vlm.active)


# Files


def test_a_file_gives_the_same_function(vlm, tmp_path):
    steering = fitted(vlm, loss="mse+l1-cos")
    loaded = load_steering(steering.save(tmp_path / "new" / "steering.safetensors"))
    state = noise(3, vlm.width, seed=8)
    assert torch.equal(loaded.predict(state), steering.predict(state))
    assert (loaded.model, loaded.loss, loaded.n_hidden) == (vlm.name, "mse+l1-cos", 4)
    with loaded.apply(vlm, 1):
        pass


@pytest.mark.parametrize("damage", ["shape", "missing", "nan", "format", "settings", "absent"])
def test_a_damaged_file_is_refused(vlm, tmp_path, damage):
    steering = fitted(vlm)
    path = tmp_path / "steering.safetensors"
    parts = {name: getattr(steering, name).contiguous() for name in ("encoder", "bias", "decoder")}
    metadata = {"format": "xlvlms learned steering 1"}
    metadata["settings"] = json.dumps({"loss": "mse", "model": "m", "seed": 0})
    if damage == "shape":
        parts["bias"] = parts["bias"][:-1].contiguous()
    if damage == "missing":
        del parts["bias"]
    if damage == "nan":
        parts["bias"] = parts["bias"] * float("nan")
    if damage == "format":
        metadata["format"] = "other"
    if damage == "settings":
        metadata["settings"] = "{"
    if damage != "absent":
        save_file(parts, path, metadata)
    with pytest.raises(LoadError):
        load_steering(path)


# What is refused


@pytest.mark.parametrize(
    ("states", "shifts", "problem"),
    [
        (noise(4, 3), noise(5, 3), "4"),
        (noise(4, 3), noise(4, 2), "widths"),
        (noise(4, 3), noise(4, 3) / 0, "NaN or infinite"),
        (noise(4, 3) * float("nan"), noise(4, 3), "NaN or infinite"),
        (noise(4, 3), torch.zeros(4, 3), "all shifts are zero"),
        (noise(4), noise(4), "shape"),
        (noise(0, 3), noise(0, 3), "shape"),
    ],
)
def test_states_and_shifts_that_do_not_fit_are_refused(states, shifts, problem):
    with pytest.raises(InputError, match=problem):
        LearnedSteering(2).fit(states, shifts)


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(InputError, match="n_hidden is 4 for states of width 3"):
        LearnedSteering(4).fit(noise(9, 3), noise(9, 3))


@pytest.mark.parametrize(
    "options", [{"loss": "l2"}, {"n_hidden": 0}, {"learning_rate": float("inf")}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError):
        LearnedSteering(**options)


def test_what_is_not_fitted_steers_nothing(vlm):
    with pytest.raises(InputError, match="call fit first"):
        LearnedSteering().predict(noise(2, 3))


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        ({"strength": float("inf")}, InputError, "strength"),
        ({"strength": float("nan")}, InputError, "strength"),
        ({"layer": L + 1}, LayerError, "layer"),
        ({"read_layer": 3}, InputError, "above"),
        ({"positions": "nowhere"}, InterventionError, "positions"),
        ({"positions": torch.ones(2, 3, dtype=torch.bool)}, InterventionError, "positions"),
    ],
)
def test_a_place_or_strength_that_cannot_be_is_refused(vlm, batch, changes, error, problem):
    arguments = {"layer": 2} | changes
    with pytest.raises(error, match=problem), fitted(vlm).apply(vlm, **arguments):
        vlm.forward(batch)


def test_a_function_of_another_model_is_refused(vlm):
    states = noise(9, vlm.width)
    other = LearnedSteering(2, epochs=1).fit(states, states, "another")
    with pytest.raises(InputError, match="models"), other.apply(vlm, 1):
        pass
    narrow = LearnedSteering(2, epochs=1).fit(noise(9, 3), noise(9, 3), vlm.name)
    with pytest.raises(InputError, match="widths"), narrow.apply(vlm, 1):
        pass
    with pytest.raises(InputError, match="widths"):
        narrow.predict(states)


def test_completions_that_do_not_fit_are_refused(vlm):
    with pytest.raises(InputError):
        contrast_shifts(vlm, samples_of(2), ["yes"], ["no", "no"], 1, prompt=QUESTION)
    with pytest.raises(InputError, match="read"):
        contrast_shifts(vlm, samples_of(1), ["yes"], ["no"], 1, prompt=QUESTION, read="first")
