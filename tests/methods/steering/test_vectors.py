"""Steering vectors, concepts and logit biases against closed forms, loops in
float64, and the model's own logits.
"""

import json
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import models

from tests.contract.reference import traces
from tests.support.steering import PICTURES, PROVENANCE, TEXTS, by_hand, noise, one_vector
from tests.support.tiny import lively, tiny_llava
from tests.support.tokenizers import bytes_tokenizer, pieces_tokenizer
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import FileError, InputError, InterventionError, LayerError, LoadError
from xlvlms_tutorial.methods.concepts.baselines import PCA, KMeans
from xlvlms_tutorial.methods.steering import (
    SteeringVectors,
    concept_vectors,
    load_vectors,
    logit_bias,
    mean_difference,
    mean_logits_bias,
    random_control,
    shuffled_control,
    steer_by_concept,
)
from xlvlms_tutorial.methods.steering.logit_bias import first_pieces
from xlvlms_tutorial.models import anatomy

L = 3
PROVENANCE |= {"selection": {"positions": [-1]}}


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava())


@pytest.fixture
def batch(vlm):
    return vlm.batch(PICTURES, TEXTS)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(vlm):
    yield
    assert traces(vlm) == []


def stepped(vlm, batch, n=3):
    """The logits of each step of a greedy generation."""
    steps = []
    hook = anatomy.unembedding(vlm.model).register_forward_hook(
        lambda module, args, output: steps.append(output[:, -1].clone())
    )
    try:
        ids = vlm.generate_ids(batch, n, min_new_tokens=n)
    finally:
        hook.remove()
    return ids, torch.stack(steps, 1)


# Coarse vectors


def test_a_coarse_vector_is_the_difference_of_means_in_float64():
    a, b = by_hand(7, offset=100.0), by_hand(5, seed=1, offset=103.0)
    vectors = mean_difference(a, b)
    for layer in (1, 3):
        expected = []
        for k in range(a[layer].shape[1]):
            mean_a = sum(float(row[k]) for row in a[layer]) / 7
            mean_b = sum(float(row[k]) for row in b[layer]) / 5
            expected.append(mean_b - mean_a)
        np.testing.assert_allclose(vectors[layer].numpy(), expected, rtol=1e-6)
        assert vectors.norms[layer] == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    assert vectors.layers == [1, 3] and len(vectors) == 2 and vectors[1].dtype == torch.float32


