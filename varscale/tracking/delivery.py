"""What is new in the files of runs and sweeps, given to an MLflow store."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from varscale.store.layout import RunFiles, absolute, read_json
from varscale.tracking.records import (
    OPEN,
    STATE_FILE,
    Point,
    Position,
    SweepRecord,
    file_checksum,
    new_points,
    numbers,
    owners,
    read_position,
    read_records,
    write_position,
)
from varscale.tracking.store import METRICS_A_CALL, RunDeletedError, Store, is_rejection

Item = TypeVar("Item")

PARENT_TAG = "mlflow.parentRunId"
REUSED_TAG = "reused_runs"
IDS_A_TAG = 200
LABELS_TAG = "reused_labels"
"""What reused runs have otherwise in this sweep: JSON, by run."""
LABELS_A_TAG = 40
SORTABLE = ("train_flops", "params_total", "params_active", "images_seen")
"""Parameters that are metrics too: MLflow sorts parameters as text. The others are not, to keep the metrics few."""


class OutOfTimeError(Exception):
    """The delivery's time is over; the rest waits for the next one."""


class Delivery:
    """Delivers runs and sweeps under one runs folder to one store, remembering how far it came.

    The first look at a run takes the truth from the store (its run by key, the last step of each metric); later ones
    trust `mlflow.json`. So a state file that is behind, absent, or of another database doubles and loses nothing.
    """

    def __init__(self, store: Store, tracking_uri: str, runs: Path) -> None:
        self._store = store
        self._uri = tracking_uri
        self._runs = absolute(runs)
        self._verified: dict[Path, str] = {}
        self._settled: dict[Path, object] = {}
        self._deadline = 0.0

    def deliver(self, folders: Iterable[Path], deadline: float) -> None:
        """Deliver what is new of these runs and of the sweeps that they belong to.

        Raises:
            OutOfTimeError: `deadline` (of `time.monotonic`) passed.
            Exception: The store does not answer, or refused something of a run (raised after all others were tried).
        """
        self._deadline = deadline
        records = read_records(self._runs)
        owned = owners(records)
        keys = {self._key(folder): folder for folder in folders}
        concerned = [record for record in records if not keys.keys().isdisjoint(record.runs)]
        refused: list[Exception] = []

        def attempt(action: Callable[[], None]) -> None:
            if time.monotonic() > self._deadline:
                raise OutOfTimeError("out of time")
            try:
                action()
            except RunDeletedError:
                pass  # by the user, in MLflow
            except Exception as error:
                if not is_rejection(error):
                    raise
                self._verified.clear()
                refused.append(error)

        for record in concerned:
            attempt(lambda record=record: self._open_sweep(record))  # type: ignore[misc]
        for key, folder in keys.items():
            attempt(lambda key=key, folder=folder: self._run(folder, owned.get(key)))  # type: ignore[misc]
        for record in concerned:
            attempt(lambda record=record: self._update_sweep(record, owned))  # type: ignore[misc]
        if refused:
            raise refused[0]

    def _run(self, folder: Path, owner: SweepRecord | None) -> None:
        run, state = RunFiles(folder), folder / STATE_FILE
        identity = read_json(run.identity)
        signature = (_stamp(run.metrics), _stamp(run.result), owner and (owner.file, owner.status))
        if identity is None or self._settled.get(folder) == signature:
            return
        result = run.read_result()
        first = next((point for point in new_points(run.metrics, Position()) if point.milliseconds), None)
        if first is None and result is None:
            return  # not begun
        parent = self._position(owner.state).run_id if owner else ""
        links = {PARENT_TAG: parent, "sweep": owner.name} if owner and parent else {}
        tags = {"role": str(identity.get("role", "run")), "fingerprint": str(identity.get("fingerprint", ""))}
        began = first.milliseconds if first else _began(result or {})
        position = self._open(state, folder, identity.get("name", folder.name), began, {**tags, **links})
        self._params(state, position, identity.get("params", {}))
        self._tags(state, position, links)
        self._points(state, position, run.metrics)
        status, ended = (owner.status, owner.ended or 0) if owner else (OPEN, 0)
        if result is not None:
            self._result(state, position, run, result, identity.get("params", {}))
            status, ended = "FAILED" if result.get("status") == "diverged" else "FINISHED", result.get("time", 0)
        self._status(state, position, status, _milliseconds(ended))
        self._settled[folder] = signature

    def _open_sweep(self, record: SweepRecord) -> None:
        position = self._sweep_position(record)
        self._params(record.state, position, record.params)

    def _update_sweep(self, record: SweepRecord, owned: dict[str, SweepRecord]) -> None:
        position = self._sweep_position(record)
        others = [run for run in record.runs if run not in owned or owned[run].file != record.file]
        found = {run: read_position(self._runs / run / STATE_FILE, self._uri).run_id for run in others}
        reused = [run_id for run_id in found.values() if run_id]
        labels = [(found[run], label) for run, label in record.labels.items() if found.get(run)]
        tags = {"mlflow.runName": record.name, **{tag: "{}" for tag in position.tags if tag.startswith(LABELS_TAG)}}
        tags |= {tag: ",".join(ids) for tag, ids in _parts(REUSED_TAG, reused, IDS_A_TAG)}
        tags |= {tag: json.dumps(dict(each)) for tag, each in _parts(LABELS_TAG, labels, LABELS_A_TAG)}
        self._tags(record.state, position, tags)
        for path in record.attachments:
            self._artifact(record.state, position, Path(path), "laws")
        if _milliseconds(record.ended or 0) > position.ended:
            position.status = OPEN  # it was run again, and ended again
        self._status(record.state, position, record.status, _milliseconds(record.ended or 0))

    def _sweep_position(self, record: SweepRecord) -> Position:
        return self._open(
            record.state,
            record.file,
            record.name,
            _milliseconds(record.created),
            {"role": "sweep", "sweep": record.name},
        )

    def _open(self, state: Path, path: Path, name: str, began: int, tags: dict[str, str]) -> Position:
        position = self._position(state)
        if position.run_id and self._verified.get(path) == position.run_id:
            return position
        key = self._key(path)
        experiment = key.split("/", 1)[0]
        found = self._store.find(experiment, key, position.run_id)
        created = found is None
        found = found or self._store.create(experiment, key, name, began, tags)
        if found.run_id != position.run_id:
            position = Position(run_id=found.run_id, tags=tags if created else {})
        position.offset, position.steps = 0, found.steps
        self._save(state, position)
        self._verified[path] = found.run_id
        return position

    def _points(self, state: Path, position: Position, metrics_file: Path) -> None:
        batch: list[Point] = []
        count = 0
        for point in new_points(metrics_file, position):
            # points known already have no metrics, and come in thousands when a file is read again from its start
            if batch and (count + len(point.metrics) > METRICS_A_CALL or len(batch) == METRICS_A_CALL):
                self._send(state, position, batch)
                batch, count = [], 0
            batch.append(point)
            count += len(point.metrics)
        if batch:
            self._send(state, position, batch)

    def _send(self, state: Path, position: Position, batch: list[Point]) -> None:
        if time.monotonic() > self._deadline:
            raise OutOfTimeError("out of time")
        if any(point.metrics for point in batch):
            self._store.log_points(position.run_id, batch)
        position.offset, position.checksum = batch[-1].end, batch[-1].checksum
        for point in batch:
            position.steps.update(dict.fromkeys(point.metrics, point.images))
        self._save(state, position)

    def _result(
        self, state: Path, position: Position, run: RunFiles, result: dict[str, Any], params: dict[str, Any]
    ) -> None:
        for name in result.get("pictures", ()):
            self._artifact(state, position, run.folder / name, None)
        checksum = file_checksum(run.result)
        if checksum == position.result:
            return
        everything = numbers(result.get("metrics", {}))
        metrics = {key: value for key, value in everything.items() if key not in params or key in SORTABLE}
        known = {*everything, *params, "fingerprint", "status"}
        words = {key: value for key, value in result.get("row", {}).items() if key not in known}
        self._store.log_params(position.run_id, words)
        images = int(everything.get("images_seen", max(position.steps.values(), default=0)))
        point = Point(_milliseconds(result.get("time", 0)), images, metrics, 0, 0)
        self._store.log_points(position.run_id, [point])
        self._tags(state, position, {"status": str(result.get("status", "finished"))})
        position.result = checksum
        self._save(state, position)

    def _params(self, state: Path, position: Position, params: dict[str, Any]) -> None:
        if not position.parameters:
            self._store.log_params(position.run_id, params)
            position.parameters = True
            self._save(state, position)

    def _tags(self, state: Path, position: Position, tags: dict[str, str]) -> None:
        changed = {key: value for key, value in tags.items() if position.tags.get(key) != value}
        if changed:
            self._store.set_tags(position.run_id, changed)
            position.tags.update(changed)
            self._save(state, position)

    def _artifact(self, state: Path, position: Position, file: Path, folder: str | None) -> None:
        stamp = _stamp(file)
        if stamp is not None and position.artifacts.get(file.name) != stamp:
            self._store.upload(position.run_id, file, folder)
            position.artifacts[file.name] = stamp
            self._save(state, position)

    def _status(self, state: Path, position: Position, status: str, end: int) -> None:
        if status != position.status:
            self._store.set_status(position.run_id, status, end)
            position.status, position.ended = status, end
            self._save(state, position)

    def _position(self, state: Path) -> Position:
        return read_position(state, self._uri)

    def _save(self, state: Path, position: Position) -> None:
        write_position(state, self._uri, position)

    def _key(self, path: Path) -> str:
        return absolute(path).relative_to(self._runs).as_posix()


def _parts(tag: str, items: list[Item], size: int) -> Iterator[tuple[str, list[Item]]]:
    """So many items a tag, with a number from the second on: MLflow's tags are short."""
    for start in range(0, len(items), size):
        yield f"{tag}.{start // size}" if start else tag, items[start : start + size]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _began(result: dict[str, Any]) -> int:
    """When a run without curves began, Unix milliseconds."""
    return _milliseconds(result.get("time", 0) - result.get("metrics", {}).get("wall_seconds", 0))


def _stamp(file: Path) -> list[int] | None:
    """Size and modification time, or None where there is no file."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]
