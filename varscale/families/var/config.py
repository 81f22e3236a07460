"""VAR's section of an experiment, and the description of one VAR transformer."""

from typing import Literal, Self

from pydantic import model_validator

from varscale.errors import ExperimentError
from varscale.families.base import Family, TokenSpace
from varscale.families.shared.description import TransformerDescription, TransformerSection
from varscale.families.var.loss_weights import LossWeighting, token_weights


class VARConfig(TransformerDescription, LossWeighting):
    """One VAR transformer."""

    family: Literal["var"] = "var"
    """The family."""

    @model_validator(mode="after")
    def _check_loss_weights(self) -> Self:
        token_weights(self.patch_nums, self.loss_weights)
        return self

    def implementation(self) -> Family:
        """VAR's part that needs torch."""
        from varscale.families.var.family import VARFamily

        return VARFamily()


class VARSection(TransformerSection, LossWeighting):
    """The VAR transformer."""

    family: Literal["var"] = "var"
    """Model family."""

    description = VARConfig

    def describe(self, tokens: TokenSpace, depth: int) -> TransformerDescription:
        """The transformer of `depth` blocks.

        Raises:
            ExperimentError: What `TransformerSection.describe` refuses, or weights of other scales; names the key.
        """
        try:
            token_weights(tokens.patch_nums, self.loss_weights)
        except ValueError as error:
            raise ExperimentError(f"model.loss_weights: {error}") from None
        return super().describe(tokens, depth)


SECTION = VARSection
