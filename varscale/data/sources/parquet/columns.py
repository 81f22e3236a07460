"""Columns of Parquet files that hold images or labels, in the forms in which they are found."""

import errno
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from varscale.data.sources.base import Labels
from varscale.data.sources.decoded import check_labels, class_order, nearest
from varscale.errors import DataError

CAPTIONS = ("caption", "captions", "text", "prompt", "description")
"""Columns of text that describe an image, by their usual names."""
IMAGES = ("image", "img", "images", "picture", "photo", "jpg", "png", "image_bytes", "bytes")
IMAGE_FILES = ("image", "img", "image_path", "path", "file", "filename", "file_name")
LABELS = ("label", "labels", "class", "class_label", "class_id", "category", "target", "fine_label", "y", "cls")
"""Columns of images, of names of images' files, and of labels, by their usual names, the likeliest first."""


@dataclass(frozen=True)
class LabelColumn:
    """Where labels are, and what they mean."""

    name: str | None = "label"
    """The column; None: images have no labels, and are of one class."""
    first: int = 0
    """The number that stands for label 0."""
    named_by: Sequence[Path] = ()
    """Files whose text labels are the classes, those of the training set; none: the file's own."""


@dataclass(frozen=True)
class FoundLabels:
    """What a file's labels turned out to be."""

    settings: dict[str, Any] = field(default_factory=lambda: {"label_column": None, "num_classes": 1})
    """Fields of the section `data`."""
    remarks: tuple[str, ...] = ()
    """Why a column can't be used."""


def open_table(file: Path, image_column: str, label_column: str | None) -> pq.ParquetFile:
    """A Parquet file with both columns.

    Raises:
        DataError: It is none, a column is missing, or one is of a type that can't be images or labels.
    """
    reader = _reader(file)
    schema = reader.schema_arrow
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in schema.names:
            none = "; null: no labels, one class" if key == "label_column" else ""
            raise DataError(f"{file}: {key}: no column {column!r}; the file has {nearest(column, schema.names)}{none}")
    image = schema.field(image_column).type
    if not _holds_images(image):
        raise DataError(
            f"{file}: image_column: {image_column!r} is {image}; expected binary, a struct with bytes or path, "
            "text that names files, or a list of one of these"
        )
    return reader


def find_columns(file: Path) -> tuple[str, str | None]:
    """The columns of images and of labels, by their types and usual names; None: there is none of labels.

    Raises:
        DataError: It is no Parquet file, or no column can be images.
    """
    schema = _reader(file).schema_arrow
    types = {name: schema.field(name).type for name in schema.names if _holds_images(schema.field(name).type)}
    stored = sorted((name for name in types if not _is_text(types[name])), key=lambda name: _rank(name, IMAGES))
    named = sorted((name for name in types if name.lower() in IMAGE_FILES), key=lambda name: _rank(name, IMAGE_FILES))
    if not (images := [*stored, *named]):
        raise DataError(f"{file}: no column of images; the file has {nearest('', schema.names)}")
    labels = [name for name in schema.names if name.lower() in LABELS and name != images[0]]
    return images[0], min(labels, key=lambda name: _rank(name, LABELS), default=None)


def find_labels(files: Sequence[Path], image_column: str, label_column: str | None) -> FoundLabels:
    """How many classes there are, and from which number labels count; none where a column can't be labels."""
    if label_column is None:
        return FoundLabels()
    readers = [open_table(file, image_column, label_column) for file in files]
    try:
        labels_N, names = read_labels(files, readers, LabelColumn(label_column), None)
    except DataError as error:
        return FoundLabels(remarks=(f"no labels: {error}",))
    first = 1 if not names and labels_N.min() == 1 else 0
    classes = len(names) or int(labels_N.max()) + 1 - first
    if classes > len(labels_N) / 2:
        return FoundLabels(
            remarks=(f"no labels: {label_column!r} has {classes:,} values of {len(labels_N):,} pictures",)
        )
    return FoundLabels({"label_column": label_column, "first_label": first, "num_classes": classes})


