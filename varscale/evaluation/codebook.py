"""How much of the codebook each scale uses.

Letters: B batch, K scales, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookUsage(Metric):
    """Share of codes used and perplexity, for each scale and over all.

    A scale of n tokens can use min(n, V) codes at most, so its usage is counted against that number.
    """

    full_state_update = False
    counts_KV: Tensor

    def __init__(self, scales: int, vocab_size: int) -> None:
        super().__init__()
        self.add_state("counts_KV", torch.zeros(scales, vocab_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens: Sequence[Tensor]) -> None:
        """Count the tokens (B, p²) of each of the K scales."""
        self.counts_KV += count_codes(tokens, self.counts_KV.shape[1])

    def compute(self) -> dict[str, float]:
        """`codebook_usage` (a share) and `codebook_perplexity`, over all scales and as `…_scale_<k>`, k from 1."""
        figures = {}
        rows = {"": self.counts_KV.sum(0), **{f"_scale_{k}": row for k, row in enumerate(self.counts_KV, start=1)}}
        for suffix, counts_V in rows.items():
            total = int(counts_V.sum())
            share_V = counts_V.double() / max(total, 1)
            figures[f"codebook_usage{suffix}"] = float((counts_V > 0).sum()) / max(min(total, len(counts_V)), 1)
            figures[f"codebook_perplexity{suffix}"] = float(torch.special.entr(share_V).sum().exp())
        return figures


def count_codes(tokens: Sequence[Tensor], vocab_size: int) -> Tensor:
    """How often each scale uses each code, int64 (K, V)."""
    return torch.stack([torch.bincount(scale.flatten(), minlength=vocab_size) for scale in tokens])
