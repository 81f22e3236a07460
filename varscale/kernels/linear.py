"""Linear layers that use the whole width of a processor's vectors where PyTorch's own product uses half of it.

PyTorch multiplies float32 matrices by MKL, which on AMD's processors with AVX-512 computes with vectors of 256 bits.
oneDNN, which PyTorch has for convolutions, uses all 512. Forward and backward, torch 2.14, one core of an AMD EPYC,
beside other work, milliseconds:

      rows  inputs  outputs |  MKL  oneDNN
      2048     256      768 | 23.2    12.3
      2048     688      256 | 20.7     9.5
      4160     384     1536 |  144      67
        64     256      768 | 0.73    0.41

Letters: R rows, I inputs and O outputs of a layer.
"""

import functools
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from varscale.kernels import building


class Linear(nn.Linear):
    """`torch.nn.Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) to (…, O)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, (…, I) to (…, O), by the product that is faster on this processor."""
    if not _by_onednn(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled():
        return cast(Tensor, _Linear.apply(x, weight_OI, bias_O))
    return _product(x, weight_OI, bias_O)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _product(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        gradient_RO = gradient.flatten(0, -2)
        return (
            _product(gradient, weight_OI.T) if of_x else None,
            _product(gradient_RO.T, x.flatten(0, -2).T) if of_weight else None,
            gradient_RO.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], ""))


def _by_onednn(x: Tensor, weight_OI: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight_OI.dtype != torch.float32:
        return False
    if x.ndim < 2 or not x.numel() or not weight_OI.numel():
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or not building.enabled():
        return False
    return _halves_vectors()


@functools.cache
def _halves_vectors() -> bool:
    """Whether this processor computes with 512 bits where MKL uses 256, and oneDNN is there."""
    if platform.system() != "Linux" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    has_both = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_both and "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]
