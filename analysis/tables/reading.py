"""Files of runs, as people have them, into one DataFrame; what had to be guessed about a file is recorded.

`frame.attrs["sources"]` names the files and `frame.attrs["notes"]` says what was guessed: another encoding than UTF-8,
a decimal comma, comment lines, columns that only some of the files have.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.errors import TableError
from analysis.tables.drawn import as_csv, first_block, without_rulers
from analysis.tables.roles import free_name

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MOST_COLUMNS = 10_000
_SEPARATORS = (",", ";", "\t", "|")
_POINT = re.compile(r"(?:^|;)\s*[+-]?\d+\.\d+(?:[eE][+-]?\d+)?\s*(?:;|$)", re.MULTILINE)
"""A number with a decimal point between semicolons."""
_EXCEL = re.compile(r"sep=(.)", re.IGNORECASE)
"""The first line of a file that tells Excel its separator."""
_TEXTS = (".csv", ".tsv", ".txt", ".dat", ".md")
_KINDS = ".csv, .tsv, .parquet, .jsonl or .json (text also as .gz, .bz2 or .xz); save a sheet of Excel as .csv"
# what parsers of text, JSON, Parquet and packed files were seen to raise for broken or hostile ones
_UNREADABLE = (
    *(ValueError, OSError, TypeError, KeyError, EOFError, NotImplementedError, RecursionError, MemoryError),
    *(zlib.error, lzma.LZMAError, csv.Error),
)


def read_runs(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Reads CSV, TSV, Markdown, Parquet, JSON-lines or JSON files into one table.

    `row` names each row's file and place, and of several files `file` each row's file. Columns of the files' own that
    are called so become `source row` and `source file`.

    Args:
        paths: files, or patterns such as `runs/*.csv`.

    Raises:
        TableError: a file is missing, empty, or of a kind that can't be read.
    """
    if not paths:
        raise TableError("no file with runs was given")
    files = [file for path in paths for file in _matching(path)]
    files = list(dict.fromkeys(files))
    several = len(files) > 1 or files != list(map(Path, paths))
    frames, notes = [], []
    labels = _labels(files)
    for path, label in zip(files, labels, strict=True):
        frame, guessed = _read_one(path)
        frame = frame.rename(columns={name: free_name(frame, name) for name in ("row", "file")[: 1 + several]})
        frame["row"] = [f"{label}:{number}" if several else str(number) for number in range(1, len(frame) + 1)]
        frames.append(frame.assign(file=label) if several else frame)
        notes += [f"{label}: {note}" for note in guessed]
    every = dict.fromkeys(name for frame in frames for name in frame.columns)
    for label, frame in zip(labels, frames, strict=True):
        missing = [name for name in every if name not in frame.columns]
        if missing:
            notes.append(f"{label} has no column {', '.join(map(repr, missing))}")
    table = pd.concat(frames, ignore_index=True)
    table.attrs["sources"] = tuple(labels)
    table.attrs["notes"] = tuple(notes)
    return table


def _matching(path: str | Path) -> list[Path]:
    """The file itself, or those that a shell's pattern stands for."""
    if Path(path).exists() or not glob.has_magic(str(path)):
        return [Path(path)]
    every = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  # absolute patterns, too
    found = [Path(each) for each in every if Path(each).is_file()]
    if not found:
        raise TableError(f"{path}: no file matches")
    return found


def _labels(files: Sequence[Path]) -> list[str]:
    """The files' names, with the folders that tell files of one name apart."""
    for parts in range(1, max(len(path.parts) for path in files) + 1):
        labels = ["/".join(path.parts[-parts:]) for path in files]
        if len(set(labels)) == len(files):
            return labels
    return [str(path) for path in files]


