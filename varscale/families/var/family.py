"""VAR as a family: next-scale prediction over the token pyramid; and what families of such transformers share.

Letters in tensor names: B batch, D depth, L tokens of an image, M tokens of the later scales, c latent channels.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from varscale.evaluation.likelihood import token_losses
from varscale.families.base import Family, ParameterGroup, SamplingOptions, TokenLosses
from varscale.families.models import FamilyModel, Sample
from varscale.families.var.attention import loss_weight_of_tokens
from varscale.families.var.config import TransformerDescription, VARConfig
from varscale.families.var.sampling import sample_scales
from varscale.families.var.transformer import VAR, TokenTransformer
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class TransformerFamily(Family):
    """What families of transformers that predict an image's tokens map by map share."""

    @abstractmethod
    def inputs(self, model: FamilyModel, tokenizer: MultiScaleTokenizer, tokens_BL: Tensor) -> Tensor:
        """What a model is fed while it learns to predict these tokens, float32 (B, M, c)."""

    def losses(
        self, model: FamilyModel, tokenizer: MultiScaleTokenizer, batch: Mapping[str, Tensor], seed: int | None = None
    ) -> TokenLosses:
        """Cross-entropy of every token, in nats; see `Family.losses`."""
        tokens_BL, (labels_B, keep_D2B) = batch["tokens_BL"], kept_labels_and_branches(model, batch, seed)
        tokenizer.quantizer.to(tokens_BL.device)
        logits_BLV = model(labels_B, self.inputs(model, tokenizer, tokens_BL), keep_D2B=keep_D2B)
        return TokenLosses(token_losses(logits_BLV, tokens_BL), tokens_BL, logits_BLV)

    def names_without_decay(self, model: FamilyModel) -> set[str]:
        """Biases, and place, start, scale and offset tables."""
        special = ("start_MC", "position_LC", "level_KC", "log_scale_H", "modulation_offset_6C")
        return {name for name, parameter in model.named_parameters() if parameter.ndim == 1 or name.endswith(special)}

    def parameter_groups(self, model: FamilyModel) -> list[ParameterGroup]:
        """By kind: matrices from width to width, which the theory gives a rate of base width / width, and all else.

        Yang et al. 2022 (arXiv 2203.03466), table 8, and Dey et al. 2025 (arXiv 2505.01618), table 1. The projections
        of AdaLN go from the class embedding's width to the model's, so they are such matrices. AdamW's epsilon follows
        the size of the gradients. Only complete-p keeps rate · decay the same at all widths.
        """
        config, plain = cast(TokenTransformer, model).config, self.names_without_decay(model)
        if config.parametrization == "paper":
            return super().parameter_groups(model)
        wide, deep = config.growth
        groups: dict[tuple[float, float, float], list[str]] = {}
        for name, parameter in model.named_parameters():
            within = name.startswith("blocks.")
            matrix = parameter.ndim == 2 and (within or "modulation" in name) and name not in plain
            rate = 1 / wide if matrix else 1.0
            decay = 0.0 if name in plain else wide if matrix and config.parametrization == "complete-p" else 1.0
            epsilon = 1.0 if name == "head.bias" else 1 / (wide * deep) if within else 1 / wide
            groups.setdefault((rate, decay, epsilon), []).append(name)
        return [ParameterGroup(tuple(names), *factors) for factors, names in groups.items()]

    def blocks(self, model: FamilyModel) -> Sequence[nn.Module]:
        """The transformer's blocks: one compilation serves them all."""
        return list(cast(TokenTransformer, model).blocks)


class VARFamily(TransformerFamily):
    """Tian et al. 2024: every scale's tokens at once, from the coarser scales."""

    can_smooth = True

    def build(self, description: VARConfig) -> VAR:
        """The transformer."""
        return VAR(description)

    def inputs(self, model: FamilyModel, tokenizer: MultiScaleTokenizer, tokens_BL: Tensor) -> Tensor:
        """The coarser scales, summed up and resized."""
        return tokenizer.quantizer.next_scale_inputs(tokens_BL.split(model.config.groups, dim=1))

    def losses(
        self, model: FamilyModel, tokenizer: MultiScaleTokenizer, batch: Mapping[str, Tensor], seed: int | None = None
    ) -> TokenLosses:
        """Cross-entropy of every token, in nats, with the weights of `model.loss_weights`; see `Family.losses`."""
        losses, config = super().losses(model, tokenizer, batch, seed), cast(VAR, model).config
        if config.loss_weights == "uniform":
            return losses
        weight_L = loss_weight_of_tokens(config.patch_nums, config.loss_weights, losses.loss_BL.device)
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


def kept_labels_and_branches(
    model: FamilyModel, batch: Mapping[str, Tensor], seed: int | None
) -> tuple[Tensor, Tensor | None]:
    """A batch's labels, some replaced by "no class", and `TokenTransformer.forward`'s `keep_D2B`.

    Without a seed nothing is dropped.
    """
    labels_B, index_B, config = batch["labels_B"], batch["sample_index_B"], cast(TokenTransformer, model).config
    if seed is None:
        return labels_B, None
    return _dropped(labels_B, index_B, config, seed), _kept_branches(index_B, config, seed)


def _dropped(labels_B: Tensor, index_B: Tensor, config: TransformerDescription, seed: int) -> Tensor:
    """The labels, some replaced by "no class"."""
    if config.label_dropout == 0:
        return labels_B
    dropped_B = uniform(seed, "label_dropout", 0, index_B, 1)[:, 0] < config.label_dropout
    return labels_B.masked_fill(dropped_B, config.num_classes)


def _kept_branches(index_B: Tensor, config: TransformerDescription, seed: int) -> Tensor | None:
    """Stochastic depth (Huang et al. 2016): 0 or 1 / keep probability for each block, branch and sample."""
    rates = config.drop_path_rates
    if not any(rates):
        return None
    drawn_BD2 = uniform(seed, "stochastic_depth", 0, index_B, 2 * len(rates)).view(-1, len(rates), 2)
    rate_D1 = drawn_BD2.new_tensor(rates).unsqueeze(1)
    return ((drawn_BD2 >= rate_D1) / (1 - rate_D1)).permute(1, 2, 0)
