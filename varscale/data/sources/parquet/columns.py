"""Columns of Parquet files that hold images or labels, in the forms in which they are found."""

import errno
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from varscale.data.sources.base import Labels
from varscale.data.sources.decoded import MAX_UNDECODABLE, check_labels, class_order, nearest
from varscale.data.sources.survey import foreign
from varscale.errors import DataError

CAPTIONS = ("caption", "captions", "text", "prompt", "description")
"""Columns of text that describe an image, by their usual names."""
IMAGES = ("image", "img", "images", "picture", "photo", "jpg", "png", "image_bytes", "bytes")
IMAGE_FILES = ("image", "img", "image_path", "path", "file", "filename", "file_name")
LABELS = ("label", "labels", "class", "class_label", "class_id", "category", "target", "fine_label", "y", "cls")
"""Columns of images, of names of images' files, and of labels, by their usual names, the likeliest first."""
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
MOST_CLASSES = 2**31
LONGEST_PATH = 1000


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


class ReadLabels(NamedTuple):
    """The labels of some files."""

    labels_N: Labels
    """From 0 up; of rows without a label, any."""
    names: tuple[str, ...] = ()
    """Of the classes, where they have names."""
    missing: Mapping[int, str] = MappingProxyType({})
    """Row without a label → why."""
    notes: tuple[str, ...] = ()
    """What is not used, in lines."""


class _Values(NamedTuple):
    """The labels of a file as they are stored."""

    values: Any
    """A list of texts, or whole numbers as an array; of rows without a label, anything."""
    missing_N: NDArray[np.bool_]

    @property
    def known(self) -> list[Any]:
        """The values of rows that have one."""
        return [value for value, missing in zip(self.values, self.missing_N, strict=True) if not missing]


def open_table(file: Path, image_column: str, label_column: str | None) -> pq.ParquetFile:
    """A Parquet file with both columns.

    Raises:
        DataError: It is none, a column is missing, or one is of a type that can't be images or labels.
    """
    reader = _reader(file)
    schema = reader.schema_arrow
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column is None or (key == "label_column" and _in_path(file, reader, column) is not None):
            continue
        if column not in schema.names:
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
    in_path = [part.partition("=")[0] for part in file.parts if "=" in part]
    labels = [name for name in (*schema.names, *in_path) if name.lower() in LABELS and name != images[0]]
    return images[0], min(labels, key=lambda name: _rank(name, LABELS), default=None)


def find_labels(files: Sequence[Path], image_column: str, label_column: str | None) -> FoundLabels:
    """How many classes there are, and from which number labels count; none where a column can't be labels."""
    if label_column is None:
        return FoundLabels()
    readers = [open_table(file, image_column, label_column) for file in files]
    try:
        found = read_labels(files, readers, LabelColumn(label_column), None)
    except DataError as error:
        return FoundLabels(remarks=(f"no labels: {error}",))
    if len(found.missing) > MAX_UNDECODABLE:
        return FoundLabels(remarks=(f"no labels: {label_column!r} is null in {len(found.missing):,} rows",))
    known_N = np.delete(found.labels_N, list(found.missing))
    first = 0 if found.names else int(known_N.min())
    classes = len(found.names) or int(known_N.max()) + 1 - first
    if classes > len(known_N) / 2:
        return FoundLabels(
            remarks=(f"no labels: {label_column!r} has {classes:,} values of {len(known_N):,} pictures",)
        )
    return FoundLabels({"label_column": label_column, "first_label": first, "num_classes": classes})


def open_image(value: Any, folder: Path) -> BinaryIO:
    """The file of an image: bytes, a path beside the table, a struct with either, or a list of one of these.

    Raises:
        ValueError: There is no image, or not one.
        OSError: The path's file can't be opened.
    """
    while isinstance(value, list):
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
    path: Path = folder / value
    if len(value) > LONGEST_PATH or value.startswith("data:"):
        raise ValueError("text that names no file, perhaps a picture in base64; store its bytes")
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, f"no such file, beginning at the Parquet file's folder\t{value}")
    return path.open("rb")


