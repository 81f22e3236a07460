"""The multi-scale tokenizer and its training."""

from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from varscale.config.section import (
    BatchSize,
    BatchSizeOrZero,
    Channels,
    Codes,
    Decay,
    Few,
    Fraction,
    Images,
    ImagesOrZero,
    NonNegative,
    PathText,
    Positive,
    Quantizer,
    Real,
    Section,
    Seed,
    Side,
    Steps,
    Truth,
    Whole,
)

MOST_BITS = 16
"""Of a bitwise token: they fit the two bytes of a stored token, and counts of all tokens into memory."""
ENTROPY_WEIGHT = 0.01
"""Of bitwise tokenizers, unless an experiment says otherwise; docs/families.md compares it with 0.1."""
SHARD_IMAGES = 8192
"""Images of a shard of a token store."""
SMALLEST_ADVERSARIAL_IMAGE = 24
"""Side, pixels, below which nothing is left for the last of the PatchGAN discriminator's convolutions."""


class TokenizerTraining(Section):
    """How the multi-scale VQ-VAE is trained."""

    images: Images = 64_000
    """Length of the training, images seen."""
    batch_size: BatchSize = 64
    """Images a step, over all devices."""
    micro_batch: BatchSizeOrZero = 0
    """Images that pass at once: a step of more goes in parts, whose gradients are added up. 0: all of a step."""
    lr: Positive = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: NonNegative = 0.05
    """AdamW's weight decay (none on biases, norms, other 1-d parameters and the codebook)."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    warmup_images: ImagesOrZero = 3_200
    """Linear warm-up, images."""
    final_lr_ratio: Fraction = 0.01
    """The rate falls to this share of the peak along a cosine."""
    ema_decay: Decay | None = None
    """Decay a step of the averaged weights that are used for tokens, decoding and metrics. None: 1 - 25 / steps, but at
    most 0.9999, so that in a training of any length they have forgotten how it began."""
    l1_weight: NonNegative = 0.2
    """Weight of the mean absolute error of pixels in [-1, 1]."""
    l2_weight: NonNegative = 1.0
    """Weight of the mean squared error."""
    perceptual_weight: NonNegative = 0.0
    """Weight of LPIPS; needs `perceptual_weights_path`."""
    perceptual_weights_path: PathText | None = None
    """File of torchvision's VGG-16 weights, the backbone of LPIPS."""
    adversarial_weight: NonNegative = 0.0
    """Weight of the hinge PatchGAN term, scaled adaptively as in VQGAN (eq. 7)."""
    adversarial_start: Fraction = 0.3
    """Share of the training after which the adversarial term sets in."""
    discriminator_channels: Channels = 64
    """Base channels of the PatchGAN discriminator."""
    quantize_after: Annotated[Real, Field(ge=0, le=0.8)] = 0.2
    """Share of the training in which images pass unquantized (with a small penalty on the features' squares), before
    codes are initialised from the features. With 0 short trainings take several times as long, or collapse."""
    restart_every_steps: Steps = 50
    """Steps between restarts of dead codes; none in the last fifth of training, or with the quantizer `bitwise`."""
    restart_usage: Fraction = 0.1
    """A code is dead when used less often than this share of its fair share since the last restart."""
    seed: Seed = 0
    """Seed of initialisation and data order."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_images > self.images:
            raise ValueError(f"warmup_images: {self.warmup_images}, but the training has {self.images} images")
        return self

    @property
    def steps(self) -> int:
        """Steps of whole batches."""
        return max(1, round(self.images / self.batch_size))

    @property
    def total_images(self) -> int:
        """Images of all steps."""
        return self.steps * self.batch_size

    @property
    def averaging_decay(self) -> float:
        """Decay a step of the averaged weights."""
        return self.ema_decay if self.ema_decay is not None else min(max(0.0, 1 - 25 / self.steps), 0.9999)

    def check_image_size(self, side: int) -> None:
        """Raise a ValueError where images of so many pixels a side are too small for the discriminator."""
        if self.adversarial_weight > 0 and side < SMALLEST_ADVERSARIAL_IMAGE:
            raise ValueError(
                f"adversarial_weight: {self.adversarial_weight:g}, but the discriminator needs images of at least "
                f"{SMALLEST_ADVERSARIAL_IMAGE} px, not {side}: set it to 0"
            )


class TokenizerArchitecture(Section):
    """What a multi-scale VQ-VAE (VAR, section 3.2) is made of, without its weights."""

    patch_nums: Annotated[tuple[Side, ...], Field(max_length=64)]
    """Side of each scale's token map, strictly growing, ending at the latent size."""
    # these two are left out of what is written down where nothing is said of them: fingerprints of before stay valid
    quantizer: Annotated[Quantizer, Field(exclude_if=lambda quantizer: quantizer == "codebook")] = "codebook"
    """What makes tokens of vectors: the nearest of the codes that all scales share (`codebook`), or the signs of the
    channels (`bitwise`, as in Infinity, arXiv 2412.04431), so that a token is `latent_channels` bits."""
    entropy_weight: Annotated[NonNegative, Field(exclude_if=lambda weight: weight == ENTROPY_WEIGHT)] = ENTROPY_WEIGHT
    """Weight of the penalty that keeps the bits of `bitwise` decided and balanced."""
    vocab_size: Codes
    """Codes in the one codebook that all scales share; of `bitwise` 2 to the power of latent_channels."""
    latent_channels: Channels
    """Channels of the latent map and of a code; of `bitwise` the bits of a token."""
    base_channels: Channels
    """Channels of the encoder's and decoder's highest resolution."""
    channel_multipliers: Annotated[tuple[Few, ...], Field(min_length=1, max_length=14)] = (1, 1, 2, 2, 4)
    """Channels of each resolution as multiples of base_channels; n entries downsample by 2^(n-1)."""
    residual_blocks: Few = 2
    """Residual blocks a resolution (the decoder has one more)."""
    attention: Truth = True
    """Self-attention at the lowest resolution."""
    norm_groups: Channels = 32
    """Groups of the group norms; must divide the channels of every resolution."""
    phi_count: Few = 4
    """φ convolutions shared among the scales."""
    phi_ratio: Fraction = 0.5
    """Share of the convolution in φ(h) = (1 - r) h + r conv(h)."""
    commitment_weight: NonNegative = 0.25
    """β of the quantizer's loss."""

    @property
    def latent_size(self) -> int:
        """Side of the latent map, the last scale's token map."""
        return self.patch_nums[-1]

    @property
    def tokens_per_image(self) -> int:
        """L, tokens of an image over all scales."""
        return sum(side * side for side in self.patch_nums)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each resolution, fine to coarse."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """How many times smaller than the images the latent map is, along a side."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @property
    def image_size(self) -> int:
        """Side of the images, pixels."""
        return self.latent_size * self.downsampling

    @model_validator(mode="after")
    def _check_architecture(self) -> Self:
        if not self.patch_nums or any(b <= a for a, b in pairwise(self.patch_nums)):
            raise ValueError(f"patch_nums: must grow strictly, got {list(self.patch_nums)}")
        for multiplier in self.channel_multipliers:
            if (self.base_channels * multiplier) % self.norm_groups:
                raise ValueError(
                    f"norm_groups: {self.norm_groups} does not divide {self.base_channels * multiplier} channels "
                    f"(base_channels {self.base_channels} × {multiplier})"
                )
        if self.quantizer == "bitwise":
            self._check_bits()
        elif self.entropy_weight != ENTROPY_WEIGHT:
            raise ValueError("entropy_weight: only the quantizer bitwise has a use for it")
        return self

    def _check_bits(self) -> None:
        bits = self.latent_channels
        if bits > MOST_BITS:
            raise ValueError(
                f"latent_channels: {bits}, but tokens of the quantizer bitwise are stored in {MOST_BITS} bits at most"
            )
        if self.vocab_size != 2**bits:
            raise ValueError(
                f"vocab_size: {self.vocab_size}, but with the quantizer bitwise latent_channels {bits} are the bits of "
                f"a token: it is {2**bits} (2^{bits})"
            )


class TokenizerConfig(TokenizerArchitecture):
    """The multi-scale VQ-VAE and its training."""

    encode_batch_size: Annotated[Whole, Field(ge=1, le=SHARD_IMAGES)] = 256
    """Images that the finished tokenizer encodes, or decodes to be measured, at once; must divide 8192."""
    checkpoint: PathText | None = None
    """File of a finished tokenizer (ours or the reference's vae_*.pth) to use instead of training one."""
    accept: Truth = False
    """Train models on the tokenizer even where its figures speak against that."""
    training: TokenizerTraining = TokenizerTraining()
    """How it is trained."""

    @property
    def architecture(self) -> TokenizerArchitecture:
        """The part that the weights belong to."""
        return TokenizerArchitecture(**{name: getattr(self, name) for name in TokenizerArchitecture.model_fields})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if SHARD_IMAGES % self.encode_batch_size:
            raise ValueError(f"encode_batch_size: {self.encode_batch_size} does not divide {SHARD_IMAGES}")
        if self.training.perceptual_weight > 0 and self.training.perceptual_weights_path is None:
            raise ValueError("training.perceptual_weights_path: LPIPS needs the file of VGG-16's weights")
        return self
