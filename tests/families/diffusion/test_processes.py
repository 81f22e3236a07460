"""Noise and samplers against what is known of a single normal distribution, whose flow has a closed form.

Of data N(m, s²) the exact velocity and noise are linear in x, and the flow takes noise z to m + s·z.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from varscale.families.diffusion.config import DiffusionSettings
from varscale.families.diffusion.processes import LARGEST_LATENT, drawn, kept_shares, noised
from varscale.numerics.randomness import normal

MEAN, DEVIATION = 0.7, 0.4
NOISE = normal(0, "test", 0, torch.arange(400), 10).double()


def exact_velocity(x: Tensor, moment: float) -> Tensor:
    time = moment / 1000
    variance = (1 - time) ** 2 + time**2 * DEVIATION**2
    return MEAN + (time * DEVIATION**2 - (1 - time)) / variance * (x - time * MEAN)


def exact_noise(schedule: str) -> Any:
    def predict(x: Tensor, moment: float) -> Tensor:
        kept = float(kept_shares(schedule)[int(moment)])
        return math.sqrt(1 - kept) * (x - math.sqrt(kept) * MEAN) / (kept * DEVIATION**2 + 1 - kept)

    return predict


def error_of(sampler: str, steps: int) -> float:
    found = drawn(DiffusionSettings(sampler=sampler), exact_velocity, lambda step: NOISE, steps)
    return float((found - (MEAN + DEVIATION * NOISE)).abs().max())


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_integrators_converge_with_their_order(sampler: str, order: int) -> None:
    errors = [error_of(sampler, steps) for steps in (64, 128, 256)]
    assert errors[-1] < 0.01
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_follows_the_flow(schedule: str) -> None:
    settings = DiffusionSettings(prediction="ddpm", noise_schedule=schedule)
    found = drawn(settings, exact_noise(schedule), lambda step: NOISE, 500)
    torch.testing.assert_close(found, MEAN + DEVIATION * NOISE, atol=0.03, rtol=0)


def test_ancestral_samples_have_the_datas_distribution() -> None:
    settings = DiffusionSettings(prediction="ddpm", sampler="ancestral")

    def fresh(step: int) -> Tensor:
        return normal(3, "test", step, torch.arange(400), 10).double()

    found = drawn(settings, exact_noise("linear"), fresh, 1000)
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(found.std()) == pytest.approx(DEVIATION, abs=0.02)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("steps", [1, 20])
def test_latents_that_the_model_guesses_far_off_are_cut(sampler: str, steps: int) -> None:
    """A model that finds a thousand times too much noise is not followed beyond what latents can be."""
    settings = DiffusionSettings(prediction="ddpm", sampler=sampler)
    signs = NOISE.sign()
    found = drawn(settings, lambda x, moment: -1000 * signs, lambda step: NOISE, steps)
    torch.testing.assert_close(found, LARGEST_LATENT * signs)


def test_more_steps_than_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="1001 steps: ddim has 1000 levels of noise"):
        drawn(DiffusionSettings(prediction="ddpm"), exact_noise("linear"), lambda step: NOISE, 1001)


def test_noise_schedules_are_the_papers() -> None:
    linear, cosine = kept_shares("linear").numpy(), kept_shares("cosine").numpy()
    np.testing.assert_allclose(linear, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), rtol=1e-12)
    share = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine[:900], (share / share[0])[1:901], rtol=1e-9)  # none of these is cut at 0.999
    assert 0 < cosine[-1] < linear[-1] < 1e-4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noised_latents_keep_their_variance(schedule: str) -> None:
    """Of the chain that is 1 at all levels; the flow starts at the noise and ends at the latents."""
    latents, noise = (normal(seed, "test", 0, torch.arange(1000), 48).view(-1, 3, 4, 4) for seed in (1, 2))
    times_B = (torch.arange(1000) + 0.5) / 1000
    ddpm = DiffusionSettings(prediction="ddpm", noise_schedule=schedule)
    noisy, moments_B, target = noised(ddpm, latents, noise, times_B)
    assert float(noisy.var()) == pytest.approx(1, abs=0.02)
    assert torch.equal(target, noise)
    assert torch.equal(moments_B, torch.arange(1000.0))
    flow = DiffusionSettings()
    noisy, moments_B, target = noised(flow, latents, noise, torch.linspace(0, 1, 1000))
    assert torch.equal(noisy[0], noise[0])
    assert torch.equal(noisy[-1], latents[-1])
    torch.testing.assert_close(noisy[500] + (1 - moments_B[500] / 1000) * target[500], latents[500])
