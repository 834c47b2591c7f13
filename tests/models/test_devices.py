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
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: bf16 or including_emulation,
        )


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_automatic_choices_follow_the_gpu(monkeypatch, bf16, expected):
    FakeCuda(monkeypatch, 2, bf16)
    assert devices.resolve_device("auto") == torch.device("cuda", 0)
    assert devices.resolve_device("balanced") == "balanced"
    assert {
        devices.resolve_dtype("auto", placed) for placed in (torch.device("cuda", 0), "balanced")
    } == {expected}
    assert devices.resolve_dtype("auto", torch.device("cpu")) == torch.float32


def test_every_format_is_known_by_its_name_and_as_torch_says_it():
    for name in devices.DTYPES:
        assert devices.resolve_dtype(name, "balanced") is devices.resolve_dtype(
            getattr(torch, name), torch.device("cpu")
        )
        assert devices.resolve_dtype(name, torch.device("cpu")).is_floating_point


def test_a_device_that_is_named_is_kept():
    assert (
        devices.resolve_device("cpu")
        == devices.resolve_device(torch.device("cpu"))
        == torch.device("cpu")
    )


def test_the_devices_of_the_machine_are_listed(monkeypatch):
    FakeCuda(monkeypatch, 2)
    with pytest.raises(
        LoadError,
        match=(
            "device 'tpu' cannot be used .* this machine has: auto, cpu, cuda:0, cuda:1, balanced"
        ),
    ):
        devices.resolve_device("tpu")


def test_processes_that_are_launched_together_take_a_gpu_each(monkeypatch):
    FakeCuda(monkeypatch, 2)
    indices = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        indices.append(devices.resolve_device("auto").index)
    assert indices == [0, 1, 0]


@pytest.mark.parametrize(
    ("flags", "text", "advice"),
    [
        ("sse4_2", "no known vector units", "no units for bfloat16"),
        ("sse4_2 avx2", "AVX2", "no units for bfloat16"),
        ("avx2 avx512f", "AVX2, AVX-512", "no units for bfloat16"),
        ("avx2 avx512f avx512_bf16", "AVX2, AVX-512, AVX512-BF16", "bfloat16 is fast"),
        (
            "avx2 avx512f avx512_bf16 amx_bf16 amx_tile",
            "AVX2, AVX-512, AVX512-BF16, AMX-BF16",
            "bfloat16 is fast",
        ),
        ("FP ASIMD", "NEON", "no units for bfloat16"),
        ("fp asimd sve bf16", "NEON, SVE, BF16", "bfloat16 is fast"),
    ],
)
def test_a_processor_is_told_with_the_number_format_that_suits_it(monkeypatch, flags, text, advice):
    for name in devices.LIMITS:
        monkeypatch.delenv(name, raising=False)
    units, format = devices.processor(flags.split(), "AVX2")
    assert units == f"{text}; torch uses AVX2"
    assert advice in format and "float32" in format and "\n" not in format


def test_a_processor_held_back_by_a_variable_is_told_as_such(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    for value, advice in {
        "AVX2": "slow",
        "AVX512_CORE": "slow",
        "AVX512_CORE_BF16": "is fast",
        "ALL": "is fast",
    }.items():
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
        units, format = devices.processor({"avx2", "avx512f", "avx512_bf16"}, "AVX512")
        assert units.endswith(f"(ONEDNN_MAX_CPU_ISA={value})") and advice in format


def test_flags_are_read_from_what_each_system_tells():
    assert devices.flags_of_linux(
        "processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags : fpu\n"
    ) == {"fpu", "avx2"}
    assert devices.flags_of_linux("processor : 0\nFeatures : fp asimd bf16\n") == {
        "fp",
        "asimd",
        "bf16",
    }
    assert devices.flags_of_linux("") == set()
    intel = (
        "machdep.cpu.features: FPU AVX1.0\n"
        "machdep.cpu.leaf7_features: AVX2 AVX512F\n"
        "hw.optional.avx2_0: 1\n"
    )
    assert {"avx2", "avx512f"} <= devices.flags_of_macos(intel)
    apple = (
        "machdep.cpu.brand_string: Apple M2\n"
        "hw.optional.neon: 1\n"
        "hw.optional.arm.FEAT_BF16: 1\n"
        "hw.optional.arm.FEAT_SME: 0\n"
    )
    assert devices.flags_of_macos(apple) == {"neon", "feat_bf16"}
    assert (
        devices.processor(devices.flags_of_macos(apple), "DEFAULT")[0]
        == "NEON, BF16; torch uses DEFAULT"
    )


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_this_machine_is_told_whatever_its_system(monkeypatch, system):
    monkeypatch.setattr(devices.platform, "system", lambda: system)
    monkeypatch.setattr(devices, "_read", lambda file: "")
    # no sysctl here; torch knows three
    assert devices.processor_flags() <= {"avx2", "avx512f", "avx512_bf16"}
    assert "torch uses" in devices.processor()[0]
