"""The experts that are shipped: where they start, how far they went, and what is refused."""

import pytest
import torch

from xlvlms_tutorial.errors import InputError, LoadError
from xlvlms_tutorial.pocket import build
from xlvlms_tutorial.training import expert
from xlvlms_tutorial.training.connector_runs import EXPERTS


def test_experts_differ_in_what_they_learn_in_the_order_of_the_data_or_in_their_start():
    recipes = {name: {**run.recipe.__dict__, "mixes": ()} for name, run in EXPERTS.items()}
    assert recipes["expert-captions-0"] == recipes["expert-presence-0"]
    assert recipes["expert-presence-1"] == {**recipes["expert-presence-0"], "seed": 1}
    starts = {name: run.start for name, run in EXPERTS.items()}
    assert starts.pop("expert-captions-other") == ("image-1", "step-0450")
    assert set(starts.values()) == {("image", "step-0450")}


def test_experts_of_one_start_are_nearer_to_it_than_the_two_starts_are_to_each_other():
    start, other = expert("start"), expert("start", "other")
    assert torch.equal(
        start["linear_1.weight"], build.connector_state("image", "step-0450")["linear_1.weight"]
    )
    apart = (start["linear_1.weight"] - other["linear_1.weight"]).norm()
    for skill in ("captions", "presence"):
        change = (expert(skill)["linear_1.weight"] - start["linear_1.weight"]).norm()
        assert 0 < change < apart / 2
    far = expert("captions", "other")["linear_1.weight"]
    assert 0 < (far - other["linear_1.weight"]).norm() < apart / 2


def test_a_change_is_small_on_disk_and_says_what_it_changes():
    folder = build.WEIGHTS / "expert-presence-0"
    assert (folder / "step-0110.safetensors").stat().st_size < 1_200_000
    record = build.training_record("expert-presence-0")
    assert record["start"] == ["image", "step-0450"] and record["recipe"]["steps"] == 110


def test_what_is_not_there_is_refused():
    with pytest.raises(InputError, match="'captions', 'presence', 'start'"):
        expert("answers")
    with pytest.raises(InputError, match="seed"):
        expert("captions", 7)
    with pytest.raises(LoadError, match="step-0110"):
        expert("captions", 0, "step-0999")
