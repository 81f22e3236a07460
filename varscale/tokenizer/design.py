"""What a tokenizer is chosen by: schedules of scales, codebooks and networks for a size of images. Pure; no torch.

The schedule is VAR's (Tian et al. 2024, appendix), made a rule: geometric from one token to the latent's side, where
what is left of the way is divided anew at each scale, since sides are whole numbers and must grow.
"""

import math
from collections.abc import Iterator
from typing import Any

from varscale.config.text import yaml_line
from varscale.config.tokenizer import TokenizerArchitecture
from varscale.errors import ExperimentError

FACTORS = (4, 8, 16)
"""How many times smaller than the images latents may be: 4 in our studies of small images, 16 in the paper."""
PAPER_SCALES = 10
"""Scales of the paper's models at 256 and at 512 pixels."""
PAPER_IMAGE = 128
"""Side, pixels, from which on the paper's network is proposed; below that of `experiments/cifar10.yaml`."""
VECTORS_A_CODE = 39
"""Vectors that k-means needs for each centre so that it is more than one of them (FAISS warns below this number)."""
SMALL_CODES, PAPER_CODES = 512, 4096
"""Codes at most: of `experiments/cifar10.yaml`, and of the paper."""


def scale_sides(latent: int, scales: int | None = None) -> tuple[int, ...]:
    """Sides of the token maps of all scales, from 1 to the latent's side.

    16 in 10 scales gives the paper's 1, 2, 3, 4, 5, 6, 8, 10, 13, 16; 8 in 6 those of `experiments/cifar10.yaml`.

    Args:
        latent: Side of the latent map, 1 or more.
        scales: How many; None: two for each doubling, and from 16 on the paper's ten.

    Raises:
        ExperimentError: There aren't as many different sides.
    """
    count = usual_scales(latent) if scales is None else scales
    if not min(2, latent) <= count <= latent:
        raise ExperimentError(f"{count} scales: from 1 to {latent} there are {min(2, latent)} to {latent} that grow")
    sides = [1]
    while (left := count - len(sides)) > 0:
        ratio = (latent / sides[-1]) ** (1 / left)
        sides.append(max(sides[-1] + 1, round(sides[-1] * ratio)))
    return tuple(sides)


def usual_scales(latent: int) -> int:
    """Scales for a latent of that side."""
    return PAPER_SCALES if latent >= 16 else min(latent, max(2, round(2 * math.log2(latent)))) if latent > 1 else 1


