"""VAR's section of an experiment, and the description of one VAR transformer."""

from typing import Literal, Self

from pydantic import model_validator

from varscale.errors import ExperimentError
from varscale.families.base import Draws, Family, TokenSpace
from varscale.families.shared.description import TransformerDescription, TransformerSection
from varscale.families.var.classifier import Classification
from varscale.families.var.loss_weights import LossWeighting, token_weights


class VARConfig(TransformerDescription, LossWeighting, Classification):
    """One VAR transformer."""

    family: Literal["var"] = "var"
    """The family."""

    @model_validator(mode="after")
    def _check_var(self) -> Self:
        token_weights(self.patch_nums, self.loss_weights)
        self.check_classifier(self.quantizer)
        return self

    @property
    def draws(self) -> Draws:
        """What the output layer predicts."""
        return self.classifier

    @property
    def outputs(self) -> int:
        """Logits of a token: one for each token that it may be, or for each of its bits."""
        return self.latent_channels if self.classifier == "bits" else self.vocab_size

    def implementation(self) -> Family:
        """VAR's part that needs torch."""
        from varscale.families.var.family import VARFamily

        return VARFamily()


class VARSection(TransformerSection, LossWeighting, Classification):
    """The VAR transformer."""

    family: Literal["var"] = "var"
    """Model family."""

    description = VARConfig

    @property
    def draws(self) -> Draws:
        """What the output layer predicts."""
        return self.classifier

    def describe(self, tokens: TokenSpace, depth: int) -> TransformerDescription:
        """The transformer of `depth` blocks.

        Raises:
            ExperimentError: What `TransformerSection.describe` refuses, weights of other scales, or bits of tokens that
                have none; names the key.
        """
        checks = {
            "loss_weights": lambda: token_weights(tokens.patch_nums, self.loss_weights),
            "classifier": lambda: self.check_classifier(tokens.quantizer),
        }
        for key, check in checks.items():
            try:
                check()
            except ValueError as error:
                raise ExperimentError(f"model.{key}: {error}") from None
        return super().describe(tokens, depth)


SECTION = VARSection
