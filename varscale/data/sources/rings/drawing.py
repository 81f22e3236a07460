"""Procedural images of soft rings: the data set that needs no download.

An image is a background, dark unless `backgrounds` says otherwise, with `min_rings` to `max_rings` rings painted over
one another; its class is the number of rings. Each image is a pure function of (seed, split, index), so any part of the
set can be made anywhere, in any order, without storing it, and a run of any length never sees an image twice.

Identical on every machine: the random numbers are 64-bit integer hashes, and the pixels come from additions,
multiplications, divisions and square roots only, which IEEE 754 rounds the same everywhere. The profile exp(-t)
is (1 - t/64)^64, six squarings instead of the mathematics library's `exp`, and within 0.005 of it.

Letters: N images, R rings in one layer, K colours, s side of an image in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from varscale.config.data import Split
from varscale.errors import DataError

PALETTE = np.array(
    [
        (1.00, 0.25, 0.20),  # red
        (0.25, 0.55, 1.00),  # blue
        (0.30, 0.90, 0.35),  # green
        (1.00, 0.85, 0.20),  # yellow
        (0.90, 0.35, 0.95),  # magenta
        (0.25, 0.90, 0.95),  # cyan
        (1.00, 0.60, 0.15),  # orange
        (0.95, 0.95, 0.95),  # white
    ],
    dtype=np.float32,
)
"""Ring colours as red, green, blue in [0, 1]; a data set uses the first `colours` of them."""
COLOUR_NAMES = ("red", "blue", "green", "yellow", "magenta", "cyan", "orange", "white")

BACKGROUND = np.array((0.07, 0.07, 0.12), dtype=np.float32)
"""The dark background's colour as red, green, blue in [0, 1]."""
_BACKGROUNDS = np.concatenate([BACKGROUND[None], PALETTE * np.float32(0.45)])
"""The dark background, then a shade of each ring colour, darker than rings so that these stand out."""

_SPLIT_KEYS: dict[str, int] = {"train": 1, "validation": 2}
_DRAWS_PER_RING = 5
_BACKGROUND_DRAW = -1  # before those of rings, which stay what they are without coloured backgrounds
_CHUNK = 64  # images rendered together: their float32 planes stay within the second-level cache
_PROFILE_SQUARINGS = 6


