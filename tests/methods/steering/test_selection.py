"""Separability against scikit-learn fold by fold, sweeps against whole forwards,
choices against what is plain to see.
"""

from contextlib import nullcontext
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge

from tests.contract.reference import case, traces
from tests.support.steering import PROVENANCE, by_hand, noise
from tests.support.tiny import PROMPTS, lively, tiny_llava
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.errors import InputError, LayerError
from xlvlms_tutorial.interventions.edits import add
from xlvlms_tutorial.methods.probes import deal_folds
from xlvlms_tutorial.methods.steering import SteeringVectors, selection
from xlvlms_tutorial.methods.steering.selection import best_setting, separability
from xlvlms_tutorial.methods.steering.sweep import (
    Recorded,
    Replay,
    Run,
    fast_layers,
    first_ids,
    sweep,
)
from xlvlms_tutorial.models import anatomy

# the package offers a function of this name
sweep_module = import_module("xlvlms_tutorial.methods.steering.sweep")
L = 3
ALL = range(L + 1)


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava())


@pytest.fixture(autouse=True)
def nothing_is_left_behind(vlm):
    yield
    assert traces(vlm) == []


@pytest.fixture
def six(samples):
    return samples(6)


def vectors(width=32, layers=ALL, model="tiny-llava", size=3.0):
    return SteeringVectors(
        {layer: size * noise(width, seed=layer) for layer in layers},
        {"model": model, "how": "by hand"},
    )


def prompts(n):
    return [PROMPTS[k % len(PROMPTS)] for k in range(n)]


# Separability


@pytest.mark.parametrize("d", [6, 80])  # fewer dimensions than rows, and more
def test_a_probe_is_the_ridge_regression_of_the_other_folds(d):
    a, b = by_hand(31, d=d), by_hand(24, d=d, seed=1, offset=0.25)
    rows = torch.cat([a[3], b[3]]).double()
    y = torch.cat([-torch.ones(31), torch.ones(24)]).double()
    fold = deal_folds(np.arange(55), y.numpy(), 5, 0)
    scaled = ((rows - rows.mean(0)) / rows.std(0, correction=0) / d**0.5).numpy()
    expected = np.empty(55)
    for number in range(5):
        held_out = fold == number
        expected[held_out] = (
            Ridge(alpha=selection._RIDGE)
            .fit(scaled[~held_out], y.numpy()[~held_out])
            .predict(scaled[held_out])
        )
    table = separability(a, b).set_index("layer")
    assert table.loc[3, "accuracy"] == pytest.approx(np.mean((expected >= 0) == (y.numpy() > 0)))
    assert table.loc[3, "chance"] == pytest.approx(31 / 55) and (table["n"] == 55).all()
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()


def test_fisher_is_that_of_held_out_rows_along_the_others_direction():
    a, b = by_hand(20, d=7), by_hand(15, d=7, seed=1, offset=0.8)
    fold = deal_folds(np.arange(35), np.array([False] * 20 + [True] * 15), 4, 3)
    along = {False: [], True: []}
    rows = [
        (row.double().numpy(), side)
        for side, states in ((False, a), (True, b))
        for row in states[1]
    ]
    for number in range(4):
        others = {}
        for side in (False, True):
            fitted = [r for k, (r, label) in enumerate(rows) if label == side and fold[k] != number]
            others[side] = np.mean(fitted, axis=0)
        w = (others[True] - others[False]) / np.linalg.norm(others[True] - others[False])
        for k, (row, side) in enumerate(rows):
            if fold[k] == number:
                along[side].append((row - (others[True] + others[False]) / 2) @ w)
    expected = (np.mean(along[True]) - np.mean(along[False])) ** 2 / (
        np.var(along[True]) + np.var(along[False])
    )
    assert separability(a, b, folds=4, seed=3).set_index("layer").loc[1, "fisher"] == pytest.approx(
        expected, rel=1e-5
    )


def test_sets_far_apart_are_separable_and_equal_ones_are_not():
    near = pd.concat(
        [
            separability(by_hand(60, d=40, seed=2 * k), by_hand(60, d=40, seed=2 * k + 1))
            for k in range(6)
        ]
    )
    assert abs(near["accuracy"].mean() - 0.5) < 0.06 and near["fisher"].mean() < 0.05
    far = separability(by_hand(60, d=40), by_hand(60, d=40, seed=1, offset=2.0))
    assert (far["accuracy"] == 1).all() and (far["low"] < 1).all() and (far["fisher"] > 10).all()


