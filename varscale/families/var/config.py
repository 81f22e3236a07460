"""Parameters, FLOPs and memory of tokenizer and transformer, in closed form, from shapes alone.

FLOPs are 2 × multiply-adds of all matrix products and convolutions, for one image. The forward pass counts all L × L
pairs of tokens, whatever a kernel skips, so that a budget is the same on every device; it equals what
`torch.utils.flop_counter` counts with the math kernel. Executed FLOPs, only for utilisation, leave out hidden pairs.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from varscale.config.model import FamilySection
from varscale.config.section import Fraction, NonNegative, Positive, Truth, Whole

# resizing is a matrix product up to this many entries, which all maps of up to 32 × 32 have; beyond, on a GPU, the
# gradients of F.interpolate are not the same bits every time
LARGEST_RESIZING_MATRIX = 2**20
FLOAT32_BYTES = 4
# weights, gradients and AdamW's two moments
TRAINING_COPIES = 4
# of the latents' size that each scale of the quantizer keeps
QUANTIZER_MAPS = 6


class _Shape:
    @classmethod
    def of(cls, model: Any) -> Self:
        """The shape of a model that has attributes of these names, as the models of this package do."""
        return cls(**{field.name: getattr(model, field.name) for field in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class VARShape(_Shape):
    """What the size of a VAR transformer depends on; see `varscale.families.var.transformer.VAR` for the meaning."""

    patch_nums: tuple[int, ...]
    vocab_size: int
    latent_channels: int
    num_classes: int
    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    shared_adaln: bool = False
    normalise_queries_keys: bool = True

    @property
    def tokens(self) -> int:
        """L, the tokens of an image over all scales."""
        return sum(side**2 for side in self.patch_nums)

    @property
    def hidden(self) -> int:
        """Channels between the two feed-forward layers."""
        return round(self.width * self.mlp_ratio)

    def parameters(self) -> int:
        """All trainable parameters."""
        width = self.width
        modulation = 6 * width * (width + 1)
        modulations = modulation + 6 * width * self.depth if self.shared_adaln else modulation * self.depth
        tables = self.num_classes + 1 + self.patch_nums[0] ** 2 + self.tokens + len(self.patch_nums)
        return self.active_parameters() + modulations + tables * width + 2 * width * (width + 1)

    def active_parameters(self, *, head: bool = True) -> int:
        """N = depth·(12C² + 8C + H) + (c + 1)·C + (C + 1)·V: blocks without modulation, input and head.

        Args:
            head: Count the output layer's (C + 1)·V.
        """
        width, hidden = self.width, self.hidden
        scales = self.heads if self.normalise_queries_keys else 0
        block = 4 * width**2 + 2 * width * hidden + 4 * width + hidden + scales
        output = (width + 1) * self.vocab_size if head else 0
        return self.depth * block + (self.latent_channels + 1) * width + output

    def forward_flops(self) -> int:
        """One teacher-forced pass of one image, with all L × L pairs."""
        return self._products() + self._attention(self.tokens**2)

    def training_flops(self) -> int:
        """Forward and backward pass of one image: 3 × forward."""
        return 3 * self.forward_flops()

    def executed_forward_flops(self) -> int:
        """One teacher-forced pass of one image, with only the pairs that a block-causal kernel computes."""
        ends = itertools.accumulate(side**2 for side in self.patch_nums)
        pairs = sum(side**2 * end for side, end in zip(self.patch_nums, ends, strict=True))
        return self._products() + self._attention(pairs)

    def executed_training_flops(self) -> int:
        """Forward and backward pass of one image as it is computed: 3 × the executed forward pass."""
        return 3 * self.executed_forward_flops()

    def sampling_flops(self, *, guidance: bool = True, cache: bool = True) -> int:
        """Sampling one image in K passes, without the tokenizer's decoder.

        Args:
            guidance: Also compute the branch without class (at the first scale without its output layer).
            cache: Keep keys and values; else each pass computes all scales so far anew.
        """
        branches = 2 if guidance else 1
        total, end = (branches * self._modulation() if self.shared_adaln else 0), 0
        for index, side in enumerate(self.patch_nums):
            added = side**2
            end += added
            rows = added if cache else end
            blocks = self._blocks(rows) + self._attention(rows * end)
            blocks += 0 if self.shared_adaln else self._modulation()
            predictions = branches if index else 1
            total += branches * blocks + predictions * self._head(added) + (self._embedding(added) if index else 0)
        return total

    def activation_bytes(self, batch: int, *, element_bytes: int = FLOAT32_BYTES) -> int:
        """An estimate, to within a third, of what a training step keeps for its backward pass.

        Of each token a block keeps 12 rows of C (stream, normalised, modulated and branch twice, joint queries, keys
        and values, attention's output) and 2 of the hidden layer; the output layer 3 of C and the logits twice. Under
        bfloat16 6 of the 12 stay float32 (stream, normalised, queries and keys), and there are copies: 10 of 2 bytes.

        Args:
            batch: Images at once.
            element_bytes: Of the products' inputs: 4, or 2 under bfloat16.
        """
        rows = 12 * FLOAT32_BYTES if element_bytes == FLOAT32_BYTES else 6 * FLOAT32_BYTES + 10 * element_bytes
        block = rows * self.width + 2 * self.hidden * element_bytes + self.heads * FLOAT32_BYTES
        output = (3 * self.width + 2 * self.vocab_size) * FLOAT32_BYTES
        return batch * self.tokens * (self.depth * block + output)

    def training_state_bytes(self) -> int:
        """Float32 weights, gradients and AdamW's two moments."""
        return self.parameters() * TRAINING_COPIES * FLOAT32_BYTES

    def checkpoint_bytes(self) -> int:
        """Of a checkpoint that training goes on from: float32 weights and AdamW's two moments."""
        return self.parameters() * (TRAINING_COPIES - 1) * FLOAT32_BYTES

    def weights_bytes(self) -> int:
        """Of the float32 weights alone."""
        return self.parameters() * FLOAT32_BYTES

    def step_bytes(self, images: int, *, element_bytes: int = FLOAT32_BYTES) -> int:
        """What a training step needs with so many images at once; compiled blocks need up to a third less."""
        return self.training_state_bytes() + self.activation_bytes(images, element_bytes=element_bytes)

    def _products(self) -> int:
        later = self.tokens - self.patch_nums[0] ** 2
        return self._embedding(later) + self._blocks(self.tokens) + self._modulation() + self._head(self.tokens)

    def _embedding(self, tokens: int) -> int:
        return 2 * tokens * self.latent_channels * self.width

    def _blocks(self, tokens: int) -> int:
        return self.depth * tokens * (8 * self.width**2 + 4 * self.width * self.hidden)

    def _modulation(self) -> int:
        return 12 * self.width**2 * (1 if self.shared_adaln else self.depth)

    def _attention(self, pairs: int) -> int:
        return self.depth * 4 * pairs * self.width

    def _head(self, tokens: int) -> int:
        return 4 * self.width**2 + 2 * tokens * self.width * self.vocab_size


@dataclass(frozen=True)
class TokenizerShape(_Shape):
    """What the size of a tokenizer depends on; see `varscale.tokenizer.autoencoder.MultiScaleTokenizer`."""

    patch_nums: tuple[int, ...]
    vocab_size: int
    latent_channels: int
    base_channels: int
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    residual_blocks: int = 2
    attention: bool = True
    phi_count: int = 4

    def parameters(self) -> int:
        """All parameters: encoder, decoder, codebook, φ and the convolutions around the quantizer."""
        latent = self.latent_channels
        layers = (*self._encoder(), *self._decoder())
        quantizer = self.vocab_size * latent + self.phi_count * _Convolution(latent, latent, 1).parameters()
        return sum(layer.parameters() for layer in layers) + quantizer

    def encode_flops(self) -> int:
        """Image to tokens."""
        # the last scale's contribution would only change a residual that nobody looks at
        return sum(layer.flops() for layer in self._encoder()) + self._lookups() + self._contributions(last=False)

    def decode_flops(self) -> int:
        """Tokens to image."""
        return sum(layer.flops() for layer in self._decoder()) + self._contributions(last=True)

    def forward_flops(self) -> int:
        """One training pass: image to reconstruction."""
        layers = (*self._encoder(), *self._decoder())
        return sum(layer.flops() for layer in layers) + self._lookups() + self._contributions(last=True)

    def training_flops(self) -> int:
        """Forward and backward pass of one image: 3 × forward."""
        return 3 * self.forward_flops()

    def next_scale_flops(self) -> int:
        """Tokens to the transformer's inputs."""
        return self._contributions(last=False) + sum(self._resizing(side) for side in self.patch_nums[1:])

    def training_state_bytes(self, *, averaged: bool = True) -> int:
        """Float32 weights, gradients, AdamW's two moments and the averaged weights (EMA)."""
        return self.parameters() * (TRAINING_COPIES + averaged) * FLOAT32_BYTES

    def activation_bytes(self, batch: int) -> int:
        """An estimate, to within a third, of what a training step keeps for its backward pass, in float32.

        Convolutions keep their inputs, normalisations inputs and outputs; the adversarial term and LPIPS are left out.

        Args:
            batch: Images at once.
        """
        layers = (*self._encoder(), *self._decoder())
        quantizer = len(self.patch_nums) * QUANTIZER_MAPS * self.latent_channels * self.patch_nums[-1] ** 2
        return batch * (sum(layer.kept() for layer in layers) + quantizer) * FLOAT32_BYTES

    def step_bytes(self, images: int) -> int:
        """What a training step needs with so many images at once."""
        return self.training_state_bytes() + self.activation_bytes(images)

    def _channels(self) -> list[int]:
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]

    def _encoder(self) -> "list[_Layer]":
        channels, levels = self._channels(), len(self.channel_multipliers)
        side = self.patch_nums[-1] * 2 ** (levels - 1)
        layers: list[_Layer] = [_Convolution(3, channels[0], side)]
        incoming = channels[0]
        for level, outgoing in enumerate(channels):
            last = level == levels - 1
            layers += self._level(incoming, outgoing, side, self.residual_blocks, attention=last)
            incoming = outgoing
            if not last:
                side //= 2
                layers.append(_Convolution(outgoing, outgoing, side, stride=2))
        return [*layers, *self._middle(), *self._ends(incoming, self.latent_channels, side), *self._beside_quantizer()]

    def _decoder(self) -> "list[_Layer]":
        channels, side = self._channels(), self.patch_nums[-1]
        incoming = channels[-1]
        layers: list[_Layer] = [*self._beside_quantizer(), _Convolution(self.latent_channels, incoming, side)]
        layers += self._middle()
        for level in reversed(range(len(channels))):
            coarsest = level == len(channels) - 1
            layers += self._level(incoming, channels[level], side, self.residual_blocks + 1, attention=coarsest)
            incoming = channels[level]
            if level:
                side *= 2
                layers.append(_Convolution(incoming, incoming, side))
        return [*layers, *self._ends(incoming, 3, side)]

    def _level(self, incoming: int, outgoing: int, side: int, blocks: int, *, attention: bool) -> "list[_Layer]":
        layers: list[_Layer] = []
        for index in range(blocks):
            layers += _residual_block(outgoing if index else incoming, outgoing, side)
            if attention and self.attention:
                layers.append(_Attention(outgoing, side))
        return layers

    def _middle(self) -> "list[_Layer]":
        channels, side = self._channels()[-1], self.patch_nums[-1]
        attention = [_Attention(channels, side)] if self.attention else []
        return [*_residual_block(channels, channels, side), *attention, *_residual_block(channels, channels, side)]

    def _ends(self, incoming: int, outgoing: int, side: int) -> "list[_Layer]":
        return [_Normalisation(incoming, side), _Convolution(incoming, outgoing, side)]

    def _beside_quantizer(self) -> "list[_Layer]":
        return [_Convolution(self.latent_channels, self.latent_channels, self.patch_nums[-1])]

    def _lookups(self) -> int:
        """Distances to all codes, and the residuals' down-sampling before them."""
        tokens = sum(side**2 for side in self.patch_nums)
        resizing = sum(self._resizing(side) for side in self.patch_nums)
        return 2 * tokens * self.latent_channels * self.vocab_size + resizing

    def _contributions(self, *, last: bool) -> int:
        """Up-sampling and φ of all scales, with or without the last."""
        sides = self.patch_nums if last else self.patch_nums[:-1]
        refine = _Convolution(self.latent_channels, self.latent_channels, self.patch_nums[-1]).flops()
        return sum(self._resizing(side) + refine for side in sides)

    def _resizing(self, side: int) -> int:
        entries = side**2 * self.patch_nums[-1] ** 2
        by_matrix = side != self.patch_nums[-1] and entries <= LARGEST_RESIZING_MATRIX
        return 2 * self.latent_channels * entries if by_matrix else 0


