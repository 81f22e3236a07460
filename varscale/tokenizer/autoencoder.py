"""The multi-scale tokenizer: a VQGAN-style convolutional encoder and decoder around the multi-scale quantizer.

Esser et al. 2021 (VQGAN) for encoder and decoder, Tian et al. 2024 (VAR) for the quantizer between them.

Letters in tensor names: B batch, C channels, H and W image height and width, h and w those of the latents,
S places (h·w).
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.config.tokenizer import TokenizerArchitecture
from varscale.tokenizer.bitwise import BitwiseQuantizer
from varscale.tokenizer.quantizer import MultiScaleQuantizer

FEATURE_PENALTY = 1e-3
"""Weight of the features' mean square while they are not quantized."""


class TokenizerOutput(NamedTuple):
    """What one training pass of the tokenizer gives; the last three are the quantizer's, see `QuantizerOutput`."""

    reconstruction_B3HW: Tensor
    """Images on the scale of [-1, 1], not clamped."""
    quantizer_loss: Tensor
    tokens: list[Tensor]
    residuals: list[Tensor]


class MultiScaleTokenizer(nn.Module):
    """Images to a pyramid of tokens and back."""

    def __init__(self, architecture: TokenizerArchitecture) -> None:
        super().__init__()
        latent_channels = architecture.latent_channels
        bitwise = architecture.quantizer == "bitwise"
        self.quantizer = BitwiseQuantizer(architecture) if bitwise else MultiScaleQuantizer(architecture)
        self.encoder = Encoder(architecture)
        self.decoder = Decoder(architecture)
        self.before_quantizer = _convolution(latent_channels, latent_channels)
        self.after_quantizer = _convolution(latent_channels, latent_channels)
        self.architecture = architecture
        self.patch_nums, self.vocab_size = architecture.patch_nums, architecture.vocab_size
        self.latent_channels, self.image_size = latent_channels, architecture.image_size

    def forward(self, images_B3HW: Tensor, *, quantize: bool = True) -> TokenizerOutput:
        """Reconstruct images in [-1, 1] for training.

        Args:
            images_B3HW: Images.
            quantize: False passes the features on as they are: no tokens, and as quantizer loss a small penalty on the
                features' squares, so that codes can be initialised from features of moderate size later.
        """
        features_BChw = self.features(images_B3HW)
        if not quantize:
            # DistributedDataParallel wants a gradient, if only zero, for every parameter
            nothing = sum(0.0 * parameter.sum() for parameter in self.quantizer.parameters())
            penalty = FEATURE_PENALTY * features_BChw.square().mean()
            return TokenizerOutput(self._decoded(features_BChw), penalty + nothing, [], [])
        features_hat_BChw, loss, tokens, residuals = self.quantizer(features_BChw)
        return TokenizerOutput(self._decoded(features_hat_BChw), loss, tokens, residuals)

    def features(self, images_B3HW: Tensor) -> Tensor:
        """The features (B, c, h, w) of images in [-1, 1] that the quantizer sees.

        Raises:
            ValueError: If the images don't have the size that patch_nums and the down-sampling ask for.
        """
        if tuple(images_B3HW.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images have shape {tuple(images_B3HW.shape)}, but patch_nums {self.patch_nums} with down-sampling "
                f"{self.architecture.downsampling} need (B, 3, {self.image_size}, {self.image_size})"
            )
        return cast(Tensor, self.before_quantizer(self.encoder(images_B3HW)))

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> list[Tensor]:
        """The tokens of images in [-1, 1]: K int64 tensors (B, p²), coarse to fine."""
        return self.quantizer.encode(self.features(images_B3HW))

    def next_scale_inputs(self, tokens: Sequence[Tensor]) -> Tensor:
        """What the transformer is fed while it learns to predict these tokens: float32 (B, L - p_1², c)."""
        return self.quantizer.next_scale_inputs(tokens)

    @torch.no_grad()
    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """The images (B, 3, H, W) that tokens stand for, clamped to [-1, 1]."""
        return self.decode_features(self.quantizer.decode_features(tokens))

    @torch.no_grad()
    def decode_features(self, features_hat_BChw: Tensor) -> Tensor:
        """The images (B, 3, H, W) of quantized features, clamped to [-1, 1]."""
        return self._decoded(features_hat_BChw).clamp(-1, 1)

    def _decoded(self, features_hat_BChw: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.after_quantizer(features_hat_BChw)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, c, h, w): residual blocks, halving the side between resolutions."""

    def __init__(self, architecture: TokenizerArchitecture) -> None:
        super().__init__()
        channels, blocks, groups = architecture.channels, architecture.residual_blocks, architecture.norm_groups
        self.input = _convolution(3, channels[0])
        self.levels = nn.Sequential()
        incoming = channels[0]
        for level, outgoing in enumerate(channels):
            last = level == len(channels) - 1
            resample = nn.Identity() if last else _halving(outgoing)
            attention = architecture.attention and last
            self.levels.append(Level(incoming, outgoing, blocks, attention, groups, resample))
            incoming = outgoing
        self.middle = Middle(incoming, architecture.attention, groups)
        self.norm = _normalisation(groups, incoming)
        self.output = _convolution(incoming, architecture.latent_channels)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Encode images in [-1, 1]."""
        features_BChw = self.middle(self.levels(self.input(images_B3HW)))
        return cast(Tensor, self.output(F.silu(self.norm(features_BChw))))


class Decoder(nn.Module):
    """Features (B, c, h, w) to images (B, 3, H, W): the encoder mirrored, with one more residual block a resolution."""

    def __init__(self, architecture: TokenizerArchitecture) -> None:
        super().__init__()
        channels, blocks, groups = architecture.channels, architecture.residual_blocks, architecture.norm_groups
        incoming = channels[-1]
        self.input = _convolution(architecture.latent_channels, incoming)
        self.middle = Middle(incoming, architecture.attention, groups)
        self.levels = nn.Sequential()  # coarse to fine, in the order of computation
        for level, outgoing in reversed(list(enumerate(channels))):
            resample = _doubling(outgoing) if level else nn.Identity()
            attention = architecture.attention and level == len(channels) - 1
            self.levels.append(Level(incoming, outgoing, blocks + 1, attention, groups, resample))
            incoming = outgoing
        self.norm = _normalisation(groups, incoming)
        self.output = _convolution(incoming, 3)

    def forward(self, features_BChw: Tensor) -> Tensor:
        """Decode quantized features into images on the scale of [-1, 1], not clamped."""
        x_BCHW = self.levels(self.middle(self.input(features_BChw)))
        return cast(Tensor, self.output(F.silu(self.norm(x_BCHW))))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention (if any), then the step to the next resolution."""

    def __init__(
        self, incoming: int, outgoing: int, blocks: int, attention: bool, norm_groups: int, resample: nn.Module
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(incoming if index == 0 else outgoing, outgoing, norm_groups) for index in range(blocks)
        )
        self.attentions = nn.ModuleList(
            SpatialAttention(outgoing, norm_groups) if attention else nn.Identity() for _ in range(blocks)
        )
        self.resample = resample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Apply the level."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x_BCHW = attention(block(x_BCHW))
        return cast(Tensor, self.resample(x_BCHW))


class Middle(nn.Sequential):
    """Residual block, attention (if any), residual block at the coarsest resolution."""

    def __init__(self, channels: int, attention: bool, norm_groups: int) -> None:
        super().__init__(
            ResidualBlock(channels, channels, norm_groups),
            SpatialAttention(channels, norm_groups) if attention else nn.Identity(),
            ResidualBlock(channels, channels, norm_groups),
        )


class ResidualBlock(nn.Module):
    """Two normalised 3 × 3 convolutions around a shortcut."""

    def __init__(self, incoming: int, outgoing: int, norm_groups: int) -> None:
        super().__init__()
        self.norm_1 = _normalisation(norm_groups, incoming)
        self.convolution_1 = _convolution(incoming, outgoing)
        self.norm_2 = _normalisation(norm_groups, outgoing)
        self.convolution_2 = _convolution(outgoing, outgoing)
        self.shortcut = nn.Identity() if incoming == outgoing else nn.Conv2d(incoming, outgoing, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Input plus f(input), where the shortcut adapts the number of channels."""
        hidden_BCHW = self.convolution_1(F.silu(self.norm_1(x_BCHW)))
        return cast(Tensor, self.shortcut(x_BCHW) + self.convolution_2(F.silu(self.norm_2(hidden_BCHW))))


class SpatialAttention(nn.Module):
    """Single-head self-attention over the places of a map, with a residual connection."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = _normalisation(norm_groups, channels)
        self.queries_keys_values = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.projection = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Input plus attention(input)."""
        joint_B3CS = self.queries_keys_values(self.norm(x_BCHW)).flatten(2)
        queries_B1SC, keys_B1SC, values_B1SC = joint_B3CS.transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        attended_B1SC = F.scaled_dot_product_attention(queries_B1SC, keys_B1SC, values_B1SC)
        attended_BCHW = attended_B1SC.squeeze(1).transpose(1, 2).reshape(x_BCHW.shape)
        return cast(Tensor, x_BCHW + self.projection(attended_BCHW))


def _halving(channels: int) -> nn.Sequential:
    """Halves the side by a 3 × 3 convolution of stride 2 that is padded at the right and at the bottom only."""
    convolution = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
    return nn.Sequential(OrderedDict(padding=nn.ZeroPad2d((0, 1, 0, 1)), convolution=convolution))


def _doubling(channels: int) -> nn.Sequential:
    """Doubles the side by repeating pixels, then convolves."""
    convolution = _convolution(channels, channels)
    return nn.Sequential(OrderedDict(repeating=nn.Upsample(scale_factor=2), convolution=convolution))


def _convolution(incoming: int, outgoing: int) -> nn.Conv2d:
    return nn.Conv2d(incoming, outgoing, kernel_size=3, padding=1)


def _normalisation(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)