def _read_one(path: Path) -> tuple[pd.DataFrame, list[str]]:
    if not path.is_file():
        raise TableError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    kind = suffixes[-1] if suffixes else ""
    notes: list[str] = []
    try:
        if kind in (".parquet", ".pq") and not packed:
            frame = pd.read_parquet(path)
            if any(frame.index.names):
                frame = frame.reset_index()
        elif kind in (".jsonl", ".ndjson"):
            frame = _records([json.loads(line) for line in _text(path, packed, notes).split("\n") if line.strip()])
        elif kind == ".json":
            content = json.loads(_text(path, packed, notes))
            frame = _records(content) if isinstance(content, list) else pd.DataFrame(content)
        elif kind in _TEXTS:
            text = _text(path, packed, notes)
            text = first_block(text) if kind == ".md" else text
            frame = _separated(text, "\t" if kind == ".tsv" else None, notes)
        else:
            raise TableError(f"{path}: unknown kind of table {''.join(path.suffixes[-2:])!r}; {_KINDS}")
    except TableError as error:
        raise error if str(path) in str(error) else TableError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TableError(f"{path}: can't be read as a table: {first_line}") from error
    if not len(frame):
        raise TableError(f"{path}: the table has no rows")
    frame.columns = [str(name).strip() for name in frame.columns]
    if len(frame.columns) > MOST_COLUMNS:
        raise TableError(f"{path}: {len(frame.columns):,} columns; a table of runs has at most {MOST_COLUMNS:,}")
    if not frame.columns.is_unique:
        raise TableError(f"{path}: the table has two columns named {frame.columns[frame.columns.duplicated()][0]!r}")
    return frame, notes


def _text(path: Path, packed: str, notes: list[str]) -> str:
    if packed:
        with _OPENERS[packed](path, "rb") as opened:
            data: bytes = opened.read()
    else:
        data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        notes.append("not UTF-8, read as Latin-1")
        return data.decode("latin-1")


def _records(records: list[Any]) -> pd.DataFrame:
    """One row a record; keys of nested objects are joined by dots."""
    if not all(isinstance(record, dict) for record in records):
        raise TableError("every record must be an object of column names and values")
    nested = any(isinstance(value, dict) for record in records for value in record.values())
    return pd.json_normalize(records) if nested else pd.DataFrame(records)


def _separated(text: str, separator: str | None, notes: list[str]) -> pd.DataFrame:
    if "\0" in text:
        raise TableError("this is no text; save a sheet of Excel as .csv")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.splitlines(keepends=True)
    if (first := _EXCEL.fullmatch(lines[0].strip()) if lines else None) and separator is None:
        separator, lines = first[1], lines[1:]
        text = "".join(lines)
    kept = [line for line in lines if not line.startswith("#")]
    if len(kept) < len(lines):
        notes.append(f"{len(lines) - len(kept)} lines that start with # were skipped")
        text = "".join(kept)
    filled = without_rulers(kept)
    if len(filled) < sum(1 for line in kept if line.strip()):
        text = "".join(filled)
    if separator is None and (drawn := as_csv(filled, _SEPARATORS)) is not None:
        text, note = drawn
        notes.append(note)
        separator = ","
    header_line = next(iter(filled), "")
    separator = separator or _separator(header_line)
    decimal = "," if separator == ";" and not _POINT.search(text) else "."
    if decimal == ",":
        notes.append("columns are separated by ';', so that a comma is read as a decimal comma")
    _check_header(text, separator)
    return pd.read_csv(io.StringIO(text), sep=separator, decimal=decimal, index_col=False, low_memory=False)


def _separator(header: str) -> str:
    """The separator that the header has most of, outside quotes."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(_SEPARATORS, key=bare.count)


def _check_header(text: str, separator: str) -> None:
    """Refuses what pandas would read without a word: two columns of one name, rows longer than the header."""
    rows = (row for row in csv.reader(io.StringIO(text), delimiter=separator) if any(cell.strip() for cell in row))
    header = next(rows, [])
    if len(header) > MOST_COLUMNS:
        raise TableError(f"{len(header):,} columns; a table of runs has at most {MOST_COLUMNS:,}")
    name, count = next(iter(Counter(cell.strip() for cell in header if cell.strip()).most_common(1)), ("", 0))
    if count > 1:
        raise TableError(f"the table has two columns named {name!r}")
    first = next(rows, [])
    if any(cell.strip() for cell in first[len(header) :]):
        raise TableError(f"the header has {len(header)} columns, but the first row has {len(first)} values")
