"""Parquet files with image bytes and labels, in the layout of Hugging Face's data sets."""

import io
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from varscale.data.sources.base import ImageSource, Labels, digest
from varscale.data.sources.decoded import MAX_UNDECODABLE, DecodedSource, check_labels, existing, expanded, nearest
from varscale.data.transforms import Crop
from varscale.errors import DataError
from varscale.numerics.randomness import permutation

CACHE_BYTES = 2 * 2**30
"""Encoded images that a source keeps in memory; smaller data sets are read from disk once."""


class ParquetSource(DecodedSource):
    """Images and labels of a Parquet file, of all in a folder, or of a pattern's, such as `data/train-*.parquet`.

    The image column is binary, or a struct with a field `bytes` and perhaps `path` (read when `bytes` is null, from the
    file's folder). Row groups are read when one of their images is asked for; the latest stay in memory, up to
    `cache_bytes`.

    Raises:
        DataError: If a file or column is missing or of another type, or a label is null or out of range.
    """

    def __init__(
        self,
        path: str | Path,
        crop: Crop,
        *,
        image_column: str = "image",
        label_column: str = "label",
        num_classes: int | None = None,
        max_undecodable: int = MAX_UNDECODABLE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.files = _find_files(path)
        self._image_column = image_column
        self._readers = [_open(file, image_column, label_column) for file in self.files]
        self._file_starts = np.cumsum([0, *(reader.metadata.num_rows for reader in self._readers)])
        self._groups = [(file, n) for file, reader in enumerate(self._readers) for n in range(reader.num_row_groups)]
        groups = [self._readers[file].metadata.row_group(number) for file, number in self._groups]
        self._group_starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._group_bytes = np.array([group.total_byte_size for group in groups], dtype=np.int64)
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._cache_bytes, self._cache_lock = cache_bytes, threading.Lock()
        labels = [_read_labels(file, r, label_column) for file, r in zip(self.files, self._readers, strict=True)]
        all_labels = np.concatenate(labels)
        if not all_labels.size:
            raise DataError(f"{path}: no rows")
        num_classes = num_classes if num_classes is not None else int(all_labels.max()) + 1
        check_labels(all_labels, num_classes, lambda row: f"{self.picture_name(row)}, column {label_column}")
        super().__init__(str(path), all_labels, num_classes, crop, max_undecodable)

    def open_picture(self, index: int) -> Image.Image:
        """The picture as stored."""
        group = int(np.searchsorted(self._group_starts, index, side="right")) - 1
        value = self._images(group)[index - int(self._group_starts[group])].as_py()
        stored = value if isinstance(value, dict) else {"bytes": value}
        if stored["bytes"] is not None:
            return Image.open(io.BytesIO(stored["bytes"]))
        if stored.get("path") is None:
            raise ValueError("the row holds no image")
        return Image.open(io.BytesIO((self.files[self._groups[group][0]].parent / stored["path"]).read_bytes()))

    def picture_name(self, index: int) -> str:
        """The picture's file and row."""
        file = int(np.searchsorted(self._file_starts, index, side="right")) - 1
        return f"{self.files[file]} row {index - self._file_starts[file]}"

    def order(self, seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        """A random order of the images that reads each row group once or twice, not once an image.

        Groups come in random order; windows of as many as half of the memory kept holds are shuffled throughout.
        """
        groups = permutation(seed, epoch, len(self._groups))
        window_of_place = np.cumsum(self._group_bytes[groups]) // (self._cache_bytes // 2 + 1)
        window_of_group = np.empty_like(window_of_place)
        window_of_group[groups] = window_of_place
        images = permutation(seed, epoch, size)
        window_of_image = np.repeat(window_of_group, np.diff(self._group_starts))
        return images[np.argsort(window_of_image[images], kind="stable")]

    def content_digest(self) -> str:
        """Hash of the files' names, sizes and footers (which hold each column's place, sizes and statistics)."""
        return digest(part for file in self.files for part in (file.name.encode(), _footer(file)))

    def check_apart_from(self, training: ImageSource) -> None:
        """Raise `DataError` where a file is among the training files, too."""
        others = training.files if isinstance(training, ParquetSource) else []
        shared = {file.resolve() for file in others} & {file.resolve() for file in self.files}
        if shared:
            raise DataError(
                f"data.validation_path: {min(shared)} is among the training files, too; name the split's own files, "
                f"such as {min(shared).parent / 'validation-*.parquet'}"
            )

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


def _find_files(path: str | Path) -> list[Path]:
    """The file, the folder's files, or the pattern's, in the order of their names."""
    path = expanded(Path(path))
    if any(sign in path.name for sign in "*?[") and not path.exists():
        files = sorted(existing(path.parent).glob(path.name))
    elif existing(path).is_dir():
        files = sorted(path.glob("*.parquet"))
    else:
        files = [path]
    if not files:
        folder = path if path.is_dir() else path.parent
        found = nearest(path.name, (entry.name for entry in folder.iterdir()))
        raise DataError(f"{path}: no Parquet files; {folder} has {found}")
    return files


def _open(file: Path, image_column: str, label_column: str) -> pq.ParquetFile:
    if not file.is_file():  # a pipe would be waited for
        raise DataError(f"{file}: not a file")
    try:
        reader = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {' '.join(str(error).split())}") from None
    schema = reader.schema_arrow
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in schema.names:
            raise DataError(f"{file}: {key}: no column {column!r}; the file has {nearest(column, schema.names)}")
    image, label = schema.field(image_column).type, schema.field(label_column).type
    held = image
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        held = image.field("bytes").type
    if not (pa.types.is_binary(held) or pa.types.is_large_binary(held)):
        raise DataError(f"{file}: image_column: {image_column!r} is {image}; expected binary, or a struct with bytes")
    if not pa.types.is_integer(label):
        raise DataError(f"{file}: label_column: {label_column!r} is {label}; expected whole numbers")
    return reader


def _read_labels(file: Path, reader: pq.ParquetFile, label_column: str) -> Labels:
    column = reader.read(columns=[label_column]).column(label_column)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{file} row {row}: {label_column} is null; expected a whole number")
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _footer(file: Path) -> bytes:
    """The last bytes of a Parquet file: its metadata, that metadata's length in four bytes, and the magic number."""
    with file.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(size - 8)
        length = int.from_bytes(stream.read(4), "little") + 8
        stream.seek(size - length)
        return size.to_bytes(8, "little") + stream.read(length)
