"""The adversarial losses against VQGAN's formulas."""

import pytest
import torch

from varscale.config import SMALLEST_ADVERSARIAL_IMAGE
from varscale.tokenizer.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 2.0])
    # mean of max(0, 1 - real) is (0 + 0.5 + 2) / 3, of max(0, 1 + fake) is (0 + 1 + 3) / 3
    assert float(discriminator_loss(real, fake)) == pytest.approx(0.5 * (2.5 / 3 + 4 / 3))
    assert float(generator_loss(fake)) == pytest.approx(1 / 3)


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = (torch.tensor([3.0, 4.0]) * weight).sum(), (torch.tensor([0.0, 2.0]) * weight).sum()
    ratio = adaptive_weight(reconstruction, adversarial, weight)
    assert float(ratio) == pytest.approx(5 / (2 + 1e-4))
    assert not ratio.requires_grad
    assert float(adaptive_weight(1e9 * weight.sum(), 0.0 * weight.sum(), weight)) == 1e4  # capped


def test_patches_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8)
    images_B3HW = torch.rand(3, 3, 32, 32)
    logits = discriminator(images_B3HW)
    assert logits.shape == (3, 1, 2, 2)
    assert torch.allclose(logits[1:2], discriminator(images_B3HW[1:2]), atol=1e-6)


def test_sizes_are_those_of_pix2pix() -> None:
    """70 × 70 receptive field: the gradient of one logit reaches exactly so far."""
    discriminator = PatchDiscriminator(2)
    for module in discriminator:
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1.0)
    convolutions = [module for module in discriminator if isinstance(module, torch.nn.Conv2d)]
    field, jump = 1, 1
    for convolution in convolutions:
        field += (convolution.kernel_size[0] - 1) * jump
        jump *= convolution.stride[0]
    assert (field, jump) == (70, 8)
    assert [convolution.out_channels for convolution in convolutions] == [2, 4, 8, 16, 1]


def test_smallest_image() -> None:
    discriminator, side = PatchDiscriminator(2), SMALLEST_ADVERSARIAL_IMAGE
    assert discriminator(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(1, 3, side - 1, side - 1))
