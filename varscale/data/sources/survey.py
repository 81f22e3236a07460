"""A look at all pictures of a source before anything is trained on them: which are damaged, how large, of what kinds.

Of every picture the header is read, and the end of its file, which is missing where a download was cut short. Of sets
up to `DECODED_BYTES` every picture is decoded as well; of larger ones those whose end is not as it should be, and
`DECODED_SAMPLE` others, evenly spread. What was found is kept in the user's cache folder, under a hash of the files'
names, sizes and times, so that the next process needs not look again.
"""

import hashlib
import io
import json
import logging
import math
import os
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from varscale.data.pictures import is_animated, is_deep, opened, orientation
from varscale.data.sources.base import digest
from varscale.data.transforms import Crop
from varscale.errors import DataError
from varscale.store.atomic import write_atomically
from varscale.store.layout import cache_folder

DECODED_BYTES = 256 * 2**20
"""Sets up to this size, as stored, are decoded once before training: some ten seconds at most."""
DECODED_SAMPLE = 1000
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for broken files: mostly OSError, for some formats and headers the others."""

_VERSION = 2  # of what is looked at, and how it is kept
_HEAD, _TAIL = 4096, 64
_DEEP_LOOKED_AT = 10
_SECONDS_BETWEEN_LINES = 5.0
_BAND = 256  # rows that are hashed at a time
_AT_ONCE = 256
_log = logging.getLogger(__name__)


class Look(NamedTuple):
    """What a look at one picture found."""

    size: tuple[int, int] = (0, 0)
    """Width and height, as stored."""
    stored: int = 0
    """Hash of the file's size, beginning and end."""
    shown: int = 0
    """Hash of the decoded pixels; 0: it was not decoded."""
    marks: tuple[str, ...] = ()
    """In what the picture is special, in words."""
    fault: str = ""
    """Why it can't be used."""
    lasting: bool = True
    """Whether the fault is the file's, not one of the system's that may be gone the next time."""


@dataclass(frozen=True)
class Survey:
    """What a look at all pictures of a source found."""

    left_out: dict[int, str]
    """Index of each picture that can't be used → why."""
    marks: dict[str, int]
    """In what pictures are special → how many are."""
    sizes_N2: NDArray[np.int64] = field(repr=False)
    """Width and height of each; 0 of those that were not looked at."""
    stored_N: NDArray[np.uint64] = field(repr=False)
    """Hash of each file's size, beginning and end."""
    shown_N: NDArray[np.uint64] = field(repr=False)
    """Hash of each picture's pixels; 0: not decoded."""
    lasting: bool = True
    """Whether the next look would find the same."""


@dataclass(frozen=True)
class Candidates:
    """The pictures of a source before it is known which can be used."""

    name: str
    """The source's, for messages."""
    content: str
    """Hash of their files' names, sizes and times."""
    count: int
    """How many there are."""
    stored_bytes: int
    """Size of all of them, as stored."""
    open: Callable[[int], BinaryIO]
    """A picture's file."""
    place: Callable[[int], str]
    """A picture's name in messages."""
    faults: Mapping[int, str]
    """What is known to be wrong already."""
    only: NDArray[np.int64] | None = None
    """Those to be looked at; None: all."""

    def short(self, index: int) -> str:
        """A picture's name within the source."""
        place = self.place(index)
        return place.removeprefix(self.name).lstrip("/ ") if place.startswith(self.name) else place


def survey(candidates: Candidates, crop: Crop, most_faults: int) -> Survey:
    """Look at pictures, or remember what an earlier look found.

    Raises:
        DataError: More than `most_faults` of them can't be used.
    """
    key = digest([f"{_VERSION} {candidates.content} {crop.levels is not None}".encode()])
    kept = cache_folder() / "pictures" / f"{key}.npz"
    found = _read(kept, candidates.count)
    if found is None:
        found = _look_at_all(candidates, crop, most_faults)
        if found.lasting:
            _write(kept, found)
    _check(candidates, found.left_out, candidates.count, most_faults)
    return found