def usual_factor(image_size: int) -> int:
    """How many times smaller than images of that side latents are: the least that leaves 8 × 8 or fewer, or the most.

    Raises:
        ExperimentError: The side is not a multiple of 4, or below 8 pixels.
    """
    possible = [factor for factor in FACTORS if image_size % factor == 0 and image_size >= 2 * factor]
    if not possible:
        raise ExperimentError(f"image size {image_size}: expected a multiple of {FACTORS[0]} from {2 * FACTORS[0]} up")
    return next((factor for factor in possible if image_size // factor <= 8), possible[-1])


def fillable_codes(images: int | None, tokens: int, image_size: int) -> int:
    """Codes of a codebook, a power of two: no more than so many training images fill with `VECTORS_A_CODE` each.

    Args:
        images: Training images; None: as many as are needed.
        tokens: Of an image.
        image_size: Side, pixels; larger images have more to say.
    """
    most = PAPER_CODES if image_size >= PAPER_IMAGE else SMALL_CODES
    filled = most if images is None else min(most, images * tokens // VECTORS_A_CODE)
    return int(2 ** max(1, math.floor(math.log2(max(2, filled)))))


def architecture(
    image_size: int, *, factor: int | None = None, scales: int | None = None, images: int | None = None, base: int = 16
) -> TokenizerArchitecture:
    """A tokenizer for images of that side, whose latents are `factor` times smaller.

    So many training images fill its codebook, or as many as are needed. `base` are the channels of the highest
    resolution below `PAPER_IMAGE` pixels; above they are the paper's. What is None is as usual.

    Raises:
        ExperimentError: The side is not a multiple of the factor, or there aren't so many scales.
    """
    factor = usual_factor(image_size) if factor is None else factor
    if image_size % factor:
        raise ExperimentError(f"image size {image_size}: expected a multiple of {factor}")
    sides = scale_sides(image_size // factor, scales)
    codes = fillable_codes(images, sum(side * side for side in sides), image_size)
    network = _PAPER_NETWORK if image_size >= PAPER_IMAGE else {**_SMALL_NETWORK, "base_channels": base}
    return TokenizerArchitecture(
        patch_nums=sides, vocab_size=codes, channel_multipliers=_MULTIPLIERS[factor], **network
    )


def schedules(image_size: int, images: int | None = None) -> Iterator[TokenizerArchitecture]:
    """Tokenizers that differ in how many times smaller latents are, and in how many scales lead to them."""
    for factor in FACTORS:
        if image_size % factor == 0 and 4 <= (latent := image_size // factor) <= 64:
            doubled = round(2 * math.log2(latent))
            counts = {_fewest_scales(latent), doubled, usual_scales(latent), PAPER_SCALES + 2}
            for scales in sorted(count for count in counts if count <= latent):
                yield architecture(image_size, factor=factor, scales=scales, images=images)


def nearest_in_tokens(image_size: int, tokens: int, images: int | None = None) -> TokenizerArchitecture:
    """The tokenizer whose tokens an image are nearest to so many; of equals the one with smaller latents.

    Raises:
        ExperimentError: The side is not a multiple of 4, or below 8 pixels.
    """
    usual_factor(image_size)
    found = [
        architecture(image_size, factor=factor, scales=scales, images=images)
        for factor in reversed(FACTORS)
        if image_size % factor == 0 and image_size >= 2 * factor
        for scales in range(_fewest_scales(image_size // factor), min(image_size // factor, 2 * PAPER_SCALES) + 1)
    ]
    return min(found, key=lambda each: abs(math.log(each.tokens_per_image / tokens)))


def variations(proposed: TokenizerArchitecture) -> Iterator[tuple[str, TokenizerArchitecture]]:
    """What else could be chosen with the same scales: in words, and the tokenizer."""
    codes, scales, base = proposed.vocab_size, len(proposed.patch_nums), proposed.base_channels
    changes: list[tuple[str, dict[str, Any]]] = [
        (f"{codes // 4:,} codes", {"vocab_size": codes // 4}),
        (f"{codes * 4:,} codes", {"vocab_size": codes * 4}),
        ("one φ for all scales", {"phi_count": 1}),
        ("a φ for each scale", {"phi_count": scales}),
        (f"{base // 2} base channels", {"base_channels": base // 2, "norm_groups": min(proposed.norm_groups, 16)}),
        (f"{base * 2} base channels", {"base_channels": base * 2}),
    ]
    for words, change in changes:
        if proposed.model_copy(update=change) != proposed and change.get("vocab_size", codes) >= 2:
            yield words, proposed.model_copy(update=change)


def section_lines(made: TokenizerArchitecture, images: int | None) -> list[str]:
    """The section `tokenizer` of an experiment, without its training: each choice with its reason."""
    tokens = made.tokens_per_image
    codes = f"at most: {VECTORS_A_CODE} vectors for each code take {_images_for(made):,} training images or more"
    if images is not None:
        most = images * tokens // VECTORS_A_CODE
        codes = f"{images:,} training images of {tokens} tokens fill at most {most:,} codes ({VECTORS_A_CODE} each)"
    size = f"{made.image_size} px to latents of {made.latent_size} × {made.latent_size}"
    small = made.image_size < PAPER_IMAGE
    network = "the paper's" if not small else "half of those of cifar10.yaml, to save time"
    if small and made.base_channels >= 16:
        network = "those of cifar10.yaml"
    return [
        "tokenizer:",
        yaml_line("patch_nums", list(made.patch_nums), f"{tokens} tokens an image (docs/tokenizers.md)"),
        yaml_line("vocab_size", made.vocab_size, codes),
        yaml_line("latent_channels", made.latent_channels),
        yaml_line("base_channels", made.base_channels, network),
        yaml_line("channel_multipliers", list(made.channel_multipliers), size),
        yaml_line("residual_blocks", made.residual_blocks),
        yaml_line("attention", made.attention),
        yaml_line("norm_groups", made.norm_groups, "of rings a tenth less time than 4 on processors" if small else ""),
        yaml_line("phi_count", made.phi_count, f"φ convolutions, shared among {len(made.patch_nums)} scales"),
    ]


def _fewest_scales(latent: int) -> int:
    """Of which none is more than about twice the one before."""
    return 1 + math.ceil(math.log2(latent))


def _images_for(made: TokenizerArchitecture) -> int:
    """Training images that fill a codebook."""
    return -(-made.vocab_size * VECTORS_A_CODE // made.tokens_per_image)


_MULTIPLIERS = {4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4)}
_SMALL_NETWORK: dict[str, Any] = {
    "latent_channels": 16,
    "residual_blocks": 1,
    "attention": False,
    "norm_groups": 1,
}
_PAPER_NETWORK: dict[str, Any] = {
    "latent_channels": 32,
    "base_channels": 160,
    "residual_blocks": 2,
    "attention": True,
    "norm_groups": 32,
}
