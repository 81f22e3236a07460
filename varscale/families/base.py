"""What a family of models gives; cells, plan, trunks, accounting, storage and sampling know nothing else of it.

A family is a folder `varscale/families/<name>/`. Its `config.py` is light (no torch) and defines `SECTION`, the section
`model: {family: <name>, …}` of an experiment. From the section and a size comes a `ModelDescription`, one frozen object
that goes from the settings into accounting, model, file and fingerprint. What needs torch is a `Family`, which the
description gives.

Letters in tensor names: B batch, L tokens of an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypedDict, get_args

from pydantic import Field

from varscale.config.kinds import Kinds
from varscale.config.section import GuidanceSchedule, Quantizer, Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from varscale.families.models import FamilyModel, Sample
    from varscale.tokenizer.autoencoder import MultiScaleTokenizer

FLOAT32_BYTES = 4
TRAINING_COPIES = 4
"""Of the weights during training: weights, gradients and AdamW's two moments."""

EVALUATION_SEED = 0
"""Of the masks or the noise that models without a likelihood are measured with: the same for all."""

LARGEST = 1e6
"""Guidance, and temperature or its inverse, at most: logits times more than that are infinite."""

Size = Annotated[int, Field(ge=1, le=2**40)]
Reads = Literal["pyramid", "scale", "latents"]
"""What a model reads: the tokens of all scales, the tokens of one scale, or the latents before quantization."""


Draws = Literal["tokens", "bits", "latents"]
"""What a model chooses when it draws an image: each token, each bit of a token by itself, or numbers, not a choice."""


class TokenSpace(Section):
    """What the tokens of a study are: a model's inputs and outputs."""

    patch_nums: tuple[Size, ...]
    """Side of each scale's token map, strictly growing."""
    vocab_size: Size
    """Number of codes V of the tokenizer."""
    latent_channels: Size
    """Channels c of its latents."""
    # left out of what is written down where it is `codebook`: fingerprints from before there was a choice stay valid
    quantizer: Annotated[Quantizer, Field(exclude_if=lambda quantizer: quantizer == "codebook")] = "codebook"
    """What made them; a token of `bitwise` is latent_channels bits."""
    num_classes: Size
    """Classes 0 … num_classes - 1; the label num_classes stands for "no class"."""
    text_width: Annotated[Size | None, Field(exclude_if=lambda width: width is None)] = None
    """Numbers D of a caption's embedding, for models that are told captions; None: they are told classes."""

    @property
    def tokens(self) -> int:
        """L, the tokens of an image over all scales."""
        return sum(side**2 for side in self.patch_nums)

    @property
    def condition_rows(self) -> int:
        """Rows of the table of classes, "no class" among them, or of the projection of captions with its bias."""
        return self.num_classes + 1 if self.text_width is None else self.text_width + 1

    def condition_flops(self, width: int) -> int:
        """Of an image's caption, projected to the width; a class is looked up."""
        return 2 * width * (self.text_width or 0)


class ModelDescription(TokenSpace, ABC):
    """Everything that a model is built from, and what follows from these numbers alone."""

    family: str
    """The family's name."""
    depth: Size
    """The size: the number of blocks. All other sizes follow from it within a study."""
    reads: ClassVar[Reads] = "pyramid"
    """What the models read, and so what a study stores of its images."""

    @property
    def draws(self) -> Draws:
        """What the models choose when they draw."""
        return "latents" if self.reads == "latents" else "tokens"

    @abstractmethod
    def implementation(self) -> "Family":
        """The family's part that needs torch, imported now."""

    @abstractmethod
    def parameters(self) -> int:
        """All trainable parameters."""

    @abstractmethod
    def active_parameters(self, *, head: bool = True) -> int:
        """Parameters that take part in the computation of every token, with or without the output layer's."""

    @abstractmethod
    def forward_flops(self) -> int:
        """One training pass of one image, 2 × multiply-adds of all matrix products, with all pairs of tokens."""

    @abstractmethod
    def executed_forward_flops(self) -> int:
        """The same with only the pairs that the fastest kernel computes; for utilisation."""

    def sampling_flops(self, *, guidance: bool = True) -> int:
        """Drawing one image's tokens, at the least one pass of all of them, and with guidance one without class."""
        return (2 if guidance else 1) * self.forward_flops()

    def sampling_passes(self) -> int:
        """Times that the model runs to draw an image: once a scale, unless the family draws otherwise."""
        return len(self.patch_nums)

    def sampling_calls(self) -> int:
        """Times that a block is called for it: for a batch as often as for one image."""
        return self.sampling_passes() * self.depth

    @abstractmethod
    def activation_bytes(self, batch: int, *, element_bytes: int = FLOAT32_BYTES) -> int:
        """An estimate, to within a third, of what a training step of so many images keeps for its backward pass.

        The inputs of products have 4 bytes, or 2 under bfloat16.
        """

    @abstractmethod
    def columns(self) -> dict[str, int]:
        """What the runs table says of the model beside depth and parameters, such as its width."""

    @property
    def groups(self) -> tuple[int, ...]:
        """How the L tokens fall into groups whose losses are reported apart: the scales."""
        return tuple(side**2 for side in self.patch_nums)

    @property
    def loss_unit(self) -> str:
        """What the loss is measured in, for people; losses of different units don't compare."""
        return "nats a token"

    @property
    def outputs(self) -> int:
        """Numbers that the output layer gives for each token: the logits."""
        return self.vocab_size

    def training_flops(self) -> int:
        """Forward and backward pass of one image: 3 × forward."""
        return 3 * self.forward_flops()

    def executed_training_flops(self) -> int:
        """Forward and backward pass of one image as it is computed: 3 × the executed forward pass."""
        return 3 * self.executed_forward_flops()

    def training_state_bytes(self) -> int:
        """Float32 weights, gradients and AdamW's two moments."""
        return self.parameters() * TRAINING_COPIES * FLOAT32_BYTES

    def checkpoint_bytes(self) -> int:
        """Of a checkpoint that training goes on from: float32 weights and AdamW's two moments."""
        return self.parameters() * (TRAINING_COPIES - 1) * FLOAT32_BYTES

    def weights_bytes(self) -> int:
        """Of the float32 weights alone."""
        return self.parameters() * FLOAT32_BYTES


