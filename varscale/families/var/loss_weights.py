"""How much the tokens of each scale count in VAR's training loss. No torch.

The reference's loss is the mean over all tokens, so the finest scale, which has most of them, decides most of it.

Letters: K scales, p side of a scale's token map.
"""

import math
import reprlib
import statistics
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from varscale.config.section import Section

Named = Literal["uniform", "infinity", "nextflow", "hmar"]
LARGEST, MOST_SCALES = 1e6, 64
"""A weight at most, as their ratios count; and how many of them."""
Weight = Annotated[float, Field(ge=0, le=LARGEST)]
LossWeights = Named | Annotated[tuple[Weight, ...], Field(max_length=MOST_SCALES)]
EXPONENTS = {"uniform": 0.0, "infinity": 0.5, "nextflow": 0.9}
"""α of weights (p²)^-α: `reweight_loss_by_scale` of FoundationVision/Infinity (arXiv 2412.04431), and NextFlow
(arXiv 2601.02204, equation 2, with section 3.2.3's α)."""


class LossWeighting(Section):
    """What an experiment states of the training loss, and the model's description keeps."""

    # left out of what is written down where it is `uniform`: fingerprints from before there was a choice stay valid
    loss_weights: Annotated[LossWeights, Field(exclude_if=lambda weights: weights == "uniform")] = "uniform"
    """How much a token of each scale counts in the training loss: alike (`uniform`, the paper's), as in `infinity`,
    `nextflow` or `hmar`, or a number for each scale. Only ratios matter; validation losses are never weighted."""

    @field_validator("loss_weights", mode="before")
    @classmethod
    def _name_or_numbers(cls, weights: Any) -> Any:
        # here, since of a union pydantic would report what is wrong with each of its kinds
        if isinstance(weights, str) and weights in get_args(Named):
            return weights
        if not isinstance(weights, list | tuple) or len(weights) > MOST_SCALES:
            raise ValueError(f"expected {', '.join(get_args(Named))} or a list of numbers, got {reprlib.repr(weights)}")
        if not all(type(weight) in (int, float) and 0 <= weight <= LARGEST for weight in weights) or not any(weights):
            raise ValueError(
                f"numbers must be from 0 to {LARGEST:g}, and one of them above 0, got {reprlib.repr(weights)}"
            )
        return tuple(weights)


def token_weights(patch_nums: Sequence[int], weights: LossWeights) -> tuple[float, ...]:
    """What the loss of a token of each scale is multiplied by; its mean over the tokens of an image is 1.

    Args:
        patch_nums: Side of each scale's token map.
        weights: `infinity` and `nextflow` are (p²)^-α. `hmar` divides a weight of the whole scale among its tokens, the
            normal density of what NVlabs/HMAR calls `lognorm` (Kumbong et al. 2025, arXiv 2506.04421): sides in the
            opposite order, as deviations from their mean.

    Raises:
        ValueError: There are more or fewer numbers than scales.
    """
    if weights == "hmar":
        relative = _hmar(patch_nums)
    elif isinstance(weights, str):
        relative = [side ** (-2 * EXPONENTS[weights]) for side in patch_nums]
    else:
        relative = list(weights)
    if len(relative) != len(patch_nums):
        raise ValueError(f"{len(relative)} numbers, but there are {len(patch_nums)} scales, {list(patch_nums)}")
    tokens = [side**2 for side in patch_nums]
    mean = math.fsum(weight * count for weight, count in zip(relative, tokens, strict=True)) / sum(tokens)
    return tuple(weight / mean for weight in relative)


def _hmar(patch_nums: Sequence[int]) -> list[float]:
    if len(patch_nums) == 1:
        return [1.0]
    mean, deviation = statistics.fmean(patch_nums), statistics.stdev(patch_nums)
    density = [math.exp(-(((side - mean) / deviation) ** 2) / 2) for side in reversed(patch_nums)]
    return [weight / side**2 for weight, side in zip(density, patch_nums, strict=True)]
