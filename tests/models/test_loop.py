"""The loop is AdamW with clipped gradients as a loop of plain numbers has it, and a run that
goes on ends as one that was not killed.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from xlvlms_tutorial.models.loop import optimise, warmup_cosine

TARGET = torch.tensor([3.0, -0.5, 0.02])


def start() -> dict[str, nn.Parameter]:
    return {
        "weight": nn.Parameter(torch.tensor([1.0, 1.0, 1.0])),
        "bias": nn.Parameter(torch.tensor([0.5])),
    }


def run(parameters, steps=8, **options):
    """A loss that differs from step to step, steep at the start so
    that gradients are clipped there.
    """

    def loss(step):
        noise = torch.tensor(np.random.default_rng(step).normal(size=3), dtype=torch.float32)
        return 4 * (parameters["weight"] + parameters["bias"] - TARGET - 0.1 * noise).square().sum()

    return optimise(
        parameters,
        loss,
        steps,
        lambda step: 0.1 * warmup_cosine(step, steps, 3),
        disable=True,
        **options,
    )


def by_numbers(steps=8, decay=0.0):
    """AdamW of Loshchilov and Hutter (2019), algorithm 2, in float64,
    the gradient's norm clipped at 1.
    """
    weights, mean, square = np.array([1.0, 1.0, 1.0, 0.5]), np.zeros(4), np.zeros(4)
    losses = []
    for step in range(steps):
        error = (
            weights[:3]
            + weights[3]
            - TARGET.double().numpy()
            - 0.1 * np.random.default_rng(step).normal(size=3)
        )
        losses.append(4 * (error**2).sum())
        gradient = np.append(8 * error, 8 * error.sum())
        gradient /= max(1.0, np.linalg.norm(gradient))
        rate = 0.1 * min(1, (step + 1) / 3) * (1 + math.cos(math.pi * step / steps)) / 2
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        change = (
            mean / (1 - 0.9 ** (step + 1)) / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
        )
        weights = weights - rate * decay * weights - rate * change
    return weights, losses


def test_the_rate_rises_to_the_cosine_and_falls_to_nothing():
    rates = [warmup_cosine(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    # (1 + cos x) / 2 is the square of cos x / 2
    assert rates[4] == pytest.approx(0.5 * math.cos(math.pi * 4 / 200) ** 2)
    assert rates[50] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert max(rates) == rates[9]
    assert [warmup_cosine(step, 100) for step in range(9, 101)] == rates[9:]
    assert warmup_cosine(0, 100) == 1.0


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_steps_are_those_of_the_algorithm(decay):
    parameters = start()
    rows = run(parameters, weight_decay=decay)
    weights, losses = by_numbers(decay=decay)
    assert torch.cat(list(parameters.values())).tolist() == pytest.approx(
        weights.tolist(), abs=1e-5
    )
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["step"] for row in rows] == list(range(8))
    assert all(row["seconds"] >= 0 for row in rows)


def test_what_is_not_given_stays_and_what_is_done_at_a_step_comes_before_the_next():
    parameters, steps = start(), []
    trained = {"weight": parameters["weight"]}

    def at_step(done):
        steps.append(done)
        parameters["weight"].detach().clamp_(max=1.05)

    run_on = lambda step: (parameters["weight"] + parameters["bias"]).sum().neg()
    optimise(trained, run_on, 5, lambda step: 0.1, at_step=at_step, disable=True)
    assert steps == [0, 1, 2, 3, 4, 5]
    assert parameters["bias"].item() == 0.5
    assert parameters["weight"].tolist() == pytest.approx([1.05] * 3)


def test_a_killed_run_goes_on_from_what_was_kept_and_ends_the_same(tmp_path):
    whole, killed, resumed = start(), start(), start()
    steps = []
    expected = run(whole)

    def kill(done):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, folder=tmp_path, keep_at=range(2, 9, 3), at_step=kill)
    rows = run(resumed, folder=tmp_path, keep_at=(), at_step=steps.append)
    assert steps == [5, 6, 7, 8]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [(row["step"], row["loss"]) for row in rows] == [
        (row["step"], row["loss"]) for row in expected
    ]


def test_a_run_that_is_done_is_read_and_not_trained_again(tmp_path):
    first, again, steps = start(), start(), []
    rows = run(first, folder=tmp_path, keep_at={8})
    assert run(again, folder=tmp_path, at_step=steps.append) == rows
    assert steps == [8] and torch.equal(first["weight"], again["weight"])


def test_nothing_is_kept_without_a_folder_or_before_it_is_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(start(), keep_at=range(9))
    run(start(), folder=tmp_path / "run", keep_at=(9,))
    assert not list(tmp_path.rglob("*"))


def test_a_parameter_with_a_factor_moves_so_much_faster():
    def moved(factors):
        parameters = {name: nn.Parameter(torch.ones(3)) for name in ("a", "b")}
        loss = lambda step: sum(weight.square().sum() for weight in parameters.values())
        optimise(parameters, loss, 1, lambda step: 0.01, factors=factors, disable=True)
        return {name: 1 - weight[0].item() for name, weight in parameters.items()}

    plain, faster = moved(None), moved({"b": 4.0})
    assert faster["a"] == pytest.approx(plain["a"])
    assert faster["b"] == pytest.approx(4 * plain["b"], rel=1e-4)
