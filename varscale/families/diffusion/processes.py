"""How latents become noise, and noise latents again: the linear path of a flow, and DDPM's chain.

Flow: SiT (Ma et al. 2024, arXiv 2401.08740), the path x(t) = t·latents + (1 - t)·noise, whose velocity is latents -
noise. DDPM: Ho et al. 2020, x = √ᾱ·latents + √(1 - ᾱ)·noise at 1,000 levels; drawn as in DDIM (Song et al. 2021,
equations 12 and 16), of which ancestral sampling is the case that adds fresh noise.

A time in [0, 1) is a flow's t, or 1/1,000 of DDPM's level; moments, which the model is told, are 1,000 times that.

Letters in tensor names: B batch, C channels, h and w height and width of the latents, N levels.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from varscale.families.diffusion.config import NOISE_LEVELS, DiffusionSettings

LARGEST_LATENT = 6.0
"""Of standardised latents that DDPM's samplers believe: where all is noise, small errors of the model are large ones of
its guess at the latents."""

Predict = Callable[[Tensor, float], Tensor]
"""Noisy latents and their moment to velocity or noise."""
Fresh = Callable[[int], Tensor]
"""Number of a step to standard normal noise of the latents' shape."""


def noised(
    settings: DiffusionSettings, latents_BChw: Tensor, noise_BChw: Tensor, times_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents at these times, their moments, and what the model is to predict of them."""
    if settings.prediction == "flow":
        noisy_BChw = torch.lerp(noise_BChw, latents_BChw, times_B.view(-1, 1, 1, 1))
        return noisy_BChw, NOISE_LEVELS * times_B, latents_BChw - noise_BChw
    levels_B = (NOISE_LEVELS * times_B).long().clamp_max(NOISE_LEVELS - 1)
    kept_B111 = kept_shares(settings.noise_schedule).to(times_B.device)[levels_B].view(-1, 1, 1, 1)
    noisy_BChw = kept_B111.sqrt().float() * latents_BChw + (1 - kept_B111).sqrt().float() * noise_BChw
    return noisy_BChw, levels_B.float(), noise_BChw


def drawn(settings: DiffusionSettings, predict: Predict, fresh: Fresh, steps: int) -> Tensor:
    """Standardised latents (B, C, h, w), from noise.

    Raises:
        ValueError: There are fewer levels of noise than steps.
    """
    if settings.prediction == "flow":
        return _integrated(predict, fresh(0), steps, heun=settings.solver == "heun")
    if steps > NOISE_LEVELS:
        raise ValueError(
            f"{steps} steps: {settings.solver} has {NOISE_LEVELS} levels of noise, and takes no more steps"
        )
    return _denoised(predict, fresh, kept_shares(settings.noise_schedule), steps, settings.solver == "ancestral")


@functools.lru_cache(maxsize=2)
def kept_shares(schedule: str) -> Tensor:
    """ᾱ of each level, float64 (N,): the share of the latents in the variance."""
    with torch.inference_mode(False):
        if schedule == "linear":
            beta_N = torch.linspace(1e-4, 0.02, NOISE_LEVELS, dtype=torch.float64)
        else:
            ends = torch.arange(NOISE_LEVELS + 1, dtype=torch.float64) / NOISE_LEVELS
            share = torch.cos((ends + 0.008) / 1.008 * math.pi / 2).square()
            beta_N = (1 - share[1:] / share[:-1]).clamp_max(0.999)
        return (1 - beta_N).cumprod(0)


def _integrated(predict: Predict, x_BChw: Tensor, steps: int, *, heun: bool) -> Tensor:
    """Along the velocity from t = 0 to 1, in equal steps."""
    for step in range(steps):
        start, end = (NOISE_LEVELS * moment / steps for moment in (step, step + 1))
        velocity_BChw = predict(x_BChw, start)
        if heun:
            velocity_BChw = (velocity_BChw + predict(x_BChw + velocity_BChw / steps, end)) / 2
        x_BChw = x_BChw + velocity_BChw / steps
    return x_BChw


def _denoised(predict: Predict, fresh: Fresh, kept_N: Tensor, steps: int, ancestral: bool) -> Tensor:
    """From the last level to the first, over `steps` of them, evenly spaced."""
    x_BChw = fresh(0)
    levels = torch.linspace(NOISE_LEVELS - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    shares = [*kept_N[levels].tolist(), 1.0]
    for step, (level, kept, after) in enumerate(zip(levels, shares, shares[1:], strict=False), start=1):
        noise_BChw = predict(x_BChw, level)
        latents_BChw = (x_BChw - math.sqrt(1 - kept) * noise_BChw) / math.sqrt(kept)
        latents_BChw = latents_BChw.clamp(-LARGEST_LATENT, LARGEST_LATENT)
        noise_BChw = (x_BChw - math.sqrt(kept) * latents_BChw) / math.sqrt(1 - kept)
        added = (1 - after) / (1 - kept) * (1 - kept / after) if ancestral else 0.0
        x_BChw = math.sqrt(after) * latents_BChw + math.sqrt(max(0.0, 1 - after - added)) * noise_BChw
        if added:
            x_BChw = x_BChw + math.sqrt(added) * fresh(step)
    return x_BChw