def _check(candidates: Candidates, left_out: Mapping[int, str], looked_at: int, most_faults: int) -> None:
    """Raise `DataError` where too many of the pictures that were looked at can't be used."""
    number = len(left_out)
    if not candidates.count:
        raise DataError(f"{candidates.name}: no pictures")
    if number <= most_faults and number < looked_at:
        return
    among, limit = f"none of the {number:,} pictures looked at can be used", ""
    if number < looked_at:
        among = f"{number:,} of the {looked_at:,} pictures looked at can't be used"
        limit = f", data.max_undecodable is {most_faults}"
    deep = all("more than 8 bits" in reason for reason in left_out.values())
    cure = _how_to_show(candidates, list(left_out)[:_DEEP_LOOKED_AT]) if deep else ""
    what = by_reason(((candidates.short(index), reason) for index, reason in left_out.items()), names=3)
    raise DataError(f"{candidates.name}: {among}{limit}: {what}{cure}")


def _how_to_show(candidates: Candidates, deep: Sequence[int]) -> str:
    """What helps where all of these pictures have more than 8 bits a channel."""
    low, high = math.inf, -math.inf
    for index in deep:
        with candidates.open(index) as stream, opened(stream) as picture, suppress(*DECODING_ERRORS):
            values_hw = np.asarray(picture, dtype=np.float64)
            values_N = values_hw[np.isfinite(values_hw)]
            low, high = min(low, values_N.min(initial=low)), max(high, values_N.max(initial=high))
    if not low < high:
        return "; convert them to 8 bits"
    return (
        f"; convert them to 8 bits, or say which values are black and white, such as data.levels=[{low:g},{high:g}], "
        f"between which those of the first {len(deep)} lie"
    )


