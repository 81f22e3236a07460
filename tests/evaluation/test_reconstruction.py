"""Reconstruction figures against their definitions."""

import math

import pytest
import torch
from architectures import architecture
from hypothesis import given
from hypothesis import strategies as st

from varscale.evaluation.reconstruction import ReconstructionMeter
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


def test_figures_of_two_batches_follow_their_definitions() -> None:
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(
        architecture((1, 4, 8), 32, 4, 4, channel_multipliers=(1, 2), residual_blocks=1, attention=False, norm_groups=2)
    )
    torch.nn.init.normal_(tokenizer.quantizer.codebook_Vc)
    images_B3HW = torch.rand(7, 3, 16, 16) * 2 - 1
    meter = ReconstructionMeter(3, 32)
    for part_B3HW in images_B3HW.split(4):
        meter.update(tokenizer, part_B3HW)
    figures = meter.compute()
    with torch.no_grad():
        tokens = tokenizer.encode(images_B3HW)
        mean_squared = float((tokenizer.decode(tokens) - images_B3HW).double().square().mean())
    assert figures["mean_squared_error"] == pytest.approx(mean_squared, rel=1e-4)
    assert figures["psnr"] == pytest.approx(10 * math.log10(4 / mean_squared), rel=1e-5)
    with_mean_B3HW = images_B3HW.double().mean(0).expand_as(images_B3HW)
    assert figures["mean_picture_error"] == pytest.approx(
        float((images_B3HW.double() - with_mean_B3HW).square().mean()), rel=1e-12
    )
    assert -1 <= figures["ssim"] <= 1
    assert figures["codebook_usage"] == pytest.approx(len(torch.cat([t.flatten() for t in tokens]).unique()) / 32)


class Perfect(torch.nn.Module):
    """A tokenizer that loses nothing."""

    def encode(self, images_B3HW: torch.Tensor) -> list[torch.Tensor]:
        self.images_B3HW = images_B3HW
        return [torch.zeros(len(images_B3HW), 1, dtype=torch.int64)]

    def decode(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        return self.images_B3HW


def test_a_perfect_reconstruction() -> None:
    meter = ReconstructionMeter(1, 2)
    meter.update(Perfect(), torch.rand(2, 3, 16, 16) * 2 - 1)
    figures = meter.compute()
    assert figures["ssim"] == pytest.approx(1)
    assert figures["psnr"] == math.inf
    assert figures["mean_squared_error"] == 0


@given(shade=st.floats(-1, 1, width=32), count=st.integers(1, 9))
def test_images_that_are_all_alike_are_their_mean(shade: float, count: int) -> None:
    meter = ReconstructionMeter(1, 2)
    for _ in range(count):
        meter.update(Perfect(), torch.full((3, 3, 16, 16), shade))
    assert 0 <= meter.compute()["mean_picture_error"] < 1e-14
