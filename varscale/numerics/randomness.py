"""Stateless random numbers: pure functions of (seed, stream, step, sample), so there is no state to save or to split.

Resuming, branching and spreading over processes then change nothing. The hash is the finaliser of splitmix64 (Steele,
Lea and Flood 2014) applied to one key after another; in int64 arithmetic it gives the same bits on every device.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio."""
HALF_GOLDEN = (5**0.5 - 1) / 4
FACTOR_1 = 0xBF58476D1CE4E5B9
FACTOR_2 = 0x94D049BB133111EB
MASK_64 = 2**64 - 1


def uniform(seed: int, stream: str, step: int, sample_index_B: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), the same for the same arguments whatever else is in the batch, on any device.

    Args:
        seed: Of the run.
        stream: What the numbers are for, such as "label-dropout"; streams are independent.
        step: The training step, or any other counter.
        sample_index_B: int64, each sample's number among all samples of that step, over all processes.
        draws: How many numbers a sample needs.

    Returns:
        float32 (B, draws), multiples of 2^-24.
    """
    hash_Bn = _hash(seed, stream, step, sample_index_B, draws)
    return ((hash_Bn >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def normal(seed: int, stream: str, step: int, sample_index_B: Tensor, draws: int) -> Tensor:
    """Standard normal numbers, float32 (B, draws), as `uniform` draws its own: its numbers, inverted.

    None is beyond ±5.42. Devices may round them otherwise.
    """
    middle_Bn = uniform(seed, stream, step, sample_index_B, draws) - 0.5 + 2.0**-25  # exact, and never ±½
    return torch.erfinv(2 * middle_Bn) * math.sqrt(2)


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise, of the shape of `uniform`'s numbers, from which it is made: from -2.85 to 16.6."""
    # the largest number, 1 - 2^-24, plus 2^-25 is rounded to 1
    return (uniform + 2.0**-25).clamp_max(1 - 2.0**-24).log().neg().log().neg()


def evenly_spread(sample_index_B: Tensor, start: float = HALF_GOLDEN) -> Tensor:
    """Numbers in [0, 1), float64 (B,), that samples which follow each other cover evenly, however many they are.

    Multiples of the golden ratio, modulo 1: what is averaged over them has less noise than with numbers that are drawn
    apart (as in Kingma et al. 2021, appendix I.1). The same on any device.

    Args:
        sample_index_B: int64, each sample's number.
        start: The number of sample 0; by default in the middle of a step.
    """
    return ((sample_index_B.long() * (GOLDEN >> 32) + int(start * 2**32)) & (2**32 - 1)).double() / 2**32


def permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """A random order of 0 … size - 1, a pure function of its arguments."""
    keys = _hash(seed, "permutation", epoch, torch.arange(size), 1)[:, 0]
    return cast(npt.NDArray[np.int64], torch.argsort(keys, stable=True).numpy())


epoch_order = functools.lru_cache(maxsize=2)(permutation)
"""`permutation`, kept for the steps of an epoch."""
Order = Callable[[int, int, int], npt.NDArray[np.int64]]
"""(seed, epoch, size) → a random order of 0 … size - 1."""


def sample_indices(
    seed: int, step: int, batch_size: int, dataset_size: int, order: Order = epoch_order
) -> npt.NDArray[np.int64]:
    """Which items of a data set a global step takes: epochs in ever new order, without replacement within each.

    Args:
        seed: Of the run.
        step: From 0.
        batch_size: Items a step takes, over all processes.
        dataset_size: Items there are. A batch may run over the end of an epoch into the next.
        order: Of an epoch; called for each step.

    Raises:
        ValueError: If a size is not positive or the step is negative.
    """
    if batch_size < 1 or dataset_size < 1 or step < 0:
        raise ValueError(
            f"batch_size {batch_size} and dataset_size {dataset_size} must be at least 1, and step {step} at least 0"
        )
    position = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epoch, place = np.divmod(position, dataset_size)
    indices = np.empty(batch_size, dtype=np.int64)
    for number in range(int(epoch[0]), int(epoch[-1]) + 1):
        taken = epoch == number
        indices[taken] = order(seed, number, dataset_size)[place[taken]]
    return indices


def _hash(seed: int, stream: str, step: int, sample_index_B: Tensor, draws: int) -> Tensor:
    """64 random bits as int64 (B, draws)."""
    key = 0
    for part in (seed, zlib.crc32(stream.encode()), step):
        key = _mix_integer(key ^ (part & MASK_64))
    key_B = _mix(sample_index_B.to(torch.int64) ^ _signed(key))
    return _mix(key_B[:, None] ^ torch.arange(draws, device=key_B.device))


def _mix_integer(value: int) -> int:
    value = (value + GOLDEN) & MASK_64
    value = ((value ^ (value >> 30)) * FACTOR_1) & MASK_64
    value = ((value ^ (value >> 27)) * FACTOR_2) & MASK_64
    return value ^ (value >> 31)


def _mix(value: Tensor) -> Tensor:
    # int64 wraps around as uint64 does; only the shift to the right must not copy the sign
    value = value + _signed(GOLDEN)
    value = (value ^ _shifted(value, 30)) * _signed(FACTOR_1)
    value = (value ^ _shifted(value, 27)) * _signed(FACTOR_2)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
