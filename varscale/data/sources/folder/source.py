"""Image folders in torchvision's layout."""

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from varscale.data.sources.base import ImageSource, digest
from varscale.data.sources.decoded import MAX_UNDECODABLE, DecodedSource, existing
from varscale.data.transforms import Crop
from varscale.errors import DataError

HASHED_BYTES = 256 * 2**20
"""Image folders up to this size are told apart by their contents; it takes about a second."""


class FolderSource(DecodedSource):
    """Image folders in torchvision's layout, `root/<class>/…/<image>`; classes are numbered in order of their names.

    Raises:
        DataError: If the folder is missing, holds no images, or not `num_classes` classes.
    """

    def __init__(
        self,
        root: str | Path,
        crop: Crop,
        *,
        num_classes: int | None = None,
        max_undecodable: int = MAX_UNDECODABLE,
    ) -> None:
        self.root = existing(Path(root))
        if not self.root.is_dir():
            raise DataError(f"{root}: a file; expected a folder {root}/<class>/<image>")
        self.classes = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
        if num_classes is not None and len(self.classes) != num_classes:
            found = ", ".join(self.classes[:3]) + (", …" if len(self.classes) > 3 else "")
            raise DataError(
                f"{root}: {len(self.classes)} class folders ({found or 'none'}), num_classes is {num_classes}; "
                f"expected {root}/<class>/<image>"
            )
        numbers = {name: number for number, name in enumerate(self.classes)}
        samples = make_dataset(self.root, numbers, IMG_EXTENSIONS, allow_empty=True) if numbers else []
        endings = f"ending in one of {' '.join(IMG_EXTENSIONS)}"
        if not samples:
            raise DataError(f"{root}: no images; expected {root}/<class>/<image>, {endings}")
        empty = sorted({*self.classes} - {self.classes[label] for _, label in samples})
        if empty:
            raise DataError(f"{self.root / empty[0]}: no images, {endings}")
        self.files = [Path(file) for file, _ in samples]
        labels = np.array([label for _, label in samples], dtype=np.int64)
        super().__init__(str(root), labels, len(self.classes), crop, max_undecodable)

    def open_picture(self, index: int) -> Image.Image:
        """The picture as stored."""
        with Image.open(self.files[index]) as picture:
            picture.load()
            return picture

    def picture_name(self, index: int) -> str:
        """The picture's file."""
        return str(self.files[index])

    def content_digest(self) -> str:
        """Hash of the files' names and sizes, and up to `HASHED_BYTES` in all of their contents.

        Of a larger set a file that is replaced by another of the same size is not noticed.
        """
        sizes = [file.stat().st_size for file in self.files]
        names = [file.relative_to(self.root).as_posix() for file in self.files]
        listed = [f"{name} {size}".encode() for name, size in zip(names, sizes, strict=True)]
        contents = (file.read_bytes() for file in self.files) if sum(sizes) <= HASHED_BYTES else ()
        return digest([*listed, *contents])

    def check_apart_from(self, training: ImageSource) -> None:
        """Raise `DataError` where the training images lie in the same folder, or in other class folders."""
        if not isinstance(training, FolderSource):
            return
        if training.root.resolve() == self.root.resolve():
            raise DataError(f"data.validation_path: {self.root} is the training set's folder, too")
        different = sorted({*training.classes} ^ {*self.classes})
        if different:
            raise DataError(
                f"data.validation_path: {self.root} and {training.root} differ in their class folders, such as "
                f"{different[0]}: labels would mean different classes"
            )
