"""Image folders in torchvision's layout."""

import os
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from varscale.data.sources.base import ImageSource, check_captions, digest
from varscale.data.sources.decoded import MAX_UNDECODABLE, EncodedSource, class_order, existing
from varscale.data.sources.folder.listing import CAPTION, Listing, StoredFile
from varscale.data.sources.survey import Candidates
from varscale.data.transforms import Crop
from varscale.errors import DataError

HASHED_BYTES = 256 * 2**20
"""Image folders up to this size are told apart by their contents; it takes about a second."""
ONLY_CLASS = "images"
"""Name of the class of images that lie in no class folder."""
_ENDINGS = f"ending in one of {' '.join(IMG_EXTENSIONS)}"


class FolderSource(EncodedSource):
    """Image folders in torchvision's layout, `root/<class>/…/<image>`, or images of a single class straight in `root`.

    Classes are numbered in the order of their names, or of their numbers where all names are numbers. Hidden and system
    files and folders are never images or classes, damaged pictures are left out.

    Attributes:
        root: The folder.
        classes: The names of the class folders.

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
        listing = Listing.of(self.root)
        straight = not listing.classes and bool(listing.loose) and num_classes in (None, 1)
        held = {ONLY_CLASS: listing.loose} if straight else listing.classes
        self.classes = class_order(held)
        self._check_classes(listing, num_classes)
        stored = [file for name in self.classes for file in held[name]]
        labels = np.repeat(np.arange(len(self.classes)), [len(held[name]) for name in self.classes])
        candidates = Candidates(
            name=_printable(str(root)),
            content=digest(os.fsencode(f"{file.path} {file.bytes} {file.time}") for file in stored),
            count=len(stored),
            stored_bytes=sum(file.bytes for file in stored),
            open=lambda index: _opened(stored[index]),
            place=lambda index: _printable(stored[index].path),
            faults={index: file.fault for index, file in enumerate(stored) if file.fault},
        )
        super().__init__(candidates, labels, [_printable(name) for name in self.classes], crop, max_undecodable)
        self._candidates, self._texts = stored, listing.texts
        counts_C = np.bincount(self.labels, minlength=self.num_classes)
        if not counts_C.all():
            name = self.classes[int(counts_C.argmin())]
            raise DataError(f"{self.root / name}: none of its {len(held[name])} pictures can be read")
        self.notes = listing.notes()
        if listing.loose and not straight:
            number, first = len(listing.loose), _printable(Path(listing.loose[0].path).name)
            self.notes.append(
                f"images beside the class folders belong to no class and are left out: {number}, such as {first}"
            )
        folded = Counter(name.casefold() for name in self.class_names)
        if alike := [name for name in self.class_names if folded[name.casefold()] > 1]:
            named = ", ".join(alike[:6])
            self.notes.append(f"class folders that differ in capital letters alone are different classes: {named}")

    @property
    def files(self) -> list[Path]:
        """Each image's file."""
        return [Path(file.path) for file in self._stored]

    @property
    def _stored(self) -> list[StoredFile]:
        return [self._candidates[index] for index in self.kept_N.tolist()]

    def content_digest(self) -> str:
        """Hash of the files' names and sizes, and up to `HASHED_BYTES` in all of their contents.

        Of a larger set a file that is replaced by another of the same size is not noticed.
        """
        above, stored = len(os.fsencode(self.root)) + 1, self._stored
        listed = (b"%s %d" % (os.fsencode(file.path)[above:], file.bytes) for file in stored)
        small = sum(file.bytes for file in stored) <= HASHED_BYTES
        return digest(chain(listed, (Path(file.path).read_bytes() for file in stored) if small else ()))

    def captions(self) -> list[str]:
        """The text beside each picture: of `cat.png` the file `cat.txt`."""
        texts = [self._texts.get(file.with_suffix(CAPTION)) for file in self.files]
        captions = ["" if text is None else _words_of(text) for text in texts]
        expected = "a text beside each picture, as cat.txt beside cat.png"
        check_captions(captions, lambda index: _printable(str(self.files[index])), expected)
        return captions

    def check_apart_from(self, training: ImageSource) -> None:
        """Raise `DataError` where the training images lie in the same folder, or in other class folders."""
        if not isinstance(training, FolderSource):
            return
        if training.root.resolve() == self.root.resolve() and not self.parts:
            raise DataError(f"data.validation_path: {self.root} is the training set's folder, too")
        if training.class_names == self.class_names:
            return
        different = sorted({*training.class_names} ^ {*self.class_names})
        composed = [{unicodedata.normalize("NFC", name) for name in source.classes} for source in (training, self)]
        reason = "; the same letters in another form of Unicode" if composed[0] == composed[1] else ""
        raise DataError(
            f"data.validation_path: {self.root} and {training.root} differ in their class folders, such as "
            f"{different[0]}: labels would mean different classes{reason}"
        )

    def _check_classes(self, listing: Listing, num_classes: int | None) -> None:
        root, classes = self.root, self.classes
        if num_classes is not None and len(classes) != num_classes:
            found = ", ".join(map(_printable, classes[:3])) + (", …" if len(classes) > 3 else "")
            straight = f" and {len(listing.loose)} images straight in it" if listing.loose and not classes else ""
            single = "; or say num_classes 1, of images without classes" if straight else ""
            raise DataError(
                f"{root}: {len(classes)} class folders ({found or 'none'}){straight}, num_classes is {num_classes}; "
                f"expected {root}/<class>/<image>{single}"
            )
        if not any(listing.classes.values()) and not listing.loose:
            passed = f" ({'; '.join(listing.notes())})" if listing.notes() else ""
            raise DataError(f"{root}: no images; expected {root}/<class>/<image>, {_ENDINGS}{passed}")
        empty = [name for name in classes if name in listing.classes and not listing.classes[name]]
        if empty:
            raise DataError(f"{root / empty[0]}: no images, {_ENDINGS}")


def _words_of(file: Path) -> str:
    """The words of a caption's file, on one line."""
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except (OSError, ValueError) as error:
        raise DataError(f"{_printable(str(file))}: no caption that can be read, a text in UTF-8 ({error})") from None


def _opened(file: StoredFile) -> BinaryIO:
    return Path(file.path).open("rb")


def _printable(name: str) -> str:
    """A name in UTF-8, whatever bytes it is of on the disk."""
    return os.fsencode(name).decode(errors="replace")