def test_many_rows_are_summed_in_blocks(monkeypatch):
    a, b = by_hand(50), by_hand(41, seed=1)
    whole = mean_difference(a, b)
    monkeypatch.setattr("xlvlms_tutorial.methods.steering.vectors._ROWS", 8)
    torch.testing.assert_close(mean_difference(a, b)[3], whole[3], rtol=1e-6, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_way_back_is_the_negative(n, m, seed):
    a, b = by_hand(n, d=4, seed=2 * seed), by_hand(m, d=4, seed=2 * seed + 1)
    vectors, back = mean_difference(a, b), mean_difference(b, a)
    assert all(torch.equal(vectors[layer], -back[layer]) for layer in vectors.layers)


def test_shuffled_vectors_are_those_of_a_permutation_and_zero_on_average():
    a, b = by_hand(6, d=3), by_hand(4, d=3, seed=1, offset=5.0)
    draws = torch.stack([shuffled_control(a, b, seed)[3] for seed in range(400)])
    truth, spread = mean_difference(a, b)[3], draws.std(dim=0) / 400**0.5
    assert (draws.mean(dim=0).abs() < 4 * spread).all() and (truth.abs() > 20 * spread).all()
    rows, order = (
        torch.cat([a[3], b[3]]).double(),
        torch.randperm(10, generator=torch.Generator().manual_seed(7)),
    )
    expected = rows[order >= 6].mean(dim=0) - rows[order < 6].mean(dim=0)
    torch.testing.assert_close(shuffled_control(a, b, 7)[3], expected.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(shuffled_control(a, b, 7)[3], shuffled_control(a, b, 7)[3])


def test_random_vectors_are_as_long_and_reproducible():
    vectors = mean_difference(by_hand(6), by_hand(4, seed=1))
    result = random_control(vectors, 3)
    np.testing.assert_allclose(result.norms, vectors.norms, rtol=1e-5)
    assert torch.equal(result[3], random_control(vectors, 3)[3])
    assert not torch.equal(result[3], random_control(vectors, 4)[3])
    cosines = [
        torch.cosine_similarity(random_control(vectors, seed)[3], vectors[3], dim=0)
        for seed in range(200)
    ]
    assert abs(float(torch.stack(cosines).mean())) < 4 / (32 * 200) ** 0.5
    assert "random" in result.provenance["how"] and result.provenance["model"] == "tiny-llava"


def test_a_vector_knows_how_it_was_made(vlm, samples):
    states = capture(vlm, samples(6), "all", positions=-1, prompt="What colour ?")
    first = states.table["sample"] < 4
    vectors = mean_difference(states.select(first), states.select(~first))
    provenance = vectors.provenance
    assert (provenance["model"], provenance["how"], provenance["layers"]) == (
        "tiny-llava",
        "mean difference",
        [0, 1, 2, 3],
    )
    assert (provenance["source"]["n"], provenance["target"]["n"]) == (4, 2)
    assert provenance["source"]["ids_sha256"] != provenance["target"]["ids_sha256"]
    assert provenance["source"]["selection"] == {"positions": [-1]}
    assert provenance["source"]["prompts_sha256"] == states.provenance["prompts_sha256"]
    assert (
        json.loads(json.dumps(provenance)) == provenance
        and torch.__version__ == provenance["versions"]["torch"]
    )
    assert not vectors[0].any() and vectors[3].any()  # the same token enters all
    assert "4 source" in repr(vectors)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (by_hand(3), by_hand(3, seed=1, layers=(1, 2)), "layers and sites differ"),
        (by_hand(3, site="mlp_out"), by_hand(3, seed=1), "layers and sites differ"),
        (by_hand(3), by_hand(3, seed=1, model="other"), "model differ: tiny-llava and other"),
        (by_hand(3), by_hand(3, seed=1, prompt="Where ?"), "prompt differ"),
        (by_hand(3), by_hand(3, seed=1, interventions=["add"]), "interventions differ"),
        (
            by_hand(3),
            by_hand(3, seed=1, selection={"span": ["answer"]}),
            "kinds of positions differ",
        ),
        (by_hand(3), by_hand(3, seed=1, d=8), "widths at layer 1 differ: 32 and 8"),
    ],
)
@pytest.mark.parametrize("make", [mean_difference, shuffled_control])
def test_sets_that_do_not_belong_together_are_refused(make, source, target, message):
    with pytest.raises(InputError, match=message):
        make(source, target)


def test_other_words_are_the_same_kind_of_position_and_others_on_request():
    a = by_hand(3, selection={"words": ["sand"]})
    assert mean_difference(a, by_hand(3, seed=1, selection={"words": ["snow"]}))[3].any()
    pooled = by_hand(3, seed=1, selection={"span": ["answer"]})
    with pytest.raises(InputError, match="same_positions=False"):
        mean_difference(a, pooled)
    assert mean_difference(a, pooled, same_positions=False)[3].any()


def test_sets_from_which_there_is_no_vector_are_refused():
    a, b = by_hand(4), by_hand(4, seed=1)
    with pytest.raises(InputError, match="source and target are the same"):
        mean_difference(a, a)
    turned = Activations(
        {key: rows.flip(0) for key, rows in a.tensors.items()}, a.table, a.provenance
    )
    with pytest.raises(InputError, match="source and target are the same"):
        mean_difference(a, turned)
    for empty in ((a.select([False] * 4), b), (a, b.select([False] * 4))):
        with pytest.raises(InputError, match="one row or more"):
            mean_difference(*empty)
    b.tensors[3, "resid_post"][2, 5] = float("nan")
    with pytest.raises(InputError, match="1 of 4 states are NaN or infinite at layer 3"):
        mean_difference(a, b)
    with pytest.raises(InputError, match="no residual stream"):
        mean_difference(by_hand(3, site="mlp_out"), by_hand(3, seed=1, site="mlp_out"))


# What a file holds


