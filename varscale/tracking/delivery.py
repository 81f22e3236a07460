"""What is new in the files of studies and their runs, given to an MLflow store."""

import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from varscale.evaluation.stored import SETTINGS, StoredEvaluations
from varscale.store.curves import read_curve
from varscale.store.layout import Kind, RunFiles, Store, StudyFiles
from varscale.store.records import Result, Row, RunIdentity, StudyCell, StudyRecord, read_result
from varscale.tracking.client import LONGEST_TAG, MLflowStore, RunDeletedError, is_rejection
from varscale.tracking.positions import (
    OPEN,
    Point,
    Position,
    milliseconds,
    new_points,
    read_position,
    result_checksum,
    write_position,
)

PARENT_TAG, NAME_TAG = "mlflow.parentRunId", "mlflow.runName"
ROW_TAG, LABELS_TAG, EVALUATIONS_TAG = "row", "labels", "evaluations"
"""A cell's columns of the runs table, JSON: those of its result, of the study, and of its images (`rows`: a list, one
for each way in which they were measured)."""
MISSING_TAG = "missing"
"""Titles of the study's cells that have no result, a line each."""
SORTABLE = ("train_flops", "params_total", "params_active", "images_seen")
"""Parameters that are metrics too: MLflow sorts parameters as text. The others are not, to keep the metrics few."""
POINTS_AT_ONCE = 200
"""Of a curve: then they are sent, and the time looked at."""


class OutOfTimeError(Exception):
    """The delivery's time is over; the rest waits for the next one."""


class Delivery:
    """Delivers studies to one MLflow store, remembering how far it came.

    The first look at a run takes the truth from the store (its run by key, the last step of each metric, its
    parameters); later ones trust the file of positions. So a file that is behind, absent, or of another database
    doubles and loses nothing.
    """

    def __init__(self, mlflow: MLflowStore, place: str, store: Store) -> None:
        """Deliver what lies in `store`; `place` is what positions in this MLflow store are kept under."""
        self._mlflow, self._place, self._store = mlflow, place, store
        self._verified: dict[Path, str] = {}
        self._settled: dict[Path, object] = {}
        self._ended: set[Path] = set()
        self._evaluations = StoredEvaluations(store)
        self._deadline = 0.0
        self._refused: list[Exception] = []

    def deliver(self, studies: Iterable[StudyFiles], deadline: float) -> None:
        """Deliver what is new of these studies; one whose study.json can't be used is left out.

        Raises:
            OutOfTimeError: `deadline` (of `time.monotonic`) passed.
            Exception: The store does not answer, or refused something (raised after all others were tried).
        """
        self._deadline, self._refused = deadline, []
        self._evaluations.refresh()
        for study in studies:
            if (record := StudyRecord.read(study.record)) is not None:
                self._study(study, record)
        if self._refused:
            raise self._refused[0]

    def _study(self, study: StudyFiles, record: StudyRecord) -> None:
        file = study.delivery("study", study.name)
        with self._held(), self._shown(study, file, "study", study.name, record.created) as parent:
            parent.tag({"role": "study", "recipe": record.recipe})
        run_id = read_position(file, self._place).run_id
        for kind, run, cell in members(self._store, record):
            with self._held():
                self._run(study, record, run_id, kind, run, cell)
        grid = record.settings.get("grid")
        depths = grid.get("depths") if isinstance(grid, dict) else None
        with self._held(), self._shown(study, file, "study", study.name, record.created) as parent:
            missing = [cell for cell in record.current if study.delivery("cells", cell.folder) not in self._ended]
            parent.tag(
                {  # tags may change, which MLflow's parameters can't
                    "recipe": record.recipe,
                    "tokenizer": record.tokenizer,
                    "cells": str(len(record.current)),
                    "depths": ",".join(map(str, depths if isinstance(depths, list) else ())),
                    MISSING_TAG: "\n".join(cell.title for cell in missing),
                }
            )
            for path in sorted(study.laws.glob("*")):
                if path.name in ("laws.json", "report.html", "runs.csv") or path.suffix in (".svg", ".png"):
                    parent.upload(path, "laws")
            parent.end(record.status, milliseconds(record.ended or 0))

    def _run(
        self, study: StudyFiles, record: StudyRecord, parent: str, kind: Kind, run: RunFiles, cell: StudyCell | None
    ) -> None:
        file = study.delivery(kind, run.folder.name)
        measured = self._evaluations.stamps(run.fingerprint) if cell else []
        stamps = [_stamp(run.metrics), _stamp(run.result), measured]
        signature = (*map(str, stamps), record.status, record.ended, cell, parent)
        if self._settled.get(file) == signature:
            return
        identity, result = RunIdentity.read(run.identity), read_result(run)
        self._ended.discard(file)
        began = [point.time for point in islice(read_curve(run.metrics), 1)]
        if result is not None:
            began.append(result.time - result.metrics.get("wall_seconds", 0.0))
        if identity is None or not began:
            return
        name, labels = (cell.title, cell.labels) if cell else (identity.name, {})
        params = {**identity.params, **labels}
        tags = {"role": identity.role, "fingerprint": run.fingerprint, NAME_TAG: name}
        if parent:
            tags[PARENT_TAG] = parent
        if cell:
            tags["recipe"] = cell.recipe
        with self._shown(study, file, f"{kind}/{run.folder.name}", name, began[0]) as shown:
            shown.parameters(params)
            shown.tag(tags)
            if cell:
                shown.json_tag(LABELS_TAG, labels)
            shown.curve(run.metrics)
            shown.result(run, result, {*params, *tags})
            if cell and result is not None:
                rows = self._evaluations.rows(result, cell.evaluations)
                shown.evaluations(rows, self._evaluations.ended(run.fingerprint))
            if result is None:
                shown.end(record.status, milliseconds(record.ended or 0))
            else:
                shown.end("FAILED" if result.status == "diverged" else "FINISHED", milliseconds(result.time))
                self._ended.add(file)
        self._settled[file] = signature

    @contextmanager
    def _held(self) -> Iterator[None]:
        """What MLflow refuses of one run does not hold up the others."""
        if time.monotonic() > self._deadline:
            raise OutOfTimeError
        try:
            yield
        except RunDeletedError:
            pass  # by the user, in MLflow
        except Exception as error:
            if not is_rejection(error):
                raise
            self._verified.clear()
            self._refused.append(error)

    @contextmanager
    def _shown(self, study: StudyFiles, file: Path, name: str, title: str, began: float) -> "Iterator[_ShownRun]":
        """MLflow's run of a run of the study, created where there is none; how far it came is kept in `file`."""
        position, key = read_position(file, self._place), f"{study.name}/{name}"
        if not position.run_id or self._verified.get(file) != position.run_id:
            found = self._mlflow.find(study.name, key) or Position()
            if found.run_id and found.run_id == position.run_id:
                found = position.model_copy(update={"offset": 0, "steps": found.steps, "params": found.params})
            position = found
        create = partial(self._mlflow.create, study.name, key, title, milliseconds(began))
        shown = _ShownRun(self._mlflow, create, position, self._deadline)
        try:
            yield shown
            shown.send()
        finally:
            self._verified[file] = shown.delivered.run_id
            write_position(file, self._place, shown.delivered)


