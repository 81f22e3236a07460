"""What the models of all families share: their base class, samples, the choice of tokens, and evaluation mode.

Letters in tensor names: B batch, M tokens, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from varscale.families.base import ModelDescription


class FamilyModel(nn.Module):
    """A model of any family; it is built from `config` alone."""

    config: ModelDescription


class Sample(NamedTuple):
    """Sampled images.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1].
        tokens: K int64 tensors (B, p²), coarse to fine.
    """

    images: Tensor
    tokens: list[Tensor]


def draw(logits_BMV: Tensor, uniform_BM: Tensor, *, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Draw tokens (B, M) by inverting the distribution function at uniform numbers in [0, 1).

    Args:
        logits_BMV: Logits.
        uniform_BM: float32.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Of these, leave out the least likely as long as what is left out has together a probability of at most
            1 - p; the likeliest always stays. 0 keeps all.
    """
    order_BMV = None
    if 0 < top_k < logits_BMV.shape[-1]:
        logits_BMV, order_BMV = logits_BMV.topk(top_k, dim=-1)
    elif top_p:
        logits_BMV, order_BMV = logits_BMV.sort(dim=-1, descending=True)
    probability_BMV = logits_BMV.softmax(dim=-1)
    distribution_BMV = probability_BMV.cumsum(dim=-1)
    last_BM1 = torch.full_like(uniform_BM, logits_BMV.shape[-1] - 1, dtype=torch.int64).unsqueeze(-1)
    if top_p:  # the likeliest come first; the last one kept has less than p before it
        before_BMV = distribution_BMV - probability_BMV
        last_BM1 = ((before_BMV < top_p).sum(dim=-1, keepdim=True) - 1).clamp_min(0)
    threshold_BM1 = uniform_BM.unsqueeze(-1) * distribution_BMV.gather(-1, last_BM1)
    # rounding may lift the threshold to the whole sum
    place_BM1 = torch.searchsorted(distribution_BMV, threshold_BM1, right=True).minimum(last_BM1)
    return (place_BM1 if order_BMV is None else order_BMV.gather(-1, place_BM1)).squeeze(-1)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards each part of the models is in the mode it was in."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
