"""CIFAR-10 as torchvision downloads it."""

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from varscale.data.sources.base import Pixels, digest
from varscale.data.sources.decoded import MAX_UNDECODABLE, DecodedSource, check_labels, existing
from varscale.data.transforms import Crop
from varscale.errors import DataError


class Cifar10Source(DecodedSource):
    """CIFAR-10 as torchvision downloads it: `root/cifar-10-batches-py`.

    Raises:
        DataError: If the files are missing or damaged.
    """

    def __init__(
        self,
        root: str | Path,
        crop: Crop,
        *,
        train: bool = True,
        num_classes: int = 10,
        max_undecodable: int = MAX_UNDECODABLE,
    ) -> None:
        folder = existing(Path(root))
        try:
            stored = CIFAR10(str(folder), train=train, download=False)
        except (RuntimeError, OSError, KeyError) as error:
            raise DataError(
                f"{root}: no intact cifar-10-batches-py inside ({error}); "
                f"torchvision.datasets.CIFAR10({str(root)!r}, download=True) fetches it"
            ) from None
        self._pixels_N32x32x3: Pixels = stored.data
        labels = np.asarray(stored.targets, dtype=np.int64)
        check_labels(labels, num_classes, lambda row: f"{root}, image {row}")
        if num_classes == len(stored.classes):
            self.class_names = tuple(stored.classes)
        super().__init__(f"{root} ({'train' if train else 'test'})", labels, num_classes, crop, max_undecodable)

    def cropped(self, index: int, view: int) -> Pixels:
        """One view of the picture as stored: (3, s, s) in 0..255."""
        return self.crop.apply(Image.fromarray(self._pixels_N32x32x3[index]), index, view)

    def picture_name(self, index: int) -> str:
        """The picture's number."""
        return f"{self.name}, image {index}"

    def content_digest(self) -> str:
        """Hash of all pixels."""
        return digest([self._pixels_N32x32x3.tobytes()])
