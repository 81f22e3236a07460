"""From a decoded picture of any size to a square crop, as a pure function of (seed, image index, view).

Letters: s side of the crop in pixels, h, w height and width of the resized picture.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from varscale.data.pictures import WHITE, as_shown, check_memory

LONG = 8
"""Of a picture so many times as long as wide, only the crop is enlarged, not all of it."""
_TWO_TO_64 = 2.0**64


@dataclass(frozen=True)
class Crop:
    """Resize, crop and flip as VAR does: shorter side to `round(resize_ratio · image_size)` with Lanczos, then a crop.

    Raises:
        ValueError: If a setting is out of its range; the message names it.
    """

    image_size: int
    """Side s of the crop in pixels."""
    resize_ratio: float = 1.125
    """Shorter side after resizing as a multiple of image_size; 1 crops along the longer side only."""
    random: bool = True
    """Random crops (training) instead of the centre (validation)."""
    flip: bool = False
    """Mirror each view left to right with probability ½. VAR: no."""
    seed: int = 0
    """Seed of crops and flips."""
    background: tuple[int, int, int] = field(default=WHITE, repr=False)
    """Colour behind transparent parts; it counts where there are any, and so is no part of how a crop is written."""
    levels: tuple[float, float] | None = field(default=None, repr=False)
    """Of pictures with more than 8 bits a channel, the values that become black and white; None: they are refused."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size: {self.image_size} is not positive")
        if self.resize_ratio < 1:
            raise ValueError(f"resize_ratio: {self.resize_ratio} is below 1, so the crop would not fit")

    @property
    def varies(self) -> bool:
        """Whether two views of an image can differ."""
        return self.random or self.flip

    def apply(self, picture: Image.Image, index: int, view: int) -> NDArray[np.uint8]:
        """Crop one view of image `index`; returns (3, s, s) in 0..255.

        Raises:
            ValueError: The picture takes too much memory, or has more than 8 bits a channel and there are no levels.
            OSError: It is damaged; Pillow raises other errors, too.
        """
        shown, side = self.shown(picture), self.image_size
        width, height = resized_size(shown.size, self._shorter)
        down, across, mirror = uniform_draws(self.seed, index, view)
        top, left = self._corner(height, down), self._corner(width, across)
        if max(shown.size) > LONG * min(shown.size) and (width, height) != shown.size:
            over, along = shown.width / width, shown.height / height
            box = left * over, top * along, (left + side) * over, (top + side) * along
            pixels_hw3 = np.asarray(shown.resize((side, side), Image.Resampling.LANCZOS, box))
        else:
            resized = resize_shorter_side(shown, self._shorter)
            pixels_hw3 = np.asarray(resized)[top : top + side, left : left + side]
        if self.flip and mirror < 0.5:
            pixels_hw3 = pixels_hw3[:, ::-1]
        return np.ascontiguousarray(pixels_hw3.transpose(2, 0, 1))

    def shown(self, picture: Image.Image) -> Image.Image:
        """The whole picture as a viewer shows it, before it is resized; raises what `apply` raises."""
        return as_shown(picture, self._shorter, self.background, self.levels)

    def check(self, picture: Image.Image) -> None:
        """Raise `ValueError` where the picture, of which the header is read, would take too much memory."""
        check_memory(picture, self._shorter)

    @property
    def _shorter(self) -> int:
        """Pixels of the shorter side after resizing."""
        return round(self.resize_ratio * self.image_size)

    def _corner(self, length: int, uniform: float) -> int:
        room = length - self.image_size
        return int(uniform * (room + 1)) if self.random else round(room / 2)


def resize_shorter_side(picture: Image.Image, target: int) -> Image.Image:
    """Resize with Lanczos so that the shorter side has `target` pixels; torchvision's rule for the longer."""
    size = resized_size(picture.size, target)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def resized_size(size: tuple[int, int], target: int) -> tuple[int, int]:
    """Width and height that a picture has when its shorter side has `target` pixels; torchvision's rule."""
    shorter = min(size)
    width, height = (target if side == shorter else int(target * side / shorter) for side in size)
    return width, height


def uniform_draws(seed: int, index: int, view: int) -> tuple[float, float, float]:
    """Three uniform numbers in [0, 1) that depend on (seed, index, view) only: Philox, keyed by the seed."""
    bits = np.random.Philox(key=seed % 2**64, counter=[0, view, index, 0]).random_raw(3)
    first, second, third = (float(value) / _TWO_TO_64 for value in bits >> np.uint64(11) << np.uint64(11))
    return first, second, third


def to_model_range(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels 0..255 as float32 in [-1, 1], same shape."""
    return torch.from_numpy(pixels).to(torch.float32).mul_(2 / 255).sub_(1)
