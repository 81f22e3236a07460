"""Cells with the measures of their images, for the table of a paper; read off files alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sweeps.jobs.graph import read_cell_job
from varscale.errors import ExperimentError
from varscale.evaluation.stored import StoredEvaluations
from varscale.store.layout import RunFiles, Store
from varscale.store.records import Row, StudyRecord, read_result


@dataclass(frozen=True)
class ListedCell:
    """A cell, and how a study calls it."""

    files: RunFiles
    labels: Row
    evaluations: tuple[str, ...] = ()
    """Folders of the evaluations that come first."""

    @classmethod
    def of_study(cls, store: Store, name: str) -> "list[ListedCell]":
        """The cells of a study's latest recipe.

        Raises:
            ExperimentError: There is no such study.
        """
        record = StudyRecord.read(store.study(name).record)
        if record is None:
            raise ExperimentError(f"{store.study(name).folder}: no study; run `varscale sweep {name}` first")
        cells = store.runs / "cells"
        return [cls(RunFiles(cells / cell.folder), cell.labels, cell.evaluations) for cell in record.current]

    @classmethod
    def at(cls, folder: Path) -> "ListedCell":
        """The cell in a folder.

        Raises:
            ExperimentError: It is no finished cell's.
        """
        files = RunFiles(folder.resolve())
        if read_result(files) is None:
            raise ExperimentError(f"{folder}: no finished cell's folder, and no experiment of that name")
        return cls(files, {})


def measured_rows(cells: Sequence[ListedCell]) -> list[Row]:
    """One row for each way in which a finished cell's images were measured, or one without measures.

    Raises:
        ExperimentError: A folder is of another run than a cell.
    """
    stored: dict[Path, StoredEvaluations] = {}
    rows: list[Row] = []
    for cell in cells:
        result = read_result(cell.files)
        if result is None or result.status != "finished":
            continue
        job, runs = read_cell_job(cell.files.folder), cell.files.folder.parents[1]
        trunk = job.cell.trunk
        known = stored.setdefault(runs, StoredEvaluations(Store(runs)))
        row = {**job.cell.labels(), **result.row, **cell.labels, "model": trunk.model_name}
        row["sampling_passes"] = trunk.model.sampling_passes()
        measured = known.measured(result, cell.evaluations)
        for images, evaluation in measured:
            beside = {name: evaluation.provenance.get(name) for name in ("device", "threads")}
            rows.append({**row, **images, **beside, "seconds_an_image": evaluation.metrics.get("seconds_an_image")})
        rows += [] if measured else [row]
    return rows
