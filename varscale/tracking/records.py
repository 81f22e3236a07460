"""What MLflow is told is read from here: curves, results and sweep records on disk, and how far each was delivered.

    runs/<experiment>/<kind>/<run>/mlflow.json    how far that run was delivered, for each MLflow store
    runs/<experiment>/sweeps/<key>.sweep.json     a sweep as MLflow shows it
    runs/<experiment>/sweeps/<key>.mlflow.json    how far that was delivered

Nothing here knows MLflow. Deleting `mlflow.json` costs a redelivery, which the store recognises; it doubles nothing.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from varscale.store.layout import RunFiles, read_json, write_json

STATE_FILE = "mlflow.json"
RECORD_SUFFIX = ".sweep.json"
OPEN = "RUNNING"
LONGEST_LINE = 1 << 18


@dataclass(frozen=True)
class Point:
    """One line of a run's curves and where the next line starts."""

    milliseconds: int
    """Unix time."""
    images: int
    """Images seen, the step that MLflow shows."""
    metrics: dict[str, float]
    """Numbers; empty where the line could not be read."""
    end: int
    """Byte offset after the line."""
    checksum: int
    """CRC-32 of the line, to notice that the file was rewritten."""


@dataclass
class Position:
    """How far one run or sweep was delivered to one MLflow store."""

    run_id: str = ""
    """MLflow's name of the run; empty: not created yet."""
    offset: int = 0
    """Bytes of metrics.jsonl that were delivered."""
    checksum: int = 0
    """CRC-32 of the last line delivered."""
    steps: dict[str, int] = field(default_factory=dict)
    """Images seen at the last point of each metric: a resumed run repeats points, which are not delivered again."""
    parameters: bool = False
    """Whether the parameters were delivered."""
    result: int = 0
    """CRC-32 of the result file that was delivered; 0: none."""
    status: str = OPEN
    """MLflow's status of the run."""
    ended: int = 0
    """When it ended, as delivered, Unix milliseconds."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags that may change, as delivered."""
    artifacts: dict[str, list[int]] = field(default_factory=dict)
    """Size and modification time of each file delivered."""


def read_position(file: Path, store: str) -> Position:
    """How far the run or sweep whose state is in `file` was delivered to `store`; nothing where the file is absent."""
    stores = (read_json(file) or {}).get("stores", {})
    known = Position.__dataclass_fields__
    return Position(**{key: value for key, value in stores.get(store, {}).items() if key in known})


def write_position(file: Path, store: str, position: Position) -> None:
    """Remember `position`, atomically, beside what else the file holds."""
    content = read_json(file) or {}
    stores = {**content.get("stores", {}), store: asdict(position)}
    write_json(file, {**content, "stores": stores})


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
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                milliseconds, images, metrics = _parse(line)
                fresh = {key: value for key, value in metrics.items() if images > last.get(key, -1)}
                last.update(dict.fromkeys(fresh, images))
                yield Point(milliseconds, images, fresh, offset, zlib.crc32(line))
    except FileNotFoundError:
        return


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `values` (truth values and None are not)."""
    return {key: float(value) for key, value in values.items() if type(value) in (int, float)}


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as MLflow shows it: the parent run of its cells."""

    file: Path
    """Where it is kept."""
    name: str
    """What MLflow shows."""
    created: float
    """Unix time."""
    params: dict[str, Any]
    """Settings to show."""
    runs: tuple[str, ...]
    """Folders of its tokenizer, trunks and cells, relative to the runs folder, those of earlier sweeps included."""
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What cells that another sweep planned have otherwise here, their nominal budget say; by folder, as in `runs`."""
    attachments: tuple[str, ...] = ()
    """Figures and reports, relative to the runs folder or absolute."""
    status: str = OPEN
    """RUNNING, FINISHED, FAILED or KILLED."""
    ended: float | None = None
    """Unix time."""

    @property
    def state(self) -> Path:
        """Where it is kept how far the record was delivered (its own file: two threads write the two)."""
        return self.file.with_name(self.file.name.removesuffix(RECORD_SUFFIX) + "." + STATE_FILE)

    def write(self) -> None:
        """Keep the record, atomically."""
        write_json(self.file, {key: value for key, value in asdict(self).items() if key != "file"})


def read_records(runs: Path) -> list[SweepRecord]:
    """All sweeps under the runs folder, oldest first."""
    records = [read_record(file) for file in runs.glob(f"*/sweeps/*{RECORD_SUFFIX}")]
    return sorted((record for record in records if record), key=lambda record: (record.created, str(record.file)))


def read_record(file: Path) -> SweepRecord | None:
    """The sweep kept in `file`, or None where there is none."""
    content = read_json(file)
    if content is None or not {"name", "created", "params", "runs"} <= content.keys():
        return None
    return SweepRecord(
        file=file,
        name=content["name"],
        created=content["created"],
        params=content["params"],
        runs=tuple(content["runs"]),
        labels=content.get("labels", {}),
        attachments=tuple(content.get("attachments", ())),
        status=content.get("status", OPEN),
        ended=content.get("ended"),
    )


def owners(records: Iterable[SweepRecord]) -> dict[str, SweepRecord]:
    """The sweep that each run belongs to: the oldest of its own experiment that lists it. Other ones reuse it."""
    found: dict[str, SweepRecord] = {}
    for record in records:
        experiment = record.file.parent.parent.name
        for run in record.runs:
            if run.split("/")[0] == experiment:
                found.setdefault(run, record)
    return found


def run_folders(runs: Path) -> list[Path]:
    """Every tokenizer, trunk and cell under the runs folder, in a fixed order."""
    return sorted(file.parent for file in runs.glob(f"*/*/*/{RunFiles(runs).identity.name}"))


def pending_metrics(folder: Path, store: str) -> int:
    """Numbers in a run's files, of curves and result, that `store` was not given."""
    run, position = RunFiles(folder), read_position(folder / STATE_FILE, store)
    count = sum(len(point.metrics) for point in new_points(run.metrics, position))
    result = run.read_result()
    if result is not None and file_checksum(run.result) != position.result:
        count += len(numbers(result.get("metrics", {})))
    return count


def file_checksum(file: Path) -> int:
    """CRC-32 of a file."""
    return zlib.crc32(file.read_bytes())


def _start(file: BinaryIO, position: Position) -> int:
    """The offset to go on from: the old one if the line before it is still the one that was delivered last."""
    window = min(position.offset, LONGEST_LINE)
    file.seek(position.offset - window)
    delivered = file.read(window)
    if len(delivered) < window or not delivered.endswith(b"\n"):
        return 0
    last_line = delivered[delivered.rfind(b"\n", 0, -1) + 1 :]
    return position.offset if zlib.crc32(last_line) == position.checksum else 0


def _parse(line: bytes) -> tuple[int, int, dict[str, float]]:
    try:
        content = json.loads(line)
        return round(content["time"] * 1000), int(content["images"]), numbers(content["metrics"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return 0, 0, {}
