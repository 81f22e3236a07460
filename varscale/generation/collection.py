"""Drawn images as files: a folder of PNGs, one .npz as guided-diffusion has it, or one .parquet as Hugging Face has it.

Each batch is kept as it comes, so that an interrupted drawing goes on. PNGs are the batches themselves; those of the
other two lie in a hidden folder beside the file until they are joined. What a collection is of lies in a record beside
the batches, which is written first.

Letters: b images of a batch, H and W height and width.
"""

import csv
import io
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from pydantic import FiniteFloat

from varscale.errors import ExperimentError
from varscale.store.atomic import replaced, write_atomically
from varscale.store.locks import held_alone
from varscale.store.records import Record

RECORD = ".sampling.json"
LABELS = "labels.csv"
Names = NDArray[np.int64] | NDArray[np.str_]
"""Of images, their labels, or the captions that they were drawn for."""


class CollectionRecord(Record):
    """What a collection is of; two that differ in any of it are never mixed."""

    model: str
    tokenizer: str
    """Checksums of both files."""
    images: int
    labels: str
    """Hash of all labels."""
    batch_size: int
    guidance: FiniteFloat
    guidance_schedule: str
    temperature: FiniteFloat
    top_k: int
    top_p: FiniteFloat
    smooth: bool
    seed: int
    use_cache: bool
    steps: int = 0
    chosen: str = ""
    """How images were chosen among candidates, and by which classifier; nothing where all were kept."""

    def difference_from(self, other: "CollectionRecord") -> str | None:
        """The first thing in which they differ, in words; None where nothing does."""
        for name in type(self).model_fields:
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                return f"with {name.replace('_', ' ')} {others}, not {mine}"
        return None


class Collection(ABC):
    """A collection of images that is being drawn."""

    def __init__(self, out: Path) -> None:
        """Look at what there is.

        Raises:
            ExperimentError: There is something else at `out`.
        """
        self.out = out
        self.begun = CollectionRecord.read(self.parts / RECORD)
        other_file = out.exists() and not (out.is_dir() and self.parts == out)
        torn_record = f".{RECORD}."  # what a process leaves that is killed while it writes the record
        filled = out.is_dir() and not all(path.name.startswith(torn_record) for path in out.iterdir())
        if self.begun is None and (other_file or filled):
            held = "a folder that holds something else" if out.is_dir() else "there is such a file already"
            raise ExperimentError(f"--out {out}: {held}; name another")

    @staticmethod
    def at(out: str) -> "Collection":
        """The collection of a folder, an .npz or a .parquet: a name without one of these suffixes is a folder's.

        Raises:
            ExperimentError: There is something else, or the suffix is another one.
        """
        path = Path(out)
        if is_folder(out):
            return _Folder(path)
        if path.suffix not in (".npz", ".parquet"):
            raise ExperimentError(f"--out {out}: expected a name that ends in .png, .npz or .parquet, or a folder")
        return _Npz(path) if path.suffix == ".npz" else _Parquet(path)

    def begin(self, record: CollectionRecord) -> int:
        """Begin, or go on; returns how many images need not be drawn: those of the first whole batches.

        Raises:
            ExperimentError: What was begun is of other options.
            OSError: It can't be written.
        """
        self.record = record
        if self.begun is None:
            if self.parts != self.out:  # whatever is there has no record that can be read
                shutil.rmtree(self.parts, ignore_errors=True)
            record.write(self.parts / RECORD)
        elif difference := record.difference_from(self.begun):
            raise ExperimentError(f"--out {self.out}: was begun {difference}; name another, or go on with the same")
        if self._finished():
            return record.images
        for torn in self.parts.glob(".[0-9]*"):  # a killed process left it
            torn.unlink()
        there = {path.name for path in self.parts.iterdir()}
        firsts = range(0, record.images, record.batch_size)
        return next((first for first in firsts if not there.issuperset(self._names(first))), record.images)

    @property
    def parts(self) -> Path:
        """Folder of the batches and the record."""
        return self.out.with_name(f".{self.out.name}.parts")

    def add(self, first: int, images_bHW3: NDArray[np.uint8], names_b: Names) -> None:
        """Keep the batch of images that begins with image `first`."""
        for name, content in zip(self._names(first), self._encoded(first, images_bHW3, names_b), strict=True):
            write_atomically(self.parts / name, content)

    def finish(self, names_N: Names) -> None:
        """Make one thing of all batches, if it isn't made yet."""
        if not self._finished():
            self._join(names_N)
        if self.parts != self.out:
            shutil.rmtree(self.parts)

    def _finished(self) -> bool:
        return self.out.exists()

    def _part_paths(self) -> Iterator[Path]:
        for first in range(0, self.record.images, self.record.batch_size):
            yield from (self.parts / name for name in self._names(first))

    def _names(self, first: int) -> list[str]:
        """Of the files of the batch that begins there."""
        return [f"{first:09d}.part"]

    @abstractmethod
    def _encoded(self, first: int, images_bHW3: NDArray[np.uint8], names_b: Names) -> Iterable[bytes]:
        """Their contents."""

    @abstractmethod
    def _join(self, names_N: Names) -> None: ...


