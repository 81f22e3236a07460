"""Loss and error of token prediction on a whole set of images.

Letters: B batch, K scales, L tokens of an image, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from varscale.families.base import TokenLosses


class TokenPrediction(Metric):
    """Loss of each token and error (1 - top-1 accuracy), over all scales, the last, and each.

    The loss is in nats of models with a likelihood; others predict no tokens, and have no error.

    The sums of each position are float64, so that neither the batch size nor the number of processes shows in the
    result.
    """

    full_state_update = False
    loss_L: Tensor
    errors_L: Tensor
    squares: Tensor
    images: Tensor

    def __init__(self, groups: Sequence[int], *, has_likelihood: bool = True) -> None:
        """Expect groups of so many tokens, which are reported apart: the scales."""
        super().__init__()
        self.groups, self.has_likelihood = tuple(groups), has_likelihood
        tokens = sum(self.groups)
        for name, shape in (("loss_L", (tokens,)), ("errors_L", (tokens,)), ("squares", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: TokenLosses) -> None:
        """Add a batch of images."""
        loss_BL = losses.loss_BL.double()
        self.loss_L += loss_BL.sum(0)
        if self.has_likelihood:
            self.errors_L += losses.wrong.sum(0)
        self.squares += loss_BL.mean(1).square().sum()
        self.images += len(loss_BL)

    def compute(self) -> dict[str, float]:
        """All figures; `loss_standard_error` is over images, `loss_per_image` in nats an image (of a likelihood)."""
        count = int(self.images)
        loss_L, errors_L = (self.loss_L / count).cpu(), (self.errors_L / count).cpu()
        mean = float(loss_L.mean())
        variance = max(float(self.squares) / count - mean * mean, 0.0) * count / max(count - 1, 1)
        of_likelihood = {**by_scale("error", errors_L, self.groups), "loss_per_image": float(loss_L.sum())}
        return {
            **by_scale("loss", loss_L, self.groups),
            **(of_likelihood if self.has_likelihood else {}),
            "loss_standard_error": math.sqrt(variance / count),
            "validation_images": float(count),
        }


def token_losses(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    """Cross-entropy of every token (B, L), float32 nats."""
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), tokens_BL.flatten(), reduction="none").view_as(tokens_BL)


def by_scale(name: str, values_L: Tensor, groups: Sequence[int]) -> dict[str, float]:
    """Means over all positions, the last scale, and each scale (numbered from 1), named for the runs table.

    Where all positions are one group, there is nothing to tell apart.
    """
    if len(groups) == 1:
        return {name: float(values_L.mean())}
    scales = [float(part.mean()) for part in values_L.split(list(groups))]
    return {
        name: float(values_L.mean()),
        f"{name}_last_scale": scales[-1],
        **{f"{name}_scale_{number}": value for number, value in enumerate(scales, start=1)},
    }
