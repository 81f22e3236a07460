"""Parquet files with image bytes and labels, in the layout of Hugging Face's data sets."""

import glob
import io
import threading
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from varscale.config.captions import CaptionsSection
from varscale.data.sources.base import ImageSource, check_captions, digest
from varscale.data.sources.decoded import MAX_UNDECODABLE, EncodedSource, existing, expanded, nearest
from varscale.data.sources.folder.listing import is_hidden
from varscale.data.sources.parquet.columns import captions_of, open_image, open_table, read_captions, read_vectors
from varscale.data.sources.parquet.labels import LabelColumn, read_labels
from varscale.data.sources.survey import DECODED_BYTES, Candidates
from varscale.data.transforms import Crop
from varscale.errors import DataError
from varscale.numerics.randomness import permutation

CACHE_BYTES = 2 * 2**30
"""Encoded images that a source keeps in memory; smaller data sets are read from disk once."""
GROUPS_LOOKED_AT = 16
"""Row groups of a larger set whose images are looked at before training, beside those that are known to have nulls."""


class ParquetSource(EncodedSource):
    """Images and labels of a Parquet file, of all below a folder, or of a pattern's, such as `data/*/train-*.parquet`.

    The image column is binary, text that names files, a struct with a field `bytes` and perhaps `path` (read when
    `bytes` is null), or a list of one of these; paths begin in the Parquet file's folder. Row groups are read when one
    of their images is asked for; the latest stay in memory, up to `cache_bytes`.

    Raises:
        DataError: If a file or column is missing or of another type, or a label is null or out of range.
    """

    def __init__(
        self,
        path: str | Path,
        crop: Crop,
        *,
        image_column: str = "image",
        labels: LabelColumn = LabelColumn(),  # noqa: B008  # frozen
        num_classes: int | None = None,
        max_undecodable: int = MAX_UNDECODABLE,
        captions: CaptionsSection | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.files = find_files(path)
        self._image_column = image_column
        self._readers = [open_table(file, image_column, labels.name) for file in self.files]
        self._file_starts = np.cumsum([0, *(reader.metadata.num_rows for reader in self._readers)])
        self._groups = [(file, n) for file, reader in enumerate(self._readers) for n in range(reader.num_row_groups)]
        groups = [self._readers[file].metadata.row_group(number) for file, number in self._groups]
        self._group_starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._group_bytes = np.array([group.total_byte_size for group in groups], dtype=np.int64)
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._cache_bytes, self._cache_lock = cache_bytes, threading.Lock()
        read = read_labels(self.files, self._readers, labels, num_classes)
        stored_bytes = int(self._group_bytes.sum())
        candidates = Candidates(
            name=str(path),
            content=digest([*map(_stat, self.files), image_column.encode(), self.content_digest().encode()]),
            count=len(read.labels_N),
            stored_bytes=stored_bytes,
            open=self._open_row,
            place=self._row_name,
            faults=read.missing,
            only=None if stored_bytes <= DECODED_BYTES else self._rows_looked_at(),
        )
        if not candidates.count:
            raise DataError(f"{path}: no rows")
        classes = read.names or (num_classes if num_classes is not None else int(read.labels_N.max()) + 1)
        super().__init__(candidates, read.labels_N, classes, crop, max_undecodable)
        self.notes = list(read.notes)
        if stored_bytes > cache_bytes:  # the last groups that were looked at are none that training begins with
            self._cache.clear()
        self._captions = captions
        if (column := captions_of(self._readers[0])) is not None:
            self.notes.append(
                f"column {column!r} holds captions; models of condition: text learn them, by data.captions"
            )

    def order(self, seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        """A random order of the images that reads each row group once or twice, not once an image.

        Groups come in random order; windows of as many as half of the memory kept holds are shuffled throughout.
        """
        groups = permutation(seed, epoch, len(self._groups))
        window_of_place = np.cumsum(self._group_bytes[groups]) // (self._cache_bytes // 2 + 1)
        window_of_group = np.empty_like(window_of_place)
        window_of_group[groups] = window_of_place
        images = permutation(seed, epoch, size)
        window_of_image = np.repeat(window_of_group, np.diff(self._group_starts))[self.kept_N]
        return images[np.argsort(window_of_image[images], kind="stable")]

    def content_digest(self) -> str:
        """Hash of the files' names, sizes and footers (which hold each column's place, sizes and statistics)."""
        return digest(part for file in self.files for part in (file.name.encode(), _footer(file)))

    def check_apart_from(self, training: ImageSource) -> None:
        """Raise `DataError` where a file is among the training files, too, or labels mean other classes there."""
        if training.class_names and self.class_names and training.class_names != self.class_names:
            pairs = zip(training.class_names, self.class_names, strict=False)
            label, names = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
            raise DataError(
                f"data.validation_path: {self.name} and {training.name} name their classes otherwise: label {label} is "
                f"{names[1]!r} and {names[0]!r}"
            )
        others = training.files if isinstance(training, ParquetSource) and not self.parts else []
        shared = {file.resolve() for file in others} & {file.resolve() for file in self.files}
        if shared:
            raise DataError(
                f"data.validation_path: {min(shared)} is among the training files, too; name the split's own files, "
                f"such as {min(shared).parent / 'validation-*.parquet'}"
            )

    def captions(self) -> list[str]:
        """Those of the column that the experiment names, or of one of a usual name."""
        texts = read_captions(self.files, self._readers, self._captions.column if self._captions else None)
        kept = [texts[row] for row in self.kept_N.tolist()]
        check_captions(kept, self.picture_name, "a text in each row")
        return kept

    def caption_vectors(self) -> NDArray[np.float32]:
        """Those of the column that the experiment names."""
        assert self._captions is not None
        assert self._captions.column is not None
        width = self._captions.embedding_width
        vectors = read_vectors(self.files, self._readers, self._captions.column, width)
        kept = [vectors[row] for row in self.kept_N.tolist()]
        check_captions(["x" * len(vector) for vector in kept], self.picture_name, "a vector in each row")
        with np.errstate(over="ignore"):  # what becomes infinite is named
            vectors_ND = np.asarray(kept, dtype=np.float32)
        wrong = np.flatnonzero(~(np.isfinite(vectors_ND).all(1) & vectors_ND.any(1)))
        if wrong.size:
            raise DataError(
                f"data.captions: {wrong.size} of {len(kept)} vectors are zero or not finite, such as that of "
                f"{self.picture_name(int(wrong[0]))}; expected directions"
            )
        return vectors_ND

    def _open_row(self, row: int) -> BinaryIO:
        group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
        value = self._images(group)[row - int(self._group_starts[group])].as_py()
        return open_image(value, self.files[self._groups[group][0]].parent)

    def _row_name(self, row: int) -> str:
        file = int(np.searchsorted(self._file_starts, row, side="right")) - 1
        return f"{self.files[file]} row {row - self._file_starts[file]}"

    def _rows_looked_at(self) -> NDArray[np.int64]:
        """Rows of evenly spread row groups, and of those that have nulls by their statistics."""
        chosen = set(np.linspace(0, len(self._groups) - 1, GROUPS_LOOKED_AT, dtype=np.int64).tolist())
        chosen |= {group for group, (file, number) in enumerate(self._groups) if self._has_nulls(file, number)}
        return np.concatenate([np.arange(*self._group_starts[[group, group + 1]]) for group in sorted(chosen)])

    def _has_nulls(self, file: int, number: int) -> bool:
        """Whether images of a row group are null, as far as its statistics say."""
        group = self._readers[file].metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        nulls = {
            column.path_in_schema: column.statistics.null_count
            for column in columns
            if column.path_in_schema.partition(".")[0] == self._image_column and column.statistics is not None
        }
        return bool(nulls) and min(nulls.values()) > 0  # a struct without bytes may have a path

    def _images(self, group: int) -> pa.ChunkedArray:
        with self._cache_lock:  # one reader must not be used by two threads at once
            if group not in self._cache:
                file, number = self._groups[group]
                table = self._readers[file].read_row_group(number, columns=[self._image_column])
                self._cache[group] = table.column(self._image_column)
                while len(self._cache) > 1 and sum(a.nbytes for a in self._cache.values()) > self._cache_bytes:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(group)
            return self._cache[group]


def find_files(path: str | Path) -> list[Path]:
    """The file, the folder's files or else those of all folders in it, or the pattern's, in the order of their names.

    Raises:
        DataError: There are none.
    """
    path = expanded(Path(path))
    if glob.has_magic(str(path)) and not path.exists():
        plain = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        existing(plain)
        files = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207  # of any path
        files = [file for found in files for file in (tables_below(found) if found.is_dir() else [found])]
    elif existing(path).is_dir():
        files = tables_below(path)
    else:
        files = [path]
    if not files:
        folder = next(folder for folder in (path, *path.parents) if folder.is_dir())
        found = nearest(path.name, (entry.name for entry in folder.iterdir()))
        raise DataError(f"{path}: no Parquet files; {folder} has {found}")
    return files


def tables_below(folder: Path) -> list[Path]:
    """A folder's Parquet files, or where it has none those of the folders in it."""
    return tables_in(folder) or sorted(table for table in folder.rglob("*") if is_table(table, folder))


def tables_in(folder: Path) -> list[Path]:
    """The Parquet files that lie straight in a folder, in the order of their names."""
    return sorted(table for table in folder.iterdir() if is_table(table, folder))


def is_table(file: Path, folder: Path) -> bool:
    """Whether something in a folder is a Parquet file by its name, and no hidden one; Spark names folders so, too."""
    named = file.suffix.lower() == ".parquet" and not any(map(is_hidden, file.relative_to(folder).parts))
    return named and not file.is_dir()


def _stat(file: Path) -> bytes:
    status = file.stat()
    return f"{file} {status.st_size} {status.st_mtime_ns}".encode()


def _footer(file: Path) -> bytes:
    """The last bytes of a Parquet file: its metadata, that metadata's length in four bytes, and the magic number."""
    with file.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(size - 8)
        length = int.from_bytes(stream.read(4), "little") + 8
        stream.seek(size - length)
        return size.to_bytes(8, "little") + stream.read(length)
