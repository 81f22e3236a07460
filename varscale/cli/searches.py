"""The verb that searches hyperparameters."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from varscale.cli.launchers import Launch
from varscale.cli.options import (
    RUNS,
    ExperimentName,
    Launcher,
    Overrides,
    RunsDir,
    SiteName,
    TrackingUri,
    load,
    open_store,
    tracking_store,
)
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from sweeps.orchestrator import Deliverer, Outcome
    from sweeps.study import Study

TRIALS = 40
"""In all, unless said otherwise."""
SLURM_PARALLEL = 8
"""Trials at once on a cluster, unless said otherwise."""


def tune(
    experiment: ExperimentName,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials in all, with those of earlier calls; default: 40.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Trials at once; default: one a GPU, or one a processor.")
    ] = None,
    launcher: Launcher = "local",
    site: SiteName = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Optuna's storage; default: a journal in the runs folder.")
    ] = None,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Instead: whether a rate of a small size serves large ones.")
    ] = False,
    set_: Overrides = None,
    runs_dir: RunsDir = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Search for better hyperparameters with Optuna, at equal compute, then see whether the best beat the default.

    With --transfer try the same rates at several sizes, as the experiment's search.transfer says.
    """
    if transfer and trials is not None:
        raise typer.BadParameter(
            "--trials: --transfer tries the rates, sizes and seeds of search.transfer, all of them"
        )
    if transfer and parallel is not None and launcher == "slurm":
        raise typer.BadParameter(
            "--parallel: --transfer gives Slurm all runs of a size; at_once of the site says how many go at once"
        )
    from rich.console import Console

    from sweeps.orchestrator import Orchestrator
    from sweeps.searches.plan import SearchPlan
    from sweeps.searches.transfer import TransferPlan

    settings = load(experiment, set_, None, parallel if launcher == "local" else None, "--parallel")
    launch = Launch.of(launcher, site, "", detach=False)
    plan = TransferPlan(settings) if transfer else SearchPlan(settings)
    plan.check()
    launch.check()
    from sweeps.searches.report import write_report
    from sweeps.searches.search import Search
    from sweeps.searches.storage import open_search
    from sweeps.searches.transfer import TransferRun
    from sweeps.searches.transfer_report import write_transfer
    from sweeps.view import SearchView
    from varscale.numerics.machine import MachineShares
    from varscale.tracking import Forwarder

    store, console = open_store(runs_dir), Console()
    say = partial(console.print, markup=False, highlight=False)
    at_once = parallel or (SLURM_PARALLEL if launcher == "slurm" else MachineShares.of(settings.runtime).workers)
    forwarder = Forwarder(tracking_store(tracking_uri, store), store, plan.name, notify=say)
    delivering, said = _KeptOpen(forwarder), set[str]()
    files = store.search(plan.name if transfer else settings.name)
    with open_search(plan, files, storage) as optuna_study:

        def sweep(study: "Study") -> "Outcome":
            return Orchestrator(study, SearchView(console, said), delivering).sweep(lambda: launch.executor(study))

        try:
            if isinstance(plan, TransferPlan):
                run = TransferRun(plan, store, optuna_study, sweep, say)
                run.run()
            else:
                search = Search(plan, store, optuna_study, sweep, say)
                search.run(trials or TRIALS, at_once)
                confirmation = search.confirm()
        finally:
            forwarder.stop()
        if isinstance(plan, SearchPlan) and not search.ended:
            raise ExperimentError("no trial ended")
        lines = write_transfer(run, files) if transfer else write_report(search, files, experiment, confirmation)
        for line in lines:
            say(line)
    if not transfer and search.best is not None:
        typer.echo(files.best)
    typer.echo(files.report)


class _KeptOpen:
    """Delivers from the first sweep on; the search ends it, not each of its sweeps."""

    def __init__(self, deliverer: "Deliverer") -> None:
        self._deliverer, self._started = deliverer, False

    def start(self) -> None:
        """Begin, once."""
        if not self._started:
            self._deliverer.start()
            self._started = True

    def stop(self) -> None:
        """Not yet."""
