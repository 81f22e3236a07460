"""Drawing images from VAR, scale after scale, with a key-value cache and classifier-free guidance.

Tian et al. 2024, section 3.2 and appendix; by default guidance grows linearly over the scales, as in the reference.

Letters in tensor names: B batch, M tokens of one scale, c latent channels, V vocabulary.
"""

import torch
from torch import Tensor

from varscale.families.base import SamplingOptions
from varscale.families.models import GivenTokens, Sample, draw, evaluating, pictures, smooth_weights
from varscale.families.shared.predictor import ScalePredictor
from varscale.families.var.bits import draw_bits
from varscale.families.var.config import VARConfig
from varscale.families.var.transformer import VAR
from varscale.numerics.precision import full_float32
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

SMOOTHED_NUMBERS = 2**22
"""Random numbers that smoothing draws at once."""


def sample_scales(
    var: VAR,
    tokenizer: MultiScaleTokenizer,
    labels_B: Tensor,
    options: SamplingOptions,
    indices_B: Tensor,
    given: GivenTokens | None = None,
) -> Sample:
    """Draw one image a label, around the tokens that are given; see `Family.sample`."""
    features_hat_BChw, tokens = sample_features(var, tokenizer, labels_B, options, indices_B, given)
    with evaluating(tokenizer):
        return Sample(pictures(tokenizer, features_hat_BChw), tokens)


def sample_features(
    var: VAR,
    tokenizer: MultiScaleTokenizer,
    labels_B: Tensor,
    options: SamplingOptions,
    indices_B: Tensor,
    given: GivenTokens | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """What `sample_scales` decodes, (B, c, h, w), and the tokens of each scale."""
    with evaluating(var, tokenizer):
        predictor = ScalePredictor(
            var, labels_B, options.guidance, schedule=options.guidance_schedule, use_cache=options.use_cache
        )
        tokens: list[Tensor] = []
        features_hat_BChw, inputs_BMc = None, None
        for k in range(len(var.config.patch_nums)):
            logits_BMV = predictor.predict(inputs_BMc)
            if options.smooth:
                tokens_BM, codes = _smoothed(logits_BMV, tokenizer, k, indices_B, options)
            else:
                tokens_BM = codes = _drawn(logits_BMV, var.config, k, indices_B, options)
            if given is not None:
                tokens_BM, codes = _with_given(tokens_BM, codes, given, k, tokenizer)
            tokens.append(tokens_BM)
            features_hat_BChw, inputs_BMc = tokenizer.quantizer.accumulate(features_hat_BChw, codes, k)
        assert features_hat_BChw is not None
        return features_hat_BChw, tokens


def _smoothed(
    logits_BMV: Tensor, tokenizer: MultiScaleTokenizer, scale: int, indices_B: Tensor, options: SamplingOptions
) -> tuple[Tensor, Tensor]:
    """The heaviest code at each place (B, M), and the mixtures (B, M, c); in parts, since each weight has its noise."""
    _, places, codes = logits_BMV.shape
    progress = scale / max(len(tokenizer.patch_nums) - 1, 1)
    tokens, mixtures = [], []
    at_once = max(1, SMOOTHED_NUMBERS // (places * codes))
    for part_BMV, part_B in zip(logits_BMV.split(at_once), indices_B.split(at_once), strict=True):
        uniform_BMV = uniform(options.seed, "smoothing", scale, part_B, places * codes).view_as(part_BMV)
        weights_BMV = smooth_weights(part_BMV, uniform_BMV, progress, **options.cut)
        tokens.append(weights_BMV.argmax(-1))
        with full_float32(weights_BMV.device):
            mixtures.append(weights_BMV @ tokenizer.quantizer.codebook(scale))
    return torch.cat(tokens), torch.cat(mixtures)


def _drawn(logits_BMV: Tensor, config: VARConfig, scale: int, indices_B: Tensor, options: SamplingOptions) -> Tensor:
    """The tokens of a scale (B, M)."""
    _, places, outputs = logits_BMV.shape
    if config.classifier == "bits":
        uniform_BMd = uniform(options.seed, "sampling", scale, indices_B, places * outputs).view_as(logits_BMV)
        return draw_bits(logits_BMV, uniform_BMd, greedy=options.top_k == 1, temperature=options.temperature)
    return draw(logits_BMV, uniform(options.seed, "sampling", scale, indices_B, places), **options.cut)


def _with_given(
    tokens_BM: Tensor, codes: Tensor, given: GivenTokens, scale: int, tokenizer: MultiScaleTokenizer
) -> tuple[Tensor, Tensor]:
    """The tokens, and what is accumulated of them, with those that stay in place of the drawn ones."""
    given_BM, kept_BM = given.tokens[scale], given.kept[scale]
    tokens_BM = torch.where(kept_BM, given_BM, tokens_BM)
    if not codes.is_floating_point():
        return tokens_BM, tokens_BM
    given_BMc = tokenizer.quantizer.codes(given_BM, scale)
    return tokens_BM, torch.where(kept_BM.unsqueeze(-1), given_BMc, codes)
