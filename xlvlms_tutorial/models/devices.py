"""Which device a model goes to, and in which dtype."""

import os
import platform
from collections.abc import Collection
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xlvlms_tutorial.errors import LoadError
from xlvlms_tutorial.io import output_of
from xlvlms_tutorial.models.failures import FAILURES, reason

# what a processor may have that decides how fast products are: our name, and
# its flags on Linux, macOS and ARM
UNITS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "AVX512-BF16": {"avx512_bf16"},
    "AMX-BF16": {"amx_bf16"},
    "NEON": {"asimd", "neon"},
    "SVE": {"sve"},
    "BF16": {"bf16", "feat_bf16"},
}
HALF = ("AVX512-BF16", "AMX-BF16", "BF16")  # those that multiply bfloat16
# variables by which torch is told to use less
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def resolve_device(device: str | torch.device) -> torch.device | str:
    """Return the device for "auto", and any other as torch names it; "balanced" stays.

    Raises
    ------
    LoadError
        If this machine has no such device, with those it has.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        # accelerate launch and torchrun: one process a GPU
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    if device == "balanced" and gpus:
        return device
    try:
        placed = torch.device(device)
        torch.zeros(1, device=placed)
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        available = ["auto", "cpu"]
        available += [f"cuda:{k}" for k in range(gpus)]
        if gpus:
            available.append("balanced")
        if torch.backends.mps.is_available():
            available.append("mps")
        reason = str(cause).strip().split("\n")[0]
        raise LoadError(
            f"device {str(device)!r} cannot be used ({reason})",
            f"this machine has: {', '.join(available)}",
        ) from cause
    if placed.type == "meta":
        raise LoadError("device 'meta' holds no weights", "give cpu, cuda or auto")
    return placed


def home(model: torch.nn.Module) -> torch.device:
    """Return where a model's weights are, or are brought to when they are offloaded."""
    device = model.device
    if device.type != "meta":
        return device
    return torch.device(model.get_input_embeddings()._hf_hook.execution_device)


def resolve_dtype(dtype: str | torch.dtype, placed: torch.device | str) -> torch.dtype:
    """Return the dtype of the weights for "auto" on a device, or the one that is named.

    Raises
    ------
    LoadError
        If it is no floating-point dtype.
    """
    if dtype == "auto":
        if str(placed) == "cpu":
            return torch.float32
        cuda = str(placed) == "balanced" or placed.type == "cuda"
        # a T4 only emulates bfloat16, slowly
        if cuda and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16
    if (name := str(dtype).removeprefix("torch.")) not in DTYPES:
        raise LoadError(f"dtype {name!r}", f"allowed: auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Let a model compute its attention in one of the ways that transformers knows.

    Raises
    ------
    LoadError
        If ``implementation`` is none of them, needs a package that is not installed, or the model
        does not have it.
    """
    allowed = ["eager"]
    allowed += [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name]
    if implementation not in allowed:  # a hub id would be code to run
        raise LoadError(f"attn_implementation={implementation!r}", f"allowed: {', '.join(allowed)}")
    try:
        model.set_attn_implementation(implementation)
    except FAILURES as cause:
        raise LoadError(
            f"attn_implementation={implementation!r} cannot be had here ({reason(cause)})",
            "give 'sdpa' or 'eager'",
        ) from cause


def processor(
    flags: Collection[str] | None = None, capability: str | None = None
) -> tuple[str, str]:
    """Return what this CPU has and torch uses, and which dtype that makes fast, a line each.

    ``flags`` and ``capability`` are those of this machine where they are left out.
    """
    flags = processor_flags() if flags is None else set(map(str.lower, flags))
    capability = capability or torch.backends.cpu.get_cpu_capability()
    units = [name for name, signs in UNITS.items() if signs & flags]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    description = f"{', '.join(units) or 'no known vector units'}; torch uses {capability}"
    if limits:
        description += f" ({', '.join(limits)})"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not set(HALF) & set(units):
        fast = (
            "float32, the default on a CPU: this one has no units for bfloat16, which "
            "is several times slower here"
        )
    elif not any(sign in limit for sign in ("ALL", "DEFAULT", "BF16", "FP16", "AMX")):
        fast = (
            "float32, the default on a CPU: bfloat16 is slow with ONEDNN_MAX_CPU_ISA as it is set"
        )
    else:
        fast = (
            "float32 is the default on a CPU; bfloat16 is fast here too, but its "
            "results differ between processors"
        )
    return description, fast


def processor_flags() -> set[str]:
    """Return the instruction sets of this CPU, in lower case as Linux names them.

    Empty where the system does not tell.
    """
    system = platform.system()
    if system == "Linux":
        return flags_of_linux(_read("/proc/cpuinfo"))
    if system == "Darwin":
        return flags_of_macos(output_of("sysctl", "machdep.cpu", "hw.optional"))
    checks = {
        "avx2": "_is_avx2_supported",
        "avx512f": "_is_avx512_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
    }
    flags = set()
    for flag, name in checks.items():
        supported = getattr(torch.cpu, name, bool)  # bool() is False
        if supported():
            flags.add(flag)
    return flags


def flags_of_linux(cpuinfo: str) -> set[str]:
    """Return the flags of the first CPU in ``/proc/cpuinfo``.

    They stand behind "flags" on x86 and "Features" on ARM.
    """
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return set(value.lower().split())
    return set()


def flags_of_macos(output: str) -> set[str]:
    """Return the flags in the output of ``sysctl``.

    It has lists of names on Intel, a switch for each on Apple's own CPUs.
    """
    flags: set[str] = set()
    for line in output.splitlines():
        name, _, value = line.partition(":")
        switch = name.rpartition(".")[2].strip().lower()
        if switch in ("features", "leaf7_features"):
            flags |= set(value.lower().split())
        elif value.strip() == "1":
            flags.add(switch)
    return flags


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
