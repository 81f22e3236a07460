"""Where the scales lie in an image's sequence of tokens and in the image, and who sees whom.

Letters in tensor names: B batch, K scales, L all tokens of an image, M some of them, H heads, d channels of a head, r
channels of a pair of which one is rotated with the other, J joint channels of queries, keys and values (3·H·d).
"""

import functools
import itertools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)
def scale_bounds(patch_nums: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Where each scale's tokens begin and end in the sequence."""
    ends = tuple(itertools.accumulate(side**2 for side in patch_nums))
    return tuple(zip((0, *ends), ends, strict=False))


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


ROTARY_BASE = 10_000.0
"""As in LlamaGen: frequencies fall from 1 to about one over this."""


@functools.lru_cache(maxsize=32)
def rotary_angles(patch_nums: tuple[int, ...], head_channels: int, device: torch.device) -> Tensor:
    """Cosines and sines (2, L, r) of the angles by which a head's pairs of channels are turned at each token's place.

    Half of the pairs by the row and half by the column (Su et al. 2021 in two dimensions, as LlamaGen has them). The
    places of all scales are measured on the finest map, from the middle of a token to that of the next.
    """
    with torch.inference_mode(False):
        frequencies = ROTARY_BASE ** -(torch.arange(head_channels // 4, device="cpu") / (head_channels // 4))
        places = []
        for side in patch_nums:
            middles = (torch.arange(side, device="cpu") + 0.5) * (patch_nums[-1] / side)
            places.append(torch.cartesian_prod(middles, middles))
        angles_Lr = (torch.cat(places).unsqueeze(2) * frequencies).flatten(1)
        return torch.stack((angles_Lr.cos(), angles_Lr.sin())).to(device)


def rotated(joint_BMJ: Tensor, heads: int, angles_2Mr: Tensor) -> Tensor:
    """The same with queries and keys turned; channels of a head beyond the pairs, fewer than four, stay as they are."""
    joint_BM3Hd = joint_BMJ.unflatten(2, (3, heads, -1))
    pairs = angles_2Mr.shape[2]
    cosine_M11r, sine_M11r = angles_2Mr[:, :, None, None]
    turned, values = joint_BM3Hd.split((2, 1), dim=2)
    first, second, rest = turned.split((pairs, pairs, turned.shape[-1] - 2 * pairs), dim=-1)
    turned = torch.cat(
        (first * cosine_M11r - second * sine_M11r, first * sine_M11r + second * cosine_M11r, rest), dim=-1
    )
    return torch.cat((turned.to(values.dtype), values), dim=2).flatten(2)
