"""Block-causal attention as one operator on a CPU, for few channels a head.

Forward and backward, batch 32, 130 tokens, against normalisation and `scaled_dot_product_attention` with a mask
(milliseconds on one core with AVX-512, torch 2.13): 12 heads of 4 channels 10 against 49, 8 of 8 10 against 38, 3 of 16
6 against 10, 8 of 32 23 against 49, 4 of 64 21 against 40; in bfloat16 (float32 inside) the last two 25 against 104 and
22 against 67.

Letters in tensor names: B batch, L tokens, M the last of them, J joint channels (queries, keys and values of all
heads), C width, H heads.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from varscale.kernels import building

MOST_HEAD_CHANNELS = 64


@torch.compiler.assume_constant_result
def available(head_channels: int, *, normalised: bool = True) -> bool:
    """Whether the operator can be used: a C++ compiler is there, and a head is not too wide."""
    fits = head_channels <= MOST_HEAD_CHANNELS and building.enabled()
    return fits and _library(head_channels, normalised) is not None


def native_attention(joint_BLJ: Tensor, scale_H: Tensor, ends: Sequence[int], *, normalised: bool = True) -> Tensor:
    """Attention among the tokens of one image, each seeing all up to the end of its own scale.

    Args:
        joint_BLJ: float32 (B, L, 3·C): queries, keys and values.
        scale_H: Factor on the logits of each head.
        ends: Where each scale ends; the last is L.
        normalised: Whether queries and keys are given length 1 here.

    Returns:
        (B, L, C).
    """
    result: tuple[Tensor, Tensor] = _forward(joint_BLJ, scale_H, list(ends), normalised)
    return result[0]


def native_attention_to_all(joint_BLJ: Tensor, scale_H: Tensor, *, queries: int, normalised: bool = True) -> Tensor:
    """Attention of the last tokens to all tokens, without gradients: a step of cached sampling.

    Args:
        joint_BLJ: float32 (B, L, 3·C), a prefix of a contiguous cache of more tokens.
        scale_H: Factor on the logits of each head.
        queries: How many tokens at the end ask.
        normalised: Whether queries and keys are given length 1 here.

    Returns:
        (B, queries, C).
    """
    out_BMC: Tensor = _to_all(joint_BLJ, scale_H, queries, normalised)
    return out_BMC


@torch.library.custom_op("varscale::attention_to_all", mutates_args=(), device_types="cpu")
def _to_all(joint_BLJ: Tensor, scale_H: Tensor, queries: int, normalised: bool) -> Tensor:
    batch, tokens, channels = joint_BLJ.shape
    out_BMC, log_sum_BHM = _empty_results(joint_BLJ[:, :queries], scale_H)
    _loaded(joint_BLJ, len(scale_H), normalised).attention_forward(
        *_pointers(joint_BLJ, scale_H.contiguous(), out_BMC, log_sum_BHM),
        *_sizes(batch, len(scale_H), [tokens]),
        ctypes.c_int64(tokens - queries),
        ctypes.c_int64(joint_BLJ.stride(0) // channels),
    )
    return out_BMC


@torch.library.custom_op("varscale::block_causal_attention", mutates_args=(), device_types="cpu")
def _forward(joint_BLJ: Tensor, scale_H: Tensor, ends: list[int], normalised: bool) -> tuple[Tensor, Tensor]:
    joint_BLJ, scale_H = joint_BLJ.contiguous(), scale_H.contiguous()
    out_BLC, log_sum_BHL = _empty_results(joint_BLJ, scale_H)
    batch, heads = len(joint_BLJ), len(scale_H)
    _loaded(joint_BLJ, heads, normalised).attention_forward(
        *_pointers(joint_BLJ, scale_H, out_BLC, log_sum_BHL),
        *_sizes(batch, heads, ends),
        ctypes.c_int64(0),
        ctypes.c_int64(joint_BLJ.shape[1]),
    )
    return out_BLC, log_sum_BHL


@torch.library.custom_op("varscale::block_causal_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    joint_BLJ: Tensor,
    scale_H: Tensor,
    out_BLC: Tensor,
    log_sum_BHL: Tensor,
    gradient_BLC: Tensor,
    ends: list[int],
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    joint_BLJ, scale_H, gradient_BLC = joint_BLJ.contiguous(), scale_H.contiguous(), gradient_BLC.contiguous()
    batch, heads = len(joint_BLJ), len(scale_H)
    joint_gradient_BLJ = torch.empty_like(joint_BLJ)
    scale_gradient_BH = scale_H.new_empty(batch, heads)
    tensors = (joint_BLJ, scale_H, out_BLC, log_sum_BHL, gradient_BLC, joint_gradient_BLJ, scale_gradient_BH)
    _loaded(joint_BLJ, heads, normalised).attention_backward(*_pointers(*tensors), *_sizes(batch, heads, ends))
    return joint_gradient_BLJ, scale_gradient_BH.sum(0)


@_forward.register_fake
def _(joint_BLJ: Tensor, scale_H: Tensor, ends: list[int], normalised: bool) -> tuple[Tensor, Tensor]:
    return _empty_results(joint_BLJ, scale_H)


@_backward.register_fake
def _(joint_BLJ: Tensor, scale_H: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return joint_BLJ.new_empty(joint_BLJ.shape), scale_H.new_empty(scale_H.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, list[int], bool], output: tuple[Tensor, Tensor]) -> None:
    joint_BLJ, scale_H, ctx.ends, ctx.normalised = inputs
    ctx.save_for_backward(joint_BLJ, scale_H, *output)


def _gradients(ctx: Any, gradient_BLC: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
    joint_gradient_BLJ, scale_gradient_H = _backward(*ctx.saved_tensors, gradient_BLC, ctx.ends, ctx.normalised)
    return joint_gradient_BLJ, scale_gradient_H, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


# FLOPs are counted for all L × L pairs, whatever the kernel skips, as everywhere in the project
@register_flop_formula(torch.ops.varscale.block_causal_attention)
def _forward_flops(joint_shape: Sequence[int], *_: object, **__: object) -> int:
    batch, tokens, channels = joint_shape
    return 4 * batch * tokens**2 * (channels // 3)


@register_flop_formula(torch.ops.varscale.block_causal_attention_backward)
def _backward_flops(joint_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * _forward_flops(joint_shape)


@register_flop_formula(torch.ops.varscale.attention_to_all)
def _to_all_flops(joint_shape: Sequence[int], _: object, queries: int, *__: object, **___: object) -> int:
    batch, tokens, channels = joint_shape
    return 4 * batch * queries * tokens * (channels // 3)


@functools.lru_cache(maxsize=16)
def _library(head_channels: int, normalised: bool) -> ctypes.CDLL | None:
    """To be asked only where kernels are enabled: what it says is kept."""
    source = Path(__file__).with_name("attention.cpp")
    return building.load(source, {"HEAD_CHANNELS": head_channels, "NORMALISED": normalised})


def _loaded(joint_BLJ: Tensor, heads: int, normalised: bool) -> ctypes.CDLL:
    library = _library(joint_BLJ.shape[2] // (3 * heads), normalised)
    if library is None:
        raise RuntimeError("the native attention kernel is not available on this machine; ask available() first")
    return library


def _empty_results(joint_BLJ: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = joint_BLJ.shape
    return joint_BLJ.new_empty(batch, tokens, channels // 3), joint_BLJ.new_empty(batch, scale_H.shape[0], tokens)


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sizes(batch: int, heads: int, ends: Sequence[int]) -> tuple[Any, ...]:
    integer = ctypes.c_int64
    return (
        integer(batch),
        integer(heads),
        (integer * len(ends))(*ends),
        integer(len(ends)),
        integer(torch.get_num_threads()),
    )
