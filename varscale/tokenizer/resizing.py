"""Resizing of small square maps by precomputed matrices: the same numbers as `F.interpolate`, in one product.

Letters in tensor names: B batch, C channels, h and w height and width, s and t number of places (side squared) of the
source and of the target map.
"""

import functools
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from varscale.tokenizer.shape import LARGEST_RESIZING_MATRIX


def resize(maps_BChw: Tensor, side: int, mode: Literal["area", "bicubic"]) -> Tensor:
    """Shrink (area) or enlarge (bicubic) square maps to side × side, as `F.interpolate` in this mode, to 1e-6."""
    source = maps_BChw.shape[-1]
    if source == side:
        return maps_BChw
    if source**2 * side**2 > LARGEST_RESIZING_MATRIX or maps_BChw.device.type == "meta":
        return F.interpolate(maps_BChw, size=(side, side), mode=mode)
    weights_st = _weights(source, side, mode, maps_BChw.device)
    return torch.matmul(maps_BChw.flatten(2), weights_st).view(*maps_BChw.shape[:2], side, side)


@functools.lru_cache(maxsize=256)
def _weights(source: int, target: int, mode: str, device: torch.device) -> Tensor:
    # not a buffer: a model built on the meta device and then materialised would find it uninitialised
    with torch.inference_mode(False), torch.no_grad():
        identity_sshw = torch.eye(source**2, device="cpu").view(source**2, 1, source, source)
        weights_sthw: Tensor = F.interpolate(identity_sshw, size=(target, target), mode=mode)
        return weights_sthw.flatten(1).to(device)
