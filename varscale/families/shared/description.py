"""The description of one transformer of VAR's ladder and blocks, what follows from its numbers, and its section.

FLOPs are 2 × multiply-adds of all matrix products, for one image. The forward pass counts all L × L pairs of tokens,
whatever a kernel skips, so that a budget is the same on every device; it equals what `torch.utils.flop_counter` counts
with the math kernel. Executed FLOPs, only for utilisation, leave out hidden pairs.

Letters: C width, H heads, L tokens, V vocabulary, c latent channels.
"""

import itertools
import math
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from varscale.config.section import (
    Channels,
    Few,
    Fraction,
    NonNegative,
    Parametrization,
    Positive,
    Section,
    Truth,
    Whole,
)
from varscale.errors import ExperimentError
from varscale.families.base import (
    FLOAT32_BYTES,
    FamilySection,
    ModelDescription,
    Size,
    TokenSpace,
    block_bytes,
    most_heads,
)

LEAST_ROTATED = 4
"""Channels of a head that rotary positions need at least: a pair for rows and one for columns."""


class Growth(NamedTuple):
    """How much larger a model is than the base of its parametrization; 1 where the parametrization leaves a side be."""

    width: float = 1.0
    depth: float = 1.0


class TransformerSettings(Section):
    """What an experiment states of the model and the model is built from; a new field of these needs no other place."""

    mlp_ratio: Annotated[Positive, Field(le=1000)] = 4.0
    """Hidden width of the feed-forward layers as a multiple of the width."""
    label_dropout: Fraction = 0.1
    """Probability that a training image's label is replaced by "no class"."""
    shared_adaln: Truth = False
    """One AdaLN projection for all blocks plus an offset for each (the paper's d36 at 512 px)."""
    normalise_queries_keys: Truth = True
    """L2-normalise queries and keys and learn a temperature a head; otherwise a fixed scale 0.25/√d."""
    adaln_init: Annotated[NonNegative, Field(le=1e6)] = 0.5
    """Scale of AdaLN's scale and shift weights at initialisation."""
    adaln_gamma_init: Annotated[NonNegative, Field(le=1e6)] = 1e-3
    """Scale of AdaLN's gate (gamma) weights at initialisation."""
    head_init: Annotated[NonNegative, Field(le=1e6)] = 0.02
    """Scale of the classifier's weights at initialisation."""
    # left out of what is written down where it is `var`: fingerprints from before there was a choice stay valid
    block: Annotated[Literal["var", "modern"], Field(exclude_if=lambda block: block == "var")] = "var"
    """`var`: the paper's. `modern`: two-dimensional rotary positions instead of learned ones, RMSNorm, and SwiGLU of as
    many parameters, as in LlamaGen; AdaLN stays."""
    # the three below stay out of what is written, and so out of fingerprints, where nothing is said of them
    parametrization: Annotated[Parametrization, Field(exclude_if=lambda value: value == "paper")] = "paper"
    """How initialisation and rates follow the size, so that a rate found at the base serves larger models: as in the
    paper (not at all); `mup`: with the width (arXiv 2203.03466); `complete-p`: with width and depth (2505.01618)."""
    base_width: Annotated[Channels | None, Field(exclude_if=lambda value: value is None)] = None
    """Width of the base, the size at which all parametrizations are the same; `paper` has no use for it."""
    base_depth: Annotated[Few | None, Field(exclude_if=lambda value: value is None)] = None
    """Depth of the base; only `complete-p` has a use for it."""


