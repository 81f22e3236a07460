"""What every source of images can do, and even subsets of a source.

Letters: B batch, s side of an image in pixels.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from varscale.errors import DataError

Indices = Sequence[int] | NDArray[np.int64]
Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class ImageSource(ABC):
    """Labelled square images, each view of each a pure function of (image index, view)."""

    name: str
    """Where the images come from, for messages."""
    image_size: int
    """Side s in pixels."""
    num_classes: int
    """Labels are 0 … num_classes - 1."""
    procedural: bool = False
    """Whether image i is the same however many images the source has, and images are in no particular order."""
    varies: bool
    """Whether two views of an image can differ."""
    class_names: tuple[str, ...] = ()
    """Name of each label, where labels have names."""
    undecodable: dict[str, str]
    """Images that turned out damaged while they were loaded → why. Another one, drawn at random, stands in for each."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that the pixels and labels depend on, except the number of images of a procedural source."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def load_batch(self, indices: Indices, views: Indices) -> tuple[Pixels, Labels]:
        """Images (B, 3, s, s) in 0..255 and labels (B,). Safe to call from several threads."""

    def labels_of(self, indices: Indices) -> Labels:
        """Labels (B,) alone; a source that knows them without loading the images says so by its own method."""
        return self.load_batch(indices, [0] * len(indices))[1]

    def load(self, index: int, view: int = 0) -> tuple[Pixels, int]:
        """One image (3, s, s) in 0..255 and its label."""
        pixels_1, labels_1 = self.load_batch([index], [view])
        return pixels_1[0], int(labels_1[0])

    def captions(self) -> list[str]:
        """What each image shows, in words.

        Raises:
            DataError: There are no captions, or some images have none.
        """
        raise DataError(f"data.captions: {self.name} has no captions")

    def caption_vectors(self) -> NDArray[np.float32]:
        """Each image's embedding (N, D), where a data set has these instead of captions.

        Raises:
            DataError: There are none, or some images have none.
        """
        raise DataError(f"data.captions.encoder: {self.name} has no vectors; a column of a Parquet file can have them")

    def order(self, seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        """A random order of the first `size` images, in which an epoch of training takes them."""
        from varscale.numerics.randomness import permutation  # torch, which asking what data there are needs not

        return permutation(seed, epoch, size)

    def summary(self) -> list[str]:
        """What a person should know of the images before anything is trained on them, in lines; [] where nothing."""
        return []

    def shared_with(self, training: "ImageSource") -> list[str]:
        """Names of those images that are in another source, too, as far as that is known."""
        return []

    def check_apart_from(self, training: "ImageSource") -> None:
        """Of validation images: raise `DataError` where some are trained on, or labels mean other classes there."""
        if training.fingerprint == self.fingerprint:
            raise DataError(f"data: {self.name}: the validation images are the training images")


class SubsetSource(ImageSource):
    """`count` images of another source, evenly spread over it, so that data sorted by class stay balanced."""

    def __init__(self, source: ImageSource, count: int) -> None:
        if not 1 <= count <= len(source):
            raise DataError(f"{source.name}: {count} images asked for, it has {len(source)}")
        self.source = source
        self.name = f"{count} images of {source.name}"
        self.image_size, self.num_classes, self.varies = source.image_size, source.num_classes, source.varies
        self.undecodable, self.class_names = source.undecodable, source.class_names
        self._chosen = np.arange(count, dtype=np.int64) * len(source) // count

    @property
    def fingerprint(self) -> str:
        """Hash of the source's fingerprint and the number of images taken."""
        return digest([f"{self.source.fingerprint} {len(self)} of {len(self.source)}".encode()])

    def __len__(self) -> int:
        return len(self._chosen)

    def load_batch(self, indices: Indices, views: Indices) -> tuple[Pixels, Labels]:
        """Images (B, 3, s, s) and labels (B,)."""
        return self.source.load_batch(self._chosen[np.asarray(indices, dtype=np.int64)], views)

    def labels_of(self, indices: Indices) -> Labels:
        """Those of the chosen images."""
        return self.source.labels_of(self._chosen[np.asarray(indices, dtype=np.int64)])

    def captions(self) -> list[str]:
        """Those of the chosen images."""
        captions = self.source.captions()
        return [captions[index] for index in self._chosen.tolist()]

    def caption_vectors(self) -> NDArray[np.float32]:
        """Those of the chosen images."""
        return self.source.caption_vectors()[self._chosen]

    def check_apart_from(self, training: ImageSource) -> None:
        """What the whole source checks."""
        self.source.check_apart_from(training)

    def summary(self) -> list[str]:
        """How many are taken, and what there is to know of the whole source."""
        return [f"{len(self):,} of these images are used: {self.source.name}", *self.source.summary()]

    def shared_with(self, training: ImageSource) -> list[str]:
        """Names of those of the whole source."""
        return self.source.shared_with(training)


def check_captions(captions: Sequence[str], place: Callable[[int], str], expected: str) -> None:
    """Raise `DataError` where images have no caption: how many, the first one's place, and what is expected."""
    missing = [index for index, caption in enumerate(captions) if not caption.strip()]
    if missing:
        raise DataError(
            f"data.captions: {len(missing)} of {len(captions)} images have no caption, such as {place(missing[0])}; "
            f"expected {expected}"
        )


def digest(parts: Iterable[bytes]) -> str:
    """A 32-digit hexadecimal BLAKE2b hash of the parts; their boundaries count."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()
