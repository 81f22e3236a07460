"""The least family that there can be: each token's distribution from its position and the image's class alone.

It is defined here and registered by a test, which shows that a family needs no change elsewhere.

Letters: B batch, L tokens of an image, C width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.config import Experiment
from varscale.config.section import Fraction
from varscale.evaluation.likelihood import token_losses
from varscale.families.base import (
    FAMILY_KINDS,
    FLOAT32_BYTES,
    Family,
    FamilySection,
    ModelDescription,
    SamplingOptions,
    Size,
    TokenLosses,
    TokenSpace,
)
from varscale.families.models import (
    FamilyModel,
    Sample,
    condition_embedding,
    draw,
    evaluating,
    labels_after_dropout,
    labels_of,
)
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class TinyDescription(ModelDescription):
    family: Literal["tiny"] = "tiny"
    width: Size
    label_dropout: Fraction = 0.1

    def implementation(self) -> Family:
        return TinyFamily()

    def parameters(self) -> int:
        return self.active_parameters() + (self.condition_rows + self.tokens) * self.width

    def active_parameters(self, *, head: bool = True) -> int:
        blocks = self.depth * (self.width + 1) * self.width
        return blocks + ((self.width + 1) * self.vocab_size if head else 0)

    def forward_flops(self) -> int:
        products = 2 * self.tokens * self.width * (self.depth * self.width + self.vocab_size)
        return products + self.condition_flops(self.width)

    def executed_forward_flops(self) -> int:
        return self.forward_flops()

    def activation_bytes(self, batch: int, *, element_bytes: int = FLOAT32_BYTES) -> int:
        rows = (2 * self.depth + 1) * self.width * element_bytes + self.vocab_size * FLOAT32_BYTES
        return batch * self.tokens * rows

    def columns(self) -> dict[str, int]:
        return {"width": self.width}


class TinySection(FamilySection):
    family: Literal["tiny"] = "tiny"
    width: Size = 16
    description = TinyDescription

    def describe(self, tokens: TokenSpace, depth: int) -> TinyDescription:
        return TinyDescription(**tokens.model_dump(), depth=depth, width=self.width)


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return x_BLC + F.gelu(self.linear(x_BLC))


class TinyModel(FamilyModel):
    def __init__(self, config: TinyDescription) -> None:
        super().__init__()
        self.config: TinyDescription = config
        self.classes = condition_embedding(config, config.width)
        self.position_LC = nn.Parameter(torch.randn(config.tokens, config.width))
        self.blocks = nn.ModuleList(TinyBlock(config.width) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head.bias.zero_()

    def forward(self, labels_B: Tensor) -> Tensor:
        x_BLC = self.classes(labels_B).unsqueeze(1) + self.position_LC
        for block in self.blocks:
            x_BLC = block(x_BLC)
        logits_BLV: Tensor = self.head(x_BLC)
        return logits_BLV.float()


class TinyFamily(Family):
    def build(self, description: TinyDescription) -> TinyModel:
        return TinyModel(description)

    def losses(
        self, model: FamilyModel, tokenizer: MultiScaleTokenizer, batch: Mapping[str, Tensor], seed: int | None = None
    ) -> TokenLosses:
        labels_B, config = labels_of(batch, model.config), model.config
        assert isinstance(config, TinyDescription)
        if seed is not None:
            labels_B = labels_after_dropout(batch, config.label_dropout, config, seed)
        logits_BLV = model(labels_B)
        return TokenLosses(token_losses(logits_BLV, batch["tokens_BL"]), batch["tokens_BL"], logits_BLV)

    def sample(
        self,
        model: FamilyModel,
        tokenizer: MultiScaleTokenizer,
        labels_B: Tensor,
        options: SamplingOptions,
        sample_indices_B: Tensor,
    ) -> Sample:
        with evaluating(model, tokenizer):
            uniform_BL = uniform(options.seed, "sampling", 0, sample_indices_B, model.config.tokens)
            tokens_BL = draw(model(labels_B), uniform_BL, **options.cut)
            tokens = list(tokens_BL.split(model.config.groups, dim=1))
            return Sample((tokenizer.decode(tokens) + 1) / 2, tokens)

    def names_without_decay(self, model: FamilyModel) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.ndim == 1 or name == "position_LC"}

    def blocks(self, model: FamilyModel) -> Sequence[nn.Module]:
        assert isinstance(model, TinyModel)
        return list(model.blocks)


@contextmanager
def tiny_registered() -> Iterator[None]:
    """Within it experiments may say `model: {family: tiny}`."""
    FAMILY_KINDS.add(TinySection)
    Experiment.model_rebuild(force=True)
    try:
        yield
    finally:
        del FAMILY_KINDS.sections["tiny"]
        Experiment.model_rebuild(force=True)


TINY_CHANGES: dict[str, dict[str, Any]] = {"plain": {}, "deep": {"depth": 5}, "one scale": {"patch_nums": (3,)}}
