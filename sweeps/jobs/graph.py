"""A study as a graph of jobs, and a job read back from its file."""

import os
from collections.abc import Sequence
from pathlib import Path

from sweeps.costs import size_costs
from sweeps.jobs.base import Job, JobRecord, StudyPlace
from sweeps.jobs.evaluation import EvaluationJob, ReferenceJob, evaluation_jobs, reference_jobs
from sweeps.jobs.preparation import ExecutionJob, TokenizerJob, TokensJob
from sweeps.jobs.training import BranchJob, TrunkJob
from sweeps.study import Study
from varscale.config.yaml import validate
from varscale.errors import ExperimentError
from varscale.evaluation.plan import FidelityPlan
from varscale.store.layout import KINDS, RunFiles, Store, TokenFiles
from varscale.store.records import why_unusable
from varscale.training.cells import Cell, Trunk


def study_jobs(study: Study, missing: Sequence[Cell]) -> list[Job]:
    """The graph of what a study's missing cells and evaluations need; jobs that are done are left out."""
    experiment, place = study.experiment, StudyPlace.of(study)
    evaluations = evaluation_jobs(study)
    if not missing:
        before = TokenizerJob(experiment, place)
        needed: list[Job] = [before, *reference_jobs(evaluations), *evaluations] if evaluations else []
        return [job for job in needed if not job.done()]
    jobs: list[Job] = [
        TokenizerJob(experiment, place),
        TokensJob(experiment, place, study.train_images),
        ExecutionJob(experiment, place, tuple((size.trunk, size.all_images) for size in size_costs(study.cells))),
        *(TrunkJob(size.trunk.experiment, place, size.trunk, size.milestones) for size in size_costs(missing)),
        *(BranchJob(cell.trunk.experiment, place, cell) for cell in missing),
        *reference_jobs(evaluations),
        *evaluations,
    ]
    return [job for job in jobs if not job.done()]


def single_jobs(study: Study) -> list[Job]:
    """The graph of a study's one cell, trained from start to end without trunk and branch."""
    (cell,) = study.cells
    experiment, place = study.experiment, StudyPlace.of(study)
    jobs: list[Job] = [
        TokenizerJob(experiment, place),
        TokensJob(experiment, place, study.train_images),
        ExecutionJob(experiment, place, ((cell.trunk, cell.images),)),
        BranchJob(cell.trunk.experiment, place, cell, from_trunk=False),
    ]
    return [job for job in jobs if not job.done()]


def read_job(path: Path) -> Job:
    """The job in a file; it works in the runs folder that the file lies in, which may be a copy, or have moved.

    Raises:
        ExperimentError: There is no such file, or it is none that this version of varscale can run.
    """
    try:
        record = JobRecord.load(path)
    except (OSError, ValueError) as error:
        problem = f"{path}: no job that can be read ({why_unusable(error)})"
        raise ExperimentError(f"{problem}; a run's folder has its job.json") from None
    for real in (os.path.abspath, os.path.realpath):  # a runs folder may hold links, and a link may lead into one
        kind = Path(real(path)).parent.parent
        if kind.name in (*KINDS, "studies"):
            record = record.model_copy(update={"runs": str(kind.parent)})
            break
    return job_of(record, path)


def read_cell_job(folder: Path) -> BranchJob:
    """The job of the cell in a folder.

    Raises:
        ExperimentError: It is no cell's folder.
    """
    job = read_job(folder / "job.json")
    if not isinstance(job, BranchJob):
        raise ExperimentError(f"{folder}: not a cell's folder; only cells draw images")
    return job


def job_of(record: JobRecord, path: Path) -> Job:
    """The job that a record describes; errors name the file that it came from."""
    experiment = validate(record.experiment, str(path))
    store = Store(Path(record.runs))
    place = StudyPlace(
        store,
        store.study(experiment.name),
        RunFiles(store.runs / "tokenizers" / record.tokenizer),
        TokenFiles(store.runs / "tokens" / record.tokens),
    )
    trunk = Trunk(experiment, record.depth, record.seed, record.smallest_budget, record.variant)
    match record.job:
        case "tokenizer":
            return TokenizerJob(experiment, place)
        case "tokens":
            return TokensJob(experiment, place, record.train_images)
        case "execution":
            sizes = ((Trunk(experiment, depth, seed, least), images) for depth, seed, least, images in record.sizes)
            return ExecutionJob(experiment, place, tuple(sizes))
        case "trunk":
            return TrunkJob(experiment, place, trunk, tuple(record.milestones))
        case "branch":
            return BranchJob(experiment, place, trunk.cell(record.budget), record.from_trunk)
        case "reference" | "evaluation":
            plan = FidelityPlan.of(experiment)
            if plan is None:
                raise ExperimentError(f"{path}: experiment.evaluation.fidelity: missing; expected what is measured")
            if record.job == "reference":
                return ReferenceJob(experiment, place, plan)
            cell = trunk.cell(record.budget) if record.subject == "cell" else None
            return EvaluationJob(experiment, place, plan, record.subject, cell)
