"""The columns of Parquet files: which hold images, labels and captions, and how images and captions are read."""

import errno
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from varscale.data.sources.decoded import nearest
from varscale.data.sources.survey import foreign
from varscale.errors import DataError

CAPTIONS = ("caption", "captions", "text", "prompt", "description")
"""Columns of text that describe an image, by their usual names."""
IMAGES = ("image", "img", "images", "picture", "photo", "jpg", "png", "image_bytes", "bytes")
IMAGE_FILES = ("image", "img", "image_path", "path", "file", "filename", "file_name")
LABELS = ("label", "labels", "class", "class_label", "class_id", "category", "target", "fine_label", "y", "cls")
"""Columns of images, of names of images' files, and of labels, by their usual names, the likeliest first."""
LONGEST_PATH = 1000


def open_table(file: Path, image_column: str, label_column: str | None) -> pq.ParquetFile:
    """A Parquet file with both columns.

    Raises:
        DataError: It is none, a column is missing, or one is of a type that can't be images or labels.
    """
    reader = open_reader(file)
    schema = reader.schema_arrow
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column is None or (key == "label_column" and in_path(file, reader, column) is not None):
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
    schema = open_reader(file).schema_arrow
    types = {name: schema.field(name).type for name in schema.names if _holds_images(schema.field(name).type)}
    stored = sorted((name for name in types if not is_text(types[name])), key=lambda name: _rank(name, IMAGES))
    named = sorted((name for name in types if name.lower() in IMAGE_FILES), key=lambda name: _rank(name, IMAGE_FILES))
    if not (images := [*stored, *named]):
        raise DataError(f"{file}: no column of images; the file has {nearest('', schema.names)}")
    in_path = [part.partition("=")[0] for part in file.parts if "=" in part]
    labels = [name for name in (*schema.names, *in_path) if name.lower() in LABELS and name != images[0]]
    return images[0], min(labels, key=lambda name: _rank(name, LABELS), default=None)


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


def open_reader(file: Path) -> pq.ParquetFile:
    """A Parquet file.

    Raises:
        DataError: It is none, or two of its columns have one name.
    """
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


def in_path(file: Path, reader: pq.ParquetFile, name: str) -> str | None:
    """The class of all rows of a file in a folder `<column>=<class>`; None where it isn't in one, or has the column."""
    if name in reader.schema_arrow.names:
        return None
    named = [part.partition("=")[2] for part in file.parts[:-1] if part.startswith(f"{name}=")]
    return unquote(named[-1]) if named else None


def _holds_images(kind: pa.DataType) -> bool:
    if _is_list(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind if field.name in ("bytes", "path")}
        return bool(fields) and all(pa.types.is_null(each) or _holds_images(each) for each in fields.values())
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(binary or pa.types.is_fixed_size_binary(kind) or is_text(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _holds_texts(kind: pa.DataType) -> bool:
    return is_text(kind.value_type) if _is_list(kind) else is_text(kind)


def _holds_vectors(kind: pa.DataType) -> bool:
    return _is_list(kind) and bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def is_text(kind: pa.DataType) -> bool:
    """Whether values are texts, also those of a dictionary."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
