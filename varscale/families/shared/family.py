"""What families of transformers that predict an image's tokens map by map share.

Letters in tensor names: B batch, D depth, L tokens of an image, M tokens of the later scales, c latent channels.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from varscale.evaluation.likelihood import token_losses
from varscale.families.base import Family, ParameterGroup, TokenLosses
from varscale.families.models import FamilyModel, labels_after_dropout, labels_of
from varscale.families.shared.description import TransformerDescription
from varscale.families.shared.transformer import TokenTransformer
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class TransformerFamily(Family):
    """How such transformers learn, and which of their parameters are treated alike."""

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
        return self.compared(model, logits_BLV, tokens_BL)

    def compared(self, model: FamilyModel, logits_BLV: Tensor, tokens_BL: Tensor) -> TokenLosses:
        """What a model's outputs say of the true tokens."""
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


def kept_labels_and_branches(
    model: FamilyModel, batch: Mapping[str, Tensor], seed: int | None
) -> tuple[Tensor, Tensor | None]:
    """A batch's labels, some replaced by "no class", and `TokenTransformer.forward`'s `keep_D2B`.

    Without a seed nothing is dropped.
    """
    config = cast(TokenTransformer, model).config
    if seed is None:
        return labels_of(batch, config), None
    labels_B = labels_after_dropout(batch, config.label_dropout, config, seed)
    return labels_B, _kept_branches(batch["sample_index_B"], config, seed)


def _kept_branches(index_B: Tensor, config: TransformerDescription, seed: int) -> Tensor | None:
    """Stochastic depth (Huang et al. 2016): 0 or 1 / keep probability for each block, branch and sample."""
    rates = config.drop_path_rates
    if not any(rates):
        return None
    drawn_BD2 = uniform(seed, "stochastic_depth", 0, index_B, 2 * len(rates)).view(-1, len(rates), 2)
    rate_D1 = drawn_BD2.new_tensor(rates).unsqueeze(1)
    return ((drawn_BD2 >= rate_D1) / (1 - rate_D1)).permute(1, 2, 0)
