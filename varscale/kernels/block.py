"""A whole transformer block as one operator on a CPU: narrow models spend most of their time between operators.

Letters in tensor names: B batch, L tokens, C width, H heads, J joint channels of queries, keys and values (3·C).
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

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
        ends: tuple[int, ...],
        *weights: Tensor,
    ) -> Tensor:
        inputs = (x_BLC.contiguous(), modulation_B6C.contiguous(), log_scale_H.clamp_max(log_limit).exp())
        out_BLC: Tensor
        out_BLC, memory = torch.ops.varscale.block(*inputs, weights, ends)
        ctx.save_for_backward(*inputs, memory, log_scale_H, *weights)
        ctx.log_limit, ctx.ends = log_limit, ends
        return out_BLC

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, modulation_B6C, scale_H, memory, log_scale_H, *weights = ctx.saved_tensors
        inputs = (x_BLC, modulation_B6C, scale_H, weights, memory, output_gradients[0].contiguous(), ctx.ends)
        x_gradient_BLC, modulation_gradient_B6C, scale_gradient_BH, *gradients = torch.ops.varscale.block_backward(
            *inputs
        )
        log_scale_gradient_H = scale_gradient_BH.sum(0) * scale_H * (log_scale_H <= ctx.log_limit)
        return (x_gradient_BLC, modulation_gradient_B6C, log_scale_gradient_H, None, None, *gradients)


# operators make FLOPs countable; without the wrapping of torch.library.custom_op, which costs a tenth of a narrow block
_operators = torch.library.Library("varscale", "FRAGMENT")
_operators.define("block(Tensor x, Tensor modulation, Tensor scale, Tensor[] weights, int[] ends) -> (Tensor, Tensor)")
_operators.define(
    "block_backward(Tensor x, Tensor modulation, Tensor scale, Tensor[] weights, Tensor memory, Tensor gradient, "
    "int[] ends) -> Tensor[]"
)


def _forward(
    x_BLC: Tensor, modulation_B6C: Tensor, scale_H: Tensor, weights: list[Tensor], ends: list[int]
) -> tuple[Tensor, Tensor]:
    rows, width, hidden = x_BLC.shape[0] * x_BLC.shape[1], x_BLC.shape[2], len(weights[4])
    memory = x_BLC.new_empty(rows * (9 * width + 2 * hidden + 4 + len(scale_H)))
    space = x_BLC.new_empty(width * max(hidden, 3 * width))
    out_BLC = torch.empty_like(x_BLC)
    _library_of(scale_H, width).block_forward(
        *_pointers(x_BLC, modulation_B6C, scale_H),
        _array(weights),
        *_pointers(memory, space, out_BLC),
        *_sizes(x_BLC, hidden, ends),
    )
    return out_BLC, memory


def _backward(
    x_BLC: Tensor,
    modulation_B6C: Tensor,
    scale_H: Tensor,
    weights: list[Tensor],
    memory: Tensor,
    gradient_BLC: Tensor,
    ends: list[int],
) -> list[Tensor]:
    rows, width, hidden = x_BLC.shape[0] * x_BLC.shape[1], x_BLC.shape[2], len(weights[4])
    space = x_BLC.new_empty(rows * (5 * width + hidden))
    of_inputs = [torch.empty_like(x_BLC), torch.empty_like(modulation_B6C), scale_H.new_empty(len(x_BLC), len(scale_H))]
    of_weights = [torch.empty_like(weight) for weight in weights]
    _library_of(scale_H, width).block_backward(
        *_pointers(x_BLC, modulation_B6C, scale_H),
        _array(weights),
        *_pointers(memory, space, gradient_BLC, *of_inputs),
        _array(of_weights),
        *_sizes(x_BLC, hidden, ends),
    )
    return [*of_inputs, *of_weights]


_operators.impl("block", _forward, "CPU")
_operators.impl("block_backward", _backward, "CPU")


@register_flop_formula(torch.ops.varscale.block)
def _forward_flops(
    x_shape: Sequence[int],
    modulation: object,
    scale: object,
    weights: Sequence[Sequence[int]],
    *_: object,
    **__: object,
) -> int:
    batch, tokens, width = x_shape
    products = sum(math.prod(shape) for shape in weights if len(shape) == 2)
    return 2 * batch * tokens * products + 4 * batch * tokens**2 * width  # of all pairs, as everywhere in the project


@register_flop_formula(torch.ops.varscale.block_backward)
def _backward_flops(*shapes: Any, **_: object) -> int:
    return 2 * _forward_flops(*shapes)


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
