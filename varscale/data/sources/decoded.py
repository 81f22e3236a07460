"""Images that are decoded and cropped: what such sources share.

Letters: B batch, N pictures, s side of an image in pixels.
"""

import copy
import difflib
import logging
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from varscale.data.pictures import opened
from varscale.data.sources.base import ImageSource, Indices, Labels, Pixels, digest
from varscale.data.sources.survey import (
    DECODING_ERRORS,
    LEVELS,
    TRANSPARENT,
    TURNED,
    Candidates,
    by_reason,
    survey,
    why_broken,
)
from varscale.data.transforms import Crop, uniform_draws
from varscale.errors import DataError

MAX_UNDECODABLE = 10
"""Pictures that may be damaged before a source gives up, unless said otherwise."""
MOST_STAND_INS = 100
_NAMED = 10
_log = logging.getLogger(__name__)


class DecodedSource(ImageSource):
    """Labelled pictures that are decoded, resized and cropped when asked for.

    A picture that turns out damaged only then is recorded in `undecodable`, and another one, drawn at random, stands in
    for it with its own label. More than `max_undecodable` of them raise `DataError`.
    """

    def __init__(self, name: str, labels: Labels, num_classes: int, crop: Crop, max_undecodable: int) -> None:
        self.name, self.labels, self.num_classes = name, labels, num_classes
        self.crop, self.image_size, self.varies = crop, crop.image_size, crop.varies
        self.max_undecodable = max_undecodable
        self.undecodable: dict[str, str] = {}
        self._record_lock = threading.Lock()

    @abstractmethod
    def cropped(self, index: int, view: int) -> Pixels:
        """One view of the picture as stored: (3, s, s) in 0..255; raises what `Crop.apply` raises."""

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
            DataError: If more than `max_undecodable` pictures turned out damaged.
        """
        candidate = index
        for attempt in range(1, MOST_STAND_INS):
            try:
                return self.cropped(candidate, view), int(self.labels[candidate])
            except DataError:
                raise
            except DECODING_ERRORS as error:
                self._record_undecodable(self.picture_name(candidate), why_broken(error, b"?"))
            candidate = int(uniform_draws(self.crop.seed, index, 2**32 + attempt)[0] * len(self))
        raise DataError(f"{self.name}: pictures do not decode any more, such as {self.picture_name(index)}")

    def load_batch(self, indices: Indices, views: Indices) -> tuple[Pixels, Labels]:
        """Images (B, 3, s, s) in 0..255 and labels (B,)."""
        pixels_B3ss = np.empty((len(indices), 3, self.image_size, self.image_size), dtype=np.uint8)
        labels_B = np.empty(len(indices), dtype=np.int64)
        for row, (index, view) in enumerate(zip(indices, views, strict=True)):
            pixels_B3ss[row], labels_B[row] = self.load(int(index), int(view))
        return pixels_B3ss, labels_B

    def labels_of(self, indices: Indices) -> Labels:
        """Labels (B,), of damaged images their own."""
        return self.labels[np.asarray(indices, dtype=np.int64)]

    def _record_undecodable(self, picture: str, reason: str) -> None:
        with self._record_lock:
            known, most = picture in self.undecodable, self.max_undecodable
            self.undecodable[picture] = reason
            count = len(self.undecodable)
        if not known:
            told = "%s does not decode (%s); another image, drawn at random, stands in for it (%d so far, at most %d)"
            _log.warning(told, picture, reason, count, most)
        if count > most:
            raise DataError(
                f"{self.name}: {count} images do not decode, max_undecodable is {most}; "
                f"the last is {picture} ({reason})"
            ) from None


class EncodedSource(DecodedSource):
    """Pictures that are stored as encoded files, all of which are looked at first: damaged ones are left out.

    Attributes:
        survey: What the look at them found.
        kept_N: Of each image its place among the candidates.
        notes: What else there is to know of them, in lines.
        parts: Which part of the pictures that can be used these are, in words; empty: all.
    """

    parts: tuple[str, ...] = ()

    def __init__(
        self, candidates: Candidates, labels: Labels, classes: int | Sequence[str], crop: Crop, max_undecodable: int
    ) -> None:
        """Look at the candidates, which have these labels of so many classes, or of classes of these names.

        Raises:
            DataError: More than `max_undecodable` pictures are damaged.
        """
        self.candidates = candidates
        self.survey = survey(candidates, crop, max_undecodable)
        self.kept_N = np.delete(np.arange(candidates.count), list(self.survey.left_out))
        self.notes: list[str] = []
        if not isinstance(classes, int):
            self.class_names = tuple(classes)
        number = classes if isinstance(classes, int) else len(classes)
        super().__init__(candidates.name, labels[self.kept_N], number, crop, max_undecodable)

    def held_out(self, count: int, split: Literal["train", "validation"]) -> Self:
        """Of a set without a validation split: `count` images, spread evenly over it, to validate, or all others.

        Raises:
            DataError: It has no more images than that.
        """
        if not 0 < count < len(self):
            raise DataError(
                f"data.validation_images: {count} can't be held out of the {len(self)} images of {self.name}"
            )
        held_N = _spread(count, len(self))
        if split == "validation":
            return self._part(held_N, f"{count} held out")
        return self._part(np.delete(np.arange(len(self)), held_N), f"without {count} held out")

    def spread(self, count: int) -> Self:
        """`count` images, spread evenly over the set.

        Raises:
            DataError: It has fewer.
        """
        if count > len(self):
            raise DataError(f"data.training_images: {count} asked for, {self.name} has {len(self)}")
        return self._part(_spread(count, len(self)), f"{count} of them")

    def _part(self, chosen_N: NDArray[np.int64], words: str) -> Self:
        """Some of the images, as a source of their own; what is kept in memory is shared."""
        part = copy.copy(self)
        part.kept_N, part.labels = self.kept_N[chosen_N], self.labels[chosen_N]
        part.name, part.parts, part.undecodable = f"{self.name} ({words})", (*self.parts, words), {}
        return part

    def cropped(self, index: int, view: int) -> Pixels:
        """One view of the picture as stored: (3, s, s) in 0..255; raises what `Crop.apply` raises."""
        with self.candidates.open(int(self.kept_N[index])) as stream, opened(stream) as picture:
            return self.crop.apply(picture, index, view)

    def picture_name(self, index: int) -> str:
        """The picture's file, or its file and row."""
        return self.candidates.place(int(self.kept_N[index]))

    @property
    def fingerprint(self) -> str:
        """Hash of the stored pictures, the labels, how they are cropped, and how special ones are shown."""
        marks = self.survey.marks
        shown = [repr(self.crop.background).encode()] if TRANSPARENT in marks else []
        shown += [repr(self.crop.levels).encode()] if LEVELS in marks else []
        shown += [b"turned"] if TURNED in marks else []
        shown += [part.encode() for part in self.parts]
        return digest([super().fingerprint.encode(), *shown]) if shown else super().fingerprint

    def summary(self) -> list[str]:
        """Images and classes, sizes, what was left out and why, and how special pictures are shown."""
        counts_C = np.bincount(self.labels, minlength=self.num_classes)
        smallest, largest = self._class(int(counts_C.argmin()), counts_C), self._class(int(counts_C.argmax()), counts_C)
        each = f"{counts_C[0]:,} each" if counts_C.min() == counts_C.max() else f"{smallest} to {largest}"
        classes = "1 class" if self.num_classes == 1 else f"{self.num_classes:,} classes of {each}"
        sizes_N2 = self.survey.sizes_N2[self.kept_N]
        sizes_N2 = sizes_N2[sizes_N2[:, 0] > 0]
        lines = [f"{self.name}: {_count(len(self), 'image')} in {classes}{_sizes(sizes_N2)}"]
        if left_out := self.survey.left_out:
            why = by_reason(
                ((self.candidates.short(index), reason) for index, reason in left_out.items()), names=_NAMED
            )
            lines.append(f"{_count(len(left_out), 'picture')} left out: {why}")
        lines += [f"{_count(number, 'picture')} {mark}" for mark, number in self.survey.marks.items()]
        smaller = int((sizes_N2.min(1) < self.image_size).sum())
        if smaller:
            lines.append(f"{_count(smaller, 'picture')} smaller than image_size ({self.image_size}) will be enlarged")
        if empty := np.flatnonzero(counts_C == 0).tolist():
            named = ", ".join(self._name(label) for label in empty[:3]) + (", …" if empty[3:] else "")
            lines.append(f"no pictures of {len(empty):,} of the classes: {named}")
        return [lines[0], *(f"  {line}" for line in (*lines[1:], *self.notes))]

    def shared_with(self, training: ImageSource) -> list[str]:
        """Names of those pictures that are in another source, too: the same file, or the same pixels where known."""
        if not isinstance(training, EncodedSource):
            return []
        (ours, theirs), (stored_N, their_stored) = (
            [getattr(source.survey, key)[source.kept_N] for source in (self, training)]
            for key in ("shown_N", "stored_N")
        )
        same_N = (ours > 0) & np.isin(ours, theirs)
        places = {int(hashed): place for place, hashed in enumerate(their_stored.tolist()) if hashed}
        for index in np.flatnonzero(~same_N & (stored_N > 0) & np.isin(stored_N, their_stored)).tolist():
            same_N[index] = self._content(index) == training._content(places[int(stored_N[index])])
        return [self.picture_name(index) for index in np.flatnonzero(same_N).tolist()]

    def _content(self, index: int) -> bytes:
        with self.candidates.open(int(self.kept_N[index])) as stream:
            return stream.read()

    def _class(self, label: int, counts_C: NDArray[np.int64]) -> str:
        return f"{counts_C[label]:,} ({self._name(label)})"

    def _name(self, label: int) -> str:
        return self.class_names[label] if self.class_names else f"label {label}"


def _spread(count: int, number: int) -> NDArray[np.int64]:
    """Places spread evenly over so many, so that images sorted by class stay balanced."""
    return np.arange(count, dtype=np.int64) * number // count


def _sizes(sizes_N2: NDArray[np.int64]) -> str:
    """The smallest, the median and the largest picture, by area."""
    if not len(sizes_N2):
        return ""
    by_area = sizes_N2[np.argsort(sizes_N2.prod(1), kind="stable")]
    small, middle, large = (f"{width} × {height}" for width, height in by_area[[0, len(by_area) // 2, -1]])
    return f", {small} pixels each" if small == large else f", {small} to {large} pixels, median {middle}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels: of their numbers where all of them are numbers."""
    ordered = sorted(names)
    if all(name.isascii() and name.isdigit() for name in ordered):
        ordered.sort(key=int)
    return ordered


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
