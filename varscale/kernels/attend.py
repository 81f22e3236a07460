"""Attention of VAR by the fastest exact kernel of the device: ours, plain products, or PyTorch's.

What is fastest was measured, forward and backward, batch 32 (torch 2.13, milliseconds on one core):

    tokens  width  heads | fused, masked | products | a call for each scale, no mask
       130     48      6 |          15.2 |     24.2 |          16.8
       130    256      4 |          30.2 |     31.6 |          49.6
        30     48      6 |          1.85 |     0.98 |          3.07
        30    256      4 |          2.36 |     2.08 |          4.97

Letters in tensor names: B batch, H heads, L all tokens of an image, M tokens of some scales, N keys (all tokens up to
the end of these scales), d channels of a head, C width, J joint channels of queries, keys and values (3·C), X channels
of a cache's rows.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from varscale.kernels.attention import available, native_attention, native_attention_to_all

# up to here plain matrix products are faster on a CPU than its fused kernel
MOST_TOKENS_FOR_PRODUCTS = 64
# scales that end up to here share one masked call on a GPU; each finer scale has its own, without a mask
MOST_TOKENS_IN_MASKED_CALL = 160


class KeyValueCache:
    """What one block keeps of the tokens sampled so far, in memory set aside once for all of them."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.length = 0
        self.rows_BLX: Tensor | None = None

    def append(self, rows_BMX: Tensor) -> Tensor:
        """Add the next tokens' rows (keys and values, and what else the kernel wants); returns all so far."""
        batch, tokens, channels = rows_BMX.shape
        rows_BLX = self.reserve(batch, tokens, channels, rows_BMX)
        rows_BLX[:, self.length - tokens : self.length] = rows_BMX
        return rows_BLX[:, : self.length]

    def reserve(self, batch: int, tokens: int, channels: int, like: Tensor) -> Tensor:
        """Count the next tokens' rows in, which the caller then writes; returns the whole memory (B, L, X)."""
        if self.rows_BLX is None:  # only now are batch and precision known
            self.rows_BLX = like.new_empty(batch, self.tokens, channels)
        self.length += tokens
        return self.rows_BLX


def attend(
    joint_BMJ: Tensor,
    scale_H: Tensor | None,
    heads: int,
    ends: Sequence[int],
    mask_LL: Tensor | None,
    cache: KeyValueCache | None = None,
    *,
    logit_factor: float = 0.25,
) -> Tensor:
    """Self-attention in which every token sees its own scale and all coarser ones.

    Args:
        joint_BMJ: Queries, keys and values of all heads, of all tokens or of the first few scales; with a cache, of
            the next scale.
        scale_H: float32, each head's factor on the logits of queries and keys of length 1; None: they keep their
            length, and the factor is logit_factor/√d.
        heads: Number of heads H.
        ends: Where each scale ends in the sequence.
        mask_LL: 0 where the row's token sees the column's and -inf elsewhere; None with a cache, or for one scale.
        cache: Keys and values of earlier scales, all of which are seen; extended by these tokens.
        logit_factor: See `scale_H`.

    Returns:
        (B, M, C), in the precision of `joint_BMJ`.
    """
    if _fits_native(joint_BMJ, heads, normalised=scale_H is not None):
        # float32 inside, and even with bfloat16 around it faster than PyTorch's kernel with its slow backward pass
        return _by_native_kernel(joint_BMJ.float(), scale_H, heads, ends, cache, logit_factor).to(joint_BMJ.dtype)
    joint_BM3Hd = joint_BMJ.unflatten(2, (3, heads, -1))
    scaled = scaled_queries_keys(joint_BM3Hd[:, :, :2], scale_H, logit_factor)
    queries_BMHd, keys_BNHd = (x.to(joint_BMJ.dtype) for x in scaled)
    values_BNHd = joint_BM3Hd[:, :, 2]
    if cache is not None:
        rows_BNX = cache.append(torch.stack((keys_BNHd, values_BNHd), dim=2).flatten(2))
        keys_BNHd, values_BNHd = rows_BNX.unflatten(2, (2, heads, -1)).unbind(2)
    queries_BHMd, keys_BHNd, values_BHNd = (x.transpose(1, 2) for x in (queries_BMHd, keys_BNHd, values_BNHd))
    causal = len(ends) == ends[-1]  # each token is a scale of its own
    if mask_LL is None:
        out_BHMd = F.scaled_dot_product_attention(queries_BHMd, keys_BHNd, values_BHNd, scale=1.0)
    elif causal and queries_BHMd.device.type == "cuda":
        out_BHMd = F.scaled_dot_product_attention(queries_BHMd, keys_BHNd, values_BHNd, is_causal=True, scale=1.0)
    elif queries_BHMd.device.type == "cuda" and queries_BHMd.dtype != torch.float32:
        out_BHMd = sliced_attention(queries_BHMd, keys_BHNd, values_BHNd, mask_LL, query_slices(tuple(ends)))
    else:
        out_BHMd = masked_attention(queries_BHMd, keys_BHNd, values_BHNd, mask_LL)
    return out_BHMd.transpose(1, 2).flatten(2)


