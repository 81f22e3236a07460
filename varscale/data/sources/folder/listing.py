"""What lies in an image folder: class folders, images, and what is neither."""

import errno
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from varscale.errors import DataError

SYSTEM_NAMES = frozenset(
    {
        *("__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
        *("system volume information", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)
"""Files and folders that systems and network storages put beside people's own, in small letters."""


CAPTION = ".txt"
"""What the caption of `cat.png` ends in, instead of the picture's suffix."""


class StoredFile(NamedTuple):
    """An image's file."""

    path: str
    bytes: int
    time: int
    """When it was changed, nanoseconds."""
    fault: str = ""
    """Why it can't be opened."""


@dataclass
class Listing:
    """What lies in a folder of class folders, or in one of images."""

    root: Path
    classes: dict[str, list[StoredFile]] = field(default_factory=dict)
    """Name of each class folder → its images, in the order of their names, folder by folder."""
    loose: list[StoredFile] = field(default_factory=list)
    """Images that lie beside the class folders."""
    hidden: Counter[str] = field(default_factory=Counter)
    """Hidden and system files and folders that were passed over, by their names' kinds."""
    others: Counter[str] = field(default_factory=Counter)
    """Files that are no images by their names, by suffix; texts aren't among them."""
    texts: dict[Path, Path] = field(default_factory=dict)
    """Files of text, which may be captions of images: name with `CAPTION` in small letters → file."""

    @classmethod
    def of(cls, root: Path) -> "Listing":
        """List a folder.

        Raises:
            DataError: A folder can't be read.
        """
        listing = cls(root)
        for entry in listing._entries(root):
            if _is_folder(entry):
                found = dict(listing._folders(entry.path, frozenset({_identity(root)})))
                listing.classes[entry.name] = [file for path in sorted(found) for file in found[path]]
            elif file := listing._image(entry):
                listing.loose.append(file)
        return listing

    def notes(self) -> list[str]:
        """What was passed over, in lines."""
        lines = []
        if self.hidden:
            lines.append(f"hidden and system files and folders are passed over: {_counted(self.hidden)}")
        images = [file for files in (*self.classes.values(), self.loose) for file in files]
        captions = self.texts.keys() & {Path(file.path).with_suffix(CAPTION) for file in images}
        others = self.others + Counter({CAPTION: len(self.texts) - len(captions)})
        if others:
            suffixes = " ".join(IMG_EXTENSIONS)
            lines.append(f"files that are no images by their names are left out: {_counted(others)} (not {suffixes})")
        if captions:
            lines.append(
                f"captions beside pictures ({CAPTION}): {len(captions)} of {len(images)}; models of condition: text "
                "learn them, by data.captions"
            )
        return lines

    def _entries(self, folder: str | Path) -> list["os.DirEntry[str]"]:
        """What lies in a folder and is neither hidden nor a system's, in the order of their names."""
        try:
            with os.scandir(folder) as entries:
                everything = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: can't be read ({error.strerror})") from None
        own = [entry for entry in everything if not is_hidden(entry.name)]
        self.hidden.update(_hidden_kind(entry.name) for entry in everything if is_hidden(entry.name))
        return own

    def _folders(self, folder: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, list[StoredFile]]]:
        """A folder and all below it, each with its images; links back to a folder above are not followed."""
        identity = _identity(folder)
        if identity in above:
            self.others["(links to a folder above)"] += 1
            return
        files, folders = [], []
        for entry in self._entries(folder):
            if _is_folder(entry):
                folders.append(entry.path)
            elif file := self._image(entry):
                files.append(file)
        yield folder, files
        for path in folders:
            yield from self._folders(path, above | {identity})

    def _image(self, entry: "os.DirEntry[str]") -> StoredFile | None:
        """The file, if it is an image by its name."""
        suffix = Path(entry.name).suffix.lower()
        if suffix == CAPTION:
            self.texts[Path(entry.path).with_suffix(CAPTION)] = Path(entry.path)
            return None
        if suffix not in IMG_EXTENSIONS:
            self.others[suffix or "(without a suffix)"] += 1
            return None
        try:
            status = entry.stat()
        except OSError as error:
            dead = entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP)
            return StoredFile(entry.path, 0, 0, "a link to nothing" if dead else str(error.strerror).lower())
        fault = "" if S_ISREG(status.st_mode) else "not a file, but a pipe, a socket or a device"
        return StoredFile(entry.path, status.st_size, status.st_mtime_ns, fault)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is never a person's own image or class."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_NAMES


def _hidden_kind(name: str) -> str:
    return "._* (AppleDouble)" if name.startswith("._") else name


def _counted(counts: Counter[str]) -> str:
    """The commonest names and how often each occurs."""
    shown = ", ".join(f"{name} ({number})" for name, number in counts.most_common(5))
    return shown + (f" and {len(counts) - 5} more" if len(counts) > 5 else "")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """A link that leads back to itself, or to where nobody may look, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino
