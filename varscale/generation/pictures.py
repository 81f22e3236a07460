"""Grids of images as PNG files that a person can look at."""

import io
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from varscale.store.atomic import write_atomically

SMALLEST_SIDE = 96
"""Smaller images are enlarged, pixel by pixel, to at least this side."""


def save_pictures(images_B3HW: Tensor, path: Path, columns: int) -> None:
    """Write images in [0, 1] as a grid, row by row."""
    enlarge = max(1, -(-SMALLEST_SIDE // images_B3HW.shape[-1]))
    enlarged = F.interpolate(images_B3HW.detach().float().cpu(), scale_factor=enlarge, mode="nearest")
    buffer = io.BytesIO()
    save_image(make_grid(enlarged, nrow=columns, padding=4, pad_value=1.0), buffer, format="png")
    write_atomically(path, buffer.getvalue())
