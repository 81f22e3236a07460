"""Diffusion transformers as a family: they learn to undo noise on the tokenizer's latents, and draw them from noise.

Letters in tensor names: B batch, L tokens, C channels, h and w height and width of the latents.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from varscale.families.base import EVALUATION_SEED, Family, SamplingOptions, TokenLosses
from varscale.families.diffusion.config import DiTConfig
from varscale.families.diffusion.processes import drawn, noised
from varscale.families.diffusion.transformer import DiT, patches
from varscale.families.models import (
    FamilyModel,
    Sample,
    evaluating,
    labels_after_dropout,
    labels_of,
    pictures,
    with_unconditional,
)
from varscale.numerics.randomness import evenly_spread, normal, uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class DiffusionFamily(Family):
    """DiT by flow matching (SiT), or DDPM."""

    has_likelihood = False
    can_choose_steps = True

    def build(self, description: DiTConfig) -> DiT:
        """The transformer."""
        return DiT(description)

    def losses(
        self, model: FamilyModel, tokenizer: MultiScaleTokenizer, batch: Mapping[str, Tensor], seed: int | None = None
    ) -> TokenLosses:
        """Mean squared error of velocity or noise in each patch; 2 or 1 of a model that says 0. See `Family.losses`.

        In an evaluation the times of consecutive samples cover [0, 1) evenly, whatever times a model was trained at, so
        that losses of the same prediction compare.
        """
        dit, index_B = _dit(model), batch["sample_index_B"]
        config, latents_BChw = dit.config, dit.standardised(batch["latents_BChw"])
        if seed is None:
            labels_B = labels_of(batch, config)
            times_B = evenly_spread(index_B).float()
            noise_BChw = _noise(latents_BChw, EVALUATION_SEED, "evaluation", 0, index_B)
        else:
            labels_B = labels_after_dropout(batch, config.label_dropout, config, seed)
            if config.time_distribution == "uniform":
                times_B = uniform(seed, "diffusion_time", 0, index_B, 1)[:, 0]
            else:
                times_B = normal(seed, "diffusion_time", 0, index_B, 1)[:, 0].sigmoid()
            noise_BChw = _noise(latents_BChw, seed, "diffusion_noise", 0, index_B)
        noisy_BChw, moments_B, target_BChw = noised(config, latents_BChw, noise_BChw, times_B)
        error_BChw = dit(noisy_BChw, moments_B, labels_B) - target_BChw
        return TokenLosses(patches(error_BChw.square(), config.patch_size).mean(2))

    def sample(
        self,
        model: FamilyModel,
        tokenizer: MultiScaleTokenizer,
        labels_B: Tensor,
        options: SamplingOptions,
        sample_indices_B: Tensor,
    ) -> Sample:
        """From noise, with the same guidance at all times; see `Family.sample`."""
        dit, guided = _dit(model), options.guidance > 0
        config = dit.config
        if guided:
            labels_B = with_unconditional(labels_B, config)
        like = labels_B.new_empty(
            len(sample_indices_B), config.latent_channels, *2 * (config.patch_nums[-1],), dtype=torch.float32
        )

        def predict(x_BChw: Tensor, moment: float) -> Tensor:
            x_BChw = torch.cat((x_BChw, x_BChw)) if guided else x_BChw
            said_BChw: Tensor = dit(x_BChw, x_BChw.new_full((len(x_BChw),), moment), labels_B)
            if not guided:
                return said_BChw
            with_class_BChw, without_BChw = said_BChw.chunk(2)
            return torch.lerp(without_BChw, with_class_BChw, 1 + options.guidance)

        def fresh(step: int) -> Tensor:
            return _noise(like, options.seed, "sampling", step, sample_indices_B)

        with evaluating(model, tokenizer):
            latents_BChw = drawn(config, predict, fresh, options.steps or config.sampling_steps)
            return Sample(pictures(tokenizer, dit.restored(latents_BChw)), [])

    def names_without_decay(self, model: FamilyModel) -> set[str]:
        """Biases."""
        return {name for name, parameter in model.named_parameters() if parameter.ndim == 1}

    def blocks(self, model: FamilyModel) -> Sequence[nn.Module]:
        """The transformer's blocks: one compilation serves them all."""
        return list(_dit(model).blocks)


def _dit(model: FamilyModel) -> DiT:
    return cast(DiT, model)


def _noise(like_BChw: Tensor, seed: int, stream: str, step: int, index_B: Tensor) -> Tensor:
    """Standard normal noise of the latents' shape."""
    return normal(seed, stream, step, index_B, like_BChw[0].numel()).view_as(like_BChw)
