"""A site: what of a Slurm cluster a person states once, in a file of their own, and no experiment knows."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from sweeps.devices import GPUS
from varscale.config.explain import explain_section, nearest
from varscale.config.section import Name, NonNegative, Positive, Real, Section, Whole
from varscale.config.text import read_yaml_file
from varscale.errors import ExperimentError

Option = str | int | float | bool


class Site(Section):
    """How jobs are submitted to one cluster."""

    partition: Name | None = None
    """Partition; None: the cluster's default. So with the next three."""
    account: Name | None = None
    """Account that is charged."""
    qos: Name | None = None
    """Quality of service."""
    constraint: Name | None = None
    """Features that nodes must have."""
    gpus: Annotated[Whole, Field(ge=0, le=1)] = 0
    """GPUs of a task; 0 on a cluster of processors. A run has as many tasks as `resources` says."""
    cpus: Annotated[Whole, Field(ge=1, le=4096)] = 4
    """Processors of a task, and the threads that its runs use."""
    memory_gb: Positive | None = None
    """Memory of a task; None: the cluster's default."""
    device: Name | None = None
    """The GPU by `varscale plan`'s name (h100, …), from which time limits and packing follow; None: from what was
    trained in the runs folder, where anything was."""
    hours: Positive | None = None
    """Time limit of a job, which saves there and is continued; None: ten minutes, and twice what the plan says."""
    at_once: Annotated[Whole, Field(ge=1, le=100_000)] | None = None
    """Jobs that run at the same time at most; None: as many as the cluster lets."""
    pack_minutes: NonNegative = 30.0
    """Runs that take less together share a job, one after another in one process."""
    signal_seconds: Annotated[Whole, Field(ge=1, le=3600)] = 90
    """How long before its time limit a job is asked to save."""
    poll_seconds: Annotated[Real, Field(gt=0, le=3600)] = 15.0
    """Time between looks at the queue."""
    grace_seconds: NonNegative = 30.0
    """How long a job may be gone from the queue before its result must be seen on a slow file system."""
    setup: Annotated[tuple[str, ...], Field(max_length=1000)] = ()
    """Shell lines before a job starts, such as `module load cuda`."""
    prefix: str = ""
    """What stands before Python in a job's command, such as a container's `apptainer exec --nv image.sif`."""
    sbatch: dict[Name, Option] = Field(default_factory=dict)
    """Further options of sbatch by their long names, such as reservation: maintenance."""


def load_site(name_or_file: str | None) -> Site:
    """The site of that name in the user's file; of a file, its only one; `FILE:NAME`: the file's of that name.

    Without a name it is the file's only one, or the one called `default`.

    Raises:
        ExperimentError: No such file or name, or settings that are wrong; the error names file and key.
    """
    file, name = user_file(), name_or_file
    if name_or_file is not None and (name_or_file.partition(":")[0].endswith((".yaml", ".yml"))):
        path, _, rest = name_or_file.partition(":")
        file, name = Path(path), rest or None
    sites = _read(file)
    if name is None:
        name = next(iter(sites)) if len(sites) == 1 else "default"
    if name not in sites:
        known = ", ".join(map(str, sites)) or "none"
        raise ExperimentError(f"--site: {file} has no site {name!r}{nearest(name, list(sites))}; it has {known}")
    try:
        site = Site.model_validate(sites[name])
    except ValidationError as error:
        raise ExperimentError(explain_section(error, Site, f"{file}: {name}")) from None
    if site.device is not None and site.device not in GPUS:
        raise ExperimentError(f"{file}: {name}: device: {site.device}: unknown; expected one of {', '.join(GPUS)}")
    return site


def user_file() -> Path:
    """Where a person's sites are."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path(os.environ.get("HOME", "/")) / ".config"
    return Path(home) / "varscale" / "sites.yaml"


def _read(file: Path) -> Mapping[str, Any]:
    if not file.exists():
        raise ExperimentError(
            f"--launcher slurm: no file {file}; write one that names partition, account and time of your cluster "
            "(docs/cluster.md), or name another by --site FILE"
        )
    sites = read_yaml_file(file)
    if not isinstance(sites, dict) or not all(isinstance(site, dict) for site in sites.values()) or not sites:
        raise ExperimentError(f"{file}: expected a section for each site, such as mycluster: with partition: gpu in it")
    return {str(name): site for name, site in sites.items()}
