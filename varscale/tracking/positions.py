"""How far each run was delivered to each store, and what of its curve is new. Nothing here knows MLflow.

A file of positions that is deleted or damaged costs a redelivery, which the store recognises; it doubles nothing.
"""

import itertools
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from varscale.store.curves import parse_point
from varscale.store.layout import RunFiles
from varscale.store.records import Record, Result, read_result

OPEN = "RUNNING"
LONGEST_LINE = 1 << 18
_NAME = re.compile(r"\w[\w.-]{0,249}")
"""Names of metrics; a damaged line may hold others, which a store would refuse."""
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Point:
    """One line of a run's curves and where the next line starts."""

    milliseconds: int
    """Unix time."""
    images: int
    """Images seen, the step that MLflow shows."""
    metrics: dict[str, float]
    """Numbers; empty where the line could not be read."""
    end: int = 0
    """Byte offset after the line."""
    checksum: int = 0
    """CRC-32 of the line, to notice that the file was rewritten."""


class Position(BaseModel):
    """How far one run was delivered to one store."""

    model_config = ConfigDict(strict=True, extra="ignore")

    run_id: str = ""
    """MLflow's name of the run; empty: not created yet."""
    offset: Count = 0
    """Bytes of metrics.jsonl that were delivered."""
    checksum: Count = 0
    """CRC-32 of the last line delivered."""
    steps: dict[str, int] = {}
    """Images seen at the last point of each metric: a resumed run repeats points, which are not delivered again."""
    params: list[str] = []
    """Names of the parameters delivered; MLflow lets none of them change."""
    result: Count = 0
    """CRC-32 of the result that was delivered; 0: none."""
    evaluations: Count = 0
    """CRC-32 of what was delivered of evaluations; 0: nothing."""
    status: str = OPEN
    """MLflow's status of the run."""
    ended: Count = 0
    """When it ended, Unix milliseconds; 0: it goes on."""
    tags: dict[str, str] = {}
    """Tags as delivered."""
    artifacts: dict[str, list[int]] = {}
    """Size and modification time of each file delivered."""


class DeliveryRecord(Record):
    """How far one run was delivered to each store, by the store's masked URI."""

    stores: dict[str, Position] = Field(default_factory=dict)


def read_position(file: Path, store: str) -> Position:
    """How far the run whose positions are in `file` was delivered to `store`; nothing where the file says nothing."""
    record = DeliveryRecord.read(file)
    return record.stores.get(store, Position()) if record else Position()


def write_position(file: Path, store: str, position: Position) -> None:
    """Remember `position`, atomically, beside those of other stores; the file stays where it says so already."""
    stores = (DeliveryRecord.read(file) or DeliveryRecord()).stores
    if stores.get(store) != position:
        DeliveryRecord(stores={**stores, store: position}).write(file)


def new_points(metrics_file: Path, position: Position) -> Iterator[Point]:
    """Complete lines beyond `position`, without what was delivered already.

    The last line may be torn (being written, or left by a killed process): it waits until its end is there. Where the
    file was shortened or rewritten (a resumed run), reading starts over and the images seen tell what is new. A line
    that can't be read counts as a point without metrics, so that the position moves beyond it.
    """
    try:
        with metrics_file.open("rb") as file:
            offset = _start(file, position)
            file.seek(offset)
            last = dict(position.steps)
            for line in itertools.takewhile(lambda line: line.endswith(b"\n"), file):
                offset += len(line)
                time, images, metrics = parse_point(line) or (0, 0, {})
                new = [key for key in metrics if images > last.get(key, -1) and _NAME.fullmatch(key)]
                fresh = {key: metrics[key] for key in new}
                last |= dict.fromkeys(fresh, images)
                yield Point(milliseconds(time), images, fresh, offset, zlib.crc32(line))
    except OSError:
        return


def pending_metrics(run: RunFiles, position: Position) -> int:
    """Numbers in a run's files, of curves and result, that a store was not given."""
    count = sum(len(point.metrics) for point in new_points(run.metrics, position))
    result = read_result(run)
    return count if result is None or result_checksum(result) == position.result else count + len(result.metrics)


def result_checksum(result: Result | None) -> int:
    """CRC-32 of a result's content; 0 where there is none."""
    return zlib.crc32(result.model_dump_json().encode()) if result else 0


def milliseconds(seconds: float) -> int:
    """Unix milliseconds of Unix seconds, none that a database could not hold."""
    return round(min(max(seconds, 0.0), 1e11) * 1000)


def _start(file: BinaryIO, position: Position) -> int:
    """The offset to go on from: the old one if the line before it is still the one that was delivered last."""
    window = min(position.offset, LONGEST_LINE)
    file.seek(position.offset - window)
    delivered = file.read(window)
    if len(delivered) < window or not delivered.endswith(b"\n"):
        return 0
    last_line = delivered[delivered.rfind(b"\n", 0, -1) + 1 :]
    return position.offset if zlib.crc32(last_line) == position.checksum else 0
