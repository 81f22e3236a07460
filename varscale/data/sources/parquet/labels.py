"""The labels of Parquet files: numbers, or names of classes, in a column or in the names of folders."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from varscale.data.sources.base import Labels
from varscale.data.sources.decoded import MAX_UNDECODABLE, check_labels, class_order, nearest
from varscale.data.sources.parquet.columns import in_path, is_text, open_reader, open_table
from varscale.errors import DataError

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
MOST_CLASSES = 2**31


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
    named_by = [(file, open_reader(file)) for file in column.named_by]
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


def _values(file: Path, reader: pq.ParquetFile, name: str) -> _Values:
    """A file's labels: names of classes, or numbers as they are stored."""
    if (named := in_path(file, reader, name)) is not None:
        rows, missing = reader.metadata.num_rows, named == NULL_PARTITION
        return _Values([named] * rows, np.full(rows, missing))
    column = reader.read(columns=[name]).column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, missing_N = column.type, np.asarray(column.is_null(nan_is_null=True).to_numpy(), dtype=bool)
    if is_text(kind):
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
        return in_path(file, reader, name) is not None
    return is_text(reader.schema_arrow.field(name).type)


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
