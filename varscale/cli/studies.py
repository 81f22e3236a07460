"""Verbs about a whole study: its sweep, plan, state and dashboard."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from varscale.cli.launchers import Launch
from varscale.cli.laws import fit_sweep
from varscale.cli.options import (
    RUNS,
    Depths,
    ExperimentName,
    Overrides,
    RunsDir,
    TrackingUri,
    Workers,
    load,
    open_store,
    tracking_store,
)

if TYPE_CHECKING:
    from varscale.config import Experiment
    from varscale.store.layout import Store


def sweep(
    experiment: ExperimentName,
    depths: Depths = None,
    workers: Workers = None,
    launcher: Annotated[Literal["local", "slurm"], typer.Option(help="What carries the runs out.")] = "local",
    site: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE[:NAME]", help="Of Slurm: a site of ~/.config/varscale/sites.yaml, or a file."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit to Slurm, whose last job fits the laws.")] = False,
    campaign: Annotated[str, typer.Option(hidden=True)] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, write the scripts for Slurm, and stop.")
    ] = False,
    set_: Overrides = None,
    runs_dir: RunsDir = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train the grid (what is finished is not trained again), then fit the laws."""
    settings = load(experiment, set_, depths, workers)
    launch = Launch.of(launcher, site, campaign, detach=detach)
    launch.check()
    if dry_run:
        _print_plan(settings, open_store(runs_dir, writing=False), launch.device)
        launch.write_scripts(settings, runs_dir)
        return
    from rich.console import Console

    from sweeps.grid import grid_cells
    from sweeps.orchestrator import Orchestrator
    from sweeps.study import Study
    from sweeps.view import SweepView
    from varscale.tracking import Forwarder

    store = open_store(runs_dir)
    console = Console()
    uri = tracking_store(tracking_uri, store)
    forwarder = launch.forwarder(uri) or Forwarder(
        uri, store, settings.name, notify=partial(console.print, markup=False)
    )
    study = Study.of(settings, store, grid_cells(settings))
    outcome = Orchestrator(study, SweepView(console), forwarder).sweep(lambda: launch.executor(study))
    try:
        if outcome.left:
            launch.call_again(experiment, depths, set_ or (), runs_dir, tracking_uri)
            console.print(f"{outcome.left} runs are with Slurm; varscale status {experiment} shows how far they are")
            return
        for title, reason in outcome.failed.items():
            console.print(f"failed: {title}: {reason}", style="red", markup=False, highlight=False)
        if not outcome.rows:
            raise typer.Exit(1)
        if fit_sweep(outcome.rows, outcome.failed, study.files) is None:
            console.print("nothing is new: the laws stand")
    finally:
        forwarder.stop()
    typer.echo(f"{study.files.laws / 'laws.json'}\n{study.files.laws / 'report.html'}")
    if outcome.failed:
        raise typer.Exit(1)


def plan(
    experiment: ExperimentName,
    depths: Depths = None,
    device: Annotated[
        str, typer.Option(help="What it would run on: h100, h200, a100, 4090, or this machine.")
    ] = "this",
    workers: Workers = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure a few steps of each size here.")] = False,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of a named GPU's peak that is reached; default: 0.3.")
    ] = None,
    cells: Annotated[bool, typer.Option("--cells", help="A line a cell instead of a line a size.")] = False,
    set_: Overrides = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Show what the study costs: parameters, FLOPs, images, memory, hours and disk, before anything runs."""
    from sweeps.devices import check_device

    check_device(device, utilisation, calibrate=calibrate)
    settings = load(experiment, set_, depths, workers)
    _print_plan(settings, open_store(runs_dir, writing=False), device, utilisation, calibrate=calibrate, cells=cells)


def status(experiment: ExperimentName, depths: Depths = None, set_: Overrides = None, runs_dir: RunsDir = RUNS) -> None:
    """Show each cell's state, and where its log is."""
    from rich.console import Console

    from sweeps.status import status_table

    settings = load(experiment, set_, depths)
    console, table = Console(), status_table(settings, open_store(runs_dir, writing=False))
    # paths stay whole, to be copied: a narrow terminal wraps the lines
    console.width = 1000
    console.print(table)


def dashboard(
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 5000,
    order_by: Annotated[Literal["loss", "train_flops"], typer.Option(help="What runs are sorted by.")] = "loss",
    runs_dir: RunsDir = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Deliver what MLflow has not got yet, then serve its dashboard on loopback."""
    from varscale.tracking import check_port, dashboard_url, deliver_all, serve_dashboard

    check_port(port)
    store = open_store(runs_dir)
    uri = tracking_store(tracking_uri, store)
    if not deliver_all(store, uri, notify=typer.echo).answers:
        raise typer.Exit(1)  # the reason was printed; what MLflow refuses of a study doesn't shut the others' dashboard
    typer.echo(dashboard_url(uri, port, order_by))
    raise typer.Exit(serve_dashboard(uri, port))


def sync(runs_dir: RunsDir = RUNS, tracking_uri: TrackingUri = None) -> None:
    """Deliver what MLflow has not got yet, of all studies; to a new store everything."""
    from varscale.tracking import deliver_all

    store = open_store(runs_dir)
    state = deliver_all(store, tracking_store(tracking_uri, store), notify=typer.echo)
    if state.problem or state.pending:
        raise typer.Exit(1)  # the reason was printed
    typer.echo("MLflow has everything")


def _print_plan(
    experiment: "Experiment",
    store: "Store",
    device: str = "this",
    utilisation: float | None = None,
    *,
    calibrate: bool = False,
    cells: bool = False,
) -> None:
    from rich.console import Console

    from sweeps.devices import planned_device, this_machine
    from sweeps.grid import grid_cells
    from sweeps.plan import plan_of, print_cells, print_plan

    planned = grid_cells(experiment)
    if calibrate:
        from sweeps.calibration import calibrate as measure

        on = this_machine(experiment.runtime, measure(experiment, planned, store, Console(stderr=True)))
    else:
        on = planned_device(experiment, store, device, utilisation)
    (print_cells if cells else print_plan)(plan_of(experiment, store, planned, on), Console())
