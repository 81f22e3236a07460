"""All blocks of a transformer as one operator on a CPU: narrow models spend most of their time between operators.

Letters in tensor names: D blocks, B batch, L tokens, C width, H heads.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from varscale.kernels import building
from varscale.kernels.attend import KeyValueCache

MOST_CHANNELS = 128
"""Width up to which the block's own products, which keep no panels in cache, are faster than the library's."""
ROWS_AT_ONCE = 512
"""Tokens that a thread takes through all blocks at a time where nothing is kept: they stay in its cache."""
_LEAST_LANES, _MOST_LANES = 8, 16
"""Numbers of a vector: as many as the processor has, where rows are whole vectors of so many."""


def fits(width: int, hidden: int, heads: int, *, normalised: bool = True) -> bool:
    """Whether the operator can be used for blocks of this shape on this machine: asked for every pass."""
    if width > MOST_CHANNELS or width % _LEAST_LANES or hidden % _LEAST_LANES or not building.enabled():
        return False
    return _library(width, hidden, heads, normalised) is not None


def native_blocks(
    x_BLC: Tensor,
    modulation_DB6C: Tensor,
    log_limit: float,
    ends: Sequence[int],
    weights: Sequence[Tensor],
    caches: Sequence[KeyValueCache] = (),
    *,
    normalised: bool = True,
) -> Tensor:
    """The residual stream after all D blocks (B, L, C).

    Args:
        x_BLC: float32, the residual stream.
        modulation_DB6C: Each block's gates, scales and shifts; of attention and of the feed-forward layers each.
        log_limit: Largest logarithm of a head's factor on logits; beyond, no gradient passes.
        ends: Where each scale ends; the last is L.
        weights: Ten tensors a block: of queries, keys and values (3·C, C), the biases of queries and of values, the
            logarithms of the heads' factors on logits; and weight and bias of the projection and of the two
            feed-forward layers.
        caches: One a block, only without gradients: the L tokens are one scale that sees all that was cached, and
            are added to it.
        normalised: Whether queries and keys are given length 1.
    """
    if torch.is_grad_enabled():
        assert not caches, "a cache is for sampling"
        return cast(Tensor, _Blocks.apply(x_BLC, modulation_DB6C, log_limit, tuple(ends), normalised, *weights))
    batch, tokens, width = x_BLC.shape
    begin = caches[0].length if caches else 0
    rows = [cache.reserve(batch, tokens, 3 * width, x_BLC) for cache in caches]
    inputs = (x_BLC.contiguous(), modulation_DB6C.contiguous(), weights, rows, log_limit, ends, begin, normalised)
    return cast(Tensor, torch.ops.varscale.blocks_without_gradients(*inputs))


class _Blocks(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLC: Tensor,
        modulation_DB6C: Tensor,
        log_limit: float,
        ends: tuple[int, ...],
        normalised: bool,
        *weights: Tensor,
    ) -> Tensor:
        inputs = (x_BLC.contiguous(), modulation_DB6C.contiguous())
        ctx.settings = (log_limit, ends, normalised)
        outputs_DBLC, memory = torch.ops.varscale.blocks(*inputs, weights, *ctx.settings)
        ctx.save_for_backward(*inputs, outputs_DBLC, memory, *weights)
        return cast(Tensor, outputs_DBLC[-1])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, modulation_DB6C, outputs_DBLC, memory, *weights = ctx.saved_tensors
        x_gradient_BLC, modulation_gradient_DB6C, *gradients = torch.ops.varscale.blocks_backward(
            x_BLC, modulation_DB6C, weights, memory, outputs_DBLC, output_gradients[0], *ctx.settings
        )
        return (x_gradient_BLC, modulation_gradient_DB6C, None, None, None, *gradients)


# operators make FLOPs countable; without the wrapping of torch.library.custom_op, which costs more than a narrow block
_operators = torch.library.Library("varscale", "FRAGMENT")
_operators.define(
    "blocks(Tensor x, Tensor modulation, Tensor[] weights, float log_limit, int[] ends, bool normalised) "
    "-> (Tensor, Tensor)"
)
_operators.define(
    "blocks_without_gradients(Tensor x, Tensor modulation, Tensor[] weights, Tensor(a!)[] caches, float log_limit, "
    "int[] ends, int begin, bool normalised) -> Tensor"
)
_operators.define(
    "blocks_backward(Tensor x, Tensor modulation, Tensor[] weights, Tensor memory, Tensor outputs, Tensor gradient, "
    "float log_limit, int[] ends, bool normalised) -> Tensor[]"
)


def _forward(
    x_BLC: Tensor,
    modulation_DB6C: Tensor,
    weights: list[Tensor],
    log_limit: float,
    ends: list[int],
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    (rows, width), hidden, heads = x_BLC.flatten(0, 1).shape, len(weights[7]), len(weights[3])
    blocks = len(modulation_DB6C)
    memory = x_BLC.new_empty(blocks * rows * _kept_floats(width, hidden, heads))
    space = x_BLC.new_empty(_matrix_floats(width, hidden) + rows * (width + hidden + 2))
    outputs_DBLC = x_BLC.new_empty(blocks, *x_BLC.shape)
    _library_of(width, hidden, heads, normalised).blocks_forward(
        *_pointers(x_BLC, modulation_DB6C),
        _array(weights),
        *_pointers(memory, space, outputs_DBLC),
        *_sizes(modulation_DB6C, hidden, ends, log_limit),
    )
    return outputs_DBLC, memory


def _without_gradients(
    x_BLC: Tensor,
    modulation_DB6C: Tensor,
    weights: list[Tensor],
    caches: list[Tensor],
    log_limit: float,
    ends: list[int],
    begin: int,
    normalised: bool,
) -> Tensor:
    (batch, tokens, width), hidden, heads = x_BLC.shape, len(weights[7]), len(weights[3])
    threads = torch.get_num_threads()
    at_once = max(1, min(ROWS_AT_ONCE // tokens, -(-batch // threads)))
    floats = at_once * tokens * (_kept_floats(width, hidden, heads) + width + hidden + 2)
    prepared = x_BLC.new_empty(len(modulation_DB6C) * _matrix_floats(width, hidden))
    space, output_BLC = x_BLC.new_empty(threads * floats), torch.empty_like(x_BLC)
    integers = map(ctypes.c_int64, (begin, caches[0].shape[1] if caches else 0, at_once))
    _library_of(width, hidden, heads, normalised).blocks_without_gradients(
        *_pointers(x_BLC, modulation_DB6C),
        _array(weights),
        _array(caches) if caches else None,
        *integers,
        *_pointers(prepared, space, output_BLC),
        *_sizes(modulation_DB6C, hidden, ends, log_limit),
    )
    return output_BLC


def _kept_floats(width: int, hidden: int, heads: int) -> int:
    """Of a token: what the operator keeps of a block."""
    return 7 * width + hidden + heads


def _matrix_floats(width: int, hidden: int) -> int:
    """Of a block's matrices and biases as the operator reads them."""
    return width * (4 * width + 2 * hidden + 4)