def test_vectors_come_back_from_their_file(tmp_path):
    vectors = mean_difference(by_hand(6), by_hand(4, seed=1))
    loaded = load_vectors(vectors.save(tmp_path / "new" / "v.safetensors"))
    assert loaded.provenance == vectors.provenance and loaded.layers == vectors.layers
    assert all(torch.equal(loaded[layer], vectors[layer]) for layer in vectors.layers)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["v.safetensors"]


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "v"
    with pytest.raises(LoadError, match="cannot be read"):
        load_vectors(file)
    file.write_bytes(b"none")
    with pytest.raises(LoadError, match="cannot be read"):
        load_vectors(file)
    save_file({"1": torch.ones(3)}, file)
    with pytest.raises(LoadError, match="no file of format"):
        load_vectors(file)
    metadata = {"format": "xlvlms steering vectors 1", "provenance": "{}"}
    for tensors, extra in (
        ({"one": torch.ones(3)}, {}),
        ({"1": torch.ones(3)}, {"provenance": "[1"}),
        ({"1": torch.tensor([torch.nan])}, {}),
        ({"1": torch.ones(3, dtype=torch.int64)}, {}),
        ({"1": torch.ones(3, dtype=torch.bool)}, {}),
        ({"-1": torch.ones(3)}, {}),
        ({"1.5": torch.ones(3)}, {}),
        ({"1": torch.ones(3), "2": torch.ones(4)}, {}),
        ({"1": torch.ones(3, 1)}, {}),
        ({}, {}),
        ({"1": torch.ones(3)}, {"provenance": "[]"}),
        ({"1": torch.ones(3)}, {"provenance": "null"}),
        ({"1": torch.ones(3)}, {"provenance": "[" * 100_000}),
    ):
        save_file(tensors, file, metadata | extra)
        with pytest.raises(LoadError, match="damaged"):
            load_vectors(file)
    with pytest.raises(FileError, match="cannot be written"):
        one_vector(torch.ones(3), 1).save(file / "inside")


def test_only_layers_that_there_are():
    vectors = mean_difference(by_hand(3), by_hand(3, seed=1))
    with pytest.raises(InputError, match="no vector for layer 2; there are: 1, 3"):
        vectors[2]
    for layer in (0, 4, -1):
        with pytest.raises(LayerError):
            vectors[layer]
    with pytest.raises(TypeError):
        list(vectors)
    for wrong in ({}, {1: torch.tensor([1.0, torch.inf])}, {1: torch.zeros(0)}):
        with pytest.raises(InputError):
            SteeringVectors(wrong, {})
    with pytest.raises(InputError, match="widths"):
        SteeringVectors({1: torch.ones(2), 2: torch.ones(3)}, {})


# Steering


@pytest.mark.parametrize("positions", ["all", "last"])
def test_at_the_last_layer_the_first_token_is_that_of_the_closed_form(vlm, batch, positions):
    vector, states = noise(32), read(vlm, batch, L, positions="last")[L, "resid_post"][:, 0]
    shifted = states + 2.5 * vector
    norm, head = anatomy.final_norm(vlm.model), anatomy.unembedding(vlm.model)
    rms = (
        shifted
        / (shifted.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon).sqrt()
        * norm.weight
    )
    with one_vector(vector, L).apply(vlm, L, 2.5, positions):
        logits = vlm.forward(batch).logits[:, -1]
    torch.testing.assert_close(logits, rms @ head.weight.T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, vlm.forward(batch).logits[:, -1])


def test_at_the_last_layer_positions_that_predict_are_enough_for_a_whole_answer(vlm, batch):
    vectors = one_vector(2 * noise(32), L)
    with vectors.apply(vlm, L):
        ids, steps = stepped(vlm, batch)
    with vectors.apply(vlm, L, positions="last"):
        torch.testing.assert_close(stepped(vlm, batch)[1], steps)
    assert ids.shape == (2, 3)


def test_generated_positions_leave_the_first_token_as_it_is(vlm, batch):
    _, plain = stepped(vlm, batch)
    with one_vector(5 * noise(32), 2).apply(vlm, 2, positions="generated"):
        _, steered = stepped(vlm, batch)
    assert torch.equal(plain[:, 0], steered[:, 0])
    assert not torch.allclose(plain[:, 1], steered[:, 1])


def test_strength_zero_changes_nothing(vlm, batch):
    with one_vector(noise(32), 2).apply(vlm, 2, 0):
        steered = vlm.forward(batch).logits
    torch.testing.assert_close(steered, vlm.forward(batch).logits)