def read_labels(
    files: Sequence[Path], readers: Sequence[pq.ParquetFile], column: LabelColumn, num_classes: int | None
) -> ReadLabels:
    """Labels from 0 up, and the names of the classes where there are any.

    Whole numbers, booleans and whole floats are labels as they are; text names a class, and so does a folder
    `<column>=<class>` above a file without that column, as Hive and Spark lay out partitions.

    Raises:
        DataError: All labels are missing, or one is of no known class, out of range, or of a type that is none.
    """
    if column.name is None:
        if num_classes not in (None, 1):
            raise DataError(f"{files[0]}: label_column: null makes one class, num_classes is {num_classes}")
        return ReadLabels(np.zeros(sum(reader.metadata.num_rows for reader in readers), dtype=np.int64))
    name = column.name
    text = _names_classes(files[0], readers[0], name)
    named_by = [(file, _reader(file)) for file in column.named_by]
    for file, reader in (*zip(files, readers, strict=True), *named_by):
        if _names_classes(file, reader, name) != text:
            kinds = ("text", "numbers") if text else ("numbers", "text")
            raise DataError(f"{file}: column {name} has {kinds[1]}, but in {files[0]} {kinds[0]}; expected one of both")
    parts = [_values(file, reader, name) for file, reader in zip(files, readers, strict=True)]
    starts = np.cumsum([0, *(len(part.values) for part in parts)])
    missing_N = np.concatenate([part.missing_N for part in parts])
    if missing_N.all():
        raise DataError(f"{files[0]}: " + (f"{name} is null in all rows; expected labels" if starts[-1] else "no rows"))
    missing = dict.fromkeys(np.flatnonzero(missing_N).tolist(), "no label (null)")

    def place(row: int) -> str:
        file = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{files[file]} row {row - starts[file]}, column {name}"

    if text:
        texts = [str(value) for part in parts for value in part.values]
        training = [_values(file, reader, name) for file, reader in named_by] or parts
        names = class_order({str(value) for part in training for value in part.known})
        if num_classes not in (None, len(names)):
            found = nearest("", names)
            raise DataError(
                f"{files[0]}: label_column: {name!r} names {len(names)} classes ({found}), num_classes is {num_classes}"
            )
        numbers = {each: number for number, each in enumerate(names)}
        unknown = next((row for row, each in enumerate(texts) if each not in numbers and row not in missing), None)
        if unknown is not None:
            known = nearest(texts[unknown], names)
            raise DataError(f"{place(unknown)}: {texts[unknown]!r} is no class of the training set, which has {known}")
        labels_N = np.array([numbers.get(each, 0) for each in texts], dtype=np.int64)
        return ReadLabels(labels_N, tuple(names), missing)
    labels_N = np.concatenate([part.values for part in parts]) - column.first
    labels_N[missing_N] = labels_N[~missing_N][0]  # any that is in range
    described = _described_names(readers[0], name)
    number = num_classes if num_classes is not None else max(int(labels_N.max()) + 1, len(described))
    _check_range(labels_N, number, column, place)
    if not described or (len(described) == number and column.first == 0):
        return ReadLabels(labels_N, described, missing)
    counts = f"num_classes {number}, first_label {column.first}"
    note = f"the file names {len(described)} classes of column {name!r}, which are not used: {counts}"
    return ReadLabels(labels_N, (), missing, (note,))


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
    firsts = [next(filter(None, value), "") if isinstance(value, list) else value for value in values]
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
        reader = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        with file.open("rb") as stream:
            head = stream.read(512)
        reason = "cut short" if head.startswith(b"PAR1") and "magic bytes" in str(error) else foreign(head, "the table")
        raise DataError(f"{file}: not a readable Parquet file: {reason or ' '.join(str(error).split())}") from None
    names = reader.schema_arrow.names
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise DataError(f"{file}: two columns are named {twice[0]!r}; rename one")
    return reader


def _rank(name: str, usual: Sequence[str]) -> int:
    """The place of a name among the usual ones; behind all of them where it is none."""
    return usual.index(name.lower()) if name.lower() in usual else len(usual)


def _values(file: Path, reader: pq.ParquetFile, name: str) -> _Values:
    """A file's labels: names of classes, or numbers as they are stored."""
    if (named := _in_path(file, reader, name)) is not None:
        rows, missing = reader.metadata.num_rows, named == NULL_PARTITION
        return _Values([named] * rows, np.full(rows, missing))
    column = reader.read(columns=[name]).column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, missing_N = column.type, np.asarray(column.is_null(nan_is_null=True).to_numpy(), dtype=bool)
    if _is_text(kind):
        return _Values(column.to_pylist(), missing_N)
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if not (numbers or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise DataError(f"{file}: label_column: {name!r} is {kind}; expected whole numbers, text or booleans")
    if not pa.types.is_integer(kind):
        values_N = np.where(missing_N, 0, column.to_numpy()).astype(np.float64)
        broken = np.flatnonzero((values_N != np.round(values_N)) | (np.abs(values_N) > MOST_CLASSES))
        if broken.size:
            raise DataError(f"{file} row {broken[0]}: {name} is {values_N[broken[0]]:g}; expected a whole number")
        return _Values(values_N.astype(np.int64), missing_N)
    values_N = pc.fill_null(column, 0).to_numpy()
    if (large := np.flatnonzero(np.abs(values_N.astype(np.float64)) > MOST_CLASSES)).size:
        raise DataError(f"{file} row {large[0]}: {name} is {values_N[large[0]]}; expected the number of a class")
    return _Values(values_N.astype(np.int64), missing_N)


def _names_classes(file: Path, reader: pq.ParquetFile, name: str) -> bool:
    """Whether a file's labels are names of classes instead of numbers."""
    if name not in reader.schema_arrow.names:
        return _in_path(file, reader, name) is not None
    return _is_text(reader.schema_arrow.field(name).type)


def _in_path(file: Path, reader: pq.ParquetFile, name: str) -> str | None:
    """The class of all rows of a file in a folder `<column>=<class>`; None where it isn't in one, or has the column."""
    if name in reader.schema_arrow.names:
        return None
    named = [part.partition("=")[2] for part in file.parts[:-1] if part.startswith(f"{name}=")]
    return unquote(named[-1]) if named else None


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
    if pa.types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind if field.name in ("bytes", "path")}
        return bool(fields) and all(pa.types.is_null(each) or _holds_images(each) for each in fields.values())
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