class TransformerDescription(ModelDescription, TransformerSettings):
    """One transformer of VAR's blocks (Tian et al. 2024, section 3.2)."""

    width: Size
    """Channels C of a token."""
    heads: Size
    """Attention heads H; they divide the width."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of the last block; the others' rates grow linearly from 0."""
    init_std: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the initial weights; None: √(1/(3C))."""
    modulates_once: ClassVar[bool] = False
    """Whether drawing computes the blocks' modulations once for all passes: it pays where they are many and small."""
    guides_from_the_start: ClassVar[bool] = False
    """Whether the first pass of drawing is guided, too; otherwise guidance grows from 0."""
    base_head_channels: Annotated[Size | None, Field(exclude_if=lambda value: value is None)] = None
    """Channels of a head of the base."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(larger <= smaller for smaller, larger in itertools.pairwise(self.patch_nums)) or not self.patch_nums:
            raise ValueError(f"patch_nums {self.patch_nums} must grow strictly")
        if self.reads == "scale" and len(self.patch_nums) > 1:
            raise ValueError(f"patch_nums {self.patch_nums}: models of family {self.family} read tokens of one scale")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.hidden < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio:g} leaves width {self.width} no hidden channel")
        if self.modern and self.head_channels < LEAST_ROTATED:
            raise ValueError(f"heads of {self.head_channels} channels are too narrow for rotary positions")
        return self

    @property
    def pass_sides(self) -> tuple[int, ...]:
        """Side of each map of tokens that are predicted at once, one after the other: the scales."""
        return self.patch_nums

    def sampling_passes(self) -> int:
        """One a map."""
        return len(self.pass_sides)

    @property
    def embedded_tokens(self) -> int:
        """How many of an image's tokens are inputs of a training pass: all but those of the first map."""
        return self.tokens - self.pass_sides[0] ** 2

    @property
    def modern(self) -> bool:
        """Whether the blocks are `modern`."""
        return self.block == "modern"

    @property
    def head_channels(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def columns(self) -> dict[str, int]:
        """Width and heads."""
        return {"width": self.width, "heads": self.heads}

    @property
    def growth(self) -> Growth:
        """Against the base."""
        if self.base_width is None:
            return Growth()
        return Growth(self.width / self.base_width, self.depth / (self.base_depth or self.depth))

    @property
    def branch_factor(self) -> float:
        """Of what a block adds to the residual stream."""
        return 1 / self.growth.depth

    @property
    def logit_factor(self) -> float:
        """Of queries and keys that keep their length: their products times this over √d are the logits.

        Trained queries and keys are aligned, so that their product grows with d, and the theory divides by it.
        """
        return 0.25 * math.sqrt((self.base_head_channels or self.head_channels) / self.head_channels)

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Stochastic depth of each block."""
        return tuple(self.drop_path_rate * index / max(self.depth - 1, 1) for index in range(self.depth))

    @property
    def hidden(self) -> int:
        """Channels between the two feed-forward layers; SwiGLU has two thirds of them, for three matrices."""
        return round(self.width * self.mlp_ratio * (2 / 3 if self.modern else 1))

    def parameters(self) -> int:
        """All trainable parameters."""
        width = self.width
        modulation = 6 * width * (width + 1)
        modulations = modulation + 6 * width * self.depth if self.shared_adaln else modulation * self.depth
        places = 0 if self.modern else self.tokens
        tables = self.condition_rows + self.pass_sides[0] ** 2 + places + len(self.patch_nums)
        return self.active_parameters() + modulations + tables * width + 2 * width * (width + 1)

    def active_parameters(self, *, head: bool = True) -> int:
        """N = depth·(12C² + 8C + H) + (c + 1)·C + (C + 1)·V: blocks without modulation, input and head."""
        width, hidden = self.width, self.hidden
        scales = self.heads if self.normalise_queries_keys else 0
        feedforward = 3 * width * hidden if self.modern else 2 * width * hidden + width + hidden
        block = 4 * width**2 + 3 * width + feedforward + scales
        output = (width + 1) * self.outputs if head else 0
        return self.depth * block + (self.latent_channels + 1) * width + output

    def forward_flops(self) -> int:
        """One teacher-forced pass of one image, with all L × L pairs."""
        return self._products() + self.attention_flops()

    def attention_flops(self) -> int:
        """Those of a teacher-forced pass that are for pairs of tokens, all L × L."""
        return self._attention(self.tokens**2)

    def executed_forward_flops(self) -> int:
        """One teacher-forced pass of one image, with only the pairs that a block-causal kernel computes."""
        ends = itertools.accumulate(side**2 for side in self.pass_sides)
        pairs = sum(side**2 * end for side, end in zip(self.pass_sides, ends, strict=True))
        return self._products() + self._attention(pairs)

    def sampling_flops(self, *, guidance: bool = True, cache: bool = True) -> int:
        """Sampling one image map by map, without the tokenizer's decoder.

        Args:
            guidance: Also compute the branch without class (with a shared output layer).
            cache: Keep keys and values; else each pass computes all scales so far anew.
        """
        branches, once = 2 if guidance else 1, self.shared_adaln or self.modulates_once
        total, end = branches * (self.condition_flops(self.width) + (self._modulation() if once else 0)), 0
        for index, side in enumerate(self.pass_sides):
            added = side**2
            end += added
            rows = added if cache else end
            blocks = self._blocks(rows) + self._attention(rows * end) + (0 if once else self._modulation())
            total += branches * blocks + self._head(added) + (self._embedding(added) if index else 0)
            if index or self.guides_from_the_start:  # the head mixes both branches' modulated inputs
                total += 4 * self.width**2 * (branches - 1)
        return total

    def activation_bytes(self, batch: int, *, element_bytes: int = FLOAT32_BYTES) -> int:
        """An estimate, to within a third, of what a training step keeps for its backward pass.

        Blocks keep two rows of the hidden layer, four with SwiGLU; the output layer three of C, and the logits twice.
        The operator of narrow models on a CPU keeps three fifths of that.
        """
        block = block_bytes(self.width, (4 if self.modern else 2) * self.hidden, self.heads, element_bytes)
        output = (3 * self.width + 2 * self.outputs) * FLOAT32_BYTES
        return batch * self.tokens * (self.depth * block + output)

    def _products(self) -> int:
        return (
            self._embedding(self.embedded_tokens)
            + self._blocks(self.tokens)
            + self._modulation()
            + self._head(self.tokens)
            + self.condition_flops(self.width)
        )

    def _embedding(self, tokens: int) -> int:
        return 2 * tokens * self.latent_channels * self.width

    def _blocks(self, tokens: int) -> int:
        return self.depth * tokens * self.width * (8 * self.width + (6 if self.modern else 4) * self.hidden)

    def _modulation(self) -> int:
        return 12 * self.width**2 * (1 if self.shared_adaln else self.depth)

    def _attention(self, pairs: int) -> int:
        return self.depth * 4 * pairs * self.width

    def _head(self, tokens: int) -> int:
        return 4 * self.width**2 + 2 * tokens * self.width * self.outputs


class TransformerSection(FamilySection, TransformerSettings):
    """A transformer of VAR's ladder; depth derives the rest."""

    width_per_depth: Annotated[Whole, Field(ge=1, le=4096)] = 64
    """Transformer width = width_per_depth · depth."""
    head_dim: Annotated[Whole, Field(ge=1, le=4096)] = 64
    """Channels of an attention head, at least: a size has as many heads as divide its width and leave each that many
    (64, the paper's, with width 64 · depth makes heads = depth)."""
    drop_path_at_depth_24: Fraction = 0.1
    """Stochastic depth of the last block is this · depth / 24, linear over the blocks."""

    description: ClassVar[type[TransformerDescription]]

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        needed = {"paper": (), "mup": ("base_width",), "complete-p": ("base_width", "base_depth")}
        for name in needed[self.parametrization]:
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name}: parametrization {self.parametrization} needs it; name that of the size whose rate is "
                    "carried to larger ones"
                )
        return self

    def describe(self, tokens: TokenSpace, depth: int) -> TransformerDescription:
        """The transformer of `depth` blocks.

        At the base's own size every parametrization is the paper's, and a model of it the paper's model.

        Raises:
            ExperimentError: A rate of stochastic depth of 1 or more, no hidden channel, heads too narrow for rotary
                positions, or less than the base; names the key.
        """
        width, rate = self.width_per_depth * depth, self.drop_path_at_depth_24 * depth / 24
        if rate >= 1:
            raise ExperimentError(
                f"model.drop_path_at_depth_24: {self.drop_path_at_depth_24:g} is a rate of {rate:.3g} at depth "
                f"{depth}; it must stay below 1"
            )
        if round(width * self.mlp_ratio * (2 / 3 if self.block == "modern" else 1)) < 1:
            raise ExperimentError(
                f"model.mlp_ratio: {self.mlp_ratio:g} leaves depth {depth} of width {width} no hidden channel"
            )
        heads = most_heads(width, self.head_dim)
        if self.block == "modern" and width // heads < LEAST_ROTATED:
            raise ExperimentError(
                f"model.block: modern needs heads of {LEAST_ROTATED} channels at least for rotary positions; depth "
                f"{depth} has {width // heads} of model.head_dim {self.head_dim}"
            )
        own = {name: getattr(self, name) for name in self.description.model_fields.keys() & type(self).model_fields}
        own |= {"depth": depth, "width": width, "heads": heads, "drop_path_rate": rate} | self._base(width, depth)
        return self.description(**tokens.model_dump(), **own)

    def _base(self, width: int, depth: int) -> dict[str, str | int | None]:
        """The fields of a model's description that say how it is scaled from the base."""
        base_width = None if self.parametrization == "paper" else self.base_width
        base_depth = self.base_depth if self.parametrization == "complete-p" else None
        for name, base, own in (("width", base_width, width), ("depth", base_depth, depth)):
            if base is not None and base > own:
                raise ExperimentError(
                    f"model.base_{name}: {base} is more than the {own} of depth {depth}; the base is the smallest size"
                )
        if base_width in (None, width) and base_depth in (None, depth):
            return {"parametrization": "paper", "base_width": None, "base_depth": None}
        head_channels = base_width // most_heads(base_width, self.head_dim) if base_width is not None else None
        return {"base_width": base_width, "base_depth": base_depth, "base_head_channels": head_channels}
