"""Where the scales lie in an image's sequence of tokens, and who sees whom.

Letters in tensor names: K scales, L all tokens of an image.
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