def _look_at_all(candidates: Candidates, crop: Crop, most_faults: int) -> Survey:
    count, name = candidates.count, candidates.name
    sizes_N2 = np.zeros((count, 2), dtype=np.int64)
    stored_N, shown_N = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.uint64)
    left_out, marks = dict(candidates.faults), Counter[str]()
    chosen = range(count) if candidates.only is None else candidates.only.tolist()
    chosen = [index for index in chosen if index not in left_out]
    every = 1 if candidates.stored_bytes <= DECODED_BYTES else max(1, len(chosen) // DECODED_SAMPLE)
    lasting = True
    started = told = time.monotonic()

    def look(place: int) -> Look:
        return _look(candidates.open, chosen[place], crop, decode=place % every == 0)

    # small pictures are read faster by one thread: what they take holds Python's lock
    threads = min(8, os.cpu_count() or 1) if candidates.stored_bytes > 16_384 * count else 1
    with ThreadPoolExecutor(threads, thread_name_prefix="look") as pool:
        for start in range(0, len(chosen) or 1, _AT_ONCE):
            places = range(start, min(start + _AT_ONCE, len(chosen)))
            for place, seen in zip(places, pool.map(look, places) if threads > 1 else map(look, places), strict=True):
                index = chosen[place]
                sizes_N2[index], stored_N[index], shown_N[index] = seen.size, seen.stored, seen.shown
                marks.update(seen.marks)
                lasting = lasting and seen.lasting
                if seen.fault:
                    left_out[index] = seen.fault
            if len(left_out) > most_faults:
                _check(candidates, left_out, places.stop + len(candidates.faults), most_faults)
            if (now := time.monotonic()) - told > _SECONDS_BETWEEN_LINES:
                told, left = now, (now - started) / places.stop * (len(chosen) - places.stop)
                _log.warning("%s: looked at %d of %d pictures, %.0f s left", name, places.stop, len(chosen), left)
    return Survey(left_out, dict(marks), sizes_N2, stored_N, shown_N, lasting)


def _look(open_stored: Callable[[int], BinaryIO], index: int, crop: Crop, *, decode: bool) -> Look:
    head = b""
    try:
        with open_stored(index) as stream:
            head = stream.read(_HEAD)
            length = stream.seek(0, io.SEEK_END)
            stream.seek(max(0, length - _TAIL))
            tail = stream.read()
            stream.seek(0)
            stored = _hash([length.to_bytes(8, "little"), head, tail])
            with opened(stream) as picture:
                size, marks = picture.size, []
                if is_animated(picture):
                    marks.append(FRAMES)
                if picture.mode == "CMYK":
                    marks.append(CMYK)
                if is_deep(picture):
                    marks.append(LEVELS)
                transparent = picture.has_transparency_data and not is_deep(picture)
                if decode or is_deep(picture) or not ends_well(picture.format, head, tail, length):
                    rgb = crop.shown(picture)
                    if picture.format in ("JPEG", "MPO") and not any(tail):
                        _check_zeros(stream)
                    transparent = transparent and not _is_opaque(picture)
                    shown = _hash([repr(rgb.size).encode(), *map(Image.Image.tobytes, _bands(rgb))])
                else:
                    crop.check(picture)
                    shown = 0
                if transparent:
                    marks.append(TRANSPARENT)
                # of a PNG that is not decoded, Pillow would decode it to know
                if orientation(picture) > 1 if shown or picture.format != "PNG" else "exif" in picture.info:
                    marks.append(TURNED)
                return Look(size, stored, shown, tuple(marks))
    except DECODING_ERRORS as error:
        return Look(fault=why_broken(error, head), lasting=not (isinstance(error, OSError) and error.errno is not None))


def _check_zeros(stream: BinaryIO) -> None:
    """Refuse a JPEG that was not written to its end, for which its decoder shows grey; cameras put zeros behind it."""
    stream.seek(0)
    if not stream.read().rstrip(b"\0").endswith(b"\xff\xd9"):
        raise EOFError


FRAMES = "with several frames or pages, of which the first is taken"
CMYK = "in CMYK, converted to RGB"
TRANSPARENT = "with transparent parts, behind which data.background is shown"
LEVELS = "with more than 8 bits a channel, shown as data.levels says"
TURNED = "turned as their EXIF data say"


def ends_well(stored_as: str | None, head: bytes, tail: bytes, length: int) -> bool:
    """Whether a file ends as its format says, so that nothing of it is missing."""
    if stored_as in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if stored_as == "PNG":
        return b"IEND" in tail
    return stored_as == "WEBP" and int.from_bytes(head[4:8], "little") + 8 <= length


def why_broken(error: Exception, head: bytes) -> str:
    """In words, the same ones for the same fault, why a picture whose file begins with `head` does not decode."""
    if isinstance(error, UnidentifiedImageError):
        return foreign(head, "the picture") or "no picture of a known format"
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror[:1].lower() + error.strerror[1:]
    if isinstance(error, Image.DecompressionBombError):
        return "too large: over 178 million pixels; make it smaller"
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return "cut short"
    known = isinstance(error, ValueError) and text
    return text if known else f"damaged ({text or type(error).__name__})"


def foreign(head: bytes, wanted: str) -> str:
    """What a download leaves in place of what was wanted, by how the file begins; nothing where it is none of that."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer instead of {wanted} (git lfs pull fetches it)"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"a page of the web instead of {wanted}"
    return "" if any(head) else "nothing but zeros"


def by_reason(faults: Iterable[tuple[str, str]], names: int) -> str:
    """Pictures and why they can't be used, as text: each reason with up to `names` of its pictures.

    What follows a tab in a reason is said of the picture alone.
    """
    groups: dict[str, list[str]] = {}
    for picture, fault in faults:
        reason, _, detail = fault.partition("\t")
        groups.setdefault(reason, []).append(f"{picture} ({detail})" if detail else picture)
    more = {reason: f" and {len(group) - names:,} more" if group[names:] else "" for reason, group in groups.items()}
    return "; ".join(f"{reason}: {', '.join(group[:names])}{more[reason]}" for reason, group in groups.items())


def _is_opaque(picture: Image.Image) -> bool:
    """Whether no pixel of a decoded picture is transparent, though it could be."""
    with_alpha = picture if picture.mode in ("RGBA", "LA", "PA") else picture.convert("RGBA")
    return bool(with_alpha.getextrema()[-1] == (255, 255))


def _bands(picture: Image.Image) -> Iterator[Image.Image]:
    """A picture's rows, some at a time, so that its bytes are never copied all at once."""
    for top in range(0, picture.height, _BAND):
        yield picture.crop((0, top, picture.width, min(top + _BAND, picture.height)))


def _hash(parts: Iterable[bytes]) -> int:
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(part)
    return int.from_bytes(total.digest(), "little") or 1


def _read(path: Path, count: int) -> Survey | None:
    """What was kept; None where nothing is, or it can't be used."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            words = json.loads(str(stored["words"]))
            left_out = {int(index): str(reason) for index, reason in words["left_out"].items()}
            found = Survey(left_out, words["marks"], *(stored[name] for name in ("sizes", "stored", "shown")))
    except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile):
        return None
    return found if len(found.sizes_N2) == count else None


def _write(path: Path, found: Survey) -> None:
    """Keep what was found; where that can't be, the next process looks again."""
    words = json.dumps({"left_out": found.left_out, "marks": found.marks})
    content = io.BytesIO()
    np.savez(content, words=np.array(words), sizes=found.sizes_N2, stored=found.stored_N, shown=found.shown_N)
    with suppress(OSError):
        write_atomically(path, content.getvalue())
