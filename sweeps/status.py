"""Tables of a study: what it would cost, and how far it is."""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.table import Table

from sweeps.decided import decided
from sweeps.pace import Pace
from sweeps.plan import Plan
from varscale.config import Experiment
from varscale.store.fingerprint import stored_numerics
from varscale.store.layout import ExperimentFiles, RunFiles, read_json
from varscale.training.cells import Cell, grid_cells


def plan_table(experiment: Experiment, files: ExperimentFiles) -> Table:
    """Each cell's parameters, FLOPs, steps and memory, and its hours where the machine's speed is known from runs.

    Raises:
        ExperimentError: cells that are too short.
    """
    pace, measured = _pace(files)
    cells = grid_cells(experiment)
    table = Table(
        title=f"{experiment.name}: {len(cells)} cells", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for column in ("model", "width", "params", "FLOPs", "steps", "images", "GiB", "hours"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    table.caption = "GiB of a whole step in float32; a device with less takes a step in parts (runtime.micro_batch)"
    if not measured:
        table.caption += "; hours follow once a size of this study was trained here"
    elif not {cell.trunk.flops_per_image for cell in cells} <= measured:
        table.caption += "; ~ hours of sizes that were not trained yet"
    for cell in cells:
        shape, batch = cell.trunk.shape, cell.trunk.batch_size
        hours = cell.images * pace.seconds(cell.trunk.flops_per_image) / 3600
        mark = "" if cell.trunk.flops_per_image in measured else "~"
        table.add_row(
            cell.trunk.name,
            f"{shape.width}",
            f"{shape.parameters():.3g}" if shape.parameters() >= 1e7 else f"{shape.parameters():,}",
            f"{cell.budget_flops:.3g}",
            f"{cell.steps:,}",
            f"{cell.images:,}",
            f"{shape.step_bytes(batch) / 2**30:.2g}",
            f"{mark}{hours:.2g}" if measured else "",
        )
    return table


def status_table(experiment: Experiment, files: ExperimentFiles) -> Table:
    """Each cell's state, loss and log."""
    title = f"{experiment.name} in {files.root}"
    table = Table("cell", "state", "loss", "log", title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    plan = _known_plan(experiment, files)
    for cell in grid_cells(experiment):
        if plan is None:
            table.add_row(cell.name, "not begun", "", "")
            continue
        run = plan.cell_files(cell)
        result = run.read_result()
        loss = f"{result['metrics']['loss']:.4f}" if result and "loss" in result.get("metrics", {}) else ""
        log = run.log if run.log.exists() else plan.trunk_files(cell.trunk).log
        table.add_row(cell.name, _state(plan, cell), loss, str(log) if log.exists() else "")
    return table


class Results(NamedTuple):
    """What `fit-laws` fits of a study."""

    rows: list[dict[str, Any]]
    """The runs table."""
    missing: list[str]
    """Cells of its sweeps that have no result."""
    others: int
    """Other cells of the study that ended."""


def study_results(files: ExperimentFiles) -> Results:
    """The results of the latest sweep and of all others of its recipe.

    Losses of different tokenizers or validation images don't compare, and a law of two recipes is a law of neither.
    Cells that a sweep took from another belong to it, under its own budgets. Without a sweep, all cells of the latest
    tokenizer.
    """
    ended = {run.folder: result for run in files.all_runs("cells") if (result := _with_row(run)) is not None}
    records = [record for path in files.sweep_records() if (record := read_json(path)) is not None]
    if not records:
        newest = max(ended.values(), key=_time, default={})
        rows = [result["row"] for result in ended.values() if result["row"]["tokenizer"] == newest["row"]["tokenizer"]]
        return Results(rows, [], len(ended) - len(rows))
    latest = max(records, key=_time)
    labels: dict[str, dict[str, Any]] = {}
    for record in sorted((record for record in records if _recipe(record) == _recipe(latest)), key=_time):
        labels |= {run: record.get("labels", {}).get(run, {}) for run in record["runs"] if "/cells/" in run}
    results = {run: _with_row(RunFiles(files.runs / run)) for run in sorted(labels)}
    rows = [
        {**result["row"], "experiment": files.experiment, **labels[run]}
        for run, result in results.items()
        if result is not None
    ]
    prints = {result["fingerprint"] for result in results.values() if result is not None}
    # begun here, a cell may have been finished by another study
    missing = [Path(run).name for run, result in results.items() if result is None and run.split("-")[-1] not in prints]
    return Results(rows, missing, len(ended.keys() - {files.runs / run for run in labels}))


def _with_row(run: RunFiles) -> dict[str, Any] | None:
    result = run.read_result()
    return result if result is not None and "row" in result else None


def _time(ended: dict[str, Any]) -> float:
    """When a sweep or a run ended, or else began."""
    return float(ended.get("ended") or ended.get("time") or ended.get("created") or 0)


def _recipe(record: dict[str, Any]) -> tuple[str | None, str | None]:
    return record.get("params", {}).get("tokenizer"), record.get("params", {}).get("recipe")


def _known_plan(experiment: Experiment, files: ExperimentFiles) -> Plan | None:
    """The plan, if the study's numerics are decided."""
    from varscale.data.sources.of_experiment import data_identity
    from varscale.errors import DataError

    cells = grid_cells(experiment)
    try:
        known = decided(experiment, files, cells, data_identity(experiment.data))
    except DataError:
        if stored_numerics(files) is not None:
            raise
        return None  # nothing was begun, and what others have finished can't be told
    return None if known.numerics is None else Plan(experiment, files, cells, known.tokens, known.numerics)


def _state(plan: Plan, cell: Cell) -> str:
    run = plan.cell_files(cell)
    if plan.finished(cell):
        return str((run.read_result() or {})["status"])
    if run.identity.exists():
        return "in its branch"
    if plan.has_checkpoint(cell):
        return "ready to branch"
    return "in its trunk" if plan.trunk_files(cell.trunk).identity.exists() else "not begun"


def _pace(files: ExperimentFiles) -> tuple[Pace, set[int]]:
    """How long an image took at each size that was trained, from metrics files; and the sizes, FLOPs an image."""
    pace, measured = Pace(), set()
    for run in files.all_runs("trunks"):
        identity = read_json(run.identity)
        if identity is None or not run.metrics.exists():
            continue
        rates = [point["images_per_second"] for point in _points(run.metrics) if "images_per_second" in point]
        if rates:
            size = int(identity["params"]["flops_per_image"])
            pace.add(size, 1, 1 / statistics.median(rates))
            measured.add(size)
    return pace, measured


def _points(path: Path) -> list[dict[str, float]]:
    points = []
    for line in path.read_bytes().splitlines():
        try:
            points.append(json.loads(line)["metrics"])
        except (ValueError, KeyError, TypeError):  # torn by a crash
            continue
    return points