class _ShownRun:
    """A run of MLflow's, and how far it was delivered. What is new is collected, and sent together: calls cost most."""

    def __init__(
        self, mlflow: MLflowStore, create: Callable[[Mapping[str, str]], str], position: Position, deadline: float
    ) -> None:
        self.delivered = position
        """What MLflow has."""
        self.position = position.model_copy(deep=True)
        """What it has when all that was collected is sent."""
        self._mlflow, self._create, self._deadline = mlflow, create, deadline
        self._params: dict[str, Any] = {}
        self._points: list[Point] = []
        self._tags: dict[str, str] = {}
        self._files: list[tuple[Path, str | None]] = []

    def send(self) -> None:
        """Send what was collected, to a new run where there is none yet."""
        if not self.position.run_id:
            self.position.run_id, self._tags = self._create(self._tags), {}
        if self._params or self._points or self._tags:
            self._mlflow.log(self.position.run_id, self._params, self._points, self._tags)
        for file, folder in self._files:
            self._mlflow.upload(self.position.run_id, file, folder)
        self._params, self._points, self._tags, self._files = {}, [], {}, []
        self.delivered = self.position.model_copy(deep=True)

    def parameters(self, params: Mapping[str, Any]) -> None:
        """Add those that are new."""
        new = {key: value for key, value in params.items() if key not in self.position.params and value is not None}
        self._params |= new
        self.position.params = sorted({*self.position.params, *new})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set those that changed."""
        changed = {key: value for key, value in tags.items() if self.position.tags.get(key) != value}
        self._tags |= changed
        self.position.tags |= changed

    def json_tag(self, tag: str, content: Mapping[str, Any]) -> None:
        """Set a tag, and others with a number where one is too short for the content (see `joined`)."""
        text = json.dumps(content)
        parts = [text[start : start + LONGEST_TAG] for start in range(0, len(text), LONGEST_TAG)]
        former = {key: "" for key in self.position.tags if key.startswith(f"{tag}.")}
        self.tag({**former, **{f"{tag}.{number}" if number else tag: part for number, part in enumerate(parts)}})

    def curve(self, metrics_file: Path) -> None:
        """Deliver the points that are new; those known already have no metrics, and only move the position."""
        points = new_points(metrics_file, self.position)
        while batch := list(islice(points, POINTS_AT_ONCE)):
            if time.monotonic() > self._deadline:
                raise OutOfTimeError
            self._points += batch
            self.position.offset, self.position.checksum = batch[-1].end, batch[-1].checksum
            for point in batch:
                self.position.steps.update(dict.fromkeys(point.metrics, point.images))
            if len(batch) == POINTS_AT_ONCE:
                self.send()

    def result(self, run: RunFiles, result: Result | None, described: set[str]) -> None:
        """Deliver a result: its pictures, its numbers as metrics at the last step, its words and provenance as tags.

        Without result, take back the one that was delivered and whose file was then damaged.
        """
        for name in result.pictures if result else ():
            self.upload(run.folder / name)
        checksum = result_checksum(result)
        if checksum == self.position.result:
            return
        if result is None:
            self.tag({"status": ""})
        else:
            metrics = {key: value for key, value in result.metrics.items() if key not in described or key in SORTABLE}
            images = int(min(result.metrics.get("images_seen", max(self.position.steps.values(), default=0)), 2**62))
            self._points.append(Point(milliseconds(result.time), images, metrics))
            row = {**result.row, **result.provenance}
            hidden = {*result.metrics, *described, ROW_TAG, LABELS_TAG}
            shown = {key: str(value) for key, value in row.items() if value not in (None, "") and key not in hidden}
            self.tag({**shown, "status": result.status})
            self.json_tag(ROW_TAG, row)
        self.position.result = checksum

    def evaluations(self, rows: Sequence[Row], ended: float) -> None:
        """Deliver what was measured of a cell's images: numbers as metrics, and all of it for the runs table.

        Metrics of the first row have the columns' own names; those of further rows say how they were measured
        otherwise, such as `fid_guidance_3`.
        """
        checksum = zlib.crc32(json.dumps(rows).encode()) if rows else 0
        if checksum == self.position.evaluations:
            return
        first = rows[0] if rows else {}
        numbers = {
            f"{name}{_difference(first, row)}": value
            for row in rows
            for name, value in row.items()
            if isinstance(value, float) and name not in SETTINGS
        }
        images = int(max(self.position.steps.values(), default=0))
        if numbers:
            self._points.append(Point(milliseconds(ended), images, numbers))
        self.tag({name: str(first[name]) for name in SETTINGS if name in first})
        self.json_tag(EVALUATIONS_TAG, {"rows": list(rows)})
        self.position.evaluations = checksum

    def upload(self, file: Path, folder: str | None = None) -> None:
        """Deliver a file where it is new or changed; a link is none of ours."""
        stamp = _stamp(file)
        if stamp and not file.is_symlink() and self.position.artifacts.get(file.name) != stamp:
            self._files.append((file, folder))
            self.position.artifacts[file.name] = stamp

    def end(self, status: str, end: int) -> None:
        """Set MLflow's status: RUNNING, or how and when the run ended."""
        end = 0 if status == OPEN else end
        if (status, end) != (self.position.status, self.position.ended):
            self.send()
            self._mlflow.set_status(self.position.run_id, status, end)
            self.position.status, self.position.ended = status, end


