"""Tables of a study: what it would cost, and how far it is."""

import statistics

from rich.box import SIMPLE
from rich.table import Table

from sweeps.grid import grid_cells
from sweeps.pace import Pace
from sweeps.study import Study
from varscale.config import Experiment
from varscale.errors import DataError
from varscale.store.curves import read_curve
from varscale.store.layout import Store
from varscale.store.records import RunIdentity
from varscale.tokenizer.shape import TokenizerShape
from varscale.training.cells import Cell


def plan_table(experiment: Experiment, store: Store) -> Table:
    """Parameters, FLOPs, steps and memory of the tokenizer and of each cell; hours where runs told the machine's speed.

    Raises:
        ExperimentError: Cells that are too short.
    """
    pace, measured = _pace(store)
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
    tokenizer, training = experiment.tokenizer, experiment.tokenizer.training
    if tokenizer.checkpoint is None:
        shape = TokenizerShape(tokenizer.architecture)
        flops = f"{shape.training_flops() * training.total_images:.3g}"
        counts = f"{training.steps:,}", f"{training.total_images:,}"
        gib = f"{shape.step_bytes(training.batch_size) / 2**30:.2g}"
        table.add_row("tokenizer", "", _count(shape.parameters()), flops, *counts, gib, "")
    for cell in cells:
        model, batch = cell.trunk.model, cell.trunk.batch_size
        hours = cell.images * pace.seconds(cell.trunk.flops_per_image) / 3600
        mark = "" if cell.trunk.flops_per_image in measured else "~"
        table.add_row(
            cell.trunk.label,
            f"{model.columns().get('width', '')}",
            _count(model.parameters()),
            f"{cell.budget_flops:.3g}",
            f"{cell.steps:,}",
            f"{cell.images:,}",
            f"{model.step_bytes(batch) / 2**30:.2g}",
            f"{mark}{hours:.2g}" if measured else "",
        )
    return table


def status_table(experiment: Experiment, store: Store) -> Table:
    """Each cell's state, loss and log."""
    cells = grid_cells(experiment)
    files = store.study(experiment.name)
    title = f"{experiment.name} in {files.folder}"
    table = Table("cell", "state", "loss", "log", title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    try:
        study = Study.of(experiment, store, cells)
    except DataError:
        if files.record.exists():
            raise
        for cell in cells:  # nothing was begun, and what other studies have finished can't be told
            table.add_row(cell.label, "not begun", "", "")
        return table
    for cell in cells:
        result, run = study.result(cell), study.cell_files(cell)
        loss = f"{result.metrics['loss']:.4f}" if result is not None and "loss" in result.metrics else ""
        log = run.log if run.log.exists() else study.trunk_files(cell.trunk).log
        state = _state(study, cell) if result is None else result.status
        table.add_row(cell.label, state, loss, str(log) if log.exists() else "")
    return table


def _count(parameters: int) -> str:
    return f"{parameters:.3g}" if parameters >= 1e7 else f"{parameters:,}"


def _state(study: Study, cell: Cell) -> str:
    if study.cell_files(cell).identity.exists():
        return "in its branch"
    if study.has_branch_point(cell):
        return "ready to branch"
    return "in its trunk" if study.trunk_files(cell.trunk).identity.exists() else "not begun"


def _pace(store: Store) -> tuple[Pace, set[int]]:
    """How long an image took at each size that was trained, from metrics files; and the sizes, FLOPs an image."""
    pace, measured = Pace(), set()
    for run in store.begun("trunks"):
        identity = RunIdentity.read(run.identity)
        size = identity.params.get("flops_per_image") if identity is not None else None
        rates = [rate for point in read_curve(run.metrics) if (rate := point.metrics.get("images_per_second", 0)) > 0]
        if rates and isinstance(size, int | float) and size > 0:
            pace.add(int(size), 1, 1 / statistics.median(rates))
            measured.add(int(size))
    return pace, measured
