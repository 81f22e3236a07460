"""The verb that measures the images of cells that are trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varscale.cli.options import RUNS, Overrides, RunsDir, load, open_store
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from sweeps.jobs.evaluation import EvaluationJob
    from varscale.config import Experiment

_SHOWN = ("fid", "fid_low", "fid_high", "kid", "mind", "image_precision", "image_recall")


def evaluate(
    what: Annotated[str, typer.Argument(metavar="EXPERIMENT|CELL", help="An experiment, or a finished cell's folder.")],
    samples: Annotated[int | None, typer.Option(min=100, help="Images drawn of each cell.")] = None,
    extractor: Annotated[str | None, typer.Option(help="What makes features, such as inception-v3-compat.")] = None,
    weights: Annotated[Path | None, typer.Option(help="File of the extractor's weights.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance at the last scale.")] = None,
    set_: Overrides = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Measure images of finished cells against real ones: FID, KID, MIND, precision, recall. Trains nothing."""
    given = {"samples": samples, "extractor": extractor, "weights": weights and str(weights), "guidance": guidance}
    changes = {name: value for name, value in given.items() if value is not None}
    jobs = _jobs(what, changes, set_, runs_dir)
    failed = _run([job for job in jobs if not job.done()])
    _print(jobs)
    for title, reason in failed.items():
        typer.echo(f"failed: {title}: {reason}", err=True)
    if failed:
        raise typer.Exit(1)


def _jobs(what: str, changes: dict[str, Any], overrides: list[str] | None, runs_dir: str) -> "list[EvaluationJob]":
    """Those of a cell, or of all finished cells of an experiment's study and of its floors."""
    from sweeps.grid import grid_cells
    from sweeps.jobs.evaluation import EvaluationJob, evaluation_jobs
    from sweeps.jobs.graph import read_job
    from sweeps.jobs.training import BranchJob
    from sweeps.study import Study
    from varscale.evaluation.plan import FidelityPlan

    folder = Path(what)
    if (folder / "job.json").is_file():
        if overrides:
            raise ExperimentError(f"--set: {what} is a cell, whose settings stand; --samples and the like say how")
        job = read_job(folder / "job.json")
        if not isinstance(job, BranchJob):
            raise ExperimentError(f"{what}: not a cell's folder; only cells draw images")
        if not job.done():
            raise ExperimentError(f"{what}: this cell is not finished; `varscale status` shows how far it is")
        experiment = _with_fidelity(job.experiment, changes, what)
        plan = FidelityPlan.of(experiment)
        assert plan is not None
        return [EvaluationJob(experiment, job.place, plan, "cell", job.cell)]
    settings = [f"evaluation.fidelity.{name}={value}" for name, value in changes.items()]
    asked = load(what, [*(overrides or ()), *settings])
    experiment = _with_fidelity(asked, {}, what)
    study = Study.of(experiment, open_store(runs_dir), grid_cells(experiment))
    unfinished = {cell.title for cell in study.missing}
    if len(unfinished) == len(study.cells):
        raise ExperimentError(f"{what}: none of its cells is finished; `varscale sweep` trains them")
    if study.files.record.exists() and experiment == asked and not (changes or overrides):
        study.record(None)  # from now on its table has the figures
    jobs = evaluation_jobs(study, all_of_them=True)
    return [job for job in jobs if job.cell is None or job.cell.title not in unfinished]


def _with_fidelity(experiment: "Experiment", changes: dict[str, Any], what: str) -> "Experiment":
    """The experiment with `evaluation.fidelity`, of default values where it has none."""
    from varscale.config.yaml import changed

    own = experiment.evaluation.fidelity
    settings = {**(own.model_dump(mode="json") if own else {}), **changes}
    return changed(experiment, {"evaluation.fidelity": settings}, what)


def _run(jobs: "list[EvaluationJob]") -> dict[str, str]:
    """Run jobs in worker processes; titles of those that failed, and why."""
    from rich.console import Console

    from sweeps.executors.local import LocalExecutor
    from sweeps.view import SweepView
    from varscale.numerics.machine import MachineShares

    if not jobs:
        return {}
    executor = LocalExecutor(MachineShares.of(jobs[0].experiment.runtime))
    try:
        graph = executor.run(jobs, SweepView(Console(stderr=True), patient=True))
    finally:
        executor.stop()
    return {job.title: reason for job, reason in graph.failed}


def _print(jobs: "list[EvaluationJob]") -> None:
    """A table of what was measured, and below it each result's file."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from varscale.store.records import read_result

    results = [(job, result) for job in jobs if (result := read_result(job.files)) is not None]
    table = Table("images", *_SHOWN, box=SIMPLE, padding=(0, 1, 0, 0))
    for job, result in results:
        table.add_row(job.title, *(f"{result.metrics[name]:.4g}" if name in result.metrics else "" for name in _SHOWN))
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update_width(1000)).maximum)
    console.print(table)
    for job, _ in results:
        typer.echo(job.files.result)
