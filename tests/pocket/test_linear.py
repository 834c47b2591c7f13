"""Linear maps by oneDNN: the same numbers, the same weights, and training as ever."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from xlvlms_tutorial.metrics import count_flops
from xlvlms_tutorial.pocket import linear
from xlvlms_tutorial.pocket.linear import OneDnnLinear, onednn_is_faster, use_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here"
)


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch):
    """As on a processor on which oneDNN is faster."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)


def quick(n_in, n_out, bias=True):
    return use_onednn(nn.Linear(n_in, n_out, bias=bias)).requires_grad_(False)


@given(st.integers(0, 5), st.integers(1, 7), st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_it_computes_the_products_of_float64(b, t, n_in, n_out, bias):
    model = quick(n_in, n_out, bias)
    states = torch.randn(b, t, n_in)
    expected = states.double() @ model.weight.double().T
    if bias:
        expected = expected + model.bias.double()
    assert type(model) is OneDnnLinear
    for inputs, outputs in (
        (states, expected),
        (states.transpose(0, 1), expected.transpose(0, 1)),
        (states[:, 0], expected[:, 0]),
    ):
        torch.testing.assert_close(model(inputs).double(), outputs, rtol=1e-5, atol=1e-5)


def test_weights_that_change_count_at_once():
    model = quick(3, 2, bias=False)
    model.weight.data.fill_(2.0)
    assert torch.equal(model(torch.ones(1, 3)), torch.full((1, 2), 6.0))
    model.weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    assert torch.equal(model(torch.ones(1, 3)), torch.full((1, 2), 3.0))


def test_gradients_are_those_of_a_linear_map():
    plain = nn.Linear(4, 3)
    model = quick(4, 3).requires_grad_(True)
    model.load_state_dict(plain.state_dict())
    states = torch.randn(5, 4)
    frozen = quick(4, 3)
    frozen.load_state_dict(plain.state_dict())
    for module in (plain, model):
        module(states).square().sum().backward()
    assert torch.equal(plain.weight.grad, model.weight.grad)
    wanted = states.clone().requires_grad_(True)
    frozen(wanted).square().sum().backward()
    assert wanted.grad.abs().sum() > 0


def test_other_numbers_run_as_ever_and_subclasses_stay():
    model = quick(4, 3).double()
    states = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(model(states), nn.functional.linear(states, model.weight, model.bias))

    class Special(nn.Linear):
        pass

    assert type(use_onednn(nn.Sequential(Special(2, 2)))[0]) is Special


def test_its_operations_are_counted():
    model = quick(5, 7)
    with torch.no_grad():
        table = count_flops(lambda: model(torch.randn(2, 3, 5)))
    assert table["flops"].iloc[-1] == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    ("processor", "capability", "expected"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : AuthenticAMD", "AVX2", False),
        ("vendor_id : GenuineIntel", "AVX512", False),
    ],
)
def test_it_is_chosen_by_the_processor(tmp_path, monkeypatch, processor, capability, expected):
    info = tmp_path / "cpuinfo"
    info.write_text(processor)
    monkeypatch.setattr(linear, "_CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn_is_faster.__wrapped__() is expected