class FamilySection(Section, ABC):
    """The section `model` of an experiment: what all families have."""

    family: Annotated[str, Field(max_length=100)]
    """Name of the family."""
    condition: Annotated[Literal["class", "text"], Field(exclude_if=lambda value: value == "class")] = "class"
    """What models are told of an image: its class, or its caption, as `data.captions` says."""
    description: ClassVar[type[ModelDescription]]
    """What `describe` gives; a model's file is read back into it."""

    @property
    def draws(self) -> Draws:
        """What the models choose when they draw; as their description says."""
        return "latents" if self.description.reads == "latents" else "tokens"

    @abstractmethod
    def describe(self, tokens: TokenSpace, depth: int) -> ModelDescription:
        """The model of a size.

        Raises:
            ExperimentError: The settings make no model of this size; names the key.
        """


def block_bytes(width: int, hidden: int, heads: int, element_bytes: int) -> int:
    """What a block with AdaLN keeps of each token for its backward pass, roughly.

    Twelve rows of C (stream, normalised, modulated and branch twice, joint queries, keys and values, attention's
    output), of which six stay float32 under bfloat16 (stream, normalised, queries and keys), when there are copies,
    too: 10 rows of 2 bytes. And `hidden` numbers of the feed-forward layers, and one a head.
    """
    rows = 12 * FLOAT32_BYTES if element_bytes == FLOAT32_BYTES else 6 * FLOAT32_BYTES + 10 * element_bytes
    return rows * width + hidden * element_bytes + heads * FLOAT32_BYTES