def test_steering_by_what_does_not_fit_is_refused(vlm):
    good = one_vector(noise(32), 2)
    wrong = [
        (one_vector(noise(32), 2, "another"), 2, 1.0, InputError, "another and tiny-llava"),
        (
            one_vector(noise(16), 2),
            2,
            1.0,
            InputError,
            "widths of vectors and model differ: 16 and 32",
        ),
        (good, 1, 1.0, LayerError, "layer 1"),
        (good, 2, float("nan"), InputError, "finite"),
        (good, 2, float("inf"), InputError, "finite"),
        (one_vector(torch.zeros(32), 2), 2, 1.0, InputError, "vector of layer 2 is zero"),
        (one_vector(noise(32), 9), 9, 1.0, LayerError, "0 to 3"),
    ]
    for vectors, layer, strength, error, message in wrong:
        with pytest.raises(error, match=message), vectors.apply(vlm, layer, strength):
            raise AssertionError
    with (
        pytest.raises(InterventionError, match="unknown positions"),
        good.apply(vlm, 2, positions="nowhere"),
    ):
        raise AssertionError


# Concepts


def test_vectors_lie_between_all_pairs_of_concepts():
    states = by_hand(40, d=5)
    result = concept_vectors(states, 3, 4, seed=2)
    centres = KMeans(4, seed=2).fit(states[3]).components_
    assert len(result) == 4 and result.layer == 3
    table = result.pairs
    assert {tuple(pair) for pair in table[["source", "target"]].to_numpy()} == {
        (i, j) for i in range(4) for j in range(4) if i != j
    }
    for row in table.itertuples():
        expected = centres[row.target] - centres[row.source]
        between = result.between(row.source, row.target)
        np.testing.assert_allclose(between[3], expected, rtol=1e-5, atol=1e-6)
        assert row.norm == pytest.approx(np.linalg.norm(expected), rel=1e-4)
        sizes = np.linalg.norm(centres[row.source]) * np.linalg.norm(centres[row.target])
        assert row.cosine == pytest.approx(
            centres[row.source] @ centres[row.target] / sizes, abs=1e-5
        )
    assert table["norm"].is_monotonic_increasing
    assert result.between(1, 2).provenance["how"] == "concept 1 to concept 2 of 4"
    assert result.between(1, 2).provenance["source"]["n"] == 40


def test_any_dictionary_gives_concepts_and_stays_as_it_was():
    states, plain = by_hand(40, d=5), PCA(3)
    result = concept_vectors(states, 1, plain)
    assert not hasattr(plain, "components_") and isinstance(result.dictionary, PCA)
    fitted = PCA(2).fit(states[3])
    assert concept_vectors(states, 1, fitted).dictionary is fitted
    with pytest.raises(InputError, match="widths of dictionary and states differ: 5 and 7"):
        concept_vectors(by_hand(20, d=7), 1, fitted)


def test_concepts_that_there_are_not_are_refused():
    states = by_hand(20, d=5)
    result = concept_vectors(states, 1, 3)
    for pair in ((0, 3), (-1, 0), (True, 0)):
        with pytest.raises(InputError, match="give one of 0 to 2"):
            result.between(*pair)
    with pytest.raises(InputError, match="two different concepts"):
        result.between(1, 1)
    with pytest.raises(InputError, match="give one of 0 to 2"):
        result.gate(3)
    for wrong in (1, 0, True):
        with pytest.raises(InputError, match="2 or more"):
            concept_vectors(states, 1, wrong)
    with pytest.raises(InputError, match="20 samples for 30 concepts"):
        concept_vectors(states, 1, 30)
    with pytest.raises(LayerError):
        concept_vectors(states, 7, 2)


@pytest.mark.parametrize("dictionary", [4, PCA(3)])
def test_a_gate_lets_in_the_samples_that_show_the_concept(dictionary):
    states = by_hand(60, d=5)
    result = concept_vectors(states, 3, dictionary)
    prompts = torch.cat([noise(60, 2, 5, seed=3), states[3][:, None]], dim=1)
    codes = np.abs(result.dictionary.transform(states[3]))
    gates = torch.stack([result.gate(i)(prompts) for i in range(len(result))])
    assert (gates.sum(dim=0) == 1).all()
    assert gates.int().argmax(dim=0).tolist() == codes.argmax(axis=1).tolist()
    if isinstance(dictionary, int):
        nearest = torch.cdist(states[3], result.concepts).argmin(dim=1)
        assert gates.int().argmax(dim=0).tolist() == nearest.tolist()
    assert result.gate(0)(prompts.bfloat16()).shape == (60,)


def test_a_gated_vector_steers_only_where_its_concept_is(vlm, samples):
    few = samples(8)
    states = capture(vlm, few, 2, positions=-1, prompt=TEXTS[1])
    result = concept_vectors(states, 2, 2)
    batch = vlm.batch([sample.image for sample in few], [TEXTS[1]] * 8)
    before = read(vlm, batch, 2)[2, "resid_post"]
    with result.between(0, 1).apply(vlm, 2, 3.0, gate=result.gate(0)):
        moved = (read(vlm, batch, 2)[2, "resid_post"] - before).abs().amax(dim=(1, 2)) > 1e-4
    assert moved.tolist() == (result.dictionary.labels_ == 0).tolist() and 0 < int(moved.sum()) < 8


