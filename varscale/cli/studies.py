"""Verbs about a whole study: its sweep, plan, state and dashboard."""

import subprocess
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from varscale.cli.laws import fit_sweep, print_paths
from varscale.cli.options import (
    DEFAULT_RUNS,
    Depths,
    ExperimentName,
    Overrides,
    RunsDir,
    TrackingUri,
    Workers,
    load,
    tracking_store,
)
from varscale.config import Experiment
from varscale.store.layout import ExperimentFiles


def sweep(
    experiment: ExperimentName,
    depths: Depths = None,
    workers: Workers = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    set_: Overrides = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train the grid (what is finished is not trained again), then fit the laws."""
    settings = load(experiment, set_, depths, workers)
    if dry_run:
        _print_plan(settings, runs_dir)
        return
    from rich.console import Console

    from sweeps.orchestrator import run_sweep
    from sweeps.view import SweepView
    from varscale.tracking import Forwarder

    files = ExperimentFiles(runs_dir, settings.name)
    console = Console()
    forwarder = Forwarder(tracking_store(tracking_uri, files), files, notify=partial(console.print, markup=False))
    outcome = run_sweep(settings, files, SweepView(console), forwarder)
    try:
        for title, reason in outcome.failed.items():
            console.print(f"failed: {title}: {reason}", style="red", markup=False, highlight=False)
        forwarder.finish(outcome.record, "FAILED" if outcome.failed else "FINISHED")
        if not outcome.rows:
            raise typer.Exit(1)
        written = fit_sweep(outcome.rows, outcome.failed, settings.name, files)
        if written is None:
            console.print("nothing is new: the laws stand")
        else:
            forwarder.attach(outcome.record, [written.laws_json, written.report_html, *written.figures])
    finally:
        forwarder.stop()
    print_paths(files.laws / "laws.json", files.laws / "report.html")
    if outcome.failed:
        raise typer.Exit(1)


def plan(
    experiment: ExperimentName, depths: Depths = None, set_: Overrides = None, runs_dir: RunsDir = DEFAULT_RUNS
) -> None:
    """Show the cells: parameters, FLOPs, steps, memory, and hours where the machine was measured."""
    _print_plan(load(experiment, set_, depths), runs_dir)


def status(
    experiment: ExperimentName, depths: Depths = None, set_: Overrides = None, runs_dir: RunsDir = DEFAULT_RUNS
) -> None:
    """Show each cell's state, and where its log is."""
    from rich.console import Console

    from sweeps.status import status_table

    settings = load(experiment, set_, depths)
    console, table = Console(), status_table(settings, ExperimentFiles(runs_dir, settings.name))
    # paths stay whole, to be copied: a narrow terminal wraps the lines
    console.width = max(console.width, console.measure(table, options=console.options.update_width(1000)).maximum)
    console.print(table)


def dashboard(
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 5000,
    order_by: Annotated[Literal["loss", "train_flops"], typer.Option(help="What runs are sorted by.")] = "loss",
    runs_dir: RunsDir = DEFAULT_RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Deliver what MLflow has not got yet, then serve its dashboard on loopback."""
    from varscale.tracking import dashboard_command, dashboard_environment, dashboard_url, deliver_all

    uri = tracking_store(tracking_uri, ExperimentFiles(runs_dir, ""))
    if deliver_all(runs_dir, uri, notify=typer.echo).problem:
        raise typer.Exit(1)  # the reason was printed
    typer.echo(dashboard_url(uri, port, order_by))
    command = dashboard_command(uri, port)
    if command:  # a tracking server is its own dashboard
        raise typer.Exit(subprocess.call(command, env=dashboard_environment()))


def _print_plan(experiment: Experiment, runs_dir: Path) -> None:
    from rich.console import Console

    from sweeps.status import plan_table

    Console().print(plan_table(experiment, ExperimentFiles(runs_dir, experiment.name)))
