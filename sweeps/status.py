"""How far a study is, as a table."""

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from sweeps.executors.slurm.records import last_jobs
from sweeps.grid import grid_cells
from sweeps.study import Study
from varscale.config import Experiment
from varscale.errors import DataError
from varscale.store.layout import Store
from varscale.store.records import read_result
from varscale.training.cells import Cell


def status_table(experiment: Experiment, store: Store) -> Table:
    """Each cell's state, loss and log."""
    cells = grid_cells(experiment)
    files = store.study(experiment.name)
    title = f"{experiment.name} in {files.folder}"
    slurm_jobs = last_jobs(files.slurm)
    columns = ("cell", "state", "loss", *(("Slurm job",) if slurm_jobs else ()), "log")
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    try:
        study = Study.of(experiment, store, cells)
    except DataError:
        if files.record.exists():
            raise
        for cell in cells:  # nothing was begun, and what other studies have finished can't be told
            table.add_row(cell.label, "not begun", "", "")
        return table
    for cell in cells:
        run = study.cell_files(cell)
        result = read_result(run)
        loss = f"{result.metrics['loss']:.4f}" if result is not None and "loss" in result.metrics else ""
        log = run.log if run.log.exists() else study.trunk_files(cell.trunk).log
        state = _state(study, cell) if result is None else result.status
        keys = [f"trunk {cell.trunk.label}", cell.label]
        if run.identity.exists():
            keys.reverse()
        slurm = (next((slurm_jobs[key] for key in keys if key in slurm_jobs), ""),) if slurm_jobs else ()
        texts = (cell.label, state, loss, *slurm, str(log) if log.exists() else "")
        table.add_row(*map(Text, texts))  # as they are: markup would be looked for in each, which takes longest
    return table


def _state(study: Study, cell: Cell) -> str:
    if study.cell_files(cell).identity.exists():
        return "in its branch"
    if study.has_branch_point(cell):
        return "ready to branch"
    return "in its trunk" if study.trunk_files(cell.trunk).identity.exists() else "not begun"