# Steering by the concept of each token


def looped(states, centres, shifts, strength, min_cosine):
    """The same token by token, in float64."""
    steered = states.double().clone()
    for row in steered.reshape(-1, states.shape[-1]):
        cosines = [float(row @ c / (row.norm() * c.norm())) for c in centres.double()]
        best = max(range(len(cosines)), key=cosines.__getitem__)
        if min_cosine is None or cosines[best] >= min_cosine:
            row.add_(strength * shifts[best].double())
    return steered


@pytest.mark.parametrize("min_cosine", [None, 0.2, -1.0, 0.99])
def test_every_token_is_steered_by_its_own_concept(vlm, batch, min_cosine):
    before = read(vlm, batch, 2)[2, "resid_post"]
    centres = torch.cat([before[0, [1, 5]] * 3, noise(2, 32)])
    shifts = noise(4, 32, seed=1)
    shifts[1] = 0
    with steer_by_concept(vlm, centres, shifts, 2, 2.0, min_cosine=min_cosine):
        result = read(vlm, batch, 2)[2, "resid_post"]
        assert [text.split("(")[0] for text in vlm.active] == ["steer_by_concept", "edit"]
    torch.testing.assert_close(
        result, looped(before, centres, shifts, 2.0, min_cosine).float(), rtol=1e-4, atol=1e-4
    )
    moved = (result - before).abs().amax(dim=-1) > 1e-4
    assert not moved[0, 5] and moved.any()


def test_each_sample_of_a_batch_may_have_its_own_strength(vlm, batch):
    before = read(vlm, batch, 2)[2, "resid_post"]
    centres, shifts = noise(3, 32), noise(3, 32, seed=1)
    strengths = torch.arange(float(len(before)))
    with steer_by_concept(vlm, centres, shifts, 2, strengths):
        result = read(vlm, batch, 2)[2, "resid_post"]
    for row, strength in enumerate(strengths.tolist()):
        expected = looped(before[[row]], centres, shifts, strength, None).float()
        torch.testing.assert_close(result[[row]], expected, rtol=1e-4, atol=1e-4)
    with (
        pytest.raises(InputError, match="3 strengths"),
        steer_by_concept(vlm, centres, shifts, 2, torch.ones(3)),
    ):
        read(vlm, batch, 2)


def test_tokens_are_steered_in_decode_steps_as_in_a_prompt(vlm, batch):
    centres, shifts = noise(3, 32), 2 * noise(3, 32, seed=1)
    with steer_by_concept(vlm, centres, shifts, 1, positions="last"):
        ids, steps = stepped(vlm, batch)
        answered = vlm.batch(PICTURES, TEXTS, vlm.tokenizer.batch_decode(ids))
        assert torch.equal(answered["input_ids"][:, -3:], ids)
        torch.testing.assert_close(
            vlm.forward(answered).logits[:, -4:-1], steps, rtol=1e-4, atol=1e-4
        )


def test_half_precision_stays_half(vlm, batch):
    model = lively(tiny_llava())
    model.model.bfloat16()
    half = model.batch(PICTURES, TEXTS)
    with steer_by_concept(model, noise(3, 32), noise(3, 32, seed=1), 1):
        assert read(model, half, 1)[1, "resid_post"].dtype == torch.bfloat16


def test_concepts_of_tokens_that_do_not_fit_are_refused(vlm):
    centres, shifts = noise(3, 32), noise(3, 32, seed=1)
    nan = centres.clone()
    nan[0, 0] = float("nan")
    wrong = [
        ((centres, shifts[:2], 1), {}, InputError),
        ((centres[:, :8], shifts[:, :8], 1), {}, InputError),
        ((nan, shifts, 1), {}, InputError),
        ((centres * torch.tensor([[1.0], [0.0], [1.0]]), shifts, 1), {}, InputError),
        ((centres, 0 * shifts, 1), {}, InputError),
        ((centres, shifts, 1), {"min_cosine": 1.5}, InputError),
        ((centres, shifts, 1), {"strength": float("inf")}, InputError),
        ((centres, shifts, 4), {}, LayerError),
    ]
    for arguments, options, error in wrong:
        with pytest.raises(error), steer_by_concept(vlm, *arguments, **options):
            raise AssertionError