@dataclass(frozen=True)
class _Convolution:
    incoming: int
    outgoing: int
    side: int  # of its output
    kernel: int = 3
    stride: int = 1

    def parameters(self) -> int:
        return (self.incoming * self.kernel**2 + 1) * self.outgoing

    def flops(self) -> int:
        return 2 * self.incoming * self.outgoing * self.kernel**2 * self.side**2

    def kept(self) -> int:
        return self.incoming * (self.stride * self.side) ** 2


@dataclass(frozen=True)
class _Normalisation:
    channels: int
    side: int

    def parameters(self) -> int:
        return 2 * self.channels

    def flops(self) -> int:
        return 0

    def kept(self) -> int:
        return 2 * self.channels * self.side**2


@dataclass(frozen=True)
class _Attention:
    channels: int
    side: int

    def parameters(self) -> int:
        return 4 * self.channels * (self.channels + 1) + 2 * self.channels

    def flops(self) -> int:
        places = self.side**2
        return 8 * places * self.channels**2 + 4 * places**2 * self.channels

    def kept(self) -> int:
        return 6 * self.channels * self.side**2


_Layer = _Convolution | _Normalisation | _Attention


def _residual_block(incoming: int, outgoing: int, side: int) -> list[_Layer]:
    shortcut = [] if incoming == outgoing else [_Convolution(incoming, outgoing, side, kernel=1)]
    return [
        _Normalisation(incoming, side),
        _Convolution(incoming, outgoing, side),
        _Normalisation(outgoing, side),
        _Convolution(outgoing, outgoing, side),
        *shortcut,
    ]