def masked_attention(queries_BHLd: Tensor, keys_BHLd: Tensor, values_BHLd: Tensor, mask_LL: Tensor) -> Tensor:
    """Attention with logits q·k plus the mask: by products where these are few, else by PyTorch's fused kernel."""
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
    """The same numbers as `masked_attention`, skipping the pairs that the mask hides.

    The queries of one scale see a prefix of the keys, so a finer scale needs no mask and can use a flash kernel; only
    the coarse scales, too small to fill one, share a masked call. `slices`: from `query_slices`.
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


def scaled_queries_keys(
    queries_keys_BM2Hd: Tensor, scale_H: Tensor | None, logit_factor: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, M, H, d) whose products are the logits; see `attend`."""
    if scale_H is None:
        queries_BMHd, keys_BMHd = queries_keys_BM2Hd.unbind(2)
        return queries_BMHd * (logit_factor / math.sqrt(queries_BMHd.shape[-1])), keys_BMHd
    # float32 also under autocast: a scale of up to 100 magnifies rounding of the directions
    queries_keys_BM2Hd = queries_keys_BM2Hd.float()
    factor_2H1 = torch.stack((scale_H, torch.ones_like(scale_H))).unsqueeze(2)
    inverse_BM2H1 = queries_keys_BM2Hd.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()
    queries_BMHd, keys_BMHd = (queries_keys_BM2Hd * (inverse_BM2H1 * factor_2H1)).unbind(2)
    return queries_BMHd, keys_BMHd


@functools.lru_cache(maxsize=32)
def query_slices(ends: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The slices of `sliced_attention`: first the coarse scales together, then each finer one."""
    together = max((end for end in ends if end <= MOST_TOKENS_IN_MASKED_CALL), default=ends[0])
    finer = [end for end in ends if end >= together]
    return ((0, together), *itertools.pairwise(finer))


def _fits_native(joint_BMJ: Tensor, heads: int, *, normalised: bool) -> bool:
    on_cpu = joint_BMJ.device.type == "cpu" and joint_BMJ.dtype in (torch.float32, torch.bfloat16)
    return on_cpu and available(joint_BMJ.shape[2] // (3 * heads), normalised=normalised)


def _by_native_kernel(
    joint_BMJ: Tensor,
    scale_H: Tensor | None,
    heads: int,
    ends: Sequence[int],
    cache: KeyValueCache | None,
    logit_factor: float,
) -> Tensor:
    tokens, channels = joint_BMJ.shape[1:]
    normalised = scale_H is not None
    if scale_H is None:
        scale_H = joint_BMJ.new_full((heads,), logit_factor / math.sqrt(channels // (3 * heads)))
    if cache is not None:
        return native_attention_to_all(cache.append(joint_BMJ), scale_H, queries=tokens, normalised=normalised)
    return native_attention(joint_BMJ, scale_H, [end for end in ends if end <= tokens], normalised=normalised)
