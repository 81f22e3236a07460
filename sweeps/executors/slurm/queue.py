"""Slurm's commands, and submitit's executor for one array: the only place that starts any of them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

from submitit import SlurmExecutor as Submitit
from submitit.core.utils import FailedJobError

from sweeps.executors.local import changed_environment
from sweeps.executors.slurm.site import Site
from varscale.config.section import RunResources
from varscale.errors import ExperimentError, SweepError

_TIMEOUT_SECONDS = 120
_COMMENT = "varscale:"


@dataclass(frozen=True)
class Submission:
    """What one array is submitted with."""

    folder: Path
    name: str
    minutes: int
    dependency: str = ""
    run: RunResources = field(default_factory=RunResources)
    """Its devices and nodes; a task each."""
    light: bool = False
    """Whether it needs no GPU."""


def queue_of(slurm: Path) -> dict[tuple[str, int], str]:
    """What Slurm has of a study: (array's folder, element) → its job's id.

    Raises:
        SweepError: Slurm doesn't answer.
    """
    found: dict[tuple[str, int], str] = {}
    for line in _run("squeue", "--noheader", "--me", "--array", "--format=%i|%k").splitlines():
        slurm_job, _, comment = line.strip().partition("|")
        folder = Path(comment.removeprefix(_COMMENT))
        if comment.startswith(_COMMENT) and folder.parent == slurm.absolute():
            index = int(slurm_job.partition("_")[2] or 0)
            found[folder.name, index] = slurm_job
    return found


def submit(calls: Sequence[Any], submission: Submission, site: Site) -> list[str]:
    """Hand an array to Slurm: one element a call; Slurm's ids of the elements.

    Raises:
        SweepError: Slurm refuses it.
    """
    executor = _submitit(submission, site)
    with _without_allocation():
        try:
            if len(calls) == 1:
                return [executor.submit(calls[0]).job_id]
            with executor.batch():
                jobs = [executor.submit(call) for call in calls]
            return [job.job_id for job in jobs]
        except (FailedJobError, subprocess.CalledProcessError, OSError) as error:
            raise SweepError(f"sbatch: {_one_line(error)}") from None


def script(calls: int, submission: Submission, site: Site) -> str:
    """The script that would be handed to Slurm."""
    executor = _submitit(submission, site)
    if calls > 1:
        executor.parameters["map_count"] = calls
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def check_site(site: Site, folder: Path) -> None:
    """Ask Slurm whether it would take a job of this site, without giving it one.

    Raises:
        ExperimentError: There is no Slurm here, or it would not: an unknown partition, account, option, …
    """
    for command in ("sbatch", "srun", "squeue"):
        if which(command) is None:
            raise ExperimentError(f"--launcher slurm: {command} is not installed here; call it on a login node")
    text = script(1, Submission(folder, "varscale", 1), site)
    with _without_allocation():
        tried = subprocess.run(
            ["sbatch", "--test-only"], input=text, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    if tried.returncode:
        lines = [line for line in tried.stderr.splitlines() if line.strip()]
        reason = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in lines[:2])
        raise ExperimentError(f"--site: Slurm would not take a job: {reason}{_known_partitions(reason)}")


def _known_partitions(reason: str) -> str:
    if "partition" not in reason:
        return ""
    names = _run("sinfo", "--noheader", "--format=%R").split()
    return f"; its partitions are {', '.join(dict.fromkeys(names))}"


def _submitit(submission: Submission, site: Site) -> Submitit:
    python = sys.executable if not site.prefix else f"{site.prefix} {sys.executable}"
    run = submission.run
    executor = Submitit(submission.folder, max_num_timeout=1000, python=python)
    wanted: dict[str, Any] = {
        "job_name": submission.name,
        "comment": f"{_COMMENT}{submission.folder.absolute()}",
        "time": submission.minutes,
        "nodes": run.nodes,
        "ntasks_per_node": run.devices,
        "cpus_per_task": site.cpus,
        "gpus_per_node": None if submission.light else site.gpus * run.devices or None,
        "mem": None if site.memory_gb is None else f"{round(site.memory_gb * 1024) * run.devices}M",
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "dependency": submission.dependency or None,
        "setup": list(site.setup) or None,
        "signal_delay_s": site.signal_seconds,
        "array_parallelism": site.at_once or 100_000,
        "stderr_to_stdout": True,
        "srun_args": [
            f"--cpus-per-task={site.cpus}",  # since 22.05 srun doesn't take it from sbatch
            *(["--kill-on-bad-exit=1"] if run.processes > 1 else []),  # the others would wait for it
        ],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **site.sbatch},
    }
    executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None}, wckey=None)
    return executor


def _without_allocation() -> AbstractContextManager[None]:
    """A job submitted from within a job, or an interactive shell, must not take over that one's sizes."""
    inherited = (name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_")))
    return changed_environment({name: None for name in inherited if name != "SLURM_CONF"})


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SweepError(f"{command[0]}: {_one_line(error)}") from None
    return done.stdout


def _one_line(error: Exception) -> str:
    told = getattr(error, "stderr", None) or str(error)
    return " ".join(str(told).split())[:300]
