"""MaskGIT: masked tokens are predicted all at once from the others (Chang et al. 2022, arXiv 2202.04200).

It is VAR's transformer with one map of all tokens: where a token is masked its input is the class and the place's own
vector, elsewhere the token's code; attention is bidirectional.

Letters in tensor names: B batch, L tokens of an image, D depth, V vocabulary, C width, c latent channels.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from varscale.evaluation.likelihood import token_losses
from varscale.families.base import EVALUATION_SEED, SamplingOptions, TokenLosses
from varscale.families.masked.config import MaskedConfig
from varscale.families.models import FamilyModel, Sample, draw, evaluating, pictures, with_unconditional
from varscale.families.shared.family import TransformerFamily, kept_labels_and_branches
from varscale.families.shared.transformer import TokenTransformer
from varscale.numerics.randomness import evenly_spread, gumbel, uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class MaskedTransformer(TokenTransformer):
    """Predicts masked tokens from those that are not."""

    config: MaskedConfig

    def forward(
        self,
        labels_B: Tensor,
        inputs_BMc: Tensor,
        *,
        keep_D2B: Tensor | None = None,
        masked_BL: Tensor | None = None,
        guidance: float = 0.0,
    ) -> Tensor:
        """Logits (B, L, V) of all tokens, float32.

        Args:
            labels_B: See `TokenTransformer.forward`.
            inputs_BMc: Codes of all tokens (B, L, c); those of masked ones don't matter.
            keep_D2B: See `TokenTransformer.forward`.
            masked_BL: bool; None: all.
            guidance: See `TokenTransformer.logits`; above 0, the branch without class is computed, too.
        """
        batch = len(labels_B)
        if guidance:
            labels_B = with_unconditional(labels_B, self.config)
        condition_BC, modulation = self.condition(labels_B)
        x_BLC, known_BLC = self.first_input(condition_BC), self.embed(inputs_BMc)
        if masked_BL is not None:
            branches = len(labels_B) // batch
            x_BLC = torch.where(masked_BL.repeat(branches, 1).unsqueeze(2), x_BLC, known_BLC.repeat(branches, 1, 1))
        x_BLC = x_BLC + self.place_embedding(0, x_BLC.shape[1])
        return self.logits(self.transform(x_BLC, modulation, keep_D2B=keep_D2B), condition_BC, guidance=guidance)


class MaskedFamily(TransformerFamily):
    """All tokens in a few passes, the most confident ones first. It has no likelihood."""

    has_likelihood = False
    can_choose_steps = True

    def build(self, description: MaskedConfig) -> MaskedTransformer:
        """The transformer."""
        return MaskedTransformer(description)

    def inputs(self, model: FamilyModel, tokenizer: MultiScaleTokenizer, tokens_BL: Tensor) -> Tensor:
        """The codes of all tokens."""
        return tokenizer.quantizer.codes(tokens_BL, 0)

    def losses(
        self, model: FamilyModel, tokenizer: MultiScaleTokenizer, batch: Mapping[str, Tensor], seed: int | None = None
    ) -> TokenLosses:
        """Cross-entropy of masked tokens over the share of tokens that are masked on average, 0 of the others.

        So the mean over all tokens of many images is that over the masked ones, in nats, as in the paper (equation 1).
        """
        tokens_BL, (labels_B, keep_D2B) = batch["tokens_BL"], kept_labels_and_branches(model, batch, seed)
        tokenizer.quantizer.to(tokens_BL.device)
        config = cast(MaskedTransformer, model).config
        masked_BL = training_masks(config.tokens, batch["sample_index_B"], EVALUATION_SEED if seed is None else seed)
        inputs_BLc = self.inputs(model, tokenizer, tokens_BL)
        logits_BLV = model(labels_B, inputs_BLc, keep_D2B=keep_D2B, masked_BL=masked_BL)
        return TokenLosses(token_losses(logits_BLV, tokens_BL) * (masked_BL / config.masked_share))

    def sample(
        self,
        model: FamilyModel,
        tokenizer: MultiScaleTokenizer,
        labels_B: Tensor,
        options: SamplingOptions,
        sample_indices_B: Tensor,
    ) -> Sample:
        """Pass after pass; guidance grows over them as over VAR's scales. See `Family.sample`.

        Of the tokens drawn in a pass the most confident stay (section 3.2): the logarithm of a token's probability plus
        Gumbel noise, which falls to nothing, as in google-research/maskgit.
        """
        transformer = cast(MaskedTransformer, model)
        config = transformer.config
        counts = config.masked_counts(options.steps)
        tokens_BL = torch.zeros(len(labels_B), config.tokens, dtype=torch.int64, device=labels_B.device)
        masked_BL = torch.ones_like(tokens_BL, dtype=torch.bool)

        def random(stream: str, step: int) -> Tensor:
            return uniform(options.seed, stream, step, sample_indices_B, config.tokens)

        with evaluating(model, tokenizer):
            for step, following in enumerate((*counts[1:], 0)):
                inputs_BLc, guidance = tokenizer.quantizer.codes(tokens_BL, 0), options.guidance_at(step, len(counts))
                logits_BLV = transformer(labels_B, inputs_BLc, masked_BL=masked_BL, guidance=guidance)
                drawn_BL = draw(logits_BLV, random("sampling", step), **options.cut)
                tokens_BL = torch.where(masked_BL, drawn_BL, tokens_BL)
                noise = config.confidence_temperature * (1 - (step + 1) / len(counts))
                log_share_BL = logits_BLV.log_softmax(-1).gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)
                confidence_BL = (log_share_BL + noise * gumbel(random("confidence", step))).masked_fill(
                    ~masked_BL, torch.inf
                )
                masked_BL = _rank(confidence_BL) < following
            return Sample(pictures(tokenizer, tokenizer.quantizer.decode_features([tokens_BL])), [tokens_BL])


def training_masks(tokens: int, index_B: Tensor, seed: int) -> Tensor:
    """Which of an image's tokens are masked, bool (B, L): ⌈L·cos(πu/2)⌉ of them, at random places.

    u is uniform in [0, 1) and, over samples that follow each other, evenly spread, so that batches differ less.
    """
    start = float(uniform(seed, "masked_share", 0, torch.zeros(1, dtype=torch.int64), 1)[0, 0])
    count_B = (tokens * torch.cos(math.pi / 2 * evenly_spread(index_B, start))).ceil()
    return _rank(uniform(seed, "masked_places", 0, index_B, tokens)) < count_B.unsqueeze(1)


def _rank(values_BL: Tensor) -> Tensor:
    """Place of each value among those of its image, from 0 for the smallest."""
    return values_BL.argsort(dim=1, stable=True).argsort(dim=1)
