"""Zero-shot editing: parts of an image are drawn anew, scale after scale, around the tokens of the rest.

Tian et al. 2024, "Visual Autoregressive Modeling", section 5 (in-painting, out-painting, class-conditional editing):
outside the mask all tokens are the source image's, at every scale, and what the model draws inside goes on from them.
No training is needed.

Letters in tensor names: B images, K scales, H and W height and width, M tokens of a scale, S side in pixels, p side of
a scale's token map.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from varscale.families.base import SamplingOptions
from varscale.families.models import FamilyModel, GivenTokens, evaluating, pictures
from varscale.families.var.sampling import sample_scales
from varscale.families.var.transformer import VAR
from varscale.generation.sampling import check_sampling
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class Edited(NamedTuple):
    """Edited images.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1].
        tokens: K int64 tensors (B, p²), coarse to fine.
        source_tokens: Those of the source images, (B, p²) or (1, p²).
        reconstructions: What the source's tokens stand for, as `images`.
    """

    images: Tensor
    tokens: list[Tensor]
    source_tokens: list[Tensor]
    reconstructions: Tensor


class DistanceBand(NamedTuple):
    """How alike images are at a distance from the mask.

    Attributes:
        nearest: Smallest distance, pixels; 0: within the mask.
        farthest: Largest distance.
        pixels: How many pixels of an image lie there.
        psnr: In dB, of each of the pairs that were compared; infinite where they are equal.
    """

    nearest: int
    farthest: int
    pixels: int
    psnr: tuple[float, ...]


def edit(
    model: FamilyModel,
    tokenizer: MultiScaleTokenizer,
    images: Tensor,
    mask: Tensor,
    labels: Tensor,
    options: SamplingOptions,
    *,
    source_scales: int = 0,
    sample_indices: Tensor | None = None,
) -> Edited:
    """Draw what is masked anew: with a class it becomes that, with num_classes ("no class") it is in- or out-painted.

    A model that is told captions takes a caption in place of the class.

    With everything masked it is plain sampling: the same tokens from the same seed. With nothing masked it is the
    source's reconstruction. An image depends on its source, label, seed and index, not on its batch (to rounding).

    Args:
        model: A `VAR`.
        tokenizer: The tokenizer whose tokens it was trained on.
        images: The sources, (B, 3, H, W) in [-1, 1], or one for all labels.
        mask: bool (H, W): what is drawn anew.
        labels: int64 (B,), each 0 … num_classes; or embeddings of captions (B, D), zeros for none.
        options: How tokens are drawn.
        source_scales: How many of the first scales are the source's everywhere; 1 is the reference's choice.
        sample_indices: int64 (B,), each image's number for the noise; 0 … B - 1 unless given.

    Raises:
        ValueError: An argument is out of range, or doesn't fit the model.
    """
    if not isinstance(model, VAR):
        raise ValueError(f"models of family {model.config.family} can't edit images")
    check_sampling(model.config, tokenizer, labels, options)
    if len(images) not in (1, len(labels)):
        raise ValueError(f"{len(images)} images, but {len(labels)} labels")
    if tuple(mask.shape) != (tokenizer.image_size,) * 2:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, but the images have {tokenizer.image_size} pixels a side"
        )
    indices_B = torch.arange(len(labels)) if sample_indices is None else sample_indices
    with evaluating(tokenizer):
        source = tokenizer.encode(images)
        reconstructions = pictures(tokenizer, tokenizer.quantizer.decode_features(source))
    kept = [kept_M.unsqueeze(0).to(labels.device) for kept_M in kept_tokens(mask, tokenizer.patch_nums, source_scales)]
    given = GivenTokens(source, kept)
    drawn = sample_scales(model, tokenizer, labels, options, indices_B.to(labels.device), given)
    return Edited(drawn.images, drawn.tokens, source, reconstructions)


def kept_tokens(mask: Tensor, patch_nums: Sequence[int], source_scales: int = 0) -> list[Tensor]:
    """Which tokens stay the source's: those of whose area less than half is masked, and all of the first scales.

    Args:
        mask: bool (S, S): what is drawn anew.
        patch_nums: Side of each scale's token map.
        source_scales: How many of the first scales stay.

    Returns:
        K bool tensors (p²,).
    """
    kept = []
    for scale, side in enumerate(patch_nums):
        overlap_pS = _overlap(side, len(mask))
        masked_pp = overlap_pS @ mask.double().cpu() @ overlap_pS.T  # whole numbers, of S² a token: exact
        kept.append((2 * masked_pp < len(mask) ** 2).flatten() | (scale < source_scales))
    return kept


def psnr_by_distance(pairs: Sequence[tuple[Tensor, Tensor]], mask: Tensor, step: int) -> list[DistanceBand]:
    """How alike pairs of images (B, 3, H, W) in [0, 1] are: in the mask, up to `step` pixels from it, to twice that, …

    Distance is the larger one of across and down.
    """
    bands, reached_HW, nearest, farthest = [], torch.zeros_like(mask).cpu(), 0, 0
    while not reached_HW.all():
        grown_HW = _grown(mask.cpu(), farthest)
        band_HW = grown_HW & ~reached_HW
        if band_HW.any():
            psnr = tuple(_psnr(first, second, band_HW) for first, second in pairs)
            bands.append(DistanceBand(nearest, farthest, int(band_HW.sum()), psnr))
        reached_HW, nearest, farthest = grown_HW, farthest + 1, max(step, 2 * farthest)
    return bands


def _overlap(cells: int, pixels: int) -> Tensor:
    """How much of each pixel lies in each of the cells of a line, in 1/cells of a pixel: float64 (cells, pixels)."""
    cell_p1, pixel_S = torch.arange(cells).unsqueeze(1) * pixels, torch.arange(pixels) * cells
    ends_pS, starts_pS = torch.minimum(cell_p1 + pixels, pixel_S + cells), torch.maximum(cell_p1, pixel_S)
    return (ends_pS - starts_pS).clamp_min(0).double()


def _grown(mask_HW: Tensor, pixels: int) -> Tensor:
    if not mask_HW.any():
        return torch.ones_like(mask_HW)  # everywhere is equally far from nothing
    down_1HW = F.max_pool2d(mask_HW[None].float(), (2 * pixels + 1, 1), stride=1, padding=(pixels, 0))
    return F.max_pool2d(down_1HW, (1, 2 * pixels + 1), stride=1, padding=(0, pixels))[0].bool()


def _psnr(first_B3HW: Tensor, second_B3HW: Tensor, place_HW: Tensor) -> float:
    difference = (first_B3HW.double() - second_B3HW.double()).cpu()[..., place_HW]
    return float(-10 * difference.square().mean().log10())
