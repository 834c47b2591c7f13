"""Distributions over the vocabulary against float64 loops; what upstream's figures got wrong.

Memory that does not grow with tokens.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import vocabulary as benchmark
from benchmarks.harness import Options, Report
from benchmarks.memory import peak_bytes
from benchmarks.subjects import Subject, llava_shape
from tests.support.tiny import redrawn, tiny_llava
from tests.zoo import MODELS, build
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.errors import InputError, LayerError
from xlvlms_tutorial.methods.logit_lens import distributions as module
from xlvlms_tutorial.methods.logit_lens.measures import (
    KINDS,
    consecutive_divergence,
    divergence_profile,
    entropy,
    entropy_profile,
    histogram,
    kl_divergence,
    mean_distribution,
    modality_divergence,
    relative_entropy,
    top_tokens,
)
from xlvlms_tutorial.metrics.intervals import resampled_shares
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

CPU = torch.device("cpu")
CHUNKED = pytest.mark.usefixtures("chunking")
COUNTS_P, COUNTS_T = (3, 2, 4, 1), (2, 3, 1, 2)  # tokens of four samples


@pytest.fixture(scope="module")
def vlm():
    return redrawn(tiny_llava(), seed=4)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunking(request, monkeypatch, vlm):
    if request.param == "many chunks":
        row = 4 * module.size(vlm)
        for name, rows in (("CHUNK", 5), ("SLICE", 2), ("HELD", 7)):
            monkeypatch.setattr(module, name, rows * row)


def noise(n, seed=0, width=32):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def states_of(counts, layers=(0, 1, 2, 3), seed=0, model="tiny-llava"):
    """Random states, of each sample so many, other ones at each layer."""
    samples = [sample for sample, count in enumerate(counts) for _ in range(count)]
    table = pd.DataFrame({"sample": samples, "id": [f"s{sample}" for sample in samples]})
    return Activations(
        {(layer, "resid_post"): noise(len(samples), 10 * seed + layer) for layer in layers},
        table,
        {"model": model},
    )


def distributions(vlm, states, norm=True):
    """Probabilities in float64, one state at a time."""
    probabilities = []
    for state in states:
        logits = vlm.unembed(state[None], norm)[0].double().tolist()
        total = sum(math.exp(logit - max(logits)) for logit in logits)
        probabilities.append([math.exp(logit - max(logits)) / total for logit in logits])
    return probabilities


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=atol
    )


@CHUNKED
@pytest.mark.parametrize("norm", [True, False])
def test_numbers_of_each_state_and_pair_are_those_of_float64_loops(vlm, norm):
    p, q = noise(11, 1), noise(9, 2)
    ps, qs = (distributions(vlm, side, norm) for side in (p, q))
    close(
        entropy(vlm, p, norm), [-sum(a * math.log(a) for a in distribution) for distribution in ps]
    )
    close(
        kl_divergence(vlm, p, q, norm, pairs="all"), [[kl(a, b) for b in qs] for a in ps], atol=1e-4
    )
    close(kl_divergence(vlm, p[:9], q, norm), [kl(a, b) for a, b in zip(ps, qs, strict=False)])
    close(mean_distribution(vlm, p, norm), np.mean(ps, axis=0).tolist(), atol=1e-7)
    labels = list("bacabcabbab")
    by_label = [
        np.mean([a for a, label in zip(ps, labels, strict=True) if label == name], axis=0).tolist()
        for name in "abc"
    ]
    close(mean_distribution(vlm, p, norm, labels), by_label, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_read_by_its_own_unembedding(name):
    vlm = VLM(build(name)[0], None, name)
    p, q = noise(3, 1, vlm.width), noise(3, 2, vlm.width)
    ps, qs = (distributions(vlm, side) for side in (p, q))
    assert {len(distribution) for distribution in ps} == {module.size(vlm)}
    close(
        entropy(vlm, p),
        [-sum(a * math.log(a) for a in distribution if a > 0) for distribution in ps],
    )
    close(kl_divergence(vlm, p, q), [kl(a, b) for a, b in zip(ps, qs, strict=True)])
    close(kl_divergence(vlm, p, q, pairs="all"), [[kl(a, b) for b in qs] for a in ps], atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 1000), n=st.integers(1, 12))
def test_bounds_hold_for_any_states(seed, scale, n):
    vlm = tiny_llava(layers=1)
    p, q = scale * noise(n, seed), scale * noise(n, seed + 1)
    result = entropy(vlm, p, norm=False)
    assert ((result >= 0) & (result <= math.log(module.size(vlm)) + 1e-5)).all()
    assert (kl_divergence(vlm, p, q, norm=False) >= 0).all()
    assert (kl_divergence(vlm, p, q, norm=False, pairs="all") >= 0).all()
    assert torch.equal(kl_divergence(vlm, p, p, norm=False), torch.zeros(n))
    torch.testing.assert_close(mean_distribution(vlm, p, norm=False).sum(), torch.tensor(1.0))


def test_a_uniform_distribution_has_the_entropy_log_v_and_a_sure_one_0_and_not_nan(vlm):
    close(entropy(vlm, torch.zeros(2, 32), norm=False), [math.log(module.size(vlm))] * 2)
    sure = 1e4 * anatomy.unembedding(vlm.model).weight[:3]
    probabilities = vlm.unembed(sure, norm=False).softmax(dim=-1)
    assert (probabilities * probabilities.log()).sum(dim=-1).isnan().all()  # upstream's formula
    assert torch.equal(entropy(vlm, sure, norm=False), torch.zeros(3))
    assert torch.isfinite(kl_divergence(vlm, sure, noise(3), norm=False)).all()
    assert torch.isfinite(kl_divergence(vlm, sure, sure, norm=False, pairs="all")).all()


def test_close_distributions_keep_their_digits(vlm):
    p = noise(4, 3)
    q = p + 1e-3 * noise(4, 4)
    expected = [kl(a, b) for a, b in zip(distributions(vlm, p), distributions(vlm, q), strict=True)]
    assert max(expected) < 1e-5
    np.testing.assert_allclose(kl_divergence(vlm, p, q), expected, rtol=0.05, atol=2e-7)


def test_states_in_half_precision_and_with_gradients_are_read(vlm):
    p = noise(5).bfloat16()
    torch.testing.assert_close(entropy(vlm, p), entropy(vlm, p.float()))
    result = kl_divergence(vlm, noise(5).requires_grad_(), noise(5, 1))
    assert not result.requires_grad


def test_relative_entropy_of_vectors():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([0.25, 0.25, 0.5])
    close(relative_entropy(p, q), [math.log(2), kl(p[1].tolist(), q.tolist())])
    assert relative_entropy(q, p[0]).item() == math.inf
    assert relative_entropy(p[0], p[0]).item() == 0
    with pytest.raises(InputError, match="vocabularies differ: 3 and 2"):
        relative_entropy(p, torch.tensor([0.5, 0.5]))
    for bad in ([0.5, 0.6, 0.0], [1.2, -0.2, 0.0], [math.nan, 0.5, 0.5]):
        with pytest.raises(InputError, match="q holds vectors that are not distributions"):
            relative_entropy(p, torch.tensor(bad))


def test_mean_distributions_are_compared_as_vectors(vlm):
    p, q = mean_distribution(vlm, noise(6, 1)), mean_distribution(vlm, noise(6, 2))
    expected = [kl(p.double().tolist(), q.double().tolist())]
    close(relative_entropy(p, q)[None], expected)


@CHUNKED
def test_top_words_are_the_most_probable_ones_in_order(vlm):
    states = noise(7, 5)
    table, expected = top_tokens(vlm, states, k=3), np.array(distributions(vlm, states))
    assert table.columns.tolist() == ["row", "rank", "token_id", "word", "probability"]
    assert table["row"].tolist() == [row for row in range(7) for _ in range(3)]
    assert table["rank"].tolist() == [1, 2, 3] * 7
    order = np.argsort(-expected, axis=1)[:, :3]
    assert table["token_id"].tolist() == order.flatten().tolist()
    np.testing.assert_allclose(
        table["probability"], np.take_along_axis(expected, order, 1).flatten(), rtol=1e-4
    )
    assert table["word"].tolist() == [vlm.tokenizer.decode([token]) for token in table["token_id"]]
    every = top_tokens(vlm, states, k=module.size(vlm))
    np.testing.assert_allclose(every.groupby("row")["probability"].sum(), 1, rtol=1e-5)


@CHUNKED
def test_the_histogram_counts_all_k_words_of_each_state(vlm):
    states = noise(40, 6)
    top = top_tokens(vlm, states, k=5)
    table = histogram(vlm, states, k=5)
    assert table["count"].sum() == 40 * 5
    first = histogram(vlm, states)
    assert first["count"].sum() == 40
    assert len(first) < len(table)  # words that are never first are counted too
    assert dict(table[["token_id", "count"]].to_numpy()) == top["token_id"].value_counts().to_dict()
    assert table["count"].is_monotonic_decreasing
    np.testing.assert_allclose(table["share"], table["count"] / 40)
    assert table["word"].tolist() == [vlm.tokenizer.decode([token]) for token in table["token_id"]]


@CHUNKED
def test_the_entropy_profile_follows_the_layer(vlm):
    states = states_of(COUNTS_P)
    table = entropy_profile(vlm, states)
    means = [entropy(vlm, states[layer]).mean().item() for layer in range(4)]
    # upstream reads P at its first layer for ever
    assert len({round(mean, 4) for mean in means}) == 4
    np.testing.assert_allclose(table["value"], means, rtol=1e-5)
    assert table["layer"].tolist() == [0, 1, 2, 3]
    assert (table["n"] == 10).all()
    assert ((table["low"] < table["value"]) & (table["value"] < table["high"])).all()
    pd.testing.assert_frame_equal(
        entropy_profile(vlm, states, [2]), table[2:3].reset_index(drop=True)
    )


@CHUNKED
@pytest.mark.parametrize("step", [1, 2, 3])
def test_consecutive_means_layer_l_against_l_plus_step(vlm, step):
    states = states_of(COUNTS_P)
    table = consecutive_divergence(vlm, states, step)
    assert list(zip(table["layer"], table["to"], strict=True)) == [
        (layer, layer + step) for layer in range(4 - step)
    ]
    ps = [distributions(vlm, states[layer]) for layer in range(4)]
    expected = []
    for layer in range(4 - step):
        pairs = zip(ps[layer], ps[layer + step], strict=True)
        expected.append(np.mean([kl(a, b) for a, b in pairs]))
    np.testing.assert_allclose(table["value"], expected, rtol=1e-4)
    cosines = []
    for layer in range(4 - step):
        pairs = zip(ps[layer], ps[layer + step], strict=True)
        cosines.append([np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    as_cosines = consecutive_divergence(vlm, states, step, measure="cosine")
    np.testing.assert_allclose(as_cosines["value"], np.mean(cosines, axis=1), rtol=1e-4)
    assert (table["n"] == 10).all()


def test_consecutive_layers_are_read_once_each_and_gaps_are_left_out(vlm, monkeypatch):
    states, read = states_of(COUNTS_P, layers=(0, 1, 3, 4, 6, 9)), []
    monkeypatch.setattr(
        vlm,
        "unembed",
        lambda states, norm: read.append(len(states)) or VLM.unembed(vlm, states, norm),
    )
    assert consecutive_divergence(vlm, states, 3)["layer"].tolist() == [0, 1, 3, 6]
    assert sum(read) == 10 * 6
    read.clear()
    assert consecutive_divergence(vlm, states, 1)["layer"].tolist() == [0, 3]
    assert sum(read) == 10 * 4


def of_pairs(vlm, p, t, layer):
    """Divergences of all pairs of tokens of different samples, from P and
    from other T, with both samples.
    """
    of_t, qs = t.table["sample"].tolist(), distributions(vlm, t[layer])
    for side in (p, t):
        ps, samples_of_rows = distributions(vlm, side[layer]), side.table["sample"].tolist()
        yield [
            (i, j, kl(a, b))
            for i, a in zip(samples_of_rows, ps, strict=True)
            for j, b in zip(of_t, qs, strict=True)
            if i != j
        ]


@CHUNKED
def test_the_contrast_is_the_mean_over_all_pairs_of_tokens_of_different_samples(vlm):
    p, t = states_of(COUNTS_P), states_of(COUNTS_T, seed=1)
    shares = resampled_shares(4, seed=7)
    for layer in (0, 2):
        result, draws, values = modality_divergence(vlm, p, t, layer, n_tokens=None, seed=7), [], []
        for pairs in of_pairs(vlm, p, t, layer):
            i, j, pair_values = (np.array(column) for column in zip(*pairs, strict=True))
            weights = shares[:, i.astype(int)] * shares[:, j.astype(int)]
            with np.errstate(invalid="ignore"):
                draws.append((weights * pair_values).sum(axis=1) / weights.sum(axis=1))
            values.append(pair_values.mean())
        values, draws = (*values, values[0] - values[1]), (*draws, draws[0] - draws[1])
        for kind, value, resampled, n in zip(KINDS, values, draws, (10, 8, 18), strict=True):
            low, high = np.nanquantile(resampled, [0.025, 0.975])
            np.testing.assert_allclose(
                list(result[kind].asdict().values()), [value, low, high, n], rtol=1e-4, atol=1e-5
            )


def test_no_arbitrary_pairing_decides_the_contrast(vlm):
    p, t = states_of(COUNTS_P), states_of(COUNTS_T, seed=1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    shuffled = Activations(
        {key: tensor[order] for key, tensor in t.tensors.items()},
        t.table.iloc[order.numpy()],
        t.provenance,
    )
    first, second = (modality_divergence(vlm, p, text, 1, n_tokens=None) for text in (t, shuffled))
    for kind in KINDS:
        np.testing.assert_allclose(
            list(first[kind].asdict().values()),
            list(second[kind].asdict().values()),
            rtol=1e-5,
            atol=1e-6,
        )


@CHUNKED
def test_the_divergence_profile_has_three_rows_a_layer_and_follows_it(vlm):
    p, t = states_of(COUNTS_P), states_of(COUNTS_T, seed=1)
    table = divergence_profile(vlm, p, t, n_tokens=None)
    assert table["layer"].tolist() == [layer for layer in range(4) for _ in KINDS]
    assert table["kind"].tolist() == list(KINDS) * 4
    for layer, rows in table.groupby("layer"):
        value = dict(zip(rows["kind"], rows["value"], strict=True))
        # P at this layer, not at the first
        expected = np.mean([value for _, _, value in next(of_pairs(vlm, p, t, layer))])
        assert value["P against T"] == pytest.approx(expected, rel=1e-4)
        assert value["difference"] == pytest.approx(
            value["P against T"] - value["T against other T"], abs=1e-5
        )
    single = divergence_profile(vlm, p, t, [3], n_tokens=None)
    np.testing.assert_allclose(single["value"], table["value"][9:])


def test_a_sample_of_tokens_is_drawn_by_seed_from_every_sample(vlm):
    p, t = states_of((9, 8, 7, 3)), states_of((6, 6, 6, 6), seed=1)
    draws = [
        modality_divergence(vlm, p, t, 1, n_tokens=2, seed=seed)["P against T"].value
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    result = modality_divergence(vlm, p, t, 1, n_tokens=4)
    assert [result[kind].n for kind in KINDS] == [4 + 4 + 4 + 3, 16, 31]
    # text that says the same whatever the sample: which tokens are drawn, and from
    # which sample, makes no difference
    same = Activations({(1, "resid_post"): noise(1).expand(24, 32)}, t.table, t.provenance)
    alone = kl_divergence(vlm, p[1], noise(1), pairs="all").mean().item()
    assert modality_divergence(vlm, p, same, 1, n_tokens=None)[
        "T against other T"
    ].value == pytest.approx(0, abs=1e-5)
    assert modality_divergence(vlm, p, same, 1, n_tokens=None)[
        "P against T"
    ].value == pytest.approx(alone, rel=1e-4)


def test_memory_does_not_grow_with_tokens(monkeypatch):
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vlm = llava_shape(
        CPU,
        torch.float32,
        {"vocab_size": 49_152, **small},
        {"image_size": 28, "patch_size": 14, **small},
    ).vlm
    for name, size in (("CHUNK", 2**23), ("SLICE", 2**21), ("HELD", 2**23)):
        monkeypatch.setattr(module, name, size)
    p, q, everything = noise(600, 1, 16), noise(600, 2, 16), 4 * 600 * 49_152
    calls = {
        "entropy": lambda: entropy(vlm, p),
        "matched": lambda: kl_divergence(vlm, p, q),
        "all": lambda: kl_divergence(vlm, p[:100], q[:100], pairs="all"),
        "mean": lambda: mean_distribution(vlm, p),
    }
    peaks = {name: peak_bytes(call, CPU) for name, call in calls.items()}
    assert peak_bytes(lambda: vlm.unembed(p).softmax(dim=-1), CPU) > everything
    assert max(peaks.values()) < 6 * 2**23 < everything, peaks


BAD = {
    "empty": (noise(0), InputError, "no states"),
    "nan": (torch.full((3, 32), math.nan), InputError, "NaN or infinite"),
    "infinite": (torch.full((3, 32), math.inf), InputError, "NaN or infinite"),
    "wide": (
        noise(3, width=33),
        InputError,
        "widths differ: states of 33 and 32 of tiny-llava",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_states_without_a_distribution_give_no_number(vlm, bad):
    states, error, message = BAD[bad]
    calls = [
        lambda: kl_divergence(vlm, noise(3), states),
        lambda: kl_divergence(vlm, states, noise(3), pairs="all"),
    ]
    calls += [
        lambda call=call: call(vlm, states)
        for call in (entropy, mean_distribution, top_tokens, histogram)
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_logits_that_overflow_give_no_number(vlm):
    for call in (entropy, mean_distribution, top_tokens, histogram):
        with pytest.raises(InputError, match="logits"):
            call(vlm, torch.full((2, 32), 3e38), norm=False)


def test_profiles_of_states_without_a_distribution_give_no_number(vlm):
    plain, empty = states_of(COUNTS_P), states_of(())
    spoiled = states_of(COUNTS_P)
    spoiled.tensors[1, "resid_post"][4] = math.nan
    for states, message in ((empty, "no states"), (spoiled, "NaN or infinite")):
        for call in (
            entropy_profile,
            consecutive_divergence,
            lambda vlm, states: divergence_profile(vlm, states, states),
        ):
            with pytest.raises(InputError, match=message):
                call(vlm, states)
    with pytest.raises(InputError, match="2 or more"):
        entropy_profile(vlm, states_of((5,)))
    with pytest.raises(InputError, match="found 2 samples"):
        modality_divergence(vlm, states_of((5, 5)), states_of((5, 5)), 1)
    with pytest.raises(LayerError, match="layer 4"):
        divergence_profile(vlm, plain, plain, [4])
    with pytest.raises(InputError, match="layer 1 was not captured"):
        divergence_profile(vlm, plain, states_of(COUNTS_P, layers=(0, 3)))


def test_what_is_asked_for_must_exist(vlm):
    with pytest.raises(InputError, match="unknown pairs 'zipped'"):
        kl_divergence(vlm, noise(3), noise(3), pairs="zipped")
    with pytest.raises(InputError, match="p: 3, q: 4"):
        kl_divergence(vlm, noise(3), noise(4))
    with pytest.raises(InputError, match="states: 3, groups: 2"):
        mean_distribution(vlm, noise(3), groups=[0, 1])
    for call in (top_tokens, histogram):
        for k in (0, module.size(vlm) + 1):
            with pytest.raises(InputError, match=f"k is {k}"):
                call(vlm, noise(3), k=k)
        with pytest.raises(InputError, match="without a tokenizer"):
            call(VLM(vlm.model, None, "bare"), noise(3))
    for step in (0, -1, 4):
        with pytest.raises(InputError, match=f"a step of {step} apart"):
            consecutive_divergence(vlm, states_of(COUNTS_P), step)
    with pytest.raises(InputError, match="unknown measure"):
        consecutive_divergence(vlm, states_of(COUNTS_P), measure="euclid")
    with pytest.raises(InputError, match="n_tokens is 0"):
        modality_divergence(vlm, states_of(COUNTS_P), states_of(COUNTS_T), 1, n_tokens=0)


def test_both_sides_are_of_the_same_model_and_samples(vlm):
    with pytest.raises(InputError, match="models differ: tiny-llava and other"):
        modality_divergence(vlm, states_of(COUNTS_P), states_of(COUNTS_T, model="other"), 1)
    with pytest.raises(
        InputError, match="samples differ: 4 with perceptual tokens and 3 with textual ones"
    ):
        modality_divergence(vlm, states_of(COUNTS_P), states_of((2, 2, 2)), 1)


def test_the_benchmark_measures_what_gives_the_same_numbers():
    subject = Subject(
        "tiny-llava",
        tiny_llava(),
        dict,
        [Sample(f"s{k}", Image.new("RGB", (32, 32), (k, 9, 9))) for k in range(8)],
    )
    states = benchmark.tokens(subject, 60)
    assert states.shape == (60, 32)
    torch.testing.assert_close(
        entropy(subject.vlm, states), benchmark.entropy_held(subject, states)
    )
    p, q = states[:6], states[6:12]
    torch.testing.assert_close(
        kl_divergence(subject.vlm, p, q),
        benchmark.divergence_held(subject, p, q),
        rtol=1e-3,
        atol=1e-6,
    )
    looped = benchmark.divergence_looped(subject, p, q)
    torch.testing.assert_close(
        kl_divergence(subject.vlm, p, q, pairs="all"), looped, rtol=1e-3, atol=1e-5
    )
    report = Report("trial", Options(repeats=2, quick=True))
    benchmark.about(report, subject, 80, 20, 8)
    assert len(report.promises) == 11
    assert all(finding.holds for finding in report.promises if "memory, in GB" in finding.label)