def most_heads(width: int, channels: int) -> int:
    """Attention heads of at least so many channels each that divide the width; one where there is no room for two."""
    return max((count for count in range(1, width // channels + 1) if width % count == 0), default=1)


FAMILY_KINDS: Kinds[FamilySection] = Kinds("family", "varscale.families", default="var")
"""The families that there are."""


class TokenLosses(NamedTuple):
    """What a model says of a batch."""

    loss_BL: "Tensor"
    """Loss of each token, float32; nats for a family with a likelihood, otherwise what the family says."""
    tokens_BL: "Tensor | None" = None
    """The true tokens; None without a likelihood."""
    logits_BLV: "Tensor | None" = None
    """The logits; None without a likelihood."""
    weight_L: "Tensor | None" = None
    """How much the token at each place counts in the training loss, 1 on average; None: all alike."""

    @property
    def objective(self) -> "Tensor":
        """The training loss, a scalar: the mean over all tokens, weighted where there are weights."""
        return self.loss_BL.mean() if self.weight_L is None else (self.loss_BL * self.weight_L).mean()

    @property
    def wrong(self) -> "Tensor":
        """Whether the likeliest token is another one, (B, L)."""
        assert self.logits_BLV is not None, "only a family with a likelihood predicts tokens"
        assert self.tokens_BL is not None
        return self.logits_BLV.detach().argmax(-1).ne(self.tokens_BL)


def cut_without_meaning(draws: Draws, top_k: int, top_p: float) -> str:
    """Why models that choose so have no use for such a cut; "" where they have."""
    if draws == "latents" and (top_k or top_p):
        return "they choose no tokens"
    if draws == "bits" and (top_k > 1 or top_p):
        return "they choose each bit of a token by itself; beside all, only top_k 1 has a meaning, the likeliest"
    return ""


class Cut(TypedDict):
    """Arguments of `varscale.families.models.draw`."""

    top_k: int
    top_p: float
    temperature: float


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn."""

    guidance: float = 1.5
    """Classifier-free guidance at the last scale; 0 samples without."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all, 1 is greedy."""
    top_p: float = 0.0
    """Keep the likeliest tokens that together have this probability; 0 keeps all."""
    seed: int = 0
    """Of the noise."""
    use_cache: bool = True
    """Keep keys and values of earlier tokens, where the family has such a cache."""
    guidance_schedule: GuidanceSchedule = "ramp"
    """How guidance depends on the scale, where a family has scales."""
    temperature: float = 1.0
    """What logits are divided by before tokens are chosen."""
    smooth: bool = False
    """Mix codes by Gumbel noise instead of choosing one (the reference's `more_smooth`); for pictures, not measures."""
    steps: int = 0
    """Steps of the sampler, where a family's number of passes can be chosen; 0: as the model's settings say."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance <= LARGEST:
            raise ValueError(f"guidance (cfg) must be finite and at least 0, not {self.guidance}; at most {LARGEST:g}")
        if self.guidance_schedule not in get_args(GuidanceSchedule):
            raise ValueError(f"the guidance schedule must be ramp or constant, not {self.guidance_schedule}")
        if not 1 / LARGEST <= self.temperature <= LARGEST:
            raise ValueError(
                f"temperature must be finite and above 0, not {self.temperature}; from {1 / LARGEST:g} to {LARGEST:g}"
            )
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_k must be at least 0 and top_p in [0, 1], not {self.top_k} and {self.top_p}")
        if not 0 <= self.steps <= LARGEST:
            raise ValueError(f"steps must be at least 0, not {self.steps}; at most {LARGEST:g}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 up, not {self.seed}")

    @property
    def cut(self) -> Cut:
        """Which tokens may be drawn, and how likely: what `varscale.families.models.draw` takes."""
        return {"top_k": self.top_k, "top_p": self.top_p, "temperature": self.temperature}

    def guidance_at(self, scale: int, scales: int) -> float:
        """Guidance at one of so many scales."""
        return self.guidance if self.guidance_schedule == "constant" else self.guidance * scale / max(scales - 1, 1)


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike, with factors on what the experiment says."""

    names: tuple[str, ...]
    rate: float = 1.0
    """On the learning rate."""
    decay: float = 1.0
    """On the weight decay; 0: none."""
    epsilon: float = 1.0
    """On AdamW's epsilon."""


class Family(ABC):
    """What a family does with its models. It has no state: models are ordinary modules with an attribute `config`."""

    has_likelihood: ClassVar[bool] = True
    can_smooth: ClassVar[bool] = False
    """Whether `SamplingOptions.smooth` has a meaning."""
    can_choose_steps: ClassVar[bool] = False
    """Whether `SamplingOptions.steps` has a meaning."""

    @abstractmethod
    def build(self, description: Any) -> "FamilyModel":
        """A model, initialised with torch's random numbers."""

    @abstractmethod
    def losses(
        self,
        model: "FamilyModel",
        tokenizer: "MultiScaleTokenizer",
        batch: "Mapping[str, Tensor]",
        seed: int | None = None,
    ) -> TokenLosses:
        """The loss of every token of a batch: the training loss is the mean over all of them, or weighted.

        Args:
            model: From `build`.
            tokenizer: The frozen tokenizer whose tokens these are.
            batch: `tokens_BL` (or `latents_BChw`, where models read latents) and `labels_B` (with `text_BD` instead for
                models that are told captions: float32, zeros for "no caption"), and `sample_index_B`, each
                sample's number in the whole run.
            seed: Of label dropout, stochastic depth and the like, which depend on (seed, sample index) alone; None:
                an evaluation, without any of them.
        """

    @abstractmethod
    def sample(
        self,
        model: "FamilyModel",
        tokenizer: "MultiScaleTokenizer",
        labels_B: "Tensor",
        options: SamplingOptions,
        sample_indices_B: "Tensor",
    ) -> "Sample":
        """Draw one image a label. An image depends on its label, the seed and its own index alone (to rounding).

        Args:
            model: From `build`.
            tokenizer: The tokenizer whose tokens it was trained on.
            labels_B: int64, each 0 … num_classes; num_classes stands for "no class". For models that are told captions,
                their embeddings instead: float32 (B, D), zeros for "no caption".
            options: How.
            sample_indices_B: int64, each image's number for the noise.
        """

    @abstractmethod
    def names_without_decay(self, model: "FamilyModel") -> set[str]:
        """Names of the parameters that weight decay leaves alone."""

    def parameter_groups(self, model: "FamilyModel") -> "list[ParameterGroup]":
        """All parameters by how the optimizer treats them; with one rate, unless a family scales it with the size."""
        plain, names = self.names_without_decay(model), [name for name, _ in model.named_parameters()]
        decayed, others = (tuple(name for name in names if (name in plain) is without) for without in (False, True))
        return [ParameterGroup(decayed), ParameterGroup(others, decay=0.0)]

    @abstractmethod
    def blocks(self, model: "FamilyModel") -> "Sequence[nn.Module]":
        """The parts that follow each other and are alike: each is compiled, and sharded over devices, by itself."""
