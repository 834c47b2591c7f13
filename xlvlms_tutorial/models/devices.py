"""Which device a model goes to, and in which number format."""

import os

import torch

from xlvlms_tutorial.errors import LoadError

DTYPES = ("float32", "bfloat16", "float16", "float64")


def place(device: str | torch.device) -> torch.device | str:
    """The device for "auto", and any other as torch names it; "balanced" stays.

    Raises
    ------
    LoadError
        If this machine has no such device, with those it has.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        mine = int(os.environ.get("LOCAL_RANK", "0"))  # accelerate launch and torchrun: one process a GPU
        return torch.device("cuda", mine % gpus) if gpus else torch.device("cpu")
    if device == "balanced" and gpus:
        return device
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        here = ["auto", "cpu", *(f"cuda:{k}" for k in range(gpus)), *["balanced"] * bool(gpus)]
        here += ["mps"] * torch.backends.mps.is_available()
        reason = str(cause).strip().split("\n")[0]
        raise LoadError(f"device {str(device)!r} cannot be used ({reason})", f"this machine has: {', '.join(here)}") from cause
    if found.type == "meta":
        raise LoadError("device 'meta' holds no weights", "give cpu, cuda or auto")
    return found


def number_format(dtype: str | torch.dtype, placed: torch.device | str) -> torch.dtype:
    """The number format of the weights for "auto" on a device, or the one that is named.

    Raises
    ------
    LoadError
        If it is no floating-point format.
    """
    if dtype == "auto":
        if str(placed) == "cpu":
            return torch.float32
        cuda = str(placed) == "balanced" or placed.type == "cuda"
        # a T4 only emulates bfloat16, slowly
        return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if (told := str(dtype).removeprefix("torch.")) not in DTYPES:
        raise LoadError(f"dtype {told!r}", f"allowed: auto, {', '.join(DTYPES)}")
    return getattr(torch, told)
