"""What data a folder or a Parquet file holds: which source reads it, where its splits lie, its columns and classes."""

import copy
import glob
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from varscale.config.data import PicturesSection
from varscale.data.sources.decoded import EncodedSource, existing
from varscale.data.sources.folder.config import FolderSection
from varscale.data.sources.folder.listing import Listing, is_hidden
from varscale.data.sources.parquet.columns import find_columns
from varscale.data.sources.parquet.config import ParquetSection
from varscale.data.sources.parquet.labels import find_labels
from varscale.data.sources.parquet.source import find_files, tables_below, tables_in
from varscale.errors import DataError

TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "test", "testing")
"""Words by which files and folders name their split, the best first."""
_LOOK = 32  # pixels; what is found does not depend on it


@dataclass(frozen=True)
class FoundData:
    """Pictures that were found, and how an experiment describes them."""

    settings: dict[str, Any]
    """Fields of the section `data`, without those that say what becomes of the pictures."""
    train: EncodedSource
    """The training images, or all where there is no validation split."""
    validation: EncodedSource | None
    """The validation images; None: there is no such split that can be used."""
    remarks: tuple[str, ...]
    """What was found and can't be used, and why."""

    @cached_property
    def captioned(self) -> bool:
        """Whether every picture has a caption."""
        try:
            return all(source.captions() for source in (self.train, self.validation) if source is not None)
        except DataError:
            return False

    def summary(self, image_size: int) -> list[str]:
        """What there is to know of the pictures, if they become images of that size, in lines."""
        lines = []
        for source in (self.train, self.validation):
            if source is not None:
                shown = copy.copy(source)
                shown.image_size = image_size
                lines += shown.summary()
        return lines

    def shorter_side(self) -> int:
        """Pixels that the shorter side of three quarters of the pictures has at least."""
        sizes_N2 = self.train.survey.sizes_N2[self.train.kept_N]
        shorter_N = sorted(int(min(size)) for size in sizes_N2.tolist() if min(size) > 0)
        return shorter_N[len(shorter_N) // 4] if shorter_N else 0


def find_data(path: Path) -> FoundData:
    """Look at a folder of images, a folder of Parquet files, or a Parquet file.

    Raises:
        DataError: There is nothing, or what there is can't be read as images.
    """
    path = existing(path)
    tables = _tables(path)
    return _found_tables(path, tables) if tables or path.is_file() else _found_folder(path)


def _found_folder(path: Path) -> FoundData:
    train, splits = _split_folders(path)
    listing = Listing.of(train)
    if not listing.classes and not listing.loose:
        passed = f" ({'; '.join(listing.notes())})" if listing.notes() else ""
        raise DataError(f"{train}: no images and no Parquet files; expected {train}/<class>/<image>{passed}")
    settings = {"kind": "folder", "num_classes": max(1, len(listing.classes))}
    return _opened(settings, str(train), [str(split) for split in splits], ())


def _split_folders(path: Path) -> tuple[Path, list[Path]]:
    """The folders of the training images and of other splits; the folder itself and none where it has no splits.

    A folder that holds nothing but another one with several folders, as unpacking leaves it, stands for that.
    """
    seen = [entry for entry in sorted(path.iterdir()) if not is_hidden(entry.name)]
    entries = [entry for entry in seen if entry.is_dir()]
    folders = {entry.name.lower(): entry for entry in entries}
    if _all_splits(entries):
        folders = {word: entry for entry in entries for word in _words(Path(entry.name))}
    elif len(seen) == len(entries) == 1 and entries[0].name.lower() not in TRAINING:
        within = [entry for entry in entries[0].iterdir() if not is_hidden(entry.name)]
        if len(within) > 1 and all(entry.is_dir() for entry in within):
            return _split_folders(entries[0])
    train = next((folders[word] for word in TRAINING if word in folders), None)
    splits = [folders[word] for word in HELD_OUT if word in folders]
    if train is None or not (splits or len(folders) == 1 or any(entry.is_dir() for entry in train.iterdir())):
        return path, []  # beside buses and cars, trains are a class
    return train, splits


def _all_splits(folders: Sequence[Path]) -> bool:
    """Whether folders are one split each by their names, such as training_set and test_set, and not classes."""
    words = [_words(Path(folder.name)) & {*TRAINING, *HELD_OUT} for folder in folders]
    return all(len(each) == 1 for each in words) and sum(bool(each & {*TRAINING}) for each in words) == 1


def _found_tables(path: Path, tables: Sequence[Path]) -> FoundData:
    words = {table: _words(table.relative_to(path if path.is_dir() else path.parent)) for table in tables}
    named = {word: [table for table in tables if word in words[table]] for word in (*TRAINING, *HELD_OUT)}
    train = next((named[word] for word in TRAINING if named[word]), None)
    if path.is_file():
        splits = [named[word] for word in HELD_OUT if named[word]] if path in (train or ()) else []
        train = [path]
    else:
        splits = [named[word] for word in HELD_OUT if named[word]] if train else []
        train = train or list(tables)
    image, label = find_columns(train[0])
    labels = find_labels(train, image, label)
    settings = {"kind": "parquet", "image_column": image, **labels.settings}
    return _opened(settings, _together(path, train), [_together(path, split) for split in splits], labels.remarks)


def _opened(settings: dict[str, Any], train_path: str, splits: Sequence[str], remarks: Sequence[str]) -> FoundData:
    """Open the training images, and the first of the other splits that goes with them."""
    section = _section(settings, train_path)
    train, found = section.open_all(train_path, "train"), list(remarks)
    for split in splits:
        try:
            validation = section.open_all(split, "validation")
            validation.check_apart_from(train)
        except DataError as error:
            found.append(str(error))
            continue
        paths = {"train_path": train_path, "validation_path": split}
        return FoundData({**settings, **paths}, train, validation, tuple(found))
    paths_alone = {"train_path": train_path, "validation_path": None}
    return FoundData({**settings, **paths_alone}, train, None, tuple(found))


def _section(settings: dict[str, Any], train_path: str) -> PicturesSection:
    kind: type[PicturesSection] = FolderSection if settings["kind"] == "folder" else ParquetSection
    look = {"train_path": train_path, "validation_path": train_path, "image_size": _LOOK}
    return kind.model_validate({**settings, **look})


def _tables(path: Path) -> list[Path]:
    """The Parquet files of a folder, or beside a file that is one, those of the folders in it where it has none."""
    return tables_in(path.parent) if path.is_file() else tables_below(path)


def _words(path: Path) -> set[str]:
    """Of a path, in small letters."""
    return set(re.split(r"[^a-z]+", str(path.with_suffix("")).lower()))


def _together(path: Path, tables: Sequence[Path]) -> str:
    """Several files as one path: themselves, a folder, or a pattern.

    Raises:
        DataError: No pattern means these files alone.
    """
    if len(tables) == 1:
        return str(tables[0])
    above = {folder for table in tables for folder in table.parents if folder.is_relative_to(path)}
    for folder in sorted(above):
        if tables_below(folder) == list(tables):
            return str(folder)
    first, last = str(min(tables)), str(max(tables))
    start = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    pattern = f"{glob.escape(start)}*{tables[0].suffix}"
    if find_files(pattern) != sorted(tables):
        raise DataError(f"{path}: which of its Parquet files belong together? Put those of a split into a folder")
    return pattern
