"""Parameters, FLOPs and memory of the tokenizer, in closed form, from its architecture alone. No torch.

FLOPs are 2 × multiply-adds of all matrix products and convolutions, for one image, as `torch.utils.flop_counter` counts
them with the math kernel.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from varscale.config.tokenizer import TokenizerArchitecture

LARGEST_RESIZING_MATRIX = 2**20
"""Resizing is a matrix product up to this many entries, which all maps of up to 32 × 32 have; beyond, on a GPU, the
gradients of F.interpolate are not the same bits every time."""
FLOAT32_BYTES = 4
TRAINING_COPIES = 5
"""Weights, gradients, AdamW's two moments and the averaged weights."""
QUANTIZER_MAPS = 6
"""Maps of the latents' size that each scale of the quantizer keeps for its backward pass."""


@dataclass(frozen=True)
class TokenizerShape:
    """What follows from a tokenizer's architecture; `varscale.tokenizer.autoencoder` has the layers in this order."""

    architecture: TokenizerArchitecture

    def parameters(self) -> int:
        """All parameters: encoder, decoder, codes, φ and the convolutions around the quantizer."""
        architecture = self.architecture
        codes = (
            len(architecture.patch_nums) if self._bitwise else architecture.vocab_size * architecture.latent_channels
        )
        phi = architecture.phi_count * self._beside_quantizer.parameters
        return sum(layer.parameters for layer in self._encoder + self._decoder) + codes + phi

    def encode_flops(self) -> int:
        """Image to tokens."""
        # the last scale's contribution would only change a residual that nobody looks at
        return sum(layer.flops for layer in self._encoder) + self._lookups() + self._contributions(last=False)

    def decode_flops(self) -> int:
        """Tokens to image."""
        return sum(layer.flops for layer in self._decoder) + self._contributions(last=True)

    def forward_flops(self) -> int:
        """One training pass: image to reconstruction."""
        return sum(layer.flops for layer in self._encoder) + self._lookups() + self.decode_flops()

    def training_flops(self) -> int:
        """Forward and backward pass of one image: 3 × forward."""
        return 3 * self.forward_flops()

    def training_state_bytes(self) -> int:
        """Float32 weights, gradients, AdamW's two moments and the averaged weights."""
        return self.parameters() * TRAINING_COPIES * FLOAT32_BYTES

    def activation_bytes(self, batch: int) -> int:
        """An estimate, to within a third, of what a training step keeps for its backward pass, in float32.

        Convolutions keep their inputs, normalisations inputs and outputs; the adversarial term and LPIPS are left out.
        """
        latents = self.architecture.latent_channels * self.architecture.latent_size**2
        quantizer = len(self.architecture.patch_nums) * QUANTIZER_MAPS * latents
        return batch * (sum(layer.kept for layer in self._encoder + self._decoder) + quantizer) * FLOAT32_BYTES

    def step_bytes(self, images: int) -> int:
        """What a training step needs with so many images at once."""
        return self.training_state_bytes() + self.activation_bytes(images)

    @property
    def _bitwise(self) -> bool:
        return self.architecture.quantizer == "bitwise"

    @cached_property
    def _encoder(self) -> "list[_Layer]":
        channels, side = self.architecture.channels, self.architecture.image_size
        layers = [_convolution(3, channels[0], side)]
        for incoming, outgoing in zip((channels[0], *channels), channels, strict=False):
            coarsest = side == self.architecture.latent_size
            layers += self._level(incoming, outgoing, side, self.architecture.residual_blocks, attention=coarsest)
            if not coarsest:
                side //= 2
                layers.append(_convolution(outgoing, outgoing, side, stride=2))
        layers += [*self._middle, _normalisation(channels[-1], side)]
        return [*layers, _convolution(channels[-1], self.architecture.latent_channels, side), self._beside_quantizer]

    @cached_property
    def _decoder(self) -> "list[_Layer]":
        channels, side = self.architecture.channels[::-1], self.architecture.latent_size
        layers = [self._beside_quantizer, _convolution(self.architecture.latent_channels, channels[0], side)]
        layers += self._middle
        for incoming, outgoing in zip((channels[0], *channels), channels, strict=False):
            coarsest = side == self.architecture.latent_size
            layers += self._level(incoming, outgoing, side, self.architecture.residual_blocks + 1, attention=coarsest)
            if side < self.architecture.image_size:
                side *= 2
                layers.append(_convolution(outgoing, outgoing, side))
        return [*layers, _normalisation(channels[-1], side), _convolution(channels[-1], 3, side)]

    def _level(self, incoming: int, outgoing: int, side: int, blocks: int, *, attention: bool) -> "list[_Layer]":
        attentions = [_attention(outgoing, side)] if attention and self.architecture.attention else []
        first = [*_residual_block(incoming, outgoing, side), *attentions]
        return first + (blocks - 1) * [*_residual_block(outgoing, outgoing, side), *attentions]

    @property
    def _middle(self) -> "list[_Layer]":
        channels, side = self.architecture.channels[-1], self.architecture.latent_size
        block = _residual_block(channels, channels, side)
        return [*block, *([_attention(channels, side)] if self.architecture.attention else []), *block]

    @property
    def _beside_quantizer(self) -> "_Layer":
        channels = self.architecture.latent_channels
        return _convolution(channels, channels, self.architecture.latent_size)

    def _lookups(self) -> int:
        """Distances to all codes, which signs need not, and the residuals' down-sampling before them."""
        distances = 2 * self.architecture.tokens_per_image * self.architecture.latent_channels
        codes = 0 if self._bitwise else self.architecture.vocab_size
        return distances * codes + sum(map(self._resizing, self.architecture.patch_nums))

    def _contributions(self, *, last: bool) -> int:
        """Up-sampling and φ of all scales, with or without the last."""
        sides = self.architecture.patch_nums if last else self.architecture.patch_nums[:-1]
        return sum(self._resizing(side) + self._beside_quantizer.flops for side in sides)  # φ is as large as that

    def _resizing(self, side: int) -> int:
        entries = side**2 * self.architecture.latent_size**2
        by_matrix = side != self.architecture.latent_size and entries <= LARGEST_RESIZING_MATRIX
        return 2 * self.architecture.latent_channels * entries if by_matrix else 0


class _Layer(NamedTuple):
    parameters: int
    flops: int
    kept: int
    """Numbers that it keeps for its backward pass."""


def _convolution(incoming: int, outgoing: int, side: int, *, kernel: int = 3, stride: int = 1) -> _Layer:
    """Of a map whose output has `side` places a side."""
    products = incoming * kernel**2 * outgoing
    return _Layer(products + outgoing, 2 * products * side**2, incoming * (stride * side) ** 2)


def _normalisation(channels: int, side: int) -> _Layer:
    return _Layer(2 * channels, 0, 2 * channels * side**2)


def _attention(channels: int, side: int) -> _Layer:
    places = side**2
    flops = 8 * places * channels**2 + 4 * places**2 * channels
    return _Layer(4 * channels * (channels + 1) + 2 * channels, flops, 6 * channels * places)


def _residual_block(incoming: int, outgoing: int, side: int) -> list[_Layer]:
    shortcut = [] if incoming == outgoing else [_convolution(incoming, outgoing, side, kernel=1)]
    first, second = (_convolution(channels, outgoing, side) for channels in (incoming, outgoing))
    return [_normalisation(incoming, side), first, _normalisation(outgoing, side), second, *shortcut]
