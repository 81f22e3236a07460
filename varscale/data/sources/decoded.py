"""Images that are decoded and cropped: what such sources share.

Letters: B batch, s side of an image in pixels.
"""

import difflib
import logging
import os
import struct
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varscale.data.sources.base import ImageSource, Indices, Labels, Pixels, digest
from varscale.data.transforms import Crop
from varscale.errors import DataError

MAX_UNDECODABLE = 10
"""Images that may fail to decode before a source gives up, unless said otherwise."""

# What Pillow raises for broken files: mostly OSError, for some formats and headers the others.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_log = logging.getLogger(__name__)


class DecodedSource(ImageSource):
    """Labelled pictures that are decoded, resized and cropped when asked for.

    A picture that doesn't decode is recorded in `undecodable`, and the next one in order stands in for it with its own
    label, so every index always means the same image. More than `max_undecodable` of them raise `DataError`.
    """

    def __init__(self, name: str, labels: Labels, num_classes: int, crop: Crop, max_undecodable: int) -> None:
        self.name, self.labels, self.num_classes = name, labels, num_classes
        self.crop, self.image_size, self.varies = crop, crop.image_size, crop.varies
        self.max_undecodable = max_undecodable
        self.undecodable: dict[str, str] = {}
        self._record_lock = threading.Lock()

    @abstractmethod
    def open_picture(self, index: int) -> Image.Image:
        """The picture as stored."""

    @abstractmethod
    def picture_name(self, index: int) -> str:
        """The picture's file, or its file and row."""

    @abstractmethod
    def content_digest(self) -> str:
        """Hash of what is stored: cheap, and different when it changed, as far as that is cheap to tell."""

    @property
    def fingerprint(self) -> str:
        """Hash of the stored pictures, the labels and how they are cropped."""
        return digest([self.content_digest().encode(), self.labels.tobytes(), repr(self.crop).encode()])

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, view: int = 0) -> tuple[Pixels, int]:
        """One view of an image: (3, s, s) in 0..255 and its label.

        Raises:
            DataError: If more than `max_undecodable` pictures did not decode.
        """
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                return self.crop.apply(self.open_picture(candidate), candidate, view), int(self.labels[candidate])
            except DataError:
                raise
            except _DECODING_ERRORS as error:
                self._record_undecodable(self.picture_name(candidate), error)
        raise DataError(f"{self.name}: none of the {len(self)} images decodes")

    def load_batch(self, indices: Indices, views: Indices) -> tuple[Pixels, Labels]:
        """Images (B, 3, s, s) in 0..255 and labels (B,)."""
        pixels_B3ss = np.empty((len(indices), 3, self.image_size, self.image_size), dtype=np.uint8)
        labels_B = np.empty(len(indices), dtype=np.int64)
        for row, (index, view) in enumerate(zip(indices, views, strict=True)):
            pixels_B3ss[row], labels_B[row] = self.load(int(index), int(view))
        return pixels_B3ss, labels_B

    def _record_undecodable(self, picture: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        with self._record_lock:
            known, most = picture in self.undecodable, self.max_undecodable
            self.undecodable[picture] = reason
            count = len(self.undecodable)
        if not known:
            told = "%s does not decode (%s); the next image stands in for it (%d so far, at most %d)"
            _log.warning(told, picture, reason, count, most)
        if count > most:
            raise DataError(
                f"{self.name}: {count} images do not decode, max_undecodable is {most}; "
                f"the last is {picture} ({reason})"
            ) from None


def existing(path: Path) -> Path:
    """The path, `~` resolved, if there is such a file or folder.

    Raises:
        DataError: If there isn't, or it can't be told; the message names the nearest that exists.
    """
    path = expanded(path)
    if path.exists():
        return path
    parent = next(folder for folder in path.absolute().parents if folder.is_dir() and os.access(folder, os.R_OK))
    missing = path.absolute().relative_to(parent).parts[0]
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    raise DataError(f"{path}: no such file or folder; {parent} has {nearest(missing, names)}")


def expanded(path: Path) -> Path:
    """The path with `~` resolved.

    Raises:
        DataError: There is no such user, or this one has no home directory.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise DataError(f"{path}: the home directory {path.parts[0]} is not known; write the path without ~") from None


def nearest(wanted: str, names: Iterable[str]) -> str:
    """The names most like the wanted one, or the first few, as text."""
    everything = sorted(names)
    like = difflib.get_close_matches(wanted, everything, n=3)
    more = ", …" if not like and len(everything) > 5 else ""
    return ", ".join(like or everything[:5]) + more or "nothing"


def check_labels(labels: NDArray[np.int64], num_classes: int, place: Callable[[int], str]) -> None:
    """Raise `DataError` naming the place of the first label outside 0 … num_classes - 1, and how many there are."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        first = int(wrong[0])
        raise DataError(
            f"{place(first)}: label {labels[first]} is outside 0 … {num_classes - 1} (num_classes {num_classes})"
            + (f"; so are {wrong.size - 1} more" if wrong.size > 1 else "")
        )
