"""Bitwise tokens as numbers: bit j of a token, worth 2^j, says whether channel j of its code is positive.

Letters in tensor names: d bits, and so latent channels, of a token.
"""

import torch
from torch import Tensor


def bits_of(tokens: Tensor, count: int) -> Tensor:
    """The bits of integer tokens, bool (…, d)."""
    return (tokens.unsqueeze(-1) >> torch.arange(count, device=tokens.device)) & 1 != 0


def tokens_of(bits: Tensor) -> Tensor:
    """The tokens, int64, of bool bits (…, d)."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def bit_entropy(probability: Tensor) -> Tensor:
    """Entropy in nats of bits that are set with these probabilities; its gradient is finite at 0 and 1, too."""
    inside = probability.clamp(1e-7, 1 - 1e-7)
    return -(probability * inside.log() + (1 - probability) * (-inside).log1p())
