"""Compute linear maps by the library that is fast on this processor.

On processors of AMD the matrix products that torch uses for float32 (those of MKL) leave half of
AVX-512 unused. Those of oneDNN, which torch ships too, do not: a forward takes about half the time.
Both sum in float32 and differ by rounding only.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

_CPU_INFO = Path("/proc/cpuinfo")  # of Linux


class OneDnnLinear(nn.Linear):
    """A linear map that runs by oneDNN where nothing is trained.

    The weights stay where and what they are: they may be changed, masked or trained as those of any
    ``nn.Linear``, which is what runs where a gradient is wanted, on a GPU, and in other dtypes.
    """

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Return the input times the weights, plus the bias where there is one."""
        if not self._runs_in_onednn(input):
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")

    def _runs_in_onednn(self, input: Tensor) -> bool:
        tensors = [input, self.weight]
        if self.bias is not None:
            tensors.append(self.bias)
        for tensor in tensors:
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                return False
            if tensor.requires_grad and torch.is_grad_enabled():
                return False
        return True


def use_onednn(model: nn.Module) -> nn.Module:
    """Let the linear maps of a model run by oneDNN, where this is faster.

    Use it for a model that is mostly run and hardly trained, in float32 on a CPU. Elsewhere it
    changes nothing.

    Parameters
    ----------
    model : nn.Module
        The model; its modules of the very class ``nn.Linear`` are changed in place.

    Returns
    -------
    nn.Module
        The same model.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.pocket.linear import use_onednn
    >>> linear = torch.nn.Linear(3, 2)
    >>> expected = linear(torch.ones(4, 3))
    >>> torch.allclose(use_onednn(linear)(torch.ones(4, 3)), expected)
    True
    """
    if onednn_is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model


@cache
def onednn_is_faster() -> bool:
    """Tell whether this is a processor of AMD of which torch uses AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    # not offered to users by torch, so a later release may lack it
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    processor = (
        _CPU_INFO.read_text(encoding="utf-8") if _CPU_INFO.exists() else platform.processor()
    )
    return "AuthenticAMD" in processor
