"""The section of diffusion transformers, and the description of one with what follows from its numbers.

FLOPs are 2 × multiply-adds of all matrix products, for one image.

Letters: C width, L tokens (patches of the latents), c latent channels.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from varscale.config.section import Fraction, Positive, Section, Whole
from varscale.errors import ExperimentError
from varscale.families.base import (
    FLOAT32_BYTES,
    Family,
    FamilySection,
    ModelDescription,
    Reads,
    Size,
    TokenSpace,
    block_bytes,
    most_heads,
)

TIME_WAVES = 256
"""Sines and cosines of the time that the model is told, as in DiT."""
NOISE_LEVELS = 1000
"""Of DDPM."""
SAMPLERS = {"flow": ("euler", "heun"), "ddpm": ("ddim", "ancestral")}
"""Of each prediction; the first is the default."""


class DiffusionSettings(Section):
    """What an experiment states of the model and the model is built from; a new field of these needs no other place."""

    patch_size: Annotated[Whole, Field(ge=1, le=64)] = 1
    """Latents along a side of the square that is one token. DiT's 2 halves latents of 32 × 32; ours are smaller."""
    mlp_ratio: Annotated[Positive, Field(le=1000)] = 4.0
    """Hidden width of the feed-forward layers as a multiple of the width."""
    label_dropout: Fraction = 0.1
    """Probability that a training image's label is replaced by "no class"."""
    prediction: Literal["flow", "ddpm"] = "flow"
    """`flow`: the velocity of SiT's linear path from noise to latents. `ddpm`: the noise (Ho et al. 2020)."""
    time_distribution: Literal["uniform", "logit-normal"] = "uniform"
    """Times at which a flow is trained; `logit-normal` favours the middle (Esser et al. 2024)."""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """How noise grows with the time of `ddpm`; `cosine` is Nichol and Dhariwal's (2021)."""
    sampler: Literal["euler", "heun", "ddim", "ancestral"] | None = None
    """`euler` or `heun` (two passes a step) integrate a flow; `ddim` or `ancestral` undo the noise of `ddpm`. None:
    `euler` or `ddim`."""
    sampling_steps: Annotated[Whole, Field(ge=1, le=NOISE_LEVELS)] = 50
    """Steps in which an image is drawn, unless it is asked for with others."""

    @field_validator("sampler")
    @classmethod
    def _default_has_one_name(cls, sampler: str | None, info: ValidationInfo) -> str | None:
        """So that the default, named or not, is one model with one fingerprint."""
        return None if sampler == SAMPLERS.get(info.data.get("prediction", ""), ("",))[0] else sampler

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        other = "ddpm" if self.prediction == "flow" else "flow"
        if self.sampler in SAMPLERS[other]:
            raise ValueError(
                f"sampler: {self.sampler} is for prediction {other}; {self.prediction} takes "
                f"{' or '.join(SAMPLERS[self.prediction])}"
            )
        name = "noise_schedule" if self.prediction == "flow" else "time_distribution"
        if getattr(self, name) != type(self).model_fields[name].default:
            raise ValueError(f"{name}: only prediction {other} has one, and prediction is {self.prediction}")
        return self

    @property
    def solver(self) -> str:
        """The sampler that is used."""
        return self.sampler or SAMPLERS[self.prediction][0]