def _backward(
    x_BLC: Tensor,
    modulation_DB6C: Tensor,
    weights: list[Tensor],
    memory: Tensor,
    outputs_DBLC: Tensor,
    gradient_BLC: Tensor,
    log_limit: float,
    ends: list[int],
    normalised: bool,
) -> list[Tensor]:
    (rows, width), hidden, heads = x_BLC.flatten(0, 1).shape, len(weights[7]), len(weights[3])
    space = x_BLC.new_empty(rows * (6 * width + 3 * hidden + 2) + 3 * width + (len(x_BLC) + 1) * heads)
    x_gradient_BLC = gradient_BLC.clone(memory_format=torch.contiguous_format)
    modulation_gradient_DB6C = torch.empty_like(modulation_DB6C)
    gradients = [torch.empty_like(weight) for weight in weights]
    _library_of(width, hidden, heads, normalised).blocks_backward(
        *_pointers(x_BLC, modulation_DB6C),
        _array(weights),
        *_pointers(memory, space, outputs_DBLC, x_gradient_BLC, modulation_gradient_DB6C),
        _array(gradients),
        *_sizes(modulation_DB6C, hidden, ends, log_limit),
    )
    return [x_gradient_BLC, modulation_gradient_DB6C, *gradients]


_operators.impl("blocks", _forward, "CPU")
_operators.impl("blocks_without_gradients", _without_gradients, "CPU")
_operators.impl("blocks_backward", _backward, "CPU")


@register_flop_formula(torch.ops.varscale.blocks)
def _forward_flops(
    x_shape: Sequence[int], modulation_shape: Sequence[int], weights: Sequence[Sequence[int]], *_: object, **__: object
) -> int:
    batch, tokens, width = x_shape
    products = sum(math.prod(shape) for shape in weights if len(shape) == 2)
    pairs = modulation_shape[0] * tokens**2  # all, as everywhere in the project
    return 2 * batch * tokens * products + 4 * batch * pairs * width


@register_flop_formula(torch.ops.varscale.blocks_without_gradients)
def _flops_without_gradients(
    x_shape: Sequence[int], modulation_shape: Sequence[int], weights: Any, *others: Any, **_: object
) -> int:
    batch, tokens, width = x_shape
    begin: int = others[-2]
    cached = 4 * batch * modulation_shape[0] * tokens * begin * width  # pairs with the tokens before these
    return _forward_flops(x_shape, modulation_shape, weights) + cached


@register_flop_formula(torch.ops.varscale.blocks_backward)
def _backward_flops(*shapes: Any, **_: object) -> int:
    return 2 * _forward_flops(*shapes)


def _library(width: int, hidden: int, heads: int, normalised: bool) -> ctypes.CDLL | None:
    """To be asked only where kernels are enabled: what it says is kept."""
    lanes = _MOST_LANES if width % _MOST_LANES == 0 and hidden % _MOST_LANES == 0 else _LEAST_LANES
    return _compiled(width // heads, normalised, lanes)


@functools.lru_cache(maxsize=64)
def _compiled(head_channels: int, normalised: bool, lanes: int) -> ctypes.CDLL | None:
    definitions = {"HEAD_CHANNELS": head_channels, "NORMALISED": normalised, "MOST_LANES": lanes}
    return building.load(Path(__file__).with_name("blocks.cpp"), definitions)


def _library_of(width: int, hidden: int, heads: int, normalised: bool) -> ctypes.CDLL:
    library = _library(width, hidden, heads, normalised)
    assert library is not None, "ask fits() first"
    return library


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _array(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _sizes(modulation_DB6C: Tensor, hidden: int, ends: Sequence[int], log_limit: float) -> tuple[Any, ...]:
    integer = ctypes.c_int64
    blocks, batch, _, width = modulation_DB6C.shape
    return (
        *map(integer, (blocks, batch, width, hidden)),
        (integer * len(ends))(*ends),
        integer(len(ends)),
        integer(torch.get_num_threads()),
        ctypes.c_float(log_limit),
    )
