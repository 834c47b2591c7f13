import pytest
import torch
from torch import nn

from xlvlms_tutorial import checkpoint


@pytest.fixture
def trained():
    """A parameter after two steps of AdamW, and its optimiser."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimiser = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        (weight**2).sum().backward()
        optimiser.step()
    return {"weight": weight}, optimiser


def test_a_run_goes_on_from_what_was_kept(tmp_path, trained):
    parameters, optimiser = trained
    checkpoint.keep(tmp_path / "new", parameters, optimiser, [{"loss": 5.0}, {"loss": 4.5}])
    fresh = {"weight": nn.Parameter(torch.zeros(2))}
    second_optimizer = torch.optim.AdamW(fresh.values(), lr=0.1)
    assert checkpoint.resumed(tmp_path / "new", fresh, second_optimizer) == [
        {"loss": 5.0},
        {"loss": 4.5},
    ]
    assert torch.equal(fresh["weight"], parameters["weight"])
    was, now = optimiser.state[parameters["weight"]], second_optimizer.state[fresh["weight"]]
    assert was.keys() == now.keys() and all(torch.equal(was[key], now[key]) for key in was)


def test_there_is_no_history_where_nothing_was_kept(tmp_path, trained):
    parameters, optimiser = trained
    before = parameters["weight"].clone()
    assert checkpoint.resumed(tmp_path, parameters, optimiser) == []
    assert torch.equal(parameters["weight"], before)


def test_the_draft_of_a_killed_run_is_removed(tmp_path, trained):
    (tmp_path / f".{checkpoint.FILE}.k1lled").write_bytes(b"half")
    checkpoint.keep(tmp_path, *trained, [])
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.FILE]
