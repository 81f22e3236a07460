"""Pictures to and from files that a person looks at, and what an image looks like after each scale.

Letters in tensor names: B images, K scales, H and W height and width.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from varscale.data.pictures import WHITE, as_shown, opened
from varscale.data.sources.survey import why_broken
from varscale.errors import DataError
from varscale.families.models import evaluating, pictures
from varscale.store.atomic import write_atomically
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

SMALLEST_SIDE = 96
"""Smaller images are enlarged, pixel by pixel, to at least this side."""


def save_pictures(images_B3HW: Tensor, path: Path, columns: int) -> None:
    """Write images in [0, 1] as a grid, row by row."""
    enlarge = max(1, -(-SMALLEST_SIDE // images_B3HW.shape[-1]))
    enlarged = F.interpolate(images_B3HW.detach().float().cpu(), scale_factor=enlarge, mode="nearest")
    buffer = io.BytesIO()
    save_image(make_grid(enlarged, nrow=columns, padding=4, pad_value=1.0), buffer, format="png")
    write_atomically(path, buffer.getvalue())


def save_picture(image_3HW: Tensor, path: Path) -> None:
    """Write one image in [0, 1], pixel by pixel, as a PNG."""
    buffer = io.BytesIO()
    save_image(image_3HW.detach().float().cpu(), buffer, format="png")
    write_atomically(path, buffer.getvalue())


def scale_pictures(tokenizer: MultiScaleTokenizer, tokens: Sequence[Tensor]) -> Tensor:
    """What tokens stand for after each scale, (B·K, 3, H, W) in [0, 1]: image after image, each from coarse to fine."""
    sums, features_hat_BChw = [], None
    with evaluating(tokenizer):
        for scale, tokens_BL in enumerate(tokens):
            features_hat_BChw, _ = tokenizer.quantizer.accumulate(features_hat_BChw, tokens_BL, scale)
            sums.append(features_hat_BChw)
        return pictures(tokenizer, torch.stack(sums, dim=1).flatten(0, 1))


def read_picture(path: Path, side: int) -> Tensor:
    """A picture of side × side pixels as a viewer shows it, transparency on white: float32 (1, 3, H, W) in [0, 1].

    Raises:
        DataError: It can't be read, or has another size.
    """
    pixels_HW3 = np.array(opened_picture(path, side))
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1).unsqueeze(0) / 255


def opened_picture(path: Path, side: int, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """A picture of side × side pixels as a viewer shows it, RGB, transparency on a background.

    Raises:
        DataError: It can't be read, or has another size.
    """
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with opened(path) as picture:
            if picture.size == (side, side):  # of any other, nothing is decoded
                return as_shown(picture, background=background)
            width, height = picture.size
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            raise DataError(f"{path}: not a picture that can be read ({why_broken(error, file.read(512))})") from None
    except Exception as error:  # broken files raise whatever they lead to
        raise DataError(f"{path}: not a picture that can be read ({' '.join(str(error).split())[:200]})") from None
    raise DataError(f"{path}: {width} × {height} pixels, where {side} × {side} are needed; crop and resize it first")