class _Folder(Collection):
    """000000.png, 000001.png, …, and in the end labels.csv."""

    @property
    def parts(self) -> Path:
        return self.out

    def _finished(self) -> bool:
        return (self.out / LABELS).exists()

    def _names(self, first: int) -> list[str]:
        return [f"{i:06d}.png" for i in range(first, min(first + self.record.batch_size, self.record.images))]

    def _encoded(self, first: int, images_bHW3: NDArray[np.uint8], names_b: Names) -> Iterable[bytes]:
        return map(_png, images_bHW3)

    def _join(self, names_N: Names) -> None:
        names = [path.name for path in self._part_paths()]
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerows([("file", _column(names_N)), *zip(names, names_N.tolist(), strict=True)])
        write_atomically(self.out / LABELS, table.getvalue().encode())


class _Npz(Collection):
    """arr_0: uint8 (N, H, W, 3); arr_1: int64 (N,), or text."""

    def _encoded(self, first: int, images_bHW3: NDArray[np.uint8], names_b: Names) -> Iterable[bytes]:
        buffer = io.BytesIO()
        np.save(buffer, images_bHW3)
        yield buffer.getvalue()

    def _join(self, names_N: Names) -> None:
        shape = (len(names_N), *np.load(next(iter(self._part_paths()))).shape[1:])
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        # as numpy.savez, which would hold all images in memory
        with replaced(self.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for part in self._part_paths():
                    entry.write(np.load(part).data)
            with archive.open("arr_1.npy", "w") as entry:
                np.save(entry, names_N)


class _Parquet(Collection):
    """Columns `img` (a struct of `bytes`, a PNG, and `path`) and `label` or `caption`, as Hugging Face's CIFAR-10."""

    @staticmethod
    def _schema(names_N: Names) -> Any:
        image, name = pa.struct([("bytes", pa.binary()), ("path", pa.string())]), _column(names_N)
        return pa.schema([("img", image), (name, pa.int64() if name == "label" else pa.string())])

    def _encoded(self, first: int, images_bHW3: NDArray[np.uint8], names_b: Names) -> Iterable[bytes]:
        rows = [
            {"img": {"bytes": _png(image_HW3), "path": f"{first + i:06d}.png"}, _column(names_b): names_b[i].item()}
            for i, image_HW3 in enumerate(images_bHW3)
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, self._schema(names_b)), buffer)
        yield buffer.getvalue()

    def _join(self, names_N: Names) -> None:
        with replaced(self.out) as temporary, pq.ParquetWriter(temporary, self._schema(names_N)) as writer:
            for part in self._part_paths():
                writer.write_table(pq.read_table(part))


def drawn_alone(out: str) -> AbstractContextManager[None]:
    """Within it no other process draws into this collection.

    Raises:
        ExperimentError: One does.
    """
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = ExperimentError(f"--out {out}: another process draws into it; wait for it, or name another")
    return held_alone(path.with_name(f".{path.name}.lock"), busy)


def is_folder(out: str) -> bool:
    """Whether images go into a folder of this name: it is one, ends in a slash, or has no suffix."""
    return out.endswith("/") or Path(out).is_dir() or Path(out).suffix == ""


def _column(names_N: Names) -> str:
    """What a column of them is called."""
    return "caption" if names_N.dtype.kind == "U" else "label"


def _png(image_HW3: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "png")
    return buffer.getvalue()