def test_a_layer_that_never_varies_is_at_chance():
    a, b = by_hand(9), by_hand(6, seed=1)
    for states in (a, b):
        states.tensors[1, "resid_post"] = torch.linspace(100, 3, 32).expand(len(states), -1)
    row = separability(a, b, folds=3).set_index("layer").loc[1]
    assert row["accuracy"] == row["chance"] == pytest.approx(0.6) and row["fisher"] == 0


def test_all_rows_of_a_sample_are_held_out_together():
    """Twelve pictures with four questions each: what tells pictures apart must not help."""
    pictures = noise(12, 64).repeat_interleave(4, dim=0) * 5
    rows = {False: pictures[:24], True: pictures[24:]}
    a, b = (
        Activations(
            {(1, "resid_post"): rows[k]},
            pd.DataFrame({"sample": range(24), "id": [f"{k}{i // 4}" for i in range(24)]}),
            PROVENANCE,
        )
        for k in (False, True)
    )
    assert separability(a, b)["accuracy"][0] < 0.85  # any probe that has seen a picture knows it
    fold = deal_folds(np.arange(48) // 4, np.arange(48) >= 24, 5, 0)[np.arange(48) // 4]
    assert all(len(set(fold[k : k + 4])) == 1 for k in range(0, 48, 4))
    sizes = np.empty((5, 2), dtype=int)
    for number in range(5):
        groups = set(np.flatnonzero(fold == number) // 4)
        sizes[number] = len(groups & set(range(6))), len(groups & set(range(6, 12)))
    assert sizes.min() >= 1 and sizes.max() <= 2


def test_sets_that_cannot_be_told_apart_for_lack_of_samples_are_refused():
    with pytest.raises(InputError, match="4 source and 9 target"):
        separability(by_hand(4), by_hand(9, seed=1))
    with pytest.raises(InputError, match="folds is 1"):
        separability(by_hand(9), by_hand(9, seed=1), folds=1)
    with pytest.raises(InputError, match="layers and sites"):
        separability(by_hand(9), by_hand(9, seed=1, layers=(1,)))


# Sweeps


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "mllama", "blip2"])
@pytest.mark.parametrize("positions", ["all", "last", ("question", "last")])
def test_a_pass_from_a_layer_on_gives_the_logits_of_a_whole_one(name, positions):
    tiny = case(name)
    of_layers = vectors(tiny.vlm.width, model=name)
    assert fast_layers(tiny.vlm, tiny.batch, set(ALL)) == set(ALL)
    replay = Replay(tiny.vlm, tiny.batch, set(ALL))
    for layer in ALL:
        steering = Run("v", of_layers, layer, 2.0).steering
        with steering(tiny.vlm, positions):
            expected = tiny.vlm.forward(tiny.batch).logits[:, -1]
        torch.testing.assert_close(
            replay.logits(layer, steering(tiny.vlm, positions)), expected, rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(replay.base, expected, atol=1e-4)
    assert traces(tiny.vlm) == []


def test_a_layer_where_a_pass_cannot_start_is_found_and_goes_the_whole_way(vlm, six, monkeypatch):
    batch = vlm.batch_of(six[:2], PROMPTS[:2])
    lying = Replay.logits
    monkeypatch.setattr(
        Replay,
        "logits",
        lambda self, layer, steering: lying(self, layer, steering) + (0.5 if layer == 2 else 0),
    )
    assert fast_layers(vlm, batch, {1, 2, 3}) == {1, 3}
    monkeypatch.setattr(Replay, "logits", None)
    runs = [Run(None, vectors(), layer, 1.0) for layer in ALL]
    whole = [ids.tolist() for ids in first_ids(vlm, batch, runs)]
    with vectors().apply(vlm, 1):
        assert whole[2] == vlm.forward(batch).logits[:, -1].argmax(-1).tolist()


def test_no_pass_is_shortened_while_something_else_changes_the_model(vlm, six):
    batch = vlm.batch_of(six[:2], PROMPTS[:2])
    with add(vlm, noise(32), 1):
        assert fast_layers(vlm, batch, {1, 2}) == set()
        steered = sweep(vlm, vectors(), six, prompts(6), layers=[2], answers=True)
    plain = sweep(vlm, vectors(), six, prompts(6), layers=[2], answers=True)
    assert list(steered.columns) == list(plain.columns) and len(steered["answers"][0]) == 6


@pytest.mark.parametrize(
    ("positions", "batch_size"), [("all", 4), ("last", 2), (("image", "last"), 4)]
)
def test_a_sweep_is_what_steering_each_sample_alone_gives(
    vlm, six, positions, batch_size, monkeypatch
):
    options = {
        "layers": (0, 2, 3),
        "strengths": (0.0, -4.0),
        "positions": positions,
        "batch_size": batch_size,
        "answers": True,
    }
    swept = sweep(vlm, vectors(), six, prompts(6), **options)
    monkeypatch.setattr(sweep_module, "_fast_layers", lambda *_: set())
    pd.testing.assert_frame_equal(swept, sweep(vlm, vectors(), six, prompts(6), **options))
    assert swept[["layer", "strength"]].to_numpy().tolist() == [
        [layer, s] for layer in (0, 2, 3) for s in (0.0, -4.0)
    ]
    base = swept["answers"][0]
    for row in swept.itertuples():
        with vectors().apply(vlm, row.layer, row.strength, positions):
            logits = [
                vlm.forward(vlm.batch_of([sample], [text])).logits[0, -1]
                for sample, text in zip(six, prompts(6), strict=True)
            ]
        expected = [
            vlm.tokenizer.decode(logit_row.argmax(), skip_special_tokens=True).strip()
            for logit_row in logits
        ]
        assert row.answers == expected and row.n == 6
        assert row.changed == pytest.approx(
            np.mean([a != b for a, b in zip(expected, base, strict=True)])
        )
    assert swept["changed"].max() > 0 and (swept.loc[swept["strength"] == 0, "changed"] == 0).all()


def test_only_the_blocks_above_are_computed_and_the_tower_once(vlm, six):
    batch = vlm.batch_of(six[:2], PROMPTS[:2])
    counts = {}
    modules = {"tower": anatomy.tower(vlm.model)} | {
        k + 1: block.mlp for k, block in enumerate(vlm.blocks)
    }
    for name, module in modules.items():
        counts[name] = 0
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    list(
        first_ids(
            vlm,
            batch,
            [Run(None, vectors(), layer, s) for layer in (1, 3) for s in (1.0, 2.0, 0.0)],
            "all",
            {1, 3},
        )
    )
    for module in modules.values():
        module._forward_hooks.popitem()
    assert counts == {"tower": 1, 1: 1, 2: 3, 3: 3}


def test_scores_get_all_answers_in_order_and_several_vectors_are_named(vlm, six):
    recorded = []

    def score(answers):
        recorded.append(answers)
        return {"length": float(np.mean(list(map(len, answers))))}

    several = {"a": vectors(layers=(1, 2)), "b": vectors(layers=(2,), size=9.0)}
    swept = sweep(vlm, several, six, prompts(6), score=score, answers=True)
    assert swept[["vector", "layer"]].to_numpy().tolist() == [["a", 1], ["a", 2], ["b", 2]]
    assert recorded == swept["answers"].tolist()
    assert list(swept.columns) == [
        "vector",
        "layer",
        "strength",
        "n",
        "changed",
        "length",
        "answers",
    ]
    assert swept["length"].tolist() == [np.mean(list(map(len, answers))) for answers in recorded]


def test_whole_answers_are_those_of_plain_generation_while_steered(vlm, six):
    swept = sweep(
        vlm,
        vectors(layers=(2,)),
        six,
        PROMPTS[0],
        strengths=(0, 2.0),
        max_new_tokens=3,
        batch_size=4,
        answers=True,
    )
    images = [sample.image for sample in six]
    for row in swept.itertuples():
        with vectors().apply(vlm, 2, row.strength) if row.strength else nullcontext():
            assert row.answers == vlm.generate(images, [PROMPTS[0]] * 6, 3)
    late = sweep(
        vlm,
        vectors(layers=(2,)),
        six,
        PROMPTS[0],
        positions="generated",
        max_new_tokens=3,
        answers=True,
    )
    assert len(late["answers"][0]) == 6


def test_layers_without_a_vector_are_left_out_unless_asked_for(vlm, six):
    steering = SteeringVectors({0: torch.zeros(32), 2: noise(32)}, {"model": "tiny-llava"})
    assert sweep(vlm, steering, six, prompts(6))["layer"].tolist() == [2]
    with pytest.raises(InputError, match="vector of layer 0 is zero"):
        sweep(vlm, steering, six, prompts(6), layers=[0, 2])


def test_sweeps_that_make_no_sense_are_refused(vlm, six):
    wrong = [
        ({"samples": []}, InputError),
        ({"prompts": prompts(5)}, InputError),
        ({"layers": [4]}, LayerError),
        ({"layers": [-1]}, LayerError),
        ({"layers": []}, InputError),
        ({"strengths": []}, InputError),
        ({"strengths": [float("nan")]}, InputError),
        ({"batch_size": 0}, InputError),
        ({"max_new_tokens": 0}, InputError),
        ({"positions": "generated"}, InputError),
        ({"vectors": vectors(model="another")}, InputError),
        ({"vectors": {}}, InputError),
        ({"score": lambda answers: {"layer": 1.0}}, InputError),
    ]
    for change, error in wrong:
        with pytest.raises(error):
            sweep(
                **(
                    {"vlm": vlm, "vectors": vectors(), "samples": six, "prompts": prompts(6)}
                    | change
                )
            )
    with pytest.raises(InputError, match="no vector for layer 2"):
        sweep(vlm, vectors(layers=(1, 3)), six, prompts(6), layers=[2])


# Choices


def table(**columns):
    return pd.DataFrame(
        {
            "layer": [1, 2, 3, 2],
            "strength": [2.0, 1.0, 0.5, 4.0],
            "hit": [0.2, 0.9, 0.9, 1.0],
            **columns,
        }
    )


def test_the_best_row_within_the_limit_is_chosen():
    rows = table(elsewhere=[0.0, 0.05, 0.05, 0.4])
    assert best_setting(rows, "hit") == (2, 4.0)
    assert best_setting(rows, "hit", ("elsewhere", 0.05)) == (
        3,
        0.5,
    )  # as good at a smaller strength
    assert best_setting(rows, "hit", ("elsewhere", 0.01)) == (1, 2.0)
    tied = pd.DataFrame({"layer": [5, 4], "strength": [1.0, -1.0], "hit": [1.0, 1.0]})
    assert best_setting(tied, "hit") == (5, 1.0)
    assert best_setting(rows.assign(hit=[np.nan, 0.1, 0.0, np.nan]), "hit") == (2, 1.0)


def test_nothing_is_chosen_where_nothing_fits():
    with pytest.raises(InputError, match="closest is layer 1, strength 2 with 0.1"):
        best_setting(table(elsewhere=[0.1, 0.2, 0.3, 0.4]), "hit", ("elsewhere", 0.05))
    with pytest.raises(InputError, match="lacks 'miss'"):
        best_setting(table(), "miss")
    with pytest.raises(InputError, match="lacks 'elsewhere'"):
        best_setting(table(), "hit", ("elsewhere", 1.0))
    with pytest.raises(InputError, match="no row has numbers"):
        best_setting(table(hit=[np.nan] * 4), "hit")


def test_recorded_questions_are_steered_as_whole_ones_are(vlm, six):
    options = {"layers": (1, 3), "strengths": (0.0, -4.0), "answers": True}
    expected = sweep(vlm, vectors(), six, prompts(6), batch_size=4, **options)
    recorded = Recorded(vlm, six, prompts(6), layers=[3], batch_size=4)
    pd.testing.assert_frame_equal(sweep(vlm, vectors(), recorded, **options), expected)
    rows = [0, 2, 5]
    part = sweep(vlm, vectors(), recorded.only(rows), **options)
    for some, everything in zip(part["answers"], expected["answers"], strict=True):
        assert some == [everything[row] for row in rows]
    assert set(expected["changed"]) != {0.0}


@pytest.mark.parametrize("name, by_row", [("llava", True), ("qwen3_vl", False), ("mllama", False)])
def test_rows_are_selected_only_where_all_that_was_recorded_has_rows(name, by_row):
    tiny = case(name)
    replay = Replay(tiny.vlm, tiny.batch, {1})
    assert replay.by_row == by_row
    if by_row:
        steering = Run("v", vectors(tiny.vlm.width, model=name), 1, 2.0).steering
        whole = replay.logits(1, steering(tiny.vlm, "all"))
        part = replay.only([1]).logits(1, steering(tiny.vlm, "all"))
        torch.testing.assert_close(part, whole[[1]], rtol=1e-5, atol=1e-5)


def test_what_was_recorded_is_steered_as_it_was(vlm, six):
    with add(vlm, noise(32), 1), pytest.raises(InputError, match="recording while add"):
        Recorded(vlm, six, prompts(6))
    recorded = Recorded(vlm, six, prompts(6))
    with add(vlm, noise(32), 1), pytest.raises(InputError, match="before it was changed"):
        sweep(vlm, vectors(), recorded)
    with pytest.raises(InputError, match="max_new_tokens"):
        sweep(vlm, vectors(), recorded, max_new_tokens=2)
    batch = vlm.batch_of(six, prompts(6))
    expected = vlm.unembed(recorded.last_states)
    torch.testing.assert_close(expected, vlm.forward(batch).logits[:, -1], rtol=1e-5, atol=1e-5)
