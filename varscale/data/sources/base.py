"""What every source of images can do, rings as a source, and even subsets of a source.

Letters: B batch, s side of an image in pixels.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from varscale.data.sources import rings
from varscale.errors import DataError
from varscale.numerics.randomness import permutation

Indices = Sequence[int] | NDArray[np.int64]
Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class ImageSource(Protocol):
    """Labelled square images, each view of each a pure function of (image index, view)."""

    @property
    def name(self) -> str:
        """Where the images come from, for messages."""

    @property
    def image_size(self) -> int:
        """Side s in pixels."""

    @property
    def num_classes(self) -> int:
        """Labels are 0 … num_classes - 1."""

    @property
    def procedural(self) -> bool:
        """Whether image i is the same however many images the source has, and images are in no particular order."""

    @property
    def varies(self) -> bool:
        """Whether two views of an image can differ."""

    @property
    def undecodable(self) -> dict[str, str]:
        """Images met so far that did not decode → why. Another image stands in for each."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that the pixels and labels depend on, except the number of images of a procedural source."""

    def __len__(self) -> int:
        """Number of images."""

    def load(self, index: int, view: int = 0) -> tuple[Pixels, int]:
        """One image (3, s, s) in 0..255 and its label."""

    def load_batch(self, indices: Indices, views: Indices) -> tuple[Pixels, Labels]:
        """Images (B, 3, s, s) in 0..255 and labels (B,). Safe to call from several threads."""

    def order(self, seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        """A random order of the first `size` images, in which an epoch of training takes them."""


@dataclass(frozen=True)
class RingsSource:
    """Procedural rings (`varscale.data.sources.rings`) of one split; every view of an image is the same.

    Raises:
        DataError: If a setting is out of its range.
    """

    num_images: int
    """Number of images; any other number gives the same images as far as both go."""
    image_size: int
    """Side s in pixels."""
    split: rings.Split = "train"
    """Training and validation images never coincide."""
    seed: int = 0
    """Names the data set."""
    min_rings: int = 1
    """Fewest rings in an image."""
    max_rings: int = 3
    """Most rings in an image."""
    radius: tuple[float, float] = (0.16, 0.30)
    """Smallest and largest radius, as a share of the side."""
    width: tuple[float, float] = (0.045, 0.045)
    """Smallest and largest standard deviation of the profile across a ring, as a share of the side."""
    colours: int = 4
    """Colours in use."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise DataError(f"num_images: {self.num_images} is not positive")
        try:
            self.load_batch([], [])
        except ValueError as error:
            raise DataError(f"rings: {error}") from None

    @property
    def name(self) -> str:
        """Where the images come from, for messages."""
        return f"rings ({self.split}, seed {self.seed})"

    @property
    def num_classes(self) -> int:
        """One class for each number of rings."""
        return rings.num_classes(self.min_rings, self.max_rings)

    @property
    def procedural(self) -> bool:
        """True: image i doesn't depend on num_images."""
        return True

    @property
    def varies(self) -> bool:
        """False: rings are drawn, not cropped."""
        return False

    @property
    def undecodable(self) -> dict[str, str]:
        """Always empty."""
        return {}

    @property
    def fingerprint(self) -> str:
        """Hash of the settings; num_images is left out, so that a store can grow."""
        settings = (self.image_size, self.split, self.seed, self.min_rings, self.max_rings, self.radius, self.width)
        return digest([repr(("rings", *settings, self.colours)).encode()])

    def __len__(self) -> int:
        return self.num_images

    def load(self, index: int, view: int = 0) -> tuple[Pixels, int]:
        """One image (3, s, s) and its label."""
        pixels_1, labels_1 = self.load_batch([index], [view])
        return pixels_1[0], int(labels_1[0])

    def load_batch(self, indices: Indices, views: Indices) -> tuple[Pixels, Labels]:
        """Images (B, 3, s, s) and labels (B,)."""
        return rings.render_rings(
            self.seed,
            np.asarray(indices, dtype=np.int64),
            self.image_size,
            split=self.split,
            min_rings=self.min_rings,
            max_rings=self.max_rings,
            radius=self.radius,
            width=self.width,
            colours=self.colours,
        )

    def order(self, seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        """Any order."""
        return permutation(seed, epoch, size)


class SubsetSource:
    """`count` images of another source, evenly spread over it, so that data sorted by class stay balanced."""

    procedural = False

    def __init__(self, source: ImageSource, count: int) -> None:
        if not 1 <= count <= len(source):
            raise DataError(f"{source.name}: {count} images asked for, it has {len(source)}")
        self.source = source
        self.name = f"{count} images of {source.name}"
        self.image_size, self.num_classes, self.varies = source.image_size, source.num_classes, source.varies
        self.undecodable = source.undecodable
        self._chosen = np.arange(count, dtype=np.int64) * len(source) // count

    @property
    def fingerprint(self) -> str:
        """Hash of the source's fingerprint and the number of images taken."""
        return digest([f"{self.source.fingerprint} {len(self)} of {len(self.source)}".encode()])

    def __len__(self) -> int:
        return len(self._chosen)

    def load(self, index: int, view: int = 0) -> tuple[Pixels, int]:
        """One image (3, s, s) and its label."""
        return self.source.load(int(self._chosen[index]), view)

    def load_batch(self, indices: Indices, views: Indices) -> tuple[Pixels, Labels]:
        """Images (B, 3, s, s) and labels (B,)."""
        return self.source.load_batch(self._chosen[np.asarray(indices, dtype=np.int64)], views)

    def order(self, seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        """Any order."""
        return permutation(seed, epoch, size)


def digest(parts: Iterable[bytes]) -> str:
    """A 32-digit hexadecimal BLAKE2b hash of the parts; their boundaries count."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()
