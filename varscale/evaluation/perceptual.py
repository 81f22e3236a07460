"""LPIPS with its backbone's weights from a file, since clusters and CI reach no download server."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS


def load_lpips(vgg16_weights: Path) -> nn.Module:
    """LPIPS (Zhang et al. 2018, VGG-16): a frozen module of two image batches in [-1, 1], giving (B, 1, 1, 1).

    Args:
        vgg16_weights: torchvision's `vgg16-397923af.pth`, or any state dict of `torchvision.models.vgg16`.

    Raises:
        ValueError: the file is absent or not such a state dict.
    """
    try:
        state = torch.load(vgg16_weights, map_location="cpu", weights_only=True)
        # torchmetrics' public class always downloads the backbone; the linear layers come with torchmetrics
        lpips = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
        for name, parameter in lpips.net.named_parameters():  # slice2.5.weight is features.5.weight
            parameter.data.copy_(state[f"features.{name.split('.', 1)[1]}"])
    except (OSError, EOFError, pickle.UnpicklingError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{vgg16_weights}: not torchvision's VGG-16 weights ({reason}); get them with "
            "torchvision.models.vgg16(weights='DEFAULT') on a machine with a network"
        ) from None
    frozen: nn.Module = lpips.eval().requires_grad_(False)
    return frozen