class DiTConfig(ModelDescription, DiffusionSettings):
    """One diffusion transformer (Peebles and Xie 2023, DiT, with adaLN-zero)."""

    reads: ClassVar[Reads] = "latents"
    family: Literal["diffusion"] = "diffusion"
    """The family."""
    width: Size
    """Channels C of a token."""
    heads: Size
    """Attention heads; they divide the width."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.patch_nums or self.patch_nums[-1] % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} must divide the latents' side, the last of patch_nums")
        if self.width % self.heads or self.hidden < 1:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}, and mlp_ratio above 0")
        return self

    def implementation(self) -> Family:
        """The part that needs torch."""
        from varscale.families.diffusion.family import DiffusionFamily

        return DiffusionFamily()

    def columns(self) -> dict[str, int]:
        """Width and heads."""
        return {"width": self.width, "heads": self.heads}

    @property
    def loss_unit(self) -> str:
        """The mean over the latents, of what is predicted."""
        return f"squared error of {'velocity' if self.prediction == 'flow' else f'noise, {self.noise_schedule}'}"

    @property
    def side(self) -> int:
        """Tokens along a side."""
        return self.patch_nums[-1] // self.patch_size

    @property
    def tokens(self) -> int:
        """L, patches of the latents."""
        return self.side**2

    @property
    def groups(self) -> tuple[int, ...]:
        """All tokens are alike."""
        return (self.tokens,)

    @property
    def outputs(self) -> int:
        """Numbers of a patch."""
        return self.patch_size**2 * self.latent_channels

    @property
    def hidden(self) -> int:
        """Channels between the two feed-forward layers."""
        return round(self.width * self.mlp_ratio)

    def parameters(self) -> int:
        """All trainable parameters."""
        width = self.width
        conditions = (TIME_WAVES + 1 + width + 1 + self.condition_rows) * width
        return self.active_parameters() + conditions + (6 * self.depth + 2) * width * (width + 1)

    def active_parameters(self, *, head: bool = True) -> int:
        """depth·(4C² + 2C·hidden + 5C + hidden) and input and head: blocks without modulation, as VAR's are counted."""
        width, hidden = self.width, self.hidden
        block = 4 * width**2 + 2 * width * hidden + 5 * width + hidden
        return self.depth * block + (self.outputs + 1) * width + ((width + 1) * self.outputs if head else 0)

    def forward_flops(self) -> int:
        """One pass of one image at one time."""
        width, tokens = self.width, self.tokens
        products = 8 * width**2 + 4 * width * self.hidden + 4 * tokens * width
        condition = self.condition_flops(width) + 2 * (TIME_WAVES + width) * width + (12 * self.depth + 4) * width**2
        return self.depth * tokens * products + 4 * tokens * self.outputs * width + condition

    def executed_forward_flops(self) -> int:
        """The same: all tokens see each other."""
        return self.forward_flops()

    def sampling_passes(self) -> int:
        """One a step of the sampler, or two where it is Heun's."""
        return self.sampling_steps * (2 if self.solver == "heun" else 1)

    def sampling_flops(self, *, guidance: bool = True) -> int:
        """Drawing one image in all passes, with guidance of two branches each."""
        return self.sampling_passes() * super().sampling_flops(guidance=guidance)

    def activation_bytes(self, batch: int, *, element_bytes: int = FLOAT32_BYTES) -> int:
        """An estimate, to within a third, of what a training step keeps for its backward pass.

        Beside its tokens a block keeps each image's modulation; the output layer keeps three rows of C and the patch.
        """
        block = block_bytes(self.width, 2 * self.hidden, self.heads, element_bytes)
        ends = (3 * self.width + 2 * self.outputs) * FLOAT32_BYTES
        modulation = self.depth * 8 * self.width * FLOAT32_BYTES
        return batch * (self.tokens * (self.depth * block + ends) + modulation)


class DiffusionSection(FamilySection, DiffusionSettings):
    """A diffusion transformer on the tokenizer's latents, before they are quantized; depth derives the rest."""

    family: Literal["diffusion"] = "diffusion"
    """Model family."""
    width_per_depth: Annotated[Whole, Field(ge=1, le=4096)] = 64
    """Transformer width = width_per_depth · depth."""
    head_dim: Annotated[Whole, Field(ge=1, le=4096)] = 64
    """Channels of an attention head, at least: a size has as many heads as divide its width and leave each so many."""

    description = DiTConfig

    def describe(self, tokens: TokenSpace, depth: int) -> DiTConfig:
        """The transformer of `depth` blocks.

        Raises:
            ExperimentError: The latents can't be divided into such patches, or no hidden channel; names the key.
        """
        width, side = self.width_per_depth * depth, tokens.patch_nums[-1]
        if side % self.patch_size:
            raise ExperimentError(
                f"model.patch_size: {self.patch_size} does not divide the side of the latents, {side} (the last of "
                "tokenizer.patch_nums)"
            )
        if round(width * self.mlp_ratio) < 1:
            raise ExperimentError(
                f"model.mlp_ratio: {self.mlp_ratio:g} leaves depth {depth} of width {width} no hidden channel"
            )
        heads = most_heads(width, self.head_dim)
        own = {name: getattr(self, name) for name in DiffusionSettings.model_fields}
        return DiTConfig(**tokens.model_dump(), **own, depth=depth, width=width, heads=heads)


SECTION = DiffusionSection
