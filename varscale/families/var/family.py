"""VAR as a family: next-scale prediction over the token pyramid.

Letters in tensor names: B batch, L tokens of an image, M tokens of the later scales, c latent channels.
"""

import functools
from typing import cast

import torch
from torch import Tensor

from varscale.families.base import SamplingOptions, TokenLosses
from varscale.families.models import FamilyModel, Sample
from varscale.families.shared.attention import level_of_tokens
from varscale.families.shared.family import TransformerFamily
from varscale.families.var.bits import bit_losses
from varscale.families.var.config import VARConfig
from varscale.families.var.loss_weights import LossWeights, token_weights
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

    def compared(self, model: FamilyModel, logits_BLV: Tensor, tokens_BL: Tensor) -> TokenLosses:
        """Cross-entropy of every token, in nats, with the weights of `model.loss_weights`."""
        config = cast(VAR, model).config
        by_bits = config.classifier == "bits"
        losses = bit_losses(logits_BLV, tokens_BL) if by_bits else super().compared(model, logits_BLV, tokens_BL)
        if config.loss_weights == "uniform":
            return losses
        weight_L = _weight_of_tokens(config.patch_nums, config.loss_weights, losses.loss_BL.device)
        return losses._replace(weight_L=weight_L)

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


@functools.lru_cache(maxsize=32)
def _weight_of_tokens(patch_nums: tuple[int, ...], weights: LossWeights, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        weight_K = torch.tensor(token_weights(patch_nums, weights), device="cpu")
        return weight_K[level_of_tokens(patch_nums, torch.device("cpu"))].to(device)
