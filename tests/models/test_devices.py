"""Automatic choices of device and number format, on machines whose GPUs are as told."""

import pytest
import torch

from xlvlms_tutorial.errors import LoadError
from xlvlms_tutorial.models import devices


class FakeCuda:
    """A machine whose GPUs are as told."""

    def __init__(self, monkeypatch, gpus: int, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)


@pytest.mark.parametrize(("bf16", "wanted"), [(True, torch.bfloat16), (False, torch.float16)])
def test_automatic_choices_follow_the_gpu(monkeypatch, bf16, wanted):
    FakeCuda(monkeypatch, 2, bf16)
    assert devices.place("auto") == torch.device("cuda", 0)
    assert devices.place("balanced") == "balanced"
    assert {devices.number_format("auto", placed) for placed in (torch.device("cuda", 0), "balanced")} == {wanted}
    assert devices.number_format("auto", torch.device("cpu")) == torch.float32


def test_every_format_is_known_by_its_name_and_as_torch_says_it():
    for name in devices.DTYPES:
        assert devices.number_format(name, "balanced") is devices.number_format(getattr(torch, name), torch.device("cpu"))
        assert devices.number_format(name, torch.device("cpu")).is_floating_point


def test_a_device_that_is_named_is_kept():
    assert devices.place("cpu") == devices.place(torch.device("cpu")) == torch.device("cpu")


def test_the_devices_of_the_machine_are_listed(monkeypatch):
    FakeCuda(monkeypatch, 2)
    with pytest.raises(LoadError, match="device 'tpu' cannot be used .* this machine has: auto, cpu, cuda:0, cuda:1, balanced"):
        devices.place("tpu")


def test_processes_that_are_launched_together_take_a_gpu_each(monkeypatch):
    FakeCuda(monkeypatch, 2)
    taken = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        taken.append(devices.place("auto").index)
    assert taken == [0, 1, 0]