@dataclass(frozen=True)
class Style:
    """What rings look like.

    Raises:
        DataError: If a setting is out of its range; the message names it.
    """

    min_rings: int = 1
    """Fewest rings in an image, at least 1."""
    max_rings: int = 3
    """Most rings in an image."""
    radius: tuple[float, float] = (0.16, 0.30)
    """Smallest and largest radius, as a share of the side. A ring lies inside the image as far as its radius."""
    width: tuple[float, float] = (0.045, 0.045)
    """Smallest and largest standard deviation of the Gaussian profile across the ring, as a share of the side."""
    colours: int = 4
    """How many colours of `PALETTE` are used."""
    backgrounds: int = 0
    """How many colours of `PALETTE` backgrounds have, as often as the dark one; 0: they are all dark."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_rings <= self.max_rings:
            counts = f"{self.min_rings} and {self.max_rings}"
            raise DataError(f"rings: min_rings, max_rings: expected 1 <= min_rings <= max_rings, got {counts}")
        if not 0 < self.radius[0] <= self.radius[1] <= 0.5:
            raise DataError(f"rings: radius: expected 0 < smallest <= largest <= 0.5 of the side, got {self.radius}")
        if not 0 < self.width[0] <= self.width[1]:
            raise DataError(f"rings: width: expected 0 < smallest <= largest, got {self.width}")
        if not 1 <= self.colours <= len(PALETTE):
            raise DataError(f"rings: colours: expected 1 to {len(PALETTE)}, got {self.colours}")
        if not 0 <= self.backgrounds <= len(PALETTE):
            raise DataError(f"rings: backgrounds: expected 0 to {len(PALETTE)}, got {self.backgrounds}")
        if self.backgrounds and self.colours == 1:
            raise DataError(
                "rings: colours: rings of 1 colour can't be seen on a background of that colour; expected 2"
            )

    @property
    def num_classes(self) -> int:
        """One class for each number of rings."""
        return self.max_rings - self.min_rings + 1


def render_rings(
    seed: int,
    indices: Sequence[int] | NDArray[np.integer],
    image_size: int,
    split: Split = "train",
    style: Style = Style(),  # frozen
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render images of rings and their labels.

    Args:
        seed: Names the data set; another seed gives other images.
        indices: Which images of the split, each at least 0. Any order, any subset.
        image_size: Side s in pixels.
        split: "train" or "validation". They draw from different random streams.
        style: What they look like.

    Returns:
        Images (N, 3, s, s) in 0..255 and labels (N,): the number of rings minus `min_rings`.

    Raises:
        ValueError: If an argument is out of its range; the message names it.
    """
    if image_size < 1:
        raise ValueError(f"image_size: {image_size} is not positive")
    if split not in _SPLIT_KEYS:
        raise ValueError(f"split: {split!r} is neither 'train' nor 'validation'")
    index_N = np.asarray(indices)
    if index_N.ndim != 1 or (index_N.size and (not np.issubdtype(index_N.dtype, np.integer) or index_N.min() < 0)):
        raise ValueError("indices: expected a list of whole numbers, each at least 0")
    key_N = _keys(seed, index_N, split)
    count_N = _counts(key_N, style)
    images_N3ss = np.empty((index_N.size, 3, image_size, image_size), dtype=np.uint8)
    for start in range(0, index_N.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        images_N3ss[part] = _render_chunk(key_N[part], count_N[part], image_size, style)
    return images_N3ss, count_N - style.min_rings


def what_is_drawn(
    seed: int, indices: Sequence[int] | NDArray[np.integer], split: Split, style: Style
) -> NDArray[np.int64]:
    """How many rings of each colour images have, and last their background, (N, colours + 1).

    Backgrounds are 0 for the dark one, or 1 + a place in the palette.
    """
    key_N = _keys(seed, np.asarray(indices), split)
    counts_N, background_N = _counts(key_N, style), _backgrounds(key_N, style)
    rings_NK = np.zeros((key_N.size, style.colours), dtype=np.int64)
    for layer in range(style.max_rings):
        chosen_R = np.flatnonzero(counts_N > layer)
        rings_NK[chosen_R, _colours(key_N[chosen_R], background_N[chosen_R], layer, style)] += 1
    return np.column_stack([rings_NK, background_N])


def _keys(seed: int, index_N: NDArray[np.integer], split: Split) -> NDArray[np.uint64]:
    """What names an image's random numbers."""
    split_key_1 = _hash(_hash(np.array([seed % 2**64], dtype=np.uint64)), _SPLIT_KEYS[split])
    return _hash(split_key_1 + index_N.astype(np.uint64))


def _counts(key_N: NDArray[np.uint64], style: Style) -> NDArray[np.int64]:
    """Rings of each image."""
    return style.min_rings + _below(_hash(key_N), style.num_classes)


def _backgrounds(key_N: NDArray[np.uint64], style: Style) -> NDArray[np.int64]:
    """Background of each image: 0 is dark, the others are 1 + a place in the palette."""
    return _below(_hash(key_N, _BACKGROUND_DRAW), 1 + style.backgrounds)


def _colours(key_R: NDArray[np.uint64], background_R: NDArray[np.int64], layer: int, style: Style) -> NDArray[np.int64]:
    """Place in the palette of each image's ring of a layer: any colour in use but the background's."""
    taken_R = (background_R > 0) & (background_R <= style.colours)
    place_R = _below(_hash(key_R, (layer + 1) * _DRAWS_PER_RING), style.colours - taken_R)
    return place_R + (taken_R & (place_R >= background_R - 1))


def _render_chunk(
    key_N: NDArray[np.uint64], count_N: NDArray[np.int64], image_size: int, style: Style
) -> NDArray[np.uint8]:
    """Paint rings layer by layer, each over the ones before, as opaque as its profile is high."""
    canvas_N3ss = np.empty((key_N.size, 3, image_size, image_size), dtype=np.float32)
    background_N = _backgrounds(key_N, style)
    canvas_N3ss[:] = _BACKGROUNDS[background_N, :, None, None]
    pixel_s = (np.arange(image_size, dtype=np.float32) + np.float32(0.5)) / np.float32(image_size)
    for layer in range(int(count_N.max(initial=0))):
        chosen_R = np.flatnonzero(count_N > layer)
        first_draw = 1 + layer * _DRAWS_PER_RING
        bits = [_hash(key_N[chosen_R], first_draw + draw) for draw in range(_DRAWS_PER_RING - 1)]
        radius_R = _between(bits[0], *style.radius)
        width_R = _between(bits[1], *style.width)
        room_R = np.float32(1) - np.float32(2) * radius_R
        x_R, y_R = (radius_R + room_R * _uniform(bits[draw]) for draw in (2, 3))
        colour_R3 = PALETTE[_colours(key_N[chosen_R], background_N[chosen_R], layer, style)]

        across_Rs = np.square(pixel_s[None, :] - x_R[:, None])
        down_Rs = np.square(pixel_s[None, :] - y_R[:, None])
        profile_Rss = np.sqrt(down_Rs[:, :, None] + across_Rs[:, None, :])
        profile_Rss -= radius_R[:, None, None]
        np.square(profile_Rss, out=profile_Rss)
        # 1 - t / 2^squarings with t = distance² / (2 width²), then squared until it is (1 - t / n)^n.
        scale_R = np.float32(-(0.5 ** (_PROFILE_SQUARINGS + 1))) / np.square(width_R)
        profile_Rss *= scale_R[:, None, None]
        profile_Rss += np.float32(1)
        np.maximum(profile_Rss, np.float32(0), out=profile_Rss)
        for _ in range(_PROFILE_SQUARINGS):
            np.square(profile_Rss, out=profile_Rss)

        for channel in range(3):
            plane_Rss = canvas_N3ss[chosen_R, channel]
            plane_Rss += (colour_R3[:, channel, None, None] - plane_Rss) * profile_Rss
            canvas_N3ss[chosen_R, channel] = plane_Rss
    canvas_N3ss *= np.float32(255)
    canvas_N3ss += np.float32(0.5)
    return canvas_N3ss.astype(np.uint8)


def _hash(state: NDArray[np.uint64], draw: int = 0) -> NDArray[np.uint64]:
    """The output of the splitmix64 generator (Steele, Lea and Flood 2014) for `state + draw`, modulo 2^64."""
    mixed = state + np.uint64((0x9E3779B97F4A7C15 + draw) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _uniform(bits: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) from the upper 24 bits, which float32 holds exactly."""
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _between(bits: NDArray[np.uint64], low: float, high: float) -> NDArray[np.float32]:
    """Uniform numbers from low to high."""
    return np.float32(low) + (np.float32(high) - np.float32(low)) * _uniform(bits)


def _below(bits: NDArray[np.uint64], count: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole numbers 0 to count - 1; the bias of the remainder is below count / 2^32."""
    return ((bits >> np.uint64(32)) % np.asarray(count, dtype=np.uint64)).astype(np.int64)
