"""What carries out a sweep: worker processes here, or a Slurm cluster as a person's site file describes it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from varscale.cli.options import open_store
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from sweeps.executors.base import Executor
    from sweeps.executors.slurm.executor import SlurmExecutor
    from sweeps.executors.slurm.site import Site
    from sweeps.study import Study
    from varscale.config import Experiment


@dataclass
class Launch:
    """How one call of `varscale sweep` has its runs carried out."""

    site: "Site | None" = None
    """The cluster's; None: here."""
    site_name: str | None = None
    campaign: str = ""
    detach: bool = False
    _slurm: "SlurmExecutor | None" = None

    @classmethod
    def of(cls, launcher: Literal["local", "slurm"], site: str | None, campaign: str, *, detach: bool) -> "Launch":
        """As the options say.

        Raises:
            ExperimentError: They don't go together, or there is no such site.
        """
        if launcher == "local":
            if site is not None or detach:
                option = "--detach" if detach else "--site"
                raise ExperimentError(f"{option}: only for a cluster; add --launcher slurm")
            return cls()
        from sweeps.executors.slurm.site import load_site

        return cls(load_site(site), site, campaign, detach)

    @property
    def device(self) -> str:
        """What runs are on, as `varscale plan` calls it."""
        return self.site.device or "this" if self.site is not None else "this"

    def check(self) -> None:
        """Raise `ExperimentError` where Slurm would take no job of the site."""
        if self.site is not None:
            from sweeps.executors.slurm.queue import check_site

            check_site(self.site, Path.cwd())

    def executor(self, study: "Study") -> "Executor":
        """What runs the study.

        Raises:
            ExperimentError: This machine can't hold the study or get it done in a year, a size doesn't fit into the
                memory of the site's device, or the site's time limit holds no step.
        """
        if self.site is None:
            from sweeps.executors.local import LocalExecutor
            from sweeps.feasible import check_machine
            from varscale.numerics.machine import MachineShares

            shares = MachineShares.of(study.experiment.runtime)
            check_machine(study, shares, study.missing)
            return LocalExecutor(shares)
        self._slurm = _slurm_executor(study, self.site, self.campaign, detach=self.detach)
        return self._slurm

    def write_scripts(self, settings: "Experiment", runs_dir: str) -> None:
        """Write the scripts that would be submitted, and name them; nothing where Slurm isn't asked for."""
        if self.site is None:
            return
        from sweeps.grid import grid_cells
        from sweeps.jobs.graph import study_jobs
        from sweeps.study import Study

        store = open_store(runs_dir)
        study = Study.of(settings, store, grid_cells(settings))
        executor = _slurm_executor(study, self.site, "", detach=False)
        for path in executor.write_scripts(study_jobs(study, study.missing), study.files.slurm / "dry-run"):
            typer.echo(path)

    def forwarder(self, tracking_uri: str) -> "Silent | None":
        """What delivers nothing, on a compute node with an SQLite store; None: deliver as always."""
        return Silent() if self.campaign and tracking_uri.startswith("sqlite") else None

    def call_again(self, arguments: Sequence[str], tracking_uri: str | None) -> None:
        """Let Slurm call the command again at the end. The tracking URI, which may hold a password, is not written."""
        if self._slurm is None:
            return
        if tracking_uri is not None:
            os.environ["MLFLOW_TRACKING_URI"] = tracking_uri  # sbatch hands the environment on
        command = ["sweep", *arguments, "--launcher", "slurm", "--detach", "--campaign", self._slurm.campaign]
        command += ["--site", self.site_name] if self.site_name is not None else []
        slurm_job = self._slurm.call_again(command)
        if slurm_job is not None:
            typer.echo(f"Slurm job {slurm_job} will fit the laws when they have ended")


class Silent:
    """Stands for a forwarder where nothing may be delivered; `varscale sync`, or the dashboard, does so later."""

    def start(self) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


def _slurm_executor(study: "Study", site: "Site", campaign: str, *, detach: bool) -> "SlurmExecutor":
    from sweeps.devices import planned_device
    from sweeps.executors.slurm.executor import SlurmExecutor
    from sweeps.grid import unfit_sizes
    from sweeps.jobs.graph import study_jobs

    device = planned_device(study.experiment, study.store, site.device or "this", None)
    trunks = (cell.trunk for cell in study.missing)
    if site.device is not None and (unfit := unfit_sizes(trunks, device.memory_bytes)):
        raise ExperimentError(f"{unfit} on {device.title}: leave them out, or name another site")
    executor = SlurmExecutor(study.files.slurm, site, device, campaign=campaign, detach=detach)
    executor.check_times(study_jobs(study, study.missing))
    return executor
