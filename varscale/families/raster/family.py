"""Next-token prediction in raster order, row by row (VQGAN, Esser et al. 2021, section 3.2; LlamaGen, Sun et al. 2024).

It is VAR's transformer with a map for each token: the class is the first input, and every other input is the code of
the token before. So attention is causal, and the key-value cache grows by one token a pass.

Letters in tensor names: B batch, L tokens of an image, V vocabulary, c latent channels.
"""

from typing import cast

import torch
from torch import Tensor

from varscale.families.base import SamplingOptions
from varscale.families.models import FamilyModel, Sample, draw, evaluating, pictures
from varscale.families.raster.config import RasterConfig
from varscale.families.shared.family import TransformerFamily
from varscale.families.shared.predictor import ScalePredictor
from varscale.families.shared.transformer import TokenTransformer
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class RasterTransformer(TokenTransformer):
    """Predicts each token from those before it."""

    config: RasterConfig


class RasterFamily(TransformerFamily):
    """One token a pass, from the upper left to the lower right."""

    def build(self, description: RasterConfig) -> RasterTransformer:
        """The transformer."""
        return RasterTransformer(description)

    def inputs(self, model: FamilyModel, tokenizer: MultiScaleTokenizer, tokens_BL: Tensor) -> Tensor:
        """The codes of all tokens but the last."""
        return tokenizer.quantizer.codes(tokens_BL[:, :-1], 0)

    def sample(
        self,
        model: FamilyModel,
        tokenizer: MultiScaleTokenizer,
        labels_B: Tensor,
        options: SamplingOptions,
        sample_indices_B: Tensor,
    ) -> Sample:
        """Token after token, with the same guidance at all of them; see `Family.sample`."""
        transformer = cast(RasterTransformer, model)
        uniform_BL = uniform(options.seed, "sampling", 0, sample_indices_B, transformer.config.tokens)
        with evaluating(model, tokenizer):
            predictor = token_predictor(transformer, labels_B, options.guidance, use_cache=options.use_cache)
            drawn: list[Tensor] = []
            inputs_B1c = None
            for uniform_B1 in uniform_BL.split(1, dim=1):
                drawn.append(draw(predictor.predict(inputs_B1c), uniform_B1, **options.cut))
                inputs_B1c = tokenizer.quantizer.codes(drawn[-1], 0)
            tokens_BL = torch.cat(drawn, dim=1)
            return Sample(pictures(tokenizer, tokenizer.quantizer.decode_features([tokens_BL])), [tokens_BL])


def token_predictor(
    transformer: RasterTransformer, labels_B: Tensor, guidance: float, *, use_cache: bool = True
) -> ScalePredictor:
    """The guided logits of one token after the other."""
    return ScalePredictor(transformer, labels_B, guidance, schedule="constant", use_cache=use_cache)