def open_image(value: Any, folder: Path) -> BinaryIO:
    """The file of an image: bytes, a path beside the table, a struct with either, or a list of one of these.

    Raises:
        ValueError: There is no image, or not one.
        OSError: The path's file can't be opened.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"a list of {len(value)} images; expected one")
        value = value[0]
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ValueError("no image (null)")
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if "://" in value:
        raise ValueError("an address on the web, not an image; download it first")
    path = folder / str(value)
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, f"no such file, beginning at the Parquet file's folder\t{value}")
    return path.open("rb")


def read_labels(
    files: Sequence[Path], readers: Sequence[pq.ParquetFile], column: LabelColumn, num_classes: int | None
) -> tuple[Labels, tuple[str, ...]]:
    """Labels from 0 up, and the names of the classes where there are any.

    Whole numbers, booleans and whole floats are labels as they are; text names a class.

    Raises:
        DataError: A label is missing, of no known class, out of range, or of a type that is none.
    """
    if column.name is None:
        if num_classes not in (None, 1):
            raise DataError(f"{files[0]}: label_column: null makes one class, num_classes is {num_classes}")
        return np.zeros(sum(reader.metadata.num_rows for reader in readers), dtype=np.int64), ()
    parts = [_values(file, reader, column.name) for file, reader in zip(files, readers, strict=True)]
    starts = np.cumsum([0, *map(len, parts)])
    if not starts[-1]:
        raise DataError(f"{files[0]}: no rows")

    def place(row: int) -> str:
        file = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{files[file]} row {row - starts[file]}, column {column.name}"

    if isinstance(parts[0], list):
        own = {name for part in parts for name in part}
        others = [_values(file, open_table(file, column.name, column.name), column.name) for file in column.named_by]
        names = class_order({str(name) for part in others for name in part} if others else map(str, own))
        if num_classes not in (None, len(names)):
            found = nearest("", names)
            raise DataError(
                f"{files[0]}: label_column: {column.name!r} names {len(names)} classes ({found}), "
                f"num_classes is {num_classes}"
            )
        numbers = {name: number for number, name in enumerate(names)}
        texts = [str(name) for part in parts for name in part]
        unknown = next((row for row, name in enumerate(texts) if name not in numbers), None)
        if unknown is not None:
            known = nearest(texts[unknown], names)
            raise DataError(f"{place(unknown)}: {texts[unknown]!r} is no class of the training set, which has {known}")
        return np.array([numbers[name] for name in texts], dtype=np.int64), tuple(names)
    labels_N = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]) - column.first
    number = num_classes if num_classes is not None else int(labels_N.max()) + 1
    _check_range(labels_N, number, column, place)
    described = _described_names(readers[0], column.name)
    return labels_N, described if len(described) == number and column.first == 0 else ()


def captions_of(reader: pq.ParquetFile) -> str | None:
    """The column of texts that describe the images, by its usual names; None where there is none."""
    schema = reader.schema_arrow
    return next((name for name in CAPTIONS if name in schema.names and _holds_texts(schema.field(name).type)), None)


def read_captions(files: Sequence[Path], readers: Sequence[pq.ParquetFile], name: str | None) -> list[str]:
    """Each row's caption on one line, of several the first; empty where it is null.

    Raises:
        DataError: There is no such column, or it holds no text.
    """
    found = name or captions_of(readers[0])
    if found is None:
        raise DataError(
            f"{files[0]}: no column of captions ({', '.join(CAPTIONS)}); name one by data.captions.column, the file "
            f"has {nearest('', readers[0].schema_arrow.names)}"
        )
    values = _column(files, readers, found, "text, or lists of texts", _holds_texts)
    firsts = [value[0] if isinstance(value, list) and value else value for value in values]
    return [" ".join(text.split()) if isinstance(text, str) else "" for text in firsts]


def read_vectors(files: Sequence[Path], readers: Sequence[pq.ParquetFile], name: str, width: int) -> list[list[float]]:
    """Each row's vector; empty where it is null.

    Raises:
        DataError: There is no such column, or it holds no vectors, or they have another width.
    """
    values = _column(files, readers, name, "lists of numbers", _holds_vectors)
    if other := next((len(value) for value in values if value and len(value) != width), None):
        raise DataError(f"{files[0]}: column {name!r} has vectors of {other} numbers; data.captions.width is {width}")
    return [value or [] for value in values]


def _column(
    files: Sequence[Path],
    readers: Sequence[pq.ParquetFile],
    name: str,
    expected: str,
    fits: Callable[[pa.DataType], bool],
) -> list[Any]:
    """All values of a column, as Python's own."""
    values: list[Any] = []
    for file, reader in zip(files, readers, strict=True):
        schema = reader.schema_arrow
        if name not in schema.names:
            raise DataError(
                f"{file}: data.captions.column: no column {name!r}; the file has {nearest(name, schema.names)}"
            )
        if not fits(schema.field(name).type):
            raise DataError(f"{file}: data.captions.column: {name!r} is {schema.field(name).type}; expected {expected}")
        values += reader.read(columns=[name]).column(name).to_pylist()
    return values


