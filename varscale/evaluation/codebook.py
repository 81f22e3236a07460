"""How much of the codebook each scale uses, and of bitwise tokens how evenly each bit is set.

Letters: B batch, K scales, V vocabulary, d bits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from varscale.numerics.bits import bit_entropy, bits_of


class CodebookUsage(Metric):
    """Share of codes used and perplexity, for each scale and over all; of bitwise tokens also the entropy of a bit.

    A scale of n tokens can use min(n, V) codes at most, so its usage is counted against that number.
    """

    full_state_update = False
    counts_KV: Tensor

    def __init__(self, scales: int, vocab_size: int, *, bits: int = 0) -> None:
        """Expect tokens of so many bits; 0: of a codebook."""
        super().__init__()
        self.bits = bits
        self.add_state("counts_KV", torch.zeros(scales, vocab_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens: Sequence[Tensor]) -> None:
        """Count the tokens (B, p²) of each of the K scales."""
        self.counts_KV += count_codes(tokens, self.counts_KV.shape[1])

    def compute(self) -> dict[str, float]:
        """`codebook_usage` (a share) and `codebook_perplexity`, over all scales and as `…_scale_<k>`, k from 1.

        `bit_entropy` is that of a bit alone, in bits, the mean over the d bits: 0 where each is always the same.
        """
        figures = {}
        rows = {"": self.counts_KV.sum(0), **{f"_scale_{k}": row for k, row in enumerate(self.counts_KV, start=1)}}
        for suffix, counts_V in rows.items():
            total = int(counts_V.sum())
            share_V = counts_V.double() / max(total, 1)
            figures[f"codebook_usage{suffix}"] = float((counts_V > 0).sum()) / max(min(total, len(counts_V)), 1)
            figures[f"codebook_perplexity{suffix}"] = float(torch.special.entr(share_V).sum().exp())
            if self.bits:
                bits_Vd = bits_of(torch.arange(len(share_V), device=share_V.device), self.bits)
                figures[f"bit_entropy{suffix}"] = float(bit_entropy(share_V @ bits_Vd.double()).mean()) / math.log(2)
        return figures


def count_codes(tokens: Sequence[Tensor], vocab_size: int) -> Tensor:
    """How often each scale uses each code, int64 (K, V)."""
    return torch.stack([torch.bincount(scale.flatten(), minlength=vocab_size) for scale in tokens])
