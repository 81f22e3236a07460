"""PatchGAN discriminator and the hinge losses of VQGAN (Esser et al. 2021, section 3.1; Isola et al. 2017)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchDiscriminator(nn.Sequential):
    """Images (B, 3, H, W) to a map of realness logits, one for each overlapping patch.

    Group norm instead of the original's batch norm: no statistics of the batch, so results don't depend on how a batch
    is split over processes.
    """

    def __init__(self, channels: int = 64) -> None:
        stages: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for stride in (2, 2, 1):
            convolution = nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1, bias=False)
            width *= 2
            stages += [convolution, nn.GroupNorm(1, width), nn.LeakyReLU(0.2)]
        super().__init__(*stages, nn.Conv2d(width, 1, 4, padding=1))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Hinge loss of the autoencoder: raise the logits of its reconstructions."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """λ of VQGAN's equation 7: the ratio of both losses' gradients at the decoder's last layer, at most 10,000."""
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    ratio: Tensor = reconstruction.norm() / (adversarial.norm() + 1e-4)
    return ratio.clamp(0, 1e4).detach()