# Logits


def test_a_bias_is_added_to_the_logits_of_words(vlm, batch):
    plain = vlm.forward(batch).logits
    with logit_bias(vlm, {"yes": 3.0, "no": -2.5}):
        biased = vlm.forward(batch).logits
        assert "logit_bias" in vlm.active[0]
    expected = torch.zeros(plain.shape[-1])
    (
        expected[vlm.tokenizer.convert_tokens_to_ids("yes")],
        expected[vlm.tokenizer.convert_tokens_to_ids("no")],
    ) = 3.0, -2.5
    torch.testing.assert_close(biased, plain + expected)
    assert torch.equal(vlm.forward(batch).logits, plain)


def test_a_vector_of_biases_holds_in_every_step_and_is_undone_by_errors(vlm, batch):
    bias = torch.full((28,), -1.0)
    bias[vlm.tokenizer.convert_tokens_to_ids("woman")] = 1e4
    with logit_bias(vlm, bias):
        assert set(vlm.tokenizer.batch_decode(vlm.generate_ids(batch, 3))) == {"woman woman woman"}
    with pytest.raises(RuntimeError, match="planted"), logit_bias(vlm, bias):
        raise RuntimeError("planted")


def whole_words(tokens):
    """Like GPT-2's tokenizer, where these are tokens as they stand."""
    tokenizer = bytes_tokenizer(tokens)
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<unk>", *tokens])}
    tokenizer.backend_tokenizer.model = models.BPE(
        vocabulary, [], unk_token="<unk>", ignore_merges=True
    )
    return tokenizer


def test_words_are_known_by_all_their_first_pieces(vlm):
    tokens = ["Ġyes", "yes", "Yes", "ĠYes", "no", "Ġ"]
    second_vlm = tiny_llava()
    second_vlm.tokenizer = whole_words(tokens)
    ids = second_vlm.tokenizer.convert_tokens_to_ids
    assert set(first_pieces(second_vlm, "yes")) == {ids(token) for token in tokens[:4]}
    assert set(first_pieces(second_vlm, " yes ")) == set(first_pieces(second_vlm, "yes"))
    second_vlm.tokenizer = pieces_tokenizer()
    space = second_vlm.tokenizer.convert_tokens_to_ids("▁")
    assert space in second_vlm.tokenizer(" 1", add_special_tokens=False).input_ids
    assert space not in first_pieces(second_vlm, "1")
    assert not set(first_pieces(second_vlm, "1")) & set(first_pieces(second_vlm, "3"))


def test_words_without_a_token_or_alike_are_refused(vlm):
    for word in ("", "  ", "elephant", "<image>"):
        with pytest.raises(InputError, match="gives no token"), logit_bias(vlm, {word: 1.0}):
            raise AssertionError
    for alike in ({"yes": 1.0, " yes": -1.0}, {"yes": 1.0, "yes no": 1.0}):
        with (
            pytest.raises(InputError, match="begin with the same piece"),
            logit_bias(vlm, alike),
        ):
            raise AssertionError
    for wrong, error in (
        ({}, InputError),
        ({"yes": float("nan")}, InputError),
        (torch.ones(5), InputError),
    ):
        with pytest.raises(error), logit_bias(vlm, wrong):
            raise AssertionError
    with pytest.raises(InputError), logit_bias(vlm, torch.full((28,), float("inf"))):
        raise AssertionError


def test_the_bias_of_two_sets_is_the_difference_of_their_mean_logits(vlm, samples, monkeypatch):
    states = capture(vlm, samples(5), (1, L), positions=-1, prompt=TEXTS[0])
    first = states.table["sample"] < 2
    a, b = states.select(first), states.select(~first)
    monkeypatch.setattr(import_module("xlvlms_tutorial.methods.steering.logit_bias"), "_ROWS", 2)
    expected = vlm.unembed(b[L]).mean(dim=0) - vlm.unembed(a[L]).mean(dim=0)
    torch.testing.assert_close(mean_logits_bias(vlm, a, b), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(LayerError):
        mean_logits_bias(vlm, by_hand(3, layers=(1, 2)), by_hand(3, layers=(1, 2), seed=1))
    with pytest.raises(InputError, match="models of states"):
        mean_logits_bias(vlm, by_hand(3, model="x"), by_hand(3, seed=1, model="x"))
