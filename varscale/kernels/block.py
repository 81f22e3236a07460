"""A whole transformer block as one operator on a CPU: narrow models spend most of their time between operators.

Letters in tensor names: B batch, L tokens, C width, H heads, J joint channels of queries, keys and values (3·C).
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from varscale.kernels import building

MOST_CHANNELS = 128
"""Width up to which the block's own products, which keep no panels in cache, are faster than the library's."""
_LANES = 8


def fits(width: int, hidden: int, heads: int) -> bool:
    """Whether the operator can be used for blocks of this shape on this machine: asked for every pass."""
    whole = width % _LANES == 0 and hidden % _LANES == 0
    return whole and width <= MOST_CHANNELS and building.enabled() and _library(width // heads) is not None


def native_block(
    x_BLC: Tensor, modulation_B6C: Tensor, log_scale_H: Tensor, log_limit: float, ends: Sequence[int], *weights: Tensor
) -> Tensor:
    """The block's output (B, L, C).

    Args:
        x_BLC: float32, the residual stream.
        modulation_B6C: Gates, scales and shifts; of attention and of the feed-forward layers each.
        log_scale_H: Logarithm of each head's factor on logits of queries and keys of length 1.
        log_limit: Its largest value; beyond, no gradient passes.
        ends: Where each scale ends; the last is L.
        weights: Of queries, keys and values; of the projection; of the two feed-forward layers; each followed by its
            bias.
    """
    out_BLC: Tensor = _Block.apply(x_BLC, modulation_B6C, log_scale_H, log_limit, tuple(ends), *weights)
    return out_BLC


class _Block(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLC: Tensor,
        modulation_B6C: Tensor,
        log_scale_H: Tensor,
        log_limit: float,
        ends: Any,
        *weights: Tensor,
    ) -> Tensor:
        x_BLC, modulation_B6C = x_BLC.contiguous(), modulation_B6C.contiguous()
        scale_H = log_scale_H.clamp_max(log_limit).exp()
        rows, width, hidden = x_BLC.shape[0] * x_BLC.shape[1], x_BLC.shape[2], len(weights[4])
        memory = x_BLC.new_empty(rows * (9 * width + 2 * hidden + 4 + len(scale_H)))
        space = x_BLC.new_empty(width * max(hidden, 3 * width))
        out_BLC = torch.empty_like(x_BLC)
        tensors = (x_BLC, modulation_B6C, scale_H)
        _library_of(scale_H, width).block_forward(
            *_pointers(*tensors), _array(weights), *_pointers(memory, space, out_BLC), *_sizes(x_BLC, hidden, ends)
        )
        ctx.save_for_backward(*tensors, memory, log_scale_H, *weights)
        ctx.log_limit, ctx.ends = log_limit, ends
        return out_BLC

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, modulation_B6C, scale_H, memory, log_scale_H, *weights = ctx.saved_tensors
        rows, width, hidden = x_BLC.shape[0] * x_BLC.shape[1], x_BLC.shape[2], len(weights[4])
        space = x_BLC.new_empty(rows * (5 * width + hidden))
        x_gradient_BLC, modulation_gradient_B6C = torch.empty_like(x_BLC), torch.empty_like(modulation_B6C)
        scale_gradient_BH = scale_H.new_empty(len(x_BLC), len(scale_H))
        gradients = [torch.empty_like(weight) for weight in weights]
        _library_of(scale_H, width).block_backward(
            *_pointers(x_BLC, modulation_B6C, scale_H),
            _array(weights),
            *_pointers(memory, space, output_gradients[0].contiguous()),
            *_pointers(x_gradient_BLC, modulation_gradient_B6C, scale_gradient_BH),
            _array(gradients),
            *_sizes(x_BLC, hidden, ctx.ends),
        )
        log_scale_gradient_H = scale_gradient_BH.sum(0) * scale_H * (log_scale_H <= ctx.log_limit)
        return (x_gradient_BLC, modulation_gradient_B6C, log_scale_gradient_H, None, None, *gradients)


@functools.lru_cache(maxsize=16)
def _library(head_channels: int) -> ctypes.CDLL | None:
    """To be asked only where kernels are enabled: what it says is kept."""
    source = Path(__file__).with_name("block.cpp")
    return building.load(source, {"HEAD_CHANNELS": head_channels, "MOST_LANES": _LANES})


def _library_of(scale_H: Tensor, width: int) -> ctypes.CDLL:
    library = _library(width // len(scale_H))
    assert library is not None, "ask fits() first"
    return library


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _array(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _sizes(x_BLC: Tensor, hidden: int, ends: Sequence[int]) -> tuple[Any, ...]:
    integer = ctypes.c_int64
    numbers = (len(x_BLC), x_BLC.shape[2], hidden)
    return (
        *map(integer, numbers),
        (integer * len(ends))(*ends),
        integer(len(ends)),
        integer(torch.get_num_threads()),
    )
