"""Mixtures of state dicts: float64 sums, buffers of integers, tied weights, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.merging import add_tasks, average, interpolate


def made(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "proj.weight": torch.randn(3, 4, generator=generator).to(dtype),
        "proj.bias": torch.randn(3, generator=generator).to(dtype),
        "norm.num_batches": torch.tensor(10 + seed),
    }


@given(weight=st.floats(0, 1))
def test_an_interpolation_is_the_weighted_sum_in_float64(weight):
    first, second = made(0), made(1)
    mixture = interpolate(first, second, weight)
    for name in ("proj.weight", "proj.bias"):
        expected = (1 - weight) * first[name].double() + weight * second[name].double()
        torch.testing.assert_close(mixture[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_ends_are_the_experts_to_the_bit_even_where_the_second_is_not_finite():
    first, second = made(0), made(1)
    broken = second | {"proj.bias": torch.full((3,), torch.nan)}
    for name in first:
        assert torch.equal(interpolate(first, broken, 0)[name], first[name])
    assert torch.equal(interpolate(first, second, 1)["proj.weight"], second["proj.weight"])


def test_integers_are_of_the_first_and_nothing_is_shared_with_it():
    first, second = made(0), made(1)
    mixture = interpolate(first, second, 0.5)
    assert mixture["norm.num_batches"].item() == 10
    for tensor in mixture.values():
        tensor.zero_()
    assert all(torch.equal(first[name], made(0)[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept_and_sums_are_wider_than_half(dtype):
    states = [made(seed, dtype) for seed in range(3)]
    mean = average(states)["proj.weight"]
    expected = torch.stack([state["proj.weight"].double() for state in states]).mean(0)
    assert mean.dtype == dtype
    torch.testing.assert_close(mean, expected.to(dtype), rtol=torch.finfo(dtype).eps * 4, atol=0)
    if dtype != torch.float64:
        assert torch.equal(mean, expected.to(dtype))


def test_the_average_of_one_is_itself_and_of_two_the_interpolation_at_half():
    first, second = made(0), made(1)
    assert torch.equal(average([first])["proj.weight"], first["proj.weight"])
    half = interpolate(first, second, 0.5)["proj.weight"]
    torch.testing.assert_close(average([first, second])["proj.weight"], half)


def test_tasks_add_up_and_a_task_taken_away_undoes_one_added():
    base, expert, second = made(0), made(1), made(2)
    sum_of_both = add_tasks(base, [expert, second], [1, 1])["proj.bias"]
    expected = expert["proj.bias"] + second["proj.bias"] - base["proj.bias"]
    torch.testing.assert_close(sum_of_both, expected)
    without = add_tasks(base, [expert], [-1])
    undone = add_tasks(without, [expert], [0.5])["proj.bias"]
    # (base - change) + (expert - (base - change)) / 2 = base, as expert = base + change
    torch.testing.assert_close(undone, base["proj.bias"])


def test_tied_weights_stay_one_tensor():
    embedding = torch.ones(5, 2)
    tied = {"embed.weight": embedding, "lm_head.weight": embedding}
    second = torch.zeros(5, 2)
    mixture = interpolate(tied, {"embed.weight": second, "lm_head.weight": second}, 0.25)
    assert mixture["embed.weight"] is mixture["lm_head.weight"]
    # untied in one of them: two tensors
    apart = {"embed.weight": torch.zeros(5, 2), "lm_head.weight": torch.ones(5, 2)}
    mixture = interpolate(tied, apart, 0.5)
    assert mixture["lm_head.weight"].eq(1).all() and mixture["embed.weight"].eq(0.5).all()


def test_a_whole_model_takes_its_mixture():
    vlm, second = tiny_llava(), tiny_llava()
    with torch.no_grad():
        for weight in second.model.parameters():
            weight.add_(0.1)
    state = interpolate(vlm.model.state_dict(), second.model.state_dict(), 0.5)
    assert vlm.model.load_state_dict(state).missing_keys == []


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_weight_outside_is_refused_unless_extrapolation_is_asked_for(weight):
    with pytest.raises(InputError, match="weight is"):
        interpolate(made(0), made(1), weight)
    if abs(weight) < 2:
        beyond = interpolate(made(0), made(1), weight, extrapolate=True)["proj.bias"]
        expected = (1 - weight) * made(0)["proj.bias"] + weight * made(1)["proj.bias"]
        torch.testing.assert_close(beyond, expected)


CHANGES = {
    "names": (lambda state: state | {"extra": torch.ones(1)}, "1 names, such as extra"),
    "a name less": (lambda state: {"proj.bias": state["proj.bias"]}, "2 names"),
    "shapes": (lambda state: state | {"proj.bias": torch.ones(4)}, r"\(3,\) in state 1 and \(4,\)"),
    "dtypes": (lambda state: state | {"proj.bias": torch.ones(3).half()}, "float16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_experts_that_do_not_fit_are_refused(change):
    alter, message = CHANGES[change]
    for mix in (
        lambda a, b: interpolate(a, b, 0.5),
        lambda a, b: average([a, a, b]),
        lambda a, b: add_tasks(a, [b], [1.0]),
    ):
        with pytest.raises(InputError, match=message):
            mix(made(0), alter(made(1)))


def test_nothing_to_mix_is_refused():
    with pytest.raises(InputError, match="no states"):
        average([])
    with pytest.raises(InputError, match="no experts"):
        add_tasks(made(0), [], [])
    with pytest.raises(InputError, match="experts and strengths|strengths"):
        add_tasks(made(0), [made(1)], [1, 2])
    with pytest.raises(InputError, match="a strength is nan"):
        add_tasks(made(0), [made(1)], [float("nan")])