class VARSection(FamilySection):
    """The VAR transformer; depth derives the rest."""

    family: Literal["var"] = "var"
    """Model family."""
    width_per_depth: Annotated[Whole, Field(ge=1, le=4096)] = 64
    """Transformer width = width_per_depth · depth."""
    head_dim: Annotated[Whole, Field(ge=1, le=4096)] = 64
    """Channels of an attention head, at least: a size has as many heads as divide its width and leave each that many
    (64, the paper's, with width 64 · depth makes heads = depth)."""
    mlp_ratio: Annotated[Positive, Field(le=1000)] = 4.0
    """Hidden width of the feed-forward layers as a multiple of the width."""
    drop_path_at_depth_24: Fraction = 0.1
    """Stochastic depth of the last block is this · depth / 24, linear over the blocks."""
    label_dropout: Fraction = 0.1
    """Probability that a training image's label is replaced by "no class"."""
    shared_adaln: Truth = False
    """One AdaLN projection for all blocks (the paper's d36 at 512 px)."""
    normalise_queries_keys: Truth = True
    """L2-normalise queries and keys and learn a temperature a head."""
    adaln_init: NonNegative = 0.5
    """Scale of AdaLN's scale and shift weights at initialisation."""
    adaln_gamma_init: NonNegative = 1e-3
    """Scale of AdaLN's gate (gamma) weights at initialisation."""
    head_init: NonNegative = 0.02
    """Scale of the classifier's weights at initialisation."""

    def width(self, depth: int) -> int:
        """Transformer width of a model of `depth` blocks."""
        return self.width_per_depth * depth

    def heads(self, depth: int) -> int:
        """Attention heads of a model of `depth` blocks: at least one."""
        width = self.width(depth)
        return max((heads for heads in range(1, width // self.head_dim + 1) if width % heads == 0), default=1)

    def drop_path_rate(self, depth: int) -> float:
        """Stochastic-depth rate of the last block of a model of `depth` blocks."""
        return self.drop_path_at_depth_24 * depth / 24


SECTION = VARSection
