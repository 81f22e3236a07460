"""VAR as a family: next-scale prediction over the token pyramid.

Letters in tensor names: B batch, D depth, L tokens of an image, M tokens of the later scales, c latent channels.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from varscale.evaluation.likelihood import token_losses
from varscale.families.base import Family, ParameterGroup, SamplingOptions, TokenLosses
from varscale.families.models import FamilyModel, Sample
from varscale.families.var.config import VARConfig
from varscale.families.var.sampling import sample_scales
from varscale.families.var.transformer import VAR
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class VARFamily(Family):
    """Tian et al. 2024: every scale's tokens at once, from the coarser scales."""

    can_smooth = True

    def build(self, description: VARConfig) -> VAR:
        """The transformer."""
        return VAR(description)

    def losses(
        self, model: FamilyModel, tokenizer: MultiScaleTokenizer, batch: Mapping[str, Tensor], seed: int | None = None
    ) -> TokenLosses:
        """Cross-entropy of every token, in nats; see `Family.losses`."""
        var, tokens_BL, labels_B = _var(model), batch["tokens_BL"], batch["labels_B"]
        quantizer = tokenizer.quantizer.to(tokens_BL.device)
        inputs_BMc = quantizer.next_scale_inputs(tokens_BL.split(var.config.groups, dim=1))
        keep_D2B = None
        if seed is not None:
            labels_B = _dropped(labels_B, batch["sample_index_B"], var.config, seed)
            keep_D2B = _kept_branches(batch["sample_index_B"], var.config, seed)
        logits_BLV = var(labels_B, inputs_BMc, keep_D2B=keep_D2B)
        return TokenLosses(token_losses(logits_BLV, tokens_BL), tokens_BL, logits_BLV)

    def sample(
        self,
        model: FamilyModel,
        tokenizer: MultiScaleTokenizer,
        labels_B: Tensor,
        options: SamplingOptions,
        sample_indices_B: Tensor,
    ) -> Sample:
        """Scale after scale; see `Family.sample`."""
        return sample_scales(_var(model), tokenizer, labels_B, options, sample_indices_B)

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
        config, plain = _var(model).config, self.names_without_decay(model)
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
        return list(_var(model).blocks)


def _var(model: FamilyModel) -> VAR:
    return cast(VAR, model)


def _dropped(labels_B: Tensor, index_B: Tensor, config: VARConfig, seed: int) -> Tensor:
    """The labels, some replaced by "no class"."""
    if config.label_dropout == 0:
        return labels_B
    dropped_B = uniform(seed, "label_dropout", 0, index_B, 1)[:, 0] < config.label_dropout
    return labels_B.masked_fill(dropped_B, config.num_classes)


def _kept_branches(index_B: Tensor, config: VARConfig, seed: int) -> Tensor | None:
    """Stochastic depth (Huang et al. 2016): 0 or 1 / keep probability for each block, branch and sample."""
    rates = config.drop_path_rates
    if not any(rates):
        return None
    drawn_BD2 = uniform(seed, "stochastic_depth", 0, index_B, 2 * len(rates)).view(-1, len(rates), 2)
    rate_D1 = drawn_BD2.new_tensor(rates).unsqueeze(1)
    return ((drawn_BD2 >= rate_D1) / (1 - rate_D1)).permute(1, 2, 0)
