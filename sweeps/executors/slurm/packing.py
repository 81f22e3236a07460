"""Which jobs of a graph share a job of Slurm, and how long it takes. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sweeps.costs import Work, encoding_work, fidelity_work, tokenizer_work, training_work, validation_work
from sweeps.devices import Device
from sweeps.jobs.base import Job
from sweeps.jobs.evaluation import EvaluationJob, ReferenceJob
from sweeps.jobs.preparation import ExecutionJob, TokenizerJob, TokensJob
from sweeps.jobs.training import BranchJob, TrunkJob
from varscale.config.section import RunResources

Seconds = Callable[[Job], float | None]


@dataclass(frozen=True)
class Pack:
    """Jobs that share a job of Slurm, one after another in one process."""

    name: str
    """What it is, short: as squeue shows it."""
    jobs: tuple[Job, ...]

    @property
    def run(self) -> RunResources:
        """What its runs take; what comes before and after them takes one device."""
        runs = (job.resources.run for job in self.jobs if isinstance(job, TrunkJob | BranchJob))
        return next(runs, RunResources())

    def needs(self) -> set[str]:
        """Keys of the jobs of other packs that these start from."""
        return {key for job in self.jobs for key in job.needs} - {job.key for job in self.jobs}


def packed(jobs: Sequence[Job], seconds: Seconds, pack_seconds: float, at_once: int | None) -> list[Pack]:
    """Divide a graph among jobs of Slurm.

    What comes before all models is one pack. A trunk is one with its branches, and these with their evaluations, where
    all together take no longer than `pack_seconds`; several such sizes share one, if they take the same resources.
    Otherwise the trunk is alone, and its branches fill packs. A size whose branches could not run side by side without
    exceeding `at_once` is one pack.

    Args:
        jobs: The graph.
        seconds: How long a job takes; None: nothing is known of it.
        pack_seconds: Of a pack of several runs, at most.
        at_once: Packs that may run at the same time; None: any number.
    """
    before = tuple(job for job in jobs if isinstance(job, TokenizerJob | TokensJob | ExecutionJob | ReferenceJob))
    loose = tuple(job for job in jobs if isinstance(job, EvaluationJob) and job.cell is None)
    sizes: dict[str, list[Job]] = {}
    for job in jobs:
        if (label := _size(job)) is not None:
            sizes.setdefault(label, []).append(job)
    packs = [Pack("preparation", before)] if before else []
    if loose:
        packs.append(Pack("floors", loose))
    lanes = len(sizes) + bool(loose)
    branches_at_once = None if at_once is None else max(1, at_once // max(1, lanes))
    short: dict[RunResources, list[tuple[str, tuple[Job, ...]]]] = {}
    for label, own in sizes.items():
        total = _total(own, seconds)
        if total is not None and total <= pack_seconds:
            short.setdefault(Pack(label, tuple(own)).run, []).append((label, tuple(own)))
        elif at_once is not None and lanes > at_once:
            packs.append(Pack(label, tuple(own)))
        else:
            packs += _size_packs(label, own, seconds, pack_seconds, branches_at_once)
    for sizes_of_a_kind in short.values():
        weighed = [(label, own, _total(own, seconds) or 0.0) for label, own in sizes_of_a_kind]
        for filled in _filled(weighed, pack_seconds):
            name = together([label for label, _ in filled])
            packs.append(Pack(name, tuple(job for _, own in filled for job in own)))
    return packs


def job_seconds(job: Job, device: Device) -> float | None:
    """How long a job takes on a device; None where nothing is known."""
    estimate = device.seconds(_work(job))
    return None if estimate is None else estimate.seconds / job.resources.run.processes


def together(names: Sequence[str]) -> str:
    """A short name for several, such as d12-s0 +2."""
    return names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}"


def _size_packs(label: str, jobs: Sequence[Job], seconds: Seconds, pack_seconds: float, most: int | None) -> list[Pack]:
    """A trunk, and its branches, each with its evaluations."""
    packs = [Pack(label, (job,)) for job in jobs if isinstance(job, TrunkJob)]
    cells: dict[str, list[Job]] = {}
    for job in jobs:
        if isinstance(job, BranchJob | EvaluationJob) and job.cell is not None:
            cells.setdefault(job.cell.label, []).append(job)
    weighed = []
    for cell, own in cells.items():
        total = _total(own, seconds)
        weighed.append((cell, tuple(own), math.inf if total is None else total))
    filled = _filled(weighed, pack_seconds)
    if most is not None and len(filled) > most:  # round and round, so that all have some of the long ones
        filled = [[pair for group in filled[start::most] for pair in group] for start in range(most)]
    return [
        *packs,
        *(
            Pack(together([cell for cell, _ in group]), tuple(job for _, own in group for job in own))
            for group in filled
        ),
    ]


def _filled(
    weighed: Sequence[tuple[str, tuple[Job, ...], float]], most: float
) -> list[list[tuple[str, tuple[Job, ...]]]]:
    """Neighbours together, as long as they don't take more than `most`."""
    groups: list[list[tuple[str, tuple[Job, ...]]]] = []
    total = 0.0
    for name, jobs, seconds in weighed:
        if not groups or total + seconds > most:
            groups.append([])
            total = 0.0
        groups[-1].append((name, jobs))
        total += seconds
    return groups


def _size(job: Job) -> str | None:
    if isinstance(job, TrunkJob):
        return job.trunk.label
    if isinstance(job, BranchJob):
        return job.cell.trunk.label
    if isinstance(job, EvaluationJob) and job.cell is not None:
        trunk = job.cell.trunk
        return trunk.label if trunk.resources.processes == 1 else f"{trunk.label} images"  # drawn by one device
    return None


def _total(jobs: Sequence[Job], seconds: Seconds) -> float | None:
    found = [seconds(job) for job in jobs]
    return None if None in found else sum(each for each in found if each is not None)


def _work(job: Job) -> tuple[Work, ...]:
    match job:
        case TokenizerJob():
            return tokenizer_work(job.experiment)
        case TokensJob():
            return encoding_work(job.experiment, job.train_images * job.experiment.data.views)
        case TrunkJob():
            return (training_work(job.trunk, job.milestones[-1]),)
        case BranchJob():
            first, last = job.images
            validation = validation_work([job.cell], job.experiment.data.validation_images or 0)
            return (training_work(job.cell.trunk, last - first), *validation)
        case EvaluationJob(cell=None):
            return tuple(fidelity_work(job.experiment, [], floors=True))
        case EvaluationJob(cell=cell) if cell is not None:
            drawn = [(cell, guidance) for guidance in job.plan.settings.drawings]
            return tuple(fidelity_work(job.experiment, drawn, floors=False))
    return ()
