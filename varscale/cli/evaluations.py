"""The verb that measures the images of cells that are trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from varscale.cli.options import (
    RUNS,
    ClassifierName,
    ClassifierWeights,
    GuidanceSchedules,
    Overrides,
    RunsDir,
    load,
    open_store,
    patient_view,
)
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from sweeps.jobs.evaluation import EvaluationJob
    from varscale.config import Experiment

_SHOWN = ("fid", "fid_low", "fid_high", "kid", "mind", "image_precision", "image_recall")
_OF_WHAT_WAS_ASKED = ("class_agreement", "text_agreement", "text_retrieval")
_OF_REJECTION = ("keep_rate", "class_probability", "class_probability_of_all")


def evaluate(
    what: Annotated[str, typer.Argument(metavar="EXPERIMENT|CELL", help="An experiment, or a finished cell's folder.")],
    samples: Annotated[int | None, typer.Option(help="Images drawn of each cell, 100 or more.")] = None,
    extractor: Annotated[str | None, typer.Option(help="What makes features, such as inception-v3-compat.")] = None,
    weights: Annotated[Path | None, typer.Option(help="File of the extractor's weights.")] = None,
    guidance: Annotated[
        str | None,
        typer.Option(help="Classifier-free guidance at the last scale; several, such as 0,1.5,3, are measured each."),
    ] = None,
    guidance_schedule: GuidanceSchedules | None = None,
    candidates: Annotated[
        int | None, typer.Option(help="Also keep 1 of so many drawn images by a classifier (rejection sampling).")
    ] = None,
    classifier: ClassifierName = None,
    classifier_weights: ClassifierWeights = None,
    cells: Annotated[
        Literal["all", "best"], typer.Option(help="Of an experiment: all, or those of the lowest loss at each budget.")
    ] = "all",
    set_: Overrides = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Measure images of finished cells against real ones: FID, KID, MIND, precision, recall. Trains nothing."""
    if candidates is not None and candidates < 2:
        raise ExperimentError(f"--candidates {candidates}: expected 2 or more, of which 1 is kept")
    if candidates is None and (classifier or classifier_weights):
        raise ExperimentError("--classifier: has nothing to choose; say by --candidates 4, say, among how many images")
    given = {
        "samples": samples,
        "extractor": extractor,
        "weights": weights and str(weights),
        "guidance": None if guidance is None else _numbers("--guidance", guidance),
        "guidance_schedule": guidance_schedule,
        "candidates": candidates and [1, candidates],  # without and with rejection, side by side
        "classifier": classifier,
        "classifier_weights": classifier_weights and str(classifier_weights),
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if (Path(what) / "job.json").is_file():
        if set_ or cells != "all":
            raise ExperimentError(f"{'--set' if set_ else '--cells'}: only for an experiment, and {what} is a cell")
        jobs = _of_cell(Path(what), changes)
    else:
        jobs = _of_experiment(what, changes, set_, runs_dir, best=cells == "best")
    failed = _run([job for job in jobs if not job.done()])
    _print(jobs)
    for title, reason in failed.items():
        typer.echo(f"failed: {title}: {reason}", err=True)
    if failed:
        raise typer.Exit(1)


def _of_cell(folder: Path, changes: dict[str, Any]) -> "list[EvaluationJob]":
    from sweeps.jobs.evaluation import cell_evaluations
    from sweeps.jobs.graph import read_cell_job
    from varscale.evaluation.plan import FidelityPlan
    from varscale.store.layout import RunFiles
    from varscale.store.records import read_result

    job = read_cell_job(folder)
    result = read_result(RunFiles(folder.resolve()))
    if result is None:
        raise ExperimentError(f"{folder}: this cell is not finished; `varscale status` shows how far it is")
    if result.status == "diverged":
        raise ExperimentError(f"{folder}: this cell diverged: it has no weights to draw images from")
    plan = FidelityPlan.of(_with_fidelity(job.experiment, changes, str(folder)))
    assert plan is not None
    job.place.store.check()
    return cell_evaluations(job.place, plan, [job.cell])


def _of_experiment(
    what: str, changes: dict[str, Any], overrides: list[str] | None, runs_dir: str, *, best: bool
) -> "list[EvaluationJob]":
    """Those of the finished cells of an experiment's study, or of the best of these, and of its floors."""
    from sweeps.grid import grid_cells
    from sweeps.jobs.evaluation import evaluation_jobs
    from sweeps.study import Study

    asked = load(what, overrides)
    experiment = _with_fidelity(asked, changes, what)
    study = Study.of(experiment, open_store(runs_dir), grid_cells(experiment))
    unfinished = study.missing
    if len(unfinished) == len(study.cells):
        raise ExperimentError(f"{what}: none of its cells is finished; `varscale sweep` trains them")
    if best and unfinished:
        typer.echo(f"{len(unfinished)} cells are not finished; the best of the others are measured", err=True)
    if study.files.record.exists() and experiment == asked and not overrides:
        study.record(None)  # from now on these evaluations come first in its table
    chosen = study.best_cells() if best else [cell for cell in study.cells if cell not in unfinished]
    jobs = evaluation_jobs(study, all_of_them=True)
    return [job for job in jobs if job.cell is None or job.cell in chosen]


def _numbers(option: str, text: str) -> list[float]:
    """Numbers of an option such as 0,1.5,3."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ExperimentError(f"{option} {text[:100]!r}: expected numbers from 0 up, such as 0,1.5,3") from None


def _with_fidelity(experiment: "Experiment", changes: dict[str, Any], what: str) -> "Experiment":
    """The experiment with `evaluation.fidelity`, of default values where it has none."""
    from varscale.config.yaml import changed

    own = experiment.evaluation.fidelity
    settings = {**(own.model_dump(mode="json") if own else {}), **changes}
    return changed(experiment, {"evaluation.fidelity": settings}, what)


def _run(jobs: "list[EvaluationJob]") -> dict[str, str]:
    """Run jobs in worker processes; titles of those that failed, and why."""
    from sweeps.executors.local import LocalExecutor
    from sweeps.feasible import check_evaluations
    from sweeps.jobs.evaluation import reference_jobs
    from varscale.numerics.machine import MachineShares

    if not jobs:
        return {}
    shares = MachineShares.of(jobs[0].experiment.runtime)
    drawn = [(job.cell, guidance) for job in jobs if job.cell for guidance in job.plan.settings.drawings]
    check_evaluations(jobs[0].experiment, drawn, shares)
    with LocalExecutor(shares) as executor:
        graph = executor.run([*reference_jobs(jobs), *jobs], patient_view())
    return {job.title: reason for job, reason in graph.failed}


def _print(jobs: "list[EvaluationJob]") -> None:
    """A table of what was measured, and below it each result's file."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from varscale.store.records import read_result

    results = [(job, result) for job in jobs if (result := read_result(job.files)) is not None]
    places: dict[tuple[str, float], int] = {}  # without and with rejection one below the other
    for job, _ in results:
        places.setdefault(_images(job), len(places))
    shown = [*_SHOWN, *(name for name in _OF_WHAT_WAS_ASKED if any(name in result.metrics for _, result in results))]
    shown += _OF_REJECTION if any(job.plan.candidates > 1 for job, _ in results) else ()
    table = Table("images", "guidance", *shown, box=SIMPLE, padding=(0, 1, 0, 0))
    for job, result in sorted(results, key=lambda each: places[_images(each[0])]):
        guidance = f"{job.plan.guidance:g}" if job.cell else ""
        figures = (f"{result.metrics[name]:.4g}" if name in result.metrics else "" for name in shown)
        table.add_row(job.cell.title if job.cell else job.subject, guidance, *figures)
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update_width(1000)).maximum)
    console.print(table)
    for job, _ in results:
        typer.echo(job.files.result)


def _images(job: "EvaluationJob") -> tuple[str, float]:
    return (job.cell.label, job.plan.guidance) if job.cell else (job.subject, 0.0)
