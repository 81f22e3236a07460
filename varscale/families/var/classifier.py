"""What VAR predicts of bitwise tokens: each token, or each of its bits by itself. The part without torch.

Han et al. 2024, "Infinity" (arXiv 2412.04431), section 3.3, the infinite-vocabulary classifier.
"""

from typing import Annotated, Literal

from pydantic import Field

from varscale.config.section import Quantizer, Section

Classifier = Literal["tokens", "bits"]


class Classification(Section):
    """What an experiment states of the output layer, and the model's description keeps."""

    # left out of what is written down where it is `tokens`: fingerprints from before there was a choice stay valid
    classifier: Annotated[Classifier, Field(exclude_if=lambda classifier: classifier == "tokens")] = "tokens"
    """`tokens`: a logit for each of the vocab_size tokens. `bits`, of bitwise tokenizers: a logit for each bit of a
    token, all at once, so that the output layer has latent_channels rows."""

    def check_classifier(self, quantizer: Quantizer) -> None:
        """Raise a ValueError where tokens have no bits."""
        if self.classifier == "bits" and quantizer != "bitwise":
            raise ValueError(
                f"bits, but the tokens are of the quantizer {quantizer}: set tokenizer.quantizer to bitwise"
            )