def members(store: Store, record: StudyRecord) -> Iterator[tuple[Kind, RunFiles, StudyCell | None]]:
    """Kind and files of every run of a study (the tokenizer, the trunks, the cells), each once."""
    cells = {cell.folder: cell for cell in (*record.cells, *record.current)}  # the latest recipe's labels, if in both
    yield "tokenizers", RunFiles(store.runs / "tokenizers" / record.tokenizer), None
    for trunk in dict.fromkeys(cell.trunk for cell in record.cells):
        yield "trunks", RunFiles(store.runs / "trunks" / trunk), None
    for folder, cell in cells.items():
        yield "cells", RunFiles(store.runs / "cells" / folder), cell


def joined(tags: Mapping[str, str], tag: str) -> dict[str, Any]:
    """What `json_tag` made of a JSON object; empty where there is none."""
    parts = {int(key[len(tag) + 1 :] or 0): text for key, text in tags.items() if key.split(".")[0] == tag}
    content = json.loads("".join(parts[number] for number in sorted(parts)) or "{}")
    return content if isinstance(content, dict) else {}


def _difference(first: Row, row: Row) -> str:
    """What a further evaluation's metrics are called beside the first one's: the settings that differ."""
    differing = ((name, row[name]) for name in SETTINGS if row[name] != first[name])
    texts = (f"{name}_{value:.12g}" if isinstance(value, float) else f"{name}_{value}" for name, value in differing)
    return "".join("_" + re.sub(r"[^\w.-]", "-", text) for text in texts)


def _stamp(file: Path) -> list[int] | None:
    """Size and modification time; None where there is no file that can be read."""
    try:
        with file.open("rb"):
            stat = file.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]