def _reader(file: Path) -> pq.ParquetFile:
    if not file.is_file():  # a pipe would be waited for
        raise DataError(f"{file}: not a file")
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {' '.join(str(error).split())}") from None


def _rank(name: str, usual: Sequence[str]) -> int:
    """The place of a name among the usual ones; behind all of them where it is none."""
    return usual.index(name.lower()) if name.lower() in usual else len(usual)


def _values(file: Path, reader: pq.ParquetFile, name: str) -> list[str] | NDArray[np.int64]:
    """A file's labels: names of classes, or numbers as they are stored."""
    column = reader.read(columns=[name]).column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{file} row {row}: {name} is null; expected a label")
    if _is_text(column.type):
        return [str(text) for text in column.to_pylist()]
    if pa.types.is_boolean(column.type) or pa.types.is_integer(column.type):
        return np.asarray(column.to_numpy(), dtype=np.int64)
    if not (pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)):
        raise DataError(f"{file}: label_column: {name!r} is {column.type}; expected whole numbers, text or booleans")
    values_N = np.asarray(column.to_numpy(), dtype=np.float64)
    broken = np.flatnonzero(values_N != np.round(values_N))
    if broken.size:
        raise DataError(f"{file} row {broken[0]}: {name} is {values_N[broken[0]]:g}; expected a whole number")
    return values_N.astype(np.int64)


def _check_range(labels_N: Labels, number: int, column: LabelColumn, place: Callable[[int], str]) -> None:
    low, high = int(labels_N.min()), int(labels_N.max())
    if column.first == 0 and low == high == -1:
        raise DataError(
            f"{place(0)}: all labels are -1, which stands for no label (hidden labels of a test set): name files that "
            "have labels, or, for a single class, data.label_column=null and data.num_classes=1"
        )
    if column.first == 0 and (low, high) == (1, number):
        raise DataError(
            f"{place(int(labels_N.argmax()))}: labels begin at 1 (1 … {number}, num_classes {number}); "
            "data.first_label=1 makes them 0 … " + str(number - 1)
        )
    check_labels(labels_N, number, place)


def _described_names(reader: pq.ParquetFile, column: str) -> tuple[str, ...]:
    """The names of the classes as Hugging Face's `datasets` writes them into a file's metadata; booleans'."""
    if pa.types.is_boolean(reader.schema_arrow.field(column).type):
        return "false", "true"
    try:
        described = json.loads((reader.schema_arrow.metadata or {})[b"huggingface"])
        names = described["info"]["features"][column]["names"]
        return tuple(map(str, names)) if isinstance(names, list) else ()
    except (KeyError, TypeError, ValueError):
        return ()


def _holds_images(kind: pa.DataType) -> bool:
    if _is_list(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(binary or pa.types.is_fixed_size_binary(kind) or _is_text(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _holds_texts(kind: pa.DataType) -> bool:
    return _is_text(kind.value_type) if _is_list(kind) else _is_text(kind)


def _holds_vectors(kind: pa.DataType) -> bool:
    return _is_list(kind) and bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
