"""VAR as a family: next-scale prediction over the token pyramid.

Letters in tensor names: B batch, L tokens of an image, M tokens of the later scales, c latent channels.
"""

from typing import cast

from torch import Tensor

from varscale.families.base import SamplingOptions
from varscale.families.models import FamilyModel, Sample
from varscale.families.shared.family import TransformerFamily
from varscale.families.var.config import VARConfig
from varscale.families.var.sampling import sample_scales
from varscale.families.var.transformer import VAR
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class VARFamily(TransformerFamily):
    """Tian et al. 2024: every scale's tokens at once, from the coarser scales."""

    can_smooth = True

    def build(self, description: VARConfig) -> VAR:
        """The transformer."""
        return VAR(description)

    def inputs(self, model: FamilyModel, tokenizer: MultiScaleTokenizer, tokens_BL: Tensor) -> Tensor:
        """The coarser scales, summed up and resized."""
        return tokenizer.quantizer.next_scale_inputs(tokens_BL.split(model.config.groups, dim=1))

    def sample(
        self,
        model: FamilyModel,
        tokenizer: MultiScaleTokenizer,
        labels_B: Tensor,
        options: SamplingOptions,
        sample_indices_B: Tensor,
    ) -> Sample:
        """Scale after scale; see `Family.sample`."""
        return sample_scales(cast(VAR, model), tokenizer, labels_B, options, sample_indices_B)
