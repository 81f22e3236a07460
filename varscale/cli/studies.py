"""Verbs about a whole study: its sweep, plan, state and dashboard."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from varscale.cli.launchers import Launch
from varscale.cli.laws import fit_sweep
from varscale.cli.options import (
    RUNS,
    Depths,
    ExperimentName,
    Launcher,
    Overrides,
    RunsDir,
    SiteName,
    TrackingUri,
    Workers,
    load_parts,
    members_of,
    open_store,
    tracking_store,
)
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from rich.console import Console

    from sweeps.orchestrator import Outcome
    from varscale.config import Experiment
    from varscale.store.layout import Store, StudyFiles


def sweep(
    experiment: ExperimentName,
    depths: Depths = None,
    workers: Workers = None,
    launcher: Launcher = "local",
    site: SiteName = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit to Slurm, whose last job fits the laws.")] = False,
    campaign: Annotated[str, typer.Option(hidden=True)] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, write the scripts for Slurm, and stop.")
    ] = False,
    set_: Overrides = None,
    runs_dir: RunsDir = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train the grid (what is finished is not trained again), then fit the laws; members of a file are compared."""
    launch = Launch.of(launcher, site, campaign, detach=detach)
    launch.check()
    parts = load_parts(experiment, set_, depths, workers)
    if dry_run:
        store = open_store(runs_dir, writing=False)
        for settings in parts.values():
            _print_plan(settings, store, launch.device)
            launch.write_scripts(settings, runs_dir)
        return
    from rich.console import Console

    from sweeps.members import check_comparable, members_table
    from varscale.config.yaml import name_of

    check_comparable(list(parts.values()))
    store, console = open_store(runs_dir), Console()
    uri, joint, left, failed = tracking_store(tracking_uri, store), experiment not in parts, 0, []
    options = ["--runs-dir", runs_dir, *(() if depths is None else ("--depths", depths))]
    options += [word for override in set_ or () for word in ("--set", override)]
    for part, settings in parts.items():
        if joint:
            console.print(part, style="bold", highlight=False)
        with _swept(settings, launch, (store, uri), console) as outcome:
            left += outcome.left
            failed += [f"{part}: {title}" if joint else title for title in outcome.failed]
            if outcome.left:
                launch.call_again([part, *options], tracking_uri)
                console.print(f"{outcome.left} runs are with Slurm; varscale status {part} shows how far they are")
            elif not joint:
                _fit(outcome.rows, failed, store.study(settings.name), console)
    if joint and left:
        console.print(f"when they have ended, varscale fit-laws {experiment} compares the members")
    elif joint:
        _fit(members_table(store, members_of(experiment)).rows, failed, store.study(name_of(experiment)), console)
    if failed and not left:
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
    for settings in load_parts(experiment, set_, depths, workers).values():
        store = open_store(runs_dir, writing=False)
        _print_plan(settings, store, device, utilisation, calibrate=calibrate, cells=cells)


def status(experiment: ExperimentName, depths: Depths = None, set_: Overrides = None, runs_dir: RunsDir = RUNS) -> None:
    """Show each cell's state, and where its log is."""
    from rich.console import Console

    from sweeps.status import status_table

    console, store = Console(), open_store(runs_dir, writing=False)
    # paths stay whole, to be copied: a narrow terminal wraps the lines
    console.width = 1000
    for settings in load_parts(experiment, set_, depths).values():
        console.print(status_table(settings, store))


def dashboard(
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 5000,
    order_by: Annotated[Literal["loss", "train_flops"], typer.Option(help="What runs are sorted by.")] = "loss",
    runs_dir: RunsDir = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Deliver what MLflow has not got yet, then serve its dashboard on loopback."""
    from varscale.tracking import check_port, dashboard_url, deliver_all, serve_dashboard
    from varscale.tracking.uris import is_server

    store = open_store(runs_dir)
    uri = tracking_store(tracking_uri, store)
    if not is_server(uri):  # which has a dashboard of its own, elsewhere
        if not store.runs.is_dir():
            raise ExperimentError(f"--runs-dir {store.runs}: no such folder, so there is nothing to show")
        check_port(port)
    if not deliver_all(store, uri, notify=typer.echo).answers:
        raise typer.Exit(1)  # the reason was printed; what MLflow refuses of a study doesn't shut the others' dashboard
    typer.echo(dashboard_url(uri, port, order_by))
    raise typer.Exit(serve_dashboard(uri, port))


def sync(runs_dir: RunsDir = RUNS, tracking_uri: TrackingUri = None) -> None:
    """Deliver what MLflow has not got yet, of all studies; to a new store everything."""
    from varscale.tracking import deliver_all

    store = open_store(runs_dir)
    if not store.runs.is_dir():
        raise ExperimentError(f"--runs-dir {store.runs}: no such folder, so there is nothing to deliver")
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


@contextmanager
def _swept(
    settings: "Experiment", launch: Launch, delivery: "tuple[Store, str]", console: "Console"
) -> "Iterator[Outcome]":
    """The outcome of a study's sweep; what is delivered to MLflow meanwhile is whole afterwards."""
    from sweeps.grid import grid_cells
    from sweeps.orchestrator import Orchestrator
    from sweeps.study import Study
    from sweeps.view import SweepView
    from varscale.tracking import Forwarder

    store, uri = delivery
    notify = partial(console.print, markup=False)
    forwarder = launch.forwarder(uri) or Forwarder(uri, store, settings.name, notify=notify)
    study = Study.of(settings, store, grid_cells(settings))
    outcome = Orchestrator(study, SweepView(console), forwarder).sweep(lambda: launch.executor(study))
    try:
        for title, reason in outcome.failed.items():
            console.print(f"failed: {title}: {reason}", style="red", markup=False, highlight=False)
        yield outcome
    finally:
        forwarder.stop()


def _fit(rows: list[dict[str, Any]], failed: list[str], files: "StudyFiles", console: "Console") -> None:
    """Fit a sweep's laws, and print where they are."""
    if not rows:
        raise typer.Exit(1)
    if fit_sweep(rows, failed, files) is None:
        console.print("nothing is new: the laws stand")
    typer.echo(f"{files.laws / 'laws.json'}\n{files.laws / 'report.html'}")
