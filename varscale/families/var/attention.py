"""Block-causal attention: every token sees its own scale and all coarser ones, by the fastest exact kernel.

Letters in tensor names: B batch, H heads, L all tokens of an image, M queries (the tokens of some scales), N keys (all
tokens up to the end of these scales), d channels of a head.

What is fastest was measured with torch 2.13, forward and backward, batch 32 (milliseconds on one core):

    tokens  width  heads | fused, masked | products | a call for each scale, no mask
       130     48      6 |          15.2 |     24.2 |          16.8
       130    256      4 |          30.2 |     31.6 |          49.6
        30     48      6 |          1.85 |     0.98 |          3.07
        30    256      4 |          2.36 |     2.08 |          4.97
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# up to here plain matrix products are faster on a CPU than its fused kernel
MOST_TOKENS_FOR_PRODUCTS = 64
# scales that end up to here share one masked call on a GPU; each finer scale has its own, without a mask
MOST_TOKENS_IN_MASKED_CALL = 160


def block_causal_attention(queries_BHLd: Tensor, keys_BHLd: Tensor, values_BHLd: Tensor, mask_LL: Tensor) -> Tensor:
    """Attention with logits q·k (no further scaling) over all tokens of an image.

    Args:
        queries_BHLd: Queries, already scaled.
        keys_BHLd: Keys.
        values_BHLd: Values.
        mask_LL: From `block_causal_mask`, 0 where a query sees a key and -inf elsewhere.

    Returns:
        (B, H, L, d).
    """
    mask_LL = mask_LL.to(queries_BHLd.dtype)
    if queries_BHLd.device.type == "cpu" and queries_BHLd.shape[2] <= MOST_TOKENS_FOR_PRODUCTS:
        return torch.softmax(queries_BHLd @ keys_BHLd.transpose(-1, -2) + mask_LL, dim=-1) @ values_BHLd
    return F.scaled_dot_product_attention(queries_BHLd, keys_BHLd, values_BHLd, attn_mask=mask_LL, scale=1.0)


def sliced_attention(
    queries_BHLd: Tensor,
    keys_BHLd: Tensor,
    values_BHLd: Tensor,
    mask_LL: Tensor,
    slices: Sequence[tuple[int, int]],
) -> Tensor:
    """The same numbers as `block_causal_attention`, skipping the pairs that the mask hides.

    The queries of one scale see a prefix of the keys, so a finer scale needs no mask and can use a flash kernel; only
    the coarse scales, too small to fill one, share a masked call.

    Args:
        queries_BHLd: Queries, already scaled; of all scales or of the first few.
        keys_BHLd: Keys.
        values_BHLd: Values.
        mask_LL: From `block_causal_mask`.
        slices: From `query_slices`.
    """
    tokens = queries_BHLd.shape[2]
    slices = [(begin, min(end, tokens)) for begin, end in slices if begin < tokens]
    queries = queries_BHLd.split([end - begin for begin, end in slices], dim=2)
    outputs = []
    # from the finest scale on, each prefix cut from the one before: the backward pass then adds up the fewest zeros
    for (begin, end), queries_BHMd in zip(reversed(slices), reversed(queries), strict=True):
        keys_BHLd, values_BHLd = keys_BHLd[:, :, :end], values_BHLd[:, :, :end]
        mask_MN = mask_LL[begin:end, :end].to(queries_BHLd.dtype) if begin == 0 else None
        outputs.append(
            F.scaled_dot_product_attention(queries_BHMd, keys_BHLd, values_BHLd, attn_mask=mask_MN, scale=1.0)
        )
    return torch.cat(outputs[::-1], dim=2)


@functools.lru_cache(maxsize=32)
def scale_bounds(patch_nums: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Where each scale's tokens begin and end in the sequence."""
    ends = tuple(itertools.accumulate(side**2 for side in patch_nums))
    return tuple(zip((0, *ends), ends, strict=False))


@functools.lru_cache(maxsize=32)
def query_slices(patch_nums: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The slices of `sliced_attention`: first the coarse scales together, then each finer one."""
    bounds = scale_bounds(patch_nums)
    together = max((end for _, end in bounds if end <= MOST_TOKENS_IN_MASKED_CALL), default=bounds[0][1])
    return ((0, together), *((begin, end) for begin, end in bounds if begin >= together))


@functools.lru_cache(maxsize=32)
def level_of_tokens(patch_nums: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 (L,): the scale to which each token belongs."""
    with torch.inference_mode(False):
        sizes = torch.tensor([side**2 for side in patch_nums], device="cpu")
        return torch.arange(len(patch_nums), device="cpu").repeat_interleave(sizes).to(device)


@functools.lru_cache(maxsize=32)
def block_causal_mask(patch_nums: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 (L, L): 0 where the row's token sees the column's (a scale not finer than its own), else -inf.

    Made when first used rather than kept as a buffer, so that models can be built on the meta device.
    """
    with torch.inference_mode(False):
        level_L = level_of_tokens(patch_nums, torch.device("cpu"))
        hidden_LL = level_L[:, None] < level_L[None, :]
        return torch.zeros(hidden_LL.shape, device="cpu").masked_fill(hidden_LL, -torch.inf).to(device)
